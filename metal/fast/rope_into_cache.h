// What becomes of the product that gives queries, keys and values of new tokens: queries and keys are normalised and
// turned, and keys and values stored in a cache.
//
//   simdgroup = head of a token      lane   0       1      ...    31
//                                  pairs  (0, h)  (1, h + 1)    (31, h + 31), then 32 more     h = rotated / 2
//
// A head is read once for its norm and once, from a cache, to be stored; nothing is shared, and no lane waits at a
// barrier. Where a norm is of all heads together, as in OLMo 2, every head's simdgroup reads all of them for it. One
// launch takes the place of a bias, two norms, two rotations and two copies.
#pragma once

#include "../../csrc/gpu/launch.h"
#include "../common/metal.h"

namespace quantization_mlx {

constant bool has_bias [[function_constant(QUANTIZATION_MLX_HAS_BIAS)]];
constant bool has_query_norm [[function_constant(QUANTIZATION_MLX_HAS_QUERY_NORM)]];
constant bool has_key_norm [[function_constant(QUANTIZATION_MLX_HAS_KEY_NORM)]];
constant bool has_angles [[function_constant(QUANTIZATION_MLX_HAS_ANGLES)]];

static constant constexpr const int rope_cache_threads = 32 * rope_cache_simdgroups();

// One head, from x and bias to float32, and times the weight of its norm. Where that is of all heads, the others lie
// before and after these.
template <typename T>
struct HeadSource {
  const device T* x;
  const device T* bias;
  const device T* weight;
  bool normalises;
  float factor;  // of the norm
};

template <typename T>
METAL_FUNC float sum_at(thread const HeadSource<T>& source, int d) {
  const float value = static_cast<float>(source.x[d]);
  return has_bias ? value + static_cast<float>(source.bias[d]) : value;
}

template <typename T>
METAL_FUNC float value_at(thread const HeadSource<T>& source, int d) {
  const float value = sum_at(source, d);
  return source.normalises ? value * source.factor * static_cast<float>(source.weight[d]) : value;
}

// Of elements first to first + length.
template <typename T>
METAL_FUNC float norm_factor(thread const HeadSource<T>& source, int first, int length, float epsilon, uint lane) {
  float squares = 0.0f;
  for (int d = first + lane; d < first + length; d += 32) {
    const float value = sum_at(source, d);
    squares += value * value;
  }
  return rsqrt(simd_sum(squares) / length + epsilon);
}

template <typename T>
[[kernel, max_total_threads_per_threadgroup(rope_cache_threads)]] void rope_into_cache(
    const device T* x [[buffer(0)]],
    const device T* bias [[buffer(1), function_constant(has_bias)]],
    const device T* query_norm [[buffer(2), function_constant(has_query_norm)]],
    const device T* key_norm [[buffer(3), function_constant(has_key_norm)]],
    const device T* cosines [[buffer(4), function_constant(has_angles)]],
    const device T* sines [[buffer(5), function_constant(has_angles)]],
    device T* keys [[buffer(6)]],
    device T* values [[buffer(7)]],
    device T* queries [[buffer(8)]],
    constant RopeCacheParams& params [[buffer(9)]],
    uint threadgroup_index [[threadgroup_position_in_grid]],
    uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  const int number = threadgroup_index * rope_cache_simdgroups() + simdgroup;
  if (number >= params.count) {
    return;
  }
  const int dim = params.dim;
  const int heads = params.query_heads + 2 * params.key_heads;
  const int head = number % heads;
  const int token = number / heads;  // of all sequences
  const int sequence = token / params.tokens;
  const int place = token % params.tokens;
  const bool is_query = head < params.query_heads;
  const bool is_key = !is_query && head < params.query_heads + params.key_heads;
  const int key_head = is_query ? 0 : (head - params.query_heads) % params.key_heads;
  const long cached = (sequence * static_cast<long>(params.key_heads) + key_head) * params.capacity + params.position;
  const long query = (sequence * static_cast<long>(params.query_heads) + head) * params.tokens;
  device T* destination = (is_query ? queries : (is_key ? keys : values)) + ((is_query ? query : cached) + place) * dim;

  HeadSource<T> source;
  source.x = x + number * static_cast<long>(dim);
  if (has_bias) {
    source.bias = bias + head * dim;
  }
  source.normalises = is_query ? has_query_norm : (is_key && has_key_norm);
  const int norm_heads = is_query ? params.query_norm_heads : params.key_norm_heads;
  const int before = norm_heads == 1 ? 0 : (is_query ? head : key_head) * dim;  // elements of the same norm
  if (has_query_norm && is_query) {
    source.weight = query_norm + before;
  }
  if (has_key_norm && is_key) {
    source.weight = key_norm + before;
  }
  source.factor = source.normalises ? norm_factor(source, -before, norm_heads * dim, params.epsilon, lane) : 1.0f;
  const int rotated = has_angles && (is_query || is_key) ? params.rotated : 0;
  const int half_size = rotated / 2;
  if (has_angles) {
    const long row = (params.has_angles_of_sequences ? token : place) * static_cast<long>(params.rotated);
    for (int i = lane; i < half_size; i += 32) {
      const float real = value_at(source, i);
      const float imaginary = value_at(source, half_size + i);
      const device T* cosine = cosines + row + i;
      const device T* sine = sines + row + i;
      destination[i] = static_cast<T>(real * static_cast<float>(cosine[0]) - imaginary * static_cast<float>(sine[0]));
      destination[half_size + i] = static_cast<T>(
          real * static_cast<float>(sine[half_size]) + imaginary * static_cast<float>(cosine[half_size]));
    }
  }
  for (int d = rotated + lane; d < dim; d += 32) {
    destination[d] = static_cast<T>(value_at(source, d));
  }
}

}  // namespace quantization_mlx
