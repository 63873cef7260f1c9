"""References that share no code with the package: float64 arithmetic from the format descriptions, and the mlx wheel.

The packed layout is described in MLX's documentation of mx.quantize; E2M1, E4M3 and E8M0 in the OCP Microscaling
Formats specification v1.0. mlx multiplies in float32 only: in half precision its CPU back end accumulates in the input
dtype.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

# --- Formats ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Format:
    mode: str
    group_size: int
    bits: int

    def __str__(self) -> str:
        return f"{self.mode}-g{self.group_size}-b{self.bits}"

    @property
    def is_affine(self) -> bool:
        return self.mode == "affine"

    @property
    def is_column_packed(self) -> bool:
        """Whether words run along N: w [K, N] is packed and grouped down its columns, as Marlin's formats are."""
        return self.mode.startswith("marlin")

    @property
    def has_zeros(self) -> bool:
        return self.mode == "marlin_int4"

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments that name this format, for our ops and for mlx's alike."""
        return {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}


def name_of(value: Any) -> str:
    """A readable pytest id for formats and dtypes."""
    return str(value).removeprefix("torch.")


# --- Packing and element codes ----------------------------------------------------------------------------------------


def unpack(words: Tensor, bits: int) -> np.ndarray:
    """int64 codes [..., K] of words [..., K * bits / 32]: element i is bits [i * bits, (i + 1) * bits) of its row."""
    raw = np.ascontiguousarray(words.detach().cpu().contiguous().view(torch.int32).numpy())
    columns = raw.shape[-1] * 32 // bits
    stream = np.unpackbits(raw.reshape(-1).view(np.uint8), bitorder="little")
    weights = 1 << np.arange(bits, dtype=np.int64)
    return (stream.reshape(*raw.shape[:-1], columns, bits) * weights).sum(-1)


def pack(codes: np.ndarray, bits: int) -> Tensor:
    """uint32 words [..., K * bits / 32] of integer codes [..., K]."""
    stream = ((codes[..., None] >> np.arange(bits)) & 1).astype(np.uint8)
    raw = np.packbits(stream.reshape(-1), bitorder="little").view(np.uint32)
    return torch.from_numpy(raw.reshape(*codes.shape[:-1], codes.shape[-1] * bits // 32).copy())


def _e4m3_value(code: int) -> float:
    sign = -1.0 if code & 0x80 else 1.0
    exponent, mantissa = (code >> 3) & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    if exponent == 0:
        return sign * mantissa * 2.0**-9
    return sign * (8 + mantissa) * 2.0 ** (exponent - 10)


E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
E4M3 = np.array([_e4m3_value(code) for code in range(256)])
# What is taken from a code of Marlin's integers, where it is the same everywhere.
MARLIN_OFFSETS = {"marlin_int2": 1.5, "marlin_int4_sym": 8.0}
# mlx decodes byte 255 as infinity (OCP as NaN).
E8M0 = np.array([2.0 ** (byte - 127) for byte in range(255)] + [math.inf])


def decode_elements(codes: np.ndarray, mode: str) -> np.ndarray:
    table = {"mxfp4": E2M1, "nvfp4": E2M1, "mxfp8": E4M3, "marlin_fp4": E2M1, "marlin_fp8": E4M3}.get(mode)
    return codes.astype(np.float64) if table is None else table[codes]


def decode_scales(scales: Tensor, mode: str) -> np.ndarray:
    if mode == "affine":
        return scales.detach().cpu().double().numpy()
    return (E4M3 if mode == "nvfp4" else E8M0)[scales.detach().cpu().numpy()]


def dequantize(
    w: Tensor, scales: Tensor, biases: Tensor | None, format: Format, global_scale: Tensor | None = None
) -> Tensor:
    """The exact values of a quantized matrix, float64 [..., K]; global_scale has one element or one per matrix."""
    if format.is_column_packed:
        return dequantize_columns(w, scales, biases, format)
    values = decode_elements(unpack(w, format.bits), format.mode)
    values = values * np.repeat(decode_scales(scales, format.mode), format.group_size, -1)
    if biases is not None:
        values = values + np.repeat(biases.detach().cpu().double().numpy(), format.group_size, -1)
    result = torch.from_numpy(values)
    if global_scale is not None:
        factor = global_scale.detach().cpu().double() / 2688
        result = result * (factor[..., None, None] if factor.numel() > 1 else factor.reshape(()))
    return result


def format_of(layer: Any) -> Format:
    """Of a packed layer."""
    return Format(layer.mode, layer.group_size, layer.bits)


def values_of(layer: Any) -> Tensor:
    """The exact values of a packed layer's weight, as `dequantize` gives them."""
    format = format_of(layer)
    offsets = layer.zeros if format.is_column_packed else layer.biases
    return dequantize(layer.weight_packed, layer.scales, offsets, format)


def dequantize_columns(w: Tensor, scales: Tensor, zeros: Tensor | None, format: Format) -> Tensor:
    """The exact values of a matrix of packed columns, float64 [..., K, N]."""
    values = np.swapaxes(decode_elements(unpack(w.mT, format.bits), format.mode), -2, -1)
    offset = MARLIN_OFFSETS.get(format.mode, 0.0)
    if zeros is not None:
        offset = np.repeat(zeros.detach().cpu().double().numpy(), format.group_size, -2)
    factors = np.repeat(scales.detach().cpu().double().numpy(), format.group_size, -2)
    return torch.from_numpy((values - offset) * factors)


# --- Quantized test matrices ------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Quantized:
    """Packed weights with the exact values that they stand for."""

    format: Format
    w: Tensor
    scales: Tensor
    biases: Tensor | None
    global_scale: Tensor | None = None

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.w, self.scales, self.biases

    @functools.cached_property
    def dense(self) -> Tensor:
        return dequantize(self.w, self.scales, self.biases, self.format, self.global_scale)

    def matrix(self, transpose: bool) -> Tensor:
        """The float64 right operand [..., K, N] of the product; where columns are packed, w is that."""
        return self.dense.mT if transpose else self.dense

    def to(self, device: str) -> Quantized:
        scale = None if self.global_scale is None else self.global_scale.to(device)
        return replace(self.map(lambda tensor: tensor.to(device)), global_scale=scale)

    def map(self, change: Callable[[Tensor], Tensor]) -> Quantized:
        """With what `change` makes of w, of scales and of biases."""
        changed = (None if tensor is None else change(tensor) for tensor in self.tensors)
        return Quantized(self.format, *changed, self.global_scale)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_quantized(format: Format, *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Quantized:
    """Random codes, scales and biases for a matrix of this shape, drawn without any quantizer; values from -4 to 4."""
    if format.is_column_packed:
        return random_columns(format, *shape, seed=seed)
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 1 << format.bits, shape)
    groups = (*shape[:-1], shape[-1] // format.group_size)
    if format.mode == "mxfp8":
        codes = np.where((codes & 0x7F) == 0x7F, codes ^ 1, codes)  # no NaN
    words = pack(codes, format.bits)
    if not format.is_affine:
        # Elements reach 6 or 448, so these bytes stand for about 2^-4 to 1/2 and 2^-11 to 2^-7.
        low, high = {"mxfp4": (123, 127), "nvfp4": (24, 48), "mxfp8": (116, 121)}[format.mode]
        return Quantized(format, words, torch.from_numpy(rng.integers(low, high, groups).astype(np.uint8)), None)
    step = 2.0 / (1 << format.bits)
    scales = step * rng.uniform(0.5, 1.5, groups) * rng.choice([-1.0, 1.0], groups)
    biases = -scales * ((1 << format.bits) - 1) / 2 + rng.uniform(-0.2, 0.2, groups)
    return Quantized(format, words, torch.from_numpy(scales).to(dtype), torch.from_numpy(biases).to(dtype))


def random_columns(format: Format, *shape: int, seed: int = 0) -> Quantized:
    """As random_quantized, for a matrix [..., K, N] of packed columns."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 1 << format.bits, shape)
    if format.mode == "marlin_fp8":
        codes = np.where((codes & 0x7F) == 0x7F, codes ^ 1, codes)  # no NaN
    groups = (*shape[:-2], shape[-2] // format.group_size, shape[-1])
    largest = {"marlin_fp4": 6.0, "marlin_fp8": 448.0, "marlin_int2": 1.5}.get(format.mode, 8.0)
    scales = 2.0 / largest * rng.uniform(0.5, 1.5, groups) * rng.choice([-1.0, 1.0], groups)
    zeros = torch.from_numpy(rng.integers(-2, 18, groups)).half() if format.has_zeros else None
    words = pack(np.swapaxes(codes, -2, -1), format.bits).mT.contiguous()
    return Quantized(format, words, torch.from_numpy(scales).half(), zeros)


def random_x(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=generator(seed)).to(dtype)


def random_large(format: Format, *shape: int, seed: int = 0) -> Quantized:
    """As random_quantized in float16, but that a third of the rows of w (of packed columns) reach beyond 65504.

    Nothing does in mode nvfp4: its weights before they are multiplied by the global scale are 2688 at most.
    """
    base = random_quantized(format, *shape, dtype=torch.float16, seed=seed)
    scales, biases = base.scales.clone(), base.biases
    if format.is_column_packed:
        scales[..., 1::3] = scales[..., 1::3].sign() * (30000 + 10000 * scales[..., 1::3].abs().clamp(max=3))
    elif format.is_affine:
        last = (1 << format.bits) - 1
        scales[..., 1::3, :] = (scales[..., 1::3, :].float() * 60000 / last / scales.abs().max().float()).half()
        biases = biases.clone()
        biases[..., 1::3, :] = scales[..., 1::3, :].sign() * 50000
    elif format.mode != "nvfp4":
        scales[..., 1::3, :] += {"mxfp4": 18, "mxfp8": 20}[format.mode]
    return Quantized(format, base.w, scales, biases)


# --- Comparing --------------------------------------------------------------------------------------------------------


def error_bound(x: Tensor, matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """The largest error that a product x [M, K] @ matrix [K, N] (float64, exact) may have in this dtype.

    Twice the error of torch's own product in that dtype on the dequantized weights, plus two units of the output's
    rounding, plus the rounding of a float32 sum of K terms.
    """
    x64 = x.double()
    reference = x64 @ matrix
    if reference.numel() == 0:
        return torch.zeros((), dtype=torch.float64)
    in_dtype = (x.to(dtype) @ matrix.to(dtype)).double()
    assert torch.isfinite(in_dtype).all(), "torch's own product overflows: the bound would excuse anything"
    rows = x64.norm(dim=-1).max()
    columns = matrix.norm(dim=-2).max()
    return (
        2 * (in_dtype - reference).abs().max()
        + 2 * torch.finfo(dtype).eps * reference.abs().max()
        + 4 * torch.finfo(torch.float32).eps * math.sqrt(x.shape[-1]) * rows * columns
    )


def _first(mask: Tensor) -> tuple[int, ...]:
    return tuple(mask.nonzero()[0].tolist())


def assert_within(ours: Tensor, reference: Tensor, bound: Tensor | float, what: str = "") -> None:
    """ours, of any dtype, equals the float64 reference up to bound (one number, or one per element)."""
    ours = ours.detach().cpu().double()
    assert ours.shape == reference.shape, f"{what}: shape {tuple(ours.shape)}, expected {tuple(reference.shape)}"
    error = (ours - reference).abs()
    limit = torch.as_tensor(bound, dtype=torch.float64).expand(error.shape)
    wrong = ~(error <= limit)
    if wrong.any():
        at = _first(wrong)
        raise AssertionError(
            f"{what}: {int(wrong.sum())} of {wrong.numel()} values outside the bound, first at {at}: "
            f"{ours[at].item()!r}, expected {reference[at].item()!r}, error {error[at].item():.3g}, "
            f"bound {limit[at].item():.3g}"
        )


def assert_product(ours: Tensor, x: Tensor, matrix: Tensor, dtype: torch.dtype, what: str = "") -> None:
    """ours equals x [..., K] @ matrix [K, N] in shape, dtype and, within the error bound, in value."""
    assert ours.dtype == dtype, f"{what}: dtype {ours.dtype}, expected {dtype}"
    x = x.detach().cpu()
    rows = x.reshape(-1, x.shape[-1])
    assert_within(ours, x.double() @ matrix, error_bound(rows, matrix, dtype), what)


def small_x(matrix: Tensor, *shape: int, seed: int = 1) -> Tensor:
    """Float16 rows, normal numbers times a power of two, whose products with the matrix float16 has room for."""
    scale = 2.0 ** math.floor(math.log2(4000 / matrix.norm(dim=-2).max()))
    return (torch.randn(shape, generator=generator(seed)) * scale).half()


def assert_float16_terms(ours: Tensor, x: Tensor, matrix: Tensor, what: str = "") -> None:
    """ours, float16, equals x @ matrix up to the rounding of each weight and of the result, column by column.

    So it does also where weights are beyond float16's range.
    """
    assert ours.dtype == torch.float16, what
    x = x.detach().cpu().double()
    bound = torch.finfo(torch.float16).eps * (x.abs() @ matrix.abs()) + 2.0**-24
    assert_within(ours, x @ matrix, bound, what)


_BIT_PATTERN = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def mismatches(ours: Tensor, expected: Tensor) -> Tensor:
    """Where the bit patterns differ (so -0 is not 0, and equal NaNs are equal)."""
    assert ours.dtype == expected.dtype, f"dtype {ours.dtype}, expected {expected.dtype}"
    assert ours.shape == expected.shape, f"shape {tuple(ours.shape)}, expected {tuple(expected.shape)}"
    pattern = _BIT_PATTERN[ours.element_size()]
    return ours.detach().cpu().contiguous().view(pattern) != expected.detach().cpu().contiguous().view(pattern)


def assert_identical(ours: Tensor, expected: Tensor, what: str = "") -> None:
    differs = mismatches(ours, expected)
    if differs.any():
        at = _first(differs)
        raise AssertionError(
            f"{what}: {int(differs.sum())} of {differs.numel()} values differ, first at {at}: "
            f"{ours.cpu()[at].item()!r}, expected {expected.cpu()[at].item()!r}"
        )


# --- mlx --------------------------------------------------------------------------------------------------------------


@functools.cache
def mlx() -> Any:
    """mlx.core, set to its CPU back end."""
    import mlx.core as mx

    mx.set_default_device(mx.cpu)
    return mx


def to_mlx(tensor: Tensor | None) -> Any:
    if tensor is None:
        return None
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return mlx().array(tensor.view(torch.int16).numpy().view(np.uint16)).view(mlx().bfloat16)
    return mlx().array(tensor.numpy())


def from_mlx(array: Any) -> Tensor:
    if array.dtype == mlx().bfloat16:
        return torch.from_numpy(np.array(array.view(mlx().uint16)).view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(np.array(array))


def mlx_quantize(w: Tensor, format: Format, global_scale: Tensor | None = None) -> tuple[Tensor, ...]:
    more = {} if global_scale is None else {"global_scale": to_mlx(global_scale)}
    return tuple(from_mlx(part) for part in mlx().quantize(to_mlx(w), **format.options, **more))


def mlx_dequantize(weights: Quantized, dtype: torch.dtype | None = None) -> Tensor:
    more = {} if dtype is None else {"dtype": getattr(mlx(), name_of(dtype))}
    if weights.global_scale is not None:
        more["global_scale"] = to_mlx(weights.global_scale)
    return from_mlx(mlx().dequantize(*map(to_mlx, weights.tensors), **weights.format.options, **more))


def mlx_quantized_matmul(x: Tensor, weights: Quantized, transpose: bool = True) -> Tensor:
    operands = map(to_mlx, (x, *weights.tensors))
    return from_mlx(mlx().quantized_matmul(*operands, transpose=transpose, **weights.format.options))


def mlx_gather_qmm(
    x: Tensor, weights: Quantized, lhs: Tensor | None, rhs: Tensor | None, transpose: bool = True
) -> Tensor:
    operands = map(to_mlx, (x, *weights.tensors, lhs, rhs))
    return from_mlx(mlx().gather_qmm(*operands, transpose=transpose, **weights.format.options))
