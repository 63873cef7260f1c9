// From a checked problem and a GPU to the kernels that run it. Plans are data: nothing here touches a device, so any
// problem can be planned for any GPU on any machine.
#pragma once

#include <c10/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "facts.h"
#include "launch.h"
#include "traits.h"

namespace quantization_mlx::gpu {

// Kernels that can stand in for one another, the fastest first. A plan takes the first one that serves the problem.
#define QUANTIZATION_MLX_FAMILIES(EACH) \
  EACH(tensor)                          \
  EACH(tile)                            \
  EACH(matvec)                          \
  EACH(gated_matvec)                    \
  EACH(quantize)                        \
  EACH(dequantize)                      \
  EACH(norm)                            \
  EACH(rope_into_cache)                 \
  EACH(rope)                            \
  EACH(gate)                            \
  EACH(attention)                       \
  EACH(sample)                          \
  EACH(router)                          \
  EACH(combine)                         \
  EACH(image)

#define ENUMERATOR(name) name,
enum class Family : uint8_t { QUANTIZATION_MLX_FAMILIES(ENUMERATOR) };
#undef ENUMERATOR

#define FAMILY(name) Family::name,
inline constexpr Family all_families[] = {QUANTIZATION_MLX_FAMILIES(FAMILY)};
#undef FAMILY

const char* name_of(Family family);

class Families {
 public:
  bool contains(Family family) const { return (bits_ >> static_cast<int>(family)) & 1u; }
  void insert(Family family) { bits_ |= 1u << static_cast<int>(family); }

 private:
  unsigned bits_ = 0;
};

// What a plan is made for. Excluded families are not used: they gave wrong results here.
struct Target {
  GpuTraits gpu;
  Families excluded;
};

// What kernels take, by the part that it plays. "none": an argument that this kernel does not use; x: also what
// quantize reads; w: packed words, read or written; workspace: 32-bit values that launches hand on; residual: what is
// added to x, and sum both together; numbers: CallNumbers, no tensor; experts: indices.
#define QUANTIZATION_MLX_ROLES(EACH) \
  EACH(none)                         \
  EACH(x)                            \
  EACH(w)                            \
  EACH(scales)                       \
  EACH(biases)                       \
  EACH(global_scale)                 \
  EACH(y)                            \
  EACH(workspace)                    \
  EACH(lhs_indices)                  \
  EACH(rhs_indices)                  \
  EACH(residual)                     \
  EACH(weight)                       \
  EACH(x_weight)                     \
  EACH(bias)                         \
  EACH(sum)                          \
  EACH(query_norm)                   \
  EACH(key_norm)                     \
  EACH(cosines)                      \
  EACH(sines)                        \
  EACH(queries)                      \
  EACH(keys)                         \
  EACH(values)                       \
  EACH(key_scales)                   \
  EACH(key_biases)                   \
  EACH(value_scales)                 \
  EACH(value_biases)                 \
  EACH(mask)                         \
  EACH(sinks)                        \
  EACH(gates)                        \
  EACH(offsets)                      \
  EACH(freqs)                        \
  EACH(seeds)                        \
  EACH(previous)                     \
  EACH(numbers)                      \
  EACH(experts)                      \
  EACH(value_bias)

#define ENUMERATOR(name) name,
enum class Role : uint8_t { QUANTIZATION_MLX_ROLES(ENUMERATOR) };
#undef ENUMERATOR

#define ONE(name) +1
inline constexpr int role_count = 0 QUANTIZATION_MLX_ROLES(ONE);
#undef ONE

const char* name_of(Role role);

struct Argument {
  Role role = Role::none;
  int64_t offset = 0;  // elements past the beginning of the tensor
};

// One kernel, specialised: what a pipeline is made of. Plain data; the texts are literals, equal where their addresses
// are.
struct KernelInstance {
  const char* file;  // stem of the .metal file that has it
  const char* name_pattern;  // of name() and instance(), for any type and format
  const char* instance_pattern;
  Format format;
  int32_t dtype;  // at::ScalarType
  uint32_t constants;  // bit i: function constant i of launch.h is true
  uint32_t threads;  // of one threadgroup, along x

  bool has_format() const;  // else it is of a type alone
  std::string name() const;  // its specification: affine_qmv_float16_gs_64_b_4_rows_2
  std::string instance() const;  // the template with its arguments: qmv<half, Mode::affine, 64, 4, 2>
};

struct Launch {
  KernelInstance kernel;
  Family family;
  std::array<Argument, 12> arguments;  // by buffer index; params_index is left out
  int argument_count = 0;
  int params_index = 0;
  std::array<std::byte, std::max({sizeof(GatherParams), sizeof(AttentionParams), sizeof(RopeParams)})> params;
  int params_size = 0;
  std::array<uint32_t, 3> threadgroups;
};

struct Plan {
  std::vector<Launch> launches;  // in order, each after the one before; none where there is nothing to compute
  int64_t workspace = 0;  // 32-bit values of Role::workspace
};

// Kernels read scales and biases of one dtype, in affine mode: these are the problems with theirs promoted to it, which
// is exact and, where nothing differs, free. The dequantized matrix is of that dtype, and may be wanted in another.
MatmulProblem with_kernel_dtype(MatmulProblem problem);
GatherProblem with_kernel_dtype(GatherProblem problem);
DequantizeProblem with_kernel_dtype(DequantizeProblem problem);
GatedMatmulProblem with_kernel_dtype(GatedMatmulProblem problem);
inline const QuantizeProblem& with_kernel_dtype(const QuantizeProblem& problem) { return problem; }
inline const NormProblem& with_kernel_dtype(const NormProblem& problem) { return problem; }
inline const RopeIntoCacheProblem& with_kernel_dtype(const RopeIntoCacheProblem& problem) { return problem; }
inline const SampleProblem& with_kernel_dtype(const SampleProblem& problem) { return problem; }
inline const RouterProblem& with_kernel_dtype(const RouterProblem& problem) { return problem; }
inline const CombineProblem& with_kernel_dtype(const CombineProblem& problem) { return problem; }
inline const AttentionProblem& with_kernel_dtype(const AttentionProblem& problem) { return problem; }
inline const RopeProblem& with_kernel_dtype(const RopeProblem& problem) { return problem; }
inline const GateProblem& with_kernel_dtype(const GateProblem& problem) { return problem; }
inline const ImageProblem& with_kernel_dtype(const ImageProblem& problem) { return problem; }

// Raise NotImplementedError for sizes beyond a kernel's 32-bit counters and RuntimeError where every family is
// excluded; op: the name that errors carry.
// Without launches for a gated product that no kernel serves: then its parts do.
Plan plan(const ProductFacts& facts, std::string_view op, const Target& target);
Plan plan(const DequantizeFacts& facts, std::string_view op, const Target& target);
Plan plan(const QuantizeFacts& facts, std::string_view op, const Target& target);
Plan plan(const NormFacts& facts, std::string_view op, const Target& target);
Plan plan(const RopeCacheFacts& facts, std::string_view op, const Target& target);
Plan plan(const SampleFacts& facts, std::string_view op, const Target& target);
Plan plan(const RouterFacts& facts, std::string_view op, const Target& target);
Plan plan(const CombineFacts& facts, std::string_view op, const Target& target);
Plan plan(const AttentionFacts& facts, std::string_view op, const Target& target);
Plan plan(const RopeFacts& facts, std::string_view op, const Target& target);
Plan plan(const GateFacts& facts, std::string_view op, const Target& target);
Plan plan(const ImageFacts& facts, std::string_view op, const Target& target);

// Of a problem with_kernel_dtype.
template <typename Problem>
Plan plan(const Problem& problem, const Target& target) {
  Plan all;
  for (const auto& facts : facts_of(problem)) {
    Plan part = plan(facts, op_of(problem), target);
    all.launches.insert(all.launches.end(), part.launches.begin(), part.launches.end());
    all.workspace = std::max(all.workspace, part.workspace);
  }
  return all;
}

// One launch for product and activation or, where no kernel serves it, those of the product and of the activation.
Plan plan(const GatedMatmulProblem& problem, const Target& target);

}  // namespace quantization_mlx::gpu
