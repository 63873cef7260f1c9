// Kernels that users write: their schemas, and what they answer where there is no Metal.
#pragma once

#include <torch/library.h>

namespace quantization_mlx {

void define_custom_kernels(torch::Library& library);

// For every device; csrc/metal/custom.mm has what runs on Apple GPUs.
void refuse_custom_kernels(torch::Library& library);

}  // namespace quantization_mlx
