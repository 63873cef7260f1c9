// Attention of one query position. The query heads that share keys and values go over them together: each key and value
// is loaded once for up to 4 heads. Lanes run along the head's dimension.
#pragma once

#include "../isa/real.h"
#include "functions.h"

namespace quantization_mlx::cpu {
namespace {

// The query heads that share one pass over keys or values, and the vectors of each that are kept in registers.
constexpr int shared_heads = 4;
constexpr int held_vectors = Vector::registers / (4 * shared_heads);

// scores[h, j] = queries[h] . keys[j]
template <int heads>
void score(const Attention& attention, const float* queries, float* scores) {
  const int64_t dim = attention.dim;
  for (int64_t j = 0; j < attention.length; ++j) {
    F sums[heads];
    unrolled<heads>([&](auto h) __attribute__((always_inline)) { sums[h] = Vector::zero(); });
    for (int64_t d = 0; d < dim; d += lanes) {
      const F key = load_real(attention.type, attention.keys, j * dim + d);
      unrolled<heads>([&](auto h) __attribute__((always_inline)) {
        sums[h] = Vector::fma(Vector::load(queries + h * dim + d), key, sums[h]);
      });
    }
    unrolled<heads>(
        [&](auto h) __attribute__((always_inline)) { scores[h * attention.score_stride + j] = Vector::sum(sums[h]); });
  }
}

// Scores become weights of sum 1. Overwrites what follows them, up to a multiple of the lanes.
void softmax(float* scores, int64_t length) {
  float maximum = scores[0];
  for (int64_t j = 1; j < length; ++j) {
    maximum = scores[j] > maximum ? scores[j] : maximum;
  }
  for (int64_t j = length; j % lanes != 0; ++j) {
    scores[j] = -__builtin_inff();
  }
  F sums = Vector::zero();
  for (int64_t j = 0; j < length; j += lanes) {
    const F weights = exponential(Vector::add(Vector::load(scores + j), Vector::set(-maximum)));
    Vector::store(scores + j, weights);
    sums = Vector::add(sums, weights);
  }
  const F factor = Vector::set(1.0f / Vector::sum(sums));
  for (int64_t j = 0; j < length; j += lanes) {
    Vector::store(scores + j, Vector::mul(Vector::load(scores + j), factor));
  }
}

// result[h, d] = sum of weights[h, j] * values[j, d] over j, for `vectors` vectors from d on
template <int heads, int vectors>
void mix(const Attention& attention, const float* weights, int64_t d, float* result) {
  F sums[heads][vectors];
  clear(sums);
  for (int64_t j = 0; j < attention.length; ++j) {
    unrolled<vectors>([&](auto v) __attribute__((always_inline)) {
      const F value = load_real(attention.type, attention.values, j * attention.dim + d + v * lanes);
      unrolled<heads>([&](auto h) __attribute__((always_inline)) {
        sums[h][v] = Vector::fma(Vector::set(weights[h * attention.score_stride + j]), value, sums[h][v]);
      });
    });
  }
  for (int h = 0; h < heads; ++h) {
    for (int v = 0; v < vectors; ++v) {
      Vector::store(result + h * attention.dim + d + v * lanes, sums[h][v]);
    }
  }
}

template <int heads>
void attend_heads(const Attention& attention, int64_t first) {
  const float* queries = attention.queries + first * attention.dim;
  float* scores = attention.scores + first * attention.score_stride;
  float* result = attention.result + first * attention.dim;
  score<heads>(attention, queries, scores);
  for (int h = 0; h < heads; ++h) {
    softmax(scores + h * attention.score_stride, attention.length);
  }
  int64_t d = 0;
  for (; d + held_vectors * lanes <= attention.dim; d += held_vectors * lanes) {
    mix<heads, held_vectors>(attention, scores, d, result);
  }
  for (; d < attention.dim; d += lanes) {
    mix<heads, 1>(attention, scores, d, result);
  }
}

void attend(const Attention& attention) {
  int64_t head = 0;
  for (; head + shared_heads <= attention.heads; head += shared_heads) {
    attend_heads<shared_heads>(attention, head);
  }
  with_one_of<1, 2, 3>(
      static_cast<int>(attention.heads - head), [&](auto heads) { attend_heads<heads>(attention, head); });
}

}  // namespace
}  // namespace quantization_mlx::cpu
