// Attention of few queries: the vector form, which reads keys and values once for the query heads that share them.
//
//   rows: the queries, at most 8, of the heads that share a head of keys; 32 = rows x keys pairs of them at a time
//
//                   lane 0   lane 1  ...  lane 31
//   elements        [0, 4)   [4, 8)                   of each row, of the sums of each row, and of a key or a value
//   products        32 sums, one for each pair, of the elements of the lane
//   scores          pair 0   pair 1  ...  pair 31     after 31 shuffles that add and distribute these sums
//   softmax         one exponential to a lane
//   weighted sums   each value times the weight of its pair, which its lane hands out
//
// A score costs about two shuffles and a thirty-second of an exponential, and a load of a key serves all rows. The
// simdgroups of a threadgroup take keys in turn and add up what they have in threadgroup memory at the end, with one
// barrier. Where there are too few heads to fill the GPU, parts of the keys go to threadgroups of their own, and
// attention_combine puts their sums together.
//
// What reads and sums is independent of where keys and values come from and of what hides them: attend_keys takes rows
// with load_elements and move, and a mask with masked_score. Packed keys and values differ in load_elements alone: a
// lane loads 1 to 8 bytes of codes, its neighbours the next ones, and the scale and the bias of their group.
#pragma once

#include "../../csrc/functions.h"
#include "../../csrc/gpu/launch.h"
#include "../common/load.h"
#include "../common/metal.h"
#include "../common/polynomial.h"
#include "../quantized/dequantize.h"

namespace quantization_mlx {

constant bool aligned_x [[function_constant(QUANTIZATION_MLX_ALIGNED_X)]];
constant bool is_causal [[function_constant(QUANTIZATION_MLX_CAUSAL)]];
constant bool has_bool_mask [[function_constant(QUANTIZATION_MLX_HAS_BOOL_MASK)]];
constant bool has_added_mask [[function_constant(QUANTIZATION_MLX_HAS_ADDED_MASK)]];
constant bool has_sinks [[function_constant(QUANTIZATION_MLX_HAS_SINKS)]];
constant bool is_split [[function_constant(QUANTIZATION_MLX_SPLIT_KEYS)]];
constant bool whole_heads [[function_constant(QUANTIZATION_MLX_WHOLE_HEADS)]];
constant bool packed_keys [[function_constant(QUANTIZATION_MLX_PACKED_KEYS)]];
constant bool eight_bits [[function_constant(QUANTIZATION_MLX_EIGHT_BITS)]];

static constant constexpr const int attention_threads = 32 * attention_simdgroups();
static constant constexpr const float lowest_score = -3.402823466e38f;  // finite: the difference of two is no NaN
static constant constexpr const float log2_e = 1.44269504f;

// exp(score - maximum)
METAL_FUNC float weight_of(float score, float maximum) { return exp2((score - maximum) * log2_e); }

// --- Rows of keys and values ----------------------------------------------------------------------------------------

// A row of memory and those after it.
template <typename T>
struct DenseRows {
  const device T* row;
  long stride;
  int length;
};

template <typename T>
METAL_FUNC void move(thread DenseRows<T>& rows, int count) {
  rows.row += count * rows.stride;
}

// Elements of the row from `first` on, zero behind its end.
template <int count, typename T>
METAL_FUNC void load_elements(thread const DenseRows<T>& rows, int first, thread float* values) {
  if (aligned_x) {
    // No branch, so that the loads of many rows are under way together.
    const bool is_inside = whole_heads || first < rows.length;
    load_values<count>(rows.row + (is_inside ? first : 0), true, values);
#pragma unroll
    for (int i = 0; i < count; ++i) {
      values[i] = is_inside ? values[i] : 0.0f;
    }
  } else {
#pragma unroll
    for (int i = 0; i < count; ++i) {
      values[i] = first + i < rows.length ? static_cast<float>(rows.row[first + i]) : 0.0f;
    }
  }
}

// Two codes in the lowest bits of a word.
template <int bits>
METAL_FUNC void decode_two(uint word, thread float* codes) {
  constexpr uint mask = (1u << bits) - 1u;
  set_pair(code_pair((word & mask) | ((word >> bits & mask) << 16), bits, 0), 0, 1, codes);
}

// Four, whose first and third go into the two halves of a word, and the others beside them.
template <int bits>
METAL_FUNC void decode_four(uint word, thread float* codes) {
  if (bits == 4) {
    const uint halves = (word & 0xFFu) | ((word & 0xFF00u) << 8);
    set_pair(code_pair(halves, 4, 0), 0, 2, codes);
    set_pair(code_pair(halves, 4, 4), 1, 3, codes);
  } else {
    set_pair(code_pair(word, 8, 0), 0, 2, codes);
    set_pair(code_pair(word >> 8, 8, 0), 1, 3, codes);
  }
}

// `count` adjacent codes of a row, 2, 4 or 8, from `first` on, a multiple of count.
template <int count, int bits>
METAL_FUNC void load_codes(const device uint* row, int first, thread float* codes) {
  constexpr int bytes = count * bits / 8;
  const device uchar* source = (const device uchar*)row + first * bits / 8;
  uint words[2];
  if (bytes >= 4) {
    load_words<bytes / 4>((const device uint*)source, aligned_x, words);
  } else {
    words[0] = bytes == 2 ? static_cast<uint>(*(const device ushort*)source) : static_cast<uint>(*source);
  }
  if (count == 2) {
    decode_two<bits>(words[0], codes);
  } else {
#pragma unroll
    for (int i = 0; i < count / 4; ++i) {
      decode_four<bits>(bits == 8 ? words[i] : words[0] >> (16 * i), codes + 4 * i);
    }
  }
}

// A row of packed words and those after it.
template <typename T>
struct PackedRows {
  const device uint* row;
  const device T* scales;
  const device T* biases;
  long stride;
  long scale_stride;
  int length;
  int group_shift;  // elements to a scale, as a power of two
};

template <typename T>
METAL_FUNC void move(thread PackedRows<T>& rows, int count) {
  rows.row += count * rows.stride;
  rows.scales += count * rows.scale_stride;
  rows.biases += count * rows.scale_stride;
}

template <int count, typename T>
METAL_FUNC void load_elements(thread const PackedRows<T>& rows, int first, thread float* values) {
  const bool is_inside = whole_heads || first < rows.length;
  const int own = is_inside ? first : 0;
  const float scale = static_cast<float>(rows.scales[own >> rows.group_shift]);
  const float bias = static_cast<float>(rows.biases[own >> rows.group_shift]);
  if (eight_bits) {
    load_codes<count, 8>(rows.row, own, values);
  } else {
    load_codes<count, 4>(rows.row, own, values);
  }
#pragma unroll
  for (int i = 0; i < count; ++i) {
    values[i] = is_inside ? fma(values[i], scale, bias) : 0.0f;
  }
}

// Rows of keys or values: packed ones where packed_keys is set.
template <typename T>
struct KeyRows {
  DenseRows<T> dense;
  PackedRows<T> packed;
};

template <typename T>
METAL_FUNC void move(thread KeyRows<T>& rows, int count) {
  if (packed_keys) {
    move(rows.packed, count);
  } else {
    move(rows.dense, count);
  }
}

template <int count, typename T>
METAL_FUNC void load_elements(thread const KeyRows<T>& rows, int first, thread float* values) {
  if (packed_keys) {
    load_elements<count>(rows.packed, first, values);
  } else {
    load_elements<count>(rows.dense, first, values);
  }
}

// The rows of one head in a buffer of elements or, with scales and biases, of words.
template <typename T>
METAL_FUNC KeyRows<T> key_rows(
    const device T* heads,
    const device T* scales,
    const device T* biases,
    constant HeadStrides& strides,
    constant HeadStrides& scale_strides,
    constant AttentionParams& params,
    int batch,
    int head,
    int length) {
  const long offset = batch * strides.batch + head * strides.head;
  KeyRows<T> rows;
  if (packed_keys) {
    const long scale_offset = batch * scale_strides.batch + head * scale_strides.head;
    rows.packed.row = (const device uint*)heads + offset;
    rows.packed.scales = scales + scale_offset;
    rows.packed.biases = biases + scale_offset;
    rows.packed.stride = strides.position;
    rows.packed.scale_stride = scale_strides.position;
    rows.packed.length = length;
    rows.packed.group_shift = params.group_shift;
  } else {
    rows.dense.row = heads + offset;
    rows.dense.stride = strides.position;
    rows.dense.length = length;
  }
  return rows;
}

// The elements of a lane: `steps` times `elements` adjacent ones.
template <int elements, int steps, typename Rows>
METAL_FUNC void load_lane(thread const Rows& rows, uint lane, thread float* values) {
#pragma unroll
  for (int step = 0; step < steps; ++step) {
    load_elements<elements>(rows, (step * 32 + static_cast<int>(lane)) * elements, values + step * elements);
  }
}

// --- What a query sees
// ------------------------------------------------------------------------------------------------

// Of one row: keys [first, last), and what a mask shows of them or adds.
template <typename T>
struct RowMask {
  float softcap;  // 0 for none
  int first;
  int last;
  long stride;
  const device uchar* visible;
  const device T* added;
};

METAL_FUNC float hyperbolic_tangent(float x) {
  const float square = x * x;
  const float small = fma(x * square, polynomial(square, tanh_odd), x);
  const float large = 1.0f - 2.0f / (exp(2.0f * fabs(x)) + 1.0f);
  return fabs(x) <= tanh_small ? small : (x < 0.0f ? -large : large);
}

// The score, capped, with what is added; below lowest_score where the row does not see the key.
template <typename T>
METAL_FUNC float masked_score(thread const RowMask<T>& mask, int key, float score) {
  if (mask.softcap > 0.0f) {
    score = mask.softcap * hyperbolic_tangent(score / mask.softcap);
  }
  bool visible = key >= mask.first && key < mask.last;
  if (has_bool_mask && visible) {
    visible = mask.visible[key * mask.stride] != 0;
  }
  if (has_added_mask && visible) {
    score += static_cast<float>(mask.added[key * mask.stride]);
  }
  return visible ? score : -INFINITY;
}

// --- One simdgroup
// ----------------------------------------------------------------------------------------------------

template <int elements, int key_steps, int value_steps, int rows>
struct AttentionState {
  float queries[rows * key_steps * elements];  // times the scale
  float sums[rows * value_steps * elements];  // of weights times values
  float maximum;  // of the scores of row lane % rows
  float weights;  // the sum of this lane's
};

template <int elements, int key_steps, int value_steps, int rows>
METAL_FUNC void begin_attention(thread AttentionState<elements, key_steps, value_steps, rows>& state) {
#pragma unroll
  for (int i = 0; i < rows * value_steps * elements; ++i) {
    state.sums[i] = 0.0f;
  }
  state.maximum = lowest_score;
  state.weights = 0.0f;
}

// Of 32 values to a lane, the sum over all lanes of the one that has the lane's number.
METAL_FUNC float sum_to_own_lane(thread float* values, uint lane) {
#pragma unroll
  for (int half_count = 16; half_count > 0; half_count /= 2) {
    const bool upper = lane & half_count;
#pragma unroll
    for (int i = 0; i < half_count; ++i) {
      const float low = values[i];  // loaded by name: a choice between elements is one between addresses
      const float high = values[i + half_count];
      values[i] = (upper ? high : low) + simd_shuffle_xor(upper ? low : high, static_cast<ushort>(half_count));
    }
  }
  return values[0];
}

// Over the lanes of a row: those whose number has one remainder.
template <int rows>
METAL_FUNC float max_of_row(float value) {
#pragma unroll
  for (int mask = rows; mask < 32; mask *= 2) {
    value = max(value, simd_shuffle_xor(value, static_cast<ushort>(mask)));
  }
  return value;
}

template <int rows>
METAL_FUNC float sum_of_row(float value) {
#pragma unroll
  for (int mask = rows; mask < 32; mask *= 2) {
    value += simd_shuffle_xor(value, static_cast<ushort>(mask));
  }
  return value;
}

// Keys [begin, end) in runs of 32 / rows, of which every `step` / (32 / rows)-th is this simdgroup's; keys and values
// stand at row `begin`. mask: of row lane % rows.
template <int elements, int key_steps, int value_steps, int rows, typename Keys, typename Values, typename Mask>
METAL_FUNC void attend_keys(
    Keys keys,
    Values values,
    thread const Mask& mask,
    int begin,
    int end,
    int step,
    uint lane,
    thread AttentionState<elements, key_steps, value_steps, rows>& state) {
  constexpr int run = 32 / rows;
  constexpr int key_elements = key_steps * elements;
  constexpr int value_elements = value_steps * elements;
  for (int j = begin; j < end; j += step) {
    float products[32];
    Keys key = keys;
#pragma unroll
    for (int i = 0; i < run; ++i) {
      float own[key_elements];
      load_lane<elements, key_steps>(key, lane, own);
#pragma unroll
      for (int row = 0; row < rows; ++row) {
        float sum = 0.0f;
#pragma unroll
        for (int e = 0; e < key_elements; ++e) {
          sum = fma(own[e], state.queries[row * key_elements + e], sum);
        }
        products[i * rows + row] = sum;
      }
      move(key, j + i + 1 < end ? 1 : 0);  // the last one again instead of what is not there
    }
    move(keys, step);

    const int own_key = j + static_cast<int>(lane) / rows;
    const float score = masked_score(mask, own_key, sum_to_own_lane(products, lane));
    const bool counts = own_key < end && !(score < lowest_score);
    const float maximum = max(state.maximum, max_of_row<rows>(counts ? score : lowest_score));
    const float factor = weight_of(state.maximum, maximum);
    const float weight = counts ? weight_of(score, maximum) : 0.0f;
    state.maximum = maximum;
    state.weights = state.weights * factor + weight;
#pragma unroll
    for (int row = 0; row < rows; ++row) {
      const float of_row = simd_shuffle(factor, static_cast<ushort>(row));
#pragma unroll
      for (int e = 0; e < value_elements; ++e) {
        state.sums[row * value_elements + e] *= of_row;
      }
    }

    Values value = values;
#pragma unroll
    for (int i = 0; i < run; ++i) {
      float own[value_elements];
      load_lane<elements, value_steps>(value, lane, own);
#pragma unroll
      for (int row = 0; row < rows; ++row) {
        const float of_pair = simd_shuffle(weight, static_cast<ushort>(i * rows + row));
#pragma unroll
        for (int e = 0; e < value_elements; ++e) {
          state.sums[row * value_elements + e] = fma(of_pair, own[e], state.sums[row * value_elements + e]);
        }
      }
      move(value, j + i + 1 < end ? 1 : 0);
    }
    move(values, step);
  }
}

// --- One threadgroup
// --------------------------------------------------------------------------------------------------

// Floats of threadgroup memory.
inline constexpr int attention_memory(int rows, int value_elements) {
  return attention_simdgroups() * rows * (32 * value_elements + 2);
}

// Where the largest score and the sum of weights of a row are, behind the sums of all rows.
template <int rows, int value_elements>
METAL_FUNC int place_of_weights(int row, int simdgroup) {
  return attention_simdgroups() * rows * 32 * value_elements + (row * attention_simdgroups() + simdgroup) * 2;
}

template <int elements, int key_steps, int value_steps, int rows>
METAL_FUNC void share_sums(
    thread const AttentionState<elements, key_steps, value_steps, rows>& state,
    uint simdgroup,
    uint lane,
    threadgroup float* shared) {
  constexpr int value_elements = value_steps * elements;
  const float weights = sum_of_row<rows>(state.weights);
  if (lane < rows) {
    const int place = place_of_weights<rows, value_elements>(lane, simdgroup);
    shared[place] = state.maximum;
    shared[place + 1] = weights;
  }
#pragma unroll
  for (int row = 0; row < rows; ++row) {
    const int first = (row * attention_simdgroups() + simdgroup) * 32 * value_elements;
#pragma unroll
    for (int e = 0; e < value_elements; ++e) {
      shared[first + e * 32 + lane] = state.sums[row * value_elements + e];
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}

// A row of all simdgroups: its largest score, the sum of its weights and, for this lane's elements, that of weights
// times values.
template <int value_elements>
struct RowSums {
  float maximum;
  float weights;
  float values[value_elements];
};

template <int rows, int value_elements>
METAL_FUNC RowSums<value_elements> sums_of_row(threadgroup const float* shared, int row, uint lane) {
  RowSums<value_elements> result;
  result.maximum = lowest_score;
#pragma unroll
  for (int i = 0; i < attention_simdgroups(); ++i) {
    result.maximum = max(result.maximum, shared[place_of_weights<rows, value_elements>(row, i)]);
  }
  result.weights = 0.0f;
#pragma unroll
  for (int e = 0; e < value_elements; ++e) {
    result.values[e] = 0.0f;
  }
#pragma unroll
  for (int i = 0; i < attention_simdgroups(); ++i) {
    const int place = place_of_weights<rows, value_elements>(row, i);
    const float factor = weight_of(shared[place], result.maximum);
    result.weights = fma(factor, shared[place + 1], result.weights);
    const int first = (row * attention_simdgroups() + i) * 32 * value_elements;
#pragma unroll
    for (int e = 0; e < value_elements; ++e) {
      result.values[e] = fma(factor, shared[first + e * 32 + lane], result.values[e]);
    }
  }
  return result;
}

// What weighted sums are multiplied by: one over the sum of all weights and that of a sink; 0 where there are none.
METAL_FUNC float final_factor(float maximum, float weights, float sink) {
  const float largest = has_sinks ? max(maximum, sink) : maximum;
  const float share = weight_of(maximum, largest);
  const float total = weights * share + (has_sinks ? weight_of(sink, largest) : 0.0f);
  return total == 0.0f ? 0.0f : share / total;
}

// --- Kernels
// ----------------------------------------------------------------------------------------------------------

// Which query and which head a row is; rows beyond the last one are that one.
struct RowPlace {
  int query;
  int head;
};

METAL_FUNC RowPlace row_place(constant AttentionParams& params, int row, int key_head) {
  const int existing = min(row, params.queries * params.group - 1);
  RowPlace place;
  place.query = existing / params.group;
  place.head = key_head * params.group + (existing - place.query * params.group);
  return place;
}

// A query sees keys [first, last), as far as a mask shows them.
METAL_FUNC int last_key(constant AttentionParams& params, int query) {
  return is_causal ? clamp(params.keys - params.queries + query + 1, 0, params.keys) : params.keys;
}

METAL_FUNC int first_key(constant AttentionParams& params, int query) {
  return is_causal ? clamp(params.keys - params.queries + query + 1 - params.window, 0, params.keys) : 0;
}

template <typename T>
METAL_FUNC RowMask<T> mask_of(
    constant AttentionParams& params,
    const device uchar* visible,
    const device T* added,
    int batch,
    RowPlace place) {
  RowMask<T> mask;
  mask.softcap = params.softcap;
  mask.first = first_key(params, place.query);
  mask.last = last_key(params, place.query);
  mask.stride = params.mask_key_stride;
  const long offset = batch * params.mask.batch + place.head * params.mask.head + place.query * params.mask.position;
  if (has_bool_mask) {
    mask.visible = visible + offset;
  }
  if (has_added_mask) {
    mask.added = added + offset;
  }
  return mask;
}

// Elements of y to a batch.
METAL_FUNC long result_size(constant AttentionParams& params) {
  return static_cast<long>(params.key_heads) * params.group * params.queries * params.value_dim;
}

// What the kernels of all forms take; PACKED_KEYS those that read packed keys as well.
// clang-format off
#define ATTENTION_ARGUMENTS(T)                                                   \
    const device T* q [[buffer(0)]],                                             \
    const device T* k [[buffer(1)]],                                             \
    const device T* v [[buffer(2)]],                                             \
    const device uchar* visible [[buffer(3), function_constant(has_bool_mask)]], \
    const device T* added [[buffer(4), function_constant(has_added_mask)]],      \
    const device T* sinks [[buffer(5), function_constant(has_sinks)]],           \
    device T* y [[buffer(6)]],                                                   \
    constant AttentionParams& params [[buffer(12)]],                             \
    uint3 threadgroup_index [[threadgroup_position_in_grid]],                    \
    uint simdgroup [[simdgroup_index_in_threadgroup]],                           \
    uint lane [[thread_index_in_simdgroup]]
#define PACKED_KEYS(T)                                                       \
    const device T* k_scales [[buffer(8), function_constant(packed_keys)]],  \
    const device T* k_biases [[buffer(9), function_constant(packed_keys)]],  \
    const device T* v_scales [[buffer(10), function_constant(packed_keys)]], \
    const device T* v_biases [[buffer(11), function_constant(packed_keys)]]
// clang-format on

// Threadgroups, x dimension: blocks of rows, y dimension: parts of the keys, z dimension: batch and head of keys.
template <typename T, int elements, int key_steps, int value_steps, int rows>
[[kernel, max_total_threads_per_threadgroup(attention_threads)]] void attention_vector(
    ATTENTION_ARGUMENTS(T),
    PACKED_KEYS(T),
    device float* partial_sums [[buffer(7), function_constant(is_split)]]) {
  constexpr int run = 32 / rows;
  constexpr int key_elements = key_steps * elements;
  constexpr int value_elements = value_steps * elements;
  threadgroup float shared[attention_memory(rows, value_elements)];
  const int row_count = params.queries * params.group;
  const int first_row = threadgroup_index.x * rows;
  const int part = threadgroup_index.y;
  const int batch = threadgroup_index.z / params.key_heads;
  const int key_head = threadgroup_index.z - batch * params.key_heads;
  device T* result_of_batch = y + batch * result_size(params);

  AttentionState<elements, key_steps, value_steps, rows> state;
  begin_attention(state);
#pragma unroll
  for (int row = 0; row < rows; ++row) {
    const RowPlace place = row_place(params, first_row + row, key_head);
    DenseRows<T> query;
    query.row = q + batch * params.q.batch + place.head * params.q.head + place.query * params.q.position;
    query.stride = 0;
    query.length = params.dim;
    load_lane<elements, key_steps>(query, lane, state.queries + row * key_elements);
#pragma unroll
    for (int e = 0; e < key_elements; ++e) {
      state.queries[row * key_elements + e] *= params.scale;
    }
  }

  const RowMask<T> mask =
      mask_of(params, visible, added, batch, row_place(params, first_row + static_cast<int>(lane) % rows, key_head));
  const int part_begin = params.first_key + part * params.part_keys;
  const int begin = max(part_begin, first_key(params, row_place(params, first_row, key_head).query));
  const int end =
      min(part_begin + params.part_keys, last_key(params, row_place(params, first_row + rows - 1, key_head).query));
  const int own_begin = begin + static_cast<int>(simdgroup) * run;
  KeyRows<T> keys = key_rows(k, k_scales, k_biases, params.k, params.k_scales, params, batch, key_head, params.dim);
  KeyRows<T> values =
      key_rows(v, v_scales, v_biases, params.v, params.v_scales, params, batch, key_head, params.value_dim);
  move(keys, own_begin);
  move(values, own_begin);
  attend_keys(keys, values, mask, own_begin, end, attention_simdgroups() * run, lane, state);

  share_sums(state, simdgroup, lane, shared);
  for (int row = simdgroup; row < rows && first_row + row < row_count; row += attention_simdgroups()) {
    const RowSums<value_elements> sums = sums_of_row<rows, value_elements>(shared, row, lane);
    const RowPlace place = row_place(params, first_row + row, key_head);
    const long result = place.head * static_cast<long>(params.queries) + place.query;  // of the batch
    const long first_partial =
        ((batch * static_cast<long>(params.key_heads) * params.group * params.queries + result) * params.parts + part) *
        (params.value_dim + 2);
    const float sink = has_sinks && !is_split ? static_cast<float>(sinks[place.head]) : 0.0f;
    const float factor = is_split ? 1.0f : final_factor(sums.maximum, sums.weights, sink);
#pragma unroll
    for (int e = 0; e < value_elements; ++e) {
      const int element = (e / elements * 32 + static_cast<int>(lane)) * elements + e % elements;
      if (whole_heads || element < params.value_dim) {
        if (is_split) {
          partial_sums[first_partial + element] = sums.values[e];
        } else {
          result_of_batch[result * params.value_dim + element] = static_cast<T>(sums.values[e] * factor);
        }
      }
    }
    if (is_split && lane == 0) {
      partial_sums[first_partial + params.value_dim] = sums.maximum;
      partial_sums[first_partial + params.value_dim + 1] = sums.weights;
    }
  }
}

// The parts of a row put together. Threadgroups, x dimension: 32 elements of y, one to a lane, y dimension: rows of y.
// The simdgroups share the parts, so that few loads follow one another, and add up what they have in threadgroup
// memory. A lane has the weight of one of 32 parts, and hands it out; sums are loaded many at a time.
template <typename T>
[[kernel, max_total_threads_per_threadgroup(32 * attention_combine_simdgroups())]] void attention_combine(
    const device float* partial_sums [[buffer(0)]],
    const device T* sinks [[buffer(1), function_constant(has_sinks)]],
    device T* y [[buffer(2)]],
    constant AttentionCombineParams& params [[buffer(3)]],
    uint3 threadgroup_index [[threadgroup_position_in_grid]],
    uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  constexpr int loads = 16;
  constexpr int simdgroups = attention_combine_simdgroups();
  threadgroup float shared_sums[simdgroups * 32];
  threadgroup float shared_maxima[simdgroups];
  threadgroup float shared_weights[simdgroups];
  const int position = threadgroup_index.x * 32 + lane;
  const int element = min(position, params.value_dim - 1);
  const long row = threadgroup_index.y;
  const int part_size = params.value_dim + 2;
  const device float* parts = partial_sums + row * params.parts * part_size;
  const int share = (params.parts + simdgroups - 1) / simdgroups;
  const int own_begin = static_cast<int>(simdgroup) * share;
  const int own_end = min(own_begin + share, params.parts);
  float maximum = lowest_score;
  float weights = 0.0f;  // of this lane's parts
  float sum = 0.0f;
  for (int begin = own_begin; begin < own_end; begin += 32) {
    const bool exists = begin + static_cast<int>(lane) < own_end;
    const device float* own = parts + min(begin + static_cast<int>(lane), own_end - 1) * part_size + params.value_dim;
    const float larger = max(maximum, max_of_row<1>(exists ? own[0] : lowest_score));
    const float before = weight_of(maximum, larger);
    const float factor = exists ? weight_of(own[0], larger) : 0.0f;
    maximum = larger;
    weights = fma(factor, own[1], weights * before);
    sum *= before;
    const int count = min(32, own_end - begin);
    for (int first = 0; first < count; first += loads) {
      float sums[loads];
#pragma unroll
      for (int i = 0; i < loads; ++i) {  // the last part again instead of what is not there
        sums[i] = parts[min(begin + first + i, own_end - 1) * part_size + element];
      }
#pragma unroll
      for (int i = 0; i < loads; ++i) {
        const float added = fma(simd_shuffle(factor, static_cast<ushort>(first + i)), sums[i], sum);
        sum = first + i < count ? added : sum;
      }
    }
  }
  weights = sum_of_row<1>(weights);
  shared_sums[simdgroup * 32 + lane] = sum;
  if (lane == 0) {
    shared_maxima[simdgroup] = maximum;
    shared_weights[simdgroup] = weights;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (simdgroup > 0 || position >= params.value_dim) {
    return;
  }
#pragma unroll
  for (int i = 1; i < simdgroups; ++i) {
    maximum = max(maximum, shared_maxima[i]);
  }
  sum = 0.0f;
  weights = 0.0f;
#pragma unroll
  for (int i = 0; i < simdgroups; ++i) {
    const float factor = weight_of(shared_maxima[i], maximum);
    sum = fma(factor, shared_sums[i * 32 + lane], sum);
    weights = fma(factor, shared_weights[i], weights);
  }
  const int head = threadgroup_index.y / params.queries % params.heads;
  const float sink = has_sinks ? static_cast<float>(sinks[head]) : 0.0f;
  y[row * params.value_dim + position] = static_cast<T>(sum * final_factor(maximum, weights, sink));
}

}  // namespace quantization_mlx
