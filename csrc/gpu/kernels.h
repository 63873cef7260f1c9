// Every kernel: its name, and the template of metal/ that it is an instance of. Macros, because both read them: the
// host for the kernels of a plan and the one instance that a library compiled at run time holds, and the .metal files
// for all instances of a library that is compiled beforehand.
//
// KERNEL(name, instance) for each kernel of an element type T, that of x and y, and a format. A name is `before`, such
// as "affine_", the op, `after`, such as "_float16_gs_64_b_4", and for several rows "_rows_2". The last arguments are
// those of the format: Mode::affine, 64, 4.
//
// A table of packed rows has two parts: what models are run with, x @ w.T, and what is x @ w, as their gradients are.
#pragma once

#define MATVEC_KERNELS_rows(...) MATVEC_KERNELS_inference(__VA_ARGS__) MATVEC_KERNELS_training(__VA_ARGS__)
#define MATMUL_KERNELS_rows(...) MATMUL_KERNELS_inference(__VA_ARGS__) MATMUL_KERNELS_training(__VA_ARGS__)
#define TENSOR_KERNELS_rows(...) TENSOR_KERNELS_inference(__VA_ARGS__) TENSOR_KERNELS_training(__VA_ARGS__)
#define QUANTIZE_KERNELS_rows(...) QUANTIZE_KERNELS_inference(__VA_ARGS__)

// --- Matvecs -------------------------------------------------------------------------------------------------------

#define MATVEC_KERNELS_inference(KERNEL, before, after, T, ...)              \
  KERNEL(before "qmv" after, qmv<T, __VA_ARGS__, 1>)                         \
  KERNEL(before "qmv" after "_rows_2", qmv<T, __VA_ARGS__, 2>)               \
  KERNEL(before "qmv" after "_rows_3", qmv<T, __VA_ARGS__, 3>)               \
  KERNEL(before "qmv" after "_rows_4", qmv<T, __VA_ARGS__, 4>)               \
  KERNEL(before "qmv" after "_rows_6", qmv<T, __VA_ARGS__, 6>)               \
  KERNEL(before "qmv" after "_rows_8", qmv<T, __VA_ARGS__, 8>)               \
  KERNEL(before "qmv" after "_rows_12", qmv<T, __VA_ARGS__, 12>)             \
  KERNEL(before "gather_qmv" after, gather_qmv<T, __VA_ARGS__, 1>)           \
  KERNEL(before "gather_qmv" after "_rows_4", gather_qmv<T, __VA_ARGS__, 4>) \
  KERNEL(before "gather_qmv" after "_rows_8", gather_qmv<T, __VA_ARGS__, 8>) \
  KERNEL(before "gather_qmv" after "_rows_12", gather_qmv<T, __VA_ARGS__, 12>)

#define MATVEC_KERNELS_training(KERNEL, before, after, T, ...)                     \
  QVM_KERNELS(KERNEL, before, after, qvm, gather_qvm, 1, T, __VA_ARGS__)           \
  KERNEL(before "gather_qvm_splitk" after, gather_qvm<T, __VA_ARGS__, 1, float>)   \
  PLAIN_QVM_KERNELS(KERNEL, before, after "_rows_2", qvm, 2, T, __VA_ARGS__)       \
  QVM_KERNELS(KERNEL, before, after "_rows_4", qvm, gather_qvm, 4, T, __VA_ARGS__) \
  QVM_KERNELS(KERNEL, before, after "_rows_8", qvm, gather_qvm, 8, T, __VA_ARGS__)

// Where columns are packed.
#define MATVEC_KERNELS_columns(KERNEL, before, after, T, ...)                                    \
  QVM_KERNELS(KERNEL, before, after, column_qvm, gather_column_qvm, 1, T, __VA_ARGS__)           \
  QVM_KERNELS(KERNEL, before, after "_rows_4", column_qvm, gather_column_qvm, 4, T, __VA_ARGS__) \
  QVM_KERNELS(KERNEL, before, after "_rows_8", column_qvm, gather_column_qvm, 8, T, __VA_ARGS__)

#define QVM_KERNELS(KERNEL, before, after, plain, gathered, rows, T, ...) \
  PLAIN_QVM_KERNELS(KERNEL, before, after, plain, rows, T, __VA_ARGS__)   \
  KERNEL(before "gather_qvm" after, gathered<T, __VA_ARGS__, rows, T>)

#define PLAIN_QVM_KERNELS(KERNEL, before, after, plain, rows, T, ...) \
  KERNEL(before "qvm" after, plain<T, __VA_ARGS__, rows, T>)          \
  KERNEL(before "qvm_splitk" after, plain<T, __VA_ARGS__, rows, float>)

// Of a type alone.
#define SUM_KERNELS(KERNEL, after, T) KERNEL("sum_parts" after, sum_parts<T>)

// Of neither: of 64-bit indices.
#define PAIR_KERNELS(KERNEL) KERNEL("sort_pairs", sort_pairs<long>)

// --- Between products, of a type alone ------------------------------------------------------------------------------

#define NORM_KERNELS(KERNEL, after, T)                 \
  KERNEL("rms_norm" after, norm<T, false, true>)       \
  KERNEL("rms_norm_long" after, norm<T, false, false>) \
  KERNEL("layer_norm" after, norm<T, true, true>)      \
  KERNEL("layer_norm_long" after, norm<T, true, false>)

#define ROPE_CACHE_KERNELS(KERNEL, after, T) KERNEL("rope_into_cache" after, rope_into_cache<T>)
// --- What else stands between products, of a type alone --------------------------------------------------------------

#define ROPE_KERNELS(KERNEL, after, T) \
  KERNEL("rope" after, rope<T, false>) \
  KERNEL("rope_traditional" after, rope<T, true>)

#define GATE_KERNELS(KERNEL, after, T)          \
  KERNEL("swiglu" after, gate<T, Gate::swiglu>) \
  KERNEL("geglu" after, gate<T, Gate::geglu>)   \
  KERNEL("geglu_tanh" after, gate<T, Gate::geglu_tanh>)

// --- Sampling, of a type alone --------------------------------------------------------------------------------------

#define SAMPLE_KERNELS(KERNEL, after, T) KERNEL("sample" after, sample<T>)

// --- Mixtures of experts, of a type alone ---------------------------------------------------------------------------

#define MOE_KERNELS(KERNEL, after, T)               \
  KERNEL("moe_router_32" after, moe_router<T, 1>)   \
  KERNEL("moe_router_64" after, moe_router<T, 2>)   \
  KERNEL("moe_router_128" after, moe_router<T, 4>)  \
  KERNEL("moe_router_256" after, moe_router<T, 8>)  \
  KERNEL("moe_router_512" after, moe_router<T, 16>) \
  KERNEL("moe_combine" after, moe_combine<T, T>)

#define MOE_HALF_KERNELS(KERNEL, after, T) KERNEL("moe_combine_float32_weights" after, moe_combine<T, float>)

// --- Images, of the type of their pixels ----------------------------------------------------------------------------

#define IMAGE_KERNELS(KERNEL, after, T) KERNEL("resample_image" after, resample_image<T>)

// --- Attention, of a type alone
// ---------------------------------------------------------------------------------------

// By the largest head size, which the elements of a lane are for. More rows hold too many of them.
#define ATTENTION_KERNELS(KERNEL, after, T)                                \
  ATTENTION_ROWS_4(KERNEL, "attention_64" after, T, 2, 1, 1)               \
  KERNEL("attention_64" after "_rows_8", attention_vector<T, 2, 1, 1, 8>)  \
  ATTENTION_ROWS_4(KERNEL, "attention_128" after, T, 4, 1, 1)              \
  KERNEL("attention_128" after "_rows_8", attention_vector<T, 4, 1, 1, 8>) \
  ATTENTION_ROWS_4(KERNEL, "attention_256" after, T, 8, 1, 1)              \
  ATTENTION_ROWS_2(KERNEL, "attention_576" after, T, 4, 5, 4)              \
  KERNEL("attention_combine" after, attention_combine<T>)

#define ATTENTION_ROWS_4(KERNEL, name, T, ...)   \
  ATTENTION_ROWS_2(KERNEL, name, T, __VA_ARGS__) \
  KERNEL(name "_rows_4", attention_vector<T, __VA_ARGS__, 4>)

#define ATTENTION_ROWS_2(KERNEL, name, T, ...)      \
  KERNEL(name, attention_vector<T, __VA_ARGS__, 1>) \
  KERNEL(name "_rows_2", attention_vector<T, __VA_ARGS__, 2>)

// By the largest head size; of float32, whose blocks take twice the memory, up to 128.
#define ATTENTION_TILE_KERNELS(KERNEL, after, T)           \
  KERNEL("attention_tile_64" after, attention_tile<T, 64>) \
  KERNEL("attention_tile_128" after, attention_tile<T, 128>)

#define ATTENTION_TILE_HALF_KERNELS(KERNEL, after, T) KERNEL("attention_tile_256" after, attention_tile<T, 256>)

// On tensor operations: not of float32.
#define ATTENTION_TENSOR_KERNELS(KERNEL, after, T)                   \
  KERNEL("attention_tile_nax_64" after, attention_tile_nax<T, 64>)   \
  KERNEL("attention_tile_nax_128" after, attention_tile_nax<T, 128>) \
  KERNEL("attention_tile_nax_256" after, attention_tile_nax<T, 256>)

// --- Tiles ---------------------------------------------------------------------------------------------------------

#define MATMUL_KERNELS_inference(KERNEL, before, after, T, ...) \
  QMM_KERNELS(KERNEL, before, "_t", after, true, T, __VA_ARGS__)

#define MATMUL_KERNELS_training(KERNEL, before, after, T, ...) \
  QMM_KERNELS(KERNEL, before, "_n", after, false, T, __VA_ARGS__)

// Where columns are packed, blocks of w are laid out as transposed ones: see tile.h.
#define MATMUL_KERNELS_columns(KERNEL, before, after, T, ...) \
  QMM_KERNELS(KERNEL, before, "_n", after, true, T, __VA_ARGS__)

#define QMM_KERNELS(KERNEL, before, side, after, transpose, T, ...)                                    \
  KERNEL(before "qmm" side after "_rows_16", qmm<T, __VA_ARGS__, 16, transpose, T>)                    \
  KERNEL(before "qmm" side after "_rows_32", qmm<T, __VA_ARGS__, 32, transpose, T>)                    \
  KERNEL(before "qmm" side after "_rows_64", qmm<T, __VA_ARGS__, 64, transpose, T>)                    \
  KERNEL(before "qmm" side "_splitk" after "_rows_16", qmm<T, __VA_ARGS__, 16, transpose, float>)      \
  KERNEL(before "qmm" side "_splitk" after "_rows_32", qmm<T, __VA_ARGS__, 32, transpose, float>)      \
  KERNEL(before "qmm" side "_splitk" after "_rows_64", qmm<T, __VA_ARGS__, 64, transpose, float>)      \
  KERNEL(before "gather_qmm" side after "_rows_32", gather_qmm<T, __VA_ARGS__, 32, transpose>)         \
  KERNEL(before "gather_qmm_rhs" side after "_rows_16", gather_qmm_rhs<T, __VA_ARGS__, 16, transpose>) \
  KERNEL(before "gather_qmm_rhs" side after "_rows_32", gather_qmm_rhs<T, __VA_ARGS__, 32, transpose>)

// --- Tensor operations: not of float32 -----------------------------------------------------------------------------

#define TENSOR_KERNELS_inference(KERNEL, before, after, T, ...) \
  QMM_NAX_KERNELS(KERNEL, before, "_t", after, true, T, __VA_ARGS__)

#define TENSOR_KERNELS_training(KERNEL, before, after, T, ...) \
  QMM_NAX_KERNELS(KERNEL, before, "_n", after, false, T, __VA_ARGS__)

#define TENSOR_KERNELS_columns(KERNEL, before, after, T, ...) \
  QMM_NAX_KERNELS(KERNEL, before, "_n", after, true, T, __VA_ARGS__)

// Tiles of 128 rows are for products that have enough of them: K is not split.
#define QMM_NAX_KERNELS(KERNEL, before, side, after, transpose, T, ...)                                   \
  KERNEL(before "qmm" side "_nax" after "_rows_32", qmm_nax<T, __VA_ARGS__, 32, transpose, T>)            \
  KERNEL(before "qmm" side "_nax" after "_rows_64", qmm_nax<T, __VA_ARGS__, 64, transpose, T>)            \
  KERNEL(before "qmm" side "_nax" after "_rows_128", qmm_nax<T, __VA_ARGS__, 128, transpose, T>)          \
  KERNEL(before "qmm" side "_nax_splitk" after "_rows_32", qmm_nax<T, __VA_ARGS__, 32, transpose, float>) \
  KERNEL(before "qmm" side "_nax_splitk" after "_rows_64", qmm_nax<T, __VA_ARGS__, 64, transpose, float>) \
  KERNEL(before "gather_qmm_rhs" side "_nax" after "_rows_32", gather_qmm_rhs_nax<T, __VA_ARGS__, transpose>)

// --- Conversions ---------------------------------------------------------------------------------------------------

#define QUANTIZE_KERNELS_inference(KERNEL, before, after, T, ...) \
  KERNEL(before "quantize" after, quantize<T, __VA_ARGS__>)       \
  KERNEL(before "dequantize" after, dequantize<T, __VA_ARGS__>)

// None besides.
#define QUANTIZE_KERNELS_training(...)

#define QUANTIZE_KERNELS_columns(KERNEL, before, after, T, ...)     \
  KERNEL(before "quantize" after, quantize_columns<T, __VA_ARGS__>) \
  KERNEL(before "dequantize" after, dequantize_columns<T, __VA_ARGS__>)
