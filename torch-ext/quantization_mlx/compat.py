"""What the package needs of Transformers beyond its documented interface, and how that differs between versions."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

# The keyword argument that carries the cache in `forward` of models, decoder layers and attention: its name today,
# and the one before Transformers 5.24.
_CACHE_NAMES = ("cache", "past_key_values")


def cache_name(forward: Callable[..., Any] | None = None) -> str:
    """The name of the keyword argument by which `forward` takes the cache.

    Args:
        forward: of a model of Transformers or of a part of one; that of Llama's decoder layers if None.

    Raises:
        TypeError: it has none of the known names.
    """
    if forward is None:
        from transformers.models.llama.modeling_llama import LlamaDecoderLayer

        forward = LlamaDecoderLayer.forward
    parameters = inspect.signature(forward).parameters
    for name in _CACHE_NAMES:
        if name in parameters:
            return name
    raise TypeError(
        f"{forward.__qualname__} has none of the parameters {', '.join(_CACHE_NAMES)}; it takes {', '.join(parameters)}"
    )


def forward_options(forward: Callable[..., Any], overridden: Iterable[str]) -> frozenset[str]:
    """The names of the further keyword arguments that `forward` takes.

    Args:
        forward: of a model of Transformers or of a part of one.
        overridden: the parameters that what overrides it has, too, but for the cache.

    Raises:
        TypeError: `forward` has other parameters than those and the cache.
    """
    from transformers.utils import TransformersKwargs

    parameters = inspect.signature(forward).parameters.values()
    named = {each.name for each in parameters if each.kind is not each.VAR_KEYWORD} - {"self"}
    if different := named ^ {*overridden, cache_name(forward)}:
        raise TypeError(f"{forward.__qualname__} differs from the known one in the parameters {sorted(different)}")
    return frozenset(TransformersKwargs.__annotations__) | {"return_dict"}
