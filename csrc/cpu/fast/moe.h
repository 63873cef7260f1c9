// What mixtures of experts do to a row. Arrays go on to whole vectors, with anything.
#pragma once

#include "functions.h"
#include "rows.h"

namespace quantization_mlx::cpu {
namespace {

// exponential beyond its range, too: 0, infinity and NaN.
ALWAYS_INLINE Floats any_exponential(Floats x) {
  Floats power = (Floats)exponential((F)x);
  power = x < -87.0f ? Floats{} : power;
  power = x > 88.0f ? Floats{} + __builtin_inff() : power;
  return x == x ? power : x;
}

// e^(x - greatest), and the sum of them.
float exponentials(const float* x, float greatest, int64_t n, float* y) {
  for (int64_t i = 0; i < n; i += lanes) {
    Vector::store(y + i, (F)any_exponential((Floats)Vector::load(x + i) - greatest));
  }
  const int64_t whole = n / lanes * lanes;
  float sum = sum_of_row(
      whole, [&](int64_t i, F part) __attribute__((always_inline)) { return Vector::add(Vector::load(y + i), part); });
  for (int64_t i = whole; i < n; ++i) {
    sum += y[i];
  }
  return sum;
}

// 1 / (1 + e^-x)
void sigmoids(const float* x, int64_t n, float* y) {
  for (int64_t i = 0; i < n; i += lanes) {
    Vector::store(y + i, (F)(1.0f / (1.0f + any_exponential(-(Floats)Vector::load(x + i)))));
  }
}

void add_multiple(const float* x, float factor, int64_t n, float* sum) {
  for (int64_t i = 0; i < n; i += lanes) {
    Vector::store(sum + i, Vector::fma(Vector::load(x + i), Vector::set(factor), Vector::load(sum + i)));
  }
}

}  // namespace
}  // namespace quantization_mlx::cpu
