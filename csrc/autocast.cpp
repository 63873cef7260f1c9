#include "autocast.h"

#include <ATen/autocast_mode.h>
#include <ATen/core/Tensor.h>

#include "problem/modes.h"

namespace quantization_mlx::autocast {

void product(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const c10::impl::ExcludeDispatchKeyGuard without_autocast(c10::autocast_dispatch_keyset);
  const auto& schema = op.schema();
  const auto arguments = torch::jit::last(*stack, schema.arguments().size());
  const auto argument = [&](const char* name) -> c10::IValue& {
    return const_cast<c10::IValue&>(arguments[*schema.argumentIndexWithName(name)]);
  };
  const bool affine = argument("mode").toStringRef() == name_of(Mode::affine);
  for (const char* name : {"x", "scales", "biases"}) {
    c10::IValue& value = argument(name);
    const at::Tensor tensor = value.isTensor() ? value.toTensor() : at::Tensor();
    if (tensor.defined() && (affine || name == std::string_view("x"))) {
      const at::DeviceType device = tensor.device().type();
      value = at::autocast::cached_cast(at::autocast::get_autocast_dtype(device), tensor, device);
    }
  }
  op.callBoxed(stack);
}

}  // namespace quantization_mlx::autocast
