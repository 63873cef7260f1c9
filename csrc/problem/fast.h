// The arguments of the ops between products, checked: as problem.h, of which this is the second half.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>
#include <tuple>

#include "sizes.h"

namespace quantization_mlx {

// Vectors along the last dimension of a tensor; strides count elements, and those of a vector are adjacent.
struct Vectors {
  at::Tensor tensor;
  int64_t count = 0;
  int64_t stride = 0;
};

// Every vector of x, or of x + residual, normalised, times weight, plus bias.
struct NormProblem {
  enum class Kind : uint8_t { rms, layer };

  std::string_view op;
  Kind kind;
  Vectors x;  // of the result's dtype, as all tensors
  Vectors residual;  // an undefined tensor where nothing is added
  at::Tensor weight;  // [length], contiguous; undefined for 1
  at::Tensor bias;  // [length], contiguous; undefined for 0
  double epsilon;
  int64_t length;
  Sizes<int64_t> output;

  at::Device device() const { return x.tensor.device(); }
  bool is_empty() const { return x.count == 0 || length == 0; }
};

struct RmsNormProblem : NormProblem {
  static constexpr const char* name = "rms_norm";
  template <typename Result>
  using Schema = Result(const at::Tensor& x, const std::optional<at::Tensor>& weight, double eps);
  static Schema<RmsNormProblem> check;
  static Schema<at::Tensor> meta;
};

struct LayerNormProblem : NormProblem {
  static constexpr const char* name = "layer_norm";
  template <typename Result>
  using Schema = Result(
      const at::Tensor& x,
      const std::optional<at::Tensor>& weight,
      const std::optional<at::Tensor>& bias,
      double eps);
  static Schema<LayerNormProblem> check;
  static Schema<at::Tensor> meta;
};

// The sum, rounded to its dtype, and the RMS norm of that.
struct AddRmsNormProblem : NormProblem {
  static constexpr const char* name = "add_rms_norm";
  template <typename Result>
  using Schema =
      Result(const at::Tensor& x, const at::Tensor& residual, const std::optional<at::Tensor>& weight, double eps);
  static Schema<AddRmsNormProblem> check;
  static Schema<std::tuple<at::Tensor, at::Tensor>> meta;
};

inline std::string_view op_of(const NormProblem& problem) { return problem.op; }

}  // namespace quantization_mlx
