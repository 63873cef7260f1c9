// Atomics of int and uint in device and threadgroup memory, relaxed as in Metal: only what this project's shaders call.
#pragma once

namespace metal {

enum memory_order { memory_order_relaxed };

template <class T>
struct atomic {
  static_assert(is_same_v<T, int> || is_same_v<T, uint>, "atomics are of int or uint");
  T value;
};
// The rewriter appends the underscore: clang has typedefs of the plain names.
typedef atomic<int> atomic_int_;
typedef atomic<uint> atomic_uint_;

#define GPU_LANE_ATOMIC(SPACE, NAME)                                                                             \
  template <class T>                                                                                             \
  METAL_FUNC T atomic_##NAME##_explicit(volatile SPACE atomic<T>* object, decltype(T()) operand, memory_order) { \
    return __atomic_##NAME((volatile SPACE T*)object, operand, __ATOMIC_RELAXED);                                \
  }
#define GPU_LANE_ATOMICS(SPACE)                                                                                \
  template <class T>                                                                                           \
  METAL_FUNC T atomic_load_explicit(const volatile SPACE atomic<T>* object, memory_order) {                    \
    return __atomic_load_n((const volatile SPACE T*)object, __ATOMIC_RELAXED);                                 \
  }                                                                                                            \
  template <class T>                                                                                           \
  METAL_FUNC void atomic_store_explicit(volatile SPACE atomic<T>* object, decltype(T()) value, memory_order) { \
    __atomic_store_n((volatile SPACE T*)object, value, __ATOMIC_RELAXED);                                      \
  }                                                                                                            \
  GPU_LANE_ATOMIC(SPACE, fetch_add)                                                                            \
  GPU_LANE_ATOMIC(SPACE, fetch_or)
GPU_LANE_ATOMICS(__global)
GPU_LANE_ATOMICS(__local)
#undef GPU_LANE_ATOMIC
#undef GPU_LANE_ATOMICS

}  // namespace metal
