// Norms of one row, of any length: x goes on to whole vectors with zeros, the others with anything.
#pragma once

#include "../isa/real.h"

namespace quantization_mlx::cpu {
namespace {

// The sum over a row of what term(i, sum) adds to the sum for the vector at i. Several sums at once, so that none waits
// for another, and of short parts of the row, so that they stay small beside what is added to them.
template <typename Term>
ALWAYS_INLINE float sum_of_row(int64_t n, const Term& term) {
  constexpr int64_t at_once = 4;
  constexpr int64_t part = 64 * lanes;
  double total = 0.0;
  for (int64_t begin = 0; begin < n; begin += part) {
    const int64_t end = min(begin + part, n);
    F sums[at_once] = {Vector::zero(), Vector::zero(), Vector::zero(), Vector::zero()};
    int64_t i = begin;
    for (; i + at_once * lanes <= end; i += at_once * lanes) {
      unrolled<at_once>([&](auto k) __attribute__((always_inline)) { sums[k] = term(i + k * lanes, sums[k]); });
    }
    for (; i < end; i += lanes) {
      sums[0] = term(i, sums[0]);
    }
    total += Vector::sum(Vector::add(Vector::add(sums[0], sums[1]), Vector::add(sums[2], sums[3])));
  }
  return static_cast<float>(total);
}

void rms_norm(const float* x, const float* weight, float epsilon, int64_t n, float* y) {
  const float squares = sum_of_row(n, [&](int64_t i, F sum) __attribute__((always_inline)) {
    return Vector::fma(Vector::load(x + i), Vector::load(x + i), sum);
  });
  const F factor = Vector::set(1.0f / __builtin_sqrtf(squares / static_cast<float>(n) + epsilon));
  for (int64_t i = 0; i < n; i += lanes) {
    Vector::store(y + i, Vector::mul(Vector::mul(Vector::load(x + i), factor), Vector::load(weight + i)));
  }
}

// The mean is rounded, which matters where it is large beside the deviations: they are centred again, by their own
// mean.
void layer_norm(const float* x, const float* weight, const float* bias, float epsilon, int64_t n, float* y) {
  const float count = static_cast<float>(n);
  const float mean =
      sum_of_row(
          n, [&](int64_t i, F sum) __attribute__((always_inline)) { return Vector::add(Vector::load(x + i), sum); }) /
      count;
  const F minus_mean = Vector::set(-mean);
  const int64_t whole = n / lanes * lanes;
  float deviations = sum_of_row(whole, [&](int64_t i, F sum) __attribute__((always_inline)) {
    return Vector::add(Vector::add(Vector::load(x + i), minus_mean), sum);
  });
  float squares = sum_of_row(whole, [&](int64_t i, F sum) __attribute__((always_inline)) {
    const F deviation = Vector::add(Vector::load(x + i), minus_mean);
    return Vector::fma(deviation, deviation, sum);
  });
  for (int64_t i = whole; i < n; ++i) {  // the zeros behind the values are no deviations
    deviations += x[i] - mean;
    squares += (x[i] - mean) * (x[i] - mean);
  }
  const float rest = deviations / count;
  const float variance = squares / count - rest * rest;
  const F factor = Vector::set(1.0f / __builtin_sqrtf((variance < 0.0f ? 0.0f : variance) + epsilon));
  for (int64_t i = 0; i < n; i += lanes) {
    const F deviation = Vector::add(Vector::add(Vector::load(x + i), minus_mean), Vector::set(-rest));
    Vector::store(y + i, Vector::fma(Vector::mul(deviation, factor), Vector::load(weight + i), Vector::load(bias + i)));
  }
}

}  // namespace
}  // namespace quantization_mlx::cpu
