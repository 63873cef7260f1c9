// What a CPU instruction set provides: a table of functions on raw memory. No torch types here, so that the files
// compiled for one instruction set contain nothing else that a linker could pick for another.
#pragma once

#include <cstdint>

#include "../format.h"
#include "../sampling.h"
#include "../functions.h"

namespace quantization_mlx::cpu {

enum class Real : uint8_t { float32, float16, bfloat16 };

// The first three are those of Real.
enum class ScaleType : uint8_t { float32, float16, bfloat16, e8m0, e4m3 };

// What kernels have to know of a mode: none of them asks for its name.
struct WeightFormat {
  Packing packing;
  Element element;
  int bits;
  int group_size;
  ScaleType scale_type;
  float zero;  // of column-packed weights: the code that stands for zero where none are stored

  constexpr bool is_column_packed() const { return packing == Packing::columns; }
};

// `scales`: the type of scales in modes where it is one of three.
constexpr WeightFormat weight_format(Format format, Real scales) {
  const ModeTraits traits = traits_of(format.mode);
  const ScaleType scale_type = traits.scale == Scale::e8m0 ? ScaleType::e8m0
      : traits.scale == Scale::e4m3                        ? ScaleType::e4m3
                                                           : static_cast<ScaleType>(scales);
  return {traits.packing, traits.element, format.bits, format.group_size, scale_type, traits.zero};
}

// The algorithms, named by how the rows of x are laid out for them. Column-packed weights have the first and the third.
enum class Layout : uint8_t {
  streamed,  // in the order in which the weights unpack, with the sum of each group behind it
  tiled,  // in the same order
  broadcast,  // in the order of a column's elements
  plain,  // in natural order, for row-packed weights that are not transposed
};

// Several rows of x times one quantized matrix. Lengths count elements.
struct Product {
  WeightFormat format;
  Real x_type;
  bool bfloat16;  // may multiply in bfloat16, as Kernels::bfloat16 says
  bool split;  // may split float32 and float16 into exact sums of bfloat16 values, as Kernels::split says
  int64_t K;
  int64_t N;
  const uint8_t* words;  // [N, K] packed, or [K, N] for Layout::plain and in column-packed modes
  const uint8_t* scales;
  const uint8_t* biases;  // or zeros; null in modes that have neither
  const float* x;  // packed rows
  int64_t rows;
  int64_t y_row;  // floats from one row of a result to the next; a multiple of broadcast_columns for that layout and
                  // in column-packed modes

  // Whether the code 0 stands for something else than zero.
  bool has_offset() const { return biases != nullptr || format.zero != 0.0f; }
};

// What is added to scores, or which of them count, by row of an Attention.
struct AttentionMask {
  enum class Kind : uint8_t { none, visible, added };  // visible: bytes, 0 for what is hidden

  Kind kind = Kind::none;
  Real type = Real::float32;  // of what is added
  const void* const* rows = nullptr;  // where key 0 of each row is
  int64_t stride = 0;  // elements from one key to the next
};

// How many rows one call takes, and how many keys it takes at a time at most.
constexpr int64_t attention_rows = 96;
constexpr int64_t attention_keys = 128;
constexpr int64_t least_attention_group = 32;  // of packed keys and values

// Keys or values, a row for each position; strides count elements, of packed ones words.
struct AttentionSource {
  const void* first;
  int64_t stride;
  const void* scales;  // and biases: of packed ones
  const void* biases;
  int64_t scale_stride;
};

// Queries of heads that share keys and values, against keys [begin, end). A row's result is the sum of its weights,
// exp(score - maximum), times values, yet to be divided by the sum of the weights; maximum is that of its scores, and
// the lowest finite number where it sees nothing, with sums and a result of 0. Strides count elements.
struct Attention {
  Real type;  // of keys and values or, of packed ones, of their scales and biases
  int bits;  // of packed keys and values; 0 where they are not
  int group_size;
  int64_t rows;  // 1 to attention_rows
  int64_t dim;
  int64_t value_dim;
  int64_t begin;
  int64_t end;
  const float* queries;  // [rows, dim], times the scale
  float softcap;  // scores become softcap * tanh(score / softcap); 0 for none
  AttentionSource keys;
  AttentionSource values;
  const int64_t* first;  // each row sees keys [first, last); null where it sees all
  const int64_t* last;
  AttentionMask mask;
  float* workspace;  // attention_workspace(dim, value_dim)
  float* maxima;  // [rows]
  float* sums;  // [rows]
  float* result;  // [rows, value_dim]
};

// The tokens of a row that may be drawn, as sampling.h describes them.
struct Sampling {
  uint32_t greatest;  // key
  uint32_t last;  // the least key that is kept
  uint32_t farthest;  // distance
  float scale;
};
constexpr int64_t attention_workspace(int64_t dim, int64_t value_dim) {
  const int64_t of_keys = attention_keys * (dim + value_dim + 2 * 16 + attention_rows);
  const int64_t of_scales = 2 * attention_keys * (dim + value_dim) / least_attention_group;
  return of_keys + of_scales + attention_rows * (dim + value_dim + 2) + 24 * 16;
}
// A row of gates and values; strides count elements.
struct GatedRow {
  Gate kind;
  Real type;
  const uint8_t* gates;
  const uint8_t* values;
  int64_t gates_stride;
  int64_t values_stride;
  const uint8_t* gate_bias;  // added to gates; null for none
  const uint8_t* value_bias;
  int64_t gate_bias_stride;
  int64_t value_bias_stride;
  int64_t count;
  float alpha;  // of swiglu
  float limit;  // of gates from above, of values from both sides; infinity for none
  float offset;  // added to values
  uint8_t* y;
};

// The elements of several heads that are turned by the angles of one position; strides count elements.
struct Rotation {
  Real type;
  bool traditional;  // pairs are neighbours; else they are `pairs` elements apart
  int64_t pairs;
  int64_t heads;
  const uint8_t* x;
  int64_t x_stride;
  uint8_t* y;
  int64_t y_stride;
  const float* cosines;  // of each pair or, where traditional, of each element
  const float* sines;  // likewise, and there negative for the first of a pair; both go on to whole vectors
};

// What stands between the products of a decoder.
struct DecoderKernels {
  // x / sqrt(mean(x^2) + epsilon) * weight; y may be x. All of them go on to whole vectors: x with zeros.
  void (*rms_norm)(const float* x, const float* weight, float epsilon, int64_t n, float* y);
  // (x - mean(x)) / sqrt(variance(x) + epsilon) * weight + bias, likewise.
  void (*layer_norm)(const float* x, const float* weight, const float* bias, float epsilon, int64_t n, float* y);
  // activation(gates) * (values + offset), rounded once.
  void (*gate)(const GatedRow&);
  // Of position * turns, each turns a fraction of 2^64; all of them go on to whole vectors.
  void (*angles)(const uint64_t* turns, int64_t position, int64_t pairs, float* cosines, float* sines);
  void (*rotate_heads)(const Rotation&);
  void (*attend)(const Attention&);
  // e^(x - greatest), and the sum of the n; to whole vectors, as the next two.
  float (*exponentials)(const float* x, float greatest, int64_t n, float* y);
  // 1 / (1 + e^-x)
  void (*sigmoids)(const float* x, int64_t n, float* y);
  void (*add_multiple)(const float* x, float factor, int64_t n, float* sum);
  // The greatest of the keys.
  uint32_t (*logit_keys)(const float* logits, int64_t n, uint32_t* keys);
  // The sum of the weights, of which those that are not kept are 0.
  uint64_t (*token_weights)(const uint32_t* keys, int64_t n, const Sampling&, uint32_t* weights);
};

// One way of computing products.
struct ProductKernels {
  // Whether the broadcasting product is faster than the tiled one or, of column-packed weights, than the streamed one.
  bool (*broadcast_is_faster)(const Product&);
  // Floats that one packed row of x occupies.
  int64_t (*packed_row)(const Product&, Layout);
  void (*pack_row)(const Product&, Layout, const void* row, float* packed);
  // Floats of working memory that one call needs, unless it is streamed.
  int64_t (*workspace)(const Product&);
  // For each Layout: y[m, n - begin] for begin <= n < end.
  void (*multiply[4])(const Product&, int64_t begin, int64_t end, float* workspace, float* y);
};

struct Kernels {
  const char* name;
  bool bfloat16;  // whether the machine multiplies bfloat16
  bool split;  // whether that is fast enough to split other activations
  ProductKernels exact;
  // With activations quantized to int8: streamed and broadcast, for row-packed weights whose elements are not E4M3.
  // Null where the machine lacks instructions that they need.
  const ProductKernels* int8;
  // May write zeros behind the n floats, up to a multiple of 16.
  void (*to_float32)(Real type, const void* source, int64_t n, float* destination);
  // source * factor, rounded to nearest, ties to even.
  void (*from_float32)(const float* source, float factor, int64_t n, Real type, void* destination);
  DecoderKernels decoder;
};

// The most rows that the streamed product takes; any number with column-packed weights.
constexpr int64_t max_streamed_rows = 4;

// How the caller cuts the N columns into tasks. Tiled and broadcasting products take at most max_tiled_columns, best a
// multiple of column_multiple; broadcasting ones a multiple of broadcast_columns, and plain ones of plain_columns,
// which are whole blocks of the widest vectors.
constexpr int64_t max_tiled_columns = 64;
constexpr int64_t broadcast_columns = 32;
constexpr int64_t column_multiple = 4;
constexpr int64_t plain_columns(int bits) { return unit_elements(bits) > 16 ? 512 : 256; }

// Null where the build or the machine lacks the instruction set.
const Kernels* baseline_kernels();
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();
const Kernels* amx_kernels();
const Kernels* neon_kernels();

// The best of them, or the one that QUANTIZATION_MLX_CPU names.
const Kernels& kernels();

}  // namespace quantization_mlx::cpu
