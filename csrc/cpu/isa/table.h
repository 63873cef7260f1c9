// All kernels of one instruction set.
#pragma once

#include "../fast/attention.h"
#include "../fast/moe.h"
#include "../fast/gates.h"
#include "../fast/rotation.h"
#include "../fast/rows.h"
#include "../fast/sample.h"
#include "../product/broadcast.h"
#include "../product/plain.h"
#include "../product/streamed.h"
#include "../product/tiled.h"

namespace quantization_mlx::cpu {
namespace {

int64_t workspace(const Product& product) {
  const int64_t block = lanes * unit_elements(product.format.bits);
  const int64_t tiled = max_tiled_columns * panel_stride_floats;
  static_assert(panel_steps <= panel_stride_floats);  // enough for the broadcasting product, too
  const int64_t plain = (plain_panel_rows + product.rows) * block;
  return tiled > plain ? tiled : plain;
}

constexpr DecoderKernels decoder_table = {rms_norm,     layer_norm, gate,         angles,     rotate_heads, attend,
                                          exponentials, sigmoids,   add_multiple, logit_keys, token_weights};

constexpr ProductKernels exact_table{
    broadcast_is_faster,
    packed_row,
    pack_row,
    workspace,
    {for_format<Streamed>, for_format<Tiled>, for_format<Broadcast>, for_format<Plain>}};

// bfloat16: whether this machine multiplies it.
constexpr Kernels make_table(
    const char* name,
    bool bfloat16,
    bool split,
    const ProductKernels* int8 = nullptr,
    const ProductKernels& exact = exact_table) {
  return {name, bfloat16, split, exact, int8, to_float32, from_float32, decoder_table};
}

}  // namespace
}  // namespace quantization_mlx::cpu
