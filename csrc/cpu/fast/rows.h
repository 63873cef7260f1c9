// What a decoder does to one row between its products. Lengths are multiples of 16, which every `lanes` divides.
#pragma once

#include "../isa/real.h"

namespace quantization_mlx::cpu {
namespace {

// exp within 2 units in the last place between -87 and 88; arguments beyond are clamped.
ALWAYS_INLINE F exponential(F value) {
  const Floats low = (Floats)Vector::set(-87.0f);
  const Floats high = (Floats)Vector::set(88.0f);
  Floats x = (Floats)value;
  x = x < low ? low : x;
  x = x > high ? high : x;
  // Adding 1.5 * 2^23 rounds to an integer and leaves it in the lowest bits.
  const Floats shifted = (Floats)Vector::fma((F)x, Vector::set(1.44269504f), Vector::set(12582912.0f));
  const F whole = (F)(shifted - 12582912.0f);
  const F rest = Vector::fma(whole, Vector::set(-1.42860677e-6f), Vector::fma(whole, Vector::set(-0.693145752f), (F)x));
  constexpr float coefficients[] = {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
  F power = Vector::set(1.0f / 720);
  for (const float coefficient : coefficients) {
    power = Vector::fma(power, rest, Vector::set(coefficient));
  }
  return (F)((Integers)power + ((Integers)shifted << 23));
}

void rms_norm(const float* x, const float* weight, float epsilon, int64_t n, float* y) {
  F squares = Vector::zero();
  for (int64_t i = 0; i < n; i += lanes) {
    squares = Vector::fma(Vector::load(x + i), Vector::load(x + i), squares);
  }
  const F factor = Vector::set(1.0f / __builtin_sqrtf(Vector::sum(squares) / static_cast<float>(n) + epsilon));
  for (int64_t i = 0; i < n; i += lanes) {
    Vector::store(y + i, Vector::mul(Vector::mul(Vector::load(x + i), factor), Vector::load(weight + i)));
  }
}

void gate(const float* gates, const float* values, int64_t n, float* y) {
  const F one = Vector::set(1.0f);
  for (int64_t i = 0; i < n; i += lanes) {
    const F x = Vector::load(gates + i);
    const Floats denominator = (Floats)Vector::add(one, exponential((F) - (Floats)x));
    Vector::store(y + i, Vector::mul((F)((Floats)x / denominator), Vector::load(values + i)));
  }
}

// The halves of a head are the real and the imaginary parts of a complex vector.
void rotate(const float* x, const float* cosines, const float* sines, int64_t dim, float* y) {
  const int64_t half = dim / 2;
  for (int64_t i = 0; i < half; i += lanes) {
    const F real = Vector::load(x + i);
    const F imaginary = Vector::load(x + half + i);
    const F minus = (F) - (Floats)imaginary;
    Vector::store(y + i, Vector::fma(minus, Vector::load(sines + i), Vector::mul(real, Vector::load(cosines + i))));
    Vector::store(
        y + half + i,
        Vector::fma(real, Vector::load(sines + half + i), Vector::mul(imaginary, Vector::load(cosines + half + i))));
  }
}

}  // namespace
}  // namespace quantization_mlx::cpu
