// The namespace of this build's ops: kernel-builder gives every build its own name, so that two builds can live in one
// process; the pip build names its ops quantization_mlx, so that exported programs can refer to them.
//
// Few files include this: the others are the same in every build, and call op_namespace of ops.h.
#pragma once

#ifndef QUANTIZATION_MLX_NAMESPACE
#define QUANTIZATION_MLX_NAMESPACE TORCH_EXTENSION_NAME
#endif

// The library macros paste their argument: one more level lets it expand first.
#define TORCH_LIBRARY_EXPAND(name, module) TORCH_LIBRARY(name, module)
#define TORCH_LIBRARY_IMPL_EXPAND(name, key, module) TORCH_LIBRARY_IMPL(name, key, module)
