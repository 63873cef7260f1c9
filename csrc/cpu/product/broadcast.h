// Many rows of x: as in tiled.h, but lanes run along N. Every value of x meets vectors that hold one element of as many
// columns, so that sums need no adding up and K no padding. Units have to be transposed for that, which pays from some
// tens of rows on; those of column-packed weights stand right as they are.
//
//     column     0    1    2   ...
//     unit 0    e0.. e0.. e0..   one word each    -> e0 of all columns, e1 of all columns, ...   = steps of a panel
//     unit 1    e8.. e8.. e8..
//
// A step is an element, or a pair where the machine multiplies bfloat16: 32 bits of every lane in any case.
#pragma once

#include "columns.h"
#include "decode.h"
#include "transpose.h"

namespace quantization_mlx::cpu {
namespace {

constexpr int tile_vectors = 2;
constexpr int broadcast_rows = Vector::registers >= 32 ? 12 : 6;
constexpr int panel_columns = tile_vectors * lanes;
static_assert(broadcast_columns % panel_columns == 0);
constexpr int64_t panel_steps = 512;

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
  const int bytes = scale_bytes(product.format.scale_type);
  int64_t codes[lanes];
  int64_t scales[lanes];
  for (int c = 0; c < lanes; ++c) {
    const int64_t column = min(n + c, end - 1);
    codes[c] = column * row_bytes;
    scales[c] = column * (product.K / group_size) * bytes;
  }
  alignas(64) float scale[lanes * lanes];
  alignas(64) float bias[lanes * lanes] = {};
  const int64_t chunk = static_cast<int64_t>(lanes) * group_size;
  for (int64_t start = first; start < first + length; start += chunk) {
    const int64_t stop = min(start + chunk, first + length);
    const int64_t groups = (stop - start) / group_size;
    const int64_t offset = start / group_size * bytes;
    transposed_scales(product.format.scale_type, product.scales + offset, scales, groups, scale);
    if (product.biases != nullptr) {
      transposed_scales(product.format.scale_type, product.biases + offset, scales, groups, bias);
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
      const int64_t count = min(stop - k, block) / per_unit;
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
  const int bytes = scale_bytes(product.format.scale_type);
  const int64_t ahead = group_size / per_unit * product.N * word_bytes;
  F scales[max_tiled_columns / lanes];
  F biases[max_tiled_columns / lanes];
  for (int64_t k = first; k < first + length; k += group_size) {
    prefetch_scales(product, k / group_size + 1, begin, columns);
    for (int64_t n = 0; n < columns; n += lanes) {
      const int64_t count = end > begin + n ? end - begin - n : 0;
      const int64_t position = k / group_size * product.N + begin + n;
      scales[n / lanes] = load_first_scales(product.format.scale_type, product.scales + position * bytes, count);
      biases[n / lanes] = product.has_offset() ? Vector::mul(negated_zeros(product, position, count), scales[n / lanes])
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
    for_constant_tiles<broadcast_rows>(task.rows, [&](int64_t m, auto height) {
      for (int64_t n = 0; n < task.columns; n += panel_columns) {
        broadcast_tile<Tile, height>(
            task.x + m * task.x_row, task.x_row, task.panels + n * panel_steps, panel_columns, task.steps,
            task.sums + m * task.sums_row + n, task.sums_row);
      }
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
    if (product.format.is_column_packed()) {
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
    const int64_t length = min(product.K - first, panel_elements);
    decode_panels<Element, Units>(product, begin, end, columns, first, length, workspace);
    Tiles::multiply(
        {product.rows, product.x + first / elements_per_step, packed_row(product, Layout::broadcast), workspace,
         columns, length / elements_per_step, y, product.y_row});
  }
}

// As measured: what it saves over the tiled product grows with the rows, and what transposing costs grows with K.
// Columns that are packed stream instead, in tiles of rows each of which decodes them: not more often than it costs.
bool broadcast_is_faster(const Product& product) {
  const int64_t tiles = product.format.element == Element::e4m3 ? 1 : 4;
  return product.format.is_column_packed() ? product.rows > tiles * max_streamed_rows : 40 * product.rows > product.K;
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

}  // namespace
}  // namespace quantization_mlx::cpu
