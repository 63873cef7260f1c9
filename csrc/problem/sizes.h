// Sizes of tensors as plain integers or, where a compiler traces the op, as symbols: the rules of shapes are written
// once for both.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/SymInt.h>
#include <c10/util/Exception.h>
#include <c10/util/SmallVector.h>

#include <algorithm>
#include <string_view>

namespace quantization_mlx {

template <typename Int>
using Sizes = c10::SmallVector<Int, 6>;

// For requirements: whether a condition holds. Of sizes that depend on data, a tracing compiler does not know: it takes
// the condition for true, and the traced program asserts it when it runs.
inline bool holds(bool condition) { return condition; }
inline bool holds(const c10::SymBool& condition) { return condition.expect_true(__FILE__, __LINE__); }

// For choices between two ways of computing the same: whether a condition is known to be true while tracing.
inline bool is_known(bool condition) { return condition; }
inline bool is_known(const c10::SymBool& condition) { return condition.guard_or_false(__FILE__, __LINE__); }

template <typename Int>
c10::ArrayRef<Int> sizes_of(const at::Tensor& tensor);

template <>
inline c10::ArrayRef<int64_t> sizes_of<int64_t>(const at::Tensor& tensor) {
  return tensor.sizes();
}

template <>
inline c10::ArrayRef<c10::SymInt> sizes_of<c10::SymInt>(const at::Tensor& tensor) {
  return tensor.sym_sizes();
}

inline at::Tensor empty(c10::ArrayRef<int64_t> sizes, at::TensorOptions options) { return at::empty(sizes, options); }

inline at::Tensor empty(c10::ArrayRef<c10::SymInt> sizes, at::TensorOptions options) {
  return at::empty_symint(sizes, options);
}

template <typename Int>
Int product(c10::ArrayRef<Int> sizes) {
  Int result = 1;
  for (const Int& size : sizes) {
    result = result * size;
  }
  return result;
}

template <typename Int>
bool same_sizes(c10::ArrayRef<Int> a, c10::ArrayRef<Int> b) {
  return a.size() == b.size() && std::equal(a.begin(), a.end(), b.begin(), [](const Int& one, const Int& other) {
           return holds(c10::sym_eq(one, other));
         });
}

template <typename Int>
Sizes<Int> joined(c10::ArrayRef<Int> leading, std::initializer_list<Int> trailing) {
  Sizes<Int> result(leading.begin(), leading.end());
  result.append(trailing.begin(), trailing.end());
  return result;
}

template <typename Int>
Sizes<Int> broadcast(std::string_view op, const char* what, c10::ArrayRef<Int> a, c10::ArrayRef<Int> b) {
  const auto rank = std::max(a.size(), b.size());
  Sizes<Int> result(rank, Int(1));
  for (size_t i = 0; i < rank; ++i) {
    const bool in_a = i + a.size() >= rank;
    const bool in_b = i + b.size() >= rank;
    if (in_a && in_b) {
      const Int& from_a = a[i + a.size() - rank];
      const Int& from_b = b[i + b.size() - rank];
      // As in torch, a size that depends on data is taken to be other than 1.
      result[i] = is_known(c10::sym_eq(from_a, Int(1))) ? from_b : from_a;
      TORCH_CHECK_VALUE(
          is_known(c10::sym_eq(from_a, Int(1))) || is_known(c10::sym_eq(from_b, Int(1))) ||
              holds(c10::sym_eq(from_a, from_b)),
          "[", op, "] ", what, " of shapes ", a, " and ", b, " do not broadcast.");
    } else {
      result[i] = in_a ? a[i + a.size() - rank] : b[i + b.size() - rank];
    }
  }
  return result;
}

}  // namespace quantization_mlx
