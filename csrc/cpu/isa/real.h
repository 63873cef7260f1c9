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

// Writes zeros behind the row, up to a multiple of the lanes.
void to_float32(Real type, const void* source, int64_t count, float* destination) {
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) {
    Vector::store(destination + i, load_real(type, source, i));
  }
  if (i < count) {
    alignas(64) uint8_t padded[64] = {};
    copy_bytes(padded, static_cast<const uint8_t*>(source) + i * real_bytes(type), (count - i) * real_bytes(type));
    Vector::store(destination + i, load_real(type, padded, 0));
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
    alignas(64) uint8_t result[lanes * sizeof(float)];
    std::memcpy(padded, source + i, static_cast<size_t>(count - i) * sizeof(float));
    store_real(type, result, Vector::mul(Vector::load(padded), factors));
    std::memcpy(to + i * real_bytes(type), result, static_cast<size_t>((count - i) * real_bytes(type)));
  }
}

}  // namespace
}  // namespace quantization_mlx::cpu
