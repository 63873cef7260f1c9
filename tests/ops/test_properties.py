"""Shapes, formats, dtypes and layouts drawn by hypothesis, each against float64 or mlx."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import oracle
import quantization_mlx as qm
from cases import DTYPES, FORMATS
from oracle import Format, Quantized

formats = st.sampled_from(FORMATS)
dtypes = st.sampled_from(DTYPES)
seeds = st.integers(0, 2**16)
rows = st.integers(0, 70)
batches = st.lists(st.integers(0, 3), max_size=3).map(tuple)


def _strided(tensor: Tensor, layout: str) -> Tensor:
    """The same values with other strides."""
    if layout == "transposed" and tensor.dim() > 1:
        return tensor.mT.contiguous().mT
    if layout == "padded":
        return torch.nn.functional.pad(tensor.float(), (0, 3)).to(tensor.dtype)[..., : tensor.shape[-1]]
    return tensor


@st.composite
def broadcast_pairs(draw: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Two leading shapes that broadcast."""
    full = draw(batches)
    pair = []
    for _ in range(2):
        shape = [size if draw(st.booleans()) else 1 for size in full]
        pair.append(tuple(shape[draw(st.integers(0, len(shape))) :]))
    return pair[0], pair[1]


Sizes, Pair = tuple[int, int, int], tuple[tuple[int, ...], tuple[int, ...]]
pairs, layouts = broadcast_pairs(), st.sampled_from(["contiguous", "transposed", "padded"])


@given(formats, dtypes, st.tuples(st.integers(1, 70), st.integers(1, 5), rows), st.booleans(), pairs, layouts, seeds)
@settings(max_examples=300)
def test_quantized_matmul(
    device: str, format: Format, dtype: torch.dtype, sizes: Sizes, transpose: bool, batch: Pair, layout: str, seed: int
) -> None:
    (rows_of_w, groups, M), (x_leading, w_leading) = sizes, batch
    weights = oracle.random_quantized(format, *w_leading, rows_of_w, groups * format.group_size, dtype=dtype, seed=seed)
    matrix = weights.matrix(transpose)
    x = oracle.random_x(*x_leading, M, matrix.shape[-2], dtype=dtype, seed=seed)
    ours = qm.quantized_matmul(_strided(x, layout).to(device), *weights.to(device).tensors, transpose, **format.options)
    flat = matrix.reshape(-1, *matrix.shape[-2:])
    bounds = [oracle.error_bound(x.reshape(-1, x.shape[-1]), each, dtype) for each in flat]
    oracle.assert_within(ours, x.double() @ matrix, max(bounds, default=0.0))


@given(formats, dtypes, st.data(), st.booleans(), st.booleans(), seeds)
@settings(max_examples=200)
def test_gather_qmm(
    device: str, format: Format, dtype: torch.dtype, data: st.DataObject, transpose: bool, sort: bool, seed: int
) -> None:
    rows_of_w, groups = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 3))
    experts, batch = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 6))
    pairs = data.draw(st.lists(st.tuples(st.integers(0, batch - 1), st.integers(0, experts - 1)), max_size=40))
    if sort:
        pairs.sort(key=lambda pair: pair[1])
    lhs, rhs = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).unbind(1)
    weights = oracle.random_quantized(format, experts, rows_of_w, groups * format.group_size, dtype=dtype, seed=seed)
    matrix = weights.matrix(transpose)
    x = oracle.random_x(batch, data.draw(st.integers(1, 4)), matrix.shape[-2], dtype=dtype, seed=seed)
    operands = (x.to(device), *weights.to(device).tensors, lhs.to(device), rhs.to(device))
    ours = qm.gather_qmm(*operands, transpose, **format.options, sorted_indices=sort)
    bounds = [oracle.error_bound(x[lhs[rhs == j]].flatten(0, 1), matrix[j], dtype) for j in rhs.unique()]
    oracle.assert_within(ours, x[lhs].double() @ matrix[rhs], max(bounds, default=0.0))


finite = st.floats(-1e4, 1e4, width=32, allow_subnormal=False)


@given(formats, dtypes, st.data())
@settings(max_examples=300)
def test_quantize_is_bit_exact(device: str, format: Format, dtype: torch.dtype, data: st.DataObject) -> None:
    values = data.draw(st.lists(finite, min_size=32, max_size=32))
    scale = data.draw(st.sampled_from([1.0, 1e-3, 1e-6]))
    columns = 2 * max(format.group_size, 32)
    w = (torch.tensor(values).repeat(columns // 32) * scale).roll(data.draw(st.integers(0, 31)))
    w = w.reshape(1, columns).to(dtype)
    for ours, expected in zip(qm.quantize(w.to(device), **format.options), oracle.mlx_quantize(w, format), strict=True):
        oracle.assert_identical(ours, expected, f"{format} {dtype}")


@given(formats, st.lists(st.integers(0, 2**32 - 1), min_size=32, max_size=32), dtypes)
@settings(max_examples=200)
def test_any_words_dequantize(device: str, format: Format, words: list[int], dtype: torch.dtype) -> None:
    """Every bit pattern is a valid code, but for E4M3's two NaN."""
    columns = max(32, format.group_size)
    w = torch.tensor(words[: columns * format.bits // 32] or words, dtype=torch.int64).to(torch.uint32)[None]
    columns = w.shape[1] * 32 // format.bits
    groups = (1, columns // format.group_size)
    one = {"affine": None, "nvfp4": 0x38}.get(format.mode, 127)
    scales = torch.ones(groups) if one is None else torch.full(groups, one, dtype=torch.uint8)
    biases = torch.zeros(groups) if format.is_affine else None
    weights = Quantized(format, w, scales, biases)
    ours = qm.dequantize(*weights.to(device).tensors, **format.options, dtype=dtype)
    torch.testing.assert_close(ours.cpu(), weights.dense.to(dtype), rtol=0, atol=0, equal_nan=True)
