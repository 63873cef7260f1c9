"""compute-sanitizer: runs sanitize.py under each of its tools and reads the reports."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bundle import Item
from mutants import MUTANTS

# Allocations a page apart show accesses that would otherwise meet a neighbour. Reports of host code say nothing here.
TOOLS = {
    "racecheck": (),
    "memcheck": ("--padding", "65536"),
    "initcheck": (),
    "synccheck": (),
}
OPTIONS = ("--print-limit", "100000", "--show-backtrace", "no")
# What a bug does to one kernel must not end the others.
MUTANT_OPTIONS = {"memcheck": ("--destroy-on-device-error", "kernel")}
TIMEOUT = 300
SUMMARY = re.compile(r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard")


@dataclass
class Report:
    """What a tool said: the count of its summary (None: there is none), and the words of its messages."""

    tool: str
    options: Sequence[str]
    errors: int | None = None
    launches: int = 0
    failure: str = ""
    words: set[str] = field(default_factory=set)
    text: str = ""

    @property
    def is_clean(self) -> bool:
        return not self.failure and self.errors == 0

    def names(self, item: Item) -> bool:
        """Whether a kernel of the item is in a message."""
        return any(launch["symbol"] in self.words for launch in item.launches)

    def as_dict(self) -> dict[str, Any]:
        shown = {name: getattr(self, name) for name in ("tool", "errors", "launches", "failure")}
        return {**shown, "options": " ".join(self.options)}


def parse(text: str, report: Report) -> Report:
    report.text = text
    messages = [line for line in text.splitlines() if line.startswith("=========")]
    counts = [int(a or b) for line in messages for a, b in SUMMARY.findall(line)]
    report.errors = sum(counts) if counts else None
    report.words = {word for line in messages for word in re.findall(r"\w+", line)}
    launches = re.search(r"^launches (\d+)$", text, re.MULTILINE)
    report.launches = int(launches[1]) if launches else 0
    if not counts or not launches:
        reasons = [line for line in messages if re.search(r"not supported|Error|failed", line)] or text.splitlines()[
            -1:
        ]
        report.failure = "did not finish: " + " ".join(reasons)[:200].replace("=", "").strip()
    elif "failed" in {line.split(" ")[0] for line in text.splitlines()}:
        report.failure = next(line for line in text.splitlines() if line.startswith("failed"))[:200]
    return report


def run(tool: str, bundle: Path, suite: str) -> Report:
    options = TOOLS[tool] + (MUTANT_OPTIONS.get(tool, ()) if suite == "mutants" else ())
    report = Report(tool, options)
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if sanitizer is None:
        report.failure = "compute-sanitizer is not installed"
        return report
    script = [sys.executable, str(Path(__file__).with_name("sanitize.py")), str(bundle), suite, tool]
    command = [sanitizer, "--tool", tool, *OPTIONS, *options, *script]
    try:
        result = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, timeout=TIMEOUT
        )
    except subprocess.TimeoutExpired as error:
        report.failure = f"took more than {TIMEOUT} s"
        report.text = (error.stdout or b"").decode(errors="replace")
        return report
    return parse(result.stdout, report)


def judge_mutants(items: Sequence[Item], reports: dict[str, Report]) -> list[dict[str, Any]]:
    """For each mutant, whether its tool names one of its kernels, and none of its twin's."""
    verdicts = []
    for name, mutant in MUTANTS.items():
        report = reports[mutant.tool]
        own = [item for item in items if item.data["tag"] == name]
        twins = [item for item in items if item.data["tag"] == f"twin of {name}"]
        if own:
            clean = not report.failure and not any(map(report.names, twins))
            verdict = {"flagged": any(map(report.names, own)), "twin_is_clean": clean}
            verdicts.append({"mutant": name, "tool": mutant.tool, **verdict})
    return verdicts
