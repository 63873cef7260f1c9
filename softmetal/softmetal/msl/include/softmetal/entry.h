// What the generated entry points use to turn bindings and grid positions into a kernel's arguments.
#pragma once

template <class F>
struct __softmetal_signature;
template <int I, class A, class... Rest>
struct __softmetal_nth {
  typedef typename __softmetal_nth<I - 1, Rest...>::type type;
};
template <class A, class... Rest>
struct __softmetal_nth<0, A, Rest...> {
  typedef A type;
};
template <class... A>
struct __softmetal_signature<void(A...)> {
  template <int I>
  using argument = typename __softmetal_nth<I, A...>::type;
};

template <class T>
struct __softmetal_pointer;
#define SOFTMETAL_SPACE(SPACE)                                        \
  template <class T>                                                  \
  struct __softmetal_pointer<SPACE T*> {                              \
    static SPACE T* get(ulong address) { return (SPACE T*)address; }  \
  };                                                                  \
  template <class T>                                                  \
  struct __softmetal_pointer<SPACE T&> {                              \
    static SPACE T& get(ulong address) { return *(SPACE T*)address; } \
  };
SOFTMETAL_SPACE(__global)
SOFTMETAL_SPACE(__constant)
SOFTMETAL_SPACE(__local)
#undef SOFTMETAL_SPACE

template <class T>
struct __softmetal_position {
  static T get(int which) {
    typedef typename metal::__shape<T>::element Element;
    constexpr int size = metal::__shape<T>::size;
    static_assert(metal::is_integral_v<Element>, "a grid position is ushort or uint");
    T value;
    if constexpr (size == 1) {
      value = static_cast<T>(__softmetal_builtin(which, 0));
    } else {
      for (int i = 0; i < size; i++) {
        value[i] = static_cast<Element>(__softmetal_builtin(which, i));
      }
    }
    return value;
  }
};
