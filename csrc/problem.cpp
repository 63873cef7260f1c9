#include "problem.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <c10/core/ScalarType.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <sstream>
#include <string>
#include <vector>

namespace quantization_mlx {
namespace {

using at::ScalarType;
using at::Tensor;
using c10::sym_eq;
using c10::sym_ne;

// --- Sizes of a tensor as the caller wants to count them -----------------------------------------------------------

template <typename Int>
c10::ArrayRef<Int> sizes_of(const Tensor& tensor);

template <>
c10::ArrayRef<int64_t> sizes_of<int64_t>(const Tensor& tensor) {
  return tensor.sizes();
}

template <>
c10::ArrayRef<c10::SymInt> sizes_of<c10::SymInt>(const Tensor& tensor) {
  return tensor.sym_sizes();
}

Tensor empty(c10::ArrayRef<int64_t> sizes, at::TensorOptions options) { return at::empty(sizes, options); }

Tensor empty(c10::ArrayRef<c10::SymInt> sizes, at::TensorOptions options) { return at::empty_symint(sizes, options); }

template <typename Int>
Int product(c10::ArrayRef<Int> sizes) {
  Int result = 1;
  for (const Int& size : sizes) {
    result = result * size;
  }
  return result;
}

template <typename Int>
bool same_sizes(c10::ArrayRef<Int> a, c10::ArrayRef<Int> b) {
  return a.size() == b.size() && std::equal(a.begin(), a.end(), b.begin(), [](const Int& one, const Int& other) {
           return holds(sym_eq(one, other));
         });
}

template <typename Int>
Sizes<Int> joined(c10::ArrayRef<Int> leading, std::initializer_list<Int> trailing) {
  Sizes<Int> result(leading.begin(), leading.end());
  result.append(trailing.begin(), trailing.end());
  return result;
}

// --- Dtypes, devices and formats -----------------------------------------------------------------------------------

bool is_activation(ScalarType dtype) { return dtype == at::kFloat || dtype == at::kHalf || dtype == at::kBFloat16; }

bool is_words(ScalarType dtype) { return dtype == at::kUInt32 || dtype == at::kInt; }

void check_activation(std::string_view op, const char* name, const Tensor& tensor) {
  TORCH_CHECK_TYPE(tensor.defined(), "[", op, "] ", name, " is None; it must be a tensor.");
  TORCH_CHECK_TYPE(
      is_activation(tensor.scalar_type()), "[", op, "] ", name, " has dtype ", tensor.scalar_type(),
      "; supported are float32, float16 and bfloat16.");
}

void check_device(
    std::string_view op,
    const char* name,
    const Tensor& tensor,
    const char* other_name,
    const Tensor& other) {
  TORCH_CHECK_VALUE(
      tensor.device() == other.device(), "[", op, "] ", name, " is on ", tensor.device(), " and ", other_name, " on ",
      other.device(), "; all arguments must be on one device.");
}

constexpr std::string_view mode_names[] = {
#define NAME(name, ...) #name,
    QUANTIZATION_MLX_MODES(NAME, )
#undef NAME
};

// The numbers whose bit is set, ascending.
std::vector<int> bits_of(int mask) {
  std::vector<int> bits;
  for (int bit = 0; bit < 31; ++bit) {
    if (mask >> bit & 1) {
      bits.push_back(bit);
    }
  }
  return bits;
}

std::vector<int> widths_of(Mode mode) { return bits_of(traits_of(mode).widths); }

std::vector<int> group_sizes_of(Mode mode) {
  std::vector<int> sizes = bits_of(traits_of(mode).group_sizes);
  std::transform(sizes.begin(), sizes.end(), sizes.begin(), [](int bit) { return 1 << bit; });
  return sizes;
}

// "a, b or c"
template <typename Values>
std::string listed(const Values& values, const char* last) {
  std::ostringstream text;
  for (size_t i = 0; i < values.size(); ++i) {
    text << (i == 0 ? "" : i + 1 == values.size() ? last : ", ") << values[i];
  }
  return text.str();
}

std::string names_of(Packing packing) {
  std::vector<std::string> names;
  for (int mode = 0; mode < mode_count(); ++mode) {
    if (traits_of(static_cast<Mode>(mode)).packing == packing) {
      names.push_back(c10::str('"', mode_names[mode], '"'));
    }
  }
  return listed(names, " and ");
}

Format parse_format(
    std::string_view op,
    std::string_view name,
    std::optional<int64_t> group_size,
    std::optional<int64_t> bits) {
  const auto* found = std::find(std::begin(mode_names), std::end(mode_names), name);
  TORCH_CHECK_VALUE(
      found != std::end(mode_names), "[", op, "] mode is \"", name, "\"; supported are ", names_of(Packing::rows),
      ", and for column-packed weights ", names_of(Packing::columns), ".");
  const Mode mode = static_cast<Mode>(found - mode_names);
  const int64_t wanted_bits = bits.value_or(default_bits(mode));
  const int64_t wanted_group_size = group_size.value_or(default_group_size(mode));
  const bool fits_int =
      std::min(wanted_bits, wanted_group_size) > 0 && std::max(wanted_bits, wanted_group_size) <= 1024;
  const Format format{mode, static_cast<int>(wanted_bits), static_cast<int>(wanted_group_size)};
  TORCH_CHECK_VALUE(
      fits_int && is_supported(format), "[", op, "] mode \"", name, "\" with bits ", wanted_bits, " and group_size ",
      wanted_group_size, " is not supported; ", name, " takes bits ", listed(widths_of(mode), " or "),
      " and group_size ", listed(group_sizes_of(mode), " or "), ".");
  return format;
}

// one_per_matrix: a gathered product may scale each of its matrices.
void check_global_scale(
    std::string_view op,
    Mode mode,
    const std::optional<Tensor>& global_scale,
    const char* other_name,
    const Tensor& other,
    bool one_per_matrix) {
  if (!global_scale.has_value()) {
    return;
  }
  TORCH_CHECK_VALUE(
      takes_global_scale(mode), "[", op, "] global_scale is given with mode \"", name_of(mode),
      "\"; it is only for mode \"nvfp4\".");
  TORCH_CHECK_TYPE(
      global_scale->scalar_type() == at::kFloat, "[", op, "] global_scale has dtype ", global_scale->scalar_type(),
      "; it must be float32.");
  check_device(op, "global_scale", *global_scale, other_name, other);
  TORCH_CHECK_VALUE(
      is_known(global_scale->sym_numel().sym_eq(1)) ||
          (one_per_matrix && other.dim() > 2
               ? same_sizes(global_scale->sym_sizes(), other.sym_sizes().slice(0, other.dim() - 2))
               : holds(global_scale->sym_numel().sym_eq(1))),
      "[", op, "] global_scale has shape ", global_scale->sym_sizes(), "; it must have one element",
      one_per_matrix ? " or the leading shape of w." : ".");
}

void check_float16(const WeightArguments& arguments, const char* name, const Tensor& tensor) {
  TORCH_CHECK_TYPE(
      tensor.defined() && tensor.scalar_type() == at::kHalf, "[", arguments.op, "] ", name, " have dtype ",
      tensor.scalar_type(), "; mode \"", arguments.mode, "\" has float16 ", name, ".");
}

void check_column_packed(const WeightArguments& arguments, Mode mode) {
  check_float16(arguments, "scales", arguments.scales);
  if (has_zeros(mode)) {
    TORCH_CHECK_VALUE(
        arguments.biases.has_value(), "[", arguments.op, "] mode \"", arguments.mode, "\" needs zeros, as biases.");
    check_float16(arguments, "zeros", *arguments.biases);
    check_device(arguments.op, "zeros", *arguments.biases, "w", arguments.w);
  } else {
    TORCH_CHECK_VALUE(
        !arguments.biases.has_value(), "[", arguments.op, "] mode \"", arguments.mode, "\" has no biases.");
  }
}

// Everything about the weights but their sizes.
Format check_weights(const WeightArguments& arguments) {
  std::string_view op = arguments.op;
  const Format format = parse_format(op, arguments.mode, arguments.group_size, arguments.bits);
  const auto& [w, scales, biases] = std::tie(arguments.w, arguments.scales, arguments.biases);
  TORCH_CHECK_TYPE(
      w.defined() && scales.defined(), "[", op, "] ", w.defined() ? "scales" : "w", " is None; it must be a tensor.");
  TORCH_CHECK_TYPE(
      is_words(w.scalar_type()), "[", op, "] w has dtype ", w.scalar_type(),
      "; packed weights must be uint32 or int32 words.");
  TORCH_CHECK_VALUE(
      w.dim() >= 2 && scales.dim() >= 2, "[", op, "] w of shape ", w.sym_sizes(), " and scales of shape ",
      scales.sym_sizes(), " must have at least two dimensions.");
  check_device(op, "scales", scales, "w", w);
  if (is_column_packed(format.mode)) {
    check_column_packed(arguments, format.mode);
  } else if (has_biases(format.mode)) {
    TORCH_CHECK_VALUE(biases.has_value(), "[", op, "] mode \"affine\" needs biases.");
    check_activation(op, "scales", scales);
    check_activation(op, "biases", *biases);
    check_device(op, "biases", *biases, "w", w);
  } else {
    TORCH_CHECK_VALUE(!biases.has_value(), "[", op, "] mode \"", arguments.mode, "\" has no biases.");
    TORCH_CHECK_TYPE(
        scales.scalar_type() == at::kByte, "[", op, "] scales have dtype ", scales.scalar_type(), "; mode \"",
        arguments.mode, "\" has uint8 scales.");
  }
  return format;
}

// --- Shape rules, the same for real and for symbolic sizes ---------------------------------------------------------

// The unpacked length of a row of w, or of a column where columns are packed.
template <typename Int>
Int check_packing(const WeightArguments& arguments, Format format) {
  const auto w = sizes_of<Int>(arguments.w);
  const auto scales = sizes_of<Int>(arguments.scales);
  const Int bits = format.bits;
  const Int group_size = format.group_size;
  const bool columns = is_column_packed(format.mode);
  const size_t from_last = columns ? 2 : 1;  // of the packed dimension
  const Int words = w[w.size() - from_last];
  const Int groups = scales[scales.size() - from_last];
  const Int length = groups * group_size;
  TORCH_CHECK_VALUE(
      w.size() == scales.size() &&
          same_sizes(w.slice(0, w.size() - from_last), scales.slice(0, scales.size() - from_last)) &&
          (!columns || holds(sym_eq(w.back(), scales.back()))) && holds(sym_eq(words * 32, length * bits)),
      "[", arguments.op, "] w of shape ", w, " and scales of shape ", scales, " do not belong together: ", bits,
      "-bit ", columns ? "columns" : "rows", " of ", words, " words hold ", words * 32, "/", bits, " elements, and ",
      groups, " groups of ", group_size, " hold ", length, ".");
  if (arguments.biases.has_value()) {
    TORCH_CHECK_VALUE(
        same_sizes(sizes_of<Int>(*arguments.biases), scales), "[", arguments.op, "] ",
        has_zeros(format.mode) ? "zeros" : "biases", " of shape ", sizes_of<Int>(*arguments.biases),
        " must have the shape of scales, ", scales, ".");
  }
  return length;
}

template <typename Int>
Sizes<Int> broadcast(std::string_view op, const char* what, c10::ArrayRef<Int> a, c10::ArrayRef<Int> b) {
  const auto rank = std::max(a.size(), b.size());
  Sizes<Int> result(rank, Int(1));
  for (size_t i = 0; i < rank; ++i) {
    const bool in_a = i + a.size() >= rank;
    const bool in_b = i + b.size() >= rank;
    if (in_a && in_b) {
      const Int& from_a = a[i + a.size() - rank];
      const Int& from_b = b[i + b.size() - rank];
      // As in torch, a size that depends on data is taken to be other than 1.
      result[i] = is_known(sym_eq(from_a, Int(1))) ? from_b : from_a;
      TORCH_CHECK_VALUE(
          is_known(sym_eq(from_a, Int(1))) || is_known(sym_eq(from_b, Int(1))) || holds(sym_eq(from_a, from_b)), "[",
          op, "] ", what, " of shapes ", a, " and ", b, " do not broadcast.");
    } else {
      result[i] = in_a ? a[i + a.size() - rank] : b[i + b.size() - rank];
    }
  }
  return result;
}

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

Tensor with_dtype(const Tensor& tensor, ScalarType dtype) {
  return tensor.scalar_type() == dtype ? tensor : tensor.to(dtype);
}

// The stride of all leading sizes seen as one; nothing where they have no common one.
std::optional<int64_t> leading_stride(const Tensor& tensor) {
  int64_t count = 1;
  int64_t stride = 0;
  for (int64_t i = tensor.dim() - 3; i >= 0; --i) {
    if (tensor.size(i) == 1) {
      continue;
    }
    if (count > 1 && tensor.stride(i) != count * stride) {
      return std::nullopt;
    }
    stride = count > 1 ? stride : tensor.stride(i);
    count *= tensor.size(i);
  }
  return stride;
}

// Copies only what has gaps within a matrix or, between matrices, gaps of several sizes.
Matrices weight_matrices(const Tensor& tensor) {
  const int64_t rows = tensor.size(-2);
  const int64_t columns = tensor.size(-1);
  const int64_t count = product<int64_t>(tensor.sizes().slice(0, tensor.dim() - 2));
  const bool dense_matrix = (tensor.stride(-1) == 1 || columns <= 1) && (tensor.stride(-2) == columns || rows <= 1);
  const std::optional<int64_t> stride = dense_matrix ? leading_stride(tensor) : std::nullopt;
  if (stride.has_value()) {
    return {tensor, count, *stride, columns};
  }
  return {tensor.contiguous(), count, rows * columns, columns};
}

QuantizedMatrices matrices_of(const WeightArguments& arguments, Format format) {
  QuantizedMatrices result{format, weight_matrices(arguments.w), {}, {}, {}};
  if (arguments.biases.has_value()) {
    // One dtype for both; promoting a value is exact.
    const auto dtype = c10::promoteTypes(arguments.scales.scalar_type(), arguments.biases->scalar_type());
    result.scales = weight_matrices(with_dtype(arguments.scales, dtype));
    result.biases = weight_matrices(with_dtype(*arguments.biases, dtype));
  } else {
    result.scales = weight_matrices(arguments.scales);
  }
  if (arguments.global_scale.has_value()) {
    result.global_scale = arguments.global_scale->contiguous();
  }
  return result;
}

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

// The indices given, or a count through the operand's own batch, for every position of batch.
Tensor broadcast_indices(
    const std::optional<Tensor>& indices,
    c10::IntArrayRef own,
    c10::IntArrayRef batch,
    at::Device device) {
  const Tensor given = indices.has_value()
      ? indices->to(at::kLong)
      : at::arange(product<int64_t>(own), at::TensorOptions().dtype(at::kLong).device(device)).reshape(own);
  return given.expand(batch).contiguous();
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

ScalarType dequantized_dtype(const WeightArguments& arguments, Format format, std::optional<ScalarType> dtype) {
  if (dtype.has_value()) {
    TORCH_CHECK_TYPE(
        is_activation(*dtype), "[", arguments.op, "] dtype is ", *dtype,
        "; supported are float32, float16 and bfloat16.");
    return *dtype;
  }
  if (is_column_packed(format.mode)) {
    return arguments.scales.scalar_type();
  }
  return has_biases(format.mode) ? c10::promoteTypes(arguments.scales.scalar_type(), arguments.biases->scalar_type())
                                 : at::kBFloat16;
}

template <typename Int>
Sizes<Int> unpacked_sizes(const WeightArguments& arguments, Format format) {
  const Int length = check_packing<Int>(arguments, format);
  const auto sizes = sizes_of<Int>(arguments.w);
  Sizes<Int> result(sizes.begin(), sizes.end());
  result[result.size() - (is_column_packed(format.mode) ? 2 : 1)] = length;
  return result;
}

template <typename Int>
struct QuantizedShape {
  Sizes<Int> words;
  Sizes<Int> scales;
};

template <typename Int>
QuantizedShape<Int> quantized_shape(const Tensor& w, Format format) {
  const auto sizes = sizes_of<Int>(w);
  TORCH_CHECK_VALUE(sizes.size() >= 2, "[quantize] w of shape ", sizes, " must have at least two dimensions.");
  const Int group_size = format.group_size;
  const bool columns = is_column_packed(format.mode);
  const Int length = sizes[sizes.size() - (columns ? 2 : 1)];
  TORCH_CHECK_VALUE(
      holds(sym_eq(length % group_size, Int(0))), "[quantize] the ", columns ? "second to last" : "last",
      " size of w, of shape ", sizes, ", must be divisible by group_size ", group_size, ".");
  const Int words = length * format.bits / 32;
  const Int groups = length / group_size;
  if (columns) {
    const auto leading = sizes.slice(0, sizes.size() - 2);
    return {joined<Int>(leading, {words, sizes.back()}), joined<Int>(leading, {groups, sizes.back()})};
  }
  const auto leading = sizes.slice(0, sizes.size() - 1);
  return {joined<Int>(leading, {words}), joined<Int>(leading, {groups})};
}

Format check_quantize(
    const Tensor& w,
    std::optional<int64_t> group_size,
    std::optional<int64_t> bits,
    std::string_view mode,
    const std::optional<Tensor>& global_scale) {
  const Format format = parse_format("quantize", mode, group_size, bits);
  check_activation("quantize", "w", w);
  check_global_scale("quantize", format.mode, global_scale, "w", w, /*one_per_matrix=*/false);
  return format;
}

template <typename Int>
std::tuple<Tensor, Tensor, Tensor> empty_results(const Tensor& w, Format format, const QuantizedShape<Int>& shape) {
  const auto dtype = is_column_packed(format.mode) ? at::kHalf : has_biases(format.mode) ? w.scalar_type() : at::kByte;
  const auto parameters = w.options().dtype(dtype);
  const bool third = has_biases(format.mode) || has_zeros(format.mode);
  const Sizes<Int> none{Int(0)};
  return {
      empty(c10::ArrayRef<Int>(shape.words), w.options().dtype(at::kUInt32)),
      empty(c10::ArrayRef<Int>(shape.scales), parameters),
      empty(c10::ArrayRef<Int>(third ? shape.scales : none), parameters)};
}

}  // namespace

std::string_view name_of(Mode mode) { return mode_names[static_cast<int>(mode)]; }

bool is_column_packed(std::string_view mode) {
  const auto* found = std::find(std::begin(mode_names), std::end(mode_names), mode);
  return found != std::end(mode_names) && is_column_packed(static_cast<Mode>(found - mode_names));
}

std::string describe_modes() {
  constexpr const char* packings[] = {"rows", "columns"};
  constexpr const char* elements[] = {"integer", "e2m1", "e4m3"};
  constexpr const char* scales[] = {"real", "float16", "e8m0", "e4m3"};
  constexpr const char* offsets[] = {"none", "biases", "zeros"};
  std::ostringstream text;
  for (int i = 0; i < mode_count(); ++i) {
    const ModeTraits traits = traits_of(static_cast<Mode>(i));
    text << (i == 0 ? "[" : ", ") << R"({"name": ")" << mode_names[i] << R"(", "packing": ")"
         << packings[static_cast<int>(traits.packing)] << R"(", "element": ")"
         << elements[static_cast<int>(traits.element)] << R"(", "scale": ")" << scales[static_cast<int>(traits.scale)]
         << R"(", "offset": ")" << offsets[static_cast<int>(traits.offset)] << R"(", "group_sizes": [)"
         << listed(group_sizes_of(static_cast<Mode>(i)), ", ") << R"(], "widths": [)"
         << listed(widths_of(static_cast<Mode>(i)), ", ") << R"(], "default_group_size": )" << traits.default_group_size
         << R"(, "default_bits": )" << traits.default_bits << "}";
  }
  return text.str() + "]";
}

void check_range(std::string_view op, const char* name, const Tensor& indices, int64_t matrices) {
  const int64_t* values = indices.const_data_ptr<int64_t>();
  const int64_t* end = values + indices.numel();
  const int64_t* bad = std::find_if(values, end, [&](int64_t index) { return index < 0 || index >= matrices; });
  TORCH_CHECK_INDEX(
      bad == end, "[", op, "] ", name, " holds ", *bad, " at position ", bad - values,
      "; it must be at least 0 and below ", matrices, ".");
}

ScalarType result_dtype(const WeightArguments& arguments, const Tensor& x) {
  ScalarType dtype = x.scalar_type();
  if (arguments.mode == name_of(Mode::affine)) {
    dtype = c10::promoteTypes(dtype, arguments.scales.scalar_type());
    dtype = c10::promoteTypes(dtype, arguments.biases->scalar_type());
  }
  return dtype;
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

MatmulProblem MatmulProblem::check(const WeightArguments& arguments, const Tensor& x, bool transpose) {
  const Format format = check_product(arguments, x, /*gathered=*/false);
  auto shape = matmul_shape<int64_t>(arguments, format, x, transpose);
  const ScalarType dtype = result_dtype(arguments, x);
  Matrices matrices = activation_matrices(x, dtype, shape);
  return {arguments.op, matrices_of(arguments, format), transpose, std::move(matrices), dtype, std::move(shape)};
}

Tensor MatmulProblem::meta(const WeightArguments& arguments, const Tensor& x, bool transpose) {
  const Format format = check_product(arguments, x, /*gathered=*/false);
  const auto shape = matmul_shape<c10::SymInt>(arguments, format, x, transpose);
  return empty(c10::SymIntArrayRef(shape.output), x.options().dtype(result_dtype(arguments, x)));
}

GatherProblem GatherProblem::check(
    const WeightArguments& arguments,
    const Tensor& x,
    const std::optional<Tensor>& lhs_indices,
    const std::optional<Tensor>& rhs_indices,
    bool transpose,
    bool sorted_indices) {
  const Format format = check_product(arguments, x, /*gathered=*/true);
  check_indices(arguments.op, "lhs_indices", lhs_indices, x);
  check_indices(arguments.op, "rhs_indices", rhs_indices, x);
  auto shape = gather_shape<int64_t>(arguments, format, x, lhs_indices, rhs_indices, transpose);
  const ScalarType dtype = result_dtype(arguments, x);
  Matrices matrices = activation_matrices(x, dtype, shape);
  Tensor lhs = broadcast_indices(lhs_indices, shape.x_batch, shape.batch, x.device());
  Tensor rhs = broadcast_indices(rhs_indices, shape.w_batch, shape.batch, x.device());
  MatmulProblem matmul{arguments.op,    matrices_of(arguments, format), transpose, std::move(matrices), dtype,
                       std::move(shape)};
  return {std::move(matmul), std::move(lhs), std::move(rhs), sorted_indices};
}

Tensor GatherProblem::meta(
    const WeightArguments& arguments,
    const Tensor& x,
    const std::optional<Tensor>& lhs_indices,
    const std::optional<Tensor>& rhs_indices,
    bool transpose) {
  const Format format = check_product(arguments, x, /*gathered=*/true);
  check_indices(arguments.op, "lhs_indices", lhs_indices, x);
  check_indices(arguments.op, "rhs_indices", rhs_indices, x);
  const auto shape = gather_shape<c10::SymInt>(arguments, format, x, lhs_indices, rhs_indices, transpose);
  return empty(c10::SymIntArrayRef(shape.output), x.options().dtype(result_dtype(arguments, x)));
}

DequantizeProblem DequantizeProblem::check(const WeightArguments& arguments, std::optional<ScalarType> dtype) {
  const Format format = check_weights(arguments);
  check_global_scale(arguments.op, format.mode, arguments.global_scale, "w", arguments.w, /*one_per_matrix=*/false);
  return {
      matrices_of(arguments, format), dequantized_dtype(arguments, format, dtype),
      unpacked_sizes<int64_t>(arguments, format)};
}

Tensor DequantizeProblem::meta(const WeightArguments& arguments, std::optional<ScalarType> dtype) {
  const Format format = check_weights(arguments);
  check_global_scale(arguments.op, format.mode, arguments.global_scale, "w", arguments.w, /*one_per_matrix=*/false);
  const auto output = unpacked_sizes<c10::SymInt>(arguments, format);
  return empty(c10::SymIntArrayRef(output), arguments.w.options().dtype(dequantized_dtype(arguments, format, dtype)));
}

QuantizeProblem QuantizeProblem::check(
    const Tensor& w,
    std::optional<int64_t> group_size,
    std::optional<int64_t> bits,
    std::string_view mode,
    const std::optional<Tensor>& global_scale) {
  const Format format = check_quantize(w, group_size, bits, mode, global_scale);
  auto shape = quantized_shape<int64_t>(w, format);
  return {
      format, w.contiguous(), global_scale.has_value() ? global_scale->contiguous() : Tensor(), std::move(shape.words),
      std::move(shape.scales)};
}

std::tuple<Tensor, Tensor, Tensor> QuantizeProblem::meta(
    const Tensor& w,
    std::optional<int64_t> group_size,
    std::optional<int64_t> bits,
    std::string_view mode,
    const std::optional<Tensor>& global_scale) {
  const Format format = check_quantize(w, group_size, bits, mode, global_scale);
  return empty_results(w, format, quantized_shape<c10::SymInt>(w, format));
}

std::tuple<Tensor, Tensor, Tensor> empty_quantized(const QuantizeProblem& problem) {
  return empty_results<int64_t>(problem.w, problem.format, {problem.words, problem.scales});
}

}  // namespace quantization_mlx
