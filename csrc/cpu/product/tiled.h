// More rows of x: a panel of weights is decoded into the cache once, then multiplied in tiles of rows of x by columns.
//
//                        w: 4 columns
//     x: 6 rows     24 sums in registers
//
// Lanes run along K, in x and in w alike: each vector of x serves 4 multiply-adds, and each vector of w serves 6. The
// lanes of a sum are added up once per panel.
#pragma once

#include "decode.h"
#include "pack.h"

namespace quantization_mlx::cpu {
namespace {

// Of one weight column: so long that adding up the lanes of a tile's sums is rare, so short that a task's panel stays
// in the second-level cache.
constexpr int64_t panel_bytes = 8192;
constexpr int64_t panel_stride_floats = spaced(panel_bytes / static_cast<int64_t>(sizeof(float)));
constexpr int tile_rows = Vector::registers >= 32 ? 6 : 3;
constexpr int tile_columns = 4;
constexpr int64_t few_tiles = 16;  // whose rows of x stay in the second-level cache beside it

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
    sum_lanes(total[m], sums);
    for (int c = 0; c < COLUMNS; ++c) {
      float& result = y[m * y_stride + c];
      result = (accumulate ? result : 0.0f) + sums[c];
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
  const int64_t width_at_once = tiles <= few_tiles ? tile_columns : columns;
  for (int64_t c = 0; c < columns; c += width_at_once) {
    const int64_t width = min(columns - c, width_at_once);
    for (int64_t first = 0; first < product.K; first += panel) {
      const int64_t length = min(product.K - first, panel);
      const int64_t padded = round_up(length, block_elements<Element>);
      for (int64_t i = 0; i < width; ++i) {
        decode_row<Element, Tile>(product, begin + c + i, product.K, first, length, decoded + i * panel_stride);
      }
      for_constant_tiles<tile_rows>(product.rows, [&](int64_t m, auto height) {
        multiply_columns<Tile, height>(
            x + m * x_row + first, x_row, decoded, panel_stride, padded, first > 0, width, y + m * product.y_row + c,
            product.y_row);
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

}  // namespace
}  // namespace quantization_mlx::cpu
