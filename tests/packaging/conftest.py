"""The CPU variant that kernel-builder would make, for the files that load it: one group for pytest-xdist."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

import kernel_builder


@pytest.fixture(scope="session")
def variant(tmp_path_factory, pytestconfig) -> Path:
    """The CPU variant, made in an empty folder of what nix sees; with --exhaustive, all of it is compiled there."""
    folder = tmp_path_factory.mktemp("kernel_builder")
    return kernel_builder.build_cpu_variant(folder, from_scratch=pytestconfig.option.exhaustive)


@pytest.fixture(scope="session")
def repository(variant) -> Path:
    return variant.parent.parent


@pytest.fixture(scope="session")
def hub(repository):
    """The variant as `kernels` loads it."""
    kernels = importlib.import_module("kernels")
    return kernels.get_local_kernel(repository, backend="cpu")
