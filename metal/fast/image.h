// Images of another size: y of images [C, H, W] or [H, W, C] from x on any strides.
//
//   threadgroups along x     64 pixels of y, row by row, of which a thread has one
//   threadgroups along y     4 channels each, which share the weights of a thread
//   threadgroups along z     images
//
//          tx, four at a time
//        +---+---+---+---+        A thread adds up the pixels of x that have weights for its own (csrc/resampling.h).
//    ty  | . | . | . | . |        The weights of four columns are computed once and serve for all rows; those of rows
//     |  | . | . | . | . |        once for every four columns. Nothing is shared, nothing is kept in memory: pixels
//     that v  | . | . | . | . |        neighbours read as well come from the cache.
//        +---+---+---+---+
//
// A pixel of weight 0 is not read, so that infinity and NaN stay where they are in an image of the same size.
#pragma once

#include "../../csrc/gpu/launch.h"
#include "../../csrc/resampling.h"
#include "../common/metal.h"

namespace quantization_mlx {

constant bool has_bias [[function_constant(QUANTIZATION_MLX_HAS_BIAS)]];

static constant constexpr const int image_threads = elementwise_threads_per_threadgroup();
static constant constexpr const int thread_channels = image_channels();
static constant constexpr const int step_columns = 4;

// What a thread adds up of `channels` channels, and the sum of weights.
struct PixelSums {
  float values[thread_channels];
  float weights;
};

template <typename T>
METAL_FUNC void add_pixel(
    const device T* pixel,
    long channel_stride,
    int channels,
    float weight,
    thread PixelSums& sums) {
  sums.weights += weight;
#pragma unroll
  for (int c = 0; c < thread_channels; ++c) {
    if (c < channels) {
      sums.values[c] += weight * static_cast<float>(pixel[c * channel_stride]);
    }
  }
}

// Of pixel `row`, `column` of y.
template <typename T>
METAL_FUNC void add_pixels(
    const device T* x,
    constant ImageParams& params,
    int row,
    int column,
    int channels,
    thread PixelSums& sums) {
  const bool is_cubic = params.cubic != 0;
  const bool antialias = params.antialias != 0;
  const ResampledSide down = resampled_side(params.height, params.new_height, is_cubic, antialias);
  const ResampledSide across = resampled_side(params.width, params.new_width, is_cubic, antialias);
  const int first_row = first_tap(down, row);
  const int end_of_rows = end_of_taps(down, row);
  const int end_of_columns = end_of_taps(across, column);
  for (int tx = first_tap(across, column); tx < end_of_columns; tx += step_columns) {
    float weights[step_columns];
#pragma unroll
    for (int i = 0; i < step_columns; ++i) {
      weights[i] = tx + i < end_of_columns ? tap_weight(across, column, tx + i) : 0.0f;
    }
    for (int ty = first_row; ty < end_of_rows; ++ty) {
      const float row_weight = tap_weight(down, row, ty);
      const device T* source = x + clamped_pixel(down, ty) * params.row_stride;
#pragma unroll
      for (int i = 0; i < step_columns; ++i) {
        const float weight = row_weight * weights[i];
        if (weight != 0.0f) {
          const device T* pixel = source + clamped_pixel(across, tx + i) * params.column_stride;
          add_pixel(pixel, params.channel_stride, channels, weight, sums);
        }
      }
    }
  }
}

template <typename T>
[[kernel, max_total_threads_per_threadgroup(image_threads)]] void resample_image(
    const device T* x [[buffer(0)]],
    const device float* mean [[buffer(1), function_constant(has_bias)]],
    const device float* deviation [[buffer(2), function_constant(has_bias)]],
    device float* y [[buffer(3)]],
    constant ImageParams& params [[buffer(4)]],
    uint3 threadgroup_index [[threadgroup_position_in_grid]],
    uint thread_index [[thread_index_in_threadgroup]]) {
  const int pixels = params.new_height * params.new_width;
  const int pixel = threadgroup_index.x * image_threads + thread_index;
  if (pixel >= pixels) {
    return;
  }
  const long image = threadgroup_index.z;
  const int channel = threadgroup_index.y * thread_channels;
  const int channels = min(thread_channels, params.channels - channel);
  PixelSums sums = {};
  add_pixels(
      x + image * params.image_stride + channel * params.channel_stride, params, pixel / params.new_width,
      pixel % params.new_width, channels, sums);

  const bool channels_last = params.channels_last != 0;
  const long step = channels_last ? 1 : pixels;
  device float* destination = y + image * params.channels * pixels +
      (channels_last ? static_cast<long>(pixel) * params.channels + channel : channel * step + pixel);
#pragma unroll
  for (int c = 0; c < thread_channels; ++c) {
    if (c < channels) {
      const float value = sums.values[c] / sums.weights * params.scale;
      destination[c * step] = has_bias ? (value - mean[channel + c]) / deviation[channel + c] : value;
    }
  }
}

}  // namespace quantization_mlx
