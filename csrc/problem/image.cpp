// Images of another size: resample_image.
#include "image.h"

#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>
#include <c10/core/ScalarType.h>

#include <cmath>

#include "weights.h"

namespace quantization_mlx {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr const char* op = ImageProblem::name;

struct ImageArguments {
  const Tensor& x;
  std::string_view mode;
  const OptionalTensor& mean;
  const OptionalTensor& std;
  double scale;
  bool channels_last;
};

// Where in the sizes of x each dimension of an image is.
struct Places {
  size_t channel;
  size_t row;
  size_t column;
};

Places places_of(const Tensor& x, bool channels_last) {
  const auto first = static_cast<size_t>(x.dim() - 3);
  return channels_last ? Places{first + 2, first, first + 1} : Places{first, first + 1, first + 2};
}

template <typename Int>
void check_side(const char* what, const Int& size) {
  TORCH_CHECK_VALUE(
      holds(c10::sym_ge(size, Int(1))) && holds(c10::sym_le(size, Int(resampling_max_side()))), "[", op, "] ", what,
      " is ", size, "; it must be from 1 to ", resampling_max_side(), " pixels.");
}

template <typename Int>
void check_statistic(const char* name, const OptionalTensor& given, const Tensor& x, const Int& channels) {
  if (!given.has_value()) {
    return;
  }
  check_activation(op, name, *given);
  check_device(op, name, *given, "x", x);
  TORCH_CHECK_VALUE(
      given->dim() == 1 && holds(c10::sym_eq(sizes_of<Int>(*given)[0], channels)), "[", op, "] ", name, " of shape ",
      sizes_of<Int>(*given), " must be one number for each of the ", channels, " channels of x.");
}

template <typename Int>
void check_image(const ImageArguments& arguments, const Int& height, const Int& width) {
  const auto& [x, mode, mean, std, scale, channels_last] = arguments;
  TORCH_CHECK_TYPE(
      x.scalar_type() == at::kByte || is_activation(x.scalar_type()), "[", op, "] x has dtype ", x.scalar_type(),
      "; supported are uint8, float32, float16 and bfloat16.");
  const auto sizes = sizes_of<Int>(x);
  TORCH_CHECK_VALUE(
      sizes.size() == 3 || sizes.size() == 4, "[", op, "] x of shape ", sizes, " must be an image or a batch of them, ",
      channels_last ? "[..., H, W, C]." : "[..., C, H, W].");
  TORCH_CHECK_VALUE(
      mode == "bilinear" || mode == "bicubic", "[", op, "] mode is \"", mode,
      "\"; supported are \"bilinear\" and \"bicubic\".");
  const Places places = places_of(x, channels_last);
  check_side<Int>("the height of x", sizes[places.row]);
  check_side<Int>("the width of x", sizes[places.column]);
  check_side<Int>("the height of the result", height);
  check_side<Int>("the width of the result", width);
  check_statistic<Int>("mean", mean, x, sizes[places.channel]);
  check_statistic<Int>("std", std, x, sizes[places.channel]);
  TORCH_CHECK_VALUE(std::isfinite(scale), "[", op, "] scale is ", scale, "; it must be finite.");
}

template <typename Int>
Sizes<Int> resampled_sizes(const Tensor& x, bool channels_last, const Int& height, const Int& width) {
  const auto sizes = sizes_of<Int>(x);
  const Places places = places_of(x, channels_last);
  Sizes<Int> result(sizes.begin(), sizes.end());
  result[places.row] = height;
  result[places.column] = width;
  return result;
}

}  // namespace

ImageProblem ImageProblem::check(
    const Tensor& x,
    int64_t height,
    int64_t width,
    std::string_view mode,
    bool antialias,
    const OptionalTensor& mean,
    const OptionalTensor& std,
    double scale,
    bool channels_last) {
  check_image<int64_t>({x, mode, mean, std, scale, channels_last}, height, width);
  const Places places = places_of(x, channels_last);
  const bool is_batch = x.dim() == 4;
  ImageProblem problem;
  problem.x = x;
  problem.images = is_batch ? x.size(0) : 1;
  problem.channels = x.sizes()[places.channel];
  problem.height = x.sizes()[places.row];
  problem.width = x.sizes()[places.column];
  problem.new_height = height;
  problem.new_width = width;
  problem.strides = {
      is_batch ? x.stride(0) : 0, x.strides()[places.channel], x.strides()[places.row], x.strides()[places.column]};
  if (mean.has_value() || std.has_value()) {
    const auto options = x.options().dtype(at::kFloat);
    const auto given = [](const Tensor& tensor) { return with_dtype(tensor, at::kFloat).contiguous(); };
    problem.mean = mean.has_value() ? given(*mean) : at::zeros({problem.channels}, options);
    problem.deviation = std.has_value() ? given(*std) : at::ones({problem.channels}, options);
  }
  problem.cubic = mode == "bicubic";
  problem.antialias = antialias;
  problem.channels_last = channels_last;
  problem.scale = static_cast<float>(scale);
  problem.output = resampled_sizes<int64_t>(x, channels_last, height, width);
  return problem;
}

Tensor ImageProblem::meta(
    const Tensor& x,
    c10::SymInt height,
    c10::SymInt width,
    std::string_view mode,
    bool,
    const OptionalTensor& mean,
    const OptionalTensor& std,
    double scale,
    bool channels_last) {
  check_image<c10::SymInt>({x, mode, mean, std, scale, channels_last}, height, width);
  return empty(
      c10::ArrayRef<c10::SymInt>(resampled_sizes<c10::SymInt>(x, channels_last, height, width)),
      x.options().dtype(at::kFloat));
}

}  // namespace quantization_mlx
