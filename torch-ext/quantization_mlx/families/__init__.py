"""What is special about families of models: one file for each, by the `model_type` in config.json."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from typing import Any

from torch import nn

from .family import Family


@functools.cache
def families() -> dict[str, Family]:
    """All families that have a file here, by their model_types."""
    found = {}
    for each in pkgutil.iter_modules(__path__):
        family = getattr(importlib.import_module(f"{__name__}.{each.name}"), "FAMILY", None)
        if family is not None:
            found.update(dict.fromkeys((each.name, *family.also), family))
    return found


def family_of(model: nn.Module | str | Any) -> Family:
    """The family of a module that has a config, or of a model_type."""
    model_type = model if isinstance(model, str) else getattr(getattr(model, "config", model), "model_type", None)
    return families().get(model_type, Family())
