// Tiled products on the matrix units of M5-class GPUs, through Metal 4's tensor operations.
//
// One threadgroup of four simdgroups computes a tile of y, `rows` x 64, and walks K in steps of 64:
//
//            K ->  64     64     64                 w (packed)
//          +------+------+------+---                  |  tile.h: a thread unpacks a run of 32 weights, with scale
//     rows |  x   |  x   |  x   |                     |  and bias, to the type of x
//          +------+------+------+---                  v
//     a tensor in device memory: the       x     +---------+ 64     a tensor in threadgroup memory
//     matrix units read it themselves            |         |
//                                                +---------+
//                                                    64
//          = sums, float32, spread over the 128 threads: a cooperative destination tensor
//
// A weight is unpacked once for all rows of the tile. The packed words of the next step are loaded before the matrix
// units start on this one, which hides their latency. All four simdgroups run one operation together, and the library
// divides it among them. Which sums a thread holds differs between GPU generations, so the tensor is asked.
//
// Tiles of 128 rows unpack each weight half as often as those of 64, where there are enough of them for all cores.
// Where there are few tiles, K is cut up as in matmul.h: threadgroup `part` writes float32 partial sums, and sum_parts
// adds them up.
//
// Whole tiles have static sizes, so that no bounds are checked. Tiles at the edge of M, and a K that is no multiple of
// 64, have sizes known at run time, and nothing beyond the last row or column of x is read.
//
// gather_qmm_rhs: a tile of pairs of one matrix, as in matmul.h. All rows of the tile are multiplied, and those of
// pairs are written. Rows of x can be anywhere, so they are copied to threadgroup memory.
#pragma once

#if __METAL_VERSION__ >= 400 && __has_include(<MetalPerformancePrimitives/MetalPerformancePrimitives.h>)
#define QUANTIZATION_MLX_TENSOR_OPS 1

#include "../common/metal.h"
#include <metal_tensor>
#include <MetalPerformancePrimitives/MetalPerformancePrimitives.h>

#include "../../csrc/gpu/launch.h"
#include "../common/cooperative.h"
#include "operands.h"
#include "tile.h"

namespace quantization_mlx {

static constant constexpr const int tensor_depth = tensor_tile_k();
static constant constexpr const int tensor_columns = tensor_tile_columns();
static constant constexpr const int tensor_simdgroups = tensor_tile_simdgroups();
static constant constexpr const int tensor_threads = 32 * tensor_tile_simdgroups();
static constant constexpr const int tensor_gather_rows = 32;
static_assert(tensor_depth == 64 && tensor_columns == 64, "a block of w has rows of 64 elements either way round");

// --- Operands ------------------------------------------------------------------------------------------------------

// Threadgroup memory for `rows` rows of one step, counted in vectors, whose alignment it needs.
template <typename T>
inline constexpr int step_vectors(int rows) {
  return rows * padded<T>(64) * static_cast<int>(sizeof(T)) / 16;
}

// The step of x, `rows_left` x `depth_left`, that begins at x; a whole one has static sizes. The address is computed in
// 64 bits: slices of a large tensor go wrong beyond 2 GiB.
template <bool whole, int rows, typename T>
METAL_FUNC auto step_of_x(const device T* x, long row_stride, int depth_left, int rows_left) {
  // The operation takes no const elements; it writes none.
  tensor<device T, dextents<int, 2>, tensor_inline> left(
      (device T*)x, dextents<int, 2>(depth_left, rows_left), array<int, 2>{1, static_cast<int>(row_stride)});
  if constexpr (whole) {
    return left.template slice<tensor_depth, rows>(0, 0);
  } else {
    return left;
  }
}

// A step in threadgroup memory, `rows_left` rows of `elements` elements; a whole one has static sizes.
template <bool whole, int rows, typename T>
METAL_FUNC auto step_in_threadgroup(threadgroup T* block, int elements, int rows_left) {
  tensor<threadgroup T, dextents<int, 2>, tensor_inline> step(
      block, dextents<int, 2>(elements, rows_left), array<int, 2>{1, padded<T>(64)});
  if constexpr (whole) {
    return step.template slice<64, rows>(0, 0);
  } else {
    return step;
  }
}

// --- Sums ----------------------------------------------------------------------------------------------------------

// The first `end_row` rows of the tile to their rows of y, times `factor` and, with `scaled`, the factor of each
// column.
template <typename T, typename Rows, typename Sums>
METAL_FUNC void store_sums(
    thread Sums& sums,
    device T* y,
    constant ProductParams& params,
    Rows rows_of_y,
    int end_row,
    int column,
    float factor,
    bool scaled,
    threadgroup const float* column_factors) {
#pragma unroll
  for (ushort i = 0; i < sums.get_capacity(); ++i) {
    if (sums.is_valid_element(i)) {
      const auto place = sums.get_multidimensional_index(i);  // column, row
      const int row = place[1];
      const int n = column + place[0];
      if (row < end_row && (aligned_outputs || n < params.n)) {
        const float sum = scaled ? sums[i] * column_factors[place[0]] : sums[i];
        y[row_of_y(rows_of_y, row) * static_cast<long>(params.n) + n] = static_cast<T>(sum * factor);
      }
    }
  }
}

// --- Products ------------------------------------------------------------------------------------------------------

// Along K from k_begin to k_end. `whole`: a tile of whole rows, and K is a multiple of the depth.
template <
    bool whole,
    bool transpose,
    int rows,
    Mode mode,
    int group_size,
    int bits,
    typename T,
    typename Scale,
    typename Y>
METAL_FUNC void tensor_product(
    thread const Operands<T, Scale>& operands,
    constant ProductParams& params,
    device Y* y,
    threadgroup T* weights,
    int rows_left,
    int column,
    int k_begin,
    int k_end,
    int thread_index) {
  constexpr auto descriptor = mpp::tensor_ops::matmul2d_descriptor(
      rows, tensor_columns, whole ? tensor_depth : static_cast<int>(dynamic_extent), false, transpose, true,
      mpp::tensor_ops::matmul2d_descriptor::mode::multiply_accumulate);
  mpp::tensor_ops::matmul2d<descriptor, execution_simdgroups<tensor_simdgroups>> product;
  typedef decltype(step_of_x<whole, rows>(operands.x, 0, 0, 0)) Left;
  typedef decltype(step_in_threadgroup<whole, 64>(weights, 0, 0)) Right;
  auto sums = product.template get_destination_cooperative_tensor<Left, Right, float>();

  WeightRange range = initial_range();
  bool scaled = false;
  do {
    clear(sums);
    PackedWeights<mode, group_size, bits, run_elements> packed;
    fetch_block<transpose, tensor_columns, tensor_depth>(operands, params, k_begin, column, thread_index, packed);
    for (int k = k_begin; k < k_end; k += tensor_depth) {
      threadgroup_barrier(mem_flags::mem_threadgroup);  // the last step has used the weights
      store_block<transpose, tensor_columns, tensor_depth>(packed, thread_index, weights, range);
      if (k + tensor_depth >= k_end) {
        share_range<transpose, tensor_columns, tensor_depth, mode>(range, thread_index, weights);
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
      if (k + tensor_depth < k_end) {
        fetch_block<transpose, tensor_columns, tensor_depth>(
            operands, params, k + tensor_depth, column, thread_index, packed);
      }
      const int depth = min(tensor_depth, k_end - k);
      Left left = step_of_x<whole, rows>(operands.x + k, params.x_row_stride, depth, rows_left);
      Right right = step_in_threadgroup<whole, 64>(
          weights, transpose ? depth : tensor_columns, transpose ? tensor_columns : depth);
      product.run(left, right, sums);
    }
  } while (
      needs_factors<transpose, tensor_columns, tensor_depth, mode, run_elements>(range, scaled, thread_index, weights));
  store_sums(
      sums, y, params, RowsInOrder{}, rows_left, column, operands.factor, scaled, (threadgroup const float*)weights);
}

template <typename T, Mode mode, int group_size, int bits, int rows, bool transpose, typename Y>
[[kernel, max_total_threads_per_threadgroup(tensor_threads)]] void qmm_nax(PRODUCT_ARGUMENTS(T, mode, Y)) {
  static_assert(rows == 32 || rows == 64 || rows == 128, "rows of a tile");
  const int thread_index = 32 * simdgroup + lane;
  threadgroup uint4 weights[step_vectors<T>(64)];
  const int row_tiles = (params.rows + rows - 1) / rows;
  const int part = threadgroup_index.y / row_tiles;
  const int row = static_cast<int>(threadgroup_index.y - part * row_tiles) * rows;
  const int column = threadgroup_index.x * tensor_columns;
  const int rows_left = min(rows, params.rows - row);
  const int k_begin = part * params.part_k;
  const int k_end = min(params.k, k_begin + params.part_k);
  Operands<T, ScaleType<mode, T>> operands = batch_operands<mode>(TENSORS(T, mode), params, threadgroup_index.z);
  operands.x += row * params.x_row_stride;
  device Y* out = batch_output(y, params, part, threadgroup_index.z) + static_cast<long>(row) * params.n;
  if (aligned_k && rows_left == rows) {
    tensor_product<true, transpose, rows, mode, group_size, bits>(
        operands, params, out, (threadgroup T*)weights, rows, column, k_begin, k_end, thread_index);
  } else {
    tensor_product<false, transpose, rows, mode, group_size, bits>(
        operands, params, out, (threadgroup T*)weights, rows_left, column, k_begin, k_end, thread_index);
  }
}

// --- Gathered products of pairs in tiles ---------------------------------------------------------------------------

// The first `end_row` rows of a tile, whose x is in `pieces`, to the rows of y of their pairs.
template <bool transpose, Mode mode, int group_size, int bits, typename T, typename Scale>
METAL_FUNC void tensor_pair_tile(
    thread const Operands<T, Scale>& operands,
    thread RowPieces<T, tensor_gather_rows, tensor_depth, tensor_threads>& pieces,
    constant ProductParams& params,
    device T* y,
    threadgroup T* weights,
    threadgroup T* activations,
    const device SortedPair* pairs,
    int end_row,
    int column,
    int thread_index) {
  constexpr auto descriptor = mpp::tensor_ops::matmul2d_descriptor(
      tensor_gather_rows, tensor_columns, tensor_depth, false, transpose, true,
      mpp::tensor_ops::matmul2d_descriptor::mode::multiply_accumulate);
  mpp::tensor_ops::matmul2d<descriptor, execution_simdgroups<tensor_simdgroups>> product;
  typedef decltype(step_in_threadgroup<true, tensor_gather_rows>(activations, 0, 0)) Left;
  typedef decltype(step_in_threadgroup<true, 64>(weights, 0, 0)) Right;
  Left left = step_in_threadgroup<true, tensor_gather_rows>(activations, tensor_depth, tensor_gather_rows);
  Right right = step_in_threadgroup<true, 64>(weights, 64, 64);
  auto sums = product.template get_destination_cooperative_tensor<Left, Right, float>();

  WeightRange range = initial_range();
  bool scaled = false;
  do {
    clear(sums);
    PackedWeights<mode, group_size, bits, run_elements> packed;
    fetch_block<transpose, tensor_columns, tensor_depth>(operands, params, 0, column, thread_index, packed);
    fetch_rows(0, thread_index, pieces);
    for (int k = 0; k < params.k; k += tensor_depth) {
      threadgroup_barrier(mem_flags::mem_threadgroup);  // the last step has used both blocks
      store_block<transpose, tensor_columns, tensor_depth>(packed, thread_index, weights, range);
      if (k + tensor_depth >= params.k) {
        share_range<transpose, tensor_columns, tensor_depth, mode>(range, thread_index, weights);
      }
      store_rows(pieces, thread_index, activations);
      threadgroup_barrier(mem_flags::mem_threadgroup);
      if (k + tensor_depth < params.k) {
        fetch_block<transpose, tensor_columns, tensor_depth>(
            operands, params, k + tensor_depth, column, thread_index, packed);
        fetch_rows(k + tensor_depth, thread_index, pieces);
      }
      product.run(left, right, sums);
    }
  } while (
      needs_factors<transpose, tensor_columns, tensor_depth, mode, run_elements>(range, scaled, thread_index, weights));
  store_sums(sums, y, params, pairs, end_row, column, operands.factor, scaled, (threadgroup const float*)weights);
}

template <typename T, Mode mode, int group_size, int bits, bool transpose>
[[kernel, max_total_threads_per_threadgroup(tensor_threads)]] void gather_qmm_rhs_nax(PAIR_TILE_ARGUMENTS(T, mode)) {
  const int thread_index = 32 * simdgroup + lane;
  threadgroup uint4 weights[step_vectors<T>(64)];
  threadgroup uint4 activations[step_vectors<T>(tensor_gather_rows)];
  const int column = threadgroup_index.x * tensor_columns;
  const PairTile tile = tiles[threadgroup_index.y];
  if (tile.matrix < 0) {
    write_nan_of_pairs(y, params, tile, pairs, column, tensor_columns, thread_index, tensor_threads);
    return;
  }
  RowPieces<T, tensor_gather_rows, tensor_depth, tensor_threads> pieces;
  gather_rows(x, params.x.outer, pair_of_lane(tile, pairs, lane).lhs, thread_index, pieces);
  set_rows(tile.count, params.k, thread_index, pieces);
  const Operands<T, ScaleType<mode, T>> operands = operands_of_matrix<mode>(TENSORS(T, mode), params, tile.matrix);
  tensor_pair_tile<transpose, mode, group_size, bits>(
      operands, pieces, params, y, (threadgroup T*)weights, (threadgroup T*)activations, pairs + tile.first, tile.count,
      column, thread_index);
}

}  // namespace quantization_mlx

#endif
