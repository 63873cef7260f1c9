// Column-packed weights, streamed. [K, N] with units along K: words of neighboring columns are neighbors, so lanes run
// along N, and element j of all lanes is multiplied by the one x[j].
//
//     column      0      1      2   ...
//     word row 0  e0..   e0..   e0..     -> value j of every column, times x[j] in all lanes
//     word row 1  e8..   e8..   e8..
//
// All columns of one group are done before the next group: memory is read in as many streams as a group has word rows.
// Codes are multiplied unscaled, and the sum of a group is scaled; the code that stands for zero is subtracted as its
// product with the sum of x over the group.
#pragma once

#include "pack.h"

namespace quantization_mlx::cpu {
namespace {

// Whether there is a mode that packs columns of this element.
template <typename Element>
constexpr bool may_be_column_packed = [] {
  for (int mode = 0; mode < mode_count(); ++mode) {
    const ModeTraits traits = traits_of(static_cast<Mode>(mode));
    if (traits.packing == Packing::columns && traits.element == Element::kind && traits.widths >> Element::bits & 1) {
      return true;
    }
  }
  return false;
}();

// How far ahead words are prefetched, in bytes along their row.
constexpr int64_t column_bytes_ahead = 1024;

// x points to element 0 of the unit in packed x: the others follow `lanes` apart.
template <typename Element>
struct Float32Columns : Element {
  static constexpr int64_t block_floats = block_elements<Element>;

  template <int ROWS, int VECTORS>
  static ALWAYS_INLINE void add(
      const typename Element::Units (&units)[VECTORS],
      const float* x,
      int64_t x_row,
      F (&sums)[ROWS][VECTORS]) {
    for_values<Element>(units, [&](auto j, const F(&values)[VECTORS]) __attribute__((always_inline)) {
      for (int v = 0; v < VECTORS; ++v) {
        for (int m = 0; m < ROWS; ++m) {
          sums[m][v] = Vector::fma(values[v], Vector::set(x[m * x_row + j * lanes]), sums[m][v]);
        }
      }
    });
  }
};

template <typename Element, typename V, int TERMS>
struct BFloat16Columns : Pairs<Element, V> {
  static constexpr int64_t block_floats = block_elements<Element> / 2 * TERMS;

  template <int ROWS, int VECTORS>
  static ALWAYS_INLINE void add(
      const typename Pairs<Element, V>::Units (&units)[VECTORS],
      const float* x,
      int64_t x_row,
      F (&sums)[ROWS][VECTORS]) {
    constexpr int half = positions<Element> / 2;
    unrolled<half>([&](auto j) __attribute__((always_inline)) {
      for (int v = 0; v < VECTORS; ++v) {
        const I value = Pairs<Element, V>::template values<j>(units[v]);
        for (int term = 0; term < TERMS; ++term) {
          for (int m = 0; m < ROWS; ++m) {
            sums[m][v] = V::dot_pairs(value, V::broadcast_pair(x + m * x_row + (term * half + j) * lanes), sums[m][v]);
          }
        }
      }
    });
  }
};

// Minus the code that stands for zero in each of `count` columns: what it adds to their sums per unit of x.
ALWAYS_INLINE F negated_zeros(const Product& product, int64_t position, int64_t count) {
  if (product.biases != nullptr) {
    const F zeros = load_first_scales(
        product.format.scale_type, product.biases + position * scale_bytes(product.format.scale_type), count);
    return Vector::mul(zeros, Vector::set(-1.0f));
  }
  return Vector::set(-product.format.zero);
}

// Prefetches the scales, and zeros, of one group of columns.
ALWAYS_INLINE void prefetch_scales(const Product& product, int64_t group, int64_t n, int64_t columns) {
  const int bytes = scale_bytes(product.format.scale_type);
  const int64_t offset = (group * product.N + n) * bytes;
  prefetch(product.scales + offset, columns * bytes);
  if (product.biases != nullptr) {
    prefetch(product.biases + offset, columns * bytes);
  }
}

// Some rows of x, packed, and where their results go.
struct ColumnRows {
  const float* x;
  float* y;
};

// Adds one group of the columns [n, n + VECTORS * lanes), of which `count` exist, to y, and prefetches the words that
// are `ahead` bytes further on.
template <typename Element, typename Stream, int ROWS, int VECTORS>
ALWAYS_INLINE void add_column_group(
    const Product& product,
    const ColumnRows& rows,
    int64_t group,
    int64_t n,
    int64_t count,
    int64_t ahead) {
  constexpr int word_bytes = unit_bytes(Element::bits);
  const int64_t units_per_group = product.format.group_size / positions<Element>;
  const int64_t x_row = packed_row(product, Layout::streamed);
  const int bytes = scale_bytes(product.format.scale_type);
  F sums[ROWS][VECTORS];
  clear(sums);
  for (int64_t unit = group * units_per_group; unit < (group + 1) * units_per_group; ++unit) {
    const uint8_t* codes = product.words + (unit * product.N + n) * word_bytes;
    prefetch(codes + ahead, VECTORS * block_bytes<Element>);
    typename Stream::Units units[VECTORS];
    for (int v = 0; v < VECTORS; ++v) {
      units[v] =
          load_block<Stream, block_bytes<Element>>(codes + v * block_bytes<Element>, (count - v * lanes) * word_bytes);
    }
    Stream::template add<ROWS, VECTORS>(
        units, rows.x + unit / lanes * Stream::block_floats + unit % lanes, x_row, sums);
  }
  const float* group_sums = rows.x + packed_values(product, Layout::streamed) + group;
  prefetch_scales(product, group + 1, n, VECTORS * lanes);
  for (int v = 0; v < VECTORS; ++v) {
    const int64_t position = group * product.N + n + v * lanes;
    const F scale = load_first_scales(product.format.scale_type, product.scales + position * bytes, count - v * lanes);
    if (product.has_offset()) {
      const F zeros = negated_zeros(product, position, count - v * lanes);
      for (int m = 0; m < ROWS; ++m) {
        sums[m][v] = Vector::fma(zeros, Vector::set(group_sums[m * x_row]), sums[m][v]);
      }
    }
    for (int m = 0; m < ROWS; ++m) {
      float* total = rows.y + m * product.y_row + v * lanes;
      Vector::store(total, Vector::fma(sums[m][v], scale, Vector::load(total)));
    }
  }
}

// Rows in tiles of at most MOST, which share the words of a group while they are in the first-level cache.
template <typename Element, typename Stream, int MOST, int VECTORS>
void streamed_column_groups(const Product& product, int64_t begin, int64_t end, float* y) {
  constexpr int64_t columns = VECTORS * lanes;
  constexpr int word_bytes = unit_bytes(Element::bits);
  const int64_t x_row = packed_row(product, Layout::streamed);
  const int64_t group_words = product.format.group_size / positions<Element> * product.N;
  const auto add = [&](auto vectors, int64_t group, int64_t n, int64_t count, int64_t ahead)
                       __attribute__((always_inline)) {
                         for_constant_tiles<MOST>(product.rows, [&](int64_t m, auto height) {
                           const ColumnRows tile{product.x + m * x_row, y + m * product.y_row + (n - begin)};
                           add_column_group<Element, Stream, height, vectors>(product, tile, group, n, count, ahead);
                         });
                       };
  std::memset(y, 0, sizeof(float) * static_cast<size_t>(product.rows * product.y_row));
  for (int64_t group = 0; group < product.K / product.format.group_size; ++group) {
    int64_t n = begin;
    for (; n + columns <= end; n += columns) {
      // After the last columns of this group come the first columns of the next.
      const bool wraps = n + column_bytes_ahead / word_bytes >= end;
      const int64_t ahead = column_bytes_ahead + (wraps ? (group_words - (end - begin)) * word_bytes : 0);
      add(std::integral_constant<int, VECTORS>(), group, n, columns, ahead);
    }
    for (; n < end; n += lanes) {
      add(std::integral_constant<int, 1>(), group, n, end - n, group_words * word_bytes);
    }
  }
}

// Enough vectors that the latency of an addition to one is hidden by those to the others. Only single rows of x are
// split into several bfloat16 terms.
template <typename Element, int TERMS>
void streamed_packed_columns(const Product& product, int64_t begin, int64_t end, float* y) {
  using Stream = std::conditional_t<TERMS == 0, Float32Columns<Element>, BFloat16Columns<Element, Vector, TERMS>>;
  constexpr int vectors = Vector::registers >= 32 ? 4 : 2;
  if constexpr (TERMS < 2) {
    if (product.rows > 1) {
      return streamed_column_groups<Element, Stream, max_streamed_rows, vectors>(product, begin, end, y);
    }
  }
  streamed_column_groups<Element, Stream, 1, 2 * vectors>(product, begin, end, y);
}

}  // namespace
}  // namespace quantization_mlx::cpu
