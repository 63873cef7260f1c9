// The gradient of rope with respect to x.
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/autograd/custom_function.h>

#include "autograd.h"
#include "gradients.h"

namespace quantization_mlx::autograd {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using OptionalTensor = std::optional<Tensor>;

OptionalTensor optional(const Tensor& tensor) { return tensor.defined() ? OptionalTensor(tensor) : std::nullopt; }

// A rotation is orthogonal: the gradient of x is that of y turned back, by positions of the opposite scale.
struct Rope : torch::autograd::Function<Rope> {
  static Tensor forward(
      AutogradContext* context,
      const Tensor& x,
      int64_t dims,
      bool traditional,
      std::optional<double> base,
      double scale,
      const c10::SymInt& offset,
      const OptionalTensor& offsets,
      const OptionalTensor& freqs) {
    at::AutoDispatchBelowADInplaceOrView guard;
    context->save_for_backward({offsets.value_or(Tensor()), freqs.value_or(Tensor())});
    auto& data = context->saved_data;
    data["dims"] = dims;
    data["traditional"] = traditional;
    data["base"] = base;
    data["scale"] = scale;
    data["offset"] = offset;
    return ops::rope(x, dims, traditional, base, scale, offset, offsets, freqs);
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    const auto saved = context->get_saved_variables();
    auto& data = context->saved_data;
    variable_list result(8);
    result[0] = ops::rope(
        gradients[0], data["dims"].toInt(), data["traditional"].toBool(), data["base"].toOptional<double>(),
        -data["scale"].toDouble(), data["offset"].toSymInt(), optional(saved[0]), optional(saved[1]));
    return result;
  }
};

}  // namespace

Tensor rope(
    const Tensor& x,
    int64_t dims,
    bool traditional,
    std::optional<double> base,
    double scale,
    c10::SymInt offset,
    const OptionalTensor& offsets,
    const OptionalTensor& freqs) {
  refuse_tangents(RopeProblem::name, {&x, pointer(freqs)});
  TORCH_CHECK_NOT_IMPLEMENTED(
      !at::GradMode::is_enabled() || !wants_gradient(freqs), "[", RopeProblem::name,
      "] there are gradients for x only, and freqs require one.");
  if (at::GradMode::is_enabled() && wants_gradient(x)) {
    return Rope::apply(x, dims, traditional, base, scale, offset, offsets, freqs);
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return ops::rope(x, dims, traditional, base, scale, std::move(offset), offsets, freqs);
}

}  // namespace quantization_mlx::autograd
