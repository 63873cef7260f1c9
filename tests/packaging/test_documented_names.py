"""The names that the four documents have (support/documented.py): where they are, and that ours only adds arguments."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from pathlib import Path
from typing import Any

import pytest

import quantization_mlx as qm
from documented import DOCUMENTS, MARLIN_TORCH, REQUIRED, arguments_of
from quantization_mlx import marlin
from repository import ROOT

NAMES = {path: signature for document in DOCUMENTS.values() for path, signature in document.items()}
WITH_ARGUMENTS = [path for path, signature in NAMES.items() if signature is not None]
MIGRATE = Path(ROOT, "docs", "migrate.md").read_text(encoding="utf-8")
# What docs/migrate.md says that calls may leave out here.
DEFAULTED = {("marlin.metal_dispatch.mps_tensor_to_metal_buffer", "device"): "mps"}


def split(path: str) -> tuple[Any, list[str]]:
    """A name's module, the deepest one, and what is behind it."""
    module, names = qm, path.split(".")
    while names:
        try:
            module = importlib.import_module(f"{module.__name__}.{names[0]}")
        except ModuleNotFoundError:
            break
        del names[0]
    return module, names


def found(path: str) -> Any:
    at, names = split(path)
    for name in names:
        at = getattr(at, name)
    return at


@pytest.mark.parametrize("path", NAMES)
def test_is_there(path: str) -> None:
    module, (name, *_) = split(path)
    assert name in getattr(module, "__all__", vars(module)), f"{module.__name__} does not export {name}"
    assert NAMES[path] is None or callable(found(path))
    assert name in MIGRATE


@pytest.mark.parametrize("path", WITH_ARGUMENTS)
def test_arguments(path: str) -> None:
    """By position and by name; those that only this package has are optional."""
    wanted = arguments_of(NAMES[path])
    wanted |= {name: default for (at, name), default in DEFAULTED.items() if at == path}
    parameters = list(inspect.signature(found(path)).parameters.values())
    by_position = [each for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD][: len(wanted)]
    assert [(each.name, each.default) for each in by_position] == list(wanted.items())
    added = [each for each in parameters if each not in by_position]
    assert all(each.default is not REQUIRED or each.kind is each.VAR_KEYWORD for each in added)
    assert "**" not in NAMES[path] or added


def test_the_top_level_of_marlin_has_all_of_its_names() -> None:
    """But for the function that has the name of its module."""
    for path in MARLIN_TORCH:
        _, (name, *_) = split(path)
        if name != "generate":
            assert name in marlin.__all__ and hasattr(marlin, name)
    assert inspect.ismodule(marlin.generate)
    for module in (marlin.metal_dispatch, marlin.inference_metal):
        for name in module.__all__:
            assert getattr(marlin, name) is getattr(module, name)


def test_configs_are_dataclasses() -> None:
    for config in (marlin.MetalKVCacheConfig, marlin.GenerationConfig, marlin.MetalGenerationConfig):
        assert dataclasses.is_dataclass(config)
