// Which matrices a threadgroup works on: the batch strides of a plain product, the indices of a gathered one.
#pragma once

#include <metal_stdlib>

#include "../../csrc/gpu/launch.h"
#include "dequantize.h"

namespace quantization_mlx {

constant bool aligned_outputs [[function_constant(QUANTIZATION_MLX_ALIGNED_OUTPUTS)]];
constant bool aligned_weights [[function_constant(QUANTIZATION_MLX_ALIGNED_WEIGHTS)]];
constant bool aligned_x [[function_constant(QUANTIZATION_MLX_ALIGNED_X)]];
constant bool aligned_k [[function_constant(QUANTIZATION_MLX_ALIGNED_K)]];
constant bool has_global_scale [[function_constant(QUANTIZATION_MLX_HAS_GLOBAL_SCALE)]];

// The operands of one product, moved to their matrices.
template <typename T, typename Scale>
struct Operands {
  const device T* x;
  const device uint* w;
  const device Scale* scales;
  const device Scale* biases;
  float factor;  // of all scales
};

inline float factor_at(const device float* global_scale, long offset) {
  return has_global_scale ? nvfp4_decode_factor(global_scale[offset]) : 1.0f;
}

inline long batch_offset(constant BatchStrides& strides, uint position, int inner_size) {
  const long outer = position / static_cast<uint>(inner_size);
  const long inner = position % static_cast<uint>(inner_size);
  return outer * strides.outer + inner * strides.inner;
}

// At one position of the batch.
template <Mode mode, typename T, typename Scale>
inline Operands<T, Scale> batch_operands(
    const device T* x,
    const device uint* w,
    const device Scale* scales,
    const device Scale* biases,
    const device float* global_scale,
    constant ProductParams& params,
    uint position) {
  Operands<T, Scale> result;
  result.x = x + batch_offset(params.x, position, params.inner_size);
  result.w = w + batch_offset(params.w, position, params.inner_size);
  result.scales = scales + batch_offset(params.scales, position, params.inner_size);
  result.biases = reads_biases(mode) ? biases + batch_offset(params.biases, position, params.inner_size) : biases;
  result.factor = factor_at(global_scale, batch_offset(params.global_scale, position, params.inner_size));
  return result;
}

// Where y of one position and part begins.
template <typename Y>
inline device Y* batch_output(device Y* y, constant ProductParams& params, uint part, uint position) {
  return y + batch_offset(params.y, position, params.inner_size) + part * params.y_part_stride;
}

// The operands of matrix `rhs`, x being left where it is.
template <Mode mode, typename T, typename Scale>
inline Operands<T, Scale> operands_of_matrix(
    const device T* x,
    const device uint* w,
    const device Scale* scales,
    const device Scale* biases,
    const device float* global_scale,
    constant ProductParams& params,
    long rhs) {
  Operands<T, Scale> result;
  result.x = x;
  result.w = w + rhs * params.w.outer;
  result.scales = scales + rhs * params.scales.outer;
  result.biases = reads_biases(mode) ? biases + rhs * params.biases.outer : biases;
  result.factor = factor_at(global_scale, rhs * params.global_scale.outer);
  return result;
}

inline bool is_valid_index(long index, int count) { return index >= 0 && index < count; }

// The operands of one pair of indices. False where one of them is out of range: then nothing may be read.
template <Mode mode, typename T, typename Scale>
inline bool gather_operands(
    const device T* x,
    const device uint* w,
    const device Scale* scales,
    const device Scale* biases,
    const device float* global_scale,
    const device long* lhs_indices,
    const device long* rhs_indices,
    constant GatherParams& params,
    uint pair,
    thread Operands<T, Scale>& result) {
  const long lhs = lhs_indices[pair];
  const long rhs = rhs_indices[pair];
  if (!is_valid_index(lhs, params.lhs_count) || !is_valid_index(rhs, params.rhs_count)) {
    return false;
  }
  result =
      operands_of_matrix<mode>(x + lhs * params.product.x.outer, w, scales, biases, global_scale, params.product, rhs);
  return true;
}

// NaN to columns [first, end) of rows [first_row, end_row), as far as the matrix goes.
template <typename Y>
inline void write_nan(
    device Y* y,
    constant ProductParams& params,
    int first_row,
    int end_row,
    int first,
    int end,
    int thread_index,
    int threads) {
  for (int row = first_row; row < min(end_row, params.rows); ++row) {
    for (int column = first + thread_index; column < min(end, params.n); column += threads) {
      y[static_cast<long>(row) * params.n + column] = static_cast<Y>(quiet_nan());
    }
  }
}

}  // namespace quantization_mlx
