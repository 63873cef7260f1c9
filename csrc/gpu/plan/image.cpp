// Plans of resample_image: a thread makes a few channels of a pixel.
#include <c10/util/Exception.h>

#include <bit>

#include "launches.h"

namespace quantization_mlx::gpu {

Plan plan(const ImageFacts& facts, std::string_view op, const Target& target) {
  TORCH_CHECK(!target.excluded.contains(Family::image), no_family_left(op, target));
  const auto as_int = [](int64_t value) { return static_cast<int>(value); };
  const int pixels = checked_int(op, "the number of pixels", facts.new_height * facts.new_width);
  const int channels = checked_int(op, "the number of channels", facts.channels);
  const bool has_statistics = facts.has_statistics != 0;
  Launch launch = launch_of(Family::image, "resample_image", 1, Format{}, facts.dtype);
  launch.kernel.constants = constant(QUANTIZATION_MLX_HAS_BIAS, has_statistics);
  launch.kernel.threads = elementwise_threads_per_threadgroup();
  launch.threadgroups = {
      static_cast<uint32_t>(ceil_div(pixels, launch.kernel.threads)),
      static_cast<uint32_t>(ceil_div(channels, image_channels())),
      static_cast<uint32_t>(checked_int(op, "the number of images", facts.images))};
  const auto given = [&](Role role) { return has_statistics ? Argument{role} : Argument{}; };
  set_arguments(launch, {{Role::x}, given(Role::bias), given(Role::weight), {Role::y}});
  set_params(
      launch,
      ImageParams{
          facts.image_stride, facts.channel_stride, facts.row_stride, facts.column_stride, channels,
          as_int(facts.height), as_int(facts.width), as_int(facts.new_height), as_int(facts.new_width), facts.cubic,
          facts.antialias, facts.channels_last, std::bit_cast<float>(facts.scale)},
      4);
  return {{launch}, 0};
}

}  // namespace quantization_mlx::gpu
