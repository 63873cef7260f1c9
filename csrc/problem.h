// The one place where the arguments of an op are judged. Everything behind it trusts these structs.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/SymInt.h>
#include <c10/util/SmallVector.h>

#include <optional>
#include <string>
#include <string_view>
#include <tuple>

#include "format.h"

namespace quantization_mlx {

// Sizes as plain integers or, where a compiler traces the op, as symbols.
template <typename Int>
using Sizes = c10::SmallVector<Int, 6>;

// For requirements: whether a condition holds. Of sizes that depend on data, a tracing compiler does not know: it takes
// the condition for true, and the traced program asserts it when it runs.
inline bool holds(bool condition) { return condition; }
inline bool holds(const c10::SymBool& condition) { return condition.expect_true(__FILE__, __LINE__); }

// For choices between two ways of computing the same: whether a condition is known to be true while tracing.
inline bool is_known(bool condition) { return condition; }
inline bool is_known(const c10::SymBool& condition) { return condition.guard_or_false(__FILE__, __LINE__); }

// The arguments that every op on packed weights has in common, as the caller gave them.
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

  static MatmulProblem check(const WeightArguments& arguments, const at::Tensor& x, bool transpose);
  // The empty result alone, for tracing.
  static at::Tensor meta(const WeightArguments& arguments, const at::Tensor& x, bool transpose);
};

// One product for each pair of indices: x[lhs_indices[i]] with w[rhs_indices[i]].
struct GatherProblem {
  MatmulProblem matmul;  // shape.batch is the broadcast shape of the indices
  at::Tensor lhs_indices;  // int64, contiguous, broadcast
  at::Tensor rhs_indices;
  bool sorted_indices;  // the caller's promise; nothing depends on it being kept

  at::Device device() const { return matmul.device(); }

  static GatherProblem check(
      const WeightArguments& arguments,
      const at::Tensor& x,
      const std::optional<at::Tensor>& lhs_indices,
      const std::optional<at::Tensor>& rhs_indices,
      bool transpose,
      bool sorted_indices);
  static at::Tensor meta(
      const WeightArguments& arguments,
      const at::Tensor& x,
      const std::optional<at::Tensor>& lhs_indices,
      const std::optional<at::Tensor>& rhs_indices,
      bool transpose);
};

struct DequantizeProblem {
  QuantizedMatrices weights;
  at::ScalarType dtype;
  Sizes<int64_t> output;

  at::Device device() const { return weights.words.tensor.device(); }

  static DequantizeProblem check(const WeightArguments& arguments, std::optional<at::ScalarType> dtype);
  static at::Tensor meta(const WeightArguments& arguments, std::optional<at::ScalarType> dtype);
};

struct QuantizeProblem {
  Format format;
  at::Tensor w;  // contiguous
  at::Tensor global_scale;  // undefined or one float32
  Sizes<int64_t> words;
  Sizes<int64_t> scales;

  at::Device device() const { return w.device(); }

  static QuantizeProblem check(
      const at::Tensor& w,
      std::optional<int64_t> group_size,
      std::optional<int64_t> bits,
      std::string_view mode,
      const std::optional<at::Tensor>& global_scale);
  static std::tuple<at::Tensor, at::Tensor, at::Tensor> meta(
      const at::Tensor& w,
      std::optional<int64_t> group_size,
      std::optional<int64_t> bits,
      std::string_view mode,
      const std::optional<at::Tensor>& global_scale);
};

// The three results of quantize, uninitialised; the third is empty in modes that have neither biases nor zeros.
std::tuple<at::Tensor, at::Tensor, at::Tensor> empty_quantized(const QuantizeProblem& problem);

// "affine", "mxfp4", ...; ends in a zero byte.
std::string_view name_of(Mode mode);

// Whether the mode of this name packs columns; false for a name that is none.
bool is_column_packed(std::string_view mode);

// The table of formats.h as JSON: a list of {"name", "packing", "element", "scale", "offset", "group_sizes", "widths",
// "default_group_size", "default_bits"}.
std::string describe_modes();

// Raises IndexError unless all of these int64 indices, contiguous and in host memory, choose one of `matrices`.
void check_range(std::string_view op, const char* name, const at::Tensor& indices, int64_t matrices);

// For every position of batch, in row-major order, the matrix of an operand with these leading sizes that serves it.
c10::SmallVector<int64_t, 8> broadcast_matrices(c10::IntArrayRef operand_batch, c10::IntArrayRef batch);

// The result dtype of a product: in affine mode x, scales and biases promote, else it is x's.
at::ScalarType result_dtype(const WeightArguments& arguments, const at::Tensor& x);

}  // namespace quantization_mlx
