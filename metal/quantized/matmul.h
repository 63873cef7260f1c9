// Tiled products of many rows of x with a quantized matrix, on simdgroup matrices: plain, split along K, and gathered.
//
// One threadgroup of four simdgroups computes a tile of y, 16, 32 or 64 rows x 64 columns, and walks K in steps of 32,
// or of 64 where the tile has few rows of half or bfloat:
//
//            K ->   32     32     32                w, packed               tile of y, by simdgroups
//          +------+------+------+---                   |                    64 rows        16 or 32 rows
//     rows |  x   |  x   |  x   |                      v                    +---+---+      +-+-+-+-+
//          +------+------+------+---     x     64 x 32 weights as T         | 0 | 1 |      |0|1|2|3|
//            |                                  in threadgroup memory       +---+---+      +-+-+-+-+
//            v                                                              | 2 | 3 |
//     rows x 32 in threadgroup memory                                       +---+---+
//
//   fetch 0 | store | barrier | fetch 1, multiply 0 | barrier | store | barrier | fetch 2, multiply 1 | ...
//
// Every weight is unpacked once for all rows of the tile, by the thread that loaded it, and every value of x is loaded
// once for all 64 columns. The next step is loaded into registers while the matrix units work on this one, which hides
// the latency without a second copy in threadgroup memory, so that several threadgroups fit on a core. A fragment of x,
// once in registers, is multiplied by two or four fragments of weights, and the other way round, and each pair has its
// own accumulator: up to sixteen independent multiplications of 8x8 matrices between two loads. Fragments of rows that
// do not exist are not multiplied.
//
// Measured on another GPU (docs/gpu-lane.md): with few rows, the two barriers of a step and the wait for w take most of
// its time, so steps of 64 take four fifths of the time; with 64 rows they would gain little and halve the threadgroups
// on a core. A product is cut along K until every core has several threadgroups, whatever the tile, because unpacking
// each weight once is worth more than a smaller tile.
//
// gather_qmm_rhs: a tile of pairs of one matrix, as sort_pairs has made them. Lane i of every simdgroup holds pair i,
// which knows its row of x and of y. So a matrix is unpacked once for all of its pairs that fit into a tile, whatever
// their order was, and experts with few pairs do not wait for one another.
#pragma once

#include "../common/metal.h"
#include "tile.h"

namespace quantization_mlx {

static constant constexpr const int fragment_size = 8;
static constant constexpr const int tile_threads = 32 * tile_simdgroups();

typedef simdgroup_matrix<float, 8, 8> Accumulator;

// --- Who does what -------------------------------------------------------------------------------------------------

// How simdgroups divide a tile, and fragments a simdgroup's part. With few rows all simdgroups are side by side, so
// that each has work where there is one fragment of rows.
inline constexpr int simdgroups_down(int rows) { return rows == 64 ? 2 : 1; }
inline constexpr int simdgroups_across(int rows) { return tile_simdgroups() / simdgroups_down(rows); }
inline constexpr int fragments_down(int rows) { return rows / fragment_size / simdgroups_down(rows); }
inline constexpr int fragments_across(int rows) { return tile_columns() / fragment_size / simdgroups_across(rows); }

METAL_FUNC int first_row_of(int rows, uint simdgroup) {
  return simdgroup / simdgroups_across(rows) * fragments_down(rows) * fragment_size;
}

METAL_FUNC int first_column_of(int rows, uint simdgroup) {
  return simdgroup % simdgroups_across(rows) * fragments_across(rows) * fragment_size;
}

struct FragmentPlace {
  int row;
  int column;  // and the next one
};

// The two elements of an 8x8 matrix that a lane holds. Metal's specification leaves it open; all of Apple's GPUs so far
// have this order. Nothing else depends on it.
METAL_FUNC FragmentPlace fragment_place(uint lane) {
  FragmentPlace place;
  place.row = (lane / 4 & 4) + lane / 2 % 4;
  place.column = (lane / 4 & 2) * 2 + lane % 2 * 2;
  return place;
}

// --- Memory --------------------------------------------------------------------------------------------------------

// In units of uint4, so that rows are aligned for vectors.
inline constexpr int weight_memory(int element_size, int rows, bool transpose) {
  return block_rows(transpose, tile_columns(), tile_k(rows, element_size)) *
      (block_row_elements(transpose, tile_columns(), tile_k(rows, element_size)) * element_size / 16 + 1);
}

inline constexpr int x_memory(int element_size, int rows) {
  return rows * (tile_k(rows, element_size) * element_size / 16 + 1);
}

// Weights that a thread takes in one step.
inline constexpr int tile_elements(int rows, int element_size) {
  return tile_columns() * tile_k(rows, element_size) / tile_threads;
}

// --- One step ------------------------------------------------------------------------------------------------------

// Multiplies the first `end` fragments of rows, and with `all` every one, at `x` and `weights` in threadgroup memory.
template <typename T, int rows, bool transpose, bool all>
METAL_FUNC void multiply_step(threadgroup const T* x, threadgroup const T* weights, int end, thread Accumulator* sums) {
  constexpr int across = fragments_across(rows);
  constexpr int depth = tile_k(rows, sizeof(T));
  constexpr int x_stride = padded<T>(depth);
  constexpr int weight_stride = padded<T>(block_row_elements(transpose, tile_columns(), depth));
#pragma unroll
  for (int k = 0; k < depth; k += fragment_size) {
    simdgroup_matrix<T, 8, 8> right[across];
#pragma unroll
    for (int j = 0; j < across; ++j) {
      const int column = j * fragment_size;
      simdgroup_load(
          right[j], weights + (transpose ? column * weight_stride + k : k * weight_stride + column), weight_stride,
          ulong2(0, 0), transpose);
    }
#pragma unroll
    for (int i = 0; i < fragments_down(rows); ++i) {
      if (all || i < end) {
        simdgroup_matrix<T, 8, 8> left;
        simdgroup_load(left, x + i * fragment_size * x_stride + k, x_stride, ulong2(0, 0), false);
#pragma unroll
        for (int j = 0; j < across; ++j) {
          simdgroup_multiply_accumulate(sums[i * across + j], left, right[j], sums[i * across + j]);
        }
      }
    }
  }
}

// --- One tile ------------------------------------------------------------------------------------------------------

// Where a thread stands in its threadgroup.
struct Position {
  int thread_index;
  uint simdgroup;
  uint lane;
};

template <int rows>
METAL_FUNC void clear(thread Accumulator* sums) {
#pragma unroll
  for (int i = 0; i < fragments_down(rows) * fragments_across(rows); ++i) {
    sums[i] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
  }
}

// The sums of the first `end_row` rows of the tile, along K from k_begin to k_end. The pieces know which rows of x are
// the tile's. True where each column of the sums is to be multiplied by a factor at `weights`: a weight was too large
// for T.
template <Mode mode, int group_size, int bits, int rows, bool transpose, typename T, typename Scale>
METAL_FUNC bool multiply_tile(
    thread const Operands<T, Scale>& operands,
    constant ProductParams& params,
    thread RowPieces<T, rows, tile_k(rows, sizeof(T)), tile_threads>& pieces,
    int end_row,
    int column,
    int k_begin,
    int k_end,
    Position position,
    threadgroup T* weights,
    threadgroup T* x,
    thread Accumulator* sums) {
  constexpr int depth = tile_k(rows, sizeof(T));
  constexpr int elements = tile_elements(rows, sizeof(T));
  const int thread_index = position.thread_index;
  const int simdgroup_row = first_row_of(rows, position.simdgroup);
  const int simdgroup_column = first_column_of(rows, position.simdgroup);
  const int begun = max(0, end_row - simdgroup_row + fragment_size - 1) / fragment_size;
  const int end = min(begun, fragments_down(rows));
  const bool all = end == fragments_down(rows);
  threadgroup const T* left = x + simdgroup_row * padded<T>(depth);
  threadgroup const T* right = weights + (transpose ? simdgroup_column * padded<T>(depth) : simdgroup_column);

  WeightRange range = initial_range();
  bool scaled = false;
  do {
    clear<rows>(sums);
    PackedWeights<mode, group_size, bits, elements> packed;
    if (k_begin < k_end) {
      fetch_block<transpose, tile_columns(), depth>(operands, params, k_begin, column, thread_index, packed);
      fetch_rows(k_begin, thread_index, pieces);
    }
    for (int k = k_begin; k < k_end; k += depth) {
      threadgroup_barrier(mem_flags::mem_threadgroup);  // the step before has been multiplied
      store_block<transpose, tile_columns(), depth>(packed, thread_index, weights, range);
      store_rows(pieces, thread_index, x);
      if (k + depth >= k_end) {
        share_range<transpose, tile_columns(), depth, mode>(range, thread_index, weights);
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);  // this one is complete
      if (k + depth < k_end) {
        fetch_block<transpose, tile_columns(), depth>(operands, params, k + depth, column, thread_index, packed);
        fetch_rows(k + depth, thread_index, pieces);
      }
      if (all) {
        multiply_step<T, rows, transpose, true>(left, right, 0, sums);
      } else {
        multiply_step<T, rows, transpose, false>(left, right, end, sums);
      }
    }
  } while (k_begin < k_end &&
           needs_factors<transpose, tile_columns(), depth, mode, elements>(range, scaled, thread_index, weights));
  return scaled;
}

// The first `end_row` rows of the tile to their rows of y, times `factor` and, with `scaled`, the factor of each
// column.
template <int rows, typename Rows, typename Y>
METAL_FUNC void store_sums(
    thread Accumulator* sums,
    device Y* y,
    constant ProductParams& params,
    Rows rows_of_y,
    int end_row,
    int column,
    float factor,
    bool scaled,
    threadgroup const float* column_factors,
    Position position) {
  constexpr int across = fragments_across(rows);
  const FragmentPlace place = fragment_place(position.lane);
#pragma unroll
  for (int i = 0; i < fragments_down(rows); ++i) {
    const int row = first_row_of(rows, position.simdgroup) + i * fragment_size + place.row;
    const int y_row = row_of_y(rows_of_y, row);
#pragma unroll
    for (int j = 0; j < across; ++j) {
      const int tile_column = first_column_of(rows, position.simdgroup) + j * fragment_size + place.column;
      const int n = column + tile_column;
      // thread_elements is for all lanes together, also for those that write nothing.
      float2 pair =
          float2(sums[i * across + j].thread_elements()[0], sums[i * across + j].thread_elements()[1]) * factor;
      if (scaled) {
        pair *= float2(column_factors[tile_column], column_factors[tile_column + 1]);
      }
      const Y first = static_cast<Y>(pair.x);
      const Y second = static_cast<Y>(pair.y);
      device Y* target = y + y_row * static_cast<long>(params.n) + n;
      if (row < end_row) {
        if (aligned_outputs) {
          *(device vec<Y, 2>*)target = vec<Y, 2>(first, second);
        } else {
          if (n < params.n) {
            target[0] = first;
          }
          if (n + 1 < params.n) {
            target[1] = second;
          }
        }
      }
    }
  }
}

// --- Plain products ------------------------------------------------------------------------------------------------

// One tile of the product of a matrix of x with one of w.
template <Mode mode, int group_size, int bits, int rows, bool transpose, typename T, typename Scale, typename Y>
METAL_FUNC void matmul_tile(
    thread const Operands<T, Scale>& operands,
    constant ProductParams& params,
    device Y* y,
    int row,
    int column,
    int k_begin,
    Position position,
    threadgroup uint4* weights,
    threadgroup uint4* x) {
  static_assert(rows == 16 || rows == 32 || rows == 64, "rows of a tile");
  const int end_row = min(rows, params.rows - row);
  constexpr int depth = tile_k(rows, sizeof(T));
  RowPieces<T, rows, depth, tile_threads> pieces;
  const device T* first_row = operands.x + row * params.x_row_stride;
#pragma unroll
  for (int i = 0; i < pieces_per_thread(sizeof(T), rows, depth, tile_threads); ++i) {
    const int piece_row = row_of_piece<T, depth, tile_threads>(position.thread_index, i);
    pieces.source[i] = first_row + piece_row * params.x_row_stride;
  }
  set_rows(end_row, params.k, position.thread_index, pieces);
  Accumulator sums[fragments_down(rows) * fragments_across(rows)];
  const bool scaled = multiply_tile<mode, group_size, bits, rows, transpose>(
      operands, params, pieces, end_row, column, k_begin, min(params.k, k_begin + params.part_k), position,
      (threadgroup T*)weights, (threadgroup T*)x, sums);
  store_sums<rows>(
      sums, y + row * static_cast<long>(params.n), params, RowsInOrder{}, end_row, column, operands.factor, scaled,
      (threadgroup const float*)weights, position);
}

template <typename T, Mode mode, int group_size, int bits, int rows, bool transpose, typename Y>
[[kernel, max_total_threads_per_threadgroup(tile_threads)]] void qmm(PRODUCT_ARGUMENTS(T, mode, Y)) {
  threadgroup uint4 shared_weights[weight_memory(sizeof(T), rows, transpose)];
  threadgroup uint4 shared_x[x_memory(sizeof(T), rows)];
  const Position position = {static_cast<int>(32 * simdgroup + lane), simdgroup, lane};
  const int row_tiles = (params.rows + rows - 1) / rows;
  const int part = threadgroup_index.y / row_tiles;
  const int row = static_cast<int>(threadgroup_index.y - part * row_tiles) * rows;
  const Operands<T, ScaleType<mode, T>> operands = batch_operands<mode>(TENSORS(T, mode), params, threadgroup_index.z);
  matmul_tile<mode, group_size, bits, rows, transpose>(
      operands, params, batch_output(y, params, part, threadgroup_index.z), row, threadgroup_index.x * tile_columns(),
      part * params.part_k, position, shared_weights, shared_x);
}

// --- Gathered products ---------------------------------------------------------------------------------------------

// Each pair of indices with its own rows of x.
template <typename T, Mode mode, int group_size, int bits, int rows, bool transpose>
[[kernel, max_total_threads_per_threadgroup(tile_threads)]] void gather_qmm(GATHER_ARGUMENTS(T, mode, T)) {
  threadgroup uint4 shared_weights[weight_memory(sizeof(T), rows, transpose)];
  threadgroup uint4 shared_x[x_memory(sizeof(T), rows)];
  const Position position = {static_cast<int>(32 * simdgroup + lane), simdgroup, lane};
  const int row = threadgroup_index.y * rows;
  const int column = threadgroup_index.x * tile_columns();
  device T* out = y + threadgroup_index.z * params.product.y.outer;
  Operands<T, ScaleType<mode, T>> operands;
  if (gather_operands<mode>(TENSORS(T, mode), lhs_indices, rhs_indices, params, threadgroup_index.z, operands)) {
    matmul_tile<mode, group_size, bits, rows, transpose>(
        operands, params.product, out, row, column, 0, position, shared_weights, shared_x);
  } else {
    write_nan(out, params.product, row, row + rows, column, tile_columns(), position.thread_index, tile_threads);
  }
}

// A tile of pairs, which have a row of x each.
template <typename T, Mode mode, int group_size, int bits, int rows, bool transpose>
[[kernel, max_total_threads_per_threadgroup(tile_threads)]] void gather_qmm_rhs(PAIR_TILE_ARGUMENTS(T, mode)) {
  static_assert(rows <= 32, "a lane for each pair");
  threadgroup uint4 shared_weights[weight_memory(sizeof(T), rows, transpose)];
  threadgroup uint4 shared_x[x_memory(sizeof(T), rows)];
  const Position position = {static_cast<int>(32 * simdgroup + lane), simdgroup, lane};
  const int column = threadgroup_index.x * tile_columns();
  const PairTile tile = tiles[threadgroup_index.y];
  if (tile.matrix < 0) {
    write_nan_of_pairs(y, params, tile, pairs, column, tile_columns(), position.thread_index, tile_threads);
    return;
  }
  const SortedPair pair = pair_of_lane(tile, pairs, lane);
  RowPieces<T, rows, tile_k(rows, sizeof(T)), tile_threads> pieces;
  gather_rows(x, params.x.outer, pair.lhs, position.thread_index, pieces);
  set_rows(tile.count, params.k, position.thread_index, pieces);
  const Operands<T, ScaleType<mode, T>> operands = operands_of_matrix<mode>(TENSORS(T, mode), params, tile.matrix);
  Accumulator sums[fragments_down(rows) * fragments_across(rows)];
  const bool scaled = multiply_tile<mode, group_size, bits, rows, transpose>(
      operands, params, pieces, tile.count, column, 0, params.k, position, (threadgroup T*)shared_weights,
      (threadgroup T*)shared_x, sums);
  store_sums<rows>(
      sums, y, params, pair, tile.count, column, operands.factor, scaled, (threadgroup const float*)shared_weights,
      position);
}

}  // namespace quantization_mlx
