// What becomes of gates: csrc/functions.h says which functions these are.
#pragma once

#include "../../csrc/functions.h"
#include "metal.h"
#include "polynomial.h"

namespace quantization_mlx {

METAL_FUNC float times_sigmoid(float x, float argument) { return x / (1.0f + exp(-argument)); }

// x times the standard normal distribution, of which the tail on the side of zero is known.
METAL_FUNC float times_normal(float x) {
  const float distance = fabs(x);
  const float t = 1.0f / fma(distance, tail_rate, 1.0f);
  const float tail = exp(distance * distance * -0.5f) * t * polynomial(t, tail_coefficients);
  return x * (x < 0.0f ? tail : 1.0f - tail);
}

// alpha: of swiglu.
METAL_FUNC float activated(Gate kind, float x, float alpha) {
  if (kind == Gate::swiglu) {
    return times_sigmoid(x, alpha * x);
  }
  if (kind == Gate::geglu_tanh) {
    return times_sigmoid(x, x * fma(x * x, tanh_third, tanh_first));
  }
  return times_normal(x);
}

}  // namespace quantization_mlx
