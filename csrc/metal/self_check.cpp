#include "self_check.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_set>
#include <utility>

#include "../environment.h"
#include "device.h"
#include "self_check_examples.h"

namespace quantization_mlx::metal {
namespace {

using namespace gpu;

struct CheckedKernel {
  const void* gpu;
  KernelInstance kernel;
};

// What a failed kernel excludes: its family, for all that it might be wrong about.
struct Excluded {
  const void* gpu;
  Format format;
  int32_t family;
  int32_t dtype;
  int32_t side;  // transpose, the kind of norm or gate, traditional, or the bits of packed keys
};

// Held while a check runs: it is short, and nothing else may use kernels that are being checked.
std::mutex mutex;
std::unordered_set<CheckedKernel, Bytewise, Bytewise> passed;  // guarded by mutex
std::unordered_set<Excluded, Bytewise, Bytewise> excluded;  // guarded by mutex
std::atomic<uint64_t> failures{0};

int32_t side_of(const ProductFacts& facts) { return static_cast<int32_t>(facts.transpose); }
int32_t side_of(const NormFacts& facts) { return facts.kind; }
int32_t side_of(const RopeFacts& facts) { return facts.traditional; }
int32_t side_of(const GateFacts& facts) { return facts.kind; }
int32_t side_of(const AttentionFacts& facts) { return facts.bits; }
template <typename Facts>
int32_t side_of(const Facts&) {
  return 0;
}

template <typename Facts>
Excluded exclusion(const Facts& facts, Family family) {
  Format format{};
  if constexpr (requires { facts.format; }) {
    format = facts.format;
  }
  return {current_gpu(), format, static_cast<int32_t>(family), facts.dtype, side_of(facts)};
}

// What of a problem decides whether a family is used: " and affine of 4 bits with transpose=True".
template <typename Facts>
std::string described(const Facts& facts) {
  if constexpr (requires { facts.format; }) {
    return c10::str(" and ", name_of(facts.format.mode), " of ", facts.format.bits, " bits");
  }
  return {};
}
std::string described(const NormFacts& facts) {
  return facts.kind == static_cast<int32_t>(NormProblem::Kind::layer) ? " and layer_norm" : " and rms_norm";
}
std::string described(const RopeFacts& facts) {
  return c10::str(" and rope with traditional=", facts.traditional != 0 ? "True" : "False");
}
std::string described(const GateFacts& facts) {
  return facts.kind == static_cast<int32_t>(Gate::swiglu) ? " and swiglu" : " and geglu";
}
std::string described(const AttentionFacts& facts) {
  return facts.bits == 0 ? "" : c10::str(" and keys of ", facts.bits, " bits");
}
std::string described(const ProductFacts& facts) {
  return described<ProductFacts>(facts) + " with transpose=" + (facts.transpose != 0 ? "True" : "False");
}

template <typename Facts>
Target target_of(const Facts& facts) {
  Target target{gpu_traits(), {}};
  const std::lock_guard lock(mutex);
  for (const Family family : all_families) {
    if (excluded.count(exclusion(facts, family)) > 0) {
      target.excluded.insert(family);
    }
  }
  return target;
}

bool is_variable(const char* name, std::string_view value) {
  const char* set = environment_variable(name);
  return set != nullptr && set == value;
}

template <typename Facts>
void exclude(const Facts& facts, const Launch& launch, const Target& target, const std::string& reason) {
  const std::string text = c10::str(
      "[quantization_mlx] Kernel family \"", name_of(launch.family), "\" fails its self-check for ",
      static_cast<at::ScalarType>(facts.dtype), described(facts), " on ", target.gpu.architecture,
      " and is not used: ", launch.kernel.name(), ": ", reason);
  TORCH_CHECK(!is_variable("CI", "true"), text);
  if (excluded.insert(exclusion(facts, launch.family)).second) {
    TORCH_WARN(text);
    ++failures;
  }
}

// What comes before or after a product in its plan, and is checked with it.
bool is_part_of_product(const Launch& launch) {
  const std::string_view file = launch.kernel.file;
  return file == "sum_parts" || file == "sort_pairs";
}

// Whether a kernel has passed its check, which the first caller makes.
template <typename Facts>
bool passes(const Facts& facts, const Launch& launch, const Target& target) {
  static const bool leaves_out = is_variable("QUANTIZATION_MLX_SELF_CHECK", "0");
  if (leaves_out || is_part_of_product(launch)) {
    return true;
  }
  const CheckedKernel checked{current_gpu(), launch.kernel};
  const std::lock_guard lock(mutex);
  if (passed.count(checked) > 0) {
    return true;
  }
  const Reason reason = failure(facts, launch, target);
  if (reason.has_value()) {
    exclude(facts, launch, target, *reason);
    return false;
  }
  passed.insert(checked);
  return true;
}

// The plan with its pipelines; nothing where Metal makes none and another family may serve.
template <typename Facts>
std::optional<PreparedPlan> prepared_of_several(const Facts& facts, Plan plan, const Target& target) {
  for (const Launch& launch : plan.launches) {
    try {
      prepared({{launch}, 0});
    } catch (const c10::Error& error) {
      const std::lock_guard lock(mutex);
      exclude(facts, launch, target, error.what_without_backtrace());
      return std::nullopt;
    }
  }
  return prepared(std::move(plan));
}

std::optional<PreparedPlan> prepared_or_excluded(const ProductFacts& facts, Plan plan, const Target& target) {
  return prepared_of_several(facts, std::move(plan), target);
}
std::optional<PreparedPlan> prepared_or_excluded(const AttentionFacts& facts, Plan plan, const Target& target) {
  return prepared_of_several(facts, std::move(plan), target);
}

// Nothing stands in for other kernels: Metal's own error is what helps.
template <typename Facts>
std::optional<PreparedPlan> prepared_or_excluded(const Facts&, Plan plan, const Target&) {
  return prepared(std::move(plan));
}

}  // namespace

template <typename Facts>
Target current_target(const Facts& facts) {
  return target_of(facts);
}

template <typename Facts>
PreparedPlan checked_plan(const Facts& facts, std::string_view op) {
  while (true) {
    const Target target = target_of(facts);
    auto plan = prepared_or_excluded(facts, gpu::plan(facts, op, target), target);
    if (!plan.has_value()) {
      continue;
    }
    const auto& launches = plan->plan.launches;
    if (std::all_of(
            launches.begin(), launches.end(), [&](const Launch& launch) { return passes(facts, launch, target); })) {
      return *std::move(plan);
    }
  }
}

#define INSTANTIATE(Facts)                      \
  template Target current_target(const Facts&); \
  template PreparedPlan checked_plan(const Facts&, std::string_view);
QUANTIZATION_MLX_FACTS(INSTANTIATE)
#undef INSTANTIATE

uint64_t failure_count() { return failures.load(std::memory_order_relaxed); }

}  // namespace quantization_mlx::metal
