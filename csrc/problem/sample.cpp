// sample: the choice of a token.
#include <c10/core/ScalarType.h>

#include <algorithm>
#include <cmath>

#include "../sampling.h"
#include "fast.h"
#include "weights.h"

namespace quantization_mlx {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr const char* op = SampleProblem::name;

struct Settings {
  double temperature;
  int64_t top_k;
  double top_p;
  double min_p;
  double repetition_penalty;
};

void check_integers(const char* name, const Tensor& tensor, const Tensor& logits) {
  TORCH_CHECK_TYPE(
      tensor.scalar_type() == at::kLong, "[", op, "] ", name, " has dtype ", tensor.scalar_type(),
      "; it must be int64.");
  check_device(op, name, tensor, "logits", logits);
}

template <typename Int>
void check_sample(
    const Tensor& logits,
    const OptionalTensor& seeds,
    const Settings& settings,
    const OptionalTensor& previous) {
  check_activation(op, "logits", logits);
  const auto sizes = sizes_of<Int>(logits);
  TORCH_CHECK_VALUE(!sizes.empty(), "[", op, "] logits is a scalar; it needs at least one dimension.");
  TORCH_CHECK_VALUE(
      holds(c10::sym_ge(sizes.back(), Int(1))), "[", op, "] logits of shape ", sizes, " has no tokens to choose from.");
  const auto rows = sizes.slice(0, sizes.size() - 1);
  if (seeds.has_value()) {
    check_integers("seed", *seeds, logits);
    TORCH_CHECK_VALUE(
        seeds->dim() == 0 || same_sizes(sizes_of<Int>(*seeds), rows), "[", op, "] seed of shape ",
        sizes_of<Int>(*seeds), " must be a scalar or one for each row of logits, whose shape is ", sizes, ".");
  }
  if (previous.has_value()) {
    check_integers("previous", *previous, logits);
    const auto given = sizes_of<Int>(*previous);
    TORCH_CHECK_VALUE(
        given.size() == sizes.size() && same_sizes(given.slice(0, given.size() - 1), rows), "[", op,
        "] previous of shape ", given, " must have the leading sizes of logits, whose shape is ", sizes, ".");
  }
  const auto is_share = [](double value) { return value >= 0.0 && value <= 1.0; };
  TORCH_CHECK_VALUE(
      settings.temperature >= 0.0 && std::isfinite(settings.temperature), "[", op, "] temperature is ",
      settings.temperature, "; it must be at least 0, and finite.");
  TORCH_CHECK_VALUE(settings.top_k >= 0, "[", op, "] top_k is ", settings.top_k, "; it must be at least 0, for all.");
  TORCH_CHECK_VALUE(is_share(settings.top_p), "[", op, "] top_p is ", settings.top_p, "; it must be from 0 to 1.");
  TORCH_CHECK_VALUE(is_share(settings.min_p), "[", op, "] min_p is ", settings.min_p, "; it must be from 0 to 1.");
  TORCH_CHECK_VALUE(
      settings.repetition_penalty > 0.0 && std::isfinite(settings.repetition_penalty), "[", op,
      "] repetition_penalty is ", settings.repetition_penalty, "; it must be above 0, and finite.");
}

// std::log2 of doubles wants a newer glibc than Hub builds may have.
double logarithm_2(double value) {
  constexpr double ln_2 = 0.6931471805599453;
  int exponent = 0;
  const double mantissa = std::frexp(value, &exponent);
  return exponent + std::log1p(mantissa - 1.0) / ln_2;
}

SampleRules rules_of(const Settings& settings, int64_t vocabulary) {
  constexpr double unit = 16777216.0;  // distances to one
  constexpr double log2_e = 1.4426950408889634;
  // Beyond these temperatures nothing changes, and within them no product overflows.
  const double scale = std::clamp(unit * log2_e / settings.temperature, 0x1p-60, 0x1p60);
  const double farthest = settings.min_p > 0.0 ? std::round(-logarithm_2(settings.min_p) * unit) : far_distance();
  return {
      settings.temperature == 0.0 ? 0.0f : static_cast<float>(scale), static_cast<float>(settings.repetition_penalty),
      settings.top_k < vocabulary ? settings.top_k : 0, static_cast<int64_t>(std::round(settings.top_p * 0x1p32)),
      static_cast<int64_t>(std::min<double>(farthest, far_distance()))};
}

}  // namespace

SampleProblem SampleProblem::check(
    const Tensor& logits,
    const OptionalTensor& seeds,
    int64_t seed,
    int64_t offset,
    double temperature,
    int64_t top_k,
    double top_p,
    double min_p,
    double repetition_penalty,
    const OptionalTensor& previous) {
  const Settings settings{temperature, top_k, top_p, min_p, repetition_penalty};
  check_sample<int64_t>(logits, seeds, settings, previous);
  const auto sizes = logits.sizes();
  const bool penalises = previous.has_value() && repetition_penalty != 1.0 && previous->size(-1) > 0;
  return {
      vectors_of(logits, logits.scalar_type()),
      seeds.has_value() ? seeds->contiguous() : Tensor(),
      seeds.has_value() && seeds->dim() > 0,
      penalises ? previous->contiguous() : Tensor(),
      seed,
      offset,
      rules_of(settings, sizes.back()),
      sizes.back(),
      {sizes.begin(), sizes.end() - 1}};
}

Tensor SampleProblem::meta(
    const Tensor& logits,
    const OptionalTensor& seeds,
    c10::SymInt,
    c10::SymInt,
    double temperature,
    int64_t top_k,
    double top_p,
    double min_p,
    double repetition_penalty,
    const OptionalTensor& previous) {
  check_sample<c10::SymInt>(logits, seeds, {temperature, top_k, top_p, min_p, repetition_penalty}, previous);
  const auto sizes = logits.sym_sizes();
  return empty(sizes.slice(0, sizes.size() - 1), logits.options().dtype(at::kLong));
}

}  // namespace quantization_mlx
