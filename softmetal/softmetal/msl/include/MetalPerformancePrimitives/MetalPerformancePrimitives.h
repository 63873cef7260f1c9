// The matrix product of tensors, mpp::tensor_ops::matmul2d. Language 4.0 only, as in Metal.
#pragma once
#include <metal_stdlib>

#if __METAL_VERSION__ >= 400

#include <metal_tensor>
#ifndef SOFTMETAL_MACROS_ONLY  // shaders see the macros; the rest is precompiled

extern "C" {
SOFTMETAL_COLLECTIVE void __softmetal_matmul(ulong request);
}

namespace mpp {
namespace tensor_ops {

template <class T>
constexpr __constant T dynamic_length_v = metal::numeric_limits<T>::max();

struct matmul2d_descriptor {
  enum class mode { multiply, multiply_accumulate };

  int m, n, k;
  bool transpose_left, transpose_right, relaxed_precision;
  mode matmul_mode;

  constexpr matmul2d_descriptor(
      int tile_m,
      int tile_n,
      int tile_k = static_cast<int>(metal::dynamic_extent),
      bool left = false,
      bool right = false,
      bool relaxed = false,
      mode how = mode::multiply)
      : m(tile_m),
        n(tile_n),
        k(tile_k),
        transpose_left(left),
        transpose_right(right),
        relaxed_precision(relaxed),
        matmul_mode(how) {}

  // clang takes objects as template arguments in C++20 only; so there a descriptor becomes this number.
  constexpr operator ulong() const {
    const bool is_dynamic = k < 0 || k == dynamic_length_v<int>;
    const bool fits = m > 0 && m < 0x4000 && n > 0 && n < 0x4000 && (is_dynamic || k < 0xFFFFFFF);
    const ulong flags = (transpose_left ? 1ul : 0ul) | (transpose_right ? 2ul : 0ul) | (relaxed_precision ? 4ul : 0ul) |
        (matmul_mode == mode::multiply_accumulate ? 8ul : 0ul);
    return !fits ? 0ul
                 : static_cast<ulong>(m) | static_cast<ulong>(n) << 14 |
            (is_dynamic ? 0xFFFFFFFul : static_cast<ulong>(k)) << 28 | flags << 56;
  }
  static constexpr matmul2d_descriptor __unpack(ulong packed) {
    const int k = static_cast<int>(packed >> 28 & 0xFFFFFFF);
    return matmul2d_descriptor(
        static_cast<int>(packed & 0x3FFF), static_cast<int>(packed >> 14 & 0x3FFF), k == 0xFFFFFFF ? -1 : k,
        packed >> 56 & 1, packed >> 57 & 1, packed >> 58 & 1,
        packed >> 59 & 1 ? mode::multiply_accumulate : mode::multiply);
  }
};

namespace __detail {

// The layout is repeated in tensor_ops.h.
struct request {
  int m, n, k;
  int simdgroups;  // 0: one thread
  uint transpose_left, transpose_right, relaxed, accumulate;
  int layout;
  uint reserved;
  metal::__tensor_operand left, right, destination;
};

// Types by their code in types.h: int8_t 0, int 4, float 6, half 7, bfloat 8.
constexpr bool is_legal(int left, int right, int destination) {
  const bool has_float = left == 6 || right == 6;
  const bool has_half = left == 7 || right == 7;
  const bool has_bfloat = left == 8 || right == 8;
  const bool has_byte = left == 0 || right == 0;
  if ((left != 0 && left < 6) || (right != 0 && right < 6)) {
    return false;
  }
  if (left == 0 && right == 0) {
    return destination == 4;
  }
  if (has_float) {
    return destination == 6;
  }
  return destination == 6 || (destination == 7 && has_half && (left != 0 || has_byte)) ||
      (destination == 8 && has_bfloat);
}

template <class T>
using bare = metal::remove_cv_t<metal::remove_addrspace_t<metal::remove_reference_t<T>>>;

template <class T>
constexpr __constant bool is_operand = metal::is_tensor<bare<T>>::value || metal::is_cooperative_tensor<bare<T>>::value;

template <class T, bool IsTensor>
struct memory_of {
  static constexpr __constant bool of_simdgroups = true, of_thread = true;
};
template <class T>
struct memory_of<T, true> {
  static constexpr __constant bool of_simdgroups =
      T::__memory == metal::__space::device_memory || T::__memory == metal::__space::threadgroup_memory;
  static constexpr __constant bool of_thread =
      T::__memory == metal::__space::device_memory || T::__memory == metal::__space::thread_memory;
};
template <class T>
using memory = memory_of<T, metal::is_tensor<T>::value>;

template <class Left, class Right, class Element>
constexpr bool check_types() {
  static_assert(
      !metal::is_same_v<typename Left::value_type, const metal::remove_cv_t<typename Left::value_type>> &&
          !metal::is_same_v<typename Right::value_type, const metal::remove_cv_t<typename Right::value_type>>,
      "operands of a tensor operation have no const elements");
  static_assert(
      is_legal(
          metal::__scalar<typename Left::value_type>::code, metal::__scalar<typename Right::value_type>::code,
          metal::__scalar<Element>::code),
      "no tensor operation multiplies these element types");
  return true;
}

// Which part of a product a cooperative tensor is: 0 the left operand, 1 the right one, 2 the destination.
template <class Descriptor, class Scope, int Part, int Rows, int Columns>
struct layout {
  typedef metal::__distribution<Rows, Columns, metal::__simdgroups_of<Scope>::value, Part> distribution;
};

}  // namespace __detail

template <ulong Descriptor, class Scope, class... Args>
class matmul2d {
 public:
  static constexpr __constant matmul2d_descriptor descriptor = matmul2d_descriptor::__unpack(Descriptor);
  typedef Scope scope;

 private:
  static constexpr __constant int simdgroups = metal::__simdgroups_of<Scope>::value;
  static constexpr __constant int m = descriptor.m, n = descriptor.n, k = descriptor.k;
  static_assert(simdgroups >= 0, "the scope is execution_thread or execution_simdgroups<N>");
  static_assert(m > 0 && n > 0, "a tile has at least one row and one column");
  static_assert(
      (m % 8 == 0 || m == 1 || m == 2 || m == 4) && (n % 8 == 0 || n == 1 || n == 2 || n == 4),
      "m and n are 1, 2, 4 or multiples of 8");
  static_assert(simdgroups == 0 || m % 16 == 0 || n % 16 == 0, "at least one of m and n is a multiple of 16");

  template <int Part, int Rows, int Columns, class Coordinate, class T>
  using cooperative = metal::
      cooperative_tensor<T, metal::dextents<Coordinate, 2>, __detail::layout<matmul2d, Scope, Part, Rows, Columns>>;
  static constexpr __constant int left_rows = descriptor.transpose_left ? k : m;
  static constexpr __constant int left_columns = descriptor.transpose_left ? m : k;
  static constexpr __constant int right_rows = descriptor.transpose_right ? n : k;
  static constexpr __constant int right_columns = descriptor.transpose_right ? k : n;

 public:
  template <class LeftElement, class RightElement, class Element, class Coordinate = int, class... More>
  using cooperative_tensor_left_input_t = cooperative<0, left_rows, left_columns, Coordinate, LeftElement>;
  template <class LeftElement, class RightElement, class Element, class Coordinate = int, class... More>
  using cooperative_tensor_right_input_t = cooperative<1, right_rows, right_columns, Coordinate, RightElement>;
  template <class Left, class Right, class Element, class Coordinate = int, class... More>
  using cooperative_tensor_destination_t = cooperative<2, m, n, Coordinate, Element>;

  template <class LeftElement, class RightElement, class Element, class Coordinate = int>
  METAL_FUNC cooperative_tensor_left_input_t<LeftElement, RightElement, Element, Coordinate>
  get_left_input_cooperative_tensor() const {
    check_inputs<LeftElement, RightElement, Element>();
    return cooperative_tensor_left_input_t<LeftElement, RightElement, Element, Coordinate>();
  }
  template <class LeftElement, class RightElement, class Element, class Coordinate = int>
  METAL_FUNC cooperative_tensor_right_input_t<LeftElement, RightElement, Element, Coordinate>
  get_right_input_cooperative_tensor() const {
    check_inputs<LeftElement, RightElement, Element>();
    return cooperative_tensor_right_input_t<LeftElement, RightElement, Element, Coordinate>();
  }

  template <class Left, class Right, class Element, class Coordinate = int>
  METAL_FUNC cooperative_tensor_destination_t<Left, Right, Element, Coordinate> get_destination_cooperative_tensor()
      const {
    static_assert(
        __detail::is_operand<Left> && __detail::is_operand<Right>,
        "the destination is made for the types of two tensors, not for element types");
    static_assert(__detail::check_types<__detail::bare<Left>, __detail::bare<Right>, Element>());
    return cooperative_tensor_destination_t<Left, Right, Element, Coordinate>();
  }

  // All threads of the scope call it together. Operands are variables, as in Metal.
  template <class Left, class Right, class Destination>
  METAL_FUNC void run(__private Left& left, __private Right& right, __private Destination& destination) const {
    static_assert(
        __detail::is_operand<Left> && __detail::is_operand<Right> && __detail::is_operand<Destination>,
        "operands are tensors");
    static_assert(__detail::check_types<Left, Right, typename Destination::value_type>());
    static_assert(
        simdgroups == 0 ? __detail::memory<Left>::of_thread && __detail::memory<Right>::of_thread
                        : __detail::memory<Left>::of_simdgroups && __detail::memory<Right>::of_simdgroups,
        "operands lie in device or threadgroup memory, those of one thread in device or thread memory");
    check_part<Left, 0, left_rows, left_columns>();
    check_part<Right, 1, right_rows, right_columns>();
    check_part<Destination, 2, m, n>();
    __detail::request request;
    request.m = m;
    request.n = n;
    request.k = k;
    request.simdgroups = simdgroups;
    request.transpose_left = descriptor.transpose_left;
    request.transpose_right = descriptor.transpose_right;
    request.relaxed = descriptor.relaxed_precision;
    request.accumulate = descriptor.matmul_mode == matmul2d_descriptor::mode::multiply_accumulate;
    request.layout = SOFTMETAL_TENSOR_LAYOUT;
    request.left = left.__operand();
    request.right = right.__operand();
    request.destination = destination.__operand();
    __softmetal_matmul((ulong)&request);
  }

 private:
  template <class LeftElement, class RightElement, class Element>
  static constexpr void check_inputs() {
    static_assert(simdgroups == 1, "cooperative operands belong to one simdgroup");
    static_assert(
        (m == 16 || m == 32) && (n == 16 || n == 32) && (k == 16 || k == 32) && (m == 32 || n == 32 || k == 32),
        "with cooperative operands m, n and k are 16 or 32, and one of them is 32");
    static_assert(
        __detail::is_legal(
            metal::__scalar<LeftElement>::code, metal::__scalar<RightElement>::code, metal::__scalar<Element>::code),
        "no tensor operation multiplies these element types");
  }
  template <class T, int Part, int Rows, int Columns>
  static constexpr void check_part() {
    if constexpr (metal::is_cooperative_tensor<T>::value) {
      typedef typename T::__distribution_type Distribution;
      static_assert(
          Distribution::part == Part && Distribution::rows == Rows && Distribution::columns == Columns &&
              Distribution::simdgroups == simdgroups,
          "the cooperative tensor belongs to another operation");
    }
  }
};

}  // namespace tensor_ops
}  // namespace mpp

#endif
#endif
