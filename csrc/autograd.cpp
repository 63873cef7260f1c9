#include "autograd.h"

#include <ATen/ExpandUtils.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <string>
#include <vector>

#include "cpu/ops.h"
#include "gradients.h"

namespace quantization_mlx::autograd {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using OptionalTensor = std::optional<Tensor>;
using OptionalInt = std::optional<int64_t>;

// Names that are none have failed, or will, in the op's own checks.
bool is_column_packed(std::string_view mode) {
  const auto named = mode_of(mode);
  return named.has_value() && quantization_mlx::is_column_packed(*named);
}

OptionalTensor optional(const Tensor& tensor) { return tensor.defined() ? OptionalTensor(tensor) : std::nullopt; }

// A backward pass computes with exact activations and, under autocast, in the dtypes that the forward pass had.
class BackwardScope {
  const cpu::ExactActivations exact_;
  const c10::impl::ExcludeDispatchKeyGuard without_autocast_{c10::autocast_dispatch_keyset};
};

// The weights of a product, as a backward pass needs them back.
struct Weights {
  Tensor w;
  Tensor scales;
  OptionalTensor biases;
  OptionalTensor global_scale;
  bool transpose;
  OptionalInt group_size;
  OptionalInt bits;
  std::string mode;
  std::string op;

  variable_list tensors() const { return {w, scales, biases.value_or(Tensor()), global_scale.value_or(Tensor())}; }

  void save(AutogradContext* context) const {
    context->saved_data["transpose"] = transpose;
    context->saved_data["group_size"] = group_size;
    context->saved_data["bits"] = bits;
    context->saved_data["mode"] = mode;
    context->saved_data["op"] = op;
  }

  static Weights load(AutogradContext* context, const variable_list& saved) {
    auto& data = context->saved_data;
    return {
        saved[0],
        saved[1],
        optional(saved[2]),
        optional(saved[3]),
        data["transpose"].toBool(),
        data["group_size"].toOptional<int64_t>(),
        data["bits"].toOptional<int64_t>(),
        data["mode"].toStringRef(),
        data["op"].toStringRef()};
  }
};

// Input 3 of a Function, the biases, is one of its variables only where there are biases.
bool wants_parameters(AutogradContext* context, const Weights& weights) {
  return weights.biases.has_value() && (context->needs_input_grad(2) || context->needs_input_grad(3));
}

// Scales of the other modes are integers, which cannot ask for a gradient.
void refuse_parameter_gradients(
    std::string_view op,
    std::string_view mode,
    const Tensor& scales,
    const OptionalTensor& biases) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      !is_column_packed(mode) || (!wants_gradient(scales) && !wants_gradient(biases)), "[", op, "] mode \"", mode,
      "\" has gradients for x only, and scales or zeros require one.");
}

// What reaches the inputs of a product without elements.
variable_list zero_gradients(
    AutogradContext* context,
    const Weights& weights,
    const std::vector<c10::SymInt>& x_sizes,
    const Tensor& gradient,
    variable_list result) {
  if (context->needs_input_grad(0)) {
    result[0] = at::zeros_symint(x_sizes, gradient.options().dtype(context->saved_data["x_dtype"].toScalarType()));
  }
  if (wants_parameters(context, weights)) {
    result[2] = at::zeros_like(weights.scales);
    result[3] = at::zeros_like(*weights.biases);
  }
  return result;
}

// From the gradient of the unpacked weights to those of scales and biases: w = code * scale + bias within each group.
struct ParameterGradients {
  Tensor scales;
  Tensor biases;
};

ParameterGradients parameter_gradients(const Tensor& unpacked, const Weights& weights) {
  std::vector<c10::SymInt> grouped(weights.scales.sym_sizes().vec());
  grouped.push_back(weights.group_size.value_or(default_group_size(*mode_of(weights.mode))));
  const Tensor gradient = unpacked.to(at::kFloat).reshape_symint(grouped);
  const Tensor one = at::ones_symint(weights.scales.sym_sizes(), weights.scales.options().dtype(at::kFloat));
  const Tensor codes =
      ops::dequantize(
          weights.w, one, at::zeros_like(one), weights.group_size, weights.bits, weights.mode, std::nullopt, at::kFloat)
          .reshape_symint(grouped);
  return {
      (gradient * codes).sum(-1).to(weights.scales.scalar_type()), gradient.sum(-1).to(weights.biases->scalar_type())};
}

// The gradient of w [.., N, K] (transpose) or [.., K, N] from matching matrices of x and of the result's gradient.
Tensor weight_gradient(const Tensor& x, const Tensor& gradient, bool transpose) {
  return transpose ? at::matmul(gradient.mT(), x) : at::matmul(x.mT(), gradient);
}

// Elements of column-packed weights that a backward pass holds unpacked at a time.
constexpr int64_t unpacked_elements = 1 << 22;

// gradient [.., N] @ dequantize(w).T of column-packed weights [.., K, N], some of whose rows are unpacked at a time:
// all of them where a compiler traces weights of unknown sizes, which nothing can loop over.
Tensor column_packed_x_gradient(const Tensor& gradient, const Weights& weights) {
  // A weight may be beyond the range of float16.
  const at::ScalarType dtype = gradient.scalar_type() == at::kHalf ? at::kFloat : gradient.scalar_type();
  const auto product = [&](const Tensor& w, const Tensor& scales, const OptionalTensor& zeros) {
    const Tensor rows =
        ops::dequantize(w, scales, zeros, weights.group_size, weights.bits, weights.mode, std::nullopt, dtype);
    return at::matmul(gradient.to(dtype), rows.mT()).to(gradient.scalar_type());
  };
  const auto& [w, scales, zeros] = std::tie(weights.w, weights.scales, weights.biases);
  if (w.unsafeGetTensorImpl()->has_symbolic_sizes_strides() ||
      scales.unsafeGetTensorImpl()->has_symbolic_sizes_strides()) {
    return product(w, scales, zeros);
  }
  const int64_t groups = scales.size(-2);
  const int64_t group_words = w.size(-2) / groups;
  const int64_t group_elements =
      scales.numel() / groups * weights.group_size.value_or(default_group_size(*mode_of(weights.mode)));
  const int64_t step = std::max<int64_t>(1, unpacked_elements / std::max<int64_t>(group_elements, 1));
  std::vector<Tensor> parts;
  for (int64_t group = 0; group < groups; group += step) {
    const int64_t end = std::min(group + step, groups);
    parts.push_back(product(
        w.slice(-2, group * group_words, end * group_words), scales.slice(-2, group, end),
        zeros.has_value() ? OptionalTensor(zeros->slice(-2, group, end)) : std::nullopt));
  }
  return parts.size() == 1 ? parts[0] : at::cat(parts, -1);
}

Tensor flat_rows(const Tensor& tensor) { return tensor.reshape_symint({-1, tensor.sym_size(-1)}); }

// --- quantized_matmul -----------------------------------------------------------------------------------------------

struct QuantizedMatmul : torch::autograd::Function<QuantizedMatmul> {
  static Tensor forward(
      AutogradContext* context,
      const Tensor& x,
      const Tensor& w,
      const Tensor& scales,
      const OptionalTensor& biases,
      const Weights& weights) {
    at::AutoDispatchBelowADInplaceOrView guard;
    weights.save(context);
    auto saved = weights.tensors();
    saved.push_back(wants_gradient(scales) || wants_gradient(biases) ? x : Tensor());
    context->save_for_backward(saved);
    context->saved_data["x_sizes"] = c10::IValue(x.sym_sizes());
    context->saved_data["x_dtype"] = x.scalar_type();
    return ops::quantized_matmul(
        x, w, scales, biases, weights.transpose, weights.group_size, weights.bits, weights.mode, weights.global_scale,
        weights.op);
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    const BackwardScope scope;
    const auto saved = context->get_saved_variables();
    const Weights weights = Weights::load(context, saved);
    const auto x_sizes = context->saved_data["x_sizes"].toSymIntVector();
    // A vector x is a matrix of one row.
    const bool vector = x_sizes.size() == 1;
    const Tensor gradient = vector ? gradients[0].unsqueeze(-2) : gradients[0];
    variable_list result(5);
    if (is_known(gradients[0].sym_numel().sym_eq(0))) {
      return zero_gradients(context, weights, x_sizes, gradients[0], std::move(result));
    }
    if (context->needs_input_grad(0)) {
      Tensor x_gradient = is_column_packed(weights.mode)
          ? column_packed_x_gradient(gradient, weights)
          : ops::quantized_matmul(
                gradient, weights.w, weights.scales, weights.biases, !weights.transpose, weights.group_size,
                weights.bits, weights.mode, weights.global_scale, weights.op);
      x_gradient = vector ? x_gradient.squeeze(-2) : x_gradient;
      result[0] =
          at::sum_to(x_gradient, c10::SymIntArrayRef(x_sizes)).to(context->saved_data["x_dtype"].toScalarType());
    }
    if (wants_parameters(context, weights)) {
      const Tensor x = vector ? saved[4].unsqueeze(-2) : saved[4];
      const auto dtype = gradient.scalar_type();
      Tensor unpacked;
      if (weights.w.dim() == 2) {
        unpacked = weight_gradient(flat_rows(x.to(dtype)), flat_rows(gradient), weights.transpose);
      } else {
        unpacked = weight_gradient(x.to(dtype), gradient, weights.transpose);
        auto sizes = weights.w.sym_sizes().vec();
        sizes.back() = unpacked.sym_size(-1);
        unpacked = at::sum_to(unpacked, c10::SymIntArrayRef(sizes));
      }
      auto parameters = parameter_gradients(unpacked, weights);
      result[2] = std::move(parameters.scales);
      result[3] = std::move(parameters.biases);
    }
    return result;
  }
};

// --- gather_qmm -----------------------------------------------------------------------------------------------------

// The index of each result's matrix in an operand, flat: the one given or the count through the operand's batch.
Tensor flat_indices(
    const OptionalTensor& indices,
    c10::SymIntArrayRef operand,
    c10::SymIntArrayRef batch,
    at::Device device) {
  if (indices.has_value()) {
    return indices->to(at::kLong).expand_symint(batch).reshape({-1});
  }
  c10::SymInt count = 1;
  for (const auto& size : operand) {
    count = count * size;
  }
  return at::arange(count, at::TensorOptions().dtype(at::kLong).device(device))
      .reshape_symint(operand)
      .expand_symint(batch)
      .reshape({-1});
}

Tensor matrices(const Tensor& tensor) { return tensor.reshape_symint({-1, tensor.sym_size(-2), tensor.sym_size(-1)}); }

// The gradient of each gathered matrix of x. Where columns are packed, all of them meet each matrix of w, and each
// keeps what its own gave: no index is read on the host, on any device.
Tensor gathered_x_gradient(const Tensor& gradient, const Tensor& rhs, const Weights& weights) {
  if (!is_column_packed(weights.mode)) {
    return ops::gather_qmm(
        gradient, weights.w, weights.scales, weights.biases, std::nullopt, rhs, !weights.transpose, weights.group_size,
        weights.bits, weights.mode, weights.global_scale, /*sorted_indices=*/false, weights.op);
  }
  const Tensor w = matrices(weights.w);
  const Tensor scales = matrices(weights.scales);
  const OptionalTensor zeros = weights.biases.has_value() ? OptionalTensor(matrices(*weights.biases)) : std::nullopt;
  const Tensor none = at::zeros({}, gradient.options());
  Tensor sum;
  for (int64_t matrix = 0; matrix < w.size(0); ++matrix) {
    Weights one = weights;
    one.w = w[matrix];
    one.scales = scales[matrix];
    one.biases = zeros.has_value() ? OptionalTensor((*zeros)[matrix]) : std::nullopt;
    const Tensor chosen = rhs.eq(matrix).reshape({-1, 1, 1});
    sum = at::where(chosen, column_packed_x_gradient(gradient, one), sum.defined() ? sum : none);
  }
  return sum;
}

struct GatherQmm : torch::autograd::Function<GatherQmm> {
  static Tensor forward(
      AutogradContext* context,
      const Tensor& x,
      const Tensor& w,
      const Tensor& scales,
      const OptionalTensor& biases,
      const OptionalTensor& lhs_indices,
      const OptionalTensor& rhs_indices,
      bool sorted_indices,
      const Weights& weights) {
    at::AutoDispatchBelowADInplaceOrView guard;
    weights.save(context);
    auto saved = weights.tensors();
    saved.push_back(wants_gradient(scales) || wants_gradient(biases) ? x : Tensor());
    saved.push_back(lhs_indices.value_or(Tensor()));
    saved.push_back(rhs_indices.value_or(Tensor()));
    context->save_for_backward(saved);
    context->saved_data["x_sizes"] = c10::IValue(x.sym_sizes());
    context->saved_data["x_dtype"] = x.scalar_type();
    return ops::gather_qmm(
        x, w, scales, biases, lhs_indices, rhs_indices, weights.transpose, weights.group_size, weights.bits,
        weights.mode, weights.global_scale, sorted_indices, weights.op);
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    const BackwardScope scope;
    const auto saved = context->get_saved_variables();
    const Weights weights = Weights::load(context, saved);
    const auto x_sizes = context->saved_data["x_sizes"].toSymIntVector();
    const auto x_batch = c10::SymIntArrayRef(x_sizes).slice(0, x_sizes.size() - 2);
    const auto w_batch = weights.w.sym_sizes().slice(0, weights.w.dim() - 2);
    const auto batch = gradients[0].sym_sizes().slice(0, gradients[0].dim() - 2);
    const Tensor lhs = flat_indices(optional(saved[5]), x_batch, batch, gradients[0].device());
    const Tensor rhs = flat_indices(optional(saved[6]), w_batch, batch, gradients[0].device());
    const Tensor gradient = matrices(gradients[0]);
    variable_list result(8);
    if (is_known(gradients[0].sym_numel().sym_eq(0))) {
      return zero_gradients(context, weights, x_sizes, gradients[0], std::move(result));
    }
    if (context->needs_input_grad(0)) {
      const Tensor each = gathered_x_gradient(gradient, rhs, weights);
      c10::SymInt count = 1;
      for (const auto& size : x_batch) {
        count = count * size;
      }
      // Several results may read one matrix of x: their gradients add up in float32.
      const Tensor sums =
          at::zeros_symint({count, each.sym_size(-2), each.sym_size(-1)}, each.options().dtype(at::kFloat));
      result[0] = sums.index_add(0, lhs, each.to(at::kFloat))
                      .reshape_symint(x_sizes)
                      .to(context->saved_data["x_dtype"].toScalarType());
    }
    if (wants_parameters(context, weights)) {
      const Tensor x = matrices(saved[4].to(gradient.scalar_type())).index_select(0, lhs);
      // A masked product for each matrix of w: no index is read on the host, on any device.
      std::vector<Tensor> unpacked;
      const Tensor none = at::zeros({}, gradient.options());
      const int64_t count = matrices(weights.w).size(0);
      for (int64_t matrix = 0; matrix < count; ++matrix) {
        const Tensor chosen = at::where(rhs.eq(matrix).reshape({-1, 1, 1}), gradient, none);
        unpacked.push_back(weight_gradient(flat_rows(x), flat_rows(chosen), weights.transpose));
      }
      auto parameters = parameter_gradients(at::stack(unpacked), weights);
      result[2] = std::move(parameters.scales);
      result[3] = std::move(parameters.biases);
    }
    return result;
  }
};

// --- dequantize -----------------------------------------------------------------------------------------------------

struct Dequantize : torch::autograd::Function<Dequantize> {
  static Tensor forward(
      AutogradContext* context,
      const Tensor& w,
      const Tensor& scales,
      const OptionalTensor& biases,
      std::optional<at::ScalarType> dtype,
      const Weights& weights) {
    at::AutoDispatchBelowADInplaceOrView guard;
    weights.save(context);
    context->save_for_backward(weights.tensors());
    return ops::dequantize(
        w, scales, biases, weights.group_size, weights.bits, weights.mode, weights.global_scale, dtype);
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    const Weights weights = Weights::load(context, context->get_saved_variables());
    auto parameters = parameter_gradients(gradients[0], weights);
    return {Tensor(), std::move(parameters.scales), std::move(parameters.biases), Tensor(), Tensor()};
  }
};

}  // namespace

Tensor quantized_matmul(
    const Tensor& x,
    const Tensor& w,
    const Tensor& scales,
    const OptionalTensor& biases,
    bool transpose,
    OptionalInt group_size,
    OptionalInt bits,
    std::string_view mode,
    const OptionalTensor& global_scale,
    std::string_view op) {
  refuse_tangents(op, {&x, &scales, pointer(biases)});
  refuse_parameter_gradients(op, mode, scales, biases);
  if (at::GradMode::is_enabled() && (wants_gradient(x) || wants_gradient(scales) || wants_gradient(biases))) {
    return QuantizedMatmul::apply(
        x, w, scales, biases,
        Weights{w, scales, biases, global_scale, transpose, group_size, bits, std::string(mode), std::string(op)});
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return ops::quantized_matmul(x, w, scales, biases, transpose, group_size, bits, mode, global_scale, op);
}

Tensor gather_qmm(
    const Tensor& x,
    const Tensor& w,
    const Tensor& scales,
    const OptionalTensor& biases,
    const OptionalTensor& lhs_indices,
    const OptionalTensor& rhs_indices,
    bool transpose,
    OptionalInt group_size,
    OptionalInt bits,
    std::string_view mode,
    const OptionalTensor& global_scale,
    bool sorted_indices,
    std::string_view op) {
  refuse_tangents(op, {&x, &scales, pointer(biases)});
  refuse_parameter_gradients(op, mode, scales, biases);
  if (at::GradMode::is_enabled() && (wants_gradient(x) || wants_gradient(scales) || wants_gradient(biases))) {
    return GatherQmm::apply(
        x, w, scales, biases, lhs_indices, rhs_indices, sorted_indices,
        Weights{w, scales, biases, global_scale, transpose, group_size, bits, std::string(mode), std::string(op)});
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return ops::gather_qmm(
      x, w, scales, biases, lhs_indices, rhs_indices, transpose, group_size, bits, mode, global_scale, sorted_indices,
      op);
}

Tensor dequantize(
    const Tensor& w,
    const Tensor& scales,
    const OptionalTensor& biases,
    OptionalInt group_size,
    OptionalInt bits,
    std::string_view mode,
    const OptionalTensor& global_scale,
    std::optional<at::ScalarType> dtype) {
  refuse_tangents("dequantize", {&scales, pointer(biases)});
  refuse_parameter_gradients("dequantize", mode, scales, biases);
  if (at::GradMode::is_enabled() && (wants_gradient(scales) || wants_gradient(biases))) {
    return Dequantize::apply(
        w, scales, biases, dtype,
        Weights{
            w, scales, biases, global_scale, /*transpose=*/true, group_size, bits, std::string(mode), "dequantize"});
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return ops::dequantize(w, scales, biases, group_size, bits, mode, global_scale, dtype);
}

std::tuple<Tensor, Tensor, Tensor> quantize(
    const Tensor& w,
    OptionalInt group_size,
    OptionalInt bits,
    std::string_view mode,
    const OptionalTensor& global_scale) {
  at::AutoDispatchBelowADInplaceOrView guard;
  return ops::quantize(w, group_size, bits, mode, global_scale);
}

Tensor sample(
    const Tensor& logits,
    const OptionalTensor& seeds,
    c10::SymInt seed,
    c10::SymInt offset,
    double temperature,
    int64_t top_k,
    double top_p,
    double min_p,
    double repetition_penalty,
    const OptionalTensor& previous) {
  at::AutoDispatchBelowADInplaceOrView guard;
  return ops::sample(
      logits, seeds, std::move(seed), std::move(offset), temperature, top_k, top_p, min_p, repetition_penalty,
      previous);
}

}  // namespace quantization_mlx::autograd
