// Atomics in device and threadgroup memory, relaxed as in Metal; of 64 bits only minimum and maximum of ulong.
#pragma once

extern "C" {
void __softmetal_atomic(int operation, int type, ulong address, ulong operand, ulong result, uint size);
int __softmetal_atomic_compare_exchange(ulong address, ulong expected, ulong desired, uint size);
void __softmetal_fence(void);
}

namespace metal {

enum memory_order {
  memory_order_relaxed,
  memory_order_acquire,
  memory_order_release,
  memory_order_acq_rel,
  memory_order_seq_cst
};
enum thread_scope { thread_scope_thread, thread_scope_simdgroup, thread_scope_threadgroup, thread_scope_device };

template <class T>
struct atomic {
  static_assert(
      is_same_v<T, int> || is_same_v<T, uint> || is_same_v<T, float> || is_same_v<T, bool> || is_same_v<T, ulong>,
      "atomics are of int, uint, float, bool or ulong");
  T value;
};
// The rewriter appends the underscore: clang has typedefs of the plain names.
typedef atomic<int> atomic_int_;
typedef atomic<uint> atomic_uint_;
typedef atomic<float> atomic_float_;
typedef atomic<bool> atomic_bool_;
typedef atomic<ulong> atomic_ulong_;

// Orders this thread's accesses, which the fibers of one core see in order anyway; it is no barrier.
METAL_FUNC void atomic_thread_fence(
    mem_flags,
    memory_order = memory_order_seq_cst,
    thread_scope = thread_scope_device) {
  __softmetal_fence();
}

// Codes as in runtime.cpp's Atomic.
template <class T>
METAL_FUNC T __atomic_operation(int operation, ulong address, T operand) {
  T result;
  __softmetal_atomic(
      operation, is_same_v<T, ulong> ? 9 : __scalar<T>::code, address, (ulong)&operand, (ulong)&result, sizeof(T));
  return result;
}

#define SOFTMETAL_ATOMIC(SPACE, NAME, OPERATION)                                             \
  template <class T>                                                                         \
  METAL_FUNC T NAME(volatile SPACE atomic<T>* object, decltype(T()) operand, memory_order) { \
    return __atomic_operation<T>(OPERATION, (ulong)object, operand);                         \
  }
#define SOFTMETAL_ATOMICS(SPACE)                                                                                    \
  template <class T>                                                                                                \
  METAL_FUNC T atomic_load_explicit(const volatile SPACE atomic<T>* object, memory_order) {                         \
    return __atomic_operation<T>(0, (ulong)object, T());                                                            \
  }                                                                                                                 \
  template <class T>                                                                                                \
  METAL_FUNC void atomic_store_explicit(volatile SPACE atomic<T>* object, decltype(T()) value, memory_order) {      \
    __atomic_operation<T>(1, (ulong)object, value);                                                                 \
  }                                                                                                                 \
  template <class T>                                                                                                \
  METAL_FUNC bool atomic_compare_exchange_weak_explicit(                                                            \
      volatile SPACE atomic<T>* object, __private T* expected, decltype(T()) desired, memory_order, memory_order) { \
    return __softmetal_atomic_compare_exchange((ulong)object, (ulong)expected, (ulong) & desired, sizeof(T));       \
  }                                                                                                                 \
  SOFTMETAL_ATOMIC(SPACE, atomic_exchange_explicit, 2)                                                              \
  SOFTMETAL_ATOMIC(SPACE, atomic_fetch_add_explicit, 3)                                                             \
  SOFTMETAL_ATOMIC(SPACE, atomic_fetch_sub_explicit, 4)                                                             \
  template <class T>                                                                                                \
  METAL_FUNC void atomic_min_explicit(volatile SPACE atomic<T>* object, decltype(T()) value, memory_order) {        \
    __atomic_operation<T>(5, (ulong)object, value);                                                                 \
  }                                                                                                                 \
  template <class T>                                                                                                \
  METAL_FUNC void atomic_max_explicit(volatile SPACE atomic<T>* object, decltype(T()) value, memory_order) {        \
    __atomic_operation<T>(6, (ulong)object, value);                                                                 \
  }                                                                                                                 \
  SOFTMETAL_ATOMIC(SPACE, atomic_fetch_min_explicit, 5)                                                             \
  SOFTMETAL_ATOMIC(SPACE, atomic_fetch_max_explicit, 6)                                                             \
  SOFTMETAL_ATOMIC(SPACE, atomic_fetch_and_explicit, 7)                                                             \
  SOFTMETAL_ATOMIC(SPACE, atomic_fetch_or_explicit, 8)                                                              \
  SOFTMETAL_ATOMIC(SPACE, atomic_fetch_xor_explicit, 9)
SOFTMETAL_ATOMICS(__global)
SOFTMETAL_ATOMICS(__local)
#undef SOFTMETAL_ATOMIC
#undef SOFTMETAL_ATOMICS

}  // namespace metal
