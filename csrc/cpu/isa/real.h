// Rows of float32, float16 or bfloat16 values, to float32 and back.
#pragma once

#include "vector.h"

namespace quantization_mlx::cpu {
namespace {

constexpr int real_bytes(Real type) { return type == Real::float32 ? 4 : 2; }

// `lanes` values from number i on.
ALWAYS_INLINE F load_real(Real type, const void* source, int64_t i) {
  const uint8_t* bytes = static_cast<const uint8_t*>(source);
  switch (type) {
    case Real::float16: return Vector::load_float16(bytes + 2 * i);
    case Real::bfloat16: return Vector::load_bfloat16(bytes + 2 * i);
    case Real::float32: return Vector::load(static_cast<const float*>(source) + i);
  }
  __builtin_unreachable();
}

ALWAYS_INLINE void store_bfloat16(void* destination, F value) {
  const Words bits = (Words)value;
  const Words rounded = (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16;
  const Words is_nan = (Words)((bits & 0x7FFFFFFFu) > 0x7F800000u);
  const HalfWords halves = __builtin_convertvector((is_nan & 0x7FC0u) | (~is_nan & rounded), HalfWords);
  std::memcpy(destination, &halves, sizeof halves);
}

ALWAYS_INLINE void store_real(Real type, void* destination, F value) {
  switch (type) {
    case Real::float32: return Vector::store(static_cast<float*>(destination), value);
    case Real::float16: return Vector::store_float16(destination, value);
    case Real::bfloat16: return store_bfloat16(destination, value);
  }
}

// Calls function with the type as a constant.
template <typename Function>
ALWAYS_INLINE void with_type(Real type, Function&& function) {
  switch (type) {
    case Real::float32: return function(std::integral_constant<Real, Real::float32>());
    case Real::float16: return function(std::integral_constant<Real, Real::float16>());
    case Real::bfloat16: return function(std::integral_constant<Real, Real::bfloat16>());
  }
}

// Calls function(i, count as a constant or, of the last values, as a number) for `lanes` values at a time.
template <typename Function>
ALWAYS_INLINE void for_vectors(int64_t count, Function&& function) {
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) {
    function(i, std::integral_constant<int, lanes>());
  }
  if (i < count) {
    function(i, static_cast<int>(count - i));
  }
}

// `lanes` values or, where count is a number, so many and zeros.
template <typename Count>
ALWAYS_INLINE F load_some(Real type, const uint8_t* source, Count count) {
  if constexpr (std::is_same_v<Count, int>) {
    alignas(64) uint8_t padded[64] = {};
    copy_bytes(padded, source, count * real_bytes(type));
    return load_real(type, padded, 0);
  }
  return load_real(type, source, 0);
}

template <typename Count>
ALWAYS_INLINE void store_some(Real type, uint8_t* destination, F value, Count count) {
  if constexpr (std::is_same_v<Count, int>) {
    alignas(64) uint8_t whole[lanes * sizeof(float)];
    store_real(type, whole, value);
    std::memcpy(destination, whole, static_cast<size_t>(count * real_bytes(type)));
    return;
  }
  store_real(type, destination, value);
}

// Writes zeros behind the row, up to a multiple of the lanes.
void to_float32(Real type, const void* source, int64_t count, float* destination) {
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) {
    Vector::store(destination + i, load_real(type, source, i));
  }
  if (i < count) {
    const uint8_t* rest = static_cast<const uint8_t*>(source) + i * real_bytes(type);
    Vector::store(destination + i, load_some(type, rest, static_cast<int>(count - i)));
  }
}

// source * factor, rounded to nearest, ties to even.
void from_float32(const float* source, float factor, int64_t count, Real type, void* destination) {
  const F factors = Vector::set(factor);
  uint8_t* to = static_cast<uint8_t*>(destination);
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) {
    store_real(type, to + i * real_bytes(type), Vector::mul(Vector::load(source + i), factors));
  }
  if (i < count) {
    alignas(64) float padded[lanes] = {};
    std::memcpy(padded, source + i, static_cast<size_t>(count - i) * sizeof(float));
    const F values = Vector::mul(Vector::load(padded), factors);
    store_some(type, to + i * real_bytes(type), values, static_cast<int>(count - i));
  }
}

}  // namespace
}  // namespace quantization_mlx::cpu
