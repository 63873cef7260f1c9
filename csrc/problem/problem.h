// The arguments of an op, checked. Back ends trust these structs and check nothing again.
//
// Each struct is one op. `Schema` has the parameters of its schema (torch-ext/torch_binding.cpp) in the same order;
// `check` makes a problem of them, and `meta` the empty result alone, for tracing. Both raise TypeError for dtypes and
// ValueError for everything else that does not fit.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>
#include <tuple>

#include "../format.h"
#include "modes.h"
#include "sizes.h"

namespace quantization_mlx {

// Matrices within a tensor of any leading sizes; strides count elements, and columns are adjacent.
struct Matrices {
  at::Tensor tensor;
  int64_t count = 0;
  int64_t matrix_stride = 0;
  int64_t row_stride = 0;
};

// Checked weights. The rows of each matrix follow one another without gaps.
struct QuantizedMatrices {
  Format format;
  Matrices words;
  Matrices scales;
  Matrices biases;  // or zeros; an undefined tensor in modes that have neither
  at::Tensor global_scale;  // undefined, or float32 with one element or one per matrix
};

template <typename Int>
struct MatmulShape {
  Int M;
  Int K;
  Int N;
  Sizes<Int> x_batch;  // leading sizes of x
  Sizes<Int> w_batch;  // leading sizes of w
  Sizes<Int> batch;  // one product for each of these; the result is [*batch, M, N]
  Sizes<Int> output;
};

// x @ dequantize(w).T (transpose) or x @ dequantize(w), the latter alone where columns are packed. Batches of x and w
// broadcast; where w is a single matrix, all rows of x are one product.
struct MatmulProblem {
  std::string_view op;
  QuantizedMatrices weights;
  bool transpose;
  Matrices x;  // [M, K] each, of the result's dtype
  at::ScalarType dtype;
  MatmulShape<int64_t> shape;

  at::Device device() const { return x.tensor.device(); }

  static constexpr const char* name = "quantized_matmul";
  template <typename Result>
  using Schema = Result(
      const at::Tensor& x,
      const at::Tensor& w,
      const at::Tensor& scales,
      const std::optional<at::Tensor>& biases,
      bool transpose,
      std::optional<int64_t> group_size,
      std::optional<int64_t> bits,
      std::string_view mode,
      const std::optional<at::Tensor>& global_scale,
      std::string_view op);
  static Schema<MatmulProblem> check;
  static Schema<at::Tensor> meta;
};

// One product for each pair of indices: x[lhs_indices[i]] with w[rhs_indices[i]].
struct GatherProblem {
  MatmulProblem matmul;  // shape.batch is the broadcast shape of the indices
  at::Tensor lhs_indices;  // int64, contiguous, broadcast
  at::Tensor rhs_indices;
  bool sorted_indices;  // the caller's promise; nothing depends on it being kept

  at::Device device() const { return matmul.device(); }

  static constexpr const char* name = "gather_qmm";
  template <typename Result>
  using Schema = Result(
      const at::Tensor& x,
      const at::Tensor& w,
      const at::Tensor& scales,
      const std::optional<at::Tensor>& biases,
      const std::optional<at::Tensor>& lhs_indices,
      const std::optional<at::Tensor>& rhs_indices,
      bool transpose,
      std::optional<int64_t> group_size,
      std::optional<int64_t> bits,
      std::string_view mode,
      const std::optional<at::Tensor>& global_scale,
      bool sorted_indices,
      std::string_view op);
  static Schema<GatherProblem> check;
  static Schema<at::Tensor> meta;
};

struct DequantizeProblem {
  QuantizedMatrices weights;
  at::ScalarType dtype;
  Sizes<int64_t> output;

  at::Device device() const { return weights.words.tensor.device(); }

  static constexpr const char* name = "dequantize";
  template <typename Result>
  using Schema = Result(
      const at::Tensor& w,
      const at::Tensor& scales,
      const std::optional<at::Tensor>& biases,
      std::optional<int64_t> group_size,
      std::optional<int64_t> bits,
      std::string_view mode,
      const std::optional<at::Tensor>& global_scale,
      std::optional<at::ScalarType> dtype);
  static Schema<DequantizeProblem> check;
  static Schema<at::Tensor> meta;
};

struct QuantizeProblem {
  Format format;
  at::Tensor w;  // contiguous
  at::Tensor global_scale;  // undefined or one float32
  Sizes<int64_t> words;
  Sizes<int64_t> scales;

  at::Device device() const { return w.device(); }

  static constexpr const char* name = "quantize";
  template <typename Result>
  using Schema = Result(
      const at::Tensor& w,
      std::optional<int64_t> group_size,
      std::optional<int64_t> bits,
      std::string_view mode,
      const std::optional<at::Tensor>& global_scale);
  static Schema<QuantizeProblem> check;
  static Schema<std::tuple<at::Tensor, at::Tensor, at::Tensor>> meta;
};

// The names that errors carry.
inline std::string_view op_of(const MatmulProblem& problem) { return problem.op; }
inline std::string_view op_of(const GatherProblem& problem) { return problem.matmul.op; }
inline std::string_view op_of(const DequantizeProblem& problem) { return problem.name; }
inline std::string_view op_of(const QuantizeProblem& problem) { return problem.name; }

// The three results of quantize, uninitialised; the third is empty in modes that have neither biases nor zeros.
std::tuple<at::Tensor, at::Tensor, at::Tensor> empty_quantized(const QuantizeProblem& problem);

// Raises IndexError unless all of these int64 indices, contiguous and in host memory, choose one of `matrices`.
void check_range(std::string_view op, const char* name, const at::Tensor& indices, int64_t matrices);

// For every position of batch, in row-major order, the matrix of an operand with these leading sizes that serves it.
c10::SmallVector<int64_t, 8> broadcast_matrices(c10::IntArrayRef operand_batch, c10::IntArrayRef batch);

}  // namespace quantization_mlx
