// 8x8 matrices spread over a simdgroup: lane l holds (row, column) and (row, column + 1).
#pragma once

extern "C" {
SOFTMETAL_COLLECTIVE void __softmetal_simdgroup_multiply(ulong source, ulong target);
SOFTMETAL_COLLECTIVE void __softmetal_simdgroup_arrive(int collective);
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

template <class T, int Columns, int Rows>
METAL_FUNC simdgroup_matrix<T, Columns, Rows> make_filled_simdgroup_matrix(T value) {
  simdgroup_matrix<T, Columns, Rows> result;
  result.elements = value;
  return result;
}

template <class D, class A, class B, class C>
METAL_FUNC void simdgroup_multiply_accumulate(
    __private simdgroup_matrix<D, 8, 8>& d,
    __private simdgroup_matrix<A, 8, 8>& a,
    __private simdgroup_matrix<B, 8, 8>& b,
    __private simdgroup_matrix<C, 8, 8>& c) {
  float source[6];
  float target[2];
  for (int i = 0; i < 2; i++) {
    source[i] = static_cast<float>(a.elements[i]);
    source[2 + i] = static_cast<float>(b.elements[i]);
    source[4 + i] = static_cast<float>(c.elements[i]);
  }
  __softmetal_simdgroup_multiply((ulong)&source[0], (ulong)&target[0]);
  for (int i = 0; i < 2; i++) {
    d.elements[i] = static_cast<D>(target[i]);
  }
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

// Codes as in runtime.cpp's Collective.
template <class T, class Pointer>
METAL_FUNC void simdgroup_load(
    __private simdgroup_matrix<T, 8, 8>& d,
    Pointer source,
    ulong elements_per_row = 8,
    vec<ulong, 2> origin = 0,
    bool transpose = false) {
  __softmetal_simdgroup_arrive(5);
  ulong row = __fragment_row(__softmetal_lane());
  ulong column = __fragment_column(__softmetal_lane());
  for (ulong i = 0; i < 2; i++) {
    d.elements[i] = transpose ? source[(origin.y + column + i) * elements_per_row + origin.x + row]
                              : source[(origin.y + row) * elements_per_row + origin.x + column + i];
  }
}

template <class T, class Pointer>
METAL_FUNC void simdgroup_store(
    __private simdgroup_matrix<T, 8, 8>& d,
    Pointer target,
    ulong elements_per_row = 8,
    vec<ulong, 2> origin = 0,
    bool transpose = false) {
  __softmetal_simdgroup_arrive(6);
  ulong row = __fragment_row(__softmetal_lane());
  ulong column = __fragment_column(__softmetal_lane());
  for (ulong i = 0; i < 2; i++) {
    ulong place = transpose ? (origin.y + column + i) * elements_per_row + origin.x + row
                            : (origin.y + row) * elements_per_row + origin.x + column + i;
    target[place] = d.elements[i];
  }
}

}  // namespace metal
