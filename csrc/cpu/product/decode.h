// Rows of weights decoded into memory, block after block in the order of elements.h: for products of so many rows of x
// that decoding once and multiplying often is faster than streaming.
#pragma once

#include "pairs.h"
#include "scales.h"

namespace quantization_mlx::cpu {
namespace {

// --- Element types of the tiled product ------------------------------------------------------------------------------
// `step` elements make a vector.

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

// Decoders of one block at a time, to float32 or to pairs; blocks count from the first group in the buffers of scales.

template <typename Element>
struct ScaledBlocks {
  using Storage = float;
  using Codes = Element;
  Spread<Element> spread;

  explicit ScaledBlocks(int group_size) : spread(group_size) {}

  // The elements of one unit of each lane, `stride` apart.
  static ALWAYS_INLINE void store(const typename Codes::Units& units, F scale, F bias, float* decoded, int64_t stride) {
    const typename Codes::Units one[] = {units};
    for_values<Element>(one, [&](auto j, const F(&values)[1]) __attribute__((always_inline)) {
      Vector::store(decoded + j * stride, Vector::fma(values[0], scale, bias));
    });
  }

  ALWAYS_INLINE void operator()(
      const uint8_t* codes,
      int64_t available,
      const float* scales,
      const float* biases,
      int64_t block,
      float* decoded) const {
    const auto units = load_block<Codes, block_bytes<Element>>(codes, available);
    store(units, spread(scales, block), spread(biases, block), decoded, lanes);
  }
};

template <typename Element, typename V>
struct ScaledPairs {
  using Storage = uint16_t;
  using Codes = Pairs<Element, V>;
  Spread<Element> spread;

  explicit ScaledPairs(int group_size) : spread(group_size) {}

  static ALWAYS_INLINE void store(
      const typename Codes::Units& units,
      F scale,
      F bias,
      uint16_t* decoded,
      int64_t stride) {
    unrolled<positions<Element> / 2>([&](auto j) __attribute__((always_inline)) {
      const I pairs = Codes::template values<j>(units);
      const F low = Vector::fma(V::low_of_pairs(pairs), scale, bias);
      const F high = Vector::fma(V::high_of_pairs(pairs), scale, bias);
      V::store_integers(decoded + j * stride, V::rounded_pairs(low, high));
    });
  }

  ALWAYS_INLINE void operator()(
      const uint8_t* codes,
      int64_t available,
      const float* scales,
      const float* biases,
      int64_t block,
      uint16_t* decoded) const {
    const auto units = load_block<Codes, block_bytes<Element>>(codes, available);
    store(units, spread(scales, block), spread(biases, block), decoded, 2 * lanes);
  }
};

// Few codes and few groups in a block: the values that a block can have make a table of 32 or 64, and decoding an
// element costs one look-up in it.
template <typename Element, typename V, int entries>
struct TabledPairs {
  using Storage = uint16_t;
  using Codes = ShortPairs<Element, V>;
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

  ALWAYS_INLINE void operator()(
      const uint8_t* codes,
      int64_t available,
      const float* scales,
      const float* biases,
      int64_t block,
      uint16_t* decoded) const {
    const auto units = load_block<Codes, block_bytes<Element>>(codes, available);
    scales += block * lanes >> shift;
    biases += block * lanes >> shift;
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

// Decodes elements [first, first + length) of one packed row; length is a multiple of the block or ends the row.
template <typename Element, typename Blocks>
void decode_row_as(
    const Product& product,
    int64_t row,
    int64_t row_elements,
    int64_t first,
    int64_t length,
    typename Blocks::Storage* destination) {
  constexpr int block = block_elements<Element>;
  const int group_size = product.format.group_size;
  const int64_t row_bytes = row_elements * Element::bits / 8;
  const int64_t row_scales = row_elements / group_size;
  const int bytes = scale_bytes(product.format.scale_type);
  const Blocks decode(group_size);
  const int64_t chunk = static_cast<int64_t>(chunk_groups) * group_size;
  for (int64_t start = first; start < first + length; start += chunk) {
    const int64_t group = start / group_size;
    const int64_t end = min(start + chunk, first + length);
    const int64_t count = (end - start + group_size - 1) / group_size;
    ScaleBuffer scales;
    ScaleBuffer biases;
    convert_scales(
        product.format.scale_type, product.scales + (row * row_scales + group) * bytes, count, scales.values);
    if (product.biases != nullptr) {
      convert_scales(
          product.format.scale_type, product.biases + (row * row_scales + group) * bytes, count, biases.values);
    } else {
      std::memset(biases.values, 0, sizeof biases.values);
    }
    for (int64_t k = start; k < end; k += block) {
      const int64_t byte = k * Element::bits / 8;
      prefetch(product.words + (row + columns_ahead) * row_bytes + byte, block_bytes<Element>);
      decode(
          product.words + row * row_bytes + byte, row_bytes - byte, scales.values, biases.values, (k - start) / block,
          destination + (k - first));
    }
  }
}

template <typename Element, typename Tile>
void decode_row(
    const Product& product,
    int64_t row,
    int64_t row_elements,
    int64_t first,
    int64_t length,
    typename Tile::Storage* destination) {
  if constexpr (std::is_same_v<Tile, Float32Tile>) {
    decode_row_as<Element, ScaledBlocks<Element>>(product, row, row_elements, first, length, destination);
  } else {
    if constexpr (Element::bits <= 6) {
      const int block_groups = lanes >> Spread<Element>(product.format.group_size).shift;
      const int entries = (block_groups > 1 ? block_groups : 1) << Element::bits;
      if (entries <= 32) {
        return decode_row_as<Element, TabledPairs<Element, Vector, 32>>(
            product, row, row_elements, first, length, destination);
      }
      if (entries <= 64) {
        return decode_row_as<Element, TabledPairs<Element, Vector, 64>>(
            product, row, row_elements, first, length, destination);
      }
    }
    decode_row_as<Element, ScaledPairs<Element, Vector>>(product, row, row_elements, first, length, destination);
  }
}

}  // namespace
}  // namespace quantization_mlx::cpu
