// What a plan depends on, as plain data: calls with equal facts run the same kernels with the same parameters.
#pragma once

#include <c10/core/ScalarType.h>
#include <c10/util/SmallVector.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string_view>
#include <type_traits>

#include "../problem/fast.h"
#include "../problem/image.h"
#include "../problem/problem.h"

namespace quantization_mlx::gpu {

// Matrices in a tensor; strides count elements.
struct OperandFacts {
  int64_t count;
  int64_t rows;
  int64_t matrix_stride;
  int64_t row_stride;
  int32_t element_size;  // 0 of an operand that is not given
  int32_t misalignment;  // bytes of the first element past a multiple of 16; Metal's buffers begin at such addresses

  bool is_given() const { return element_size > 0; }
};

// A batch dimension, and the distance of its positions in each operand, in matrices.
struct BatchDimension {
  int64_t size;
  int64_t x;
  int64_t w;
  int64_t y;
};

// The matrices of one launch, which steps over two batch dimensions.
struct BatchPart {
  BatchDimension outer{1, 0, 0, 0};
  BatchDimension inner{1, 0, 0, 0};
  int64_t x = 0;  // matrices before the first
  int64_t w = 0;
  int64_t y = 0;

  int64_t count() const { return outer.size * inner.size; }
};

struct ProductFacts {
  Format format;
  int32_t dtype;  // at::ScalarType of x and y
  int64_t transpose;
  int64_t M;
  int64_t K;
  int64_t N;
  int64_t pairs;  // of indices; 0 where nothing is gathered
  int64_t global_scales;  // elements; 0 without one
  int64_t gate;  // 1 + Gate where the rows of w are those of gates, then those of values, N each; else 0
  BatchPart batch;
  OperandFacts x;
  OperandFacts words;
  OperandFacts scales;
  OperandFacts biases;

  at::ScalarType scalar_type() const { return static_cast<at::ScalarType>(dtype); }
};

struct DequantizeFacts {
  Format format;
  int32_t dtype;  // of the result
  int64_t global_scales;
  OperandFacts words;
  OperandFacts scales;
  OperandFacts biases;
};

struct QuantizeFacts {
  Format format;
  int32_t dtype;  // of w
  int64_t global_scales;
  int64_t elements;
  int64_t columns;
  int64_t misalignment;
};

struct NormFacts {
  int32_t kind;  // NormProblem::Kind
  int32_t dtype;  // of all tensors
  int64_t rows;
  int64_t length;
  int64_t x_stride;
  int64_t residual_stride;
  int32_t has_residual;
  int32_t has_weight;
  int32_t has_bias;
  int32_t is_misaligned;  // whether a tensor begins elsewhere than at a multiple of 16 bytes
  int64_t epsilon;  // the bits of a double, as scale
  int64_t scale;
  int64_t has_x_weight;
};

struct RopeCacheFacts {
  int32_t dtype;  // of all tensors
  int32_t has_bias;
  int64_t has_angles_of_sequences;
  int64_t batch;
  int64_t tokens;
  int64_t query_heads;
  int64_t key_heads;
  int64_t query_norm_heads;  // that a norm is of: one, or all of them; 0 without a norm
  int64_t key_norm_heads;
  int64_t dim;
  int64_t rotated;
  int64_t capacity;
  int64_t position;
  int64_t epsilon;  // the bits of a double
};

struct SampleFacts {
  int32_t dtype;  // of logits
  int32_t is_misaligned;  // whether logits begin elsewhere than at a multiple of 16 bytes
  int64_t rows;
  int64_t vocabulary;
  int64_t row_stride;
  int64_t previous;  // tokens for each row; 0 where nothing is penalised
  int32_t has_seeds;
  int32_t has_row_seeds;
  int64_t top_k;
  int64_t top_p;
  int64_t farthest;
  int32_t scale;  // the bits of a float, as those of penalty
  int32_t penalty;
};

struct RouterFacts {
  int32_t dtype;  // of logits and weights
  int32_t scoring;  // RouterProblem::Scoring
  int64_t tokens;
  int64_t experts;
  int64_t row_stride;
  int64_t k;
  int64_t groups;
  int64_t groups_used;
  int32_t has_bias;
  int32_t chooses_by_score;
  int32_t normalise;
  int32_t scale;  // the bits of a float
};

struct CombineFacts {
  int32_t dtype;  // of y, residual and result
  int32_t has_wide_weights;  // float32 where dtype is another one
  int64_t tokens;
  int64_t k;
  int64_t length;
  int64_t y_stride;
  int64_t residual_stride;
  int64_t bias_stride;
  int64_t experts;  // rows of the bias; 0 without one
  int32_t has_residual;
  int32_t is_misaligned;  // whether a tensor begins elsewhere than at a multiple of 16 bytes
};

struct AttentionFacts {
  int64_t batch;
  int64_t query_heads;
  int64_t key_heads;
  int64_t queries;
  int64_t keys;
  int64_t dim;
  int64_t value_dim;
  int64_t q_strides[3];  // of batch, heads and positions; 0 where there is one
  int64_t k_strides[3];  // of packed ones in words
  int64_t v_strides[3];
  int64_t k_scale_strides[3];
  int64_t v_scale_strides[3];
  int64_t mask_strides[4];
  int64_t window;
  int64_t scale;  // the bits of a double, as softcap
  int64_t softcap;
  int32_t dtype;  // of all tensors but a mask of bool
  int32_t causal;
  int32_t has_window;
  int32_t has_bool_mask;
  int32_t has_added_mask;
  int32_t has_sinks;
  int32_t is_misaligned;  // whether q, k or v begins elsewhere than at a multiple of 16 bytes
  int32_t bits;  // of packed keys and values; 0 where they are not
  int32_t group_size;
  int32_t reserved;  // without gaps
};

// But for the first position, which differs from call to call.
struct RopeFacts {
  int32_t dtype;
  int32_t traditional;
  int64_t sequences;
  int64_t heads;
  int64_t length;
  int64_t width;
  int64_t pairs;
  int64_t sequence_stride;
  int64_t head_stride;
  int64_t position_stride;
  int64_t offset_stride;  // in elements
  int32_t offset_size;  // bytes of an element; 0 without offsets
  int32_t has_freqs;
  int64_t base;  // the bits of a double, as scale
  int64_t scale;
  int64_t misalignment;
};

struct GateFacts {
  int32_t kind;  // Gate
  int32_t dtype;
  int64_t rows;
  int64_t length;
  int64_t gates_row_stride;
  int64_t gates_stride;
  int64_t values_row_stride;
  int64_t values_stride;
  int64_t gate_bias_row_stride;
  int64_t gate_bias_stride;
  int64_t value_bias_row_stride;
  int64_t value_bias_stride;
  int64_t experts;  // rows of the biases; 0 without them
  int64_t alpha;  // the bits of a double, as limit and offset
  int64_t limit;
  int64_t offset;
  int64_t is_misaligned;
};

struct ImageFacts {
  int32_t dtype;  // of x
  int32_t has_statistics;
  int64_t images;
  int64_t channels;
  int64_t height;  // of x
  int64_t width;
  int64_t new_height;
  int64_t new_width;
  int64_t image_stride;
  int64_t channel_stride;
  int64_t row_stride;
  int64_t column_stride;
  int32_t cubic;
  int32_t antialias;
  int32_t channels_last;
  int32_t scale;  // the bits of a float
};

// EACH(facts), for what is there once for each kind of them.
#define QUANTIZATION_MLX_FACTS(EACH) \
  EACH(ProductFacts)                 \
  EACH(DequantizeFacts)              \
  EACH(QuantizeFacts)                \
  EACH(NormFacts)                    \
  EACH(RopeCacheFacts)               \
  EACH(SampleFacts)                  \
  EACH(RouterFacts)                  \
  EACH(CombineFacts)                 \
  EACH(AttentionFacts)               \
  EACH(RopeFacts)                    \
  EACH(GateFacts)                    \
  EACH(ImageFacts)

// Of a problem with_kernel_dtype. A product with more than two batch dimensions is several, one after the other.
c10::SmallVector<ProductFacts, 1> facts_of(const MatmulProblem& problem);
c10::SmallVector<ProductFacts, 1> facts_of(const GatherProblem& problem);
c10::SmallVector<ProductFacts, 1> facts_of(const GatedMatmulProblem& problem);
c10::SmallVector<DequantizeFacts, 1> facts_of(const DequantizeProblem& problem);
c10::SmallVector<QuantizeFacts, 1> facts_of(const QuantizeProblem& problem);
c10::SmallVector<NormFacts, 1> facts_of(const NormProblem& problem);
c10::SmallVector<RopeCacheFacts, 1> facts_of(const RopeIntoCacheProblem& problem);
c10::SmallVector<SampleFacts, 1> facts_of(const SampleProblem& problem);
c10::SmallVector<RouterFacts, 1> facts_of(const RouterProblem& problem);
c10::SmallVector<CombineFacts, 1> facts_of(const CombineProblem& problem);
c10::SmallVector<AttentionFacts, 1> facts_of(const AttentionProblem& problem);
c10::SmallVector<RopeFacts, 1> facts_of(const RopeProblem& problem);
c10::SmallVector<GateFacts, 1> facts_of(const GateProblem& problem);
c10::SmallVector<ImageFacts, 1> facts_of(const ImageProblem& problem);

// Compares and hashes plain data without gaps as bytes.
struct Bytewise {
  template <typename Data>
  size_t operator()(const Data& data) const {
    static_assert(std::has_unique_object_representations_v<Data>);
    return std::hash<std::string_view>{}({reinterpret_cast<const char*>(&data), sizeof data});
  }

  template <typename Data>
  bool operator()(const Data& a, const Data& b) const {
    static_assert(std::has_unique_object_representations_v<Data>);
    return std::memcmp(&a, &b, sizeof a) == 0;
  }
};

}  // namespace quantization_mlx::gpu
