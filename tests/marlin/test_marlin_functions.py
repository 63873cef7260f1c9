"""Marlin's packers and products against numpy and float64, and the examples of its documentation."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import oracle
import quantization_mlx as qm
from cases import DTYPES
from oracle import name_of
from packed_columns import BITS, DIVISORS, Packed, element_values, exact, group_sizes_of, random_packed, reference
from process import printed
from quantization_mlx import marlin
from quantization_mlx.marlin import MetalKernelLibrary, get_default_library, marlin_gemm_fp4, marlin_gemm_int4
from quantization_mlx.marlin.arrays import is_mlx_array, to_mlx, to_torch

KIND = pytest.mark.parametrize("kind", BITS)
GROUP_SIZE = pytest.mark.parametrize("group_size", [32, 64, 128])
DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
# What is multiplied: numbers of columns, and shapes of activations.
COLUMNS = {"cpu": (1, 33, 128), "mps": (33,)}
SHAPES = {
    "cpu": ((1, 256), (2, 256), (5, 256), (33, 256), (256,), (2, 3, 256), (0, 256)),
    "mps": ((256,), (2, 3, 256), (17, 256)),
}


def packer(kind: str) -> Callable[..., tuple[Tensor, ...]]:
    return getattr(marlin, f"pack_{kind}_weights")


# --- Packing ----------------------------------------------------------------------------------------------------------


def _randn(K: int, N: int) -> Tensor:
    return torch.randn(K, N, generator=oracle.generator(0))


def _orders_of_magnitude(K: int, N: int) -> Tensor:
    powers = torch.rand(N, generator=oracle.generator(1)) * 40 - 30
    return _randn(K, N).clamp(-3, 3) * torch.exp2(powers)


def _halfway(K: int, N: int) -> Tensor:
    """Points between two codes of some format, with the largest codes in place and power-of-two scales."""
    points = torch.tensor([0.25, 0.5, 0.75, 1, 1.25, 1.75, 2.5, 3.5, 4.5, 5, 0.2500001, 4.9999995, 5.5, 0.0009765625])
    chosen = points[torch.randint(0, len(points), (K, N), generator=oracle.generator(2))]
    signs = torch.randint(0, 2, (K, N), generator=oracle.generator(3)) * 2 - 1
    columns = torch.tensor([6.0, 448.0, 1.5, 7.0, 15.0]).repeat(N)[:N]
    chosen[::32] = columns
    return torch.where(chosen == columns, chosen, chosen * signs) * 2.0 ** (torch.arange(N) % 5 - 2)


def _outlier(K: int, N: int) -> Tensor:
    weights = _randn(K, N) * 1e-3
    weights[5::32] = 3.0
    return weights


WEIGHTS: dict[str, Callable[[int, int], Tensor]] = {
    "normal": lambda K, N: _randn(K, N) * 0.05,
    "orders of magnitude": _orders_of_magnitude,
    "halfway": _halfway,
    "outlier": _outlier,
    "positive": lambda K, N: _randn(K, N).abs() + 0.5,
    "negative": lambda K, N: -_randn(K, N).abs() - 0.01,
    "nearly constant": lambda K, N: 2.5 + 1e-3 * _randn(K, N),
    "small and constant": lambda K, N: torch.full((K, N), 3e-4) + 1e-8 * _randn(K, N),
    "constant": lambda K, N: torch.full((K, N), -1.3),
    "zero": lambda K, N: torch.zeros(K, N),
    "negative zero": lambda K, N: -torch.zeros(K, N),
    "large": lambda K, N: _randn(K, N).clamp(-4, 4) * 1e4,
    "beyond float16": lambda K, N: _randn(K, N).clamp(-4, 4) * 1e37,
    "below float16": lambda K, N: _randn(K, N) * 1e-30,
}


@KIND
@DTYPE
def test_packers_follow_the_formulas(kind: str, dtype: torch.dtype, device: str) -> None:
    """Words, scales and zeros bit for bit; each kind of weights in columns of its own."""
    limit, N = torch.finfo(dtype).max, 7
    weights = torch.cat([make(256, N) for make in WEIGHTS.values()], 1).clamp(-limit, limit).to(dtype)
    for group_size in group_sizes_of(device, f"marlin_{kind}", dtype):
        packed = packer(kind)(weights.to(device), group_size=group_size)
        assert isinstance(packed, tuple)
        for ours, theirs in zip(packed, reference(kind, weights, group_size).tensors, strict=True):
            for what, one, other in zip(WEIGHTS, ours.cpu().split(N, 1), theirs.split(N, 1), strict=True):
                oracle.assert_identical(one, other, f"{kind}, {what} weights, groups of {group_size}")


def test_int4_keeps_values_far_from_zero(device: str) -> None:
    """Each column is one value, of either sign: the error is half a step of 1 / 2047 of it, or of the least scale."""
    values = torch.logspace(-8, 7, 301).repeat_interleave(2) * torch.tensor([1, -1]).repeat(301)
    packed = marlin.pack_int4_weights(values.expand(128, -1).to(device))
    decoded = exact("int4", Packed(*packed), 128)
    step = (values.abs() / 2047).clamp_min(1e-7).double()
    # A float16 is off by half a unit of its last place, or of the subnormal ones.
    oracle.assert_within(decoded, values.double().expand(128, -1), 0.5 * step * (1 + 2**-10) + 2**-25)


@KIND
def test_layout_of_words(kind: str) -> None:
    """By hand: one column counts up through its codes, the other has a single element that is not zero."""
    weights = torch.zeros(32, 2)
    weights[:, 0] = torch.linspace(-1, 1, 32)
    weights[9, 1] = 1
    words, *_ = packer(kind)(weights, group_size=32)
    bits = BITS[kind]
    assert words.shape == (bits, 2) and words.dtype == torch.uint32
    word, position = divmod(9, 32 // bits)
    columns = words.view(torch.int32).long() & 0xFFFFFFFF
    nonzero = (columns[word, 1].item() >> (bits * position)) & (2**bits - 1)
    zero = columns[word, 1].item() & (2**bits - 1)
    assert (zero, nonzero) == {
        "fp4": (0, 0b0111),  # 6
        "fp8": (0, 0x7E),  # 448
        "int2": (2, 3),
        "int4": (0, 15),
        "int4_sym": (8, 15),
    }[kind]
    codes = oracle.unpack(words.mT, bits)[0]
    values = element_values(kind, codes)
    assert values[0] < 0 or kind == "int4"
    assert (np.diff(values) >= 0).all() and values[-1] > values[0]


@KIND
def test_packers_take_any_number_of_columns_and_any_strides(kind: str, device: str) -> None:
    for shape in ((128, 1), (256, 100), (384, 64)) if device == "cpu" else ((256, 5),):
        weights = torch.randn(shape, generator=oracle.generator(4))
        default = packer(kind)(weights.to(device))
        strided = packer(kind)(weights.T.contiguous().to(device).T, 128)
        for ours, other, theirs in zip(default, strided, reference(kind, weights, 128).tensors, strict=True):
            oracle.assert_identical(ours, theirs, f"{kind} {shape}")
            oracle.assert_identical(other, theirs, f"{kind} {shape}, by columns")


def test_packers_take_other_float_dtypes() -> None:
    weights = torch.randn(128, 3, generator=oracle.generator(5), dtype=torch.float64)
    small = weights.to(torch.float8_e4m3fn)
    for kind in BITS:
        for given in (weights, small, torch.nn.Parameter(weights)):
            for ours, theirs in zip(packer(kind)(given), reference(kind, given, 128).tensors, strict=True):
                oracle.assert_identical(ours, theirs)
                assert not ours.requires_grad


@KIND
@pytest.mark.parametrize(
    "weights, group_size, error, message",
    [
        (torch.zeros(128), 128, ValueError, "weights has shape [128]; it must have 2 dimensions"),
        (torch.zeros(2, 128, 4), 128, ValueError, "weights has shape [2, 128, 4]"),
        (torch.zeros(130, 4), 128, ValueError, "number of rows of weights, is 130, which does not divide into groups"),
        (torch.zeros(128, 4), 48, ValueError, "group_size is 48; supported are 128, 64, 32"),
        (torch.full((128, 4), math.inf), 128, ValueError, "infinities or NaN"),
        (torch.full((128, 4), math.nan), 128, ValueError, "infinities or NaN"),
        (torch.full((128, 4), 1e300, dtype=torch.float64), 128, ValueError, "infinities or NaN"),
        (torch.zeros(128, 4, dtype=torch.int32), 128, TypeError, "weights has dtype torch.int32"),
        (np.zeros((128, 4)), 128, TypeError, "weights is of type ndarray; it must be a tensor"),
    ],
    ids=lambda value: None if isinstance(value, (Tensor, np.ndarray)) else str(value),
)
def test_packers_refuse(kind: str, weights: Any, group_size: int, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)) as caught:
        packer(kind)(weights, group_size)
    assert str(caught.value).startswith(f"[pack_{kind}_weights] ")


# --- Quality ----------------------------------------------------------------------------------------------------------


def _density(t: np.ndarray) -> np.ndarray:
    return np.exp(-(t**2) / 2) / math.sqrt(2 * math.pi)


_erf = np.vectorize(math.erf)


def theoretical_error(kind: str, group_size: int) -> float:
    """The relative RMS error of standard normal weights, from the format and the distribution of a group's extremes.

    Symmetric formats: given a group's largest magnitude m, which has no error, the other values are normal, cut off at
    m, and go to the nearest level; m has the density of the largest of group_size magnitudes. With zero points, errors
    are uniform in a step of range / 15.
    """
    t = np.linspace(0.0, 8.0, 16001)[1:]
    if kind == "int4":
        # E[range^2] = 2 * integral over u < v of P(min < u and max > v), by the known joint distribution.
        grid = np.linspace(-6.0, 6.0, 1201)
        cdf = 0.5 * (1 + _erf(grid / math.sqrt(2)))
        u, v = cdf[:, None], cdf[None, :]
        outside = 1 - (1 - u) ** group_size - v**group_size + np.clip(v - u, 0, 1) ** group_size
        step = grid[1] - grid[0]
        squared = 2 * np.triu(outside, 1).sum() * step**2
        return math.sqrt(squared / 15**2 / 12)
    inside = _erf(t / math.sqrt(2))
    density = group_size * 2 * _density(t) * inside ** (group_size - 1)
    maxima = np.linspace(1.0, 6.0, 101)
    codes = np.arange(1 << BITS[kind])
    levels = np.unique(element_values(kind, codes)[np.isfinite(element_values(kind, codes))])
    top = DIVISORS[kind]
    errors = []
    for m in maxima:
        w = t[t <= m]
        scaled = levels * m / top
        nearest = scaled[np.searchsorted((scaled[1:] + scaled[:-1]) / 2, w)]
        errors.append(((w - nearest) ** 2 * 2 * _density(w)).sum() * (t[1] - t[0]) / math.erf(m / math.sqrt(2)))
    weights = np.interp(maxima, t, density)
    return math.sqrt((group_size - 1) / group_size * np.average(errors, weights=weights))


@KIND
@GROUP_SIZE
def test_error_of_normal_weights_is_that_of_the_format(kind: str, group_size: int) -> None:
    weights = torch.randn(1024, 1024, generator=oracle.generator(6)) * 0.02
    packed = packer(kind)(weights, group_size)
    decoded = qm.dequantize(
        *packed, group_size=group_size, bits=BITS[kind], mode=f"marlin_{kind}", dtype=torch.float32
    ).double()
    relative = ((decoded - weights).norm() / weights.norm()).item()
    correlation = torch.corrcoef(torch.stack([decoded.flatten(), weights.double().flatten()]))[0, 1].item()
    theory = theoretical_error(kind, group_size)
    print(f"{kind} group_size {group_size}: error {relative:.4f}, theory {theory:.4f}, correlation {correlation:.5f}")
    assert relative == pytest.approx(theory, rel=0.01)
    assert correlation > 1 - relative**2
    if (kind, group_size) == ("fp4", 128):
        assert relative == pytest.approx(0.11, abs=0.005)


# --- Dequantization and products --------------------------------------------------------------------------------------


@KIND
@DTYPE
def test_dequantize_gives_the_exact_values_rounded_once(kind: str, dtype: torch.dtype, device: str) -> None:
    for group_size in group_sizes_of(device, f"marlin_{kind}", dtype):
        packed = random_packed(kind, 256, 21, group_size)
        values = exact(kind, packed, group_size)
        options = {"group_size": group_size, "bits": BITS[kind], "mode": f"marlin_{kind}"}
        ours = qm.dequantize(*packed.to(device), **options, dtype=dtype)
        oracle.assert_identical(ours, values.to(dtype), f"{kind}, groups of {group_size}")
        if dtype == torch.float16:
            oracle.assert_identical(qm.dequantize(*packed.to(device), **options), ours)


def test_dispatch_dequant_fp4(device: str) -> None:
    lib = get_default_library()
    for group_size in group_sizes_of(device, "marlin_fp4", torch.float16):
        packed = random_packed("fp4", 256, 21, group_size)
        words, scales, _ = packed.to(device)
        ours = marlin.dispatch_dequant_fp4(lib, words, scales, 256, 21, group_size)
        oracle.assert_identical(ours, exact("fp4", packed, group_size).half())
        signed = marlin.dispatch_dequant_fp4(lib, words.view(torch.int32), scales, 256, 21, group_size)
        oracle.assert_identical(signed, ours)


def product(kind: str, x: Tensor, packed: Packed, group_size: int) -> Tensor:
    """By the function that is documented for this format; int4_sym has none but the op."""
    *leading, K = x.shape
    N = packed.words.shape[1]
    if kind == "int4":
        return marlin_gemm_int4(x, *packed.tensors, group_size=group_size)
    if kind == "fp4" and len(leading) != 1:
        return marlin_gemm_fp4(x, *packed.tensors, group_size=group_size)
    if kind == "int4_sym":
        return qm.quantized_matmul(x, *packed, False, group_size, 4, "marlin_int4_sym")
    function = getattr(marlin, f"dispatch_gemm_{kind}")
    rows = x.reshape(-1, K)
    return function(get_default_library(), rows, *packed.tensors, len(rows), N, K, group_size).view(*leading, N)


@KIND
@DTYPE
def test_products(kind: str, dtype: torch.dtype, device: str) -> None:
    for group_size in group_sizes_of(device, f"marlin_{kind}", dtype):
        for N in COLUMNS[device]:
            packed = random_packed(kind, 256, N, group_size)
            matrix = exact(kind, packed, group_size)
            for shape in SHAPES[device]:
                x = oracle.random_x(*shape, dtype=dtype)
                y = product(kind, x.to(device), packed.to(device), group_size)
                oracle.assert_product(y, x, matrix, dtype, f"{kind}, groups of {group_size}, x {shape}, N {N}")


def test_products_with_what_was_packed(device: str) -> None:
    """Defaults meet: pack_fp4_weights and marlin_gemm_fp4 take groups of 128, the dispatch functions their own."""
    weights, x = oracle.random_x(256, 40, seed=3), oracle.random_x(5, 256, dtype=torch.float16)
    matrix = exact("fp4", reference("fp4", weights, 128), 128)
    packed = marlin.pack_fp4_weights(weights.to(device))
    oracle.assert_product(marlin_gemm_fp4(x.to(device), *packed), x, matrix, torch.float16)
    fine = marlin.pack_fp4_weights(weights.to(device), 32)
    y = marlin.dispatch_gemm_fp4(get_default_library(), x.to(device), *fine, 5, 40, 256)
    oracle.assert_product(y, x, exact("fp4", reference("fp4", weights, 32), 32), torch.float16)
    dense = qm.dequantize(*fine, None, 32, 4, "marlin_fp4")
    assert torch.equal(marlin.dispatch_dequant_fp4(get_default_library(), *fine, 256, 40), dense)


def test_products_have_a_gradient_for_the_activations(device: str) -> None:
    packed = random_packed("int4", 256, 40, 128)
    x = oracle.random_x(5, 256).to(device).requires_grad_()
    upstream = oracle.random_x(5, 40, seed=2)
    marlin_gemm_int4(x, *packed.to(device).tensors).backward(upstream.to(device))
    oracle.assert_product(x.grad, upstream, exact("int4", packed, 128).T, torch.float32)


def test_products_compile_to_one_graph(device: str) -> None:
    packed = random_packed("fp4", 256, 40, 128).to(device)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: marlin_gemm_fp4(x, *packed.tensors).relu(), backend="aot_eager", fullgraph=True, dynamic=True
    )
    for rows in (2, 7):
        x = oracle.random_x(rows, 256).to(device)
        oracle.assert_identical(compiled(x), marlin_gemm_fp4(x, *packed.tensors).relu())


# --- Wrong arguments --------------------------------------------------------------------------------------------------


def _half(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float16)


def _words(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.uint32)


def _gemm(A: Any = None, B_packed: Any = None, scales: Any = None, group_size: int = 128) -> Tensor:
    A = _half(3, 256) if A is None else A
    return marlin_gemm_fp4(
        A, _words(32, 8) if B_packed is None else B_packed, _half(2, 8) if scales is None else scales, group_size
    )


def _dispatch(name: str = "fp4", lib: Any = None, A: Any = None, M: int = 3, N: int = 8, K: int = 256) -> Tensor:
    words = _words(256 * BITS[name] // 32, 8)
    function = getattr(marlin, f"dispatch_gemm_{name}")
    A = _half(3, 256) if A is None else A
    return function(lib or get_default_library(), A, words, _half(2, 8), M, N, K, group_size=128)


def _dequant(packed: Any = None, scales: Any = None, K: int = 256, N: int = 8, group_size: int = 32) -> Tensor:
    packed = _words(32, 8) if packed is None else packed
    scales = _half(8, 8) if scales is None else scales
    return marlin.dispatch_dequant_fp4(get_default_library(), packed, scales, K, N, group_size)


def _benchmark(**options: int) -> dict[str, float]:
    return marlin.benchmark_dequant_fp4(get_default_library(), **{"num_packed": 64, "benchmark_iters": 1} | options)


VALUE_ERRORS: dict[str, tuple[Callable[[], Any], str]] = {
    "K of A": (
        lambda: _gemm(A=_half(3, 128)),
        "[marlin_gemm_fp4] B_packed has shape [32, 8]; with K = 128, N = 8 and group_size = 128 it must be [16, 8]",
    ),
    "groups": (
        lambda: _gemm(scales=_half(8, 8)),
        "[marlin_gemm_fp4] scales has shape [8, 8]; with K = 256, N = 8 and group_size = 128 it must be [2, 8]",
    ),
    "ragged K": (
        lambda: _gemm(A=_half(3, 200)),
        "[marlin_gemm_fp4] K is 200, which does not divide into groups of 128",
    ),
    "group_size": (lambda: _gemm(group_size=16), "[marlin_gemm_fp4] group_size is 16; supported are"),
    "A without dimensions": (lambda: _gemm(A=_half()), "[marlin_gemm_fp4] A has no dimensions"),
    "batched words": (lambda: _gemm(B_packed=_words(2, 32, 8)), "[marlin_gemm_fp4] B_packed has shape"),
    "K of 0": (
        lambda: _gemm(_half(3, 0), _words(0, 8), _half(0, 8)),
        "[marlin_gemm_fp4] K is 0; it must be at least 1",
    ),
    "text as group_size": (
        lambda: _gemm(group_size="128"),
        "[marlin_gemm_fp4] group_size is '128'; supported are 128, 64, 32",
    ),
    "fraction as group_size": (
        lambda: _gemm(group_size=128.0),
        "[marlin_gemm_fp4] group_size is 128.0; supported are 128, 64, 32",
    ),
    "text as group_size of a packer": (
        lambda: marlin.pack_fp4_weights(_half(128, 8), "64"),
        "[pack_fp4_weights] group_size is '64'; supported are 128, 64, 32",
    ),
    "devices": (
        lambda: _gemm(A=_half(3, 256).to("meta")),
        "[marlin_gemm_fp4] A is on meta and B_packed on cpu; all must be on one device",
    ),
    "device of words": (
        lambda: _gemm(B_packed=_words(32, 8).to("meta")),
        "[marlin_gemm_fp4] B_packed is on meta and scales on cpu",
    ),
    "device of zeros": (
        lambda: marlin_gemm_int4(_half(3, 256), _words(32, 8), _half(2, 8), _half(2, 8).to("meta")),
        "[marlin_gemm_int4] B_packed is on cpu and zeros on meta",
    ),
    "zeros": (
        lambda: marlin_gemm_int4(_half(3, 256), _words(32, 8), _half(2, 8), _half(1, 8)),
        "[marlin_gemm_int4] zeros has shape [1, 8]",
    ),
    "M": (
        lambda: _dispatch(M=4),
        "[dispatch_gemm_fp4] A has shape [3, 256]; with M = 4 and K = 256 it must be [4, 256]",
    ),
    "N": (
        lambda: _dispatch("fp8", N=9),
        "[dispatch_gemm_fp8] B_packed has shape [64, 8]; with K = 256, N = 9 and group_size = 128 it must be [64, 9]",
    ),
    "K": (
        lambda: _dispatch("int2", K=128),
        "[dispatch_gemm_int2] A has shape [3, 256]; with M = 3 and K = 128 it must be [3, 128]",
    ),
    "rank of A": (lambda: _dispatch(A=_half(1, 3, 256)), "[dispatch_gemm_fp4] A has shape [1, 3, 256]"),
    "K of dequant": (lambda: _dequant(K=128), "[dispatch_dequant_fp4] packed has shape [32, 8]; with K = 128"),
    "N of dequant": (lambda: _dequant(N=7), "[dispatch_dequant_fp4] packed has shape [32, 8]; with K = 256, N = 7"),
    "groups of dequant": (lambda: _dequant(group_size=64), "[dispatch_dequant_fp4] scales has shape [8, 8]"),
    "devices of dequant": (
        lambda: _dequant(scales=_half(8, 8).to("meta")),
        "[dispatch_dequant_fp4] packed is on cpu and scales on meta",
    ),
    "num_packed": (lambda: _benchmark(num_packed=0), "num_packed is 0; it must be at least 1"),
    "warmup_iters": (lambda: _benchmark(warmup_iters=-1), "warmup_iters is -1; it must be at least 0"),
    "benchmark_iters": (lambda: _benchmark(benchmark_iters=0), "benchmark_iters is 0; it must be at least"),
    "group_size of benchmark": (lambda: _benchmark(group_size=8), "group_size is 8; supported are"),
    "device of a library": (lambda: MetalKernelLibrary("meta"), "device is 'meta'; supported are 'mps' and"),
}
TYPE_ERRORS: dict[str, tuple[Callable[[], Any], str]] = {
    "dtype of A": (lambda: _gemm(A=torch.zeros(3, 256).double()), "[marlin_gemm_fp4] A has dtype"),
    "dtype of dispatched A": (lambda: _dispatch(A=_half(3, 256).int()), "[dispatch_gemm_fp4] A has dtype"),
    "text as K": (lambda: _dispatch(K="256"), "[dispatch_gemm_fp4] K is '256'; it must be a whole number"),
    "text as M": (lambda: _dispatch(M="3"), "[dispatch_gemm_fp4] M is '3'; it must be a whole number"),
    "text as N of dequant": (lambda: _dequant(N="8"), "[dispatch_dequant_fp4] N is '8'; it must be a whole"),
    "text as num_packed": (lambda: _benchmark(num_packed="64"), "num_packed is '64'; it must be a whole"),
    "dtype of words": (lambda: _gemm(B_packed=_half(32, 8)), "[marlin_gemm_fp4] B_packed has dtype"),
    "dtype of scales": (
        lambda: _gemm(scales=torch.zeros(2, 8)),
        "[marlin_gemm_fp4] scales has dtype torch.float32; supported are torch.float16",
    ),
    "no tensor": (lambda: _gemm(A=[1.0]), "[marlin_gemm_fp4] A is of type list"),
    "no zeros": (
        lambda: marlin_gemm_int4(_half(3, 256), _words(32, 8), _half(2, 8), None),
        "[marlin_gemm_int4] zeros is of type NoneType",
    ),
    "lib": (lambda: _dispatch(lib="mps"), "[dispatch_gemm_fp4] lib is of type str; it must be a Metal"),
    "lib of dequant": (
        lambda: marlin.dispatch_dequant_fp4(None, _words(32, 8), _half(8, 8), 256, 8),
        "[dispatch_dequant_fp4] lib is of type NoneType",
    ),
    "lib of benchmark": (lambda: marlin.benchmark_dequant_fp4(4096), "[benchmark_dequant_fp4] lib is of type int"),
}


@pytest.mark.parametrize("name", [*VALUE_ERRORS, *TYPE_ERRORS])
def test_wrong_arguments_are_named(name: str) -> None:
    call, message = {**VALUE_ERRORS, **TYPE_ERRORS}[name]
    with pytest.raises(ValueError if name in VALUE_ERRORS else TypeError, match=re.escape(message)):
        call()


# --- The library and the benchmark ------------------------------------------------------------------------------------


def test_default_library_is_one_for_all_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(marlin.library, "_default", {})
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: get_default_library(), range(64)))
    assert all(lib is made[0] for lib in made)
    assert isinstance(made[0], MetalKernelLibrary)


@pytest.mark.parametrize("available", [True, False])
def test_library_is_for_the_gpu_where_there_is_one(available: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: available)
    assert MetalKernelLibrary().device == torch.device("mps" if available else "cpu")
    assert MetalKernelLibrary("cpu").device == torch.device("cpu")
    assert repr(MetalKernelLibrary("cpu")) == "MetalKernelLibrary(device='cpu')"


class Dequantized(TorchDispatchMode):
    """The sizes of the results of `dequantize`."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.quantization_mlx.dequantize.default:
            self.shapes.append(tuple(result.shape))
        return result


@pytest.mark.parametrize("num_packed, shape", [(1, (32, 1)), (1024, (32, 256)), (20000, (64, 4096))], ids=str)
def test_benchmark_counts_what_it_says(num_packed: int, shape: tuple[int, int], device: str) -> None:
    with Dequantized() as recorded:
        result = marlin.benchmark_dequant_fp4(MetalKernelLibrary(device), num_packed, warmup_iters=2, benchmark_iters=3)
    assert recorded.shapes == 5 * [shape]
    assert result.keys() == {"time_ms", "bandwidth_gb_s", "throughput_gop_s"}
    K, N = shape
    seconds = result["time_ms"] / 1e3
    assert seconds > 0
    assert result["throughput_gop_s"] * 1e9 * seconds == pytest.approx(K * N)
    assert result["bandwidth_gb_s"] * 1e9 * seconds == pytest.approx(K * N / 8 * 20 + K * N / 32 * 2)


# --- mlx arrays -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*DTYPES, torch.uint32, torch.int32], ids=name_of)
@pytest.mark.parametrize("shape", [(), (3,), (4, 6), (2, 0, 3)], ids=str)
def test_arrays_keep_their_values(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = (torch.rand(shape, generator=oracle.generator(8)) * 2**31).to(dtype)
    array = to_mlx(tensor)
    assert is_mlx_array(array) and not is_mlx_array(tensor)
    assert array.dtype == getattr(oracle.mlx(), name_of(dtype)) and array.shape == shape
    oracle.assert_identical(oracle.from_mlx(array), tensor)
    oracle.assert_identical(to_torch(array), tensor)
    if len(shape) == 2:
        oracle.assert_identical(to_torch(array.T), tensor.T)
        oracle.assert_identical(
            to_torch(array[1::2, ::-1]),
            tensor[1::2].fliplr() if dtype != torch.uint32 else tensor[1::2][:, [5, 4, 3, 2, 1, 0]],
        )
        oracle.assert_identical(oracle.from_mlx(to_mlx(tensor.T)), tensor.T)


def test_arrays_go_to_the_gpu_where_mlx_and_torch_have_it(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mx = oracle.mlx()
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: device == "mps")
    assert to_torch(mx.arange(3)).device.type == "cpu"
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    tensor = to_torch(mx.arange(3.0))
    assert tensor.device.type == device
    oracle.assert_identical(oracle.from_mlx(to_mlx(tensor)), torch.arange(3.0))


def test_a_tensor_outlives_its_array() -> None:
    mx = oracle.mlx()
    array = mx.arange(100_000) + 0.5
    expected = np.array(array)
    tensor = to_torch(array)
    array += 1
    mx.eval(array)
    del array
    mx.eval([mx.zeros(100_000) for _ in range(20)])
    assert (tensor.numpy() == expected).all()


@KIND
def test_packers_return_mlx_arrays_for_mlx_arrays(kind: str) -> None:
    for dtype in (*DTYPES, torch.float64):
        weights = oracle.random_x(256, 12, dtype=dtype)
        array = (
            oracle.to_mlx(weights)
            if dtype != torch.float64
            else oracle.mlx().array(weights.numpy(), dtype=oracle.mlx().float64)
        )
        packed = packer(kind)(array, group_size=64)
        for ours, theirs in zip(packed, reference(kind, weights, 64).tensors, strict=True):
            assert type(ours) is oracle.mlx().array
            oracle.assert_identical(oracle.from_mlx(ours), theirs)


@pytest.mark.parametrize("kind", ["fp4", "int4"])
@DTYPE
def test_products_of_mlx_arrays(kind: str, dtype: torch.dtype) -> None:
    packed = random_packed(kind, 256, 12, 64)
    x = oracle.random_x(2, 3, 256, dtype=dtype)
    function = {"fp4": marlin_gemm_fp4, "int4": marlin_gemm_int4}[kind]
    ours = function(oracle.to_mlx(x), *map(oracle.to_mlx, packed.tensors), group_size=64)
    assert type(ours) is oracle.mlx().array
    oracle.assert_identical(oracle.from_mlx(ours), function(x, *packed.tensors, group_size=64))
    oracle.assert_product(oracle.from_mlx(ours), x, exact(kind, packed, 64), dtype)


def test_tensors_and_arrays_do_not_mix() -> None:
    words, scales, _ = random_packed("fp4", 256, 12, 128)
    x = oracle.random_x(2, 256)
    with pytest.raises(TypeError, match=r"\[marlin_gemm_fp4\] got torch tensors and mlx arrays"):
        marlin_gemm_fp4(oracle.to_mlx(x), words, scales)
    with pytest.raises(TypeError, match=r"\[marlin_gemm_fp4\] got torch tensors and mlx arrays"):
        marlin_gemm_fp4(x, B_packed=words, scales=oracle.to_mlx(scales))
    with pytest.raises(TypeError, match=r"mlx array of dtype mlx.core.complex64 is not supported"):
        marlin.pack_fp4_weights(oracle.to_mlx(x).astype(oracle.mlx().complex64))
    with pytest.raises(TypeError, match=r"\[pack_int4_weights\] weights has dtype torch.int32"):
        marlin.pack_int4_weights(oracle.mlx().zeros((128, 2), dtype=oracle.mlx().int32))


def test_torch_alone_needs_no_mlx() -> None:
    code = """
import sys

import torch

from quantization_mlx.marlin import marlin_gemm_fp4, pack_fp4_weights

sys.modules["mlx"] = sys.modules["numpy"] = None
marlin_gemm_fp4(torch.ones(2, 128), *pack_fp4_weights(torch.ones(128, 4)))
assert "mlx.core" not in sys.modules
"""
    printed("-c", code)


# --- The documented examples ------------------------------------------------------------------------------------------


def _documented_sizes(device: str) -> tuple[int, int, int]:
    """M, N and K as documented; the software Metal device gets smaller ones."""
    return (32, 4096, 4096) if device == "cpu" else (32, 64, 256)


def test_documented_example_of_marlin_gemm_fp4() -> None:
    mx = oracle.mlx()

    def random_weights(K: int, N: int) -> Any:
        return mx.random.normal((K, N), dtype=mx.float16)

    M, N, K = 32, 4096, 4096
    A = mx.random.normal((M, K), dtype=mx.float16)
    B_packed, scales = marlin.pack_fp4_weights(random_weights(K, N), group_size=128)
    C = marlin_gemm_fp4(A, B_packed, scales)

    assert (C.shape, C.dtype) == ((M, N), mx.float16)
    columns = Packed(oracle.from_mlx(B_packed)[:, :40], oracle.from_mlx(scales)[:, :40])
    ours, x = oracle.from_mlx(C)[:, :40], oracle.from_mlx(A)
    oracle.assert_product(ours, x, exact("fp4", columns, 128), torch.float16)


def test_documented_example_of_dispatch_gemm_fp4(device: str) -> None:
    lib = get_default_library()
    M, N, K = _documented_sizes(device)

    A = torch.randn(M, K, dtype=torch.float16, device=device)
    B_packed = torch.randint(0, 2**32, (K // 8, N), dtype=torch.uint32).to(device)
    scales = torch.randn(K // 32, N, dtype=torch.float16, device=device) * 0.1

    C = marlin.dispatch_gemm_fp4(lib, A, B_packed, scales, M, N, K, group_size=32)

    assert C.shape == (M, N) and C.device == A.device
    columns = Packed(B_packed.cpu()[:, :40], scales.cpu()[:, :40])
    oracle.assert_product(C.cpu()[:, :40], A.cpu(), exact("fp4", columns, 32), torch.float16)
