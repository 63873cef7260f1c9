#include "memo.h"

#include <cstdint>
#include <unordered_map>

#include "device.h"
#include "self_check.h"

namespace quantization_mlx::metal {
namespace {

// Prompts have many lengths, and each is another plan.
constexpr size_t max_plans = 1024;

// What one thread has asked for, on one GPU.
template <typename Facts>
struct Memo {
  const void* gpu = nullptr;
  uint64_t failures = 0;
  std::unordered_map<Facts, PreparedPlan, gpu::Bytewise, gpu::Bytewise> plans;
};

}  // namespace

template <typename Facts>
const PreparedPlan& plan_of(const Facts& facts, std::string_view op) {
  thread_local Memo<Facts> memo;
  const void* gpu = current_gpu();
  const uint64_t failures = failure_count();
  if (memo.gpu != gpu || memo.failures != failures || memo.plans.size() >= max_plans) {
    memo.gpu = gpu;
    memo.failures = failures;
    memo.plans.clear();
  }
  const auto found = memo.plans.find(facts);
  return found != memo.plans.end() ? found->second : memo.plans.emplace(facts, checked_plan(facts, op)).first->second;
}

#define INSTANTIATE(Facts) template const PreparedPlan& plan_of(const gpu::Facts&, std::string_view);
QUANTIZATION_MLX_FACTS(INSTANTIATE)
#undef INSTANTIATE

}  // namespace quantization_mlx::metal
