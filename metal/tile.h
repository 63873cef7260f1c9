// Blocks of a quantized matrix on their way to threadgroup memory, for the tiled products.
//
//   w [N, K], transposed: 64 rows x depth      w [K, N]: depth rows x 64
//   +-----------+-----------+                  +-----------+-----------+-----------+-----------+
//   | thread 0  | thread 1  |  row 0           | thread 0  | thread 1  | thread 2  | thread 3  |  row 0
//   +-----------+-----------+                  +-----------+-----------+-----------+-----------+
//   | thread 2  | thread 3  |  row 1           | thread 4  | ...
//   +-----------+-----------+                  +-----------+
//
// Every thread takes 16 or 32 consecutive weights of one row, which have one scale (16 in nvfp4: one each), in two
// moves: fetch_block loads them, packed, into registers, where they may wait until other threads have done with
// threadgroup memory; store_block unpacks them, to where they lie in the block. What is beyond the matrix becomes
// zeros. The block keeps w's own order of rows, so neither move asks what the product is.
//
//   w [K, N] of packed columns: depth x 64          the block: 64 rows x depth, as of w [N, K]
//   +----------+----------+-----+-----------+       +------------+-------------+
//   | thread 0 | thread 1 | ... | thread 63 |       | thread 0   | thread 64   |  column 0
//   +----------+----------+-----+-----------+       +------------+-------------+
//   | thread 64| ...                        |       | thread 1   | ...
//   +----------+----------------------------+       +------------+
//
// There a thread's weights follow one another down a column: its words lie a row apart, and those of adjacent threads
// side by side. Unpacked, they are a piece of a row of the transposed block, in vector stores of which eight threads
// meet all memory banks once; so the product is the one with w transposed.
#pragma once

#include <metal_stdlib>

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

// --- Unpacking -----------------------------------------------------------------------------------------------------

template <Mode mode, int group_size, int bits, int elements>
struct PackedWeights {
  static_assert(elements == half_run_elements || elements == run_elements, "a thread takes a run or half of one");
  uint words[(elements * bits + 31) / 32];
  float scales[elements > group_size ? elements / group_size : 1];
  float biases[elements > group_size ? elements / group_size : 1];
};

// Eight consecutive elements to threadgroup memory. target is a multiple of 16 bytes.
inline void store_chunk(thread const float* values, threadgroup float* target) {
  ((threadgroup float4*)target)[0] = float4(values[0], values[1], values[2], values[3]);
  ((threadgroup float4*)target)[1] = float4(values[4], values[5], values[6], values[7]);
}

template <typename T>
inline void store_chunk(thread const float* values, threadgroup T* target) {
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

// `exist` of the elements from `first` on in row `row` do: all, half of them (of a run, in nvfp4), or none.
template <Mode mode, int group_size, int bits, int elements, typename T, typename Scale>
inline void fetch_weights(
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

// As fetch_weights, for `elements` of column `column` from row k on, which all exist or do not.
template <Mode mode, int group_size, int bits, int elements, typename T, typename Scale>
inline void fetch_column_weights(
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
inline void fetch_block(
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

// Unpacks them into the block in threadgroup memory, whose rows are padded<T>.
template <bool transpose, int columns, int depth, typename T, Mode mode, int group_size, int bits, int elements>
inline void store_block(
    thread const PackedWeights<mode, group_size, bits, elements>& packed,
    int thread_index,
    threadgroup T* block) {
  constexpr int row_elements = block_row_elements(transpose, columns, depth);
  constexpr int threads_per_row = row_elements / elements;
  constexpr int group_chunks = group_size / chunk_elements;
  const int row = is_column_packed(mode) ? thread_index % columns : thread_index / threads_per_row;
  const int piece = is_column_packed(mode) ? thread_index / columns : thread_index % threads_per_row;
  threadgroup T* target = block + row * padded<T>(row_elements) + piece * elements;
#pragma unroll
  for (int chunk = 0; chunk < elements / chunk_elements; ++chunk) {
    const float scale = packed.scales[chunk / group_chunks];
    const float bias = packed.biases[chunk / group_chunks];
    float values[chunk_elements];
    decode_chunk<mode, bits>(packed.words, chunk, values);
#pragma unroll
    for (int i = 0; i < chunk_elements; ++i) {
      values[i] = fma(values[i], scale, bias);
    }
    store_chunk(values, target + chunk * chunk_elements);
  }
}

// --- Rows of x -----------------------------------------------------------------------------------------------------

// 16 bytes of a row, of which `exist` elements do; the others are zeros.
inline uint4 fetch_piece(const device uint* source, int exist) {
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

inline uint4 fetch_piece(const device ushort* source, int exist) {
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

inline uint4 fetch_piece(const device float* source, int exist) {
  return fetch_piece((const device uint*)source, exist);
}

inline uint4 fetch_piece(const device half* source, int exist) {
  return fetch_piece((const device ushort*)source, exist);
}

inline uint4 fetch_piece(const device bfloat* source, int exist) {
  return fetch_piece((const device ushort*)source, exist);
}

// A thread's share of a block of x, rows x depth, in pieces of 16 bytes: neighbouring threads have neighbouring pieces.
// The caller sets `source`, a row of x from its first element on, and how many elements of it exist: K or none.
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

// The row of the block that a thread's piece lies in; `rows` or more where the thread has no such piece.
template <typename T, int depth, int threads>
inline int row_of_piece(int thread_index, int piece) {
  return (thread_index + piece * threads) / row_pieces(sizeof(T), depth);
}

template <typename T, int rows, int depth, int threads>
inline void fetch_rows(int k, int thread_index, thread RowPieces<T, rows, depth, threads>& pieces) {
  constexpr int piece_elements = 16 / static_cast<int>(sizeof(T));
  const int first = k + thread_index % row_pieces(sizeof(T), depth) * piece_elements;
#pragma unroll
  for (int i = 0; i < pieces_per_thread(sizeof(T), rows, depth, threads); ++i) {
    pieces.values[i] = fetch_piece(pieces.source[i] + first, pieces.exist[i] - first);
  }
}

template <typename T, int rows, int depth, int threads>
inline void store_rows(
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
