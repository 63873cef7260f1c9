// 1 to 4 rows of x: each weight is read once and decoded in registers, so that reading the weights takes all the time.
//
//     lanes run along K, over the units of one row of w; several columns of the result at a time
//
//     units of column n      * x    -> sum of column n      lane by lane; the lanes of a sum are added up at the end
//     units of column n + 1  * x    -> sum of column n + 1
//
// The columns share each load of x and give independent chains of additions.
#pragma once

#include "columns.h"
#include "pack.h"

namespace quantization_mlx::cpu {
namespace {

// Multiplies a block in float32. With one row the sum of a block is scaled; with more, the decoded value is, so that
// the rows share that product too.
template <typename Element>
struct Float32Stream : Element {
  static constexpr int64_t block_floats = block_elements<Element>;

  template <int ROWS, int COLUMNS>
  static ALWAYS_INLINE void add(
      const typename Element::Units (&units)[COLUMNS],
      const F (&scale)[COLUMNS],
      const float* x,
      int64_t x_row,
      F (&total)[ROWS][COLUMNS]) {
    if constexpr (ROWS == 1) {
      F part[COLUMNS];
      unrolled<positions<Element>>([&](auto j) __attribute__((always_inline)) {
        const F activation = Vector::load(x + j * lanes);
        for (int c = 0; c < COLUMNS; ++c) {
          const F value = Element::template value<j>(units[c]);
          part[c] = j == 0 ? Vector::mul(value, activation) : Vector::fma(value, activation, part[c]);
        }
      });
      for (int c = 0; c < COLUMNS; ++c) {
        total[0][c] = Vector::fma(part[c], scale[c], total[0][c]);
      }
    } else {
      unrolled<positions<Element>>([&](auto j) __attribute__((always_inline)) {
        for (int c = 0; c < COLUMNS; ++c) {
          const F value = Vector::mul(Element::template value<j>(units[c]), scale[c]);
          for (int m = 0; m < ROWS; ++m) {
            total[m][c] = Vector::fma(value, Vector::load(x + m * x_row + j * lanes), total[m][c]);
          }
        }
      });
    }
  }
};

// Multiplies exact codes with exact terms of x and scales the sums: no weight is rounded.
template <typename Element, typename V, int TERMS>
struct BFloat16Stream : Pairs<Element, V> {
  static constexpr int64_t block_floats = block_elements<Element> / 2 * TERMS;

  template <int ROWS, int COLUMNS>
  static ALWAYS_INLINE void add(
      const typename Pairs<Element, V>::Units (&units)[COLUMNS],
      const F (&scale)[COLUMNS],
      const float* x,
      int64_t x_row,
      F (&total)[ROWS][COLUMNS]) {
    constexpr int half = positions<Element> / 2;
    F part[ROWS][COLUMNS];
    clear(part);
    unrolled<half>([&](auto j) __attribute__((always_inline)) {
      for (int c = 0; c < COLUMNS; ++c) {
        const I value = Pairs<Element, V>::template values<j>(units[c]);
        for (int term = 0; term < TERMS; ++term) {
          for (int m = 0; m < ROWS; ++m) {
            part[m][c] = V::dot_pairs(value, V::load_integers(x + m * x_row + (term * half + j) * lanes), part[m][c]);
          }
        }
      }
    });
    for (int m = 0; m < ROWS; ++m) {
      for (int c = 0; c < COLUMNS; ++c) {
        total[m][c] = Vector::fma(part[m][c], scale[c], total[m][c]);
      }
    }
  }
};

template <typename Element, typename Stream, int ROWS, int COLUMNS>
void streamed_columns(const Product& product, int64_t n, float* y) {
  constexpr int block = block_elements<Element>;
  const int group_size = product.format.group_size;
  const int64_t groups = product.K / group_size;
  const int64_t row_bytes = product.K * Element::bits / 8;
  const int bytes = scale_bytes(product.format.scale_type);
  const int64_t scale_row = groups * bytes;
  const int64_t x_row = packed_row(product, Layout::streamed);
  const float* sums = product.x + packed_values(product, Layout::streamed);
  const Spread<Element> spread(group_size);

  F total[ROWS][COLUMNS];
  clear(total);
  // The scales of `lanes` groups fill a vector of each column, which the blocks of those groups share.
  for (int64_t group = 0; group < groups; group += lanes) {
    const int64_t count = min(groups - group, lanes);
    F scales[COLUMNS];
    for (int c = 0; c < COLUMNS; ++c) {
      const int64_t offset = (n + c) * scale_row + group * bytes;
      if (product.biases != nullptr) {
        prefetch(product.biases + offset + columns_ahead * scale_row, 1);
        const F bias = load_first_scales(product.format.scale_type, product.biases + offset, count);
        for (int m = 0; m < ROWS; ++m) {
          total[m][c] = Vector::fma(bias, Vector::load(sums + m * x_row + group), total[m][c]);
        }
      }
      prefetch(product.scales + offset + columns_ahead * scale_row, 1);
      scales[c] = load_first_scales(product.format.scale_type, product.scales + offset, count);
    }
    const int64_t first = group * group_size / block;
    const int64_t blocks = (count * group_size + block - 1) / block;
    for (int64_t i = 0; i < blocks; ++i) {
      const int64_t byte = (first + i) * block_bytes<Element>;
      const auto groups_of_lanes = spread.groups_of_lanes(i);
      typename Stream::Units units[COLUMNS];
      F scale[COLUMNS];
      for (int c = 0; c < COLUMNS; ++c) {
        const uint8_t* codes = product.words + (n + c) * row_bytes + byte;
        prefetch(codes + columns_ahead * row_bytes, block_bytes<Element>);
        units[c] = load_block<Stream, block_bytes<Element>>(codes, row_bytes - byte);
        scale[c] = Vector::lookup(scales[c], groups_of_lanes);
      }
      Stream::template add<ROWS, COLUMNS>(units, scale, product.x + (first + i) * Stream::block_floats, x_row, total);
    }
  }
  for (int m = 0; m < ROWS; ++m) {
    sum_lanes(total[m], y + m * product.y_row);
  }
}

template <typename Element, typename Stream, int ROWS>
void streamed_rows(const Product& product, int64_t begin, int64_t end, float* y) {
  constexpr int most = Vector::registers >= 32 && ROWS <= 2 ? 4 : 2;
  for_columns<most>(begin, end, [&](int64_t n, auto columns) {
    streamed_columns<Element, Stream, ROWS, columns>(product, n, y + (n - begin));
  });
}

struct Streamed {
  template <typename Element>
  static void run(const Product& product, int64_t begin, int64_t end, float*, float* y) {
    with_terms(product, Layout::streamed, [&](auto terms) {
      if constexpr (may_be_column_packed<Element>) {
        if (product.format.is_column_packed()) {
          return streamed_packed_columns<Element, terms>(product, begin, end, y);
        }
      }
      using Stream = std::conditional_t<terms == 0, Float32Stream<Element>, BFloat16Stream<Element, Vector, terms>>;
      constexpr int most_rows = terms == 3 ? 1 : max_streamed_rows;
      with_rows<most_rows>(
          product.rows, [&](auto rows) { streamed_rows<Element, Stream, rows>(product, begin, end, y); });
    });
  }
};

}  // namespace
}  // namespace quantization_mlx::cpu
