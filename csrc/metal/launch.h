// What the host and the Metal shaders agree on for a launch: parameter structs, function constants and grid constants.
// Valid C++ and valid MSL; every struct has the same layout in both, with the 64-bit fields first.
#pragma once

#ifdef __METAL_VERSION__
#include <metal_stdlib>
#else
#include <cstdint>
#endif

// Function constants, all bool. Macros, because MSL wants literals as their indices.
#define QUANTIZATION_MLX_ALIGNED_OUTPUTS 0  // N is a multiple of the outputs of one threadgroup
#define QUANTIZATION_MLX_ALIGNED_WEIGHTS 1  // every run of packed weights starts at a multiple of its load width
#define QUANTIZATION_MLX_ALIGNED_X 2  // every row of x starts at a multiple of 16 bytes
#define QUANTIZATION_MLX_HAS_GLOBAL_SCALE 3  // nvfp4 with a global scale
#define QUANTIZATION_MLX_HAS_LHS_INDICES 4  // gather: else the position in the index grid is the index
#define QUANTIZATION_MLX_HAS_RHS_INDICES 5

namespace quantization_mlx {

// The z dimension of a grid counts two batch dimensions, z = outer * inner_size + inner. Every operand has its own
// strides, 0 where it is broadcast; in elements, for weights in 32-bit words.
struct BatchStrides {
  int64_t outer;
  int64_t inner;
};

// Products of a few rows: y [batch, parts, rows, N] = x [batch, rows, K] times a quantized matrix.
struct MatvecParams {
  BatchStrides x;
  BatchStrides w;
  BatchStrides scales;
  BatchStrides biases;
  BatchStrides global_scale;
  int64_t x_row_stride;
  int inner_size;
  int rows;
  int k;
  int n;
  int parts;  // split-K: launches of the y dimension; 1 without
  int part_steps;  // of K for each part: runs of 32 elements if w is transposed, else single rows of w
};

// As MatvecParams, with matrices chosen by flat indices. In `matvec` the outer strides lead from one matrix to the next
// and the inner ones are unused.
struct GatherParams {
  MatvecParams matvec;
  BatchStrides lhs_indices;
  BatchStrides rhs_indices;
  int lhs_count;  // matrices of x
  int rhs_count;  // matrices of w
  int lhs_words;  // 32-bit words of an index: 1 or 2
  int rhs_words;
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

}  // namespace quantization_mlx
