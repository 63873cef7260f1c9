"""What `make test` leaves to `make test-all`: combinations of parameters whose pairs of values others have."""

from __future__ import annotations

import json
import os
import sys
from collections import defaultdict
from itertools import product
from pathlib import Path
from typing import Any

import pytest

import covering
from process import printed
from repository import ROOT

# Where it is loaded, it writes every collected test, with its parameters and whether it is to run.
RECORDER = """
import json, os
import pytest

@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(items):
    collected = list(items)
    marked = {item for item in items if item.get_closest_marker("exhaustive")}
    yield
    kept = set(items)
    records = []
    for item in collected:
        callspec = getattr(item, "callspec", None)
        parameters = {name: repr(value) for name, value in callspec.params.items()} if callspec else {}
        function = f"{item.path.name}::{getattr(item, 'originalname', item.name)}"
        records.append((function, parameters, item in marked, item in kept))
    with open(os.environ["RECORD"], "w") as file:
        json.dump(records, file)
"""


def pairs_of(combinations: list[dict[str, Any]]) -> set[Any]:
    found = set()
    for combination in combinations:
        for one in combination:
            for other in combination:
                if one != other or len(combination) == 1:
                    found.add((one, combination[one], other, combination[other]))
    return found


@pytest.mark.parametrize("sizes", [(3,), (2, 2), (21, 3, 2, 2), (6, 3, 2, 2, 6, 2), (5, 5, 5, 5)], ids=str)
def test_every_pair_is_in_fewer_combinations(sizes: tuple[int, ...]) -> None:
    everything = [dict(enumerate(values)) for values in product(*map(range, sizes))]
    # Where not every value meets every other, and where two parameters have the same values.
    holes = [combination for combination in everything if sum(combination.values()) % 3]
    doubled = [combination | {-1: combination[0]} for combination in everything]
    for combinations in (everything, holes, doubled):
        chosen = covering.pairwise(combinations)
        assert pairs_of([combinations[index] for index in chosen]) == pairs_of(combinations)
        assert chosen == sorted(set(chosen))
    largest = sorted(sizes)[-2:]
    if len(sizes) > 2:
        assert len(covering.pairwise(everything)) <= 2 * largest[0] * largest[1] < len(everything)


def collected(folder: Path, *arguments: str) -> list[tuple[str, dict[str, str], bool, bool]]:
    """The function, parameters, own mark and fate of every test that pytest collects."""
    (folder / "recorder.py").write_text(RECORDER)
    environment = os.environ | {"PYTHONPATH": str(folder), "RECORD": str(folder / "record.json")}
    options = ("--collect-only", "-q", "-p", "recorder", "-p", "no:cacheprovider", "-p", "no:xdist")
    printed("-m", "pytest", *options, *arguments, cwd=ROOT, env=environment)
    return json.loads((folder / "record.json").read_text())


def test_every_pair_of_parameters_is_tested(tmp_path: Path) -> None:
    """On the software device; elsewhere everything but what carries the mark itself."""
    families = defaultdict(list)
    for function, parameters, marked, kept in collected(tmp_path, "tests"):
        if parameters.get("device", "").startswith("'mps-"):
            families[function].append((parameters, kept))
        else:
            assert kept != marked, (function, parameters)
    assert sys.platform == "darwin" or len(families) > 100
    for function, tests in families.items():
        kept = pairs_of([parameters for parameters, is_kept in tests if is_kept])
        assert kept == pairs_of([parameters for parameters, _ in tests]), function


@pytest.mark.exhaustive
def test_exhaustive_runs_everything(tmp_path: Path) -> None:
    files = ("tests/host/test_mac_check.py", "tests/marlin/test_marlin_layers.py")
    tests = collected(tmp_path, "--exhaustive", *files)
    assert all(kept for *_, kept in tests)
    marked = collected(tmp_path, "-m", "exhaustive", *files)
    repeated = [(function, parameters) for function, parameters, _, kept in marked if kept]
    assert 0 < len(repeated) < len(tests)
    assert ("test_mac_check.py::test_compiles_and_links_for_apple_silicon", {"version": "'2.12.0'"}) in repeated
