"""The replacement of a model's layers by quantized ones: which can be replaced, what is kept of them, and what remains.

A quantized layer takes over the weight, the bias and the hooks. A layer whose forward pass depends on more is left
alone, with the reason. Every matrix that remains in floating point is counted and named.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ..hf import compat
from ..messages import listed
from ..nn.conv1d import as_linear, is_conv1d, stands_for_conv1d
from ..nn.module import PackedModule
from ..nn.obstacles import FLOATS, move_hooks, obstacle
from ..nn.switch import SwitchLinear

OnLayer = Callable[[str, torch.Tensor, Any], None]

_NOTICEABLE = 0.01  # share of the parameters whose staying in floating point is worth a warning

# Replacing


@dataclass(frozen=True)
class Refusal:
    """Why a layer is left alone, and whether the caller has asked for that."""

    reason: str
    is_asked_for: bool = False


@dataclass(frozen=True)
class FloatWeight:
    """A matrix, or several in one tensor, that remains as it was, which is in floating point as a rule.

    path: of the layer, or of the parameter where that is not the `weight` of a module. shape: of the tensor.
    parameters: how many; 0 where an earlier one is the same tensor, and for integers.
    reason: why it was not quantized. is_asked_for: whether the caller has asked for that.
    """

    path: str
    shape: tuple[int, ...]
    parameters: int
    reason: str
    is_asked_for: bool


@dataclass(frozen=True)
class Replacement:
    """The model, or what took its place; the paths of the layers that were replaced; and of those that were not, by
    their paths, the reasons."""

    model: nn.Module
    replaced: list[str]
    refusals: Mapping[str, Refusal]


class Left(dict[str, Refusal]):
    """What `choose` returns for layers that are left alone: the reasons, by their paths."""


def replace_layers(
    model: nn.Module,
    choose: Callable[[Mapping[str, nn.Module]], Any],
    convert: Callable[[Any, Any], nn.Module],
    tie: Callable[[Any, Any], nn.Module],
    on_layer: OnLayer | None = None,
    progress: Callable[[list[Any], str], Iterable[Any]] = lambda items, what: items,
) -> Replacement:
    """Puts other modules in the place of layers of `model`, one weight after the other.

    All choices are made before the first layer changes. A float weight is let go once its last layer is replaced. The
    hooks of a layer move to what takes its place, and so does its bias.

    Args:
        model: changed in place; a layer by itself is not changed, what takes its place is returned.
        choose: called for each weight with the modules that hold it, by their paths, or by the parameter's path where
            it is not called `weight`; returns what `convert` is to make of them, or `Left` to leave them alone.
        convert: called with the first of them and that choice; returns what takes its place.
        tie: called with each further one and what took the place of the first; returns what takes its place.
        on_layer: called with the path, the weight [..., rows, columns] and what takes its layer's place, while both
            exist.
        progress: called with a list and a title; returns what to iterate over instead of the list.
    """
    compat.adapt_accelerate()
    plan, refusals = _plan(model, choose)
    replaced: list[str] = []
    for paths, choice in progress(plan, "Quantizing"):
        layers = [model.get_submodule(path) for path in paths]  # that share this weight, or are one and the same
        made: dict[int, nn.Module] = {}
        for path, layer in zip(paths, layers, strict=True):
            if id(layer) not in made:
                linear = as_linear(layer)
                twin = next(iter(made.values()), None)
                made[id(layer)] = convert(linear, choice) if twin is None else tie(linear, twin)
                made[id(layer)]._stands_for_conv1d = stands_for_conv1d(linear)
                if path:  # a layer by itself keeps its own
                    _hand_over(layer, made[id(layer)])
                if twin is None and on_layer is not None:
                    on_layer(path, linear.weight.detach(), made[id(layer)])
                del linear
            replaced.append(path)
            if not path:
                return Replacement(made[id(layer)], replaced, refusals)
            model.set_submodule(path, made[id(layer)])
    return Replacement(model, replaced, refusals)


def _hand_over(layer: nn.Module, made: nn.Module) -> None:
    """What one layer has and its replacement takes: the hooks, and the bias that an optimizer may know."""
    move_hooks(layer, made)
    if layer._parameters.get("bias") is not None and not isinstance(layer, SwitchLinear):  # those are views
        made.bias = layer.bias


def _plan(
    model: nn.Module, choose: Callable[[Mapping[str, nn.Module]], Any]
) -> tuple[list[tuple[list[str], Any]], dict[str, Refusal]]:
    """The paths of the layers to replace, those together that share a weight, with what was chosen for them; and the
    reasons for the others.

    A function of its own, because a weight that a variable still names is not let go.
    """
    holders: dict[int, dict[str, nn.Module]] = {}  # all modules with a parameter, by its identity
    layers: set[int] = set()
    for path, module in model.named_modules(remove_duplicate=False):
        for name, parameter in () if isinstance(module, PackedModule) else module._parameters.items():
            if parameter is not None:
                holders.setdefault(id(parameter), {})[path if name == "weight" else _joined(path, name)] = module
                layers.update({id(parameter)} if name == "weight" else ())
    plan, refusals = [], {}
    for identity, held in holders.items():
        if identity not in layers:
            continue
        choice = choose(held)
        if isinstance(choice, Left):
            refusals.update(choice)
        else:
            plan.append((list(held), choice))
    return plan, refusals


def why_not(path: str, layer: nn.Module, dtypes: tuple[torch.dtype, ...] = FLOATS) -> str | None:
    """Why a layer of a class that is replaced has to be left alone; None if it need not be. `dtypes` are those that its
    weight may have."""
    if path.rpartition(".")[2] == "_orig_mod":
        return "is compiled by torch.compile"  # whose code would go on calling the layer itself
    return obstacle(layer, dtypes)


def shared_refusals(holders: Mapping[str, nn.Module], reasons: Mapping[str, Refusal | None]) -> Left | None:
    """`Left` for all the holders of one weight if one of them cannot be replaced; None if all can.

    Args:
        holders: as `choose` gets them.
        reasons: by the path of a holder, why it is left alone, None if it need not be.
    """
    refused = [path for path, reason in reasons.items() if reason is not None]
    first, *_ = refused or holders
    if refused:
        shared = Refusal(f"shares its weight with {first}", reasons[first].is_asked_for)
        return Left({path: reasons[path] or shared for path in holders})
    if len({is_conv1d(layer) for layer in holders.values()}) > 1:  # rows of the one are columns of the other
        return Left({path: Refusal(f"shares its weight with {first}, which has it transposed") for path in holders})
    return None


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


# What remains


def parameter_count(model: nn.Module) -> int:
    """How many parameters `model` has; those of packed layers as many as they stand for."""
    counts: dict[int, int] = {}
    for module in model.modules():
        packed = module.packed_names if isinstance(module, PackedModule) else ()
        for name, parameter in module._parameters.items():
            if parameter is not None and name not in packed[1:] and not is_lazy(parameter):
                count = parameter.numel()
                counts[id(parameter)] = count * 32 // module.bits if name in packed else count
    return sum(counts.values())


def float_weights(model: nn.Module, refusals: Mapping[str, Refusal]) -> list[FloatWeight]:
    """The matrices of `model` that remain in floating point, norms and biases left out.

    Args:
        refusals: by the paths of layers, why they were left alone; others get a reason by their class.
    """
    found: dict[str, FloatWeight] = {}
    seen: set[int] = set()
    for path, name, module, parameter in _matrices(model, refusals):
        owner, _, part = path.partition(".parametrizations.")
        if part:  # its tensors belong to the layer that they are for
            path, module = owner, model.get_submodule(owner)
        elif name != "weight" and not isinstance(module, (nn.Linear, nn.Embedding)):
            path = _joined(path, name)
        count = 0 if id(parameter) in seen or not parameter.is_floating_point() else parameter.numel()
        seen.add(id(parameter))
        refusal = refusals.get(path) or Refusal(reason_of_class(path, module))
        if (other := found.get(path)) is None:
            found[path] = FloatWeight(path, tuple(parameter.shape), count, refusal.reason, refusal.is_asked_for)
        else:
            shape = max(other.shape, tuple(parameter.shape), key=math.prod)
            found[path] = FloatWeight(path, shape, other.parameters + count, other.reason, other.is_asked_for)
    return list(found.values())


def _matrices(model: nn.Module, refusals: Mapping[str, Refusal]) -> Iterator[tuple[str, str, nn.Module, nn.Parameter]]:
    """The path and the name, the module and the tensor of each floating-point parameter of two or more dimensions, and
    of other weights that were refused."""
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, PackedModule) or "norm" in type(module).__name__.lower():
            continue
        for name, parameter in module._parameters.items():
            if parameter is None or is_lazy(parameter) or parameter.ndim < 2 or "bias" in name:
                continue
            if parameter.is_floating_point() or (name == "weight" and path in refusals):
                yield path, name, module, parameter


def reason_of_class(path: str, module: nn.Module) -> str:
    """Why a parameter is not quantized, as far as the class of its module tells.

    Args:
        path: of the parameter, or of the module whose `weight` it is.
    """
    kind = type(module).__name__
    if path.rpartition(".")[2] in module._parameters:
        return f"a parameter of {kind}"
    if isinstance(module, (nn.Linear, nn.Embedding)):
        return obstacle(module) or f"a subclass of {'Linear' if isinstance(module, nn.Linear) else 'Embedding'}: {kind}"
    return f"a {kind}, which has no quantized form"


def share(weights: Iterable[FloatWeight], parameters: int) -> float:
    """The part of all the `parameters` of a model that these are."""
    return sum(weight.parameters for weight in weights) / max(parameters, 1)


def warn_of_float_weights(op: str, weights: Iterable[FloatWeight], parameters: int, stacklevel: int = 3) -> None:
    """Warns once if a noticeable share of the parameters remains in floating point without having been asked for."""
    unasked = sorted((each for each in weights if not each.is_asked_for), key=lambda each: -each.parameters)
    if (part := share(unasked, parameters)) >= _NOTICEABLE:
        names = listed([f"{each.path or 'the layer'}: {each.reason}" for each in unasked])
        warnings.warn(f"[{op}] {part:.1%} of the parameters stay in floating point: {names}", stacklevel=stacklevel)
