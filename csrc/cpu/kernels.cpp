// The choice of the instruction set.
#include "kernels.h"

#include <c10/util/Exception.h>

#include <string>
#include <string_view>

#include "../environment.h"

namespace quantization_mlx::cpu {

const Kernels& kernels() {
  static const Kernels& best = []() -> const Kernels& {
    const char* wanted = environment_variable("QUANTIZATION_MLX_CPU");
    std::string known;
    for (const Kernels* candidate :
         {amx_kernels(), avx512_kernels(), avx2_kernels(), neon_kernels(), baseline_kernels()}) {
      if (candidate == nullptr) {
        continue;
      }
      if (wanted == nullptr || std::string_view(wanted) == candidate->name) {
        return *candidate;
      }
      known += std::string(known.empty() ? "" : ", ") + candidate->name;
    }
    TORCH_CHECK_VALUE(false, "QUANTIZATION_MLX_CPU is \"", wanted, "\"; this machine has ", known, ".");
  }();
  return best;
}

}  // namespace quantization_mlx::cpu
