// What product kernels share: their arguments, the matrices that a threadgroup works on, and the sums that it writes.
#pragma once

#include "../../csrc/gpu/launch.h"
#include "../common/activation.h"
#include "../common/metal.h"
#include "dequantize.h"

namespace quantization_mlx {

constant bool aligned_outputs [[function_constant(QUANTIZATION_MLX_ALIGNED_OUTPUTS)]];
constant bool aligned_weights [[function_constant(QUANTIZATION_MLX_ALIGNED_WEIGHTS)]];
constant bool aligned_x [[function_constant(QUANTIZATION_MLX_ALIGNED_X)]];
constant bool aligned_k [[function_constant(QUANTIZATION_MLX_ALIGNED_K)]];
constant bool has_global_scale [[function_constant(QUANTIZATION_MLX_HAS_GLOBAL_SCALE)]];
constant bool is_gated [[function_constant(QUANTIZATION_MLX_IS_GATED)]];

static constant constexpr const int elementwise_threads = elementwise_threads_per_threadgroup();

// The tensors that a kernel is given, and the matrices among them that one product multiplies.
template <typename T, typename Scales>
struct Tensors {
  const device T* x;
  const device uint* w;
  const device Scales* scales;
  const device Scales* biases;  // or the zeros of packed columns
  const device float* global_scale;
};

template <typename T, typename Scales>
struct Operands {
  const device T* x;
  const device uint* w;
  const device Scales* scales;
  const device Scales* biases;
  float factor;  // of all scales
};

// The arguments of all product kernels, in the order of the plans (csrc/gpu/plan/products.cpp), and the thread's place.
// clang-format off
#define ARGUMENTS(T, mode, Y, Params)                       \
    const device T* x [[buffer(0)]],                        \
    const device uint* w [[buffer(1)]],                     \
    const device ScaleType<mode, T>* scales [[buffer(2)]],  \
    const device ScaleType<mode, T>* biases [[buffer(3)]],  \
    const device float* global_scale [[buffer(4), function_constant(has_global_scale)]], \
    device Y* y [[buffer(5)]],                              \
    constant Params& params [[buffer(6)]],                  \
    uint3 threadgroup_index [[threadgroup_position_in_grid]], \
    uint simdgroup [[simdgroup_index_in_threadgroup]],      \
    uint lane [[thread_index_in_simdgroup]]
#define PRODUCT_ARGUMENTS(T, mode, Y) ARGUMENTS(T, mode, Y, ProductParams)
#define GATHER_ARGUMENTS(T, mode, Y)                 \
    ARGUMENTS(T, mode, Y, GatherParams),             \
    const device long* lhs_indices [[buffer(7)]],    \
    const device long* rhs_indices [[buffer(8)]]
#define PAIR_TILE_ARGUMENTS(T, mode)                 \
    PRODUCT_ARGUMENTS(T, mode, T),                   \
    const device PairTile* tiles [[buffer(7)]],      \
    const device SortedPair* pairs [[buffer(8)]]
#define TENSORS(T, mode) Tensors<T, ScaleType<mode, T>>{x, w, scales, biases, global_scale}
// clang-format on

METAL_FUNC float factor_at(const device float* global_scale, long offset) {
  return has_global_scale ? nvfp4_decode_factor(global_scale[offset]) : 1.0f;
}

METAL_FUNC long batch_offset(constant BatchStrides& strides, uint position, int inner_size) {
  const long outer = position / static_cast<uint>(inner_size);
  const long inner = position % static_cast<uint>(inner_size);
  return outer * strides.outer + inner * strides.inner;
}

// At one position of the batch.
template <Mode mode, typename T, typename Scales>
METAL_FUNC Operands<T, Scales> batch_operands(Tensors<T, Scales> all, constant ProductParams& params, uint position) {
  Operands<T, Scales> result;
  result.x = all.x + batch_offset(params.x, position, params.inner_size);
  result.w = all.w + batch_offset(params.w, position, params.inner_size);
  result.scales = all.scales + batch_offset(params.scales, position, params.inner_size);
  result.biases =
      reads_biases(mode) ? all.biases + batch_offset(params.biases, position, params.inner_size) : all.biases;
  result.factor = factor_at(all.global_scale, batch_offset(params.global_scale, position, params.inner_size));
  return result;
}

// Where y of one position and part begins.
template <typename Y>
METAL_FUNC device Y* batch_output(device Y* y, constant ProductParams& params, uint part, uint position) {
  return y + batch_offset(params.y, position, params.inner_size) + part * params.y_part_stride;
}

// Of matrix `rhs`, x being left where it is.
template <Mode mode, typename T, typename Scales>
METAL_FUNC Operands<T, Scales> operands_of_matrix(Tensors<T, Scales> all, constant ProductParams& params, long rhs) {
  Operands<T, Scales> result;
  result.x = all.x;
  result.w = all.w + rhs * params.w.outer;
  result.scales = all.scales + rhs * params.scales.outer;
  result.biases = reads_biases(mode) ? all.biases + rhs * params.biases.outer : all.biases;
  result.factor = factor_at(all.global_scale, rhs * params.global_scale.outer);
  return result;
}

METAL_FUNC bool is_valid_index(long index, int count) { return index >= 0 && index < count; }

// Of one pair of indices. False where one of them is out of range: then nothing may be read.
template <Mode mode, typename T, typename Scales>
METAL_FUNC bool gather_operands(
    Tensors<T, Scales> all,
    const device long* lhs_indices,
    const device long* rhs_indices,
    constant GatherParams& params,
    uint pair,
    thread Operands<T, Scales>& result) {
  const long lhs = lhs_indices[pair];
  const long rhs = rhs_indices[pair];
  if (!is_valid_index(lhs, params.lhs_count) || !is_valid_index(rhs, params.rhs_count)) {
    return false;
  }
  all.x += lhs * params.product.x.outer;
  result = operands_of_matrix<mode>(all, params.product, rhs);
  return true;
}

// The row of y that row `row` of a tile is: counted from the first, or that of a pair, which lane `row` has or which is
// in memory.
struct RowsInOrder {};
METAL_FUNC int row_of_y(RowsInOrder, int row) { return row; }
METAL_FUNC int row_of_y(SortedPair of_lane, int row) { return simd_shuffle(of_lane.pair, static_cast<ushort>(row)); }
METAL_FUNC int row_of_y(const device SortedPair* pairs, int row) { return pairs[row].pair; }

// The pair of this lane of a tile, the last one where there are fewer.
METAL_FUNC SortedPair pair_of_lane(PairTile tile, const device SortedPair* pairs, uint lane) {
  return pairs[tile.first + min(static_cast<int>(lane), tile.count - 1)];
}

// Sum i of `size` that the `along` simdgroups of `block` have in `shared`, in a fixed order.
template <int simdgroups, int size>
METAL_FUNC float sum_of_simdgroups(threadgroup const float* shared, int block, int along, int i) {
  float sum = 0.0f;
#pragma unroll
  for (int part = 0; part < simdgroups; ++part) {
    if (part < along) {
      sum += shared[(block * along + part) * size + i];
    }
  }
  return sum;
}

// Each simdgroup of a threadgroup has sums of rows x columns of y in `shared`: the first `along` of them, a power of
// two, for the same ones, the next for the columns beside those. Adds them up, in a fixed order, and writes them, times
// `factor`, to rows from first_row and columns from first_column on, as far as the matrix goes.
template <int simdgroups, int rows, int columns, typename Y>
METAL_FUNC void write_sums(
    threadgroup const float* shared,
    device Y* y,
    constant ProductParams& params,
    int first_row,
    int first_column,
    int along,
    float factor,
    int thread_index) {
  constexpr int size = rows * columns;
  for (int i = thread_index; i * along < simdgroups * size; i += simdgroups * 32) {
    const int block = i / size;
    const float sum = sum_of_simdgroups<simdgroups, size>(shared, block, along, i % size);
    const int row = first_row + i % size / columns;
    const int column = first_column + block * columns + i % columns;
    if (row < params.rows && (aligned_outputs || column < params.n)) {
      y[static_cast<long>(row) * params.n + column] = static_cast<Y>(sum * factor);
    }
  }
}

// As write_sums, of sums that are those of gates in the first half of a simdgroup's columns and of values in the
// second.
template <int simdgroups, int rows, int columns, typename Y>
METAL_FUNC void write_gated_sums(
    threadgroup const float* shared,
    device Y* y,
    constant ProductParams& params,
    int first_column,
    int along,
    float factor,
    int thread_index) {
  constexpr int half_columns = columns / 2;
  constexpr int size = rows * half_columns;
  for (int i = thread_index; i * along < simdgroups * size; i += simdgroups * 32) {
    const int block = i / size;
    const int row = i % size / half_columns;
    const int column = i % half_columns;
    const int place = row * columns + column;
    const float gate = sum_of_simdgroups<simdgroups, rows * columns>(shared, block, along, place) * factor;
    const float value =
        sum_of_simdgroups<simdgroups, rows * columns>(shared, block, along, place + half_columns) * factor;
    const int y_column = first_column + block * half_columns + column;
    if (row < params.rows && (aligned_outputs || y_column < params.n)) {
      const float result = activated(static_cast<Gate>(params.gate), gate, 1.0f) * value;
      y[static_cast<long>(row) * params.n + y_column] = static_cast<Y>(result);
    }
  }
}

// NaN to `columns` columns, from `first` on, of rows [first_row, end_row), as far as the matrix goes.
template <typename Y>
METAL_FUNC void write_nan(
    device Y* y,
    constant ProductParams& params,
    int first_row,
    int end_row,
    int first,
    int columns,
    int thread_index,
    int threads) {
  for (int row = first_row; row < min(end_row, params.rows); ++row) {
    for (int column = first + thread_index; column < min(first + columns, params.n); column += threads) {
      y[static_cast<long>(row) * params.n + column] = static_cast<Y>(quiet_nan());
    }
  }
}

// The same for the rows of a tile's pairs.
template <typename Y>
METAL_FUNC void write_nan_of_pairs(
    device Y* y,
    constant ProductParams& params,
    PairTile tile,
    const device SortedPair* pairs,
    int first,
    int columns,
    int thread_index,
    int threads) {
  for (int i = 0; i < tile.count; ++i) {
    const int row = pairs[tile.first + i].pair;
    write_nan(y, params, row, row + 1, first, columns, thread_index, threads);
  }
}

}  // namespace quantization_mlx
