// scaled_dot_product_attention, and that of packed keys and values.
#include <ATen/ops/empty.h>
#include <c10/core/ScalarType.h>

#include <string>
#include <string_view>

#include "fast.h"
#include "weights.h"

namespace quantization_mlx {
namespace {

using at::ScalarType;
using at::Tensor;
using c10::sym_eq;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t most_heads = 1 << 30;

// What both ops have beside keys and values.
struct AttentionArguments {
  std::string_view op;
  const Tensor& q;
  const OptionalTensor& mask;
  bool causal;
  const OptionalTensor& sinks;
  std::optional<int64_t> window;
};

// Sizes of keys and of values as [batch, heads, positions, head size], packed or not.
template <typename Int>
struct KeySizes {
  Sizes<Int> k;
  Sizes<Int> v;
};

bool is_between(int64_t least, int64_t size, int64_t most) { return least <= size && size <= most; }
bool is_between(int64_t least, const c10::SymInt& size, int64_t most) {
  return holds(size.sym_ge(least)) && holds(size.sym_le(most));
}

template <typename Int>
void check_shapes(const AttentionArguments& arguments, const KeySizes<Int>& sizes) {
  const std::string_view op = arguments.op;
  const auto q = sizes_of<Int>(arguments.q);
  const c10::ArrayRef<Int> k = sizes.k;
  const c10::ArrayRef<Int> v = sizes.v;
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
void check_mask(const AttentionArguments& arguments, const Int& keys, ScalarType dtype) {
  const std::string_view op = arguments.op;
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
  const Sizes<Int> scores{q[0], q[1], q[2], keys};
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
  const std::string_view op = arguments.op;
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

template <typename Int>
void check_rest(const AttentionArguments& arguments, const KeySizes<Int>& sizes, ScalarType dtype) {
  check_shapes<Int>(arguments, sizes);
  check_mask<Int>(arguments, sizes.k[2], dtype);
  check_sinks<Int>(arguments, dtype);
}

// Also the result's dtype.
template <typename Int>
ScalarType check_attention(const AttentionArguments& arguments, const Tensor& k, const Tensor& v) {
  const std::string_view op = arguments.op;
  const Tensor& q = arguments.q;
  check_activation(op, "q", q);
  check_activation(op, "k", k);
  check_activation(op, "v", v);
  check_device(op, "k", k, "q", q);
  check_device(op, "v", v, "q", q);
  const ScalarType dtype = c10::promoteTypes(c10::promoteTypes(q.scalar_type(), k.scalar_type()), v.scalar_type());
  const auto sizes = [](const Tensor& tensor) {
    const auto all = sizes_of<Int>(tensor);
    return Sizes<Int>(all.begin(), all.end());
  };
  check_rest<Int>(arguments, {sizes(k), sizes(v)}, dtype);
  return dtype;
}

// --- Packed keys and values ------------------------------------------------------------------------------------------

// Keys or values as they were given; name: "k" or "v".
struct PackedArguments {
  const char* name;
  const Tensor& words;
  const Tensor& scales;
  const Tensor& biases;
};

Format check_format(std::string_view op, int64_t group_size, int64_t bits) {
  const Format format = parse_format(op, "affine", group_size, bits);
  TORCH_CHECK_VALUE(
      bits == 4 || bits == 8, "[", op, "] bits is ", bits, "; supported are keys and values of 4 and of 8 bits.");
  return format;
}

// The sizes of what is packed.
template <typename Int>
Sizes<Int> check_packed(const AttentionArguments& arguments, const PackedArguments& packed, Format format) {
  const auto& [name, words, scales, biases] = packed;
  const std::string_view op = arguments.op;
  const std::string name_of_scales = c10::str("scales of ", name);
  const std::string name_of_biases = c10::str("biases of ", name);
  TORCH_CHECK_TYPE(
      words.scalar_type() == at::kUInt32 || words.scalar_type() == at::kInt, "[", op, "] ", name, " has dtype ",
      words.scalar_type(), "; it must be packed words of uint32 or int32.");
  check_activation(op, name_of_scales.c_str(), scales);
  check_activation(op, name_of_biases.c_str(), biases);
  check_device(op, name, words, "q", arguments.q);
  check_device(op, name_of_scales.c_str(), scales, "q", arguments.q);
  check_device(op, name_of_biases.c_str(), biases, "q", arguments.q);
  const auto of_words = sizes_of<Int>(words);
  const auto of_scales = sizes_of<Int>(scales);
  TORCH_CHECK_VALUE(
      of_words.size() == 4 && of_scales.size() == 4, "[", op, "] ", name, " of shape ", of_words, " and its scales of ",
      "shape ", of_scales, " must have four dimensions: [batch, heads, length, words or groups].");
  const Int length = of_scales[3] * Int(format.group_size);
  TORCH_CHECK_VALUE(
      same_sizes(of_words.slice(0, 3), of_scales.slice(0, 3)) &&
          holds(sym_eq(of_words[3] * Int(32), length * Int(format.bits))),
      "[", op, "] ", name, " of shape ", of_words, " and its scales of shape ", of_scales,
      " do not belong together: ", of_words[3], " words of ", format.bits, "-bit codes hold ",
      of_words[3] * Int(32) / Int(format.bits), " elements, and ", of_scales[3], " groups of ", format.group_size,
      " hold ", length, ".");
  TORCH_CHECK_VALUE(
      same_sizes(sizes_of<Int>(biases), of_scales), "[", op, "] biases of ", name, " of shape ", sizes_of<Int>(biases),
      " must have the shape of its scales, ", of_scales, ".");
  Sizes<Int> sizes(of_scales.begin(), of_scales.end());
  sizes.back() = length;
  return sizes;
}

// Also the result's dtype.
template <typename Int>
ScalarType check_packed_attention(
    const AttentionArguments& arguments,
    const PackedArguments& k,
    const PackedArguments& v,
    Format format,
    KeySizes<Int>& sizes) {
  check_activation(arguments.op, "q", arguments.q);
  sizes = {check_packed<Int>(arguments, k, format), check_packed<Int>(arguments, v, format)};
  ScalarType dtype = arguments.q.scalar_type();
  for (const Tensor* tensor : {&k.scales, &k.biases, &v.scales, &v.biases}) {
    dtype = c10::promoteTypes(dtype, tensor->scalar_type());
  }
  check_rest<Int>(arguments, sizes, dtype);
  return dtype;
}

// --- Problems --------------------------------------------------------------------------------------------------------

double checked_softcap(std::optional<double> softcap) {
  TORCH_CHECK_VALUE(
      !softcap.has_value() || *softcap > 0.0, "[", AttentionProblem::name, "] softcap is ", softcap.value_or(0.0),
      "; it must be positive.");
  return softcap.value_or(0.0);
}

// With what a position has of a head side by side.
Tensor with_adjacent_elements(const Tensor& tensor) {
  return tensor.size(3) == 1 || tensor.stride(3) == 1 ? tensor : tensor.contiguous();
}

Tensor heads_of(const Tensor& tensor, ScalarType dtype) { return with_adjacent_elements(with_dtype(tensor, dtype)); }

KeyHeads packed_heads(const PackedArguments& packed, ScalarType dtype, int64_t dim) {
  KeyHeads heads{
      with_adjacent_elements(packed.words), heads_of(packed.scales, dtype), heads_of(packed.biases, dtype), dim};
  if (heads.scales.strides() != heads.biases.strides()) {
    heads.scales = heads.scales.contiguous();
    heads.biases = heads.biases.contiguous();
  }
  return heads;
}

// Without keys and values.
void set_rest(AttentionProblem& problem, const AttentionArguments& arguments, double scale, int64_t keys) {
  const auto& [op, q, mask, causal, sinks, window] = arguments;
  const ScalarType dtype = problem.q.scalar_type();
  problem.op = op;
  problem.scale = scale;
  problem.causal = causal;
  problem.window = window;
  if (mask.has_value()) {
    const Tensor of_dtype = mask->scalar_type() == at::kBool ? *mask : with_dtype(*mask, dtype);
    problem.mask = of_dtype.expand({q.size(0), q.size(1), q.size(2), keys});
  }
  if (sinks.has_value()) {
    problem.sinks = with_dtype(*sinks, dtype).contiguous();
  }
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
    std::optional<int64_t> window,
    std::optional<double> softcap) {
  const AttentionArguments arguments{name, q, mask, causal, sinks, window};
  const ScalarType dtype = check_attention<int64_t>(arguments, k, v);
  AttentionProblem problem{};
  problem.softcap = checked_softcap(softcap);
  problem.q = heads_of(q, dtype);
  problem.k = {heads_of(k, dtype), {}, {}, k.size(3)};
  problem.v = {heads_of(v, dtype), {}, {}, v.size(3)};
  set_rest(problem, arguments, scale, k.size(2));
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
    std::optional<int64_t> window,
    std::optional<double> softcap) {
  const ScalarType dtype = check_attention<c10::SymInt>({name, q, mask, causal, sinks, window}, k, v);
  checked_softcap(softcap);
  return at::empty_symint({q.sym_size(0), q.sym_size(1), q.sym_size(2), v.sym_size(3)}, q.options().dtype(dtype));
}

QuantizedAttentionProblem QuantizedAttentionProblem::check(
    const Tensor& q,
    const Tensor& k,
    const Tensor& k_scales,
    const Tensor& k_biases,
    const Tensor& v,
    const Tensor& v_scales,
    const Tensor& v_biases,
    double scale,
    const OptionalTensor& mask,
    bool causal,
    const OptionalTensor& sinks,
    std::optional<int64_t> window,
    int64_t group_size,
    int64_t bits) {
  const AttentionArguments arguments{name, q, mask, causal, sinks, window};
  const PackedArguments keys{"k", k, k_scales, k_biases};
  const PackedArguments values{"v", v, v_scales, v_biases};
  const Format format = check_format(name, group_size, bits);
  KeySizes<int64_t> sizes;
  const ScalarType dtype = check_packed_attention<int64_t>(arguments, keys, values, format, sizes);
  QuantizedAttentionProblem problem{};
  problem.q = heads_of(q, dtype);
  problem.k = packed_heads(keys, dtype, sizes.k[3]);
  problem.v = packed_heads(values, dtype, sizes.v[3]);
  problem.bits = format.bits;
  problem.group_size = format.group_size;
  set_rest(problem, arguments, scale, sizes.k[2]);
  return problem;
}

Tensor QuantizedAttentionProblem::meta(
    const Tensor& q,
    const Tensor& k,
    const Tensor& k_scales,
    const Tensor& k_biases,
    const Tensor& v,
    const Tensor& v_scales,
    const Tensor& v_biases,
    double /*scale*/,
    const OptionalTensor& mask,
    bool causal,
    const OptionalTensor& sinks,
    std::optional<int64_t> window,
    int64_t group_size,
    int64_t bits) {
  const Format format = check_format(name, group_size, bits);
  KeySizes<c10::SymInt> sizes;
  const ScalarType dtype = check_packed_attention<c10::SymInt>(
      {name, q, mask, causal, sinks, window}, {"k", k, k_scales, k_biases}, {"v", v, v_scales, v_biases}, format,
      sizes);
  return at::empty_symint({q.sym_size(0), q.sym_size(1), q.sym_size(2), sizes.v[3]}, q.options().dtype(dtype));
}

}  // namespace quantization_mlx
