// Elements and scales: how a vector of codes becomes a vector of numbers.
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
  static_assert(
      unit_elements(bits) * bits == 8 * unit_bytes(bits) && unit_bytes(bits) <= 5,
      "no loads for these units");
  // 5-bit units have 40 bits: `high` has those from their second byte on.
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

struct E2M1Element : IntegerElement<4> {
  static constexpr Element kind = Element::e2m1;
  template <int j>
  static ALWAYS_INLINE F value(const Units& units) {
    return Vector::e2m1<4 * j>(units.low);
  }
  static constexpr uint16_t bfloat16(int code) {
    constexpr uint16_t sizes[] = {0, 0x3F00, 0x3F80, 0x3FC0, 0x4000, 0x4040, 0x4080, 0x40C0};
    return static_cast<uint16_t>(sizes[code & 7] | (code & 8) << 12);
  }
};

struct E4M3Element : IntegerElement<8> {
  static constexpr Element kind = Element::e4m3;
  template <int j>
  static ALWAYS_INLINE F value(const Units& units) {
    return Vector::e4m3<8 * j>(units.low);
  }
  // Of positive codes, 0 to 127, alone.
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

// How many columns of the result ahead weights are prefetched into the second-level cache: rows of a packed matrix are
// too short for the hardware's prefetchers.
constexpr int64_t columns_ahead = 8;

// --- Scales ---------------------------------------------------------------------------------------------------------
// Scales of any type are decoded to float32. The lanes of a group are adjacent in a block, so that one look-up in a
// vector of scales gives each lane its own.

constexpr int scale_bytes(ScaleType type) {
  return type == ScaleType::float32 ? 4 : (type == ScaleType::float16 || type == ScaleType::bfloat16 ? 2 : 1);
}

// Byte 0 is the subnormal 2^-127, the only value whose exponent bits alone do not say it.
ALWAYS_INLINE F e8m0(I bytes) {
  const Integers least = Integers{} + 0x00400000;
  const Integers bits = (Integers)((Words)bytes << 23);
  return (F)(bits > least ? bits : least);
}

ALWAYS_INLINE F load_scales(ScaleType type, const uint8_t* source) {
  switch (type) {
    case ScaleType::float32: return Vector::load(reinterpret_cast<const float*>(source));
    case ScaleType::float16: return Vector::load_float16(source);
    case ScaleType::bfloat16: return Vector::load_bfloat16(source);
    case ScaleType::e8m0: return e8m0(Vector::load_bytes(source));
    case ScaleType::e4m3: return Vector::e4m3<0>(Vector::load_bytes(source));
  }
  __builtin_unreachable();
}

// The first `count` scales of a vector, then zeros.
ALWAYS_INLINE F load_first_scales(ScaleType type, const uint8_t* source, int64_t count) {
  if (__builtin_expect(count >= lanes, 1)) {
    return load_scales(type, source);
  }
  alignas(64) uint8_t padded[64] = {};
  copy_bytes(padded, source, count * scale_bytes(type));
  const F scales = load_scales(type, padded);
  if (type != ScaleType::e8m0) {
    return scales;
  }
  // In E8M0 alone, a zero byte is not a zero scale.
  alignas(64) float values[lanes] = {};
  alignas(64) float decoded[lanes];
  Vector::store(decoded, scales);
  std::memcpy(values, decoded, static_cast<size_t>(count) * sizeof(float));
  return Vector::load(values);
}

// count scales as float32, then zeros up to a multiple of the lanes.
ALWAYS_INLINE void convert_scales(ScaleType type, const uint8_t* source, int64_t count, float* destination) {
  const int bytes = scale_bytes(type);
  for (int64_t i = 0; i < count; i += lanes) {
    Vector::store(destination + i, load_first_scales(type, source + i * bytes, count - i));
  }
}

// Scales are converted this many groups at a time, into a buffer on the stack. A multiple of every block.
constexpr int chunk_groups = 64;

// Two adjacent vectors may be loaded from any group on.
struct ScaleBuffer {
  alignas(64) float values[chunk_groups + 2 * lanes];
};

// Gives every lane of a block the scale of its group. Lanes per group are a power of two: no division per block.
template <typename Element>
struct Spread {
  int shift;
  I index;

  explicit Spread(int group_size)
      : shift(__builtin_ctz(static_cast<unsigned>(group_size / positions<Element>))),
        index(Vector::lane_groups(shift)) {}

  // The index for Vector::lookup in a vector of scales that begins with the first of block 0.
  ALWAYS_INLINE I groups_of_lanes(int64_t block) const {
    return Vector::later_groups(index, static_cast<int>(block * lanes >> shift));
  }

  // Of scales that begin with the first of the block.
  ALWAYS_INLINE F operator()(const float* scales) const { return Vector::lookup(Vector::load(scales), index); }
};

// --- The element of a product ---------------------------------------------------------------------------------------

// Runs the kernel for the product's element type and width.
template <typename Kernel>
void for_format(const Product& product, int64_t begin, int64_t end, float* workspace, float* y) {
  switch (product.format.element) {
    case Element::e2m1: return Kernel::template run<E2M1Element>(product, begin, end, workspace, y);
    case Element::e4m3: return Kernel::template run<E4M3Element>(product, begin, end, workspace, y);
    case Element::integer: break;
  }
#define QUANTIZATION_MLX_CASE(bits, ...) \
  case bits: return Kernel::template run<IntegerElement<bits>>(product, begin, end, workspace, y);
  switch (product.format.bits) { QUANTIZATION_MLX_INTEGER_WIDTHS(QUANTIZATION_MLX_CASE, ) }
#undef QUANTIZATION_MLX_CASE
}

}  // namespace
}  // namespace quantization_mlx::cpu
