// sample: a row after the other, each by one thread.
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <array>
#include <vector>

#include "../kernels.h"
#include "../ops.h"
#include "scratch.h"

namespace quantization_mlx::cpu {
namespace {

using at::Tensor;

constexpr int64_t no_token = -1;

class Sampler {
 public:
  explicit Sampler(const SampleProblem& problem)
      : problem_(problem), rules_(problem.rules), type_(real_of(problem.logits.tensor.scalar_type())) {}

  // no_token where the row has no distribution.
  int64_t token(int64_t row) const {
    const int64_t n = problem_.vocabulary;
    std::vector<uint32_t> keys(n);
    const uint32_t greatest = kernels().decoder.logit_keys(logits(row).data(), n, keys.data());
    if (!is_finite_key(greatest)) {
      return no_token;
    }
    if (rules_.scale == 0.0f) {
      return std::find(keys.begin(), keys.end(), greatest) - keys.begin();
    }
    Sampling sampling{greatest, 0, far_distance(), rules_.scale};
    if (rules_.top_k > 0) {
      sampling.last =
          last_kept(keys, [](int64_t) { return 1u; }, [&](uint64_t) { return static_cast<uint64_t>(rules_.top_k); });
    }
    std::vector<uint32_t> weights(n);
    const auto weigh = [&] { return kernels().decoder.token_weights(keys.data(), n, sampling, weights.data()); };
    if (rules_.top_p < int64_t{1} << 32) {
      weigh();
      sampling.last = last_kept(
          keys, [&](int64_t i) { return weights[i]; },
          [&](uint64_t total) { return top_p_weight(total, static_cast<uint64_t>(rules_.top_p)); });
    }
    sampling.farthest = static_cast<uint32_t>(rules_.farthest);
    return token_at(weights, fraction_of(weigh(), random(row)));
  }

 private:
  Floats logits(int64_t row) const {
    const Vectors& all = problem_.logits;
    const auto* source = static_cast<const uint8_t*>(all.tensor.const_data_ptr()) +
        row * all.stride * static_cast<int64_t>(all.tensor.element_size());
    Floats values = whole_floats(problem_.vocabulary);
    kernels().to_float32(type_, source, problem_.vocabulary, values.data());
    if (problem_.previous.defined()) {
      const int64_t count = problem_.previous_count();
      const int64_t* first = problem_.previous.const_data_ptr<int64_t>() + row * count;
      std::vector<int64_t> tokens(first, first + count);
      std::sort(tokens.begin(), tokens.end());
      tokens.erase(std::unique(tokens.begin(), tokens.end()), tokens.end());
      for (const int64_t token : tokens) {
        if (token >= 0) {
          values[token] = penalised_logit(values[token], rules_.penalty);
        }
      }
    }
    return values;
  }

  // The key such that the tokens of greater ones weigh less than limit(the sum of all), and with its own at least that.
  template <typename Weight, typename Limit>
  static uint32_t last_kept(const std::vector<uint32_t>& keys, const Weight& weight, const Limit& limit) {
    uint32_t key = 0;
    uint32_t known = 0;  // bits of it
    uint64_t left = 0;
    for (int level = 0; level < key_levels(); ++level) {
      std::array<uint64_t, key_bins()> bins{};
      const int shift = key_shift(level);
      uint64_t total = 0;
      for (size_t i = 0; i < keys.size(); ++i) {
        if ((keys[i] & known) == key) {
          const uint32_t own = weight(static_cast<int64_t>(i));
          bins[keys[i] >> shift & key_mask(level)] += own;
          total += own;
        }
      }
      left = level == 0 ? limit(total) : left;
      uint32_t bin = key_mask(level);
      for (; bins[bin] < left; --bin) {
        left -= bins[bin];
      }
      key |= bin << shift;
      known |= key_mask(level) << shift;
    }
    return key;
  }

  uint64_t random(int64_t row) const {
    const bool own = problem_.has_row_seeds;
    const int64_t seed =
        problem_.seeds.defined() ? problem_.seeds.const_data_ptr<int64_t>()[own ? row : 0] : problem_.seed;
    return random_bits(
        static_cast<uint64_t>(seed), static_cast<uint64_t>(problem_.offset), static_cast<uint64_t>(own ? 0 : row));
  }

  // The token in whose part of the sum of weights, in the tokens' order, the place is.
  static int64_t token_at(const std::vector<uint32_t>& weights, uint64_t place) {
    int64_t token = 0;
    for (; place >= weights[token]; ++token) {
      place -= weights[token];
    }
    return token;
  }

  const SampleProblem& problem_;
  const SampleRules& rules_;
  Real type_;
};

void check_previous(const SampleProblem& problem) {
  if (!problem.previous.defined()) {
    return;
  }
  const int64_t* tokens = problem.previous.const_data_ptr<int64_t>();
  const int64_t* end = tokens + problem.previous.numel();
  const int64_t* bad = std::find_if(tokens, end, [&](int64_t token) { return token >= problem.vocabulary; });
  TORCH_CHECK_INDEX(
      bad == end, "[", problem.name, "] previous holds ", *bad, " at position ", bad - tokens,
      "; it must be below the number of tokens, ", problem.vocabulary, ".");
}

}  // namespace

Tensor run(const SampleProblem& problem) {
  check_previous(problem);
  const Tensor tokens = at::empty(problem.output, problem.logits.tensor.options().dtype(at::kLong));
  int64_t* results = tokens.mutable_data_ptr<int64_t>();
  const Sampler sampler(problem);
  for_rows(problem.logits.count, problem.vocabulary, [&](int64_t row) { results[row] = sampler.token(row); });
  const int64_t* bad = std::find(results, results + problem.logits.count, no_token);
  TORCH_CHECK_VALUE(
      bad == results + problem.logits.count, "[", problem.name, "] row ", bad - results,
      " of logits has no distribution: its greatest value is not finite.");
  return tokens;
}

}  // namespace quantization_mlx::cpu
