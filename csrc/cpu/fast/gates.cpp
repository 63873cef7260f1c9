// Gated activations: rows, cut into parts that threads share.
#include <ATen/ops/empty.h>

#include <algorithm>

#include "../kernels.h"
#include "../ops.h"
#include "scratch.h"

namespace quantization_mlx::cpu {
namespace {

// What one element costs, in multiplications, and the elements that are worth a thread's while.
constexpr int64_t element_multiplications = 8;
constexpr int64_t task_elements = task_multiplications / element_multiplications;

}  // namespace

at::Tensor run(const GateProblem& problem) {
  const at::Tensor& gates = problem.gates.tensor;
  const at::Tensor y = at::empty(problem.output, gates.options());
  if (problem.is_empty()) {
    return y;
  }
  const int64_t size = gates.element_size();
  const int64_t* experts = nullptr;
  if (problem.experts.defined()) {
    check_range(problem.op, "experts", problem.experts, problem.expert_count());
    experts = problem.experts.const_data_ptr<int64_t>();
  }
  auto* result = static_cast<uint8_t*>(y.mutable_data_ptr());
  const int64_t part = std::min(problem.length, task_elements);
  const int64_t parts = (problem.length + part - 1) / part;
  parallel_chunks(problem.rows * parts, std::max<int64_t>(1, task_elements / part), [&](int64_t i) {
    const int64_t row = i / parts;
    const int64_t begin = i % parts * part;
    const auto part_of = [&](const StridedRows& rows, int64_t number) {
      const auto* first = static_cast<const uint8_t*>(rows.tensor.const_data_ptr());
      return first + (number * rows.row_stride + begin * rows.stride) * size;
    };
    const auto of_expert = [&](const StridedRows& biases) {
      return experts == nullptr ? nullptr : part_of(biases, experts[row]);
    };
    kernels().decoder.gate(
        {problem.kind, real_of(gates.scalar_type()), part_of(problem.gates, row), part_of(problem.values, row),
         problem.gates.stride, problem.values.stride, of_expert(problem.gate_bias), of_expert(problem.value_bias),
         problem.gate_bias.stride, problem.value_bias.stride, std::min(part, problem.length - begin),
         static_cast<float>(problem.alpha), static_cast<float>(problem.limit), static_cast<float>(problem.offset),
         result + (row * problem.length + begin) * size});
  });
  return y;
}

at::Tensor run(const GatedMatmulProblem& problem) { return run(problem.of_product(run(problem.matmul))); }

}  // namespace quantization_mlx::cpu
