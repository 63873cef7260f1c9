// Functions of real numbers on vectors; their coefficients are in csrc/functions.h.
#pragma once

#include "../isa/vector.h"

namespace quantization_mlx::cpu {
namespace {

// The highest power first.
template <size_t count>
ALWAYS_INLINE F polynomial(F x, const float (&coefficients)[count]) {
  F sum = Vector::set(coefficients[0]);
  unrolled<static_cast<int>(count) - 1>(
      [&](auto i) __attribute__((always_inline)) { sum = Vector::fma(sum, x, Vector::set(coefficients[i + 1])); });
  return sum;
}

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

// Of an angle in units of 2^-32 turns.
ALWAYS_INLINE void cosine_and_sine(Words fraction, F& cosine, F& sine) {
  const Words quadrant = (fraction + 0x20000000u) >> 30;
  const Integers rest = (Integers)(fraction - (quadrant << 30));
  const F x = Vector::mul((F) __builtin_convertvector(rest, Floats), Vector::set(radians_of_fraction));
  const F square = Vector::mul(x, x);
  const F s = Vector::fma(Vector::mul(x, square), polynomial(square, sine_coefficients), x);
  const F half = Vector::fma(square, Vector::set(-0.5f), Vector::set(1.0f));
  const F c = Vector::fma(Vector::mul(square, square), polynomial(square, cosine_coefficients), half);
  const Words swap = 0u - (quadrant & 1u);
  const Words kept = ~swap;
  cosine = (F)((((Words)c & kept) | ((Words)s & swap)) ^ ((quadrant + 1u) & 2u) << 30);
  sine = (F)((((Words)s & kept) | ((Words)c & swap)) ^ (quadrant & 2u) << 30);
}

}  // namespace
}  // namespace quantization_mlx::cpu
