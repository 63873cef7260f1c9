"""The one way in which layers of a model are replaced: which can be, what is kept of them, and what remains.

A packed layer takes over the weight, the bias and the hooks. A layer whose forward pass depends on more is left alone,
with the reason. Every matrix that remains in floating point is counted and named.
"""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ..formats import FLOATS
from ..messages import listed
from ..nn.conv1d import as_linear, conv1d_of, is_conv1d
from ..nn.embedding import row_scale
from ..nn.module import PackedModule
from ..nn.obstacles import move_hooks, obstacle
from ..nn.switch import SwitchLinear
from ..optional import progress

OnLayer = Callable[[str, torch.Tensor, Any], None]
Kinds = tuple[tuple[type[nn.Module], type[PackedModule]], ...]

_NOTICEABLE = 0.01  # warn if this share of the parameters stays in floating point

# Context managers that `surgery` enters; `hf` adds its own for Transformers' models.
integrations: list[Callable[[nn.Module], AbstractContextManager[None]]] = []


@contextmanager
def surgery(model: nn.Module) -> Iterator[None]:
    """Within, layers of `model` may be replaced, and fused experts have theirs as children; for `replace_layers`."""
    with ExitStack() as stack:
        for integration in integrations:
            stack.enter_context(integration(model))
        yield


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
    """What `replace_layers` did.

    model: the model, or what took its place. replaced: the paths of the layers that were replaced.
    refusals: by the paths of those that were not, the reasons. left: what remains in floating point.
    parameters: how many the model has; those of packed layers as many as they stand for.
    """

    model: nn.Module
    replaced: list[str]
    refusals: Mapping[str, Refusal]
    left: list[FloatWeight]
    parameters: int

    def warn(self, op: str) -> None:
        """Warns once, the caller of `op`, if a noticeable share of the parameters remains in floating point without
        having been asked for."""
        unasked = sorted((each for each in self.left if not each.is_asked_for), key=lambda each: -each.parameters)
        if (part := share(unasked, self.parameters)) >= _NOTICEABLE:
            names = listed([f"{each.path or 'the layer'}: {each.reason}" for each in unasked])
            warnings.warn(f"[{op}] {part:.1%} of the parameters stay in floating point: {names}", stacklevel=3)


def replace_layers(
    model: nn.Module,
    refuse: Callable[[str, nn.Module], Refusal | None],
    choose: Callable[[str, Any], Any],
    kinds: Kinds,
    op: str | None = None,
    on_layer: OnLayer | None = None,
) -> Replacement:
    """Puts packed layers in the place of layers of `model`, one weight after the other, within `surgery(model)`.

    All choices are made before the first layer changes. A float weight is let go once its last layer is replaced. The
    hooks of a layer move to what takes its place, and so does its bias. Layers that share a weight share what it
    becomes, or are all left alone.

    Args:
        model: changed in place; a layer by itself is not changed, what takes its place is returned.
        refuse: called with each module that has a parameter in common with a `weight`, and its path, or that of the
            parameter where it is not called `weight`; returns why it cannot be replaced, None if it can.
        choose: called with the first of those that share a weight; returns the options by which the constructors of
            `kinds` pack it, or a Refusal.
        kinds: the classes of layers, and of what takes their places.
        op: what errors name; None makes layers that wait for their tensors.
        on_layer: called with the path, the weight [..., rows, columns] and what takes its layer's place, while both
            exist.
    """
    plan, refusals = _plan(model, refuse, choose)
    replaced: list[str] = []
    for paths, options in progress(plan, "Quantizing"):
        layers = [model.get_submodule(path) for path in paths]  # sharing one weight; may be the same layer twice
        made: dict[int, PackedModule] = {}
        for path, layer in zip(paths, layers, strict=True):
            if id(layer) not in made:
                linear = as_linear(layer)
                kind = next(packed for kind, packed in kinds if isinstance(linear, kind))
                twin = next(iter(made.values()), None)
                if twin is None and op is not None:
                    made[id(layer)] = kind.quantized(op, linear, None, **options)
                else:
                    made[id(layer)] = kind.shell(linear, linear.weight.dtype, **options)
                if twin is not None:
                    _tie(made[id(layer)], linear, twin)
                made[id(layer)].conv1d_class = conv1d_of(linear)
                if path:  # a lone layer is not changed
                    _hand_over(layer, made[id(layer)])
                if twin is None and on_layer is not None:
                    on_layer(path, linear.weight.detach(), made[id(layer)])
                del linear
            replaced.append(path)
            if path:
                model.set_submodule(path, made[id(layer)])
            else:
                model = made[id(layer)]
    return Replacement(model, replaced, refusals, _float_weights(model, refusals), _parameter_count(model))


def _tie(made: PackedModule, layer: nn.Module, twin: PackedModule) -> None:
    """Gives `made` the packed tensors of `twin`, which had the same floating-point weight as `layer`."""
    made.share(twin)
    if getattr(layer, "bias", None) is not None:
        made.bias = layer.bias
    made.train(layer.training)


def _hand_over(layer: nn.Module, made: nn.Module) -> None:
    """What one layer has and its replacement takes: the hooks, and the bias that an optimizer may know."""
    move_hooks(layer, made)
    bias = layer._parameters.get("bias")
    if bias is not None and not isinstance(layer, SwitchLinear):  # whose bias is a view
        made.bias = bias


def _plan(
    model: nn.Module, refuse: Callable[[str, nn.Module], Refusal | None], choose: Callable[[str, Any], Any]
) -> tuple[list[tuple[list[str], Any]], dict[str, Refusal]]:
    """The paths of the layers to replace, those together that share a weight, with what was chosen for them; and the
    reasons for the others.

    A function of its own, because a weight that a variable still names is not let go.
    """
    holders: dict[int, dict[str, nn.Module]] = {}  # id of a parameter -> path -> module that has it
    layers: set[int] = set()
    for path, module in model.named_modules(remove_duplicate=False):
        for name, parameter in () if isinstance(module, PackedModule) else module._parameters.items():
            if parameter is not None:
                holders.setdefault(id(parameter), {})[path if name == "weight" else _joined(path, name)] = module
                layers.update({id(parameter)} if name == "weight" else ())
    plan, refusals = [], {}
    for held in (held for identity, held in holders.items() if identity in layers):
        refused = _refusals(held, {path: refuse(path, layer) for path, layer in held.items()})
        choice = None if refused else choose(*next(iter(held.items())))
        if isinstance(choice, Refusal):
            refused = dict.fromkeys(held, choice)
        refusals.update(refused)
        if not refused:
            plan.append((list(held), choice))
    return plan, refusals


def _refusals(held: Mapping[str, nn.Module], reasons: Mapping[str, Refusal | None]) -> dict[str, Refusal]:
    """The reasons for all modules that hold one weight if one of them cannot be replaced, else none. `reasons` has by
    the path of each why it is left alone, None if it need not be."""
    refused = [path for path, reason in reasons.items() if reason is not None]
    first, *_ = refused or held
    if refused:
        shared = Refusal(f"shares its weight with {first}", reasons[first].is_asked_for)
        return {path: reasons[path] or shared for path in held}
    if len({is_conv1d(layer) for layer in held.values()}) > 1:  # one has it transposed
        return dict.fromkeys(held, Refusal(f"shares its weight with {first}, which has it transposed"))
    return {}


def class_refusal(
    path: str, layer: nn.Module, dtypes: tuple[torch.dtype, ...] = FLOATS, embeddings: bool = True
) -> Refusal | None:
    """Why a module that holds a weight is left alone whatever its format would be; None if it need not be. `dtypes` are
    those that its weight may have, and `embeddings` tells whether these are replaced, too."""
    if type(layer) in (nn.Linear, SwitchLinear) or is_conv1d(layer) or (embeddings and row_scale(layer) is not None):
        reason = why_not(path, layer, dtypes)
    else:
        reason = reason_of_class(path, layer)
    return None if reason is None else Refusal(reason)


def why_not(path: str, layer: nn.Module, dtypes: tuple[torch.dtype, ...] = FLOATS) -> str | None:
    """Why a layer of a class that is replaced has to be left alone; None if it need not be. `dtypes` are those that its
    weight may have."""
    if path.rpartition(".")[2] == "_orig_mod":
        return "is compiled by torch.compile"  # compiled code would go on calling the old layer
    return obstacle(layer, dtypes)


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


# What remains


def _parameter_count(model: nn.Module) -> int:
    counts: dict[int, int] = {}
    for module in model.modules():
        packed = module.packed_names if isinstance(module, PackedModule) else ()
        for name, parameter in module._parameters.items():
            if parameter is not None and name not in packed[1:] and not is_lazy(parameter):
                count = parameter.numel()
                counts[id(parameter)] = count * 32 // module.bits if name in packed else count
    return sum(counts.values())


def _float_weights(model: nn.Module, refusals: Mapping[str, Refusal]) -> list[FloatWeight]:
    """The matrices of `model` that remain in floating point, norms and biases left out; those without a refusal get a
    reason by their class."""
    found: dict[str, FloatWeight] = {}
    seen: set[int] = set()
    for path, name, module, parameter in _matrices(model, refusals):
        owner, _, part = path.partition(".parametrizations.")
        if part:  # tensors of a parametrization count for their layer
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
    """Why a parameter is not quantized, as far as the class of its module tells. `path` is that of the parameter, or of
    the module whose `weight` it is."""
    kind = type(module).__name__
    if path.rpartition(".")[2] in module._parameters:
        return f"a parameter of {kind}"
    if isinstance(module, (nn.Linear, nn.Embedding)):
        return obstacle(module) or f"a subclass of {'Linear' if isinstance(module, nn.Linear) else 'Embedding'}: {kind}"
    return f"a {kind}, which has no quantized form"


def share(weights: Iterable[FloatWeight], parameters: int) -> float:
    """The part of all the `parameters` of a model that these are."""
    return sum(weight.parameters for weight in weights) / max(parameters, 1)
