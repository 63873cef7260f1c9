// NEON, part of every 64-bit Arm CPU.
#include "../kernels.h"

#if defined(__aarch64__)

#define QUANTIZATION_MLX_VECTOR "neon.h"
#include "table.h"

const quantization_mlx::cpu::Kernels* quantization_mlx::cpu::neon_kernels() {
  static constexpr Kernels table = make_table("neon", false, false);
  return &table;
}

#else

const quantization_mlx::cpu::Kernels* quantization_mlx::cpu::neon_kernels() { return nullptr; }

#endif
