// What the plans of all ops are put together from.
#pragma once

#include <cstring>
#include <initializer_list>
#include <limits>
#include <string>
#include <string_view>

#include "../plan.h"

namespace quantization_mlx::gpu {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Kernels count in 32 bits.
inline constexpr int64_t max_size = std::numeric_limits<int>::max() / 2;

// What is to be said where all kernels that could serve are excluded.
std::string no_family_left(std::string_view op, const Target& target);

// Raises NotImplementedError for a size beyond max_size; what: the subject of the message.
int checked_int(std::string_view op, const char* what, int64_t size);

// A launch of the kernel in kernels.h of this op and number of rows.
Launch launch_of(Family family, const std::string& op, int rows, Format format, int32_t dtype);

inline uint32_t constant(int index, bool value) { return static_cast<uint32_t>(value) << index; }

// Whether the address of an element, so many after the first, is a multiple of `bytes`, at most 16.
bool is_aligned(const OperandFacts& operand, int64_t elements, int64_t bytes);

// Bytes that a lane loads of a run of 32 codes at once (dequantize.h); of packed columns, of a row of words
// (matvec_columns.h).
int load_bytes(Format format);

void set_arguments(Launch& launch, std::initializer_list<Argument> arguments);

template <typename Params>
void set_params(Launch& launch, const Params& params, int index) {
  static_assert(sizeof(Params) <= sizeof launch.params);
  std::memcpy(launch.params.data(), &params, sizeof params);
  launch.params_size = sizeof params;
  launch.params_index = index;
}

}  // namespace quantization_mlx::gpu
