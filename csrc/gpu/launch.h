// What the host and the Metal shaders agree on for a launch: parameter structs, function constants and tile sizes.
// Valid C++ and valid MSL; every struct has the same layout in both, with the 64-bit fields first.
#pragma once

#ifdef __METAL_VERSION__
#include <metal_stdlib>
#else
#include <cstdint>
#endif

// Function constants, all bool. Macros, because MSL wants literals as their indices.
#define QUANTIZATION_MLX_ALIGNED_OUTPUTS 0  // N is a multiple of the columns of one threadgroup
#define QUANTIZATION_MLX_ALIGNED_WEIGHTS 1  // every run of packed weights starts at a multiple of its load width
#define QUANTIZATION_MLX_ALIGNED_X 2  // every row of x starts at a multiple of 16 bytes
#define QUANTIZATION_MLX_ALIGNED_K 3  // every part of K is a multiple of a tile's depth
#define QUANTIZATION_MLX_HAS_GLOBAL_SCALE 4  // nvfp4 with a global scale
#define QUANTIZATION_MLX_HAS_WEIGHT 5  // norms: those that are given
#define QUANTIZATION_MLX_HAS_BIAS 6
#define QUANTIZATION_MLX_HAS_RESIDUAL 7
#define QUANTIZATION_MLX_HAS_QUERY_NORM 8  // rope_into_cache
#define QUANTIZATION_MLX_HAS_KEY_NORM 9
#define QUANTIZATION_MLX_HAS_ANGLES 10
#define QUANTIZATION_MLX_HAS_SEEDS 11  // sample: those that are given
#define QUANTIZATION_MLX_HAS_PREVIOUS 12
#define QUANTIZATION_MLX_CAUSAL 13  // attention: queries see no later keys
#define QUANTIZATION_MLX_HAS_BOOL_MASK 14
#define QUANTIZATION_MLX_HAS_ADDED_MASK 15
#define QUANTIZATION_MLX_HAS_SINKS 16
#define QUANTIZATION_MLX_SPLIT_KEYS 17  // parts of the keys are put together by another launch
#define QUANTIZATION_MLX_HAS_OFFSETS 18  // rope
#define QUANTIZATION_MLX_HAS_FREQS 19
#define QUANTIZATION_MLX_PACKED_KEYS 20  // attention: keys and values are codes with scales and biases
#define QUANTIZATION_MLX_EIGHT_BITS 21  // of these codes; else four
#define QUANTIZATION_MLX_IS_GATED 22  // matvec: rows of w are gates, then values
#define QUANTIZATION_MLX_HAS_X_WEIGHT 23  // norms: x has one of its own before it is added
#define QUANTIZATION_MLX_WHOLE_HEADS 24  // attention: every lane has elements of each head
#define QUANTIZATION_MLX_CONSTANTS 25  // how many there are

// How moe_router scores experts.
#define ROUTER_SOFTMAX 0
#define ROUTER_SIGMOID 1
#define ROUTER_SOFTMAX_OF_SELECTED 2

namespace quantization_mlx {

// --- Sizes that the shaders are written for and the plans count with ------------------------------------------------

// qmv. Of a simdgroup, 16 lanes lie along K and two across; qmv_outputs: rows of w to a lane.
inline constexpr int qmv_simdgroups() { return 4; }
inline constexpr int qmv_lanes_across() { return 2; }
inline constexpr int qmv_lanes_along() { return 32 / qmv_lanes_across(); }
inline constexpr int qmv_outputs() { return 4; }
inline constexpr int qmv_simdgroup_columns() { return qmv_lanes_across() * qmv_outputs(); }

// A lane's step along K, in elements: a whole run, in the widest loads, for few rows of half; half of one for more
// rows, which keeps the code of a step short, for groups of 16, so that a lane needs one scale, and for x in float32,
// of which sixteen lanes would load 2 KiB at once.
inline constexpr int qmv_elements(int rows, int group_size, int element_size) {
  return rows <= 3 && group_size >= 32 && element_size == 2 ? 32 : 16;
}

// Steps that the lanes of `along` simdgroups, 1, 2 or 4, have time for while they take these, together.
inline constexpr int qmv_capacity(int steps, int along) {
  return (steps + along * qmv_lanes_along() - 1) & -(along * qmv_lanes_along());
}

// Of y, from which on half as many threadgroups still fill a GPU.
inline constexpr int qmv_many_columns() { return 16384; }

// The simdgroups of a threadgroup that divide K, of `steps` steps; the others compute other columns of y, n of them in
// all. All simdgroups, for the most loads in flight, unless a quarter of the lanes or more would be idle, and are not
// with fewer. Where a lane has one step, and columns are many, half of them: what comes before and after the steps is a
// third of the work then, and is done half as often.
inline constexpr int qmv_simdgroups_along(int steps, int n) {
  int along = qmv_simdgroups();
  while (along > 1 && 4 * steps <= 3 * qmv_capacity(steps, along) &&
         qmv_capacity(steps, along / 2) < qmv_capacity(steps, along)) {
    along /= 2;
  }
  const bool halves = along > 1 && steps <= along * qmv_lanes_along() && n >= qmv_many_columns();
  return halves ? along / 2 : along;
}

// Of simdgroups along K: 1, 2 or 4. Shifts instead of divisions, which shaders would do at run time.
inline constexpr int qmv_log2(int along) { return along / 2; }

// Of y, to a threadgroup.
inline constexpr int qmv_columns(int along) { return qmv_simdgroup_columns() * qmv_simdgroups() >> qmv_log2(along); }

// qvm; columns: of y, to a threadgroup.
inline constexpr int qvm_simdgroups() { return 4; }
inline constexpr int qvm_columns() { return 256; }

// qvm of packed columns; lane_columns: adjacent columns per lane.
inline constexpr int column_qvm_simdgroups() { return 8; }
inline constexpr int column_qvm_lane_columns() { return 2; }
inline constexpr int column_qvm_columns() { return 32 * column_qvm_lane_columns(); }

// The tiled products: tiles of 16, 32 or 64 rows; tile_k: elements of K per step. Tiles of few rows wait for memory
// rather than for the matrix units, so their steps are longer.
inline constexpr int tile_columns() { return 64; }
inline constexpr int tile_k(int rows, int element_size) { return rows < 64 && element_size == 2 ? 64 : 32; }
inline constexpr int tile_simdgroups() { return 4; }

// sort_pairs: one threadgroup, with a thread for each matrix of w and one for pairs that are of none.
inline constexpr int sort_pairs_threads() { return 1024; }

// The tensor-op products: tiles of 32, 64 or 128 rows.
inline constexpr int tensor_tile_columns() { return 64; }
inline constexpr int tensor_tile_k() { return 64; }
inline constexpr int tensor_tile_simdgroups() { return 4; }

// sum_parts, quantize and dequantize: threads that share nothing.
inline constexpr int elementwise_threads_per_threadgroup() { return 64; }

// Norms: elements of a thread's step, and the most threads of a row.
inline constexpr int norm_elements() { return 8; }
inline constexpr int norm_max_threads() { return 1024; }

// rope_into_cache: a simdgroup for each head.
inline constexpr int rope_cache_simdgroups() { return 4; }

// sample: adjacent tokens of a lane, a step of a simdgroup, and the most threads of a row.
inline constexpr int sample_elements() { return 8; }
inline constexpr int sample_step() { return 32 * sample_elements(); }
inline constexpr int sample_max_threads() { return 1024; }

// moe_router: tokens of a threadgroup, and the most of what it takes; what is added to a sum of weights.
inline constexpr int router_simdgroups() { return 4; }
inline constexpr int router_max_experts() { return 512; }
inline constexpr int router_max_selected() { return 32; }
inline constexpr int router_max_groups() { return 32; }
inline constexpr float router_epsilon() { return 1e-20f; }

// moe_combine: adjacent columns of a thread.
inline constexpr int combine_elements() { return 4; }
// Attention of few queries: simdgroups of a threadgroup; of what puts parts together, threads.
inline constexpr int attention_simdgroups() { return 4; }
inline constexpr int attention_combine_simdgroups() { return 4; }

// Attention of many queries: rows of a block, simdgroups of a threadgroup, and keys of a step, by the bytes of a head.
inline constexpr int attention_tile_rows() { return 32; }
inline constexpr int attention_tile_simdgroups() { return 4; }
inline constexpr int attention_tile_keys(int head_bytes) { return head_bytes <= 256 ? 32 : 16; }

// The same on tensor operations, with as many simdgroups: rows, by the elements of a head, whose sums take as many
// registers either way; and keys.
inline constexpr int attention_tensor_rows(int dim) { return dim <= 128 ? 64 : 32; }
inline constexpr int attention_tensor_keys() { return 32; }

// rope: adjacent pairs of a thread, as many other elements, the most heads that share its angles, and the bits that
// count pairs where their frequencies follow from a base.
inline constexpr int rope_pairs() { return 4; }
inline constexpr int rope_max_heads() { return 8; }
inline constexpr int rope_max_bits() { return 12; }

// Gates: elements of a thread.
inline constexpr int gate_elements() { return 8; }

// resample_image: channels of a thread.
inline constexpr int image_channels() { return 4; }

// --- Parameters -----------------------------------------------------------------------------------------------------

// The z dimension of a grid counts two batch dimensions, z = outer * inner_size + inner. Every operand has its own
// strides, 0 where it is broadcast; in elements, for weights in 32-bit words.
struct BatchStrides {
  int64_t outer;
  int64_t inner;
};

// y [batch, rows, N] = x [batch, rows, K] times a quantized matrix. With split-K, y are the partial sums, in float32.
struct ProductParams {
  BatchStrides x;
  BatchStrides w;
  BatchStrides scales;
  BatchStrides biases;
  BatchStrides global_scale;
  BatchStrides y;
  int64_t x_row_stride;
  int64_t y_part_stride;
  int inner_size;
  int rows;
  int k;
  int n;
  int parts;  // of K, each to a threadgroup of its own; 1 without split-K
  int part_k;  // elements of K for each part: a multiple of 32, of a tile's depth in a tiled product, and of a group in
               // a matvec of packed columns
  int gate;  // which Gate, of a product that ends in one
};

// As ProductParams, for pairs of indices: z is the position in both lists. The outer strides lead from one matrix to
// the next, y.outer from one pair to the next; the inner ones are unused.
struct GatherParams {
  ProductParams product;
  int lhs_count;  // matrices of x
  int rhs_count;  // matrices of w
};

// What sort_pairs makes of pairs with one row of x each, for a tiled product whose strides are those of GatherParams
// and whose rows are the pairs. First the tiles: pairs of one matrix that follow one another in the list of pairs.
struct PairTile {
  int matrix;  // -1: an index of each of its pairs is out of range, or there are none
  int first;
  int count;  // at most the rows of a tile
};

// After the last tile, that list: the place of each pair in both lists of indices, and its row of x.
struct SortedPair {
  int pair;
  int lhs;
};

struct SortPairsParams {
  int pairs;
  int lhs_count;
  int rhs_count;
  int tile_rows;
  int tiles;  // of any pairs, so some are empty
};

// Sums the parts of a split-K product: y [batch, size] of partial sums float32 [batch, parts, size].
struct SumPartsParams {
  int parts;
  int size;
};

// A matrix of whole groups, contiguous, seen as one row.
struct QuantizeParams {
  int64_t elements;
};

// The same where columns are packed, as one matrix of n columns.
struct QuantizeColumnsParams {
  int64_t elements;
  int n;
};

// y [rows, length], contiguous, from x with rows x_stride elements apart; likewise residual.
struct NormParams {
  int64_t x_stride;
  int64_t residual_stride;
  int length;
  float epsilon;
  float scale;  // of x beside residual
};

// Heads of x [batch, tokens, query_heads + 2 * key_heads, dim], of which the middle and the last ones go to `position`
// of a cache [batch, key_heads, capacity, dim].
struct RopeCacheParams {
  int count;  // batch * tokens * heads
  int tokens;
  int query_heads;
  int key_heads;
  int query_norm_heads;  // that a norm is of: one, or all of them
  int key_norm_heads;
  int dim;
  int rotated;  // elements of a head that are turned
  int capacity;
  int position;
  int has_angles_of_sequences;  // cosines and sines [batch, tokens, rotated]; else [tokens, rotated]
  float epsilon;
};

// A token of each row of logits, row_stride elements apart; the rules are those of SampleRules in problem/fast.h.
struct SampleParams {
  int64_t row_stride;
  int64_t top_p;
  int64_t seed_stride;
  int vocabulary;
  int previous;  // tokens for each row
  int top_k;
  int farthest;
  float scale;
  float penalty;
};

// The experts of each row of logits, row_stride elements apart.
struct RouterParams {
  int64_t row_stride;
  int tokens;
  int experts;
  int k;
  int groups;
  int groups_used;
  int scoring;
  int chooses_by_score;  // and the bias; else by logits
  int normalise;
  float scale;
};

// A row of length elements for each k rows of x, y_stride elements apart, and one residual. `experts` rows of biases.
struct CombineParams {
  int64_t y_stride;
  int64_t residual_stride;
  int64_t bias_stride;
  int64_t experts;
  int k;
  int length;
};

// The numbers of a call that its plan does not depend on: they change from call to call.
struct CallNumbers {
  int64_t seed;
  int64_t offset;  // of draws; of rope, the first position
};

// Of [batch, heads, positions, ...], in elements.
struct HeadStrides {
  int64_t batch;
  int64_t head;
  int64_t position;
};

// y [batch, heads, queries, value_dim], contiguous. A head of keys serves `group` heads of queries.
struct AttentionParams {
  HeadStrides q;
  HeadStrides k;  // of packed ones in words
  HeadStrides v;
  HeadStrides k_scales;  // and biases
  HeadStrides v_scales;
  HeadStrides mask;  // positions: queries
  int64_t mask_key_stride;
  int key_heads;
  int group;
  int queries;
  int keys;
  int dim;
  int value_dim;
  int window;  // keys that a causal query sees at most
  int first_key;  // where the first part begins
  int parts;
  int part_keys;
  float softcap;  // of scores; 0 for none
  int group_shift;  // elements to a scale, as a power of two
  float scale;
};

// y of partial sums float32 [batch, heads, queries, parts, value_dim + 2]: of weights times values, and behind them
// the largest score and the sum of weights.
struct AttentionCombineParams {
  int parts;
  int value_dim;
  int queries;
  int heads;
};

// y [sequences, heads, length, width], contiguous, from x. Values of two floats, whose sum they are, hold what pairs
// turn by for one position, in turns: `first` those of pair 0, times powers[i] for each bit i of another pair's number;
// with freqs, `first` over them.
struct RopeParams {
  int64_t sequence_stride;  // of x
  int64_t head_stride;
  int64_t position_stride;
  float first[2];
  float powers[rope_max_bits()][2];
  int length;
  int heads;
  int width;
  int pairs;
  int thread_heads;  // that share a thread's angles
  int offset_words;  // of 32 bits to an offset, 1 or 2
  int offset_stride;  // words from one sequence's to the next
};

// y [rows, length], contiguous.
struct GateParams {
  int64_t gates_row_stride;
  int64_t gates_stride;
  int64_t values_row_stride;
  int64_t values_stride;
  int64_t gate_bias_row_stride;
  int64_t gate_bias_stride;
  int64_t value_bias_row_stride;
  int64_t value_bias_stride;
  int64_t experts;  // rows of biases
  int length;
  float alpha;
  float limit;
  float offset;
};

// y of images [channels, new_height, new_width] or [new_height, new_width, channels], contiguous, from x of any
// strides.
struct ImageParams {
  int64_t image_stride;  // of x
  int64_t channel_stride;
  int64_t row_stride;
  int64_t column_stride;
  int channels;
  int height;  // of x
  int width;
  int new_height;
  int new_width;
  int cubic;
  int antialias;
  int channels_last;
  float scale;
};

}  // namespace quantization_mlx
