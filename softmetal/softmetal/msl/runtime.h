// The C interface of the software GPU's runtime, for device.py and for a host-side imitation of Metal.
//
// A compiled kernel is a SoftmetalPipeline, which device.py's Library.pipeline makes. A launch names it, memory and a
// grid; softmetal_launch runs the grid in the calling thread (one launch at a time; others wait) and returns a report.
// Nothing here needs Python or its lock.
#pragma once

#include <cstdint>

// Memory as a host owns it: one MTLBuffer, or the bytes of one setBytes. No two of them overlap in one launch.
struct SoftmetalAllocation {
  uint8_t* data;
  uint64_t size;
  // 0: nothing may write here, such as the bytes of setBytes. A buffer that the kernel takes as const is not written
  // either way.
  uint32_t writable;
  // 1: all of it holds values. 0: nothing does, and reading before writing is an error. Ignored with `written`.
  uint32_t initialized;
  // With in_place, the kernel works on `data` itself, of which `guard` bytes before and behind belong to it and hold
  // 0xFF (verified after the launch). Otherwise on a copy with guard zones of the runtime's, copied back at the end.
  uint32_t in_place;
  uint32_t guard;
  // One byte for each byte of data, or null: 1 where it holds a value. The launch reads it and sets it where the kernel
  // writes, so that it can live as long as the buffer does.
  uint8_t* written;
  // Results: the bytes that the kernel loaded and stored, counted with checks only.
  uint64_t bytes_read, bytes_written;
};

// What is bound to [[buffer(i)]], i being the position in the array.
struct SoftmetalBinding {
  int32_t allocation;  // its number, or -1 for nil
  uint32_t reserved;
  uint64_t offset;  // of the argument within the allocation, bytes
};

struct SoftmetalConstant {
  uint32_t slot;
  uint32_t size;
  uint8_t value[32];
};

// A kernel with its function constants.
struct SoftmetalPipeline {
  void (*entry)(void);
  void (*derive)(void);  // computes program-scope constants from function constants
  const SoftmetalConstant* constants;
  uint32_t constant_count;
  uint32_t buffers;  // bit i: there is an argument [[buffer(i)]]
  uint32_t writable_buffers;  // bit i: and it is not const
  uint32_t threadgroup_arguments;  // number of [[threadgroup(i)]] slots
  uint32_t max_threads;  // per threadgroup
  uint32_t checked;
};

struct SoftmetalLaunch {
  const SoftmetalPipeline* pipeline;
  SoftmetalAllocation* allocations;
  const SoftmetalBinding* bindings;
  const uint64_t* threadgroup_lengths;  // bytes for each [[threadgroup(i)]]
  uint32_t allocation_count, binding_count, threadgroup_length_count;
  uint32_t threads_per_threadgroup[3];
  uint32_t threads[3];  // of the whole grid; the last threadgroups may be partial
  uint32_t seed;  // 0: threads in order; other numbers draw the order of threads and of threadgroups
  double seconds;  // the launch is given up after this time
};

// Totals over the grid; Report in device.py tells what they count.
struct SoftmetalCounters {
  uint64_t device_bytes_read, device_bytes_written, constant_bytes_read;
  uint64_t threadgroup_bytes_read, threadgroup_bytes_written, threadgroup_bytes;
  uint64_t device_loads, device_stores;
  uint64_t threadgroup_barriers, simdgroup_barriers;
  uint64_t simd_reductions, simd_shuffles, simd_votes, quad_operations;
  uint64_t simdgroup_multiplies, simdgroup_loads, simdgroup_stores;
  uint64_t atomics;
};

struct SoftmetalError {
  const char* kind;
  const char* message;  // "memory 3" in it is the allocation of that number
  uint64_t offset;  // of the instruction in the kernel's module, for Pipeline.describe; 0: none
  uint64_t count;
};

struct SoftmetalReport {
  SoftmetalCounters counters;
  const SoftmetalError* errors;
  uint32_t error_count;
};

#ifndef SOFTMETAL_API
#define SOFTMETAL_API extern "C" __attribute__((visibility("default")))
#endif

// Never null. The caller gives it back to softmetal_free_report.
SOFTMETAL_API SoftmetalReport* softmetal_launch(const SoftmetalLaunch* launch);
SOFTMETAL_API void softmetal_free_report(SoftmetalReport* report);
