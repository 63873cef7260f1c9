// AVX2 with FMA and F16C.
#include "../kernels.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

#define QUANTIZATION_MLX_VECTOR "avx2.h"
#include "table.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace quantization_mlx::cpu {

const Kernels* avx2_kernels() {
  static constexpr Kernels table = make_table("avx2", false, false);
  const bool present =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  return present ? &table : nullptr;
}

}  // namespace quantization_mlx::cpu

#else

const quantization_mlx::cpu::Kernels* quantization_mlx::cpu::avx2_kernels() { return nullptr; }

#endif
