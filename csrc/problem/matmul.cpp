// Products: quantized_matmul and gather_qmm.
#include <ATen/ops/arange.h>
#include <c10/core/ScalarType.h>

#include <algorithm>
#include <vector>

#include "weights.h"

namespace quantization_mlx {
namespace {

using at::ScalarType;
using at::Tensor;
using c10::sym_eq;
using c10::sym_ne;

// M, K, N and the operands' batches; the caller says how the batches combine.
template <typename Int>
MatmulShape<Int> operand_shape(const WeightArguments& arguments, Format format, const Tensor& x, bool transpose) {
  std::string_view op = arguments.op;
  const Int length = check_packing<Int>(arguments, format);
  const auto x_sizes = sizes_of<Int>(x);
  const auto w_sizes = sizes_of<Int>(arguments.w);
  TORCH_CHECK_VALUE(!x_sizes.empty(), "[", op, "] x is a scalar; it needs at least one dimension.");
  TORCH_CHECK_VALUE(
      !transpose || !is_column_packed(format.mode), "[", op, "] mode \"", name_of(format.mode),
      "\" has column-packed weights [K, N]; it takes transpose=False.");
  MatmulShape<Int> shape;
  const bool columns = is_column_packed(format.mode);
  shape.M = x_sizes.size() > 1 ? x_sizes[x_sizes.size() - 2] : Int(1);
  const Int& rows = w_sizes[w_sizes.size() - 2];
  shape.K = transpose || columns ? length : rows;
  shape.N = transpose ? rows : columns ? w_sizes.back() : length;
  TORCH_CHECK_VALUE(
      holds(sym_eq(x_sizes.back(), shape.K)), "[", op, "] x of shape ", x_sizes, " and w of shape ", w_sizes,
      " do not fit: with transpose=", transpose ? "True" : "False", ", bits ", format.bits, " and group_size ",
      format.group_size, " the last size of x must be ", shape.K, ".");
  TORCH_CHECK_VALUE(
      holds(sym_ne(shape.K, Int(0))), "[", op, "] the inner size K is 0: x of shape ", x_sizes, ", w of shape ",
      w_sizes, ".");
  const auto x_leading = x_sizes.size() > 1 ? x_sizes.slice(0, x_sizes.size() - 2) : c10::ArrayRef<Int>();
  const auto w_leading = w_sizes.slice(0, w_sizes.size() - 2);
  shape.x_batch.assign(x_leading.begin(), x_leading.end());
  shape.w_batch.assign(w_leading.begin(), w_leading.end());
  return shape;
}

template <typename Int>
MatmulShape<Int> matmul_shape(const WeightArguments& arguments, Format format, const Tensor& x, bool transpose) {
  auto shape = operand_shape<Int>(arguments, format, x, transpose);
  if (shape.w_batch.empty()) {
    shape.output = joined<Int>(sizes_of<Int>(x).slice(0, x.dim() - 1), {shape.N});
    shape.M = product<Int>(sizes_of<Int>(x).slice(0, x.dim() - 1));
    shape.x_batch.clear();
    return shape;
  }
  shape.batch = broadcast<Int>(arguments.op, "the batches of x and w,", shape.x_batch, shape.w_batch);
  shape.output = x.dim() > 1 ? joined<Int>(shape.batch, {shape.M, shape.N}) : joined<Int>(shape.batch, {shape.N});
  return shape;
}

template <typename Int>
MatmulShape<Int> gather_shape(
    const WeightArguments& arguments,
    Format format,
    const Tensor& x,
    const std::optional<Tensor>& lhs_indices,
    const std::optional<Tensor>& rhs_indices,
    bool transpose) {
  TORCH_CHECK_VALUE(
      x.dim() >= 2, "[", arguments.op, "] x of shape ", sizes_of<Int>(x), " must have at least two dimensions.");
  auto shape = operand_shape<Int>(arguments, format, x, transpose);
  // An index that is not given counts through its operand's batch.
  const auto lhs = lhs_indices.has_value() ? sizes_of<Int>(*lhs_indices) : c10::ArrayRef<Int>(shape.x_batch);
  const auto rhs = rhs_indices.has_value() ? sizes_of<Int>(*rhs_indices) : c10::ArrayRef<Int>(shape.w_batch);
  shape.batch = broadcast<Int>(arguments.op, "lhs_indices and rhs_indices", lhs, rhs);
  shape.output = joined<Int>(shape.batch, {shape.M, shape.N});
  return shape;
}

// --- Operands as the back ends want them ----------------------------------------------------------------------------

Matrices activation_matrices(const Tensor& x, ScalarType dtype, const MatmulShape<int64_t>& shape) {
  Tensor tensor = with_dtype(x, dtype);
  const int64_t count = product<int64_t>(shape.x_batch);
  if (tensor.is_contiguous()) {
    return {tensor, count, shape.M * shape.K, shape.K};
  }
  tensor = tensor.reshape({count, shape.M, shape.K});
  if (tensor.stride(-1) != 1 && shape.K > 1) {
    tensor = tensor.contiguous();
  }
  return {tensor, count, tensor.stride(0), tensor.stride(1)};
}

// A count through an operand's own batch, for every position of batch. Layers of experts ask for the same ones on every
// call, and making them takes several kernels on a GPU.
Tensor counting_indices(c10::IntArrayRef own, c10::IntArrayRef batch, at::Device device) {
  struct Known {
    Sizes<int64_t> own;
    Sizes<int64_t> batch;
    Tensor indices;
  };
  constexpr size_t most = 16;
  constexpr int64_t most_elements = 1 << 16;
  thread_local std::vector<Known> known;  // the newest last
  for (const Known& each : known) {
    if (each.indices.device() == device && own == each.own && batch == each.batch) {
      return each.indices;
    }
  }
  const auto options = at::TensorOptions().dtype(at::kLong).device(device);
  const Tensor indices = at::arange(product<int64_t>(own), options).reshape(own).expand(batch).contiguous();
  if (indices.numel() <= most_elements) {
    if (known.size() == most) {
      known.erase(known.begin());
    }
    known.push_back({{own.begin(), own.end()}, {batch.begin(), batch.end()}, indices});
  }
  return indices;
}

// The indices given, or a count through the operand's own batch, for every position of batch.
Tensor broadcast_indices(
    const std::optional<Tensor>& indices,
    c10::IntArrayRef own,
    c10::IntArrayRef batch,
    at::Device device) {
  return indices.has_value() ? indices->to(at::kLong).expand(batch).contiguous() : counting_indices(own, batch, device);
}

void check_indices(std::string_view op, const char* name, const std::optional<Tensor>& indices, const Tensor& x) {
  if (!indices.has_value()) {
    return;
  }
  TORCH_CHECK_TYPE(
      c10::isIntegralType(indices->scalar_type(), /*includeBool=*/false), "[", op, "] ", name, " has dtype ",
      indices->scalar_type(), "; indices must be integers.");
  check_device(op, name, *indices, "x", x);
}

Format check_product(const WeightArguments& arguments, const Tensor& x, bool gathered) {
  const Format format = check_weights(arguments);
  check_activation(arguments.op, "x", x);
  check_device(arguments.op, "x", x, "w", arguments.w);
  check_global_scale(arguments.op, format.mode, arguments.global_scale, "w", arguments.w, gathered);
  return format;
}

// The result dtype: x's, which real scales and biases promote.
ScalarType result_dtype(const WeightArguments& arguments, Format format, const Tensor& x) {
  const bool promotes = traits_of(format.mode).scale == Scale::real;
  return promotes ? c10::promoteTypes(x.scalar_type(), scale_dtype(arguments)) : x.scalar_type();
}

}  // namespace

void check_range(std::string_view op, const char* name, const Tensor& indices, int64_t matrices) {
  const int64_t* values = indices.const_data_ptr<int64_t>();
  const int64_t* end = values + indices.numel();
  const int64_t* bad = std::find_if(values, end, [&](int64_t index) { return index < 0 || index >= matrices; });
  TORCH_CHECK_INDEX(
      bad == end, "[", op, "] ", name, " holds ", *bad, " at position ", bad - values,
      "; it must be at least 0 and below ", matrices, ".");
}

c10::SmallVector<int64_t, 8> broadcast_matrices(c10::IntArrayRef operand_batch, c10::IntArrayRef batch) {
  c10::SmallVector<int64_t, 8> result(1, 0);
  int64_t stride = product<int64_t>(operand_batch);
  for (size_t i = 0; i < batch.size(); ++i) {
    const bool present = i + operand_batch.size() >= batch.size();
    const int64_t size = present ? operand_batch[i + operand_batch.size() - batch.size()] : 1;
    stride = size > 0 ? stride / size : 0;
    c10::SmallVector<int64_t, 8> next;
    next.reserve(result.size() * batch[i]);
    for (const int64_t base : result) {
      for (int64_t j = 0; j < batch[i]; ++j) {
        next.push_back(base + (size == 1 ? 0 : j * stride));
      }
    }
    result = std::move(next);
  }
  return result;
}

MatmulProblem MatmulProblem::check(
    const Tensor& x,
    const Tensor& w,
    const Tensor& scales,
    const std::optional<Tensor>& biases,
    bool transpose,
    std::optional<int64_t> group_size,
    std::optional<int64_t> bits,
    std::string_view mode,
    const std::optional<Tensor>& global_scale,
    std::string_view op) {
  const WeightArguments arguments{op, w, scales, biases, group_size, bits, mode, global_scale};
  const Format format = check_product(arguments, x, /*gathered=*/false);
  auto shape = matmul_shape<int64_t>(arguments, format, x, transpose);
  const ScalarType dtype = result_dtype(arguments, format, x);
  Matrices matrices = activation_matrices(x, dtype, shape);
  return {arguments.op, matrices_of(arguments, format), transpose, std::move(matrices), dtype, std::move(shape)};
}

Tensor MatmulProblem::meta(
    const Tensor& x,
    const Tensor& w,
    const Tensor& scales,
    const std::optional<Tensor>& biases,
    bool transpose,
    std::optional<int64_t> group_size,
    std::optional<int64_t> bits,
    std::string_view mode,
    const std::optional<Tensor>& global_scale,
    std::string_view op) {
  const WeightArguments arguments{op, w, scales, biases, group_size, bits, mode, global_scale};
  const Format format = check_product(arguments, x, /*gathered=*/false);
  const auto shape = matmul_shape<c10::SymInt>(arguments, format, x, transpose);
  return empty(c10::SymIntArrayRef(shape.output), x.options().dtype(result_dtype(arguments, format, x)));
}

GatherProblem GatherProblem::check(
    const Tensor& x,
    const Tensor& w,
    const Tensor& scales,
    const std::optional<Tensor>& biases,
    const std::optional<Tensor>& lhs_indices,
    const std::optional<Tensor>& rhs_indices,
    bool transpose,
    std::optional<int64_t> group_size,
    std::optional<int64_t> bits,
    std::string_view mode,
    const std::optional<Tensor>& global_scale,
    bool sorted_indices,
    std::string_view op) {
  const WeightArguments arguments{op, w, scales, biases, group_size, bits, mode, global_scale};
  const Format format = check_product(arguments, x, /*gathered=*/true);
  check_indices(arguments.op, "lhs_indices", lhs_indices, x);
  check_indices(arguments.op, "rhs_indices", rhs_indices, x);
  auto shape = gather_shape<int64_t>(arguments, format, x, lhs_indices, rhs_indices, transpose);
  const ScalarType dtype = result_dtype(arguments, format, x);
  Matrices matrices = activation_matrices(x, dtype, shape);
  Tensor lhs = broadcast_indices(lhs_indices, shape.x_batch, shape.batch, x.device());
  Tensor rhs = broadcast_indices(rhs_indices, shape.w_batch, shape.batch, x.device());
  MatmulProblem matmul{arguments.op,    matrices_of(arguments, format), transpose, std::move(matrices), dtype,
                       std::move(shape)};
  return {std::move(matmul), std::move(lhs), std::move(rhs), sorted_indices};
}

Tensor GatherProblem::meta(
    const Tensor& x,
    const Tensor& w,
    const Tensor& scales,
    const std::optional<Tensor>& biases,
    const std::optional<Tensor>& lhs_indices,
    const std::optional<Tensor>& rhs_indices,
    bool transpose,
    std::optional<int64_t> group_size,
    std::optional<int64_t> bits,
    std::string_view mode,
    const std::optional<Tensor>& global_scale,
    bool /*sorted_indices*/,
    std::string_view op) {
  const WeightArguments arguments{op, w, scales, biases, group_size, bits, mode, global_scale};
  const Format format = check_product(arguments, x, /*gathered=*/true);
  check_indices(arguments.op, "lhs_indices", lhs_indices, x);
  check_indices(arguments.op, "rhs_indices", rhs_indices, x);
  const auto shape = gather_shape<c10::SymInt>(arguments, format, x, lhs_indices, rhs_indices, transpose);
  return empty(c10::SymIntArrayRef(shape.output), x.options().dtype(result_dtype(arguments, format, x)));
}

}  // namespace quantization_mlx
