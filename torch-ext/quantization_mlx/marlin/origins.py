"""The modules of Transformers that Marlin's layers are made of, and what these say about themselves."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ..families import EVERY_FAMILY, Family
from ..hf import compat
from ..nn.module import own
from ..nn.obstacles import HOOKS
from .parts import RMSNorm, Rotary

_LLAMA = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
_LATENT = ("deepseek_v3", "glm4_moe_lite")
_MIXTURES = ("mixtral", "qwen3_moe", *_LATENT)
# By the part of a decoder's layer: the model_types whose classes are known, what their names end with, and the part's
# name in `compat.DECODERS`.
_PARTS: dict[str, tuple[tuple[str, ...], tuple[str, ...], str | None]] = {
    "attention": ((*_LLAMA, "mixtral", "qwen3_moe"), ("Attention",), "attention"),
    "latent attention": (_LATENT, ("Attention",), "latent attention"),
    "mlp": ((*_LLAMA, "qwen3_moe", *_LATENT), ("MLP",), "mlp"),
    "mixture": (_MIXTURES, ("SparseMoeBlock", "MoE"), "mixture"),
    "router": (_MIXTURES, ("TopKRouter", "TopkRouter"), "router"),
    "experts": (_MIXTURES, ("Experts",), "experts"),
    "layer": ((*_LLAMA, *_MIXTURES), ("DecoderLayer",), "layer"),
    "norm": ((*_LLAMA, *_MIXTURES), ("RMSNorm",), None),
}
_NAMES: Mapping[str, tuple[str, Family]] = {
    model_type: (name, family)
    for family in EVERY_FAMILY
    for model_type, name in family.decoders.items()
    if model_type in (*_LLAMA, *_MIXTURES)
}
_SILU = ("SiLU", "SiLUActivation")
# Whose angles depend on nothing but the position.
_STATIC_ROPE = ("default", "linear", "llama3", "yarn")
# Whose attention reads the window in the config.
_WINDOW_IN_CONFIG = ("mistral", "mixtral")


def is_origin(module: Any, part: str) -> bool:
    """Whether it is of a class that is known as such a part."""
    return _class_of(module, part) is not None


def check_origin(op: str, module: Any, part: str) -> None:
    """Raises TypeError unless `module` is such a part of a known decoder's layer with the forward of its class, and
    ValueError if it has what cannot be kept: hooks or, in training, dropout."""
    model_types, suffixes, in_table = _PARTS[part]
    kind = _class_of(module, part)
    if kind is None:
        known = ", ".join(_NAMES[each][0] for each in model_types)
        raise TypeError(
            f"[{op}] module is of type {type(module).__name__}; supported are classes of Transformers whose names end "
            f"with {' or '.join(suffixes)}, of {known} models"
        )
    compat.check("from_float")
    if "forward" in vars(module) or not set(_codes(type(module).forward)) <= set(_codes(kind.forward)):
        raise TypeError(
            f"[{op}] {type(module).__name__} has a forward of its own and may compute something else than "
            f"{kind.__name__}"
        )
    if in_table is not None and not compat.is_known_part(module, in_table):
        raise TypeError(f"[{op}] this {kind.__name__} differs from the known ones in its attributes or submodules")
    if any(getattr(module, table) for table in HOOKS):
        raise ValueError(f"[{op}] this {kind.__name__} has hooks, which cannot be kept")
    for name in ("attention_dropout", "jitter_noise"):
        if module.training and getattr(module, name, 0):
            raise ValueError(
                f"[{op}] this {kind.__name__} is in training and has {name} {getattr(module, name)}, which is not "
                "supported; eval() ends that"
            )


def _codes(function: Any) -> Iterator[Any]:
    """The code of a function and of those that it wraps: Transformers wraps that of each subclass of a layer anew."""
    while function is not None:
        yield function.__code__
        function = getattr(function, "__wrapped__", None)


def _class_of(module: Any, part: str) -> type | None:
    """The known class that `module` is of, if it is such a part."""
    model_types, suffixes, _ = _PARTS[part]
    for kind in type(module).__mro__:
        model_type = _model_type(kind)
        if model_type in model_types and kind.__name__.removeprefix(_NAMES[model_type][0]) in suffixes:
            return kind
    return None


def _model_type(kind: type) -> str | None:
    model_type = kind.__module__.rpartition(".modeling_")[2]
    return model_type if kind.__module__ == f"transformers.models.{model_type}.modeling_{model_type}" else None


def _origin(module: nn.Module) -> tuple[str, type]:
    """The model_type of a module that `check_origin` has let pass, and the class that tells."""
    return next((found, kind) for kind in type(module).__mro__ if (found := _model_type(kind)) in _NAMES)


def family_of_origin(module: nn.Module) -> Family:
    """That of a module that `check_origin` has let pass."""
    return _NAMES[_origin(module)[0]][1]


def check_activation(op: str, module: nn.Module) -> None:
    """Raises ValueError unless the MLP or the experts have SiLU for their gates, and nothing else with it."""
    name = type(module.act_fn).__name__
    if name not in _SILU:
        raise ValueError(f"[{op}] this {type(module).__name__} has the activation {name}; supported is SiLU")
    if "forward" in vars(module.act_fn) or any(getattr(module.act_fn, table) for table in HOOKS):
        raise ValueError(
            f"[{op}] the activation of this {type(module).__name__} has hooks or a forward of its own, which cannot be "
            "kept"
        )


def norm_of(op: str, module: nn.Module) -> RMSNorm:
    """A copy of a norm of Transformers. Raises TypeError and ValueError as `check_origin`."""
    check_origin(op, module, "norm")
    norm = RMSNorm(len(module.weight), module.variance_epsilon, device="meta")
    norm.weight = own(module.weight)
    return norm


def window_of(attention: nn.Module) -> int | None:
    """How many keys a query sees, where that is limited."""
    if _origin(attention)[0] in _WINDOW_IN_CONFIG:
        return getattr(attention.config, "sliding_window", None)
    return getattr(attention, "sliding_window", None)


def rotary_of(op: str, attention: nn.Module, device: torch.device, interleaved: bool = False) -> Rotary:
    """The rotary embedding of the models with such attention, as its config describes it. Raises ValueError, which
    names it, if that is of a type whose angles depend on the length of the text."""
    config = attention.config
    most = config.max_position_embeddings
    if not getattr(attention, "use_rope", True):
        return Rotary(0, most)
    rope_type = config.rope_parameters["rope_type"]
    if rope_type not in _STATIC_ROPE:
        raise ValueError(
            f"[{op}] rope_parameters have the rope_type {rope_type!r}; supported are {', '.join(_STATIC_ROPE)}"
        )
    model_type, kind = _origin(attention)
    embedding = getattr(sys.modules[kind.__module__], f"{_NAMES[model_type][0]}RotaryEmbedding")(config)
    dims = 2 * len(embedding.inv_freq)
    magnitude = float(embedding.attention_scaling)
    if rope_type == "default":
        return Rotary(dims, most, config.rope_parameters["rope_theta"], magnitude=magnitude, interleaved=interleaved)
    freqs = 1 / embedding.inv_freq.to(device, torch.float32)
    return Rotary(dims, most, freqs=freqs, magnitude=magnitude, interleaved=interleaved)
