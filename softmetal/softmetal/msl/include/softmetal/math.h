// Math, integer, relational and geometric functions: scalar float, the same through float for half, and componentwise.
#pragma once

// clang-format off
#define SOFTMETAL_LIBM(X)                                                                         \
  X(acos) X(acosh) X(asin) X(asinh) X(atan) X(atanh) X(cos) X(cosh) X(exp) X(exp2) X(exp10) X(log) \
  X(log10) X(log2) X(sin) X(sinh) X(tan) X(tanh) X(round)
// clang-format on

extern "C" {
#define X(NAME) float NAME##f(float);
SOFTMETAL_LIBM(X)
#undef X
float atan2f(float, float);
float fmodf(float, float);
float powf(float, float);
float nextafterf(float, float);
float ldexpf(float, int);
}

// One float implementation each; Apple's own headers call these __metal_ names with a math mode, as do kernels that
// extend them to bfloat.
#define X(NAME) \
  METAL_FUNC float __metal_##NAME(float x, int = 0) { return NAME##f(x); }
SOFTMETAL_LIBM(X)
#undef X
#define SOFTMETAL_FLOAT1(NAME, EXPRESSION) \
  METAL_FUNC float __metal_##NAME(float x, int = 0) { return EXPRESSION; }
#define SOFTMETAL_FLOAT2(NAME, EXPRESSION) \
  METAL_FUNC float __metal_##NAME(float x, float y, int = 0) { return EXPRESSION; }
#define SOFTMETAL_FLOAT3(NAME, EXPRESSION) \
  METAL_FUNC float __metal_##NAME(float x, float y, float z, int = 0) { return EXPRESSION; }
SOFTMETAL_FLOAT1(fabs, __builtin_fabsf(x))
SOFTMETAL_FLOAT1(sqrt, __builtin_sqrtf(x))
SOFTMETAL_FLOAT1(rsqrt, 1.0f / __builtin_sqrtf(x))
SOFTMETAL_FLOAT1(floor, __builtin_floorf(x))
SOFTMETAL_FLOAT1(ceil, __builtin_ceilf(x))
SOFTMETAL_FLOAT1(trunc, __builtin_truncf(x))
SOFTMETAL_FLOAT1(rint, __builtin_rintf(x))
SOFTMETAL_FLOAT1(fract, __builtin_fminf(x - __builtin_floorf(x), 0x1.fffffep-1f))
SOFTMETAL_FLOAT1(cospi, cosf(x* M_PI_F))
SOFTMETAL_FLOAT1(sinpi, sinf(x* M_PI_F))
SOFTMETAL_FLOAT1(tanpi, tanf(x* M_PI_F))
SOFTMETAL_FLOAT1(saturate, __builtin_fminf(__builtin_fmaxf(x, 0.0f), 1.0f))
SOFTMETAL_FLOAT1(sign, x > 0.0f ? 1.0f : (x < 0.0f ? -1.0f : 0.0f * x))
SOFTMETAL_FLOAT2(atan2, atan2f(x, y))
SOFTMETAL_FLOAT2(fmax, __builtin_fmaxf(x, y))
SOFTMETAL_FLOAT2(fmin, __builtin_fminf(x, y))
SOFTMETAL_FLOAT2(fmod, fmodf(x, y))
SOFTMETAL_FLOAT2(pow, powf(x, y))
SOFTMETAL_FLOAT2(powr, powf(x, y))
SOFTMETAL_FLOAT2(divide, x / y)
SOFTMETAL_FLOAT2(copysign, __builtin_copysignf(x, y))
SOFTMETAL_FLOAT2(fdim, __builtin_fmaxf(x - y, 0.0f))
SOFTMETAL_FLOAT2(nextafter, nextafterf(x, y))
SOFTMETAL_FLOAT2(step, y < x ? 0.0f : 1.0f)
SOFTMETAL_FLOAT3(fma, __builtin_fmaf(x, y, z))
SOFTMETAL_FLOAT3(mix, x + (y - x) * z)
SOFTMETAL_FLOAT3(fmax3, __builtin_fmaxf(__builtin_fmaxf(x, y), z))
SOFTMETAL_FLOAT3(fmin3, __builtin_fminf(__builtin_fminf(x, y), z))
SOFTMETAL_FLOAT3(fmedian3, __builtin_fmaxf(__builtin_fminf(x, y), __builtin_fminf(__builtin_fmaxf(x, y), z)))
METAL_FUNC float __metal_ldexp(float x, int exponent, int = 0) { return ldexpf(x, exponent); }
METAL_FUNC float __metal_frexp(float x, __private int* exponent, int = 0) {
  uint bits = as_type<uint>(x);
  *exponent = 0;
  if (x == 0.0f || (bits & 0x7F800000u) == 0x7F800000u) {
    return x;
  }
  if ((bits & 0x7F800000u) == 0u) {
    bits = as_type<uint>(x * 0x1p24f);
    *exponent = -24;
  }
  *exponent += static_cast<int>((bits >> 23) & 0xFFu) - 126;
  return as_type<float>((bits & 0x807FFFFFu) | 0x3F000000u);
}

namespace metal {

#define SOFTMETAL_COMPONENTS(T, CALL) \
  vec<T, N> result;                   \
  for (int i = 0; i < N; i++) {       \
    result[i] = static_cast<T>(CALL); \
  }                                   \
  return result;
#define SOFTMETAL_UNARY(NAME)                                                                       \
  METAL_FUNC float NAME(float x) { return __metal_##NAME(x); }                                      \
  METAL_FUNC half NAME(half x) { return static_cast<half>(__metal_##NAME(static_cast<float>(x))); } \
  template <class T, int N>                                                                         \
  METAL_FUNC enable_if_t<is_floating_point_v<T>, vec<T, N>> NAME(vec<T, N> x) {                     \
    SOFTMETAL_COMPONENTS(T, __metal_##NAME(static_cast<float>(x[i])))                               \
  }
#define SOFTMETAL_BINARY(NAME)                                                                  \
  METAL_FUNC float NAME(float x, float y) { return __metal_##NAME(x, y); }                      \
  METAL_FUNC half NAME(half x, half y) {                                                        \
    return static_cast<half>(__metal_##NAME(static_cast<float>(x), static_cast<float>(y)));     \
  }                                                                                             \
  template <class T, int N>                                                                     \
  METAL_FUNC enable_if_t<is_floating_point_v<T>, vec<T, N>> NAME(vec<T, N> x, vec<T, N> y) {    \
    SOFTMETAL_COMPONENTS(T, __metal_##NAME(static_cast<float>(x[i]), static_cast<float>(y[i]))) \
  }                                                                                             \
  template <class T, int N, class S>                                                            \
  METAL_FUNC enable_if_t<is_arithmetic_v<S>, vec<T, N>> NAME(vec<T, N> x, S y) {                \
    return NAME(x, static_cast<vec<T, N>>(static_cast<T>(y)));                                  \
  }                                                                                             \
  template <class T, int N, class S>                                                            \
  METAL_FUNC enable_if_t<is_arithmetic_v<S>, vec<T, N>> NAME(S x, vec<T, N> y) {                \
    return NAME(static_cast<vec<T, N>>(static_cast<T>(x)), y);                                  \
  }
#define SOFTMETAL_TERNARY(NAME)                                                                                    \
  METAL_FUNC float NAME(float x, float y, float z) { return __metal_##NAME(x, y, z); }                             \
  METAL_FUNC half NAME(half x, half y, half z) {                                                                   \
    return static_cast<half>(__metal_##NAME(static_cast<float>(x), static_cast<float>(y), static_cast<float>(z))); \
  }                                                                                                                \
  template <class T, int N>                                                                                        \
  METAL_FUNC enable_if_t<is_floating_point_v<T>, vec<T, N>> NAME(vec<T, N> x, vec<T, N> y, vec<T, N> z) {          \
    SOFTMETAL_COMPONENTS(                                                                                          \
        T, __metal_##NAME(static_cast<float>(x[i]), static_cast<float>(y[i]), static_cast<float>(z[i])))           \
  }                                                                                                                \
  template <class T, int N, class S>                                                                               \
  METAL_FUNC enable_if_t<is_arithmetic_v<S>, vec<T, N>> NAME(vec<T, N> x, vec<T, N> y, S z) {                      \
    return NAME(x, y, static_cast<vec<T, N>>(static_cast<T>(z)));                                                  \
  }
// clang-format off
#define SOFTMETAL_FUNCTIONS(X1, X2, X3)                                                                     \
  SOFTMETAL_LIBM(X1)                                                                                        \
  X1(fabs) X1(sqrt) X1(rsqrt) X1(floor) X1(ceil) X1(trunc) X1(rint) X1(fract) X1(cospi) X1(sinpi) X1(tanpi) \
  X1(saturate) X1(sign) X2(atan2) X2(fmax) X2(fmin) X2(fmod) X2(pow) X2(powr) X2(divide) X2(copysign)       \
  X2(fdim) X2(nextafter) X2(step) X3(fma) X3(mix) X3(fmax3) X3(fmin3) X3(fmedian3)
// clang-format on

SOFTMETAL_FUNCTIONS(SOFTMETAL_UNARY, SOFTMETAL_BINARY, SOFTMETAL_TERNARY)
namespace fast {
SOFTMETAL_FUNCTIONS(SOFTMETAL_UNARY, SOFTMETAL_BINARY, SOFTMETAL_TERNARY)
}
namespace precise {
SOFTMETAL_FUNCTIONS(SOFTMETAL_UNARY, SOFTMETAL_BINARY, SOFTMETAL_TERNARY)
}

METAL_FUNC float ldexp(float x, int exponent) { return ldexpf(x, exponent); }
METAL_FUNC half ldexp(half x, int exponent) { return static_cast<half>(ldexpf(static_cast<float>(x), exponent)); }
METAL_FUNC float frexp(float x, __private int& exponent) { return __metal_frexp(x, &exponent); }
METAL_FUNC float modf(float x, __private float& whole) {
  whole = __builtin_truncf(x);
  return x - whole;
}
METAL_FUNC float sincos(float x, __private float& cosine) {
  cosine = cosf(x);
  return sinf(x);
}

// --- Common functions of all scalars ---

#define SOFTMETAL_ORDERED(T)                                                          \
  METAL_FUNC constexpr T min(T a, T b) { return b < a ? b : a; }                      \
  METAL_FUNC constexpr T max(T a, T b) { return a < b ? b : a; }                      \
  METAL_FUNC constexpr T clamp(T x, T low, T high) { return min(max(x, low), high); } \
  METAL_FUNC constexpr T min3(T a, T b, T c) { return min(min(a, b), c); }            \
  METAL_FUNC constexpr T max3(T a, T b, T c) { return max(max(a, b), c); }            \
  METAL_FUNC constexpr T select(T a, T b, bool c) { return c ? b : a; }
#define SOFTMETAL_SIGNED(T) \
  METAL_FUNC constexpr T abs(T a) { return static_cast<T>(a < static_cast<T>(0) ? -a : a); }
#define SOFTMETAL_UNSIGNED(T) \
  METAL_FUNC constexpr T abs(T a) { return a; }
SOFTMETAL_ORDERED(char)
SOFTMETAL_ORDERED(int8_t)
SOFTMETAL_ORDERED(uchar)
SOFTMETAL_ORDERED(short)
SOFTMETAL_ORDERED(ushort)
SOFTMETAL_ORDERED(int)
SOFTMETAL_ORDERED(uint)
SOFTMETAL_ORDERED(long)
SOFTMETAL_ORDERED(ulong)
SOFTMETAL_SIGNED(char)
SOFTMETAL_SIGNED(int8_t)
SOFTMETAL_SIGNED(short)
SOFTMETAL_SIGNED(int)
SOFTMETAL_SIGNED(long)
SOFTMETAL_UNSIGNED(uchar)
SOFTMETAL_UNSIGNED(ushort)
SOFTMETAL_UNSIGNED(uint)
SOFTMETAL_UNSIGNED(ulong)
#define SOFTMETAL_REAL(T)                                                             \
  METAL_FUNC T min(T a, T b) { return fmin(a, b); }                                   \
  METAL_FUNC T max(T a, T b) { return fmax(a, b); }                                   \
  METAL_FUNC T clamp(T x, T low, T high) { return min(max(x, low), high); }           \
  METAL_FUNC T min3(T a, T b, T c) { return min(min(a, b), c); }                      \
  METAL_FUNC T max3(T a, T b, T c) { return max(max(a, b), c); }                      \
  METAL_FUNC T select(T a, T b, bool c) { return c ? b : a; }                         \
  METAL_FUNC T abs(T a) { return fabs(a); }                                           \
  METAL_FUNC bool isnan(T a) { return a != a; }                                       \
  METAL_FUNC bool isinf(T a) { return __builtin_isinf(static_cast<float>(a)); }       \
  METAL_FUNC bool isfinite(T a) { return __builtin_isfinite(static_cast<float>(a)); } \
  METAL_FUNC bool isnormal(T a) { return __builtin_isnormal(static_cast<float>(a)); } \
  METAL_FUNC bool signbit(T a) { return as_type<uint>(static_cast<float>(a)) >> 31; }
SOFTMETAL_REAL(float)
SOFTMETAL_REAL(half)
#undef SOFTMETAL_ORDERED
#undef SOFTMETAL_SIGNED
#undef SOFTMETAL_UNSIGNED
#undef SOFTMETAL_REAL

template <class T, int N>
METAL_FUNC vec<T, N> min(vec<T, N> a, vec<T, N> b) {
  SOFTMETAL_COMPONENTS(T, min(a[i], b[i]))
}
template <class T, int N>
METAL_FUNC vec<T, N> max(vec<T, N> a, vec<T, N> b) {
  SOFTMETAL_COMPONENTS(T, max(a[i], b[i]))
}
template <class T, int N>
METAL_FUNC vec<T, N> clamp(vec<T, N> x, vec<T, N> low, vec<T, N> high) {
  SOFTMETAL_COMPONENTS(T, min(max(x[i], low[i]), high[i]))
}
template <class T, int N, class S>
METAL_FUNC enable_if_t<is_arithmetic_v<S>, vec<T, N>> min(vec<T, N> a, S b) {
  SOFTMETAL_COMPONENTS(T, min(a[i], static_cast<T>(b)))
}
template <class T, int N, class S>
METAL_FUNC enable_if_t<is_arithmetic_v<S>, vec<T, N>> min(S a, vec<T, N> b) {
  SOFTMETAL_COMPONENTS(T, min(static_cast<T>(a), b[i]))
}
template <class T, int N, class S>
METAL_FUNC enable_if_t<is_arithmetic_v<S>, vec<T, N>> max(vec<T, N> a, S b) {
  SOFTMETAL_COMPONENTS(T, max(a[i], static_cast<T>(b)))
}
template <class T, int N, class S>
METAL_FUNC enable_if_t<is_arithmetic_v<S>, vec<T, N>> max(S a, vec<T, N> b) {
  SOFTMETAL_COMPONENTS(T, max(static_cast<T>(a), b[i]))
}
template <class T, int N, class S>
METAL_FUNC enable_if_t<is_arithmetic_v<S>, vec<T, N>> clamp(vec<T, N> x, S low, S high){
    SOFTMETAL_COMPONENTS(T, min(max(x[i], static_cast<T>(low)), static_cast<T>(high)))} METAL_FUNC
    float smoothstep(float low, float high, float x) {
  float t = clamp((x - low) / (high - low), 0.0f, 1.0f);
  return t * t * (3.0f - 2.0f * t);
}
template <class T, int N>
METAL_FUNC vec<T, N> abs(vec<T, N> a) {
  SOFTMETAL_COMPONENTS(T, abs(a[i]))
}
// A comparison of vectors gives integers, all bits set where it holds.
template <class T, class C, int N>
METAL_FUNC vec<T, N> select(vec<T, N> a, vec<T, N> b, vec<C, N> condition) {
  SOFTMETAL_COMPONENTS(T, condition[i] ? b[i] : a[i])
}
template <int N>
METAL_FUNC vec<int, N> __mask(__bool_vector<N> condition) {
  SOFTMETAL_COMPONENTS(int, condition[i])
}
template <class C, int N>
METAL_FUNC bool any(vec<C, N> condition) {
  bool result = false;
  for (int i = 0; i < N; i++) {
    result = result || condition[i];
  }
  return result;
}
template <class C, int N>
METAL_FUNC bool all(vec<C, N> condition) {
  bool result = true;
  for (int i = 0; i < N; i++) {
    result = result && condition[i];
  }
  return result;
}
template <class T, int N>
METAL_FUNC vec<T, N> select(vec<T, N> a, vec<T, N> b, __bool_vector<N> condition) {
  SOFTMETAL_COMPONENTS(T, condition[i] ? b[i] : a[i])
}
template <int N>
METAL_FUNC bool any(__bool_vector<N> condition) {
  return any(static_cast<vec<int, N>>(0) != __mask(condition));
}
template <int N>
METAL_FUNC bool all(__bool_vector<N> condition) {
  return all(static_cast<vec<int, N>>(0) != __mask(condition));
}
template <class T, int N>
METAL_FUNC vec<int, N> isnan(vec<T, N> a) {
  return __builtin_convertvector(a != a, vec<int, N>);
}
template <class T, int N>
METAL_FUNC T dot(vec<T, N> a, vec<T, N> b) {
  T result = a[0] * b[0];
  for (int i = 1; i < N; i++) {
    result += a[i] * b[i];
  }
  return result;
}
template <class T, int N>
METAL_FUNC T length_squared(vec<T, N> a) {
  return dot(a, a);
}
template <class T, int N>
METAL_FUNC T length(vec<T, N> a) {
  return sqrt(dot(a, a));
}
template <class T, int N>
METAL_FUNC vec<T, N> normalize(vec<T, N> a) {
  return a * rsqrt(dot(a, a));
}

// --- Integers ---

#define SOFTMETAL_INTEGER(T, U)                                                                                     \
  METAL_FUNC T popcount(T a) { return static_cast<T>(__builtin_popcountl(static_cast<ulong>(static_cast<U>(a)))); } \
  METAL_FUNC T clz(T a) {                                                                                           \
    U bits = static_cast<U>(a);                                                                                     \
    return static_cast<T>(                                                                                          \
        bits ? __builtin_clzl(static_cast<ulong>(bits)) - (64 - 8 * static_cast<int>(sizeof(T)))                    \
             : 8 * static_cast<int>(sizeof(T)));                                                                    \
  }                                                                                                                 \
  METAL_FUNC T ctz(T a) {                                                                                           \
    U bits = static_cast<U>(a);                                                                                     \
    return static_cast<T>(bits ? __builtin_ctzl(static_cast<ulong>(bits)) : 8 * static_cast<int>(sizeof(T)));       \
  }                                                                                                                 \
  METAL_FUNC T reverse_bits(T a) {                                                                                  \
    return static_cast<T>(                                                                                          \
        static_cast<U>(__builtin_bitreverse64(static_cast<ulong>(static_cast<U>(a))) >> (64 - 8 * sizeof(T))));     \
  }                                                                                                                 \
  METAL_FUNC T rotate(T a, T count) {                                                                               \
    constexpr uint width = 8 * sizeof(T);                                                                           \
    uint shift = static_cast<uint>(count) % width;                                                                  \
    U bits = static_cast<U>(a);                                                                                     \
    return static_cast<T>(shift ? static_cast<U>(bits << shift | bits >> (width - shift)) : bits);                  \
  }                                                                                                                 \
  METAL_FUNC T extract_bits(T a, uint offset, uint count) {                                                         \
    constexpr uint width = 8 * sizeof(T);                                                                           \
    return static_cast<T>(                                                                                          \
        count ? static_cast<T>(static_cast<U>(a) << (width - offset - count)) >> (width - count) : 0);              \
  }                                                                                                                 \
  METAL_FUNC T insert_bits(T base, T insert, uint offset, uint count) {                                             \
    U mask = static_cast<U>(count < 64 ? (1ul << count) - 1 : ~0ul) << offset;                                      \
    return static_cast<T>((static_cast<U>(base) & ~mask) | (static_cast<U>(insert) << offset & mask));              \
  }
SOFTMETAL_INTEGER(uchar, uchar)
SOFTMETAL_INTEGER(ushort, ushort)
SOFTMETAL_INTEGER(short, ushort)
SOFTMETAL_INTEGER(int, uint)
SOFTMETAL_INTEGER(uint, uint)
SOFTMETAL_INTEGER(long, ulong)
SOFTMETAL_INTEGER(ulong, ulong)
#undef SOFTMETAL_INTEGER
METAL_FUNC uint absdiff(int a, int b) { return a < b ? static_cast<uint>(b) - a : static_cast<uint>(a) - b; }
METAL_FUNC uint absdiff(uint a, uint b) { return a < b ? b - a : a - b; }
METAL_FUNC int mulhi(int a, int b) { return static_cast<int>((static_cast<long>(a) * b) >> 32); }
METAL_FUNC uint mulhi(uint a, uint b) { return static_cast<uint>((static_cast<ulong>(a) * b) >> 32); }
METAL_FUNC int mad24(int a, int b, int c) { return a * b + c; }
METAL_FUNC int mul24(int a, int b) { return a * b; }

#undef SOFTMETAL_COMPONENTS

}  // namespace metal
