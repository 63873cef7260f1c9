// Attention of many queries, on simdgroup matrices: the tiled form.
//
// One threadgroup of four simdgroups takes a block of 32 rows, the queries of the heads that share a head of keys, and
// goes over the keys that any of them sees, 16 or 32 at a time: causal blocks behind the diagonal and before the window
// are not visited.
//
//                     keys ->
//                   +----+----+----+---            of a simdgroup, 8 rows
//   simdgroup 0     | S  |                         scores S   = Q K^T     8 x keys, in float32 registers
//   simdgroup 1     |    |                         weights    = exp(S - the largest score of the row so far)
//   simdgroup 2     |    |                         sums       = sums * what that changes + weights V
//   simdgroup 3     |    |                                      8 x the head's size, in float32 registers
//                   +----+
//
//   store K | barrier | S | barrier | store V | barrier | weights, sums | barrier | store K of the next block ...
//
// Q stays in threadgroup memory, and K and V follow one another in the same place, so that several threadgroups fit on
// a core and hide each other's loads. A lane has two adjacent scores of one row of a matrix of 8x8, so that maxima and
// sums of a row are two shuffles away, and weights are multiplied as float32, as they are: values become float32 on
// their way into a matrix, which multiplies that as fast as half. Packed keys and values are decoded as they are
// stored, once for all 32 rows, and rounded to the type of the queries.
#pragma once

#include "attention.h"

namespace quantization_mlx {

static constant constexpr const int attention_tile_threads = 32 * attention_tile_simdgroups();
static constant constexpr const int matrix_size = 8;

typedef simdgroup_matrix<float, 8, 8> FloatMatrix;

// The two elements of an 8x8 matrix that a lane holds; as in quantized/matmul.h.
struct MatrixPlace {
  int row;
  int column;  // and the next one
};

METAL_FUNC MatrixPlace matrix_place(uint lane) {
  MatrixPlace place;
  place.row = (lane / 4 & 4) + lane / 2 % 4;
  place.column = (lane / 4 & 2) * 2 + lane % 2 * 2;
  return place;
}

// Over the lanes that hold elements of one row.
METAL_FUNC float max_of_matrix_row(float value) {
  value = max(value, simd_shuffle_xor(value, ushort(1)));
  return max(value, simd_shuffle_xor(value, ushort(8)));
}

METAL_FUNC float sum_of_matrix_row(float value) {
  value += simd_shuffle_xor(value, ushort(1));
  return value + simd_shuffle_xor(value, ushort(8));
}

// --- Threadgroup memory
// -----------------------------------------------------------------------------------------------

// Elements from one row to the next: 16 bytes more than there are, which keeps vectors aligned and the rows of a matrix
// out of each other's memory banks.
template <typename T>
inline constexpr int tile_stride(int dim) {
  return dim + 16 / static_cast<int>(sizeof(T));
}

// 16 bytes of a row of `left` elements from `source` on, zeros behind its end.
template <typename T>
METAL_FUNC void store_piece(const device T* source, int left, threadgroup T* target) {
  constexpr int count = 16 / static_cast<int>(sizeof(T));
  if (aligned_x && left >= count) {
    *(threadgroup uint4*)target = *(const device uint4*)source;
  } else {
#pragma unroll
    for (int i = 0; i < count; ++i) {
      target[i] = i < left ? source[i] : static_cast<T>(0.0f);
    }
  }
}

// 16 bytes of row `row`.
template <typename T>
METAL_FUNC void store_piece(thread const KeyRows<T>& rows, int row, int element, int left, threadgroup T* target) {
  if (packed_keys) {
    constexpr int count = 16 / static_cast<int>(sizeof(T));
    PackedRows<T> own = rows.packed;
    move(own, left > 0 ? row : 0);
    float values[count];
    load_elements<count>(own, left > 0 ? element : 0, values);
#pragma unroll
    for (int i = 0; i < count; ++i) {
      target[i] = static_cast<T>(left > 0 ? values[i] : 0.0f);
    }
  } else {
    store_piece(rows.dense.row + (left > 0 ? row * rows.dense.stride + element : 0), left, target);
  }
}

// The first `keys` rows of keys or values; of those that are not there, and of what lacks in whole matrices, zeros.
template <typename T, int dim, int keys>
METAL_FUNC void store_keys(
    thread const KeyRows<T>& rows,
    int existing,
    int length,
    int thread_index,
    threadgroup T* block) {
  constexpr int piece = 16 / static_cast<int>(sizeof(T));
  constexpr int pieces = dim / piece;
#pragma unroll
  for (int i = thread_index; i < keys * pieces; i += attention_tile_threads) {
    const int row = i / pieces;
    const int element = i % pieces * piece;
    if (element < (length + matrix_size - 1) / matrix_size * matrix_size) {
      const int left = row < existing ? length - element : 0;
      store_piece(rows, row, element, left, block + row * tile_stride<T>(dim) + element);
    }
  }
}

// The queries of rows from first_row on, of which q is the batch; of what lacks in whole matrices, zeros.
template <typename T, int dim, int rows>
METAL_FUNC void store_queries(
    const device T* q,
    constant AttentionParams& params,
    int first_row,
    int key_head,
    int thread_index,
    threadgroup T* queries) {
  constexpr int piece = 16 / static_cast<int>(sizeof(T));
  constexpr int pieces = dim / piece;
#pragma unroll
  for (int i = thread_index; i < rows * pieces; i += attention_tile_threads) {
    const int row = i / pieces;
    const int element = i % pieces * piece;
    const RowPlace place = row_place(params, first_row + row, key_head);
    const device T* source = q + place.head * params.q.head + place.query * params.q.position;
    if (element < (params.dim + matrix_size - 1) / matrix_size * matrix_size) {
      const int left = params.dim - element;
      store_piece(source + (left > 0 ? element : 0), left, queries + row * tile_stride<T>(dim) + element);
    }
  }
}

// --- What a block of rows sees
// ----------------------------------------------------------------------------------------

// Keys [begin, end), of which every row sees [seen_begin, seen_end), as far as a mask shows them.
struct KeyRange {
  int begin;
  int end;
  int seen_begin;
  int seen_end;
};

METAL_FUNC KeyRange key_range(constant AttentionParams& params, int first_row, int rows, int key_head) {
  const int first_query = row_place(params, first_row, key_head).query;
  const int last_query = row_place(params, first_row + rows - 1, key_head).query;
  KeyRange range;
  range.begin = first_key(params, first_query);
  range.end = last_key(params, last_query);
  range.seen_begin = first_key(params, last_query);
  range.seen_end = last_key(params, first_query);
  return range;
}

// Whether scores of keys [begin, end) need masked_score.
METAL_FUNC bool are_masked(constant AttentionParams& params, KeyRange range, int begin, int end) {
  return has_bool_mask || has_added_mask || params.softcap > 0.0f || begin < range.seen_begin || end > range.seen_end;
}

// --- Kernel
// -----------------------------------------------------------------------------------------------------------

// dim: the largest head size. Threadgroups, x dimension: blocks of rows, z dimension: batch and head of keys.
template <typename T, int dim>
[[kernel, max_total_threads_per_threadgroup(attention_tile_threads)]] void attention_tile(
    ATTENTION_ARGUMENTS(T),
    PACKED_KEYS(T),
    uint3 threadgroups [[threadgroups_per_grid]]) {
  constexpr int rows = attention_tile_rows();
  constexpr int keys = attention_tile_keys(dim * sizeof(T));
  constexpr int stride = tile_stride<T>(dim);
  constexpr int piece = 16 / static_cast<int>(sizeof(T));
  constexpr int key_matrices = keys / matrix_size;
  threadgroup uint4 query_memory[rows * stride / piece];
  threadgroup uint4 key_memory[keys * stride / piece];
  threadgroup T* queries = (threadgroup T*)query_memory;
  threadgroup T* block = (threadgroup T*)key_memory;

  const int thread_index = 32 * simdgroup + lane;
  // The last queries have the most keys: they begin first.
  const int first_row = static_cast<int>(threadgroups.x - 1 - threadgroup_index.x) * rows;
  const int batch = threadgroup_index.z / params.key_heads;
  const int key_head = threadgroup_index.z - batch * params.key_heads;
  device T* result_of_batch = y + batch * result_size(params);
  const int dim_matrices = (params.dim + matrix_size - 1) / matrix_size;
  const int value_matrices = (params.value_dim + matrix_size - 1) / matrix_size;

  store_queries<T, dim, rows>(q + batch * params.q.batch, params, first_row, key_head, thread_index, queries);
  const MatrixPlace matrix = matrix_place(lane);
  const int own_row = first_row + static_cast<int>(simdgroup) * matrix_size + matrix.row;
  const RowPlace place = row_place(params, own_row, key_head);
  const RowMask<T> mask = mask_of(params, visible, added, batch, place);
  const KeyRange range = key_range(params, first_row, rows, key_head);
  KeyRows<T> key_block =
      key_rows(k, k_scales, k_biases, params.k, params.k_scales, params, batch, key_head, params.dim);
  KeyRows<T> value_block =
      key_rows(v, v_scales, v_biases, params.v, params.v_scales, params, batch, key_head, params.value_dim);
  move(key_block, range.begin);
  move(value_block, range.begin);
  threadgroup const T* own_queries = queries + simdgroup * matrix_size * stride;

  FloatMatrix sums[dim / matrix_size];
#pragma unroll
  for (int d = 0; d < dim / matrix_size; ++d) {
    sums[d] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
  }
  float maximum = lowest_score;
  float weights = 0.0f;
  for (int begin = range.begin; begin < range.end; begin += keys) {
    const int existing = range.end - begin;
    threadgroup_barrier(mem_flags::mem_threadgroup);  // the values before have been multiplied
    store_keys<T, dim, keys>(key_block, existing, params.dim, thread_index, block);
    move(key_block, keys);
    threadgroup_barrier(mem_flags::mem_threadgroup);  // queries and keys are complete
    FloatMatrix scores[key_matrices];
#pragma unroll
    for (int j = 0; j < key_matrices; ++j) {
      scores[j] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
    }
    for (int d = 0; d < dim_matrices; ++d) {
      simdgroup_matrix<T, 8, 8> query;
      simdgroup_load(query, own_queries + d * matrix_size, stride, ulong2(0, 0), false);
#pragma unroll
      for (int j = 0; j < key_matrices; ++j) {
        simdgroup_matrix<T, 8, 8> key;
        simdgroup_load(key, block + j * matrix_size * stride + d * matrix_size, stride, ulong2(0, 0), true);
        simdgroup_multiply_accumulate(scores[j], query, key, scores[j]);
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);  // the keys have been multiplied
    store_keys<T, dim, keys>(value_block, existing, params.value_dim, thread_index, block);
    move(value_block, keys);

    const bool changes = are_masked(params, range, begin, begin + keys);
    float largest = lowest_score;
#pragma unroll
    for (int j = 0; j < key_matrices; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float score = scores[j].thread_elements()[e] * params.scale;
        if (changes) {
          score = masked_score(mask, begin + j * matrix_size + matrix.column + e, score);
        }
        scores[j].thread_elements()[e] = score;
        largest = max(largest, score);
      }
    }
    largest = max(maximum, max_of_matrix_row(largest));
    const float factor = weight_of(maximum, largest);
    maximum = largest;
    weights *= factor;
#pragma unroll
    for (int j = 0; j < key_matrices; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float score = scores[j].thread_elements()[e];
        const float weight = score < lowest_score ? 0.0f : weight_of(score, maximum);
        scores[j].thread_elements()[e] = weight;
        weights += weight;
      }
    }
#pragma unroll
    for (int d = 0; d < dim / matrix_size; ++d) {
      sums[d].thread_elements()[0] *= factor;
      sums[d].thread_elements()[1] *= factor;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);  // the values are complete
#pragma unroll
    for (int j = 0; j < key_matrices; ++j) {
      threadgroup const T* values = block + (j * matrix_size + matrix.row) * stride + matrix.column;
#pragma unroll
      for (int d = 0; d < dim / matrix_size; ++d) {
        if (d < value_matrices) {
          FloatMatrix value;
          value.thread_elements()[0] = static_cast<float>(values[d * matrix_size]);
          value.thread_elements()[1] = static_cast<float>(values[d * matrix_size + 1]);
          simdgroup_multiply_accumulate(sums[d], scores[j], value, sums[d]);
        }
      }
    }
  }

  const float sink = has_sinks ? static_cast<float>(sinks[place.head]) : 0.0f;
  const float factor = final_factor(maximum, sum_of_matrix_row(weights), sink);
  const long result = place.head * static_cast<long>(params.queries) + place.query;  // of the batch
  device T* target = result_of_batch + result * params.value_dim + matrix.column;
  const bool exists = own_row < params.queries * params.group;
#pragma unroll
  for (int d = 0; d < dim / matrix_size; ++d) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      // thread_elements is for all lanes together, also for those that write nothing.
      const T value = static_cast<T>(sums[d].thread_elements()[e] * factor);
      if (exists && d * matrix_size + matrix.column + e < params.value_dim) {
        target[d * matrix_size + e] = value;
      }
    }
  }
}

}  // namespace quantization_mlx
