// Rotary position embedding: rope.
#include <c10/core/ScalarType.h>

#include <cmath>

#include "fast.h"
#include "weights.h"

namespace quantization_mlx {
namespace {

using at::ScalarType;
using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr const char* op = RopeProblem::name;
constexpr size_t fewest_dimensions = 3;

struct RopeArguments {
  const Tensor& x;
  int64_t dims;
  std::optional<double> base;
  double scale;
  const OptionalTensor& offsets;
  const OptionalTensor& freqs;
};

template <typename Int>
void check_offsets(const Tensor& offsets, const Tensor& x) {
  check_device(op, "offset", offsets, "x", x);
  TORCH_CHECK_TYPE(
      c10::isIntegralType(offsets.scalar_type(), /*includeBool=*/false), "[", op, "] offset has dtype ",
      offsets.scalar_type(), "; it must be an integer or a tensor of integers.");
  const auto sizes = sizes_of<Int>(offsets);
  const Int sequences = sizes_of<Int>(x)[0];
  TORCH_CHECK_VALUE(
      sizes.empty() ||
          (sizes.size() == 1 && (is_known(c10::sym_eq(sizes[0], Int(1))) || holds(c10::sym_eq(sizes[0], sequences)))),
      "[", op, "] offset of shape ", sizes, " must be a scalar or have one element for each of the ", sequences,
      " sequences of x.");
}

template <typename Int>
void check_rope(const RopeArguments& arguments) {
  const Tensor& x = arguments.x;
  const int64_t dims = arguments.dims;
  check_activation(op, "x", x);
  const auto sizes = sizes_of<Int>(x);
  TORCH_CHECK_VALUE(
      sizes.size() >= fewest_dimensions, "[", op, "] x of shape ", sizes,
      " must have at least three dimensions: sequences, anything between, positions and elements.");
  TORCH_CHECK_VALUE(
      dims > 0 && dims % 2 == 0 && holds(x.sym_size(-1).sym_ge(dims)), "[", op, "] dims is ", dims,
      "; it must be positive, even and at most the last size of x, ", sizes.back(), ".");
  TORCH_CHECK_VALUE(
      arguments.base.has_value() != arguments.freqs.has_value(), "[", op, "] base and freqs are ",
      arguments.base.has_value() ? "both given" : "both None", "; exactly one of them must be given.");
  TORCH_CHECK_VALUE(
      !arguments.base.has_value() || (std::isfinite(*arguments.base) && *arguments.base > 0.0), "[", op, "] base is ",
      *arguments.base, "; it must be positive and finite.");
  TORCH_CHECK_VALUE(std::isfinite(arguments.scale), "[", op, "] scale is ", arguments.scale, "; it must be finite.");
  if (arguments.offsets.has_value()) {
    check_offsets<Int>(*arguments.offsets, x);
  }
  if (arguments.freqs.has_value()) {
    const Tensor& freqs = *arguments.freqs;
    check_activation(op, "freqs", freqs);
    check_device(op, "freqs", freqs, "x", x);
    TORCH_CHECK_VALUE(
        freqs.dim() == 1 && holds(freqs.sym_size(0).sym_eq(dims / 2)), "[", op, "] freqs of shape ", freqs.sym_sizes(),
        " must have one dimension, of dims / 2 = ", dims / 2, " elements.");
  }
}

// Of what lies between the first and the last two dimensions.
std::optional<int64_t> stride_of_heads(const Tensor& x) { return leading_stride(x, 2, 1); }

// Copies only what has gaps within a vector or, between heads, gaps of several sizes.
Tensor strided(const Tensor& x) { return x.stride(-1) == 1 && stride_of_heads(x).has_value() ? x : x.contiguous(); }

// Those that kernels read without a conversion.
bool is_kernel_offset(ScalarType dtype) { return dtype == at::kInt || dtype == at::kLong; }

}  // namespace

RopeProblem RopeProblem::check(
    const Tensor& x,
    int64_t dims,
    bool traditional,
    std::optional<double> base,
    double scale,
    int64_t offset,
    const OptionalTensor& offsets,
    const OptionalTensor& freqs) {
  check_rope<int64_t>({x, dims, base, scale, offsets, freqs});
  RopeProblem problem;
  problem.x = strided(x);
  problem.sequences = x.size(0);
  problem.heads = product<int64_t>(x.sizes().slice(1, x.dim() - 3));
  problem.length = x.size(-2);
  problem.width = x.size(-1);
  problem.sequence_stride = problem.x.stride(0);
  problem.head_stride = stride_of_heads(problem.x).value();
  problem.position_stride = problem.x.stride(-2);
  problem.dims = dims;
  problem.traditional = traditional;
  problem.base = base.value_or(0.0);
  problem.scale = scale;
  problem.offset = offset;
  if (offsets.has_value()) {
    problem.offsets = (is_kernel_offset(offsets->scalar_type()) ? *offsets : offsets->to(at::kLong)).reshape({-1});
  }
  if (freqs.has_value()) {
    problem.freqs = with_dtype(*freqs, at::kFloat).contiguous();
  }
  problem.output = {x.sizes().begin(), x.sizes().end()};
  return problem;
}

Tensor RopeProblem::meta(
    const Tensor& x,
    int64_t dims,
    bool,
    std::optional<double> base,
    double scale,
    c10::SymInt,
    const OptionalTensor& offsets,
    const OptionalTensor& freqs) {
  check_rope<c10::SymInt>({x, dims, base, scale, offsets, freqs});
  return empty(x.sym_sizes(), x.options());
}

}  // namespace quantization_mlx
