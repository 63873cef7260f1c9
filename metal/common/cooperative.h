// Cooperative tensors: the destination of a tensor operation, spread over the threads that run it together.
#pragma once

#include "metal.h"

namespace quantization_mlx {

template <typename Sums>
METAL_FUNC void clear(thread Sums& sums) {
#pragma unroll
  for (ushort i = 0; i < sums.get_capacity(); ++i) {
    if (sums.is_valid_element(i)) {
      sums[i] = 0.0f;
    }
  }
}

}  // namespace quantization_mlx
