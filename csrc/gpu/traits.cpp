#include "traits.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <iterator>
#include <optional>

namespace quantization_mlx::gpu {
namespace {

// GPUs by the last letter of their architecture. Cores are those of the larger common model; they only steer how far a
// small product is cut up.
struct Variant {
  char letter;
  int cores;
};
constexpr Variant variants[] = {{'p', 6}, {'g', 10}, {'s', 20}, {'c', 32}, {'d', 64}};

std::optional<GpuTraits> known(std::string_view architecture, int macos) {
  constexpr std::string_view prefix = "applegpu_g";
  const bool complete = architecture.substr(0, prefix.size()) == prefix && architecture.size() > prefix.size() + 1;
  const std::string_view rest = complete ? architecture.substr(prefix.size()) : std::string_view();
  const bool digits = complete && rest.size() <= 4 &&
      std::all_of(rest.begin(), rest.end() - 1, [](char c) { return c >= '0' && c <= '9'; });
  const Variant* variant = digits
      ? std::find_if(std::begin(variants), std::end(variants), [&](Variant v) { return v.letter == rest.back(); })
      : std::end(variants);
  if (variant == std::end(variants)) {
    return std::nullopt;
  }
  GpuTraits traits;
  traits.architecture = std::string(architecture);
  traits.macos = macos;
  traits.generation = std::stoi(std::string(rest.substr(0, rest.size() - 1)));
  traits.variant = variant->letter;
  traits.cores = variant->cores;
  // The phone chip of generation 17 came before the matrix units.
  traits.tensor_ops = traits.generation >= (traits.variant == 'p' ? 18 : 17) && macos >= 2602;
  return traits;
}

}  // namespace

GpuTraits GpuTraits::parse(std::string_view name, int macos) {
  const size_t slash = name.find('/');
  auto traits = known(name.substr(0, slash), macos);
  const std::string_view cores = slash == std::string_view::npos ? "" : name.substr(slash + 1);
  const bool is_number = std::all_of(cores.begin(), cores.end(), [](char c) { return c >= '0' && c <= '9'; });
  const bool has_cores = slash == std::string_view::npos || (!cores.empty() && cores.size() <= 4 && is_number);
  TORCH_CHECK_VALUE(
      traits.has_value() && has_cores, "The GPU is named \"", name,
      "\"; expected is Metal's name of an architecture, applegpu_g and a generation and p, g, s, c or d, and if you "
      "like, after a slash, how many cores it has: applegpu_g16s or applegpu_g16s/16.");
  if (!cores.empty()) {
    traits->cores = std::max(1, std::stoi(std::string(cores)));
  }
  return *traits;
}

GpuTraits GpuTraits::of_device(std::string_view architecture, int macos, int cores) {
  GpuTraits plain;
  plain.architecture = std::string(architecture);
  plain.cores = 10;
  plain.macos = macos;
  GpuTraits traits = known(architecture, macos).value_or(plain);
  traits.cores = cores > 0 ? cores : traits.cores;
  return traits;
}

}  // namespace quantization_mlx::gpu
