// Attention of many queries on the matrix units of M5-class GPUs, through Metal 4's tensor operations.
//
// As in attention_tile.h, a threadgroup of four simdgroups takes a block of rows, the queries of the heads that share a
// head of keys, and goes over the keys that any of them sees: 64 rows, of heads beyond 128 elements 32, and 32 keys at
// a time.
//
//            keys ->
//          +----+----+---       scores S   = Q K^T           Q in threadgroup memory, K in device memory
//     rows | S  |    |          weights    = exp(S - maximum), rounded to the type of the values
//          |    |    |          sums       = sums + weights V    V in device memory
//          +----+----+---
//
//   Q | barrier | S | barrier | weights | barrier | sums, S of the next keys | barrier | weights ...
//
// The matrix units read keys and values where they lie, so that no thread copies them; all four simdgroups run one
// operation together. Which scores and sums a thread holds differs between GPU generations. So scores go through
// threadgroup memory, where two or four lanes of a simdgroup share a row, whose largest score and sum of weights are
// one or two shuffles away.
//
// Sums stay in registers. Multiplying them when a row's maximum moves means asking of each sum which row it is of, so
// the maximum follows the largest score only when that is more than `score_slack` ahead: after the first keys, few
// blocks have such a row. Until then weights go up to exp(score_slack), as exact as those up to 1.
#pragma once

#if __METAL_VERSION__ >= 400 && __has_include(<MetalPerformancePrimitives/MetalPerformancePrimitives.h>)
#define QUANTIZATION_MLX_TENSOR_OPS 1

#include "../common/metal.h"
#include <metal_tensor>
#include <MetalPerformancePrimitives/MetalPerformancePrimitives.h>

#include "../common/cooperative.h"
#include "attention_tile.h"

namespace quantization_mlx {

static constant constexpr const float score_slack = 4.0f;

// --- Operands ------------------------------------------------------------------------------------------------------

template <typename T>
using DeviceMatrix = tensor<device T, dextents<int, 2>, tensor_inline>;
template <typename T>
using SharedMatrix = tensor<threadgroup T, dextents<int, 2>, tensor_inline>;

// `count` rows of keys or values, from the one at `row` on; whatever an operation asks for beyond them is zero.
template <typename T>
METAL_FUNC DeviceMatrix<T> matrix_of_keys(const device T* row, long stride, int length, int count) {
  // The operation takes no const elements; it writes none.
  return DeviceMatrix<T>((device T*)row, dextents<int, 2>(length, count), array<int, 2>{1, static_cast<int>(stride)});
}

template <typename T>
METAL_FUNC SharedMatrix<T> shared_matrix(threadgroup T* block, int stride, int length, int count) {
  return SharedMatrix<T>(block, dextents<int, 2>(length, count), array<int, 2>{1, stride});
}

// --- Weights of a row ----------------------------------------------------------------------------------------------

struct RowState {
  float maximum;  // what is subtracted from scores: the largest one so far, or up to score_slack less
  float weights;  // the sum of this lane's
};

// Turns this lane's part of a row of scores, of keys from `key` on, into weights. Returns what the sums of the row so
// far are to be multiplied by.
template <int simdgroup_rows, int count, typename T>
METAL_FUNC float weigh(
    threadgroup const float* scores,
    thread const RowMask<T>& mask,
    bool masked,
    int key,
    float scale,
    thread RowState& state,
    threadgroup T* weights) {
  float own[count];
#pragma unroll
  for (int i = 0; i < count / 4; ++i) {
    const float4 four = ((threadgroup const float4*)scores)[i];
    own[4 * i] = four.x;
    own[4 * i + 1] = four.y;
    own[4 * i + 2] = four.z;
    own[4 * i + 3] = four.w;
  }
  float largest = lowest_score;
#pragma unroll
  for (int i = 0; i < count; ++i) {
    own[i] *= scale;
    if (masked) {
      own[i] = masked_score(mask, key + i, own[i]);
    }
    largest = max(largest, own[i]);
  }
  largest = max_of_row<simdgroup_rows>(largest);
  const float maximum = largest > state.maximum + score_slack ? largest : state.maximum;
  const float factor = weight_of(state.maximum, maximum);
  state.maximum = maximum;
  state.weights *= factor;
#pragma unroll
  for (int i = 0; i < count; ++i) {
    const T weight = static_cast<T>(own[i] < lowest_score ? 0.0f : weight_of(own[i], maximum));
    state.weights += static_cast<float>(weight);  // as it is multiplied
    weights[i] = weight;
  }
  return factor;
}

// --- Sums ----------------------------------------------------------------------------------------------------------

template <typename Sums>
METAL_FUNC void multiply_rows(thread Sums& sums, threadgroup const float* factors) {
#pragma unroll
  for (ushort i = 0; i < sums.get_capacity(); ++i) {
    if (sums.is_valid_element(i)) {
      const auto place = sums.get_multidimensional_index(i);  // column, row
      sums[i] *= factors[place[1]];
    }
  }
}

// Each row of sums, times its factor, to its row of y; -1 for none.
template <typename T, typename Sums>
METAL_FUNC void store_rows(
    thread Sums& sums,
    threadgroup const float* factors,
    threadgroup const long* rows_of_y,
    int value_dim,
    device T* y) {
#pragma unroll
  for (ushort i = 0; i < sums.get_capacity(); ++i) {
    if (sums.is_valid_element(i)) {
      const auto place = sums.get_multidimensional_index(i);  // column, row
      const long row = rows_of_y[place[1]];
      if (row >= 0 && place[0] < value_dim) {
        y[row * value_dim + place[0]] = static_cast<T>(sums[i] * factors[place[1]]);
      }
    }
  }
}

// --- Kernel --------------------------------------------------------------------------------------------------------

// dim: the largest head size. Threadgroups, x dimension: blocks of rows, z dimension: batch and head of keys.
template <typename T, int dim>
[[kernel, max_total_threads_per_threadgroup(attention_tile_threads)]] void attention_tile_nax(
    ATTENTION_ARGUMENTS(T),
    uint3 threadgroups [[threadgroups_per_grid]]) {
  constexpr int rows = attention_tensor_rows(dim);
  constexpr int keys = attention_tensor_keys();
  constexpr int simdgroup_rows = rows / attention_tile_simdgroups();
  constexpr int own_keys = keys * simdgroup_rows / 32;
  constexpr int query_stride = tile_stride<T>(dim);
  constexpr int score_stride = tile_stride<float>(keys);
  constexpr int weight_stride = tile_stride<T>(keys);
  constexpr int piece = 16 / static_cast<int>(sizeof(T));
  threadgroup uint4 query_memory[rows * query_stride / piece];
  threadgroup uint4 score_memory[rows * score_stride / 4];
  threadgroup uint4 weight_memory[rows * weight_stride / piece];
  threadgroup long rows_of_y[rows];
  threadgroup float factors[rows];
  threadgroup int have_moved[attention_tile_simdgroups()];  // whether a maximum of a simdgroup has
  threadgroup T* queries = (threadgroup T*)query_memory;
  threadgroup float* scores = (threadgroup float*)score_memory;
  threadgroup T* weights = (threadgroup T*)weight_memory;

  const int thread_index = 32 * simdgroup + lane;
  // The last queries have the most keys: they begin first.
  const int first_row = static_cast<int>(threadgroups.x - 1 - threadgroup_index.x) * rows;
  const int batch = threadgroup_index.z / params.key_heads;
  const int key_head = threadgroup_index.z - batch * params.key_heads;
  device T* result_of_batch = y + batch * result_size(params);
  k += batch * params.k.batch + key_head * params.k.head;
  v += batch * params.v.batch + key_head * params.v.head;
  store_queries<T, dim, rows>(q + batch * params.q.batch, params, first_row, key_head, thread_index, queries);

  const int row = static_cast<int>(simdgroup) * simdgroup_rows + static_cast<int>(lane) % simdgroup_rows;
  const int first_own = static_cast<int>(lane) / simdgroup_rows * own_keys;
  const RowPlace place = row_place(params, first_row + row, key_head);
  const RowMask<T> mask = mask_of(params, visible, added, batch, place);
  const KeyRange range = key_range(params, first_row, rows, key_head);
  if (first_own == 0) {
    const bool exists = first_row + row < params.queries * params.group;
    rows_of_y[row] = exists ? place.head * static_cast<long>(params.queries) + place.query : -1;
  }

  constexpr auto accumulate = mpp::tensor_ops::matmul2d_descriptor::mode::multiply_accumulate;
  constexpr int any_depth = static_cast<int>(dynamic_extent);
  constexpr auto of_scores = mpp::tensor_ops::matmul2d_descriptor(rows, keys, any_depth, false, true, true, accumulate);
  constexpr auto of_sums = mpp::tensor_ops::matmul2d_descriptor(rows, dim, any_depth, false, false, true, accumulate);
  mpp::tensor_ops::matmul2d<of_scores, execution_simdgroups<attention_tile_simdgroups()>> score_product;
  mpp::tensor_ops::matmul2d<of_sums, execution_simdgroups<attention_tile_simdgroups()>> sum_product;
  auto block = score_product.template get_destination_cooperative_tensor<SharedMatrix<T>, DeviceMatrix<T>, float>();
  auto sums = sum_product.template get_destination_cooperative_tensor<SharedMatrix<T>, DeviceMatrix<T>, float>();
  SharedMatrix<T> query_matrix = shared_matrix(queries, query_stride, params.dim, rows);
  SharedMatrix<float> score_matrix = shared_matrix(scores, score_stride, keys, rows);
  clear(sums);
  RowState state;
  state.maximum = lowest_score;
  state.weights = 0.0f;
  threadgroup_barrier(mem_flags::mem_threadgroup);  // the queries are complete
  for (int begin = range.begin; begin < range.end; begin += keys) {
    const int count = min(keys, range.end - begin);
    DeviceMatrix<T> key_matrix = matrix_of_keys(k + begin * params.k.position, params.k.position, params.dim, count);
    clear(block);
    score_product.run(query_matrix, key_matrix, block);
    block.store(score_matrix);
    threadgroup_barrier(mem_flags::mem_threadgroup);  // the scores are complete, the weights before multiplied
    const float factor = weigh<simdgroup_rows, own_keys>(
        scores + row * score_stride + first_own, mask, are_masked(params, range, begin, begin + keys),
        begin + first_own, params.scale, state, weights + row * weight_stride + first_own);
    if (first_own == 0) {
      factors[row] = factor;
    }
    const bool has_moved = simd_any(factor != 1.0f);
    if (lane == 0) {
      have_moved[simdgroup] = has_moved;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);  // weights and factors are complete
    bool any_moved = false;
#pragma unroll
    for (int i = 0; i < attention_tile_simdgroups(); ++i) {
      any_moved = any_moved || have_moved[i] != 0;
    }
    if (any_moved) {
      multiply_rows(sums, factors);
    }
    SharedMatrix<T> weight_matrix = shared_matrix(weights, weight_stride, count, rows);
    DeviceMatrix<T> value_matrix =
        matrix_of_keys(v + begin * params.v.position, params.v.position, params.value_dim, count);
    sum_product.run(weight_matrix, value_matrix, sums);
  }

  const float sink = has_sinks ? static_cast<float>(sinks[place.head]) : 0.0f;
  const float all_weights = sum_of_row<simdgroup_rows>(state.weights);
  threadgroup float* final_factors = scores;  // nothing reads these any more, as other threads may still read `factors`
  if (first_own == 0) {
    final_factors[row] = final_factor(state.maximum, all_weights, sink);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);  // they are complete
  store_rows(sums, final_factors, rows_of_y, params.value_dim, result_of_batch);
}

}  // namespace quantization_mlx

#endif
