// The ops' kernels for dispatch key MPS. Only builds with Metal have this file.
#include <string>
#include <string_view>

#include "../gpu/describe.h"
#include "../ops.h"
#include "ops.h"
#include "self_check.h"

namespace quantization_mlx::metal {
namespace {

using gpu::GpuTraits;
using gpu::Target;

struct BackEnd {
  template <typename Problem>
  static auto run(const Problem& problem) {
    return metal::run(problem);
  }

  template <typename Problem>
  static std::string explain(const Problem& problem, std::string_view gpu, int64_t macos) {
    return gpu::explain(
        problem, gpu.empty() ? current_target(problem) : Target{GpuTraits::parse(gpu, static_cast<int>(macos)), {}});
  }
};

}  // namespace
}  // namespace quantization_mlx::metal

TORCH_LIBRARY_IMPL_EXPAND(QUANTIZATION_MLX_NAMESPACE, MPS, m) {
  quantization_mlx::implement<quantization_mlx::metal::BackEnd>(m);
}
