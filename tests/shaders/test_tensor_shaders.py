"""The shaders that use Metal 4's tensor operations, on the software device: values, reads, barriers, names."""

from __future__ import annotations

import functools
import itertools
import struct

import numpy as np
import pytest
import torch
from torch import Tensor

import cases
import launching
import oracle
import softmetal
from cases import FORMATS
from covering import mostly_exhaustive
from launching import (
    BARRIER,
    FOUR_BIT,
    NVFP4,
    PRODUCT_CONSTANTS,
    PRODUCT_PARAMS,
    ceil,
    columns_of,
    expanded,
    kernel_name,
    memory,
    tiles_of_pairs,
    unwritten,
)
from oracle import Format, Quantized
from repository import ROOT

DTYPES = (torch.float16, torch.bfloat16)
EVERY_FORMAT = mostly_exhaustive(
    itertools.product(FORMATS, DTYPES), *((format, DTYPES[i % 2]) for i, format in enumerate(FORMATS))
)
STANDARD = "metal4.0"
ALL_KERNELS = {"QUANTIZATION_MLX_ALL_KERNELS": 1}  # metal/quantized/formats.h
SHADER = ROOT / "metal/quantized/matmul_tensor.metal"
COLUMNS = DEPTH = 64
GATHER_ROWS = 32
# One format for each width and each kind of scale.
EACH_WIDTH = (
    *(Format("affine", size, bits) for bits, size in ((2, 64), (3, 32), (4, 64), (5, 128), (6, 32), (8, 64))),
    *(Format("mxfp4", 32, 4), Format("mxfp8", 32, 8), NVFP4),
)


@functools.cache
def library(constants: frozenset[int], layout: int = 0):
    """layout: which thread holds which of the sums."""
    values = {index: index in constants for index in PRODUCT_CONSTANTS}
    defines = {"SOFTMETAL_TENSOR_LAYOUT": layout, **ALL_KERNELS}
    return softmetal.compile(SHADER, defines=defines, function_constants=values, standard=STANDARD)


def constants_for(weights: Quantized, n: int, k: int, aligned_x: bool, aligned: bool) -> frozenset[int]:
    constants = {launching.HAS_GLOBAL_SCALE} if weights.global_scale is not None else set()
    load_bytes = {2: 8, 4: 16, 6: 8, 8: 16}.get(weights.format.bits, 4)
    if aligned:
        constants |= {launching.ALIGNED_OUTPUTS} if n % COLUMNS == 0 else set()
        constants |= {launching.ALIGNED_K} if k % DEPTH == 0 else set()
        constants |= {launching.ALIGNED_WEIGHTS} if weights.w.shape[-1] * 4 % load_bytes == 0 else set()
        constants |= {launching.ALIGNED_X} if aligned_x else set()
    return frozenset(constants)


def launch(weights, dtype, op, rows, constants, buffers, threadgroups, layout=0):
    arrays = [memory(buffer) if isinstance(buffer, Tensor) else buffer for buffer in buffers]
    kernel = kernel_name(weights.format, op, dtype, rows)
    report = library(constants, layout).launch(kernel, arrays, threadgroups, (128,), seed=1)
    assert not report.errors, "\n".join(report.errors)
    return report


def qmm(
    x: Tensor,
    weights: Quantized,
    transpose: bool,
    rows: int = 32,
    aligned: bool = True,
    layout: int = 0,
    parts: int = 0,
):
    """y [B0, B1, M, N] of x [B0, B1, M, K] and matrices with the same batch dimensions, any strides; and the report.

    parts: of K, where it is split; y is then the sum of the float32 parts.
    """
    outer, inner, m, k = x.shape
    n = columns_of(weights, transpose)
    strides = [n for t in (x, *weights.tensors) for n in ((0, 0) if t is None else t.stride()[:2])]
    part_k = ceil(k, DEPTH * max(parts, 1)) * DEPTH
    y = unwritten(outer, inner, max(parts, 1), m, n, dtype=torch.float32 if parts else x.dtype)
    params = struct.pack(
        PRODUCT_PARAMS, *strides, 0, 0, *y.stride()[:2], x.stride(-2), m * n, inner, m, k, n, max(parts, 1), part_k
    )
    buffers = [x, *weights.tensors, weights.global_scale, y, params]
    constants = constants_for(weights, n, k, False, aligned)
    grid = (ceil(n, COLUMNS), ceil(m, rows) * max(parts, 1), outer * inner)
    op = f"qmm_{'t' if transpose else 'n'}_nax{'_splitk' if parts else ''}"
    report = launch(weights, x.dtype, op, rows, constants, buffers, grid, layout)
    return y.sum(2).to(x.dtype), report


def check_qmm(format: Format, dtype: torch.dtype, m: int, n: int, k: int, transpose: bool, **options):
    """One product of random numbers against float64."""
    weights = oracle.random_quantized(format, *((n, k) if transpose else (k, n)), dtype=dtype)
    x = oracle.random_x(1, 1, m, k, dtype=dtype)
    y, report = qmm(x, expanded(weights), transpose, **options)
    oracle.assert_product(y[0, 0], x[0, 0], weights.matrix(transpose), dtype, f"{format} {m}x{k}x{n}")
    return report


@pytest.mark.parametrize("format, dtype", EVERY_FORMAT, ids=oracle.name_of)
def test_qmm_every_format(format, dtype):
    """A whole tile of rows and a ragged one; the groups run along K, then along N."""
    grouped = {16: 80, 32: 96, 64: 192, 128: 128}[format.group_size]
    check_qmm(format, dtype, 37, 70, grouped, transpose=True)
    check_qmm(format, dtype, 37, grouped, 70, transpose=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=oracle.name_of)
@pytest.mark.parametrize("mode", cases.MARLIN_BITS)
def test_packed_columns(mode, dtype):
    """Tiles whole and ragged; pairs of sorted experts."""
    for group_size, n in ((64, 37), (32, 128)):
        format = Format(mode, group_size, cases.MARLIN_BITS[mode])
        check_qmm(format, dtype, 37, n, 3 * group_size, transpose=False)
        check_qmm(format, dtype, 64, n, 128, transpose=False, rows=64)
        check_gather(format, dtype, np.arange(45), sorted_pairs(45), False, (3 * group_size, n), 45)


@pytest.mark.parametrize("transpose", (True, False), ids=("t", "n"))
@pytest.mark.parametrize("format", EACH_WIDTH, ids=oracle.name_of)
def test_qmm_shapes(format, transpose):
    """Aligned, the smallest that there are, ragged on the larger tile, and without any alignment."""
    group = format.group_size
    check_qmm(format, torch.float16, 64, 128, 128, transpose, rows=64)
    check_qmm(format, torch.float16, 1, *((1, group) if transpose else (group, 1)), transpose)
    ragged = (37, 3 * group) if transpose else (3 * group, 37)
    check_qmm(format, torch.float16, 70, *ragged, transpose, rows=64)
    check_qmm(format, torch.float16, 33, *ragged, transpose, aligned=False)


@pytest.mark.parametrize("transpose", (True, False), ids=("t", "n"))
def test_qmm_batch(transpose):
    """Two batch dimensions, operands broadcast in different ones, x not contiguous: every operand its own strides."""
    dtype = torch.float16
    stacked = oracle.random_quantized(FOUR_BIT, 3, *((40, 128) if transpose else (72, 192)), dtype=dtype)
    weights = expanded(stacked, 2, 3)
    k = 128 if transpose else 72
    x = oracle.random_x(2, 3, 70, 2 * k, dtype=dtype)[:, :, ::2, :k]
    shared = oracle.random_x(2, 1, 35, k, dtype=dtype).expand(2, 3, 35, k)
    for operand in (x, shared):
        y, _ = qmm(operand, weights, transpose)
        for position in np.ndindex(2, 3):
            matrix = stacked.matrix(transpose)[position[1]]
            oracle.assert_product(y[position], operand[position], matrix, dtype)


@pytest.mark.parametrize("transpose", (True, False), ids=("t", "n"))
def test_qmm_global_scale(transpose):
    dtype = torch.bfloat16
    plain = oracle.random_quantized(NVFP4, *((40, 128) if transpose else (128, 48)), dtype=dtype)
    weights = Quantized(NVFP4, plain.w, plain.scales, None, torch.tensor([900.0]))
    x = oracle.random_x(1, 1, 33, 128, dtype=dtype)
    y, _ = qmm(x, expanded(weights), transpose)
    oracle.assert_product(y[0, 0], x[0, 0], weights.matrix(transpose), dtype)


@pytest.mark.parametrize("rows", (32, 64))
def test_qmm_does_not_assume_who_holds_which_sum(rows):
    check_qmm(FOUR_BIT, torch.float16, rows, 64, 64, transpose=True, rows=rows, layout=1)
    check_qmm(FOUR_BIT, torch.float16, 19, 70, 64, transpose=True, rows=rows, layout=1)


@pytest.mark.parametrize("transpose", (True, False), ids=("t", "n"))
def test_split_k(transpose):
    """Whole and ragged tiles; parts of one and of two steps, the last one shorter."""
    for rows, m, parts in ((32, 32, 2), (32, 37, 3), (64, 64, 3), (64, 70, 5)):
        n, k = (70, 320) if transpose else (128, 290)
        check_qmm(FOUR_BIT, torch.float16, m, n, k, transpose, rows=rows, parts=parts)
        check_qmm(NVFP4, torch.bfloat16, m, n if transpose else 80, k - k % 16, transpose, rows=rows, parts=parts)


@pytest.mark.parametrize("transpose", (True, False), ids=("t", "n"))
def test_large_tiles(transpose):
    """A whole one, one with a last tile of few rows, and one in another layout of its sums."""
    check_qmm(FOUR_BIT, torch.float16, 128, 64, 128, transpose, rows=128)
    check_qmm(FOUR_BIT, torch.bfloat16, 135, *((70, 64) if transpose else (64, 70)), transpose, rows=128)
    check_qmm(FOUR_BIT, torch.float16, 128, 64, 64, transpose, rows=128, layout=1)


def test_qmm_reads_weights_once_for_each_tile_of_rows():
    n, k = 128, 256
    report = check_qmm(FOUR_BIT, torch.float16, 64, n, k, True, rows=64)
    assert report.counters["buffer_bytes_read"][1] == n * k // 2
    assert report.counters["simdgroup_multiplies"] == 64 * n * k // 512
    assert report.counters["threadgroup_barriers"] == 2 * (k // DEPTH) * (n // COLUMNS)


# --- Gathered products of pairs in tiles -----------------------------------------------------------------------------


def gather(x: Tensor, weights: Quantized, lhs: Tensor, rhs: Tensor, transpose: bool, layout: int = 0) -> Tensor:
    """y [P, N] for indices [P] into the rows of x [A, K] and into the matrices [E, ..]."""
    pairs, k = len(rhs), x.shape[-1]
    n = columns_of(weights, transpose)
    matrices = (x, *weights.tensors)
    strides = [number for t in matrices for number in ((0, 0) if t is None else (t.stride(0), 0))]
    scale_each = int(weights.global_scale is not None and weights.global_scale.numel() > 1)
    y = unwritten(pairs, n, dtype=x.dtype)
    params = struct.pack(
        PRODUCT_PARAMS, *strides, scale_each, 0, n, 0, x.stride(-2), 0, 1, pairs, k, n, 1, ceil(k, DEPTH) * DEPTH
    )
    aligned_x = x.stride(0) % 8 == 0
    constants = constants_for(weights, n, k, aligned_x, True)
    tiles, order = tiles_of_pairs(lhs, rhs, len(x), len(weights.w), GATHER_ROWS)
    buffers = [x, *weights.tensors, weights.global_scale, y, params, tiles, order]
    op = "gather_qmm_rhs_t_nax" if transpose else "gather_qmm_rhs_n_nax"
    grid = (ceil(n, COLUMNS), len(tiles), 1)
    launch(weights, x.dtype, op, GATHER_ROWS, constants, buffers, grid, layout)
    return y


def check_gather(format, dtype, lhs, rhs, transpose, shape, rows_of_x, experts=4, global_scale=None, layout=0):
    lhs, rhs = torch.as_tensor(lhs, dtype=torch.int64), torch.as_tensor(rhs, dtype=torch.int64)
    plain = oracle.random_quantized(format, experts, *shape, dtype=dtype)
    weights = Quantized(format, *plain.tensors, global_scale)
    x = oracle.random_x(rows_of_x, shape[1] if transpose else shape[0], dtype=dtype)
    y = gather(x, weights, lhs, rhs, transpose, layout)
    matrices = weights.matrix(transpose)
    valid = (lhs >= 0) & (lhs < rows_of_x) & (rhs >= 0) & (rhs < experts)
    assert y[~valid].isnan().all()
    for expert in range(experts):
        of_expert = valid & (rhs == expert)
        if of_expert.any():
            oracle.assert_product(y[of_expert], x[lhs[of_expert]], matrices[expert], dtype, f"{format} {expert}")


def sorted_pairs(count: int, experts: int = 4) -> np.ndarray:
    return np.sort(np.random.default_rng(count).integers(0, experts, count))


@pytest.mark.parametrize("format, dtype", EVERY_FORMAT, ids=oracle.name_of)
def test_gather_every_format(format, dtype):
    grouped = {16: 80, 32: 96, 64: 64, 128: 128}[format.group_size]
    pairs = np.arange(45)
    check_gather(format, dtype, pairs, sorted_pairs(45), True, (70, grouped), 45)
    check_gather(format, dtype, pairs, sorted_pairs(45), False, (40, grouped), 45)


@pytest.mark.parametrize("transpose", (True, False), ids=("t", "n"))
@pytest.mark.parametrize("order", ("sorted", "unsorted", "invalid", "one", "rows of x shared"))
def test_gather_orders(order, transpose):
    """Whole tiles of one expert, many runs in a tile, indices out of range among and in place of the others."""
    rng = np.random.default_rng(1)
    lhs, rhs = np.arange(80), sorted_pairs(80)
    if order == "unsorted":
        rhs = rng.integers(0, 4, 40)
        lhs = np.arange(40)
    elif order == "invalid":
        rhs[3], rhs[40:44], rhs[79] = -1, 4, 2**32 + 1
        lhs[60], lhs[61] = -(2**40), 80
    elif order == "one":
        lhs, rhs = np.array([2]), np.array([3])
    elif order == "rows of x shared":
        lhs = rng.integers(0, 80, 80)
    check_gather(FOUR_BIT, torch.float16, lhs, rhs, transpose, (64, 128), 80)


def test_gather_does_not_assume_who_holds_which_sum():
    pairs = np.arange(20)
    check_gather(FOUR_BIT, torch.float16, pairs, sorted_pairs(20), True, (70, 64), 20, layout=1)


@pytest.mark.parametrize("scales", ([900.0], [900.0, 2688.0, 5000.0, 100.0]), ids=("one", "each"))
def test_gather_global_scale(scales):
    pairs = np.arange(40)
    check_gather(NVFP4, torch.float16, pairs, sorted_pairs(40), True, (48, 80), 40, global_scale=torch.tensor(scales))


# --- The table of kernels --------------------------------------------------------------------------------------------


def test_kernels():
    """Exactly the kernels that the formats and types call for; none below language 4.0."""
    expected = set()
    for dtype in DTYPES:
        for format in FORMATS:
            for side in "tn":
                expected |= {kernel_name(format, f"qmm_{side}_nax", dtype, rows) for rows in (32, 64, 128)}
                expected |= {kernel_name(format, f"qmm_{side}_nax_splitk", dtype, rows) for rows in (32, 64)}
                expected |= {kernel_name(format, f"gather_qmm_rhs_{side}_nax", dtype, GATHER_ROWS)}
        for format in cases.MARLIN_FORMATS:
            expected |= {kernel_name(format, "qmm_n_nax", dtype, rows) for rows in (32, 64, 128)}
            expected |= {kernel_name(format, "qmm_n_nax_splitk", dtype, rows) for rows in (32, 64)}
            expected |= {kernel_name(format, "gather_qmm_rhs_n_nax", dtype, GATHER_ROWS)}
    assert set(softmetal.compile(SHADER, defines=ALL_KERNELS, standard="metal4.0").kernels) == expected
    assert softmetal.compile(SHADER, defines=ALL_KERNELS, standard="metal3.1").kernels == []


@pytest.mark.parametrize("barrier", range(4))
def test_each_barrier_is_needed(barrier):
    """Without one barrier, be it of the plain product's loop or of the gathered one's, there is a race."""
    parts = SHADER.with_suffix(".h").read_text().split(BARRIER)
    assert len(parts) == 5
    without = BARRIER.join(parts[: barrier + 1]) + BARRIER.join(parts[barrier + 1 :])
    source = SHADER.read_text().replace('#include "matmul_tensor.h"', without)
    format, dtype = Format("mxfp4", 32, 4), torch.float16
    constants = {index: False for index in PRODUCT_CONSTANTS}
    broken = softmetal.compile(source, [SHADER.parent], function_constants=constants, standard=STANDARD)
    weights = oracle.random_quantized(format, 64, 128)
    x = oracle.random_x(32, 128, dtype=dtype)
    y = unwritten(32, 64, dtype=dtype)
    buffers = [memory(x), memory(weights.w), memory(weights.scales), None, None, memory(y)]
    params = struct.pack(PRODUCT_PARAMS, *[0] * 12, 128, 0, 1, 32, 128, 64, 1, 128)
    if barrier < 2:
        name = kernel_name(format, "qmm_t_nax", dtype, 32)
        buffers += [params]
    else:
        name = kernel_name(format, "gather_qmm_rhs_t_nax", dtype, 32)
        pairs = np.stack([np.arange(32), np.arange(32)], 1).astype(np.int32)
        buffers += [params, np.array([[0, 0, 32]], np.int32), pairs]
    assert "threadgroup-race" in broken.launch(name, buffers, (1,), (128,)).kinds
