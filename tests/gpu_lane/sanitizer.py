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
from mutants import LATE
from sanitize import TWIN

# Allocations a page apart show accesses that would otherwise meet a neighbour. Reports of host code say nothing here.
TOOLS = {"racecheck": (), "memcheck": ("--padding", "65536"), "initcheck": (), "synccheck": ()}
OPTIONS = ("--print-limit", "100000", "--show-backtrace", "no")
# What a bug does to one kernel must not end the others.
MUTANT_OPTIONS = {"memcheck": ("--destroy-on-device-error", "kernel")}
TIMEOUT = 300
SUMMARY = re.compile(r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard")


@dataclass
class Report:
    """What a tool said: the count of its summary (None: there is none), and the words of its messages.

    failed: lines about calls that the driver refused. failure: why there is no report.
    """

    tool: str
    options: Sequence[str]
    errors: int | None = None
    launches: int = 0
    failure: str = ""
    failed: list[str] = field(default_factory=list)
    words: set[str] = field(default_factory=set)
    text: str = ""

    @property
    def is_clean(self) -> bool:
        return not self.failure and not self.failed and self.errors == 0

    def names(self, item: Item) -> bool:
        """Whether a kernel of the item is in a message."""
        return any(launch["symbol"] in self.words for launch in item.launches)

    def as_dict(self) -> dict[str, Any]:
        shown = {name: getattr(self, name) for name in ("tool", "errors", "launches", "failure")}
        shown["failure"] = " ".join([self.failure, *self.failed[:1]]).strip()
        return {**shown, "options": " ".join(self.options)}


def parse(text: str, report: Report) -> Report:
    report.text = text
    messages = [line for line in text.splitlines() if line.startswith("=========")]
    counts = [int(a or b) for line in messages for a, b in SUMMARY.findall(line)]
    report.errors = sum(counts) if counts else None
    report.words = {word for line in messages for word in re.findall(r"\w+", line)}
    launches = re.search(r"^launches (\d+)$", text, re.MULTILINE)
    report.launches = int(launches[1]) if launches else 0
    report.failed = re.findall(r"^failed .*$", text, re.MULTILINE)
    if not counts or not launches:
        reasons = [line for line in messages if re.search(r"not supported|Error|failed", line)] or text.splitlines()[
            -1:
        ]
        report.failure = "did not finish: " + " ".join(reasons)[:200].replace("=", "").strip()
    return report


def run(tool: str, bundle: Path, suite: str, which: str = "") -> Report:
    """which: of the mutants, this one; otherwise all that the tool must find."""
    options = TOOLS.get(tool, ()) + (MUTANT_OPTIONS.get(tool, ()) if suite == "mutants" else ())
    report = Report(tool, options)
    script = [sys.executable, str(Path(__file__).with_name("sanitize.py")), str(bundle), suite, which or tool]
    if tool == LATE:
        return _finished(script, report)
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if sanitizer is None:
        report.failure = "compute-sanitizer is not installed"
        return report
    return _finished([sanitizer, "--tool", tool, *OPTIONS, *options, *script], report)


def _finished(command: Sequence[str], report: Report) -> Report:
    """The report, with what the command printed."""
    try:
        result = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, timeout=TIMEOUT
        )
    except subprocess.TimeoutExpired as error:
        report.failure = f"took more than {TIMEOUT} s"
        report.text = (error.stdout or b"").decode(errors="replace")
        return report
    return parse(result.stdout, report)


def verdict_on(name: str, items: Sequence[Item], report: Report) -> dict[str, Any]:
    """Whether the report names one of a mutant's kernels, and none of its twin's."""
    twin = f"{TWIN}{name}"
    kernels = {tag: [item for item in items if item.data["tag"] == tag] for tag in (name, twin)}
    named = {tag: any(map(report.names, of_tag)) for tag, of_tag in kernels.items()}
    ran = not report.failure and not any(f"[{twin}]" in line for line in report.failed)
    return {"mutant": name, "tool": report.tool, "flagged": named[name], "twin_is_clean": ran and not named[twin]}
