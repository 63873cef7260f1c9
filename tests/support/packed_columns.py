"""Weights packed by columns, by the rules of Marlin's formats, in numpy."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import oracle
from cases import DTYPES, MARLIN_BITS
from oracle import Format

# By the names without "marlin_": the bits of an element, and what the largest magnitude of a group is divided by for
# the scale.
BITS = {mode.removeprefix("marlin_"): bits for mode, bits in MARLIN_BITS.items()}
DIVISORS = {"fp4": 6, "fp8": 448, "int2": 1.5, "int4_sym": 7}
GROUP_SIZES = (32, 64, 128)
FLOAT_ELEMENTS = {"marlin_fp4": oracle.E2M1[:8], "marlin_fp8": oracle.E4M3[:127]}


def group_sizes_of(device: str, mode: str, dtype: torch.dtype) -> tuple[int, ...]:
    """All on the CPU; on "mps" one of them, such that a mode meets each in one dtype and a dtype each in some mode."""
    chosen = (list(MARLIN_BITS).index(mode) + DTYPES.index(dtype)) % len(GROUP_SIZES)
    return GROUP_SIZES if device == "cpu" else GROUP_SIZES[chosen : chosen + 1]


def reference_scale(mode: str, groups: np.ndarray) -> np.ndarray:
    """float16 [G, N] of float32 groups [G, group_size, N]."""
    low, high, largest = groups.min(1), groups.max(1), np.abs(groups).max(1)
    if mode == "marlin_int4":
        scale = np.maximum((high - low) / np.float32(15), largest / np.float32(2047))
    else:
        scale = largest / np.float32(DIVISORS[mode.removeprefix("marlin_")])
    stored = np.minimum(np.maximum(scale, np.float32(1e-7)), np.float32(65504)).astype(np.float16)
    if mode == "marlin_int4":  # with a zero of 2048 at most, if the scale has to be one float16 larger
        is_too_small = (np.float32(2048) * stored.astype(np.float32) < largest) & (stored < 65504)
        stored = np.where(is_too_small, np.nextafter(stored, np.float16(65504)), stored)
    return stored


def reference_codes(mode: str, groups: np.ndarray, scale: np.ndarray, zero: np.ndarray) -> np.ndarray:
    scaled = groups / scale.astype(np.float32)[:, None]
    if mode == "marlin_int4":
        return np.clip(np.rint(scaled + zero.astype(np.float32)[:, None]), 0, 15).astype(np.int64)
    if mode == "marlin_int4_sym":
        return np.clip(np.rint(scaled), -8, 7).astype(np.int64) + 8
    if mode == "marlin_int2":
        return np.clip(np.rint(scaled + np.float32(1.5)), 0, 3).astype(np.int64)
    # The nearest element: a tie goes to the lower code in E2M1, to the even one in E4M3.
    values = FLOAT_ELEMENTS[mode]
    size = np.abs(scaled.astype(np.float64))
    above = np.searchsorted(values, size).clip(1, len(values) - 1)
    lower, upper = size - values[above - 1], values[above] - size
    goes_up = (upper < lower) | ((upper == lower) & (mode == "marlin_fp8") & (above % 2 == 0))
    code = np.where(goes_up, above, above - 1)
    if mode == "marlin_fp4":  # zero has no sign
        return np.where((scaled < 0) & (code > 0), code | 8, code)
    return np.where(np.signbit(scaled), code | 128, code)


def reference_quantize(w: Tensor, format: Format) -> tuple[Tensor, Tensor, Tensor | None]:
    """Words, scales and zeros of w [K, N], by the rules of the formats, in float32."""
    K, N = w.shape
    groups = w.float().numpy().reshape(K // format.group_size, format.group_size, N)
    scale = reference_scale(format.mode, groups)
    zero = np.zeros_like(scale)
    if format.has_zeros:
        exact = np.rint(-groups.min(1) / scale.astype(np.float32)) + np.float32(0)
        zero = np.clip(exact, -2048, 2048).astype(np.float16)
    codes = reference_codes(format.mode, groups, scale, zero).reshape(K, N)
    words = oracle.pack(codes.T, format.bits).mT.contiguous()
    return words, torch.from_numpy(scale), torch.from_numpy(zero) if format.has_zeros else None


class Packed(NamedTuple):
    words: Tensor
    scales: Tensor
    zeros: Tensor | None = None

    def to(self, device: str) -> Packed:
        return Packed(*(None if tensor is None else tensor.to(device) for tensor in self))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(tensor for tensor in self if tensor is not None)


def element_values(kind: str, codes: np.ndarray) -> np.ndarray:
    """float64, what codes stand for before the scale (and the zero point of int4)."""
    if kind == "fp4":
        return oracle.E2M1[codes]
    if kind == "fp8":
        return oracle.E4M3[codes]
    return codes - {"int2": 1.5, "int4": 0.0, "int4_sym": 8.0}[kind]


def format_of(kind: str, group_size: int) -> Format:
    return Format(f"marlin_{kind}", group_size, BITS[kind])


def exact(kind: str, packed: Packed, group_size: int) -> Tensor:
    """float64 [K, N]."""
    return oracle.dequantize(*packed, format_of(kind, group_size))


def reference(kind: str, weights: Tensor, group_size: int) -> Packed:
    return Packed(*reference_quantize(weights.detach().cpu(), format_of(kind, group_size)))


def random_packed(kind: str, K: int, N: int, group_size: int) -> Packed:
    """Random codes, scales and zero points, drawn without any quantizer."""
    made = oracle.random_quantized(format_of(kind, group_size), K, N)
    return Packed(made.w, made.scales, made.biases)
