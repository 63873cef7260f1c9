"""AWQ layers and checkpoints, of the version "gemm"."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .layer import (
    ConvertedLinear,
    Method,
    StoredLayer,
    check,
    check_words,
    checked,
    equal_runs,
    in_mlx_format,
    pack,
    unpack,
)

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # column of each 4-bit field of a word


def convert_awq(
    qweight: Tensor, qzeros: Tensor | None, scales: Tensor, dtype: torch.dtype | None = None
) -> ConvertedLinear:
    """A 4-bit AWQ layer (version "gemm") in MLX's format.

    Args:
        qweight: int32 [in, out / 8], eight columns per word in the order 0, 2, 4, 6, 1, 3, 5, 7.
        qzeros: int32 [groups, out / 8], packed alike; None if all zeros are 8.
        scales: [groups, out]; the groups are runs of in / groups inputs.
        dtype: of the new scales and biases; None for that of `scales` if it holds the biases exactly, or else float32.

    Raises:
        ValueError: a shape or dtype is another, a scale is not finite, or the groups do not divide into groups of 32.
    """
    return in_mlx_format(_layer(qweight, qzeros, scales), dtype)


def _layer(qweight: Tensor, qzeros: Tensor | None, scales: Tensor) -> StoredLayer:
    check(scales.dim() == 2, f"scales {list(scales.shape)} should be [groups, out]")
    check(qweight.dim() == 2, f"qweight {list(qweight.shape)} should be [in, out / 8]")
    (groups, rows), columns = scales.shape, qweight.shape[0]
    check_words("qweight", qweight, (columns, rows // 8))
    if qzeros is None:
        zeros = torch.full((rows, groups), 8, dtype=torch.int32)
    else:
        check_words("qzeros", qzeros, (groups, rows // 8))
        zeros = _unpack_awq(qzeros).T.to(torch.int32)
    return checked(
        4, zeros, scales.T, equal_runs(columns, groups), lambda: pack(_unpack_awq(qweight).T.contiguous(), 4)
    )


def _unpack_awq(words: Tensor) -> Tensor:
    """uint8 codes [..., 8 * words] in the order of the columns."""
    fields = unpack(words, 4).unflatten(-1, (-1, 8))
    return fields[..., [_AWQ_ORDER.index(column) for column in range(8)]].flatten(-2)


def _read(stored: Mapping[str, Tensor], path: str, record: Mapping[str, Any]) -> StoredLayer:
    return _layer(stored[f"{path}.qweight"], stored.get(f"{path}.qzeros"), stored[f"{path}.scales"])


METHOD = Method(_read, ("qweight", "qzeros", "scales"), ("version", "format"), ("gemm",))
