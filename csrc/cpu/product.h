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
//   broadcast many rows: the same with lanes that run along N; units are transposed, where weights are smallest
//   plain     untransposed weights: their lanes run along N as they are
//
// Column-packed weights are [K, N] with units along K: words of neighbouring columns are neighbours, and lanes run
// along N without a transpose. They are streamed with x broadcast, or decoded to the panels of the broadcasting
// product.

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

// Calls function with rows, at least one and at most `most`, as a constant.
template <int most, typename Function>
ALWAYS_INLINE void with_rows(int64_t rows, Function&& function) {
  if (rows == most) {
    return function(std::integral_constant<int, most>());
  }
  if constexpr (most > 1) {
    with_rows<most - 1>(rows, function);
  }
}

template <typename Sum, int rows, int columns>
ALWAYS_INLINE void clear(Sum (&sums)[rows][columns]) {
  for (auto& row : sums) {
    for (auto& value : row) {
      value = Sum();
    }
  }
}

constexpr int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// --- Elements: how a vector of units decodes ------------------------------------------------------------------------

// The bits of 0 <= value < 256 as bfloat16, exactly.
constexpr uint16_t bfloat16_of_integer(int value) {
  int exponent = 0;
  while (value >> exponent > 1) {
    ++exponent;
  }
  return static_cast<uint16_t>(value == 0 ? 0 : ((127 + exponent) << 7) + ((value << 7 >> exponent) & 0x7F));
}

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
  static constexpr uint16_t bfloat16(int code) { return bfloat16_of_integer(code); }
};

struct E2M1Element {
  static constexpr int bits = 4;
  using Units = I;
  static ALWAYS_INLINE Units load(const uint8_t* codes) { return Vector::load_units<4, 0>(codes); }
  template <int j>
  static ALWAYS_INLINE F value(Units units) {
    return Vector::e2m1<4 * j>(units);
  }
  static constexpr uint16_t bfloat16(int code) {
    constexpr uint16_t sizes[] = {0, 0x3F00, 0x3F80, 0x3FC0, 0x4000, 0x4040, 0x4080, 0x40C0};
    return static_cast<uint16_t>(sizes[code & 7] | (code & 8) << 12);
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
  // Of the positive codes, 0 to 127.
  static constexpr uint16_t bfloat16(int code) {
    if (code == 0x7F) {
      return 0x7FC0;
    }
    const uint16_t subnormal = static_cast<uint16_t>(bfloat16_of_integer(code) - (code == 0 ? 0 : 9 << 7));
    return code < 8 ? subnormal : static_cast<uint16_t>((code << 4) + (120 << 7));
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
template <typename Loader, int bytes>
ALWAYS_INLINE typename Loader::Units load_block(const uint8_t* codes, int64_t available) {
  if (__builtin_expect(available >= bytes, 1)) {
    return Loader::load(codes);
  }
  alignas(64) uint8_t padded[round_up(bytes, 64)] = {};
  copy_bytes(padded, codes, available);
  return Loader::load(padded);
}

// How many columns of the result before their use weights are asked for, into the second-level cache: rows of a packed
// matrix are too short for the machine's own prefetching to get going.
constexpr int64_t columns_ahead = 8;

// Asks for `bytes` bytes ahead of their use; they need not exist.
ALWAYS_INLINE void prefetch(const uint8_t* address, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) {
    __builtin_prefetch(address + i, 0, 2);
  }
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

// The first `count` scales of a vector, then zeros.
ALWAYS_INLINE F load_first_scales(ScaleType type, const uint8_t* source, int64_t count) {
  if (__builtin_expect(count >= lanes, 1)) {
    return load_scales(type, source);
  }
  alignas(64) uint8_t padded[64] = {};
  copy_bytes(padded, source, count * scale_bytes(type));
  const F scales = load_scales(type, padded);
  if (type != ScaleType::e8m0) {
    return scales;
  }
  // Only there are zero bytes not a zero scale.
  alignas(64) float values[lanes] = {};
  alignas(64) float decoded[lanes];
  Vector::store(decoded, scales);
  std::memcpy(values, decoded, static_cast<size_t>(count) * sizeof(float));
  return Vector::load(values);
}

// count scales as float32, then zeros up to a multiple of the lanes.
ALWAYS_INLINE void convert_scales(ScaleType type, const uint8_t* source, int64_t count, float* destination) {
  const int bytes = scale_bytes(type);
  for (int64_t i = 0; i < count; i += lanes) {
    Vector::store(destination + i, load_first_scales(type, source + i * bytes, count - i));
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

  // For Vector::lookup in a vector of scales, of which block 0 uses the first.
  ALWAYS_INLINE I groups_of_lanes(int64_t block) const {
    return Vector::later_groups(index, static_cast<int>(block * lanes >> shift));
  }

  ALWAYS_INLINE F operator()(const float* scales, int64_t block) const {
    return Vector::lookup(Vector::load(scales + (block * lanes >> shift)), index);
  }
};

// --- bfloat16 pairs -------------------------------------------------------------------------------------------------
// Where the machine multiplies bfloat16, two units of half the length stand in each 32-bit lane: pair j of a lane holds
// the elements j and j + positions / 2 of its unit, so that the lanes of a sum belong to the same groups as in float32.
// Every code of every format is exact in bfloat16. Templates on V, so that they need not compile for other machines.

template <typename Element>
struct CodeTable {
  static constexpr int size = Element::bits <= 6 ? 64 : 128;
  alignas(64) uint16_t values[size];
  constexpr CodeTable() : values() {
    for (int i = 0; i < size; ++i) {
      values[i] = Element::bfloat16(i & ((1 << Element::bits) - 1));
    }
  }
};

// A block of at most six-bit elements: 16-bit lanes index a table with their low bits, whatever stands above them.
template <typename Element, typename V>
struct ShortPairs {
  static constexpr CodeTable<Element> table{};
  using Units = typename V::HalfUnits;
  static ALWAYS_INLINE Units load(const uint8_t* codes) { return V::template load_halves<Element::bits>(codes); }
  template <int j>
  static ALWAYS_INLINE I codes(const Units& units) {
    return V::template half_codes<Element::bits, j>(units);
  }
  template <int j>
  static ALWAYS_INLINE I values(const Units& units) {
    if constexpr (Element::bits <= 5) {
      return V::lookup_half(codes<j>(units), V::load_halves(table.values));
    } else {
      return V::lookup_half(codes<j>(units), V::load_halves(table.values), V::load_halves(table.values + 32));
    }
  }
};

// Any element that is exact in bfloat16, through float32.
template <typename Element, typename V>
struct LongPairs {
  using Units = typename Element::Units;
  static ALWAYS_INLINE Units load(const uint8_t* codes) { return Element::load(codes); }
  template <int j>
  static ALWAYS_INLINE I values(const Units& units) {
    return V::truncated_pairs(
        Element::template value<j>(units), Element::template value<j + positions<Element> / 2>(units));
  }
};

template <typename V>
struct LongPairs<E4M3Element, V> {
  static constexpr CodeTable<E4M3Element> table{};
  using Units = I;
  static ALWAYS_INLINE Units load(const uint8_t* codes) { return E4M3Element::load(codes); }
  template <int j>
  static ALWAYS_INLINE I values(Units units) {
    return V::template lookup_signed_byte<j>(units, table.values);
  }
};

template <typename Element, typename V>
using Pairs = std::conditional_t<(Element::bits <= 6), ShortPairs<Element, V>, LongPairs<Element, V>>;

// Calls function(j, the element j of each lane's unit, for every vector of units) for every position. E4M3 comes in
// bfloat16 pairs where there is a table for them: converting it alone takes twice the instructions.
template <typename Element, int VECTORS, typename Function>
ALWAYS_INLINE void for_values(const typename Element::Units (&units)[VECTORS], Function&& function) {
  F values[VECTORS];
  if constexpr (std::is_same_v<Element, E4M3Element> && Vector::has_bfloat16) {
    const auto in_pairs = [&]<typename V>(std::type_identity<V>) __attribute__((always_inline)) {
      unrolled<2>([&](auto j) __attribute__((always_inline)) {
        I pairs[VECTORS];
        for (int v = 0; v < VECTORS; ++v) {
          pairs[v] = LongPairs<E4M3Element, V>::template values<j>(units[v]);
          values[v] = V::low_of_pairs(pairs[v]);
        }
        function(j, values);
        for (int v = 0; v < VECTORS; ++v) {
          values[v] = V::high_of_pairs(pairs[v]);
        }
        function(std::integral_constant<int, j + 2>(), values);
      });
    };
    in_pairs(std::type_identity<Vector>());
  } else {
    unrolled<positions<Element>>([&](auto j) __attribute__((always_inline)) {
      for (int v = 0; v < VECTORS; ++v) {
        values[v] = Element::template value<j>(units[v]);
      }
      function(j, values);
    });
  }
}

// The most bfloat16 terms whose sum one value of x is.
constexpr int max_terms = 3;

// How many bfloat16 values a value of x is the exact sum of, or 0 where the product multiplies float32.
int bfloat16_terms(const Product& product, Layout layout) {
  if (!product.bfloat16 || layout == Layout::plain) {
    return 0;
  }
  const bool split = product.split && layout == Layout::streamed;
  // Where x is broadcast, it pays to decode each code to float32 once for several rows.
  const bool one_row = product.rows == 1 || !is_column_packed(product.format.mode);
  switch (product.x_type) {
    case Real::bfloat16: return 1;
    case Real::float16: return split && one_row ? 2 : 0;
    case Real::float32: return split && product.rows == 1 ? 3 : 0;
  }
  __builtin_unreachable();
}

// --- Element types of the tiled product ------------------------------------------------------------------------------
// `step` elements make a vector.

struct Float32Tile {
  using Storage = float;
  using Operand = F;
  static constexpr int step = lanes;
  static ALWAYS_INLINE Operand load(const float* source) { return Vector::load(source); }
  static ALWAYS_INLINE Operand broadcast(const float* source) { return Vector::set(*source); }
  static ALWAYS_INLINE F multiply_add(Operand a, Operand b, F sum) { return Vector::fma(a, b, sum); }
};

template <typename V>
struct BFloat16Tile {
  using Storage = uint16_t;
  using Operand = I;
  static constexpr int step = 2 * lanes;
  static ALWAYS_INLINE Operand load(const void* source) { return V::load_halves(source); }
  static ALWAYS_INLINE Operand broadcast(const float* source) { return V::broadcast_pair(source); }
  static ALWAYS_INLINE F multiply_add(Operand a, Operand b, F sum) { return V::dot_pairs(a, b, sum); }
};

// --- Packing x ------------------------------------------------------------------------------------------------------

ALWAYS_INLINE F load_real(Real type, const uint8_t* source) {
  switch (type) {
    case Real::float32: return Vector::load(reinterpret_cast<const float*>(source));
    case Real::float16: return Vector::load_float16(source);
    case Real::bfloat16: return Vector::load_bfloat16(source);
  }
  __builtin_unreachable();
}

typedef uint32_t Words __attribute__((vector_size(sizeof(F))));
typedef uint16_t HalfWords __attribute__((vector_size(sizeof(F) / 2)));

ALWAYS_INLINE void store_bfloat16(void* destination, F value) {
  const Words bits = (Words)value;
  const Words rounded = (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16;
  const Words is_nan = (Words)((bits & 0x7FFFFFFFu) > 0x7F800000u);
  const HalfWords halves = __builtin_convertvector((is_nan & 0x7FC0u) | (~is_nan & rounded), HalfWords);
  std::memcpy(destination, &halves, sizeof halves);
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

// A row of float32, each times factor, rounded to the nearest.
void narrow(const float* source, float factor, int64_t count, Real type, void* destination) {
  const F factors = Vector::set(factor);
  const int bytes = type == Real::float32 ? 4 : 2;
  const auto store = [&](F value, uint8_t* to) __attribute__((always_inline)) {
    switch (type) {
      case Real::float32: return Vector::store(reinterpret_cast<float*>(to), value);
      case Real::float16: return Vector::store_float16(to, value);
      case Real::bfloat16: return store_bfloat16(to, value);
    }
  };
  uint8_t* to = static_cast<uint8_t*>(destination);
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) {
    store(Vector::mul(Vector::load(source + i), factors), to + i * bytes);
  }
  if (i < count) {
    alignas(64) float padded[lanes] = {};
    alignas(64) uint8_t result[lanes * sizeof(float)];
    std::memcpy(padded, source + i, static_cast<size_t>(count - i) * sizeof(float));
    store(Vector::mul(Vector::load(padded), factors), result);
    std::memcpy(to + i * bytes, result, static_cast<size_t>((count - i) * bytes));
  }
}

// out[j] = elements j, count + j, 2 * count + j, ... of the vectors in.
template <int count>
ALWAYS_INLINE void deinterleave(const F* in, F* out) {
  if constexpr (count == 1) {
    out[0] = in[0];
  } else {
    constexpr int half = count / 2;
    F even[half];
    F odd[half];
    for (int i = 0; i < half; ++i) {
      Vector::unzip(in[2 * i], in[2 * i + 1], even[i], odd[i]);
    }
    F even_out[half];
    F odd_out[half];
    deinterleave<half>(even, even_out);
    deinterleave<half>(odd, odd_out);
    for (int i = 0; i < half; ++i) {
      out[2 * i] = even_out[i];
      out[2 * i + 1] = odd_out[i];
    }
  }
}

int64_t padded_length(const Product& product) {
  return round_up(product.K, lanes * unit_elements(product.format.bits));
}

int64_t padded_groups(const Product& product) { return round_up(product.K / product.format.group_size, lanes); }

// An odd number of cache lines: equal positions of several rows then meet different sets of a cache.
constexpr int64_t spaced(int64_t floats) {
  return round_up(floats, 16) / 16 % 2 == 0 ? round_up(floats, 16) + 16 : round_up(floats, 16);
}

// Floats of a packed row before the sums of its groups.
int64_t packed_values(const Product& product, Layout layout) {
  const int terms = bfloat16_terms(product, layout);
  return terms == 0 ? padded_length(product) : padded_length(product) / 2 * terms;
}

int64_t packed_row(const Product& product, Layout layout) {
  switch (layout) {
    case Layout::streamed: return spaced(packed_values(product, layout) + padded_groups(product));
    case Layout::tiled: return spaced(packed_values(product, layout));
    case Layout::broadcast: return spaced(bfloat16_terms(product, layout) == 0 ? product.K : product.K / 2);
    case Layout::plain: return round_up(product.K, lanes);
  }
  __builtin_unreachable();
}

// Block after block in the order in which weights unpack, each as TERMS vectors of pairs or, for 0, as float32.
template <int per_unit, int TERMS, typename V>
void pack_blocks(const Product& product, const uint8_t* row, float* packed) {
  constexpr int block = lanes * per_unit;
  const int element_bytes = product.x_type == Real::float32 ? 4 : 2;
  for (int64_t k = 0; k < product.K; k += block) {
    alignas(64) float natural[block] = {};
    widen(product.x_type, row + k * element_bytes, product.K - k < block ? product.K - k : block, natural);
    F in[per_unit];
    F out[per_unit];
    for (int i = 0; i < per_unit; ++i) {
      in[i] = Vector::load(natural + i * lanes);
    }
    deinterleave<per_unit>(in, out);
    if constexpr (TERMS == 0) {
      for (int j = 0; j < per_unit; ++j) {
        Vector::store(packed + k + j * lanes, out[j]);
      }
    } else {
      constexpr int half = per_unit / 2;
      for (int term = 0; term < TERMS; ++term) {
        for (int j = 0; j < half; ++j) {
          V::store_halves(
              packed + k / 2 * TERMS + (term * half + j) * lanes, V::truncated_pairs(out[j], out[j + half]));
          out[j] = V::without_top(out[j]);
          out[j + half] = V::without_top(out[j + half]);
        }
      }
    }
  }
}

template <int TERMS, typename V>
void pack_units(const Product& product, const uint8_t* row, float* packed) {
  switch (unit_elements(product.format.bits)) {
    case 4: return pack_blocks<4, TERMS, V>(product, row, packed);
    case 8: return pack_blocks<8, TERMS, V>(product, row, packed);
    case 16: return pack_blocks<16, TERMS, V>(product, row, packed);
  }
}

// Calls function with the number of terms as a constant.
template <typename V, typename Function>
ALWAYS_INLINE void with_terms(const Product& product, Layout layout, Function&& function) {
  if constexpr (V::has_bfloat16) {
    switch (bfloat16_terms(product, layout)) {
      case 1: return function(std::integral_constant<int, 1>());
      case 2: return function(std::integral_constant<int, 2>());
      case 3: return function(std::integral_constant<int, 3>());
    }
  }
  function(std::integral_constant<int, 0>());
}

// The sums that a bias multiplies, always in float32.
void sum_groups(const Product& product, const uint8_t* row, float* sums) {
  const int element_bytes = product.x_type == Real::float32 ? 4 : 2;
  const int group_size = product.format.group_size;
  const int64_t groups = product.K / group_size;
  for (int64_t group = 0; group < groups; ++group) {
    F sum = Vector::zero();
    for (int k = 0; k < group_size; k += lanes) {
      sum = Vector::add(sum, load_real(product.x_type, row + (group * group_size + k) * element_bytes));
    }
    sums[group] = Vector::sum(sum);
  }
  for (int64_t group = groups; group < padded_groups(product); ++group) {
    sums[group] = 0.0f;
  }
}

// Pairs of the elements j and j + per_unit / 2 of each unit, unit after unit.
template <typename V>
void pack_pairs(const Product& product, const uint8_t* row, float* packed) {
  constexpr int vector = 2 * lanes;
  const int per_unit = unit_elements(product.format.bits);
  alignas(64) uint16_t order[vector];
  for (int i = 0; i < vector; ++i) {
    const int pair = i / 2;
    order[i] = static_cast<uint16_t>(pair / (per_unit / 2) * per_unit + pair % (per_unit / 2) + i % 2 * (per_unit / 2));
  }
  const I index = V::load_halves(order);
  int64_t k = 0;
  for (; k + vector <= product.K; k += vector) {
    V::store_halves(packed + k / 2, V::lookup_half(index, V::load_halves(row + 2 * k)));
  }
  if (k < product.K) {
    alignas(64) uint8_t padded[64] = {};
    copy_bytes(padded, row + 2 * k, 2 * (product.K - k));
    V::store_halves(packed + k / 2, V::lookup_half(index, V::load_halves(padded)));
  }
}

void pack_row(const Product& product, Layout layout, const void* x, float* packed) {
  const uint8_t* row = static_cast<const uint8_t*>(x);
  if constexpr (Vector::has_bfloat16) {
    if (layout == Layout::broadcast && bfloat16_terms(product, layout) == 1) {
      return pack_pairs<Vector>(product, row, packed);
    }
  }
  if (layout == Layout::plain || layout == Layout::broadcast) {
    return widen(product.x_type, row, product.K, packed);
  }
  with_terms<Vector>(product, layout, [&](auto terms) { pack_units<terms, Vector>(product, row, packed); });
  if (layout == Layout::streamed && (product.biases != nullptr || has_column_bias(product.format.mode))) {
    sum_groups(product, row, packed + packed_values(product, layout));
  }
}

// --- streamed -------------------------------------------------------------------------------------------------------
// Several columns of the result at a time share each load of x and give independent chains of additions.

// Multiplies a block in float32. With one row the sum of a block is scaled; with more, the decoded value is, so that
// the rows share that product too.
template <typename Element>
struct Float32Stream {
  using Units = typename Element::Units;
  static constexpr int64_t block_floats = block_elements<Element>;
  static ALWAYS_INLINE Units load(const uint8_t* codes) { return Element::load(codes); }

  template <int ROWS, int COLUMNS>
  static ALWAYS_INLINE void add(
      const Units (&units)[COLUMNS],
      const F (&scale)[COLUMNS],
      const float* x,
      int64_t x_row,
      F (&total)[ROWS][COLUMNS]) {
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
};

// Multiplies exact codes with exact terms of x and scales the sums: no weight is rounded.
template <typename Element, typename V, int TERMS>
struct BFloat16Stream {
  using Codes = Pairs<Element, V>;
  using Units = typename Codes::Units;
  static constexpr int64_t block_floats = block_elements<Element> / 2 * TERMS;
  static ALWAYS_INLINE Units load(const uint8_t* codes) { return Codes::load(codes); }

  template <int ROWS, int COLUMNS>
  static ALWAYS_INLINE void add(
      const Units (&units)[COLUMNS],
      const F (&scale)[COLUMNS],
      const float* x,
      int64_t x_row,
      F (&total)[ROWS][COLUMNS]) {
    constexpr int half = positions<Element> / 2;
    F part[ROWS][COLUMNS];
    clear(part);
    unrolled<half>([&](auto j) __attribute__((always_inline)) {
      for (int c = 0; c < COLUMNS; ++c) {
        const I value = Codes::template values<j>(units[c]);
        for (int term = 0; term < TERMS; ++term) {
          for (int m = 0; m < ROWS; ++m) {
            part[m][c] = V::dot_pairs(value, V::load_halves(x + m * x_row + (term * half + j) * lanes), part[m][c]);
          }
        }
      }
    });
    for (int m = 0; m < ROWS; ++m) {
      for (int c = 0; c < COLUMNS; ++c) {
        total[m][c] = Vector::fma(part[m][c], scale[c], total[m][c]);
      }
    }
  }
};

template <typename Element, typename Stream, int ROWS, int COLUMNS>
void streamed_columns(const Product& product, int64_t n, float* y) {
  constexpr int block = block_elements<Element>;
  const int group_size = product.format.group_size;
  const int64_t groups = product.K / group_size;
  const int64_t row_bytes = product.K * Element::bits / 8;
  const int bytes = scale_bytes(product.scale_type);
  const int64_t scale_row = groups * bytes;
  const int64_t x_row = packed_row(product, Layout::streamed);
  const float* sums = product.x + packed_values(product, Layout::streamed);
  const Spread<Element> spread(group_size);

  F total[ROWS][COLUMNS];
  clear(total);
  // The scales of `lanes` groups fill a vector of each column, which the blocks of those groups share.
  for (int64_t group = 0; group < groups; group += lanes) {
    const int64_t count = groups - group < lanes ? groups - group : lanes;
    F scales[COLUMNS];
    for (int c = 0; c < COLUMNS; ++c) {
      const int64_t offset = (n + c) * scale_row + group * bytes;
      if (product.biases != nullptr) {
        prefetch(product.biases + offset + columns_ahead * scale_row, 1);
        const F bias = load_first_scales(product.scale_type, product.biases + offset, count);
        for (int m = 0; m < ROWS; ++m) {
          total[m][c] = Vector::fma(bias, Vector::load(sums + m * x_row + group), total[m][c]);
        }
      }
      prefetch(product.scales + offset + columns_ahead * scale_row, 1);
      scales[c] = load_first_scales(product.scale_type, product.scales + offset, count);
    }
    const int64_t first = group * group_size / block;
    const int64_t blocks = (count * group_size + block - 1) / block;
    for (int64_t i = 0; i < blocks; ++i) {
      const int64_t byte = (first + i) * block_bytes<Element>;
      const auto groups_of_lanes = spread.groups_of_lanes(i);
      typename Stream::Units units[COLUMNS];
      F scale[COLUMNS];
      for (int c = 0; c < COLUMNS; ++c) {
        const uint8_t* codes = product.words + (n + c) * row_bytes + byte;
        prefetch(codes + columns_ahead * row_bytes, block_bytes<Element>);
        units[c] = load_block<Stream, block_bytes<Element>>(codes, row_bytes - byte);
        scale[c] = Vector::lookup(scales[c], groups_of_lanes);
      }
      Stream::template add<ROWS, COLUMNS>(units, scale, product.x + (first + i) * Stream::block_floats, x_row, total);
    }
  }
  for (int m = 0; m < ROWS; ++m) {
    if constexpr (COLUMNS == 4) {
      Vector::sum_each(total[m], y + m * product.y_row);
    } else {
      for (int c = 0; c < COLUMNS; ++c) {
        y[m * product.y_row + c] = Vector::sum(total[m][c]);
      }
    }
  }
}

template <typename Element, typename Stream, int ROWS>
void streamed_rows(const Product& product, int64_t begin, int64_t end, float* y) {
  constexpr int columns = Vector::registers >= 32 && ROWS <= 2 ? 4 : 2;
  int64_t n = begin;
  for (; n + columns <= end; n += columns) {
    streamed_columns<Element, Stream, ROWS, columns>(product, n, y + (n - begin));
  }
  for (; n < end; ++n) {
    streamed_columns<Element, Stream, ROWS, 1>(product, n, y + (n - begin));
  }
}

template <typename Element, typename V, int TERMS>
struct StreamOf {
  using type = BFloat16Stream<Element, V, TERMS>;
};
template <typename Element, typename V>
struct StreamOf<Element, V, 0> {
  using type = Float32Stream<Element>;
};

// --- streamed, column-packed ----------------------------------------------------------------------------------------
// Words of neighbouring columns are neighbours: element j of all lanes meets the one x[j].
//
//     column      0      1      2   ...
//     word row 0  e0..   e0..   e0..     -> value j of every column, times x[j] in all lanes
//     word row 1  e8..   e8..   e8..
//
// One group of all columns after the other, which is as many streams through memory as a group has rows of words. Codes
// are multiplied as they are, and the sum of a group is scaled. Behind x, packed as for the rows above, stand the sums
// of its groups, for what the code of zero adds.

template <typename Element>
constexpr bool may_be_column_packed = Element::bits == 2 || Element::bits == 4 || std::is_same_v<Element, E4M3Element>;

// How far ahead of their use words are asked for, in bytes along their row.
constexpr int64_t column_bytes_ahead = 1024;

// x points to where packed x has element 0 of the unit: the others follow `lanes` apart.
template <typename Element>
struct Float32Columns {
  using Units = typename Element::Units;
  static constexpr int64_t block_floats = block_elements<Element>;
  static ALWAYS_INLINE Units load(const uint8_t* codes) { return Element::load(codes); }

  template <int ROWS, int VECTORS>
  static ALWAYS_INLINE void add(
      const Units (&units)[VECTORS],
      const float* x,
      int64_t x_row,
      F (&sums)[ROWS][VECTORS]) {
    for_values<Element>(units, [&](auto j, const F(&values)[VECTORS]) __attribute__((always_inline)) {
      for (int v = 0; v < VECTORS; ++v) {
        for (int m = 0; m < ROWS; ++m) {
          sums[m][v] = Vector::fma(values[v], Vector::set(x[m * x_row + j * lanes]), sums[m][v]);
        }
      }
    });
  }
};

template <typename Element, typename V, int TERMS>
struct BFloat16Columns {
  using Codes = Pairs<Element, V>;
  using Units = typename Codes::Units;
  static constexpr int64_t block_floats = block_elements<Element> / 2 * TERMS;
  static ALWAYS_INLINE Units load(const uint8_t* codes) { return Codes::load(codes); }

  template <int ROWS, int VECTORS>
  static ALWAYS_INLINE void add(
      const Units (&units)[VECTORS],
      const float* x,
      int64_t x_row,
      F (&sums)[ROWS][VECTORS]) {
    constexpr int half = positions<Element> / 2;
    unrolled<half>([&](auto j) __attribute__((always_inline)) {
      for (int v = 0; v < VECTORS; ++v) {
        const I value = Codes::template values<j>(units[v]);
        for (int term = 0; term < TERMS; ++term) {
          for (int m = 0; m < ROWS; ++m) {
            sums[m][v] = V::dot_pairs(value, V::broadcast_pair(x + m * x_row + (term * half + j) * lanes), sums[m][v]);
          }
        }
      }
    });
  }
};

// What a lane's code of zero adds to its sum, for each unit of x.
ALWAYS_INLINE F negated_zeros(const Product& product, int64_t position, int64_t count) {
  if (product.format.mode == Mode::marlin_int4) {
    const F zeros =
        load_first_scales(product.scale_type, product.biases + position * scale_bytes(product.scale_type), count);
    return Vector::mul(zeros, Vector::set(-1.0f));
  }
  return Vector::set(-column_zero(product.format.mode, 0.0f));
}

// Asks for the scales, and zeros, of a group of columns.
ALWAYS_INLINE void prefetch_scales(const Product& product, int64_t group, int64_t n, int64_t columns) {
  const int bytes = scale_bytes(product.scale_type);
  const int64_t offset = (group * product.N + n) * bytes;
  prefetch(product.scales + offset, columns * bytes);
  if (product.biases != nullptr) {
    prefetch(product.biases + offset, columns * bytes);
  }
}

// Some rows of x, packed, and where their results go.
struct ColumnRows {
  const float* x;
  float* y;
};

// Adds one group of the columns [n, n + VECTORS * lanes), of which `count` exist, to y, and asks for the words that are
// `ahead` bytes further.
template <typename Element, typename Stream, int ROWS, int VECTORS>
ALWAYS_INLINE void add_column_group(
    const Product& product,
    const ColumnRows& rows,
    int64_t group,
    int64_t n,
    int64_t count,
    int64_t ahead) {
  constexpr int word_bytes = unit_bytes(Element::bits);
  const int64_t units_per_group = product.format.group_size / positions<Element>;
  const int64_t x_row = packed_row(product, Layout::streamed);
  const int bytes = scale_bytes(product.scale_type);
  F sums[ROWS][VECTORS];
  clear(sums);
  for (int64_t unit = group * units_per_group; unit < (group + 1) * units_per_group; ++unit) {
    const uint8_t* codes = product.words + (unit * product.N + n) * word_bytes;
    prefetch(codes + ahead, VECTORS * block_bytes<Element>);
    typename Stream::Units units[VECTORS];
    for (int v = 0; v < VECTORS; ++v) {
      units[v] =
          load_block<Stream, block_bytes<Element>>(codes + v * block_bytes<Element>, (count - v * lanes) * word_bytes);
    }
    Stream::template add<ROWS, VECTORS>(
        units, rows.x + unit / lanes * Stream::block_floats + unit % lanes, x_row, sums);
  }
  const float* group_sums = rows.x + packed_values(product, Layout::streamed) + group;
  prefetch_scales(product, group + 1, n, VECTORS * lanes);
  for (int v = 0; v < VECTORS; ++v) {
    const int64_t position = group * product.N + n + v * lanes;
    const F scale = load_first_scales(product.scale_type, product.scales + position * bytes, count - v * lanes);
    if (has_column_bias(product.format.mode)) {
      const F zeros = negated_zeros(product, position, count - v * lanes);
      for (int m = 0; m < ROWS; ++m) {
        sums[m][v] = Vector::fma(zeros, Vector::set(group_sums[m * x_row]), sums[m][v]);
      }
    }
    for (int m = 0; m < ROWS; ++m) {
      float* total = rows.y + m * product.y_row + v * lanes;
      Vector::store(total, Vector::fma(sums[m][v], scale, Vector::load(total)));
    }
  }
}

// Rows in tiles of at most MOST, which share the words of a group while they are in the first-level cache.
template <typename Element, typename Stream, int MOST, int VECTORS>
void streamed_column_groups(const Product& product, int64_t begin, int64_t end, float* y) {
  constexpr int64_t columns = VECTORS * lanes;
  constexpr int word_bytes = unit_bytes(Element::bits);
  const int64_t x_row = packed_row(product, Layout::streamed);
  const int64_t group_words = product.format.group_size / positions<Element> * product.N;
  const auto add = [&](auto vectors, int64_t group, int64_t n, int64_t count, int64_t ahead)
                       __attribute__((always_inline)) {
                         for_tiles<MOST>(product.rows, [&](int64_t m, int64_t rows) {
                           const ColumnRows tile{product.x + m * x_row, y + m * product.y_row + (n - begin)};
                           with_rows<MOST>(rows, [&](auto height) {
                             add_column_group<Element, Stream, height, vectors>(product, tile, group, n, count, ahead);
                           });
                         });
                       };
  std::memset(y, 0, sizeof(float) * static_cast<size_t>(product.rows * product.y_row));
  for (int64_t group = 0; group < product.K / product.format.group_size; ++group) {
    int64_t n = begin;
    for (; n + columns <= end; n += columns) {
      // Behind the last columns of these rows follow the first ones of the next group's.
      const bool wraps = n + column_bytes_ahead / word_bytes >= end;
      const int64_t ahead = column_bytes_ahead + (wraps ? (group_words - (end - begin)) * word_bytes : 0);
      add(std::integral_constant<int, VECTORS>(), group, n, columns, ahead);
    }
    for (; n < end; n += lanes) {
      add(std::integral_constant<int, 1>(), group, n, end - n, group_words * word_bytes);
    }
  }
}

template <typename Element, typename V, int TERMS>
struct ColumnsOf {
  using type = BFloat16Columns<Element, V, TERMS>;
};
template <typename Element, typename V>
struct ColumnsOf<Element, V, 0> {
  using type = Float32Columns<Element>;
};

// So many vectors that each waits for its last addition while the others go on. Only single rows are sums of bfloat16.
template <typename Element, int TERMS>
void streamed_packed_columns(const Product& product, int64_t begin, int64_t end, float* y) {
  using Stream = typename ColumnsOf<Element, Vector, TERMS>::type;
  constexpr int vectors = Vector::registers >= 32 ? 4 : 2;
  if constexpr (TERMS < 2) {
    if (product.rows > 1) {
      return streamed_column_groups<Element, Stream, max_streamed_rows, vectors>(product, begin, end, y);
    }
  }
  streamed_column_groups<Element, Stream, 1, 2 * vectors>(product, begin, end, y);
}

struct Streamed {
  template <typename Element>
  static void run(const Product& product, int64_t begin, int64_t end, float*, float* y) {
    with_terms<Vector>(product, Layout::streamed, [&](auto terms) {
      if constexpr (may_be_column_packed<Element>) {
        if (is_column_packed(product.format.mode)) {
          return streamed_packed_columns<Element, terms>(product, begin, end, y);
        }
      }
      using Stream = typename StreamOf<Element, Vector, terms>::type;
      constexpr int most_rows = terms == 3 ? 1 : max_streamed_rows;
      with_rows<most_rows>(
          product.rows, [&](auto rows) { streamed_rows<Element, Stream, rows>(product, begin, end, y); });
    });
  }
};

// --- tiled ----------------------------------------------------------------------------------------------------------
// Tiles of x rows by weight columns, both read along K as vectors: each load feeds several multiply-adds, and the lanes
// of a sum are added up once per panel.

// Of one weight column: so long that adding up the lanes of a tile's sums is rare, so short that a task's panel stays
// in the second-level cache.
constexpr int64_t panel_bytes = 8192;
constexpr int64_t panel_stride_floats = spaced(panel_bytes / static_cast<int64_t>(sizeof(float)));
constexpr int tile_rows = Vector::registers >= 32 ? 6 : 3;
constexpr int tile_columns = 4;
constexpr int64_t few_tiles = 16;  // whose rows of x stay in the second-level cache beside it

// Rows in tiles of even height: 8 rows as 4 + 4 keep more sums in flight than as 6 + 2.
template <int height, typename Function>
ALWAYS_INLINE void for_tiles(int64_t rows, Function&& function) {
  const int64_t tiles = (rows + height - 1) / height;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t m = tile * rows / tiles;
    function(m, (tile + 1) * rows / tiles - m);
  }
}

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
  clear(total);
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
    float sums[COLUMNS];
    if constexpr (COLUMNS == 4) {
      Vector::sum_each(total[m], sums);
    } else {
      for (int c = 0; c < COLUMNS; ++c) {
        sums[c] = Vector::sum(total[m][c]);
      }
    }
    for (int c = 0; c < COLUMNS; ++c) {
      float& result = y[m * y_stride + c];
      result = (accumulate ? result : 0.0f) + sums[c];
    }
  }
}

// Decoders of one block at a time, to float32 or to pairs; blocks count from the first group in the buffers of scales.

template <typename Element>
struct ScaledBlocks {
  using Storage = float;
  using Codes = Element;
  Spread<Element> spread;

  explicit ScaledBlocks(int group_size) : spread(group_size) {}

  // The elements of one unit of each lane, `stride` apart.
  static ALWAYS_INLINE void store(const typename Codes::Units& units, F scale, F bias, float* decoded, int64_t stride) {
    const typename Codes::Units one[] = {units};
    for_values<Element>(one, [&](auto j, const F(&values)[1]) __attribute__((always_inline)) {
      Vector::store(decoded + j * stride, Vector::fma(values[0], scale, bias));
    });
  }

  ALWAYS_INLINE void operator()(
      const uint8_t* codes,
      int64_t available,
      const float* scales,
      const float* biases,
      int64_t block,
      float* decoded) const {
    const auto units = load_block<Codes, block_bytes<Element>>(codes, available);
    store(units, spread(scales, block), spread(biases, block), decoded, lanes);
  }
};

template <typename Element, typename V>
struct ScaledPairs {
  using Storage = uint16_t;
  using Codes = Pairs<Element, V>;
  Spread<Element> spread;

  explicit ScaledPairs(int group_size) : spread(group_size) {}

  static ALWAYS_INLINE void store(
      const typename Codes::Units& units,
      F scale,
      F bias,
      uint16_t* decoded,
      int64_t stride) {
    unrolled<positions<Element> / 2>([&](auto j) __attribute__((always_inline)) {
      const I pairs = Codes::template values<j>(units);
      const F low = Vector::fma(V::low_of_pairs(pairs), scale, bias);
      const F high = Vector::fma(V::high_of_pairs(pairs), scale, bias);
      V::store_halves(decoded + j * stride, V::rounded_pairs(low, high));
    });
  }

  ALWAYS_INLINE void operator()(
      const uint8_t* codes,
      int64_t available,
      const float* scales,
      const float* biases,
      int64_t block,
      uint16_t* decoded) const {
    const auto units = load_block<Codes, block_bytes<Element>>(codes, available);
    store(units, spread(scales, block), spread(biases, block), decoded, 2 * lanes);
  }
};

// Few codes and few groups in a block: the values that a block can have make a table of 32 or 64, and decoding an
// element costs one look-up in it.
template <typename Element, typename V, int entries>
struct TabledPairs {
  using Storage = uint16_t;
  using Codes = ShortPairs<Element, V>;
  static constexpr int groups_per_vector = lanes >> Element::bits;  // of the table; 0 if one group fills more
  int shift;
  I group_bits;

  explicit TabledPairs(int group_size)
      : shift(Spread<Element>(group_size).shift), group_bits(V::half_groups(shift, Element::bits)) {}

  static ALWAYS_INLINE F of_groups(const float* values, int vector) {
    if constexpr (groups_per_vector > 1) {
      return Vector::lookup(Vector::load(values + vector * groups_per_vector), Vector::lane_groups(Element::bits));
    } else {
      return Vector::set(values[vector * lanes >> Element::bits]);
    }
  }

  static ALWAYS_INLINE F table_vector(const float* scales, const float* biases, int vector) {
    const auto* codes = reinterpret_cast<const uint8_t*>(Codes::table.values + vector * lanes);
    return Vector::fma(Vector::load_bfloat16(codes), of_groups(scales, vector), of_groups(biases, vector));
  }

  ALWAYS_INLINE void operator()(
      const uint8_t* codes,
      int64_t available,
      const float* scales,
      const float* biases,
      int64_t block,
      uint16_t* decoded) const {
    const auto units = load_block<Codes, block_bytes<Element>>(codes, available);
    scales += block * lanes >> shift;
    biases += block * lanes >> shift;
    I table[entries / 32];
    for (int i = 0; i < entries / 32; ++i) {
      table[i] = V::rounded_halves(table_vector(scales, biases, 2 * i), table_vector(scales, biases, 2 * i + 1));
    }
    unrolled<positions<Element> / 2>([&](auto j) __attribute__((always_inline)) {
      const I index = V::template low_bits_or<Element::bits>(Codes::template codes<j>(units), group_bits);
      I values;
      if constexpr (entries == 32) {
        values = V::lookup_half(index, table[0]);
      } else {
        values = V::lookup_half(index, table[0], table[1]);
      }
      V::store_halves(decoded + j * 2 * lanes, values);
    });
  }
};

// Decodes elements [first, first + length) of one packed row; length is a multiple of the block or ends the row.
template <typename Element, typename Blocks>
void decode_row_as(
    const Product& product,
    int64_t row,
    int64_t row_elements,
    int64_t first,
    int64_t length,
    typename Blocks::Storage* destination) {
  constexpr int block = block_elements<Element>;
  const int group_size = product.format.group_size;
  const int64_t row_bytes = row_elements * Element::bits / 8;
  const int64_t row_scales = row_elements / group_size;
  const int bytes = scale_bytes(product.scale_type);
  const Blocks decode(group_size);
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
    } else {
      std::memset(biases.values, 0, sizeof biases.values);
    }
    for (int64_t k = start; k < end; k += block) {
      const int64_t byte = k * Element::bits / 8;
      prefetch(product.words + (row + columns_ahead) * row_bytes + byte, block_bytes<Element>);
      decode(
          product.words + row * row_bytes + byte, row_bytes - byte, scales.values, biases.values, (k - start) / block,
          destination + (k - first));
    }
  }
}

template <typename Element, typename Tile>
void decode_row(
    const Product& product,
    int64_t row,
    int64_t row_elements,
    int64_t first,
    int64_t length,
    typename Tile::Storage* destination) {
  if constexpr (std::is_same_v<Tile, Float32Tile>) {
    decode_row_as<Element, ScaledBlocks<Element>>(product, row, row_elements, first, length, destination);
  } else {
    if constexpr (Element::bits <= 6) {
      const int block_groups = lanes >> Spread<Element>(product.format.group_size).shift;
      const int entries = (block_groups > 1 ? block_groups : 1) << Element::bits;
      if (entries <= 32) {
        return decode_row_as<Element, TabledPairs<Element, Vector, 32>>(
            product, row, row_elements, first, length, destination);
      }
      if (entries <= 64) {
        return decode_row_as<Element, TabledPairs<Element, Vector, 64>>(
            product, row, row_elements, first, length, destination);
      }
    }
    decode_row_as<Element, ScaledPairs<Element, Vector>>(product, row, row_elements, first, length, destination);
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
    float* y,
    int64_t y_stride) {
  int64_t c = 0;
  for (; c + tile_columns <= columns; c += tile_columns) {
    multiply_tile<Tile, ROWS, tile_columns>(x, x_row, w + c * w_row, w_row, length, accumulate, y + c, y_stride);
  }
  for (; c < columns; ++c) {
    multiply_tile<Tile, ROWS, 1>(x, x_row, w + c * w_row, w_row, length, accumulate, y + c, y_stride);
  }
}

template <typename Element, typename Tile>
void multiply_panels(const Product& product, int64_t begin, int64_t end, float* workspace, float* y) {
  using Storage = typename Tile::Storage;
  constexpr int64_t panel = panel_bytes / sizeof(Storage);
  constexpr int64_t panel_stride = panel_stride_floats * sizeof(float) / sizeof(Storage);
  Storage* decoded = reinterpret_cast<Storage*>(workspace);
  const Storage* x = reinterpret_cast<const Storage*>(product.x);
  const int64_t x_row = packed_row(product, Layout::tiled) * sizeof(float) / sizeof(Storage);
  const int64_t columns = end - begin;
  const int64_t tiles = (product.rows + tile_rows - 1) / tile_rows;
  // Few tiles read a panel soon after it is written: from the first-level cache if it is small.
  const int64_t panel_columns = tiles <= few_tiles ? tile_columns : columns;
  for (int64_t c = 0; c < columns; c += panel_columns) {
    const int64_t width = columns - c < panel_columns ? columns - c : panel_columns;
    for (int64_t first = 0; first < product.K; first += panel) {
      const int64_t length = product.K - first < panel ? product.K - first : panel;
      const int64_t padded = round_up(length, block_elements<Element>);
      for (int64_t i = 0; i < width; ++i) {
        decode_row<Element, Tile>(product, begin + c + i, product.K, first, length, decoded + i * panel_stride);
      }
      for_tiles<tile_rows>(product.rows, [&](int64_t m, int64_t rows) {
        with_rows<tile_rows>(rows, [&](auto height) {
          multiply_columns<Tile, height>(
              x + m * x_row + first, x_row, decoded, panel_stride, padded, first > 0, width, y + m * product.y_row + c,
              product.y_row);
        });
      });
    }
  }
}

struct Tiled {
  template <typename Element>
  static void run(const Product& product, int64_t begin, int64_t end, float* workspace, float* y) {
    if constexpr (Vector::has_bfloat16) {
      if (bfloat16_terms(product, Layout::tiled) == 1) {
        return multiply_panels<Element, BFloat16Tile<Vector>>(product, begin, end, workspace, y);
      }
    }
    multiply_panels<Element, Float32Tile>(product, begin, end, workspace, y);
  }
};

// --- broadcast ------------------------------------------------------------------------------------------------------
// Tiles of x rows by vectors of columns: every value of x meets vectors that hold one element of as many columns. Sums
// need no adding up and K no padding, but units have to be transposed, which pays from some tens of rows on:
//
//     column     0    1    2   ...
//     unit 0    e0.. e0.. e0..   one word each    -> e0 of all columns, e1 of all columns, ...   = steps of a panel
//     unit 1    e8.. e8.. e8..
//
// A step is an element, or a pair where the machine multiplies bfloat16: 32 bits of every lane in any case.

constexpr int tile_vectors = 2;
constexpr int broadcast_rows = Vector::registers >= 32 ? 12 : 6;
constexpr int panel_columns = tile_vectors * lanes;
static_assert(broadcast_columns % panel_columns == 0);
constexpr int64_t panel_steps = 512;

// For lanes whose number has the bit `stride`, what the first half of a butterfly takes; else the second.
template <int stride, bool second, int... lane>
ALWAYS_INLINE Words exchanged(Words a, Words b, std::integer_sequence<int, lane...>) {
#if defined(__clang__)
  if constexpr (second) {
    return __builtin_shufflevector(a, b, ((lane & stride) ? lane + lanes : lane + stride)...);
  } else {
    return __builtin_shufflevector(a, b, ((lane & stride) ? lane - stride + lanes : lane)...);
  }
#else
  if constexpr (second) {
    return __builtin_shuffle(a, b, Words{((lane & stride) ? lane + lanes : lane + stride)...});
  } else {
    return __builtin_shuffle(a, b, Words{((lane & stride) ? lane - stride + lanes : lane)...});
  }
#endif
}

// Lane j of vector i becomes lane i of vector j, by exchanging blocks of half the size at each step.
template <int stride = lanes / 2>
ALWAYS_INLINE void transpose(Words (&rows)[lanes]) {
  unrolled<lanes>([&](auto i) __attribute__((always_inline)) {
    if constexpr ((i & stride) == 0) {
      constexpr auto all = std::make_integer_sequence<int, lanes>();
      const Words a = rows[i];
      const Words b = rows[i + stride];
      rows[i] = exchanged<stride, false>(a, b, all);
      rows[i + stride] = exchanged<stride, true>(a, b, all);
    }
  });
  if constexpr (stride > 1) {
    transpose<stride / 2>(rows);
  }
}

template <typename Element, typename Units>
ALWAYS_INLINE void transpose_units(Units (&units)[lanes]) {
  const auto part = [&](auto&& member) __attribute__((always_inline)) {
    Words words[lanes];
    for (int i = 0; i < lanes; ++i) {
      words[i] = (Words)member(units[i]);
    }
    transpose(words);
    for (int i = 0; i < lanes; ++i) {
      member(units[i]) = (I)words[i];
    }
  };
  if constexpr (requires(Units unit) { unit.low; }) {
    part([](Units& unit) -> I& { return unit.low; });
    if constexpr (Element::bits == 5) {
      part([](Units& unit) -> I& { return unit.high; });
    }
  } else {
    part([](Units& unit) -> I& { return unit; });
  }
}

// One vector of scales for each of `count` groups, at most `lanes`, from those of as many columns.
ALWAYS_INLINE void transposed_scales(
    ScaleType type,
    const uint8_t* source,
    const int64_t (&columns)[lanes],
    int64_t count,
    float* destination) {
  Words words[lanes];
  for (int c = 0; c < lanes; ++c) {
    words[c] = (Words)load_first_scales(type, source + columns[c], count);
  }
  transpose(words);
  for (int g = 0; g < lanes; ++g) {
    Vector::store(destination + g * lanes, (F)words[g]);
  }
}

// Elements first to first + length of `lanes` columns from n on, as steps of a panel. Behind `end` stands the last
// column again.
template <typename Element, typename Units>
void decode_columns(const Product& product, int64_t n, int64_t end, int64_t first, int64_t length, float* panel) {
  using Codes = typename Units::Codes;
  constexpr int per_unit = positions<Element>;
  constexpr int block = block_elements<Element>;
  constexpr int elements_per_step = sizeof(float) / sizeof(typename Units::Storage);
  const int group_size = product.format.group_size;
  const int shift = Spread<Element>(group_size).shift;
  const int64_t row_bytes = product.K * Element::bits / 8;
  const int bytes = scale_bytes(product.scale_type);
  int64_t codes[lanes];
  int64_t scales[lanes];
  for (int c = 0; c < lanes; ++c) {
    const int64_t column = n + c < end ? n + c : end - 1;
    codes[c] = column * row_bytes;
    scales[c] = column * (product.K / group_size) * bytes;
  }
  alignas(64) float scale[lanes * lanes];
  alignas(64) float bias[lanes * lanes] = {};
  const int64_t chunk = static_cast<int64_t>(lanes) * group_size;
  for (int64_t start = first; start < first + length; start += chunk) {
    const int64_t stop = start + chunk < first + length ? start + chunk : first + length;
    const int64_t groups = (stop - start) / group_size;
    const int64_t offset = start / group_size * bytes;
    transposed_scales(product.scale_type, product.scales + offset, scales, groups, scale);
    if (product.biases != nullptr) {
      transposed_scales(product.scale_type, product.biases + offset, scales, groups, bias);
    }
    for (int64_t k = start; k < stop; k += block) {
      const int64_t byte = k * Element::bits / 8;
      typename Codes::Units units[lanes];
      for (int c = 0; c < lanes; ++c) {
        const uint8_t* source = product.words + codes[c] + byte;
        prefetch(source + lanes * row_bytes, block_bytes<Element>);
        units[c] = load_block<Codes, block_bytes<Element>>(source, row_bytes - byte);
      }
      transpose_units<Element>(units);
      const int64_t count = (stop - k < block ? stop - k : block) / per_unit;
      for (int64_t i = 0; i < count; ++i) {
        const int64_t group = ((k - start) / per_unit + i) >> shift;
        float* steps = panel + (k - first + i * per_unit) / elements_per_step * panel_columns;
        Units::store(
            units[i], Vector::load(scale + group * lanes), Vector::load(bias + group * lanes),
            reinterpret_cast<typename Units::Storage*>(steps), panel_columns * elements_per_step);
      }
    }
  }
}

// Where the steps of column n of a task are, from the first of its panels on.
ALWAYS_INLINE float* panel_of(float* panels, int64_t n) {
  return panels + n / panel_columns * panel_columns * panel_steps + n % panel_columns;
}

// Elements first to first + length of `columns` column-packed columns from `begin` on, as steps of panels: transposed
// they are already. Behind `end` stand zeros. The rows of a group lie far apart, and are asked for while those of
// the one before are decoded.
template <typename Element, typename Units>
void decode_packed_columns(
    const Product& product,
    int64_t begin,
    int64_t end,
    int64_t columns,
    int64_t first,
    int64_t length,
    float* panels) {
  using Codes = typename Units::Codes;
  constexpr int per_unit = positions<Element>;
  constexpr int word_bytes = unit_bytes(Element::bits);
  constexpr int elements_per_step = sizeof(float) / sizeof(typename Units::Storage);
  const int group_size = product.format.group_size;
  const int bytes = scale_bytes(product.scale_type);
  const int64_t ahead = group_size / per_unit * product.N * word_bytes;
  F scales[max_tiled_columns / lanes];
  F biases[max_tiled_columns / lanes];
  for (int64_t k = first; k < first + length; k += group_size) {
    prefetch_scales(product, k / group_size + 1, begin, columns);
    for (int64_t n = 0; n < columns; n += lanes) {
      const int64_t count = end > begin + n ? end - begin - n : 0;
      const int64_t position = k / group_size * product.N + begin + n;
      scales[n / lanes] = load_first_scales(product.scale_type, product.scales + position * bytes, count);
      biases[n / lanes] = has_column_bias(product.format.mode)
          ? Vector::mul(negated_zeros(product, position, count), scales[n / lanes])
          : Vector::zero();
    }
    for (int64_t element = k; element < k + group_size; element += per_unit) {
      const uint8_t* row = product.words + (element / per_unit * product.N + begin) * word_bytes;
      prefetch(row + ahead, columns * word_bytes);
      for (int64_t n = 0; n < columns; n += lanes) {
        const int64_t count = end > begin + n ? end - begin - n : 0;
        float* steps = panel_of(panels, n) + (element - first) / elements_per_step * panel_columns;
        Units::store(
            load_block<Codes, block_bytes<Element>>(row + n * word_bytes, count * word_bytes), scales[n / lanes],
            biases[n / lanes], reinterpret_cast<typename Units::Storage*>(steps), panel_columns * elements_per_step);
      }
    }
  }
}

// Adds the products of `steps` steps to the sums of a tile, as one addend: a long sum of small addends is less exact.
template <typename Tile, int ROWS>
void broadcast_tile(
    const float* x,
    int64_t x_row,
    const float* w,
    int64_t w_row,
    int64_t steps,
    float* sums,
    int64_t sums_row) {
  F total[ROWS][tile_vectors];
  clear(total);
  for (int64_t k = 0; k < steps; ++k) {
    typename Tile::Operand weights[tile_vectors];
    for (int v = 0; v < tile_vectors; ++v) {
      weights[v] = Tile::load(w + k * w_row + v * lanes);
    }
    for (int m = 0; m < ROWS; ++m) {
      const auto activation = Tile::broadcast(x + m * x_row + k);
      for (int v = 0; v < tile_vectors; ++v) {
        total[m][v] = Tile::multiply_add(activation, weights[v], total[m][v]);
      }
    }
  }
  for (int m = 0; m < ROWS; ++m) {
    for (int v = 0; v < tile_vectors; ++v) {
      float* sum = sums + m * sums_row + v * lanes;
      Vector::store(sum, Vector::add(Vector::load(sum), total[m][v]));
    }
  }
}

// Rows of x by the decoded steps of some panels, each of panel_columns columns.
struct Broadcasting {
  int64_t rows;
  const float* x;
  int64_t x_row;
  float* panels;
  int64_t columns;
  int64_t steps;
  float* sums;
  int64_t sums_row;
};

template <typename Tile>
struct VectorTiles {
  static void multiply(const Broadcasting& task) {
    for_tiles<broadcast_rows>(task.rows, [&](int64_t m, int64_t rows) {
      with_rows<broadcast_rows>(rows, [&](auto height) {
        for (int64_t n = 0; n < task.columns; n += panel_columns) {
          broadcast_tile<Tile, height>(
              task.x + m * task.x_row, task.x_row, task.panels + n * panel_steps, panel_columns, task.steps,
              task.sums + m * task.sums_row + n, task.sums_row);
        }
      });
    });
  }
};

template <typename Element, typename Units>
void decode_panels(
    const Product& product,
    int64_t begin,
    int64_t end,
    int64_t columns,
    int64_t first,
    int64_t length,
    float* panels) {
  if constexpr (may_be_column_packed<Element>) {
    if (is_column_packed(product.format.mode)) {
      return decode_packed_columns<Element, Units>(product, begin, end, columns, first, length, panels);
    }
  }
  for (int64_t n = 0; n < columns; n += lanes) {
    decode_columns<Element, Units>(product, begin + n, end, first, length, panel_of(panels, n));
  }
}

template <typename Element, typename Tiles, typename Units>
void broadcast_panels(const Product& product, int64_t begin, int64_t end, float* workspace, float* y) {
  constexpr int elements_per_step = sizeof(float) / sizeof(typename Units::Storage);
  constexpr int64_t panel_elements = panel_steps * elements_per_step;
  const int64_t columns = round_up(end - begin, panel_columns);
  std::memset(y, 0, sizeof(float) * static_cast<size_t>(product.rows * product.y_row));
  for (int64_t first = 0; first < product.K; first += panel_elements) {
    const int64_t length = product.K - first < panel_elements ? product.K - first : panel_elements;
    decode_panels<Element, Units>(product, begin, end, columns, first, length, workspace);
    Tiles::multiply(
        {product.rows, product.x + first / elements_per_step, packed_row(product, Layout::broadcast), workspace,
         columns, length / elements_per_step, y, product.y_row});
  }
}

// As measured: what it saves over the tiled product grows with the rows, and what transposing costs grows with K.
// Columns that are packed stream instead, in tiles of rows each of which decodes them: not more often than it costs.
bool broadcasting_pays(const Product& product) {
  const int64_t tiles = is_e4m3(product.format.mode) ? 1 : 4;
  return is_column_packed(product.format.mode) ? product.rows > tiles * max_streamed_rows
                                               : 40 * product.rows > product.K;
}

struct Broadcast {
  template <typename Element>
  static void run(const Product& product, int64_t begin, int64_t end, float* workspace, float* y) {
    if constexpr (Vector::has_bfloat16) {
      if (bfloat16_terms(product, Layout::broadcast) == 1) {
        return broadcast_panels<Element, VectorTiles<BFloat16Tile<Vector>>, ScaledPairs<Element, Vector>>(
            product, begin, end, workspace, y);
      }
    }
    broadcast_panels<Element, VectorTiles<Float32Tile>, ScaledBlocks<Element>>(product, begin, end, workspace, y);
  }
};

// --- plain ----------------------------------------------------------------------------------------------------------
// One block of columns at a time: decode a few rows of w, then add x[m, k] times them to the sums of the block.

constexpr int64_t plain_panel_rows = 32;

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
        for_tiles<broadcast_rows>(product.rows, [&](int64_t m, int64_t rows) {
          with_rows<broadcast_rows>(rows, [&](auto height) {
            for (int v = 0; v < per_unit; v += tile_vectors) {
              broadcast_tile<Float32Tile, height>(
                  product.x + m * x_row + first, x_row, decoded + v * lanes, block, length,
                  sums + m * block + v * lanes, block);
            }
          });
        });
      }
      for (int64_t m = 0; m < product.rows; ++m) {
        for (int64_t c = 0; c < columns; ++c) {
          const int64_t position = c % per_unit * lanes + c / per_unit;
          y[m * product.y_row + (n - begin) + c] = sums[m * block + position];
        }
      }
    }
  }
};

// --- The table ------------------------------------------------------------------------------------------------------

template <typename Kernel>
void for_format(const Product& product, int64_t begin, int64_t end, float* workspace, float* y) {
  if (is_e2m1(product.format.mode)) {
    return Kernel::template run<E2M1Element>(product, begin, end, workspace, y);
  }
  if (is_e4m3(product.format.mode)) {
    return Kernel::template run<E4M3Element>(product, begin, end, workspace, y);
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
  const int64_t tiled = max_tiled_columns * panel_stride_floats;
  static_assert(panel_steps <= panel_stride_floats);  // so that it is enough for the broadcasting product
  const int64_t plain = (plain_panel_rows + product.rows) * block;
  return tiled > plain ? tiled : plain;
}

}  // namespace

#include "decoder.h"

namespace {

constexpr ProductKernels exact_table{
    broadcasting_pays,     packed_row,       pack_row, workspace, streamed, for_format<Tiled>,
    for_format<Broadcast>, for_format<Plain>};

// bfloat16 tells whether this machine multiplies it.
constexpr Kernels make_table(
    const char* name,
    bool bfloat16,
    bool split,
    const ProductKernels* int8 = nullptr,
    const ProductKernels& exact = exact_table) {
  return {name, bfloat16, split, exact, int8, narrow, decoder_table};
}

}  // namespace
