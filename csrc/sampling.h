// What decides which token fast.sample draws, in C++ and in Metal's language: the same bits from both.
//
// A float operation here is one that IEEE 754 rounds correctly, and none adds to a product: a compiler that fuses the
// two finds nothing to fuse. All else is integers, whose sums do not depend on the order in which they are made.
// Subnormal numbers, which some GPUs take for zero, are zero.
//
// Philox-4x32-10 is that of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011).
#pragma once

#include "format.h"

namespace quantization_mlx {

// --- Logits in their order ------------------------------------------------------------------------------------------
// A key is the logit as an integer of the same order. 0 is no logit's; NaN is above all.

QUANTIZATION_MLX_INLINE uint32_t key_of_logit(float logit) {
  const uint32_t bits = bits_from_float(logit);
  const uint32_t size = bits & 0x7FFFFFFFu;
  const uint32_t normal = size < 0x00800000u ? 0u : bits;
  const uint32_t key = normal ^ ((normal >> 31) != 0u ? 0xFFFFFFFFu : 0x80000000u);
  return size > 0x7F800000u ? 0xFFFFFFFFu : key;
}

QUANTIZATION_MLX_INLINE float logit_of_key(uint32_t key) {
  return float_from_bits(key ^ ((key >> 31) != 0u ? 0x80000000u : 0xFFFFFFFFu));
}

// Whether a row with this greatest key has a distribution: its greatest logit is finite.
QUANTIZATION_MLX_INLINE bool is_finite_key(uint32_t key) { return key > 0x007FFFFFu && key < 0xFF800000u; }

// How keys are searched, from their highest bits on: three levels of as many bins.
inline constexpr int key_levels() { return 3; }
inline constexpr int key_bins() { return 2048; }
inline constexpr int key_shift(int level) { return level == 0 ? 21 : (level == 1 ? 10 : 0); }
inline constexpr uint32_t key_mask(int level) { return level == 2 ? 1023u : 2047u; }

QUANTIZATION_MLX_INLINE float penalised_logit(float logit, float penalty) {
  return logit > 0.0f ? quotient(logit, penalty) : logit * penalty;
}

// --- Weights --------------------------------------------------------------------------------------------------------
// A token's probability is its weight by the sum of weights. Distances count 2^-24 in the logarithm to base 2.

inline constexpr uint32_t far_distance() { return 32u << 24; }  // of a token without any weight

// scale: 2^24 * log2(e) / temperature.
QUANTIZATION_MLX_INLINE uint32_t logit_distance(float greatest, float logit, float scale) {
  const float distance = (greatest - logit) * scale;
  const float most = 536870912.0f;
  return static_cast<uint32_t>(static_cast<int32_t>(distance < most ? distance : most));
}

// 2^30 * 2^-distance, rounded down, with a relative error of about 2^-23.
QUANTIZATION_MLX_INLINE uint32_t weight_at_distance(uint32_t distance) {
  const uint32_t whole = distance >> 24;
  const float rest = static_cast<float>(static_cast<int32_t>(distance & 0xFFFFFFu)) * 5.9604644775390625e-8f;
  float power = QUANTIZATION_MLX_MATH::fma(1.0902324e-4f, rest, -1.2747483e-3f);
  power = QUANTIZATION_MLX_MATH::fma(power, rest, 9.579180e-3f);
  power = QUANTIZATION_MLX_MATH::fma(power, rest, -5.5490758e-2f);
  power = QUANTIZATION_MLX_MATH::fma(power, rest, 2.4022436e-1f);
  power = QUANTIZATION_MLX_MATH::fma(power, rest, -6.9314706e-1f);
  power = QUANTIZATION_MLX_MATH::fma(power, rest, 1.0f);
  const float scaled = float_from_bits(bits_from_float(power) + ((30u - whole) << 23));
  return static_cast<uint32_t>(static_cast<int32_t>(scaled));
}

// --- Random numbers -------------------------------------------------------------------------------------------------

QUANTIZATION_MLX_INLINE uint32_t product_high(uint32_t a, uint32_t b) {
#ifdef __METAL_VERSION__
  return metal::mulhi(a, b);
#else
  return static_cast<uint32_t>(static_cast<uint64_t>(a) * b >> 32);
#endif
}

// 64 bits, uniformly distributed: the first two words of Philox-4x32-10 with the key `seed` and the counter
// (offset, row), low words first.
QUANTIZATION_MLX_INLINE uint64_t random_bits(uint64_t seed, uint64_t offset, uint64_t row) {
  uint32_t a = static_cast<uint32_t>(offset);
  uint32_t b = static_cast<uint32_t>(offset >> 32);
  uint32_t c = static_cast<uint32_t>(row);
  uint32_t d = static_cast<uint32_t>(row >> 32);
  uint32_t first_key = static_cast<uint32_t>(seed);
  uint32_t second_key = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint32_t next_a = product_high(0xCD9E8D57u, c) ^ b ^ first_key;
    const uint32_t next_b = 0xCD9E8D57u * c;
    const uint32_t next_c = product_high(0xD2511F53u, a) ^ d ^ second_key;
    d = 0xD2511F53u * a;
    a = next_a;
    b = next_b;
    c = next_c;
    first_key += 0x9E3779B9u;
    second_key += 0xBB67AE85u;
  }
  return static_cast<uint64_t>(a) << 32 | b;
}

// total * fraction / 2^64, rounded down.
QUANTIZATION_MLX_INLINE uint64_t fraction_of(uint64_t total, uint64_t fraction) {
  const uint64_t low_word = 0xFFFFFFFFu;
  const uint64_t low = (total & low_word) * (fraction & low_word);
  const uint64_t middle = (total >> 32) * (fraction & low_word) + (low >> 32);
  const uint64_t other = (total & low_word) * (fraction >> 32) + (middle & low_word);
  return (total >> 32) * (fraction >> 32) + (middle >> 32) + (other >> 32);
}

// What the tokens above the last one that top_p keeps weigh at most, less one. top_p: in 2^-32, below 1.
QUANTIZATION_MLX_INLINE uint64_t top_p_weight(uint64_t total, uint64_t top_p) {
  const uint64_t weight = fraction_of(total, top_p << 32);
  return weight > 0u ? weight : 1u;
}

}  // namespace quantization_mlx
