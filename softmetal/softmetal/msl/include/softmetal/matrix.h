// 8x8 matrices spread over a simdgroup: lane l holds (row, column) and (row, column + 1).
#pragma once

extern "C" {
SOFTMETAL_COLLECTIVE ulong __softmetal_simdgroup_multiply(ulong a, ulong b, ulong c);
SOFTMETAL_COLLECTIVE ulong
__softmetal_simdgroup_load(ulong source, ulong row_elements, ulong x, ulong y, int transpose, uint size);
SOFTMETAL_COLLECTIVE void __softmetal_simdgroup_store(
    ulong elements,
    ulong target,
    ulong row_elements,
    ulong x,
    ulong y,
    int transpose,
    uint size);
}

namespace metal {

METAL_FUNC uint __fragment_row(uint lane) { return (lane / 4 & 4) + lane / 2 % 4; }
METAL_FUNC uint __fragment_column(uint lane) { return (lane / 4 & 2) * 2 + lane % 2 * 2; }

template <class T, int Columns, int Rows = Columns>
struct simdgroup_matrix {
  static_assert(Columns == 8 && Rows == 8, "simdgroup matrices are 8x8");
  static_assert(is_floating_point_v<T>, "simdgroup matrices are of float, half or bfloat");
  typedef vec<T, 2> storage_type;
  vec<T, 2> elements;
  simdgroup_matrix() {}
  METAL_FUNC explicit simdgroup_matrix(T diagonal) {
    uint lane = __softmetal_lane();
    for (uint i = 0; i < 2; i++) {
      elements[i] = __fragment_row(lane) == __fragment_column(lane) + i ? diagonal : static_cast<T>(0.0f);
    }
  }
  METAL_FUNC __private vec<T, 2>& thread_elements() __private { return elements; }
};
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
typedef simdgroup_matrix<bfloat, 8, 8> simdgroup_bfloat8x8;

template <class T, int Columns = 8, int Rows = Columns>
METAL_FUNC simdgroup_matrix<T, Columns, Rows> make_filled_simdgroup_matrix(T value) {
  simdgroup_matrix<T, Columns, Rows> result;
  result.elements = value;
  return result;
}

template <class D, class S>
METAL_FUNC vec<D, 2> __convert(vec<S, 2> source) {
  return vec<D, 2>{static_cast<D>(source.x), static_cast<D>(source.y)};
}

template <class D, class A, class B, class C>
METAL_FUNC void simdgroup_multiply_accumulate(
    __private simdgroup_matrix<D, 8, 8>& d,
    __private simdgroup_matrix<A, 8, 8>& a,
    __private simdgroup_matrix<B, 8, 8>& b,
    __private simdgroup_matrix<C, 8, 8>& c) {
  d.elements = __convert<D>(as_type<vec<float, 2>>(__softmetal_simdgroup_multiply(
      as_type<ulong>(__convert<float>(a.elements)), as_type<ulong>(__convert<float>(b.elements)),
      as_type<ulong>(__convert<float>(c.elements)))));
}

template <class D, class A, class B>
METAL_FUNC void simdgroup_multiply(
    __private simdgroup_matrix<D, 8, 8>& d,
    __private simdgroup_matrix<A, 8, 8>& a,
    __private simdgroup_matrix<B, 8, 8>& b) {
  simdgroup_matrix<float, 8, 8> zero;
  zero.elements = 0.0f;
  simdgroup_multiply_accumulate(d, a, b, zero);
}

template <class T, class Pointer>
METAL_FUNC void simdgroup_load(
    __private simdgroup_matrix<T, 8, 8>& d,
    Pointer source,
    ulong elements_per_row = 8,
    vec<ulong, 2> origin = 0,
    bool transpose = false) {
  static_assert(is_same_v<decay_t<remove_pointer_t<Pointer>>, T>, "the matrix and the memory have one type");
  const ulong elements =
      __softmetal_simdgroup_load((ulong)source, elements_per_row, origin.x, origin.y, transpose, sizeof(T));
  d.elements = __from_word<vec<T, 2>>(elements);
}

template <class T, class Pointer>
METAL_FUNC void simdgroup_store(
    __private simdgroup_matrix<T, 8, 8>& d,
    Pointer target,
    ulong elements_per_row = 8,
    vec<ulong, 2> origin = 0,
    bool transpose = false) {
  static_assert(is_same_v<decay_t<remove_pointer_t<Pointer>>, T>, "the matrix and the memory have one type");
  __softmetal_simdgroup_store(
      __to_word(d.elements), (ulong)target, elements_per_row, origin.x, origin.y, transpose, sizeof(T));
}

}  // namespace metal
