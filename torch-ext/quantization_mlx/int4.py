"""Arrays of int4 codes, two in a byte: helpers in numpy, with one scale and one zero point for a whole array.

A value is `(code - zero_point) * scale`, with codes from -8 to 7. They look at numbers and carry small data; weights of
models are for `quantize` and `quantize_model`, whose scales belong to short groups of weights.
Without numpy they raise ImportError.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .optional import require

if TYPE_CHECKING:
    import numpy

LOWEST, HIGHEST = -8, 7  # of the codes
_METHODS = ("minmax", "absmax")  # by which scales are chosen

_EXAMPLE = (0.1, 0.5, -1.3, 2.7, 3.9, -0.8, 5.2, -4.7)


def quantize_to_int4(
    values: Sequence[float] | numpy.ndarray, scale_method: str = "minmax", *, symmetric: bool = False
) -> tuple[numpy.ndarray, float, float]:
    """Codes, scale and zero point of values, which are taken as float32.

    The documentation of these helpers says that "minmax" maps the smallest and the largest value to the ends of the
    range. That takes a zero point, the one of the usual asymmetric quantization to integers:

        scale = (max - min) / 15,  zero_point = -8 - round(min / scale),  code = round(value / scale) + zero_point

    It is 0 just where the codes fit without one, and every value comes back within scale / 2. The original always takes
    0 and clips what does not fit: of values from 0 to 15, those above 7 are lost. `symmetric=True` does the same. A
    constant array has no range: its scale is 1 and its zero point what a code leaves over, so that it comes back too.

    "absmax" maps the largest magnitude to 7: scale = max(|value|) / 7, zero_point = 0. Halves round to even, and codes
    saturate at -8 and 7. Empty and all-zero arrays have a scale of 1.

    Args:
        values: numbers, of any shape.
        scale_method: "minmax" or "absmax".
        symmetric: keeps the zero point of "minmax" at 0; "absmax" is symmetric anyway.

    Returns:
        codes: int8, of the shape of values.
        scale: positive and finite.
        zero_point: a whole number, except for constant arrays; it may lie outside of -8..7.

    Raises:
        ValueError: the method is unknown, or a value is not finite in float32.
        TypeError: the values are no numbers.
    """
    if scale_method not in _METHODS:
        raise ValueError(
            f"[quantize_to_int4] scale_method {scale_method!r} is not supported; supported are {', '.join(_METHODS)}"
        )
    np = require("numpy", "int4")
    floats = _finite_float32("quantize_to_int4", values).astype(np.float64)  # so that no range over- or underflows
    scale, zero_point = _scale_and_zero_point(floats, scale_method, symmetric)
    quotients = floats / scale
    # Only constant arrays have a fractional zero point; then the sum has to be a whole number.
    codes = np.rint(quotients) + zero_point if zero_point.is_integer() else np.rint(quotients + zero_point)
    return np.asarray(np.clip(codes, LOWEST, HIGHEST).astype(np.int8)), scale, zero_point


def dequantize_from_int4(quantized_values: numpy.ndarray, scale: float, zero_point: float = 0) -> numpy.ndarray:
    """`(quantized_values - zero_point) * scale`, as float32.

    Args:
        quantized_values: integers from -8 to 7, of any shape.
        scale, zero_point: as `quantize_to_int4` returns them.

    Returns:
        float32, of the shape of quantized_values; saturated at float32's largest magnitude.

    Raises:
        ValueError: a code lies outside of -8..7, or the scale or the zero point is not finite.
        TypeError: the codes are no integers, or the scale or the zero point is no single number.
    """
    np = require("numpy", "int4")
    for name, number in (("scale", scale), ("zero_point", zero_point)):
        if np.ndim(number) != 0 or np.asarray(number).dtype.kind not in "iuf":
            raise TypeError(f"[dequantize_from_int4] {name} must be one number, not {number!r}")
        if not math.isfinite(number):
            raise ValueError(f"[dequantize_from_int4] {name} must be finite, not {number}")
    codes = _codes("dequantize_from_int4", "quantized_values", quantized_values)
    values = (codes.astype(np.float64) - float(zero_point)) * float(scale)
    largest = np.finfo(np.float32).max
    return np.asarray(np.clip(values, -largest, largest).astype(np.float32))


def pack_int4_to_int8(int4_values: numpy.ndarray) -> numpy.ndarray:
    """Two codes in each byte, along the last axis: the even one in the low four bits, the odd one in the high four.

    Args:
        int4_values: integers from -8 to 7 [..., n], of any integer dtype.

    Returns:
        int8 [..., ceil(n / 2)]; of an odd n, the last four bits are 0.

    Raises:
        ValueError: a code lies outside of -8..7, or there is no axis.
        TypeError: the codes are no integers.
    """
    np = require("numpy", "int4")
    codes = _codes("pack_int4_to_int8", "int4_values", int4_values)
    if codes.ndim == 0:
        raise ValueError("[pack_int4_to_int8] int4_values must have an axis to pack along, not be a single number")
    nibbles = codes.astype(np.int8).view(np.uint8) & 0xF
    nibbles = np.pad(nibbles, [(0, 0)] * (codes.ndim - 1) + [(0, codes.shape[-1] % 2)])
    return (nibbles[..., 0::2] | nibbles[..., 1::2] << 4).view(np.int8)


def unpack_int8_to_int4(packed_values: numpy.ndarray, *, length: int | None = None) -> numpy.ndarray:
    """The codes of `pack_int4_to_int8`.

    Args:
        packed_values: int8 or uint8 [..., m].
        length: how many codes were packed along the last axis, 2 * m or 2 * m - 1; 2 * m if None, which has a padding
            of 0 at its end where the number was odd.

    Returns:
        int8 [..., length].

    Raises:
        ValueError: the length is not that of m bytes, or there is no axis.
        TypeError: the values are no bytes.
    """
    np = require("numpy", "int4")
    packed = np.asarray(packed_values)
    if packed.dtype not in (np.int8, np.uint8):
        raise TypeError(f"[unpack_int8_to_int4] packed_values must be int8 or uint8, not {packed.dtype}")
    if packed.ndim == 0:
        raise ValueError("[unpack_int8_to_int4] packed_values must have an axis to unpack along, not be a single byte")
    most = 2 * packed.shape[-1]
    if length is not None and (length < 0 or length + length % 2 != most):
        lengths = f"{most - 1} or {most}" if most else "0"
        raise ValueError(f"[unpack_int8_to_int4] {most // 2} bytes hold {lengths} codes, not length={length}")
    signed = packed.view(np.int8)
    codes = np.stack([signed << 4 >> 4, signed >> 4], axis=-1)  # shifts of int8 keep the sign
    return codes.reshape(*packed.shape[:-1], most)[..., :length]


def example() -> tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray]:
    """Quantizes eight numbers, prints a table of them, and returns values, codes and dequantized values."""
    np = require("numpy", "int4")
    values = np.array(_EXAMPLE, np.float32)
    codes, scale, zero_point = quantize_to_int4(values)
    dequantized = dequantize_from_int4(codes, scale, zero_point)
    print(f"scale {scale:.4f}, zero point {zero_point:g}, {pack_int4_to_int8(codes).nbytes} bytes packed")
    print(f"{'value':>9}{'code':>6}{'dequantized':>13}{'error':>9}")
    for value, code, back in zip(values, codes, dequantized, strict=True):
        print(f"{value:>9.3f}{code:>6}{back:>13.3f}{back - value:>9.3f}")
    return values, codes, dequantized


# Scales, and the checks that functions share


def _scale_and_zero_point(values: numpy.ndarray, method: str, symmetric: bool) -> tuple[float, float]:
    """Of float64 values."""
    if not values.size:
        return 1.0, 0.0
    if method == "absmax":
        return float(abs(values).max()) / HIGHEST or 1.0, 0.0
    low, high = float(values.min()), float(values.max())
    if low == high:
        return 1.0, 0.0 if symmetric else min(max(round(low), LOWEST), HIGHEST) - low
    scale = (high - low) / (HIGHEST - LOWEST)
    return scale, 0.0 if symmetric else float(LOWEST - round(low / scale))


def _finite_float32(function: str, values: Any) -> numpy.ndarray:
    """The numbers as float32."""
    np = require("numpy", "int4")
    try:
        given = np.asarray(values)
    except ValueError as error:
        raise ValueError(f"[{function}] values must be an array, or lists of equal lengths") from error
    if given.dtype.kind not in "iuf":
        raise TypeError(f"[{function}] values must be real numbers, not {given.dtype}")
    with np.errstate(over="ignore"):
        floats = given.astype(np.float32)
    _refuse_first(f"[{function}] values must be finite in float32", "values", given, ~np.isfinite(floats))
    return floats


def _codes(function: str, name: str, codes: Any) -> numpy.ndarray:
    """The codes as an array of integers."""
    np = require("numpy", "int4")
    given = np.asarray(codes)
    if given.size == 0:
        return given.astype(np.int8)  # an empty list has no dtype of its own
    if given.dtype.kind not in "iu":
        raise TypeError(f"[{function}] {name} must be integers from {LOWEST} to {HIGHEST}, not {given.dtype}")
    outside = (given < LOWEST) | (given > HIGHEST)
    _refuse_first(f"[{function}] {name} must be from {LOWEST} to {HIGHEST}", name, given, outside)
    return given


def _refuse_first(message: str, name: str, array: numpy.ndarray, refused: numpy.ndarray) -> None:
    """Raises ValueError with the first element that is refused, if there is one."""
    if refused.any():
        index = tuple(require("numpy", "int4").argwhere(refused)[0].tolist())
        where = f"{name}[{', '.join(map(str, index))}]" if index else name
        raise ValueError(f"{message}; {where} is {array[index]}")
