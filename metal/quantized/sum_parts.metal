// sum_parts: y from the partial sums of a product whose K is cut up (split-K).

// Before any include: see metal.h.
#if __METAL_VERSION__ >= 320
#pragma METAL fp math_mode(safe)
#endif

#include "../../csrc/gpu/launch.h"
#include "../common/metal.h"

namespace quantization_mlx {

static constant constexpr const int sum_parts_threads = elementwise_threads_per_threadgroup();

// One thread per element of y, x dimension: size, y dimension: batch. The order of the additions is fixed.
template <typename T>
[[kernel, max_total_threads_per_threadgroup(sum_parts_threads)]] void sum_parts(
    const device float* partial_sums [[buffer(0)]],
    device T* y [[buffer(1)]],
    constant SumPartsParams& params [[buffer(2)]],
    uint3 position [[thread_position_in_grid]]) {
  const int element = position.x;
  if (element >= params.size) {
    return;
  }
  const long batch = position.y;
  float sum = 0.0f;
  for (int part = 0; part < params.parts; ++part) {
    sum += partial_sums[(batch * params.parts + part) * params.size + element];
  }
  y[batch * params.size + element] = static_cast<T>(sum);
}

}  // namespace quantization_mlx

// --- Instances -----------------------------------------------------------------------------------------------------

#include "../../csrc/gpu/kernels.h"
#include "../common/instantiate.h"

namespace quantization_mlx {

#define KERNELS_OF(KERNEL, type_name, T) SUM_KERNELS(KERNEL, "_" #type_name, T)
FOR_EACH_HALF_TYPE(KERNELS_OF, INSTANTIATE)
FOR_FLOAT(KERNELS_OF, INSTANTIATE)

}  // namespace quantization_mlx
