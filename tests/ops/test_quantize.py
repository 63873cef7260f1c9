"""quantize is bit-exact with mlx; dequantize is within one rounding of the exact values."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

import cases
import oracle
import quantization_mlx as qm
from cases import AFFINE_FORMATS, DTYPES, FLOAT_FORMATS, FORMATS
from oracle import Format, Quantized, name_of
from tally import Tally

pytestmark = pytest.mark.kernels_ci

E8M0_FORMATS = FLOAT_FORMATS[:2]
NVFP4 = FLOAT_FORMATS[2]
# What the largest element code stands for: a scale below 2^-127 times this one makes mlx's E8M0 byte wrap around.
LARGEST_ELEMENT = {"mxfp4": 6.0, "mxfp8": 448.0, "nvfp4": 6.0}
# Beyond this multiple of the largest scale mlx's search for the nearest E2M1 value, in float32, no longer finds it.
NVFP4_LIMIT = 448.0 * 2**24


# --- Inputs -----------------------------------------------------------------------------------------------------------


def _randn(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=oracle.generator(seed))


def _magnitudes(shape: tuple[int, ...], low: float, high: float) -> Tensor:
    """Random signs, and one random order of magnitude between 2^low and 2^high for each row."""
    rows = torch.rand((*shape[:-1], 1), generator=oracle.generator(2)) * (high - low) + low
    return _randn(shape, 3).clamp(-3, 3) / 3 * torch.exp2(rows)


def _grid(shape: tuple[int, ...], step: float) -> Tensor:
    return torch.randint(-40, 41, shape, generator=oracle.generator(4)) * step


def _outlier(shape: tuple[int, ...]) -> Tensor:
    result = _randn(shape, 5) * 1e-3
    result[..., 7] = 3.0
    return result


def _scaled_codes(shape: tuple[int, ...]) -> Tensor:
    """Halfway points of E2M1 and E4M3 at power-of-two scales, with the largest element in place."""
    points = torch.tensor([0, 0.25, 0.5, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 6, 0.3125, 4.25, 5.5, 0.2500001, 4.9999995])
    picked = points[torch.randint(0, len(points), shape, generator=oracle.generator(6))]
    picked[..., ::16] = 6.0
    sign = torch.randint(0, 2, shape, generator=oracle.generator(7)) * 2 - 1
    rows = torch.randint(-3, 4, (*shape[:-1], 1), generator=oracle.generator(8))
    return picked * sign * torch.exp2(rows.float())


def _largest(dtype: torch.dtype, format: Format) -> float:
    """Inputs up to here have, in mlx, a finite range in float32 (affine) and codes that mean something (nvfp4)."""
    limit = min(torch.finfo(dtype).max, 1.6e38)
    return min(limit, NVFP4_LIMIT) if format.mode == "nvfp4" else limit


def _smallest(dtype: torch.dtype, format: Format) -> float:
    """Rows scaled down to here do not reach the E8M0 wrap-around."""
    smallest = torch.finfo(dtype).tiny
    return max(smallest, LARGEST_ELEMENT[format.mode] * 2.0**-120) if format in E8M0_FORMATS else smallest


INPUTS: dict[str, Callable[[tuple[int, ...], torch.dtype, Format], Tensor]] = {
    "normal": lambda shape, dtype, format: _randn(shape, 0) * 0.05,
    "shifted": lambda shape, dtype, format: _randn(shape, 1) + 2.5,
    "orders of magnitude": lambda shape, dtype, format: _magnitudes(shape, -10, 10),
    "positive constant": lambda shape, dtype, format: torch.full(shape, 0.7),
    "negative constant": lambda shape, dtype, format: torch.full(shape, -1.3),
    "zero": lambda shape, dtype, format: torch.zeros(shape),
    "negative zero": lambda shape, dtype, format: -torch.zeros(shape),
    "all negative": lambda shape, dtype, format: -_randn(shape, 9).abs() - 0.01,
    "all positive": lambda shape, dtype, format: _randn(shape, 10).abs() + 0.01,
    "equal extremes": lambda shape, dtype, format: torch.sign(_randn(shape, 11)) * 0.375,
    "coarse grid": lambda shape, dtype, format: _grid(shape, 0.125),
    "odd grid": lambda shape, dtype, format: _grid(shape, 0.1),
    "halfway points": lambda shape, dtype, format: _scaled_codes(shape),
    "one outlier": lambda shape, dtype, format: _outlier(shape),
    "below 1e-7": lambda shape, dtype, format: _magnitudes(shape, -24, -20),
    "tiny": lambda shape, dtype, format: _randn(shape, 12).clamp(0.5, 2) * _smallest(dtype, format) * 2,
    "huge": lambda shape, dtype, format: _randn(shape, 13).clamp(-3, 3) / 3 * _largest(dtype, format),
    "largest": lambda shape, dtype, format: torch.sign(_randn(shape, 14)) * _largest(dtype, format),
}


def _input(name: str, shape: tuple[int, ...], dtype: torch.dtype, format: Format) -> Tensor:
    return INPUTS[name](shape, dtype, format).to(dtype)


# --- Bit-exactness ----------------------------------------------------------------------------------------------------


def compare_with_mlx(
    tally: Tally, device: str, w: Tensor, format: Format, what: str, global_scale: Tensor | None = None
) -> None:
    scale_on_device = None if global_scale is None else global_scale.to(device)
    ours = qm.quantize(w.to(device), **format.options, global_scale=scale_on_device)
    expected = oracle.mlx_quantize(w, format, global_scale)
    assert len(ours) == len(expected) == (3 if format.is_affine else 2)
    tally.compare(f"quantize {format.mode} codes", *_codes(ours[0], expected[0], format.bits), f"{what}: codes")
    for name, part, other in zip(("scales", "biases"), ours[1:], expected[1:], strict=False):
        tally.compare(f"quantize {format.mode} {name}", part, other, f"{what}: {name}")


def _codes(ours: Tensor, expected: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The words as codes, after they proved to be words of one shape and dtype."""
    assert ours.dtype == expected.dtype == torch.uint32
    assert ours.shape == expected.shape
    return torch.from_numpy(oracle.unpack(ours, bits)), torch.from_numpy(oracle.unpack(expected, bits))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("format", FORMATS, ids=name_of)
def test_quantize_is_bit_exact(device: str, tally: Tally, format: Format, dtype: torch.dtype) -> None:
    for name in INPUTS:
        w = _input(name, (16, 4 * format.group_size), dtype, format)
        compare_with_mlx(tally, device, w, format, f"{format} {name_of(dtype)} {name}")


@pytest.mark.parametrize("format", FORMATS, ids=name_of)
@pytest.mark.parametrize("leading", [(1,), (2,), (3, 1), (2, 3, 2), (1, 2, 1, 3)], ids=str)
def test_quantize_shapes(device: str, tally: Tally, format: Format, leading: tuple[int, ...]) -> None:
    for groups in (2, 3, 10):
        w = _randn((*leading, groups * format.group_size), seed=groups)
        if w.numel() % 32 == 0:  # mlx refuses other counts in the floating-point modes
            compare_with_mlx(tally, device, w, format, f"{format} {tuple(w.shape)}")


@pytest.mark.parametrize("format", cases.SOME_FORMATS, ids=name_of)
def test_quantize_takes_any_strides(device: str, format: Format) -> None:
    rows, columns = 6, 2 * format.group_size
    base = _randn((2 * columns, 2 * rows), seed=0).to(device)
    views = {
        "transposed": base[:columns, :rows].T,
        "sliced": base.T[:rows, :columns],
        "every second": base.T[::2, ::2],
        "offset": base.reshape(-1)[5 : 5 + rows * columns].reshape(rows, columns),
        "expanded": base.T[:1, :columns].expand(rows, columns),
    }
    for name, view in views.items():
        contiguous = view.clone(memory_format=torch.contiguous_format)
        both = (qm.quantize(each, **format.options) for each in (view, contiguous))
        for ours, expected in zip(*both, strict=True):
            oracle.assert_identical(ours, expected, f"{format} {name}")


def test_nvfp4_needs_no_multiple_of_32(device: str) -> None:
    w = _randn((1, 48), seed=0)
    w_q, scales = qm.quantize(w.to(device), **NVFP4.options)
    expected = oracle.mlx_quantize(torch.cat([w, w]), NVFP4)
    oracle.assert_identical(w_q, expected[0][:1], "words")
    oracle.assert_identical(scales, expected[1][:1], "scales")


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_nvfp4_global_scale(device: str, tally: Tally, dtype: torch.dtype) -> None:
    for magnitude in (1e-5, 1.0, 300.0):
        w = (_randn((16, 128), seed=0) * magnitude).to(dtype)
        absmax = w.float().abs().max()
        for factor in (0.25, 1.0, 3.0):
            for shape in ((), (1,)):
                global_scale = (absmax * factor).reshape(shape)
                compare_with_mlx(tally, device, w, NVFP4, f"{magnitude} {factor}", global_scale)


@pytest.mark.parametrize("format", E8M0_FORMATS, ids=name_of)
def test_e8m0_scale_next_to_powers_of_two(device: str, tally: Tally, format: Format) -> None:
    """The byte steps exactly where the ratio passes a power of two."""
    largest = np.float32(LARGEST_ELEMENT[format.mode])
    exponents = range(-117, 117, 9)
    values = []
    for exponent in exponents:
        centre = (largest * np.float32(2.0) ** np.float32(exponent)).view(np.int32)
        values += [(centre + offset).view(np.float32) for offset in range(-6, 7)]
    w = torch.zeros(len(values), format.group_size)
    w[:, 3] = torch.tensor(np.array(values))
    compare_with_mlx(tally, device, w, format, str(format))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("format", AFFINE_FORMATS[::3] + FLOAT_FORMATS, ids=name_of)
def test_every_half_precision_magnitude(device: str, tally: Tally, format: Format, dtype: torch.dtype) -> None:
    """Each positive 16-bit number as the largest magnitude of a group, as far as mlx's result is usable."""
    finite = torch.finfo(dtype).max
    patterns = torch.arange(1, torch.tensor(finite, dtype=dtype).view(torch.int16).item() + 1)
    absmax = patterns.to(torch.int16).view(dtype)
    usable = absmax <= _largest(dtype, format)
    if dtype == torch.bfloat16 and format in E8M0_FORMATS:
        usable &= absmax.double() > LARGEST_ELEMENT[format.mode] * 2.0**-127
    absmax = absmax[usable][: usable.sum() // 2 * 2]  # an even number of groups, for mlx
    ramp = torch.linspace(-1, 1, format.group_size).roll(3)
    w = (absmax.float()[:, None] * ramp).to(dtype)
    w[::2] = -w[::2]
    compare_with_mlx(tally, device, w, format, str(format))


def test_formats_are_those_of_mlx() -> None:
    mx = oracle.mlx()
    known = set()
    for mode in ("affine", "mxfp4", "mxfp8", "nvfp4"):
        for group_size in (8, 16, 32, 64, 128, 256):
            for bits in range(1, 9):
                with contextlib.suppress(ValueError):
                    mx.quantize(mx.ones((1, 256)), group_size=group_size, bits=bits, mode=mode)
                    known.add(oracle.Format(mode, group_size, bits))
    assert set(cases.FORMATS) == known


@pytest.mark.parametrize("group_size, bits, mode", [(None, None, "affine"), (None, None, "nvfp4"), (None, 8, "affine")])
def test_quantize_defaults(device: str, group_size: int | None, bits: int | None, mode: str) -> None:
    w = _randn((4, 128), seed=0)
    expected = oracle.mlx().quantize(oracle.to_mlx(w), group_size=group_size, bits=bits, mode=mode)
    for ours, array in zip(qm.quantize(w.to(device), group_size, bits, mode), expected, strict=True):
        oracle.assert_identical(ours, oracle.from_mlx(array), mode)


@pytest.mark.parametrize("format", FORMATS, ids=name_of)
def test_quantize_of_nothing(device: str, format: Format) -> None:
    for shape in ((0, 2 * format.group_size), (3, 0), (2, 0, format.group_size)):
        w_q, scales, *biases = qm.quantize(torch.empty(shape, device=device), **format.options)
        assert w_q.shape == (*shape[:-1], shape[-1] * format.bits // 32)
        assert scales.shape == (*shape[:-1], shape[-1] // format.group_size)
        assert [tensor.shape for tensor in biases] == ([scales.shape] if format.is_affine else [])
        dense = qm.dequantize(w_q, scales, *biases, **format.options)
        assert dense.shape == shape


# --- Where mlx's result is not usable ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("format", E8M0_FORMATS, ids=name_of)
def test_e8m0_scale_saturates_where_mlx_wraps(device: str, format: Format, dtype: torch.dtype) -> None:
    """A scale below 2^-127 becomes 2^-127 (byte 0), and the codes are the nearest ones at that scale.

    A ratio that underflows to zero counts as that of a zero group, byte 127.
    """
    largest = LARGEST_ELEMENT[format.mode]
    magnitudes = torch.exp2(torch.arange(-148.0, -124.0)).double() * largest
    pattern = torch.linspace(-1, 1, format.group_size, dtype=torch.float64)
    w = (magnitudes[:, None] * pattern).float().to(dtype)
    w_q, scales = qm.quantize(w.to(device), **format.options)

    ratio = (w.abs().amax(1) / largest).double()  # rounded to w's dtype, as in mlx
    expected = torch.where(ratio == 0, 127, torch.ceil(torch.log2(ratio)).clamp(min=-127) + 127)
    assert scales.cpu().flatten().tolist() == expected.tolist()

    codes = oracle.unpack(w_q, format.bits)
    values = oracle.decode_elements(codes, format.mode)
    wanted = w.double().numpy() / oracle.decode_scales(scales, format.mode)
    table = np.unique(oracle.E2M1 if format.bits == 4 else oracle.E4M3[~np.isnan(oracle.E4M3)])
    nearest = np.abs(wanted[..., None] - table).min(-1)
    assert (np.abs(wanted - values) == nearest).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_nvfp4_saturates_beyond_its_range(device: str, dtype: torch.dtype) -> None:
    w = (torch.sign(_randn((4, 32), seed=0)) * torch.tensor([[1e11], [1e20], [1e30], [3e38]])).to(dtype)
    w_q, scales = qm.quantize(w.to(device), **NVFP4.options)
    dense = oracle.dequantize(w_q, scales, None, NVFP4)
    assert torch.equal(dense, torch.sign(w.double()) * 448 * 6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("format", AFFINE_FORMATS, ids=name_of)
def test_affine_range_beyond_float32(device: str, format: Format, dtype: torch.dtype) -> None:
    """Where max - min overflows float32 mlx writes an infinite scale; here it saturates and all values stay finite."""
    w = (torch.linspace(-1, 1, 2 * format.group_size).reshape(2, -1) * 3.3e38).to(dtype)
    w[:, 0], w[:, 1] = 3.3e38, -3.3e38
    w_q, scales, biases = qm.quantize(w.to(device), **format.options)
    assert torch.isfinite(scales).all()
    assert torch.isfinite(biases).all()
    assert torch.isfinite(qm.dequantize(w_q, scales, biases, **format.options)).all()
    # What float32 cannot span may be lost at the far end, and one step anywhere.
    span = 0.99 * torch.finfo(torch.float32).max
    lost = max(6.6e38 - span, span / ((1 << format.bits) - 1)) + 6.6e38 * torch.finfo(dtype).eps
    oracle.assert_within(oracle.dequantize(w_q, scales, biases, format), w.double(), lost, str(format))


@pytest.mark.parametrize("global_scale", [0.0, 1e-45, 1e-36])
def test_nvfp4_tiny_global_scales_stay_finite(device: str, global_scale: float) -> None:
    """The scale of an all-zero tensor is 0; mlx divides by it."""
    w = (_randn((4, 64), seed=0).clamp(-1, 1) * global_scale).to(device)
    scale = torch.tensor(global_scale, device=device)
    w_q, scales = qm.quantize(w, **NVFP4.options, global_scale=scale)
    values = qm.dequantize(w_q, scales, **NVFP4.options, global_scale=scale, dtype=torch.float32)
    assert values.isfinite().all()
    assert values.abs().max() <= max(global_scale, 1e-44)


def test_quantize_survives_nan_and_infinity(device: str) -> None:
    """No result is promised, but other groups are untouched and nothing crashes."""
    for format in FORMATS:
        clean = _randn((2, 4 * format.group_size), seed=0)
        for poison in (float("nan"), float("inf"), float("-inf")):
            w = clean.clone()
            w[0, 1] = poison
            both = (qm.quantize(each.to(device), **format.options) for each in (w, clean))
            for ours, expected in zip(*both, strict=True):
                oracle.assert_identical(ours[1], expected[1], f"{format} {poison}")


# --- dequantize -------------------------------------------------------------------------------------------------------


def _rounding(weights: Quantized, dtype: torch.dtype) -> Tensor:
    """One rounding to dtype, and the float32 roundings of product and sum."""
    terms = weights.dense.abs()
    if weights.biases is not None:
        terms = terms + 2 * weights.biases.double().abs().repeat_interleave(weights.format.group_size, -1)
    return torch.finfo(dtype).eps / 2 * weights.dense.abs() * 1.0001 + torch.finfo(torch.float32).eps * terms


def _ours(weights: Quantized, device: str, dtype: torch.dtype | None = None) -> Tensor:
    on = weights.to(device)
    return qm.dequantize(*on.tensors, **on.format.options, global_scale=on.global_scale, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("format", FORMATS, ids=name_of)
def test_dequantize(device: str, format: Format, dtype: torch.dtype) -> None:
    size = format.group_size
    for shape in ((1, size), (5, 3 * size), (2, 3, 4 * size), (2, 1, 2, 2 * 128)):
        weights = oracle.random_quantized(format, *shape, dtype=dtype)
        ours = _ours(weights, device)
        expected_dtype = dtype if format.is_affine else torch.bfloat16
        assert ours.dtype == expected_dtype
        oracle.assert_within(ours, weights.dense, _rounding(weights, expected_dtype), f"{format} {shape}")
        if weights.dense.numel() % 32:  # which mlx refuses in the floating-point modes
            continue
        # mlx rounds the product and the sum to the storage dtype.
        theirs = oracle.mlx_dequantize(weights).double()
        terms = 2 * weights.dense.abs() + (0 if weights.biases is None else 3 * weights.biases.double().abs().max())
        oracle.assert_within(ours, theirs, torch.finfo(expected_dtype).eps * terms, f"{format} {shape} against mlx")


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("format", cases.SOME_FORMATS, ids=name_of)
def test_dequantize_to_a_dtype(device: str, format: Format, dtype: torch.dtype) -> None:
    for stored in DTYPES:
        weights = oracle.random_quantized(format, 5, 3 * format.group_size, dtype=stored)
        ours = _ours(weights, device, dtype)
        assert ours.dtype == dtype
        oracle.assert_within(ours, weights.dense, _rounding(weights, dtype), f"{format} {stored}")


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("format", FLOAT_FORMATS, ids=name_of)
def test_dequantize_decodes_every_code(device: str, format: Format, dtype: torch.dtype) -> None:
    """Every element code at a scale of 1, and every scale byte at element 2: exact products, one rounding is left."""
    codes = np.arange(256) % (1 << format.bits)
    one = 0x38 if format.mode == "nvfp4" else 127
    scales = torch.full((1, 256 // format.group_size), one, dtype=torch.uint8)
    by_code = Quantized(format, oracle.pack(codes[None], format.bits), scales, None)
    two = 0x40 if format.mode == "mxfp8" else 4
    all_two = np.full((256, format.group_size), two)
    by_scale = Quantized(format, oracle.pack(all_two, format.bits), torch.arange(256, dtype=torch.uint8)[:, None], None)
    for weights in (by_code, by_scale):
        expected = weights.dense.to(dtype)
        ours = _ours(weights, device, dtype).cpu()
        defined = ~torch.isnan(expected)
        assert torch.equal(ours[defined], expected[defined]), format
        assert torch.isnan(ours[~defined]).all(), format


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_dequantize_global_scale(device: str, dtype: torch.dtype) -> None:
    for shape in ((), (1,)):
        plain = oracle.random_quantized(NVFP4, 4, 64)
        weights = Quantized(NVFP4, plain.w, plain.scales, None, torch.full(shape, 123.456))
        ours = _ours(weights, device, dtype)
        bound = (torch.finfo(dtype).eps / 2 * 1.0001 + 2 * torch.finfo(torch.float32).eps) * weights.dense.abs()
        oracle.assert_within(ours, weights.dense, bound, "float64")
        theirs = oracle.mlx_dequantize(weights, dtype).double()
        oracle.assert_within(ours, theirs, 2 * torch.finfo(dtype).eps * weights.dense.abs(), "mlx")


@pytest.mark.parametrize("format", cases.SOME_FORMATS, ids=name_of)
def test_dequantize_takes_any_strides_and_signed_words(device: str, format: Format) -> None:
    weights = oracle.random_quantized(format, 6, 4 * format.group_size).to(device)
    expected = _ours(weights, device)
    strided = Quantized(
        format,
        weights.w.view(torch.int32).T.contiguous().T,
        torch.cat([weights.scales, weights.scales], 1)[:, : weights.scales.shape[1]],
        None if weights.biases is None else weights.biases.repeat_interleave(2, 1)[:, ::2],
    )
    oracle.assert_identical(_ours(strided, device), expected, str(format))


@pytest.mark.parametrize("format", FORMATS, ids=name_of)
def test_round_trip_stays_within_a_step(device: str, format: Format) -> None:
    """Quantized values are as near to the input as the format allows, judged without mlx."""
    w = _randn((8, 4 * format.group_size), seed=0)
    parts = qm.quantize(w.to(device), **format.options)
    dense = qm.dequantize(*parts, **format.options, dtype=torch.float32).cpu()
    groups = w.unflatten(-1, (-1, format.group_size)).double()
    largest = groups.abs().amax(-1, keepdim=True)
    if format.is_affine:
        bound = (groups.amax(-1, keepdim=True) - groups.amin(-1, keepdim=True)) / ((1 << format.bits) - 1)
    else:
        # Half a step next to the largest element, 1 of 6 (E2M1) or 16 of 448 (E4M3), at a scale up to twice too coarse.
        bound = largest / 6 * 2 if format.bits == 4 else largest / 448 * 32
    bound = bound.expand(groups.shape).flatten(-2) * 1.01
    oracle.assert_within(dense, w.double(), bound, str(format))
