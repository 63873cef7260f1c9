"""Whole models: their layers are quantized in place, and made floating-point again."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ..formats import Format, complete_format
from ..nn.conv1d import as_conv1d, as_linear, conv1d_of
from ..nn.embedding import QuantizedEmbedding
from ..nn.linear import QuantizedLinear
from ..nn.module import PackedModule
from ..nn.obstacles import copy_hooks, move_hooks
from ..nn.switch import QuantizedSwitchLinear, SwitchLinear
from .recipes import mixed_recipe
from .replacement import OnLayer, Refusal, class_refusal, replace_layers, surgery
from .report import QuantizationReport

Predicate = Callable[[str, nn.Module], "bool | Format"]
KINDS = ((SwitchLinear, QuantizedSwitchLinear), (nn.Linear, QuantizedLinear), (nn.Embedding, QuantizedEmbedding))


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
    `SwitchLinear`, and become `QuantizedSwitchLinear`; `nn/switch.py` has both. A `Conv1D` becomes a
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

    with surgery(model):
        done = replace_layers(model, class_refusal, format_of, KINDS, "quantize_model", collect)
    if report is not None:
        report.skip(done.left, done.parameters)
    done.warn("quantize_model")
    return done.model


def dequantize_model(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Puts floating-point layers in the place of the quantized ones of `model`, in place, and returns it.

    Layers that share a packed weight share the floating-point one.

    Args:
        model: with layers of `quantize_model` or of `quantization_mlx.marlin`; a layer by itself is not changed, its
            floating-point form is returned.
        dtype: of the weights that are made; that of each layer's `weight` if None.
    """
    dense: dict[int, nn.Parameter] = {}  # by the id of the packed words
    done: dict[int, nn.Module] = {}  # by the id of the layer, which may have several paths
    with surgery(model):
        for path, layer in list(model.named_modules(remove_duplicate=False)):
            if not isinstance(layer, PackedModule):
                continue
            if id(layer) not in done:
                bias, made = getattr(layer, "bias", None), layer.dequantize(dtype)
                made.conv1d_class = conv1d_of(layer)
                made = done[id(layer)] = as_conv1d(made)
                made.weight = dense.setdefault(id(layer.packed().words), made.weight)
                if not path:
                    copy_hooks(layer, made)
                    return made
                if bias is not None:
                    made.bias = bias
                move_hooks(layer, made)
            model.set_submodule(path, done[id(layer)])
    return model


def _checked_format(where: str, given: Mapping[str, Any]) -> Format:
    """The format that is given in part; errors begin with `where`."""
    if unknown := [key for key in given if key not in ("group_size", "bits", "mode")]:
        keys = ", ".join(map(repr, unknown))
        raise TypeError(f"{where} unknown key {keys}; supported are 'group_size', 'bits' and 'mode'")
    try:
        return complete_format(**given)
    except ValueError as error:
        raise ValueError(f"{where} {error}") from error
