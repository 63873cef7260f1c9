// Rows of x, packed once per call into the order in which a kernel meets the weights (elements.h), so that the inner
// loops load x as whole vectors. Behind a streamed row stand the sums of its groups, which biases multiply.
#pragma once

#include "../isa/real.h"
#include "pairs.h"

namespace quantization_mlx::cpu {
namespace {

// out[j] = elements j, count + j, 2 * count + j, ... of the vectors in, which may be the same.
template <int count>
ALWAYS_INLINE void deinterleave(const F* in, F* out) {
  if constexpr (count == 1) {
    out[0] = in[0];
  } else {
    constexpr int half = count / 2;
    F even[half];
    F odd[half];
    for (int i = 0; i < half; ++i) {
      Vector::unzip(in[2 * i], in[2 * i + 1], even[i], odd[i]);
    }
    F even_out[half];
    F odd_out[half];
    deinterleave<half>(even, even_out);
    deinterleave<half>(odd, odd_out);
    for (int i = 0; i < half; ++i) {
      out[2 * i] = even_out[i];
      out[2 * i + 1] = odd_out[i];
    }
  }
}

int64_t padded_length(const Product& product) {
  return round_up(product.K, lanes * unit_elements(product.format.bits));
}

int64_t padded_groups(const Product& product) { return round_up(product.K / product.format.group_size, lanes); }

// An odd number of cache lines, so that the same position of several rows falls into different sets of a cache.
constexpr int64_t spaced(int64_t floats) {
  return round_up(floats, 16) / 16 % 2 == 0 ? round_up(floats, 16) + 16 : round_up(floats, 16);
}

// Floats of a packed row before the sums of its groups.
int64_t packed_values(const Product& product, Layout layout) {
  const int terms = bfloat16_terms(product, layout);
  return terms == 0 ? padded_length(product) : padded_length(product) / 2 * terms;
}

int64_t packed_row(const Product& product, Layout layout) {
  switch (layout) {
    case Layout::streamed: return spaced(packed_values(product, layout) + padded_groups(product));
    case Layout::tiled: return spaced(packed_values(product, layout));
    case Layout::broadcast: return spaced(bfloat16_terms(product, layout) == 0 ? product.K : product.K / 2);
    case Layout::plain: return round_up(product.K, lanes);
  }
  __builtin_unreachable();
}

// Blocks in the order in which weights unpack: float32, or bfloat16 pairs of each of TERMS terms.
template <int per_unit, int TERMS, typename V>
void pack_blocks(const Product& product, const uint8_t* row, float* packed) {
  constexpr int block = lanes * per_unit;
  for (int64_t k = 0; k < product.K; k += block) {
    alignas(64) float natural[block] = {};
    to_float32(product.x_type, row + k * real_bytes(product.x_type), min(product.K - k, block), natural);
    F out[per_unit];
    for (int i = 0; i < per_unit; ++i) {
      out[i] = Vector::load(natural + i * lanes);
    }
    deinterleave<per_unit>(out, out);
    if constexpr (TERMS == 0) {
      for (int j = 0; j < per_unit; ++j) {
        Vector::store(packed + k + j * lanes, out[j]);
      }
    } else {
      constexpr int half = per_unit / 2;
      for (int term = 0; term < TERMS; ++term) {
        for (int j = 0; j < half; ++j) {
          V::store_integers(
              packed + k / 2 * TERMS + (term * half + j) * lanes, V::truncated_pairs(out[j], out[j + half]));
          out[j] = V::without_top(out[j]);
          out[j + half] = V::without_top(out[j + half]);
        }
      }
    }
  }
}

// The sums that a bias multiplies, always in float32.
void sum_groups(const Product& product, const uint8_t* row, float* sums) {
  const int group_size = product.format.group_size;
  const int64_t groups = product.K / group_size;
  for (int64_t group = 0; group < groups; ++group) {
    F sum = Vector::zero();
    for (int k = 0; k < group_size; k += lanes) {
      sum = Vector::add(sum, load_real(product.x_type, row, group * group_size + k));
    }
    sums[group] = Vector::sum(sum);
  }
  for (int64_t group = groups; group < padded_groups(product); ++group) {
    sums[group] = 0.0f;
  }
}

// Pairs of the elements j and j + per_unit / 2 of each unit, unit after unit.
template <typename V>
void pack_pairs(const Product& product, const uint8_t* row, float* packed) {
  constexpr int vector = 2 * lanes;
  const int per_unit = unit_elements(product.format.bits);
  alignas(64) uint16_t order[vector];
  for (int i = 0; i < vector; ++i) {
    const int pair = i / 2;
    order[i] = static_cast<uint16_t>(pair / (per_unit / 2) * per_unit + pair % (per_unit / 2) + i % 2 * (per_unit / 2));
  }
  const I index = V::load_integers(order);
  int64_t k = 0;
  for (; k + vector <= product.K; k += vector) {
    V::store_integers(packed + k / 2, V::lookup_half(index, V::load_integers(row + 2 * k)));
  }
  if (k < product.K) {
    alignas(64) uint8_t padded[64] = {};
    copy_bytes(padded, row + 2 * k, 2 * (product.K - k));
    V::store_integers(packed + k / 2, V::lookup_half(index, V::load_integers(padded)));
  }
}

void pack_row(const Product& product, Layout layout, const void* x, float* packed) {
  const uint8_t* row = static_cast<const uint8_t*>(x);
  if constexpr (Vector::has_bfloat16) {
    if (layout == Layout::broadcast && bfloat16_terms(product, layout) == 1) {
      return pack_pairs<Vector>(product, row, packed);
    }
  }
  if (layout == Layout::plain || layout == Layout::broadcast) {
    return to_float32(product.x_type, row, product.K, packed);
  }
  with_terms(product, layout, [&](auto terms) {
    with_one_of<4, 8, 16, 32>(unit_elements(product.format.bits), [&](auto per_unit) {
      pack_blocks<per_unit, terms, Vector>(product, row, packed);
    });
  });
  if (layout == Layout::streamed && product.has_offset()) {
    sum_groups(product, row, packed + packed_values(product, layout));
  }
}

}  // namespace
}  // namespace quantization_mlx::cpu
