// Batches of products, cut into what one launch can step over.
#pragma once

#include <vector>

#include "../../problem.h"

namespace quantization_mlx::gpu {

// Matrices to step over in each operand from one position of a batch dimension to the next.
struct BatchDimension {
  int64_t size;
  int64_t x;
  int64_t w;
  int64_t y;
};

// At most two dimensions go into one launch; what is beyond is looped over here.
struct BatchPart {
  BatchDimension outer{1, 0, 0, 0};
  BatchDimension inner{1, 0, 0, 0};
  int64_t x = 0;  // matrices before the first
  int64_t w = 0;
  int64_t y = 0;

  int64_t count() const { return outer.size * inner.size; }
};

std::vector<BatchPart> batch_parts(const MatmulShape<int64_t>& shape);

}  // namespace quantization_mlx::gpu
