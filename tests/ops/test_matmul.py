"""quantized_matmul and the explicit products against float64 on the exactly dequantized weights."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import cases
import oracle
import quantization_mlx as qm
from cases import AFFINE_FORMATS, DTYPES, FLOAT_FORMATS, FORMATS, SOME_FORMATS
from oracle import Format, Quantized, name_of

pytestmark = pytest.mark.kernels_ci

ROWS = (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 16, 17, 31, 32, 33, 64, 100)
SOME_ROWS = (1, 2, 4, 7, 33)
# Rows of w (any number) and groups along a row: N and K / group_size with transpose, K and N / group_size without.
WEIGHTS = ((1, 1), (3, 3), (7, 5), (31, 1), (33, 3), (64, 8), (100, 5))
LARGE_WEIGHTS = ((9, 67), (259, 3))
# Which rows of x meet which weights. On "mps", where a software device checks every access: every kernel meets ragged
# shapes, and a few whole and long ones, each of them in one dtype; test_every_row_count has the rest.
PRODUCTS = {
    "cpu": {**dict.fromkeys(WEIGHTS, ROWS), **dict.fromkeys(LARGE_WEIGHTS, SOME_ROWS)},
    "mps": {(33, 3): (0, 1, 2, 3, 4, 5, 7, 9, 13, 17, 33), (64, 8): (1, 8, 33), (9, 67): (1, 4, 20), (1, 1): (1, 14)},
}
ONE_FORMAT_PER_WIDTH = tuple(format for format in AFFINE_FORMATS if format.group_size == 64) + FLOAT_FORMATS
TRANSPOSE = pytest.mark.parametrize("transpose", [True, False], ids=["transpose", "no-transpose"])
NVFP4 = FLOAT_FORMATS[2]


def multiply(x: Tensor, weights: Quantized, device: str, transpose: bool = True) -> Tensor:
    on = weights.to(device)
    return qm.quantized_matmul(x.to(device), *on.tensors, transpose, **on.format.options, global_scale=on.global_scale)


def assert_multiplies(
    x: Tensor, weights: Quantized, device: str, transpose: bool = True, dtype: torch.dtype | None = None
) -> None:
    """One product within the error bound; the bound of a batched w is taken over the whole batch."""
    matrix = weights.matrix(transpose)
    ours = multiply(x, weights, device, transpose)
    what = f"{weights.format} x {tuple(x.shape)} w {tuple(matrix.shape)} {name_of(x.dtype)} transpose={transpose}"
    assert ours.dtype == (dtype or x.dtype), what
    oracle.assert_within(ours, x.double() @ matrix, batched_bound(x, matrix, ours.dtype), what)


def batched_bound(x: Tensor, matrix: Tensor, dtype: torch.dtype) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    matrices = matrix.reshape(-1, *matrix.shape[-2:])
    bounds = [oracle.error_bound(rows, each, dtype) for each in matrices]
    return max(bounds, default=torch.zeros((), dtype=torch.float64))


# --- Every format, dtype, orientation and kind of shape ---------------------------------------------------------------


class Products:
    """All row counts of one pair of operands, with reference and torch's own error computed once."""

    def __init__(self, weights: Quantized, transpose: bool, dtype: torch.dtype) -> None:
        self.matrix = weights.matrix(transpose)
        self.x = oracle.random_x(max(ROWS), self.matrix.shape[0], dtype=dtype)
        self.reference = self.x.double() @ self.matrix
        self.torch_error = ((self.x @ self.matrix.to(dtype)).double() - self.reference).abs()

    def bound(self, rows: int) -> Tensor | float:
        """oracle.error_bound of the first rows."""
        if rows == 0:
            return 0.0
        x, reference = self.x[:rows].double(), self.reference[:rows]
        rounding = torch.finfo(self.x.dtype).eps * reference.abs().max()
        terms = math.sqrt(x.shape[1]) * x.norm(dim=1).max() * self.matrix.norm(dim=0).max()
        return 2 * self.torch_error[:rows].max() + 2 * rounding + 4 * torch.finfo(torch.float32).eps * terms


def assert_products(
    weights: Quantized, transpose: bool, dtype: torch.dtype, device: str, row_counts: Iterable[int]
) -> None:
    products = Products(weights, transpose, dtype)
    for rows in row_counts:
        ours = multiply(products.x[:rows], weights, device, transpose)
        assert ours.dtype == dtype
        what = f"{weights.format} M {rows}, [K, N] {tuple(products.matrix.shape)}"
        oracle.assert_within(ours, products.reference[:rows], products.bound(rows), what)


@TRANSPOSE
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("format", FORMATS, ids=name_of)
def test_product(device: str, format: Format, dtype: torch.dtype, transpose: bool, pytestconfig: pytest.Config) -> None:
    every = 1 if device == "cpu" or pytestconfig.option.exhaustive else len(DTYPES)
    for (rows_of_w, groups), row_counts in PRODUCTS[device].items():
        weights = oracle.random_quantized(format, rows_of_w, groups * format.group_size, dtype=dtype)
        assert_products(weights, transpose, dtype, device, row_counts[DTYPES.index(dtype) % every :: every])


@TRANSPOSE
@pytest.mark.parametrize("format", ONE_FORMAT_PER_WIDTH, ids=name_of)
def test_every_row_count(device: str, format: Format, transpose: bool) -> None:
    """One to forty rows, in which every kernel meets its fewest and its most."""
    weights = oracle.random_quantized(format, 33, 3 * format.group_size, dtype=torch.float16)
    assert_products(weights, transpose, torch.float16, device, range(1, 41))


@TRANSPOSE
@pytest.mark.parametrize("format", FORMATS, ids=name_of)
def test_product_agrees_with_mlx(device: str, format: Format, transpose: bool) -> None:
    for rows_of_w, groups in ((7, 5), (64, 3)):
        weights = oracle.random_quantized(format, rows_of_w, groups * format.group_size)
        matrix = weights.matrix(transpose)
        x = oracle.random_x(5, matrix.shape[0])
        theirs = oracle.mlx_quantized_matmul(x, weights, transpose).double()
        bound = 2 * oracle.error_bound(x, matrix, x.dtype)
        oracle.assert_within(multiply(x, weights, device, transpose), theirs, bound)


def test_product_defaults(device: str) -> None:
    for format in (Format("affine", 64, 4), *FLOAT_FORMATS):
        weights = oracle.random_quantized(format, 5, 128).to(device)
        x = oracle.random_x(3, 128).to(device)
        ours = qm.quantized_matmul(x, *weights.tensors, mode=format.mode)
        oracle.assert_identical(ours, multiply(x, weights, device), str(format))
    affine = oracle.random_quantized(Format("affine", 64, 4), 5, 128).to(device)
    x = oracle.random_x(3, 128).to(device)
    oracle.assert_identical(qm.quantized_matmul(x, *affine.tensors), multiply(x, affine, device))


# --- Shapes -----------------------------------------------------------------------------------------------------------

# Leading sizes of x (before K) and of w (before its two matrix sizes).
BATCHES = (
    *(
        ((), ()),
        ((4,), ()),
        ((2, 5), ()),
        ((2, 3, 4), ()),
        ((2, 1, 3, 2), ()),
        ((), (2,)),
        ((3,), (2,)),
        ((2, 3), (2,)),
    ),
    *(((1, 3), (4,)), ((4, 3), (1,)), ((2, 5, 3), (5,)), ((2, 1, 3), (2, 3)), ((3, 4), (2, 3)), ((2, 3, 1), (2, 1))),
    *(((2, 1, 17), (1, 3)), ((1, 1, 1), (1, 1))),
)
EMPTY = (
    *(((0,), ()), ((0, 5), ()), ((3, 0), ()), ((0, 3), (0,)), ((0, 3), (1,)), ((1, 3), (0,)), ((2, 0), (2,))),
    ((0, 1, 3), (2,)),
)


@TRANSPOSE
@pytest.mark.parametrize("format", SOME_FORMATS, ids=name_of)
@pytest.mark.parametrize("x_leading, w_leading", BATCHES + EMPTY, ids=str)
def test_batches_broadcast(
    device: str, format: Format, x_leading: tuple[int, ...], w_leading: tuple[int, ...], transpose: bool
) -> None:
    rows_of_w, columns = 9, 3 * format.group_size
    weights = oracle.random_quantized(format, *w_leading, rows_of_w, columns)
    x = oracle.random_x(*x_leading, columns if transpose else rows_of_w)
    assert_multiplies(x, weights, device, transpose)


@pytest.mark.parametrize("format", SOME_FORMATS, ids=name_of)
def test_no_output_features(device: str, format: Format) -> None:
    weights = oracle.random_quantized(format, 0, format.group_size).to(device)
    assert multiply(oracle.random_x(3, format.group_size), weights, device).shape == (3, 0)
    columns = oracle.random_quantized(format, 5, 0).to(device)
    assert multiply(oracle.random_x(3, 5), columns, device, transpose=False).shape == (3, 0)


# Shapes on which other implementations failed: (format, M, N, K, transpose).
FAILED_ELSEWHERE = {
    "wide-n-and-some-rows": (Format("affine", 64, 4), 17, 73448, 64, True),
    "edge-tile-k-1040": (Format("affine", 32, 4), 33, 160, 1040, False),
    "edge-tile-k-4112": (Format("affine", 64, 4), 5, 192, 4112, False),
    "edge-tile-nvfp4-k-1040": (NVFP4, 33, 50, 1040, True),
    "edge-tile-nvfp4-k-4112": (NVFP4, 7, 50, 4112, True),
    "nvfp4-long-k": (NVFP4, 1, 24, 16384, True),
    "nvfp4-long-k-without-transpose": (NVFP4, 1, 32, 16384, False),
    "mxfp4-narrow-n": (FLOAT_FORMATS[0], 1, 5, 512, True),
    "mxfp8-narrow-n": (FLOAT_FORMATS[1], 2, 7, 512, True),
    "nvfp4-narrow-n": (NVFP4, 3, 2, 512, True),
    "group-32-without-transpose": (Format("affine", 32, 4), 64, 96, 64, False),
    "6-bit-720-rows": (Format("affine", 64, 6), 720, 2048, 2048, True),
    "many-rows-without-transpose": (Format("affine", 64, 5), 1100, 192, 100, False),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("case", FAILED_ELSEWHERE)
def test_shapes_that_failed_elsewhere(device: str, case: str, dtype: torch.dtype) -> None:
    format, M, N, K, transpose = FAILED_ELSEWHERE[case]
    if device == "mps" and M * N * K > 10**9:  # fewer columns of tiles, which differ in nothing
        N = 200
    shape = (N, K) if transpose else (K, N)
    weights = oracle.random_quantized(format, *shape, dtype=dtype)
    assert_multiplies(oracle.random_x(M, K, dtype=dtype), weights, device, transpose)


# --- Strides and dtypes -----------------------------------------------------------------------------------------------


def views(tensor: Tensor) -> dict[str, Tensor]:
    """The same values behind other strides and offsets."""
    padded = torch.cat([tensor.reshape(-1)[:3], tensor.reshape(-1)])
    return {
        "transposed": tensor.mT.contiguous().mT,
        "sliced columns": torch.cat([tensor, tensor], -1)[..., : tensor.shape[-1]],
        "sliced rows": torch.cat([tensor, tensor], -2)[..., : tensor.shape[-2], :],
        "every second column": torch.stack([tensor, tensor], -1).flatten(-2)[..., ::2],
        "every second row": torch.stack([tensor, tensor], -2).flatten(-3, -2)[..., ::2, :],
        "offset": padded[3:].reshape(tensor.shape),
        "batch last": tensor.movedim(0, -1).contiguous().movedim(-1, 0),
    }


@TRANSPOSE
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("format", SOME_FORMATS, ids=name_of)
def test_any_strides(device: str, format: Format, dtype: torch.dtype, transpose: bool) -> None:
    weights = oracle.random_quantized(format, 3, 10, 2 * format.group_size, dtype=dtype).to(device)
    matrix_shape = weights.matrix(transpose).shape
    for rows in (1, 4, 33):
        x = oracle.random_x(3, rows, matrix_shape[-2], dtype=dtype).to(device)
        expected = multiply(x, weights, device, transpose)
        for name, view in views(x).items():
            oracle.assert_identical(multiply(view, weights, device, transpose), expected, f"x {name}")
        for field in ("w", "scales", "biases"):
            tensor = getattr(weights, field)
            if tensor is None:
                continue
            for name, view in views(tensor).items():
                strided = replace(weights, **{field: view})
                oracle.assert_identical(multiply(x, strided, device, transpose), expected, f"{field} {name}")


# What is taken of tensors [2, 3, rows, columns]: the gaps between their matrices have one size, or several.
MERGEABLE = {
    "all": lambda t: t,
    "sliced rows": lambda t: t[:, :, :7],
    "one matrix": lambda t: t[1:, 2:, :7],
    "one outer": lambda t: t[1:, :, :7],
    "every second inner": lambda t: t[:1, ::2, :7],
    "one inner": lambda t: t[:, 1:2, :7],
    "one for all": lambda t: t[:1, :1, :7].expand(2, 3, 7, -1),
    "three leading sizes": lambda t: t[:, None, :, :7],
}
SEPARATE = {
    "sliced inner": lambda t: t[:, :2, :7],
    "swapped": lambda t: t.transpose(0, 1),
    "one for each outer": lambda t: t[:, :1].expand(2, 3, -1, -1),
}


def multiply_all(x: Tensor, weights: Quantized, gathered: bool) -> Tensor:
    """x [M, K] with every matrix of the weights."""
    if not gathered:
        return qm.quantized_matmul(x, *weights.tensors, **weights.format.options)
    indices = torch.arange(weights.w[..., 0, 0].numel(), device=x.device)
    return qm.gather_qmm(x[None], *weights.tensors, torch.zeros_like(indices), indices, **weights.format.options)


@pytest.mark.parametrize("gathered", [False, True], ids=["matmul", "gather"])
@pytest.mark.parametrize("format", [SOME_FORMATS[0], NVFP4], ids=name_of)
def test_sliced_batches_are_not_copied(device: str, format: Format, gathered: bool) -> None:
    """Leading sizes merge wherever one stride leads through all matrices, as torch.Tensor.view finds out."""
    buffers = oracle.random_quantized(format, 2, 3, 10, 64)
    x = oracle.random_x(4, 64)
    for name, take in (MERGEABLE | SEPARATE).items():
        matrix = buffers.map(take).matrix(True)
        taken = buffers.to(device).map(take)
        on = x.to(device)
        multiply_all(on, taken, gathered)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            y = multiply_all(on, taken, gathered)
        reference = (x.double() @ matrix).reshape(y.shape)
        oracle.assert_within(y, reference, batched_bound(x, matrix, torch.float32), name)
        copied = "aten::clone" in {event.key for event in profile.key_averages()}
        assert copied == (name in SEPARATE), name


@TRANSPOSE
@pytest.mark.parametrize("format", SOME_FORMATS, ids=name_of)
def test_expanded_operands(device: str, format: Format, transpose: bool) -> None:
    one = oracle.random_quantized(format, 10, 2 * format.group_size).to(device)
    K = one.matrix(transpose).shape[-2]
    many = one.map(lambda tensor: tensor.expand(3, -1, -1))
    assert_multiplies(oracle.random_x(3, 2, K), many, device, transpose)
    assert_multiplies(oracle.random_x(1, K).expand(5, K), one, device, transpose)
    assert_multiplies(oracle.random_x(1, 1, 1).expand(3, 2, K), many, device, transpose)


@pytest.mark.parametrize("format", SOME_FORMATS, ids=name_of)
def test_constant_scales_by_expansion(device: str, format: Format) -> None:
    base = oracle.random_quantized(format, 6, 3 * format.group_size)
    biases = None if base.biases is None else base.biases[:1].expand(base.scales.shape)
    weights = replace(base, scales=base.scales[:1, :1].expand(base.scales.shape), biases=biases)
    assert_multiplies(oracle.random_x(4, 3 * format.group_size), weights, device)


@TRANSPOSE
@pytest.mark.parametrize("format", FORMATS, ids=name_of)
def test_signed_words(device: str, format: Format, transpose: bool) -> None:
    weights = oracle.random_quantized(format, 2 * format.group_size, 2 * format.group_size)
    signed = replace(weights, w=weights.w.view(torch.int32))
    x = oracle.random_x(3, 2 * format.group_size)
    oracle.assert_identical(multiply(x, signed, device, transpose), multiply(x, weights, device, transpose))


@TRANSPOSE
@pytest.mark.parametrize("x_dtype", DTYPES, ids=name_of)
def test_dtypes_promote(device: str, x_dtype: torch.dtype, transpose: bool) -> None:
    format = Format("affine", 64, 4)
    for scales_dtype in DTYPES:
        for biases_dtype in DTYPES:
            base = oracle.random_quantized(format, 64, 128)
            weights = Quantized(format, base.w, base.scales.to(scales_dtype), base.biases.to(biases_dtype))
            dtype = torch.promote_types(x_dtype, torch.promote_types(scales_dtype, biases_dtype))
            for rows in (1, 3, 40):
                x = oracle.random_x(rows, 128 if transpose else 64, dtype=x_dtype)
                assert_multiplies(x, weights, device, transpose, dtype)


@TRANSPOSE
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_global_scale(device: str, dtype: torch.dtype, transpose: bool) -> None:
    for shape in ((), (1,)):
        base = oracle.random_quantized(NVFP4, 48, 64)
        weights = Quantized(NVFP4, base.w, base.scales, None, torch.full(shape, 777.0))
        for rows in (1, 3, 40):
            x = oracle.random_x(rows, 64 if transpose else 48, dtype=dtype)
            assert_multiplies(x, weights, device, transpose)


# --- Numerical behaviour ----------------------------------------------------------------------------------------------


@TRANSPOSE
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("format", FORMATS, ids=name_of)
def test_nan_and_infinity_stay_in_their_row(device: str, format: Format, dtype: torch.dtype, transpose: bool) -> None:
    weights = oracle.random_quantized(format, 2 * format.group_size, 2 * format.group_size, dtype=dtype)
    matrix = weights.matrix(transpose)
    for rows in (1, 4, 40):
        clean = oracle.random_x(rows, matrix.shape[0], dtype=dtype)
        poisoned = clean.clone()
        poisoned[0, 5] = float("nan")
        if rows > 1:
            poisoned[2, 7] = float("inf")
            poisoned[3, format.group_size + 1] = float("-inf")
        ours = multiply(poisoned, weights, device, transpose)
        non_finite = ~torch.isfinite(poisoned.double() @ matrix)
        assert not torch.isfinite(ours.cpu()[non_finite]).any()
        assert torch.isnan(ours[0]).all()
        untouched = torch.isfinite(poisoned).all(1)
        expected = multiply(clean, weights, device, transpose)
        oracle.assert_identical(ours.cpu()[untouched], expected.cpu()[untouched], f"{format} M {rows}")


@TRANSPOSE
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("format", SOME_FORMATS, ids=name_of)
def test_a_row_does_not_depend_on_the_others(device: str, format: Format, dtype: torch.dtype, transpose: bool) -> None:
    weights = oracle.random_quantized(format, 2 * format.group_size, 2 * format.group_size, dtype=dtype)
    K = weights.matrix(transpose).shape[0]
    for rows in (2, 5, 16, 40):
        x = oracle.random_x(rows, K, dtype=dtype)
        other = oracle.random_x(rows, K, dtype=dtype, seed=2) * 100
        for kept in {0, rows // 2, rows - 1}:
            other[kept] = x[kept]
            ours = multiply(other, weights, device, transpose)[kept]
            oracle.assert_identical(ours, multiply(x, weights, device, transpose)[kept], f"row {kept} of {rows}")


@pytest.mark.parametrize("rows", [513, 1025])
def test_a_row_does_not_depend_on_how_many_there_are(rows: int) -> None:
    """On CPU, long batches are cut into parts; no part is short enough for another kernel."""
    weights = oracle.random_quantized(SOME_FORMATS[0], 32, 256, dtype=torch.bfloat16)
    x = oracle.random_x(rows, 256, dtype=torch.bfloat16)
    oracle.assert_identical(multiply(x, weights, "cpu")[-8:], multiply(x[-8:], weights, "cpu"))


@pytest.mark.parametrize("format", SOME_FORMATS, ids=name_of)
def test_repeated_calls_give_the_same_bits(device: str, format: Format) -> None:
    weights = oracle.random_quantized(format, 300, 4 * format.group_size)
    for rows in (1, 7, 64):
        x = oracle.random_x(rows, 4 * format.group_size)
        first = multiply(x, weights, device)
        for _ in range(3):
            oracle.assert_identical(multiply(x, weights, device), first)


@functools.cache
def _exact_weights(format: Format, rows: int, columns: int) -> Quantized:
    """Positive weights that every dtype represents exactly, so that only sums can round."""
    base = oracle.random_quantized(format, rows, columns, seed=3)
    if not format.is_affine:
        one = {"mxfp4": 127, "mxfp8": 127 - 6, "nvfp4": 0x38}[format.mode]
        return Quantized(format, base.w, torch.full_like(base.scales, one), None)
    # Codes below 128 and an offset of 16 of them fit bfloat16's eight bits.
    codes = oracle.unpack(base.w, format.bits) & 127
    scales, biases = torch.full(base.scales.shape, 2.0**-4), torch.ones(base.scales.shape)
    return Quantized(format, oracle.pack(codes, format.bits), scales, biases)


@TRANSPOSE
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("format", SOME_FORMATS, ids=name_of)
def test_long_sums_are_not_rounded_on_the_way(device: str, format: Format, dtype: torch.dtype, transpose: bool) -> None:
    """16384 positive inputs: a sum kept in half precision is off by far more than the one rounding of the result."""
    K, N = 16384, 128 if not transpose else 5
    exact = _exact_weights(format, *((N, K) if transpose else (K, N)))
    weights = exact.map(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)
    matrix = weights.matrix(transpose)
    assert torch.equal(matrix.to(dtype).double(), matrix)
    for rows in (1, 3, 32):
        x = (oracle.random_x(rows, K).abs() / 16 + 0.25).to(dtype)
        reference = x.double() @ matrix
        terms = math.sqrt(K) * x.double().norm(dim=1).max() * matrix.norm(dim=0).max()
        bound = torch.finfo(dtype).eps * reference.abs().max() + 4 * torch.finfo(torch.float32).eps * terms
        oracle.assert_within(multiply(x, weights, device, transpose), reference, bound, f"M {rows}")


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_large_and_small_values_keep_their_range(device: str, dtype: torch.dtype) -> None:
    """Products near the top of half precision and subnormal inputs: no intermediate may overflow or flush."""
    format = Format("affine", 64, 8)
    base = oracle.random_quantized(format, 7, 128)
    weights = Quantized(format, base.w, base.scales.to(dtype), base.biases.to(dtype))
    for rows in (1, 8, 40):
        x = oracle.random_x(rows, 128)
        for factor in (500.0, 2.0**-20):
            assert_multiplies((x * factor).to(dtype), weights, device)
    # Offsets and codes that cancel: 255 * 200 - 25500 overflows float16 on the way only.
    if dtype == torch.float16:
        wide = Quantized(format, base.w, torch.full((7, 2), 200.0).to(dtype), torch.full((7, 2), -25500.0).to(dtype))
        assert_multiplies((oracle.random_x(3, 128) * 0.01).to(dtype), wide, device)


@functools.cache
def _nan_weights() -> list[Quantized]:
    result = []
    for format, nan in ((Format("affine", 64, 4), float("nan")), (NVFP4, 0x7F)):
        base = oracle.random_quantized(format, 16, 65 * format.group_size)
        result.append(Quantized(format, base.w, torch.full_like(base.scales, nan), base.biases))
    return result


def _leave_nan_in_freed_memory(device: str) -> None:
    """Products with nothing but NaN in every scale, so that stack and heap hold NaN when the next call comes."""
    for weights in _nan_weights():
        for rows in (1, 3, 7):
            for transpose, K in ((True, 65 * weights.format.group_size), (False, 16)):
                assert torch.isnan(multiply(torch.ones(rows, K), weights, device, transpose)).all()
    for exponent in range(6, 18):
        torch.full((2**exponent,), float("nan"), device=device)


@TRANSPOSE
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("format", FORMATS, ids=name_of)
def test_nothing_uninitialised_is_read(device: str, format: Format, dtype: torch.dtype, transpose: bool) -> None:
    """Padding of ragged rows and columns must not multiply what an earlier call left behind: 0 * NaN is NaN."""
    for rows_of_w, groups in ((1, 1), (5, 3)):
        weights = oracle.random_quantized(format, rows_of_w, groups * format.group_size, dtype=dtype)
        for rows in (1, 7):
            x = oracle.random_x(rows, weights.matrix(transpose).shape[0], dtype=dtype)
            _leave_nan_in_freed_memory(device)
            assert_multiplies(x, weights, device, transpose)


@TRANSPOSE
@pytest.mark.parametrize("format", FLOAT_FORMATS, ids=name_of)
def test_every_scale_byte(device: str, format: Format, transpose: bool) -> None:
    """Subnormal, largest and, in E4M3, negative scales; x brings the product back into range."""
    bytes_ = [*range(127), *range(128, 255)] if format.mode == "nvfp4" else [0, 1, 2, 20, 100, 127, 200, 245]
    base = oracle.random_quantized(format, 2 * format.group_size, 2 * format.group_size)
    for byte in bytes_:
        weights = Quantized(format, base.w, torch.full_like(base.scales, byte), None)
        power = 0 if format.mode == "nvfp4" else max(-100, min(100, 127 - byte))
        for rows in (1, 3, 9):
            x = oracle.random_x(rows, 2 * format.group_size) * 2.0**power
            assert_multiplies(x, weights, device, transpose)


@TRANSPOSE
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_tiny_scales(device: str, dtype: torch.dtype, transpose: bool) -> None:
    """Scales and biases that are subnormal in float16, as eight-bit groups of small weights have."""
    for format in FORMATS[:18:4]:
        base = oracle.random_quantized(format, format.group_size, 3 * format.group_size)
        weights = Quantized(format, base.w, (base.scales * 2.0**-16).to(dtype), (base.biases * 2.0**-16).to(dtype))
        for rows in (1, 3, 9):
            x = (oracle.random_x(rows, weights.matrix(transpose).shape[0]) * 2.0**11).to(dtype)
            assert_multiplies(x, weights, device, transpose)


# --- Weights beyond the range of float16 ------------------------------------------------------------------------------

LARGE_FORMATS = (
    Format("affine", 64, 4),
    Format("affine", 32, 2),
    Format("affine", 128, 3),
    Format("affine", 32, 8),
    *FLOAT_FORMATS,
    *(Format(mode, 32, bits) for mode, bits in cases.MARLIN_BITS.items()),
    Format("marlin_fp8", 128, 8),
)
# Around where "mps" goes from matvecs to tiles, and to larger tiles.
LARGE_ROWS = (1, 8, 9, 12, 13, 16, 17, 32, 33, 64)


@pytest.mark.parametrize("format", LARGE_FORMATS, ids=name_of)
def test_weights_beyond_float16(device: str, format: Format) -> None:
    """Float16 rows meet weights that float16 has no room for: right in every kernel, whatever the number of rows, and
    columns of usual weights beside them lose nothing."""
    packed_columns = format.is_column_packed
    for transpose in (False,) if packed_columns else (True, False):
        shape = (2 * max(format.group_size, 64), 70) if packed_columns else (70, 2 * format.group_size)
        weights = oracle.random_large(format, *shape)
        matrix = weights.matrix(transpose)
        assert format == NVFP4 or matrix.abs().max() > 70000
        x = oracle.small_x(matrix, max(LARGE_ROWS), matrix.shape[0])
        for rows in LARGE_ROWS if packed_columns or format in LARGE_FORMATS[:1] + FLOAT_FORMATS[:1] else (8, 16, 64):
            y = multiply(x[:rows], weights, device, transpose)
            oracle.assert_float16_terms(y, x[:rows], matrix, f"{format} {rows} rows, transpose={transpose}")


def test_weights_beyond_float16_in_parts_of_k(device: str) -> None:
    """Parts of a product that is cut along K have ranges of their own."""
    for format in (Format("mxfp4", 32, 4), Format("marlin_fp4", 32, 4)):
        packed_columns = format.is_column_packed
        weights = oracle.random_large(format, *((1088, 9) if packed_columns else (9, 1088)))
        if not packed_columns:
            weights.scales[:, :16] -= 12  # of the first part alone, they are in range
        matrix = weights.matrix(not packed_columns)
        x = oracle.small_x(matrix, 2, 20, 1088)
        oracle.assert_float16_terms(multiply(x, weights, device, not packed_columns), x, matrix, str(format))


def test_weights_beyond_float16_and_a_global_scale(device: str) -> None:
    weights = oracle.random_quantized(NVFP4, 70, 128)
    weights = Quantized(NVFP4, weights.w, weights.scales, None, torch.tensor(2688 * 50000.0))
    for transpose in (True, False):
        matrix = weights.matrix(transpose)
        assert matrix.abs().max() > 70000
        x = oracle.small_x(matrix, 33, matrix.shape[0])
        for rows in (8, 16, 33):
            oracle.assert_float16_terms(multiply(x[:rows], weights, device, transpose), x[:rows], matrix)


def test_infinite_weights_stay_in_their_column(device: str) -> None:
    """E8M0's last scale is infinity, and what is finite beside it stays so."""
    weights = oracle.random_large(Format("mxfp4", 32, 4), 70, 128)
    matrix = weights.matrix(True)
    weights.scales[4, 1] = 255
    x = oracle.small_x(matrix, 64, 128)
    others = [n for n in range(70) if n != 4]
    for rows in (8, 16, 64):
        y = multiply(x[:rows], weights, device)
        assert not y[:, 4].isfinite().any()
        oracle.assert_float16_terms(y[:, others], x[:rows], matrix[:, others], f"{rows} rows")


@pytest.mark.parametrize("format", (*LARGE_FORMATS[:1], *FLOAT_FORMATS[:1], Format("marlin_fp8", 32, 8)), ids=name_of)
def test_gradients_through_weights_beyond_float16(device: str, format: Format) -> None:
    packed_columns = format.is_column_packed
    weights = oracle.random_large(format, *((128, 70) if packed_columns else (128, 128)))
    matrix = weights.matrix(not packed_columns)
    x = oracle.small_x(matrix, 20, 128).to(device).requires_grad_()
    y = multiply(x, weights, device, not packed_columns)
    upstream = oracle.small_x(matrix.mT, *y.shape, seed=3)
    (gradient,) = torch.autograd.grad(y, x, upstream.to(device))
    oracle.assert_float16_terms(gradient, upstream, matrix.mT, str(format))


# --- The explicit ops -------------------------------------------------------------------------------------------------

AFFINE_T = ("affine_qmv", "affine_qmm_t", "affine_qmm_t_nax")
AFFINE_N = ("affine_qmm_n", "affine_qmm_n_nax")
TAKES_OUTPUT_FEATURES = ("qmv", "qmm_n", "qmm_n_nax")
EXPLICIT = [(name, format) for format in FORMATS[2::3][:6] + FORMATS[:1] + FORMATS[7:8] for name in AFFINE_T + AFFINE_N]
EXPLICIT += [(f"{f.mode}_{kind}", f) for f in FLOAT_FORMATS for kind in ("qmv", "qmm_t", "qmm_n")]


def explicit(name: str, x: Tensor, weights: Quantized, device: str) -> Tensor:
    """The op called with its published argument order."""
    on = weights.to(device)
    arguments: list[Any] = [x.to(device), *(tensor for tensor in on.tensors if tensor is not None)]
    if name.split("_", 1)[1] in TAKES_OUTPUT_FEATURES:
        arguments.append(weights.matrix(transposes(name)).shape[-1])
    if weights.format.is_affine:
        arguments += [weights.format.group_size, weights.format.bits]
    return getattr(qm, name)(*arguments)


def transposes(name: str) -> bool:
    return "_n" not in name.removesuffix("_nax")


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("name, format", EXPLICIT, ids=str)
def test_explicit_op(device: str, name: str, format: Format, dtype: torch.dtype) -> None:
    """Every batch element is right, also behind strides; kernels published under these names serve the first alone."""
    rows_of_w, columns = 33, 3 * format.group_size
    weights = oracle.random_quantized(format, rows_of_w, columns, dtype=dtype)
    matrix = weights.matrix(transposes(name))
    leading = [(1,), (5,), (3, 5), (1, 32), (2, 3, 4), (33,), (0,), (3, 0)]
    if name.endswith("qmv"):
        leading.append(())
    for shape in leading:
        x = oracle.random_x(*shape, matrix.shape[0], dtype=dtype)
        oracle.assert_product(explicit(name, x, weights, device), x, matrix, dtype, f"{name} {shape}")
    x = oracle.random_x(4, 3, matrix.shape[0], dtype=dtype)
    for view in (x.transpose(0, 1), x[::2], x[:, 1:], x.mT.contiguous().mT, x[:, :1].expand(4, 6, -1)):
        oracle.assert_product(explicit(name, view, weights, device), view, matrix, dtype, f"{name} strided")


def test_explicit_defaults(device: str) -> None:
    format = Format("affine", 128, 4)
    square = oracle.random_quantized(format, 128, 128)
    w, scales, biases = square.to(device).tensors
    x = oracle.random_x(2, 3, 128).to(device)
    oracle.assert_product(qm.affine_qmm_t(x, w, scales, biases), x, square.matrix(True), torch.float32)
    oracle.assert_product(qm.affine_qmv(x, w, scales, biases, 128), x, square.matrix(True), torch.float32)
    oracle.assert_product(qm.affine_qmm_n(x, w, scales, biases, 128), x, square.matrix(False), torch.float32)


def test_usage_example_of_the_published_kernel(device: str) -> None:
    # Affine 4-bit quantized matmul (transposed weight)
    x = torch.randn(1, 32, 4096, dtype=torch.float16, device=device)
    w = torch.randint(0, 255, (4096, 512), dtype=torch.int32, device=device)  # [N, K_packed]
    scales = torch.randn(4096, 4096 // 128, dtype=torch.float16, device=device)
    biases = torch.zeros(4096, 4096 // 128, dtype=torch.float16, device=device)

    y = qm.affine_qmm_t(x, w, scales, biases, group_size=128, bits=4)
    assert y.shape == (1, 32, 4096)
    weights = Quantized(Format("affine", 128, 4), w, scales, biases)
    oracle.assert_product(y, x, weights.matrix(True), torch.float16)
