// What ops check alike, most of it of packed weights, for the files of this folder.
#pragma once

#include "problem.h"
#include "sizes.h"

namespace quantization_mlx {

// The arguments that they have in common, as the caller gave them.
struct WeightArguments {
  std::string_view op;
  const at::Tensor& w;
  const at::Tensor& scales;
  const std::optional<at::Tensor>& biases;
  std::optional<int64_t> group_size;
  std::optional<int64_t> bits;
  std::string_view mode;
  const std::optional<at::Tensor>& global_scale;
};

// Whether a product takes activations of this dtype.
bool is_activation(at::ScalarType dtype);

void check_activation(std::string_view op, const char* name, const at::Tensor& tensor);

void check_device(
    std::string_view op,
    const char* name,
    const at::Tensor& tensor,
    const char* other_name,
    const at::Tensor& other);

// one_per_matrix: a gathered product may scale each of its matrices.
void check_global_scale(
    std::string_view op,
    Mode mode,
    const std::optional<at::Tensor>& global_scale,
    const char* other_name,
    const at::Tensor& other,
    bool one_per_matrix);

// A bias [experts, length] of an op whose results have this dtype, and of which expert each of these leading sizes is.
template <typename Int>
void check_expert_bias(
    std::string_view op,
    const char* name,
    const at::Tensor& bias,
    const at::Tensor& experts,
    c10::ArrayRef<Int> leading,
    const Int& length,
    at::ScalarType dtype);

// Everything about the weights but their sizes and the global scale.
Format check_weights(const WeightArguments& arguments);

// The unpacked length of a row of w, or of a column where columns are packed; Int is int64_t or c10::SymInt.
template <typename Int>
Int check_packing(const WeightArguments& arguments, Format format);

// Of scales and biases together: promoting a value is exact.
at::ScalarType scale_dtype(const WeightArguments& arguments);

at::Tensor with_dtype(const at::Tensor& tensor, at::ScalarType dtype);

// The stride of all sizes from `first` on but `trailing` ones seen as one; nothing where they have no common one.
std::optional<int64_t> leading_stride(const at::Tensor& tensor, int64_t trailing, int64_t first = 0);

QuantizedMatrices matrices_of(const WeightArguments& arguments, Format format);

}  // namespace quantization_mlx
