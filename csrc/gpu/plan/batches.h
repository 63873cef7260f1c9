// Batches of products, cut into what one launch can step over.
#pragma once

#include <vector>

#include "../../problem/problem.h"

namespace quantization_mlx::gpu {

// A batch dimension, and the distance of its positions in each operand, in matrices.
struct BatchDimension {
  int64_t size;
  int64_t x;
  int64_t w;
  int64_t y;
};

// The matrices of one launch, which steps over two batch dimensions.
struct BatchPart {
  BatchDimension outer{1, 0, 0, 0};
  BatchDimension inner{1, 0, 0, 0};
  int64_t x = 0;  // matrices before the first
  int64_t w = 0;
  int64_t y = 0;

  int64_t count() const { return outer.size * inner.size; }
};

// A product's batch: one part for every position in the dimensions beyond two.
std::vector<BatchPart> batch_parts(const MatmulShape<int64_t>& shape);

}  // namespace quantization_mlx::gpu
