"""Shared fixtures: the devices under test, the hypothesis profile, and the count of values compared with mlx."""

from __future__ import annotations

import os
from collections import defaultdict

import hypothesis
import pytest

# Before torch loads OpenMP: threads that spin while they wait make thousands of small calls crawl on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from torch import Tensor

import oracle

# Every op test runs once for each of these.
DEVICES = ("cpu",)

hypothesis.settings.register_profile("default", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "default")


@pytest.fixture(params=DEVICES, scope="session")
def device(request: pytest.FixtureRequest) -> str:
    return request.param


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

    def lines(self) -> list[str]:
        return [
            f"{name}: {count} values compared, {self.mismatched[name]} mismatches"
            for name, count in sorted(self.compared.items())
        ]


_tally = pytest.StashKey[Tally]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_tally] = Tally()
    config.addinivalue_line("markers", "kernels_ci: fast tests that need the package's ops and nothing else")


@pytest.fixture(scope="session")
def tally(pytestconfig: pytest.Config) -> Tally:
    return pytestconfig.stash[_tally]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    lines = config.stash[_tally].lines()
    if lines:
        terminalreporter.section("bit-exact with mlx")
        for line in lines:
            terminalreporter.write_line(line)
