"""Operands of a call, drawn at random: numpy arrays by role, bfloat16 as uint16.

x and w begin with the `offset` elements that the call does not use, and rows of x but the last one have their padding.
"""

from __future__ import annotations

import numpy as np

from calls import Call

# Scale bytes that keep weights between about 1/8 and 4.
SCALE_BYTES = {"mxfp4": (123, 127), "nvfp4": (24, 48), "mxfp8": (116, 121)}
GLOBAL_SCALE_UNIT = 2688.0


def encode(values: np.ndarray, dtype: str) -> np.ndarray:
    """Rounded to nearest, ties to even; no NaN among the values."""
    if dtype != "bfloat16":
        return values.astype(dtype)
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def random_operands(call: Call, seed: int = 0) -> dict[str, np.ndarray]:
    """What the kernels of a call read. A quantizer's x is the dense matrix."""
    rng = np.random.default_rng(seed)
    operands = {}
    if call.op == "quantize":
        operands["x"] = _after(call.offset, encode(hard_values(*call.w_shape), call.dtype))
    else:
        operands |= random_weights(call, rng)
    if call.global_scale:
        count = max(call.experts, 1)
        operands["global_scale"] = (GLOBAL_SCALE_UNIT * rng.uniform(0.5, 1.5, count)).astype(np.float32)
    if call.is_product:
        shape = (*call.x_shape[:-1], call.k + call.x_padding)
        x = _after(call.offset, encode(rng.standard_normal(shape, np.float32), call.dtype))
        operands["x"] = x[: len(x) - call.x_padding]
    if call.experts:
        beyond = int(call.invalid)
        lhs = rng.integers(-beyond, call.pairs + beyond, call.pairs)
        rhs = rng.integers(-beyond, call.experts + beyond, call.pairs)
        # The op gives sorted pairs a row of x each.
        operands["lhs_indices"] = np.arange(call.pairs) if call.sorted else lhs
        operands["rhs_indices"] = np.sort(rhs) if call.sorted else rhs
    return operands


def random_weights(call: Call, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Of a quantized matrix, or of several."""
    words = rng.integers(0, 2**32, call.words_shape, np.uint32)
    if call.mode in ("mxfp8", "marlin_fp8"):
        words &= 0xFEFEFEFE  # no NaN
    weights = {"w": _after(call.offset, words)}
    groups = call.groups_shape
    if call.is_column_packed:
        largest = {"marlin_fp4": 6.0, "marlin_fp8": 448.0, "marlin_int2": 1.5}.get(call.mode, 8.0)
        scales = (2.0 / largest * rng.uniform(0.5, 1.5, groups)).astype(np.float16)
        zeros = {"biases": rng.integers(-2, 18, groups).astype(np.float16)} if call.has_biases else {}
        return {**weights, "scales": scales, **zeros}
    if call.mode != "affine":
        return {**weights, "scales": rng.integers(*SCALE_BYTES[call.mode], groups, np.uint8)}
    step = 2.0 / (1 << call.bits)
    scales = step * rng.uniform(0.5, 1.5, groups) * rng.choice([-1.0, 1.0], groups)
    biases = -scales * ((1 << call.bits) - 1) / 2 + rng.uniform(-0.2, 0.2, groups)
    return {**weights, "scales": encode(scales, call.dtype), "biases": encode(biases, call.dtype)}


def _after(offset: int, array: np.ndarray) -> np.ndarray:
    """The array as one run of elements, with unused ones before it."""
    return np.concatenate([np.full(offset, 1, array.dtype), array.reshape(-1)])


def hard_values(rows: int, columns: int) -> np.ndarray:
    """Rows that each meet a special case of a quantizer, then rows of random numbers of many sizes."""
    rng = np.random.default_rng(3)
    special = [
        np.zeros(columns),
        np.full(columns, 0.75),
        np.full(columns, -3.0),
        np.arange(columns) / 4 - columns / 8,  # ties
        -1.0 - rng.random(columns),
        1e-6 * rng.standard_normal(columns),
        np.where(np.arange(columns) == 5, 2500.0, 0.25),
    ]
    powers = (power % 16 - 8 for power in range(max(0, rows - len(special))))
    return np.stack([*special, *(rng.standard_normal(columns) * 2.0**power for power in powers)])[:rows]
