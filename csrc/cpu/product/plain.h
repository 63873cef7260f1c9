// Untransposed weights: units run along N, and so do lanes. One block of columns at a time: decode a few rows of w,
// then add x[m, k] times them to the sums of the block.
#pragma once

#include "broadcast.h"

namespace quantization_mlx::cpu {
namespace {

constexpr int64_t plain_panel_rows = 32;

struct Plain {
  template <typename Element>
  static void run(const Product& product, int64_t begin, int64_t end, float* workspace, float* y) {
    constexpr int block = block_elements<Element>;
    static_assert(plain_columns(Element::bits) % block == 0);
    constexpr int per_unit = positions<Element>;
    float* decoded = workspace;
    float* sums = workspace + plain_panel_rows * block;
    const int64_t x_row = packed_row(product, Layout::plain);
    for (int64_t n = begin; n < end; n += block) {
      const int64_t columns = min(end - n, block);
      std::memset(sums, 0, sizeof(float) * static_cast<size_t>(product.rows * block));
      for (int64_t first = 0; first < product.K; first += plain_panel_rows) {
        const int64_t length = min(product.K - first, plain_panel_rows);
        for (int64_t k = 0; k < length; ++k) {
          decode_row<Element, Float32Tile>(product, {first + k, product.N, n, columns}, decoded + k * block);
        }
        for_constant_tiles<broadcast_rows>(product.rows, [&](int64_t m, auto height) {
          for (int v = 0; v < per_unit; v += tile_vectors) {
            broadcast_tile<Float32Tile, height>(
                {product.x + m * x_row + first, x_row}, {decoded + v * lanes, block}, length,
                {sums + m * block + v * lanes, block});
          }
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

}  // namespace
}  // namespace quantization_mlx::cpu
