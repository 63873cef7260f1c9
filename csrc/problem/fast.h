// The arguments of the ops between products, checked: as problem.h, of which this is the second half.
#pragma once

#include <ATen/core/Tensor.h>

#include <cmath>
#include <optional>
#include <string_view>
#include <tuple>

#include "../functions.h"
#include "sizes.h"

namespace quantization_mlx {

// Vectors along the last dimension of a tensor; strides count elements, and those of a vector are adjacent.
struct Vectors {
  at::Tensor tensor;
  int64_t count = 0;
  int64_t stride = 0;
};

// Every vector of x, or of x + residual, normalised, times weight, plus bias.
struct NormProblem {
  enum class Kind : uint8_t { rms, layer };

  std::string_view op;
  Kind kind;
  Vectors x;  // of the result's dtype, as all tensors
  Vectors residual;  // an undefined tensor where nothing is added
  at::Tensor weight;  // [length], contiguous; undefined for 1
  at::Tensor bias;  // [length], contiguous; undefined for 0
  double epsilon;
  int64_t length;
  Sizes<int64_t> output;

  at::Device device() const { return x.tensor.device(); }
  bool is_empty() const { return x.count == 0 || length == 0; }
};

struct RmsNormProblem : NormProblem {
  static constexpr const char* name = "rms_norm";
  template <typename Result>
  using Schema = Result(const at::Tensor& x, const std::optional<at::Tensor>& weight, double eps);
  static Schema<RmsNormProblem> check;
  static Schema<at::Tensor> meta;
};

struct LayerNormProblem : NormProblem {
  static constexpr const char* name = "layer_norm";
  template <typename Result>
  using Schema = Result(
      const at::Tensor& x,
      const std::optional<at::Tensor>& weight,
      const std::optional<at::Tensor>& bias,
      double eps);
  static Schema<LayerNormProblem> check;
  static Schema<at::Tensor> meta;
};

// The sum, rounded to its dtype, and the RMS norm of that.
struct AddRmsNormProblem : NormProblem {
  static constexpr const char* name = "add_rms_norm";
  template <typename Result>
  using Schema =
      Result(const at::Tensor& x, const at::Tensor& residual, const std::optional<at::Tensor>& weight, double eps);
  static Schema<AddRmsNormProblem> check;
  static Schema<std::tuple<at::Tensor, at::Tensor>> meta;
};

inline std::string_view op_of(const NormProblem& problem) { return problem.op; }

// Queries, keys and values of new tokens, side by side in x: a bias is added, queries and keys are normalised and
// turned, keys and values go into a cache, and queries are returned.
struct RopeIntoCacheProblem {
  static constexpr const char* name = "rope_into_cache";
  template <typename Result, typename Int>
  using Schema = Result(
      const at::Tensor& x,
      const std::optional<at::Tensor>& cosines,
      const std::optional<at::Tensor>& sines,
      const at::Tensor& keys,
      const at::Tensor& values,
      Int position,
      const std::optional<at::Tensor>& bias,
      const std::optional<at::Tensor>& query_norm,
      const std::optional<at::Tensor>& key_norm,
      double eps);
  static Schema<RopeIntoCacheProblem, int64_t> check;
  static Schema<at::Tensor, c10::SymInt> meta;

  // All of one dtype; those that may be undefined are not given.
  at::Tensor x;  // [batch, tokens, (query_heads + 2 * key_heads) * dim], contiguous
  at::Tensor cosines;  // [1 or batch, tokens, rotated], contiguous; or undefined
  at::Tensor sines;
  at::Tensor keys;  // [batch, key_heads, capacity, dim], contiguous
  at::Tensor values;  // likewise
  at::Tensor bias;  // [(query_heads + 2 * key_heads) * dim], contiguous; or undefined
  at::Tensor query_norm;  // [dim], contiguous; or undefined
  at::Tensor key_norm;
  int64_t position;  // of the first token in the cache
  double epsilon;
  int64_t query_heads;

  at::Device device() const { return x.device(); }
  int64_t batch() const { return keys.size(0); }
  int64_t tokens() const { return x.size(1); }
  int64_t key_heads() const { return keys.size(1); }
  int64_t capacity() const { return keys.size(2); }
  int64_t dim() const { return keys.size(3); }
  int64_t heads() const { return query_heads + 2 * key_heads(); }
  int64_t rotated() const { return cosines.defined() ? cosines.size(-1) : 0; }
  bool has_angles_of_sequences() const { return cosines.defined() && cosines.size(0) > 1; }
  Sizes<int64_t> output() const { return {batch(), query_heads, tokens(), dim()}; }
};

inline std::string_view op_of(const RopeIntoCacheProblem&) { return RopeIntoCacheProblem::name; }
// x [sequences, heads, length, width] with the first `dims` elements of each vector turned, in pairs, by angles that
// grow with the position; what lies between the first and the last two dimensions of a tensor counts as heads.
struct RopeProblem {
  static constexpr const char* name = "rope";
  template <typename Result, typename Int>
  using Schema = Result(
      const at::Tensor& x,
      int64_t dims,
      bool traditional,
      std::optional<double> base,
      double scale,
      Int offset,
      const std::optional<at::Tensor>& offsets,
      const std::optional<at::Tensor>& freqs);
  static Schema<RopeProblem, int64_t> check;
  static Schema<at::Tensor, c10::SymInt> meta;

  at::Tensor x;  // elements of a vector are adjacent
  int64_t sequences;
  int64_t heads;
  int64_t length;
  int64_t width;
  int64_t sequence_stride;  // of x, in elements
  int64_t head_stride;
  int64_t position_stride;
  int64_t dims;
  bool traditional;  // pairs are neighbours; else they are half of dims apart
  double base;  // where freqs are undefined
  double scale;
  int64_t offset;  // the position of the first vector of a sequence, added to what is in offsets
  at::Tensor offsets;  // int32 or int64, [1] or [sequences] with any stride; undefined for 0
  at::Tensor freqs;  // float32 [dims / 2], contiguous: the inverse of what the pairs turn by for each position
  Sizes<int64_t> output;

  int64_t pairs() const { return dims / 2; }
  int64_t offset_stride() const { return offsets.defined() && offsets.numel() > 1 ? offsets.stride(0) : 0; }
  at::Device device() const { return x.device(); }
  bool is_empty() const { return sequences == 0 || heads == 0 || length == 0; }
};

inline std::string_view op_of(const RopeProblem&) { return RopeProblem::name; }

// Pair i turns by base^(-i / pairs) radians for each unit of a position: the product of these for the bits of i.
inline double rope_power(double base, int64_t pairs, int bit) {
  return std::pow(base, -static_cast<double>(int64_t{1} << bit) / static_cast<double>(pairs));
}

// Rows of elements; strides count elements.
struct StridedRows {
  at::Tensor tensor;
  int64_t row_stride = 0;
  int64_t stride = 1;
};

// activation(gates) * (values + offset) for `rows` rows of `length` elements.
struct GateProblem {
  std::string_view op;
  Gate kind;
  StridedRows gates;  // of the result's dtype, as values
  StridedRows values;
  double alpha;
  double limit;  // of gates from above, of values from both sides; infinity for none
  double offset;
  int64_t rows;
  int64_t length;
  Sizes<int64_t> output;

  at::Device device() const { return gates.tensor.device(); }
  bool is_empty() const { return rows == 0 || length == 0; }
};

struct SwigluProblem : GateProblem {
  static constexpr const char* name = "swiglu";
  template <typename Result>
  using Schema = Result(
      const at::Tensor& gates,
      const at::Tensor& values,
      double alpha,
      std::optional<double> limit,
      double offset);
  static Schema<SwigluProblem> check;
  static Schema<at::Tensor> meta;
};

struct GegluProblem : GateProblem {
  static constexpr const char* name = "geglu";
  template <typename Result>
  using Schema = Result(const at::Tensor& gates, const at::Tensor& values, std::string_view approximate);
  static Schema<GegluProblem> check;
  static Schema<at::Tensor> meta;
};

inline std::string_view op_of(const GateProblem& problem) { return problem.op; }

}  // namespace quantization_mlx
