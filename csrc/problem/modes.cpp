#include "modes.h"

#include <c10/util/Exception.h>
#include <c10/util/StringUtil.h>

#include <algorithm>
#include <iterator>
#include <sstream>
#include <vector>

namespace quantization_mlx {
namespace {

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

}  // namespace

std::string_view name_of(Mode mode) { return mode_names[static_cast<int>(mode)]; }

std::optional<Mode> mode_of(std::string_view name) {
  const auto* found = std::find(std::begin(mode_names), std::end(mode_names), name);
  return found == std::end(mode_names) ? std::nullopt : std::optional(static_cast<Mode>(found - mode_names));
}

Format parse_format(
    std::string_view op,
    std::string_view name,
    std::optional<int64_t> group_size,
    std::optional<int64_t> bits) {
  const std::optional<Mode> named = mode_of(name);
  TORCH_CHECK_VALUE(
      named.has_value(), "[", op, "] mode is \"", name, "\"; supported are ", names_of(Packing::rows),
      ", and for column-packed weights ", names_of(Packing::columns), ".");
  const Mode mode = *named;
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

std::string describe_modes() {
  constexpr struct {
    const char* packing;
    const char* element;
    const char* scale;
    const char* offset;
  } texts[] = {
#define TEXTS(name, packing, element, scale, offset, ...) {#packing, #element, #scale, #offset},
      QUANTIZATION_MLX_MODES(TEXTS, )
#undef TEXTS
  };
  std::ostringstream text;
  for (int i = 0; i < mode_count(); ++i) {
    const Mode mode = static_cast<Mode>(i);
    const auto& [packing, element, scale, offset] = texts[i];
    text << (i == 0 ? "[" : ", ") << R"({"name": ")" << mode_names[i] << R"(", "packing": ")" << packing
         << R"(", "element": ")" << element << R"(", "scale": ")" << scale << R"(", "offset": ")" << offset
         << R"(", "group_sizes": [)" << listed(group_sizes_of(mode), ", ") << R"(], "widths": [)"
         << listed(widths_of(mode), ", ") << R"(], "default_group_size": )" << default_group_size(mode)
         << R"(, "default_bits": )" << default_bits(mode) << "}";
  }
  return text.str() + "]";
}

}  // namespace quantization_mlx
