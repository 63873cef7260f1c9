#include "self_check.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <list>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>

#include "../../torch-ext/torch_binding.h"
#include "device.h"
#include "encode.h"

namespace quantization_mlx::metal {
namespace {

using at::Tensor;

// More than one tile of rows, and a last one that is not full; N no multiple of a tile's columns; several steps of K.
constexpr int64_t check_rows = 33;
constexpr int64_t check_k = 256;
constexpr int64_t check_n = 72;
constexpr int64_t check_n_packed = 128;  // in the other form N is what is packed, in whole groups

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
  std::optional<Tensor> global_scale;  // none
  Format format;
  bool transpose;

  WeightArguments arguments() const {
    return {"self-check", w, scales, biases, format.group_size, format.bits, name_of(format.mode), global_scale};
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

Example example(Format format, at::ScalarType dtype, bool transpose) {
  Generator random;
  const int64_t length = transpose ? check_k : check_n_packed;
  const int64_t rows = transpose ? check_n : check_k;
  const int64_t groups = length / format.group_size;
  Example result;
  result.format = format;
  result.transpose = transpose;
  result.x = filled<float>({check_rows, check_k}, at::kFloat, [&] { return random.uniform(-1.0f, 1.0f); }).to(dtype);
  // Every code but, of E4M3, those from 2 up, among which is NaN.
  const uint32_t mask = format.mode == Mode::mxfp8 ? 0xBFBFBFBFu : 0xFFFFFFFFu;
  result.w = filled<uint32_t>({rows, length * format.bits / 32}, at::kUInt32, [&] { return random.bits() & mask; });
  if (has_biases(format.mode)) {
    const float steps = static_cast<float>(1 << format.bits);
    const auto parameter = [&](float low, float high) {
      return filled<float>({rows, groups}, at::kFloat, [&] { return random.uniform(low, high) / steps; }).to(dtype);
    };
    result.scales = parameter(0.5f, 2.0f);
    result.biases = parameter(-steps, 0.0f);
  } else {
    // Powers of two from 2^-7 to 1, as E8M0; of E4M3, values from 0.5 to 1.875.
    const uint32_t first = format.mode == Mode::nvfp4 ? 0x30u : 120u;
    const uint32_t count = format.mode == Mode::nvfp4 ? 16u : 8u;
    result.scales = filled<uint8_t>({rows, groups}, at::kByte, [&] { return first + random.bits() % count; });
  }
  return result;
}

// --- One check ------------------------------------------------------------------------------------------------------

double tolerance(at::ScalarType dtype) { return dtype == at::kFloat ? 1e-4 : (dtype == at::kHalf ? 5e-3 : 4e-2); }

// The greatest difference as a part of the greatest value expected; infinite where a value is NaN.
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

Tensor cpu_product(const Example& example) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow(QUANTIZATION_MLX_STRING_EXPAND(QUANTIZATION_MLX_NAMESPACE) "::quantized_matmul", "")
          .typed<decltype(ops::quantized_matmul)>();
  return op.call(
      example.x, example.w, example.scales, example.biases, example.transpose, example.format.group_size,
      example.format.bits, name_of(example.format.mode), std::nullopt, "self-check");
}

struct Subject {
  GpuTraits gpu;
  Family family;
  Format format;
  at::ScalarType dtype;
  bool transpose;
};

// What is wrong with a family, or nothing.
std::optional<std::string> failure(const Subject& subject) {
  const Example host = example(subject.format, subject.dtype, subject.transpose);
  const Example device = host.on(at::Device(at::kMPS, 0));
  const MatmulProblem problem = with_kernel_dtype(MatmulProblem::check(device.arguments(), device.x, device.transpose));
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
  const double apart = difference(y, cpu_product(host));
  if (apart <= tolerance(subject.dtype)) {
    return std::nullopt;
  }
  return c10::str("its result differs from the CPU's by ", apart, " of the largest value.");
}

// --- What is known --------------------------------------------------------------------------------------------------

struct Verdict {
  std::string architecture;
  Family family;
  at::ScalarType dtype;
  bool transpose;
  bool passed;
};

std::mutex mutex;
std::list<Verdict> verdicts;  // few, and guarded by mutex

bool concerns(const Verdict& verdict, const GpuTraits& gpu, at::ScalarType dtype, bool transpose) {
  return verdict.dtype == dtype && verdict.transpose == transpose && verdict.architecture == gpu.architecture;
}

Families failed_families(const GpuTraits& gpu, at::ScalarType dtype, bool transpose) {
  const std::lock_guard lock(mutex);
  Families failed;
  for (const Verdict& verdict : verdicts) {
    if (!verdict.passed && concerns(verdict, gpu, dtype, transpose)) {
      failed.insert(verdict.family);
    }
  }
  return failed;
}

bool is_ci() {
  const char* value = std::getenv("CI");
  return value != nullptr && std::string_view(value) == "true";
}

bool passes(const Subject& subject) {
  const std::lock_guard lock(mutex);
  for (const Verdict& verdict : verdicts) {
    if (verdict.family == subject.family && concerns(verdict, subject.gpu, subject.dtype, subject.transpose)) {
      return verdict.passed;
    }
  }
  const auto reason = failure(subject);
  const auto text = [&] {
    return c10::str(
        "[quantization_mlx] Kernel family \"", name_of(subject.family), "\" fails its self-check for ", subject.dtype,
        subject.transpose ? " with transpose=True" : " with transpose=False", " on ", subject.gpu.architecture,
        " and is not used: ", *reason);
  };
  TORCH_CHECK(!reason.has_value() || !is_ci(), text());
  verdicts.push_back({subject.gpu.architecture, subject.family, subject.dtype, subject.transpose, !reason.has_value()});
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
  target.excluded = failed_families(target.gpu, product.dtype, product.transpose);
  return target;
}

template <typename Problem>
Plan checked_product(const Problem& problem) {
  const MatmulProblem& product = product_of(problem);
  while (true) {
    const Target target = target_of_product(problem);
    Plan result = plan(problem, target);
    const bool passed = std::all_of(result.launches.begin(), result.launches.end(), [&](const Launch& launch) {
      // What is excluded and planned all the same has nothing that could take its place, such as the sum of split-K.
      return target.excluded.contains(launch.family) ||
          passes({target.gpu, launch.family, launch.format, product.dtype, product.transpose});
    });
    if (passed) {
      return result;
    }
  }
}

}  // namespace

Target current_target(const MatmulProblem& problem) { return target_of_product(problem); }

Target current_target(const GatherProblem& problem) { return target_of_product(problem); }

Target current_target(const DequantizeProblem&) { return {gpu_traits(), {}}; }

Target current_target(const QuantizeProblem&) { return {gpu_traits(), {}}; }

Plan checked_plan(const MatmulProblem& problem) { return checked_product(problem); }

Plan checked_plan(const GatherProblem& problem) { return checked_product(problem); }

Plan checked_plan(const DequantizeProblem& problem) { return plan(problem, current_target(problem)); }

Plan checked_plan(const QuantizeProblem& problem) { return plan(problem, current_target(problem)); }

}  // namespace quantization_mlx::metal
