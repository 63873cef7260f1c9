// Gated activations: y [rows, length] = activation(gates) * (values + offset), gates and values on any strides.
//
//   threadgroups along y       rows
//   threads along x            elements [0, 8), [8, 16), ... of a row
//
// A row of an expert's results gets the expert's biases first: NaN where there is no such expert.
//
// Elements that are adjacent, on rows of whole 16 bytes, come and go in the widest loads and stores; the even and the
// odd columns of one product come one by one, from lines that the threads beside read, too.
#pragma once

#include "../../csrc/gpu/launch.h"
#include "../common/activation.h"
#include "../common/load.h"
#include "../common/metal.h"

namespace quantization_mlx {

constant bool aligned_x [[function_constant(QUANTIZATION_MLX_ALIGNED_X)]];
constant bool has_bias [[function_constant(QUANTIZATION_MLX_HAS_BIAS)]];

static constant constexpr const int gate_threads = elementwise_threads_per_threadgroup();
static constant constexpr const int gate_step = gate_elements();

template <typename T>
METAL_FUNC void load_step(const device T* row, long stride, int first, int length, thread float* values) {
  if (aligned_x) {
    load_values<gate_step>(row + first, true, values);
  } else {
#pragma unroll
    for (int i = 0; i < gate_step; ++i) {
      values[i] = first + i < length ? static_cast<float>(row[(first + i) * stride]) : 0.0f;
    }
  }
}

// Adds elements of the expert's row.
template <typename T>
METAL_FUNC void add_bias(
    const device T* bias,
    long row_stride,
    long stride,
    long expert,
    int first,
    constant GateParams& params,
    thread float* values) {
  const bool exists = expert >= 0 && expert < params.experts;
  float own[gate_step];
  load_step(bias + (exists ? expert * row_stride : 0), stride, first, params.length, own);
#pragma unroll
  for (int i = 0; i < gate_step; ++i) {
    values[i] = exists ? values[i] + own[i] : NAN;
  }
}

template <typename T, Gate kind>
[[kernel, max_total_threads_per_threadgroup(gate_threads)]] void gate(
    const device T* gates [[buffer(0)]],
    const device T* values [[buffer(1)]],
    const device T* gate_bias [[buffer(2), function_constant(has_bias)]],
    const device T* value_bias [[buffer(3), function_constant(has_bias)]],
    const device long* experts [[buffer(4), function_constant(has_bias)]],
    device T* y [[buffer(5)]],
    constant GateParams& params [[buffer(6)]],
    uint2 threadgroup_index [[threadgroup_position_in_grid]],
    uint2 threads [[threads_per_threadgroup]],
    uint thread_index [[thread_index_in_threadgroup]]) {
  const int length = params.length;
  const int first = (threadgroup_index.x * threads.x + thread_index) * gate_step;
  if (first >= length) {
    return;
  }
  const long row = threadgroup_index.y;
  float results[gate_step];
  float factors[gate_step];
  load_step(gates + row * params.gates_row_stride, params.gates_stride, first, length, results);
  load_step(values + row * params.values_row_stride, params.values_stride, first, length, factors);
  if (has_bias) {
    const long expert = experts[row];
    add_bias(gate_bias, params.gate_bias_row_stride, params.gate_bias_stride, expert, first, params, results);
    add_bias(value_bias, params.value_bias_row_stride, params.value_bias_stride, expert, first, params, factors);
  }
#pragma unroll
  for (int i = 0; i < gate_step; ++i) {  // NaN passes every comparison by
    const float x = results[i] > params.limit ? params.limit : results[i];
    const float high = factors[i] > params.limit ? params.limit : factors[i];
    const float value = high < -params.limit ? -params.limit : high;
    results[i] = activated(kind, x, params.alpha) * (value + params.offset);
  }
  device T* destination = y + row * length + first;
  if (aligned_x) {
    store_four(results, destination);
    store_four(results + 4, destination + 4);
  } else {
#pragma unroll
    for (int i = 0; i < gate_step; ++i) {
      if (first + i < length) {
        destination[i] = static_cast<T>(results[i]);
      }
    }
  }
}

}  // namespace quantization_mlx
