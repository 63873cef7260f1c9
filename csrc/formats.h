// The modes of quantized matrices, one row each: no other place lists modes, group sizes or widths.
//
// The rows are macro calls, because C++, Metal's language and the preprocessor (which instantiates kernels from them)
// read the same ones. Python reads them through the op `_modes`.
#pragma once

namespace quantization_mlx {

// Lists of numbers in the same form: EACH(number, ...) for every one of them.
#define QUANTIZATION_MLX_2(EACH, ...) EACH(2, __VA_ARGS__)
#define QUANTIZATION_MLX_4(EACH, ...) EACH(4, __VA_ARGS__)
#define QUANTIZATION_MLX_8(EACH, ...) EACH(8, __VA_ARGS__)
#define QUANTIZATION_MLX_16(EACH, ...) EACH(16, __VA_ARGS__)
#define QUANTIZATION_MLX_32(EACH, ...) EACH(32, __VA_ARGS__)
#define QUANTIZATION_MLX_32_64_128(EACH, ...) EACH(32, __VA_ARGS__) EACH(64, __VA_ARGS__) EACH(128, __VA_ARGS__)

// clang-format off
#define QUANTIZATION_MLX_INTEGER_WIDTHS(EACH, ...)                                    \
  EACH(1, __VA_ARGS__) EACH(2, __VA_ARGS__) EACH(3, __VA_ARGS__) EACH(4, __VA_ARGS__) \
  EACH(5, __VA_ARGS__) EACH(6, __VA_ARGS__) EACH(8, __VA_ARGS__)

// ROW(name, packing, element, scale, offset, zero, group sizes, widths, default group size, default bits, ...)
#define QUANTIZATION_MLX_MODES(ROW, ...)                                                                     \
  ROW(affine,          rows,    integer, real,    biases, 0.0f, 32_64_128, INTEGER_WIDTHS, 64,  4, __VA_ARGS__) \
  ROW(mxfp4,           rows,    e2m1,    e8m0,    none,   0.0f, 32,        4,              32,  4, __VA_ARGS__) \
  ROW(mxfp8,           rows,    e4m3,    e8m0,    none,   0.0f, 32,        8,              32,  8, __VA_ARGS__) \
  ROW(nvfp4,           rows,    e2m1,    e4m3,    none,   0.0f, 16,        4,              16,  4, __VA_ARGS__) \
  ROW(marlin_fp4,      columns, e2m1,    float16, none,   0.0f, 32_64_128, 4,              128, 4, __VA_ARGS__) \
  ROW(marlin_fp8,      columns, e4m3,    float16, none,   0.0f, 32_64_128, 8,              128, 8, __VA_ARGS__) \
  ROW(marlin_int2,     columns, integer, float16, none,   1.5f, 32_64_128, 2,              128, 2, __VA_ARGS__) \
  ROW(marlin_int4,     columns, integer, float16, zeros,  0.0f, 32_64_128, 4,              128, 4, __VA_ARGS__) \
  ROW(marlin_int4_sym, columns, integer, float16, none,   8.0f, 32_64_128, 4,              128, 4, __VA_ARGS__)
// clang-format on

// Along what the codes of a word and the groups run: see "Packing" in format.h.
enum class Packing : int { rows, columns };
// What a code stands for before it is scaled: itself, or a small floating-point number.
enum class Element : int { integer, e2m1, e4m3 };
// The type of scales; real: any of float32, float16 and bfloat16.
enum class Scale : int { real, float16, e8m0, e4m3 };
// What each group has beside its scale.
enum class Offset : int { none, biases, zeros };

enum class Mode : int {
#define QUANTIZATION_MLX_NAME(name, ...) name,
  QUANTIZATION_MLX_MODES(QUANTIZATION_MLX_NAME, )
#undef QUANTIZATION_MLX_NAME
};

inline constexpr int mode_count() {
#define QUANTIZATION_MLX_ONE(...) +1
  return 0 QUANTIZATION_MLX_MODES(QUANTIZATION_MLX_ONE, );
#undef QUANTIZATION_MLX_ONE
}

// A code stands for (element - zero) * scale + bias.
struct ModeTraits {
  Packing packing;
  Element element;
  Scale scale;
  Offset offset;
  float zero;  // of every group, where no zeros are stored
  int group_sizes;  // their sum: all are powers of two
  int widths;  // the sum of 1 << bits
  int default_group_size;
  int default_bits;
};

// A chain of conditions, since constexpr functions of shaders index no tables.
inline constexpr ModeTraits traits_of(Mode mode) {
  // clang-format off
#define QUANTIZATION_MLX_OR_SIZE(size, ...) | size
#define QUANTIZATION_MLX_OR_WIDTH(bits, ...) | 1 << bits
#define QUANTIZATION_MLX_IF(name, packing, element, scale, offset, zero, sizes, widths, default_size, default_bits, ...) \
  mode == Mode::name ? ModeTraits{                                                                                       \
      Packing::packing, Element::element, Scale::scale, Offset::offset, zero,                                            \
      0 QUANTIZATION_MLX_##sizes(QUANTIZATION_MLX_OR_SIZE, ), 0 QUANTIZATION_MLX_##widths(QUANTIZATION_MLX_OR_WIDTH, ),  \
      default_size, default_bits} :
  return QUANTIZATION_MLX_MODES(QUANTIZATION_MLX_IF, ) ModeTraits{};
#undef QUANTIZATION_MLX_IF
#undef QUANTIZATION_MLX_OR_WIDTH
#undef QUANTIZATION_MLX_OR_SIZE
  // clang-format on
}

}  // namespace quantization_mlx
