"""Whole models: their layers are quantized in place, and made floating-point again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ..formats import Format, complete_format
from ..nn.conv1d import as_conv1d, as_linear, is_conv1d, stands_for_conv1d
from ..nn.embedding import QuantizedEmbedding, row_scale
from ..nn.linear import QuantizedLinear
from ..nn.module import PackedModule, QuantizedModule
from ..nn.obstacles import copy_hooks, move_hooks
from ..nn.switch import QuantizedSwitchLinear, SwitchLinear
from ..optional import progress
from .recipes import mixed_recipe
from .replacement import (
    Left,
    OnLayer,
    Refusal,
    Replacement,
    float_weights,
    parameter_count,
    reason_of_class,
    replace_layers,
    shared_refusals,
    warn_of_float_weights,
    why_not,
)
from .report import QuantizationReport

Predicate = Callable[[str, nn.Module], "bool | Format"]


def quantize_model(
    model: nn.Module,
    group_size: int | None = None,
    bits: int | None = None,
    mode: str = "affine",
    predicate: Predicate | str | None = None,
    on_layer: OnLayer | None = None,
    report: QuantizationReport | None = None,
) -> nn.Module:
    """Quantizes the `nn.Linear` and `nn.Embedding` layers, the `Conv1D` ones of Transformers and the fused experts of
    `model` in place, one after the other, and returns it.

    Fused experts of Transformers count as layers `….experts.gate_proj`, `up_proj` and `down_proj`, of type
    `SwitchLinear`, and become `QuantizedSwitchLinear`; `quantization_mlx.experts` has both. A `Conv1D` becomes a
    `QuantizedLinear` of the transposed weight. Embeddings that scale their rows, as Gemma's do, are quantized. Layers
    that share a weight, as tied embeddings do, go on sharing one packed copy; the first decides for all.

    Forward and backward hooks move to the quantized layer. Left alone are layers whose rows do not divide into groups,
    subclasses, which may compute something else, and layers with what a quantized one has not: `max_norm`,
    `scale_grad_by_freq`, parametrizations, a forward of their own, hooks on the state_dict, weights of other dtypes or
    tensor types; and so is a layer that shares its weight with one. `report.skipped` has them and all other matrices
    that remain in floating point, with the reasons; a warning lists the first ones if they are 1 % of the parameters
    or more, those aside that the predicate has refused.

    Args:
        model: any module; a layer by itself is not changed, its quantized form is returned.
        group_size, bits, mode: the format; what is None takes the mode's default.
        predicate: called with the path and the layer; a false value leaves the layer alone, a dict with any of
            group_size, bits and mode quantizes it in that format, and any other true value in the common one. The
            name of a mixed recipe, such as "mixed_4_6", stands for `mixed_recipe(name, model, group_size)`.
        on_layer: called with the path, the weight [..., rows, columns] and the quantized module of each layer, while
            both exist.
        report: gets the error of each layer, and what remains in floating point.

    Raises:
        TypeError: the predicate is no function, or returns a string, or a dict with other keys; the message names the
            layer.
        ValueError: the format or the recipe is not supported.
    """
    default = _checked_format("[quantize_model]", {"group_size": group_size, "bits": bits, "mode": mode})
    if predicate is not None and not isinstance(predicate, str) and not callable(predicate):
        raise TypeError(f"[quantize_model] predicate is {predicate!r}; it must be a function or a recipe's name")
    if isinstance(predicate, str):
        if mode != "affine":
            raise ValueError(f"[quantize_model] the recipe {predicate!r} is for mode 'affine', not for {mode!r}")
        predicate = mixed_recipe(predicate, model, default["group_size"])

    def format_of(path: str, layer: nn.Module) -> Format | Refusal:
        choice = True if predicate is None else predicate(path, layer)
        if not choice:
            return Refusal("refused by the predicate", is_asked_for=True)
        if isinstance(choice, str):
            raise TypeError(f"[quantize_model] the predicate gives {choice!r} for {path!r}; wanted: a truth or a dict")
        chosen = default
        if isinstance(choice, Mapping):
            chosen = _checked_format(f"[quantize_model] the predicate's dict for {path!r}:", {"mode": mode, **choice})
        columns = as_linear(layer).weight.shape[-1]
        if columns % chosen["group_size"]:
            return Refusal(f"a row of {columns} values does not divide into groups of {chosen['group_size']}")
        return chosen

    def collect(path: str, weight: torch.Tensor, quantized: nn.Module) -> None:
        for each in (on_layer, report.add if report is not None and report.with_errors else None):
            if each is not None:
                each(path, weight, quantized)

    from ..hf.experts import unfused

    with unfused(model):
        done = replace_quantized(model, format_of, _quantized, collect)
        left, parameters = float_weights(done.model, done.refusals), parameter_count(done.model)
    if report is not None:
        report.skip(left, parameters)
    warn_of_float_weights("quantize_model", left, parameters)
    return done.model


def dequantize_model(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Puts floating-point layers in the place of the quantized ones of `model`, in place, and returns it.

    Layers that share a packed weight share the floating-point one.

    Args:
        model: with layers of `quantize_model` or of `quantization_mlx.marlin`; a layer by itself is not changed, its
            floating-point form is returned.
        dtype: of the weights that are made; that of each layer's `weight` if None.
    """
    dense: dict[int, nn.Parameter] = {}  # by the identity of the packed words
    done: dict[int, nn.Module] = {}  # by the identity of the layer, which may have several paths
    for path, layer in list(model.named_modules(remove_duplicate=False)):
        if not isinstance(layer, PackedModule):
            continue
        if id(layer) in done:
            model.set_submodule(path, done[id(layer)])
            continue
        bias, made = getattr(layer, "bias", None), layer.dequantize()
        made._stands_for_conv1d = stands_for_conv1d(layer)
        if dtype not in (None, made.weight.dtype):  # rounded once, from the packed values
            packed = layer.packed()
            values = packed.dequantize(dtype).detach()
            made.weight = nn.Parameter(values.mT.contiguous() if packed.by_columns else values)
        made = as_conv1d(made)
        made.weight = dense.setdefault(id(layer.packed().words), made.weight)
        done[id(layer)] = made
        if not path:
            copy_hooks(layer, made)
            return made
        if bias is not None:
            made.bias = bias
        move_hooks(layer, made)
        model.set_submodule(path, made)
    from ..checkpoint.record import MARLIN_METHOD, MARLIN_RECORD, MLX_METHOD
    from ..hf.experts import fuse

    fuse(model)
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and quantizer.quantization_config.quant_method in (MLX_METHOD, MARLIN_METHOD):
        quantizer.remove_quantization_config(model)
    for module in model.modules():
        if getattr(config := getattr(module, "config", None), "quantization_config", None) == MARLIN_RECORD:
            del config.quantization_config  # what is saved from now on is in floating point
    return model


# Formats


def _checked_format(where: str, given: Mapping[str, Any]) -> Format:
    """The format that is given in part; errors begin with `where`."""
    if unknown := [key for key in given if key not in ("group_size", "bits", "mode")]:
        keys = ", ".join(map(repr, unknown))
        raise TypeError(f"{where} unknown key {keys}; supported are 'group_size', 'bits' and 'mode'")
    try:
        return complete_format(**given)
    except ValueError as error:
        raise ValueError(f"{where} {error}") from error


def format_of_layer(module: QuantizedModule) -> Format:
    return {"group_size": module.group_size, "bits": module.bits, "mode": module.mode}


# Layers


def _quantized(layer: nn.Linear | nn.Embedding | SwitchLinear, format: Format) -> QuantizedModule:
    if isinstance(layer, SwitchLinear):
        return QuantizedSwitchLinear.from_switch_linear(layer, **format)
    if isinstance(layer, nn.Linear):
        return QuantizedLinear.from_linear(layer, **format)
    return QuantizedEmbedding.from_embedding(layer, **format)


def shell_of(
    layer: nn.Linear | nn.Embedding | SwitchLinear, format: Format, dtype: torch.dtype | None
) -> QuantizedModule:
    """A quantized layer of the same sizes that waits for its tensors."""
    if isinstance(layer, SwitchLinear):
        return QuantizedSwitchLinear.shell(layer, dtype, **format)
    if isinstance(layer, nn.Linear):
        has_bias = layer.bias is not None
        return QuantizedLinear(layer.in_features, layer.out_features, has_bias, **format, device="meta", dtype=dtype)
    sizes = (layer.num_embeddings, layer.embedding_dim)
    return QuantizedEmbedding(*sizes, **format, device="meta", dtype=dtype, scale=row_scale(layer))


def replace_quantized(
    model: nn.Module,
    format_of: Callable[[str, nn.Module], Format | Refusal],
    convert: Callable[[Any, Format], QuantizedModule],
    on_layer: OnLayer | None = None,
) -> Replacement:
    """Puts convert(layer, format) in the place of every layer that has a format and can be replaced."""

    def choose(holders: Mapping[str, nn.Module]) -> Format | Left:
        reasons = {path: _refusal(path, layer) for path, layer in holders.items()}
        if (left := shared_refusals(holders, reasons)) is not None:
            return left
        format = format_of(*next(iter(holders.items())))
        return Left(dict.fromkeys(holders, format)) if isinstance(format, Refusal) else format

    return replace_layers(model, choose, convert, _tied, on_layer, progress)


def _refusal(path: str, layer: nn.Module) -> Refusal | None:
    """Why a module that holds a weight is left alone whatever its format would be."""
    if type(layer) in (nn.Linear, SwitchLinear) or is_conv1d(layer) or row_scale(layer) is not None:
        reason = why_not(path, layer)
    else:
        reason = reason_of_class(path, layer)
    return None if reason is None else Refusal(reason)


def _tied(
    layer: nn.Linear | nn.Embedding, twin: QuantizedLinear | QuantizedEmbedding
) -> QuantizedLinear | QuantizedEmbedding:
    """`layer` on the packed weight of `twin`, which had the same floating-point weight."""
    tied = shell_of(layer, format_of_layer(twin), layer.weight.dtype)
    tied.share(twin)
    if isinstance(tied, QuantizedLinear):
        tied.bias = layer.bias
    return tied.train(layer.training)
