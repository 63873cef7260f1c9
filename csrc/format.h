// Every number format of quantized matrices, MLX's and Marlin's, described once for C++ and for Metal shaders.
//
// Written in what C++14 and MSL have in common: functions on scalars by value, no pointers, no tables. The CPU kernels,
// the shaders and the argument checks all include this file, so they cannot disagree on a format.
//
// Facts: MLX documentation of mx.quantize; OCP Microscaling Formats (MX) v1.0 for E2M1, E4M3 and E8M0.
#pragma once

#ifdef __METAL_VERSION__
#include <metal_stdlib>
#define QUANTIZATION_MLX_MATH metal
#define QUANTIZATION_MLX_INLINE METAL_FUNC
#else
#include <cmath>
#include <cstdint>
#include <cstring>
#define QUANTIZATION_MLX_MATH std
#define QUANTIZATION_MLX_INLINE inline
#endif

#include "formats.h"

namespace quantization_mlx {

struct Format {
  Mode mode;
  int bits;
  int group_size;
};

inline constexpr bool is_column_packed(Mode mode) { return traits_of(mode).packing == Packing::columns; }

inline constexpr bool is_e2m1(Mode mode) { return traits_of(mode).element == Element::e2m1; }
inline constexpr bool is_e4m3(Mode mode) { return traits_of(mode).element == Element::e4m3; }

inline constexpr bool has_biases(Mode mode) { return traits_of(mode).offset == Offset::biases; }
inline constexpr bool has_zeros(Mode mode) { return traits_of(mode).offset == Offset::zeros; }

// One float32 beside the scales, in units of which E4M3 scales count.
inline constexpr bool takes_global_scale(Mode mode) { return traits_of(mode).scale == Scale::e4m3; }

inline constexpr int default_bits(Mode mode) { return traits_of(mode).default_bits; }
inline constexpr int default_group_size(Mode mode) { return traits_of(mode).default_group_size; }

// Of bits and group sizes from 0 to 1024.
inline constexpr bool is_supported(Format format) {
  const ModeTraits traits = traits_of(format.mode);
  return format.bits < 31 && (traits.widths >> format.bits & 1) != 0 &&
      (traits.group_sizes & format.group_size) == format.group_size &&
      (format.group_size & (format.group_size - 1)) == 0 && format.group_size > 0;
}

// --- Packing ------------------------------------------------------------------------------------------------------
// A row is one little-endian bit stream: element i occupies bits [i * bits, (i + 1) * bits). A *unit* is the shortest
// run of whole bytes that holds whole elements, or one 32-bit word where the width divides 32.
//
// Column-packed matrices are [K, N], grouped along K, and each column is such a stream: word (r, n) holds the elements
// r * 32 / bits, ... of column n. So the words are [K * bits / 32, N], with scales [K / group_size, N].

inline constexpr int unit_elements(int bits) { return bits == 6 ? 4 : (bits == 3 || bits == 5 ? 8 : 32 / bits); }

inline constexpr int unit_bytes(int bits) { return unit_elements(bits) * bits / 8; }

// --- Bits and rounding --------------------------------------------------------------------------------------------

QUANTIZATION_MLX_INLINE float float_from_bits(uint32_t bits) {
#ifdef __METAL_VERSION__
  return as_type<float>(bits);
#else
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

QUANTIZATION_MLX_INLINE uint32_t bits_from_float(float value) {
#ifdef __METAL_VERSION__
  return as_type<uint32_t>(value);
#else
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
#endif
}

QUANTIZATION_MLX_INLINE float round_half_even(float value) { return QUANTIZATION_MLX_MATH::rint(value); }

// Correctly rounded, also where the compiler may divide fast.
QUANTIZATION_MLX_INLINE float quotient(float dividend, float divisor) {
#ifdef __METAL_VERSION__
  return metal::precise::divide(dividend, divisor);
#else
  return dividend / divisor;
#endif
}

QUANTIZATION_MLX_INLINE float magnitude(float value) { return QUANTIZATION_MLX_MATH::fabs(value); }

// IEEE binary16, exactly.
QUANTIZATION_MLX_INLINE float float16_to_float(uint32_t bits) {
  uint32_t sign = (bits & 0x8000u) << 16;
  uint32_t low = bits & 0x7FFFu;
  float positive = low < 0x400u ? 5.9604644775390625e-8f * static_cast<float>(low)  // subnormal: steps of 2^-24
                                : float_from_bits((low << 13) + (low >= 0x7C00u ? 224u << 23 : 112u << 23));
  return float_from_bits(sign | bits_from_float(positive));
}

// To the nearest, ties to even.
QUANTIZATION_MLX_INLINE uint32_t float16_from_float(float value) {
  uint32_t bits = bits_from_float(value);
  uint32_t sign = bits >> 16 & 0x8000u;
  uint32_t low = bits & 0x7FFFFFFFu;
  if (low > 0x7F800000u) {
    return sign | 0x7E00u;
  }
  if (low >= 0x477FF000u) {  // halfway from 65504 to 65536, and more
    return sign | 0x7C00u;
  }
  if (low < 113u << 23) {  // subnormal: the last bit of 0.5 + |value| is worth 2^-24
    return sign | (bits_from_float(0.5f + float_from_bits(low)) - (126u << 23));
  }
  return sign | ((low - (112u << 23) + 0xFFFu + (low >> 13 & 1u)) >> 13);
}

// --- E2M1: the 4-bit element of mxfp4 and nvfp4 -------------------------------------------------------------------
// Codes 0..7 are 0, 0.5, 1, 1.5, 2, 3, 4, 6; bit 3 is the sign.

QUANTIZATION_MLX_INLINE float e2m1_to_float(uint32_t code) {
  uint32_t sign = (code & 8u) << 28;
  uint32_t low = code & 7u;
  // From 1 up the code is the top of a float's exponent and mantissa; 0 and 0.5 are E2M1's subnormals.
  uint32_t positive = low >= 2u ? (low << 22) + (126u << 23) : bits_from_float(0.5f * static_cast<float>(low));
  return float_from_bits(sign | positive);
}

// Nearest value; a tie goes to the lower code, as in MLX's CPU back end, so -0.25 and smaller become +0.
QUANTIZATION_MLX_INLINE uint32_t e2m1_from_float(float value) {
  float size = magnitude(value);
  uint32_t low = static_cast<uint32_t>(size > 0.25f) + static_cast<uint32_t>(size > 0.75f) +
      static_cast<uint32_t>(size > 1.25f) + static_cast<uint32_t>(size > 1.75f) + static_cast<uint32_t>(size > 2.5f) +
      static_cast<uint32_t>(size > 3.5f) + static_cast<uint32_t>(size > 5.0f);
  return value < 0.0f && low > 0u ? low | 8u : low;
}

// --- E4M3 (the "fn" variant): the element of mxfp8 and the scale of nvfp4 -----------------------------------------
// No infinities, 0x7F is NaN, the largest value is 448.

QUANTIZATION_MLX_INLINE float e4m3_to_float(uint32_t code) {
  uint32_t low = code & 0x7Fu;
  float positive = low < 8u ? 0.001953125f * static_cast<float>(low) : float_from_bits((low << 20) + (120u << 23));
  if (low == 0x7Fu) {
    positive = float_from_bits(0x7FC00000u);
  }
  return code & 0x80u ? -positive : positive;
}

// Round to nearest even, saturating at 448.
QUANTIZATION_MLX_INLINE uint32_t e4m3_from_float(float value) {
  uint32_t sign = (bits_from_float(value) >> 24) & 0x80u;
  uint32_t bits = bits_from_float(value) & 0x7FFFFFFFu;
  if (bits > 0x7F800000u) {
    return sign | 0x7Fu;
  }
  if (bits >= 0x43E00000u) {  // 448
    return sign | 0x7Eu;
  }
  if (bits < 0x3C800000u) {  // 2^-6, the smallest normal value: below it the step is 2^-9 throughout
    return sign | static_cast<uint32_t>(round_half_even(magnitude(value) * 512.0f));
  }
  uint32_t rounded = bits + 0x7FFFFu + ((bits >> 20) & 1u);
  return sign | ((rounded - (120u << 23)) >> 20);
}

// The value of a code before it is scaled.
QUANTIZATION_MLX_INLINE float element_value(Mode mode, uint32_t code) {
  return is_e2m1(mode) ? e2m1_to_float(code) : (is_e4m3(mode) ? e4m3_to_float(code) : static_cast<float>(code));
}

// --- E8M0: the power-of-two scale of mxfp4 and mxfp8 ---------------------------------------------------------------
// Value 2^(byte - 127). MLX decodes byte 255 as infinity.

QUANTIZATION_MLX_INLINE float e8m0_to_float(uint32_t byte) {
  return float_from_bits(byte == 0u ? 0x00400000u : byte << 23);
}

// The smallest power of two >= ratio, so that no element saturates. MLX writes 1 for an all-zero group; where its byte
// would wrap around below 2^-127, this saturates.
QUANTIZATION_MLX_INLINE uint32_t e8m0_from_ratio(float ratio) {
  uint32_t bits = bits_from_float(ratio);
  if (bits == 0u) {
    return 127u;
  }
  uint32_t exponent = bits >> 23;
  if (exponent == 0u) {
    return bits > 0x00400000u ? 1u : 0u;
  }
  return exponent + static_cast<uint32_t>((bits & 0x7FFFFFu) != 0u && exponent < 255u);
}

// --- Column-packed elements ----------------------------------------------------------------------------------------
// The value of a code is (element - zero) * scale, with a float16 scale; float32 arithmetic is exact in it, and so is
// element * scale + column_bias.

QUANTIZATION_MLX_INLINE constexpr float column_zero(Mode mode, float stored) {
  return has_zeros(mode) ? stored : traits_of(mode).zero;
}

inline constexpr bool has_column_bias(Mode mode) { return has_zeros(mode) || traits_of(mode).zero != 0.0f; }

QUANTIZATION_MLX_INLINE constexpr float column_bias(Mode mode, float scale, float stored_zero) {
  return -column_zero(mode, stored_zero) * scale;
}

// --- Quantizing one group -----------------------------------------------------------------------------------------

// The largest that a code can stand for before it is scaled, where a group has nothing but its scale.
inline constexpr float largest_element(Mode mode) {
  return is_e2m1(mode)
      ? 6.0f
      : (is_e4m3(mode) ? 448.0f : static_cast<float>((1 << default_bits(mode)) - 1) - traits_of(mode).zero);
}

// The scale of a group whose largest magnitude is absmax, before rounding to the scale's own type.
QUANTIZATION_MLX_INLINE float fp_scale_ratio(Mode mode, float absmax) {
  return quotient(absmax, largest_element(mode));
}

// nvfp4 scales count in units of global_scale / 2688, where 2688 = 448 * 6 is the largest value two codes can express.
// Finite also for the global scale 0 of an all-zero tensor, where MLX's is infinite.
QUANTIZATION_MLX_INLINE float nvfp4_encode_factor(float global_scale) {
  float factor = quotient(2688.0f, global_scale);
  return factor < 3.4028235e38f ? factor : 3.4028235e38f;
}

QUANTIZATION_MLX_INLINE float nvfp4_decode_factor(float global_scale) { return quotient(global_scale, 2688.0f); }

struct AffineParameters {
  float scale;
  float bias;
};

// MLX's affine rule: the extreme of larger magnitude is represented exactly by code 0 and zero, where the group
// straddles it, by a whole code. The scale is negative when that extreme is the maximum. The two codes of 1 bit are the
// extremes. Where the range overflows float32 and MLX's scale would be infinite, the step saturates so that every code
// stays finite.
QUANTIZATION_MLX_INLINE AffineParameters affine_parameters(float minimum, float maximum, int bits) {
  float steps = static_cast<float>((1 << bits) - 1);
  bool from_minimum = bits == 1 || magnitude(minimum) > magnitude(maximum);
  float edge = from_minimum ? minimum : maximum;
  float range = maximum - minimum;
  AffineParameters result;
  if (range > 3.4028235e38f) {
    float largest = 3.39e38f / steps;  // steps * largest stays finite, also after rounding to bfloat16
    result.scale = from_minimum ? largest : -largest;
    result.bias = edge;
    return result;
  }
  float scale = quotient(range, steps);
  scale = scale > 1e-7f ? scale : 1e-7f;
  scale = from_minimum ? scale : -scale;
  float zero_code = bits == 1 ? 0.0f : round_half_even(quotient(edge, scale));
  result.scale = zero_code != 0.0f ? quotient(edge, zero_code) : scale;
  result.bias = zero_code != 0.0f || bits == 1 ? edge : 0.0f;
  return result;
}

QUANTIZATION_MLX_INLINE uint32_t affine_code(float value, AffineParameters parameters, int bits) {
  float last = static_cast<float>((1 << bits) - 1);
  float code = round_half_even(quotient(value - parameters.bias, parameters.scale));
  code = code > 0.0f ? code : 0.0f;  // also where code is NaN
  return static_cast<uint32_t>(code > last ? last : code);
}

// The float16 bits of a column-packed group's scale. Stored zeros are integers that float16 holds exactly, so a scale
// is so large that the one furthest from 0 is below 2048.
QUANTIZATION_MLX_INLINE uint32_t column_scale_bits(Mode mode, float minimum, float maximum) {
  float largest = magnitude(minimum) > magnitude(maximum) ? magnitude(minimum) : magnitude(maximum);
  float scale = 0.0f;
  if (has_zeros(mode)) {
    // Halved, a range that overflows float32 does not.
    scale = 2.0f * quotient(0.5f * maximum - 0.5f * minimum, 15.0f);
    float least = quotient(largest, 2047.0f);
    scale = scale > least ? scale : least;
  } else {
    scale = quotient(largest, largest_element(mode));
  }
  scale = scale > 1e-7f ? scale : 1e-7f;
  uint32_t bits = float16_from_float(scale < 65504.0f ? scale : 65504.0f);
  // Small float16 values are coarse: rounded down, the scale would let a zero pass 2048.
  bool is_too_small = has_zeros(mode) && 2048.0f * float16_to_float(bits) < largest && bits < 0x7BFFu;
  return is_too_small ? bits + 1u : bits;
}

// The code of zero to be stored for such a group. Where the scale saturates, so does it.
QUANTIZATION_MLX_INLINE float column_stored_zero(Mode mode, float minimum, float scale) {
  if (!has_zeros(mode)) {
    return 0.0f;
  }
  float zero = round_half_even(quotient(-minimum, scale));
  zero = zero > -2048.0f ? zero : -2048.0f;
  return (zero < 2048.0f ? zero : 2048.0f) + 0.0f;  // never -0
}

QUANTIZATION_MLX_INLINE uint32_t column_code(Mode mode, float value, float scale, float stored_zero) {
  float scaled = quotient(value, scale);
  if (is_e2m1(mode)) {
    return e2m1_from_float(scaled);
  }
  if (is_e4m3(mode)) {
    return e4m3_from_float(scaled);
  }
  float last = static_cast<float>((1 << default_bits(mode)) - 1);
  // A constant whole zero is added to the rounded value: their sum would round once more.
  float zero = column_zero(mode, stored_zero);
  bool is_whole = !has_zeros(mode) && zero == round_half_even(zero);
  float code = is_whole ? round_half_even(scaled) + zero : round_half_even(scaled + zero);
  code = code > 0.0f ? code : 0.0f;  // also where code is NaN
  return static_cast<uint32_t>(code > last ? last : code);
}

}  // namespace quantization_mlx
