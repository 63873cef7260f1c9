// Every plan that the project encodes, compared with what the device was then told to launch. The linker puts this in
// the way of each call of encode (--wrap).
#include "metal/encode.h"

#include <string>

#include "device.h"

namespace quantization_mlx::metal {
namespace {

using gpu::Launch;

std::string text_of(const Launch& launch) {
  std::string text = launch.kernel.name() + " with constants";
  for (int i = 0; i < 32; ++i) {
    text += launch.kernel.constants >> i & 1u ? " " + std::to_string(i) : "";
  }
  for (const uint32_t count : launch.threadgroups) {
    text += ", " + std::to_string(count);
  }
  return text + " threadgroups of " + std::to_string(launch.kernel.threads) + ", 1, 1 threads";
}

std::string text_of(const softmetal::LaunchRecord& launch) {
  std::string text = launch.kernel + " with constants";
  for (const auto& [index, bytes] : launch.constants) {
    text += bytes != std::string(1, '\0') ? " " + std::to_string(index) : "";
  }
  for (const uint64_t count : launch.threadgroups) {
    text += ", " + std::to_string(count);
  }
  const auto& [x, y, z] = launch.threads;
  return text + " threadgroups of " + std::to_string(x) + ", " + std::to_string(y) + ", " + std::to_string(z) +
      " threads";
}

}  // namespace

void real_encode(const PreparedPlan& plan, Operands operands) asm("__real_" SOFTMETAL_ENCODE);
__attribute__((used)) void checked_encode(const PreparedPlan& plan, Operands operands) asm("__wrap_" SOFTMETAL_ENCODE);

void checked_encode(const PreparedPlan& prepared, Operands operands) {
  auto& launches = softmetal::launches_of_this_thread();
  launches.clear();
  real_encode(prepared, operands);
  std::string planned;
  std::string launched;
  for (const Launch& launch : prepared.plan.launches) {
    planned += "\n  " + text_of(launch);
  }
  for (const softmetal::LaunchRecord& launch : launches) {
    launched += "\n  " + text_of(launch);
  }
  if (planned != launched) {
    softmetal::misuse("planned were" + planned + "\nand launched" + launched);
  }
  softmetal::count("checked plans");
}

}  // namespace quantization_mlx::metal
