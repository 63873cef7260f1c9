// The norms: rows in float32, one after the other, with what is common to all of them made once.
#include <ATen/ops/empty.h>

#include <algorithm>

#include "../kernels.h"
#include "../ops.h"
#include "scratch.h"

namespace quantization_mlx::cpu {
namespace {

using at::Tensor;

class Norm {
 public:
  explicit Norm(const NormProblem& problem)
      : problem_(problem),
        type_(real_of(problem.x.tensor.scalar_type())),
        weight_(parameter(problem.weight, 1.0f)),
        x_weight_(problem.x_weight.defined() ? parameter(problem.x_weight, 1.0f) : Floats()),
        bias_(problem.kind == NormProblem::Kind::layer ? parameter(problem.bias, 0.0f) : Floats()) {}

  // sum: of x and the residual, where there is one.
  void run(const Tensor& y, const Tensor& sum) const {
    if (problem_.is_empty()) {
      return;
    }
    for_rows(problem_.x.count, problem_.length, [&](int64_t row) {
      Floats values = whole_floats(problem_.length);
      load(problem_.x, row, values.data());
      if (sum.defined()) {
        add_residual(values.data(), sum, row);
      }
      normalise(values.data());
      store(values.data(), y, row);
    });
  }

 private:
  Floats parameter(const Tensor& given, float otherwise) const {
    Floats values = whole_floats(problem_.length);
    if (given.defined()) {
      kernels().to_float32(type_, given.const_data_ptr(), problem_.length, values.data());
    } else {
      std::fill(values.begin(), values.end(), otherwise);
    }
    return values;
  }

  float epsilon() const { return static_cast<float>(problem_.epsilon); }

  void load(const Vectors& vectors, int64_t row, float* values) const {
    const auto* data = static_cast<const uint8_t*>(vectors.tensor.const_data_ptr());
    kernels().to_float32(type_, data + row * vectors.stride * vectors.tensor.element_size(), problem_.length, values);
  }

  uint8_t* row_of(const Tensor& result, int64_t row) const {
    return static_cast<uint8_t*>(result.mutable_data_ptr()) + row * problem_.length * result.element_size();
  }

  void store(const float* values, const Tensor& result, int64_t row) const {
    kernels().from_float32(values, 1.0f, problem_.length, type_, row_of(result, row));
  }

  // What is normalised is the sum as it is stored.
  void add_residual(float* values, const Tensor& sum, int64_t row) const {
    Floats addends = whole_floats(problem_.length);
    load(problem_.residual, row, addends.data());
    if (problem_.x_weight.defined()) {
      kernels().decoder.rms_norm(values, x_weight_.data(), epsilon(), problem_.length, values);
    }
    const auto scale = static_cast<float>(problem_.scale);
    for (int64_t i = 0; i < problem_.length; ++i) {
      values[i] = values[i] * scale + addends[i];
    }
    store(values, sum, row);
    kernels().to_float32(type_, row_of(sum, row), problem_.length, values);
  }

  void normalise(float* values) const {
    const DecoderKernels& kernel = kernels().decoder;
    if (problem_.kind == NormProblem::Kind::layer) {
      kernel.layer_norm(values, weight_.data(), bias_.data(), epsilon(), problem_.length, values);
    } else {
      kernel.rms_norm(values, weight_.data(), epsilon(), problem_.length, values);
    }
  }

  const NormProblem& problem_;
  Real type_;
  Floats weight_;
  Floats x_weight_;
  Floats bias_;
};

Tensor empty_result(const NormProblem& problem) { return at::empty(problem.output, problem.x.tensor.options()); }

}  // namespace

Tensor run(const NormProblem& problem) {
  const Tensor y = empty_result(problem);
  Norm(problem).run(y, Tensor());
  return y;
}

std::tuple<Tensor, Tensor> run(const AddRmsNormProblem& problem) {
  const Tensor sum = empty_result(problem);
  const Tensor y = empty_result(problem);
  Norm(problem).run(y, sum);
  return {sum, y};
}

}  // namespace quantization_mlx::cpu
