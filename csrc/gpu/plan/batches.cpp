#include "batches.h"

#include <utility>

namespace quantization_mlx::gpu {
namespace {

int64_t broadcast_size(c10::IntArrayRef own, size_t rank, size_t i) {
  return i + own.size() < rank ? 1 : own[i + own.size() - rank];
}

std::vector<BatchDimension> batch_dimensions(const MatmulShape<int64_t>& shape) {
  const size_t rank = shape.batch.size();
  std::vector<BatchDimension> dimensions;  // innermost first
  int64_t x_step = 1;
  int64_t w_step = 1;
  int64_t y_step = 1;
  for (size_t i = rank; i-- > 0;) {
    const int64_t size = shape.batch[i];
    const int64_t x_size = broadcast_size(shape.x_batch, rank, i);
    const int64_t w_size = broadcast_size(shape.w_batch, rank, i);
    const BatchDimension next{size, x_size == 1 ? 0 : x_step, w_size == 1 ? 0 : w_step, y_step};
    x_step *= x_size;
    w_step *= w_size;
    y_step *= size;
    if (size == 1) {
      continue;
    }
    if (!dimensions.empty()) {
      BatchDimension& last = dimensions.back();
      if (next.x == last.x * last.size && next.w == last.w * last.size) {  // both are one dimension
        last.size *= size;
        continue;
      }
    }
    dimensions.push_back(next);
  }
  return dimensions;
}

}  // namespace

std::vector<BatchPart> batch_parts(const MatmulShape<int64_t>& shape) {
  const auto dimensions = batch_dimensions(shape);
  std::vector<BatchPart> parts(1);
  for (size_t i = 0; i < dimensions.size(); ++i) {
    const BatchDimension& dimension = dimensions[i];
    if (i < 2) {
      (i == 0 ? parts[0].inner : parts[0].outer) = dimension;
      continue;
    }
    std::vector<BatchPart> next;
    for (const BatchPart& part : parts) {
      for (int64_t j = 0; j < dimension.size; ++j) {
        next.push_back(part);
        next.back().x += j * dimension.x;
        next.back().w += j * dimension.w;
        next.back().y += j * dimension.y;
      }
    }
    parts = std::move(next);
  }
  return parts;
}

}  // namespace quantization_mlx::gpu
