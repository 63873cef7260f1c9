// The names of modes, and formats from the arguments of an op.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "../format.h"

namespace quantization_mlx {

// "affine", "mxfp4", ...; ends in a zero byte.
std::string_view name_of(Mode mode);

// The mode of this name; nothing for a name that is none.
std::optional<Mode> mode_of(std::string_view name);

// Raises ValueError for a mode, bits or a group size that is not supported; what is not given has the mode's default.
Format parse_format(
    std::string_view op,
    std::string_view mode,
    std::optional<int64_t> group_size,
    std::optional<int64_t> bits);

// The table of formats.h as JSON: a list of {"name", "packing", "element", "scale", "offset", "group_sizes", "widths",
// "default_group_size", "default_bits"}.
std::string describe_modes();

}  // namespace quantization_mlx
