// The arguments of the ops between products, checked: as problem.h, of which this is the second half.
#pragma once

#include <ATen/core/Tensor.h>

#include <cmath>
#include <optional>
#include <string_view>
#include <tuple>

#include "../gpu/launch.h"
#include "../functions.h"
#include "problem.h"
#include "sizes.h"

namespace quantization_mlx {

// Vectors along the last dimension of a tensor; strides count elements, and those of a vector are adjacent.
struct Vectors {
  at::Tensor tensor;
  int64_t count = 0;
  int64_t stride = 0;
};

// Every vector of x, or of a sum with residual, normalised, times weight, plus bias.
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
  at::Tensor x_weight;  // [length], contiguous: x has a norm of its own before the sum; undefined where it has none
  double scale = 1.0;  // of x in the sum

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

// The sum of scale * x, which may be normalised before, and residual, rounded to its dtype, and the RMS norm of that.
struct AddRmsNormProblem : NormProblem {
  static constexpr const char* name = "add_rms_norm";
  template <typename Result>
  using Schema = Result(
      const at::Tensor& x,
      const at::Tensor& residual,
      const std::optional<at::Tensor>& weight,
      double eps,
      const std::optional<at::Tensor>& x_weight,
      double scale);
  static Schema<AddRmsNormProblem> check;
  static Schema<std::tuple<at::Tensor, at::Tensor>> meta;
};

// What narrows the choice of a token, as kernels take it: see sampling.h.
struct SampleRules {
  float scale;  // of distances; 0 for the most probable token
  float penalty;  // 1 for none
  int64_t top_k;  // 0 for all
  int64_t top_p;  // in 2^-32; 2^32 for all
  int64_t farthest;  // the greatest distance that min_p leaves
};

// A token for every row of logits.
struct SampleProblem {
  Vectors logits;
  at::Tensor seeds;  // int64, contiguous: one, or one for each row; undefined where `seed` is it
  bool has_row_seeds;  // then the number of a row is 0, and its token the same in any batch
  at::Tensor previous;  // int64 [rows, any number], contiguous; undefined where nothing is penalised
  int64_t seed;
  int64_t offset;
  SampleRules rules;
  int64_t vocabulary;
  Sizes<int64_t> output;

  at::Device device() const { return logits.tensor.device(); }
  int64_t previous_count() const { return previous.defined() ? previous.size(-1) : 0; }

  static constexpr const char* name = "sample";
  // The numbers that differ from call to call are symbols to a tracing compiler.
  template <typename Result, typename Int>
  using Schema = Result(
      const at::Tensor& logits,
      const std::optional<at::Tensor>& seeds,
      Int seed,
      Int offset,
      double temperature,
      int64_t top_k,
      double top_p,
      double min_p,
      double repetition_penalty,
      const std::optional<at::Tensor>& previous);
  static Schema<SampleProblem, int64_t> check;
  static Schema<at::Tensor, c10::SymInt> meta;
};

// The k experts of every token, the best first, and their weights.
struct RouterProblem {
  enum class Scoring : uint8_t {
    softmax = ROUTER_SOFTMAX,
    sigmoid = ROUTER_SIGMOID,
    softmax_of_selected = ROUTER_SOFTMAX_OF_SELECTED,
  };

  Vectors logits;
  at::Tensor bias;  // float32 [experts], contiguous; undefined for 0
  Scoring scoring;
  int64_t experts;
  int64_t k;
  int64_t groups;
  int64_t groups_used;
  bool normalise;
  float scale;
  Sizes<int64_t> output;

  at::Device device() const { return logits.tensor.device(); }
  // Else logits are in the same order.
  bool chooses_by_score() const { return bias.defined() || groups > 1; }

  static constexpr const char* name = "moe_router";
  template <typename Result>
  using Schema = Result(
      const at::Tensor& logits,
      int64_t k,
      std::string_view scoring,
      const std::optional<at::Tensor>& bias,
      int64_t groups,
      int64_t groups_used,
      bool normalise,
      double scale);
  static Schema<RouterProblem> check;
  static Schema<std::tuple<at::Tensor, at::Tensor>> meta;
};

// The weighted sum of k results for each token, to which their experts' biases are added, and a residual.
struct CombineProblem {
  Vectors y;  // k for each token; of the result's dtype, as the residual and the bias
  at::Tensor weights;  // contiguous, of that dtype or float32
  Vectors residual;  // an undefined tensor where nothing is added
  Vectors bias;  // one for each expert; or undefined
  at::Tensor experts;  // int64 [tokens * k], contiguous; undefined without a bias
  int64_t k;
  int64_t length;
  Sizes<int64_t> output;

  at::Device device() const { return y.tensor.device(); }
  int64_t tokens() const { return product<int64_t>(c10::ArrayRef<int64_t>(output).slice(0, output.size() - 1)); }

  static constexpr const char* name = "moe_combine";
  template <typename Result>
  using Schema = Result(
      const at::Tensor& y,
      const at::Tensor& weights,
      const std::optional<at::Tensor>& residual,
      const std::optional<at::Tensor>& bias,
      const std::optional<at::Tensor>& experts);
  static Schema<CombineProblem> check;
  static Schema<at::Tensor> meta;
};

inline std::string_view op_of(const NormProblem& problem) { return problem.op; }
inline std::string_view op_of(const SampleProblem& problem) { return problem.name; }
inline std::string_view op_of(const RouterProblem& problem) { return problem.name; }
inline std::string_view op_of(const CombineProblem& problem) { return problem.name; }

// The two results of moe_router, uninitialised: indices and weights.
std::tuple<at::Tensor, at::Tensor> empty_routed(const RouterProblem& problem);

// The vectors of a tensor, promoted to this dtype: copied only where they are not adjacent elements at one distance.
Vectors vectors_of(const at::Tensor& given, at::ScalarType dtype);

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
  at::Tensor query_norm;  // [dim] or, for one norm of all its heads, [query_heads * dim], contiguous; or undefined
  at::Tensor key_norm;  // [dim] or [key_heads * dim], likewise
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
  // That a norm is of: one or all of them; 0 without a norm.
  int64_t query_norm_heads() const { return query_norm.defined() ? query_norm.numel() / dim() : 0; }
  int64_t key_norm_heads() const { return key_norm.defined() ? key_norm.numel() / dim() : 0; }
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
  // That of long doubles: std::pow of doubles wants a newer glibc than Hub builds may have.
  const long double power = -static_cast<long double>(int64_t{1} << bit) / static_cast<long double>(pairs);
  return static_cast<double>(std::pow(static_cast<long double>(base), power));
}

// Rows of elements; strides count elements.
struct StridedRows {
  at::Tensor tensor;
  int64_t row_stride = 0;
  int64_t stride = 1;
};

// activation(gates) * (values + offset) for `rows` rows of `length` elements, to which biases are added before.
struct GateProblem {
  std::string_view op;
  Gate kind;
  StridedRows gates;  // of the result's dtype, as values and biases
  StridedRows values;
  StridedRows gate_bias;  // a row for each expert; an undefined tensor where there are none
  StridedRows value_bias;
  at::Tensor experts;  // int64 [rows], contiguous: of which expert each row is; undefined without biases
  double alpha;
  double limit;  // of gates from above, of values from both sides; infinity for none
  double offset;
  int64_t rows;
  int64_t length;
  Sizes<int64_t> output;

  at::Device device() const { return gates.tensor.device(); }
  bool is_empty() const { return rows == 0 || length == 0; }
  int64_t expert_count() const { return experts.defined() ? gate_bias.tensor.size(0) : 0; }
};

struct SwigluProblem : GateProblem {
  static constexpr const char* name = "swiglu";
  template <typename Result>
  using Schema = Result(
      const at::Tensor& gates,
      const at::Tensor& values,
      double alpha,
      std::optional<double> limit,
      double offset,
      const std::optional<at::Tensor>& gate_bias,
      const std::optional<at::Tensor>& value_bias,
      const std::optional<at::Tensor>& experts);
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

// Those of a gated product, by Gate.
inline constexpr const char* activations[] = {"silu", "gelu", "gelu_tanh"};

// activation(gates) * values of gates and values that are the halves of x @ dequantize(w).T.
struct GatedMatmulProblem {
  MatmulProblem matmul;  // of both halves
  Gate kind;

  at::Device device() const { return matmul.device(); }
  int64_t length() const { return matmul.shape.N / 2; }
  Sizes<int64_t> output() const;
  // What is left where `both` [..., N] is there.
  GateProblem of_product(const at::Tensor& both) const;

  static constexpr const char* name = "quantized_gated_matmul";
  template <typename Result>
  using Schema = Result(
      const at::Tensor& x,
      const at::Tensor& w,
      const at::Tensor& scales,
      const std::optional<at::Tensor>& biases,
      std::optional<int64_t> group_size,
      std::optional<int64_t> bits,
      std::string_view mode,
      std::string_view activation,
      const std::optional<at::Tensor>& global_scale);
  static Schema<GatedMatmulProblem> check;
  static Schema<at::Tensor> meta;
};

inline std::string_view op_of(const GatedMatmulProblem& problem) { return problem.name; }

// Keys or values [batch, heads, positions, dim]; what a position has of a head lies side by side.
struct KeyHeads {
  at::Tensor tensor;  // elements of the result's dtype, or packed words of 32 bits
  at::Tensor scales;  // [batch, heads, positions, dim / group_size]; undefined where nothing is packed
  at::Tensor biases;  // with the strides of scales
  int64_t dim = 0;
};

// softmax(scale * q @ k.T + mask) @ v, the heads of q sharing those of k and v.
struct AttentionProblem {
  static constexpr const char* name = "scaled_dot_product_attention";
  static constexpr int64_t most_dim = 576;  // DeepSeek's latent attention has these two
  static constexpr int64_t most_value_dim = 512;
  // causal: query i sees keys up to keys - queries + i, and with a window only that many of them.
  template <typename Result>
  using Schema = Result(
      const at::Tensor& q,
      const at::Tensor& k,
      const at::Tensor& v,
      double scale,
      const std::optional<at::Tensor>& mask,
      bool causal,
      const std::optional<at::Tensor>& sinks,
      std::optional<int64_t> window,
      std::optional<double> softcap);
  static Schema<AttentionProblem> check;
  static Schema<at::Tensor> meta;

  std::string_view op;
  // All of the result's dtype but for packed words and a mask of bool; the elements of a head of q are side by side.
  at::Tensor q;  // [batch, query heads, queries, dim]
  KeyHeads k;
  KeyHeads v;
  at::Tensor mask;  // [batch, query heads, queries, keys], of any strides; undefined where there is none
  at::Tensor sinks;  // [query heads], contiguous; or undefined
  double scale;
  bool causal;
  std::optional<int64_t> window;
  double softcap = 0.0;  // scores become softcap * tanh(score / softcap) before the mask; 0 for none
  int bits = 0;  // of packed keys and values; 0 where they are not
  int group_size = 0;

  at::Device device() const { return q.device(); }
  int64_t batch() const { return q.size(0); }
  int64_t query_heads() const { return q.size(1); }
  int64_t key_heads() const { return k.tensor.size(1); }
  int64_t queries() const { return q.size(2); }
  int64_t keys() const { return k.tensor.size(2); }
  int64_t dim() const { return k.dim; }
  int64_t value_dim() const { return v.dim; }
  bool is_packed() const { return bits != 0; }
  Sizes<int64_t> output() const { return {batch(), query_heads(), queries(), value_dim()}; }
  bool is_empty() const { return batch() == 0 || queries() == 0 || keys() == 0; }  // the result is zeros
};

// The same of keys and values in the affine format, of 4 or 8 bits.
struct QuantizedAttentionProblem : AttentionProblem {
  static constexpr const char* name = "quantized_scaled_dot_product_attention";
  template <typename Result>
  using Schema = Result(
      const at::Tensor& q,
      const at::Tensor& k,
      const at::Tensor& k_scales,
      const at::Tensor& k_biases,
      const at::Tensor& v,
      const at::Tensor& v_scales,
      const at::Tensor& v_biases,
      double scale,
      const std::optional<at::Tensor>& mask,
      bool causal,
      const std::optional<at::Tensor>& sinks,
      std::optional<int64_t> window,
      int64_t group_size,
      int64_t bits);
  static Schema<QuantizedAttentionProblem> check;
  static Schema<at::Tensor> meta;
};

inline std::string_view op_of(const AttentionProblem& problem) { return problem.op; }

}  // namespace quantization_mlx
