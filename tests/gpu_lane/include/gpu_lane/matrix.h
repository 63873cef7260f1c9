// simdgroup_matrix on mma.sync.m16n8k8, of whose sixteen rows it uses eight.
//
// Metal does not say which lane holds what, so neither does this: a matrix lies in registers as the instruction wants
// it, by rows for a left operand and a sum, by columns for a right one. Where the use is not what was loaded for, one
// instruction transposes. Only thread_elements() gives the order that Apple's GPUs have been seen to have:
// lane l holds (row, column) and (row, column + 1). It is for reading.
//
// GPU_LANE_APPLE_LAYOUT keeps matrices in Apple's order and exchanges them around every multiplication: ten exchanges
// for one instruction, the price for kernels that fill fragments by themselves, as MLX's do, and to compare with them.
#pragma once

namespace metal {

METAL_FUNC uint __apple_row(uint lane) { return (lane / 4 & 4) + lane / 2 % 4; }
METAL_FUNC uint __apple_column(uint lane) { return (lane / 4 & 2) * 2 + lane % 2 * 2; }
// The lane that holds columns 2 * pair and 2 * pair + 1 of a row in Apple's order, and in the instruction's.
METAL_FUNC uint __apple_lane(uint row, uint pair) {
  return (row & 4) * 4 + (pair & 2) * 4 + (row & 3) * 2 + (pair & 1);
}
METAL_FUNC uint __native_lane(uint row, uint pair) { return row * 4 + pair; }

METAL_FUNC uint __from_lane(uint value, uint lane) {
  return static_cast<uint>(
      __nvvm_shfl_sync_idx_i32(GPU_LANE_ALL_LANES, static_cast<int>(value), static_cast<int>(lane), 31));
}

template <class D, class S>
METAL_FUNC vec<D, 2> __convert(vec<S, 2> source) {
  return vec<D, 2>{static_cast<D>(source.x), static_cast<D>(source.y)};
}

template <class T>
METAL_FUNC vec<T, 2> __exchanged(vec<T, 2> pair, uint lane) {
  if constexpr (sizeof(T) == 2) {
    return as_type<vec<T, 2>>(__from_lane(as_type<uint>(pair), lane));
  } else {
    return vec<T, 2>{
        as_type<T>(__from_lane(as_type<uint>(pair.x), lane)), as_type<T>(__from_lane(as_type<uint>(pair.y), lane))};
  }
}

// From the instruction's order by rows to Apple's, and back.
template <class T>
METAL_FUNC vec<T, 2> __to_apple(vec<T, 2> pair) {
  const uint lane = __softmetal_lane();
  return __exchanged(pair, __native_lane(__apple_row(lane), __apple_column(lane) / 2));
}
template <class T>
METAL_FUNC vec<T, 2> __to_native(vec<T, 2> pair) {
  const uint lane = __softmetal_lane();
  return __exchanged(pair, __apple_lane(lane / 4, lane % 4));
}

// Between rows and columns, for matrices in the instruction's order.
template <class T>
METAL_FUNC vec<T, 2> __transposed(vec<T, 2> pair) {
  if constexpr (sizeof(T) == 2) {
    uint result;
    __asm__ volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(as_type<uint>(pair)));
    return as_type<vec<T, 2>>(result);
  } else {
    const uint lane = __softmetal_lane();
    const uint row = lane % 4 * 2;
    const uint pair_of_row = lane / 4 / 2;
    const vec<T, 2> first = __exchanged(pair, __native_lane(row, pair_of_row));
    const vec<T, 2> second = __exchanged(pair, __native_lane(row + 1, pair_of_row));
    return lane / 4 % 2 ? vec<T, 2>{first.y, second.y} : vec<T, 2>{first.x, second.x};
  }
}

template <class T, int Columns, int Rows = Columns>
struct simdgroup_matrix {
  static_assert(Columns == 8 && Rows == 8, "simdgroup matrices are 8x8");
  static_assert(is_floating_point_v<T>, "simdgroup matrices are of float, half or bfloat");
  typedef vec<T, 2> storage_type;
  vec<T, 2> elements;
#ifdef GPU_LANE_APPLE_LAYOUT
  METAL_FUNC __private vec<T, 2>& thread_elements() __private { return elements; }
  METAL_FUNC vec<T, 2> by_rows() const __private { return __to_native(elements); }
  METAL_FUNC vec<T, 2> by_columns() const __private { return __transposed(__to_native(elements)); }
  METAL_FUNC void set(vec<T, 2> native, bool) __private { elements = __to_apple(native); }
#else
  bool is_by_columns;
  METAL_FUNC vec<T, 2> thread_elements() const __private { return __to_apple(by_rows()); }
  METAL_FUNC vec<T, 2> by_rows() const __private { return is_by_columns ? __transposed(elements) : elements; }
  METAL_FUNC vec<T, 2> by_columns() const __private { return is_by_columns ? elements : __transposed(elements); }
  METAL_FUNC void set(vec<T, 2> native, bool columns) __private {
    elements = native;
    is_by_columns = columns;
  }
#endif
  simdgroup_matrix() {}
};
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
typedef simdgroup_matrix<bfloat, 8, 8> simdgroup_bfloat8x8;

template <class T, int Columns = 8, int Rows = Columns>
METAL_FUNC simdgroup_matrix<T, Columns, Rows> make_filled_simdgroup_matrix(T value) {
  simdgroup_matrix<T, Columns, Rows> result;
  result.set(vec<T, 2>{value, value}, false);
  return result;
}

// tf32 keeps ten bits of mantissa: what they leave of a float is a second operand, and three products are float32's,
// but for the last bits. Both operands name the rows and columns along which they meet in the same order.
METAL_FUNC vec<float, 2> __multiply_tf32(vec<uint, 2> a, vec<uint, 2> b, vec<float, 2> c) {
  float d0, d1, d2, d3;
  __asm__ volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
      : "=f"(d0), "=f"(d1), "=f"(d2), "=f"(d3)
      : "r"(a.x), "r"(0u), "r"(a.y), "r"(0u), "r"(b.x), "r"(b.y), "f"(c.x), "f"(c.y), "f"(0.0f), "f"(0.0f));
  return vec<float, 2>{d0, d1};
}
METAL_FUNC vec<uint, 2> __upper(vec<float, 2> x) {
  return vec<uint, 2>{as_type<uint>(x.x) & 0xFFFFE000u, as_type<uint>(x.y) & 0xFFFFE000u};
}
METAL_FUNC vec<uint, 2> __lower(vec<float, 2> x) {
  const vec<uint, 2> upper = __upper(x);
  return __upper(vec<float, 2>{x.x - as_type<float>(upper.x), x.y - as_type<float>(upper.y)});
}
METAL_FUNC vec<float, 2> __multiply(vec<float, 2> a, vec<float, 2> b, vec<float, 2> c) {
  c = __multiply_tf32(__lower(a), __upper(b), c);
  c = __multiply_tf32(__upper(a), __lower(b), c);
  return __multiply_tf32(__upper(a), __upper(b), c);
}

#define GPU_LANE_MULTIPLY(T, NAME)                                                                                 \
  METAL_FUNC vec<float, 2> __multiply(vec<T, 2> a, vec<T, 2> b, vec<float, 2> c) {                                 \
    float d0, d1, d2, d3;                                                                                          \
    __asm__ volatile(                                                                                              \
        "mma.sync.aligned.m16n8k8.row.col.f32." NAME "." NAME ".f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%7,%8,%9,%10};" \
        : "=f"(d0), "=f"(d1), "=f"(d2), "=f"(d3)                                                                   \
        : "r"(as_type<uint>(a)), "r"(0u), "r"(as_type<uint>(b)), "f"(c.x), "f"(c.y), "f"(0.0f), "f"(0.0f));        \
    return vec<float, 2>{d0, d1};                                                                                  \
  }
GPU_LANE_MULTIPLY(half, "f16")
GPU_LANE_MULTIPLY(bfloat, "bf16")
#undef GPU_LANE_MULTIPLY

template <class D, class A, class B, class C>
METAL_FUNC void simdgroup_multiply_accumulate(
    __private simdgroup_matrix<D, 8, 8>& d,
    __private simdgroup_matrix<A, 8, 8>& a,
    __private simdgroup_matrix<B, 8, 8>& b,
    __private simdgroup_matrix<C, 8, 8>& c) {
  const vec<float, 2> sum = __convert<float>(c.by_rows());
  if constexpr (is_same_v<A, B>) {
    d.set(__convert<D>(__multiply(a.by_rows(), b.by_columns(), sum)), false);
  } else {
    d.set(__convert<D>(__multiply(__convert<float>(a.by_rows()), __convert<float>(b.by_columns()), sum)), false);
  }
}

// A transposed load reads a column of the matrix from consecutive memory, which is a right operand as it should be.
template <class T, class Pointer>
METAL_FUNC void simdgroup_load(
    __private simdgroup_matrix<T, 8, 8>& d,
    Pointer source,
    ulong elements_per_row = 8,
    vec<ulong, 2> origin = 0,
    bool transpose = false) {
  const uint lane = __softmetal_lane();
  const ulong first = (origin.y + lane / 4) * elements_per_row + origin.x + lane % 4 * 2;
  const vec<T, 2> pair{source[first], source[first + 1]};
#ifdef GPU_LANE_APPLE_LAYOUT
  d.elements = __to_apple(transpose ? __transposed(pair) : pair);
#else
  d.set(pair, transpose);
#endif
}

template <class T, class Pointer>
METAL_FUNC void simdgroup_store(
    __private simdgroup_matrix<T, 8, 8>& d,
    Pointer target,
    ulong elements_per_row = 8,
    vec<ulong, 2> origin = 0,
    bool transpose = false) {
  const uint lane = __softmetal_lane();
  const vec<T, 2> pair = transpose ? d.by_columns() : d.by_rows();
  const ulong first = (origin.y + lane / 4) * elements_per_row + origin.x + lane % 4 * 2;
  target[first] = pair.x;
  target[first + 1] = pair.y;
}

}  // namespace metal
