"""The Metal shaders on the software device: values against float64 and mlx, no checker error, no byte read twice."""

from __future__ import annotations

import functools
import re
import shutil
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import oracle
import softmetal
from oracle import DTYPES, FORMATS, SOME_FORMATS, Format, Quantized

ROOT = Path(__file__).resolve().parent.parent
TYPES = {torch.float32: 1, torch.float16: 2, torch.bfloat16: 4}  # QUANTIZATION_MLX_TYPES
ROW_INSTANCES = (1, 2, 3, 4, 6, 8, 12)
GATHER_ROW_INSTANCES = (1, 4, 8)
SIMDGROUPS = {"qmv": 2, "qvm": 4}
# csrc/metal/launch.h
ALIGNED_OUTPUTS, ALIGNED_WEIGHTS, ALIGNED_X, HAS_GLOBAL_SCALE, HAS_LHS_INDICES, HAS_RHS_INDICES = range(6)
MATVEC_PARAMS, GATHER_TAIL, SUM_PARTS_PARAMS, QUANTIZE_PARAMS = "<11q6i", "<4q4i", "<2i", "<q"

FOUR_BIT = Format("affine", 64, 4)
NVFP4 = Format("nvfp4", 16, 4)


# --- Compiling and launching -----------------------------------------------------------------------------------------


@functools.cache
def instantiations(stem: str, types: int = 7, modes: int = 15) -> dict[str, str]:
    """The instantiations in metal/<stem>.metal by host name, from macro expansion alone."""
    text = (ROOT / f"metal/{stem}.metal").read_text().replace(f'#include "{stem}.h"', "")
    compiler = shutil.which("c++") or "clang++"
    options = [f"-DQUANTIZATION_MLX_TYPES={types}", f"-DQUANTIZATION_MLX_MODES={modes}", f"-I{ROOT / 'metal'}"]
    done = subprocess.run(
        [compiler, "-E", "-P", "-x", "c++", *options, "-"], input=text, capture_output=True, text=True, check=True
    )
    found = re.findall(r"template \[\[host_name\(([^)]*)\)\]\].*?;", done.stdout, re.S)
    statements = re.findall(r"template \[\[host_name\([^)]*\)\]\].*?;", done.stdout, re.S)
    names = ["".join(re.findall(r'"([^"]*)"', literal)) for literal in found]
    assert len(names) == len(set(names)), "a host name is used twice"
    return dict(zip(names, statements, strict=True))


def kernel_name(format: Format, op: str, dtype: torch.dtype, rows: int = 1) -> str:
    suffix = f"_rows_{rows}" if rows > 1 else ""
    return f"{format.mode}_{op}_{oracle.name_of(dtype)}_gs_{format.group_size}_b_{format.bits}{suffix}"


@functools.cache
def library(stem: str, names: tuple[str, ...], constants: frozenset[int]):
    """The named kernels of metal/<stem>.metal with these function constants true and the others false."""
    statements = "\n".join(instantiations(stem)[name] for name in names)
    source = f'#include "{stem}.h"\nusing namespace metal;\nusing namespace quantization_mlx;\n{statements}\n'
    values = {index: index in constants for index in range(6)}
    return softmetal.compile(source, include_dirs=[ROOT / "metal"], function_constants=values)


def family(name: str) -> tuple[str, ...]:
    """The kernels that share a library with one: the other formats, or the other row counts."""
    stem = "quantize" if "quantize" in name else "matvec"
    pattern = r"_rows_\d+$" if "_rows_" in name else r"^[a-z0-9]+|_gs_\d+_b_\d+$"
    if name.startswith("sum_parts"):
        return (name,)
    return tuple(other for other in instantiations(stem) if re.sub(pattern, "*", other) == re.sub(pattern, "*", name))


def memory(tensor: Tensor | None) -> np.ndarray | None:
    """The whole storage under a tensor, as the device sees it; bfloat16 as uint16."""
    if tensor is None:
        return None
    flat = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
    return flat.view(torch.int16).numpy().view(np.uint16) if tensor.dtype == torch.bfloat16 else flat.numpy()


def launch(stem, name, constants, buffers, threadgroups, threads):
    """Launch one kernel; the tensors among `buffers` are written in place."""
    arrays = [memory(buffer) if isinstance(buffer, Tensor) else buffer for buffer in buffers]
    report = library(stem, family(name), frozenset(constants)).launch(
        name, arrays, threadgroups, (threads, 1, 1), seed=1
    )
    assert not report.errors, "\n".join(report.errors)
    return report


def unwritten(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.full(shape, 77, dtype=dtype)


def ceil(a: int, b: int) -> int:
    return -(-a // b)


# --- The matvec's plan, as a host would make it ----------------------------------------------------------------------


def outputs_per_threadgroup(transpose: bool, instance: int) -> int:
    return 2 * 4 * (2 if instance == 1 or instance > 8 else 4) if transpose else 256


def batch_strides(tensor: Tensor | None) -> tuple[int, int]:
    return (0, 0) if tensor is None else tensor.stride()[:2]


def matvec(
    x: Tensor,
    weights: Quantized,
    transpose: bool = True,
    instance: int | None = None,
    parts: int = 1,
    aligned: bool = True,
):
    """y [B0, B1, M, N] of x [B0, B1, M, K] and matrices with the same batch dimensions, any strides; and the report.

    instance: the row count of the kernel. parts: split-K. With `aligned` false, the kernel that assumes
    no alignment runs.
    """
    format, dtype = weights.format, x.dtype
    outer, inner, rows, k = x.shape
    n = weights.w.shape[-2] if transpose else weights.w.shape[-1] * 32 // format.bits
    instance = instance or next(count for count in ROW_INSTANCES if count >= rows)
    op = ("qmv" if transpose else "qvm") + ("_splitk" if parts > 1 else "")
    name = kernel_name(format, op, dtype, instance)
    block = outputs_per_threadgroup(transpose, instance)
    row_bytes = weights.w.shape[-1] * 4
    constants = set()
    if aligned:
        constants |= {ALIGNED_OUTPUTS} if n % block == 0 else set()
        constants |= {ALIGNED_WEIGHTS} if row_bytes % {2: 8, 4: 16, 6: 8, 8: 16}.get(format.bits, 4) == 0 else set()
        constants |= {ALIGNED_X} if x.stride(-2) * x.element_size() % 16 == 0 else set()
    constants |= {HAS_GLOBAL_SCALE} if weights.global_scale is not None else set()
    steps = ceil(k // 32 if transpose else k, parts)
    params = struct.pack(
        MATVEC_PARAMS,
        *batch_strides(x), *batch_strides(weights.w), *batch_strides(weights.scales), *batch_strides(weights.biases),
        0, 0, x.stride(-2), inner, rows, k, n, parts, steps,
    )  # fmt: skip
    y = unwritten(outer, inner, parts, rows, n, dtype=torch.float32 if parts > 1 else dtype)
    buffers = [x, *weights.tensors, weights.global_scale, y, params]
    threadgroups = (ceil(n, block), parts, outer * inner)
    threads = 32 * SIMDGROUPS["qmv" if transpose else "qvm"]
    report = launch("matvec", name, constants, buffers, threadgroups, threads)
    if parts > 1:
        partial, y = y, unwritten(outer, inner, rows, n, dtype=dtype)
        summing = f"sum_parts_{oracle.name_of(dtype)}"
        params = struct.pack(SUM_PARTS_PARAMS, parts, rows * n)
        grid = (ceil(rows * n, 64), outer * inner, 1)
        launch("matvec", summing, set(), [partial, y, params], grid, 64)
    return y.reshape(outer, inner, rows, n), report


def expanded(weights: Quantized, outer: int = 1, inner: int = 1) -> Quantized:
    """The matrices [N, K] or [inner, N, K], broadcast to two batch dimensions."""
    shape = (outer, inner, -1, -1)
    w, scales, biases = (None if tensor is None else tensor.expand(shape) for tensor in weights.tensors)
    return Quantized(weights.format, w, scales, biases, weights.global_scale)


def check_matvec(format: Format, dtype: torch.dtype, rows: int, n: int, k: int, transpose: bool = True, **options):
    """One product of random numbers against float64."""
    weights = oracle.random_quantized(format, *((n, k) if transpose else (k, n)), dtype=dtype)
    x = oracle.random_x(1, 1, rows, k, dtype=dtype)
    y, report = matvec(x, expanded(weights), transpose, **options)
    oracle.assert_product(y[0, 0], x[0, 0], weights.matrix(transpose), dtype, f"{format} {rows}x{k}x{n}")
    return report


# --- Names -----------------------------------------------------------------------------------------------------------


def test_names():
    """Each table has exactly the kernels that the formats, types and row counts call for."""
    expected = {"matvec": {f"sum_parts_{oracle.name_of(dtype)}" for dtype in DTYPES}, "quantize": set()}
    for dtype in DTYPES:
        for format in FORMATS:
            ops = [(op, rows) for op in ("qmv", "qmv_splitk") for rows in ROW_INSTANCES]
            ops += [("gather_qmv", rows) for rows in GATHER_ROW_INSTANCES]
            ops += [(op, 1) for op in ("qvm", "qvm_splitk", "gather_qvm")]
            expected["matvec"] |= {kernel_name(format, op, dtype, rows) for op, rows in ops}
            expected["quantize"] |= {kernel_name(format, op, dtype) for op in ("quantize", "dequantize")}
    for stem, names in expected.items():
        assert set(instantiations(stem)) == names
        parts = [instantiations(stem, types, modes) for types in (1, 2, 4) for modes in (1, 14)]
        assert sorted(name for part in parts for name in part) == sorted(
            [*names, *(name for name in names if name.startswith("sum_parts"))]
        )


def test_launch_structs(tmp_path):
    """The host compiler lays the parameters out as this file packs them."""
    sizes = {
        "MatvecParams": struct.calcsize(MATVEC_PARAMS),
        "GatherParams": struct.calcsize(MATVEC_PARAMS) + struct.calcsize(GATHER_TAIL),
        "SumPartsParams": struct.calcsize(SUM_PARTS_PARAMS),
        "QuantizeParams": struct.calcsize(QUANTIZE_PARAMS),
    }
    checks = "".join(f"static_assert(sizeof(quantization_mlx::{name}) == {size});" for name, size in sizes.items())
    source = tmp_path / "sizes.cpp"
    source.write_text(f'#include "{ROOT}/csrc/metal/launch.h"\n{checks}\n')
    subprocess.run([shutil.which("c++") or "clang++", "-std=c++17", "-fsyntax-only", str(source)], check=True)


# --- Products --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=oracle.name_of)
@pytest.mark.parametrize("format", FORMATS, ids=oracle.name_of)
def test_qmv_every_format(format, dtype):
    k = 1296 if format == NVFP4 else 3 * 384  # nvfp4: rows end in half a run
    check_matvec(format, dtype, 1, 37, k)


@pytest.mark.parametrize("dtype", DTYPES, ids=oracle.name_of)
@pytest.mark.parametrize("format", FORMATS, ids=oracle.name_of)
def test_qvm_every_format(format, dtype):
    n = 336 if format == NVFP4 else 384
    check_matvec(format, dtype, 1, n, 37, transpose=False)


@pytest.mark.parametrize("rows", range(1, 13))
def test_rows(rows):
    """Every row count, on the instance a plan would take, ragged and aligned."""
    check_matvec(FOUR_BIT, torch.float16, rows, 37, 320)
    check_matvec(FOUR_BIT, torch.float16, rows, 64, 512)


@pytest.mark.parametrize("format", SOME_FORMATS, ids=oracle.name_of)
def test_rows_of_some_formats(format):
    check_matvec(format, torch.bfloat16, 5, 33, 272 if format == NVFP4 else 384)


@pytest.mark.parametrize("transpose", (True, False), ids=("qmv", "qvm"))
@pytest.mark.parametrize("format", SOME_FORMATS, ids=oracle.name_of)
def test_shapes(format, transpose):
    """Aligned, the smallest that there are, and without any alignment."""
    group = format.group_size
    check_matvec(format, torch.float16, 1, 256, 512, transpose)
    check_matvec(format, torch.float16, 1, *((1, group) if transpose else (group, 1)), transpose)
    check_matvec(
        format, torch.float16, 1, *((37, 3 * group) if transpose else (3 * group, 37)), transpose, aligned=False
    )


@pytest.mark.parametrize("format", (FOUR_BIT, NVFP4), ids=oracle.name_of)
@pytest.mark.parametrize(("rows", "parts"), ((1, 2), (1, 5), (3, 4), (1, 40)))
def test_split_k(format, rows, parts):
    k = 1040 if format == NVFP4 else 1088
    check_matvec(format, torch.float16, rows, 24, k, parts=parts)
    if rows == 1:
        check_matvec(format, torch.float16, rows, 320, 75, transpose=False, parts=parts)


@pytest.mark.parametrize("transpose", (True, False), ids=("qmv", "qvm"))
def test_batch(transpose):
    """Two batch dimensions, operands broadcast in different ones, x not contiguous: every operand its own strides."""
    rows = 3 if transpose else 1
    shape = (40, 128) if transpose else (72, 192)
    k = 128 if transpose else 72
    stacked = oracle.random_quantized(FOUR_BIT, 3, *shape)
    weights = expanded(stacked, 2, 3)
    x = oracle.random_x(2, 3, 2 * rows, 2 * k)[:, :, ::2, :k]
    shared = oracle.random_x(2, 1, rows, k).expand(2, 3, rows, k)
    for operand in (x, shared):
        y, _ = matvec(operand, weights, transpose)
        for outer in range(2):
            for inner in range(3):
                matrix = stacked.matrix(transpose)[inner]
                oracle.assert_product(y[outer, inner], operand[outer, inner], matrix, torch.float32)


@pytest.mark.parametrize("transpose", (True, False), ids=("qmv", "qvm"))
def test_global_scale(transpose):
    weights = oracle.random_quantized(NVFP4, *((40, 128) if transpose else (128, 48)))
    weights = Quantized(NVFP4, weights.w, weights.scales, None, torch.tensor([900.0]))
    x = oracle.random_x(1, 1, 1, 128)
    y, _ = matvec(x, expanded(weights), transpose)
    oracle.assert_product(y[0, 0], x[0, 0], weights.matrix(transpose), torch.float32)


# --- Gathered products -----------------------------------------------------------------------------------------------


def gather(x: Tensor, weights: Quantized, lhs: Tensor | None, rhs: Tensor | None, transpose: bool) -> Tensor:
    """y [T, S, M, N] for indices [T, S] into x [A, M, K] and into the matrices [E, ..]; without lhs, x is [T, M, K]."""
    format, dtype = weights.format, x.dtype
    outer, inner = (rhs if rhs is not None else lhs).shape
    rows, k = x.shape[-2:]
    n = weights.w.shape[-2] if transpose else weights.w.shape[-1] * 32 // format.bits
    instance = next(count for count in GATHER_ROW_INSTANCES if count >= rows)
    name = kernel_name(format, "gather_qmv" if transpose else "gather_qvm", dtype, instance)
    block = outputs_per_threadgroup(transpose, instance)
    matrix_strides = [
        number
        for tensor in (x, *weights.tensors, weights.global_scale)
        for number in (0 if tensor is None or tensor.numel() == 1 else tensor.stride(0), 0)
    ]
    steps = k // 32 if transpose else k
    params = struct.pack(MATVEC_PARAMS, *matrix_strides, x.stride(-2), inner, rows, k, n, 1, steps)
    indices = [(1, 0) if index is None else index.stride() for index in (lhs, rhs)]
    words = [1 if index is None else index.element_size() // 4 for index in (lhs, rhs)]
    params += struct.pack(GATHER_TAIL, *indices[0], *indices[1], len(x), len(weights.w), *words)
    constants = {HAS_LHS_INDICES} if lhs is not None else set()
    constants |= {HAS_RHS_INDICES} if rhs is not None else set()
    constants |= {HAS_GLOBAL_SCALE} if weights.global_scale is not None else set()
    y = unwritten(outer, inner, rows, n, dtype=dtype)
    as_words = [None if index is None else memory(index).view(np.uint32) for index in (lhs, rhs)]
    buffers = [x, *weights.tensors, weights.global_scale, y, params, *as_words]
    grid = (ceil(n, block), 1, outer * inner)
    launch("matvec", name, constants, buffers, grid, 32 * SIMDGROUPS["qmv" if transpose else "qvm"])
    return y


@pytest.mark.parametrize("transpose", (True, False), ids=("qmv", "qvm"))
@pytest.mark.parametrize("format", SOME_FORMATS, ids=oracle.name_of)
def test_gather(format, transpose):
    """Experts by rhs indices as in a mixture of experts; those out of range make NaN and read nothing."""
    k, n = (256, 37) if transpose else (21, 256)
    weights = oracle.random_quantized(format, 5, *((n, k) if transpose else (k, n)), dtype=torch.float16)
    x = oracle.random_x(3, 1, k, dtype=torch.float16)
    rhs = torch.tensor([[4, 0], [5, 2], [-1, 3]], dtype=torch.int32)
    y = gather(x, weights, None, rhs, transpose)
    for token, experts in enumerate(rhs.tolist()):
        for slot, expert in enumerate(experts):
            if 0 <= expert < 5:
                oracle.assert_product(y[token, slot], x[token], weights.matrix(transpose)[expert], torch.float16)
            else:
                assert y[token, slot].isnan().all()


@pytest.mark.parametrize(("transpose", "rows"), ((True, 3), (True, 7), (False, 1)))
def test_gather_both(transpose, rows):
    """64-bit, non-contiguous indices on both sides, several rows, a global scale for each expert."""
    weights = oracle.random_quantized(NVFP4, 4, *((24, 64) if transpose else (64, 48)))
    weights = Quantized(NVFP4, weights.w, weights.scales, None, torch.tensor([500.0, 900.0, 2000.0, 3000.0]))
    x = oracle.random_x(3, rows, 64)
    lhs = torch.tensor([[2, 0], [1, 2], [0, 0]]).T
    rhs = torch.tensor([[1, 3], [0, 2**32 + 1], [2, -1]]).T
    y = gather(x, weights, lhs, rhs, transpose)
    for position in np.ndindex(2, 3):
        left, right = lhs[position], rhs[position]
        if 0 <= right < 4:
            oracle.assert_product(y[position], x[left], weights.matrix(transpose)[right], torch.float32)
        else:
            assert y[position].isnan().all()


# --- Bytes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", (FOUR_BIT, Format("affine", 64, 3), Format("mxfp8", 32, 8)), ids=oracle.name_of)
@pytest.mark.parametrize("rows", (1, 2, 3, 5, 8))
def test_weights_are_read_once(format, rows):
    n, k = 128, 1024
    report = check_matvec(format, torch.float16, rows, n, k)
    assert n * k * format.bits // 8 <= weight_bytes(report) <= 1.02 * n * k * format.bits // 8


def weight_bytes(report) -> int:
    return report.counters["buffer_bytes_read"][1]


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
