// The matrices of 2 to 4 columns of 2 to 4 components, and the log, which goes nowhere.
#pragma once

namespace metal {

template <class T, int C, int R>
struct matrix {
  static_assert(is_floating_point_v<T>, "matrices are of float or half");
  vec<T, R> columns[C];

  matrix() = default;
  METAL_FUNC explicit matrix(T diagonal) {
    for (int i = 0; i < C; i++) {
      columns[i] = vec<T, R>(0);
      if (i < R) {
        columns[i][i] = diagonal;
      }
    }
  }
  template <class... Columns>
  METAL_FUNC explicit matrix(vec<T, R> first, vec<T, R> second, Columns... rest) : columns{first, second, rest...} {
    static_assert(sizeof...(Columns) + 2 == C, "give all columns");
  }
  template <class S>
  METAL_FUNC explicit matrix(matrix<S, C, R> other) {
    for (int i = 0; i < C; i++) {
      for (int j = 0; j < R; j++) {
        columns[i][j] = __softmetal_cast<T>(other.columns[i][j]);
      }
    }
  }

  METAL_FUNC vec<T, R> operator[](int i) const { return columns[i]; }
  METAL_FUNC vec<T, R> operator[](int i) const __constant { return columns[i]; }
  METAL_FUNC __private vec<T, R>& operator[](int i) __private { return columns[i]; }
  METAL_FUNC __global vec<T, R>& operator[](int i) __global { return columns[i]; }
  METAL_FUNC __local vec<T, R>& operator[](int i) __local { return columns[i]; }
};

template <class T, int C, int R>
METAL_FUNC vec<T, R> operator*(matrix<T, C, R> m, vec<T, C> v) {
  vec<T, R> result = m.columns[0] * v[0];
  for (int i = 1; i < C; i++) {
    result += m.columns[i] * v[i];
  }
  return result;
}
template <class T, int C, int R>
METAL_FUNC vec<T, C> operator*(vec<T, R> v, matrix<T, C, R> m) {
  vec<T, C> result;
  for (int i = 0; i < C; i++) {
    result[i] = dot(v, m.columns[i]);
  }
  return result;
}
template <class T, int C, int R, int K>
METAL_FUNC matrix<T, C, R> operator*(matrix<T, K, R> a, matrix<T, C, K> b) {
  matrix<T, C, R> result;
  for (int i = 0; i < C; i++) {
    result.columns[i] = a * b.columns[i];
  }
  return result;
}
template <class T, int C, int R>
METAL_FUNC matrix<T, C, R> operator*(matrix<T, C, R> a, decltype(T()) b) {
  for (int i = 0; i < C; i++) {
    a.columns[i] *= b;
  }
  return a;
}
template <class T, int C, int R>
METAL_FUNC matrix<T, C, R> operator*(decltype(T()) a, matrix<T, C, R> b) {
  return b * a;
}
template <class T, int C, int R>
METAL_FUNC matrix<T, C, R> operator+(matrix<T, C, R> a, matrix<T, C, R> b) {
  for (int i = 0; i < C; i++) {
    a.columns[i] += b.columns[i];
  }
  return a;
}
template <class T, int C, int R>
METAL_FUNC matrix<T, C, R> operator-(matrix<T, C, R> a, matrix<T, C, R> b) {
  for (int i = 0; i < C; i++) {
    a.columns[i] -= b.columns[i];
  }
  return a;
}
template <class T, int C, int R>
METAL_FUNC __private matrix<T, C, R>& operator+=(__private matrix<T, C, R>& a, matrix<T, C, R> b) {
  return a = a + b;
}
template <class T, int C, int R>
METAL_FUNC __private matrix<T, C, R>& operator*=(__private matrix<T, C, R>& a, decltype(T()) b) {
  return a = a * b;
}
template <class T, int C, int R>
METAL_FUNC matrix<T, R, C> transpose(matrix<T, C, R> m) {
  matrix<T, R, C> result;
  for (int i = 0; i < R; i++) {
    for (int j = 0; j < C; j++) {
      result.columns[i][j] = m.columns[j][i];
    }
  }
  return result;
}

struct os_log {
  constexpr os_log(__constant const char*, __constant const char*) {}
  constexpr os_log(__constant const char*, __constant const char*) __constant {}
#define SOFTMETAL_LOG(NAME)                                   \
  template <class... A>                                       \
  METAL_FUNC void NAME(__constant const char*, A...) const {} \
  template <class... A>                                       \
  METAL_FUNC void NAME(__constant const char*, A...) const __constant {}
  SOFTMETAL_LOG(log)
  SOFTMETAL_LOG(log_debug)
  SOFTMETAL_LOG(log_info)
  SOFTMETAL_LOG(log_error)
  SOFTMETAL_LOG(log_fault)
#undef SOFTMETAL_LOG
};

}  // namespace metal

#define SOFTMETAL_MATRICES(T)            \
  typedef metal::matrix<T, 2, 2> T##2x2; \
  typedef metal::matrix<T, 2, 3> T##2x3; \
  typedef metal::matrix<T, 2, 4> T##2x4; \
  typedef metal::matrix<T, 3, 2> T##3x2; \
  typedef metal::matrix<T, 3, 3> T##3x3; \
  typedef metal::matrix<T, 3, 4> T##3x4; \
  typedef metal::matrix<T, 4, 2> T##4x2; \
  typedef metal::matrix<T, 4, 3> T##4x3; \
  typedef metal::matrix<T, 4, 4> T##4x4;
SOFTMETAL_MATRICES(float)
SOFTMETAL_MATRICES(half)
#undef SOFTMETAL_MATRICES
