"""Operands of fast ops and of a decoder layer, drawn at random: numpy arrays by role, in the memory of their layouts.

What lies before and between the elements is filled, so that what is read there shows.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from calls import FILLING, NUMPY
from fast_calls import AnyCall, FastCall, LayerCall, Layout
from operands import encode, random_operands, random_weights


def operands_of(call: AnyCall) -> dict[str, np.ndarray]:
    """What the kernels of a call read."""
    if isinstance(call, FastCall):
        return _fast_operands(call)
    return _layer_operands(call) if isinstance(call, LayerCall) else random_operands(call)


def view(memory: np.ndarray, layout: Layout) -> np.ndarray:
    """The elements, where they are."""
    steps = [step * memory.itemsize for step in layout.strides]
    return np.lib.stride_tricks.as_strided(memory[layout.offset :], layout.shape, steps)


def decode(array: np.ndarray, dtype: str) -> np.ndarray:
    """float64."""
    if dtype == "bfloat16":
        array = (np.ascontiguousarray(array).astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float64)


def _laid_out(values: np.ndarray, layout: Layout) -> np.ndarray:
    dtype = np.dtype(NUMPY.get(layout.dtype, layout.dtype))
    memory = np.full(layout.size * dtype.itemsize, FILLING, np.uint8).view(dtype)
    is_real = layout.dtype in ("float32", "float16", "bfloat16")
    view(memory, layout)[...] = encode(values, layout.dtype) if is_real else values
    return memory


Draw = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]


def _normal(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.standard_normal(shape, np.float32)


def _around_one(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return 1 + 0.3 * rng.standard_normal(shape, np.float32)


def _angles(function: Callable[[np.ndarray], np.ndarray]) -> Draw:
    def draw(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        halves = rng.uniform(-9, 9, (*shape[:-1], shape[-1] // 2))
        return function(np.concatenate([halves, halves], -1))

    return draw


def _rates(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return 10000.0 ** np.linspace(0, 1, math.prod(shape))


DRAWS: dict[str, Draw] = {
    "cosines": _angles(np.cos),
    "sines": _angles(np.sin),
    "offsets": lambda rng, shape: rng.integers(0, 100000, shape),
    "freqs": _rates,
    # Of each row, one that is none of its tokens, and some more than once.
    "previous": lambda rng, shape: rng.integers(-1, 1000, shape),
    "experts": lambda rng, shape: rng.integers(0, 3, shape),
    "seeds": lambda rng, shape: rng.integers(-(2**52), 2**52, shape),
    **dict.fromkeys(("key_scales", "value_scales"), lambda rng, shape: 0.01 * _normal(rng, shape)),
    **dict.fromkeys(("weight", "query_norm", "key_norm", "first_norm", "second_norm", "last_norm"), _around_one),
}


def _draw(role: str, dtype: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    # Cosines and sines have one seed.
    rng = np.random.default_rng([seed, *("angles" if role in ("cosines", "sines") else role).encode()])
    if dtype == "bool":
        return rng.random(shape) < 0.7
    if dtype == "uint8":
        return rng.integers(0, 256, shape, np.uint8)
    if dtype == "uint32":
        return rng.integers(0, 2**32, shape, np.uint32)
    return DRAWS.get(role, _normal)(rng, shape)


def _fast_operands(call: FastCall, seed: int = 0) -> dict[str, np.ndarray]:
    return {
        role: _laid_out(_draw(role, layout.dtype, layout.shape, seed), layout)
        for role, layout in call.tensors
        if role not in call.written
    }


def _layer_operands(call: LayerCall, seed: int = 0) -> dict[str, np.ndarray]:
    operands = {
        name: encode(_draw(name, dtype, shape, seed), dtype) for name, (shape, dtype) in call.dense_operands.items()
    }
    for name, product in call.products.items():
        weights = random_weights(product, np.random.default_rng([seed, *name.encode()]))
        operands |= {f"{name}.{role}": array for role, array in weights.items()}
    return operands
