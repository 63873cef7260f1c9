// What stands around the experts of a mixture: moe_router and moe_combine.
//
//   moe_router    simdgroup = token       lane l has the experts l, l + 32, l + 64, ...
//
// Logits are read once and stay in registers. The best expert is found k times, each by two reductions over the
// simdgroup, and lane i keeps the i-th: no threadgroup memory, no barrier. Scores are compared as integers of the same
// order (csrc/sampling.h), so that NaN has a place and an index is always one of an expert.
//
//   moe_combine   threadgroup = 256 columns of a token, of which a thread has 4 adjacent ones
//
// A thread reads its columns of all k results, which do not wait for one another, and writes each sum once. Where the
// experts have biases, each result gets that of its expert first: NaN where there is no such expert.
#pragma once

#include "../../csrc/gpu/launch.h"
#include "../../csrc/sampling.h"
#include "../common/load.h"
#include "../common/metal.h"

namespace quantization_mlx {

constant bool aligned_x [[function_constant(QUANTIZATION_MLX_ALIGNED_X)]];
constant bool has_bias [[function_constant(QUANTIZATION_MLX_HAS_BIAS)]];
constant bool has_residual [[function_constant(QUANTIZATION_MLX_HAS_RESIDUAL)]];

static constant constexpr const int router_threads = 32 * router_simdgroups();
static constant constexpr const int combine_threads = elementwise_threads_per_threadgroup();
static constant constexpr const int combine_width = combine_elements();

// --- moe_router
// -------------------------------------------------------------------------------------------------------

// A key and the index that has it: of equal keys the lowest index.
struct Best {
  uint key;
  int index;
};

METAL_FUNC Best best_of_simdgroup(Best own) {
  const uint key = simd_max(own.key);
  return {key, simd_min(own.key == key ? own.index : router_max_experts())};
}

// Of a lane's experts, those of a group or, with -1, all. Keys are 0 where there is no expert.
template <int width>
METAL_FUNC Best best_expert(thread const uint* keys, thread const int* groups, int group, int lane) {
  Best best{0u, router_max_experts()};
#pragma unroll
  for (int i = 0; i < width; ++i) {
    if (keys[i] > best.key && (group < 0 || groups[i] == group)) {
      best = {keys[i], lane + 32 * i};
    }
  }
  return best_of_simdgroup(best);
}

template <int width>
METAL_FUNC void remove_expert(thread uint* keys, int expert, int lane) {
#pragma unroll
  for (int i = 0; i < width; ++i) {
    keys[i] = lane + 32 * i == expert ? 0u : keys[i];
  }
}

// Leaves the experts of the best groups. The score of a group, which lane g has of group g, is the sum of its two best.
template <int width>
METAL_FUNC void keep_best_groups(thread uint* keys, constant RouterParams& params, int lane) {
  const int size = params.experts / params.groups;
  int groups[width];
#pragma unroll
  for (int i = 0; i < width; ++i) {
    groups[i] = (lane + 32 * i) / size;
  }
  uint own = 0u;
  for (int group = 0; group < params.groups; ++group) {
    uint left[width];
#pragma unroll
    for (int i = 0; i < width; ++i) {
      left[i] = keys[i];
    }
    const Best first = best_expert<width>(left, groups, group, lane);
    remove_expert<width>(left, first.index, lane);
    const Best second = best_expert<width>(left, groups, group, lane);
    const uint key = key_of_logit(logit_of_key(first.key) + logit_of_key(second.key));
    own = lane == group ? key : own;
  }
  uint used = 0u;
  for (int i = 0; i < params.groups_used; ++i) {
    const Best best = best_of_simdgroup({own, lane});
    used |= 1u << best.index;
    own = lane == best.index ? 0u : own;
  }
#pragma unroll
  for (int i = 0; i < width; ++i) {
    keys[i] = (used >> groups[i] & 1u) != 0u ? keys[i] : 0u;
  }
}

// Logits become scores, but for softmax_of_selected, which scores in the end.
template <int width>
METAL_FUNC void score(thread float* logits, constant RouterParams& params, int lane) {
  if (params.scoring == ROUTER_SIGMOID) {
#pragma unroll
    for (int i = 0; i < width; ++i) {
      logits[i] = 1.0f / (1.0f + exp(-logits[i]));
    }
  } else if (params.scoring == ROUTER_SOFTMAX) {
    uint greatest = 0u;
#pragma unroll
    for (int i = 0; i < width; ++i) {
      greatest = lane + 32 * i < params.experts ? max(greatest, key_of_logit(logits[i])) : greatest;
    }
    const float most = logit_of_key(simd_max(greatest));
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < width; ++i) {
      logits[i] = exp(logits[i] - most);
      sum += lane + 32 * i < params.experts ? logits[i] : 0.0f;
    }
    sum = simd_sum(sum);
#pragma unroll
    for (int i = 0; i < width; ++i) {
      logits[i] = logits[i] / sum;
    }
  }
}

// width: experts of a lane.
template <typename T, int width>
[[kernel, max_total_threads_per_threadgroup(router_threads)]] void moe_router(
    const device T* x [[buffer(0)]],
    const device float* bias [[buffer(1), function_constant(has_bias)]],
    device long* experts [[buffer(2)]],
    device T* y [[buffer(3)]],
    constant RouterParams& params [[buffer(4)]],
    uint threadgroup_index [[threadgroup_position_in_grid]],
    uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint lane_index [[thread_index_in_simdgroup]]) {
  const long token = threadgroup_index * static_cast<long>(router_simdgroups()) + simdgroup;
  if (token >= params.tokens) {
    return;
  }
  const int lane = static_cast<int>(lane_index);
  float scores[width];
  uint keys[width];
#pragma unroll
  for (int i = 0; i < width; ++i) {
    const int expert = lane + 32 * i;
    scores[i] = expert < params.experts ? static_cast<float>(x[token * params.row_stride + expert]) : 0.0f;
    keys[i] = key_of_logit(scores[i]);
  }
  score<width>(scores, params, lane);
#pragma unroll
  for (int i = 0; i < width; ++i) {
    const int expert = lane + 32 * i;
    if (params.chooses_by_score != 0) {
      float choice = scores[i];
      if (has_bias) {
        choice += expert < params.experts ? bias[expert] : 0.0f;
      }
      keys[i] = key_of_logit(choice);
    }
    keys[i] = expert < params.experts ? keys[i] : 0u;
  }
  if (params.groups > 1) {
    keep_best_groups<width>(keys, params, lane);
  }

  float own = 0.0f;
  int own_expert = 0;
  int unused[width];
  for (int i = 0; i < params.k; ++i) {
    const Best best = best_expert<width>(keys, unused, -1, lane);
    float found = 0.0f;
#pragma unroll
    for (int j = 0; j < width; ++j) {
      found = lane + 32 * j == best.index ? scores[j] : found;
    }
    found = simd_shuffle(found, static_cast<ushort>(best.index % 32));
    own = lane == i ? found : own;
    own_expert = lane == i ? best.index : own_expert;
    remove_expert<width>(keys, best.index, lane);
  }
  const bool is_selected = lane < params.k;
  if (params.scoring == ROUTER_SOFTMAX_OF_SELECTED) {
    const float most = logit_of_key(simd_max(is_selected ? key_of_logit(own) : 0u));
    own = exp(own - most);
    own = own / simd_sum(is_selected ? own : 0.0f);
  }
  if (params.normalise != 0) {
    own = own / (simd_sum(is_selected ? own : 0.0f) + router_epsilon());
  }
  if (is_selected) {
    experts[token * params.k + lane] = own_expert;
    y[token * params.k + lane] = static_cast<T>(own * params.scale);
  }
}

// --- moe_combine
// ------------------------------------------------------------------------------------------------------

template <typename T>
METAL_FUNC void load_columns(const device T* source, int first, int length, thread float* values) {
  if (aligned_x) {
    load_values<combine_width>(source + first, true, values);
  } else {
#pragma unroll
    for (int i = 0; i < combine_width; ++i) {
      values[i] = first + i < length ? static_cast<float>(source[first + i]) : 0.0f;
    }
  }
}

// W: the type of weights.
template <typename T, typename W>
[[kernel, max_total_threads_per_threadgroup(combine_threads)]] void moe_combine(
    const device T* x [[buffer(0)]],
    const device W* weight [[buffer(1)]],
    const device T* residual [[buffer(2), function_constant(has_residual)]],
    const device T* bias [[buffer(3), function_constant(has_bias)]],
    const device long* experts [[buffer(4), function_constant(has_bias)]],
    device T* y [[buffer(5)]],
    constant CombineParams& params [[buffer(6)]],
    uint2 position [[threadgroup_position_in_grid]],
    uint thread_index [[thread_index_in_threadgroup]]) {
  const int first = static_cast<int>(position.x * combine_threads + thread_index) * combine_width;
  const long token = position.y;
  if (first >= params.length) {
    return;
  }
  float sums[combine_width] = {};
  if (has_residual) {
    load_columns(residual + token * params.residual_stride, first, params.length, sums);
  }
  for (int i = 0; i < params.k; ++i) {
    const long row = token * params.k + i;
    const float factor = static_cast<float>(weight[row]);
    float values[combine_width];
    load_columns(x + row * params.y_stride, first, params.length, values);
    if (has_bias) {
      const long expert = experts[row];
      const bool exists = expert >= 0 && expert < params.experts;
      float own[combine_width];
      load_columns(bias + (exists ? expert * params.bias_stride : 0), first, params.length, own);
#pragma unroll
      for (int j = 0; j < combine_width; ++j) {
        values[j] = exists ? values[j] + own[j] : NAN;
      }
    }
#pragma unroll
    for (int j = 0; j < combine_width; ++j) {
      sums[j] = fma(factor, values[j], sums[j]);
    }
  }
#pragma unroll
  for (int i = 0; i < combine_width; ++i) {
    if (aligned_x || first + i < params.length) {
      y[token * params.length + first + i] = static_cast<T>(sums[i]);
    }
  }
}

}  // namespace quantization_mlx
