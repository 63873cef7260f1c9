// Scalar and vector types, type traits, limits, casts, barriers.
#pragma once
#include <softmetal/macros.h>
#pragma OPENCL EXTENSION cl_khr_fp16 : enable
#pragma OPENCL EXTENSION __cl_clang_function_pointers : enable

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef signed char int8_t;
typedef short int16_t;
typedef int int32_t;
typedef long int64_t;
typedef uchar uint8_t;
typedef ushort uint16_t;
typedef uint uint32_t;
typedef ulong uint64_t;
typedef ulong size_t;
typedef long ptrdiff_t;
typedef ulong uintptr_t;
typedef __bf16 bfloat;

namespace metal {

template <class T, int N>
using vec = T __attribute__((ext_vector_type(N)));

// --- Type traits ---

template <class T, T v>
struct integral_constant {
  static constexpr __constant T value = v;
  typedef T value_type;
  typedef integral_constant type;
  constexpr operator T() const { return v; }
};
template <bool B>
using bool_constant = integral_constant<bool, B>;
typedef bool_constant<true> true_type;
typedef bool_constant<false> false_type;

template <bool B, class T = void>
struct enable_if {};
template <class T>
struct enable_if<true, T> {
  typedef T type;
};
template <bool B, class T = void>
using enable_if_t = typename enable_if<B, T>::type;

template <bool B, class T, class F>
struct conditional {
  typedef T type;
};
template <class T, class F>
struct conditional<false, T, F> {
  typedef F type;
};
template <bool B, class T, class F>
using conditional_t = typename conditional<B, T, F>::type;

template <class... T>
struct disjunction : false_type {};
template <class A, class... Rest>
struct disjunction<A, Rest...> : conditional_t<A::value, true_type, disjunction<Rest...>> {};
template <class... T>
using _disjunction = disjunction<T...>;

template <class A, class B>
struct is_same : false_type {};
template <class A>
struct is_same<A, A> : true_type {};
template <class A, class B>
constexpr __constant bool is_same_v = is_same<A, B>::value;
template <class A, class B>
struct is_convertible : bool_constant<__is_convertible_to(A, B)> {};
template <class A, class B>
constexpr __constant bool is_convertible_v = is_convertible<A, B>::value;
template <class A, class B>
struct is_base_of : bool_constant<__is_base_of(A, B)> {};
template <class T>
struct is_enum : bool_constant<__is_enum(T)> {};
template <class T>
struct is_class : bool_constant<__is_class(T)> {};

template <class T>
struct remove_const {
  typedef T type;
};
template <class T>
struct remove_const<const T> {
  typedef T type;
};
template <class T>
struct remove_volatile {
  typedef T type;
};
template <class T>
struct remove_volatile<volatile T> {
  typedef T type;
};
template <class T>
struct remove_cv {
  typedef typename remove_volatile<typename remove_const<T>::type>::type type;
};
template <class T>
using remove_cv_t = typename remove_cv<T>::type;

template <class T>
struct remove_addrspace {
  typedef T type;
};
template <class T>
struct remove_reference {
  typedef T type;
};
template <class T>
struct remove_reference<T&> {
  typedef T type;
};
template <class T>
struct remove_pointer {
  typedef T type;
};
#define SOFTMETAL_SPACE(SPACE)        \
  template <class T>                  \
  struct remove_addrspace<SPACE T> {  \
    typedef T type;                   \
  };                                  \
  template <class T>                  \
  struct remove_reference<SPACE T&> { \
    typedef T type;                   \
  };                                  \
  template <class T>                  \
  struct remove_pointer<SPACE T*> {   \
    typedef T type;                   \
  };
SOFTMETAL_SPACE(__global)
SOFTMETAL_SPACE(__local)
SOFTMETAL_SPACE(__constant)
SOFTMETAL_SPACE(__private)
#undef SOFTMETAL_SPACE
template <class T>
using remove_addrspace_t = typename remove_addrspace<T>::type;
template <class T>
using remove_reference_t = typename remove_reference<T>::type;
template <class T>
using remove_pointer_t = typename remove_pointer<T>::type;
template <class T>
using decay_t = remove_cv_t<remove_addrspace_t<remove_reference_t<T>>>;

// A scalar's code in the runtime (with_type in runtime.cpp); -1: no simdgroup operation takes it.
template <class T>
struct __scalar {
  static constexpr __constant bool is_integer = false, is_float = false;
  static constexpr __constant int code = -1;
};
#define SOFTMETAL_SCALAR(T, INTEGER, CODE)                                      \
  template <>                                                                   \
  struct __scalar<T> {                                                          \
    static constexpr __constant bool is_integer = INTEGER, is_float = !INTEGER; \
    static constexpr __constant int code = CODE;                                \
  };
SOFTMETAL_SCALAR(bool, true, -1)
SOFTMETAL_SCALAR(char, true, 0)
SOFTMETAL_SCALAR(int8_t, true, 0)
SOFTMETAL_SCALAR(uchar, true, 1)
SOFTMETAL_SCALAR(short, true, 2)
SOFTMETAL_SCALAR(ushort, true, 3)
SOFTMETAL_SCALAR(int, true, 4)
SOFTMETAL_SCALAR(uint, true, 5)
SOFTMETAL_SCALAR(long, true, -1)
SOFTMETAL_SCALAR(ulong, true, -1)
SOFTMETAL_SCALAR(float, false, 6)
SOFTMETAL_SCALAR(half, false, 7)
SOFTMETAL_SCALAR(bfloat, false, 8)
#undef SOFTMETAL_SCALAR

template <class T>
struct is_integral : bool_constant<__scalar<remove_cv_t<T>>::is_integer> {};
template <class T>
constexpr __constant bool is_integral_v = is_integral<T>::value;
template <class T>
struct is_floating_point : bool_constant<__scalar<remove_cv_t<T>>::is_float> {};
template <class T>
constexpr __constant bool is_floating_point_v = is_floating_point<T>::value;
template <class T>
struct is_arithmetic : bool_constant<is_integral<T>::value || is_floating_point<T>::value> {};
template <class T>
constexpr __constant bool is_arithmetic_v = is_arithmetic<T>::value;
template <class T>
struct is_scalar : is_arithmetic<T> {};
template <class T>
constexpr __constant bool is_scalar_v = is_scalar<T>::value;
template <class T>
struct is_unsigned : bool_constant<is_integral<T>::value && (T(-1) > T(0))> {};
template <class T>
struct is_signed : bool_constant<is_arithmetic<T>::value && !(T(-1) > T(0))> {};

template <class T>
constexpr __constant bool is_unsigned_v = is_unsigned<T>::value;
template <class T>
constexpr __constant bool is_signed_v = is_signed<T>::value;
template <class A, class B>
constexpr __constant bool is_base_of_v = is_base_of<A, B>::value;
template <class T>
constexpr __constant bool is_enum_v = is_enum<T>::value;
template <class T>
constexpr __constant bool is_class_v = is_class<T>::value;

// Element type and number of components of a scalar or vector.
template <class T>
struct __shape {
  typedef T element;
  static constexpr __constant int size = 1;
};
template <class T, int N>
struct __shape<T __attribute__((ext_vector_type(N)))> {
  typedef T element;
  static constexpr __constant int size = N;
};
template <class T>
struct make_scalar {
  typedef typename __shape<T>::element type;
};
template <class T>
using make_scalar_t = typename make_scalar<T>::type;
template <class T>
struct is_vector : bool_constant<(__shape<T>::size > 1)> {};

// --- Limits ---

template <class T>
struct numeric_limits {
  static constexpr T max() {
    return static_cast<T>(-1) > static_cast<T>(0) ? static_cast<T>(-1)
                                                  : static_cast<T>((1ul << (sizeof(T) * 8 - 1)) - 1);
  }
  static constexpr T min() {
    return static_cast<T>(-1) > static_cast<T>(0) ? static_cast<T>(0) : static_cast<T>(1ul << (sizeof(T) * 8 - 1));
  }
  static constexpr T lowest() { return min(); }
};
#define SOFTMETAL_LIMITS(T, MAX, MIN, EPSILON, DIGITS)                            \
  template <>                                                                     \
  struct numeric_limits<T> {                                                      \
    static constexpr __constant int digits = DIGITS;                              \
    static constexpr T max() { return static_cast<T>(MAX); }                      \
    static constexpr T min() { return static_cast<T>(MIN); }                      \
    static constexpr T lowest() { return static_cast<T>(-MAX); }                  \
    static constexpr T epsilon() { return static_cast<T>(EPSILON); }              \
    static constexpr T infinity() { return static_cast<T>(__builtin_inff()); }    \
    static constexpr T quiet_NaN() { return static_cast<T>(__builtin_nanf("")); } \
  };
SOFTMETAL_LIMITS(float, FLT_MAX, FLT_MIN, FLT_EPSILON, 24)
SOFTMETAL_LIMITS(half, 65504.0f, 6.103515625e-5f, 9.765625e-4f, 11)
SOFTMETAL_LIMITS(bfloat, 3.38953138925153547590e38f, FLT_MIN, 7.8125e-3f, 8)
#undef SOFTMETAL_LIMITS

// --- Arrays and vectors of bool ---

#define SOFTMETAL_ARRAY
template <class T, size_t N>
struct array {
  T elements[N];
  constexpr T operator[](size_t i) const { return elements[i]; }
  constexpr T operator[](size_t i) const __constant { return elements[i]; }
  constexpr __private T& operator[](size_t i) __private { return elements[i]; }
  constexpr __local T& operator[](size_t i) __local { return elements[i]; }
  constexpr __global T& operator[](size_t i) __global { return elements[i]; }
  static constexpr size_t size() { return N; }
};

// clang has no vectors of bool; comparisons give vectors of integers, which convert.
template <int N>
struct __bool_vector;
template <int N>
struct __bool_members {
  union {
    struct {
      bool x, y, z, w;
    };
    bool values[4];
  };
};
template <>
struct __bool_members<2> {
  union {
    struct {
      bool x, y;
    };
    bool values[2];
  };
};
template <int N>
struct __bool_vector : __bool_members<N> {
  __bool_vector() = default;
  METAL_FUNC __bool_vector(bool all) {
    for (int i = 0; i < N; i++) {
      this->values[i] = all;
    }
  }
  template <class... B>
  METAL_FUNC __bool_vector(bool first, bool second, B... rest) {
    static_assert(sizeof...(B) + 2 == N, "give all components");
    const bool given[] = {first, second, static_cast<bool>(rest)...};
    for (int i = 0; i < N; i++) {
      this->values[i] = given[i];
    }
  }
  template <class T>
  METAL_FUNC __bool_vector(vec<T, N> source) {
    for (int i = 0; i < N; i++) {
      this->values[i] = source[i] != 0;
    }
  }
  METAL_FUNC bool operator[](int i) const { return this->values[i]; }
  METAL_FUNC __private bool& operator[](int i) __private { return this->values[i]; }
  METAL_FUNC __bool_vector operator!() const {
    __bool_vector result;
    for (int i = 0; i < N; i++) {
      result.values[i] = !this->values[i];
    }
    return result;
  }
};
#define SOFTMETAL_BOOL_OPERATOR(OPERATOR)                                                 \
  template <int N>                                                                        \
  METAL_FUNC __bool_vector<N> operator OPERATOR(__bool_vector<N> a, __bool_vector<N> b) { \
    for (int i = 0; i < N; i++) {                                                         \
      a[i] = a[i] OPERATOR b[i];                                                          \
    }                                                                                     \
    return a;                                                                             \
  }
SOFTMETAL_BOOL_OPERATOR(&&)
SOFTMETAL_BOOL_OPERATOR(||)
SOFTMETAL_BOOL_OPERATOR(&)
SOFTMETAL_BOOL_OPERATOR(|)
SOFTMETAL_BOOL_OPERATOR(==)
SOFTMETAL_BOOL_OPERATOR(!=)
#undef SOFTMETAL_BOOL_OPERATOR

}  // namespace metal

typedef metal::__bool_vector<2> bool2;
typedef metal::__bool_vector<3> bool3;
typedef metal::__bool_vector<4> bool4;

// --- Casts and constructors; the rewriter turns `static_cast`, `half(x)`, `bfloat(x)` and `float4(...)` into these ---

// clang has no conversion between half and __bf16; MSL has the explicit one.
template <class D, class S>
METAL_FUNC constexpr D __softmetal_cast(S source) {
  using metal::is_same_v;
  typedef metal::remove_cv_t<D> Target;
  if constexpr (
      (is_same_v<Target, bfloat> && is_same_v<S, half>) || (is_same_v<Target, half> && is_same_v<S, bfloat>)) {
    return static_cast<D>(static_cast<float>(source));
  } else if constexpr (metal::__shape<Target>::size > 1 && metal::__shape<S>::size > 1) {
    return __builtin_convertvector(source, D);
  } else {
    return static_cast<D>(source);
  }
}

template <class V, class A>
METAL_FUNC void __softmetal_append(__private V& target, __private int& next, A value) {
  typedef typename metal::__shape<V>::element T;
  if constexpr (metal::__shape<A>::size == 1) {
    target[next++] = static_cast<T>(value);
  } else {
    for (int i = 0; i < metal::__shape<A>::size; i++) {
      target[next++] = static_cast<T>(value[i]);
    }
  }
}

template <class V, class... A>
METAL_FUNC constexpr V __softmetal_make(A... values) {
  typedef typename metal::__shape<V>::element T;
  constexpr int size = metal::__shape<V>::size;
  if constexpr (size == 1 && sizeof...(A) > 1) {
    return V(values...);
  } else if constexpr (size == 1 || (sizeof...(A) == 1 && (metal::__shape<A>::size + ...) == size)) {
    return __softmetal_cast<V>(values...);
  } else if constexpr (sizeof...(A) == 1) {
    return (V)((static_cast<T>(values), ...));
  } else if constexpr (sizeof...(A) == size) {
    return V{static_cast<T>(values)...};
  } else {
    static_assert((metal::__shape<A>::size + ...) == size, "wrong number of components");
    V result;
    int next = 0;
    (__softmetal_append(result, next, values), ...);
    return result;
  }
}

// `(float4)x`: the rewriter makes `__softmetal_as<float4>{} ->* x` of it, whose operator binds like a cast.
template <class V>
struct __softmetal_as {};
template <class V, class A>
METAL_FUNC constexpr V operator->*(__softmetal_as<V>, A value) {
  return __softmetal_make<V>(value);
}
template <class V>
struct __softmetal_minus {};
template <class V>
METAL_FUNC constexpr __softmetal_minus<V> operator-(__softmetal_as<V>) {
  return {};
}
template <class V, class A>
METAL_FUNC constexpr V operator->*(__softmetal_minus<V>, A value) {
  return -__softmetal_make<V>(value);
}

// `float4 v = {0}`: components that are not given are zero.
template <class V, class... A>
METAL_FUNC constexpr V __softmetal_fill(A... values) {
  typedef typename metal::__shape<V>::element T;
  if constexpr (sizeof...(A) == metal::__shape<V>::size) {
    return V{static_cast<T>(values)...};
  } else {
    V result = static_cast<T>(0);
    int next = 0;
    (__softmetal_append(result, next, values), ...);
    return result;
  }
}

#define SOFTMETAL_VECTOR(T)      \
  typedef metal::vec<T, 2> T##2; \
  typedef metal::vec<T, 3> T##3; \
  typedef metal::vec<T, 4> T##4;
SOFTMETAL_VECTOR(char)
SOFTMETAL_VECTOR(uchar)
SOFTMETAL_VECTOR(short)
SOFTMETAL_VECTOR(ushort)
SOFTMETAL_VECTOR(int)
SOFTMETAL_VECTOR(uint)
SOFTMETAL_VECTOR(long)
SOFTMETAL_VECTOR(ulong)
SOFTMETAL_VECTOR(float)
SOFTMETAL_VECTOR(half)
SOFTMETAL_VECTOR(bfloat)
#undef SOFTMETAL_VECTOR

// Aligned as their scalar.
#define SOFTMETAL_PACKED(T)                                                                        \
  typedef T packed_##T##2 __attribute__((ext_vector_type(2))) __attribute__((aligned(sizeof(T)))); \
  typedef T packed_##T##4 __attribute__((ext_vector_type(4))) __attribute__((aligned(sizeof(T))));
SOFTMETAL_PACKED(char)
SOFTMETAL_PACKED(uchar)
SOFTMETAL_PACKED(short)
SOFTMETAL_PACKED(ushort)
SOFTMETAL_PACKED(int)
SOFTMETAL_PACKED(uint)
SOFTMETAL_PACKED(float)
SOFTMETAL_PACKED(half)
SOFTMETAL_PACKED(bfloat)
#undef SOFTMETAL_PACKED

// Three scalars; clang's vectors of three are as wide as four.
template <class T>
struct __packed3 {
  T x, y, z;
  __packed3() = default;
  METAL_FUNC __packed3(T x_, T y_, T z_) : x(x_), y(y_), z(z_) {}
  METAL_FUNC __packed3(metal::vec<T, 3> v) : x(v.x), y(v.y), z(v.z) {}
  METAL_FUNC operator metal::vec<T, 3>() const { return metal::vec<T, 3>{x, y, z}; }
  METAL_FUNC operator metal::vec<T, 3>() const __constant { return metal::vec<T, 3>{x, y, z}; }
  METAL_FUNC T operator[](int i) const { return i == 0 ? x : i == 1 ? y : z; }
  METAL_FUNC T operator[](int i) const __constant { return i == 0 ? x : i == 1 ? y : z; }
};
typedef __packed3<char> packed_char3;
typedef __packed3<uchar> packed_uchar3;
typedef __packed3<short> packed_short3;
typedef __packed3<ushort> packed_ushort3;
typedef __packed3<int> packed_int3;
typedef __packed3<uint> packed_uint3;
typedef __packed3<float> packed_float3;
typedef __packed3<half> packed_half3;
typedef __packed3<bfloat> packed_bfloat3;

template <class D, class S>
METAL_FUNC constexpr D as_type(S source) {
  static_assert(sizeof(D) == sizeof(S), "as_type needs types of one size");
  return __builtin_bit_cast(D, source);
}

// --- Runtime. Addresses travel as integers, so that no address space leaks. ---

extern "C" {
ulong __softmetal_threadgroup_variable(int id, ulong size);
uint __softmetal_lane(void) METAL_CONST;
uint __softmetal_builtin(int which, int component) METAL_CONST;
ulong __softmetal_buffer_argument(uint index) METAL_CONST;
ulong __softmetal_threadgroup_argument(uint index) METAL_CONST;
ulong __softmetal_constant_address(int slot);
bool __softmetal_constant_is_defined(int slot);
void __softmetal_set_constant(int slot, ulong value, uint size);
SOFTMETAL_COLLECTIVE void __softmetal_threadgroup_barrier(uint flags);
SOFTMETAL_COLLECTIVE void __softmetal_simdgroup_barrier(uint flags);
}

// A value of at most eight bytes as a word, and back: what stays in registers needs no check.
template <class T>
METAL_FUNC ulong __to_word(T value) {
  if constexpr (sizeof(T) == 8) {
    return __builtin_bit_cast(ulong, value);
  } else if constexpr (sizeof(T) == 4) {
    return __builtin_bit_cast(uint, value);
  } else if constexpr (sizeof(T) == 2) {
    return __builtin_bit_cast(ushort, value);
  } else {
    return __builtin_bit_cast(uchar, value);
  }
}
template <class T>
METAL_FUNC T __from_word(ulong word) {
  if constexpr (sizeof(T) == 8) {
    return __builtin_bit_cast(T, word);
  } else if constexpr (sizeof(T) == 4) {
    return __builtin_bit_cast(T, static_cast<uint>(word));
  } else if constexpr (sizeof(T) == 2) {
    return __builtin_bit_cast(T, static_cast<ushort>(word));
  } else {
    return __builtin_bit_cast(T, static_cast<uchar>(word));
  }
}

template <class T>
METAL_FUNC T __softmetal_constant(int slot) {
  return *(__global const T*)__softmetal_constant_address(slot);
}

namespace metal {

using ::as_type;

enum class mem_flags : uint {
  mem_none = 0,
  mem_device = 1,
  mem_threadgroup = 2,
  mem_texture = 4,
  mem_threadgroup_imageblock = 8
};
constexpr mem_flags operator|(mem_flags a, mem_flags b) {
  return static_cast<mem_flags>(static_cast<uint>(a) | static_cast<uint>(b));
}

// The same value in all threads; nothing more to a CPU.
template <class T>
using uniform = T;
template <class T>
METAL_FUNC constexpr T make_uniform(T value) {
  return value;
}

METAL_FUNC void threadgroup_barrier(mem_flags flags) { __softmetal_threadgroup_barrier(static_cast<uint>(flags)); }
METAL_FUNC void simdgroup_barrier(mem_flags flags) { __softmetal_simdgroup_barrier(static_cast<uint>(flags)); }

}  // namespace metal
