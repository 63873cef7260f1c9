// Small problems whose results tell whether a kernel is right, and what tells it.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>

#include "../gpu/plan.h"
#include "operands.h"

namespace quantization_mlx::metal {

// Why a kernel is wrong; nothing where it is right.
using Reason = std::optional<std::string>;

// Runs this launch's kernel, as it is specialised there, on an example of its own.
#define QUANTIZATION_MLX_DECLARE(Facts) \
  Reason failure(const gpu::Facts& facts, const gpu::Launch& launch, const gpu::Target& target);
QUANTIZATION_MLX_FACTS(QUANTIZATION_MLX_DECLARE)
#undef QUANTIZATION_MLX_DECLARE

// --- What those functions are made of -------------------------------------------------------------------------------

inline const at::Device mps(at::kMPS, 0);

// Random numbers that are the same every time.
class Generator {
 public:
  uint32_t bits() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return static_cast<uint32_t>(state_ >> 32);
  }
  float uniform(float low, float high) { return low + (high - low) * (static_cast<float>(bits() >> 8) * 0x1p-24f); }

 private:
  uint64_t state_ = 1;
};

// Makes the tensors of examples: on device "meta" without values, to ask for a plan; else random ones of the host, or
// copies of these.
class Maker {
 public:
  explicit Maker(at::Device device) : device_(device) {}

  // values: makes one of a tensor of `dtype`.
  template <typename T, typename Values>
  at::Tensor tensor(c10::IntArrayRef sizes, at::ScalarType dtype, at::ScalarType result, const Values& values) {
    if (device_.is_meta()) {
      return at::empty(sizes, at::TensorOptions().dtype(result).device(device_));
    }
    at::Tensor tensor = at::empty(sizes, dtype);
    std::generate_n(static_cast<T*>(tensor.mutable_data_ptr()), tensor.numel(), values);
    return tensor.to(result).to(device_);
  }

  at::Tensor uniform(c10::IntArrayRef sizes, at::ScalarType dtype, float low, float high) {
    return tensor<float>(sizes, at::kFloat, dtype, [&] { return random_.uniform(low, high); });
  }

  uint32_t bits() { return random_.bits(); }

 private:
  at::Device device_;
  Generator random_;
};

inline bool is_set(const gpu::KernelInstance& kernel, int constant) { return kernel.constants >> constant & 1u; }

inline std::optional<at::Tensor> on_mps(const std::optional<at::Tensor>& tensor) {
  return tensor.has_value() ? std::optional(tensor->to(mps)) : std::nullopt;
}

at::Tensor host_floats(const at::Tensor& tensor);

// Nothing where a result is as near to the CPU's as one of this dtype should be.
Reason judged(const at::Tensor& result, const at::Tensor& expected, at::ScalarType dtype);

// Without checks of its kernels, and without the memo.
void run(const gpu::Plan& plan, const Operands& operands);

}  // namespace quantization_mlx::metal
