"""Compares what the kernels of a call wrote with float64 on the exact weights, or with mlx's codes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from calls import FILLING, ITEM_BYTES, NUMPY, Call
from fast_calls import AnyCall, FastCall, LayerCall
from fast_check import compare_fast, compare_layer

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

import oracle

# Of a large product, the first and the last columns and rows are compared.
CHECKED_COLUMNS, CHECKED_ROWS = 128, 16


def tensor(array: np.ndarray, dtype: str) -> Tensor:
    if dtype == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def compare(call: AnyCall, operands: dict[str, np.ndarray], results: dict[str, np.ndarray], expected=None) -> float:
    """The largest error as a share of what is allowed. Raises AssertionError where something is wrong by itself.

    expected: of quantize, its results by role.
    """
    if isinstance(call, FastCall):
        return compare_fast(call, operands, results)
    if isinstance(call, LayerCall):
        return compare_layer(call, operands, results)
    if call.op == "quantize":
        for role, array in expected.items():
            differs = results[role].view(np.uint8) != array.view(np.uint8)
            assert not differs.any(), f"{role}: {differs.sum()} of {differs.size} bytes differ from what is expected"
        return 0.0
    if call.op == "dequantize":
        return _compare_dequantized(call, operands, tensor(results["y"], call.dtype))
    return _compare_product(call, operands, results["y"])


def _share(error: Tensor, bound: Tensor) -> float:
    if error.numel() == 0:
        return 0.0
    share = (error / bound.clamp_min(1e-300)).max().item()
    return share if share == share else float("inf")


# --- Matrices ---------------------------------------------------------------------------------------------------------


def _format(call: Call) -> oracle.Format:
    return oracle.Format(call.mode, call.group_size, call.bits)


def dense(call: Call, operands: dict[str, np.ndarray], columns: slice | None = None) -> Tensor:
    """float64 w [.., n, k] or [.., k, n], exact. columns: of the product, whole groups where groups lie along them."""
    columns = columns or slice(0, call.n * (2 if call.activation else 1))
    parts = {"w": operands["w"][call.offset :].reshape(call.words_shape)}
    parts |= {role: operands[role] for role in ("scales", "biases") if role in operands}
    elements = {"w": 32 / call.bits, "scales": call.group_size, "biases": call.group_size}
    for role, array in parts.items():
        if call.transpose:
            parts[role] = array[..., columns, :]
        elif call.is_column_packed:
            parts[role] = array[..., columns]
        else:
            parts[role] = array[..., int(columns.start / elements[role]) : int(columns.stop / elements[role])]
    words, scales = torch.from_numpy(np.ascontiguousarray(parts["w"])), tensor(parts["scales"], call.scale_dtype)
    biases = tensor(parts["biases"], call.scale_dtype) if "biases" in parts else None
    factor = torch.from_numpy(operands["global_scale"]) if call.global_scale else None
    return oracle.dequantize(words, scales, biases, _format(call), factor)


def _compare_dequantized(call: Call, operands: dict[str, np.ndarray], y: Tensor) -> float:
    """One rounding to the type of y, and float32's roundings of the product and the sum."""
    reference = dense(call, operands)
    size = reference.abs()
    if call.mode == "affine":
        size = size + 2 * tensor(operands["biases"], call.dtype).double().abs().repeat_interleave(call.group_size, -1)
    info = torch.finfo(y.dtype)
    smallest = info.smallest_normal * info.eps
    bound = info.eps / 2 * reference.abs() + 2 * torch.finfo(torch.float32).eps * size + smallest
    return _share((y.double() - reference).abs(), bound)


# --- Products ---------------------------------------------------------------------------------------------------------


def rows_of_x(call: Call, operands: dict[str, np.ndarray]) -> Tensor:
    """x in its shape, without what lies between its rows."""
    stored = np.pad(operands["x"][call.offset :], (0, call.x_padding))
    x = stored.reshape(*call.x_shape[:-1], call.k + call.x_padding)[..., : call.k]
    return tensor(np.ascontiguousarray(x), call.dtype)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
}


def _compare_gated(call: Call, operands: dict[str, np.ndarray], y: np.ndarray) -> float:
    """What gates and values may be wrong by, as results of a product each, and one rounding."""
    x, out = rows_of_x(call, operands), tensor(y.reshape(call.y_shape), call.dtype)
    worst = 0.0
    for columns in _ends(call.n, CHECKED_COLUMNS, 2 * CHECKED_COLUMNS):
        of_values = slice(call.n + columns.start, call.n + columns.stop)
        gate_matrix, value_matrix = (dense(call, operands, half).mT for half in (columns, of_values))
        gates, values = x.double() @ gate_matrix, x.double() @ value_matrix
        activated = ACTIVATIONS[call.activation](gates)
        of_gates, bound = (oracle.error_bound(x, matrix, x.dtype) for matrix in (gate_matrix, value_matrix))
        exact = activated * values
        # No activation is steeper than 1.13.
        allowed = 1.13 * of_gates * (values.abs() + bound) + activated.abs() * bound
        rounding = 2 * torch.finfo(x.dtype).eps * exact.abs() + 1e-6
        worst = max(worst, _share((out[..., columns].double() - exact).abs(), allowed + rounding))
    return worst


def _compare_product(call: Call, operands: dict[str, np.ndarray], y: np.ndarray) -> float:
    if call.activation:
        return _compare_gated(call, operands, y)
    x = rows_of_x(call, operands).reshape(-1, *call.x_shape[-2:])
    y = y.reshape(-1, *call.y_shape[-2:])
    worst = 0.0
    for columns in _ends(call.n, CHECKED_COLUMNS, 2 * CHECKED_COLUMNS):
        matrices = dense(call, operands, columns)
        matrices = matrices.mT if call.transpose else matrices
        for position, (left, right) in enumerate(_pairs(call, operands)):
            out = y[position][:, columns]
            if left is None or right is None:
                _assert_nan(out, call.dtype, position)
                continue
            matrix = matrices[right] if matrices.dim() > 2 else matrices
            for rows in _ends(out.shape[0], CHECKED_ROWS, 64):
                values = x[left][rows]
                error = (tensor(np.ascontiguousarray(out[rows]), call.dtype).double() - values.double() @ matrix).abs()
                worst = max(worst, _share(error, oracle.error_bound(values, matrix, values.dtype)))
    return worst


def _ends(size: int, part: int, small: int) -> list[slice]:
    return [slice(0, size)] if size <= small else [slice(0, part), slice(size - part, size)]


def _assert_nan(out: np.ndarray, dtype: str, position: int) -> None:
    filling = np.frombuffer(bytes([FILLING]) * ITEM_BYTES[dtype], NUMPY.get(dtype, dtype)).view(f"u{ITEM_BYTES[dtype]}")
    written = np.ascontiguousarray(out).view(filling.dtype) != filling
    values = tensor(np.ascontiguousarray(out), dtype)
    assert written.all() and values.isnan().all(), f"pair {position} has an index out of range, and results"


def _pairs(call: Call, operands: dict[str, np.ndarray]) -> Iterator[tuple[int | None, int | None]]:
    """The matrices of x and of w for each matrix of y; None: out of range."""
    if not call.experts:
        yield from ((position, position) for position in range(call.batch))
        return
    for left, right in zip(operands["lhs_indices"].tolist(), operands["rhs_indices"].tolist(), strict=True):
        yield left if 0 <= left < call.pairs else None, right if 0 <= right < call.experts else None
