// Images of another size. Each row of a result is made in two steps: its rows of x are added up into one row of floats,
// which runs over memory in its order, and pixels of that into those of the result.
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <vector>

#include "../ops.h"
#include "scratch.h"

namespace quantization_mlx::cpu {
namespace {

using at::Tensor;

// For every pixel along one side of a result: its pixels of x, and their weights, whose sum is 1.
class Taps {
 public:
  struct Run {
    int64_t first;
    int64_t count;
    const float* weights;
  };

  explicit Taps(const ResampledSide& side) {
    for (int i = 0; i < side.to; ++i) {
      add(side, i);
    }
  }

  Run operator[](int64_t i) const { return {runs_[i].first, runs_[i].count, weights_.data() + runs_[i].place}; }
  int64_t total() const { return static_cast<int64_t>(weights_.size()); }

 private:
  struct Place {
    int64_t first;
    int64_t count;
    size_t place;
  };

  void add(const ResampledSide& side, int i) {
    const int begin = first_tap(side, i);
    const int end = end_of_taps(side, i);
    const int first = clamped_pixel(side, begin);
    std::vector<double> weights(clamped_pixel(side, end - 1) - first + 1, 0.0);
    double sum = 0.0;
    for (int j = begin; j < end; ++j) {
      const double weight = tap_weight(side, i, j);
      weights[clamped_pixel(side, j) - first] += weight;
      sum += weight;
    }
    // Of weight 0, infinity and NaN would count.
    const auto is_used = [](double weight) { return weight != 0.0; };
    const auto from = std::find_if(weights.begin(), weights.end(), is_used);
    const auto to = std::find_if(weights.rbegin(), weights.rend(), is_used).base();
    runs_.push_back({first + (from - weights.begin()), to - from, weights_.size()});
    std::transform(
        from, to, std::back_inserter(weights_), [&](double weight) { return static_cast<float>(weight / sum); });
  }

  std::vector<Place> runs_;
  std::vector<float> weights_;
};

// How the pixels of a row are laid out in floats: [C, W], or [W, C] where x has them so.
struct RowLayout {
  int64_t runs;  // of x: elements at one distance
  int64_t length;
  int64_t run_step;  // in x
  int64_t step;
  int64_t channel_step;  // in floats
  int64_t column_step;
};

RowLayout layout_of(const ImageProblem& problem) {
  const ImageStrides& strides = problem.strides;
  const int64_t channels = problem.channels;
  const bool is_interleaved = strides.channel == 1 && strides.column == channels;
  return is_interleaved ? RowLayout{1, problem.width * channels, 0, 1, 1, channels}
                        : RowLayout{channels, problem.width, strides.channel, strides.column, problem.width, 1};
}

template <typename T>
void add_row(const T* source, int64_t step, int64_t length, float weight, float* sums) {
  if (step == 1) {  // known to the compiler, which then uses vectors
    for (int64_t i = 0; i < length; ++i) {
      sums[i] += weight * static_cast<float>(source[i]);
    }
    return;
  }
  for (int64_t i = 0; i < length; ++i) {
    sums[i] += weight * static_cast<float>(source[i * step]);
  }
}

template <typename T>
class Resampler {
 public:
  Resampler(const ImageProblem& problem, const Tensor& y)
      : problem_(problem),
        layout_(layout_of(problem)),
        rows_(problem.rows()),
        columns_(problem.columns()),
        x_(static_cast<const T*>(problem.x.const_data_ptr())),
        mean_(problem.mean.defined() ? problem.mean.const_data_ptr<float>() : nullptr),
        deviation_(problem.mean.defined() ? problem.deviation.const_data_ptr<float>() : nullptr),
        y_(y.mutable_data_ptr<float>()) {}

  void run() const {
    const int64_t units = problem_.images * problem_.new_height;
    const int64_t of_rows = problem_.width * rows_.total() / problem_.new_height;
    const int64_t cost = problem_.channels * (of_rows + columns_.total());
    const int64_t of_task = std::max<int64_t>(1, task_multiplications / cost);
    parallel_tasks((units + of_task - 1) / of_task, [&](int64_t task, int) {
      Floats sums = floats(layout_.runs * layout_.length);
      for (int64_t unit = task * of_task; unit < std::min(units, (task + 1) * of_task); ++unit) {
        const int64_t image = unit / problem_.new_height;
        const int64_t row = unit % problem_.new_height;
        add_rows(image, row, sums.data());
        for (int64_t channel = 0; channel < problem_.channels; ++channel) {
          write_row(image, row, channel, sums.data() + channel * layout_.channel_step);
        }
      }
    });
  }

 private:
  void add_rows(int64_t image, int64_t row, float* sums) const {
    std::fill_n(sums, layout_.runs * layout_.length, 0.0f);
    const Taps::Run taps = rows_[row];
    for (int64_t k = 0; k < taps.count; ++k) {
      const T* source = x_ + image * problem_.strides.image + (taps.first + k) * problem_.strides.row;
      for (int64_t run = 0; run < layout_.runs; ++run) {
        add_row(
            source + run * layout_.run_step, layout_.step, layout_.length, taps.weights[k],
            sums + run * layout_.length);
      }
    }
  }

  void write_row(int64_t image, int64_t row, int64_t channel, const float* pixels) const {
    const ImageProblem& p = problem_;
    const bool last = p.channels_last;
    const int64_t step = last ? p.channels : 1;
    float* y = y_ +
        (last ? (image * p.new_height + row) * p.new_width * p.channels + channel
              : ((image * p.channels + channel) * p.new_height + row) * p.new_width);
    const float mean = mean_ == nullptr ? 0.0f : mean_[channel];
    const float deviation = deviation_ == nullptr ? 1.0f : deviation_[channel];
    for (int64_t column = 0; column < p.new_width; ++column) {
      const Taps::Run taps = columns_[column];
      const float* source = pixels + taps.first * layout_.column_step;
      float sum = 0.0f;
      for (int64_t k = 0; k < taps.count; ++k) {
        sum += taps.weights[k] * source[k * layout_.column_step];
      }
      y[column * step] = (sum * p.scale - mean) / deviation;
    }
  }

  const ImageProblem& problem_;
  const RowLayout layout_;
  const Taps rows_;
  const Taps columns_;
  const T* x_;
  const float* mean_;
  const float* deviation_;
  float* y_;
};

void resample_any(const ImageProblem& problem, const Tensor& y) {
  switch (problem.x.scalar_type()) {
    case at::kByte: return Resampler<uint8_t>(problem, y).run();
    case at::kHalf: return Resampler<at::Half>(problem, y).run();
    case at::kBFloat16: return Resampler<at::BFloat16>(problem, y).run();
    default: return Resampler<float>(problem, y).run();
  }
}

}  // namespace

Tensor run(const ImageProblem& problem) {
  const Tensor y = at::empty(problem.output, problem.x.options().dtype(at::kFloat));
  if (!problem.is_empty()) {
    resample_any(problem, y);
  }
  return y;
}

}  // namespace quantization_mlx::cpu
