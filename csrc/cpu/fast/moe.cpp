// moe_router and moe_combine: a token after the other.
#include <ATen/ops/empty.h>

#include <algorithm>
#include <functional>

#include "../kernels.h"
#include "../ops.h"
#include "scratch.h"

namespace quantization_mlx::cpu {
namespace {

using at::Tensor;
using Scoring = RouterProblem::Scoring;

// A score with its index: the greater, the sooner it is chosen.
using Candidate = uint64_t;
Candidate candidate(float score, int64_t index) {
  return static_cast<uint64_t>(key_of_logit(score)) << 32 | static_cast<uint32_t>(~index);
}
int64_t index_of(Candidate candidate) { return static_cast<uint32_t>(~candidate); }

using Candidates = c10::SmallVector<Candidate, 512>;

// The best ones first.
void select(Candidates& candidates, int64_t count) {
  std::partial_sort(candidates.begin(), candidates.begin() + count, candidates.end(), std::greater<>());
}

const uint8_t* row_of(const Vectors& vectors, int64_t row) {
  return static_cast<const uint8_t*>(vectors.tensor.const_data_ptr()) +
      row * vectors.stride * static_cast<int64_t>(vectors.tensor.element_size());
}

class Router {
 public:
  explicit Router(const RouterProblem& problem)
      : problem_(problem), type_(real_of(problem.logits.tensor.scalar_type())) {}

  void route(int64_t row, int64_t* experts, void* weights) const {
    const int64_t n = problem_.experts;
    Floats logits = whole_floats(n);
    kernels().to_float32(type_, row_of(problem_.logits, row), n, logits.data());
    const Floats scores = scored(logits);
    Candidates candidates = chosen_from(logits, scores);
    select(candidates, problem_.k);
    Floats selected = whole_floats(problem_.k);
    for (int64_t i = 0; i < problem_.k; ++i) {
      experts[i] = index_of(candidates[i]);
      selected[i] = scores[experts[i]];
    }
    weigh(selected);
    kernels().from_float32(selected.data(), 1.0f, problem_.k, type_, weights);
  }

 private:
  // softmax_of_selected scores afterwards.
  Floats scored(const Floats& logits) const {
    const DecoderKernels& kernel = kernels().decoder;
    const int64_t n = problem_.experts;
    Floats scores = logits;
    if (problem_.scoring == Scoring::sigmoid) {
      kernel.sigmoids(logits.data(), n, scores.data());
    } else if (problem_.scoring == Scoring::softmax) {
      softmax(scores, n);
    }
    return scores;
  }

  static void softmax(Floats& values, int64_t n) {
    const float greatest = *std::max_element(values.begin(), values.begin() + n);
    const float sum = kernels().decoder.exponentials(values.data(), greatest, n, values.data());
    std::for_each(values.begin(), values.begin() + n, [&](float& value) { value /= sum; });
  }

  // By logits, which have fewer ties than scores, where the order is the same.
  Candidates chosen_from(const Floats& logits, const Floats& scores) const {
    const int64_t n = problem_.experts;
    Candidates all(n);
    const float* bias = problem_.bias.defined() ? problem_.bias.const_data_ptr<float>() : nullptr;
    const Floats& values = problem_.chooses_by_score() ? scores : logits;
    for (int64_t i = 0; i < n; ++i) {
      all[i] = candidate(bias != nullptr ? values[i] + bias[i] : values[i], i);
    }
    return problem_.groups > 1 ? of_best_groups(all) : all;
  }

  Candidates of_best_groups(const Candidates& all) const {
    const int64_t size = problem_.experts / problem_.groups;
    Candidates groups(problem_.groups);
    for (int64_t group = 0; group < problem_.groups; ++group) {
      Candidates own(all.begin() + group * size, all.begin() + (group + 1) * size);
      select(own, 2);
      const auto score = [&](int i) { return logit_of_key(static_cast<uint32_t>(own[i] >> 32)); };
      groups[group] = candidate(score(0) + score(1), group);
    }
    select(groups, problem_.groups_used);
    Candidates result;
    for (int64_t i = 0; i < problem_.groups_used; ++i) {
      const auto* first = all.begin() + index_of(groups[i]) * size;
      result.append(first, first + size);
    }
    return result;
  }

  void weigh(Floats& selected) const {
    if (problem_.scoring == Scoring::softmax_of_selected) {
      softmax(selected, problem_.k);
    }
    float sum = 0.0f;
    std::for_each(selected.begin(), selected.begin() + problem_.k, [&](float value) { sum += value; });
    const float divisor = problem_.normalise ? sum + router_epsilon() : 1.0f;
    std::for_each(selected.begin(), selected.begin() + problem_.k, [&](float& value) {
      value = value / divisor * problem_.scale;
    });
  }

  const RouterProblem& problem_;
  Real type_;
};

}  // namespace

std::tuple<Tensor, Tensor> run(const RouterProblem& problem) {
  auto results = empty_routed(problem);
  const auto& [experts, weights] = results;
  int64_t* first_expert = experts.mutable_data_ptr<int64_t>();
  auto* first_weight = static_cast<uint8_t*>(weights.mutable_data_ptr());
  const int64_t weights_bytes = problem.k * static_cast<int64_t>(weights.element_size());
  const Router router(problem);
  for_rows(problem.logits.count, 16 * problem.experts, [&](int64_t row) {
    router.route(row, first_expert + row * problem.k, first_weight + row * weights_bytes);
  });
  return results;
}

Tensor run(const CombineProblem& problem) {
  const Tensor result = at::empty(problem.output, problem.y.tensor.options());
  if (result.numel() == 0) {
    return result;
  }
  const Kernels& kernel = kernels();
  const Real type = real_of(result.scalar_type());
  const Tensor weights = problem.weights.to(at::kFloat);
  const float* weight = weights.const_data_ptr<float>();
  auto* first = static_cast<uint8_t*>(result.mutable_data_ptr());
  const int64_t* experts = nullptr;
  if (problem.experts.defined()) {
    check_range(problem.name, "experts", problem.experts, problem.bias.tensor.size(0));
    experts = problem.experts.const_data_ptr<int64_t>();
  }
  const int64_t n = problem.length;
  const int64_t bytes = n * static_cast<int64_t>(result.element_size());
  for_rows(result.numel() / n, (problem.k + 1) * n, [&](int64_t token) {
    Floats sum = whole_floats(n);
    Floats values = whole_floats(n);
    if (problem.residual.tensor.defined()) {
      kernel.to_float32(type, row_of(problem.residual, token), n, sum.data());
    } else {
      std::fill(sum.begin(), sum.end(), 0.0f);
    }
    for (int64_t i = token * problem.k; i < (token + 1) * problem.k; ++i) {
      kernel.to_float32(type, row_of(problem.y, i), n, values.data());
      kernel.decoder.add_multiple(values.data(), weight[i], n, sum.data());
      if (experts != nullptr) {
        kernel.to_float32(type, row_of(problem.bias, experts[i]), n, values.data());
        kernel.decoder.add_multiple(values.data(), weight[i], n, sum.data());
      }
    }
    kernel.from_float32(sum.data(), 1.0f, n, type, first + token * bytes);
  });
  return result;
}

}  // namespace quantization_mlx::cpu
