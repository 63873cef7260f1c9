"""The workflows of GitHub Actions, which run elsewhere: their schema, their scripts, and what they may do."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from process import python
from repository import ROOT

WORKFLOWS = sorted((ROOT / ".github" / "workflows").iterdir())
# Hosted runners that there are: macOS 14's was retired in November 2026.
RUNNERS = {"ubuntu-24.04", "ubuntu-24.04-arm", "macos-15", "macos-26"}
EXPRESSION = re.compile(r"\$\{\{\s*(.*?)\s*\}\}")
each = pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)


def parse(path: Path) -> dict[str, Any]:
    return YAML(typ="safe").load(path)


def steps(path: Path) -> Iterator[dict[str, Any]]:
    for job in parse(path)["jobs"].values():
        yield from job["steps"]


def scripts(path: Path) -> list[str]:
    return [step["run"] for step in steps(path) if "run" in step]


def validate(path: Path) -> subprocess.CompletedProcess[str]:
    return python("-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows", path)


# --- Form -------------------------------------------------------------------------------------------------------------


@each
def test_schema(path):
    done = validate(path)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("right", "wrong"),
    [("runs-on: ubuntu-24.04", "runs_on: ubuntu-24.04"), ("timeout-minutes: 30", "timeout-minutes: soon")],
)
def test_schema_refuses(tmp_path, right, wrong):
    text = (ROOT / ".github" / "workflows" / "test.yml").read_text()
    assert right in text
    (tmp_path / "test.yml").write_text(text.replace(right, wrong, 1))
    assert validate(tmp_path / "test.yml").returncode == 1


@each
def test_scripts_are_shell(path):
    """And take no text of an event or a branch into what is run: expressions would be pasted in before it is parsed."""
    assert scripts(path)
    for script in scripts(path):
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)
        assert not EXPRESSION.search(script)


@each
def test_scripts_call_what_there_is(path):
    targets = set(re.findall(r"^([\w-]+):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for script in scripts(path):
        for target in re.findall(r"\bmake\s+([\w-]+)", script):
            assert target in targets
        for program in re.findall(r"(?<![\w/])(\.[\w-]+/[\w/.-]+)", script):
            assert (ROOT / program).exists()


def test_what_has_to_run_is_run():
    calls = {path.stem: " ".join(scripts(path)) for path in WORKFLOWS}
    assert {"make lint", "make test", "make mac-report"} <= set(re.findall(r"make [\w-]+", calls["test"]))
    assert "make nix" in calls["hub"]
    assert {"make wheel", "make mac-wheel"} <= set(re.findall(r"make [\w-]+", calls["wheels"]))


# --- Where and with what ----------------------------------------------------------------------------------------------


def labels(job: dict[str, Any]) -> set[str]:
    """The runners of a job; of a list that a variable of the repository may replace, the one without it."""
    matrix = job.get("strategy", {}).get("matrix", {})
    if EXPRESSION.fullmatch(job["runs-on"]) is None:
        return {job["runs-on"]}
    assert EXPRESSION.fullmatch(job["runs-on"])[1] == "matrix.runner"
    if "include" in matrix:
        return {entry["runner"] for entry in matrix["include"]}
    if isinstance(matrix["runner"], list):
        return set(matrix["runner"])
    assert "vars.MAC_RUNNERS" in matrix["runner"]
    return set(re.findall(r'"([\w.-]+)"', matrix["runner"]))


@each
def test_runners_exist(path):
    for job in parse(path)["jobs"].values():
        assert labels(job) <= RUNNERS


def test_each_system_is_there():
    runners = {path.stem: set().union(*map(labels, parse(path)["jobs"].values())) for path in WORKFLOWS}
    assert runners["test"] == {"ubuntu-24.04", "macos-15", "macos-26"}
    assert runners["hub"] == runners["wheels"] == {"ubuntu-24.04", "ubuntu-24.04-arm", "macos-26"}


@each
def test_expressions_name_what_there_is(path):
    for job in parse(path)["jobs"].values():
        matrix = job.get("strategy", {}).get("matrix", {})
        keys = {key for entry in matrix.get("include", ()) for key in entry} | set(matrix) - {"include"}
        used = {name for text in EXPRESSION.findall(str(job)) for name in re.findall(r"\bmatrix\.(\w+)", text)}
        assert used == keys


@each
def test_actions_are_pinned(path):
    for step in steps(path):
        if "uses" in step:
            assert re.fullmatch(r"[\w-]+/[\w-]+@v\d+", step["uses"]), step["uses"]


# --- What they may do -------------------------------------------------------------------------------------------------


@each
def test_permissions(path):
    """To read; to write in the one job that publishes, which only a tag starts and which runs nothing of the tree."""
    workflow = parse(path)
    assert workflow["permissions"] == {"contents": "read"}
    writers = [job for job in workflow["jobs"].values() if "permissions" in job]
    assert len(writers) == (path.stem == "wheels")
    for job in writers:
        assert job["permissions"] == {"contents": "write"}
        assert job["if"] == "github.ref_type == 'tag'"
        assert set(job["needs"]) == set(workflow["jobs"]) - {"release"}
        assert not any("checkout" in step.get("uses", "") for step in job["steps"])
    assert "secrets." not in path.read_text()


@each
def test_only_a_tag_publishes(path):
    publishing = re.compile(r"release|publish|upload(?!-artifact)|twine", re.IGNORECASE)
    for job in parse(path)["jobs"].values():
        if any(publishing.search(step.get("uses", "") + step.get("run", "")) for step in job["steps"]):
            assert job["if"] == "github.ref_type == 'tag'"


@each
def test_nothing_runs_for_ever(path):
    workflow = parse(path)
    assert {"group", "cancel-in-progress"} == set(workflow["concurrency"])
    assert all(0 < job["timeout-minutes"] <= 360 for job in workflow["jobs"].values())
    checkouts = [step for step in steps(path) if step.get("uses", "").startswith("actions/checkout")]
    assert checkouts
    assert all(step["with"]["persist-credentials"] is False for step in checkouts)
