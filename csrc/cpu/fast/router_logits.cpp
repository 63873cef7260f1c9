#include "router_logits.h"

#include <ATen/ops/empty.h>

#include <algorithm>

#include "../kernels.h"
#include "../ops.h"
#include "scratch.h"

namespace quantization_mlx::cpu {
namespace {

using at::Tensor;

// With more tokens, a product of copies is the faster one.
constexpr int64_t most_tokens = 4;
// Rows of the router whose products are one sum. The sums of all parts are added afterwards, in order.
constexpr int64_t part_rows = 512;
// Rows that become float32 at a time: they stay in the first cache.
constexpr int64_t block_floats = usual_floats - 32;
// Rows take turns with several sums, so that none waits for the one before.
constexpr int64_t turns = 4;

bool is_half(const Tensor& tensor) {
  return tensor.scalar_type() == at::kHalf || tensor.scalar_type() == at::kBFloat16;
}

bool is_real(const Tensor& tensor) { return is_half(tensor) || tensor.scalar_type() == at::kFloat; }

int64_t whole(int64_t length) { return (length + 15) / 16 * 16; }

// Of floats that have 16 more than are needed: vectors that cross cache lines are slow.
float* aligned(Floats& floats) {
  constexpr uintptr_t line = 64;
  return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(floats.data()) + line - 1) / line * line);
}

// `count` elements of a contiguous tensor, from the one of this number on.
void to_float32(const Tensor& tensor, int64_t first, int64_t count, float* values) {
  const auto* data = static_cast<const uint8_t*>(tensor.const_data_ptr());
  const auto size = static_cast<int64_t>(tensor.element_size());
  kernels().to_float32(real_of(tensor.scalar_type()), data + first * size, count, values);
}

class LogitsOfFew {
 public:
  LogitsOfFew(const Tensor& x, const Tensor& router)
      : x_(x), router_(router), tokens_(x.size(0)), K_(x.size(1)), experts_(router.size(1)) {}

  int64_t parts() const { return (K_ + part_rows - 1) / part_rows; }
  int64_t sums_of_turn() const { return tokens_ * whole(experts_); }
  int64_t sums_of_part() const { return turns * sums_of_turn(); }

  // sums [turns, tokens, experts up to whole vectors] of one part of K.
  void add_part(int64_t part, float* sums) const {
    std::fill_n(sums, sums_of_part(), 0.0f);
    const int64_t end = std::min(K_, (part + 1) * part_rows);
    const int64_t rows = std::clamp<int64_t>(block_floats / experts_, 1, part_rows);
    Floats block_buffer = floats(rows * experts_ + 32);  // the last row, too, is read as whole vectors
    Floats x_buffer = floats(tokens_ * whole(rows) + 16);
    float* block = aligned(block_buffer);
    float* x = aligned(x_buffer);
    const auto add_multiple = kernels().decoder.add_multiple;
    for (int64_t k = part * part_rows; k < end; k += rows) {
      const int64_t count = std::min(rows, end - k);
      to_float32(router_, k * experts_, count * experts_, block);
      for (int64_t token = 0; token < tokens_; ++token) {
        to_float32(x_, token * K_ + k, count, x + token * whole(rows));
      }
      for (int64_t row = 0; row < count; ++row) {
        float* sums_of_row = sums + row % turns * sums_of_turn();
        for (int64_t token = 0; token < tokens_; ++token) {
          add_multiple(
              block + row * experts_, x[token * whole(rows) + row], experts_, sums_of_row + token * whole(experts_));
        }
      }
    }
  }

  void write(float* sums, float* logits) const {
    for (int64_t turn = 1; turn < parts() * turns; ++turn) {
      kernels().decoder.add_multiple(sums + turn * sums_of_turn(), 1.0f, sums_of_turn(), sums);
    }
    for (int64_t token = 0; token < tokens_; ++token) {
      std::copy_n(sums + token * whole(experts_), experts_, logits + token * experts_);
    }
  }

 private:
  const Tensor& x_;  // contiguous, as the router
  const Tensor& router_;
  int64_t tokens_;
  int64_t K_;
  int64_t experts_;
};

}  // namespace

bool multiplies_without_copies(const Tensor& x, const Tensor& router) {
  return x.dim() == 2 && router.dim() == 2 && x.size(1) == router.size(0) && x.numel() > 0 && router.numel() > 0 &&
      x.size(0) <= most_tokens && router.is_cpu() && router.is_contiguous() && is_real(x) && is_half(router);
}

Tensor product_without_copies(const Tensor& x, const Tensor& router) {
  const Tensor rows = x.contiguous();
  const LogitsOfFew product(rows, router);
  Floats buffer = floats(product.parts() * product.sums_of_part() + 16);
  float* sums = aligned(buffer);
  // Below that, beginning a parallel region takes about as long as it saves.
  const bool worth_it = x.numel() * router.size(1) >= 8 * task_multiplications;
  parallel_tasks(
      product.parts(), [&](int64_t part, int) { product.add_part(part, sums + part * product.sums_of_part()); },
      worth_it);
  const Tensor logits = at::empty({x.size(0), router.size(1)}, x.options().dtype(at::kFloat));
  product.write(sums, logits.mutable_data_ptr<float>());
  return logits;
}

}  // namespace quantization_mlx::cpu
