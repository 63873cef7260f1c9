// Kernels from templates, for a library that is compiled beforehand. A library that is compiled at run time holds the
// one that the host asks for (csrc/metal/library.mm): what follows the line "// --- Instances" of a .metal file is left
// out there.
#pragma once

// clang-format off
#define INSTANTIATE(name, ...) \
  template [[host_name(name)]] [[kernel]] decltype(__VA_ARGS__) __VA_ARGS__;
// clang-format on

// EACH(type name, type) for every element type.
#define FOR_EACH_HALF_TYPE(EACH) EACH(float16, half) EACH(bfloat16, bfloat)
#define FOR_EACH_TYPE(EACH) EACH(float32, float) FOR_EACH_HALF_TYPE(EACH)
