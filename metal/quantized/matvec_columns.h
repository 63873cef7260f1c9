// Products of one to eight rows of x with a matrix of packed columns, plain and gathered: y = x @ w, w [K, N].
//
//   simdgroup:  lane            0         1       ...      31
//               columns     n, n + 1  n + 2, ...    n + 62, n + 63     64 of a threadgroup
//
//               word row r     uint2     uint2    ...    uint2         one load of the simdgroup: 256 bytes in a row
//                    r + 1     uint2     uint2    ...    uint2         `bits` of these are 32 elements of each column
//                    ...
//
//   simdgroups 0, 1, ..., 7:  groups 0, 1, ..., 7 of the same columns; then all of them go on by 8 groups, down K
//
// A lane keeps its two columns to the end, so no lane needs another's sum: threadgroup memory adds up the simdgroups,
// in a fixed order, with the only barrier of the kernel. Every word and every scale is read once, for all rows of x.
// All lanes load the same values of x, from one address, and use them for two columns.
//
// One row: the sums of codes times x are scaled once for each group. The zero of a group contributes itself times the
// sum of x, which is the same for all columns: each lane loads one element of a run of x, and the simdgroup adds them
// up, instead of 32 additions in every lane. More rows: weights are scaled before they are multiplied by x, which
// leaves more registers for it.
//
// Split-K as in qvm (matvec.h). Parts are whole groups.
#pragma once

#include "../common/metal.h"
#include "operands.h"

namespace quantization_mlx {

static constant constexpr const int lane_columns = column_qvm_lane_columns();
static constant constexpr const int column_qvm_threads = 32 * column_qvm_simdgroups();

// The columns of a lane: `exist` of them, from `first` on, are in the matrix.
struct LaneColumns {
  int first;
  int exist;
};

// One run of each of the lane's columns, packed. Columns that do not exist are zeros.
template <int bits>
METAL_FUNC void load_column_runs(
    const device uint* w,
    constant ProductParams& params,
    int run,
    LaneColumns columns,
    thread uint* packed) {
  const device uint* source = w + static_cast<long>(run) * bits * params.n + columns.first;
#pragma unroll
  for (int i = 0; i < bits; ++i) {
    uint words[lane_columns];
    if (aligned_outputs || columns.exist == lane_columns) {
      load_words<lane_columns>(source + i * static_cast<long>(params.n), aligned_weights, words);
    } else {
#pragma unroll
      for (int c = 0; c < lane_columns; ++c) {
        words[c] = c < columns.exist ? source[i * static_cast<long>(params.n) + c] : 0u;
      }
    }
#pragma unroll
    for (int c = 0; c < lane_columns; ++c) {
      packed[c * bits + i] = words[c];
    }
  }
}

// Values of the lane's columns in one group: scales or zeros.
METAL_FUNC void load_column_values(const device half* source, LaneColumns columns, thread float* values) {
  if (aligned_outputs || columns.exist == lane_columns) {
    load_values<lane_columns>(source, aligned_weights, values);
  } else {
#pragma unroll
    for (int c = 0; c < lane_columns; ++c) {
      values[c] = c < columns.exist ? static_cast<float>(source[c]) : 0.0f;
    }
  }
}

// Adds the products of all rows of x with one run of the lane's columns, (element - zero) * scale or, where sums are
// scaled, element, to sums[m * lane_columns + c].
template <Mode mode, int bits, int rows, bool scales_sums, typename T>
METAL_FUNC void multiply_column_runs(
    const device T* x,
    constant ProductParams& params,
    thread const uint* packed,
    thread const float* scales,
    thread const float* zeros,
    thread float* sums) {
#pragma unroll
  for (int chunk = 0; chunk < run_elements / chunk_elements; ++chunk) {
    float weights[lane_columns * chunk_elements];
#pragma unroll
    for (int c = 0; c < lane_columns; ++c) {
      thread float* values = weights + c * chunk_elements;
      decode_finite_chunk<mode, bits>(packed + c * bits, chunk, values);
      if (!scales_sums) {
#pragma unroll
        for (int i = 0; i < chunk_elements; ++i) {
          values[i] = fma(values[i], scales[c], column_bias(mode, scales[c], zeros[c]));
        }
      }
    }
#pragma unroll
    for (int m = 0; m < rows; ++m) {
      // An instance for more rows than there are repeats the last one, and does not write it.
      const device T* row = x + min(m, params.rows - 1) * params.x_row_stride;
      float activations[chunk_elements];
      load_values<chunk_elements>(row + chunk * chunk_elements, aligned_x, activations);
#pragma unroll
      for (int i = 0; i < chunk_elements; ++i) {
#pragma unroll
        for (int c = 0; c < lane_columns; ++c) {
          sums[m * lane_columns + c] = fma(weights[c * chunk_elements + i], activations[i], sums[m * lane_columns + c]);
        }
      }
    }
  }
}

// Adds the products of all rows of x with one group of the lane's columns to sums[m * lane_columns + c].
template <Mode mode, int group_size, int bits, int rows, typename T>
METAL_FUNC void accumulate_column_group(
    thread const Operands<T, half>& operands,
    constant ProductParams& params,
    int group,
    LaneColumns columns,
    uint lane,
    thread float* sums) {
  constexpr int runs = group_size / run_elements;
  constexpr bool scales_sums = rows == 1;
  const long first_value = static_cast<long>(group) * params.n + columns.first;
  float scales[lane_columns];
  float zeros[lane_columns] = {0.0f};
  load_column_values(operands.scales + first_value, columns, scales);
  if (has_zeros(mode)) {
    load_column_values(operands.biases + first_value, columns, zeros);
  }
  float group_sums[lane_columns] = {0.0f};
  float x_sum = 0.0f;
  for (int run = 0; run < runs; ++run) {
    const device T* x = operands.x + (group * group_size + run * run_elements);
    uint packed[lane_columns * bits];
    load_column_runs<bits>(operands.w, params, group * runs + run, columns, packed);
#pragma unroll
    for (int c = 0; c < lane_columns; ++c) {
      if (is_e4m3(mode) && has_nan(e4m3_nan_bits<bits>(packed + c * bits))) {
        scales[c] = quiet_nan();  // the whole sum is no number
      }
    }
    if (scales_sums && has_column_bias(mode)) {
      x_sum += static_cast<float>(x[lane]);
    }
    multiply_column_runs<mode, bits, rows, scales_sums>(
        x, params, packed, scales, zeros, scales_sums ? group_sums : sums);
  }
  if (scales_sums) {
    x_sum = has_column_bias(mode) ? simd_sum(x_sum) : 0.0f;
#pragma unroll
    for (int c = 0; c < lane_columns; ++c) {
      sums[c] = fma(scales[c], fma(-column_zero(mode, zeros[c]), x_sum, group_sums[c]), sums[c]);
    }
  }
}

inline constexpr int column_qvm_memory(int rows) { return column_qvm_simdgroups() * rows * column_qvm_columns(); }

// shared: column_qvm_memory(rows) floats.
template <Mode mode, int group_size, int bits, int rows, typename T, typename Y>
METAL_FUNC void matvec_of_columns(
    thread const Operands<T, half>& operands,
    constant ProductParams& params,
    device Y* y,
    threadgroup float* shared,
    uint block,
    uint part,
    uint simdgroup,
    uint lane) {
  constexpr int block_columns = column_qvm_columns();
  const int first_column = block * block_columns;
  LaneColumns columns;
  columns.first = first_column + static_cast<int>(lane) * lane_columns;
  columns.exist = max(0, min(lane_columns, params.n - columns.first));
  const int begin = part * params.part_k / group_size;
  const int end = min(params.k, static_cast<int>(part + 1) * params.part_k) / group_size;

  float sums[rows * lane_columns];
#pragma unroll
  for (int i = 0; i < rows * lane_columns; ++i) {
    sums[i] = 0.0f;
  }
  for (int group = begin + simdgroup; group < end; group += column_qvm_simdgroups()) {
    accumulate_column_group<mode, group_size, bits, rows>(operands, params, group, columns, lane, sums);
  }
#pragma unroll
  for (int i = 0; i < rows * lane_columns; ++i) {
    shared[(simdgroup * rows + i / lane_columns) * block_columns + lane * lane_columns + i % lane_columns] = sums[i];
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  write_sums<column_qvm_simdgroups(), rows, block_columns>(
      shared, y, params, 0, first_column, column_qvm_simdgroups(), operands.factor, simdgroup * 32 + lane);
}

template <typename T, Mode mode, int group_size, int bits, int rows, typename Y>
[[kernel, max_total_threads_per_threadgroup(column_qvm_threads)]] void column_qvm(PRODUCT_ARGUMENTS(T, mode, Y)) {
  threadgroup float shared[column_qvm_memory(rows)];
  const Operands<T, half> operands = batch_operands<mode>(TENSORS(T, mode), params, threadgroup_index.z);
  matvec_of_columns<mode, group_size, bits, rows>(
      operands, params, batch_output(y, params, threadgroup_index.y, threadgroup_index.z), shared, threadgroup_index.x,
      threadgroup_index.y, simdgroup, lane);
}

template <typename T, Mode mode, int group_size, int bits, int rows, typename Y>
[[kernel, max_total_threads_per_threadgroup(column_qvm_threads)]] void gather_column_qvm(GATHER_ARGUMENTS(T, mode, Y)) {
  threadgroup float shared[column_qvm_memory(rows)];
  Operands<T, half> operands;
  device Y* out = y + threadgroup_index.z * params.product.y.outer;
  if (gather_operands<mode>(TENSORS(T, mode), lhs_indices, rhs_indices, params, threadgroup_index.z, operands)) {
    matvec_of_columns<mode, group_size, bits, rows>(
        operands, params.product, out, shared, threadgroup_index.x, threadgroup_index.y, simdgroup, lane);
  } else {
    write_nan(
        out, params.product, 0, params.product.rows, threadgroup_index.x * column_qvm_columns(), column_qvm_columns(),
        simdgroup * 32 + lane, column_qvm_threads);
  }
}

}  // namespace quantization_mlx
