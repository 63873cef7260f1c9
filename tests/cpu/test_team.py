"""How threads share the tasks of a decoder's step, without torch: natively and under ThreadSanitizer."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import pytest

from repository import ROOT

FLAGS = {"native": ["-O2"], "sanitized": ["-O1", "-g", "-fsanitize=thread"]}
# ThreadSanitizer's memory has fixed places, which a random layout of addresses may take.
PLACES = ["setarch", platform.machine(), "--addr-no-randomize"] if platform.system() == "Linux" else []


def run(source: Path, folder: Path, flags: list[str]) -> subprocess.CompletedProcess:
    program = folder / source.stem
    command = ["c++", "-std=c++20", "-Wall", "-Wextra", "-Werror", "-pthread", *flags, f"-I{ROOT / 'csrc'}"]
    subprocess.run([*command, source, "-o", program], check=True)
    return subprocess.run([*PLACES, program], capture_output=True, text=True)


@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS.keys())
def test_tasks_of_a_team(flags: list[str], tmp_path: Path) -> None:
    result = run(ROOT / "tests/cpu/team.cpp", tmp_path, flags)
    assert (result.returncode, result.stderr) == (0, "")


ORDERS = {  # by what it orders: the words of the header, and what they would be without
    "function": ("memory_order_acquire));", "memory_order_relaxed));"),
    "results": ("1, std::memory_order_release", "1, std::memory_order_relaxed"),
}


@pytest.mark.parametrize("order, weaker", ORDERS.values(), ids=ORDERS.keys())
def test_sanitizer_sees_what_nothing_orders(order: str, weaker: str, tmp_path: Path) -> None:
    """Else the test above would prove nothing."""
    header = (ROOT / "csrc/cpu/team.h").read_text()
    assert header.count(order) == 1
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu/team.h").write_text(header.replace(order, weaker))
    result = run(ROOT / "tests/cpu/team.cpp", tmp_path, [f"-I{tmp_path}", *FLAGS["sanitized"]])
    assert "data race" in result.stderr
