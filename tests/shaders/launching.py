"""What hand-planned launches of the shaders have in common."""

from __future__ import annotations

import functools
import struct

import numpy as np
import torch
from torch import Tensor

import oracle
import softmetal
from oracle import Format, Quantized
from repository import ROOT

# Function constants of products, in csrc/gpu/launch.h.
ALIGNED_OUTPUTS, ALIGNED_WEIGHTS, ALIGNED_X, ALIGNED_K, HAS_GLOBAL_SCALE, IS_GATED = PRODUCT_CONSTANTS = (*range(5), 22)
FOUR_BIT = Format("affine", 64, 4)
NVFP4 = Format("nvfp4", 16, 4)
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"


def kernel_name(format: Format, op: str, dtype: torch.dtype, rows: int = 1) -> str:
    suffix = f"_rows_{rows}" if rows > 1 else ""
    return f"{format.mode}_{op}_{oracle.name_of(dtype)}_gs_{format.group_size}_b_{format.bits}{suffix}"


def memory(tensor: Tensor | None) -> np.ndarray | None:
    """The whole storage under a tensor, as the device sees it; bfloat16 as uint16."""
    if tensor is None:
        return None
    flat = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
    return flat.view(torch.int16).numpy().view(np.uint16) if tensor.dtype == torch.bfloat16 else flat.numpy()


def unwritten(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.full(shape, 77, dtype=dtype)


def ceil(a: int, b: int) -> int:
    return -(-a // b)


def columns_of(weights: Quantized, transpose: bool) -> int:
    if weights.format.is_column_packed:
        return weights.w.shape[-1]
    return weights.w.shape[-2] if transpose else weights.w.shape[-1] * 32 // weights.format.bits


def expanded(weights: Quantized, outer: int = 1, inner: int = 1) -> Quantized:
    """The matrices [N, K] or [inner, N, K], broadcast to two batch dimensions."""
    return weights.map(lambda tensor: tensor.expand(outer, inner, -1, -1))


# The integers of ProductParams; no product here ends in an activation.
PRODUCT_PARAMS = "<14q6i8x"
SORT_PAIRS_PARAMS = "<5i"
SORTING_THREADS = 1024


@functools.cache
def sorter() -> softmetal.Library:
    return softmetal.compile(ROOT / "metal/quantized/sort_pairs.metal")


def tiles_of_pairs(
    lhs: Tensor, rhs: Tensor, rows_of_x: int, matrices: int, tile_rows: int, library: softmetal.Library | None = None
) -> tuple[Tensor, Tensor]:
    """By sort_pairs: tiles, each a matrix, the first one of its pairs and their count, and the pairs with their x."""
    begun = min(len(rhs), matrices + 1)
    tiles = begun + (len(rhs) - begun) // tile_rows
    result = unwritten(3 * tiles + 2 * len(rhs), dtype=torch.int32)
    params = struct.pack(SORT_PAIRS_PARAMS, len(rhs), rows_of_x, matrices, tile_rows, tiles)
    buffers = [*map(memory, (lhs, rhs, result)), params]
    report = (library or sorter()).launch("sort_pairs", buffers, (1, 1, 1), (SORTING_THREADS, 1, 1), seed=1)
    assert not report.errors, "\n".join(report.errors)
    return result[: 3 * tiles].clone().view(-1, 3), result[3 * tiles :].clone().view(-1, 2)
