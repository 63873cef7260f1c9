#include "weights.h"

#include <c10/core/ScalarType.h>

namespace quantization_mlx {

using at::ScalarType;
using at::Tensor;
using c10::sym_eq;

namespace {

bool is_words(ScalarType dtype) { return dtype == at::kUInt32 || dtype == at::kInt; }

// name: "scales", "biases" or "zeros", which have one dtype.
void check_scale_dtype(const WeightArguments& arguments, Scale scale, const char* name, const Tensor& tensor) {
  if (scale == Scale::real) {
    check_activation(arguments.op, name, tensor);
    return;
  }
  const bool is_float16 = scale == Scale::float16;
  TORCH_CHECK_TYPE(
      tensor.defined() && tensor.scalar_type() == (is_float16 ? at::kHalf : at::kByte), "[", arguments.op, "] ", name,
      " have dtype ", tensor.scalar_type(), "; mode \"", arguments.mode, "\" has ", is_float16 ? "float16 " : "uint8 ",
      name, ".");
}

void check_offsets(const WeightArguments& arguments, const ModeTraits& traits) {
  const bool wanted = traits.offset != Offset::none;
  const char* name = traits.offset == Offset::zeros ? "zeros" : "biases";
  TORCH_CHECK_VALUE(
      arguments.biases.has_value() == wanted, "[", arguments.op, "] mode \"", arguments.mode, "\" ",
      wanted ? "needs " : "has no ", name, traits.offset == Offset::zeros ? ", as biases." : ".");
  if (wanted) {
    check_scale_dtype(arguments, traits.scale, name, *arguments.biases);
    check_device(arguments.op, name, *arguments.biases, "w", arguments.w);
  }
}

// Copies only what has gaps within a matrix or, between matrices, gaps of several sizes.
Matrices weight_matrices(const Tensor& tensor) {
  const int64_t rows = tensor.size(-2);
  const int64_t columns = tensor.size(-1);
  const int64_t count = product<int64_t>(tensor.sizes().slice(0, tensor.dim() - 2));
  const bool dense_matrix = (tensor.stride(-1) == 1 || columns <= 1) && (tensor.stride(-2) == columns || rows <= 1);
  const std::optional<int64_t> stride = dense_matrix ? leading_stride(tensor, 2) : std::nullopt;
  if (stride.has_value()) {
    return {tensor, count, *stride, columns};
  }
  return {tensor.contiguous(), count, rows * columns, columns};
}

}  // namespace

std::optional<int64_t> leading_stride(const Tensor& tensor, int64_t trailing, int64_t first) {
  int64_t count = 1;
  int64_t stride = 0;
  for (int64_t i = tensor.dim() - trailing - 1; i >= first; --i) {
    if (tensor.size(i) == 1) {
      continue;
    }
    if (count > 1 && tensor.stride(i) != count * stride) {
      return std::nullopt;
    }
    stride = count > 1 ? stride : tensor.stride(i);
    count *= tensor.size(i);
  }
  return stride;
}

bool is_activation(ScalarType dtype) { return dtype == at::kFloat || dtype == at::kHalf || dtype == at::kBFloat16; }

void check_activation(std::string_view op, const char* name, const Tensor& tensor) {
  TORCH_CHECK_TYPE(tensor.defined(), "[", op, "] ", name, " is None; it must be a tensor.");
  TORCH_CHECK_TYPE(
      is_activation(tensor.scalar_type()), "[", op, "] ", name, " has dtype ", tensor.scalar_type(),
      "; supported are float32, float16 and bfloat16.");
}

void check_device(
    std::string_view op,
    const char* name,
    const Tensor& tensor,
    const char* other_name,
    const Tensor& other) {
  TORCH_CHECK_VALUE(
      tensor.device() == other.device(), "[", op, "] ", name, " is on ", tensor.device(), " and ", other_name, " on ",
      other.device(), "; all arguments must be on one device.");
}

void check_global_scale(
    std::string_view op,
    Mode mode,
    const std::optional<Tensor>& global_scale,
    const char* other_name,
    const Tensor& other,
    bool one_per_matrix) {
  if (!global_scale.has_value()) {
    return;
  }
  TORCH_CHECK_VALUE(
      takes_global_scale(mode), "[", op, "] global_scale is given with mode \"", name_of(mode),
      "\"; it is only for mode \"nvfp4\".");
  TORCH_CHECK_TYPE(
      global_scale->scalar_type() == at::kFloat, "[", op, "] global_scale has dtype ", global_scale->scalar_type(),
      "; it must be float32.");
  check_device(op, "global_scale", *global_scale, other_name, other);
  TORCH_CHECK_VALUE(
      is_known(global_scale->sym_numel().sym_eq(1)) ||
          (one_per_matrix && other.dim() > 2
               ? same_sizes(global_scale->sym_sizes(), other.sym_sizes().slice(0, other.dim() - 2))
               : holds(global_scale->sym_numel().sym_eq(1))),
      "[", op, "] global_scale has shape ", global_scale->sym_sizes(), "; it must have one element",
      one_per_matrix ? " or the leading shape of w." : ".");
}

template <typename Int>
void check_expert_bias(
    std::string_view op,
    const char* name,
    const Tensor& bias,
    const Tensor& experts,
    c10::ArrayRef<Int> leading,
    const Int& length,
    ScalarType dtype) {
  check_activation(op, name, bias);
  TORCH_CHECK_TYPE(
      c10::promoteTypes(dtype, bias.scalar_type()) == dtype, "[", op, "] ", name, " has dtype ", bias.scalar_type(),
      ", which does not promote to that of the result, ", dtype, ".");
  TORCH_CHECK_TYPE(
      experts.scalar_type() == at::kLong, "[", op, "] experts have dtype ", experts.scalar_type(),
      "; they must be int64.");
  check_device(op, name, bias, "experts", experts);
  TORCH_CHECK_VALUE(
      bias.dim() == 2 && holds(sym_eq(sizes_of<Int>(bias)[1], length)), "[", op, "] ", name, " of shape ",
      sizes_of<Int>(bias), " must be [experts, ", length, "].");
  TORCH_CHECK_VALUE(
      same_sizes(sizes_of<Int>(experts), leading), "[", op, "] experts of shape ", sizes_of<Int>(experts),
      " must have the leading sizes, ", leading, ".");
}

template void check_expert_bias(
    std::string_view,
    const char*,
    const Tensor&,
    const Tensor&,
    c10::IntArrayRef,
    const int64_t&,
    ScalarType);
template void check_expert_bias(
    std::string_view,
    const char*,
    const Tensor&,
    const Tensor&,
    c10::SymIntArrayRef,
    const c10::SymInt&,
    ScalarType);

Format check_weights(const WeightArguments& arguments) {
  std::string_view op = arguments.op;
  const Format format = parse_format(op, arguments.mode, arguments.group_size, arguments.bits);
  const auto& [w, scales] = std::tie(arguments.w, arguments.scales);
  TORCH_CHECK_TYPE(
      w.defined() && scales.defined(), "[", op, "] ", w.defined() ? "scales" : "w", " is None; it must be a tensor.");
  TORCH_CHECK_TYPE(
      is_words(w.scalar_type()), "[", op, "] w has dtype ", w.scalar_type(),
      "; packed weights must be uint32 or int32 words.");
  TORCH_CHECK_VALUE(
      w.dim() >= 2 && scales.dim() >= 2, "[", op, "] w of shape ", w.sym_sizes(), " and scales of shape ",
      scales.sym_sizes(), " must have at least two dimensions.");
  check_device(op, "scales", scales, "w", w);
  const ModeTraits traits = traits_of(format.mode);
  check_offsets(arguments, traits);
  check_scale_dtype(arguments, traits.scale, "scales", scales);
  return format;
}

template <typename Int>
Int check_packing(const WeightArguments& arguments, Format format) {
  const auto w = sizes_of<Int>(arguments.w);
  const auto scales = sizes_of<Int>(arguments.scales);
  const Int bits = format.bits;
  const Int group_size = format.group_size;
  const bool columns = is_column_packed(format.mode);
  const size_t from_last = columns ? 2 : 1;  // of the packed dimension
  const Int words = w[w.size() - from_last];
  const Int groups = scales[scales.size() - from_last];
  const Int length = groups * group_size;
  TORCH_CHECK_VALUE(
      w.size() == scales.size() &&
          same_sizes(w.slice(0, w.size() - from_last), scales.slice(0, scales.size() - from_last)) &&
          (!columns || holds(sym_eq(w.back(), scales.back()))) && holds(sym_eq(words * 32, length * bits)),
      "[", arguments.op, "] w of shape ", w, " and scales of shape ", scales, " do not belong together: ", bits,
      "-bit ", columns ? "columns" : "rows", " of ", words, " words hold ", words * 32, "/", bits, " elements, and ",
      groups, " groups of ", group_size, " hold ", length, ".");
  if (arguments.biases.has_value()) {
    TORCH_CHECK_VALUE(
        same_sizes(sizes_of<Int>(*arguments.biases), scales), "[", arguments.op, "] ",
        has_zeros(format.mode) ? "zeros" : "biases", " of shape ", sizes_of<Int>(*arguments.biases),
        " must have the shape of scales, ", scales, ".");
  }
  return length;
}

template int64_t check_packing(const WeightArguments& arguments, Format format);
template c10::SymInt check_packing(const WeightArguments& arguments, Format format);

ScalarType scale_dtype(const WeightArguments& arguments) {
  const ScalarType scales = arguments.scales.scalar_type();
  return arguments.biases.has_value() ? c10::promoteTypes(scales, arguments.biases->scalar_type()) : scales;
}

Tensor with_dtype(const Tensor& tensor, ScalarType dtype) {
  return tensor.scalar_type() == dtype ? tensor : tensor.to(dtype);
}

QuantizedMatrices matrices_of(const WeightArguments& arguments, Format format) {
  QuantizedMatrices result{format, weight_matrices(arguments.w), {}, {}, {}};
  const ScalarType dtype = scale_dtype(arguments);
  result.scales = weight_matrices(with_dtype(arguments.scales, dtype));
  if (arguments.biases.has_value()) {
    result.biases = weight_matrices(with_dtype(*arguments.biases, dtype));
  }
  if (arguments.global_scale.has_value()) {
    result.global_scale = arguments.global_scale->contiguous();
  }
  return result;
}

}  // namespace quantization_mlx
