// rope_into_cache: a head after the other, in float32 from x to where it is stored.
#include <ATen/ops/empty.h>

#include "../kernels.h"
#include "../ops.h"
#include "scratch.h"

namespace quantization_mlx::cpu {
namespace {

using at::Tensor;

class Heads {
 public:
  Heads(const RopeIntoCacheProblem& problem, const Tensor& queries)
      : problem_(problem),
        type_(real_of(problem.x.scalar_type())),
        dim_(problem.dim()),
        query_norm_(row_of(problem.query_norm)),
        key_norm_(row_of(problem.key_norm)),
        bias_(row_of(problem.bias)),
        queries_(queries) {}

  // All heads of one token of one sequence.
  void store(int64_t token) const {
    const int64_t batch = token / problem_.tokens();
    const int64_t place = token % problem_.tokens();
    const int64_t key_heads = problem_.key_heads();
    const int64_t position = problem_.position + place;
    Floats memory = floats(3 * whole(dim_));
    float* const values = memory.data();
    float* const cosines = values + whole(dim_);
    float* const sines = cosines + whole(dim_);
    const int64_t rotated = problem_.rotated();
    if (rotated > 0) {
      const int64_t row = problem_.has_angles_of_sequences() ? token : place;
      load(problem_.cosines, row * rotated, rotated, cosines);
      load(problem_.sines, row * rotated, rotated, sines);
    }
    const auto turn_and_store = [&](float* head, const Tensor& destination, int64_t row) {
      if (rotated > 0 && &destination != &problem_.values) {
        rotate(cosines, sines, head);
      }
      kernels().from_float32(head, 1.0f, dim_, type_, at(destination, row * dim_));
    };
    // Heads first to first + count go to rows row(i).
    const auto part = [&](int64_t first, int64_t count, int64_t norm_heads, const Floats& norm,
                          const Tensor& destination, const auto& row) {
      if (norm_heads > 1) {
        Floats all = floats(count * dim_ + whole(1));
        load_heads(token, first, count, all.data());
        normalise(norm, count * dim_, all.data());
        for (int64_t i = 0; i < count; ++i) {
          turn_and_store(all.data() + i * dim_, destination, row(i));
        }
        return;
      }
      for (int64_t i = 0; i < count; ++i) {
        load_heads(token, first + i, 1, values);
        if (norm_heads == 1) {
          normalise(norm, dim_, values);
        }
        turn_and_store(values, destination, row(i));
      }
    };
    const auto of_queries = [&](int64_t i) { return (batch * problem_.query_heads + i) * problem_.tokens() + place; };
    const auto of_cache = [&](int64_t i) { return (batch * key_heads + i) * problem_.capacity() + position; };
    const int64_t keys = problem_.query_heads;
    part(0, problem_.query_heads, problem_.query_norm_heads(), query_norm_, queries_, of_queries);
    part(keys, key_heads, problem_.key_norm_heads(), key_norm_, problem_.keys, of_cache);
    part(keys + key_heads, key_heads, 0, Floats(), problem_.values, of_cache);
  }

 private:
  // Kernels work on whole vectors.
  static int64_t whole(int64_t count) { return (count + 15) / 16 * 16; }

  Floats row_of(const Tensor& given) const {
    Floats row;
    if (given.defined()) {
      row = floats(whole(given.numel()));
      load(given, 0, given.numel(), row.data());
    }
    return row;
  }

  void load(const Tensor& tensor, int64_t element, int64_t count, float* destination) const {
    kernels().to_float32(type_, at(tensor, element), count, destination);
  }

  // Of x, with the bias.
  void load_heads(int64_t token, int64_t first, int64_t count, float* destination) const {
    load(problem_.x, (token * problem_.heads() + first) * dim_, count * dim_, destination);
    for (int64_t d = 0; problem_.bias.defined() && d < count * dim_; ++d) {
      destination[d] += bias_[first * dim_ + d];
    }
  }

  void normalise(const Floats& norm, int64_t length, float* values) const {
    kernels().decoder.rms_norm(values, norm.data(), static_cast<float>(problem_.epsilon), length, values);
  }

  static uint8_t* at(const Tensor& tensor, int64_t element) {
    return static_cast<uint8_t*>(tensor.mutable_data_ptr()) + element * tensor.element_size();
  }

  // The halves of what is turned are the real and the imaginary parts of a complex vector.
  void rotate(const float* cosines, const float* sines, float* values) const {
    const int64_t half = problem_.rotated() / 2;
    for (int64_t i = 0; i < half; ++i) {
      const float real = values[i];
      const float imaginary = values[half + i];
      values[i] = real * cosines[i] - imaginary * sines[i];
      values[half + i] = real * sines[half + i] + imaginary * cosines[half + i];
    }
  }

  const RopeIntoCacheProblem& problem_;
  Real type_;
  int64_t dim_;
  Floats query_norm_;
  Floats key_norm_;
  Floats bias_;
  const Tensor& queries_;
};

}  // namespace

Tensor run(const RopeIntoCacheProblem& problem) {
  const Tensor queries = at::empty(problem.output(), problem.x.options());
  const Heads heads(problem, queries);
  for_rows(problem.batch() * problem.tokens(), 8 * problem.heads() * problem.dim(), [&](int64_t token) {
    heads.store(token);
  });
  return queries;
}

}  // namespace quantization_mlx::cpu
