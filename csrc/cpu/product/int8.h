// Products with activations quantized to int8, where a vector instruction multiplies bytes. Needs the operations on
// bytes of avx512.h.
//
// Each group of a row of x becomes int8 with one scale, max|x| / 127, rounded to nearest, ties to even. A weight is
// scale * byte + bias, where `byte` is its unsigned code, or in E2M1 twice its value plus 12. So, exactly for the
// rounded x, a group adds
//
//     x_scale * (scale * dot(bytes, x_bytes) + bias * sum(x_bytes))
//
// The dots and the sums of bytes are exact integers; the rest is float32. A group with an infinity or NaN has the scale
// NaN, and one whose values are all below 2^-100 counts as zeros. With the sums of x before rounding the error would be
// about 2.7 times as large: it would multiply codes, whose mean is not near zero, instead of weights.
//
// A byte vector holds four elements of each unit in the unit's 32-bit lane. Of 4-bit and 2-bit units, vector v has
// every second or fourth element from v on, as a shift and a mask give them; at other widths the elements 4 v to 4 v
// + 3.
//
//   streamed  lanes are units of a row of w, as in streamed.h; x is packed as [block][v][lane]
//   broadcast a panel of weights is decoded to bytes whose lanes are columns; four bytes of x, packed as
//             [block][lane][v], are multiplied with all of them
#pragma once

#ifndef QUANTIZATION_MLX_VECTOR
#define QUANTIZATION_MLX_VECTOR "avx512.h"
#endif

#include "tiled.h"
#include "transpose.h"

namespace quantization_mlx::cpu {
namespace {

template <typename Element>
constexpr int byte_vectors = positions<Element> / 4;

// Only 5-bit units do not fit a 32-bit lane: their upper half is a second part.
template <typename Element>
constexpr int unit_parts = Element::bits == 5 ? 2 : 1;

// E4M3 values are not small multiples of one number.
template <typename Element>
constexpr bool has_bytes = !std::is_same_v<Element, E4M3Element>;

// The bytes of E2M1 hold twice the value plus 12.
template <typename Element>
constexpr bool is_fp4 = std::is_same_v<Element, E2M1Element>;

template <typename Element>
struct ByteCodes {
  struct Units {
    I parts[unit_parts<Element>];
  };
  static ALWAYS_INLINE Units load(const uint8_t* codes) {
    Units units;
    unrolled<unit_parts<Element>>([&](auto part) __attribute__((always_inline)) {
      units.parts[part] = Vector::load_byte_units<Element::bits, part>(codes);
    });
    return units;
  }
  // Byte vector v of the unit's part that has it.
  template <int v>
  static ALWAYS_INLINE I bytes_of_part(I part) {
    const I codes = Vector::code_bytes<Element::bits, v>(part);
    if constexpr (is_fp4<Element>) {
      return Vector::doubled_e2m1_plus_12(codes);
    } else {
      return codes;
    }
  }
  template <int v>
  static ALWAYS_INLINE I bytes(const Units& units) {
    return bytes_of_part<v>(units.parts[unit_parts<Element> == 1 ? 0 : v]);
  }
};

struct ScaleAndBias {
  F scale;
  F bias;
};

// A weight is scale * value, and its byte 2 * value + 12.
ALWAYS_INLINE ScaleAndBias scale_and_bias_of_fp4(F scale) {
  return {Vector::mul(scale, Vector::set(0.5f)), Vector::mul(scale, Vector::set(-6.0f))};
}

// The scales and biases by which bytes become weights, of `count` groups at an offset in bytes; then zeros.
template <typename Element>
ALWAYS_INLINE ScaleAndBias load_scale_and_bias(const Product& product, int64_t offset, int64_t count) {
  const F scale = load_first_scales(product.format.scale_type, product.scales + offset, count);
  if constexpr (is_fp4<Element>) {
    return scale_and_bias_of_fp4(scale);
  } else {
    return {scale, load_first_scales(product.format.scale_type, product.biases + offset, count)};
  }
}

// --- Packing x ------------------------------------------------------------------------------------------------------

// A packed row: its bytes, then the scale of each group, then scale * sum(bytes) of each.
struct Int8Row {
  const uint8_t* bytes;
  const float* scales;
  const float* sums;

  Int8Row(const Product& product, int64_t row, int64_t row_floats) {
    const float* start = product.x + row * row_floats;
    bytes = reinterpret_cast<const uint8_t*>(start);
    scales = start + padded_length(product) / 4;
    sums = scales + padded_groups(product);
  }
};

int64_t int8_packed_row(const Product& product, Layout) {
  return spaced(padded_length(product) / 4 + 2 * padded_groups(product));
}

void quantize_group(const Product& product, const uint8_t* x, uint8_t* bytes, float& scale, float& sum) {
  constexpr uint32_t infinity = 0x7F800000u;
  constexpr float negligible = 0x1p-100f;
  I largest = Vector::magnitude_bits(Vector::zero());
  for (int k = 0; k < product.format.group_size; k += lanes) {
    largest = Vector::larger(largest, Vector::magnitude_bits(load_real(product.x_type, x, k)));
  }
  const uint32_t bits = Vector::largest(largest);
  const float magnitude = float_from_bits(bits);
  const bool counts = bits < infinity && magnitude >= negligible;
  const F factor = Vector::set(counts ? 127.0f / magnitude : 0.0f);
  I total = Vector::magnitude_bits(Vector::zero());
  for (int k = 0; k < product.format.group_size; k += lanes) {
    const I rounded = Vector::rounded_integers(Vector::mul(load_real(product.x_type, x, k), factor));
    Vector::store_int8(bytes + k, rounded);
    total = Vector::add_integers(total, rounded);
  }
  const float nothing = bits < infinity ? 0.0f : float_from_bits(0x7FC00000u);
  scale = counts ? magnitude / 127.0f : nothing;
  sum = counts ? scale * static_cast<float>(Vector::sum_integers(total)) : nothing;
}

template <int vectors>
void order_bytes(int bits, Layout layout, int64_t length, uint8_t* bytes) {
  for (int64_t k = 0; k < length; k += 64 * vectors) {
    F elements[vectors];
    for (int v = 0; v < vectors; ++v) {
      const I natural = Vector::load_integers(bytes + k + 64 * v);
      elements[v] = (F)(bits == 4 ? Vector::order_of_shifts<4>(natural)
                                  : (bits == 2 ? Vector::order_of_shifts<2>(natural) : natural));
    }
    if (layout == Layout::streamed) {
      deinterleave<vectors>(elements, elements);
    }
    for (int v = 0; v < vectors; ++v) {
      Vector::store_integers(bytes + k + 64 * v, (I)elements[v]);
    }
  }
}

void int8_pack_row(const Product& product, Layout layout, const void* x, float* packed) {
  const uint8_t* row = static_cast<const uint8_t*>(x);
  const int group_size = product.format.group_size;
  const int64_t length = padded_length(product);
  const int64_t groups = product.K / group_size;
  const int64_t all_groups = padded_groups(product);
  uint8_t* bytes = reinterpret_cast<uint8_t*>(packed);
  float* scales = packed + length / 4;
  float* sums = scales + all_groups;
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t k = group * group_size;
    quantize_group(product, row + k * real_bytes(product.x_type), bytes + k, scales[group], sums[group]);
  }
  std::memset(bytes + product.K, 0, static_cast<size_t>(length - product.K));
  for (int64_t group = groups; group < all_groups; ++group) {
    scales[group] = 0.0f;
    sums[group] = 0.0f;
  }
  with_one_of<8, 16, 32>(unit_elements(product.format.bits), [&](auto per_unit) {
    order_bytes<per_unit / 4>(product.format.bits, layout, length, bytes);
  });
}

// --- streamed -------------------------------------------------------------------------------------------------------

template <typename Element, int ROWS, int COLUMNS>
void int8_streamed_columns(const Product& product, int64_t n, float* y) {
  using Codes = ByteCodes<Element>;
  constexpr int block = block_elements<Element>;
  const int group_size = product.format.group_size;
  const int64_t groups = product.K / group_size;
  const int64_t row_bytes = product.K * Element::bits / 8;
  const int bytes = scale_bytes(product.format.scale_type);
  const int64_t scale_row = groups * bytes;
  const int64_t x_row = int8_packed_row(product, Layout::streamed);
  const Int8Row x(product, 0, x_row);
  const Spread<Element> spread(group_size);

  F total[ROWS][COLUMNS];
  clear(total);
  // The scales of `lanes` groups fill a vector of each column, which the blocks of those groups share.
  for (int64_t group = 0; group < groups; group += lanes) {
    const int64_t count = min(groups - group, lanes);
    F scales[ROWS][COLUMNS];
    for (int c = 0; c < COLUMNS; ++c) {
      const int64_t offset = (n + c) * scale_row + group * bytes;
      prefetch(product.scales + offset + columns_ahead * scale_row, 1);
      if constexpr (!is_fp4<Element>) {
        prefetch(product.biases + offset + columns_ahead * scale_row, 1);
      }
      const ScaleAndBias parameters = load_scale_and_bias<Element>(product, offset, count);
      for (int m = 0; m < ROWS; ++m) {
        scales[m][c] = Vector::mul(parameters.scale, Vector::load(x.scales + m * x_row + group));
        total[m][c] = Vector::fma(parameters.bias, Vector::load(x.sums + m * x_row + group), total[m][c]);
      }
    }
    const int64_t first = group * group_size / block;
    const int64_t blocks = (count * group_size + block - 1) / block;
    for (int64_t i = 0; i < blocks; ++i) {
      const int64_t byte = (first + i) * block_bytes<Element>;
      const uint8_t* activations = x.bytes + (first + i) * block;
      const auto groups_of_lanes = spread.groups_of_lanes(i);
      for (int c = 0; c < COLUMNS; ++c) {
        const uint8_t* codes = product.words + (n + c) * row_bytes + byte;
        prefetch(codes + columns_ahead * row_bytes, block_bytes<Element>);
        const auto units = load_block<Codes, block_bytes<Element>>(codes, row_bytes - byte);
        I dots[ROWS];
        unrolled<byte_vectors<Element>>([&](auto v) __attribute__((always_inline)) {
          const I weights = Codes::template bytes<v>(units);
          for (int m = 0; m < ROWS; ++m) {
            const I sum = v == 0 ? Vector::zero_integers() : dots[m];
            dots[m] = Vector::dot_bytes(weights, Vector::load_integers(activations + m * x_row * 4 + v * 64), sum);
          }
        });
        for (int m = 0; m < ROWS; ++m) {
          const F scale = Vector::lookup(scales[m][c], groups_of_lanes);
          total[m][c] = Vector::fma(Vector::integers_as_floats(dots[m]), scale, total[m][c]);
        }
      }
    }
  }
  for (int m = 0; m < ROWS; ++m) {
    sum_lanes(total[m], y + m * product.y_row);
  }
}

template <typename Element, int ROWS>
void int8_streamed_rows(const Product& product, int64_t begin, int64_t end, float* y) {
  for_columns<ROWS <= 2 ? 4 : 2>(begin, end, [&](int64_t n, auto columns) {
    int8_streamed_columns<Element, ROWS, columns>(product, n, y + (n - begin));
  });
}

struct Int8Streamed {
  template <typename Element>
  static void run(const Product& product, int64_t begin, int64_t end, float*, float* y) {
    if constexpr (has_bytes<Element>) {
      with_rows<max_streamed_rows>(
          product.rows, [&](auto rows) { int8_streamed_rows<Element, rows>(product, begin, end, y); });
    }
  }
};

// --- broadcast ------------------------------------------------------------------------------------------------------
// Here the lanes of a group's dots need not be added up, and its scales apply to whole vectors. A strip is `lanes`
// columns.

constexpr int int8_tile_rows = 6;
constexpr int int8_tile_strips = 2;
static_assert(broadcast_columns % (int8_tile_strips * lanes) == 0);
// Elements of K in a panel: a multiple of every block.
constexpr int64_t int8_panel = 1024;
constexpr int64_t int8_strip_bytes = int8_panel * lanes;
// Floats for the scales of the smallest groups, and as many for their biases.
constexpr int64_t int8_strip_scales = int8_panel / 16 * lanes;
constexpr int64_t int8_strip_parameters = 2 * int8_strip_scales;
constexpr int64_t int8_strips = max_tiled_columns / lanes;

int64_t int8_workspace(const Product&) { return int8_strips * (int8_strip_bytes / 4 + int8_strip_parameters); }

// A strip's part of a panel: elements [first, first + length) of columns from n on. Columns from `end` on repeat the
// last one.
struct Int8Strip {
  int64_t n;
  int64_t end;
  int64_t first;
  int64_t length;

  int64_t column(int c) const { return min(n + c, end - 1); }
};

// Into bytes [step of four elements][column][4].
template <typename Element>
void decode_strip(const Product& product, const Int8Strip& strip, uint8_t* bytes) {
  using Codes = ByteCodes<Element>;
  constexpr int block = block_elements<Element>;
  constexpr int vectors = byte_vectors<Element>;
  const int64_t row_bytes = product.K * Element::bits / 8;
  for (int64_t k = 0; k < strip.length; k += block) {
    const int64_t byte = (strip.first + k) * Element::bits / 8;
    const auto store = [&](const uint8_t* rows, int64_t stride, auto part) __attribute__((always_inline)) {
      unrolled<4>([&](auto quarter) __attribute__((always_inline)) {
        I units[4];
        Vector::load_transposed(rows + quarter * 16, stride, units);
        for (int i = 0; i < 4; ++i) {
          unrolled<vectors / unit_parts<Element>>([&](auto j) __attribute__((always_inline)) {
            constexpr int v = unit_parts<Element> == 1 ? j : part;
            Vector::store_integers(
                bytes + (k / 4 + (quarter * 4 + i) * vectors + v) * 64, Codes::template bytes_of_part<v>(units[i]));
          });
        }
      });
    };
    constexpr bool are_words = block_bytes<Element> == 64;
    if (are_words && strip.n + lanes <= strip.end && row_bytes - byte >= 64) {
      store(product.words + strip.n * row_bytes + byte, row_bytes, std::integral_constant<int, 0>());
      continue;
    }
    alignas(64) uint8_t units[unit_parts<Element>][lanes][64];
    for (int c = 0; c < lanes; ++c) {
      const uint8_t* codes = product.words + strip.column(c) * row_bytes + byte;
      const auto of_column = load_block<Codes, block_bytes<Element>>(codes, row_bytes - byte);
      for (int part = 0; part < unit_parts<Element>; ++part) {
        Vector::store_integers(units[part][c], of_column.parts[part]);
      }
    }
    unrolled<unit_parts<Element>>([&](auto part) __attribute__((always_inline)) { store(units[part][0], 64, part); });
  }
}

// Into scales [group][column], and as many biases behind them.
template <typename Element>
void decode_strip_parameters(const Product& product, const Int8Strip& strip, float* scales) {
  const int group_size = product.format.group_size;
  const int bytes = scale_bytes(product.format.scale_type);
  float* biases = scales + int8_strip_scales;
  int64_t columns[lanes];
  for (int c = 0; c < lanes; ++c) {
    columns[c] = strip.column(c) * (product.K / group_size) * bytes;
  }
  const int64_t groups = strip.length / group_size;
  for (int64_t group = 0; group < groups; group += lanes) {
    const int64_t count = min(groups - group, lanes);
    const int64_t offset = (strip.first / group_size + group) * bytes;
    transposed_scales(product.format.scale_type, product.scales + offset, columns, count, scales + group * lanes);
    if constexpr (!is_fp4<Element>) {
      transposed_scales(product.format.scale_type, product.biases + offset, columns, count, biases + group * lanes);
    }
  }
  if constexpr (is_fp4<Element>) {
    for (int64_t i = 0; i < groups * lanes; i += lanes) {
      const ScaleAndBias of_bytes = scale_and_bias_of_fp4(Vector::load(scales + i));
      Vector::store(scales + i, of_bytes.scale);
      Vector::store(biases + i, of_bytes.bias);
    }
  }
}

// A tile's operands; strides count elements of what they point to.
struct Int8Tile {
  const uint8_t* x;  // bytes of the first row and element
  const float* scales;
  const float* sums;
  int64_t x_row;  // in floats
  int64_t rows_after;  // of x behind the tile, to prefetch; none behind the last one, which others may write
  const uint8_t* w;
  const float* scales_of_w;  // biases stand behind those of each strip
  int64_t groups;
  int group_steps;
  bool accumulate;
  float* y;
  int64_t y_row;
  // Weights to prefetch meanwhile, spread evenly: ahead_bytes of each of as many rows of w as the tile has columns.
  const uint8_t* ahead;
  int64_t ahead_row;
  int64_t ahead_bytes;
};

template <int ROWS>
void int8_tile(const Int8Tile& tile) {
  F total[ROWS][int8_tile_strips];
  for (int m = 0; m < ROWS; ++m) {
    for (int s = 0; s < int8_tile_strips; ++s) {
      total[m][s] = tile.accumulate ? Vector::load(tile.y + m * tile.y_row + s * lanes) : Vector::zero();
    }
  }
  const uint8_t* x = tile.x;
  const uint8_t* w = tile.w;
  for (int64_t group = 0; group < tile.groups; ++group) {
    I dots[ROWS][int8_tile_strips];
    clear(dots);
    for (int64_t m = 0; m < tile.rows_after; ++m) {
      __builtin_prefetch(x + (m + ROWS) * tile.x_row * 4);
    }
    for (int64_t c = group; c < int8_tile_strips * lanes; c += tile.groups) {
      prefetch(tile.ahead + c * tile.ahead_row, tile.ahead_bytes);
    }
    for (int step = 0; step < tile.group_steps; ++step) {
      I weights[int8_tile_strips];
      for (int s = 0; s < int8_tile_strips; ++s) {
        weights[s] = Vector::load_integers(w + s * int8_strip_bytes);
      }
      for (int m = 0; m < ROWS; ++m) {
        const I activation = Vector::broadcast_four_bytes(x + m * tile.x_row * 4);
        for (int s = 0; s < int8_tile_strips; ++s) {
          dots[m][s] = Vector::dot_bytes(weights[s], activation, dots[m][s]);
        }
      }
      x += 4;
      w += 64;
    }
    for (int s = 0; s < int8_tile_strips; ++s) {
      const float* scales = tile.scales_of_w + s * int8_strip_parameters + group * lanes;
      const F scale = Vector::load(scales);
      const F bias = Vector::load(scales + int8_strip_scales);
      for (int m = 0; m < ROWS; ++m) {
        const F x_scale = Vector::set(tile.scales[m * tile.x_row + group]);
        const F sum = Vector::set(tile.sums[m * tile.x_row + group]);
        total[m][s] = Vector::fma(bias, sum, total[m][s]);
        total[m][s] = Vector::fma(Vector::mul(Vector::integers_as_floats(dots[m][s]), x_scale), scale, total[m][s]);
      }
    }
  }
  for (int m = 0; m < ROWS; ++m) {
    for (int s = 0; s < int8_tile_strips; ++s) {
      Vector::store(tile.y + m * tile.y_row + s * lanes, total[m][s]);
    }
  }
}

template <typename Element>
void int8_multiply_panels(const Product& product, int64_t begin, int64_t end, float* workspace, float* y) {
  const int64_t x_row = int8_packed_row(product, Layout::streamed);
  const int64_t columns = end - begin;
  const int group_size = product.format.group_size;
  uint8_t* bytes = reinterpret_cast<uint8_t*>(workspace);
  float* parameters = workspace + int8_strips * int8_strip_bytes / 4;
  const int64_t tiles = (product.rows + int8_tile_rows - 1) / int8_tile_rows;
  constexpr int64_t tile_width = int8_tile_strips * lanes;
  // If tiles are few, a small panel is still in the first-level cache when the last one reads it.
  const int64_t width = tiles <= few_tiles ? tile_width : round_up(columns, tile_width);
  for (int64_t c = 0; c < columns; c += width) {
    for (int64_t first = 0; first < product.K; first += int8_panel) {
      const int64_t length = min(product.K - first, int8_panel);
      for (int64_t s = 0; s * lanes < width; ++s) {
        const Int8Strip strip{begin + c + s * lanes, end, first, length};
        decode_strip<Element>(product, strip, bytes + s * int8_strip_bytes);
        decode_strip_parameters<Element>(product, strip, parameters + s * int8_strip_parameters);
      }
      for_tiles<int8_tile_rows>(product.rows, [&](int64_t m, int64_t rows) {
        const Int8Row x(product, m, x_row);
        for (int64_t s = 0; s * lanes < width; s += int8_tile_strips) {
          const int64_t column = c + s * lanes;
          const Int8Tile tile{
              x.bytes + first,
              x.scales + first / group_size,
              x.sums + first / group_size,
              x_row,
              min(product.rows - m - rows, rows),
              bytes + s * int8_strip_bytes,
              parameters + s * int8_strip_parameters,
              length / group_size,
              group_size / 4,
              first > 0,
              y + m * product.y_row + column,
              product.y_row,
              product.words + ((begin + column + width) * product.K + first) * Element::bits / 8,
              product.K * Element::bits / 8,
              m == 0 ? length * Element::bits / 8 : 0};
          with_rows<int8_tile_rows>(rows, [&](auto height) { int8_tile<height>(tile); });
        }
      });
    }
  }
}

struct Int8Broadcast {
  template <typename Element>
  static void run(const Product& product, int64_t begin, int64_t end, float* workspace, float* y) {
    if constexpr (has_bytes<Element>) {
      int8_multiply_panels<Element>(product, begin, end, workspace, y);
    }
  }
};

constexpr ProductKernels int8_table{
    [](const Product&) { return true; },
    int8_packed_row,
    int8_pack_row,
    int8_workspace,
    {for_format<Int8Streamed>, nullptr, for_format<Int8Broadcast>, nullptr}};

}  // namespace
}  // namespace quantization_mlx::cpu
