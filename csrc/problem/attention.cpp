// scaled_dot_product_attention.
#include <ATen/ops/empty.h>
#include <c10/core/ScalarType.h>

#include "fast.h"
#include "weights.h"

namespace quantization_mlx {
namespace {

using at::ScalarType;
using at::Tensor;
using c10::sym_eq;
using OptionalTensor = std::optional<Tensor>;

constexpr const char* op = AttentionProblem::name;
constexpr int64_t most_heads = 1 << 30;

struct AttentionArguments {
  const Tensor& q;
  const Tensor& k;
  const Tensor& v;
  const OptionalTensor& mask;
  bool causal;
  const OptionalTensor& sinks;
  std::optional<int64_t> window;
};

bool is_between(int64_t least, int64_t size, int64_t most) { return least <= size && size <= most; }
bool is_between(int64_t least, const c10::SymInt& size, int64_t most) {
  return holds(size.sym_ge(least)) && holds(size.sym_le(most));
}

template <typename Int>
void check_shapes(const AttentionArguments& arguments) {
  const auto q = sizes_of<Int>(arguments.q);
  const auto k = sizes_of<Int>(arguments.k);
  const auto v = sizes_of<Int>(arguments.v);
  const bool have_rank = q.size() == 4 && k.size() == 4 && v.size() == 4;
  TORCH_CHECK_VALUE(
      have_rank, "[", op, "] q, k and v of shapes ", q, ", ", k, " and ", v,
      " must have four dimensions: [batch, heads, length, head size].");
  TORCH_CHECK_VALUE(
      holds(sym_eq(q[0], k[0])) && same_sizes(k.slice(0, 3), v.slice(0, 3)) && holds(sym_eq(q[3], k[3])), "[", op,
      "] q of shape ", q, ", k of shape ", k, " and v of shape ", v,
      " do not fit: they must have one batch size, k and v as many heads and positions, and q and k one head size.");
  TORCH_CHECK_VALUE(
      is_between(1, q[1], most_heads) && is_between(1, k[1], most_heads) && holds(sym_eq(q[1] % k[1], Int(0))), "[", op,
      "] ", q[1], " heads of q are no multiple of ", k[1], " heads of k and v.");
  TORCH_CHECK_VALUE(
      is_between(1, q[3], AttentionProblem::most_dim) && is_between(1, v[3], AttentionProblem::most_value_dim), "[", op,
      "] the head size of q and k is ", q[3], " and that of v ", v[3], "; supported are 1 to ",
      AttentionProblem::most_dim, " and 1 to ", AttentionProblem::most_value_dim, ".");
}

template <typename Int>
void check_mask(const AttentionArguments& arguments, ScalarType dtype) {
  TORCH_CHECK_VALUE(
      !arguments.window.has_value() || (arguments.causal && *arguments.window > 0), "[", op, "] window is ",
      arguments.window.value_or(0), arguments.causal ? "; it must be positive." : "; it needs mask=\"causal\".");
  if (!arguments.mask.has_value()) {
    return;
  }
  const Tensor& mask = *arguments.mask;
  if (mask.scalar_type() != at::kBool) {
    TORCH_CHECK_TYPE(
        is_activation(mask.scalar_type()), "[", op, "] mask has dtype ", mask.scalar_type(),
        "; supported are bool, float32, float16 and bfloat16.");
    TORCH_CHECK_TYPE(
        c10::promoteTypes(dtype, mask.scalar_type()) == dtype, "[", op, "] mask has dtype ", mask.scalar_type(),
        ", which does not promote to that of the result, ", dtype, ".");
  }
  check_device(op, "mask", mask, "q", arguments.q);
  const auto q = sizes_of<Int>(arguments.q);
  const Sizes<Int> scores{q[0], q[1], q[2], sizes_of<Int>(arguments.k)[2]};
  const auto sizes = sizes_of<Int>(mask);
  bool broadcasts = sizes.size() <= scores.size();
  for (size_t i = 0; broadcasts && i < sizes.size(); ++i) {
    const Int& wanted = scores[scores.size() - sizes.size() + i];
    broadcasts = is_known(sym_eq(sizes[i], Int(1))) || holds(sym_eq(sizes[i], wanted));
  }
  TORCH_CHECK_VALUE(
      broadcasts, "[", op, "] mask of shape ", sizes, " does not broadcast to [batch, heads, queries, keys], ",
      c10::ArrayRef<Int>(scores), ".");
}

template <typename Int>
void check_sinks(const AttentionArguments& arguments, ScalarType dtype) {
  if (!arguments.sinks.has_value()) {
    return;
  }
  const Tensor& sinks = *arguments.sinks;
  check_activation(op, "sinks", sinks);
  check_device(op, "sinks", sinks, "q", arguments.q);
  TORCH_CHECK_TYPE(
      c10::promoteTypes(dtype, sinks.scalar_type()) == dtype, "[", op, "] sinks have dtype ", sinks.scalar_type(),
      ", which does not promote to that of the result, ", dtype, ".");
  TORCH_CHECK_VALUE(
      same_sizes(sizes_of<Int>(sinks), sizes_of<Int>(arguments.q).slice(1, 1)), "[", op, "] sinks of shape ",
      sizes_of<Int>(sinks), " must have one element for each head of q, whose shape is ", sizes_of<Int>(arguments.q),
      ".");
}

// Also the result's dtype.
template <typename Int>
ScalarType check_attention(const AttentionArguments& arguments) {
  const auto& [q, k, v, mask, causal, sinks, window] = arguments;
  check_activation(op, "q", q);
  check_activation(op, "k", k);
  check_activation(op, "v", v);
  check_device(op, "k", k, "q", q);
  check_device(op, "v", v, "q", q);
  check_shapes<Int>(arguments);
  const ScalarType dtype = c10::promoteTypes(c10::promoteTypes(q.scalar_type(), k.scalar_type()), v.scalar_type());
  check_mask<Int>(arguments, dtype);
  check_sinks<Int>(arguments, dtype);
  return dtype;
}

// With the elements of a head side by side.
Tensor heads_of(const Tensor& given, ScalarType dtype) {
  const Tensor tensor = with_dtype(given, dtype);
  return tensor.size(3) == 1 || tensor.stride(3) == 1 ? tensor : tensor.contiguous();
}

}  // namespace

AttentionProblem AttentionProblem::check(
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    double scale,
    const OptionalTensor& mask,
    bool causal,
    const OptionalTensor& sinks,
    std::optional<int64_t> window) {
  const ScalarType dtype = check_attention<int64_t>({q, k, v, mask, causal, sinks, window});
  AttentionProblem problem{heads_of(q, dtype), heads_of(k, dtype), heads_of(v, dtype), {}, {}, scale, causal, window};
  if (mask.has_value()) {
    const Tensor of_dtype = mask->scalar_type() == at::kBool ? *mask : with_dtype(*mask, dtype);
    problem.mask = of_dtype.expand({q.size(0), q.size(1), q.size(2), k.size(2)});
  }
  if (sinks.has_value()) {
    problem.sinks = with_dtype(*sinks, dtype).contiguous();
  }
  return problem;
}

Tensor AttentionProblem::meta(
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    double /*scale*/,
    const OptionalTensor& mask,
    bool causal,
    const OptionalTensor& sinks,
    std::optional<int64_t> window) {
  const ScalarType dtype = check_attention<c10::SymInt>({q, k, v, mask, causal, sinks, window});
  return at::empty_symint({q.sym_size(0), q.sym_size(1), q.sym_size(2), v.sym_size(3)}, q.options().dtype(dtype));
}

}  // namespace quantization_mlx
