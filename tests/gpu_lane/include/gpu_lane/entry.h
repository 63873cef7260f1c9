// A kernel's arguments as those of an entry point: buffers are pointers that do not alias, `constant T&` is a value.
#pragma once

template <class T>
struct __gpu_lane_argument;
template <class T>
struct __gpu_lane_argument<__global T*> {
  typedef __global T* __restrict type;
};
template <class T>
struct __gpu_lane_argument<__constant T*> {
  typedef __constant T* type;
};
template <class T>
struct __gpu_lane_argument<const __constant T&> {
  typedef T type;
};

template <class T>
struct __gpu_lane_pass {
  METAL_FUNC static T get(T value) { return value; }
};
template <class T>
struct __gpu_lane_pass<const __constant T&> {
  // cubin.py gives both one address space.
  METAL_FUNC static const __constant T& get(const __private T& value) { return *(const __constant T*)(ulong)&value; }
};
