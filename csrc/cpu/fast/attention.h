// Attention of a block of rows, the queries of heads that share keys and values, to a range of keys: scores, softmax
// and weighted sums of values, a block of keys at a time, so that what is read of keys and values is read once for all
// rows. The largest score so far and the sum of weights belong to a row; where a block has a larger score, the row's
// sums are multiplied by what it changes.
//
// Few rows: lanes run along the head's dimension. A key is loaded once for some rows, and four keys of a row are summed
// together.
//
//     keys  k0 k1 k2 k3      each a row of memory, times   queries  q0 q1 ...   in registers, one accumulator a pair
//
// Many rows: lanes are rows, so that neither a maximum nor a sum is taken across lanes, and nothing is transposed but
// the queries, once.
//
//     scores[key][row]   += key[key][d] (one number for all lanes)   * queries[d][row]
//     result[d][row]     += value[key][d] (the same)                 * scores[key][row]
//
// Both are one loop: 8 or 4 numbers times 3 vectors of rows, whose products stay in registers. Rows stand in panels of
// 3 vectors.
//
// Keys and values are read through `RealRows` or, where they are packed, `PackedRows`: few rows decode them on the way
// into registers, many rows once for all.
#pragma once

#include "../isa/real.h"
#include "functions.h"

namespace quantization_mlx::cpu {
namespace {

constexpr float lowest = -3.402823466e38f;  // finite: the difference of two is no NaN
constexpr float hidden = -__builtin_inff();

ALWAYS_INLINE F larger(F a, F b) { return (F)((Floats)a > (Floats)b ? (Floats)a : (Floats)b); }
ALWAYS_INLINE F minus(F a, F b) { return (F)((Floats)a - (Floats)b); }

// exp(score - maximum), 0 for a hidden one.
ALWAYS_INLINE F weight_of(F score, F maximum) {
  const Floats weight = (Floats)exponential(minus(score, maximum));
  return (F)((Floats)score == (Floats)Vector::set(hidden) ? (Floats)Vector::zero() : weight);
}

// --- Caps -----------------------------------------------------------------------------------------------------------

ALWAYS_INLINE F hyperbolic_tangent(F x) {
  const F square = Vector::mul(x, x);
  const Floats small = (Floats)Vector::fma(Vector::mul(x, square), polynomial(square, tanh_odd), x);
  const Floats size = (Floats)((Words)x & 0x7FFFFFFFu);
  const Floats limited = size > 40.0f ? Floats{} + 40.0f : size;  // beyond, the tangent is 1
  const Floats large = 1.0f - 2.0f / ((Floats)exponential((F)(limited + limited)) + 1.0f);
  const Floats signed_large = (Floats)x < 0.0f ? -large : large;
  const Floats tangent = size <= tanh_small ? small : signed_large;
  return (F)((Floats)x == (Floats)x ? tangent : (Floats)x);
}

// Whole vectors of scores.
void cap_scores(float softcap, float* scores, int64_t count) {
  for (int64_t i = 0; i < count; i += lanes) {
    const Floats score = (Floats)Vector::load(scores + i);
    Vector::store(scores + i, Vector::mul(hyperbolic_tangent((F)(score / softcap)), Vector::set(softcap)));
  }
}

// --- Masks ---------------------------------------------------------------------------------------------------------

ALWAYS_INLINE float real_at(Real type, const void* source, int64_t i) {
  if (type == Real::float32) {
    return static_cast<const float*>(source)[i];
  }
  const uint32_t bits = static_cast<const uint16_t*>(source)[i];
  if (type == Real::float16) {
    return float16_to_float(bits);
  }
  const uint32_t word = bits << 16;
  float value;
  std::memcpy(&value, &word, sizeof value);
  return value;
}

// What the mask adds to the scores of keys begin to begin + count of one row. May write on to a whole vector.
void load_mask(const AttentionMask& mask, int64_t row, int64_t begin, int64_t count, float* added) {
  const int64_t stride = mask.stride;
  const void* source = mask.rows[row];
  if (mask.kind == AttentionMask::Kind::visible) {
    const uint8_t* visible = static_cast<const uint8_t*>(source) + begin * stride;
    for (int64_t j = 0; j < count; ++j) {
      added[j] = visible[j * stride] != 0 ? 0.0f : hidden;
    }
  } else if (stride == 1) {
    to_float32(mask.type, static_cast<const uint8_t*>(source) + begin * real_bytes(mask.type), count, added);
  } else {
    for (int64_t j = 0; j < count; ++j) {
      added[j] = real_at(mask.type, source, (begin + j) * stride);
    }
  }
}

// The part of `count` keys from `begin` on that a row sees.
struct KeyRange {
  int64_t first;
  int64_t last;

  bool is_whole(int64_t count) const { return first <= 0 && last >= count; }
};

KeyRange range_of(const Attention& attention, int64_t row, int64_t begin, int64_t count) {
  if (attention.first == nullptr) {
    return {0, count};
  }
  const int64_t first = attention.first[row] - begin;
  const int64_t last = attention.last[row] - begin;
  return {first < 0 ? 0 : min(first, count), last < 0 ? 0 : min(last, count)};
}

// --- Rows of keys and values -----------------------------------------------------------------------------------------

// Working memory, a part after the other.
struct Parts {
  float* next;

  float* take(int64_t count) {
    float* part = next;
    next += round_up(count, 16);
    return part;
  }
};

// A block of keys or values that are elements.
template <Real type>
struct RealRows {
  const uint8_t* first;
  int64_t stride;

  static RealRows of(const Attention&, const AttentionSource& source, int64_t, int64_t begin, int64_t, Parts&) {
    return {static_cast<const uint8_t*>(source.first) + begin * source.stride * real_bytes(type), source.stride};
  }

  // `lanes` elements of row j from d on.
  ALWAYS_INLINE F load(int64_t j, int64_t d) const { return load_real(type, first, j * stride + d); }
};

// `lanes` adjacent codes.
template <int bits>
ALWAYS_INLINE F load_codes(const uint8_t* source) {
  if constexpr (bits == 8) {
    return (F) __builtin_convertvector((Integers)Vector::load_bytes(source), Floats);
  } else {
    static_assert(bits == 4);
    // Every lane has the word of its code, shifts that to the bottom, and masks it.
    Words shifts = {};
    Words words = {};
    for (int lane = 0; lane < lanes; ++lane) {
      shifts[lane] = 4u * (static_cast<uint32_t>(lane) % 8u);
    }
    if constexpr (lanes <= 8) {
      uint32_t word = 0;
      std::memcpy(&word, source, lanes / 2);
      words += word;
    } else {
      uint32_t both[2];
      std::memcpy(both, source, sizeof both);
      Words is_first = {};
      for (int lane = 0; lane < 8; ++lane) {
        is_first[lane] = ~0u;
      }
      words = ((words + both[0]) & is_first) | ((words + both[1]) & ~is_first);
    }
    return (F) __builtin_convertvector((Integers)(words >> shifts & 15u), Floats);
  }
}

// Scales or biases of `count` positions, `groups` of each, in float32.
float* float_scales(Real type, const void* source, int64_t stride, int64_t groups, int64_t count, Parts& parts) {
  float* const result = parts.take(count * groups + 16);
  const uint8_t* bytes = static_cast<const uint8_t*>(source);
  if (stride == groups) {
    to_float32(type, bytes, count * groups, result);
  } else {
    for (int64_t j = 0; j < count; ++j) {
      to_float32(type, bytes + j * stride * real_bytes(type), groups, result + j * groups);
    }
  }
  return result;
}

// A block of keys or values that are codes.
template <int bits>
struct PackedRows {
  const uint8_t* first;
  int64_t bytes;  // from one row to the next
  const float* scales;
  const float* biases;
  int64_t groups;
  int shift;  // elements to a group, as a power of two

  static PackedRows of(
      const Attention& attention,
      const AttentionSource& source,
      int64_t dim,
      int64_t begin,
      int64_t count,
      Parts& parts) {
    const int64_t groups = dim / attention.group_size;
    const auto floats = [&](const void* tensor) {
      const uint8_t* own = static_cast<const uint8_t*>(tensor);
      return float_scales(
          attention.type, own + begin * source.scale_stride * real_bytes(attention.type), source.scale_stride, groups,
          count, parts);
    };
    const float* const scales = floats(source.scales);
    const float* const biases = floats(source.biases);
    const int64_t bytes = source.stride * 4;
    return {static_cast<const uint8_t*>(source.first) + begin * bytes, bytes, scales, biases, groups,
            __builtin_ctz(static_cast<unsigned>(attention.group_size))};
  }

  ALWAYS_INLINE F load(int64_t j, int64_t d) const {
    const int64_t group = j * groups + (d >> shift);
    const F codes = load_codes<bits>(first + j * bytes + d * bits / 8);
    return Vector::fma(codes, Vector::set(scales[group]), Vector::set(biases[group]));
  }
};

// --- Few rows --------------------------------------------------------------------------------------------------------

// Rows that share a load, and keys whose scores are summed together.
constexpr int shared_rows = Vector::registers >= 32 ? 4 : 2;
constexpr int keys_at_once = 4;
// Blocks of keys that stay in the cache nearest to the core.
constexpr int few_rows_keys = 64;

constexpr int64_t most_few_rows = lanes / 2 > 4 ? lanes / 2 : 4;

template <int rows, int keys, typename Rows>
ALWAYS_INLINE void score_keys(
    const Attention& attention,
    const Rows& all,
    const float* queries,
    int64_t j,
    float* scores) {
  F sums[rows][keys];
  clear(sums);
  for (int64_t d = 0; d < attention.dim; d += lanes) {
    F key[keys];
    unrolled<keys>([&](auto k) __attribute__((always_inline)) { key[k] = all.load(j + k, d); });
    unrolled<rows>([&](auto r) __attribute__((always_inline)) {
      const F query = Vector::load(queries + r * attention.dim + d);
      unrolled<keys>([&](auto k)
                         __attribute__((always_inline)) { sums[r][k] = Vector::fma(query, key[k], sums[r][k]); });
    });
  }
  unrolled<rows>([&](auto r) __attribute__((always_inline)) { sum_lanes(sums[r], scores + r * few_rows_keys); });
}

// result[row, d] = result[row, d] * factors[row] + the sum of weights[row, j] * values[j, d] over j, for `vectors`
// vectors from d on
template <int rows, int vectors, typename Rows>
ALWAYS_INLINE void mix_values(
    const Attention& attention,
    const Rows& all,
    const float* weights,
    const float* factors,
    int64_t count,
    int64_t d,
    float* result) {
  F sums[rows][vectors];
  clear(sums);
  for (int64_t j = 0; j < count; ++j) {
    F value[vectors];
    unrolled<vectors>([&](auto v) __attribute__((always_inline)) { value[v] = all.load(j, d + v * lanes); });
    unrolled<rows>([&](auto r) __attribute__((always_inline)) {
      const F weight = Vector::set(weights[r * few_rows_keys + j]);
      unrolled<vectors>([&](auto v)
                            __attribute__((always_inline)) { sums[r][v] = Vector::fma(weight, value[v], sums[r][v]); });
    });
  }
  unrolled<rows>([&](auto r) __attribute__((always_inline)) {
    unrolled<vectors>([&](auto v) __attribute__((always_inline)) {
      float* const place = result + r * attention.value_dim + d + v * lanes;
      Vector::store(place, Vector::fma(Vector::load(place), Vector::set(factors[r]), sums[r][v]));
    });
  });
}

// Scores of one row become weights; the factor of what was summed before is returned.
float soften_row(const Attention& attention, int64_t row, int64_t begin, int64_t count, float* scores) {
  if (attention.softcap > 0.0f) {
    cap_scores(attention.softcap, scores, count);
  }
  if (attention.mask.kind != AttentionMask::Kind::none) {
    float added[few_rows_keys];
    load_mask(attention.mask, row, begin, count, added);
    for (int64_t j = 0; j < count; ++j) {
      scores[j] += added[j];
    }
  }
  const KeyRange range = range_of(attention, row, begin, count);
  for (int64_t j = 0; j < range.first; ++j) {
    scores[j] = hidden;
  }
  for (int64_t j = range.last; j < round_up(count, lanes); ++j) {
    scores[j] = hidden;
  }
  F maxima = Vector::set(attention.maxima[row]);
  for (int64_t j = 0; j < count; j += lanes) {
    maxima = larger(Vector::load(scores + j), maxima);
  }
  float of_lanes[lanes];
  Vector::store(of_lanes, maxima);
  float maximum = of_lanes[0];
  for (const float one : of_lanes) {
    maximum = one > maximum ? one : maximum;
  }
  F sums = Vector::zero();
  for (int64_t j = 0; j < count; j += lanes) {
    const F weights = weight_of(Vector::load(scores + j), Vector::set(maximum));
    Vector::store(scores + j, weights);
    sums = Vector::add(sums, weights);
  }
  Vector::store(of_lanes, exponential(Vector::set(attention.maxima[row] - maximum)));
  attention.maxima[row] = maximum;
  attention.sums[row] = attention.sums[row] * of_lanes[0] + Vector::sum(sums);
  return of_lanes[0];
}

template <int rows, typename Rows>
void attend_shared(
    const Attention& attention,
    const Rows& all_keys,
    const Rows& all_values,
    int64_t row,
    int64_t begin,
    int64_t count) {
  float scores[rows * few_rows_keys];
  const float* queries = attention.queries + row * attention.dim;
  for_columns<keys_at_once>(0, count, [&](int64_t j, auto keys) __attribute__((always_inline)) {
    score_keys<rows, keys>(attention, all_keys, queries, j, scores + j);
  });
  float factors[rows];
  for (int r = 0; r < rows; ++r) {
    factors[r] = soften_row(attention, row + r, begin, count, scores + r * few_rows_keys);
  }
  constexpr int vectors = Vector::registers >= 32 && rows == 1 ? 8 : 4;
  float* result = attention.result + row * attention.value_dim;
  int64_t d = 0;
  for (; d + vectors * lanes <= attention.value_dim; d += vectors * lanes) {
    mix_values<rows, vectors>(attention, all_values, scores, factors, count, d, result);
  }
  for (; d < attention.value_dim; d += lanes) {
    mix_values<rows, 1>(attention, all_values, scores, factors, count, d, result);
  }
}

template <typename Rows>
void attend_few(const Attention& attention) {
  for (int64_t begin = attention.begin; begin < attention.end; begin += few_rows_keys) {
    const int64_t count = min(few_rows_keys, attention.end - begin);
    Parts parts{attention.workspace};
    const Rows keys = Rows::of(attention, attention.keys, attention.dim, begin, count, parts);
    const Rows values = Rows::of(attention, attention.values, attention.value_dim, begin, count, parts);
    for_constant_tiles<shared_rows>(attention.rows, [&](int64_t row, auto rows) {
      attend_shared<rows>(attention, keys, values, row, begin, count);
    });
  }
}

// --- Many rows -------------------------------------------------------------------------------------------------------

constexpr int panel_vectors = 3;
constexpr int panel_rows = panel_vectors * lanes;
static_assert(attention_rows % panel_rows == 0);
// Numbers that are multiplied by one load of a panel's vectors.
constexpr int numbers_at_once = Vector::registers >= 32 ? 8 : 4;

// Steps whose products are added to one another before they are added to the rest: sums stay small beside what is added
// to them.
constexpr int64_t summed_steps = 32;

// sums[n][row] = the sum of numbers[n][s] * panel[s][row] over s < steps and, with `adds`, what was there, for `count`
// numbers, each number's steps `step_stride` and the numbers themselves `stride` floats apart.
template <int count, int vectors>
ALWAYS_INLINE void multiply_numbers(
    const float* numbers,
    int64_t stride,
    int64_t step_stride,
    const float* panel,
    int64_t steps,
    bool adds,
    float* sums) {
  constexpr int width = vectors * lanes;
  for (int64_t begin = 0; begin < steps; begin += summed_steps) {
    const int64_t end = min(begin + summed_steps, steps);
    F of_numbers[count][vectors];
    clear(of_numbers);
    for (int64_t s = begin; s < end; ++s) {
      F rows[vectors];
      unrolled<vectors>([&](auto v)
                            __attribute__((always_inline)) { rows[v] = Vector::load(panel + s * width + v * lanes); });
      unrolled<count>([&](auto n) __attribute__((always_inline)) {
        const F number = Vector::set(numbers[n * stride + s * step_stride]);
        unrolled<vectors>([&](auto v) __attribute__((always_inline)) {
          of_numbers[n][v] = Vector::fma(number, rows[v], of_numbers[n][v]);
        });
      });
    }
    const bool is_first = begin == 0 && !adds;
    unrolled<count>([&](auto n) __attribute__((always_inline)) {
      unrolled<vectors>([&](auto v) __attribute__((always_inline)) {
        float* const place = sums + n * width + v * lanes;
        Vector::store(place, is_first ? of_numbers[n][v] : Vector::add(Vector::load(place), of_numbers[n][v]));
      });
    });
  }
}

// Rows of float32 keys or values.
struct FloatRows {
  const float* first;
  int64_t stride;
};

// One panel of a block of rows.
template <int vectors>
struct Panel {
  static constexpr int width = vectors * lanes;

  const Attention& attention;
  int64_t row;  // the first; those beyond attention.rows are zeros
  float* queries;  // [dim, width]
  float* scores;  // [keys, width]
  float* result;  // [value_dim, width]
  float* maxima;  // [width]
  float* sums;  // [width]

  int64_t rows() const { return min(width, attention.rows - row); }

  void begin() const {
    for (int64_t d = 0; d < attention.dim; ++d) {
      for (int64_t r = 0; r < width; ++r) {
        queries[d * width + r] = r < rows() ? attention.queries[(row + r) * attention.dim + d] : 0.0f;
      }
    }
    std::memset(result, 0, sizeof(float) * static_cast<size_t>(attention.value_dim * width));
    for (int r = 0; r < width; ++r) {
      maxima[r] = lowest;
      sums[r] = 0.0f;
    }
  }

  void score(FloatRows keys, int64_t count) const {
    for_columns<numbers_at_once>(0, count, [&](int64_t j, auto numbers) __attribute__((always_inline)) {
      multiply_numbers<numbers, vectors>(
          keys.first + j * keys.stride, keys.stride, 1, queries, attention.dim, false, scores + j * width);
    });
  }

  void mix(FloatRows values, int64_t count) const {
    for_columns<numbers_at_once>(0, attention.value_dim, [&](int64_t d, auto numbers) __attribute__((always_inline)) {
      multiply_numbers<numbers, vectors>(values.first + d, 1, values.stride, scores, count, true, result + d * width);
    });
  }

  void hide(int64_t begin, int64_t count) const {
    if (attention.softcap > 0.0f) {
      cap_scores(attention.softcap, scores, count * width);
    }
    if (attention.mask.kind != AttentionMask::Kind::none) {
      float added[attention_keys];
      for (int64_t r = 0; r < rows(); ++r) {
        load_mask(attention.mask, row + r, begin, count, added);
        for (int64_t j = 0; j < count; ++j) {
          scores[j * width + r] += added[j];
        }
      }
    }
    int32_t first[width] = {};
    int32_t last[width] = {};
    bool is_whole = true;
    for (int64_t r = 0; r < rows(); ++r) {
      const KeyRange range = range_of(attention, row + r, begin, count);
      first[r] = static_cast<int32_t>(range.first);
      last[r] = static_cast<int32_t>(range.last);
      is_whole = is_whole && range.is_whole(count);
    }
    for (int v = 0; v < vectors && !is_whole; ++v) {
      Integers from;
      Integers to;
      std::memcpy(&from, first + v * lanes, sizeof from);
      std::memcpy(&to, last + v * lanes, sizeof to);
      for (int64_t j = 0; j < count; ++j) {
        float* place = scores + j * width + v * lanes;
        const Integers key = Integers{} + static_cast<int32_t>(j);
        const Floats score = (Floats)Vector::load(place);
        Vector::store(place, (F)(((key >= from) & (key < to)) ? score : (Floats)Vector::set(hidden)));
      }
    }
  }

  // Scores become weights, and what was summed before is multiplied by what that changes.
  void soften(int64_t count) const {
    F factors[vectors];
    for (int v = 0; v < vectors; ++v) {
      const F before = Vector::load(maxima + v * lanes);
      F maximum = before;
      for (int64_t j = 0; j < count; ++j) {
        maximum = larger(Vector::load(scores + j * width + v * lanes), maximum);
      }
      F sum = Vector::zero();
      for (int64_t j = 0; j < count; ++j) {
        float* place = scores + j * width + v * lanes;
        const F weights = weight_of(Vector::load(place), maximum);
        Vector::store(place, weights);
        sum = Vector::add(sum, weights);
      }
      factors[v] = exponential(minus(before, maximum));
      Vector::store(maxima + v * lanes, maximum);
      Vector::store(sums + v * lanes, Vector::fma(Vector::load(sums + v * lanes), factors[v], sum));
    }
    for (int64_t d = 0; d < attention.value_dim; ++d) {
      for (int v = 0; v < vectors; ++v) {
        float* place = result + d * width + v * lanes;
        Vector::store(place, Vector::mul(Vector::load(place), factors[v]));
      }
    }
  }

  void finish() const {
    for (int64_t r = 0; r < rows(); ++r) {
      attention.maxima[row + r] = maxima[r];
      attention.sums[row + r] = sums[r];
      for (int64_t d = 0; d < attention.value_dim; ++d) {
        attention.result[(row + r) * attention.value_dim + d] = result[d * width + r];
      }
    }
  }
};

template <int bits>
FloatRows unpacked_rows(
    const Attention& attention,
    const AttentionSource& source,
    int64_t dim,
    int64_t begin,
    int64_t count,
    Parts parts,
    float* copy) {
  const auto rows = PackedRows<bits>::of(attention, source, dim, begin, count, parts);
  for (int64_t j = 0; j < count; ++j) {
    for (int64_t d = 0; d < dim; d += lanes) {
      Vector::store(copy + j * dim + d, rows.load(j, d));
    }
  }
  return {copy, dim};
}

// Keys or values of a block in float32: themselves, or a copy. Takes parts for the time of the call.
FloatRows float_rows(
    const Attention& attention,
    const AttentionSource& source,
    int64_t dim,
    int64_t begin,
    int64_t count,
    Parts parts,
    float* copy) {
  const Real type = attention.type;
  if (attention.bits != 0) {
    return attention.bits == 8 ? unpacked_rows<8>(attention, source, dim, begin, count, parts, copy)
                               : unpacked_rows<4>(attention, source, dim, begin, count, parts, copy);
  }
  const uint8_t* first = static_cast<const uint8_t*>(source.first) + begin * source.stride * real_bytes(type);
  if (type == Real::float32) {
    return {reinterpret_cast<const float*>(first), source.stride};
  }
  const int64_t copy_stride = round_up(dim, 16);
  for (int64_t j = 0; j < count; ++j) {
    to_float32(type, first + j * source.stride * real_bytes(type), dim, copy + j * copy_stride);
  }
  return {copy, copy_stride};
}

void attend_many(const Attention& attention) {
  constexpr int64_t most_panels = attention_rows / panel_rows;
  Parts parts{attention.workspace};
  float* const keys_copy = parts.take(attention_keys * round_up(attention.dim, 16));
  float* const values_copy = parts.take(attention_keys * round_up(attention.value_dim, 16));
  float* const scores = parts.take(attention_keys * panel_rows);
  struct Memory {
    float* queries;
    float* result;
    float* maxima;
    float* sums;
  } memory[most_panels];
  // Calls function(panel) for each, whose vectors are no more than its rows need.
  const auto for_panels = [&](const auto& function) __attribute__((always_inline)) {
    for (int64_t p = 0; p * panel_rows < attention.rows; ++p) {
      const int64_t rows = min(panel_rows, attention.rows - p * panel_rows);
      with_rows<panel_vectors>((rows + lanes - 1) / lanes, [&](auto vectors) __attribute__((always_inline)) {
        function(
            Panel<vectors>{
                attention, p * panel_rows, memory[p].queries, scores, memory[p].result, memory[p].maxima,
                memory[p].sums});
      });
    }
  };
  for (int64_t p = 0; p * panel_rows < attention.rows; ++p) {
    memory[p] = {
        parts.take(attention.dim * panel_rows), parts.take(attention.value_dim * panel_rows), parts.take(panel_rows),
        parts.take(panel_rows)};
  }
  for_panels([&](const auto& panel) { panel.begin(); });
  for (int64_t begin = attention.begin; begin < attention.end; begin += attention_keys) {
    const int64_t count = min(attention_keys, attention.end - begin);
    const FloatRows keys = float_rows(attention, attention.keys, attention.dim, begin, count, parts, keys_copy);
    const FloatRows values =
        float_rows(attention, attention.values, attention.value_dim, begin, count, parts, values_copy);
    for_panels([&](const auto& panel) {
      panel.score(keys, count);
      panel.hide(begin, count);
      panel.soften(count);
      panel.mix(values, count);
    });
  }
  for_panels([&](const auto& panel) { panel.finish(); });
}

void attend(const Attention& attention) {
  const bool whole_vectors = attention.dim % lanes == 0 && attention.value_dim % lanes == 0;
  if (attention.rows > most_few_rows || !whole_vectors) {
    return attend_many(attention);
  }
  for (int64_t row = 0; row < attention.rows; ++row) {
    attention.maxima[row] = lowest;
    attention.sums[row] = 0.0f;
  }
  std::memset(attention.result, 0, sizeof(float) * static_cast<size_t>(attention.rows * attention.value_dim));
  switch (attention.bits) {
    case 4: return attend_few<PackedRows<4>>(attention);
    case 8: return attend_few<PackedRows<8>>(attention);
    default: break;
  }
  with_type(attention.type, [&](auto type) { attend_few<RealRows<type>>(attention); });
}

}  // namespace
}  // namespace quantization_mlx::cpu
