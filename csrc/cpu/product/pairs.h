// bfloat16 pairs, for machines that multiply bfloat16: each 32-bit lane holds two units of half the length. Pair j of a
// lane holds the elements j and j + positions / 2 of its unit, so that the lanes of a sum belong to the same groups as
// in float32:
//
//     lane          0          1      ...
//     pair 0     e0   e4    e8   e12
//     pair 1     e1   e5    e9   e13
//
// One instruction multiplies both elements of every pair with those of x and adds the products to the lane's sum: twice
// the work of one on float32. Every code of every format is exact in bfloat16.
//
// Templates on V, so that they need not compile for other machines.
#pragma once

#include "elements.h"

namespace quantization_mlx::cpu {
namespace {

template <typename Element>
struct CodeTable {
  static constexpr int size = Element::bits <= 6 ? 64 : 128;
  alignas(64) uint16_t values[size];
  constexpr CodeTable() : values() {
    for (int i = 0; i < size; ++i) {
      values[i] = Element::bfloat16(i & ((1 << Element::bits) - 1));
    }
  }
};

// Elements of at most six bits: 16-bit lanes index a table with their low bits; the bits above do not matter.
template <typename Element, typename V>
struct ShortPairs {
  static constexpr CodeTable<Element> table{};
  using Units = typename V::HalfUnits;
  static ALWAYS_INLINE Units load(const uint8_t* codes) { return V::template load_half_units<Element::bits>(codes); }
  template <int j>
  static ALWAYS_INLINE I codes(const Units& units) {
    return V::template half_codes<Element::bits, j>(units);
  }
  template <int j>
  static ALWAYS_INLINE I values(const Units& units) {
    if constexpr (Element::bits <= 5) {
      return V::lookup_half(codes<j>(units), V::load_integers(table.values));
    } else {
      return V::lookup_half_in_two(
          codes<j>(units), V::load_integers(table.values), V::load_integers(table.values + 32));
    }
  }
};

// Any element that is exact in bfloat16, through float32.
template <typename Element, typename V>
struct LongPairs {
  using Units = typename Element::Units;
  static ALWAYS_INLINE Units load(const uint8_t* codes) { return Element::load(codes); }
  template <int j>
  static ALWAYS_INLINE I values(const Units& units) {
    return V::truncated_pairs(
        Element::template value<j>(units), Element::template value<j + positions<Element> / 2>(units));
  }
};

template <typename V>
struct LongPairs<E4M3Element, V> {
  static constexpr CodeTable<E4M3Element> table{};
  using Units = E4M3Element::Units;
  static ALWAYS_INLINE Units load(const uint8_t* codes) { return E4M3Element::load(codes); }
  template <int j>
  static ALWAYS_INLINE I values(const Units& units) {
    return V::template lookup_signed_byte<j>(units.low, table.values);
  }
};

template <typename Element, typename V>
using Pairs = std::conditional_t<(Element::bits <= 6), ShortPairs<Element, V>, LongPairs<Element, V>>;

// Calls function(j, values) for every position j, where values[v] is element j of each unit of vector v. E4M3 is
// decoded in bfloat16 pairs where there is a table for them: converting single elements takes twice the instructions.
template <typename Element, typename V = Vector, int VECTORS, typename Function>
ALWAYS_INLINE void for_values(const typename Element::Units (&units)[VECTORS], Function&& function) {
  F values[VECTORS];
  if constexpr (std::is_same_v<Element, E4M3Element> && V::has_bfloat16) {
    unrolled<2>([&](auto j) __attribute__((always_inline)) {
      I pairs[VECTORS];
      for (int v = 0; v < VECTORS; ++v) {
        pairs[v] = LongPairs<E4M3Element, V>::template values<j>(units[v]);
        values[v] = V::low_of_pairs(pairs[v]);
      }
      function(j, values);
      for (int v = 0; v < VECTORS; ++v) {
        values[v] = V::high_of_pairs(pairs[v]);
      }
      function(std::integral_constant<int, j + 2>(), values);
    });
  } else {
    unrolled<positions<Element>>([&](auto j) __attribute__((always_inline)) {
      for (int v = 0; v < VECTORS; ++v) {
        values[v] = Element::template value<j>(units[v]);
      }
      function(j, values);
    });
  }
}

// The number of bfloat16 terms whose exact sum each value of x is, or 0 where the product multiplies float32.
int bfloat16_terms(const Product& product, Layout layout) {
  if (!product.bfloat16 || layout == Layout::plain) {
    return 0;
  }
  const bool split = product.split && layout == Layout::streamed;
  // Where x is broadcast, it pays to decode each code to float32 once for several rows.
  const bool one_row = product.rows == 1 || !product.format.is_column_packed();
  switch (product.x_type) {
    case Real::bfloat16: return 1;
    case Real::float16: return split && one_row ? 2 : 0;
    case Real::float32: return split && product.rows == 1 ? 3 : 0;
  }
  __builtin_unreachable();
}

// Calls function with the number of terms as a constant.
template <typename Function>
ALWAYS_INLINE void with_terms(const Product& product, Layout layout, Function&& function) {
  if constexpr (Vector::has_bfloat16) {
    with_one_of<0, 1, 2, 3>(bfloat16_terms(product, layout), function);
  } else {
    function(std::integral_constant<int, 0>());
  }
}

}  // namespace
}  // namespace quantization_mlx::cpu
