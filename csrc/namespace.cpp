#include "namespace.h"

#define QUANTIZATION_MLX_STRING(name) #name
#define QUANTIZATION_MLX_STRING_EXPAND(name) QUANTIZATION_MLX_STRING(name)

namespace quantization_mlx {

const char* op_namespace() { return QUANTIZATION_MLX_STRING_EXPAND(QUANTIZATION_MLX_NAMESPACE); }

}  // namespace quantization_mlx
