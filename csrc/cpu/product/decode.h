// Rows of weights decoded into memory, block after block in the order of elements.h: for products of so many rows of x
// that decoding once and multiplying often is faster than streaming.
#pragma once

#include "pairs.h"

namespace quantization_mlx::cpu {
namespace {

// What tiles of a product are made of: float32 or bfloat16 pairs. `step` elements make a vector.

struct Float32Tile {
  using Storage = float;
  using Operand = F;
  static constexpr int step = lanes;
  static ALWAYS_INLINE Operand load(const float* source) { return Vector::load(source); }
  static ALWAYS_INLINE Operand broadcast(const float* source) { return Vector::set(*source); }
  static ALWAYS_INLINE F multiply_add(Operand a, Operand b, F sum) { return Vector::fma(a, b, sum); }
};

template <typename V>
struct BFloat16Tile {
  using Storage = uint16_t;
  using Operand = I;
  static constexpr int step = 2 * lanes;
  static ALWAYS_INLINE Operand load(const void* source) { return V::load_integers(source); }
  static ALWAYS_INLINE Operand broadcast(const float* source) { return V::broadcast_pair(source); }
  static ALWAYS_INLINE F multiply_add(Operand a, Operand b, F sum) { return V::dot_pairs(a, b, sum); }
};

// Decoders of one block, to float32 or to pairs. Scales and biases begin with the first group of the block.

template <typename Element>
struct ScaledBlocks {
  using Storage = float;
  using Codes = Element;
  using Units = typename Codes::Units;
  Spread<Element> spread;

  explicit ScaledBlocks(int group_size) : spread(group_size) {}

  // The elements of one unit of each lane, `stride` apart.
  static ALWAYS_INLINE void store(const Units& units, F scale, F bias, float* decoded, int64_t stride) {
    const Units one[] = {units};
    for_values<Element>(one, [&](auto j, const F(&values)[1]) __attribute__((always_inline)) {
      Vector::store(decoded + j * stride, Vector::fma(values[0], scale, bias));
    });
  }

  ALWAYS_INLINE void operator()(const Units& units, const float* scales, const float* biases, float* decoded) const {
    store(units, spread(scales), spread(biases), decoded, lanes);
  }
};

template <typename Element, typename V>
struct ScaledPairs {
  using Storage = uint16_t;
  using Codes = Pairs<Element, V>;
  using Units = typename Codes::Units;
  Spread<Element> spread;

  explicit ScaledPairs(int group_size) : spread(group_size) {}

  static ALWAYS_INLINE void store(const Units& units, F scale, F bias, uint16_t* decoded, int64_t stride) {
    unrolled<positions<Element> / 2>([&](auto j) __attribute__((always_inline)) {
      const I pairs = Codes::template values<j>(units);
      const F low = Vector::fma(V::low_of_pairs(pairs), scale, bias);
      const F high = Vector::fma(V::high_of_pairs(pairs), scale, bias);
      V::store_integers(decoded + j * stride, V::rounded_pairs(low, high));
    });
  }

  ALWAYS_INLINE void operator()(const Units& units, const float* scales, const float* biases, uint16_t* decoded) const {
    store(units, spread(scales), spread(biases), decoded, 2 * lanes);
  }
};

// Where a block has few groups of few codes: all values that occur in it make a table of 32 or 64 entries, and decoding
// an element is one look-up in it.
template <typename Element, typename V, int entries>
struct TabledPairs {
  using Storage = uint16_t;
  using Codes = ShortPairs<Element, V>;
  using Units = typename Codes::Units;
  static constexpr int groups_per_vector = lanes >> Element::bits;  // of the table; 0 if one group fills more
  int shift;
  I group_bits;

  explicit TabledPairs(int group_size)
      : shift(Spread<Element>(group_size).shift), group_bits(V::half_groups(shift, Element::bits)) {}

  static ALWAYS_INLINE F of_groups(const float* values, int vector) {
    if constexpr (groups_per_vector > 1) {
      return Vector::lookup(Vector::load(values + vector * groups_per_vector), Vector::lane_groups(Element::bits));
    } else {
      return Vector::set(values[vector * lanes >> Element::bits]);
    }
  }

  static ALWAYS_INLINE F table_vector(const float* scales, const float* biases, int vector) {
    const auto* codes = reinterpret_cast<const uint8_t*>(Codes::table.values + vector * lanes);
    return Vector::fma(Vector::load_bfloat16(codes), of_groups(scales, vector), of_groups(biases, vector));
  }

  ALWAYS_INLINE void operator()(const Units& units, const float* scales, const float* biases, uint16_t* decoded) const {
    I table[entries / 32];
    for (int i = 0; i < entries / 32; ++i) {
      table[i] = V::rounded_halves(table_vector(scales, biases, 2 * i), table_vector(scales, biases, 2 * i + 1));
    }
    unrolled<positions<Element> / 2>([&](auto j) __attribute__((always_inline)) {
      const I index = V::template low_bits_or<Element::bits>(Codes::template codes<j>(units), group_bits);
      I values;
      if constexpr (entries == 32) {
        values = V::lookup_half(index, table[0]);
      } else {
        values = V::lookup_half_in_two(index, table[0], table[1]);
      }
      V::store_integers(decoded + j * 2 * lanes, values);
    });
  }
};

// Elements [first, first + length) of one of the packed rows of `elements` each. Passed by reference: a copy would be
// loaded as a vector just after its members were stored one by one, which waits for them.
struct RowPart {
  int64_t row;
  int64_t elements;
  int64_t first;
  int64_t length;
};

// `part` ends with a block or with the row.
template <typename Element, typename Blocks>
void decode_row_as(const Product& product, const RowPart& part, typename Blocks::Storage* destination) {
  constexpr int block = block_elements<Element>;
  const int group_size = product.format.group_size;
  const int shift = Spread<Element>(group_size).shift;
  const int64_t row_bytes = part.elements * Element::bits / 8;
  const int64_t row_scales = part.elements / group_size;
  const ScaleType type = product.format.scale_type;
  const Blocks decode(group_size);
  const int64_t chunk = static_cast<int64_t>(chunk_groups) * group_size;
  for (int64_t start = part.first; start < part.first + part.length; start += chunk) {
    const int64_t end = min(start + chunk, part.first + part.length);
    const int64_t count = (end - start + group_size - 1) / group_size;
    const int64_t offset = (part.row * row_scales + start / group_size) * scale_bytes(type);
    ScaleBuffer scales;
    ScaleBuffer biases;
    convert_scales(type, product.scales + offset, count, scales.values);
    if (product.biases != nullptr) {
      convert_scales(type, product.biases + offset, count, biases.values);
    } else {
      std::memset(biases.values, 0, sizeof biases.values);
    }
    for (int64_t k = start; k < end; k += block) {
      const int64_t byte = k * Element::bits / 8;
      const uint8_t* codes = product.words + part.row * row_bytes + byte;
      const int64_t group = (k - start) / block * lanes >> shift;
      prefetch(codes + columns_ahead * row_bytes, block_bytes<Element>);
      decode(
          load_block<typename Blocks::Codes, block_bytes<Element>>(codes, row_bytes - byte), scales.values + group,
          biases.values + group, destination + (k - part.first));
    }
  }
}

template <typename Element, typename Tile>
void decode_row(const Product& product, const RowPart& part, typename Tile::Storage* destination) {
  if constexpr (std::is_same_v<Tile, Float32Tile>) {
    decode_row_as<Element, ScaledBlocks<Element>>(product, part, destination);
  } else {
    if constexpr (Element::bits <= 6) {
      const int block_groups = lanes >> Spread<Element>(product.format.group_size).shift;
      const int entries = (block_groups > 1 ? block_groups : 1) << Element::bits;
      if (entries <= 32) {
        return decode_row_as<Element, TabledPairs<Element, Vector, 32>>(product, part, destination);
      }
      if (entries <= 64) {
        return decode_row_as<Element, TabledPairs<Element, Vector, 64>>(product, part, destination);
      }
    }
    decode_row_as<Element, ScaledPairs<Element, Vector>>(product, part, destination);
  }
}

}  // namespace
}  // namespace quantization_mlx::cpu
