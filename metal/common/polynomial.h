// Polynomials of csrc/functions.h.
#pragma once

#include "metal.h"

namespace quantization_mlx {

// The highest power first.
template <int count>
METAL_FUNC float polynomial(float x, constant const float (&coefficients)[count]) {
  float sum = coefficients[0];
#pragma unroll
  for (int i = 1; i < count; ++i) {
    sum = fma(sum, x, coefficients[i]);
  }
  return sum;
}

}  // namespace quantization_mlx
