// Any CPU: four lanes in the compiler's own vector types, which every target lowers to what it has.

#include "../kernels.h"

#define QUANTIZATION_MLX_VECTOR "baseline.h"
#include "table.h"

const quantization_mlx::cpu::Kernels* quantization_mlx::cpu::baseline_kernels() {
  static constexpr Kernels table = make_table("baseline", false, false);
  return &table;
}
