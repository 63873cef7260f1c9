// What a transformer decoder does between its products, for one row on one CPU core and any vector instruction set. A
// file that includes product.h includes this one behind it. Lengths are multiples of 16, which every `lanes` divides.

namespace {

// The query heads that share one pass over keys or values, and the vectors of each that one pass holds.
constexpr int shared_heads = 4;
constexpr int held_vectors = Vector::registers / (4 * shared_heads);

// The compiler's own vectors, which have operators on every target.
typedef float Floats __attribute__((vector_size(sizeof(F))));
typedef int32_t Integers __attribute__((vector_size(sizeof(F))));

ALWAYS_INLINE F load_real(Real type, const void* source, int64_t i) {
  const uint8_t* bytes = static_cast<const uint8_t*>(source);
  switch (type) {
    case Real::float16: return Vector::load_float16(bytes + 2 * i);
    case Real::bfloat16: return Vector::load_bfloat16(bytes + 2 * i);
    case Real::float32: return Vector::load(static_cast<const float*>(source) + i);
  }
  __builtin_unreachable();
}

// exp within 2 units in the last place between -87 and 88; beyond, the value at the nearer end.
ALWAYS_INLINE F exponential(F value) {
  const Floats low = (Floats)Vector::set(-87.0f);
  const Floats high = (Floats)Vector::set(88.0f);
  Floats x = (Floats)value;
  x = x < low ? low : x;
  x = x > high ? high : x;
  // Adding 1.5 * 2^23 rounds to an integer and leaves it in the lowest bits.
  const Floats shifted = (Floats)Vector::fma((F)x, Vector::set(1.44269504f), Vector::set(12582912.0f));
  const F whole = (F)(shifted - 12582912.0f);
  const F rest = Vector::fma(whole, Vector::set(-1.42860677e-6f), Vector::fma(whole, Vector::set(-0.693145752f), (F)x));
  constexpr float coefficients[] = {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
  F power = Vector::set(1.0f / 720);
  for (const float coefficient : coefficients) {
    power = Vector::fma(power, rest, Vector::set(coefficient));
  }
  return (F)((Integers)power + ((Integers)shifted << 23));
}

void widen(Real type, const void* source, int64_t n, float* destination) {
  for (int64_t i = 0; i < n; i += lanes) {
    Vector::store(destination + i, load_real(type, source, i));
  }
}

void rms_norm(const float* x, const float* weight, float epsilon, int64_t n, float* y) {
  F squares = Vector::zero();
  for (int64_t i = 0; i < n; i += lanes) {
    squares = Vector::fma(Vector::load(x + i), Vector::load(x + i), squares);
  }
  const F factor = Vector::set(1.0f / __builtin_sqrtf(Vector::sum(squares) / static_cast<float>(n) + epsilon));
  for (int64_t i = 0; i < n; i += lanes) {
    Vector::store(y + i, Vector::mul(Vector::mul(Vector::load(x + i), factor), Vector::load(weight + i)));
  }
}

void gate(const float* gates, const float* values, int64_t n, float* y) {
  const F one = Vector::set(1.0f);
  for (int64_t i = 0; i < n; i += lanes) {
    const F x = Vector::load(gates + i);
    const Floats denominator = (Floats)Vector::add(one, exponential((F) - (Floats)x));
    Vector::store(y + i, Vector::mul((F)((Floats)x / denominator), Vector::load(values + i)));
  }
}

// Each half of a head is the real or the imaginary part of a complex vector.
void rotate(const float* x, const float* cosines, const float* sines, int64_t dim, float* y) {
  const int64_t half = dim / 2;
  for (int64_t i = 0; i < half; i += lanes) {
    const F real = Vector::load(x + i);
    const F imaginary = Vector::load(x + half + i);
    const F minus = (F) - (Floats)imaginary;
    Vector::store(y + i, Vector::fma(minus, Vector::load(sines + i), Vector::mul(real, Vector::load(cosines + i))));
    Vector::store(
        y + half + i,
        Vector::fma(real, Vector::load(sines + half + i), Vector::mul(imaginary, Vector::load(cosines + half + i))));
  }
}

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

// Scores become weights, of sum 1. What follows them up to a multiple of the lanes is overwritten.
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
  for (auto& head : sums) {
    for (F& sum : head) {
      sum = Vector::zero();
    }
  }
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
  switch (attention.heads - head) {
    case 3: return attend_heads<3>(attention, head);
    case 2: return attend_heads<2>(attention, head);
    case 1: return attend_heads<1>(attention, head);
    default: return;
  }
}

constexpr DecoderKernels decoder_table = {widen, rms_norm, gate, rotate, attend};

}  // namespace
