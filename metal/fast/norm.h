// Norms of the rows of x, or of scale * x + residual, where x may have a norm of its own: rms_norm and layer_norm.
//
//   threadgroup = row
//   thread        0          1         ...      threads - 1
//   elements   [0, 8)     [8, 16)      ...                      of 8192 at a time, in float32
//
// A row of up to 8192 elements is read once and stays in registers; longer ones are read again for each pass, from a
// cache. Every pass ends with a sum over the simdgroup and, in threadgroup memory, over the simdgroups; there are as
// few of these as the row needs, and a row of one simdgroup, such as a head of attention, waits at no barrier.
#pragma once

#include "../../csrc/gpu/launch.h"
#include "../common/load.h"
#include "../common/metal.h"

namespace quantization_mlx {

constant bool aligned_x [[function_constant(QUANTIZATION_MLX_ALIGNED_X)]];
constant bool has_weight [[function_constant(QUANTIZATION_MLX_HAS_WEIGHT)]];
constant bool has_bias [[function_constant(QUANTIZATION_MLX_HAS_BIAS)]];
constant bool has_residual [[function_constant(QUANTIZATION_MLX_HAS_RESIDUAL)]];
constant bool has_x_weight [[function_constant(QUANTIZATION_MLX_HAS_X_WEIGHT)]];

static constant constexpr const int norm_threads = norm_max_threads();
static constant constexpr const int norm_step = norm_elements();

// A thread's elements, zero behind the row's end.
template <typename T>
METAL_FUNC void load_step(const device T* source, int first, int length, thread float* values) {
  if (aligned_x) {
    load_values<norm_step>(source + first, true, values);
  } else {
#pragma unroll
    for (int i = 0; i < norm_step; ++i) {
      values[i] = first + i < length ? static_cast<float>(source[first + i]) : 0.0f;
    }
  }
}

template <typename T>
METAL_FUNC void store_step(thread const float* values, device T* destination, int first, int length) {
#pragma unroll
  for (int i = 0; i < norm_step; i += 4) {
    if (aligned_x) {
      store_four(values + i, destination + first + i);
    } else {
#pragma unroll
      for (int j = i; j < i + 4; ++j) {
        if (first + j < length) {
          destination[first + j] = static_cast<T>(values[j]);
        }
      }
    }
  }
}

// Of all threads of the threadgroup, to each of them. shared: one float for each simdgroup, of this sum alone.
METAL_FUNC float sum_of_threadgroup(
    float value,
    threadgroup float* shared,
    uint simdgroup,
    uint simdgroups,
    uint lane) {
  const float sum = simd_sum(value);
  if (simdgroups == 1) {
    return sum;
  }
  if (lane == 0) {
    shared[simdgroup] = sum;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  return simd_sum(lane < simdgroups ? shared[lane] : 0.0f);
}

// once: the row has no more elements than the threads take at a time.
template <typename T, bool centres, bool once>
[[kernel, max_total_threads_per_threadgroup(norm_threads)]] void norm(
    const device T* x [[buffer(0)]],
    const device T* residual [[buffer(1), function_constant(has_residual)]],
    const device T* weight [[buffer(2), function_constant(has_weight)]],
    const device T* bias [[buffer(3), function_constant(has_bias)]],
    device T* sum [[buffer(4), function_constant(has_residual)]],
    device T* y [[buffer(5)]],
    const device T* x_weight [[buffer(6), function_constant(has_x_weight)]],
    constant NormParams& params [[buffer(7)]],
    uint row [[threadgroup_position_in_grid]],
    uint thread_index [[thread_index_in_threadgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint simdgroups [[simdgroups_per_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  threadgroup float shared[3 * norm_threads / 32];
  const int length = params.length;
  const int begin = thread_index * norm_step;
  const int step = simdgroups * 32 * norm_step;
  const device T* source = x + row * params.x_stride;
  const long place = row * static_cast<long>(length);
  float values[norm_step];
  float x_factor = params.scale;
  if (has_x_weight) {
    float squares = 0.0f;
    for (int first = begin; first < length; first += step) {
      load_step(source, first, length, values);
#pragma unroll
      for (int i = 0; i < norm_step; ++i) {
        squares += values[i] * values[i];
      }
    }
    squares = sum_of_threadgroup(squares, shared + norm_threads / 32, simdgroup, simdgroups, lane);
    x_factor *= rsqrt(squares / length + params.epsilon);
  }
  float total = 0.0f;
  for (int first = begin; first < length; first += step) {
    if (!(has_x_weight && once)) {
      load_step(source, first, length, values);
    }
    if (has_residual) {
      float addends[norm_step];
      load_step(residual + row * params.residual_stride, first, length, addends);
      if (has_x_weight) {
        float factors[norm_step];
        load_step(x_weight, first, length, factors);
#pragma unroll
        for (int i = 0; i < norm_step; ++i) {
          values[i] *= factors[i];
        }
      }
#pragma unroll
      for (int i = 0; i < norm_step; ++i) {  // what is normalised is the sum as it is stored
        values[i] = static_cast<float>(static_cast<T>(fma(values[i], x_factor, addends[i])));
      }
      store_step(values, sum + place, first, length);
    }
#pragma unroll
    for (int i = 0; i < norm_step; ++i) {
      total += centres ? values[i] : values[i] * values[i];
    }
  }
  total = sum_of_threadgroup(total, shared, simdgroup, simdgroups, lane);
  if (has_residual) {
    source = sum + place;
  }

  // The mean is rounded, which matters where it is large beside the deviations: they are centred again, by their own.
  float mean = 0.0f;
  float rest = 0.0f;
  if (centres) {
    mean = total / length;
    total = 0.0f;
    for (int first = begin; first < length; first += step) {
      if (!once) {
        load_step(source, first, length, values);
      }
#pragma unroll
      for (int i = 0; i < norm_step; ++i) {
        const float deviation = aligned_x || first + i < length ? values[i] - mean : 0.0f;
        rest += deviation;
        total += deviation * deviation;
      }
    }
    rest = sum_of_threadgroup(rest, shared + norm_threads / 32, simdgroup, simdgroups, lane) / length;
    total = sum_of_threadgroup(total, shared + 2 * norm_threads / 32, simdgroup, simdgroups, lane);
  }

  const float variance = total / length - rest * rest;
  const float factor = rsqrt((variance < 0.0f ? 0.0f : variance) + params.epsilon);
  for (int first = begin; first < length; first += step) {
    if (!once) {
      load_step(source, first, length, values);
    }
    float factors[norm_step];
    float offsets[norm_step];
    if (has_weight) {
      load_step(weight, first, length, factors);
    }
    if (has_bias) {
      load_step(bias, first, length, offsets);
    }
#pragma unroll
    for (int i = 0; i < norm_step; ++i) {
      const float normal = (centres ? values[i] - mean - rest : values[i]) * factor;
      const float scaled = has_weight ? normal * factors[i] : normal;
      values[i] = has_bias ? scaled + offsets[i] : scaled;
    }
    store_step(values, y + place, first, length);
  }
}

}  // namespace quantization_mlx
