// Kernels from templates, for a library that is compiled beforehand. A library that is compiled at run time holds the
// one that the host asks for (csrc/metal/library.mm): what follows the line "// --- Instances" of a .metal file is left
// out there.
#pragma once

// clang-format off
#define INSTANTIATE(name, ...) \
  template [[host_name(name)]] [[kernel]] decltype(__VA_ARGS__) __VA_ARGS__;
// clang-format on

// EACH(..., type name, type) for the element types.
#define FOR_EACH_HALF_TYPE(EACH, ...) EACH(__VA_ARGS__, float16, half) EACH(__VA_ARGS__, bfloat16, bfloat)
#define FOR_FLOAT(EACH, ...) EACH(__VA_ARGS__, float32, float)
