// From a checked problem and a GPU to the kernels that run it. Plans are data: nothing here touches a device, so any
// problem can be planned for any GPU on any machine.
#pragma once

#include <c10/core/ScalarType.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "../problem/problem.h"
#include "launch.h"
#include "traits.h"

namespace quantization_mlx::gpu {

// Kernels that can stand in for one another, the fastest first. A plan takes the first one that serves the problem.
enum class Family : uint8_t { tensor, tile, matvec, quantize };
inline constexpr std::array<Family, 4> all_families{Family::tensor, Family::tile, Family::matvec, Family::quantize};

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

// The tensors that kernels take, by the part they play.
enum class Role : uint8_t {
  none,  // an argument that this kernel does not use
  x,  // also what quantize reads
  w,  // packed words, read or written
  scales,
  biases,
  global_scale,
  y,
  partial_sums,  // float32 workspace
  lhs_indices,
  rhs_indices,
};
inline constexpr int role_count = 10;

const char* name_of(Role role);

struct Argument {
  Role role = Role::none;
  int64_t offset = 0;  // elements past the beginning of the tensor
};
struct Launch {
  std::string kernel;  // its name is its specification
  const char* file;  // stem of the .metal file that has it
  const char* pattern;  // of instance()
  Family family;
  Format format;
  at::ScalarType dtype;
  uint32_t constants = 0;  // bit i: function constant i of launch.h is true
  std::array<Argument, 9> arguments;  // by buffer index; params_index is left out
  int argument_count = 0;
  int params_index = 0;
  std::array<std::byte, sizeof(GatherParams)> params;
  int params_size = 0;
  std::array<uint32_t, 3> threadgroups;
  uint32_t threads = 0;  // of one threadgroup, along x

  // The template of that file, with its arguments, that is the kernel: qmv<half, Mode::affine, 64, 4, 2>.
  std::string instance() const;
};

struct Plan {
  std::vector<Launch> launches;  // in order, each after the one before; none where there is nothing to compute
  int64_t workspace = 0;  // float32 values of Role::partial_sums
};

// Kernels read scales and biases of one dtype, in affine mode: these are the problems with theirs promoted to it, which
// is exact and, where nothing differs, free. The dequantized matrix is of that dtype, and may be wanted in another.
MatmulProblem with_kernel_dtype(MatmulProblem problem);
GatherProblem with_kernel_dtype(GatherProblem problem);
DequantizeProblem with_kernel_dtype(DequantizeProblem problem);
inline const QuantizeProblem& with_kernel_dtype(const QuantizeProblem& problem) { return problem; }

// Plans of problems with_kernel_dtype. Raise NotImplementedError for sizes beyond a kernel's 32-bit counters and
// RuntimeError where every family is excluded.
Plan plan(const MatmulProblem& problem, const Target& target);
Plan plan(const GatherProblem& problem, const Target& target);
Plan plan(const DequantizeProblem& problem, const Target& target);
Plan plan(const QuantizeProblem& problem, const Target& target);

}  // namespace quantization_mlx::gpu
