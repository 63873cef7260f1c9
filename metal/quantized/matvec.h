// Products of one to twelve rows of x with a quantized matrix, plain and gathered.
//
// qmv: y = x @ w.T, w [N, K], groups along K.
//
//   simdgroup 0:  lane         0   1  ...  15 | 16  17  ...  31
//                 part of K    0   1  ...  15 |  0   1  ...  15    parts of 32 elements for few rows of half, else of
//                 16 row of w           n        |       n + 1        with n + 2, n + 4, n + 6 in more registers
//   simdgroups 1, 2, 3:       16  17  ...  31 ...  63 of the same rows of w; then all of them go on by 64 parts. Where
//                             K is short or odd, only one or two go along it, and the others take the next rows of w
//
// Sixteen lanes read adjacent parts of a row of w, 16 bytes each at 4 bits: whole lines. A value of x in a register is
// used for four rows of w, and a weight, once unpacked, for all rows of x. Each pair of a row of x and a row of w has
// an accumulator of its own, so no addition waits for another. At the end four shuffles add up the lanes, and
// threadgroup memory the simdgroups, with the only barrier of the kernel.
//
// A gated product, whose rows of w are those of N gates and then those of N values, is the same with two rows of either
// to a lane: the values stand where n + 4 and n + 6 do, and the activation comes before y is written, from float32
// sums.
//
// Measured on another GPU (docs/gpu-lane.md), for reasons that hold on Apple's: a threadgroup whose simdgroups divide K
// has four times as many loads in flight as one that divides N, and needs no second kernel to add up parts; four rows
// of w per lane instead of two halve the loads and sums of x; the rest of the time goes into unpacking and addresses,
// so both take few and cheap operations; and the code of one step fits an instruction cache, because it takes 16
// elements at a time where there are many rows.
//
// qvm of one or two rows: y = x @ w, w [K, N], groups along N.
//
//   simdgroup:  lane         0  1  2 ... 7 | 8  9 ... 15 | 16 ... 23 | 24 ... 31
//               run of 32    0  1  2 ... 7 | 0  1 ...  7 |  0 ...  7 |  0 ...  7   along N: 256 columns
//               row of w           k       |    k + 1    |   k + 2   |   k + 3     then on by 4 * simdgroups, along K
//
// A lane keeps its 32 columns to the end: shuffles then add up the four rows, and threadgroup memory the simdgroups.
// The sum of codes times x is scaled, which costs one multiplication for each group and row of x, and the unpacked
// weights no further operation. Three rows need more registers than that is worth: the form below serves them as fast.
//
// qvm of up to eight rows: the 256 columns are one row of w in one simdgroup, eight columns to a lane.
//
//   simdgroup:  lane         0       1        2        3   ...     31
//               columns   [0, 8)  [8, 16) [16, 24) [24, 32)   [248, 256)          of rows k, k + 1, ... at once
//
// So a lane has eight accumulators for each row of x, as many as fit its registers, and unpacks each weight once for
// all of them; at 4 bits a simdgroup reads whole lines. All lanes load the same values of x, from one address.
//
// Split-K, of qvm, and of gather_qvm where there are few pairs: threadgroup p along y takes part p of K and writes
// float32 partial sums; sum_parts adds them up.
#pragma once

#include "../common/metal.h"
#include "operands.h"

namespace quantization_mlx {

// --- Transposed ----------------------------------------------------------------------------------------------------

static constant constexpr const int qmv_threads = 32 * qmv_simdgroups();

// Columns of y among so many rows of w, and those of a lane.
METAL_FUNC int qmv_y_columns(int rows_of_w) { return is_gated ? rows_of_w >> 1 : rows_of_w; }
METAL_FUNC int qmv_y_outputs() { return is_gated ? qmv_outputs() / 2 : qmv_outputs(); }

// Row r of a lane, counted from its first; one of values is N rows further than its gate.
METAL_FUNC int qmv_row(int r, constant ProductParams& params) {
  return is_gated && r >= qmv_y_outputs() ? params.n + qmv_lanes_across() * (r - qmv_y_outputs())
                                          : qmv_lanes_across() * r;
}

inline constexpr int words_of(int elements, int bits) { return (elements * bits + 31) / 32; }

METAL_FUNC bool row_exists(int r, int first, constant ProductParams& params) {
  return aligned_outputs || first + qmv_lanes_across() * (r % qmv_y_outputs()) < params.n;
}

// Packed elements of each of a lane's rows of w, with their scales and biases.
template <int words, int outputs>
struct PackedRows {
  uint packed[outputs * words];
  float scales[outputs];
  float biases[outputs];
};

// `elements` elements of a lane's rows of w, from where the pointers lead in row `first`: the long loads first, then
// the scales. Rows that do not exist are zeros.
template <Mode mode, int group_size, int bits, int elements, int words, int outputs, typename Scale>
METAL_FUNC void load_rows(
    const device ushort* w,
    const device Scale* scales,
    const device Scale* biases,
    constant ProductParams& params,
    int first,
    thread PackedRows<words, outputs>& rows) {
  // From there on 32 bits are enough, which cost a quarter of 64.
  const int row_halves = params.k / 16 * bits;
  const int row_groups = params.k / group_size;
#pragma unroll
  for (int r = 0; r < outputs; ++r) {
    if (row_exists(r, first, params)) {
      const device ushort* source = w + qmv_row(r, params) * row_halves;
      if (elements == run_elements) {
        load_words<bits>((const device uint*)source, aligned_weights, rows.packed + r * words);
      } else {
        load_half_run<bits>(source, aligned_weights, rows.packed + r * words);
      }
    } else {
#pragma unroll
      for (int i = 0; i < words; ++i) {
        rows.packed[r * words + i] = 0u;
      }
    }
  }
#pragma unroll
  for (int r = 0; r < outputs; ++r) {
    if (row_exists(r, first, params)) {
      const int row = qmv_row(r, params);
      rows.scales[r] = decode_scale<mode>(scales[row * row_groups]);
      rows.biases[r] = decode_bias<mode>(biases, row * row_groups);
    } else {
      rows.scales[r] = 0.0f;
      rows.biases[r] = 0.0f;
    }
  }
}

// As a tree: the additions of one chunk do not wait for one another, nor for the chunk before.
METAL_FUNC float sum_of_chunk(thread const float* values) {
  return ((values[0] + values[1]) + (values[2] + values[3])) + ((values[4] + values[5]) + (values[6] + values[7]));
}

// Adds the products of all rows of x, from their first elements on, with loaded rows of w to sums[m * outputs + r].
//
// Few rows: codes are summed first, and the sums are scaled; the bias meets the sum of x. More rows: weights are scaled
// before they meet x, which is then fewer operations.
template <Mode mode, int bits, int rows, int elements, int words, int outputs, typename T>
METAL_FUNC void multiply_rows(
    const device T* x,
    constant ProductParams& params,
    thread const PackedRows<words, outputs>& w,
    thread float* sums) {
  constexpr bool scales_sums = rows <= 3;
  // Of one row: more have no registers left for two kinds of sums.
  constexpr bool small = rows == 1 && TakesSmallCodes<T, mode, bits>::value;
  constexpr int kinds = small ? 2 : 1;  // of sums: at even places, at odd ones
  float partial[scales_sums ? kinds * rows * outputs : 1];
  float x_sums[rows];
  if (scales_sums) {
#pragma unroll
    for (int i = 0; i < kinds * rows * outputs; ++i) {
      partial[i] = 0.0f;
    }
  }
#pragma unroll
  for (int m = 0; m < rows; ++m) {
    x_sums[m] = 0.0f;
  }
#pragma unroll
  for (int chunk = 0; chunk < elements / chunk_elements; ++chunk) {
    float weights[outputs * chunk_elements];
#pragma unroll
    for (int r = 0; r < outputs; ++r) {
      if (small) {
        decode_small_chunk(w.packed + r * words, chunk, weights + r * chunk_elements);
      } else {
        decode_finite_chunk<mode, bits>(w.packed + r * words, chunk, weights + r * chunk_elements);
      }
      if (!scales_sums) {
#pragma unroll
        for (int i = 0; i < chunk_elements; ++i) {
          weights[r * chunk_elements + i] = fma(weights[r * chunk_elements + i], w.scales[r], w.biases[r]);
        }
      }
    }
#pragma unroll
    for (int m = 0; m < rows; ++m) {
      // An instance for more rows than there are repeats the last one, and does not write it.
      const int row = m == 0 ? 0 : min(m, params.rows - 1) * static_cast<int>(params.x_row_stride);
      float activations[chunk_elements];
      load_values<chunk_elements>(x + (row + chunk * chunk_elements), aligned_x, activations);
      thread float* target = scales_sums ? partial : sums;
      if (small) {
        x_sums[m] += sum_of_chunk(activations);
      }
#pragma unroll
      for (int i = 0; i < chunk_elements; ++i) {
        if (scales_sums && has_biases(mode) && !small) {
          x_sums[m] += activations[i];
        }
#pragma unroll
        for (int r = 0; r < outputs; ++r) {
          const int place = (i % kinds * rows + m) * outputs + r;
          target[place] = fma(weights[r * chunk_elements + i], activations[i], target[place]);
        }
      }
    }
  }
  if (scales_sums) {
#pragma unroll
    for (int m = 0; m < rows; ++m) {
#pragma unroll
      for (int r = 0; r < outputs; ++r) {
        const float sum = fma(w.biases[r], x_sums[m], sums[m * outputs + r]);
        thread const float* products = partial + m * outputs + r;
        const float whole = small ? sum_of_small(products[0], products[(kinds - 1) * rows * outputs]) : products[0];
        sums[m * outputs + r] = fma(w.scales[r], whole, sum);
      }
    }
  }
}

// Lanes whose numbers differ in bit `mask` have sums of the same `count` columns. Each adds the other's to its own for
// half of them, the `upper` lane for the second half: what is given away need not be added twice.
template <int count>
METAL_FUNC void share_columns(ushort mask, bool upper, thread float* sums) {
#pragma unroll
  for (int i = 0; i < count / 2; ++i) {
    const float first = sums[i];  // values, not places: those of a choice would put the sums in memory
    const float second = sums[count / 2 + i];
    sums[i] = (upper ? second : first) + simd_shuffle_xor(upper ? first : second, mask);
  }
}

// Sums of a threadgroup's simdgroups, `columns` of y in each.
inline constexpr int qmv_memory(int rows) { return qmv_simdgroups() * rows * qmv_simdgroup_columns(); }

// As the plans count them.
template <int rows, int group_size, typename T>
METAL_FUNC int simdgroups_along(constant ProductParams& params) {
  return qmv_simdgroups_along(params.k / qmv_elements(rows, group_size, sizeof(T)), params.n);
}

// shared: qmv_memory(rows) floats. along: simdgroups_along.
template <typename T, Mode mode, int group_size, int bits, int rows, typename Scale, typename Y>
METAL_FUNC void matvec_transposed(
    thread const Operands<T, Scale>& operands,
    constant ProductParams& params,
    int along,
    device Y* y,
    threadgroup float* shared,
    uint block,
    uint simdgroup,
    uint lane) {
  constexpr int outputs = qmv_outputs();
  constexpr int columns = qmv_simdgroup_columns();
  constexpr int elements = qmv_elements(rows, group_size, sizeof(T));
  constexpr int words = words_of(elements, bits);
  constexpr int step_halves = elements / 16 * bits;
  constexpr int group_steps = group_size / elements;
  const int lane_step = lane % qmv_lanes_along();
  const int column = lane / qmv_lanes_along();
  const int part = static_cast<int>(simdgroup) & (along - 1);
  const int first_column = block * qmv_y_columns(qmv_columns(along));
  const int first = first_column + (static_cast<int>(simdgroup) >> qmv_log2(along)) * qmv_y_columns(columns) + column;

  float sums[rows * outputs];
#pragma unroll
  for (int i = 0; i < rows * outputs; ++i) {
    sums[i] = 0.0f;
  }
  uint nan_bits[outputs] = {};
  const int stride = along * qmv_lanes_along();
  const int first_step = part * qmv_lanes_along() + lane_step;
  const long row_groups = params.k / group_size;
  const device ushort* w = (const device ushort*)operands.w + static_cast<long>(first) * (params.k / 16 * bits);
  const device Scale* scales = operands.scales + first * row_groups;
  const device Scale* biases = has_biases(mode) ? operands.biases + first * row_groups : scales;
  const device T* x = operands.x + first_step * elements;
  for (int step = first_step; step * elements < params.k; step += stride) {
    PackedRows<words, outputs> packed;
    const int group = step / group_steps;
    load_rows<mode, group_size, bits, elements>(
        w + step * step_halves, scales + group, biases + group, params, first, packed);
    if (is_e4m3(mode)) {
#pragma unroll
      for (int r = 0; r < outputs; ++r) {
        nan_bits[r] |= e4m3_nan_bits<words>(packed.packed + r * words);
      }
    }
    multiply_rows<mode, bits, rows, elements>(x, params, packed, sums);
    x += stride * elements;
  }
#pragma unroll
  for (int i = 0; i < rows * outputs; ++i) {
    if (has_nan(nan_bits[i % outputs])) {
      sums[i] = quiet_nan();  // where one of its weights is no number
    }
  }
  // Sixteen lanes add up the sums of four rows of w: two steps leave one of them to each lane, and two more add it up.
  const int row = lane_step / 4;
#pragma unroll
  for (int m = 0; m < rows; ++m) {
    thread float* own = sums + m * outputs;
    // Not for other types and rows, of which it made bfloat16 slower (docs/gpu-lane.md).
    if (rows == 1 && TakesSmallCodes<T, mode, bits>::value) {
      share_columns<outputs>(8, (lane_step & 8) != 0, own);
      share_columns<outputs / 2>(4, (lane_step & 4) != 0, own);
      own[0] += simd_shuffle_xor(own[0], 2);
      own[0] += simd_shuffle_xor(own[0], 1);
      if (lane_step % 4 == 0) {
        shared[(simdgroup * rows + m) * columns + qmv_lanes_across() * row + column] = own[0];
      }
    } else {
#pragma unroll
      for (int r = 0; r < outputs; ++r) {
        float sum = own[r];
#pragma unroll
        for (int mask = 1; mask < qmv_lanes_along(); mask *= 2) {
          sum += simd_shuffle_xor(sum, static_cast<ushort>(mask));
        }
        if (lane_step == 0) {
          shared[(simdgroup * rows + m) * columns + qmv_lanes_across() * r + column] = sum;
        }
      }
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  const int thread_index = simdgroup * 32 + lane;
  if (is_gated) {
    write_gated_sums<qmv_simdgroups(), rows, columns>(
        shared, y, params, first_column, along, operands.factor, thread_index);
  } else {
    write_sums<qmv_simdgroups(), rows, columns>(
        shared, y, params, 0, first_column, along, operands.factor, thread_index);
  }
}

template <typename T, Mode mode, int group_size, int bits, int rows>
[[kernel, max_total_threads_per_threadgroup(qmv_threads)]] void qmv(PRODUCT_ARGUMENTS(T, mode, T)) {
  threadgroup float shared[qmv_memory(rows)];
  const Operands<T, ScaleType<mode, T>> operands = batch_operands<mode>(TENSORS(T, mode), params, threadgroup_index.z);
  matvec_transposed<T, mode, group_size, bits, rows>(
      operands, params, simdgroups_along<rows, group_size, T>(params), batch_output(y, params, 0, threadgroup_index.z),
      shared, threadgroup_index.x, simdgroup, lane);
}

template <typename T, Mode mode, int group_size, int bits, int rows>
[[kernel, max_total_threads_per_threadgroup(qmv_threads)]] void gather_qmv(GATHER_ARGUMENTS(T, mode, T)) {
  threadgroup float shared[qmv_memory(rows)];
  Operands<T, ScaleType<mode, T>> operands;
  const int along = simdgroups_along<rows, group_size, T>(params.product);
  device T* out = y + threadgroup_index.z * params.product.y.outer;
  if (gather_operands<mode>(TENSORS(T, mode), lhs_indices, rhs_indices, params, threadgroup_index.z, operands)) {
    matvec_transposed<T, mode, group_size, bits, rows>(
        operands, params.product, along, out, shared, threadgroup_index.x, simdgroup, lane);
  } else {
    const int columns = qmv_columns(along);
    write_nan(
        out, params.product, 0, params.product.rows, threadgroup_index.x * columns, columns, simdgroup * 32 + lane,
        qmv_threads);
  }
}

// --- Not transposed ------------------------------------------------------------------------------------------------

static constant constexpr const int qvm_threads = 32 * qvm_simdgroups();

// Moves operands on by `rows` rows of w and `columns` of its columns, a multiple of a run; x by as many of its columns
// as rows of w. A loop that does so takes fewer registers than one that computes addresses from k.
template <Mode mode, int group_size, int bits, typename T, typename Scale>
METAL_FUNC void advance(thread Operands<T, Scale>& operands, constant ProductParams& params, int rows, int columns) {
  const long row_words = static_cast<long>(params.n / 16) * bits / 2;
  const long groups = rows * static_cast<long>(params.n / group_size) + columns / group_size;
  operands.x += rows;
  operands.w += rows * row_words + columns / run_elements * bits;
  operands.scales += groups;
  operands.biases += reads_biases(mode) ? groups : 0;
}

// Adds the products of the run that w begins with and the first columns of `rows` rows of x to
// sums[m * run_elements + i]; the biases count for all columns of a group alike, and are summed on their own.
// columns: left of this row of w, 32 or more, or in nvfp4 16.
template <Mode mode, int group_size, int bits, int rows, typename T, typename Scale>
METAL_FUNC void accumulate_run_of_columns(
    Operands<T, Scale> operands,
    constant ProductParams& params,
    int columns,
    thread float* sums,
    thread float* bias_sums) {
  constexpr int span = group_size < run_elements ? group_size / chunk_elements : 4;  // chunks with one scale
  uint packed[bits];
  if (group_size >= run_elements || columns >= run_elements) {
    load_words<bits>(operands.w, aligned_weights, packed);
  } else {
#pragma unroll
    for (int i = 0; i < bits; ++i) {
      packed[i] = i < bits / 2 ? operands.w[i] : 0u;
    }
  }
  const float bias = decode_bias<mode>(operands.biases, 0);
  float activations[rows];
#pragma unroll
  for (int m = 0; m < rows; ++m) {
    // An instance for more rows than there are repeats the last one, and does not write it.
    activations[m] = static_cast<float>(operands.x[m == 0 ? 0 : min(m, params.rows - 1) * params.x_row_stride]);
    bias_sums[m] = fma(bias, activations[m], bias_sums[m]);
  }
#pragma unroll
  for (int chunk = 0; chunk < run_elements / chunk_elements; ++chunk) {
    if (group_size >= run_elements || chunk * chunk_elements < columns) {
      const float scale = decode_scale<mode>(operands.scales[chunk / span]);
      float weights[chunk_elements];
      decode_chunk<mode, bits>(packed, chunk, weights);
#pragma unroll
      for (int m = 0; m < rows; ++m) {
        const float scaled = scale * activations[m];
        thread float* target = sums + m * run_elements + chunk * chunk_elements;
#pragma unroll
        for (int i = 0; i < chunk_elements; ++i) {
          target[i] = fma(weights[i], scaled, target[i]);
        }
      }
    }
  }
}

// The sums of eight columns from `lane_column` on of the 256 of this block, for one or two rows: sums[8 * m + i].
// Lanes that have the same run read different rows of w, and in the end have a part of its columns each.
template <Mode mode, int group_size, int bits, int rows, typename T, typename Scale>
METAL_FUNC void sum_few_rows(
    Operands<T, Scale> operands,
    constant ProductParams& params,
    int first_column,
    int begin,
    int end,
    uint simdgroup,
    uint lane,
    thread float* sums,
    thread int& lane_column) {
  constexpr int lanes_along = qvm_columns() / run_elements;  // of one row of w
  constexpr int lanes_across = 32 / lanes_along;
  lane_column = lane % lanes_along * run_elements;
  const int column = first_column + lane_column;
  float run_sums[rows * run_elements];
  float bias_sums[rows];
#pragma unroll
  for (int i = 0; i < rows * run_elements; ++i) {
    run_sums[i] = 0.0f;
  }
#pragma unroll
  for (int m = 0; m < rows; ++m) {
    bias_sums[m] = 0.0f;
  }
  if (aligned_outputs || column < params.n) {
    constexpr int step = lanes_across * qvm_simdgroups();
    const int first = begin + static_cast<int>(simdgroup * lanes_across + lane / lanes_along);
    advance<mode, group_size, bits>(operands, params, first, column);
    for (int k = first; k < end; k += step) {
      accumulate_run_of_columns<mode, group_size, bits, rows>(operands, params, params.n - column, run_sums, bias_sums);
      advance<mode, group_size, bits>(operands, params, step, 0);
    }
  }
#pragma unroll
  for (int m = 0; m < rows; ++m) {
    thread float* own = run_sums + m * run_elements;
    share_columns<run_elements>(16, (lane & 16) != 0, own);
    share_columns<half_run_elements>(8, (lane & 8) != 0, own);
    float bias_sum = bias_sums[m];
    bias_sum += simd_shuffle_xor(bias_sum, 16);
    bias_sum += simd_shuffle_xor(bias_sum, 8);
#pragma unroll
    for (int i = 0; i < chunk_elements; ++i) {
      sums[m * chunk_elements + i] = own[i] + bias_sum;
    }
  }
  lane_column += (lane / 16 * 2 + lane / 8 % 2) * chunk_elements;
}

// More rows: adds the products of rows k to k + count - 1 of w, all of one chunk of columns, to sums[8 * m + i].
template <Mode mode, int group_size, int bits, int rows, int count, typename T, typename Scale>
METAL_FUNC void accumulate_columns(
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

// As sum_few_rows, for more rows. All lanes of a simdgroup read one row of w.
template <Mode mode, int group_size, int bits, int rows, typename T, typename Scale>
METAL_FUNC void sum_many_rows(
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
METAL_FUNC void matvec_plain(
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
  if (rows <= 2) {
    sum_few_rows<mode, group_size, bits, rows>(
        operands, params, first_column, begin, end, simdgroup, lane, sums, lane_column);
  } else {
    sum_many_rows<mode, group_size, bits, rows>(
        operands, params, first_column, begin, end, simdgroup, lane, sums, lane_column);
  }

  constexpr int at_once = rows_at_once(rows);
#pragma unroll
  for (int first = 0; first < rows; first += at_once) {
    if (first > 0) {
      threadgroup_barrier(mem_flags::mem_threadgroup);  // the rows before have been added up
    }
#pragma unroll
    for (int i = 0; i < at_once * chunk_elements; ++i) {
      const int row = simdgroup * at_once + i / chunk_elements;
      shared[row * qvm_columns() + lane_column + i % chunk_elements] = sums[first * chunk_elements + i];
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    write_sums<qvm_simdgroups(), at_once, qvm_columns()>(
        shared, y, params, first, first_column, qvm_simdgroups(), operands.factor, simdgroup * 32 + lane);
  }
}

template <typename T, Mode mode, int group_size, int bits, int rows, typename Y>
[[kernel, max_total_threads_per_threadgroup(qvm_threads)]] void qvm(PRODUCT_ARGUMENTS(T, mode, Y)) {
  threadgroup float shared[qvm_memory(rows)];
  matvec_plain<mode, group_size, bits, rows>(
      batch_operands<mode>(TENSORS(T, mode), params, threadgroup_index.z), params,
      batch_output(y, params, threadgroup_index.y, threadgroup_index.z), shared, threadgroup_index.x,
      threadgroup_index.y, simdgroup, lane);
}

template <typename T, Mode mode, int group_size, int bits, int rows, typename Y>
[[kernel, max_total_threads_per_threadgroup(qvm_threads)]] void gather_qvm(GATHER_ARGUMENTS(T, mode, Y)) {
  threadgroup float shared[qvm_memory(rows)];
  Operands<T, ScaleType<mode, T>> operands;
  device Y* out = y + threadgroup_index.z * params.product.y.outer + threadgroup_index.y * params.product.y_part_stride;
  if (gather_operands<mode>(TENSORS(T, mode), lhs_indices, rhs_indices, params, threadgroup_index.z, operands)) {
    matvec_plain<mode, group_size, bits, rows>(
        operands, params.product, out, shared, threadgroup_index.x, threadgroup_index.y, simdgroup, lane);
  } else {
    write_nan(
        out, params.product, 0, params.product.rows, threadgroup_index.x * qvm_columns(), qvm_columns(),
        simdgroup * 32 + lane, qvm_threads);
  }
}

}  // namespace quantization_mlx
