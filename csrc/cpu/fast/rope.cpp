// Rotary position embedding: the angles of a position are computed once and turn all of its heads.
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>

#include "../kernels.h"
#include "../ops.h"
#include "scratch.h"

namespace quantization_mlx::cpu {
namespace {

using at::Tensor;

constexpr double turn = 6.283185307179586477;

// Kernels work on whole vectors.
int64_t whole(int64_t count) { return (count + 15) / 16 * 16; }

// What each pair turns by for one position.
class Frequencies {
 public:
  explicit Frequencies(const RopeProblem& problem) {
    const int64_t pairs = problem.pairs();
    fractions_.resize(whole(pairs), 0);
    c10::SmallVector<double, usual_pairs> turns;
    turns.resize_for_overwrite(pairs);
    if (problem.freqs.defined()) {
      const auto* freqs = problem.freqs.const_data_ptr<float>();
      for (int64_t i = 0; i < pairs; ++i) {
        turns[i] = problem.scale / turn / static_cast<double>(freqs[i]);
      }
    } else {
      turns[0] = problem.scale / turn;
      for (int bit = 0; int64_t{1} << bit < pairs; ++bit) {
        const double power = rope_power(problem.base, pairs, bit);
        const int64_t count = int64_t{1} << bit;
        for (int64_t i = 0; i < count && count + i < pairs; ++i) {
          turns[count + i] = turns[i] * power;
        }
      }
    }
    for (int64_t i = 0; i < pairs; ++i) {
      if (std::isfinite(turns[i])) {
        // Whole turns drop out, in two steps that no double is too large for.
        const double part = turns[i] - std::nearbyint(turns[i]);
        fractions_[i] = static_cast<uint64_t>(static_cast<int64_t>(part * 0x1p63)) << 1;
      } else {
        not_finite_.push_back(i);
      }
    }
  }

  void angles(int64_t position, int64_t pairs, float* cosines, float* sines) const {
    kernels().decoder.angles(fractions_.data(), position, pairs, cosines, sines);
    for (const int64_t i : not_finite_) {
      cosines[i] = sines[i] = std::numeric_limits<float>::quiet_NaN();
    }
  }

 private:
  static constexpr unsigned usual_pairs = 128;
  c10::SmallVector<uint64_t, usual_pairs> fractions_;  // of 2^64
  c10::SmallVector<int64_t, 4> not_finite_;
};

class Rope {
 public:
  Rope(const RopeProblem& problem, const Tensor& y)
      : problem_(problem),
        frequencies_(problem),
        element_size_(y.element_size()),
        x_(static_cast<const uint8_t*>(problem.x.const_data_ptr())),
        y_(static_cast<uint8_t*>(y.mutable_data_ptr())) {}

  void run() const {
    // The sequences one after the other at each position, so that those with equal offsets share its angles.
    const int64_t units = problem_.length * problem_.sequences;
    const int64_t cost = element_cost * problem_.heads * problem_.width + pair_cost * problem_.pairs();
    const int64_t of_task = std::max<int64_t>(1, task_multiplications / cost);
    parallel_tasks((units + of_task - 1) / of_task, [&](int64_t task, int) {
      const int64_t count = whole(problem_.traditional ? problem_.dims : problem_.pairs());
      Floats cosines = floats(count);
      Floats sines = floats(count);
      std::optional<int64_t> known;
      for (int64_t unit = task * of_task; unit < std::min(units, (task + 1) * of_task); ++unit) {
        const int64_t sequence = unit % problem_.sequences;
        const int64_t t = unit / problem_.sequences;
        const int64_t position = first_position(sequence) + t;
        if (known != position) {
          angles(position, cosines.data(), sines.data());
          known = position;
        }
        rotate(sequence, t, cosines.data(), sines.data());
      }
    });
  }

 private:
  // In multiplications, about.
  static constexpr int64_t element_cost = 2;
  static constexpr int64_t pair_cost = 16;

  int64_t first_position(int64_t sequence) const {
    const Tensor& offsets = problem_.offsets;
    if (!offsets.defined()) {
      return problem_.offset;
    }
    const int64_t place = sequence * problem_.offset_stride();
    return problem_.offset +
        (offsets.scalar_type() == at::kInt ? offsets.const_data_ptr<int32_t>()[place]
                                           : offsets.const_data_ptr<int64_t>()[place]);
  }

  void angles(int64_t position, float* cosines, float* sines) const {
    const int64_t pairs = problem_.pairs();
    frequencies_.angles(position, pairs, cosines, sines);
    if (problem_.traditional) {  // of each element
      for (int64_t i = pairs - 1; i >= 0; --i) {
        cosines[2 * i + 1] = cosines[2 * i] = cosines[i];
        sines[2 * i + 1] = sines[i];
        sines[2 * i] = -sines[2 * i + 1];
      }
    }
  }

  // All heads of one position.
  void rotate(int64_t sequence, int64_t t, const float* cosines, const float* sines) const {
    const RopeProblem& p = problem_;
    const uint8_t* x = x_ + (sequence * p.sequence_stride + t * p.position_stride) * element_size_;
    uint8_t* y = y_ + (sequence * p.heads * p.length + t) * p.width * element_size_;
    const int64_t y_stride = p.length * p.width;
    kernels().decoder.rotate_heads(
        {real_of(p.x.scalar_type()), p.traditional, p.pairs(), p.heads, x, p.head_stride, y, y_stride, cosines, sines});
    if (p.width > p.dims) {
      for (int64_t head = 0; head < p.heads; ++head) {
        std::memcpy(
            y + (head * y_stride + p.dims) * element_size_, x + (head * p.head_stride + p.dims) * element_size_,
            static_cast<size_t>((p.width - p.dims) * element_size_));
      }
    }
  }

  const RopeProblem& problem_;
  const Frequencies frequencies_;
  const int64_t element_size_;
  const uint8_t* x_;
  uint8_t* y_;
};

}  // namespace

Tensor run(const RopeProblem& problem) {
  const Tensor y = at::empty(problem.output, problem.x.options());
  if (!problem.is_empty()) {
    Rope(problem, y).run();
  }
  return y;
}

}  // namespace quantization_mlx::cpu
