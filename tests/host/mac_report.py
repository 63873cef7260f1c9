"""Writes one file about the ops on this Mac's GPU, to attach to an issue: `make mac-report`.

The steps are those of mac_steps.py: what the GPU and its software are, every kernel family for every format against
float64, the tests of the ops on the GPU, and times beside MLX's. Each runs in a process of its own. Where that
crashes, as Metal's compiler can make it, or is silent for too long, the file says so with the last lines it wrote, and
another process goes on with what is left. The file is written in any case, and what fails fails nothing.

Nothing but the standard library is needed before the steps run: a torch that cannot be imported is a result, too.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import plistlib
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
STEPS_PROGRAM = Path(__file__).with_name("mac_steps.py")
NEEDS = (
    "mac-report needs a Mac with Apple silicon, macOS 14 or later and the Command Line Tools; "
    "elsewhere, `make test` runs the same ops on a software Metal device."
)
STEPS = ("gpu", "checks", "tests", "times")
MOST_PROCESSES = 20  # of one step: a GPU that crashes in every item has told enough by then
OUTPUT_LINES = 40
WARNING = "[quantization_mlx]"

Item = dict[str, Any]  # name, outcome, seconds, and more as the step has it


# --- Steps that may crash ---------------------------------------------------------------------------------------------


def guarded(command: Sequence[str], limit: float) -> list[Item]:
    """The items of a step, whatever becomes of the processes that run it.

    command: reads on standard input which items are done, as a JSON list of names, leaves them out, and writes to the
        file descriptor that is its last argument a line {"begin": name} before each other item and, after it, {"end":
        item, "written": bytes of output until then}. It ends with status 0 when all are done.
    limit: seconds without a line after which a process is ended.
    """
    items: list[Item] = []
    for _ in range(MOST_PROCESSES):
        ended, lost = _run_once(command, [item["name"] for item in items], limit)
        items += ended
        if lost is None:
            return items
        items.append(lost)
        if lost["name"] == "the step itself":
            return items
    reason = f"{MOST_PROCESSES} processes have ended early"
    return [*items, {"name": "the rest", "outcome": "not run", "reason": reason}]


def _run_once(command: Sequence[str], done: list[str], limit: float) -> tuple[list[Item], Item | None]:
    """What one process has done, and what it was doing when it ended early, if it did."""
    items: list[Item] = []
    name = "the step itself"
    start = time.monotonic()
    seen = 0  # bytes of output
    read, write = os.pipe()
    with tempfile.TemporaryFile() as log, open(read, "rb", buffering=0) as events:
        process = subprocess.Popen(
            [*command, str(write)],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            pass_fds=[write],
            start_new_session=True,
        )
        os.close(write)
        try:
            with suppress(BrokenPipeError), process.stdin:
                process.stdin.write(json.dumps(done).encode())
            outcome = "crashed"
            for event in _lines(events, limit):
                if event is None:
                    outcome = "hung"
                elif "begin" in event:
                    name, start = event["begin"], time.monotonic()
                else:
                    items.append({**event["end"], "seconds": round(time.monotonic() - start, 3)})
                    text = os.pread(log.fileno(), event["written"] - seen, seen)
                    seen = event["written"]
                    if warnings := warnings_in(text.decode(errors="replace")):
                        items[-1]["warnings"] = warnings
                    name = "the step itself"
            reason = f"nothing for {limit:g} s" if outcome == "hung" else _how_it_ended(process)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if outcome == "crashed" and reason is None:
            return items, None
        log.seek(0)
        output = log.read().decode(errors="replace").splitlines()[-OUTPUT_LINES:]
    seconds = round(time.monotonic() - start, 3)
    return items, {"name": name, "outcome": outcome, "reason": reason, "output": output, "seconds": seconds}


def warnings_in(output: str) -> list[str]:
    """This package's, whose library writes them to the standard error stream."""
    return [line[line.index(WARNING) :] for line in output.splitlines() if WARNING in line]


def _lines(events: Any, limit: float) -> Iterator[dict[str, Any] | None]:
    """What a process writes, line by line; None, and nothing after it, where no line comes for that long."""
    rest = b""
    while True:
        if not select.select([events], [], [], limit)[0]:
            yield None
            return
        data = os.read(events.fileno(), 1 << 16)
        if not data:
            return
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            yield json.loads(line)


def _how_it_ended(process: subprocess.Popen[bytes]) -> str | None:
    """None where it ended well."""
    try:
        status = process.wait(timeout=60)
    except subprocess.TimeoutExpired:
        return "it closed its end of the pipe and did not end"
    if status == 0:
        return None
    return signal.Signals(-status).name if status < 0 else f"exit status {status}"


# --- The machine ------------------------------------------------------------------------------------------------------


def output_of(*command: str) -> str | None:
    """What a program prints; None where it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def gpu_of_registry() -> dict[str, Any] | None:
    """What the registry of macOS's drivers says of the GPU: Metal does not tell the number of cores."""
    text = output_of("ioreg", "-a", "-r", "-d", "1", "-c", "AGXAccelerator")
    if not text:
        return None
    (properties, *_) = plistlib.loads(text.encode())
    return {name: properties[name] for name in ("model", "gpu-core-count") if name in properties}


def guarded_fact(ask: Callable[[], Any]) -> Any:
    try:
        return ask()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def machine() -> dict[str, Any]:
    commands = {
        "chip": ("sysctl", "-n", "machdep.cpu.brand_string"),
        "model": ("sysctl", "-n", "hw.model"),
        "memory": ("sysctl", "-n", "hw.memsize"),
        "virtual": ("sysctl", "-n", "kern.hv_vmm_present"),
        "system": ("sw_vers",),
        "developer directory": ("xcode-select", "-p"),
        "compiler": ("c++", "--version"),
        "Metal compiler": ("xcrun", "-sdk", "macosx", "metal", "--version"),
        "commit": ("git", "-C", str(ROOT), "describe", "--always", "--dirty"),
    }
    facts = {name: output_of(*command) for name, command in commands.items()}
    variables = ("QUANTIZATION_MLX_", "PYTORCH_", "MTL_", "METAL_")
    return facts | {
        "gpu": guarded_fact(gpu_of_registry),
        "processor": platform.machine(),
        "python": sys.version,
        "environment": {name: value for name, value in os.environ.items() if name.startswith(variables)},
    }


# --- The file ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    """software_gpu: run on the tests' software Metal device as this GPU, and not on the one of a Mac. corrupt: part of
    the names of kernels that it is to compute wrongly. select: parts of names; after step gpu, only items with one of
    them are run. limit: see guarded."""

    software_gpu: str | None = None
    corrupt: str | None = None
    select: tuple[str, ...] = ()
    limit: float = 300.0

    def command(self, step: str, *more: str) -> list[str]:
        arguments = [step, *more, *(f"--select={text}" for text in self.select)]
        for name, value in (("--software-gpu", self.software_gpu), ("--corrupt", self.corrupt)):
            arguments += [name, value] if value else []
        return [sys.executable, str(STEPS_PROGRAM), *arguments]


def report(options: Options, steps: Sequence[str]) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for step in steps:
        reason = why_not(step, results)
        if reason:
            results[step] = [{"name": "the step itself", "outcome": "not run", "reason": reason}]
        else:
            print(f"{step} ...", flush=True)
            more = () if has_passed(results, "mlx") else ("--without-mlx",)
            results[step] = guarded(options.command(step, *more), options.limit)
        print(f"  {counts(results[step])}", flush=True)
    facts = machine()
    if options.software_gpu:
        facts["device"] = "the software Metal device, whose times say nothing about a GPU"
    return {
        "summary": summary(facts, results),
        "machine": facts,
        "kernels": sorted(kernels(results)),
        "steps": {step: [item for item in items if worth_a_line(step, item)] for step, items in results.items()},
    }


def has_passed(results: dict[str, list[Item]], name: str) -> bool:
    return any(item["name"] == name and item["outcome"] == "passed" for item in results.get("gpu", ()))


def why_not(step: str, results: dict[str, list[Item]]) -> str | None:
    """A GPU that does not even copy, as some virtual ones do not, fails everything that follows."""
    if step == "gpu" or "gpu" not in results or has_passed(results, "package"):
        return None
    return "the GPU, torch or this package does not work here at all: see step gpu"


def counts(items: list[Item]) -> str:
    return ", ".join(f"{count} {outcome}" for outcome, count in Counter(item["outcome"] for item in items).items())


def worth_a_line(step: str, item: Item) -> bool:
    """Of the tests, which are many, only those that did not pass."""
    return step != "tests" or item["outcome"] not in ("passed", "skipped")


def kernels(steps: dict[str, list[Item]]) -> set[str]:
    return {kernel for items in steps.values() for item in items for kernel in item.get("kernels", ())}


def summary(facts: dict[str, Any], steps: dict[str, list[Item]]) -> list[str]:
    lines = [f"{facts['chip'] or facts['processor']}, {facts['model']}, {facts['gpu']}"]
    lines += [" ".join((facts["system"] or platform.platform()).split())]
    lines += [f"virtual machine: {facts['virtual'] == '1'}"] if facts["virtual"] else []
    lines += [facts["device"]] if "device" in facts else []
    for step, items in steps.items():
        lines.append(f"{step}: {counts(items)}")
        lines += [f"  {item['name']}: {item['outcome']}: {first_line(item)}" for item in items if is_bad(item)][:20]
    warnings = sorted({text for items in steps.values() for item in items for text in item.get("warnings", ())})
    return [*lines, *(f"warning: {first_line({'reason': text})}" for text in warnings)]


def is_bad(item: Item) -> bool:
    return item["outcome"] not in ("passed", "skipped")


def first_line(item: Item) -> str:
    """Of a failure, the line that says most: that with the error in it, or else the last."""
    lines = str(item.get("reason", "")).splitlines() or [""]
    errors = [line for line in lines if re.search(r"\b\w*Error\b", line)]
    return (errors or lines)[0].strip()[:300]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "mac-report.json")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=STEPS)
    parser.add_argument(
        "--select", action="append", default=[], metavar="TEXT", help="run items with this in their names"
    )
    parser.add_argument("--limit", type=float, default=300.0, metavar="SECONDS", help="after which an item is ended")
    parser.add_argument(
        "--software-gpu", metavar="NAME", help="not on a Mac's GPU: on the software Metal device, as this one"
    )
    parser.add_argument("--corrupt", metavar="TEXT", help="there, kernels with this in their names give wrong results")
    arguments = parser.parse_args()
    if sys.platform != "darwin" and not arguments.software_gpu:
        sys.exit(NEEDS)
    options = Options(arguments.software_gpu, arguments.corrupt, tuple(arguments.select), arguments.limit)
    result = report(options, arguments.steps)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    # The name of the user is nobody's business.
    arguments.output.write_text(json.dumps(result, indent=1).replace(str(Path.home()), "~") + "\n")
    print("\n".join(result["summary"]))
    print(f"\nPlease attach {arguments.output} to an issue, whatever it says.")


if __name__ == "__main__":
    main()
