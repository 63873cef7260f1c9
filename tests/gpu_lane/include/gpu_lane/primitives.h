// The functions that the software device's runtime provides, as code for an NVIDIA GPU: a simdgroup is a warp.
// Only what this project's shaders call; anything else stays undefined, and cubin.py says so.
#pragma once

#define GPU_LANE_DEFINED __attribute__((__always_inline__))
#define GPU_LANE_ALL_LANES 0xFFFFFFFFu

extern "C" {

// This project's threadgroups have one dimension, and its kernels need not pay for more.
GPU_LANE_DEFINED uint __gpu_lane_thread_index(void) {
#ifdef GPU_LANE_THREE_DIMENSIONS
  return (__nvvm_read_ptx_sreg_tid_z() * __nvvm_read_ptx_sreg_ntid_y() + __nvvm_read_ptx_sreg_tid_y()) *
      __nvvm_read_ptx_sreg_ntid_x() +
      __nvvm_read_ptx_sreg_tid_x();
#else
  return __nvvm_read_ptx_sreg_tid_x();
#endif
}

GPU_LANE_DEFINED uint __softmetal_lane(void) { return __gpu_lane_thread_index() & 31u; }

// Codes of msl/rewrite.py's BUILTINS; positions within a threadgroup are those of one dimension.
GPU_LANE_DEFINED uint __softmetal_builtin(int which, int component) {
  const uint thread_index = __gpu_lane_thread_index();
  const uint threads = __nvvm_read_ptx_sreg_ntid_x();
  const uint group = component == 0 ? __nvvm_read_ptx_sreg_ctaid_x()
      : component == 1              ? __nvvm_read_ptx_sreg_ctaid_y()
                                    : __nvvm_read_ptx_sreg_ctaid_z();
  const uint groups = component == 0 ? __nvvm_read_ptx_sreg_nctaid_x()
      : component == 1               ? __nvvm_read_ptx_sreg_nctaid_y()
                                     : __nvvm_read_ptx_sreg_nctaid_z();
  switch (which) {
    case 0: return component == 0 ? group * threads + thread_index : group;
    case 1: return group;
    case 2: return component == 0 ? thread_index : 0u;
    case 3: return thread_index;
    case 4: return thread_index & 31u;
    case 5: return thread_index >> 5;
    case 6: return component == 0 ? threads : 1u;
    case 7: return groups;
    case 8: return 32u;
    case 9: return threads >> 5;
    default: __builtin_trap();
  }
}

// With GPU_LANE_LATE, simdgroups of even number come late to the kernel and out of each of its barriers, so that what
// no barrier keeps apart happens in the wrong order.
GPU_LANE_DEFINED void __gpu_lane_begin(void) {
#ifdef GPU_LANE_LATE
  if ((__gpu_lane_thread_index() & 32u) == 0u) {
    const uint begin = __nvvm_read_ptx_sreg_clock();
    while (__nvvm_read_ptx_sreg_clock() - begin < 40000u) {
    }
  }
#endif
}

GPU_LANE_DEFINED void __softmetal_threadgroup_barrier(uint) {
  __syncthreads();
  __gpu_lane_begin();
}

GPU_LANE_DEFINED void __softmetal_simdgroup_barrier(uint) { __nvvm_bar_warp_sync(GPU_LANE_ALL_LANES); }

// The upper half of a word that was made of four bytes or fewer is known to be zero, and needs no exchange.
GPU_LANE_DEFINED ulong __softmetal_simd_shuffle_word(uint from, uint, int, uint width, ulong value) {
  const int lane = static_cast<int>((__softmetal_lane() & ~(width - 1u)) + from);
  const uint high = static_cast<uint>(value >> 32);
  uint word = __nvvm_shfl_sync_idx_i32(GPU_LANE_ALL_LANES, static_cast<int>(value), lane, 31);
  if (__builtin_constant_p(high)) {
    return word;
  }
  return word |
      static_cast<ulong>(
          static_cast<uint>(__nvvm_shfl_sync_idx_i32(GPU_LANE_ALL_LANES, static_cast<int>(high), lane, 31)))
      << 32;
}

// By the codes of simdgroup.h's operations and types.h's scalars: sums and greatest ones of float, int and uint, and
// least ones of the last two.
GPU_LANE_DEFINED ulong __softmetal_simd_reduce_word(int operation, int type, uint components, uint width, ulong value) {
  const uint word = static_cast<uint>(value);
  const int number = static_cast<int>(word);
  switch (10 * type + operation) {
    case 60:
    case 63: break;
    case 40:
    case 50: return static_cast<uint>(__nvvm_redux_sync_add(number, GPU_LANE_ALL_LANES));
    case 42: return static_cast<uint>(__nvvm_redux_sync_min(number, GPU_LANE_ALL_LANES));
    case 43: return static_cast<uint>(__nvvm_redux_sync_max(number, GPU_LANE_ALL_LANES));
    case 52: return static_cast<uint>(__nvvm_redux_sync_umin(word, GPU_LANE_ALL_LANES));
    case 53: return static_cast<uint>(__nvvm_redux_sync_umax(word, GPU_LANE_ALL_LANES));
    default: __builtin_trap();
  }
  float result = as_type<float>(word);
  for (uint mask = width / 2; mask > 0; mask /= 2) {
    const float other =
        as_type<float>(__nvvm_shfl_sync_bfly_i32(GPU_LANE_ALL_LANES, as_type<int>(result), static_cast<int>(mask), 31));
    result = operation == 0 ? result + other : __builtin_fmaxf(result, other);
  }
  return as_type<uint>(result);
}

// Inclusive sums of int and uint.
GPU_LANE_DEFINED void __softmetal_simd_scan(
    int operation,
    int type,
    uint components,
    uint width,
    int exclusive,
    ulong source,
    ulong target,
    uint size) {
  if (operation != 0 || exclusive != 0 || (type != 4 && type != 5)) {
    __builtin_trap();
  }
  int sum = *(const __private int*)source;
  for (uint delta = 1; delta < 32; delta *= 2) {
    const int other = __nvvm_shfl_sync_up_i32(GPU_LANE_ALL_LANES, sum, static_cast<int>(delta), 0);
    sum += __softmetal_lane() >= delta ? other : 0;
  }
  *(__private int*)target = sum;
}

// The lanes for which the predicate holds, and above them those that are active.
GPU_LANE_DEFINED ulong __softmetal_simd_ballot(uint predicate) {
  const uint votes = static_cast<uint>(__nvvm_vote_ballot_sync(GPU_LANE_ALL_LANES, predicate != 0u));
  return votes | (static_cast<ulong>(GPU_LANE_ALL_LANES) << 32);
}

// The GPU has a power of two, as Apple's have. What rounding leaves of the exponent is put right, as a precise exp
// does.
GPU_LANE_DEFINED float exp2f(float x) { return __nvvm_ex2_approx_f(x); }

GPU_LANE_DEFINED float expf(float x) {
  const float log2_e = 1.44269504f;
  const float exponent = x * log2_e;
  const float rest = __builtin_fmaf(x, 1.925963033e-8f, __builtin_fmaf(x, log2_e, -exponent));
  const float power = __nvvm_ex2_approx_f(exponent);
  return __builtin_fabsf(exponent) < 128.0f ? __builtin_fmaf(power, rest * 0.693147181f, power) : power;
}

}  // extern "C"
