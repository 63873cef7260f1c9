"""GPTQ layers and checkpoints."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .layer import ConvertedLinear, Method, StoredLayer, check, check_words, checked, equal_runs, in_mlx_format, unpack

_BITS = (2, 3, 4, 8)


def convert_gptq(
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    g_idx: Tensor | None = None,
    bits: int = 4,
    zeros_minus_one: bool = True,
    dtype: torch.dtype | None = None,
) -> ConvertedLinear:
    """A GPTQ layer of 2, 3, 4 or 8 bits in MLX's format.

    Args:
        qweight: int32 [in * bits / 32, out], the inputs packed into words from the lowest bits up.
        qzeros: int32 [groups, out * bits / 32], packed likewise along the outputs.
        scales: [groups, out].
        g_idx: integers [in], the group of each input; None for runs of equal length. With act-order the result has a
            permutation.
        bits: of a code.
        zeros_minus_one: whether `qzeros` holds zero - 1, as the format "gptq" does and "gptq_v2" does not.
        dtype: of the new scales and biases; None for that of `scales` if it holds the biases exactly, or else float32.

    Raises:
        ValueError: a shape or dtype is another, a scale is not finite, a group has a number of inputs that is no
            multiple of 32, or zeros_minus_one finds the largest code, from which readers make different zeros.
    """
    return in_mlx_format(_layer(qweight, qzeros, scales, g_idx, bits, zeros_minus_one), dtype)


def _layer(
    qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor | None, bits: int, zeros_minus_one: bool
) -> StoredLayer:
    check(bits in _BITS, f"{bits} bits; supported are {_BITS}")
    check(scales.dim() == 2, f"scales {list(scales.shape)} should be [groups, out]")
    check(qweight.dim() == 2, f"qweight {list(qweight.shape)} should be [in * {bits} / 32, out]")
    (groups, rows), columns = scales.shape, qweight.shape[0] * 32 // bits
    check_words("qweight", qweight, (columns * bits // 32, rows))
    check_words("qzeros", qzeros, (groups, rows * bits // 32))
    zeros = unpack(qzeros, bits).T.to(torch.int32)
    if zeros_minus_one:
        ambiguous = (zeros == (1 << bits) - 1).any()
        check(
            not ambiguous,
            f"qzeros holds {(1 << bits) - 1}, which readers of this format take for a zero of {1 << bits} or of 0",
        )
        zeros = zeros + 1
    if g_idx is not None:
        check(g_idx.shape == (columns,), f"g_idx {list(g_idx.shape)} should be [{columns}]")
        if not g_idx.any():  # some writers store zeros
            g_idx = None
    input_groups = equal_runs(columns, groups) if g_idx is None else g_idx
    return checked(bits, zeros, scales.T, input_groups, lambda: qweight.T.contiguous().view(torch.uint32))


def _read(stored: Mapping[str, Tensor], path: str, record: Mapping[str, Any]) -> StoredLayer:
    qweight, g_idx = stored[f"{path}.qweight"], stored.get(f"{path}.g_idx")
    # Layers may have different bits; the shapes tell.
    if g_idx is not None and not g_idx.numel():
        g_idx = None
    bits = record["bits"] if g_idx is None else qweight.shape[0] * 32 // len(g_idx)
    minus_one = record["variant"] == "gptq"
    return _layer(qweight, stored[f"{path}.qzeros"], stored[f"{path}.scales"], g_idx, bits, minus_one)


METHOD = Method(_read, ("qweight", "qzeros", "scales", "g_idx"), ("checkpoint_format", "format"), ("gptq", "gptq_v2"))
