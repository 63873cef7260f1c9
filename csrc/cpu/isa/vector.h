// The vectors of one instruction set, and what all kernels on them are made of.
//
// A .cpp of this folder is compiled for one instruction set: it names the header of its `Vector` in
// QUANTIZATION_MLX_VECTOR and includes table.h within its target region. Without the macro these are baseline's
// vectors, so that every header compiles by itself. Two rules keep instructions out of the code for other processors:
// - what depends on `Vector` has internal linkage, that is, stands in an unnamed namespace;
// - headers of others are included here or in kernels.h, and by the .cpp before its target region.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "../kernels.h"

#ifndef QUANTIZATION_MLX_VECTOR
#define QUANTIZATION_MLX_VECTOR "baseline.h"
#endif
#include QUANTIZATION_MLX_VECTOR

namespace quantization_mlx::cpu {
namespace {

using F = Vector::F;
using I = Vector::I;

constexpr int lanes = Vector::lanes;

#define ALWAYS_INLINE inline __attribute__((always_inline))

template <int count, typename Function>
ALWAYS_INLINE void unrolled(Function&& function) {
  [&]<int... index>(std::integer_sequence<int, index...>) __attribute__((always_inline)) {
    (function(std::integral_constant<int, index>()), ...);
  }(std::make_integer_sequence<int, count>());
}

// Calls function with the number of rows, 1 to `most`, as a constant.
template <int most, typename Function>
ALWAYS_INLINE void with_rows(int64_t rows, Function&& function) {
  if (rows == most) {
    return function(std::integral_constant<int, most>());
  }
  if constexpr (most > 1) {
    with_rows<most - 1>(rows, function);
  }
}

// Calls function with a value that is one of `choices` as a constant.
template <int... choices, typename Function>
ALWAYS_INLINE void with_one_of(int value, Function&& function) {
  ((value == choices && (function(std::integral_constant<int, choices>()), true)) || ...);
}

template <typename Sum, int rows, int columns>
ALWAYS_INLINE void clear(Sum (&sums)[rows][columns]) {
  for (auto& row : sums) {
    for (auto& value : row) {
      value = Sum();
    }
  }
}

constexpr int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

constexpr int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// The compiler's own vectors, which have operators on every target.
typedef float Floats __attribute__((vector_size(sizeof(F))));
typedef int32_t Integers __attribute__((vector_size(sizeof(F))));
typedef uint32_t Words __attribute__((vector_size(sizeof(F))));
typedef uint16_t HalfWords __attribute__((vector_size(sizeof(F) / 2)));

// Copies any number of bytes, reading no others; may write up to the next multiple of 64.
ALWAYS_INLINE void copy_bytes(uint8_t* destination, const uint8_t* source, int64_t count) {
  for (; count >= 64; count -= 64, source += 64, destination += 64) {
    std::memcpy(destination, source, 64);
  }
  Vector::copy_below_64(destination, source, count);
}

// The bytes need not exist.
ALWAYS_INLINE void prefetch(const uint8_t* address, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) {
    __builtin_prefetch(address + i, 0, 2);
  }
}

// Rows in tiles of even height: 8 rows as 4 + 4 keep more sums in flight than as 6 + 2.
template <int height, typename Function>
ALWAYS_INLINE void for_tiles(int64_t rows, Function&& function) {
  const int64_t tiles = (rows + height - 1) / height;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t m = tile * rows / tiles;
    function(m, (tile + 1) * rows / tiles - m);
  }
}

// The same, with the number of rows as a constant.
template <int height, typename Function>
ALWAYS_INLINE void for_constant_tiles(int64_t rows, Function&& function) {
  for_tiles<height>(rows, [&](int64_t m, int64_t tile_rows) {
    with_rows<height>(tile_rows, [&](auto constant) { function(m, constant); });
  });
}

// Calls function(n, columns as a constant) for `most` columns at a time, and for single ones at the end.
template <int most, typename Function>
ALWAYS_INLINE void for_columns(int64_t begin, int64_t end, Function&& function) {
  int64_t n = begin;
  for (; n + most <= end; n += most) {
    function(n, std::integral_constant<int, most>());
  }
  for (; n < end; ++n) {
    function(n, std::integral_constant<int, 1>());
  }
}

// The rows of a matrix in memory.
template <typename T>
struct Rows {
  T* first;
  int64_t stride;

  ALWAYS_INLINE T* operator[](int64_t row) const { return first + row * stride; }
};

// The sum of the lanes of each vector.
template <int count>
ALWAYS_INLINE void sum_lanes(const F (&values)[count], float* sums) {
  if constexpr (count == 4) {
    Vector::sum_each(values, sums);
  } else {
    for (int i = 0; i < count; ++i) {
      sums[i] = Vector::sum(values[i]);
    }
  }
}

}  // namespace
}  // namespace quantization_mlx::cpu
