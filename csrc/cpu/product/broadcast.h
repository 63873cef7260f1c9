// Many rows of x: as in tiled.h, but lanes run along N. Every value of x meets vectors that hold one element of as many
// columns, so that sums need no adding up and K no padding. Units have to be transposed for that, which pays from some
// tens of rows on; column-packed weights have that order already.
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

// Elements [first, first + length) of the columns [begin, begin + columns), and where they are decoded to. Columns from
// `end` on repeat the last one or, of column-packed weights, are zeros.
struct Panels {
  int64_t begin;
  int64_t end;
  int64_t columns;
  int64_t first;
  int64_t length;
  float* memory;

  // Step `step` of column begin + n.
  ALWAYS_INLINE float* at(int64_t n, int64_t step) const {
    return memory + n / panel_columns * panel_columns * panel_steps + n % panel_columns + step * panel_columns;
  }
};

template <typename Blocks>
constexpr int elements_per_step = sizeof(float) / sizeof(typename Blocks::Storage);

template <typename Blocks>
ALWAYS_INLINE void store_steps(const typename Blocks::Units& units, F scale, F bias, float* steps) {
  Blocks::store(
      units, scale, bias, reinterpret_cast<typename Blocks::Storage*>(steps),
      panel_columns * elements_per_step<Blocks>);
}

// `lanes` columns, of which the first is begin + n.
template <typename Element, typename Blocks>
void decode_columns(const Product& product, const Panels& panels, int64_t n) {
  constexpr int per_unit = positions<Element>;
  constexpr int block = block_elements<Element>;
  const int group_size = product.format.group_size;
  const int shift = Spread<Element>(group_size).shift;
  const int64_t row_bytes = product.K * Element::bits / 8;
  const ScaleType type = product.format.scale_type;
  int64_t codes[lanes];
  int64_t scales[lanes];
  for (int c = 0; c < lanes; ++c) {
    const int64_t column = min(panels.begin + n + c, panels.end - 1);
    codes[c] = column * row_bytes;
    scales[c] = column * (product.K / group_size) * scale_bytes(type);
  }
  alignas(64) float scale[lanes * lanes];
  alignas(64) float bias[lanes * lanes] = {};
  float* const steps = panels.at(n, 0);
  const int64_t chunk = static_cast<int64_t>(lanes) * group_size;
  for (int64_t start = panels.first; start < panels.first + panels.length; start += chunk) {
    const int64_t stop = min(start + chunk, panels.first + panels.length);
    const int64_t groups = (stop - start) / group_size;
    const int64_t offset = start / group_size * scale_bytes(type);
    transposed_scales(type, product.scales + offset, scales, groups, scale);
    if (product.biases != nullptr) {
      transposed_scales(type, product.biases + offset, scales, groups, bias);
    }
    for (int64_t k = start; k < stop; k += block) {
      const int64_t byte = k * Element::bits / 8;
      typename Blocks::Units units[lanes];
      for (int c = 0; c < lanes; ++c) {
        const uint8_t* source = product.words + codes[c] + byte;
        prefetch(source + lanes * row_bytes, block_bytes<Element>);
        units[c] = load_block<typename Blocks::Codes, block_bytes<Element>>(source, row_bytes - byte);
      }
      transpose_units<Element>(units);
      const int64_t count = min(stop - k, block) / per_unit;
      for (int64_t i = 0; i < count; ++i) {
        const int64_t group = ((k - start) / per_unit + i) >> shift;
        store_steps<Blocks>(
            units[i], Vector::load(scale + group * lanes), Vector::load(bias + group * lanes),
            steps + (k - panels.first + i * per_unit) / elements_per_step<Blocks> * panel_columns);
      }
    }
  }
}

// Without a transposition. The word rows of a group lie far apart: they are prefetched while the group before is
// decoded.
template <typename Element, typename Blocks>
void decode_packed_columns(const Product& product, const Panels& panels) {
  constexpr int per_unit = positions<Element>;
  constexpr int word_bytes = unit_bytes(Element::bits);
  const int group_size = product.format.group_size;
  const ScaleType type = product.format.scale_type;
  const int64_t ahead = group_size / per_unit * product.N * word_bytes;
  F scales[max_tiled_columns / lanes];
  F biases[max_tiled_columns / lanes];
  for (int64_t k = panels.first; k < panels.first + panels.length; k += group_size) {
    prefetch_scales(product, k / group_size + 1, panels.begin, panels.columns);
    for (int64_t n = 0; n < panels.columns; n += lanes) {
      const int64_t count = panels.end > panels.begin + n ? panels.end - panels.begin - n : 0;
      const int64_t position = k / group_size * product.N + panels.begin + n;
      const F scale = load_first_scales(type, product.scales + position * scale_bytes(type), count);
      scales[n / lanes] = scale;
      biases[n / lanes] =
          product.has_offset() ? Vector::mul(negated_zeros(product, position, count), scale) : Vector::zero();
    }
    for (int64_t element = k; element < k + group_size; element += per_unit) {
      const uint8_t* row = product.words + (element / per_unit * product.N + panels.begin) * word_bytes;
      const int64_t step = (element - panels.first) / elements_per_step<Blocks>;
      prefetch(row + ahead, panels.columns * word_bytes);
      for (int64_t n = 0; n < panels.columns; n += lanes) {
        const int64_t count = panels.end > panels.begin + n ? panels.end - panels.begin - n : 0;
        store_steps<Blocks>(
            load_block<typename Blocks::Codes, block_bytes<Element>>(row + n * word_bytes, count * word_bytes),
            scales[n / lanes], biases[n / lanes], panels.at(n, step));
      }
    }
  }
}

template <typename Element, typename Blocks>
void decode_panels(const Product& product, const Panels& panels) {
  if constexpr (may_be_column_packed<Element>) {
    if (product.format.is_column_packed()) {
      return decode_packed_columns<Element, Blocks>(product, panels);
    }
  }
  for (int64_t n = 0; n < panels.columns; n += lanes) {
    decode_columns<Element, Blocks>(product, panels, n);
  }
}

// Adds the products of `steps` steps to the sums of a tile. They are summed among themselves first, which is more exact
// than one long sum.
template <typename Tile, int ROWS>
void broadcast_tile(Rows<const float> x, Rows<const float> w, int64_t steps, Rows<float> sums) {
  F total[ROWS][tile_vectors];
  clear(total);
  for (int64_t k = 0; k < steps; ++k) {
    typename Tile::Operand weights[tile_vectors];
    for (int v = 0; v < tile_vectors; ++v) {
      weights[v] = Tile::load(w[k] + v * lanes);
    }
    for (int m = 0; m < ROWS; ++m) {
      const auto activation = Tile::broadcast(x[m] + k);
      for (int v = 0; v < tile_vectors; ++v) {
        total[m][v] = Tile::multiply_add(activation, weights[v], total[m][v]);
      }
    }
  }
  for (int m = 0; m < ROWS; ++m) {
    for (int v = 0; v < tile_vectors; ++v) {
      float* sum = sums[m] + v * lanes;
      Vector::store(sum, Vector::add(Vector::load(sum), total[m][v]));
    }
  }
}

// Rows of x times decoded panels, each of panel_columns columns.
struct Broadcasting {
  int64_t rows;
  Rows<const float> x;
  float* panels;
  int64_t columns;
  int64_t steps;
  Rows<float> sums;
};

template <typename Tile>
struct VectorTiles {
  static void multiply(const Broadcasting& task) {
    for_constant_tiles<broadcast_rows>(task.rows, [&](int64_t m, auto height) {
      for (int64_t n = 0; n < task.columns; n += panel_columns) {
        broadcast_tile<Tile, height>(
            {task.x[m], task.x.stride}, {task.panels + n * panel_steps, panel_columns}, task.steps,
            {task.sums[m] + n, task.sums.stride});
      }
    });
  }
};

template <typename Element, typename Tiles, typename Blocks>
void broadcast_panels(const Product& product, int64_t begin, int64_t end, float* workspace, float* y) {
  constexpr int per_step = elements_per_step<Blocks>;
  const int64_t columns = round_up(end - begin, panel_columns);
  const int64_t x_row = packed_row(product, Layout::broadcast);
  std::memset(y, 0, sizeof(float) * static_cast<size_t>(product.rows * product.y_row));
  for (int64_t first = 0; first < product.K; first += panel_steps * per_step) {
    const int64_t length = min(product.K - first, panel_steps * per_step);
    decode_panels<Element, Blocks>(product, {begin, end, columns, first, length, workspace});
    Tiles::multiply(
        {product.rows,
         {product.x + first / per_step, x_row},
         workspace,
         columns,
         length / per_step,
         {y, product.y_row}});
  }
}

// As measured: what it saves over the tiled product grows with the rows, and what transposing costs grows with K. The
// alternative for column-packed weights is to stream them, which decodes them once for each tile of rows.
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
