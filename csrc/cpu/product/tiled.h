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

// Of one column: long enough that the lanes of a tile's sums are rarely added up, short enough that the rows and
// columns of a tile are in the first-level cache together.
constexpr int64_t panel_bytes = 4096;
constexpr int64_t last_panel_bytes = panel_bytes * 3 / 2;  // at most: a short one of its own costs more
constexpr int64_t panel_stride_floats = spaced(last_panel_bytes / static_cast<int64_t>(sizeof(float)));
constexpr int tile_rows = Vector::registers >= 32 ? 6 : 3;
constexpr int tile_columns = 4;
constexpr int64_t few_tiles = 16;  // whose rows of x stay in the second-level cache with it

// y = x * transposed w, or y += that.
template <typename Tile, int ROWS, int COLUMNS, typename Storage = typename Tile::Storage>
void multiply_tile(Rows<const Storage> x, Rows<const Storage> w, int64_t length, bool accumulate, Rows<float> y) {
  F total[ROWS][COLUMNS];
  clear(total);
  for (int64_t k = 0; k < length; k += Tile::step) {
    typename Tile::Operand activation[ROWS];
    for (int m = 0; m < ROWS; ++m) {
      activation[m] = Tile::load(x[m] + k);
    }
    for (int c = 0; c < COLUMNS; ++c) {
      const auto weight = Tile::load(w[c] + k);
      for (int m = 0; m < ROWS; ++m) {
        total[m][c] = Tile::multiply_add(activation[m], weight, total[m][c]);
      }
    }
  }
  for (int m = 0; m < ROWS; ++m) {
    float sums[COLUMNS];
    sum_lanes(total[m], sums);
    for (int c = 0; c < COLUMNS; ++c) {
      y[m][c] = (accumulate ? y[m][c] : 0.0f) + sums[c];
    }
  }
}

template <typename Element, typename Tile>
void multiply_panels(const Product& product, int64_t begin, int64_t end, float* workspace, float* y) {
  using Storage = typename Tile::Storage;
  constexpr int64_t panel = panel_bytes / sizeof(Storage);
  constexpr int64_t last_panel = last_panel_bytes / sizeof(Storage);
  constexpr int64_t per_float = sizeof(float) / sizeof(Storage);
  constexpr int64_t panel_stride = panel_stride_floats * per_float;
  Storage* decoded = reinterpret_cast<Storage*>(workspace);
  const Rows<const Storage> x{
      reinterpret_cast<const Storage*>(product.x), packed_row(product, Layout::tiled) * per_float};
  const int64_t columns = end - begin;
  const int64_t tiles = (product.rows + tile_rows - 1) / tile_rows;
  // If tiles are few, a small panel is still in the first-level cache when the last one reads it.
  const int64_t width_at_once = tiles <= few_tiles ? tile_columns : columns;
  for (int64_t c = 0; c < columns; c += width_at_once) {
    const int64_t width = min(columns - c, width_at_once);
    int64_t length = 0;
    for (int64_t first = 0; first < product.K; first += length) {
      const int64_t left = product.K - first;
      length = left <= last_panel ? left : panel;
      const int64_t padded = round_up(length, block_elements<Element>);
      for (int64_t i = 0; i < width; ++i) {
        decode_row<Element, Tile>(product, {begin + c + i, product.K, first, length}, decoded + i * panel_stride);
      }
      for_constant_tiles<tile_rows>(product.rows, [&](int64_t m, auto height) {
        for_columns<tile_columns>(0, width, [&](int64_t n, auto columns) {
          multiply_tile<Tile, height, columns>(
              {x[m] + first, x.stride}, {decoded + n * panel_stride, panel_stride}, padded, first > 0,
              {y + m * product.y_row + c + n, product.y_row});
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

}  // namespace
}  // namespace quantization_mlx::cpu
