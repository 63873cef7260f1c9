// The ops' kernels for dispatch key MPS. Only builds with Metal have this file.
#include <string>
#include <string_view>

#include "../../torch-ext/adapters.h"
#include "../../torch-ext/torch_binding.h"
#include "../gpu/describe.h"
#include "ops.h"
#include "self_check.h"

namespace quantization_mlx::metal {
namespace {

using gpu::GpuTraits;
using gpu::Target;

// Without the name of a GPU, what runs on this one.
template <typename Problem>
std::string explain_here(const Problem& problem, std::string_view gpu, int64_t macos) {
  return gpu::explain(
      problem, gpu.empty() ? current_target(problem) : Target{GpuTraits::parse(gpu, static_cast<int>(macos)), {}});
}

}  // namespace
}  // namespace quantization_mlx::metal

using namespace quantization_mlx;

TORCH_LIBRARY_IMPL_EXPAND(QUANTIZATION_MLX_NAMESPACE, MPS, m) {
  m.impl("quantize", adapters::quantize<metal::quantize>);
  m.impl("dequantize", adapters::dequantize<metal::dequantize>);
  m.impl("quantized_matmul", adapters::quantized_matmul<metal::quantized_matmul>);
  m.impl("gather_qmm", adapters::gather_qmm<metal::gather_qmm>);
  m.impl("explain_quantize", adapters::explain_quantize<metal::explain_here<QuantizeProblem>>);
  m.impl("explain_dequantize", adapters::explain_dequantize<metal::explain_here<DequantizeProblem>>);
  m.impl("explain_quantized_matmul", adapters::explain_quantized_matmul<metal::explain_here<MatmulProblem>>);
  m.impl("explain_gather_qmm", adapters::explain_gather_qmm<metal::explain_here<GatherProblem>>);
}
