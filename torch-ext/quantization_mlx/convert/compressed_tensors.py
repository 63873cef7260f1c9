"""Layers and checkpoints of compressed-tensors, in the format "pack-quantized"."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .layer import ConvertedLinear, Method, StoredLayer, check, check_words, checked, equal_runs, in_mlx_format, unpack


def convert_compressed_tensors(
    weight_packed: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None = None,
    weight_g_idx: Tensor | None = None,
    bits: int = 4,
    dtype: torch.dtype | None = None,
) -> ConvertedLinear:
    """A layer of the compressed-tensors format "pack-quantized" in MLX's.

    Args:
        weight_packed: int32 [out, in * bits / 32], the values plus 2^(bits - 1).
        weight_scale: [out, groups].
        weight_zero_point: int32 [out * bits / 32, groups], packed along the outputs; None if symmetric.
        weight_g_idx: as in `convert_gptq`.
        bits: 2, 4 or 8.
        dtype: of the new scales and biases; None for that of `weight_scale` if it holds the biases exactly, or else
            float32.

    Raises:
        ValueError: as in `convert_gptq`.
    """
    return in_mlx_format(_layer(weight_packed, weight_scale, weight_zero_point, weight_g_idx, bits), dtype)


def _layer(words: Tensor, scales: Tensor, zero_point: Tensor | None, g_idx: Tensor | None, bits: int) -> StoredLayer:
    check(bits in (2, 4, 8), f"{bits} bits; supported are (2, 4, 8)")
    check(scales.dim() == 2, f"weight_scale {list(scales.shape)} should be [out, groups]")
    check(words.dim() == 2, f"weight_packed {list(words.shape)} should be [out, in * {bits} / 32]")
    (rows, groups), columns = scales.shape, words.shape[1] * 32 // bits
    check_words("weight_packed", words, (rows, columns * bits // 32))
    if zero_point is None:
        zeros = torch.full((rows, groups), 1 << (bits - 1), dtype=torch.int32)
    else:
        check_words("weight_zero_point", zero_point, (rows * bits // 32, groups))
        zeros = unpack(zero_point.T, bits).T.to(torch.int32)
    if g_idx is not None:
        check(g_idx.shape == (columns,), f"weight_g_idx {list(g_idx.shape)} should be [{columns}]")
    input_groups = equal_runs(columns, groups) if g_idx is None else g_idx
    return checked(bits, zeros, scales, input_groups, lambda: words.contiguous().view(torch.uint32))


def _read(stored: Mapping[str, Tensor], path: str, record: Mapping[str, Any]) -> StoredLayer:
    packed, shape = stored[f"{path}.weight_packed"], stored[f"{path}.weight_shape"].tolist()
    further = (stored.get(f"{path}.{name}") for name in ("weight_zero_point", "weight_g_idx"))
    return _layer(packed, stored[f"{path}.weight_scale"], *further, packed.shape[-1] * 32 // shape[-1])


_TENSORS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")
METHOD = Method(_read, _TENSORS, ("format",), ("pack-quantized",))
