// Quantized products on one CPU core, for any vector instruction set. A .cpp per instruction set defines `Vector` and
// includes this file inside its target region; everything here then has internal linkage.
//
// How codes meet activations without a transpose: one vector holds `lanes` consecutive *units* of a packed row (a unit
// is 8 elements in 3 bytes, 4 elements in a word, ...: format.h), one unit per 32-bit lane. Shifting all lanes by the
// same amount brings the j-th element of every unit to the bottom:
//
//     lane      0          1          2        ...                      x is packed once per call in the same order:
//     unit   e0..e7     e8..e15    e16..e23                             block = [j][lane]
//     j = 0    e0         e8         e16       -> value, times  x[j=0]: x0  x8  x16 ...
//     j = 1    e1         e9         e17       -> value, times  x[j=1]: x1  x9  x17 ...
//
// so decoding costs a shift and a look-up (or a mask and a conversion) per vector in every bit width, and lanes of one
// unit share one scale. The order of summation along K is free, so nothing is ever put back in order.
//
//   streamed  1 to 4 rows of x: each weight is read and decoded once, in registers; time is that of reading the weights
//   tiled     more rows: a panel of weights is decoded into the cache once, then multiplied tile by tile
//   plain     untransposed weights: the lanes run along N, x is broadcast

namespace {

using namespace quantization_mlx;
using namespace quantization_mlx::cpu;

using F = Vector::F;
using I = Vector::I;

constexpr int lanes = Vector::lanes;

#define ALWAYS_INLINE inline __attribute__((always_inline))

template <int count, typename Function>
ALWAYS_INLINE void unrolled(Function&& function) {
  [&]<int... index>(std::integer_sequence<int, index...>) __attribute__((always_inline)) {
    (function(std::integral_constant<int, index>()), ...);
  }(std::make_integer_sequence<int, count>());
}

constexpr int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// --- Elements: how a vector of units decodes ------------------------------------------------------------------------

template <int width>
struct AffineElement {
  static constexpr int bits = width;
  // Five-bit units have 40 bits: `high` is the unit from its second byte on.
  struct Units {
    I low;
    I high;
  };
  static ALWAYS_INLINE Units load(const uint8_t* codes) {
    if constexpr (bits == 5) {
      return {Vector::load_units<5, 0>(codes), Vector::load_units<5, 1>(codes)};
    } else {
      return {Vector::load_units<unit_bytes(bits), 0>(codes), I()};
    }
  }
  template <int j>
  static ALWAYS_INLINE F value(const Units& units) {
    if constexpr (j * bits + bits > 32) {
      return Vector::unsigned_code<bits, j * bits - 8>(units.high);
    } else {
      return Vector::unsigned_code<bits, j * bits>(units.low);
    }
  }
};

struct E2M1Element {
  static constexpr int bits = 4;
  using Units = I;
  static ALWAYS_INLINE Units load(const uint8_t* codes) { return Vector::load_units<4, 0>(codes); }
  template <int j>
  static ALWAYS_INLINE F value(Units units) {
    return Vector::e2m1<4 * j>(units);
  }
};

struct E4M3Element {
  static constexpr int bits = 8;
  using Units = I;
  static ALWAYS_INLINE Units load(const uint8_t* codes) { return Vector::load_units<4, 0>(codes); }
  template <int j>
  static ALWAYS_INLINE F value(Units units) {
    return Vector::e4m3<8 * j>(units);
  }
};

template <typename Element>
constexpr int positions = unit_elements(Element::bits);

template <typename Element>
constexpr int block_elements = lanes * positions<Element>;

template <typename Element>
constexpr int block_bytes = lanes * unit_bytes(Element::bits);

// Copies any number of bytes, reading no others; may write up to the next multiple of 64.
ALWAYS_INLINE void copy_bytes(uint8_t* destination, const uint8_t* source, int64_t count) {
  for (; count >= 64; count -= 64, source += 64, destination += 64) {
    std::memcpy(destination, source, 64);
  }
  Vector::copy_below_64(destination, source, count);
}

// The block at `codes`, of which only `available` bytes may be read; what is missing decodes as code 0.
template <typename Element>
ALWAYS_INLINE typename Element::Units load_block(const uint8_t* codes, int64_t available) {
  if (__builtin_expect(available >= block_bytes<Element>, 1)) {
    return Element::load(codes);
  }
  alignas(64) uint8_t padded[round_up(block_bytes<Element>, 64)] = {};
  copy_bytes(padded, codes, available);
  return Element::load(padded);
}

// --- Scales ---------------------------------------------------------------------------------------------------------

constexpr int scale_bytes(ScaleType type) {
  return type == ScaleType::float32 ? 4 : (type == ScaleType::float16 || type == ScaleType::bfloat16 ? 2 : 1);
}

ALWAYS_INLINE F load_scales(ScaleType type, const uint8_t* source) {
  switch (type) {
    case ScaleType::float32: return Vector::load(reinterpret_cast<const float*>(source));
    case ScaleType::float16: return Vector::load_float16(source);
    case ScaleType::bfloat16: return Vector::load_bfloat16(source);
    case ScaleType::e8m0: return Vector::load_e8m0(source);
    case ScaleType::e4m3: return Vector::e4m3<0>(Vector::load_bytes(source));
  }
  __builtin_unreachable();
}

// count scales as float32, then zeros up to a multiple of the lanes.
ALWAYS_INLINE void convert_scales(ScaleType type, const uint8_t* source, int64_t count, float* destination) {
  const int bytes = scale_bytes(type);
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) {
    Vector::store(destination + i, load_scales(type, source + i * bytes));
  }
  if (i < count) {
    alignas(64) uint8_t padded[64] = {};
    copy_bytes(padded, source + i * bytes, (count - i) * bytes);
    Vector::store(destination + i, load_scales(type, padded));
    // Zero bytes are not a zero scale in every type.
    for (int64_t j = count; type == ScaleType::e8m0 && j < i + lanes; ++j) {
      destination[j] = 0.0f;
    }
  }
}

// Scales are converted this many groups at a time, into a buffer on the stack. A multiple of every block.
constexpr int chunk_groups = 64;

struct ScaleBuffer {
  alignas(64) float values[chunk_groups + lanes];
};

// Gives every lane of a block the scale of its group. Lanes per group are a power of two: no division per block.
template <typename Element>
struct Spread {
  int shift;
  I index;

  explicit Spread(int group_size)
      : shift(__builtin_ctz(static_cast<unsigned>(group_size / positions<Element>))),
        index(Vector::lane_groups(shift)) {}

  ALWAYS_INLINE F operator()(const float* scales, int64_t block) const {
    return Vector::lookup(Vector::load(scales + (block * lanes >> shift)), index);
  }
};

// --- Element types of the tiled product ------------------------------------------------------------------------------
// `step` elements make a vector; a pair of decoded vectors is stored in one fixed order, the same for x and w.

struct Float32Tile {
  using Storage = float;
  using Operand = F;
  static constexpr int step = lanes;
  static ALWAYS_INLINE Operand load(const float* source) { return Vector::load(source); }
  static ALWAYS_INLINE F multiply_add(Operand a, Operand b, F sum) { return Vector::fma(a, b, sum); }
  static ALWAYS_INLINE void store(float* destination, F first, F second) {
    Vector::store(destination, first);
    Vector::store(destination + lanes, second);
  }
};

// A template so that it need not compile where V multiplies no bfloat16.
template <typename V>
struct BFloat16Tile {
  using Storage = uint16_t;
  using Operand = typename V::Pairs;
  static constexpr int step = 2 * lanes;
  static ALWAYS_INLINE Operand load(const uint16_t* source) { return V::load_pairs(source); }
  static ALWAYS_INLINE F multiply_add(Operand a, Operand b, F sum) { return V::dot_pairs(a, b, sum); }
  static ALWAYS_INLINE void store(uint16_t* destination, F first, F second) {
    V::store_pairs(destination, first, second);
  }
};

// Calls function(Tile()) with the tile that serves the product.
template <typename V, typename Function>
ALWAYS_INLINE void with_tile(const Product& product, Function&& function) {
  if constexpr (V::has_bfloat16) {
    if (product.bfloat16) {
      return function(BFloat16Tile<V>());
    }
  }
  function(Float32Tile());
}

// --- Packing x ------------------------------------------------------------------------------------------------------

ALWAYS_INLINE F load_real(Real type, const uint8_t* source) {
  switch (type) {
    case Real::float32: return Vector::load(reinterpret_cast<const float*>(source));
    case Real::float16: return Vector::load_float16(source);
    case Real::bfloat16: return Vector::load_bfloat16(source);
  }
  __builtin_unreachable();
}

// A row as float32, then zeros up to a multiple of the lanes.
void widen(Real type, const uint8_t* source, int64_t count, float* destination) {
  const int bytes = type == Real::float32 ? 4 : 2;
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) {
    Vector::store(destination + i, load_real(type, source + i * bytes));
  }
  if (i < count) {
    alignas(64) uint8_t padded[64] = {};
    copy_bytes(padded, source + i * bytes, (count - i) * bytes);
    Vector::store(destination + i, load_real(type, padded));
  }
}

template <int per_unit>
void permute_block(const float* source, float* destination) {
  for (int j = 0; j < per_unit; ++j) {
    for (int lane = 0; lane < lanes; ++lane) {
      destination[j * lanes + lane] = source[lane * per_unit + j];
    }
  }
}

int64_t padded_length(const Product& product) {
  return round_up(product.K, lanes * unit_elements(product.format.bits));
}

int64_t padded_groups(const Product& product) { return round_up(product.K / product.format.group_size, lanes); }

int64_t packed_row(const Product& product, Layout layout) {
  switch (layout) {
    case Layout::streamed: return padded_length(product) + padded_groups(product);
    case Layout::tiled: return product.bfloat16 ? padded_length(product) / 2 : padded_length(product);
    case Layout::plain: return round_up(product.K, lanes);
  }
  __builtin_unreachable();
}

template <typename Tile, int per_unit>
void pack_blocks(const Product& product, const uint8_t* row, Real type, int element_bytes, float* packed) {
  constexpr int block = lanes * per_unit;
  auto* destination = reinterpret_cast<typename Tile::Storage*>(packed);
  for (int64_t k = 0; k < product.K; k += block) {
    alignas(64) float natural[block] = {};
    alignas(64) float permuted[block];
    widen(type, row + k * element_bytes, product.K - k < block ? product.K - k : block, natural);
    permute_block<per_unit>(natural, permuted);
    for (int j = 0; j < per_unit; j += 2) {
      Tile::store(
          destination + k + j * lanes, Vector::load(permuted + j * lanes), Vector::load(permuted + (j + 1) * lanes));
    }
  }
}

template <typename Tile>
void pack_units(const Product& product, const uint8_t* row, Real type, int element_bytes, float* packed) {
  switch (unit_elements(product.format.bits)) {
    case 4: return pack_blocks<Tile, 4>(product, row, type, element_bytes, packed);
    case 8: return pack_blocks<Tile, 8>(product, row, type, element_bytes, packed);
    case 16: return pack_blocks<Tile, 16>(product, row, type, element_bytes, packed);
  }
}

// The sums that a bias multiplies, always in float32.
void sum_groups(const Product& product, const uint8_t* row, Real type, int element_bytes, float* sums) {
  const int group_size = product.format.group_size;
  const int64_t groups = product.K / group_size;
  for (int64_t group = 0; group < groups; ++group) {
    F sum = Vector::zero();
    for (int k = 0; k < group_size; k += lanes) {
      sum = Vector::add(sum, load_real(type, row + (group * group_size + k) * element_bytes));
    }
    sums[group] = Vector::sum(sum);
  }
  for (int64_t group = groups; group < padded_groups(product); ++group) {
    sums[group] = 0.0f;
  }
}

void pack_row(const Product& product, Layout layout, const void* x, Real type, float* packed) {
  const int element_bytes = type == Real::float32 ? 4 : 2;
  const uint8_t* row = static_cast<const uint8_t*>(x);
  switch (layout) {
    case Layout::plain: return widen(type, row, product.K, packed);
    case Layout::tiled:
      return with_tile<Vector>(
          product, [&](auto tile) { pack_units<decltype(tile)>(product, row, type, element_bytes, packed); });
    case Layout::streamed:
      pack_units<Float32Tile>(product, row, type, element_bytes, packed);
      if (product.biases != nullptr) {
        sum_groups(product, row, type, element_bytes, packed + padded_length(product));
      }
  }
}

// --- streamed -------------------------------------------------------------------------------------------------------
// Four columns of the result at a time share each load of x and give four independent chains of additions. With one row
// the sum of a block is scaled; with more, the decoded value is, so that the rows share that product too.

template <typename Element, int ROWS, int COLUMNS>
void streamed_columns(const Product& product, int64_t n, float* y, int64_t y_stride) {
  constexpr int block = block_elements<Element>;
  const int group_size = product.format.group_size;
  const int64_t groups = product.K / group_size;
  const int64_t row_bytes = product.K * Element::bits / 8;
  const int64_t scale_row = groups * scale_bytes(product.scale_type);
  const int64_t x_row = packed_row(product, Layout::streamed);
  const float* sums = product.x + padded_length(product);
  const Spread<Element> spread(group_size);

  F total[ROWS][COLUMNS];
  for (auto& row : total) {
    for (auto& value : row) {
      value = Vector::zero();
    }
  }
  for (int64_t group = 0; group < groups; group += chunk_groups) {
    const int64_t count = groups - group < chunk_groups ? groups - group : chunk_groups;
    ScaleBuffer scales[COLUMNS];
    for (int c = 0; c < COLUMNS; ++c) {
      const int64_t offset = (n + c) * scale_row + group * scale_bytes(product.scale_type);
      if (product.biases != nullptr) {
        convert_scales(product.scale_type, product.biases + offset, count, scales[c].values);
        for (int64_t g = 0; g < count; g += lanes) {
          const F bias = Vector::load(scales[c].values + g);
          for (int m = 0; m < ROWS; ++m) {
            total[m][c] = Vector::fma(bias, Vector::load(sums + m * x_row + group + g), total[m][c]);
          }
        }
      }
      convert_scales(product.scale_type, product.scales + offset, count, scales[c].values);
    }
    const int64_t first = group * group_size;
    const int64_t length = count * group_size;
    for (int64_t k = 0; k < length; k += block) {
      const int64_t byte = (first + k) * Element::bits / 8;
      typename Element::Units units[COLUMNS];
      F scale[COLUMNS];
      for (int c = 0; c < COLUMNS; ++c) {
        units[c] = load_block<Element>(product.words + (n + c) * row_bytes + byte, row_bytes - byte);
        scale[c] = spread(scales[c].values, k / block);
      }
      const float* x = product.x + first + k;
      if constexpr (ROWS == 1) {
        F part[COLUMNS];
        unrolled<positions<Element>>([&](auto j) __attribute__((always_inline)) {
          const F activation = Vector::load(x + j * lanes);
          for (int c = 0; c < COLUMNS; ++c) {
            const F value = Element::template value<j>(units[c]);
            part[c] = j == 0 ? Vector::mul(value, activation) : Vector::fma(value, activation, part[c]);
          }
        });
        for (int c = 0; c < COLUMNS; ++c) {
          total[0][c] = Vector::fma(part[c], scale[c], total[0][c]);
        }
      } else {
        unrolled<positions<Element>>([&](auto j) __attribute__((always_inline)) {
          for (int c = 0; c < COLUMNS; ++c) {
            const F value = Vector::mul(Element::template value<j>(units[c]), scale[c]);
            for (int m = 0; m < ROWS; ++m) {
              total[m][c] = Vector::fma(value, Vector::load(x + m * x_row + j * lanes), total[m][c]);
            }
          }
        });
      }
    }
  }
  for (int m = 0; m < ROWS; ++m) {
    for (int c = 0; c < COLUMNS; ++c) {
      y[m * y_stride + c] = Vector::sum(total[m][c]);
    }
  }
}

template <typename Element, int ROWS>
void streamed_rows(const Product& product, int64_t begin, int64_t end, float* y) {
  constexpr int columns = Vector::registers >= 32 ? 4 : 2;
  int64_t n = begin;
  for (; n + columns <= end; n += columns) {
    streamed_columns<Element, ROWS, columns>(product, n, y + (n - begin), end - begin);
  }
  for (; n < end; ++n) {
    streamed_columns<Element, ROWS, 1>(product, n, y + (n - begin), end - begin);
  }
}

struct Streamed {
  template <typename Element>
  static void run(const Product& product, int64_t begin, int64_t end, float*, float* y) {
    switch (product.rows) {
      case 1: return streamed_rows<Element, 1>(product, begin, end, y);
      case 2: return streamed_rows<Element, 2>(product, begin, end, y);
      case 3: return streamed_rows<Element, 3>(product, begin, end, y);
      case 4: return streamed_rows<Element, 4>(product, begin, end, y);
    }
  }
};

// --- tiled ----------------------------------------------------------------------------------------------------------
// Tiles of x rows by weight columns, both read along K as vectors: each load feeds several multiply-adds, and the lanes
// of a sum are added up once per panel.

constexpr int64_t panel_bytes = 4096;  // of one weight column: the x rows of a tile then stay in the first-level cache
constexpr int tile_rows = Vector::registers >= 32 ? 6 : 3;
constexpr int tile_columns = 4;

template <typename Tile, int ROWS, int COLUMNS>
void multiply_tile(
    const typename Tile::Storage* x,
    int64_t x_row,
    const typename Tile::Storage* w,
    int64_t w_row,
    int64_t length,
    bool accumulate,
    float* y,
    int64_t y_stride) {
  F total[ROWS][COLUMNS];
  for (auto& row : total) {
    for (auto& value : row) {
      value = Vector::zero();
    }
  }
  for (int64_t k = 0; k < length; k += Tile::step) {
    typename Tile::Operand activation[ROWS];
    for (int m = 0; m < ROWS; ++m) {
      activation[m] = Tile::load(x + m * x_row + k);
    }
    for (int c = 0; c < COLUMNS; ++c) {
      const auto weight = Tile::load(w + c * w_row + k);
      for (int m = 0; m < ROWS; ++m) {
        total[m][c] = Tile::multiply_add(activation[m], weight, total[m][c]);
      }
    }
  }
  for (int m = 0; m < ROWS; ++m) {
    for (int c = 0; c < COLUMNS; ++c) {
      float& result = y[m * y_stride + c];
      result = (accumulate ? result : 0.0f) + Vector::sum(total[m][c]);
    }
  }
}

// Decodes elements [first, first + length) of one packed row; length is a multiple of the block or ends the row.
template <typename Element, typename Tile>
void decode_row(
    const Product& product,
    int64_t row,
    int64_t row_elements,
    int64_t first,
    int64_t length,
    typename Tile::Storage* destination) {
  constexpr int block = block_elements<Element>;
  const int group_size = product.format.group_size;
  const int64_t row_bytes = row_elements * Element::bits / 8;
  const int64_t row_scales = row_elements / group_size;
  const int bytes = scale_bytes(product.scale_type);
  const Spread<Element> spread(group_size);
  const int64_t chunk = static_cast<int64_t>(chunk_groups) * group_size;
  for (int64_t start = first; start < first + length; start += chunk) {
    const int64_t group = start / group_size;
    const int64_t end = start + chunk < first + length ? start + chunk : first + length;
    const int64_t count = (end - start + group_size - 1) / group_size;
    ScaleBuffer scales;
    ScaleBuffer biases;
    convert_scales(product.scale_type, product.scales + (row * row_scales + group) * bytes, count, scales.values);
    if (product.biases != nullptr) {
      convert_scales(product.scale_type, product.biases + (row * row_scales + group) * bytes, count, biases.values);
    }
    for (int64_t k = start; k < end; k += block) {
      const int64_t byte = k * Element::bits / 8;
      const auto units = load_block<Element>(product.words + row * row_bytes + byte, row_bytes - byte);
      const F scale = spread(scales.values, (k - start) / block);
      const F bias = product.biases != nullptr ? spread(biases.values, (k - start) / block) : Vector::zero();
      typename Tile::Storage* decoded = destination + (k - first);
      unrolled<positions<Element> / 2>([&](auto pair) __attribute__((always_inline)) {
        const F low = Vector::fma(Element::template value<2 * pair>(units), scale, bias);
        const F high = Vector::fma(Element::template value<2 * pair + 1>(units), scale, bias);
        Tile::store(decoded + 2 * pair * lanes, low, high);
      });
    }
  }
}

template <typename Tile, int ROWS>
void multiply_columns(
    const typename Tile::Storage* x,
    int64_t x_row,
    const typename Tile::Storage* w,
    int64_t w_row,
    int64_t length,
    bool accumulate,
    int64_t columns,
    float* y) {
  int64_t c = 0;
  for (; c + tile_columns <= columns; c += tile_columns) {
    multiply_tile<Tile, ROWS, tile_columns>(x, x_row, w + c * w_row, w_row, length, accumulate, y + c, columns);
  }
  for (; c < columns; ++c) {
    multiply_tile<Tile, ROWS, 1>(x, x_row, w + c * w_row, w_row, length, accumulate, y + c, columns);
  }
}

// multiply_columns for a number of rows known at run time, at most ROWS.
template <typename Tile, int ROWS>
void multiply_rows(
    int64_t rows,
    const typename Tile::Storage* x,
    int64_t x_row,
    const typename Tile::Storage* w,
    int64_t w_row,
    int64_t length,
    bool accumulate,
    int64_t columns,
    float* y) {
  if (rows == ROWS) {
    return multiply_columns<Tile, ROWS>(x, x_row, w, w_row, length, accumulate, columns, y);
  }
  if constexpr (ROWS > 1) {
    multiply_rows<Tile, ROWS - 1>(rows, x, x_row, w, w_row, length, accumulate, columns, y);
  }
}

template <typename Element, typename Tile>
void multiply_panels(const Product& product, int64_t begin, int64_t end, float* workspace, float* y) {
  using Storage = typename Tile::Storage;
  constexpr int64_t panel = panel_bytes / sizeof(Storage);
  Storage* decoded = reinterpret_cast<Storage*>(workspace);
  const Storage* x = reinterpret_cast<const Storage*>(product.x);
  const int64_t x_row = padded_length(product);
  const int64_t columns = end - begin;
  for (int64_t first = 0; first < product.K; first += panel) {
    const int64_t length = product.K - first < panel ? product.K - first : panel;
    const int64_t padded = round_up(length, block_elements<Element>);
    for (int64_t c = 0; c < columns; ++c) {
      decode_row<Element, Tile>(product, begin + c, product.K, first, length, decoded + c * panel);
    }
    // Tiles of even height: 8 rows as 4 + 4 keep more sums in flight than as 6 + 2.
    const int64_t tiles = (product.rows + tile_rows - 1) / tile_rows;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t m = tile * product.rows / tiles;
      const int64_t rows = (tile + 1) * product.rows / tiles - m;
      multiply_rows<Tile, tile_rows>(
          rows, x + m * x_row + first, x_row, decoded, panel, padded, first > 0, columns, y + m * columns);
    }
  }
}

struct Tiled {
  template <typename Element>
  static void run(const Product& product, int64_t begin, int64_t end, float* workspace, float* y) {
    with_tile<Vector>(
        product, [&](auto tile) { multiply_panels<Element, decltype(tile)>(product, begin, end, workspace, y); });
  }
};

// --- plain ----------------------------------------------------------------------------------------------------------
// One block of columns at a time: decode a few rows of w, then add x[m, k] times them to the sums of the block.

constexpr int64_t plain_panel_rows = 32;
constexpr int plain_tile_rows = Vector::registers >= 32 ? 4 : 2;
constexpr int plain_tile_vectors = 4;

template <int ROWS>
void broadcast_tile(
    const float* x,
    int64_t x_row,
    const float* w,
    int64_t w_row,
    int64_t length,
    float* sums,
    int64_t sums_row) {
  F total[ROWS][plain_tile_vectors];
  for (int m = 0; m < ROWS; ++m) {
    for (int v = 0; v < plain_tile_vectors; ++v) {
      total[m][v] = Vector::load(sums + m * sums_row + v * lanes);
    }
  }
  for (int64_t k = 0; k < length; ++k) {
    for (int v = 0; v < plain_tile_vectors; ++v) {
      const F weight = Vector::load(w + k * w_row + v * lanes);
      for (int m = 0; m < ROWS; ++m) {
        total[m][v] = Vector::fma(Vector::set(x[m * x_row + k]), weight, total[m][v]);
      }
    }
  }
  for (int m = 0; m < ROWS; ++m) {
    for (int v = 0; v < plain_tile_vectors; ++v) {
      Vector::store(sums + m * sums_row + v * lanes, total[m][v]);
    }
  }
}

struct Plain {
  template <typename Element>
  static void run(const Product& product, int64_t begin, int64_t end, float* workspace, float* y) {
    constexpr int block = block_elements<Element>;
    static_assert(plain_column_multiple % block == 0);
    constexpr int per_unit = positions<Element>;
    float* decoded = workspace;
    float* sums = workspace + plain_panel_rows * block;
    const int64_t x_row = packed_row(product, Layout::plain);
    for (int64_t n = begin; n < end; n += block) {
      const int64_t columns = end - n < block ? end - n : block;
      std::memset(sums, 0, sizeof(float) * static_cast<size_t>(product.rows * block));
      for (int64_t first = 0; first < product.K; first += plain_panel_rows) {
        const int64_t length = product.K - first < plain_panel_rows ? product.K - first : plain_panel_rows;
        for (int64_t k = 0; k < length; ++k) {
          decode_row<Element, Float32Tile>(product, first + k, product.N, n, columns, decoded + k * block);
        }
        for (int v = 0; v < per_unit; v += plain_tile_vectors) {
          int64_t m = 0;
          for (; m + plain_tile_rows <= product.rows; m += plain_tile_rows) {
            broadcast_tile<plain_tile_rows>(
                product.x + m * x_row + first, x_row, decoded + v * lanes, block, length, sums + m * block + v * lanes,
                block);
          }
          for (; m < product.rows; ++m) {
            broadcast_tile<1>(
                product.x + m * x_row + first, x_row, decoded + v * lanes, block, length, sums + m * block + v * lanes,
                block);
          }
        }
      }
      for (int64_t m = 0; m < product.rows; ++m) {
        for (int64_t c = 0; c < columns; ++c) {
          const int64_t position = c % per_unit * lanes + c / per_unit;
          y[m * (end - begin) + (n - begin) + c] = sums[m * block + position];
        }
      }
    }
  }
};

// --- The table ------------------------------------------------------------------------------------------------------

template <typename Kernel>
void for_format(const Product& product, int64_t begin, int64_t end, float* workspace, float* y) {
  switch (product.format.mode) {
    case Mode::mxfp4:
    case Mode::nvfp4: return Kernel::template run<E2M1Element>(product, begin, end, workspace, y);
    case Mode::mxfp8: return Kernel::template run<E4M3Element>(product, begin, end, workspace, y);
    case Mode::affine: break;
  }
  switch (product.format.bits) {
    case 2: return Kernel::template run<AffineElement<2>>(product, begin, end, workspace, y);
    case 3: return Kernel::template run<AffineElement<3>>(product, begin, end, workspace, y);
    case 4: return Kernel::template run<AffineElement<4>>(product, begin, end, workspace, y);
    case 5: return Kernel::template run<AffineElement<5>>(product, begin, end, workspace, y);
    case 6: return Kernel::template run<AffineElement<6>>(product, begin, end, workspace, y);
    case 8: return Kernel::template run<AffineElement<8>>(product, begin, end, workspace, y);
  }
}

void streamed(const Product& product, int64_t begin, int64_t end, float* y) {
  for_format<Streamed>(product, begin, end, nullptr, y);
}

int64_t workspace(const Product& product) {
  const int64_t block = lanes * unit_elements(product.format.bits);
  const int64_t tiled = max_tiled_columns * panel_bytes / static_cast<int64_t>(sizeof(float));
  const int64_t plain = (plain_panel_rows + product.rows) * block;
  return tiled > plain ? tiled : plain;
}

}  // namespace

#include "decoder.h"

namespace {

// bfloat16 tells whether this machine multiplies it.
constexpr Kernels make_table(const char* name, bool bfloat16) {
  return {name,     bfloat16,          packed_row,        pack_row,     workspace,
          streamed, for_format<Tiled>, for_format<Plain>, decoder_table};
}

#undef ALWAYS_INLINE

}  // namespace
