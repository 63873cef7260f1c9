// The arguments of resample_image, checked: as problem.h.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>

#include "../resampling.h"
#include "sizes.h"

namespace quantization_mlx {

// Of [images, channels, rows, columns], in elements.
struct ImageStrides {
  int64_t image;
  int64_t channel;
  int64_t row;
  int64_t column;
};

// Images of another size: each pixel times scale, minus mean, over deviation of its channel; float32.
struct ImageProblem {
  static constexpr const char* name = "resample_image";
  // The size of the result may be symbols to a tracing compiler.
  template <typename Result, typename Int>
  using Schema = Result(
      const at::Tensor& x,
      Int height,
      Int width,
      std::string_view mode,
      bool antialias,
      const std::optional<at::Tensor>& mean,
      const std::optional<at::Tensor>& std,
      double scale,
      bool channels_last);
  static Schema<ImageProblem, int64_t> check;
  static Schema<at::Tensor, c10::SymInt> meta;

  at::Tensor x;  // uint8 or floating point, of any strides
  at::Tensor mean;  // float32 [channels], contiguous; undefined, as deviation, where neither is given
  at::Tensor deviation;
  int64_t images;
  int64_t channels;
  int64_t height;  // of x
  int64_t width;
  int64_t new_height;
  int64_t new_width;
  ImageStrides strides;
  bool cubic;
  bool antialias;
  bool channels_last;  // of x and of the result
  float scale;
  Sizes<int64_t> output;

  at::Device device() const { return x.device(); }
  bool is_empty() const { return images == 0 || channels == 0; }
  ResampledSide rows() const { return side(height, new_height); }
  ResampledSide columns() const { return side(width, new_width); }

 private:
  ResampledSide side(int64_t from, int64_t to) const {
    return resampled_side(static_cast<int>(from), static_cast<int>(to), cubic, antialias);
  }
};

inline std::string_view op_of(const ImageProblem& problem) { return problem.name; }

}  // namespace quantization_mlx
