// Blocks of a quantized matrix on their way to threadgroup memory, for the tiled products.
//
//   w [N, K], transposed: 64 rows x depth      w [K, N]: depth rows x 64
//   +-----------+-----------+                  +-----------+-----------+-----------+-----------+
//   | thread 0  | thread 1  |  row 0           | thread 0  | thread 1  | thread 2  | thread 3  |  row 0
//   +-----------+-----------+                  +-----------+-----------+-----------+-----------+
//   | thread 2  | thread 3  |  row 1           | thread 4  | ...
//   +-----------+-----------+                  +-----------+
//
// Every thread takes 16 or 32 consecutive weights of one row, with a scale for each group, in two steps: fetch_block
// loads them, packed, into registers, where they can stay until other threads are done with threadgroup memory;
// store_block unpacks them into the block. Beyond the edge of the matrix there are zeros. The block has the order of w,
// so both steps are the same for every product.
//
//   w [K, N] of packed columns: depth x 64          the block: 64 rows x depth, as of w [N, K]
//   +----------+----------+-----+-----------+       +------------+-------------+
//   | thread 0 | thread 1 | ... | thread 63 |       | thread 0   | thread 64   |  column 0
//   +----------+----------+-----+-----------+       +------------+-------------+
//   | thread 64| ...                        |       | thread 1   | ...
//   +----------+----------------------------+       +------------+
//
// There a thread's weights are consecutive in a column: its words are a row apart, and those of adjacent threads are
// adjacent. Unpacked, they are part of a row of the transposed block, stored as vectors, so that eight threads use
// every memory bank once; the product is then the one with w transposed.
//
// Weights beyond 65504 do not fit into blocks of half, but the matvec kernels and the CPU, which unpack to float32,
// compute with them. So a thread keeps the largest magnitude that it unpacks, which takes a few instructions per group
// and two registers. After the last step, one reduction tells whether any weight was too large; it needs no barrier of
// its own, and no memory but the padding of the block. If one was, the tile is computed once more, with the weights of
// each column (of w [K, N], of each thread's 16 or 32 columns) divided by a power of two, 2^n, and the float32 sums are
// multiplied by it at the end. Both are exact, except that weights below 2^(n - 14) lose bits: at most 2^-40 of the
// largest weight of the column, far below the rounding of a float32 sum. The alternatives make every product slower:
// blocks of float32 take twice the threadgroup memory, and finding the largest scale first reads all scales twice.
#pragma once

#include "../common/metal.h"
#include "operands.h"

namespace quantization_mlx {

// Elements between the rows of a block in threadgroup memory: 16 bytes more than there are, which keeps vector stores
// aligned, and fragments of eight rows out of each other's memory banks.
template <typename T>
inline constexpr int padded(int elements) {
  return elements + 16 / static_cast<int>(sizeof(T));
}

inline constexpr int block_rows(bool transpose, int columns, int depth) { return transpose ? columns : depth; }
inline constexpr int block_row_elements(bool transpose, int columns, int depth) { return transpose ? depth : columns; }

// --- Weights beyond the range of half ------------------------------------------------------------------------------

template <typename T>
inline constexpr bool is_half() {
  return false;
}

template <>
inline constexpr bool is_half<half>() {
  return true;
}

// Whether T may be too small for a weight of the mode. With E4M3 scales, and a global scale that is applied to sums, an
// E2M1 weight is at most 6 * 448.
template <typename T>
inline constexpr bool may_exceed_range(Mode mode) {
  return is_half<T>() && !(is_e2m1(mode) && traits_of(mode).scale == Scale::e4m3);
}

// The range of the weights that a thread unpacks. `largest` is in units of 2^16, so that no bound overflows.
struct WeightRange {
  float largest;  // magnitude so far
  float factor;  // a power of two, which the weights are multiplied by
};

METAL_FUNC WeightRange initial_range() {
  WeightRange range;
  range.largest = 0.0f;
  range.factor = 1.0f;
  return range;
}

static constant constexpr const float range_unit = 65536.0f;
static constant constexpr const float largest_half = 65504.0f / 65536.0f;

// The largest magnitude, in that unit, that codes of a group can stand for.
template <Mode mode, int bits>
METAL_FUNC float largest_weight(float scale, float bias) {
  if (is_e2m1(mode) || is_e4m3(mode)) {
    return fabs(scale) * ((is_e2m1(mode) ? 6.0f : 448.0f) / range_unit);
  }
  const float last = static_cast<float>((1 << bits) - 1);
  return fmax(fabs(bias), fabs(fma(last, scale, bias))) * (1.0f / range_unit);
}

// The factor that brings weights of this magnitude below 2^15. Of infinity, any does.
METAL_FUNC float range_factor(float largest) {
  const uint exponent = min(bits_from_float(largest) >> 23, 250u);
  return largest > largest_half ? float_from_bits((252u - exponent) << 23) : 1.0f;
}

// --- Unpacking -----------------------------------------------------------------------------------------------------

template <Mode mode, int group_size, int bits, int elements>
struct PackedWeights {
  static_assert(elements == half_run_elements || elements == run_elements, "a thread takes a run or half of one");
  uint words[(elements * bits + 31) / 32];
  float scales[elements > group_size ? elements / group_size : 1];
  float biases[elements > group_size ? elements / group_size : 1];
};

// Eight consecutive elements to threadgroup memory. target is a multiple of 16 bytes.
METAL_FUNC void store_chunk(thread const float* values, threadgroup float* target) {
  ((threadgroup float4*)target)[0] = float4(values[0], values[1], values[2], values[3]);
  ((threadgroup float4*)target)[1] = float4(values[4], values[5], values[6], values[7]);
}

template <typename T>
METAL_FUNC void store_chunk(thread const float* values, threadgroup T* target) {
  static_assert(sizeof(T) == 2, "half or bfloat");
  uint pairs[chunk_elements / 2];
#pragma unroll
  for (int i = 0; i < chunk_elements / 2; ++i) {
    const uint low = as_type<ushort>(static_cast<T>(values[2 * i]));
    const uint high = as_type<ushort>(static_cast<T>(values[2 * i + 1]));
    pairs[i] = low | (high << 16);
  }
  *(threadgroup uint4*)target = uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
}

// --- Blocks of w ---------------------------------------------------------------------------------------------------

// Weights of row `row` from `first` on. exist: how many are in the matrix: all, half of a run in groups of 16, or none.
template <Mode mode, int group_size, int bits, int elements, typename T, typename Scale>
METAL_FUNC void fetch_weights(
    thread const Operands<T, Scale>& operands,
    int row_elements,
    int row,
    int first,
    int exist,
    thread PackedWeights<mode, group_size, bits, elements>& packed) {
  constexpr int words = (elements * bits + 31) / 32;
  constexpr int groups = elements > group_size ? elements / group_size : 1;
  const long row_bytes = static_cast<long>(row_elements / 16) * (2 * bits);
  const device uchar* source = (const device uchar*)operands.w + row * row_bytes + first / 16 * (2 * bits);
  const long first_group = static_cast<long>(row) * (row_elements / group_size) + first / group_size;
  if (exist >= elements) {
    if (elements == run_elements) {
      load_words<bits>((const device uint*)source, aligned_weights, packed.words);
    } else {
      load_half_run<bits>((const device ushort*)source, aligned_weights, packed.words);
    }
  } else {
    constexpr int half_words = groups > 1 ? words / 2 : 0;
#pragma unroll
    for (int i = 0; i < words; ++i) {
      packed.words[i] = i < half_words && exist > 0 ? ((const device uint*)source)[i] : 0u;
    }
  }
#pragma unroll
  for (int i = 0; i < groups; ++i) {
    const bool exists = exist > i * group_size;
    packed.scales[i] = exists ? decode_scale<mode>(operands.scales[first_group + i]) : 0.0f;
    packed.biases[i] = exists ? decode_bias<mode>(operands.biases, first_group + i) : 0.0f;
  }
}

// As fetch_weights, of column `column` from row k on; all of them are in the matrix or none.
template <Mode mode, int group_size, int bits, int elements, typename T, typename Scale>
METAL_FUNC void fetch_column_weights(
    thread const Operands<T, Scale>& operands,
    int columns,
    int k,
    int column,
    bool exist,
    thread PackedWeights<mode, group_size, bits, elements>& packed) {
  constexpr int words = (elements * bits + 31) / 32;
  const device uint* source = operands.w + static_cast<long>(k / 16 * bits / 2) * columns + column;
#pragma unroll
  for (int i = 0; i < words; ++i) {
    packed.words[i] = exist ? source[i * static_cast<long>(columns)] : 0u;
  }
  const long group = static_cast<long>(k / group_size) * columns + column;
  packed.scales[0] = exist ? decode_scale<mode>(operands.scales[group]) : 0.0f;
  packed.biases[0] = exist ? column_bias(mode, packed.scales[0], decode_zero<mode>(operands.biases, group)) : 0.0f;
}

// This thread's weights of the block of w whose first element is in row k and column `column` of the product's right
// operand: 64 = `columns` columns, `depth` rows.
template <
    bool transpose,
    int columns,
    int depth,
    Mode mode,
    int group_size,
    int bits,
    int elements,
    typename T,
    typename Scale>
METAL_FUNC void fetch_block(
    thread const Operands<T, Scale>& operands,
    constant ProductParams& params,
    int k,
    int column,
    int thread_index,
    thread PackedWeights<mode, group_size, bits, elements>& packed) {
  if (is_column_packed(mode)) {
    const int block_column = column + thread_index % columns;
    const int first = k + thread_index / columns * elements;
    const bool exist = (aligned_outputs || block_column < params.n) && (aligned_k || first < params.k);
    fetch_column_weights(operands, params.n, first, block_column, exist, packed);
    return;
  }
  constexpr int threads_per_row = block_row_elements(transpose, columns, depth) / elements;
  const int row = (transpose ? column : k) + thread_index / threads_per_row;
  const int first = (transpose ? k : column) + thread_index % threads_per_row * elements;
  const int rows = transpose ? params.n : params.k;
  const int row_elements = transpose ? params.k : params.n;
  const bool all_rows = transpose ? aligned_outputs : aligned_k;
  const bool all_elements = transpose ? aligned_k : aligned_outputs;
  const int left = all_elements ? elements : row_elements - first;
  const int exist = all_rows || row < rows ? left : 0;
  fetch_weights(operands, row_elements, row, first, exist, packed);
}

// Where a thread's weights are in the block; piece: of a row, in units of a thread's elements.
struct BlockPlace {
  int row;
  int piece;
};

template <bool transpose, int columns, int depth, Mode mode, int elements>
METAL_FUNC BlockPlace block_place(int thread_index) {
  constexpr int threads_per_row = block_row_elements(transpose, columns, depth) / elements;
  BlockPlace place;
  place.row = is_column_packed(mode) ? thread_index % columns : thread_index / threads_per_row;
  place.piece = is_column_packed(mode) ? thread_index / columns : thread_index % threads_per_row;
  return place;
}

// Unpacks them into the block in threadgroup memory, whose rows are padded<T>.
template <bool transpose, int columns, int depth, typename T, Mode mode, int group_size, int bits, int elements>
METAL_FUNC void store_block(
    thread const PackedWeights<mode, group_size, bits, elements>& packed,
    int thread_index,
    threadgroup T* block,
    thread WeightRange& range) {
  constexpr int row_elements = block_row_elements(transpose, columns, depth);
  constexpr int group_chunks = group_size / chunk_elements;
  constexpr int groups = elements > group_size ? elements / group_size : 1;
  const BlockPlace place = block_place<transpose, columns, depth, mode, elements>(thread_index);
  threadgroup T* target = block + place.row * padded<T>(row_elements) + place.piece * elements;
  float scales[groups];
  float biases[groups];
#pragma unroll
  for (int i = 0; i < groups; ++i) {
    scales[i] = packed.scales[i];
    biases[i] = packed.biases[i];
    if (may_exceed_range<T>(mode)) {
      range.largest = fmax(range.largest, largest_weight<mode, bits>(scales[i], biases[i]));
      scales[i] *= range.factor;
      biases[i] *= range.factor;
    }
  }
#pragma unroll
  for (int chunk = 0; chunk < elements / chunk_elements; ++chunk) {
    const float scale = scales[chunk / group_chunks];
    const float bias = biases[chunk / group_chunks];
    float values[chunk_elements];
    decode_chunk<mode, bits>(packed.words, chunk, values);
#pragma unroll
    for (int i = 0; i < chunk_elements; ++i) {
      values[i] = fma(values[i], scale, bias);
    }
    store_chunk(values, target + chunk * chunk_elements);
  }
}

// --- The range of a tile's weights ---------------------------------------------------------------------------------
// For tiles that 128 threads compute together, by passes over K.

static constant constexpr const int range_threads = 128;

// The padding of the block's first row: memory for four floats, which no product reads.
template <bool transpose, int columns, int depth, typename T>
METAL_FUNC threadgroup float* block_padding(threadgroup T* block) {
  return (threadgroup float*)(block + block_row_elements(transpose, columns, depth));
}

// For needs_factors, before the barrier that completes the last step.
template <bool transpose, int columns, int depth, Mode mode, typename T>
METAL_FUNC void share_range(WeightRange range, int thread_index, threadgroup T* block) {
  if (may_exceed_range<T>(mode)) {
    const float largest = simd_max(range.largest);
    if (thread_index % 32 == 0) {
      block_padding<transpose, columns, depth>(block)[thread_index / 32] = largest;
    }
  }
}

// Sets the factor of a thread's weights, the same for all threads that unpack weights of the same columns. memory: a
// float for each thread.
template <bool transpose, int columns, int depth, Mode mode, int elements>
METAL_FUNC void set_range_factor(thread WeightRange& range, int thread_index, threadgroup float* memory) {
  threadgroup_barrier(mem_flags::mem_threadgroup);  // the last step has been multiplied, and needs_factors has read
  memory[thread_index] = range.largest;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  const BlockPlace own = block_place<transpose, columns, depth, mode, elements>(thread_index);
  for (int i = 0; i < range_threads; ++i) {
    const BlockPlace place = block_place<transpose, columns, depth, mode, elements>(i);
    if (transpose ? place.row == own.row : place.piece == own.piece) {
      range.largest = fmax(range.largest, memory[i]);
    }
  }
  range.factor = range_factor(range.largest);
}

// Writes the factor of the sums of each column to the beginning of `memory`.
template <bool transpose, int columns, int depth, Mode mode, int elements>
METAL_FUNC void store_sum_factors(WeightRange range, int thread_index, threadgroup float* memory) {
  const BlockPlace place = block_place<transpose, columns, depth, mode, elements>(thread_index);
  const float inverse = float_from_bits((254u << 23) - bits_from_float(range.factor));
  threadgroup_barrier(mem_flags::mem_threadgroup);  // the last step has been multiplied
  if (transpose) {
    if (place.piece == 0) {
      memory[place.row] = inverse;
    }
  } else if (place.row == 0) {
    for (int i = 0; i < elements; ++i) {
      memory[place.piece * elements + i] = inverse;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}

// After a pass: whether a weight was too large for T, so that a second pass with factors is needed. After that one,
// `scaled` is true and the factors of the sums are at `block`. The same for all threads.
template <bool transpose, int columns, int depth, Mode mode, int elements, typename T>
METAL_FUNC bool needs_factors(thread WeightRange& range, thread bool& scaled, int thread_index, threadgroup T* block) {
  if (!may_exceed_range<T>(mode)) {
    return false;
  }
  threadgroup float* memory = (threadgroup float*)block;
  if (scaled) {
    store_sum_factors<transpose, columns, depth, mode, elements>(range, thread_index, memory);
    return false;
  }
  const threadgroup float* padding = block_padding<transpose, columns, depth>(block);
  scaled = fmax(fmax(padding[0], padding[1]), fmax(padding[2], padding[3])) > largest_half;
  if (scaled) {
    set_range_factor<transpose, columns, depth, mode, elements>(range, thread_index, memory);
  }
  return scaled;
}

// --- Rows of x -----------------------------------------------------------------------------------------------------

// 16 bytes of a row. exist: elements that are in the matrix; the others are zeros.
METAL_FUNC uint4 fetch_piece(const device uint* source, int exist) {
  if (exist >= 4 && aligned_x) {
    return *(const device uint4*)source;
  }
  uint words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    words[i] = i < exist ? source[i] : 0u;
  }
  return uint4(words[0], words[1], words[2], words[3]);
}

METAL_FUNC uint4 fetch_piece(const device ushort* source, int exist) {
  if (exist >= 8 && aligned_x) {
    return *(const device uint4*)source;
  }
  uint words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint low = 2 * i < exist ? source[2 * i] : 0u;
    const uint high = 2 * i + 1 < exist ? source[2 * i + 1] : 0u;
    words[i] = low | (high << 16);
  }
  return uint4(words[0], words[1], words[2], words[3]);
}

METAL_FUNC uint4 fetch_piece(const device float* source, int exist) {
  return fetch_piece((const device uint*)source, exist);
}

METAL_FUNC uint4 fetch_piece(const device half* source, int exist) {
  return fetch_piece((const device ushort*)source, exist);
}

METAL_FUNC uint4 fetch_piece(const device bfloat* source, int exist) {
  return fetch_piece((const device ushort*)source, exist);
}

// A thread's share of a block of x, rows x depth, in pieces of 16 bytes: adjacent threads have adjacent pieces. The
// caller sets for each piece `source`, the beginning of its row of x, and `exist`, the elements of that row: K or 0.
template <typename T, int rows, int depth, int threads>
struct RowPieces {
  const device T* source[(rows * depth * sizeof(T) / 16 + threads - 1) / threads];
  int exist[(rows * depth * sizeof(T) / 16 + threads - 1) / threads];
  uint4 values[(rows * depth * sizeof(T) / 16 + threads - 1) / threads];
};

inline constexpr int row_pieces(int element_size, int depth) { return depth * element_size / 16; }

inline constexpr int pieces_per_thread(int element_size, int rows, int depth, int threads) {
  return (rows * row_pieces(element_size, depth) + threads - 1) / threads;
}

// The row of the block that a piece is in; `rows` or more where the thread has no such piece.
template <typename T, int depth, int threads>
METAL_FUNC int row_of_piece(int thread_index, int piece) {
  return (thread_index + piece * threads) / row_pieces(sizeof(T), depth);
}

// Row r of the block is row `lhs` of x, lhs being that of lane r.
template <typename T, int rows, int depth, int threads>
METAL_FUNC void gather_rows(
    const device T* x,
    long row_stride,
    int lhs,
    int thread_index,
    thread RowPieces<T, rows, depth, threads>& pieces) {
#pragma unroll
  for (int i = 0; i < pieces_per_thread(sizeof(T), rows, depth, threads); ++i) {
    const int row = row_of_piece<T, depth, threads>(thread_index, i);
    pieces.source[i] = x + simd_shuffle(lhs, static_cast<ushort>(row)) * row_stride;
  }
}

// The first `end` rows of the block have k elements, the others none.
template <typename T, int rows, int depth, int threads>
METAL_FUNC void set_rows(int end, int k, int thread_index, thread RowPieces<T, rows, depth, threads>& pieces) {
#pragma unroll
  for (int i = 0; i < pieces_per_thread(sizeof(T), rows, depth, threads); ++i) {
    const int row = row_of_piece<T, depth, threads>(thread_index, i);
    pieces.exist[i] = row < end ? k : 0;
  }
}

template <typename T, int rows, int depth, int threads>
METAL_FUNC void fetch_rows(int k, int thread_index, thread RowPieces<T, rows, depth, threads>& pieces) {
  constexpr int piece_elements = 16 / static_cast<int>(sizeof(T));
  const int first = k + thread_index % row_pieces(sizeof(T), depth) * piece_elements;
#pragma unroll
  for (int i = 0; i < pieces_per_thread(sizeof(T), rows, depth, threads); ++i) {
    pieces.values[i] = fetch_piece(pieces.source[i] + first, pieces.exist[i] - first);
  }
}

template <typename T, int rows, int depth, int threads>
METAL_FUNC void store_rows(
    thread const RowPieces<T, rows, depth, threads>& pieces,
    int thread_index,
    threadgroup T* block) {
  constexpr int piece_elements = 16 / static_cast<int>(sizeof(T));
  const int first = thread_index % row_pieces(sizeof(T), depth) * piece_elements;
#pragma unroll
  for (int i = 0; i < pieces_per_thread(sizeof(T), rows, depth, threads); ++i) {
    const int row = row_of_piece<T, depth, threads>(thread_index, i);
    if (rows * row_pieces(sizeof(T), depth) % threads == 0 || row < rows) {
      *(threadgroup uint4*)(block + row * padded<T>(depth) + first) = pieces.values[i];
    }
  }
}

}  // namespace quantization_mlx
