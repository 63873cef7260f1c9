"""The Metal shaders on the software device: values against float64 and mlx, no checker error, no byte read twice."""

from __future__ import annotations

import functools
import itertools
import re
import shutil
import struct
import subprocess
import sys
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor

import cases
import oracle
import softmetal
from cases import DTYPES, FORMATS, SOME_FORMATS
from launching import (
    ALIGNED_K,
    ALIGNED_OUTPUTS,
    ALIGNED_WEIGHTS,
    ALIGNED_X,
    BARRIER,
    FOUR_BIT,
    HAS_GLOBAL_SCALE,
    NVFP4,
    PRODUCT_CONSTANTS,
    PRODUCT_PARAMS,
    SORT_PAIRS_PARAMS,
    SORTING_THREADS,
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

METAL = ROOT / "metal/quantized"
ALL_KERNELS = {"QUANTIZATION_MLX_ALL_KERNELS": 1}  # metal/quantized/formats.h
GATHER_TAIL, SUM_PARTS_PARAMS = "<2i", "<2i"
QUANTIZE_PARAMS, QUANTIZE_COLUMNS_PARAMS = "<q", "<qi4x"

EVERY_WIDTH = (*(Format("affine", 32, bits) for bits in (2, 3, 5, 6, 8)), FOUR_BIT, *cases.FLOAT_FORMATS)

# Row counts that the kernels have instances for, in the order in which a plan would try them.
INSTANCES = {
    "qmv": (1, 2, 3, 4, 6, 8, 12),
    "gather_qmv": (1, 4, 8, 12),
    **dict.fromkeys(("qvm", "qvm_splitk"), (1, 2, 4, 8)),
    "gather_qvm": (1, 4, 8),
    "gather_qvm_splitk": (1,),
    **dict.fromkeys(("qmm_t", "qmm_n", "qmm_t_splitk", "qmm_n_splitk"), (16, 32, 64)),
    **dict.fromkeys(("gather_qmm_t", "gather_qmm_n"), (32,)),
    **dict.fromkeys(("gather_qmm_rhs_t", "gather_qmm_rhs_n"), (16, 32)),
}
SPLIT = [op for op in INSTANCES if op.endswith("_splitk")]
GATHERED = [op for op in INSTANCES if op.startswith("gather_")]
# Packed columns have the untransposed product alone.
COLUMN_OPS = [op for op in INSTANCES if "qvm" in op or op.endswith(("_n", "_n_splitk"))]
COLUMN_OPS.remove("gather_qvm_splitk")


def instances_of(op: str, column_packed: bool) -> tuple[int, ...]:
    return INSTANCES["gather_qvm" if column_packed and "qvm" in op else op]


# Each of Marlin's modes, and each group size.
COLUMN_FORMATS = tuple(
    Format(mode, group_size, bits)
    for (mode, bits), group_size in zip(cases.MARLIN_BITS.items(), (32, 64, 128, 64, 32), strict=True)
)


# --- Compiling and launching -----------------------------------------------------------------------------------------


@functools.cache
def library(stem: str) -> softmetal.Library:
    return softmetal.compile(METAL / f"{stem}.metal", defines=ALL_KERNELS)


def launch(stem, name, constants, buffers, threadgroups, threads):
    """Launch one kernel; the tensors among `buffers` are written in place."""
    arrays = [memory(buffer) if isinstance(buffer, Tensor) else buffer for buffer in buffers]
    values = {index: index in constants for index in PRODUCT_CONSTANTS}
    report = library(stem).launch(name, arrays, threadgroups, (threads, 1, 1), seed=1, function_constants=values)
    assert not report.errors, "\n".join(report.errors)
    return report


def simdgroups_along(steps: int, n: int) -> int:
    """Of qmv's four, those that divide K: half as many where a quarter of the lanes is idle, and fewer are then.

    Half of these for many columns, where their lanes have one step each.
    """
    busy = {along: steps / (16 * along * ceil(steps, 16 * along)) for along in (4, 2, 1)}
    along = 4
    while along > 1 and busy[along] <= 0.75 and busy[along // 2] > busy[along]:
        along //= 2
    return along // 2 if along > 1 and steps <= 16 * along and n >= 16384 else along


# --- Products, planned as a host would -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kernel:
    """An op's instance for so many rows."""

    op: str
    instance: int
    column_packed: bool = False

    @classmethod
    def of(cls, op: str, rows: int, column_packed: bool = False) -> Kernel:
        instances = instances_of(op, column_packed)
        return cls(op, next((count for count in instances if count >= rows), instances[-1]), column_packed)

    @property
    def is_tiled(self) -> bool:
        return "qmm" in self.op

    @property
    def stem(self) -> str:
        return "matmul" if self.is_tiled else "matvec"

    @property
    def transpose(self) -> bool:
        return "qmv" in self.op or "_t" in self.op

    def columns(self, k: int, n: int, dtype: torch.dtype, format: Format) -> int:
        """Of y, to a threadgroup."""
        if self.is_tiled or self.column_packed:
            return 64
        if not self.transpose:
            return 256
        step = 32 if self.instance <= 3 and format.group_size >= 32 and dtype.itemsize == 2 else 16
        return 8 * 4 // simdgroups_along(k // step, n)

    @property
    def threads(self) -> int:
        return 256 if self.column_packed and not self.is_tiled else 128

    def depth(self, dtype: torch.dtype, format: Format = FOUR_BIT) -> int:
        """Of K, to a step."""
        if self.is_tiled:
            return 64 if self.instance < 64 and dtype.itemsize == 2 else 32
        return format.group_size if self.column_packed else 32

    def threadgroups(self, rows: int, n: int, columns: int, parts: int = 1, batch: int = 1) -> tuple[int, int, int]:
        return ceil(n, columns), (ceil(rows, self.instance) if self.is_tiled else 1) * parts, batch

    def name(self, format: Format, dtype: torch.dtype) -> str:
        return kernel_name(format, self.op, dtype, self.instance)

    def constants(self, x: Tensor, weights: Quantized, n: int) -> set[int]:
        load_bytes = 8 if self.column_packed else {2: 8, 4: 16, 6: 8, 8: 16}.get(weights.format.bits, 4)
        aligned = {
            ALIGNED_OUTPUTS: n % self.columns(x.shape[-1], n, x.dtype, weights.format) == 0,
            ALIGNED_WEIGHTS: weights.w.shape[-1] * 4 % load_bytes == 0,
            ALIGNED_X: all(stride * x.element_size() % 16 == 0 for stride in x.stride()[:-1]),
            ALIGNED_K: x.shape[-1] % self.depth(x.dtype) == 0,
        }
        return {constant for constant, holds in aligned.items() if holds}


def product(kernel: Kernel, x: Tensor, weights: Quantized, parts: int = 1, aligned: bool = True):
    """y [B0, B1, M, N] of x [B0, B1, M, K] and matrices with the same batch dimensions, any strides; and the report.

    parts: split-K. With `aligned` false, the kernel that assumes no alignment runs.
    """
    dtype = x.dtype
    outer, inner, rows, k = x.shape
    n = columns_of(weights, kernel.transpose)
    constants = kernel.constants(x, weights, n) if aligned else set()
    constants |= {HAS_GLOBAL_SCALE} if weights.global_scale is not None else set()
    depth = kernel.depth(dtype, weights.format)
    part_k = depth * ceil(k, depth * parts)
    y = unwritten(outer, inner, parts, rows, n, dtype=torch.float32 if kernel.op in SPLIT else dtype)
    strides = [
        stride
        for tensor in (x, *weights.tensors, None, y)
        for stride in ((0, 0) if tensor is None else tensor.stride()[:2])
    ]
    params = struct.pack(PRODUCT_PARAMS, *strides, x.stride(-2), rows * n, inner, rows, k, n, parts, part_k)
    buffers = [x, *weights.tensors, weights.global_scale, y, params]
    threadgroups = kernel.threadgroups(rows, n, kernel.columns(k, n, dtype, weights.format), parts, outer * inner)
    name = kernel.name(weights.format, dtype)
    report = launch(kernel.stem, name, constants, buffers, threadgroups, kernel.threads)
    if kernel.op in SPLIT:
        y = sum_of_parts(y.flatten(0, 1), dtype)
    return y.reshape(outer, inner, rows, n), report


def sum_of_parts(partial: Tensor, dtype: torch.dtype) -> Tensor:
    """y [B, M, N] of the partial sums [B, parts, M, N]."""
    batch, parts, rows, n = partial.shape
    y = unwritten(batch, rows, n, dtype=dtype)
    buffers = [partial, y, struct.pack(SUM_PARTS_PARAMS, parts, rows * n)]
    launch("sum_parts", f"sum_parts_{oracle.name_of(dtype)}", set(), buffers, (ceil(rows * n, 64), batch, 1), 64)
    return y


def gather(
    kernel: Kernel, x: Tensor, weights: Quantized, lhs: Tensor, rhs: Tensor, aligned: bool = True, parts: int = 1
) -> Tensor:
    """y [P, M, N] for indices [P] into x [A, M, K] and into the matrices [E, ..]."""
    dtype = x.dtype
    rows, k = x.shape[-2:]
    n = columns_of(weights, kernel.transpose)
    y = unwritten(len(rhs), parts, rows, n, dtype=torch.float32 if kernel.op in SPLIT else dtype)
    strides = [
        stride
        for tensor in (x, *weights.tensors, weights.global_scale, y)
        for stride in (0 if tensor is None or tensor.numel() == 1 else tensor.stride(0), 0)
    ]
    in_tiles = "rhs" in kernel.op
    counted, batch = (len(rhs), 1) if in_tiles else (rows, len(rhs))
    depth = kernel.depth(dtype, weights.format)
    params = struct.pack(
        *(PRODUCT_PARAMS, *strides, x.stride(-2), rows * n, batch, counted, k, n, parts),
        depth * ceil(k, depth * parts),
    )
    threadgroups = kernel.threadgroups(counted, n, kernel.columns(k, n, dtype, weights.format), parts, batch)
    if in_tiles:
        lists = tiles_of_pairs(lhs, rhs, len(x), len(weights.w), kernel.instance)
        threadgroups = (threadgroups[0], len(lists[0]), 1)
    else:
        lists = (lhs, rhs)
        params += struct.pack(GATHER_TAIL, len(x), len(weights.w))
    constants = kernel.constants(x, weights, n) if aligned else set()
    constants |= {HAS_GLOBAL_SCALE} if weights.global_scale is not None else set()
    buffers = [x, *weights.tensors, weights.global_scale, y, params, *lists]
    launch(kernel.stem, kernel.name(weights.format, dtype), constants, buffers, threadgroups, kernel.threads)
    return sum_of_parts(y, dtype) if kernel.op in SPLIT else y[:, 0]


def assert_gathered(
    y: Tensor, x: Tensor, weights: Quantized, lhs: Tensor, rhs: Tensor, transpose: bool, what: str = ""
) -> None:
    """Pair by pair; NaN where an index is out of range."""
    for pair, (left, right) in enumerate(zip(lhs.tolist(), rhs.tolist(), strict=True)):
        if 0 <= left < len(x) and 0 <= right < len(weights.w):
            oracle.assert_product(y[pair], x[left], weights.matrix(transpose)[right], x.dtype, f"{what} pair {pair}")
        else:
            assert y[pair].isnan().all(), f"{what} pair {pair}"


def check(
    op: str,
    format: Format,
    dtype: torch.dtype,
    rows: int,
    free: int,
    grouped: int,
    instance: int | None = None,
    parts: int | None = None,
    aligned: bool = True,
    seed: int = 0,
):
    """One product of random numbers against float64; the report, if nothing is gathered.

    The stored matrices are free x grouped: K is grouped where they are transposed, and else N. Of packed columns, K is
    grouped, and they are grouped x free. The gathered ops get five pairs, or those in tiles `rows` pairs, of which some
    are out of range.
    """
    columns = format.is_column_packed
    kernel = Kernel.of(op, rows, columns) if instance is None else Kernel(op, instance, columns)
    what = f"{op} {format} {oracle.name_of(dtype)} {rows} rows, {free} x {grouped}"
    parts = parts or (2 if op in SPLIT else 1)
    k = grouped if kernel.transpose or columns else free
    shape = (grouped, free) if columns else (free, grouped)
    if op in GATHERED:
        weights = oracle.random_quantized(format, 4, *shape, dtype=dtype, seed=seed)
        by_row = "rhs" in op
        x = oracle.random_x(7, 1 if by_row else rows, k, dtype=dtype)
        if by_row:
            lhs = torch.randint(-1, 8, (rows,), generator=oracle.generator(seed))
            rhs = torch.arange(rows) * 5 // rows - 1  # one invalid
        else:
            lhs, rhs = torch.tensor([6, 0, 7, 1, 5]), torch.tensor([3, 0, 1, -1, 2])
        y = gather(kernel, x, weights, lhs, rhs, aligned, parts)
        assert_gathered(y, x, weights, lhs, rhs, kernel.transpose, what)
        return None
    weights = oracle.random_quantized(format, *shape, dtype=dtype, seed=seed)
    x = oracle.random_x(1, 1, rows, k, dtype=dtype)
    y, report = product(kernel, x, expanded(weights), parts, aligned)
    oracle.assert_product(y[0, 0], x[0, 0], weights.matrix(kernel.transpose), dtype, what)
    return report


def some_rows(op: str) -> int:
    """Few, but enough for a tile that is not full and, of pairs, for a second one."""
    return 37 if "rhs" in op else 5 if "qmm" in op else 1


# --- Names -----------------------------------------------------------------------------------------------------------


def test_names():
    """Each table has exactly the kernels that the formats, types and row counts call for."""
    expected = {
        "matvec": set(),
        "matmul": set(),
        "quantize": set(),
        "sum_parts": {f"sum_parts_{oracle.name_of(dtype)}" for dtype in DTYPES},
        "sort_pairs": {"sort_pairs"},
    }
    for dtype in DTYPES:
        for format in FORMATS:
            for op, instances in INSTANCES.items():
                stem = Kernel(op, 0).stem
                expected[stem] |= {kernel_name(format, op, dtype, rows) for rows in instances}
            expected["quantize"] |= {kernel_name(format, op, dtype) for op in ("quantize", "dequantize")}
        for format in cases.MARLIN_FORMATS:
            for op in COLUMN_OPS:
                expected[Kernel(op, 0).stem] |= {
                    kernel_name(format, op, dtype, rows) for rows in instances_of(op, True)
                }
            expected["quantize"] |= {kernel_name(format, op, dtype) for op in ("quantize", "dequantize")}
    for stem, names in expected.items():
        found = library(stem).kernels
        assert len(found) == len(set(found))
        assert set(found) == names


@pytest.mark.parametrize("stem", ("matvec", "matmul", "quantize", "sort_pairs"))
@pytest.mark.parametrize("standard", ("metal3.1", "metal4.0"))
def test_language_versions(stem, standard):
    """C++14 and C++17, for each kind of packing."""
    compiled = softmetal.compile(METAL / f"{stem}.metal", defines=ALL_KERNELS, standard=standard)
    if stem == "sort_pairs":
        compiled.check(list(compiled.kernels))
    for format in (*SOME_FORMATS, *COLUMN_FORMATS[:3]):
        end = re.compile(rf"_gs_{format.group_size}_b_{format.bits}(_rows_\d+)?")
        names = [name for name in compiled.kernels if name.startswith(f"{format.mode}_") and end.search(name)]
        compiled.check(names)


def test_launch_structs(tmp_path):
    """The host compiler lays the parameters out as this file packs them."""
    sizes = {
        "ProductParams": struct.calcsize(PRODUCT_PARAMS),
        "GatherParams": struct.calcsize(PRODUCT_PARAMS) + struct.calcsize(GATHER_TAIL),
        "SumPartsParams": struct.calcsize(SUM_PARTS_PARAMS),
        "SortPairsParams": struct.calcsize(SORT_PAIRS_PARAMS),
        "PairTile": 12,
        "SortedPair": 8,
        "QuantizeParams": struct.calcsize(QUANTIZE_PARAMS),
        "QuantizeColumnsParams": struct.calcsize(QUANTIZE_COLUMNS_PARAMS),
    }
    checks = "".join(f"static_assert(sizeof(quantization_mlx::{name}) == {size});" for name, size in sizes.items())
    source = tmp_path / "sizes.cpp"
    source.write_text(f'#include "{ROOT}/csrc/gpu/launch.h"\n{checks}\n')
    subprocess.run([shutil.which("c++") or "clang++", "-std=c++17", "-fsyntax-only", str(source)], check=True)


# --- Every kernel, and every shape -----------------------------------------------------------------------------------


@functools.cache
def kernels_of(op: str, part: str) -> list[tuple[Kernel, Format, torch.dtype]]:
    """Those in which every format, and every pair of an instance and a type occurs, or the others. The tests of the ops
    have every pair with a format."""
    everything = list(itertools.product(INSTANCES[op], DTYPES, FORMATS))
    pairs = list(itertools.product(INSTANCES[op], DTYPES))
    numbers = range(max(len(pairs), len(FORMATS)))
    some = {(*pairs[i % len(pairs)], FORMATS[i % len(FORMATS)]) for i in numbers}
    chosen = [combination for combination in everything if (combination in some) == (part == "some")]
    return [(Kernel(op, instance), format, dtype) for instance, dtype, format in chosen]


PARTS = [(op, "some") for op in INSTANCES]
PARTS += [pytest.param(op, "others", marks=pytest.mark.exhaustive) for op in INSTANCES]


@pytest.mark.parametrize("dtype", DTYPES, ids=oracle.name_of)
@pytest.mark.parametrize("op, part", PARTS)
def test_every_kernel(op, part, dtype):
    """No dimension a multiple of a block's, as far as the format allows."""
    chosen = [(kernel, format) for kernel, format, its_dtype in kernels_of(op, part) if its_dtype == dtype]
    for stem in {kernel.stem for kernel, _ in chosen}:
        library(stem).prepare([kernel.name(format, dtype) for kernel, format in chosen])
    for kernel, format in chosen:
        grouped = {16: 80, 32: 96, 64: 64, 128: 128}[format.group_size]
        rows = some_rows(op) if "qmm" in op else max(1, kernel.instance - 1)
        check(op, format, dtype, rows, 37, grouped, instance=kernel.instance)


@pytest.mark.parametrize("op", COLUMN_OPS)
def test_packed_columns(op):
    """Every mode in every instance and type: no dimension a multiple of a block's, one column, and whole blocks."""
    kernels = [Kernel(op, instance, True) for instance in instances_of(op, True)]
    cases = [(format, DTYPES[i % 3], kernel) for i, format in enumerate(COLUMN_FORMATS) for kernel in kernels]
    cases += [(COLUMN_FORMATS[3], dtype, kernel) for dtype in DTYPES for kernel in kernels]
    library(kernels[0].stem).prepare([kernel.name(format, dtype) for format, dtype, kernel in cases])
    for format, dtype, kernel in cases:
        rows = some_rows(op) if "qmm" in op else max(1, kernel.instance - 1)
        check(op, format, dtype, rows, 37, 3 * format.group_size, instance=kernel.instance)
    for format in COLUMN_FORMATS:
        check(op, format, torch.float16, 1, 1, format.group_size, instance=kernels[-1].instance)
        check(op, format, torch.float16, some_rows(op), 128, 256)
        check(op, format, torch.float16, some_rows(op), 128, 256, aligned=False)


@pytest.mark.parametrize("op", INSTANCES)
def test_shapes(op):
    """Every width of codes, on shapes that every fast path takes, that none takes, and the smallest there are."""
    rows = some_rows(op)
    kernel = Kernel.of(op, rows)
    library(kernel.stem).prepare([kernel.name(format, torch.float16) for format in EVERY_WIDTH])
    for format in EVERY_WIDTH:
        check(op, format, torch.float16, rows, 64, 256)
        check(op, format, torch.float16, rows, 70, 3 * format.group_size, aligned=False)
        check(op, format, torch.float16, 1, 1, format.group_size, instance=kernel.instance)


@pytest.mark.parametrize("op", INSTANCES)
def test_row_instances(op):
    """Full, and with all but the last row missing or, for a tile, with a second one that has a single row."""
    for instance in INSTANCES[op]:
        for dtype in (torch.float16, torch.float32):
            check(op, FOUR_BIT, dtype, instance, 70, 128, instance=instance)
        check(
            op, NVFP4, torch.bfloat16, instance + 1 if "qmm" in op else max(1, instance - 1), 37, 80, instance=instance
        )


@pytest.mark.parametrize("op", ("qmv", "gather_qmv"))
@pytest.mark.parametrize("k", (64, 512, 768, 1024, 2048, 2880))
def test_simdgroups_of_a_matvec(op, k):
    """One, two or four of them along K, the others along N: whole and ragged in both."""
    for rows, dtype in ((1, torch.float16), (4, torch.bfloat16), (1, torch.float32)):
        check(op, FOUR_BIT, dtype, rows, 64, k)
        check(op, FOUR_BIT, dtype, rows, 37, k, aligned=False)


@pytest.mark.parametrize(("rows", "dtype", "n", "k"), ((1, torch.float16, 16390, 576), (4, torch.float32, 16384, 320)))
def test_simdgroups_of_a_matvec_of_many_columns(rows, dtype, n, k):
    """Where a lane has one step, and two simdgroups would go along K, one does, and each lane has two steps."""
    check("qmv", FOUR_BIT, dtype, rows, n, k, aligned=n % 32 == 0)


@pytest.mark.parametrize("rows", (1, 3))
@pytest.mark.parametrize(
    ("dtype", "x_exponent", "scale_exponent"),
    ((torch.float16, -20, 10), (torch.bfloat16, -120, 118), (torch.float32, -120, 118)),
)
def test_smallest_x(rows, dtype, x_exponent, scale_exponent):
    """Subnormal numbers of half, and of the other types nearly the smallest normal ones, count as any others."""
    weights = oracle.random_quantized(FOUR_BIT, 24, 192, dtype=dtype)
    larger = replace(weights, scales=weights.scales * 2.0**scale_exponent, biases=weights.biases * 2.0**scale_exponent)
    x = oracle.random_x(1, 1, rows, 192, dtype=dtype) * 2.0**x_exponent
    y, _ = product(Kernel.of("qmv", rows), x, expanded(larger))
    oracle.assert_product(y[0, 0], x[0, 0], larger.matrix(True), dtype)


@pytest.mark.parametrize("op", SPLIT)
def test_split_k(op):
    """Parts of different sizes, one for each step of K."""
    rows = 35 if "qmm" in op else 1
    for parts in (2, 3, 5):
        check(op, NVFP4, torch.float16, rows, *((40, 144) if Kernel(op, 1).transpose else (139, 48)), parts=parts)
    check(op, FOUR_BIT, torch.float32, rows, 128, 128, parts=4)


@pytest.mark.parametrize("op", [op for op in INSTANCES if op not in GATHERED])
def test_batch(op):
    """Two batch dimensions, operands broadcast in different ones, rows of x with gaps: each with its own strides."""
    rows = 18 if "qmm" in op else 3
    kernel = Kernel.of(op, rows)
    free, grouped = 40, 128
    k = grouped if kernel.transpose else free
    stacked = oracle.random_quantized(FOUR_BIT, 3, free, grouped)
    weights = expanded(stacked, 2, 3)
    x = oracle.random_x(2, 3, 2 * rows, 2 * k)[:, :, ::2, :k]
    shared = oracle.random_x(2, 1, rows, k).expand(2, 3, rows, k)
    for operand in (x, shared):
        y, _ = product(kernel, operand, weights, 2 if op in SPLIT else 1)
        for outer in range(2):
            for inner in range(3):
                matrix = stacked.matrix(kernel.transpose)[inner]
                oracle.assert_product(y[outer, inner], operand[outer, inner], matrix, torch.float32)


@pytest.mark.parametrize("op", INSTANCES)
def test_global_scale(op):
    """Of the whole product, and for gathered matrices each its own."""
    rows = some_rows(op)
    kernel = Kernel.of(op, rows)
    free, grouped = (24, 64) if kernel.transpose else (64, 48)
    k = grouped if kernel.transpose else free
    factors = torch.tensor([500.0, 900.0, 2000.0, 3000.0])
    weights = oracle.random_quantized(NVFP4, 4, free, grouped)
    if op in GATHERED:
        weights = Quantized(NVFP4, weights.w, weights.scales, None, factors)
        x = oracle.random_x(3, 1 if "rhs" in op else rows, k)
        lhs, rhs = torch.tensor([2, 0, 1, 2, 3, 0, -1]), torch.tensor([1, 3, 0, 2**32 + 1, 2, -1, 0])
        assert_gathered(gather(kernel, x, weights, lhs, rhs), x, weights, lhs, rhs, kernel.transpose)
    else:
        weights = Quantized(NVFP4, weights.w[0], weights.scales[0], None, factors[:1])
        x = oracle.random_x(1, 1, rows, k)
        y, _ = product(kernel, x, expanded(weights), 2 if op in SPLIT else 1)
        oracle.assert_product(y[0, 0], x[0, 0], weights.matrix(kernel.transpose), torch.float32)


# --- Pairs in tiles --------------------------------------------------------------------------------------------------

PAIRS = {
    "sorted": torch.arange(70) // 18,
    "one expert": torch.full((70,), 2),
    "an expert for each pair": torch.arange(33) % 4,
    "unsorted": torch.randint(0, 4, (40,), generator=oracle.generator(0)),
    "invalid": torch.tensor([4, 4, 0, 0, -1, 0, 1, 1, 2**32, 3, 3, 7, -(2**62)]),
    "a single pair": torch.tensor([3]),
    "more than threads": torch.randint(-1, 5, (2 * SORTING_THREADS + 100,), generator=oracle.generator(2)),
}


def assert_in_tiles(tiles: Tensor, pairs: Tensor, lhs: Tensor, rhs: Tensor, rows_of_x: int, matrices: int, rows: int):
    """Each pair once, with its row of x, in a tile of its matrix; no more tiles than that takes."""
    valid = (lhs >= 0) & (lhs < rows_of_x) & (rhs >= 0) & (rhs < matrices)
    wanted = torch.where(valid, rhs, -1)
    used = tiles[tiles[:, 2] > 0]
    places = [torch.arange(first, first + count) for _, first, count in used.tolist()]
    assert torch.equal(torch.cat(places).sort().values, torch.arange(len(rhs)))
    for (matrix, _, count), place in zip(used.tolist(), places, strict=True):
        assert count <= rows
        assert (wanted[pairs[place, 0].long()] == matrix).all()
    assert torch.equal(pairs[:, 0].sort().values, torch.arange(len(rhs), dtype=torch.int32))
    own = pairs[:, 0].long()
    assert torch.equal(pairs[:, 1].long(), torch.where(valid, lhs, 0)[own])
    counts = torch.bincount(wanted + 1, minlength=matrices + 1)
    assert len(used) == sum(ceil(count, rows) for count in counts.tolist())
    assert (tiles[tiles[:, 2] == 0, 0] == -1).all()


@pytest.mark.parametrize("pairs", PAIRS)
def test_pairs_are_sorted_into_tiles(pairs):
    rhs = PAIRS[pairs]
    lhs = torch.randint(-1, 31, (len(rhs),), generator=oracle.generator(1))
    for rows, matrices in ((16, 4), (32, 4), (32, 1), (16, SORTING_THREADS - 1)):
        tiles, order = tiles_of_pairs(lhs, rhs, 30, matrices, rows)
        assert_in_tiles(tiles, order, lhs, rhs, 30, matrices, rows)


def test_most_pairs_of_most_matrices():
    rhs = torch.arange(SORTING_THREADS).repeat(3) * 7 % SORTING_THREADS  # the last matrix is none
    lhs = torch.arange(len(rhs))
    tiles, order = tiles_of_pairs(lhs, rhs, len(lhs), SORTING_THREADS - 1, 2)
    assert_in_tiles(tiles, order, lhs, rhs, len(lhs), SORTING_THREADS - 1, 2)


@pytest.mark.parametrize("pairs", [name for name in PAIRS if name != "more than threads"])
@pytest.mark.parametrize("op", ("gather_qmm_rhs_t", "gather_qmm_rhs_n"))
def test_products_of_pairs_in_tiles(op, pairs):
    """Any order is right; rows of x stand anywhere and may be asked for more than once."""
    rhs = PAIRS[pairs]
    kernel = Kernel.of(op, len(rhs))
    weights = oracle.random_quantized(FOUR_BIT, 4, *((70, 64) if kernel.transpose else (45, 128)), dtype=torch.bfloat16)
    lhs = torch.randint(-1, 31, (len(rhs),), generator=oracle.generator(1))
    x = oracle.random_x(30, 2, 64 if kernel.transpose else 45, dtype=torch.bfloat16)[:, :1]
    y = gather(kernel, x, weights, lhs, rhs)
    assert_gathered(y, x, weights, lhs, rhs, kernel.transpose, pairs)


# --- Numbers that are none -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", ("qmm_t", "qmm_n", "gather_qmm_rhs_t", "gather_qmm_rhs_n"))
def test_rows_are_independent(op):
    """NaN and infinity in one row of x, and beyond the end of every row, stay where they are."""
    kernel = Kernel.of(op, 20)
    free, grouped = (70, 80) if kernel.transpose else (37, 80)
    k = grouped if kernel.transpose else free
    weights = oracle.random_quantized(NVFP4, 1, free, grouped)
    rows = torch.full((22, 8 * ceil(k, 8) + 8), torch.nan)
    rows[:20, :k] = oracle.random_x(20, k)
    rows[3, 3], rows[8, 2] = torch.nan, torch.inf
    x = rows[:20, :k]
    if op in GATHERED:
        y = gather(kernel, x[:, None], weights, torch.arange(20), torch.zeros(20, dtype=torch.int64))[:, 0]
    else:
        y = product(kernel, x[None, None], expanded(weights))[0][0, 0]
    good = torch.tensor([row for row in range(20) if row not in (3, 8)])
    oracle.assert_product(y[good], x[good], weights.matrix(kernel.transpose)[0], torch.float32)
    assert not y[3].isfinite().any() and not y[8].isfinite().any()


@pytest.mark.parametrize("rows", (1, 8))
@pytest.mark.parametrize("dtype", (torch.float16, torch.float32), ids=oracle.name_of)
def test_a_weight_that_is_no_number_concerns_its_output_alone(dtype, rows):
    """E4M3's NaN of both signs: in the first step of K and the last, the first element of a lane and the last."""
    weights = oracle.random_quantized(Format("mxfp8", 32, 8), 1, 37, 1120, dtype=dtype)
    codes = weights.w.view(torch.uint8)
    for row, column, code in ((0, 0, 0x7F), (5, 1119, 0xFF), (11, 543, 0x7F), (36, 1088, 0xFF)):
        codes[0, row, column] = code
    x = oracle.random_x(rows, 1120, dtype=dtype)
    y = product(Kernel.of("qmv", rows), x[None, None], expanded(weights))[0][0, 0]
    bad = torch.tensor([column in (0, 5, 11, 36) for column in range(37)])
    assert torch.equal(y.isnan(), bad.expand(rows, 37))
    oracle.assert_product(y[:, ~bad], x, weights.matrix(True)[0][:, ~bad], dtype)


# --- Barriers --------------------------------------------------------------------------------------------------------

# By header: a file that includes it, a format, and ops and rows that reach every barrier.
BARRIER_USERS = {
    "matmul": ("matmul", FOUR_BIT, ("qmm_t", "gather_qmm_rhs_n"), (20,)),
    "tile": ("matmul", FOUR_BIT, ("qmm_t", "qmm_n"), (20,)),  # of weights beyond the range of half
    "matvec": ("matvec", FOUR_BIT, ("qmv", "qvm", "gather_qvm"), (1, 4)),
    "matvec_columns": ("matvec", COLUMN_FORMATS[0], ("qvm", "gather_qvm"), (1, 4)),
}
BARRIERS = [
    (header, number) for header in BARRIER_USERS for number in range((METAL / f"{header}.h").read_text().count(BARRIER))
]


SORTER = (METAL / "sort_pairs.metal").read_text()


@pytest.mark.parametrize("number", range(SORTER.count(BARRIER)))
def test_every_barrier_of_sort_pairs_is_needed(number):
    parts = SORTER.split(BARRIER)
    without = softmetal.compile(
        BARRIER.join(parts[: number + 1]) + BARRIER.join(parts[number + 1 :]), include_dirs=[METAL]
    )
    rhs = PAIRS["unsorted"]
    with pytest.raises(AssertionError, match="threadgroup-race"):
        tiles_of_pairs(torch.arange(len(rhs)), rhs, len(rhs), 4, 16, without)


@pytest.mark.parametrize(("header", "number"), BARRIERS)
def test_every_barrier_is_needed(header, number, monkeypatch):
    """Without any one of them, the device reports a race."""
    stem, format, ops, row_counts = BARRIER_USERS[header]
    parts = (METAL / f"{header}.h").read_text().split(BARRIER)
    without = BARRIER.join(parts[: number + 1]) + BARRIER.join(parts[number + 1 :])
    source = (METAL / f"{stem}.metal").read_text().partition("// --- Instances")[0]
    if header == "tile":
        source = source.replace('#include "matmul.h"', (METAL / "matmul.h").read_text())
        large = oracle.random_large(format, 70, 128)
        monkeypatch.setattr(oracle, "random_quantized", lambda *shape, **options: large)
    source = source.replace(f'#include "{header}.h"', without)
    kernels = f"{stem.upper()}_KERNELS_{'columns' if format.is_column_packed else 'rows'}"
    instances = f"FORMAT_KERNELS({format.mode}, {format.group_size}, {format.bits}, {kernels}, float16, half)"
    source += f'#include "formats.h"\nnamespace quantization_mlx {{\n{instances}\n}}\n'
    broken = softmetal.compile(source, include_dirs=[METAL])
    monkeypatch.setattr(sys.modules[__name__], "library", lambda stem: broken)
    errors = ""
    for op in ops:
        for rows in row_counts:
            try:
                check(op, format, torch.float16, rows, 70, 128)
            except AssertionError as error:
                errors += str(error)
    assert "threadgroup-race" in errors


# --- Cost ------------------------------------------------------------------------------------------------------------


READ_ONCE = (FOUR_BIT, Format("affine", 64, 3), Format("mxfp8", 32, 8))


@pytest.mark.parametrize(
    ("op", "format"),
    [*((op, format) for op in ("qmv", "qvm") for format in READ_ONCE), *(("qvm", format) for format in COLUMN_FORMATS)],
    ids=oracle.name_of,
)
def test_weights_are_read_once(op, format):
    """For all rows of a matvec; a tile reads them once for each tile of rows."""
    minimum = 128 * 1024 * format.bits // 8
    for rows in (1, 2, 3, 5, 8):
        report = check(op, format, torch.float16, rows, 128, 1024)
        assert minimum <= report.counters["buffer_bytes_read"][1] <= 1.02 * minimum
        if format.is_column_packed:
            assert report.counters["buffer_bytes_read"][2] == 128 * 1024 // format.group_size * 2


@pytest.mark.parametrize("op", ("qmm_t", "qmm_n"))
@pytest.mark.parametrize("rows", (16, 32, 64))
def test_cost_of_a_tile(op, rows):
    """Device memory is read once for each tile, fragments of both operands are shared, two barriers a step."""
    k, n = 128, 128
    counters = check(op, FOUR_BIT, torch.float16, rows, 128, 128).counters
    tiles, steps = n // 64, k // Kernel(op, rows).depth(torch.float16)
    assert counters["buffer_bytes_read"][0] == rows * k * 2 * tiles
    assert counters["buffer_bytes_read"][1] == n * k // 2
    assert counters["buffer_bytes_written"][5] == rows * n * 2
    assert counters["threadgroup_barriers"] == 2 * steps * tiles
    assert counters["simdgroup_multiplies"] == rows // 8 * n // 8 * k // 8
    shared = {16: 1, 32: 6 / 8, 64: 8 / 16}[rows]  # loads of fragments for each product of two
    assert counters["simdgroup_loads"] == shared * counters["simdgroup_multiplies"]
    assert counters["threadgroup_bytes"] <= 16 * 1024


# --- Quantize and dequantize -----------------------------------------------------------------------------------------


def quantize(w: Tensor, format: Format, global_scale: Tensor | None = None) -> tuple[Tensor, ...]:
    groups = (*w.shape[:-1], w.shape[-1] // format.group_size)
    words = unwritten(*w.shape[:-1], w.shape[-1] * format.bits // 32, dtype=torch.int32)
    scales = unwritten(*groups, dtype=w.dtype if format.is_affine else torch.uint8)
    biases = unwritten(*groups, dtype=w.dtype) if format.is_affine else None
    constants = {ALIGNED_X} | ({HAS_GLOBAL_SCALE} if global_scale is not None else set())
    buffers = [w, global_scale, words, scales, biases, struct.pack(QUANTIZE_PARAMS, w.numel())]
    grid = (ceil(w.numel() // 8, 64), 1, 1)
    launch("quantize", kernel_name(format, "quantize", w.dtype), constants, buffers, grid, 64)
    result = (words.view(torch.uint32), scales)
    return result if biases is None else (*result, biases)


def hard_values(dtype: torch.dtype, columns: int) -> Tensor:
    """Rows that each meet a special case of a quantizer, and rows of random numbers of many sizes."""
    generator = oracle.generator(3)
    rows = [
        torch.zeros(columns),
        torch.full((columns,), 0.75),
        torch.full((columns,), -3.0),
        torch.arange(columns) / 4 - columns / 8,  # ties
        -1.0 - torch.rand(columns, generator=generator),
        1e-6 * torch.randn(columns, generator=generator),
        torch.where(torch.arange(columns) == 5, 2500.0, 0.25),
    ]
    rows += [torch.randn(columns, generator=generator) * 2.0**power for power in range(-8, 8)]
    return torch.stack(rows).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=oracle.name_of)
@pytest.mark.parametrize("format", FORMATS, ids=oracle.name_of)
def test_quantize(format, dtype, tally):
    w = hard_values(dtype, 384)
    for ours, expected in zip(quantize(w, format), oracle.mlx_quantize(w, format), strict=True):
        tally.compare(f"shader quantize {format.mode}", ours, expected, f"{format} {dtype}")


@pytest.mark.parametrize("dtype", DTYPES, ids=oracle.name_of)
def test_quantize_with_global_scale(dtype, tally):
    w = hard_values(dtype, 384)
    for ours, expected in zip(
        quantize(w, NVFP4, w.abs().max().float().reshape(1)),
        oracle.mlx_quantize(w, NVFP4, w.abs().max().float()),
        strict=True,
    ):
        tally.compare("shader quantize nvfp4", ours, expected, f"global scale, {dtype}")


def test_quantize_ragged():
    """Threads beyond the last group, and a matrix whose elements are no multiple of 32."""
    w = oracle.random_x(3, 48, dtype=torch.float16)
    for ours, expected in zip(quantize(w, NVFP4), torch_quantize(w), strict=True):
        oracle.assert_identical(ours, expected)


def torch_quantize(w: Tensor) -> tuple[Tensor, Tensor]:
    """mlx's answer for nvfp4 where it wants a multiple of 32 elements: from w twice over."""
    words, scales = oracle.mlx_quantize(torch.cat([w, w]), NVFP4)
    return words[: len(w)], scales[: len(w)]


def dequantize(weights: Quantized, dtype: torch.dtype) -> Tensor:
    format = weights.format
    y = unwritten(*weights.dense.shape, dtype=dtype)
    constants = {ALIGNED_WEIGHTS} | ({HAS_GLOBAL_SCALE} if weights.global_scale is not None else set())
    buffers = [*weights.tensors, weights.global_scale, y, struct.pack(QUANTIZE_PARAMS, y.numel())]
    grid = (ceil(ceil(y.numel(), 32), 64), 1, 1)
    launch("quantize", kernel_name(format, "dequantize", dtype), constants, buffers, grid, 64)
    return y


def assert_dequantized(weights: Quantized, dtype: torch.dtype) -> None:
    """Within one rounding to dtype of the exact values, and float32's roundings of the product and the sum."""
    reference = weights.dense
    size = weights.dense.abs()
    if weights.biases is not None:
        size = size + 2 * weights.biases.double().abs().repeat_interleave(weights.format.group_size, -1)
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    bound = torch.finfo(dtype).eps / 2 * reference.abs() + 2 * torch.finfo(torch.float32).eps * size + smallest
    oracle.assert_within(dequantize(weights, dtype), reference, bound, f"{weights.format} {dtype}")


@pytest.mark.parametrize("dtype", DTYPES, ids=oracle.name_of)
@pytest.mark.parametrize("format", FORMATS, ids=oracle.name_of)
def test_dequantize(format, dtype):
    k = 336 if format == NVFP4 else 384
    assert_dequantized(oracle.random_quantized(format, 5, k, dtype=dtype), dtype)


def test_dequantize_with_global_scale():
    weights = oracle.random_quantized(NVFP4, 5, 48)
    assert_dequantized(Quantized(NVFP4, weights.w, weights.scales, None, torch.tensor([900.0])), torch.float32)


@pytest.mark.parametrize("format", (format for format in FORMATS if format.bits in (4, 8)), ids=oracle.name_of)
def test_dequantize_every_code(format):
    """Exact, as the codes and these scales are; both signs of zero included."""
    codes = np.arange(2 * 256).reshape(2, 256) % (1 << format.bits)
    groups = (2, 256 // format.group_size)
    if format.is_affine:
        scales, biases = torch.full(groups, 0.5), torch.full(groups, -0.0)
    else:
        scales, biases = torch.full(groups, 0x38 if format == NVFP4 else 127, dtype=torch.uint8), None  # 1
    weights = Quantized(format, oracle.pack(codes, format.bits), scales, biases)
    ours, expected = dequantize(weights, torch.float32), weights.dense.float()
    number = ~expected.isnan()
    assert torch.equal(ours.isnan(), ~number)
    assert torch.equal(ours[number], expected[number])
