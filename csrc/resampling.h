// Which pixels of an image a pixel of the resized one is made of, and their weights: in C++ and in Metal's language.
//
//   from   0     1     2     3     4     5      pixels, and their centres half a pixel behind
//          |--.--|--.--|--.--|--.--|--.--|
//   to     0         1         2         3      the centre of pixel i lies (i + 1/2) * from / to from the left
//          |----.----|----.----|----.----|
//
// Places are fractions with the denominator 2 * to, whose numerators are integers: where pixels begin and end does not
// depend on rounding, and an image of the same size stays itself.
#pragma once

#include "format.h"

namespace quantization_mlx {

// The most pixels of a side, so that all numerators are below 2^31.
inline constexpr int resampling_max_side() { return 32000; }

// Pixels on both sides of a centre that have weights, where the image is not made smaller: 2 or 4.
inline constexpr int resampling_taps(bool cubic) { return cubic ? 4 : 2; }

// One dimension of an image.
struct ResampledSide {
  int from;
  int to;
  int unit;  // the filter's own unit, over `to` pixels: wider than one where it takes all pixels of a larger image
  int cubic;
  int antialias;
  float coefficient;  // of the cubic filter
};

QUANTIZATION_MLX_INLINE ResampledSide resampled_side(int from, int to, bool cubic, bool antialias) {
  ResampledSide side;
  side.from = from;
  side.to = to;
  side.unit = antialias && from > to ? from : to;
  side.cubic = cubic ? 1 : 0;
  side.antialias = antialias ? 1 : 0;
  side.coefficient = antialias ? -0.5f : -0.75f;
  return side;
}

QUANTIZATION_MLX_INLINE int floored_quotient(int dividend, int divisor) {
  return dividend >= 0 ? dividend / divisor : -((divisor - 1 - dividend) / divisor);
}

// The pixels with weights for pixel i, from the first one to that behind the last. Without antialias they may lie
// outside of the image, whose border goes on there.
QUANTIZATION_MLX_INLINE int first_tap(ResampledSide side, int i) {
  const int reach = resampling_taps(side.cubic != 0) * side.unit;
  const int first = floored_quotient((2 * i + 1) * side.from - reach + side.to, 2 * side.to);
  return side.antialias != 0 && first < 0 ? 0 : first;
}

QUANTIZATION_MLX_INLINE int end_of_taps(ResampledSide side, int i) {
  const int reach = resampling_taps(side.cubic != 0) * side.unit;
  const int end = floored_quotient((2 * i + 1) * side.from + reach + side.to, 2 * side.to);
  return side.antialias != 0 && end > side.from ? side.from : end;
}

// Of pixel j for pixel i; their sum is not 1 where the filter is wider than one pixel.
QUANTIZATION_MLX_INLINE float tap_weight(ResampledSide side, int i, int j) {
  const int numerator = (2 * j + 1) * side.to - (2 * i + 1) * side.from;
  const float x = quotient(magnitude(static_cast<float>(numerator)), static_cast<float>(2 * side.unit));
  const float a = side.coefficient;
  if (side.cubic == 0) {
    return x < 1.0f ? 1.0f - x : 0.0f;
  }
  if (x < 1.0f) {
    return ((a + 2.0f) * x - (a + 3.0f)) * x * x + 1.0f;
  }
  return x < 2.0f ? (((x - 5.0f) * x + 8.0f) * x - 4.0f) * a : 0.0f;
}

QUANTIZATION_MLX_INLINE int clamped_pixel(ResampledSide side, int j) {
  return j < 0 ? 0 : (j < side.from ? j : side.from - 1);
}

}  // namespace quantization_mlx
