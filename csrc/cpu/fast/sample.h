// What fast.sample does to all tokens of a row: loops over the functions of sampling.h, which the compiler vectorises.
#pragma once

#include "../isa/vector.h"

namespace quantization_mlx::cpu {
namespace {

uint32_t logit_keys(const float* logits, int64_t n, uint32_t* keys) {
  uint32_t greatest = 0;
  for (int64_t i = 0; i < n; ++i) {
    keys[i] = key_of_logit(logits[i]);
    greatest = keys[i] > greatest ? keys[i] : greatest;
  }
  return greatest;
}

uint64_t token_weights(const uint32_t* keys, int64_t n, const Sampling& sampling, uint32_t* weights) {
  const float greatest = logit_of_key(sampling.greatest);
  uint64_t total = 0;
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t distance = logit_distance(greatest, logit_of_key(keys[i]), sampling.scale);
    const bool is_kept = (keys[i] >= sampling.last) & (distance <= sampling.farthest);
    weights[i] = is_kept ? weight_at_distance(distance) : 0u;
    total += weights[i];
  }
  return total;
}

}  // namespace
}  // namespace quantization_mlx::cpu
