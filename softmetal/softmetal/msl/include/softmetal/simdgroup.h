// Operations of a simdgroup and of a quadgroup. The functions are inlined, so that the runtime sees each call's place.
#pragma once

extern "C" {
SOFTMETAL_COLLECTIVE void __softmetal_simd_reduce(
    int operation,
    int type,
    uint components,
    uint width,
    ulong source,
    ulong target,
    uint size);
SOFTMETAL_COLLECTIVE void __softmetal_simd_scan(
    int operation,
    int type,
    uint components,
    uint width,
    int exclusive,
    ulong source,
    ulong target,
    uint size);
SOFTMETAL_COLLECTIVE void __softmetal_simd_shuffle(
    uint from,
    uint operand,
    int varying,
    uint width,
    ulong source,
    ulong target,
    uint size);
SOFTMETAL_COLLECTIVE ulong
__softmetal_simd_reduce_word(int operation, int type, uint components, uint width, ulong value);
SOFTMETAL_COLLECTIVE ulong __softmetal_simd_shuffle_word(uint from, uint operand, int varying, uint width, ulong value);
SOFTMETAL_COLLECTIVE ulong __softmetal_simd_ballot(uint predicate);
}

namespace metal {

// bool and 64-bit integers are not among the types that Metal takes.
template <class T>
constexpr __constant bool __is_simd_type = __scalar<typename __shape<T>::element>::code >= 0;

// Codes as in runtime.cpp's Reduction.
#define SOFTMETAL_REDUCE(PREFIX, NAME, OPERATION, WIDTH, CONDITION)                                        \
  template <class T>                                                                                       \
  METAL_FUNC enable_if_t<__is_simd_type<T> && CONDITION, T> PREFIX##NAME(T value) {                        \
    typedef typename __shape<T>::element Element;                                                          \
    constexpr int code = __scalar<Element>::code;                                                          \
    constexpr int size = __shape<T>::size;                                                                 \
    if constexpr (sizeof(T) <= 8) {                                                                        \
      return __from_word<T>(__softmetal_simd_reduce_word(OPERATION, code, size, WIDTH, __to_word(value))); \
    } else {                                                                                               \
      T result;                                                                                            \
      __softmetal_simd_reduce(OPERATION, code, size, WIDTH, (ulong) & value, (ulong) & result, sizeof(T)); \
      return result;                                                                                       \
    }                                                                                                      \
  }
#define SOFTMETAL_SCAN(PREFIX, NAME, OPERATION, WIDTH, EXCLUSIVE)                                                  \
  template <class T>                                                                                               \
  METAL_FUNC enable_if_t<__is_simd_type<T>, T> PREFIX##NAME(T value) {                                             \
    typedef typename __shape<T>::element Element;                                                                  \
    T result;                                                                                                      \
    __softmetal_simd_scan(                                                                                         \
        OPERATION, __scalar<Element>::code, __shape<T>::size, WIDTH, EXCLUSIVE, (ulong) & value, (ulong) & result, \
        sizeof(T));                                                                                                \
    return result;                                                                                                 \
  }
#define SOFTMETAL_INTEGRAL is_integral_v<typename __shape<T>::element>
#define SOFTMETAL_REDUCTIONS(PREFIX, WIDTH)                     \
  SOFTMETAL_REDUCE(PREFIX, sum, 0, WIDTH, true)                 \
  SOFTMETAL_REDUCE(PREFIX, product, 1, WIDTH, true)             \
  SOFTMETAL_REDUCE(PREFIX, min, 2, WIDTH, true)                 \
  SOFTMETAL_REDUCE(PREFIX, max, 3, WIDTH, true)                 \
  SOFTMETAL_REDUCE(PREFIX, and, 4, WIDTH, SOFTMETAL_INTEGRAL)   \
  SOFTMETAL_REDUCE(PREFIX, or, 5, WIDTH, SOFTMETAL_INTEGRAL)    \
  SOFTMETAL_REDUCE(PREFIX, xor, 6, WIDTH, SOFTMETAL_INTEGRAL)   \
  SOFTMETAL_SCAN(PREFIX, prefix_inclusive_sum, 0, WIDTH, 0)     \
  SOFTMETAL_SCAN(PREFIX, prefix_exclusive_sum, 0, WIDTH, 1)     \
  SOFTMETAL_SCAN(PREFIX, prefix_inclusive_product, 1, WIDTH, 0) \
  SOFTMETAL_SCAN(PREFIX, prefix_exclusive_product, 1, WIDTH, 1)

// The fill forms take what lies beyond the edge from the other end of `filling`.
template <class T>
struct __fill_pair {
  T data;
  T filling;
};

// Reads `value` of lane FROM. A lane number may vary; deltas, masks and broadcast lanes may not.
#define SOFTMETAL_EXCHANGE(FROM, OPERAND, VARYING, WIDTH)                                                  \
  uint from = static_cast<uint>(FROM);                                                                     \
  if constexpr (sizeof(T) <= 8) {                                                                          \
    return __from_word<T>(__softmetal_simd_shuffle_word(from, OPERAND, VARYING, WIDTH, __to_word(value))); \
  } else {                                                                                                 \
    T result;                                                                                              \
    __softmetal_simd_shuffle(from, OPERAND, VARYING, WIDTH, (ulong) & value, (ulong) & result, sizeof(T)); \
    return result;                                                                                         \
  }
#define SOFTMETAL_SHUFFLES(PREFIX, WIDTH)                                                                      \
  template <class T>                                                                                           \
  METAL_FUNC enable_if_t<__is_simd_type<T>, T> PREFIX##shuffle(T value, ushort source) {                       \
    SOFTMETAL_EXCHANGE(source, source, 1, WIDTH)                                                               \
  }                                                                                                            \
  template <class T>                                                                                           \
  METAL_FUNC enable_if_t<__is_simd_type<T>, T> PREFIX##broadcast(T value, ushort source) {                     \
    SOFTMETAL_EXCHANGE(source, source, WIDTH != 32, WIDTH)                                                     \
  }                                                                                                            \
  template <class T>                                                                                           \
  METAL_FUNC enable_if_t<__is_simd_type<T>, T> PREFIX##broadcast_first(T value) {                              \
    SOFTMETAL_EXCHANGE(0, 0, 0, WIDTH)                                                                         \
  }                                                                                                            \
  template <class T>                                                                                           \
  METAL_FUNC enable_if_t<__is_simd_type<T>, T> PREFIX##shuffle_xor(T value, ushort mask) {                     \
    SOFTMETAL_EXCHANGE((__softmetal_lane() ^ mask) % WIDTH, mask, WIDTH != 32, WIDTH)                          \
  }                                                                                                            \
  template <class T>                                                                                           \
  METAL_FUNC enable_if_t<__is_simd_type<T>, T> PREFIX##shuffle_down(T value, ushort delta) {                   \
    uint lane = __softmetal_lane() % WIDTH;                                                                    \
    SOFTMETAL_EXCHANGE(lane + delta < WIDTH ? lane + delta : lane, delta, WIDTH != 32, WIDTH)                  \
  }                                                                                                            \
  template <class T>                                                                                           \
  METAL_FUNC enable_if_t<__is_simd_type<T>, T> PREFIX##shuffle_up(T value, ushort delta) {                     \
    uint lane = __softmetal_lane() % WIDTH;                                                                    \
    SOFTMETAL_EXCHANGE(lane >= delta ? lane - delta : lane, delta, WIDTH != 32, WIDTH)                         \
  }                                                                                                            \
  template <class T>                                                                                           \
  METAL_FUNC enable_if_t<__is_simd_type<T>, T> PREFIX##shuffle_rotate_down(T value, ushort delta) {            \
    SOFTMETAL_EXCHANGE((__softmetal_lane() + delta) % WIDTH, delta, WIDTH != 32, WIDTH)                        \
  }                                                                                                            \
  template <class T>                                                                                           \
  METAL_FUNC enable_if_t<__is_simd_type<T>, T> PREFIX##shuffle_rotate_up(T value, ushort delta) {              \
    SOFTMETAL_EXCHANGE((__softmetal_lane() - delta) % WIDTH, delta, WIDTH != 32, WIDTH)                        \
  }                                                                                                            \
  template <class T>                                                                                           \
  METAL_FUNC enable_if_t<__is_simd_type<T>, T> PREFIX##shuffle_and_fill_down(                                  \
      T data, T filling, ushort delta, ushort modulo = WIDTH) {                                                \
    uint begin = __softmetal_lane() % WIDTH / modulo * modulo;                                                 \
    uint source = __softmetal_lane() % WIDTH - begin + delta;                                                  \
    __fill_pair<T> value{data, filling};                                                                       \
    __fill_pair<T> result;                                                                                     \
    __softmetal_simd_shuffle(                                                                                  \
        begin + source % modulo, delta, WIDTH != 32, WIDTH, (ulong) & value, (ulong) & result, sizeof(value)); \
    return source < modulo ? result.data : result.filling;                                                     \
  }                                                                                                            \
  template <class T>                                                                                           \
  METAL_FUNC enable_if_t<__is_simd_type<T>, T> PREFIX##shuffle_and_fill_up(                                    \
      T data, T filling, ushort delta, ushort modulo = WIDTH) {                                                \
    uint begin = __softmetal_lane() % WIDTH / modulo * modulo;                                                 \
    uint source = __softmetal_lane() % WIDTH - begin + modulo - delta;                                         \
    __fill_pair<T> value{data, filling};                                                                       \
    __fill_pair<T> result;                                                                                     \
    __softmetal_simd_shuffle(                                                                                  \
        begin + source % modulo, delta, WIDTH != 32, WIDTH, (ulong) & value, (ulong) & result, sizeof(value)); \
    return source >= modulo ? result.data : result.filling;                                                    \
  }

}  // namespace metal

namespace metal {
SOFTMETAL_REDUCTIONS(simd_, 32)
SOFTMETAL_REDUCTIONS(quad_, 4)
SOFTMETAL_SHUFFLES(simd_, 32)
SOFTMETAL_SHUFFLES(quad_, 4)

// --- Votes ---

class simd_vote {
 public:
  typedef ulong vote_t;
  simd_vote() = default;
  explicit simd_vote(ulong lanes) : lanes_(lanes) {}
  explicit operator ulong() const { return lanes_; }
  METAL_FUNC bool all() const { return (lanes_ & 0xFFFFFFFFul) == 0xFFFFFFFFul; }
  METAL_FUNC bool any() const { return lanes_ != 0; }

 private:
  ulong lanes_;
};

METAL_FUNC simd_vote simd_ballot(bool condition) {
  return simd_vote(__softmetal_simd_ballot(condition) & 0xFFFFFFFFul);
}
METAL_FUNC bool simd_any(bool condition) { return (__softmetal_simd_ballot(condition) & 0xFFFFFFFFul) != 0; }
METAL_FUNC bool simd_all(bool condition) {
  ulong votes = __softmetal_simd_ballot(condition);
  return (votes & 0xFFFFFFFFul) == votes >> 32;
}
METAL_FUNC simd_vote simd_active_threads_mask() { return simd_vote(__softmetal_simd_ballot(true) >> 32); }
METAL_FUNC bool simd_is_first() {
  uint active = static_cast<uint>(__softmetal_simd_ballot(true) >> 32);
  return static_cast<uint>(__builtin_ctz(active)) == __softmetal_lane();
}
}  // namespace metal

// The names underneath, which kernels that add bfloat overloads call.
namespace metal {
SOFTMETAL_REDUCTIONS(__metal_simd_, 32)
SOFTMETAL_SHUFFLES(__metal_simd_, 32)
METAL_FUNC float __metal_simd_xor(float value) { return as_type<float>(__metal_simd_xor(as_type<uint>(value))); }
}  // namespace metal
using metal::__metal_simd_broadcast;
using metal::__metal_simd_broadcast_first;
using metal::__metal_simd_max;
using metal::__metal_simd_min;
using metal::__metal_simd_prefix_exclusive_product;
using metal::__metal_simd_prefix_exclusive_sum;
using metal::__metal_simd_prefix_inclusive_product;
using metal::__metal_simd_prefix_inclusive_sum;
using metal::__metal_simd_product;
using metal::__metal_simd_shuffle;
using metal::__metal_simd_shuffle_and_fill_down;
using metal::__metal_simd_shuffle_and_fill_up;
using metal::__metal_simd_shuffle_down;
using metal::__metal_simd_shuffle_rotate_down;
using metal::__metal_simd_shuffle_rotate_up;
using metal::__metal_simd_shuffle_up;
using metal::__metal_simd_shuffle_xor;
using metal::__metal_simd_sum;
METAL_FUNC ushort __metal_get_simdgroup_size(ushort) { return 32; }
METAL_FUNC ushort __metal_get_thread_index_in_simdgroup(ushort) { return static_cast<ushort>(__softmetal_lane()); }
