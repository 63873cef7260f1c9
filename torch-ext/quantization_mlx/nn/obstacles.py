"""What of a layer a quantized one does not take over: options and state that its forward pass depends on."""

import torch
from torch import nn
from torch.nn.utils import parametrize

from ..formats import FLOATS
from ..messages import short_name


def obstacle(layer: nn.Module, dtypes: tuple[torch.dtype, ...] = FLOATS) -> str | None:
    """Why a quantized layer, which takes over weight, bias and hooks, would not compute what `layer` does; None if it
    would. The class of the layer is not looked at. `dtypes` are those that the weight may have."""
    if (reason := next((reason for check in _CHECKS if (reason := check(layer)) is not None), None)) is not None:
        return reason
    dtype = layer._parameters["weight"].dtype
    return None if dtype in dtypes else f"its weight is {short_name(dtype)}"


def check_class(op: str, layer: nn.Module, base: type[nn.Module]) -> None:
    """Raises TypeError unless `layer` is of `base` and has its forward; `op` is what the message begins with."""
    name = type(layer).__name__
    if not isinstance(layer, base):
        wanted = f"torch.nn.{base.__name__}" if hasattr(nn, base.__name__) else base.__name__
        raise TypeError(f"[{op}] linear is of type {name}; it must be a {wanted}")
    if type(layer).forward is not base.forward:
        raise TypeError(f"[{op}] {name} has a forward of its own and may compute something else than {base.__name__}")


def check_state(op: str, layer: nn.Module, dtypes: tuple[torch.dtype, ...] = FLOATS) -> None:
    """Raises ValueError, which names it, if an option or a state of `layer` cannot be kept; `op` as in check_class,
    `dtypes` as in obstacle."""
    if (reason := obstacle(layer, dtypes)) is not None:
        raise ValueError(f"[{op}] this {type(layer).__name__} cannot be quantized: {reason}")


def _parametrized(layer: nn.Module) -> str | None:
    if parametrize.is_parametrized(layer):
        return f"has parametrizations of {', '.join(layer.parametrizations)}"
    for name in ("weight", "bias"):
        if hasattr(layer, name) and name not in layer._parameters:
            return f"has no parameter as its {name}"  # a hook computes it, as the older weight_norm does
    return None


def _weight_of_another_kind(layer: nn.Module) -> str | None:
    weight = layer._parameters.get("weight")
    if weight is None:
        return "has no weight"
    if type(weight) is not nn.Parameter:
        return f"its weight is of type {type(weight).__name__}"
    return None if weight.layout is torch.strided else f"its weight is {short_name(weight.layout)}"


def _forward_of_its_own(layer: nn.Module) -> str | None:
    if "forward" in vars(layer):
        return "has a forward of its own, not that of its class"
    return "is compiled by its method compile()" if layer._compiled_call_impl is not None else None


def _options(layer: nn.Module) -> str | None:
    if not isinstance(layer, nn.Embedding):
        return None
    # padding_idx and sparse only affect the gradient of the weight, and a packed weight has none.
    options = {name: getattr(layer, name) for name in ("max_norm", "scale_grad_by_freq")}
    given = [f"has {name}={value}" for name, value in options.items() if value is not None and value is not False]
    return ", ".join(given) or None


def _further_state(layer: nn.Module) -> str | None:
    known = {"weight", "bias", "embed_scale"}  # embed_scale: of Transformers' ScaledWordEmbedding
    held = [*layer._parameters, *layer._buffers, *layer._modules]
    further = [name for name in held if name not in known]
    return f"has further state: {', '.join(further)}" if further else None


# Hooks that see tensors which are missing or packed in a quantized layer.
_FIXED_HOOKS = {
    "_state_dict_hooks": "a state_dict hook",
    "_state_dict_pre_hooks": "a state_dict pre-hook",
    "_load_state_dict_pre_hooks": "a load_state_dict pre-hook",
    "_load_state_dict_post_hooks": "a load_state_dict post-hook",
}


def hooks_that_stay(layer: nn.Module) -> str | None:
    """Which hooks of a module cannot go with it, if it has such."""
    for table, name in _FIXED_HOOKS.items():
        if getattr(layer, table):
            return f"has {name}"
    if layer._backward_hooks and not layer._is_full_backward_hook:
        return "has a backward hook of register_backward_hook, which sees how the layer computes"
    return None


_CHECKS = (_parametrized, _weight_of_another_kind, _forward_of_its_own, _options, _further_state, hooks_that_stay)

# Hooks

HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def copy_hooks(layer: nn.Module, made: nn.Module) -> None:
    """Gives `made`, which stands beside `layer`, its forward and backward hooks."""
    for table in HOOKS:
        getattr(made, table).update(getattr(layer, table))
    made._is_full_backward_hook = layer._is_full_backward_hook


def move_hooks(layer: nn.Module, made: nn.Module) -> None:
    """Gives `made`, which takes the place of `layer`, its very tables of hooks, so that their handles remove them."""
    for table in HOOKS:
        if held := getattr(layer, table):
            held.update({key: hook for key, hook in getattr(made, table).items() if key not in held})
            setattr(made, table, held)
    made._is_full_backward_hook = layer._is_full_backward_hook
