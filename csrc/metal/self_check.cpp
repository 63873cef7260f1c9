#include "self_check.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <list>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "../environment.h"
#include "../ops.h"
#include "device.h"
#include "encode.h"

namespace quantization_mlx::metal {
namespace {

using at::Tensor;
using namespace gpu;

// Rows of x for each kind of kernel in a family; among them more than one tile with a last one that is not full. N is
// no multiple of a tile's columns, and K is several steps.
std::vector<int64_t> check_rows(Family family) {
  switch (family) {
    case Family::matvec: return {1, 33};
    case Family::tile: return {16, 33};
    default: return {32, 33};
  }
}
constexpr int64_t check_k = 256;
constexpr int64_t check_n = 72;
constexpr int64_t check_n_packed = 128;  // where N is what is packed, in whole groups

// --- A product that is the same every time --------------------------------------------------------------------------

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

template <typename T, typename Next>
Tensor filled(c10::IntArrayRef sizes, at::ScalarType dtype, const Next& next) {
  Tensor tensor = at::empty(sizes, dtype);
  std::generate_n(static_cast<T*>(tensor.mutable_data_ptr()), tensor.numel(), next);
  return tensor;
}

struct Example {
  Tensor x;
  Tensor w;
  Tensor scales;
  std::optional<Tensor> biases;
  Format format;
  bool transpose;

  // What `check` or an op makes of it.
  template <typename Function>
  auto product(const Function& function) const {
    return function(
        x, w, scales, biases, transpose, format.group_size, format.bits, name_of(format.mode), std::nullopt,
        "self-check");
  }

  Example on(at::Device device) const {
    Example result = *this;
    result.x = x.to(device);
    result.w = w.to(device);
    result.scales = scales.to(device);
    if (biases.has_value()) {
      result.biases = biases->to(device);
    }
    return result;
  }
};

Example example(Format format, at::ScalarType dtype, bool transpose, int64_t x_rows) {
  Generator random;
  // The packed dimension, and the other one.
  const bool columns = is_column_packed(format.mode);
  const int64_t length = transpose || columns ? check_k : check_n_packed;
  const int64_t others = transpose || columns ? check_n : check_k;
  const auto sizes = [&](int64_t packed) {
    return columns ? std::array<int64_t, 2>{packed, others} : std::array<int64_t, 2>{others, packed};
  };
  const auto groups = sizes(length / format.group_size);
  Example result;
  result.format = format;
  result.transpose = transpose;
  result.x = filled<float>({x_rows, check_k}, at::kFloat, [&] { return random.uniform(-1.0f, 1.0f); }).to(dtype);
  // Any code, except in E4M3 those of 2 and more, which include NaN.
  const uint32_t mask = is_e4m3(format.mode) ? 0xBFBFBFBFu : 0xFFFFFFFFu;
  result.w = filled<uint32_t>(sizes(length * format.bits / 32), at::kUInt32, [&] { return random.bits() & mask; });
  if (has_biases(format.mode)) {
    const float steps = static_cast<float>(1 << format.bits);
    const auto parameter = [&](float low, float high) {
      return filled<float>(groups, at::kFloat, [&] { return random.uniform(low, high) / steps; }).to(dtype);
    };
    result.scales = parameter(0.5f, 2.0f);
    result.biases = parameter(-steps, 0.0f);
  } else if (columns) {
    const auto values = [&](float low, float high) {
      return filled<float>(groups, at::kFloat, [&] { return random.uniform(low, high); }).to(at::kHalf);
    };
    result.scales = values(0.1f, 0.5f);
    if (has_zeros(format.mode)) {
      result.biases = values(0.0f, 15.0f);
    }
  } else {
    // Powers of two from 2^-7 to 1, as E8M0; of E4M3, values from 0.5 to 1.875.
    const bool e4m3 = traits_of(format.mode).scale == Scale::e4m3;
    const uint32_t first = e4m3 ? 0x30u : 120u;
    const uint32_t count = e4m3 ? 16u : 8u;
    result.scales = filled<uint8_t>(groups, at::kByte, [&] { return first + random.bits() % count; });
  }
  return result;
}

// --- One check ------------------------------------------------------------------------------------------------------

double tolerance(at::ScalarType dtype) { return dtype == at::kFloat ? 1e-4 : (dtype == at::kHalf ? 5e-3 : 4e-2); }

// The largest difference relative to the largest expected value; infinite where a value is NaN.
double difference(const Tensor& result, const Tensor& expected) {
  const Tensor ours = result.cpu().to(at::kFloat).contiguous();
  const Tensor theirs = expected.to(at::kFloat).contiguous();
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

struct Subject {
  GpuTraits gpu;
  Family family;
  Format format;
  at::ScalarType dtype;
  bool transpose;
};

// What is wrong with a product of this many rows, or nothing.
std::optional<std::string> failure(const Subject& subject, int64_t rows) {
  const Example host = example(subject.format, subject.dtype, subject.transpose, rows);
  const Example device = host.on(at::Device(at::kMPS, 0));
  const MatmulProblem problem = with_kernel_dtype(device.product(MatmulProblem::check));
  Target alone{subject.gpu, {}};
  for (const Family family : all_families) {
    if (family != subject.family) {
      alone.excluded.insert(family);
    }
  }
  const Plan product = plan(problem, alone);
  try {
    prepare(product);
  } catch (const c10::Error& error) {
    return error.what_without_backtrace();
  }
  Tensor y = at::empty(problem.shape.output, problem.x.tensor.options());
  Operands operands;
  operand(operands, Role::x) = problem.x.tensor;
  operand(operands, Role::w) = problem.weights.words.tensor;
  operand(operands, Role::scales) = problem.weights.scales.tensor;
  operand(operands, Role::biases) = problem.weights.biases.tensor;
  operand(operands, Role::y) = y;
  encode(product, std::move(operands));
  const double apart = difference(y, host.product(ops::quantized_matmul));
  if (apart <= tolerance(subject.dtype)) {
    return std::nullopt;
  }
  return c10::str("its result differs from the CPU's by ", apart, " of the largest value.");
}

// What is wrong with a family, or nothing.
std::optional<std::string> failure(const Subject& subject) {
  for (const int64_t rows : check_rows(subject.family)) {
    if (auto reason = failure(subject, rows)) {
      return reason;
    }
  }
  return std::nullopt;
}

bool same_bytes(const Tensor& device, const Tensor& host) {
  const Tensor copy = device.cpu();
  return std::memcmp(copy.const_data_ptr(), host.const_data_ptr(), host.nbytes()) == 0;
}

// What is wrong with dequantizing these, on the device, or nothing.
std::optional<std::string> dequantize_failure(
    const Subject& subject,
    const Tensor& words,
    const Tensor& scales,
    const Tensor& biases) {
  const Format format = subject.format;
  const std::optional<Tensor> none;
  const bool third = has_biases(format.mode) || has_zeros(format.mode);
  const std::optional<Tensor> given = third ? std::optional(biases) : none;
  const DequantizeProblem problem = with_kernel_dtype(
      DequantizeProblem::check(
          words, scales, given, format.group_size, format.bits, name_of(format.mode), none, subject.dtype));
  const Tensor y = at::empty(problem.output, words.options().dtype(problem.dtype));
  Operands operands;
  operand(operands, Role::w) = words;
  operand(operands, Role::scales) = problem.weights.scales.tensor;
  operand(operands, Role::biases) = problem.weights.biases.tensor;
  operand(operands, Role::y) = y;
  encode(plan(problem, {subject.gpu, {}}), std::move(operands));
  const Tensor expected = ops::dequantize(
      words.cpu(), scales.cpu(), given.has_value() ? std::optional(given->cpu()) : none, format.group_size, format.bits,
      name_of(format.mode), none, subject.dtype);
  const double apart = difference(y, expected);
  if (apart <= tolerance(subject.dtype)) {
    return std::nullopt;
  }
  return c10::str("dequantize differs from the CPU's by ", apart, " of the largest value.");
}

// What is wrong with quantizing and dequantizing, or nothing.
std::optional<std::string> conversion_failure(const Subject& subject) {
  const Format format = subject.format;
  const Tensor x = example({Mode::affine, 4, 64}, subject.dtype, /*transpose=*/true, /*x_rows=*/33).x;
  const Tensor matrix = is_column_packed(format.mode) ? x.t().contiguous() : x;  // whole groups, but no more
  const auto expected = ops::quantize(matrix, format.group_size, format.bits, name_of(format.mode), std::nullopt);
  const QuantizeProblem problem = QuantizeProblem::check(
      matrix.to(at::Device(at::kMPS, 0)), format.group_size, format.bits, name_of(format.mode), std::nullopt);
  const auto [words, scales, biases] = empty_quantized(problem);
  Operands operands;
  operand(operands, Role::x) = problem.w;
  operand(operands, Role::w) = words;
  operand(operands, Role::scales) = scales;
  operand(operands, Role::biases) = biases;
  encode(plan(problem, {gpu_traits(), {}}), std::move(operands));
  if (!same_bytes(words, std::get<0>(expected)) || !same_bytes(scales, std::get<1>(expected)) ||
      !same_bytes(biases, std::get<2>(expected))) {
    return "quantize gives other codes or scales than on the CPU.";
  }
  return dequantize_failure(subject, words, scales, biases);
}

// --- What is known --------------------------------------------------------------------------------------------------

struct Verdict {
  Subject subject;
  bool passed;
};

// Held while a check runs: it is short, and nothing else may use kernels that are being checked.
std::mutex mutex;
std::list<Verdict> verdicts;  // few, and guarded by mutex

bool is_same(const Subject& a, const Subject& b) {
  return a.dtype == b.dtype && a.transpose == b.transpose && a.format.mode == b.format.mode &&
      a.format.bits == b.format.bits && a.format.group_size == b.format.group_size &&
      a.gpu.architecture == b.gpu.architecture;
}

// All that is_same as the subject, whatever its family.
Families failed_families(const Subject& subject) {
  const std::lock_guard lock(mutex);
  Families failed;
  for (const Verdict& verdict : verdicts) {
    if (!verdict.passed && is_same(verdict.subject, subject)) {
      failed.insert(verdict.subject.family);
    }
  }
  return failed;
}

bool is_ci() {
  const char* value = environment_variable("CI");
  return value != nullptr && std::string_view(value) == "true";
}

bool passes(const Subject& subject) {
  const std::lock_guard lock(mutex);
  for (const Verdict& verdict : verdicts) {
    if (verdict.subject.family == subject.family && is_same(verdict.subject, subject)) {
      return verdict.passed;
    }
  }
  const bool converts = subject.family == Family::quantize;
  const auto reason = converts ? conversion_failure(subject) : failure(subject);
  const auto text = [&] {
    const char* form = converts ? "" : (subject.transpose ? " with transpose=True" : " with transpose=False");
    return c10::str(
        "[quantization_mlx] Kernel family \"", name_of(subject.family), "\" fails its self-check for ", subject.dtype,
        " and ", name_of(subject.format.mode), " of ", subject.format.bits, " bits", form, " on ",
        subject.gpu.architecture, " and is not used: ", *reason);
  };
  TORCH_CHECK(!reason.has_value() || !(is_ci() || converts), text());
  verdicts.push_back({subject, !reason.has_value()});
  if (reason.has_value()) {
    TORCH_WARN(text());
  }
  return !reason.has_value();
}

const MatmulProblem& product_of(const MatmulProblem& problem) { return problem; }

const MatmulProblem& product_of(const GatherProblem& problem) { return problem.matmul; }

template <typename Problem>
Target target_of_product(const Problem& problem) {
  const MatmulProblem& product = product_of(problem);
  Target target{gpu_traits(), {}};
  target.excluded =
      failed_families({target.gpu, Family::tensor, product.weights.format, product.dtype, product.transpose});
  return target;
}

template <typename Problem>
Plan checked_product(const Problem& problem) {
  const MatmulProblem& product = product_of(problem);
  while (true) {
    const Target target = target_of_product(problem);
    Plan result = plan(problem, target);
    const bool passed = std::all_of(result.launches.begin(), result.launches.end(), [&](const Launch& launch) {
      return passes({target.gpu, launch.family, launch.format, product.dtype, product.transpose});
    });
    if (passed) {
      return result;
    }
  }
}

// Nothing stands in for these: passes raises.
template <typename Problem>
Plan checked_conversion(const Problem& problem) {
  const Target target = current_target(problem);
  Plan result = plan(problem, target);
  for (const Launch& launch : result.launches) {
    passes({target.gpu, launch.family, launch.format, launch.dtype, /*transpose=*/false});
  }
  return result;
}

}  // namespace

Target current_target(const MatmulProblem& problem) { return target_of_product(problem); }

Target current_target(const GatherProblem& problem) { return target_of_product(problem); }

Target current_target(const DequantizeProblem&) { return {gpu_traits(), {}}; }

Target current_target(const QuantizeProblem&) { return {gpu_traits(), {}}; }

Plan checked_plan(const MatmulProblem& problem) { return checked_product(problem); }

Plan checked_plan(const GatherProblem& problem) { return checked_product(problem); }

Plan checked_plan(const DequantizeProblem& problem) { return checked_conversion(problem); }

Plan checked_plan(const QuantizeProblem& problem) { return checked_conversion(problem); }

}  // namespace quantization_mlx::metal
