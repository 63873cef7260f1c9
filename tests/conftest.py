"""Shared fixtures: the devices under test, the hypothesis profile, and the count of values compared with mlx.

On a Mac, "mps" is its GPU. Elsewhere it is the software Metal device, once as a GPU without tensor operations and once
as one with them; what that finds wrong fails the test in which it happened.
"""

from __future__ import annotations

import os
import sys
from collections import defaultdict
from collections.abc import Iterator

import hypothesis
import pytest

# Before torch loads OpenMP: threads that spin while they wait make thousands of small calls crawl on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from torch import Tensor

import oracle
import quantization_mlx as qm
from quantization_mlx import plans

# Every op test runs once for each of these.
SOFTWARE_GPUS = {"mps-g14": "applegpu_g14s", "mps-g17": "applegpu_g17s"}
NATIVE_DEVICES = ("cpu", "mps") if sys.platform == "darwin" else ("cpu",)
DEVICES = NATIVE_DEVICES if "mps" in NATIVE_DEVICES else (*NATIVE_DEVICES, *SOFTWARE_GPUS)

hypothesis.settings.register_profile("default", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "default")


@pytest.fixture(params=DEVICES, scope="session")
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param not in SOFTWARE_GPUS:
        yield request.param
        return
    from softmetal import mps

    mps.install()
    with mps.gpu(SOFTWARE_GPUS[request.param]), pytest.MonkeyPatch.context() as patch:
        patch.setenv("CI", "true")  # a failed self-check raises
        run_every_self_check()
        yield "mps"


def run_every_self_check() -> None:
    """Afterwards, what an op call launches is its plan and nothing else."""
    for dtype in oracle.DTYPES:
        packed = qm.quantize(torch.ones(64, 64, dtype=dtype, device="mps"))
        for transpose in (True, False):
            for rows in (1, 40):
                qm.quantized_matmul(torch.ones(rows, 64, dtype=dtype, device="mps"), *packed, transpose)


@pytest.fixture(autouse=True)
def no_error_of_the_software_device(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fails a test during which the software Metal device found an error, also where the test expects exceptions."""
    if not on_software_device(request):
        yield
        return
    from softmetal import mps

    mps.clear()
    yield
    errors = mps.errors()
    mps.clear()
    assert not errors, "\n".join(errors)


@pytest.fixture
def plans_are_followed(request: pytest.FixtureRequest, no_error_of_the_software_device: None) -> Iterator[None]:
    """On the software device, the kernels that ran are those that the plans of the ops name, in that order."""
    if not on_software_device(request):
        yield
        return
    from softmetal import mps

    with plans.Recorder() as recorder:
        yield
    planned = [launch.kernel for plan in recorder.plans for launch in plan.launches]
    assert [launch.kernel for launch in mps.launched()] == planned


def on_software_device(request: pytest.FixtureRequest) -> bool:
    callspec = getattr(request.node, "callspec", None)
    return callspec is not None and callspec.params.get("device") in SOFTWARE_GPUS


class Tally:
    """Counts bitwise comparisons by name, so that a run can show how much it compared."""

    def __init__(self) -> None:
        self.compared: dict[str, int] = defaultdict(int)
        self.mismatched: dict[str, int] = defaultdict(int)

    def compare(self, name: str, ours: Tensor, expected: Tensor, what: str) -> None:
        differs = oracle.mismatches(ours, expected)
        self.compared[name] += differs.numel()
        self.mismatched[name] += int(differs.sum())
        oracle.assert_identical(ours, expected, what)

    def counts(self) -> dict[str, tuple[int, int]]:
        return {name: (count, self.mismatched[name]) for name, count in self.compared.items()}

    def add(self, counts: dict[str, tuple[int, int]]) -> None:
        for name, (compared, mismatched) in counts.items():
            self.compared[name] += compared
            self.mismatched[name] += mismatched

    def lines(self) -> list[str]:
        return [
            f"{name}: {count} values compared, {self.mismatched[name]} mismatches"
            for name, count in sorted(self.compared.items())
        ]


_tally = pytest.StashKey[Tally]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_tally] = Tally()
    config.addinivalue_line("markers", "kernels_ci: fast tests that need the package's ops and nothing else")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The build of a variant, which runs kernels_ci alone, has no compiler for the software Metal device."""
    if config.option.markexpr == "kernels_ci":
        items[:] = [
            item
            for item in items
            if getattr(item, "callspec", None) is None or item.callspec.params.get("device") not in SOFTWARE_GPUS
        ]


@pytest.fixture(scope="session")
def tally(pytestconfig: pytest.Config) -> Tally:
    return pytestconfig.stash[_tally]


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Under pytest-xdist, a worker hands its counts over."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["tally"] = session.config.stash[_tally].counts()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error) -> None:
    node.config.stash[_tally].add(getattr(node, "workeroutput", {}).get("tally", {}))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    lines = config.stash[_tally].lines()
    if lines:
        terminalreporter.section("bit-exact with mlx")
        for line in lines:
            terminalreporter.write_line(line)
