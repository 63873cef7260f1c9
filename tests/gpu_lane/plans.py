"""The plans that ship, for the calls of the lane: quantization_mlx.explain on tensors without data."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch

import quantization_mlx as qm
from calls import Call

# An Apple GPU without tensor operations, which NVIDIA's GPUs have no equal of, and with as many cores as an H100 or
# H200 has multiprocessors: how far a product is cut up depends on it.
GPU = "applegpu_g14d/132"


def _empty(shape: tuple[int, ...], dtype: str, offset: int = 0) -> torch.Tensor:
    flat = torch.empty(offset + math.prod(shape), dtype=getattr(torch, dtype), device="meta")
    return flat[offset:].view(shape)


def _operands(call: Call) -> dict[str, Any]:
    scales = _empty(call.groups_shape, call.scale_dtype)
    padded = (*call.x_shape[:-1], call.k + call.x_padding)
    return {
        "w": _empty(call.words_shape, "uint32", call.offset),
        "scales": scales,
        "biases": torch.empty_like(scales) if call.has_biases else None,
        "x": _empty(padded, call.dtype, call.offset)[..., : call.k],
        "indices": _empty((call.pairs,), "int64"),
        "dense": _empty(call.w_shape, call.dtype, call.offset),
    }


@cache
def plan_of(call: Call) -> qm.Plan:
    operands = _operands(call)
    format: dict[str, Any] = {"group_size": call.group_size, "bits": call.bits, "mode": call.mode}
    if call.global_scale:
        format["global_scale"] = _empty((max(call.experts, 1),), "float32")
    weights = tuple(operands[name] for name in ("w", "scales", "biases"))
    if call.op == "quantize":
        arguments, more = (operands["dense"],), {}
    elif call.op == "dequantize":
        arguments, more = weights, {"dtype": getattr(torch, call.dtype)}
    elif call.op == "quantized_matmul":
        arguments, more = (operands["x"], *weights), {"transpose": call.transpose}
    else:
        indices = (None if call.sorted else operands["indices"], operands["indices"])
        arguments = (operands["x"], *weights, *indices)
        more = {"transpose": call.transpose, "sorted_indices": call.sorted}
    [plan] = qm.explain(getattr(qm, call.op), *arguments, gpu=GPU, **format, **more)
    return plan
