"""The CPU's kernels for instruction sets other than the best: each runs the op tests in a process of its own."""

from __future__ import annotations

import os
import re
import subprocess

import pytest

from process import python
from repository import ROOT

VARIABLE = "QUANTIZATION_MLX_CPU"
CALL = "import torch, quantization_mlx as q; q.quantized_matmul(torch.ones(64), *q.quantize(torch.ones(2, 64)))"
OPS = ("matmul", "gather", "norm", "rope", "gates", "sample", "moe", "rope_into_cache")
OPS += ("attention", "quantized_attention")
FILES = [f"ops/test_{op}.py" for op in OPS]
# What torch does with an op is the same for all kernels.
WANTED = "not (usage_example or explicit or 6-bit-720 or wide-n or 576 or opcheck or compile or export)"


def _run(instruction_set: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, VARIABLE: instruction_set, "TEST_DEVICES": "cpu"}
    return python(*arguments, cwd=ROOT / "tests", env=environment)


def _available() -> list[str]:
    """The names that the package offers on this machine, from the error about one that it does not."""
    error = _run("none of them", "-c", CALL).stderr
    found = re.search(rf'ValueError: {VARIABLE} is "none of them"; this machine has (.*)\.', error)
    assert found, error
    return found[1].split(", ")


@pytest.mark.first
def test_other_kernels(pytestconfig: pytest.Config) -> None:
    best, *others = _available()
    assert "baseline" in (best, *others)
    for instruction_set in others:  # the best one serves all other tests
        # --capture=sys: so that what a sanitizer reports as the process ends is not lost
        options = ("-q", "-x", "-p", "no:cacheprovider", "--no-header", "-k", WANTED, "--capture=sys")
        options += () if pytestconfig.option.exhaustive else ("--covering",)
        result = _run(instruction_set, "-m", "pytest", *options, *FILES)
        assert result.returncode == 0, f"{instruction_set}: {result.stdout}{result.stderr}"
        assert " passed" in result.stdout
