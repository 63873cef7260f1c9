// Quantizing and dequantizing whole matrices: format.h's arithmetic, element for element as on the CPU.
//
//   quantize:   lane  0        1        2        3       | 4 ...       a lane owns 8 elements: 16 bytes of half in,
//               x     [0, 8)   [8, 16)  [16, 24) [24, 32)| [32, 40)    exactly `bits` bytes out
//                     +---- group of 32: 4 lanes --------+
//
// The lanes of a group find its extremes by shuffles, and each of them computes its scale. Nothing is read twice, and
// no threadgroup memory is needed.
//
//   dequantize: a lane owns a run of 32 elements (see dequantize.h): `bits` words in, 64 bytes of half out.
//
// Rows are contiguous and hold whole groups, so a matrix is one long row.
//
// Packed columns: matrices are contiguous and hold whole groups of rows, so several of them are one tall matrix.
//
//   quantize:   lane            0         1         2  ...        a lane owns a group of one column, and goes down it
//               column          n       n + 1     n + 2           twice, for the extremes and for the codes: loads and
//               rows           k ... k + group_size - 1           stores of adjacent lanes are adjacent
//
//   dequantize: the same, with a run of 32 elements to a lane.
#pragma once

#include "../common/metal.h"
#include "operands.h"

namespace quantization_mlx {

template <int lanes>
METAL_FUNC float min_over(float value) {
#pragma unroll
  for (int mask = 1; mask < lanes; mask *= 2) {
    value = min(value, simd_shuffle_xor(value, static_cast<ushort>(mask)));
  }
  return value;
}

template <int lanes>
METAL_FUNC float max_over(float value) {
#pragma unroll
  for (int mask = 1; mask < lanes; mask *= 2) {
    value = max(value, simd_shuffle_xor(value, static_cast<ushort>(mask)));
  }
  return value;
}

// Writes eight codes as `bits` bytes, in the widest pieces that are aligned.
template <int bits>
METAL_FUNC void store_codes(thread const uint* codes, device uchar* destination) {
  if (bits == 4 || bits == 8) {
#pragma unroll
    for (int word = 0; word < bits / 4; ++word) {
      uint packed = 0u;
#pragma unroll
      for (int i = 0; i < 32 / bits; ++i) {
        packed |= codes[word * 32 / bits + i] << (i * bits);
      }
      ((device uint*)destination)[word] = packed;
    }
  } else {
    uint pending = 0u;
    int held = 0;
    int written = 0;
#pragma unroll
    for (int i = 0; i < chunk_elements; ++i) {
      pending |= codes[i] << held;
      held += bits;
      if (held >= 8) {
        destination[written++] = static_cast<uchar>(pending);
        pending >>= 8;
        held -= 8;
      }
    }
  }
}

// Affine codes of a lane's eight values, whose group has these extremes.
template <int bits>
METAL_FUNC void affine_codes(thread const float* values, AffineParameters parameters, thread uint* codes) {
#pragma unroll
  for (int i = 0; i < chunk_elements; ++i) {
    codes[i] = affine_code(values[i], parameters, bits);
  }
}

// Quotients round to T, the type of w: that matters where they are subnormal in half, and in nvfp4.
template <typename T>
METAL_FUNC float rounded(float value) {
  return static_cast<float>(static_cast<T>(value));
}

template <typename T, Mode mode>
METAL_FUNC uint fp_scale(float absmax, float encode) {
  const float ratio = rounded<T>(fp_scale_ratio(mode, absmax));
  return traits_of(mode).scale == Scale::e4m3 ? e4m3_from_float(ratio * encode) : e8m0_from_ratio(ratio);
}

template <typename T, Mode mode>
METAL_FUNC uint fp_code(float value, float decoded, float encode) {
  if (decoded == 0.0f) {  // an nvfp4 group too small for any scale becomes zeros
    return 0u;
  }
  const float exact = quotient(value, decoded);
  const float scaled = traits_of(mode).scale == Scale::e4m3 ? rounded<T>(exact) * encode : exact;
  return is_e4m3(mode) ? e4m3_from_float(scaled) : e2m1_from_float(scaled);
}

template <typename T, Mode mode, int group_size, int bits>
[[kernel, max_total_threads_per_threadgroup(elementwise_threads)]] void quantize(
    const device T* w [[buffer(0)]],
    const device float* global_scale [[buffer(1), function_constant(has_global_scale)]],
    device uint* words [[buffer(2)]],
    device ScaleType<mode, T>* scales [[buffer(3)]],
    device ScaleType<mode, T>* biases [[buffer(4)]],
    constant QuantizeParams& params [[buffer(5)]],
    uint3 position [[thread_position_in_grid]]) {
  constexpr int lanes = group_size / chunk_elements;
  const bool inside = static_cast<long>(position.x) < params.elements / chunk_elements;
  // Lanes past the end take part in the shuffles, among themselves: a group's lanes are all inside or all outside.
  const long chunk = inside ? position.x : 0;
  const long group = chunk / lanes;
  const bool writes_scale = inside && chunk % lanes == 0;

  float values[chunk_elements];
  load_values<chunk_elements>(w + chunk * chunk_elements, aligned_x, values);
  float smallest = values[0];
  float largest = values[0];
#pragma unroll
  for (int i = 1; i < chunk_elements; ++i) {
    smallest = min(smallest, values[i]);
    largest = max(largest, values[i]);
  }
  smallest = min_over<lanes>(smallest);
  largest = max_over<lanes>(largest);

  uint codes[chunk_elements];
  if (has_biases(mode)) {
    const AffineParameters parameters = affine_parameters(smallest, largest, bits);
    affine_codes<bits>(values, parameters, codes);
    if (writes_scale) {
      scales[group] = static_cast<ScaleType<mode, T>>(parameters.scale);
      biases[group] = static_cast<ScaleType<mode, T>>(parameters.bias);
    }
  } else {
    const float encode = has_global_scale ? nvfp4_encode_factor(global_scale[0]) : 1.0f;
    const uint scale = fp_scale<T, mode>(max(magnitude(smallest), magnitude(largest)), encode);
    const float decoded = decode_scale<mode>(static_cast<uchar>(scale));
#pragma unroll
    for (int i = 0; i < chunk_elements; ++i) {
      codes[i] = fp_code<T, mode>(values[i], decoded, encode);
    }
    if (writes_scale) {
      scales[group] = static_cast<ScaleType<mode, T>>(scale);
    }
  }
  if (inside) {
    store_codes<bits>(codes, (device uchar*)words + chunk * bits);
  }
}

template <typename T, Mode mode, int group_size, int bits>
[[kernel, max_total_threads_per_threadgroup(elementwise_threads)]] void dequantize(
    const device uint* words [[buffer(0)]],
    const device ScaleType<mode, T>* scales [[buffer(1)]],
    const device ScaleType<mode, T>* biases [[buffer(2)]],
    const device float* global_scale [[buffer(3), function_constant(has_global_scale)]],
    device T* y [[buffer(4)]],
    constant QuantizeParams& params [[buffer(5)]],
    uint3 position [[thread_position_in_grid]]) {
  const long run = position.x;
  const long first = run * run_elements;
  if (first >= params.elements) {
    return;
  }
  const bool whole = group_size >= run_elements || first + run_elements <= params.elements;
  uint packed[bits];
  if (whole) {
    load_words<bits>(words + run * bits, aligned_weights, packed);
  } else {
#pragma unroll
    for (int i = 0; i < bits; ++i) {
      packed[i] = i < bits / 2 ? words[run * bits + i] : 0u;
    }
  }
  const float factor = factor_at(global_scale, 0);
#pragma unroll
  for (int chunk = 0; chunk < 4; ++chunk) {
    if (whole || chunk < 2) {
      const long group = (first + chunk * chunk_elements) / group_size;
      const float scale = decode_scale<mode>(scales[group]) * factor;
      const float bias = decode_bias<mode>(biases, group);
      float elements[chunk_elements];
      decode_chunk<mode, bits>(packed, chunk, elements);
#pragma unroll
      for (int i = 0; i < chunk_elements; ++i) {
        y[first + chunk * chunk_elements + i] = static_cast<T>(elements[i] * scale + bias);
      }
    }
  }
}

// --- Packed columns ------------------------------------------------------------------------------------------------

template <typename T, Mode mode, int group_size, int bits>
[[kernel, max_total_threads_per_threadgroup(elementwise_threads)]] void quantize_columns(
    const device T* w [[buffer(0)]],
    const device float* global_scale [[buffer(1), function_constant(has_global_scale)]],
    device uint* words [[buffer(2)]],
    device half* scales [[buffer(3)]],
    device half* zeros [[buffer(4)]],
    constant QuantizeColumnsParams& params [[buffer(5)]],
    uint3 position [[thread_position_in_grid]]) {
  constexpr int word_elements = 32 / bits;
  if (static_cast<long>(position.x) >= params.elements / group_size) {
    return;
  }
  const uint row = position.x / static_cast<uint>(params.n);  // of scales
  const uint column = position.x % static_cast<uint>(params.n);
  const device T* source = w + static_cast<long>(row) * group_size * params.n + column;
  float smallest = static_cast<float>(source[0]);
  float largest = smallest;
  for (int i = 1; i < group_size; ++i) {
    const float value = static_cast<float>(source[i * static_cast<long>(params.n)]);
    smallest = min(smallest, value);
    largest = max(largest, value);
  }
  const uint scale_bits = column_scale_bits(mode, smallest, largest);
  const float scale = float16_to_float(scale_bits);
  const float zero = column_stored_zero(mode, smallest, scale);
  scales[position.x] = as_type<half>(static_cast<ushort>(scale_bits));
  if (has_zeros(mode)) {
    zeros[position.x] = static_cast<half>(zero);
  }
  device uint* target = words + static_cast<long>(row) * (group_size / word_elements) * params.n + column;
  for (int word = 0; word < group_size / word_elements; ++word) {
    uint packed = 0u;
#pragma unroll
    for (int i = 0; i < word_elements; ++i) {
      const float value = static_cast<float>(source[(word * word_elements + i) * static_cast<long>(params.n)]);
      packed |= column_code(mode, value, scale, zero) << (i * bits);
    }
    target[word * static_cast<long>(params.n)] = packed;
  }
}

template <typename T, Mode mode, int group_size, int bits>
[[kernel, max_total_threads_per_threadgroup(elementwise_threads)]] void dequantize_columns(
    const device uint* words [[buffer(0)]],
    const device half* scales [[buffer(1)]],
    const device half* zeros [[buffer(2)]],
    const device float* global_scale [[buffer(3), function_constant(has_global_scale)]],
    device T* y [[buffer(4)]],
    constant QuantizeColumnsParams& params [[buffer(5)]],
    uint3 position [[thread_position_in_grid]]) {
  if (static_cast<long>(position.x) >= params.elements / run_elements) {
    return;
  }
  const uint run = position.x / static_cast<uint>(params.n);  // of the column
  const uint column = position.x % static_cast<uint>(params.n);
  const device uint* source = words + static_cast<long>(run) * bits * params.n + column;
  uint packed[bits];
#pragma unroll
  for (int i = 0; i < bits; ++i) {
    packed[i] = source[i * static_cast<long>(params.n)];
  }
  const long group = static_cast<long>(run / (group_size / run_elements)) * params.n + column;
  const float scale = decode_scale<mode>(scales[group]);
  const float zero = decode_zero<mode>(zeros, group);
  device T* target = y + static_cast<long>(run) * run_elements * params.n + column;
#pragma unroll
  for (int chunk = 0; chunk < 4; ++chunk) {
    float elements[chunk_elements];
    decode_chunk<mode, bits>(packed, chunk, elements);
#pragma unroll
    for (int i = 0; i < chunk_elements; ++i) {
      target[(chunk * chunk_elements + i) * static_cast<long>(params.n)] = static_cast<T>((elements[i] - zero) * scale);
    }
  }
}

}  // namespace quantization_mlx
