// The ops' kernels for dispatch key MPS. Only builds with Metal have this file.
#include <string>
#include <string_view>
#include <utility>

#include "../gpu/describe.h"
#include "../namespace.h"
#include "../ops.h"
#include "device.h"
#include "ops.h"
#include "self_check.h"

namespace quantization_mlx::metal {
namespace {

using gpu::GpuTraits;
using gpu::Target;

struct BackEnd {
  template <typename Problem>
  static auto run(Problem&& problem) {
    return metal::run(std::move(problem));
  }

  template <typename Problem>
  static std::string explain(const Problem& problem, std::string_view gpu, int64_t macos) {
    if (!gpu.empty()) {
      return gpu::explain(problem, {GpuTraits::parse(gpu, static_cast<int>(macos)), {}});
    }
    const auto facts = gpu::facts_of(gpu::with_kernel_dtype(problem));
    return gpu::explain(problem, facts.empty() ? Target{gpu_traits(), {}} : current_target(facts.front()));
  }
};

}  // namespace
}  // namespace quantization_mlx::metal

TORCH_LIBRARY_IMPL_EXPAND(QUANTIZATION_MLX_NAMESPACE, MPS, m) {
  quantization_mlx::implement<quantization_mlx::metal::BackEnd>(m);
}
