// AVX-512 (F, BW, DQ, VL). The BF16, VBMI and VNNI instructions stand only in the kernels on bfloat16 pairs and on
// int8, which run where the machine has them; with AMX it counts as an instruction set of its own.
#include "../kernels.h"

#if defined(__x86_64__)

#if defined(__GNUC__) && !defined(__clang__)
// GCC 12's own header leaves the masked-off operand of its intrinsics uninitialised on purpose.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <cpuid.h>
#include <immintrin.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__clang__)
#pragma clang attribute push(                                                                                     \
    __attribute__((target(                                                                                        \
        "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vbmi,avx512vnni,avx2,fma,f16c,amx-tile,amx-bf16"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target( \
    "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vbmi,avx512vnni,avx2,fma,f16c,amx-tile,amx-bf16")
#endif

#define QUANTIZATION_MLX_VECTOR "avx512.h"
#include "table.h"
#include "amx.h"
#include "../product/int8.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace quantization_mlx::cpu {

namespace {

bool multiplies_bfloat16() { return __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512bf16"); }

const ProductKernels* int8_kernels() {
  return __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni") ? &int8_table : nullptr;
}

}  // namespace

// make_table is compiled for AVX-512 too, so it is called only where that is present.
const Kernels* amx_kernels() {
  static const bool present = avx512_kernels() != nullptr && multiplies_bfloat16() && has_matrix_tiles();
  if (!present) {
    return nullptr;
  }
  // As measured, these processors multiply bfloat16 on vectors at half the rate of float32.
  static const Kernels table = make_table("amx", true, false, int8_kernels(), matrix_table);
  return &table;
}

const Kernels* avx512_kernels() {
  const bool present = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx2") &&
      __builtin_cpu_supports("fma");
  if (!present) {
    return nullptr;
  }
  static const Kernels table = make_table("avx512", multiplies_bfloat16(), true, int8_kernels());
  return &table;
}

}  // namespace quantization_mlx::cpu

#else

const quantization_mlx::cpu::Kernels* quantization_mlx::cpu::avx512_kernels() { return nullptr; }

const quantization_mlx::cpu::Kernels* quantization_mlx::cpu::amx_kernels() { return nullptr; }

#endif
