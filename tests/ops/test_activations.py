"""Products with activations quantized to int8 against float64 on activations that numpy quantizes and exact weights."""

from __future__ import annotations

import math
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import oracle
import quantization_mlx as qm
from cases import DTYPES, FLOAT_FORMATS, FORMATS
from oracle import Format, Quantized, name_of
from process import printed, python


def has_instructions() -> bool:
    """Of the machine, whatever the package makes of it: where they are there, a package without int8 fails."""
    info = Path("/proc/cpuinfo")
    flags = set(info.read_text().split()) if info.exists() else set()
    return {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "avx512vbmi"} <= flags


pytestmark = pytest.mark.kernels_ci
# Where these must run, in CI, a machine without the instructions fails them.
NEEDS_INT8 = pytest.mark.skipif(
    os.environ.get("CI") != "true" and not has_instructions(), reason="needs AVX-512 with VNNI and VBMI"
)
INT8_FORMATS = tuple(format for format in FORMATS if format.mode != "mxfp8")
MXFP8, NVFP4 = FLOAT_FORMATS[1], FLOAT_FORMATS[2]
FOUR_BIT = Format("affine", 64, 4)
ROWS = (1, 2, 3, 4, 5, 6, 7, 16, 33)
# Rows of w, and groups along a row: ragged blocks of units, strips of columns, panels and tasks.
WEIGHTS = ((1, 1), (7, 3), (16, 2), (45, 5), (150, 67))
VARIABLE = "QUANTIZATION_MLX_CPU_ACTIVATIONS"


@pytest.fixture
def int8() -> Iterator[None]:
    with qm.cpu_activations("int8"):
        yield


def rounded(x: Tensor, group_size: int) -> Tensor:
    """What int8 makes of x [..., K], float64: a scale for each group, max|x| / 127, and integers, ties to even.

    Groups below 2^-100 count as zeros.
    """
    values = x.float().numpy().reshape(*x.shape[:-1], -1, group_size)
    largest = np.abs(values).max(-1, keepdims=True)
    largest[largest < 2.0**-100] = 0
    factors = np.divide(np.float32(127), largest, out=np.zeros_like(largest), where=largest > 0)
    steps = np.rint(values * factors).astype(np.float64) * (largest / np.float32(127))
    return torch.from_numpy(steps.reshape(x.shape))


def multiply(x: Tensor, weights: Quantized, transpose: bool = True) -> Tensor:
    options = {**weights.format.options, "global_scale": weights.global_scale}
    return qm.quantized_matmul(x, *weights.tensors, transpose, **options)


def bound(x: Tensor, matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """The rounding of the result and of float32 sums, as README states it for exact products."""
    terms = math.sqrt(x.shape[-1]) * x.norm(dim=-1).max() * matrix.norm(dim=-2).max()
    return 2 * torch.finfo(dtype).eps * (x @ matrix).abs().max() + 4 * torch.finfo(torch.float32).eps * terms


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return python("-c", f"import torch, quantization_mlx as qm\n{code}", env={**os.environ, **environment})


# --- Results ----------------------------------------------------------------------------------------------------------


@NEEDS_INT8
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("format", INT8_FORMATS, ids=name_of)
def test_products(format: Format, dtype: torch.dtype, int8: None) -> None:
    for N, groups in WEIGHTS:
        K = groups * format.group_size
        weights = oracle.random_quantized(format, N, K, dtype=dtype)
        all_rows = oracle.random_x(max(ROWS), K, dtype=dtype)
        expected = rounded(all_rows, format.group_size)
        for rows in ROWS:
            y = multiply(all_rows[:rows], weights)
            x, matrix = expected[:rows], weights.matrix(True)
            assert y.dtype == dtype
            oracle.assert_within(y, x @ matrix, bound(x, matrix, dtype), f"{format} {rows} x {K} x {N}")


@NEEDS_INT8
@pytest.mark.parametrize("rows", (1, 8))
@pytest.mark.parametrize("format", INT8_FORMATS, ids=name_of)
def test_error_is_that_of_rounding(format: Format, rows: int, int8: None) -> None:
    """Rounding to steps of max|x| / 127 has a variance of step^2 / 12, and the product passes it on."""
    weights = oracle.random_quantized(format, 512, 4096)
    x = oracle.random_x(rows, 4096)
    exact = x.double() @ weights.matrix(True)
    steps = x.double().reshape(rows, -1, format.group_size).abs().amax(-1) / 127
    theory = (steps.square().mean() / 12 / x.double().square().mean()).sqrt().item()
    error = ((multiply(x, weights).double() - exact).norm() / exact.norm()).item()
    assert 0.003 < theory < 0.008
    assert error == pytest.approx(theory, rel=0.2)


@NEEDS_INT8
@pytest.mark.parametrize("format", (FOUR_BIT, NVFP4), ids=name_of)
def test_gathered_products(format: Format, int8: None) -> None:
    experts, K, N = 4, 3 * format.group_size, 21
    weights = oracle.random_quantized(format, experts, N, K)
    x = oracle.random_x(9, 1, K)
    indices = torch.tensor([3, 0, 0, 2, 0, 0, 0, 0, 3])
    y = qm.gather_qmm(x, *weights.tensors, rhs_indices=indices, **format.options)
    matrices = weights.matrix(True)[indices]
    expected = rounded(x, format.group_size) @ matrices
    limits = [bound(row.double(), matrix, x.dtype) for row, matrix in zip(x, matrices, strict=True)]
    oracle.assert_within(y, expected, max(limits))


@NEEDS_INT8
def test_batches_and_global_scales(int8: None) -> None:
    w = oracle.random_x(2, 24, 64, seed=2)
    global_scale = w.abs().amax((1, 2))
    packed = [qm.quantize(each, mode="nvfp4", global_scale=scale) for each, scale in zip(w, global_scale, strict=True)]
    words, scales = (torch.stack(parts) for parts in zip(*packed, strict=True))
    x = oracle.random_x(3, 2, 5, 64)
    y = qm.gather_qmm(x, words, scales, rhs_indices=torch.arange(2), mode="nvfp4", global_scale=global_scale)
    matrix = oracle.dequantize(words, scales, None, NVFP4, global_scale).mT
    oracle.assert_within(y, rounded(x, 16) @ matrix, bound(x.double(), matrix, x.dtype))


@NEEDS_INT8
@pytest.mark.parametrize("rows", (2, 4, 9))
@pytest.mark.parametrize("format", (FOUR_BIT, Format("affine", 32, 3), FLOAT_FORMATS[0]), ids=name_of)
def test_rows_with_nan_and_infinity_are_nan(format: Format, rows: int, int8: None) -> None:
    weights = oracle.random_quantized(format, 20, 5 * format.group_size)
    x = oracle.random_x(rows, 5 * format.group_size)
    clean = multiply(x, weights)
    for bad in (math.nan, math.inf, -math.inf):
        for place in (0, x.shape[1] - 1):
            spoiled = x.clone()
            spoiled[1, place] = bad
            y = multiply(spoiled, weights)
            assert y[1].isnan().all()
            others = torch.arange(rows) != 1
            oracle.assert_identical(y[others], clean[others])


@NEEDS_INT8
@pytest.mark.parametrize("rows", (1, 6))
def test_zero_and_tiny_groups(rows: int, int8: None) -> None:
    weights = oracle.random_quantized(FOUR_BIT, 20, 256)
    x = oracle.random_x(rows, 256)
    x[:, 64:128] = 0
    x[:, 128:192] *= 1e-29  # far above 2^-100
    x[:, 192:] = 1e-42  # a subnormal number counts as zero
    expected = rounded(x, 64)
    matrix = weights.matrix(True)
    oracle.assert_within(multiply(x, weights), expected @ matrix, bound(expected, matrix, x.dtype))
    assert (multiply(torch.zeros(rows, 256), weights) == 0).all()
    small = x[:, 128:192].contiguous()
    weights = oracle.random_quantized(FOUR_BIT, 20, 64)
    expected, matrix = rounded(small, 64), weights.matrix(True)
    oracle.assert_within(multiply(small, weights), expected @ matrix, bound(expected, matrix, x.dtype))


@NEEDS_INT8
def test_the_same_bits_whatever_the_other_rows_are(int8: None) -> None:
    weights = oracle.random_quantized(FOUR_BIT, 100, 1088)
    x = oracle.random_x(40, 1088)
    together = multiply(x, weights)
    for rows in (5, 6, 7, 23):
        oracle.assert_identical(multiply(x[:rows], weights), together[:rows])


@NEEDS_INT8
@pytest.mark.parametrize("rows", (1, 8))
def test_what_int8_does_not_serve_stays_exact(rows: int) -> None:
    for format, transpose in ((MXFP8, True), (FOUR_BIT, False), (MXFP8, False)):
        weights = oracle.random_quantized(format, 128, 128)
        x = oracle.random_x(rows, 128)
        exact = multiply(x, weights, transpose)
        with qm.cpu_activations("int8"):
            oracle.assert_identical(multiply(x, weights, transpose), exact)


@NEEDS_INT8
@pytest.mark.parametrize("transpose", (True, False))
def test_gradients_are_exact(transpose: bool) -> None:
    weights = oracle.random_quantized(FOUR_BIT, 64, 64)
    indices = torch.tensor([0, 0, 0])
    gradient = oracle.random_x(3, 64, seed=3)

    def gradients() -> list[Tensor]:
        x = oracle.random_x(3, 64).requires_grad_()
        multiply(x, weights, transpose).backward(gradient)
        gathered = oracle.random_x(3, 1, 64).requires_grad_()
        operands = [tensor[None] for tensor in weights.tensors]
        y = qm.gather_qmm(gathered, *operands, None, indices, transpose, **FOUR_BIT.options)
        y.backward(gradient[:, None])
        return [x.grad, gathered.grad]

    exact = gradients()
    with qm.cpu_activations("int8"):
        for ours, expected in zip(gradients(), exact, strict=True):
            oracle.assert_identical(ours, expected)


# --- Switching --------------------------------------------------------------------------------------------------------


def test_exact_is_the_default() -> None:
    environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
    code = "import quantization_mlx as qm; print(qm.get_cpu_activations())"
    assert printed("-c", code, env=environment) == "exact\n"


@NEEDS_INT8
def test_switching_on_and_off() -> None:
    weights, x = oracle.random_quantized(FOUR_BIT, 64, 256), oracle.random_x(2, 256)
    exact = multiply(x, weights)
    qm.set_cpu_activations("int8")
    try:
        assert qm.get_cpu_activations() == "int8"
        assert oracle.mismatches(multiply(x, weights), exact).any()
    finally:
        qm.set_cpu_activations("exact")
    assert qm.get_cpu_activations() == "exact"
    oracle.assert_identical(multiply(x, weights), exact)
    with pytest.raises(KeyError), qm.cpu_activations("int8"):
        raise KeyError
    assert qm.get_cpu_activations() == "exact"


def test_an_unknown_name() -> None:
    with pytest.raises(ValueError, match='activations is "int4"; known are "exact" and "int8"'):
        qm.set_cpu_activations("int4")
    assert qm.get_cpu_activations() == "exact"
    result = run_python("qm.quantized_matmul(torch.ones(64), *qm.quantize(torch.ones(2, 64)))", **{VARIABLE: "int4"})
    assert f'ValueError: {VARIABLE} is "int4"; known are "exact" and "int8"' in result.stderr


@NEEDS_INT8
def test_the_environment_variable() -> None:
    code = "print(qm.get_cpu_activations()); qm.set_cpu_activations('exact'); print(qm.get_cpu_activations())"
    result = run_python(code, **{VARIABLE: "int8"})
    assert result.stdout.split() == ["int8", "exact"], result.stderr


def test_kernels_without_int8_raise() -> None:
    product = "qm.quantized_matmul(torch.ones(64), *qm.quantize(torch.ones(2, 64)))"
    wanted = 'is "int8", which needs AVX-512 with VNNI and VBMI; the kernels of this process are those for baseline.'
    result = run_python("qm.set_cpu_activations('int8')", QUANTIZATION_MLX_CPU="baseline")
    assert f"ValueError: activations {wanted}" in result.stderr
    result = run_python(product, QUANTIZATION_MLX_CPU="baseline", **{VARIABLE: "int8"})
    assert f"ValueError: {VARIABLE} {wanted}" in result.stderr


@NEEDS_INT8
def test_compiled_code_follows_the_switch() -> None:
    weights, x = oracle.random_quantized(FOUR_BIT, 64, 256), oracle.random_x(2, 256)
    compiled = torch.compile(lambda x: multiply(x, weights) + 1, fullgraph=True, backend="aot_eager")
    exact = compiled(x)
    oracle.assert_identical(exact, multiply(x, weights) + 1)
    with qm.cpu_activations("int8"):
        ours = compiled(x)
        oracle.assert_identical(ours, multiply(x, weights) + 1)
    assert oracle.mismatches(ours, exact).any()


@NEEDS_INT8
def test_layers_and_plans_follow_the_switch() -> None:
    layer = qm.QuantizedLinear.from_linear(torch.nn.Linear(128, 64, bias=False), group_size=64, bits=4)
    x = oracle.random_x(2, 128)
    with torch.no_grad(), qm.cpu_activations("int8"):
        expected = qm.quantized_matmul(x, layer.weight_packed, layer.scales, layer.biases, True, 64, 4)
        oracle.assert_identical(layer(x), expected)
        [plan] = qm.explain(layer, x)
        assert plan.activations == "int8"
        assert "int8" in str(plan)
        [plan] = qm.explain(qm.quantize, x)
        assert plan.activations is None
    [plan] = qm.explain(layer, x)
    assert plan.activations == "exact"
    assert "int8" not in str(plan)
