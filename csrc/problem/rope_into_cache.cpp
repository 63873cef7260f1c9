// rope_into_cache: the heads of new tokens.
#include "fast.h"
#include "weights.h"

namespace quantization_mlx {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr const char* op = RopeIntoCacheProblem::name;

template <typename Int>
struct Arguments {
  const Tensor& x;
  const OptionalTensor& cosines;
  const OptionalTensor& sines;
  const Tensor& keys;
  const Tensor& values;
  Int position;
  const OptionalTensor& bias;
  const OptionalTensor& query_norm;
  const OptionalTensor& key_norm;
};

void check_like_x(const char* name, const Tensor& tensor, const Tensor& x) {
  check_device(op, name, tensor, "x", x);
  TORCH_CHECK_TYPE(
      tensor.scalar_type() == x.scalar_type(), "[", op, "] ", name, " has dtype ", tensor.scalar_type(), " and x ",
      x.scalar_type(), "; they must be the same.");
}

template <typename Int>
void check_cache(const Arguments<Int>& arguments) {
  const auto sizes = sizes_of<Int>(arguments.keys);
  const auto check = [&](const char* name, const Tensor& tensor) {
    check_like_x(name, tensor, arguments.x);
    TORCH_CHECK_VALUE(
        sizes.size() == 4 && same_sizes(sizes_of<Int>(tensor), sizes) && tensor.is_contiguous(), "[", op, "] ", name,
        " of shape ", sizes_of<Int>(tensor), " and strides ", tensor.sym_strides(),
        " must be contiguous, [batch, key heads, capacity, head size] as keys, whose shape is ", sizes,
        ": it is written into.");
  };
  check("keys", arguments.keys);
  check("values", arguments.values);
  TORCH_CHECK_VALUE(
      !arguments.keys.is_alias_of(arguments.values), "[", op,
      "] keys and values share memory; each must be a tensor of its own.");
}

template <typename Int>
Int query_heads_of(const Arguments<Int>& arguments) {
  const auto x = sizes_of<Int>(arguments.x);
  const auto keys = sizes_of<Int>(arguments.keys);
  const Int& dim = keys[3];
  TORCH_CHECK_VALUE(
      holds(c10::sym_gt(dim, Int(0))) && holds(c10::sym_eq(dim % 2, Int(0))), "[", op, "] keys of shape ", keys,
      " must have an even head size above 0.");
  TORCH_CHECK_VALUE(
      x.size() == 3 && holds(c10::sym_eq(x[0], keys[0])) && holds(c10::sym_eq(x[2] % dim, Int(0))) &&
          holds(c10::sym_gt(x[2], keys[1] * dim * 2)),
      "[", op, "] x of shape ", x, " does not fit keys of shape ", keys,
      ": it must be [batch, tokens, (query heads + 2 * key heads) * head size].");
  TORCH_CHECK_VALUE(
      holds(c10::sym_ge(arguments.position, Int(0))) && holds(c10::sym_le(x[1] + arguments.position, keys[2])), "[", op,
      "] ", x[1], " tokens from position ", arguments.position,
      " on are not within the capacity of keys, whose shape is ", keys, ".");
  return x[2] / dim - keys[1] * 2;
}

template <typename Int>
void check_angles(const Arguments<Int>& arguments) {
  const auto& [cosines, sines] = std::tie(arguments.cosines, arguments.sines);
  TORCH_CHECK_VALUE(
      cosines.has_value() == sines.has_value(), "[", op, "] of cosines and sines, only ",
      cosines.has_value() ? "cosines" : "sines", " are given.");
  if (!cosines.has_value()) {
    return;
  }
  check_like_x("cosines", *cosines, arguments.x);
  check_like_x("sines", *sines, arguments.x);
  const auto x = sizes_of<Int>(arguments.x);
  const auto sizes = sizes_of<Int>(*cosines);
  TORCH_CHECK_VALUE(
      sizes.size() == 3 && (is_known(c10::sym_eq(sizes[0], Int(1))) || holds(c10::sym_eq(sizes[0], x[0]))) &&
          holds(c10::sym_eq(sizes[1], x[1])) && holds(c10::sym_eq(sizes[2] % 2, Int(0))) &&
          holds(c10::sym_le(sizes[2], sizes_of<Int>(arguments.keys)[3])) && same_sizes(sizes_of<Int>(*sines), sizes),
      "[", op, "] cosines and sines of shapes ", sizes, " and ", sizes_of<Int>(*sines),
      " must both be [1 or batch, tokens, an even number up to the head size] for x of shape ", x,
      " and keys of shape ", sizes_of<Int>(arguments.keys), ".");
}

template <typename Int>
void check_bias(const Arguments<Int>& arguments) {
  if (!arguments.bias.has_value()) {
    return;
  }
  check_like_x("bias", *arguments.bias, arguments.x);
  const auto sizes = sizes_of<Int>(*arguments.bias);
  const Int& length = sizes_of<Int>(arguments.x)[2];
  TORCH_CHECK_VALUE(
      sizes.size() == 1 && holds(c10::sym_eq(sizes[0], length)), "[", op, "] bias of shape ", sizes, " must be [",
      length, "] for x of shape ", sizes_of<Int>(arguments.x), ".");
}

// heads: that the norm is of, where it is one of all of them.
template <typename Int>
void check_norm(const char* name, const OptionalTensor& norm, const Arguments<Int>& arguments, const Int& heads) {
  if (!norm.has_value()) {
    return;
  }
  check_like_x(name, *norm, arguments.x);
  const auto sizes = sizes_of<Int>(*norm);
  const Int& dim = sizes_of<Int>(arguments.keys)[3];
  const Int length = heads * dim;
  TORCH_CHECK_VALUE(
      sizes.size() == 1 && (is_known(c10::sym_eq(sizes[0], dim)) || holds(c10::sym_eq(sizes[0], length))), "[", op,
      "] ", name, " of shape ", sizes, " must be [", dim, "], for each head, or [", length,
      "], for all heads together, for x of shape ", sizes_of<Int>(arguments.x), ".");
}

// Also the number of query heads.
template <typename Int>
Int checked(const Arguments<Int>& arguments) {
  check_activation(op, "x", arguments.x);
  check_cache(arguments);
  const Int query_heads = query_heads_of(arguments);
  check_angles(arguments);
  check_bias(arguments);
  check_norm("query_norm", arguments.query_norm, arguments, query_heads);
  check_norm("key_norm", arguments.key_norm, arguments, sizes_of<Int>(arguments.keys)[1]);
  return query_heads;
}

Tensor contiguous(const OptionalTensor& tensor) { return tensor.has_value() ? tensor->contiguous() : Tensor(); }

}  // namespace

RopeIntoCacheProblem RopeIntoCacheProblem::check(
    const Tensor& x,
    const OptionalTensor& cosines,
    const OptionalTensor& sines,
    const Tensor& keys,
    const Tensor& values,
    int64_t position,
    const OptionalTensor& bias,
    const OptionalTensor& query_norm,
    const OptionalTensor& key_norm,
    double eps) {
  const int64_t query_heads = checked<int64_t>({x, cosines, sines, keys, values, position, bias, query_norm, key_norm});
  return {x.contiguous(),         contiguous(cosines),  contiguous(sines), keys, values,     contiguous(bias),
          contiguous(query_norm), contiguous(key_norm), position,          eps,  query_heads};
}

Tensor RopeIntoCacheProblem::meta(
    const Tensor& x,
    const OptionalTensor& cosines,
    const OptionalTensor& sines,
    const Tensor& keys,
    const Tensor& values,
    c10::SymInt position,
    const OptionalTensor& bias,
    const OptionalTensor& query_norm,
    const OptionalTensor& key_norm,
    double) {
  const c10::SymInt query_heads =
      checked<c10::SymInt>({x, cosines, sines, keys, values, position, bias, query_norm, key_norm});
  return at::empty_symint({x.sym_size(0), query_heads, x.sym_size(1), keys.sym_size(3)}, x.options());
}

}  // namespace quantization_mlx
