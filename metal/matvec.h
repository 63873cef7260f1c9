// Products of one to twelve rows of x with a quantized matrix, plain and gathered.
//
// qmv: y = x @ w.T, w [N, K], groups along K.
//
//   simdgroup:  lane         0  1  2 ... 7 | 8  9 ... 15 | 16 ... 23 | 24 ... 31
//               run of 32    0  1  2 ... 7 | 0  1 ...  7 |  0 ...  7 |  0 ...  7   then the next eight, along K
//               row of w           n       |    n + 1    |   n + 2   |   n + 3     with n + 4, ... in more registers
//
// Eight lanes read eight runs of one row of w: at 4 bits a whole 128-byte line, 16 bytes a lane. The four groups of
// eight read the same x, so one line of x serves all of their rows of w, and one chunk of x in registers serves the
// further ones. Each pair of a row of x and a row of w has an accumulator of its own, so no addition waits for another.
// A run of w is loaded and unpacked once, for all rows of x. At the end three shuffles add up eight lanes.
//
// qvm of one row: y = x @ w, w [K, N], groups along N.
//
//   simdgroup:  lane         0  1  2 ... 7 | 8  9 ... 15 | 16 ... 23 | 24 ... 31
//               run of 32    0  1  2 ... 7 | 0  1 ...  7 |  0 ...  7 |  0 ...  7   along N: 256 columns
//               row of w           k       |    k + 1    |   k + 2   |   k + 3     then on by 4 * simdgroups, along K
//
// A lane keeps its 32 columns to the end: shuffles then add up the four rows, and threadgroup memory the simdgroups.
//
// qvm of up to eight rows: the 256 columns are one row of w in one simdgroup, eight columns to a lane.
//
//   simdgroup:  lane         0       1        2        3   ...     31
//               columns   [0, 8)  [8, 16) [16, 24) [24, 32)   [248, 256)          of rows k, k + 1, ... at once
//
// So a lane has eight accumulators for each row of x, which is what its registers hold, and unpacks each weight once
// for all of them; at 4 bits the simdgroup reads whole lines as before. All lanes want the same values of x: the loads
// of a simdgroup are one address.
//
// Split-K: part p of the y dimension takes its share of K and writes float32 partial sums; sum_parts adds them up.
#pragma once

#include <metal_stdlib>

#include "operands.h"

namespace quantization_mlx {

static constant constexpr const int lanes_along_runs = 8;
static constant constexpr const int lanes_across_runs = 4;

// --- Transposed ----------------------------------------------------------------------------------------------------

// One row of x with `span` chunks, from chunk `first` on, of a run in each of the `outputs` rows of w. They have one
// scale and bias each, `stride` apart in the arrays, which come in once for all of them.
template <Mode mode, int bits, int outputs, int span, typename T>
inline void multiply_row(
    const device T* x,
    thread const uint* packed,
    int first,
    thread const float* scales,
    thread const float* biases,
    int stride,
    thread float* sums) {
  float x_sum = 0.0f;
  float partial[outputs];
#pragma unroll
  for (int r = 0; r < outputs; ++r) {
    partial[r] = 0.0f;
  }
#pragma unroll
  for (int chunk = 0; chunk < span; ++chunk) {
    float activations[chunk_elements];
    load_values<chunk_elements>(x + chunk * chunk_elements, aligned_x, activations);
    if (has_biases(mode)) {
#pragma unroll
      for (int i = 0; i < chunk_elements; ++i) {
        x_sum += activations[i];
      }
    }
#pragma unroll
    for (int r = 0; r < outputs; ++r) {
      float weights[chunk_elements];
      decode_chunk<mode, bits>(packed + r * bits, first + chunk, weights);
#pragma unroll
      for (int i = 0; i < chunk_elements; ++i) {
        partial[r] = fma(weights[i], activations[i], partial[r]);
      }
    }
  }
#pragma unroll
  for (int r = 0; r < outputs; ++r) {
    sums[r] = fma(scales[r * stride], partial[r], fma(biases[r * stride], x_sum, sums[r]));
  }
}

// Several rows of x with one chunk. The weights stay in registers while the rows pass by: that takes fewer of them than
// the other way round.
template <Mode mode, int bits, int outputs, int rows, typename T>
inline void multiply_rows(
    const device T* x,
    constant ProductParams& params,
    thread const uint* packed,
    int chunk,
    thread const float* scales,
    thread const float* biases,
    int stride,
    thread float* sums) {
  float weights[outputs * chunk_elements];
#pragma unroll
  for (int r = 0; r < outputs; ++r) {
    decode_chunk<mode, bits>(packed + r * bits, chunk, weights + r * chunk_elements);
#pragma unroll
    for (int i = 0; i < chunk_elements; ++i) {
      weights[r * chunk_elements + i] = fma(weights[r * chunk_elements + i], scales[r * stride], biases[r * stride]);
    }
  }
#pragma unroll
  for (int m = 0; m < rows; ++m) {
    // An instance for more rows than there are repeats the last one, and does not write it.
    float activations[chunk_elements];
    load_values<chunk_elements>(x + min(m, params.rows - 1) * params.x_row_stride, aligned_x, activations);
#pragma unroll
    for (int i = 0; i < chunk_elements; ++i) {
#pragma unroll
      for (int r = 0; r < outputs; ++r) {
        sums[m * outputs + r] = fma(weights[r * chunk_elements + i], activations[i], sums[m * outputs + r]);
      }
    }
  }
}

// Adds the products of the first `chunks` chunks of one run: of row m of x and row first + 4 * r of w to
// sums[m * outputs + r].
template <typename T, Mode mode, int group_size, int bits, int rows, int chunks, typename Scale>
inline void accumulate_run(
    Operands<T, Scale> operands,
    constant ProductParams& params,
    int run,
    int first,
    thread float* sums) {
  constexpr int outputs = qmv_outputs_per_lane(rows);
  constexpr int words = bits * chunks / 4;
  constexpr int span = group_size < run_elements ? group_size / chunk_elements : chunks;  // chunks with one scale
  constexpr int spans = chunks / span;
  const long row_words = static_cast<long>(params.k / 16) * bits / 2;
  const long row_groups = params.k / group_size;
  const long first_group = static_cast<long>(run) * run_elements / group_size;

  uint packed[outputs * bits];
  float scales[outputs * spans];
  float biases[outputs * spans];
#pragma unroll
  for (int r = 0; r < outputs; ++r) {
    const int n = first + lanes_across_runs * r;
    if (aligned_outputs || n < params.n) {
      load_words<words>(operands.w + n * row_words + run * bits, aligned_weights, packed + r * bits);
#pragma unroll
      for (int s = 0; s < spans; ++s) {
        const long group = n * row_groups + first_group + s;
        scales[r * spans + s] = decode_scale<mode>(operands.scales[group]);
        biases[r * spans + s] = decode_bias<mode>(operands.biases, group);
      }
    } else {
#pragma unroll
      for (int i = 0; i < words; ++i) {
        packed[r * bits + i] = 0u;
      }
#pragma unroll
      for (int s = 0; s < spans; ++s) {
        scales[r * spans + s] = 0.0f;
        biases[r * spans + s] = 0.0f;
      }
    }
  }

  const device T* x = operands.x + static_cast<long>(run) * run_elements;
#pragma unroll
  for (int s = 0; s < spans; ++s) {
    if (rows == 1) {
      multiply_row<mode, bits, outputs, span>(
          x + s * span * chunk_elements, packed, s * span, scales + s, biases + s, spans, sums);
    } else {
#pragma unroll
      for (int chunk = s * span; chunk < (s + 1) * span; ++chunk) {
        multiply_rows<mode, bits, outputs, rows>(
            x + chunk * chunk_elements, params, packed, chunk, scales + s, biases + s, spans, sums);
      }
    }
  }
}

template <typename T, Mode mode, int group_size, int bits, int rows, typename Scale, typename Y>
inline void matvec_transposed(
    Operands<T, Scale> operands,
    constant ProductParams& params,
    device Y* y,
    uint block,
    uint part,
    uint simdgroup,
    uint lane) {
  constexpr int outputs = qmv_outputs_per_lane(rows);
  const int lane_run = lane % lanes_along_runs;
  const int first = (block * qmv_simdgroups() + simdgroup) * (lanes_across_runs * outputs) + lane / lanes_along_runs;
  const int runs = params.k / run_elements;
  const int begin = part * (params.part_k / run_elements);
  const int end = min(runs, begin + params.part_k / run_elements);

  float sums[rows * outputs];
#pragma unroll
  for (int i = 0; i < rows * outputs; ++i) {
    sums[i] = 0.0f;
  }
  for (int run = begin + lane_run; run < end; run += lanes_along_runs) {
    accumulate_run<T, mode, group_size, bits, rows, 4>(operands, params, run, first, sums);
  }
  // In nvfp4 a row may end in half a run.
  if (group_size < run_elements && params.k % run_elements != 0 && static_cast<int>(part) == params.parts - 1 &&
      lane_run == 0) {
    accumulate_run<T, mode, group_size, bits, rows, 2>(operands, params, runs, first, sums);
  }
#pragma unroll
  for (int m = 0; m < rows; ++m) {
#pragma unroll
    for (int r = 0; r < outputs; ++r) {
      float sum = sums[m * outputs + r];
      sum += simd_shuffle_xor(sum, 1);
      sum += simd_shuffle_xor(sum, 2);
      sum += simd_shuffle_xor(sum, 4);
      const int n = first + lanes_across_runs * r;
      if (lane_run == 0 && m < params.rows && (aligned_outputs || n < params.n)) {
        y[static_cast<long>(m) * params.n + n] = static_cast<Y>(sum * operands.factor);
      }
    }
  }
}

template <typename T, Mode mode, int group_size, int bits, int rows, typename Y>
[[kernel]] void qmv(
    const device T* x [[buffer(0)]],
    const device uint* w [[buffer(1)]],
    const device typename ScaleOf<mode, T>::type* scales [[buffer(2)]],
    const device typename ScaleOf<mode, T>::type* biases [[buffer(3)]],
    const device float* global_scale [[buffer(4)]],
    device Y* y [[buffer(5)]],
    constant ProductParams& params [[buffer(6)]],
    uint3 threadgroup_index [[threadgroup_position_in_grid]],
    uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  matvec_transposed<T, mode, group_size, bits, rows>(
      batch_operands<mode>(x, w, scales, biases, global_scale, params, threadgroup_index.z), params,
      batch_output(y, params, threadgroup_index.y, threadgroup_index.z), threadgroup_index.x, threadgroup_index.y,
      simdgroup, lane);
}

template <typename T, Mode mode, int group_size, int bits, int rows>
[[kernel]] void gather_qmv(
    const device T* x [[buffer(0)]],
    const device uint* w [[buffer(1)]],
    const device typename ScaleOf<mode, T>::type* scales [[buffer(2)]],
    const device typename ScaleOf<mode, T>::type* biases [[buffer(3)]],
    const device float* global_scale [[buffer(4)]],
    device T* y [[buffer(5)]],
    constant GatherParams& params [[buffer(6)]],
    const device long* lhs_indices [[buffer(7)]],
    const device long* rhs_indices [[buffer(8)]],
    uint3 threadgroup_index [[threadgroup_position_in_grid]],
    uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  Operands<T, typename ScaleOf<mode, T>::type> operands;
  const bool valid = gather_operands<mode>(
      x, w, scales, biases, global_scale, lhs_indices, rhs_indices, params, threadgroup_index.z, operands);
  device T* out = y + threadgroup_index.z * params.product.y.outer;
  if (!valid) {
    const int block = qmv_columns(rows);
    const int first = threadgroup_index.x * block;
    write_nan(
        out, params.product, 0, params.product.rows, first, first + block, simdgroup * 32 + lane,
        qmv_simdgroups() * 32);
    return;
  }
  matvec_transposed<T, mode, group_size, bits, rows>(
      operands, params.product, out, threadgroup_index.x, threadgroup_index.y, simdgroup, lane);
}

// --- Not transposed ------------------------------------------------------------------------------------------------

// One row: adds the product of row k of w, 32 columns of it, to the sums; their biases count for all columns alike, and
// are summed on their own.
template <Mode mode, int group_size, int bits, typename T, typename Scale>
inline void accumulate_run_of_columns(
    Operands<T, Scale> operands,
    constant ProductParams& params,
    int k,
    int column,
    thread float* sums,
    thread float& bias_sum) {
  constexpr int span = group_size < run_elements ? group_size / chunk_elements : 4;  // chunks with one scale
  const int columns = params.n - column;  // 32 or more, or in nvfp4 16
  const long row_words = static_cast<long>(params.n / 16) * bits / 2;
  const long first_group = k * static_cast<long>(params.n / group_size) + column / group_size;
  const device uint* source = operands.w + k * row_words + column / run_elements * bits;
  uint packed[bits];
  if (group_size >= run_elements || columns >= run_elements) {
    load_words<bits>(source, aligned_weights, packed);
  } else {
#pragma unroll
    for (int i = 0; i < bits; ++i) {
      packed[i] = i < bits / 2 ? source[i] : 0u;
    }
  }
  const float activation = static_cast<float>(operands.x[k]);
  bias_sum = fma(decode_bias<mode>(operands.biases, first_group), activation, bias_sum);
#pragma unroll
  for (int chunk = 0; chunk < 4; ++chunk) {
    if (group_size >= run_elements || chunk * chunk_elements < columns) {
      const float scale = decode_scale<mode>(operands.scales[first_group + chunk / span]) * activation;
      float weights[chunk_elements];
      decode_chunk<mode, bits>(packed, chunk, weights);
#pragma unroll
      for (int i = 0; i < chunk_elements; ++i) {
        sums[chunk * chunk_elements + i] = fma(weights[i], scale, sums[chunk * chunk_elements + i]);
      }
    }
  }
}

// Lanes whose numbers differ in bit `mask` have sums of the same `count` columns. Each adds the other's to its own for
// half of them, the `upper` lane for the second half: what is given away need not be added twice.
template <int count>
inline void share_columns(ushort mask, bool upper, thread float* sums) {
#pragma unroll
  for (int i = 0; i < count / 2; ++i) {
    const float kept = upper ? sums[count / 2 + i] : sums[i];
    const float given = upper ? sums[i] : sums[count / 2 + i];
    sums[i] = kept + simd_shuffle_xor(given, mask);
  }
}

// The sums of eight columns from `lane_column` on of the 256 of this block, for one row. Lanes eight apart read every
// fourth row of w, and in the end have a quarter of their 32 columns each.
template <Mode mode, int group_size, int bits, typename T, typename Scale>
inline void sum_one_row(
    Operands<T, Scale> operands,
    constant ProductParams& params,
    int first_column,
    int begin,
    int end,
    uint simdgroup,
    uint lane,
    thread float* chunk_sums,
    thread int& lane_column) {
  const int run = lane % lanes_along_runs;
  const int column = first_column + run * run_elements;
  float sums[run_elements];
#pragma unroll
  for (int i = 0; i < run_elements; ++i) {
    sums[i] = 0.0f;
  }
  float bias_sum = 0.0f;
  if (aligned_outputs || column < params.n) {
    const int stride = lanes_across_runs * qvm_simdgroups();
    for (int k = begin + simdgroup * lanes_across_runs + lane / lanes_along_runs; k < end; k += stride) {
      accumulate_run_of_columns<mode, group_size, bits>(operands, params, k, column, sums, bias_sum);
    }
  }
  share_columns<run_elements>(16, (lane & 16) != 0, sums);
  share_columns<run_elements / 2>(8, (lane & 8) != 0, sums);
  bias_sum += simd_shuffle_xor(bias_sum, 16);
  bias_sum += simd_shuffle_xor(bias_sum, 8);
#pragma unroll
  for (int i = 0; i < chunk_elements; ++i) {
    chunk_sums[i] = sums[i] + bias_sum;
  }
  lane_column = run * run_elements + (lane / 16 * 2 + lane / 8 % 2) * chunk_elements;
}

// Several rows: adds the products of rows k to k + count - 1 of w, all of one chunk of columns, to sums[8 * m + i].
template <Mode mode, int group_size, int bits, int rows, int count, typename T, typename Scale>
inline void accumulate_columns(
    Operands<T, Scale> operands,
    constant ProductParams& params,
    int k,
    int column,
    thread float* sums) {
  const long row_bytes = static_cast<long>(params.n / 16) * (2 * bits);
  const long row_groups = params.n / group_size;
  uint packed[count * 2];
  float scales[count];
  float biases[count];
#pragma unroll
  for (int i = 0; i < count; ++i) {
    const device uchar* source = (const device uchar*)operands.w + (k + i) * row_bytes + column / chunk_elements * bits;
    load_chunk_codes<bits>(source, aligned_weights, packed + 2 * i);
    const long group = (k + i) * row_groups + column / group_size;
    scales[i] = decode_scale<mode>(operands.scales[group]);
    biases[i] = decode_bias<mode>(operands.biases, group);
  }
  float activations[rows * count];
#pragma unroll
  for (int m = 0; m < rows; ++m) {
    // An instance for more rows than there are repeats the last one, and does not write it.
    const device T* x = operands.x + min(m, params.rows - 1) * params.x_row_stride + k;
    load_values<count>(x, aligned_x, activations + m * count);
  }
#pragma unroll
  for (int i = 0; i < count; ++i) {
    float weights[chunk_elements];
    decode_chunk<mode, bits>(packed + 2 * i, 0, weights);
#pragma unroll
    for (int j = 0; j < chunk_elements; ++j) {
      const float weight = fma(weights[j], scales[i], biases[i]);
#pragma unroll
      for (int m = 0; m < rows; ++m) {
        sums[m * chunk_elements + j] = fma(weight, activations[m * count + i], sums[m * chunk_elements + j]);
      }
    }
  }
}

// As sum_one_row, for `rows` rows: sums[8 * m + i]. All lanes of a simdgroup read one row of w.
template <Mode mode, int group_size, int bits, int rows, typename T, typename Scale>
inline void sum_rows(
    Operands<T, Scale> operands,
    constant ProductParams& params,
    int first_column,
    int begin,
    int end,
    uint simdgroup,
    uint lane,
    thread float* sums,
    thread int& lane_column) {
  constexpr int count = rows > 4 ? 2 : 4;  // rows of w in flight, as far as the registers go
  lane_column = lane * chunk_elements;
  const int column = first_column + lane_column;
#pragma unroll
  for (int i = 0; i < rows * chunk_elements; ++i) {
    sums[i] = 0.0f;
  }
  if (aligned_outputs || column < params.n) {
    int k = begin + static_cast<int>(simdgroup) * count;
    for (; k + count <= end; k += qvm_simdgroups() * count) {
      accumulate_columns<mode, group_size, bits, rows, count>(operands, params, k, column, sums);
    }
    for (; k < end; ++k) {  // of the last ones, fewer than count
      accumulate_columns<mode, group_size, bits, rows, 1>(operands, params, k, column, sums);
    }
  }
}

// Rows of y that the simdgroups add up in threadgroup memory at a time.
inline constexpr int rows_at_once(int rows) { return rows == 1 ? 1 : 2; }
inline constexpr int qvm_memory(int rows) { return rows_at_once(rows) * qvm_simdgroups() * qvm_columns(); }

// shared: qvm_memory(rows) floats.
template <Mode mode, int group_size, int bits, int rows, typename T, typename Scale, typename Y>
inline void matvec_plain(
    Operands<T, Scale> operands,
    constant ProductParams& params,
    device Y* y,
    threadgroup float* shared,
    uint block,
    uint part,
    uint simdgroup,
    uint lane) {
  const int first_column = block * qvm_columns();
  const int begin = part * params.part_k;
  const int end = min(params.k, begin + params.part_k);
  float sums[rows * chunk_elements];
  int lane_column;
  if (rows == 1) {
    sum_one_row<mode, group_size, bits>(operands, params, first_column, begin, end, simdgroup, lane, sums, lane_column);
  } else {
    sum_rows<mode, group_size, bits, rows>(
        operands, params, first_column, begin, end, simdgroup, lane, sums, lane_column);
  }

#pragma unroll
  for (int first = 0; first < rows; first += rows_at_once(rows)) {
    if (first > 0) {
      threadgroup_barrier(mem_flags::mem_threadgroup);  // the rows before have been added up
    }
#pragma unroll
    for (int m = 0; m < rows_at_once(rows); ++m) {
#pragma unroll
      for (int i = 0; i < chunk_elements; ++i) {
        shared[(m * qvm_simdgroups() + simdgroup) * qvm_columns() + lane_column + i] =
            sums[(first + m) * chunk_elements + i];
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
#pragma unroll
    for (int m = 0; m < rows_at_once(rows); ++m) {
      for (int i = simdgroup * 32 + lane; i < qvm_columns(); i += qvm_simdgroups() * 32) {
        float sum = 0.0f;
#pragma unroll
        for (int s = 0; s < qvm_simdgroups(); ++s) {
          sum += shared[(m * qvm_simdgroups() + s) * qvm_columns() + i];
        }
        if (first + m < params.rows && (aligned_outputs || first_column + i < params.n)) {
          y[static_cast<long>(first + m) * params.n + first_column + i] = static_cast<Y>(sum * operands.factor);
        }
      }
    }
  }
}

template <typename T, Mode mode, int group_size, int bits, int rows, typename Y>
[[kernel]] void qvm(
    const device T* x [[buffer(0)]],
    const device uint* w [[buffer(1)]],
    const device typename ScaleOf<mode, T>::type* scales [[buffer(2)]],
    const device typename ScaleOf<mode, T>::type* biases [[buffer(3)]],
    const device float* global_scale [[buffer(4)]],
    device Y* y [[buffer(5)]],
    constant ProductParams& params [[buffer(6)]],
    uint3 threadgroup_index [[threadgroup_position_in_grid]],
    uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  threadgroup float shared[qvm_memory(rows)];
  matvec_plain<mode, group_size, bits, rows>(
      batch_operands<mode>(x, w, scales, biases, global_scale, params, threadgroup_index.z), params,
      batch_output(y, params, threadgroup_index.y, threadgroup_index.z), shared, threadgroup_index.x,
      threadgroup_index.y, simdgroup, lane);
}

template <typename T, Mode mode, int group_size, int bits, int rows>
[[kernel]] void gather_qvm(
    const device T* x [[buffer(0)]],
    const device uint* w [[buffer(1)]],
    const device typename ScaleOf<mode, T>::type* scales [[buffer(2)]],
    const device typename ScaleOf<mode, T>::type* biases [[buffer(3)]],
    const device float* global_scale [[buffer(4)]],
    device T* y [[buffer(5)]],
    constant GatherParams& params [[buffer(6)]],
    const device long* lhs_indices [[buffer(7)]],
    const device long* rhs_indices [[buffer(8)]],
    uint3 threadgroup_index [[threadgroup_position_in_grid]],
    uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  threadgroup float shared[qvm_memory(rows)];
  Operands<T, typename ScaleOf<mode, T>::type> operands;
  const bool valid = gather_operands<mode>(
      x, w, scales, biases, global_scale, lhs_indices, rhs_indices, params, threadgroup_index.z, operands);
  device T* out = y + threadgroup_index.z * params.product.y.outer;
  if (!valid) {
    const int first = threadgroup_index.x * qvm_columns();
    write_nan(
        out, params.product, 0, params.product.rows, first, first + qvm_columns(), simdgroup * 32 + lane,
        qvm_simdgroups() * 32);
    return;
  }
  matvec_plain<mode, group_size, bits, rows>(
      operands, params.product, out, shared, threadgroup_index.x, threadgroup_index.y, simdgroup, lane);
}

// --- Split-K ------------------------------------------------------------------------------------------------------

// One thread per element of y, x dimension: size, y dimension: batch. The order of the additions is fixed.
template <typename T>
[[kernel]] void sum_parts(
    const device float* partial_sums [[buffer(0)]],
    device T* y [[buffer(1)]],
    constant SumPartsParams& params [[buffer(2)]],
    uint3 position [[thread_position_in_grid]]) {
  const int element = position.x;
  if (element >= params.size) {
    return;
  }
  const long batch = position.y;
  float sum = 0.0f;
  for (int part = 0; part < params.parts; ++part) {
    sum += partial_sums[(batch * params.parts + part) * params.size + element];
  }
  y[batch * params.size + element] = static_cast<T>(sum);
}

}  // namespace quantization_mlx
