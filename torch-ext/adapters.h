// From the arguments of an op's schema to a checked problem and a back end: one template per op, for every dispatch
// key.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <string_view>
#include <tuple>

#include "../csrc/problem.h"

namespace quantization_mlx::adapters {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using OptionalInt = std::optional<int64_t>;

template <auto run>
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
  return run(MatmulProblem::check({op, w, scales, biases, group_size, bits, mode, global_scale}, x, transpose));
}

template <auto run>
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
  return run(
      GatherProblem::check(
          {op, w, scales, biases, group_size, bits, mode, global_scale}, x, lhs_indices, rhs_indices, transpose,
          sorted_indices));
}

template <auto run>
Tensor dequantize(
    const Tensor& w,
    const Tensor& scales,
    const OptionalTensor& biases,
    OptionalInt group_size,
    OptionalInt bits,
    std::string_view mode,
    const OptionalTensor& global_scale,
    std::optional<at::ScalarType> dtype) {
  return run(DequantizeProblem::check({"dequantize", w, scales, biases, group_size, bits, mode, global_scale}, dtype));
}

template <auto run>
std::tuple<Tensor, Tensor, Tensor> quantize(
    const Tensor& w,
    OptionalInt group_size,
    OptionalInt bits,
    std::string_view mode,
    const OptionalTensor& global_scale) {
  return run(QuantizeProblem::check(w, group_size, bits, mode, global_scale));
}

// --- The empty result, for tracing ----------------------------------------------------------------------------------

inline Tensor quantized_matmul_meta(
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
  return MatmulProblem::meta({op, w, scales, biases, group_size, bits, mode, global_scale}, x, transpose);
}

inline Tensor gather_qmm_meta(
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
    bool,
    std::string_view op) {
  return GatherProblem::meta(
      {op, w, scales, biases, group_size, bits, mode, global_scale}, x, lhs_indices, rhs_indices, transpose);
}

inline Tensor dequantize_meta(
    const Tensor& w,
    const Tensor& scales,
    const OptionalTensor& biases,
    OptionalInt group_size,
    OptionalInt bits,
    std::string_view mode,
    const OptionalTensor& global_scale,
    std::optional<at::ScalarType> dtype) {
  return DequantizeProblem::meta({"dequantize", w, scales, biases, group_size, bits, mode, global_scale}, dtype);
}

inline std::tuple<Tensor, Tensor, Tensor> quantize_meta(
    const Tensor& w,
    OptionalInt group_size,
    OptionalInt bits,
    std::string_view mode,
    const OptionalTensor& global_scale) {
  return QuantizeProblem::meta(w, group_size, bits, mode, global_scale);
}

// --- What would run: `describe` takes a problem and the name of a GPU with the version of its macOS -----------------

template <auto describe>
std::string explain_quantized_matmul(
    const Tensor& x,
    const Tensor& w,
    const Tensor& scales,
    const OptionalTensor& biases,
    bool transpose,
    OptionalInt group_size,
    OptionalInt bits,
    std::string_view mode,
    const OptionalTensor& global_scale,
    std::string_view op,
    std::string_view gpu,
    int64_t macos) {
  return describe(
      MatmulProblem::check({op, w, scales, biases, group_size, bits, mode, global_scale}, x, transpose), gpu, macos);
}

template <auto describe>
std::string explain_gather_qmm(
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
    std::string_view op,
    std::string_view gpu,
    int64_t macos) {
  return describe(
      GatherProblem::check(
          {op, w, scales, biases, group_size, bits, mode, global_scale}, x, lhs_indices, rhs_indices, transpose,
          sorted_indices),
      gpu, macos);
}

template <auto describe>
std::string explain_dequantize(
    const Tensor& w,
    const Tensor& scales,
    const OptionalTensor& biases,
    OptionalInt group_size,
    OptionalInt bits,
    std::string_view mode,
    const OptionalTensor& global_scale,
    std::optional<at::ScalarType> dtype,
    std::string_view gpu,
    int64_t macos) {
  return describe(
      DequantizeProblem::check({"dequantize", w, scales, biases, group_size, bits, mode, global_scale}, dtype), gpu,
      macos);
}

template <auto describe>
std::string explain_quantize(
    const Tensor& w,
    OptionalInt group_size,
    OptionalInt bits,
    std::string_view mode,
    const OptionalTensor& global_scale,
    std::string_view gpu,
    int64_t macos) {
  return describe(QuantizeProblem::check(w, group_size, bits, mode, global_scale), gpu, macos);
}

}  // namespace quantization_mlx::adapters
