// Transposition in registers: lane j of vector i becomes lane i of vector j.
#pragma once

#include "elements.h"

namespace quantization_mlx::cpu {
namespace {

// Which lane of two vectors, one behind the other, becomes this lane of the first or the second one, where blocks of
// `stride` lanes change places.
constexpr int exchanged_lane(int stride, bool second, int lane) {
  const bool from_b = (lane & stride) != 0;
  return lane + (from_b ? lanes : 0) + (second ? (from_b ? 0 : stride) : (from_b ? -stride : 0));
}

template <int stride, bool second, int... lane>
ALWAYS_INLINE Words exchanged(Words a, Words b, std::integer_sequence<int, lane...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, exchanged_lane(stride, second, lane)...);
#else
  return __builtin_shuffle(a, b, Words{exchanged_lane(stride, second, lane)...});
#endif
}

// Lane j of vector i becomes lane i of vector j, by exchanging blocks of half the size at each step.
template <int stride = lanes / 2>
ALWAYS_INLINE void transpose(Words (&rows)[lanes]) {
  unrolled<lanes>([&](auto i) __attribute__((always_inline)) {
    if constexpr ((i & stride) == 0) {
      constexpr auto all = std::make_integer_sequence<int, lanes>();
      const Words a = rows[i];
      const Words b = rows[i + stride];
      rows[i] = exchanged<stride, false>(a, b, all);
      rows[i + stride] = exchanged<stride, true>(a, b, all);
    }
  });
  if constexpr (stride > 1) {
    transpose<stride / 2>(rows);
  }
}

template <typename Units, typename Part>
ALWAYS_INLINE void transpose_part(Units (&units)[lanes], Part&& part) {
  Words words[lanes];
  for (int i = 0; i < lanes; ++i) {
    words[i] = (Words)part(units[i]);
  }
  transpose(words);
  for (int i = 0; i < lanes; ++i) {
    part(units[i]) = (I)words[i];
  }
}

template <typename Element, typename Units>
ALWAYS_INLINE void transpose_units(Units (&units)[lanes]) {
  transpose_part(units, [](Units& unit) -> I& { return unit.low; });
  if constexpr (Element::bits == 5) {
    transpose_part(units, [](Units& unit) -> I& { return unit.high; });
  }
}

// One vector of scales for each of `count` groups, at most `lanes`, from those of as many columns.
ALWAYS_INLINE void transposed_scales(
    ScaleType type,
    const uint8_t* source,
    const int64_t (&columns)[lanes],
    int64_t count,
    float* destination) {
  Words words[lanes];
  for (int c = 0; c < lanes; ++c) {
    words[c] = (Words)load_first_scales(type, source + columns[c], count);
  }
  transpose(words);
  for (int g = 0; g < lanes; ++g) {
    Vector::store(destination + g * lanes, (F)words[g]);
  }
}

}  // namespace
}  // namespace quantization_mlx::cpu
