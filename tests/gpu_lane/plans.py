"""The plans that ship, for the calls of the lane: quantization_mlx.explain on tensors without data."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch

import quantization_mlx as qm
from calls import Call
from fast_calls import AnyCall, FastCall, LayerCall, Layout
from quantization_mlx import fast
from quantization_mlx._ops import ops

# Apple GPUs without tensor operations, which NVIDIA's GPUs have no equal of; the first with as many cores as an H100 or
# H200 has multiprocessors: how far a call is cut up depends on it.
GPU, LAYER_GPU = "applegpu_g14d/132", "applegpu_g15s"


def _empty(shape: tuple[int, ...], dtype: str, offset: int = 0) -> torch.Tensor:
    flat = torch.empty(offset + math.prod(shape), dtype=getattr(torch, dtype), device="meta")
    return flat[offset:].view(shape)


@cache
def plan_of(call: AnyCall) -> qm.Plan:
    if isinstance(call, LayerCall):
        return _layer_plan(call)
    [plan] = _fast_plans(call) if isinstance(call, FastCall) else _product_plans(call)
    return plan


# --- Products and conversions -----------------------------------------------------------------------------------------


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


def _product_plans(call: Call) -> list[qm.Plan]:
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
    elif call.op == "quantized_gated_matmul":
        arguments, more = (operands["x"], *weights), {"activation": call.activation}
    else:
        indices = (None if call.sorted else operands["indices"], operands["indices"])
        arguments = (operands["x"], *weights, *indices)
        more = {"transpose": call.transpose, "sorted_indices": call.sorted}
    op = getattr(fast if call.activation else qm, call.op)
    return qm.explain(op, *arguments, gpu=GPU, **format, **more)


# --- Fast ops ---------------------------------------------------------------------------------------------------------

Tensors, Options = dict[str, torch.Tensor], dict[str, Any]


def _rope(t: Tensors, o: Options) -> torch.Tensor:
    options = {name: o[name] for name in ("traditional", "base", "scale")}
    return fast.rope(t["x"], o["dims"], **options, offset=t.get("offsets", o["offset"]), freqs=t.get("freqs"))


def _rope_into_cache(t: Tensors, o: Options) -> torch.Tensor:
    inputs = (t["x"], t.get("cosines"), t.get("sines"), t["keys"], t["values"], o["position"])
    return fast.rope_into_cache(
        *inputs, **{name: t.get(name) for name in ("bias", "query_norm", "key_norm")}, eps=o["eps"]
    )


def _resample_image(t: Tensors, o: Options) -> torch.Tensor:
    size, names = (o["height"], o["width"]), ("mode", "antialias", "scale", "channels_last")
    options = {name: o[name] for name in names}
    return fast.resample_image(t["x"], size, mean=t.get("bias"), std=t.get("weight"), **options)


def _attention(t: Tensors, o: Options) -> torch.Tensor:
    options = {"scale": o["scale"], "window": o["window"], "sinks": t.get("sinks")}
    mask = "causal" if o["causal"] else t.get("mask")
    return fast.scaled_dot_product_attention(t["queries"], t["keys"], t["values"], mask=mask, **options)


def _swiglu(t: Tensors, o: Options) -> torch.Tensor:
    biases = {"gate_bias": t.get("bias"), "value_bias": t.get("value_bias"), "experts": t.get("experts")}
    return fast.swiglu(t["gates"], t["values"], **biases, **o)


def _sample(t: Tensors, o: Options) -> torch.Tensor:
    rules = {name: value for name, value in o.items() if name != "seed"}
    return fast.sample(t["x"], t.get("seeds", o.get("seed")), previous=t.get("previous"), **rules)


def _router(t: Tensors, o: Options) -> tuple[torch.Tensor, torch.Tensor]:
    rules = {name: value for name, value in o.items() if name != "k"}
    return fast.moe_router(t["x"], o["k"], bias=t.get("bias"), **rules)


def _packed_attention(t: Tensors, o: Options) -> torch.Tensor:
    options = {"scale": o["scale"], "window": o["window"], "sinks": t.get("sinks")}
    options |= {"group_size": o["group_size"], "bits": o["bits"]}
    k, v = (
        (t[role], t[f"{of_scales}_scales"], t[f"{of_scales}_biases"])
        for role, of_scales in (("keys", "key"), ("values", "value"))
    )
    mask = "causal" if o["causal"] else t.get("mask")
    return fast.quantized_scaled_dot_product_attention(t["queries"], k, v, mask=mask, **options)


FUNCTIONS: dict[str, Callable[[Tensors, Options], Any]] = {
    "rms_norm": lambda t, o: fast.rms_norm(t["x"], t.get("weight"), o["eps"]),
    "layer_norm": lambda t, o: fast.layer_norm(t["x"], t.get("weight"), t.get("bias"), o["eps"]),
    "add_rms_norm": lambda t, o: fast.add_rms_norm(t["x"], t["residual"], t.get("weight"), o["eps"]),
    "swiglu": _swiglu,
    "geglu": lambda t, o: fast.geglu(t["gates"], t["values"], **o),
    "rope": _rope,
    "rope_into_cache": _rope_into_cache,
    "scaled_dot_product_attention": _attention,
    "sample": _sample,
    "resample_image": _resample_image,
    "moe_router": _router,
    "moe_combine": lambda t, o: fast.moe_combine(
        t["x"], t["weight"], **{name: t.get(name) for name in ("residual", "bias", "experts")}
    ),
    "quantized_scaled_dot_product_attention": _packed_attention,
}


def _laid_out(layout: Layout) -> torch.Tensor:
    memory = torch.empty(layout.size, dtype=getattr(torch, layout.dtype), device="meta")
    return memory.as_strided(layout.shape, layout.strides, layout.offset)


def _fast_plans(call: FastCall) -> list[qm.Plan]:
    tensors = {role: _laid_out(layout) for role, layout in call.tensors}
    return qm.explain(FUNCTIONS[call.op], tensors, call.keywords, gpu=GPU)


# --- A decoder layer --------------------------------------------------------------------------------------------------


def decoder_of(call: LayerCall, tensor: Callable[[str, tuple[int, ...], str], torch.Tensor]) -> Callable[[], Any]:
    """The step; tensor: gives an operand of a name, shape and type."""
    classes = getattr(torch.classes, ops.name)
    tensors = {name: tensor(name, shape, dtype) for name, (shape, dtype) in call.dense_operands.items()}

    def projection(name: str) -> list[Any]:
        product = call.products[name]
        groups = (product.groups_shape, product.scale_dtype)
        shapes = {"w": (product.words_shape, "uint32"), "scales": groups, "biases": groups}
        weights = (tensor(f"{name}.{role}", *shape) for role, shape in shapes.items())
        return [classes.Projection(*weights, None, product.group_size, product.bits, product.mode)]

    norms = {"attention": "first_norm", "mlp": "second_norm", "query": "query_norm", "key": "key_norm"}
    heads, *others = map(projection, call.products)
    sinks, window, softcap, rotation = None, None, None, 0
    layer = classes.DecoderLayer(
        heads,
        None,  # no latent attention
        *others,
        None,  # no mixture of experts
        {place: tensors[name] for place, name in norms.items()},
        *(sinks, 1e-6, call.dim**-0.5, window, softcap, rotation, 1.0, "silu"),
    )
    decoder = classes.Decoder([layer], tensors["last_norm"], 1e-6)
    angles = ([tensors[name].view(1, 1, -1)] for name in ("cosines", "sines"))
    caches = ([tensors["keys"]], [tensors["values"]])
    return partial(ops.decoder_step, decoder, tensors["x"].view(1, 1, -1), *angles, *caches, call.context - 1)


def _layer_plan(call: LayerCall) -> qm.Plan:
    """Of all ops that one step runs, with the names of tensors for roles."""
    gpu = f"{LAYER_GPU}/{call.cores}" if call.cores else LAYER_GPU
    plans = qm.explain(decoder_of(call, lambda name, shape, dtype: _empty(shape, dtype)), gpu=gpu)
    launches = []
    for plan, (op, wires) in zip(plans, call.wiring, strict=True):
        assert plan.op == op, (plan.op, op)
        for launch in plan.launches:
            arguments = []
            for role, element in launch.arguments:
                arguments.append((role if role in ("none", "workspace") else wires[role], element))
            launches.append(replace(launch, arguments=tuple(arguments)))
    return replace(plans[0], op=call.op, launches=tuple(launches), workspace=max(plan.workspace for plan in plans))
