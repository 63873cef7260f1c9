// Rotary position embedding of the heads at one position.
#pragma once

#include "../isa/real.h"
#include "functions.h"

namespace quantization_mlx::cpu {
namespace {

// Both of pair i, where that is x[i] and x[pairs + i], at i.
void angles(const uint64_t* turns, int64_t position, int64_t pairs, float* cosines, float* sines) {
  for (int64_t i = 0; i < pairs; i += lanes) {
    uint32_t fractions[lanes];
    for (int lane = 0; lane < lanes; ++lane) {
      fractions[lane] = static_cast<uint32_t>(static_cast<uint64_t>(position) * turns[i + lane] >> 32);
    }
    Words fraction;
    std::memcpy(&fraction, fractions, sizeof fraction);
    F cosine;
    F sine;
    cosine_and_sine(fraction, cosine, sine);
    Vector::store(cosines + i, cosine);
    Vector::store(sines + i, sine);
  }
}

typedef uint64_t LongWords __attribute__((vector_size(sizeof(F))));

ALWAYS_INLINE F neighbours_swapped(F value) {
  const LongWords pairs = (LongWords)value;
  return (F)(pairs << 32 | pairs >> 32);
}

// The halves of a head are the real and the imaginary parts of a complex vector.
template <Real type>
ALWAYS_INLINE void rotate_halves(const Rotation& rotation, const uint8_t* x, uint8_t* y) {
  const int64_t second = rotation.pairs * real_bytes(type);
  for_vectors(rotation.pairs, [&](int64_t i, auto count) __attribute__((always_inline)) {
    const int64_t place = i * real_bytes(type);
    const F real = load_some(type, x + place, count);
    const F imaginary = load_some(type, x + second + place, count);
    const F cosine = Vector::load(rotation.cosines + i);
    const F sine = Vector::load(rotation.sines + i);
    const F minus = (F) - (Floats)sine;
    store_some(type, y + place, Vector::fma(imaginary, minus, Vector::mul(real, cosine)), count);
    store_some(type, y + second + place, Vector::fma(real, sine, Vector::mul(imaginary, cosine)), count);
  });
}

// Neighbours are the parts of a complex number: each is multiplied by its cosine, and the other by its sine.
template <Real type>
ALWAYS_INLINE void rotate_neighbours(const Rotation& rotation, const uint8_t* x, uint8_t* y) {
  for_vectors(2 * rotation.pairs, [&](int64_t i, auto count) __attribute__((always_inline)) {
    const F value = load_some(type, x + i * real_bytes(type), count);
    const F other = neighbours_swapped(value);
    const F cosine = Vector::load(rotation.cosines + i);
    const F sine = Vector::load(rotation.sines + i);
    store_some(type, y + i * real_bytes(type), Vector::fma(other, sine, Vector::mul(value, cosine)), count);
  });
}

template <Real type>
void rotate_heads_of(const Rotation& rotation) {
  for (int64_t head = 0; head < rotation.heads; ++head) {
    const uint8_t* x = rotation.x + head * rotation.x_stride * real_bytes(type);
    uint8_t* y = rotation.y + head * rotation.y_stride * real_bytes(type);
    if (rotation.traditional) {
      rotate_neighbours<type>(rotation, x, y);
    } else {
      rotate_halves<type>(rotation, x, y);
    }
  }
}

void rotate_heads(const Rotation& rotation) {
  with_type(rotation.type, [&](auto type) { rotate_heads_of<type>(rotation); });
}

}  // namespace
}  // namespace quantization_mlx::cpu
