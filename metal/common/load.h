// Loads from device memory, and stores, in the widest pieces that are aligned.
#pragma once

#include "metal.h"

namespace quantization_mlx {

// With `aligned`, source is a multiple of 16 bytes where count is one of 4 words, and of 8 bytes where it is one of 2.
template <int count>
METAL_FUNC void load_words(const device uint* source, bool aligned, thread uint* words) {
  if (aligned && count % 4 == 0) {
#pragma unroll
    for (int i = 0; i < count / 4; ++i) {
      const uint4 four = ((const device uint4*)source)[i];
      words[4 * i] = four.x;
      words[4 * i + 1] = four.y;
      words[4 * i + 2] = four.z;
      words[4 * i + 3] = four.w;
    }
  } else if (aligned && count % 2 == 0) {
#pragma unroll
    for (int i = 0; i < count / 2; ++i) {
      const uint2 two = ((const device uint2*)source)[i];
      words[2 * i] = two.x;
      words[2 * i + 1] = two.y;
    }
  } else {
#pragma unroll
    for (int i = 0; i < count; ++i) {
      words[i] = source[i];
    }
  }
}

// Consecutive values in float32; count is 1, 2, 4 or 8. With `aligned`, source is a multiple of their size, at most 16.
template <int count>
METAL_FUNC void load_values(const device float* source, bool aligned, thread float* values) {
  uint words[count];
  load_words<count>((const device uint*)source, aligned, words);
#pragma unroll
  for (int i = 0; i < count; ++i) {
    values[i] = as_type<float>(words[i]);
  }
}

template <int count>
METAL_FUNC void load_values(const device half* source, bool aligned, thread float* values) {
  if (aligned && count > 1) {
    uint words[(count + 1) / 2];
    load_words<(count + 1) / 2>((const device uint*)source, true, words);
#pragma unroll
    for (int i = 0; i < count / 2; ++i) {
      const half2 two = as_type<half2>(words[i]);
      values[2 * i] = static_cast<float>(two.x);
      values[2 * i + 1] = static_cast<float>(two.y);
    }
  } else {
#pragma unroll
    for (int i = 0; i < count; ++i) {
      values[i] = static_cast<float>(source[i]);
    }
  }
}

template <int count>
METAL_FUNC void load_values(const device bfloat* source, bool aligned, thread float* values) {
  if (aligned && count > 1) {
    uint words[(count + 1) / 2];
    load_words<(count + 1) / 2>((const device uint*)source, true, words);
#pragma unroll
    for (int i = 0; i < count / 2; ++i) {  // a bfloat is the upper half of a float
      values[2 * i] = as_type<float>(words[i] << 16);
      values[2 * i + 1] = as_type<float>(words[i] & 0xFFFF0000u);
    }
  } else {
#pragma unroll
    for (int i = 0; i < count; ++i) {
      values[i] = static_cast<float>(source[i]);
    }
  }
}

// Four values, rounded; destination is a multiple of their size.
template <typename T>
METAL_FUNC void store_four(thread const float* values, device T* destination) {
  *(device vec<T, 4>*)destination = vec<T, 4>(
      static_cast<T>(values[0]), static_cast<T>(values[1]), static_cast<T>(values[2]), static_cast<T>(values[3]));
}

METAL_FUNC float quiet_nan() { return as_type<float>(0x7FC00000u); }

}  // namespace quantization_mlx
