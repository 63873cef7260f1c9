#include "self_check_examples.h"

#include <c10/util/Exception.h>

#include <cmath>

#include "encode.h"

namespace quantization_mlx::metal {

using at::Tensor;

Tensor host_floats(const Tensor& tensor) { return tensor.cpu().to(at::kFloat).contiguous(); }

namespace {

double tolerance(at::ScalarType dtype) { return dtype == at::kFloat ? 1e-4 : (dtype == at::kHalf ? 5e-3 : 4e-2); }

// The largest difference relative to the largest expected value; infinite where a value is NaN.
double difference(const Tensor& result, const Tensor& expected) {
  const Tensor ours = host_floats(result);
  const Tensor theirs = host_floats(expected);
  const float* a = ours.const_data_ptr<float>();
  const float* b = theirs.const_data_ptr<float>();
  double largest = 0.0;
  double distance = 0.0;
  for (int64_t i = 0; i < ours.numel(); ++i) {
    const double apart = std::fabs(static_cast<double>(a[i]) - b[i]);
    distance = apart <= distance ? distance : (std::isnan(apart) ? HUGE_VAL : apart);
    largest = std::max(largest, static_cast<double>(std::fabs(b[i])));
  }
  return distance / largest;
}

}  // namespace

Reason judged(const Tensor& result, const Tensor& expected, at::ScalarType dtype) {
  const double apart = difference(result, expected);
  return apart <= tolerance(dtype)
      ? std::nullopt
      : Reason(c10::str("its result differs from the CPU's by ", apart, " of the largest value."));
}

void run(const gpu::Plan& plan, const Operands& operands) { encode(prepared(plan), operands); }

}  // namespace quantization_mlx::metal
