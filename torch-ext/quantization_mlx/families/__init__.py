"""What is special about families of models: one file for each, by the `model_type` in config.json."""

import importlib
import pkgutil
from typing import Any

from .family import FAMILIES, Family

for _each in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_each.name}")

EVERY_FAMILY = tuple(dict.fromkeys(FAMILIES.values()))


def family_of(model: Any) -> Family:
    """The family of a model_type, or of a module that has a config, or of a config."""
    model_type = model if isinstance(model, str) else getattr(getattr(model, "config", model), "model_type", None)
    return FAMILIES.get(model_type) or Family()
