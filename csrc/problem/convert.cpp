// Conversions: quantize and dequantize.
#include <c10/core/ScalarType.h>

#include "weights.h"

namespace quantization_mlx {
namespace {

using at::ScalarType;
using at::Tensor;
using c10::sym_eq;

ScalarType dequantized_dtype(const WeightArguments& arguments, Format format, std::optional<ScalarType> dtype) {
  if (dtype.has_value()) {
    TORCH_CHECK_TYPE(
        is_activation(*dtype), "[", arguments.op, "] dtype is ", *dtype,
        "; supported are float32, float16 and bfloat16.");
    return *dtype;
  }
  switch (traits_of(format.mode).scale) {
    case Scale::real: return scale_dtype(arguments);
    case Scale::float16: return at::kHalf;
    default: return at::kBFloat16;
  }
}

template <typename Int>
Sizes<Int> unpacked_sizes(const WeightArguments& arguments, Format format) {
  const Int length = check_packing<Int>(arguments, format);
  const auto sizes = sizes_of<Int>(arguments.w);
  Sizes<Int> result(sizes.begin(), sizes.end());
  result[result.size() - (is_column_packed(format.mode) ? 2 : 1)] = length;
  return result;
}

template <typename Int>
struct QuantizedShape {
  Sizes<Int> words;
  Sizes<Int> scales;
};

template <typename Int>
QuantizedShape<Int> quantized_shape(const Tensor& w, Format format) {
  const auto sizes = sizes_of<Int>(w);
  TORCH_CHECK_VALUE(sizes.size() >= 2, "[quantize] w of shape ", sizes, " must have at least two dimensions.");
  const Int group_size = format.group_size;
  const bool columns = is_column_packed(format.mode);
  const Int length = sizes[sizes.size() - (columns ? 2 : 1)];
  TORCH_CHECK_VALUE(
      holds(sym_eq(length % group_size, Int(0))), "[quantize] the ", columns ? "second to last" : "last",
      " size of w, of shape ", sizes, ", must be divisible by group_size ", group_size, ".");
  const Int words = length * format.bits / 32;
  const Int groups = length / group_size;
  if (columns) {
    const auto leading = sizes.slice(0, sizes.size() - 2);
    return {joined<Int>(leading, {words, sizes.back()}), joined<Int>(leading, {groups, sizes.back()})};
  }
  const auto leading = sizes.slice(0, sizes.size() - 1);
  return {joined<Int>(leading, {words}), joined<Int>(leading, {groups})};
}

Format check_quantize(
    const Tensor& w,
    std::optional<int64_t> group_size,
    std::optional<int64_t> bits,
    std::string_view mode,
    const std::optional<Tensor>& global_scale) {
  const Format format = parse_format("quantize", mode, group_size, bits);
  check_activation("quantize", "w", w);
  check_global_scale("quantize", format.mode, global_scale, "w", w, /*one_per_matrix=*/false);
  return format;
}

template <typename Int>
std::tuple<Tensor, Tensor, Tensor> empty_results(const Tensor& w, Format format, const QuantizedShape<Int>& shape) {
  const Scale scale = traits_of(format.mode).scale;
  const auto dtype = scale == Scale::real ? w.scalar_type() : scale == Scale::float16 ? at::kHalf : at::kByte;
  const auto parameters = w.options().dtype(dtype);
  const bool third = has_biases(format.mode) || has_zeros(format.mode);
  const Sizes<Int> none{Int(0)};
  return {
      empty(c10::ArrayRef<Int>(shape.words), w.options().dtype(at::kUInt32)),
      empty(c10::ArrayRef<Int>(shape.scales), parameters),
      empty(c10::ArrayRef<Int>(third ? shape.scales : none), parameters)};
}

}  // namespace

DequantizeProblem DequantizeProblem::check(
    const Tensor& w,
    const Tensor& scales,
    const std::optional<Tensor>& biases,
    std::optional<int64_t> group_size,
    std::optional<int64_t> bits,
    std::string_view mode,
    const std::optional<Tensor>& global_scale,
    std::optional<ScalarType> dtype) {
  const WeightArguments arguments{name, w, scales, biases, group_size, bits, mode, global_scale};
  const Format format = check_weights(arguments);
  check_global_scale(arguments.op, format.mode, arguments.global_scale, "w", arguments.w, /*one_per_matrix=*/false);
  return {
      matrices_of(arguments, format), dequantized_dtype(arguments, format, dtype),
      unpacked_sizes<int64_t>(arguments, format)};
}

Tensor DequantizeProblem::meta(
    const Tensor& w,
    const Tensor& scales,
    const std::optional<Tensor>& biases,
    std::optional<int64_t> group_size,
    std::optional<int64_t> bits,
    std::string_view mode,
    const std::optional<Tensor>& global_scale,
    std::optional<ScalarType> dtype) {
  const WeightArguments arguments{name, w, scales, biases, group_size, bits, mode, global_scale};
  const Format format = check_weights(arguments);
  check_global_scale(arguments.op, format.mode, arguments.global_scale, "w", arguments.w, /*one_per_matrix=*/false);
  const auto output = unpacked_sizes<c10::SymInt>(arguments, format);
  return empty(c10::SymIntArrayRef(output), arguments.w.options().dtype(dequantized_dtype(arguments, format, dtype)));
}

QuantizeProblem QuantizeProblem::check(
    const Tensor& w,
    std::optional<int64_t> group_size,
    std::optional<int64_t> bits,
    std::string_view mode,
    const std::optional<Tensor>& global_scale) {
  const Format format = check_quantize(w, group_size, bits, mode, global_scale);
  auto shape = quantized_shape<int64_t>(w, format);
  return {
      format, w.contiguous(), global_scale.has_value() ? global_scale->contiguous() : Tensor(), std::move(shape.words),
      std::move(shape.scales)};
}

std::tuple<Tensor, Tensor, Tensor> QuantizeProblem::meta(
    const Tensor& w,
    std::optional<int64_t> group_size,
    std::optional<int64_t> bits,
    std::string_view mode,
    const std::optional<Tensor>& global_scale) {
  const Format format = check_quantize(w, group_size, bits, mode, global_scale);
  return empty_results(w, format, quantized_shape<c10::SymInt>(w, format));
}

std::tuple<Tensor, Tensor, Tensor> empty_quantized(const QuantizeProblem& problem) {
  return empty_results<int64_t>(problem.w, problem.format, {problem.words, problem.scales});
}

}  // namespace quantization_mlx
