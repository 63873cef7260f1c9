// The broadcasting product of bfloat16 on AMX, for processors that have it.
//
// A tile register holds 16 rows of 64 bytes, and a panel is made of such rows: the pairs of 16 columns at one step. One
// instruction multiplies 16 rows of x by 16 columns, 16 steps deep, and so does 8192 multiplications where one on
// vectors does 32. Two tiles of x and two of w make four independent products of four loads:
//
//                        columns 0..15   16..31
//                           tile 6       tile 7
//     rows 0..15   tile 4   sums 0       sums 1
//         16..31   tile 5   sums 2       sums 3
#pragma once

#ifndef QUANTIZATION_MLX_VECTOR
#define QUANTIZATION_MLX_VECTOR "avx512.h"
#endif

#include <immintrin.h>
#if defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "table.h"

namespace quantization_mlx::cpu {
namespace {

constexpr int matrix_rows = 16;  // of a tile; as many steps of w as rows of x
constexpr int matrix_step_bytes = 64;
static_assert(panel_columns == 2 * lanes && matrix_step_bytes == lanes * sizeof(float));

// What LDTILECFG reads.
struct alignas(64) TileShapes {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  // For `upper` rows of x and `lower` ones below them.
  TileShapes(int64_t upper, int64_t lower) {
    const int64_t heights[] = {upper, upper, lower, lower, upper, lower, matrix_rows, matrix_rows};
    for (int i = 0; i < 8; ++i) {
      rows[i] = static_cast<uint8_t>(heights[i]);
      row_bytes[i] = heights[i] == 0 ? 0 : matrix_step_bytes;
    }
  }
};

// At most 32 rows of x by the columns of one panel; BOTH tells whether there are more than 16.
template <bool BOTH>
void multiply_matrices(Rows<const float> x, const float* w, int64_t steps, Rows<float> sums) {
  constexpr int64_t w_bytes = panel_columns * sizeof(float);
  const int64_t x_bytes = x.stride * sizeof(float);
  const int64_t sums_bytes = sums.stride * sizeof(float);
  float* upper_sums = sums[0];
  float* lower_sums = sums[matrix_rows];
  _tile_loadd(0, upper_sums, sums_bytes);
  _tile_loadd(1, upper_sums + lanes, sums_bytes);
  if constexpr (BOTH) {
    _tile_loadd(2, lower_sums, sums_bytes);
    _tile_loadd(3, lower_sums + lanes, sums_bytes);
  }
  for (int64_t step = 0; step < steps; step += matrix_rows) {
    _tile_loadd(4, x[0] + step, x_bytes);
    _tile_loadd(6, w + step * panel_columns, w_bytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, w + step * panel_columns + lanes, w_bytes);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (BOTH) {
      _tile_loadd(5, x[matrix_rows] + step, x_bytes);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, upper_sums, sums_bytes);
  _tile_stored(1, upper_sums + lanes, sums_bytes);
  if constexpr (BOTH) {
    _tile_stored(2, lower_sums, sums_bytes);
    _tile_stored(3, lower_sums + lanes, sums_bytes);
  }
}

struct MatrixTiles {
  static void multiply(const Broadcasting& task) {
    // Tiles are 16 steps deep. Rows of x end in zeros; a panel has what was there before.
    const int64_t steps = round_up(task.steps, matrix_rows);
    if (steps > task.steps) {
      for (int64_t n = 0; n < task.columns; n += panel_columns) {
        std::memset(
            task.panels + n * panel_steps + task.steps * panel_columns, 0,
            sizeof(float) * static_cast<size_t>((steps - task.steps) * panel_columns));
      }
    }
    for_tiles<2 * matrix_rows>(task.rows, [&](int64_t m, int64_t rows) {
      const int64_t upper = min(rows, matrix_rows);
      const TileShapes shapes(upper, rows - upper);
      _tile_loadconfig(&shapes);
      const float* x = task.x[m];
      for (int64_t n = 0; n < task.columns; n += panel_columns) {
        const float* panel = task.panels + n * panel_steps;
        float* sums = task.sums[m] + n;
        if (rows > matrix_rows) {
          multiply_matrices<true>({x, task.x.stride}, panel, steps, {sums, task.sums.stride});
        } else {
          multiply_matrices<false>({x, task.x.stride}, panel, steps, {sums, task.sums.stride});
        }
      }
    });
    _tile_release();
  }
};

struct MatrixBroadcast {
  template <typename Element>
  static void run(const Product& product, int64_t begin, int64_t end, float* workspace, float* y) {
    if (bfloat16_terms(product, Layout::broadcast) == 1) {
      return broadcast_panels<Element, MatrixTiles, ScaledPairs<Element, Vector>>(product, begin, end, workspace, y);
    }
    Broadcast::run<Element>(product, begin, end, workspace, y);
  }
};

// For all rows that are not streamed: decoding costs more than in the tiled product, and multiplying next to nothing.
bool matrix_broadcast_is_faster(const Product& product) {
  return bfloat16_terms(product, Layout::broadcast) == 1 || broadcast_is_faster(product);
}

constexpr ProductKernels matrix_table = [] {
  ProductKernels table = exact_table;
  table.broadcast_is_faster = matrix_broadcast_is_faster;
  table.multiply[static_cast<int>(Layout::broadcast)] = for_format<MatrixBroadcast>;
  return table;
}();

// Whether the processor has AMX for bfloat16 and the system lets this process use it.
bool has_matrix_tiles() {
#if defined(__linux__)
  unsigned eax, ebx, ecx, edx;
  constexpr unsigned bfloat16_and_tiles = 1u << 22 | 1u << 24;
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0 || (edx & bfloat16_and_tiles) != bfloat16_and_tiles) {
    return false;
  }
  constexpr long request_permission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr long tile_data = 18;
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}

}  // namespace
}  // namespace quantization_mlx::cpu
