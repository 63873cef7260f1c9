// Scales of any type as float32, and which of them each lane of a block takes: the lanes of a group are adjacent, so
// one look-up in a vector of scales gives every lane its own.
#pragma once

#include "elements.h"

namespace quantization_mlx::cpu {
namespace {

constexpr int scale_bytes(ScaleType type) {
  return type == ScaleType::float32 ? 4 : (type == ScaleType::float16 || type == ScaleType::bfloat16 ? 2 : 1);
}

ALWAYS_INLINE F load_scales(ScaleType type, const uint8_t* source) {
  switch (type) {
    case ScaleType::float32: return Vector::load(reinterpret_cast<const float*>(source));
    case ScaleType::float16: return Vector::load_float16(source);
    case ScaleType::bfloat16: return Vector::load_bfloat16(source);
    case ScaleType::e8m0: return Vector::load_e8m0(source);
    case ScaleType::e4m3: return Vector::e4m3<0>(Vector::load_bytes(source));
  }
  __builtin_unreachable();
}

// The first `count` scales of a vector, then zeros.
ALWAYS_INLINE F load_first_scales(ScaleType type, const uint8_t* source, int64_t count) {
  if (__builtin_expect(count >= lanes, 1)) {
    return load_scales(type, source);
  }
  alignas(64) uint8_t padded[64] = {};
  copy_bytes(padded, source, count * scale_bytes(type));
  const F scales = load_scales(type, padded);
  if (type != ScaleType::e8m0) {
    return scales;
  }
  // Only there are zero bytes not a zero scale.
  alignas(64) float values[lanes] = {};
  alignas(64) float decoded[lanes];
  Vector::store(decoded, scales);
  std::memcpy(values, decoded, static_cast<size_t>(count) * sizeof(float));
  return Vector::load(values);
}

// count scales as float32, then zeros up to a multiple of the lanes.
ALWAYS_INLINE void convert_scales(ScaleType type, const uint8_t* source, int64_t count, float* destination) {
  const int bytes = scale_bytes(type);
  for (int64_t i = 0; i < count; i += lanes) {
    Vector::store(destination + i, load_first_scales(type, source + i * bytes, count - i));
  }
}

// Scales are converted this many groups at a time, into a buffer on the stack. A multiple of every block.
constexpr int chunk_groups = 64;

// Two adjacent vectors may be loaded from any group on.
struct ScaleBuffer {
  alignas(64) float values[chunk_groups + 2 * lanes];
};

// Gives every lane of a block the scale of its group. Lanes per group are a power of two: no division per block.
template <typename Element>
struct Spread {
  int shift;
  I index;

  explicit Spread(int group_size)
      : shift(__builtin_ctz(static_cast<unsigned>(group_size / positions<Element>))),
        index(Vector::lane_groups(shift)) {}

  // For Vector::lookup in a vector of scales, of which block 0 uses the first.
  ALWAYS_INLINE I groups_of_lanes(int64_t block) const {
    return Vector::later_groups(index, static_cast<int>(block * lanes >> shift));
  }

  ALWAYS_INLINE F operator()(const float* scales, int64_t block) const {
    return Vector::lookup(Vector::load(scales + (block * lanes >> shift)), index);
  }
};

}  // namespace
}  // namespace quantization_mlx::cpu
