"""gather_qmm against one float64 product for each pair of indices, and against mlx."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import cases
import oracle
import quantization_mlx as qm
from cases import DTYPES, FLOAT_FORMATS, FORMATS, SOME_FORMATS
from oracle import Format, Quantized, name_of

pytestmark = pytest.mark.kernels_ci

TRANSPOSE = pytest.mark.parametrize("transpose", [True, False], ids=["transpose", "no-transpose"])
INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64)
PLAIN = Format("affine", 64, 4)


def gather(
    x: Tensor, weights: Quantized, lhs: Any, rhs: Any, device: str, transpose: bool = True, **options: Any
) -> Tensor:
    on = weights.to(device)
    indices = [None if index is None else torch.as_tensor(index).to(device) for index in (lhs, rhs)]
    return qm.gather_qmm(
        x.to(device), *on.tensors, *indices, transpose, **on.format.options, global_scale=on.global_scale, **options
    )


def loop(x: Tensor, weights: Quantized, lhs: Any, rhs: Any, transpose: bool = True) -> tuple[Tensor, Tensor]:
    """float64 result and error bound, one matrix of w after the other."""
    matrices = weights.matrix(transpose)
    x_flat = x.reshape(-1, *x.shape[-2:])
    w_flat = matrices.reshape(-1, *matrices.shape[-2:])
    lhs = torch.arange(len(x_flat)).reshape(x.shape[:-2]) if lhs is None else torch.as_tensor(lhs).long()
    rhs = torch.arange(len(w_flat)).reshape(matrices.shape[:-2]) if rhs is None else torch.as_tensor(rhs).long()
    lhs, rhs = torch.broadcast_tensors(lhs, rhs)
    shape = (*lhs.shape, x.shape[-2], matrices.shape[-1])
    products = torch.empty(lhs.numel(), *shape[-2:], dtype=torch.float64)
    bound = torch.zeros((), dtype=torch.float64)
    for j in rhs.unique().tolist():
        chosen = rhs.flatten() == j
        rows = x_flat[lhs.flatten()[chosen]]
        products[chosen] = rows.double() @ w_flat[j]
        bound = torch.maximum(bound, oracle.error_bound(rows.flatten(0, 1), w_flat[j], x.dtype))
    return products.reshape(shape), bound


def assert_gathers(
    x: Tensor, weights: Quantized, lhs: Any, rhs: Any, device: str, transpose: bool = True, **options: Any
) -> Tensor:
    ours = gather(x, weights, lhs, rhs, device, transpose, **options)
    reference, bound = loop(x, weights, lhs, rhs, transpose)
    assert ours.dtype == x.dtype
    oracle.assert_within(ours, reference, bound, f"{weights.format} x {tuple(x.shape)} lhs {lhs} rhs {rhs}")
    return ours


@TRANSPOSE
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("format", FORMATS, ids=name_of)
def test_gather(device: str, format: Format, dtype: torch.dtype, transpose: bool) -> None:
    experts, rows_of_w, columns = 5, 19, 3 * format.group_size
    weights = oracle.random_quantized(format, experts, rows_of_w, columns, dtype=dtype)
    K = columns if transpose else rows_of_w
    for M in (1, 3):
        x = oracle.random_x(4, M, K, dtype=dtype)
        assert_gathers(x, weights, None, [4, 0, 0, 2], device, transpose)
        assert_gathers(x, weights, [3, 1, 1], [4, 0, 4], device, transpose)
        assert_gathers(x, weights, [[0], [3]], [[4, 0, 2]], device, transpose)
        assert_gathers(x, weights, [0, 1, 2, 3, 0], None, device, transpose)


# x's batch, w's batch, lhs_indices and rhs_indices
INDEXING: dict[str, tuple[tuple[int, ...], tuple[int, ...], Any, Any]] = {
    "rhs": ((2,), (5,), None, [4, 1]),
    "rhs with two axes": ((2, 1), (5,), None, [[4, 1, 0], [0, 2, 3]]),
    "rhs broadcast over x": ((4,), (5,), None, [3]),
    "x without a batch": ((), (5,), None, [0, 3, 2]),
    "scalar rhs": ((3,), (5,), None, 2),
    "scalar rhs, x without a batch": ((), (5,), None, 2),
    "lhs": ((4,), (3,), [3, 0, 0], None),
    "lhs of a longer length": ((4,), (1,), [3, 0, 0, 2, 1, 1], None),
    "scalar lhs": ((4,), (3,), 1, None),
    "both": ((4,), (5,), [3, 0, 1], [4, 4, 2]),
    "both broadcast": ((4,), (5,), [[3], [0]], [[4, 4, 2]]),
    "both with other ranks": ((4,), (5,), [3, 0, 1], [[4, 4, 2], [0, 1, 2]]),
    "neither": ((5,), (5,), None, None),
    "neither broadcast": ((2, 1), (5,), None, None),
    "flat positions in two batch axes": ((2, 3), (2, 2), [5, 0, 4], [3, 0, 1]),
    "one matrix without a batch": ((3,), (), [2, 1], [0, 0]),
    "repeated": ((3,), (4,), [1, 1, 1, 1], [2, 2, 2, 2]),
    "no pairs": ((3,), (4,), [], []),
    "no pairs, two axes": ((3,), (4,), None, torch.empty(0, 3, dtype=torch.int64)),
    "x without rows, no pairs": ((0,), (4,), None, torch.empty(0, dtype=torch.int64)),
}


@TRANSPOSE
@pytest.mark.parametrize("format", SOME_FORMATS, ids=name_of)
@pytest.mark.parametrize("case", INDEXING)
def test_indexing(device: str, format: Format, case: str, transpose: bool) -> None:
    x_batch, w_batch, lhs, rhs = INDEXING[case]
    lhs, rhs = (torch.tensor(i, dtype=torch.int64) if isinstance(i, list | int) else i for i in (lhs, rhs))
    weights = oracle.random_quantized(format, *w_batch, 7, 2 * format.group_size)
    K = weights.matrix(transpose).shape[-2]
    for M in (1, 4):
        assert_gathers(oracle.random_x(*x_batch, M, K), weights, lhs, rhs, device, transpose)


@TRANSPOSE
@pytest.mark.parametrize("format", SOME_FORMATS, ids=name_of)
def test_agrees_with_mlx(device: str, format: Format, transpose: bool) -> None:
    weights = oracle.random_quantized(format, 5, 7, 2 * format.group_size)
    K = weights.matrix(transpose).shape[-2]
    for x_batch, lhs, rhs in (
        ((2,), None, [4, 1]),
        ((2, 1), None, [[4, 1, 0], [0, 2, 3]]),
        ((4,), [3, 0, 1], [4, 4, 2]),
        ((4,), [[3], [0]], [[4, 4, 2]]),
        ((5,), None, None),
    ):
        x = oracle.random_x(*x_batch, 3, K)
        lhs, rhs = (None if i is None else torch.tensor(i, dtype=torch.int32) for i in (lhs, rhs))
        theirs = oracle.mlx_gather_qmm(x, weights, lhs, rhs, transpose).double()
        _, bound = loop(x, weights, lhs, rhs, transpose)
        oracle.assert_within(gather(x, weights, lhs, rhs, device, transpose), theirs, 2 * bound, str(format))


@pytest.mark.parametrize("dtype", INTEGERS, ids=name_of)
def test_index_dtypes(device: str, dtype: torch.dtype) -> None:
    weights = oracle.random_quantized(PLAIN, 5, 7, 128)
    x = oracle.random_x(4, 1, 128)
    lhs, rhs = torch.tensor([3, 0, 0, 2]), torch.tensor([4, 1, 1, 0])
    expected = gather(x, weights, lhs, rhs, device)
    oracle.assert_identical(gather(x, weights, lhs.to(dtype), rhs.to(dtype), device), expected)


def test_strided_indices(device: str) -> None:
    weights = oracle.random_quantized(PLAIN, 5, 7, 128)
    x = oracle.random_x(4, 1, 128)
    grid = torch.tensor([[0, 4, 1], [2, 2, 3]])
    assert_gathers(x, weights, torch.tensor([[3], [1], [0]]), grid.T, device)
    assert_gathers(x, weights, torch.tensor([3]).expand(2, 3), grid, device)
    assert_gathers(x, weights, torch.tensor([0, 9, 1, 9, 2, 9])[::2], grid[:, ::2].flatten()[:3], device)


@TRANSPOSE
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("format", SOME_FORMATS, ids=name_of)
def test_sorted_indices(device: str, format: Format, dtype: torch.dtype, transpose: bool) -> None:
    """Rows of one expert in a run, experts without rows, runs of every length; the promise changes no result."""
    weights = oracle.random_quantized(format, 8, 32, 2 * format.group_size, dtype=dtype)
    K = weights.matrix(transpose).shape[-2]
    runs = [1, 0, 33, 2, 0, 17, 64, 0]
    rhs = torch.repeat_interleave(torch.arange(8), torch.tensor(runs))
    x = oracle.random_x(len(rhs), 1, K, dtype=dtype)
    assert_gathers(x, weights, None, rhs, device, transpose, sorted_indices=True)
    assert_gathers(x, weights, None, rhs, device, transpose)
    # A wrong promise may cost time, not correctness.
    shuffled = rhs[torch.randperm(len(rhs), generator=oracle.generator(0))]
    assert_gathers(x, weights, None, shuffled, device, transpose, sorted_indices=True)


def test_sorted_indices_broadcast_over_x(device: str) -> None:
    """x of batch (T, 1) with sorted indices (T, k) has T * k results."""
    weights = oracle.random_quantized(PLAIN, 4, 40, 128)
    rhs = torch.arange(4).repeat_interleave(16).reshape(16, 4)
    assert_gathers(oracle.random_x(16, 1, 1, 128), weights, None, rhs, device, sorted_indices=True)
    assert_gathers(oracle.random_x(1, 1, 128), weights, None, rhs.flatten(), device, sorted_indices=True)
    lhs = torch.arange(16).repeat_interleave(2)
    assert_gathers(oracle.random_x(16, 1, 128), weights, lhs, rhs.flatten()[::2], device, sorted_indices=True)


def test_more_than_32768_rows(device: str) -> None:
    rows = 32768 + 37
    weights = oracle.random_quantized(Format("affine", 32, 4), 3, 5, 32)
    rhs = torch.sort(torch.randint(0, 3, (rows,), generator=oracle.generator(0))).values
    x = oracle.random_x(rows, 1, 32)
    per_expert = torch.stack([x[:, 0].double() @ matrix for matrix in weights.matrix(True)])
    reference = per_expert[rhs, torch.arange(rows)][:, None]
    bound = max(oracle.error_bound(x[:, 0], matrix, x.dtype) for matrix in weights.matrix(True))
    for order in (torch.arange(rows), torch.randperm(rows, generator=oracle.generator(1))):
        ours = gather(x[order], weights, None, rhs[order], device, sorted_indices=True)
        oracle.assert_within(ours, reference[order], bound)


@pytest.mark.parametrize("format", SOME_FORMATS, ids=name_of)
def test_strided_operands(device: str, format: Format) -> None:
    weights = oracle.random_quantized(format, 3, 10, 2 * format.group_size).to(device)
    x = oracle.random_x(4, 2, 2 * format.group_size).to(device)
    rhs = torch.tensor([2, 0, 1, 2])
    expected = gather(x, weights, None, rhs, device)
    strided = weights.map(lambda tensor: tensor.movedim(0, -1).contiguous().movedim(-1, 0))
    oracle.assert_identical(gather(x, strided, None, rhs, device), expected, "weights")
    oracle.assert_identical(gather(x.mT.contiguous().mT, weights, None, rhs, device), expected, "x")
    signed = replace(weights, w=weights.w.view(torch.int32))
    oracle.assert_identical(gather(x, signed, None, rhs, device), expected, "signed words")


def test_expanded_experts(device: str) -> None:
    one = oracle.random_quantized(PLAIN, 1, 10, 128)
    many = one.map(lambda tensor: tensor.expand(6, -1, -1))
    assert_gathers(oracle.random_x(3, 2, 128), many, None, [5, 0, 3], device)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_global_scale_per_expert(device: str, dtype: torch.dtype) -> None:
    nvfp4 = FLOAT_FORMATS[2]
    base = oracle.random_quantized(nvfp4, 3, 7, 64)
    x = oracle.random_x(4, 2, 64, dtype=dtype)
    for global_scale in (torch.tensor(500.0), torch.tensor([2000.0]), torch.tensor([100.0, 2688.0, 9000.0])):
        weights = Quantized(nvfp4, base.w, base.scales, None, global_scale)
        assert_gathers(x, weights, None, [2, 0, 1, 2], device)


def test_dtypes_promote(device: str) -> None:
    base = oracle.random_quantized(PLAIN, 3, 7, 128)
    ours = gather(oracle.random_x(2, 1, 128, dtype=torch.float16), base, None, [2, 0], device)
    assert ours.dtype == torch.float32


def test_nan_stays_in_its_row(device: str) -> None:
    for format in SOME_FORMATS:
        weights = oracle.random_quantized(format, 3, 7, 2 * format.group_size)
        x = oracle.random_x(4, 2, 2 * format.group_size)
        poisoned = x.clone()
        poisoned[1, 1, 3] = float("nan")
        rhs = [2, 2, 2, 0]
        ours, clean = gather(poisoned, weights, None, rhs, device), gather(x, weights, None, rhs, device)
        assert torch.isnan(ours[1, 1]).all()
        keep = torch.ones(4, 2, dtype=torch.bool)
        keep[1, 1] = False
        oracle.assert_identical(ours.cpu()[keep], clean.cpu()[keep], str(format))


# --- affine_gather_qmm_rhs_nax ----------------------------------------------------------------------------------------


@TRANSPOSE
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_rhs_nax_takes_any_order(device: str, dtype: torch.dtype, transpose: bool) -> None:
    for format in (Format("affine", 128, 4), Format("affine", 32, 6), Format("affine", 64, 3)):
        weights = oracle.random_quantized(format, 6, 128, 2 * format.group_size, dtype=dtype)
        matrices = weights.matrix(transpose)
        on = weights.to(device)
        for M in (0, 1, 5, 70):
            x = oracle.random_x(M, matrices.shape[-2], dtype=dtype)
            indices = torch.randint(0, 6, (M,), generator=oracle.generator(M), dtype=torch.int32)
            indices[indices == 3] = 2  # an expert without rows
            for order in (indices, indices.sort().values, indices.long()):
                arguments = (order.to(device), matrices.shape[-1], format.group_size, format.bits, transpose)
                ours = qm.affine_gather_qmm_rhs_nax(x.to(device), *on.tensors, *arguments)
                reference, bound = loop(x[:, None], weights, None, order, transpose)
                assert ours.dtype == dtype
                oracle.assert_within(ours, reference[:, 0], bound, f"{format} M {M}")


def test_rhs_nax_defaults(device: str) -> None:
    weights = oracle.random_quantized(Format("affine", 128, 4), 3, 7, 256)
    x, indices = oracle.random_x(4, 256), torch.tensor([2, 0, 1, 2])
    ours = qm.affine_gather_qmm_rhs_nax(x.to(device), *weights.to(device).tensors, indices.to(device), 7)
    reference, bound = loop(x[:, None], weights, None, indices)
    oracle.assert_within(ours, reference[:, 0], bound)


# --- Index errors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [-1, 5, 7, 2**31 - 1, -(2**31), 2**40, -(2**63)])
@pytest.mark.parametrize("side", ["lhs_indices", "rhs_indices"])
@pytest.mark.parametrize("sorted_indices", [True, False])
def test_index_out_of_range(side: str, bad: int, sorted_indices: bool) -> None:
    """Known on the CPU before anything is read; other devices never read indices on the host."""
    weights = oracle.random_quantized(PLAIN, 5, 7, 128)
    x = oracle.random_x(5, 1, 128)
    indices = {"lhs_indices": torch.arange(5), "rhs_indices": torch.arange(5)}
    indices[side][3] = bad
    with pytest.raises(IndexError, match=rf"\[gather_qmm\].*{side}.*{bad}"):
        qm.gather_qmm(x, *weights.tensors, **indices, **PLAIN.options, sorted_indices=sorted_indices)


@pytest.mark.parametrize("bad", [-1, 5, 2**40])
def test_rhs_nax_index_out_of_range(bad: int) -> None:
    weights = oracle.random_quantized(PLAIN, 5, 7, 128)
    indices = torch.tensor([0, bad, 1])
    with pytest.raises(IndexError, match=rf"\[affine_gather_qmm_rhs_nax\].*{bad}"):
        qm.affine_gather_qmm_rhs_nax(oracle.random_x(3, 128), *weights.tensors, indices, 7, 64, 4)


def test_index_into_nothing() -> None:
    weights = oracle.random_quantized(PLAIN, 5, 7, 128)
    bytes_and_words = torch.tensor([255], dtype=torch.uint8), torch.tensor([2**63 + 1], dtype=torch.uint64)
    for rows, lhs, rhs in ((0, [0], [0]), *((1, None, index) for index in bytes_and_words)):
        with pytest.raises(IndexError, match="gather_qmm"):
            gather(oracle.random_x(rows, 1, 128), weights, lhs, rhs, "cpu")


# --- Weights beyond the range of float16 ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "format",
    (PLAIN, *FLOAT_FORMATS[:2], *(Format(mode, 32, bits) for mode, bits in cases.MARLIN_BITS.items())),
    ids=name_of,
)
def test_weights_beyond_float16(device: str, format: Format) -> None:
    """Matvecs, tiles and runs of sorted pairs, as in quantized_matmul."""
    for transpose in (False,) if format.is_column_packed else (True, False):
        shape = (64, 70) if format.is_column_packed else (70, 2 * format.group_size)
        weights = oracle.random_large(format, 3, *shape)
        if not format.is_column_packed:
            weights.scales[1] = weights.scales[1][:1]  # an expert without large weights
            if weights.biases is not None:
                weights.biases[1] = weights.biases[1][:1]
        matrices = weights.matrix(transpose)
        assert matrices.abs().max() > 70000
        K = matrices.shape[-2]
        runs = [0] * 9 + [1] * 7 + [2] * 24
        for M, rhs, options in ((2, [2, 0, 1], {}), (16, [2, 1, 0], {}), (1, runs, {"sorted_indices": True})):
            x = oracle.small_x(matrices, len(rhs), M, K)
            y = gather(x, weights, None, rhs, device, transpose, **options)
            for i, expert in enumerate(rhs):
                what = f"{format} transpose={transpose} M={M} pair {i}"
                oracle.assert_float16_terms(y[i], x[i], matrices[expert], what)
