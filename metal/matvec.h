// Products of one to twelve rows of x with a quantized matrix, plain and gathered.
//
// matvec_transposed: y = x @ w.T, w [N, K], groups along K.
//
//   simdgroup:  lane =  0  1  2 ... 7 | 8  9 ... 15 | 16 ... 23 | 24 ... 31
//               run  =  0  1  2 ... 7 | 0  1 ...  7 |  0 ...  7 |  0 ...  7   then the next eight runs, along K
//               row of w:     n       |    n + 1    |   n + 2   |   n + 3     and n + 4, n + 5, ... in further
//               registers
//
// Eight lanes read eight runs of one row of w: at 4 bits a whole 128-byte line, 16 bytes a lane. The four groups of
// eight read the same x, so one line of x serves all of their rows of w, and one chunk of x in registers serves the
// further ones. Each pair of a row of x and a row of w has an accumulator of its own, so no addition waits for another.
// A run of w is loaded and unpacked once, for all rows of x. At the end three shuffles add up eight lanes.
//
// matvec_plain: y = x @ w, w [K, N], groups along N.
//
//   simdgroup:  lane =  0  1  2 ... 7 | 8  9 ... 15 | 16 ... 23 | 24 ... 31
//               run  =  0  1  2 ... 7 | 0  1 ...  7 |  0 ...  7 |  0 ...  7   along N: 256 columns
//               row of w:     k       |    k + 1    |   k + 2   |   k + 3     then on by 4 * simdgroups, along K
//
// A lane keeps its 32 columns to the end: two shuffles then add up the four rows, and threadgroup memory the
// simdgroups.
//
// Split-K: part p of the y dimension takes its share of K and writes float32 partial sums; sum_parts adds them up.
#pragma once

#include <metal_stdlib>

#include "../csrc/metal/launch.h"
#include "dequantize.h"

#pragma METAL fp math_mode(safe)

namespace quantization_mlx {

constant bool aligned_outputs [[function_constant(QUANTIZATION_MLX_ALIGNED_OUTPUTS)]];
constant bool aligned_weights [[function_constant(QUANTIZATION_MLX_ALIGNED_WEIGHTS)]];
constant bool aligned_x [[function_constant(QUANTIZATION_MLX_ALIGNED_X)]];
constant bool has_global_scale [[function_constant(QUANTIZATION_MLX_HAS_GLOBAL_SCALE)]];
constant bool has_lhs_indices [[function_constant(QUANTIZATION_MLX_HAS_LHS_INDICES)]];
constant bool has_rhs_indices [[function_constant(QUANTIZATION_MLX_HAS_RHS_INDICES)]];

static constant constexpr const int matvec_simdgroups = 2;
static constant constexpr const int plain_simdgroups = 4;
static constant constexpr const int lanes_along_runs = 8;
static constant constexpr const int lanes_across_runs = 4;

// Rows of w to a lane: independent accumulators for few rows of x, registers for many.
inline constexpr int outputs_per_lane(int rows) { return rows == 1 || rows > 8 ? 2 : 4; }

// --- Which matrices ------------------------------------------------------------------------------------------------

// The operands of one position of the batch, moved to their matrices.
template <typename T, typename Scale>
struct Operands {
  const device T* x;
  const device uint* w;
  const device Scale* scales;
  const device Scale* biases;
  float factor;  // of all scales
};

inline long batch_offset(constant BatchStrides& strides, long outer, long inner) {
  return outer * strides.outer + inner * strides.inner;
}

inline float factor_at(const device float* global_scale, long offset) {
  return has_global_scale ? nvfp4_decode_factor(global_scale[offset]) : 1.0f;
}

template <Mode mode, typename T, typename Scale>
inline Operands<T, Scale> batch_operands(
    const device T* x,
    const device uint* w,
    const device Scale* scales,
    const device Scale* biases,
    const device float* global_scale,
    constant MatvecParams& params,
    uint position) {
  const long outer = position / static_cast<uint>(params.inner_size);
  const long inner = position % static_cast<uint>(params.inner_size);
  Operands<T, Scale> result;
  result.x = x + batch_offset(params.x, outer, inner);
  result.w = w + batch_offset(params.w, outer, inner);
  result.scales = scales + batch_offset(params.scales, outer, inner);
  result.biases = has_biases(mode) ? biases + batch_offset(params.biases, outer, inner) : biases;
  result.factor = factor_at(global_scale, batch_offset(params.global_scale, outer, inner));
  return result;
}

// An index of one or two words, or UINT_MAX where it is negative or beyond 32 bits.
inline uint read_index(const device uint* indices, int words, long position) {
  const uint low = indices[position * words];
  return words == 2 && indices[position * 2 + 1] != 0u ? 0xFFFFFFFFu : low;
}

// False where an index is out of range; then the operands are not to be read.
template <Mode mode, typename T, typename Scale>
inline bool gather_operands(
    const device T* x,
    const device uint* w,
    const device Scale* scales,
    const device Scale* biases,
    const device float* global_scale,
    const device uint* lhs_indices,
    const device uint* rhs_indices,
    constant GatherParams& params,
    uint position,
    thread Operands<T, Scale>& result) {
  constant MatvecParams& matvec = params.matvec;
  const long outer = position / static_cast<uint>(matvec.inner_size);
  const long inner = position % static_cast<uint>(matvec.inner_size);
  const long lhs_position = batch_offset(params.lhs_indices, outer, inner);
  const long rhs_position = batch_offset(params.rhs_indices, outer, inner);
  const uint lhs =
      has_lhs_indices ? read_index(lhs_indices, params.lhs_words, lhs_position) : static_cast<uint>(lhs_position);
  const uint rhs =
      has_rhs_indices ? read_index(rhs_indices, params.rhs_words, rhs_position) : static_cast<uint>(rhs_position);
  if (lhs >= static_cast<uint>(params.lhs_count) || rhs >= static_cast<uint>(params.rhs_count)) {
    return false;
  }
  result.x = x + lhs * matvec.x.outer;
  result.w = w + rhs * matvec.w.outer;
  result.scales = scales + rhs * matvec.scales.outer;
  result.biases = has_biases(mode) ? biases + rhs * matvec.biases.outer : biases;
  result.factor = factor_at(global_scale, rhs * matvec.global_scale.outer);
  return true;
}

// Where y of one position and part begins.
template <typename Y>
inline device Y* output_at(device Y* y, constant MatvecParams& params, uint part, uint position) {
  const long matrix = static_cast<long>(position) * params.parts + part;
  return y + matrix * params.rows * params.n;
}

template <typename Y>
inline void write_nan(device Y* y, constant MatvecParams& params, int first, int end, int thread_index, int threads) {
  for (int row = 0; row < params.rows; ++row) {
    for (int column = first + thread_index; column < min(end, params.n); column += threads) {
      y[static_cast<long>(row) * params.n + column] = static_cast<Y>(as_type<float>(0x7FC00000u));
    }
  }
}

// --- Transposed ----------------------------------------------------------------------------------------------------

// Adds the products of the first `chunks` chunks of one run: of row m of x and row first + 4 * r of w to
// sums[m * outputs + r].
template <typename T, Mode mode, int group_size, int bits, int rows, int chunks, typename Scale>
inline void accumulate_run(
    Operands<T, Scale> operands,
    constant MatvecParams& params,
    int run,
    int first,
    thread float* sums) {
  constexpr int outputs = outputs_per_lane(rows);
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
    float x_sum = 0.0f;
    float partial[outputs];  // of codes, for a single row: scale and bias come in once a span
#pragma unroll
    for (int r = 0; r < outputs; ++r) {
      partial[r] = 0.0f;
    }
#pragma unroll
    for (int chunk = s * span; chunk < (s + 1) * span; ++chunk) {
      float activations[rows * chunk_elements];
#pragma unroll
      for (int m = 0; m < rows; ++m) {
        // An instance for more rows than there are repeats the last one, and does not write it.
        const int row = rows == 1 ? 0 : min(m, params.rows - 1);
        load_chunk(x + row * params.x_row_stride + chunk * chunk_elements, aligned_x, activations + m * chunk_elements);
      }
      if (rows == 1 && has_biases(mode)) {
#pragma unroll
        for (int i = 0; i < chunk_elements; ++i) {
          x_sum += activations[i];
        }
      }
#pragma unroll
      for (int r = 0; r < outputs; ++r) {
        float weights[chunk_elements];
        decode_chunk<mode, bits>(packed + r * bits, chunk, weights);
        if (rows == 1) {
#pragma unroll
          for (int i = 0; i < chunk_elements; ++i) {
            partial[r] = fma(weights[i], activations[i], partial[r]);
          }
        } else {
#pragma unroll
          for (int i = 0; i < chunk_elements; ++i) {
            const float weight = fma(weights[i], scales[r * spans + s], biases[r * spans + s]);
#pragma unroll
            for (int m = 0; m < rows; ++m) {
              sums[m * outputs + r] = fma(weight, activations[m * chunk_elements + i], sums[m * outputs + r]);
            }
          }
        }
      }
    }
    if (rows == 1) {
#pragma unroll
      for (int r = 0; r < outputs; ++r) {
        sums[r] = fma(scales[r * spans + s], partial[r], fma(biases[r * spans + s], x_sum, sums[r]));
      }
    }
  }
}

template <typename T, Mode mode, int group_size, int bits, int rows, typename Scale, typename Y>
inline void matvec_transposed(
    Operands<T, Scale> operands,
    constant MatvecParams& params,
    device Y* y,
    uint block,
    uint part,
    uint simdgroup,
    uint lane) {
  constexpr int outputs = outputs_per_lane(rows);
  const int lane_run = lane % lanes_along_runs;
  const int first = (block * matvec_simdgroups + simdgroup) * (lanes_across_runs * outputs) + lane / lanes_along_runs;
  const int runs = params.k / run_elements;
  const int begin = part * params.part_steps;
  const int end = min(runs, begin + params.part_steps);

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
    constant MatvecParams& params [[buffer(6)]],
    uint3 threadgroup_index [[threadgroup_position_in_grid]],
    uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  matvec_transposed<T, mode, group_size, bits, rows>(
      batch_operands<mode>(x, w, scales, biases, global_scale, params, threadgroup_index.z), params,
      output_at(y, params, threadgroup_index.y, threadgroup_index.z), threadgroup_index.x, threadgroup_index.y,
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
    const device uint* lhs_indices [[buffer(7)]],
    const device uint* rhs_indices [[buffer(8)]],
    uint3 threadgroup_index [[threadgroup_position_in_grid]],
    uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  Operands<T, typename ScaleOf<mode, T>::type> operands;
  const bool valid = gather_operands<mode>(
      x, w, scales, biases, global_scale, lhs_indices, rhs_indices, params, threadgroup_index.z, operands);
  device T* out = output_at(y, params.matvec, threadgroup_index.y, threadgroup_index.z);
  if (!valid) {
    const int block = matvec_simdgroups * lanes_across_runs * outputs_per_lane(rows);
    const int first = threadgroup_index.x * block;
    write_nan(out, params.matvec, first, first + block, simdgroup * 32 + lane, matvec_simdgroups * 32);
    return;
  }
  matvec_transposed<T, mode, group_size, bits, rows>(
      operands, params.matvec, out, threadgroup_index.x, threadgroup_index.y, simdgroup, lane);
}

// --- Not transposed ------------------------------------------------------------------------------------------------

static constant constexpr const int plain_block = lanes_along_runs * run_elements;  // columns of a threadgroup

// shared: plain_simdgroups - 1 times plain_block floats.
template <typename T, Mode mode, int group_size, int bits, typename Scale, typename Y>
inline void matvec_plain(
    Operands<T, Scale> operands,
    constant MatvecParams& params,
    device Y* y,
    threadgroup float* shared,
    uint block,
    uint part,
    uint simdgroup,
    uint lane) {
  constexpr int span = group_size < run_elements ? group_size / chunk_elements : 4;  // chunks with one scale
  const int run = block * lanes_along_runs + lane % lanes_along_runs;
  const int column = run * run_elements;
  const int columns = min(run_elements, params.n - column);  // 32, or 16 at the end of a row in nvfp4, or less than 1
  const long row_words = static_cast<long>(params.n / 16) * bits / 2;
  const long row_groups = params.n / group_size;
  const int begin = part * params.part_steps;
  const int end = min(params.k, begin + params.part_steps);

  float sums[run_elements];
#pragma unroll
  for (int i = 0; i < run_elements; ++i) {
    sums[i] = 0.0f;
  }
  if (columns > 0) {
    const int stride = lanes_across_runs * plain_simdgroups;
    for (int k = begin + simdgroup * lanes_across_runs + lane / lanes_along_runs; k < end; k += stride) {
      uint packed[bits];
      const device uint* source = operands.w + k * row_words + run * bits;
      if (group_size >= run_elements || columns == run_elements) {
        load_words<bits>(source, aligned_weights, packed);
      } else {
#pragma unroll
        for (int i = 0; i < bits; ++i) {
          packed[i] = i < bits / 2 ? source[i] : 0u;
        }
      }
      const float activation = static_cast<float>(operands.x[k]);
#pragma unroll
      for (int chunk = 0; chunk < 4; ++chunk) {
        if (chunk * chunk_elements < columns) {
          const long group = k * row_groups + column / group_size + chunk / span;
          const float scale = decode_scale<mode>(operands.scales[group]) * activation;
          const float bias = decode_bias<mode>(operands.biases, group) * activation;
          float weights[chunk_elements];
          decode_chunk<mode, bits>(packed, chunk, weights);
#pragma unroll
          for (int i = 0; i < chunk_elements; ++i) {
            sums[chunk * chunk_elements + i] = fma(weights[i], scale, sums[chunk * chunk_elements + i] + bias);
          }
        }
      }
    }
  }
#pragma unroll
  for (int i = 0; i < run_elements; ++i) {
    sums[i] += simd_shuffle_xor(sums[i], 8);
    sums[i] += simd_shuffle_xor(sums[i], 16);
  }
  const int slot = lane * run_elements;  // of the lanes 0 to 7, which hold all the columns
  if (simdgroup > 0 && lane < lanes_along_runs) {
#pragma unroll
    for (int i = 0; i < run_elements; ++i) {
      shared[(simdgroup - 1) * plain_block + slot + i] = sums[i];
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (simdgroup == 0 && lane < lanes_along_runs) {
#pragma unroll
    for (int i = 0; i < run_elements; ++i) {
#pragma unroll
      for (int s = 0; s < plain_simdgroups - 1; ++s) {
        sums[i] += shared[s * plain_block + slot + i];
      }
      if (i < columns) {
        y[column + i] = static_cast<Y>(sums[i] * operands.factor);
      }
    }
  }
}

template <typename T, Mode mode, int group_size, int bits, typename Y>
[[kernel]] void qvm(
    const device T* x [[buffer(0)]],
    const device uint* w [[buffer(1)]],
    const device typename ScaleOf<mode, T>::type* scales [[buffer(2)]],
    const device typename ScaleOf<mode, T>::type* biases [[buffer(3)]],
    const device float* global_scale [[buffer(4)]],
    device Y* y [[buffer(5)]],
    constant MatvecParams& params [[buffer(6)]],
    uint3 threadgroup_index [[threadgroup_position_in_grid]],
    uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  threadgroup float shared[(plain_simdgroups - 1) * plain_block];
  matvec_plain<T, mode, group_size, bits>(
      batch_operands<mode>(x, w, scales, biases, global_scale, params, threadgroup_index.z), params,
      output_at(y, params, threadgroup_index.y, threadgroup_index.z), shared, threadgroup_index.x, threadgroup_index.y,
      simdgroup, lane);
}

template <typename T, Mode mode, int group_size, int bits>
[[kernel]] void gather_qvm(
    const device T* x [[buffer(0)]],
    const device uint* w [[buffer(1)]],
    const device typename ScaleOf<mode, T>::type* scales [[buffer(2)]],
    const device typename ScaleOf<mode, T>::type* biases [[buffer(3)]],
    const device float* global_scale [[buffer(4)]],
    device T* y [[buffer(5)]],
    constant GatherParams& params [[buffer(6)]],
    const device uint* lhs_indices [[buffer(7)]],
    const device uint* rhs_indices [[buffer(8)]],
    uint3 threadgroup_index [[threadgroup_position_in_grid]],
    uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  threadgroup float shared[(plain_simdgroups - 1) * plain_block];
  Operands<T, typename ScaleOf<mode, T>::type> operands;
  const bool valid = gather_operands<mode>(
      x, w, scales, biases, global_scale, lhs_indices, rhs_indices, params, threadgroup_index.z, operands);
  device T* out = output_at(y, params.matvec, threadgroup_index.y, threadgroup_index.z);
  if (!valid) {
    const int first = threadgroup_index.x * plain_block;
    write_nan(out, params.matvec, first, first + plain_block, simdgroup * 32 + lane, plain_simdgroups * 32);
    return;
  }
  matvec_plain<T, mode, group_size, bits>(
      operands, params.matvec, out, shared, threadgroup_index.x, threadgroup_index.y, simdgroup, lane);
}

// --- Split-K
// ----------------------------------------------------------------------------------------------------------

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
