// Whether products may quantize their activations: a setting of the process, read by every product.
#include <c10/util/Exception.h>

#include <atomic>

#include "../environment.h"
#include "kernels.h"
#include "ops.h"

namespace quantization_mlx::cpu {
namespace {

Activations activations_named(const char* source, std::string_view name) {
  TORCH_CHECK_VALUE(name == "exact" || name == "int8", source, " is \"", name, "\"; known are \"exact\" and \"int8\".");
  TORCH_CHECK_VALUE(
      name == "exact" || kernels().int8 != nullptr, source,
      " is \"int8\", which needs AVX-512 with VNNI and VBMI; the kernels of this process are those for ",
      kernels().name, kernels().name == std::string_view("avx512") ? ", on a machine without one of the two." : ".");
  return name == "int8" ? Activations::int8 : Activations::exact;
}

std::atomic<Activations>& activations_of_process() {
  constexpr const char* variable = "QUANTIZATION_MLX_CPU_ACTIVATIONS";
  static std::atomic<Activations> setting = [] {
    const char* name = environment_variable(variable);
    return activations_named(variable, name == nullptr ? "exact" : name);
  }();
  return setting;
}

thread_local int exact_scopes = 0;

}  // namespace

void set_activations(std::string_view name) {
  activations_of_process().store(activations_named("activations", name), std::memory_order_relaxed);
}

std::string get_activations() { return activations_of_process() == Activations::int8 ? "int8" : "exact"; }

Activations activations_of(const MatmulProblem& problem) {
  const ModeTraits traits = traits_of(problem.weights.format.mode);
  const bool has_bytes = traits.element == Element::e2m1 || traits.offset == Offset::biases;
  const bool may = problem.transpose && has_bytes && exact_scopes == 0;
  const Activations wanted = activations_of_process().load(std::memory_order_relaxed);
  return may ? wanted : Activations::exact;
}

ExactActivations::ExactActivations() { ++exact_scopes; }

ExactActivations::~ExactActivations() { --exact_scopes; }

}  // namespace quantization_mlx::cpu
