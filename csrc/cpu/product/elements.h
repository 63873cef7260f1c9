// Elements: how a vector of codes becomes a vector of numbers.
//
// One vector holds `lanes` consecutive *units* of a packed row (a unit is 8 elements in 3 bytes, 4 elements in a word,
// ...: format.h), one unit in each 32-bit lane. Shifting all lanes by the same amount brings element j of every unit to
// the bottom:
//
//     lane      0          1          2        ...                      x is packed once per call in the same order:
//     unit   e0..e7     e8..e15    e16..e23                             block = [j][lane]
//     j = 0    e0         e8         e16       -> value, times  x[j=0]: x0  x8  x16 ...
//     j = 1    e1         e9         e17       -> value, times  x[j=1]: x1  x9  x17 ...
//
// So decoding costs a shift and a look-up (or a mask and a conversion) per vector at any width, and the lanes of one
// unit share one scale. The order of summation along K is free: nothing is ever put back in order.
#pragma once

#include "../isa/vector.h"

namespace quantization_mlx::cpu {
namespace {

// The bits of 0 <= value < 256 as bfloat16, exactly.
constexpr uint16_t bfloat16_of_integer(int value) {
  int exponent = 0;
  while (value >> exponent > 1) {
    ++exponent;
  }
  return static_cast<uint16_t>(value == 0 ? 0 : ((127 + exponent) << 7) + ((value << 7 >> exponent) & 0x7F));
}

template <int width>
struct IntegerElement {
  static constexpr Element kind = Element::integer;
  static constexpr int bits = width;
  // Five-bit units have 40 bits: `high` is the unit from its second byte on.
  struct Units {
    I low;
    I high;
  };
  static ALWAYS_INLINE Units load(const uint8_t* codes) {
    if constexpr (bits == 5) {
      return {Vector::load_units<5, 0>(codes), Vector::load_units<5, 1>(codes)};
    } else {
      return {Vector::load_units<unit_bytes(bits), 0>(codes), I()};
    }
  }
  template <int j>
  static ALWAYS_INLINE F value(const Units& units) {
    if constexpr (j * bits + bits > 32) {
      return Vector::unsigned_code<bits, j * bits - 8>(units.high);
    } else {
      return Vector::unsigned_code<bits, j * bits>(units.low);
    }
  }
  static constexpr uint16_t bfloat16(int code) { return bfloat16_of_integer(code); }
};

struct E2M1Element {
  static constexpr Element kind = Element::e2m1;
  static constexpr int bits = 4;
  using Units = I;
  static ALWAYS_INLINE Units load(const uint8_t* codes) { return Vector::load_units<4, 0>(codes); }
  template <int j>
  static ALWAYS_INLINE F value(Units units) {
    return Vector::e2m1<4 * j>(units);
  }
  static constexpr uint16_t bfloat16(int code) {
    constexpr uint16_t sizes[] = {0, 0x3F00, 0x3F80, 0x3FC0, 0x4000, 0x4040, 0x4080, 0x40C0};
    return static_cast<uint16_t>(sizes[code & 7] | (code & 8) << 12);
  }
};

struct E4M3Element {
  static constexpr Element kind = Element::e4m3;
  static constexpr int bits = 8;
  using Units = I;
  static ALWAYS_INLINE Units load(const uint8_t* codes) { return Vector::load_units<4, 0>(codes); }
  template <int j>
  static ALWAYS_INLINE F value(Units units) {
    return Vector::e4m3<8 * j>(units);
  }
  // Of the positive codes, 0 to 127.
  static constexpr uint16_t bfloat16(int code) {
    if (code == 0x7F) {
      return 0x7FC0;
    }
    const uint16_t subnormal = static_cast<uint16_t>(bfloat16_of_integer(code) - (code == 0 ? 0 : 9 << 7));
    return code < 8 ? subnormal : static_cast<uint16_t>((code << 4) + (120 << 7));
  }
};

template <typename Element>
constexpr int positions = unit_elements(Element::bits);

template <typename Element>
constexpr int block_elements = lanes * positions<Element>;

template <typename Element>
constexpr int block_bytes = lanes * unit_bytes(Element::bits);

template <typename Loader, int bytes>
ALWAYS_INLINE typename Loader::Units load_block(const uint8_t* codes, int64_t available) {
  if (__builtin_expect(available >= bytes, 1)) {
    return Loader::load(codes);
  }
  alignas(64) uint8_t padded[round_up(bytes, 64)] = {};
  copy_bytes(padded, codes, available);
  return Loader::load(padded);
}

// How many columns of the result before their use weights are asked for, into the second-level cache: rows of a packed
// matrix are too short for the machine's own prefetching to get going.
constexpr int64_t columns_ahead = 8;

template <typename Kernel>
void for_format(const Product& product, int64_t begin, int64_t end, float* workspace, float* y) {
  switch (product.format.element) {
    case Element::e2m1: return Kernel::template run<E2M1Element>(product, begin, end, workspace, y);
    case Element::e4m3: return Kernel::template run<E4M3Element>(product, begin, end, workspace, y);
    case Element::integer: break;
  }
  switch (product.format.bits) {
    case 1: return Kernel::template run<IntegerElement<1>>(product, begin, end, workspace, y);
    case 2: return Kernel::template run<IntegerElement<2>>(product, begin, end, workspace, y);
    case 3: return Kernel::template run<IntegerElement<3>>(product, begin, end, workspace, y);
    case 4: return Kernel::template run<IntegerElement<4>>(product, begin, end, workspace, y);
    case 5: return Kernel::template run<IntegerElement<5>>(product, begin, end, workspace, y);
    case 6: return Kernel::template run<IntegerElement<6>>(product, begin, end, workspace, y);
    case 8: return Kernel::template run<IntegerElement<8>>(product, begin, end, workspace, y);
  }
}

}  // namespace
}  // namespace quantization_mlx::cpu
