"""Runs the bundle of build.py where an NVIDIA GPU is: correctness, sanitizers, times. Needs torch and numpy.

    python tests/gpu_lane/run.py [--suites check sanitize mutants time] [--bundle build/gpu_lane/bundle]
                                 [--output build/gpu_lane/results] [--markdown FILE]

Exits with 1 where a result is wrong, a sanitizer complains or a planted bug is missed. Times say nothing absolute about
Apple's GPUs. What may carry over is structure: bytes and loads, how time grows with rows; trust only what holds in both
builds of a kernel.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

import driver
import fast_tables
import sanitizer
import tables
from bundle import Archive, Buffers, Item
from calls import Call
from check import compare
from fast_calls import FastCall, LayerCall
from fast_operands import operands_of
from fast_peers import time_fast_peer
from mutants import MUTANTS
from shapes import SHAPES
from timing import GUARD, Timer, copy_bandwidth, read_bytes, time_int4pack, time_linear

ROOT = Path(__file__).resolve().parents[2]
SUITES = ("check", "sanitize", "mutants", "time")
SHOWN_ERRORS = 20


class Run:
    """The suites of one bundle: their results, their tables, and what is wrong."""

    def __init__(self, bundle: Path, output: Path) -> None:
        self.bundle, self.output = bundle, output
        self.items = Archive(bundle).items
        self.tables: list[str] = []
        self.wrong: list[str] = []
        self.results: dict[str, Any] = {"date": date.today().isoformat(), "torch": torch.__version__}
        self.results["device"] = torch.cuda.get_device_name()

    def suite(self, name: str) -> list[Item]:
        return [item for item in self.items if item.suite == name]

    def show(self, text: str) -> None:
        self.tables.append(text)
        print("\n" + text, flush=True)

    def note(self, message: str) -> None:
        self.wrong.append(message)
        if len(self.wrong) <= SHOWN_ERRORS:
            print("WRONG", message, flush=True)

    def check(self) -> None:
        self.results["check"] = [self._check(item) for item in self.suite("check")]
        self.show(tables.checks(self.results["check"]))

    def _check(self, item: Item) -> dict[str, Any]:
        operands = operands_of(item.call)
        kernels = [launch["kernel"] for launch in item.launches]
        result = {"build": item.build, "kernels": kernels, "share": 0.0, "wrong": ""}
        try:
            buffers = Buffers(item, operands, GUARD)
            item.bind(buffers)()
            driver.synchronize()
            result["share"] = compare(item.call, operands, buffers.results(), item.expected)
            if result["share"] > 1:
                result["wrong"] = f"an error of {result['share']:.3g} times what is allowed"
        except (AssertionError, driver.DriverError) as error:
            result["wrong"] = str(error)
        if result["wrong"]:
            self.note(f"{item}: {result['wrong']}")
        return result

    def sanitize(self) -> None:
        reports = [self._under(tool, "sanitize") for tool in sanitizer.TOOLS]
        dirty = [report for report in reports if not report.is_clean]
        self.wrong += [f"{each.tool}: {each.errors} errors {each.failure} {each.failed[:1]}" for each in dirty]
        self.results["sanitize"] = [report.as_dict() for report in reports]
        self.show(tables.sanitizers(self.results["sanitize"]))

    def mutants(self) -> None:
        items = self.suite("mutants")
        names = [name for name in MUTANTS if any(item.data["tag"] == name for item in items)]
        reports = {tool: self._under(tool, "mutants") for tool in dict.fromkeys(MUTANTS[name].tool for name in names)}
        verdicts = []
        for name in names:
            report = reports[MUTANTS[name].tool]
            if report.failed:  # one of them took the others along
                report = self._under(report.tool, "mutants", name)
            verdicts.append(sanitizer.verdict_on(name, items, report))
            if not (verdicts[-1]["flagged"] and verdicts[-1]["twin_is_clean"]):
                self.note(f"{verdicts[-1]} {report.failure}")
        self.results["mutants"] = verdicts
        self.show(tables.mutants(verdicts))

    def _under(self, tool: str, suite: str, which: str = "") -> sanitizer.Report:
        report = sanitizer.run(tool, self.bundle, suite, which)
        with (self.output / f"{suite}-{tool}.txt").open("a" if which else "w") as file:
            file.write(report.text)
        found = f"{report.launches} launches, {report.errors} errors {report.failure}"
        print(f"{suite} {tool} {which}: {found}", flush=True)
        return report

    def time(self) -> None:
        self.results["copy"] = copy_bandwidth()
        timer = Timer()
        measured = [(item, self._time(item, timer)) for item in self.suite("time")]
        products = [pair for pair in measured if isinstance(pair[0].call, Call)]
        fast = [pair for pair in measured if not isinstance(pair[0].call, Call)]
        self._peers_of_products([item for item, _ in products])
        self.results["fast_peers"] = [self._fast_peer(call) for call in dict.fromkeys(item.call for item, _ in fast)]
        # Clocks that were still rising, or a neighbour, would show.
        self.results["copy"] = max(self.results["copy"], copy_bandwidth())
        self.results["times"] = [result for _, result in products]
        self.results["fast_times"] = [result for _, result in fast]
        for text in [
            *(tables.Times(self.results).tables() if products else []),
            *(fast_tables.FastTimes(self.results).tables() if fast else []),
        ]:
            self.show(text)

    def _peers_of_products(self, items: Sequence[Item]) -> None:
        known = (item.call for item in items if item.build == "known" and item.call.transpose)
        timed = dict.fromkeys(call for call in known if (call.n, call.k) in SHAPES)
        self.results["peers"] = [self._peers(call) for call in timed]

    @staticmethod
    def _fast_peer(call: FastCall | LayerCall) -> dict[str, Any]:
        result = {"call": call.as_dict(), "seconds": time_fast_peer(call)}
        torch.cuda.empty_cache()
        return result

    def _time(self, item: Item, timer: Timer) -> dict[str, Any]:
        try:
            taken, share = timer(item)
            if share > 1:
                self.note(f"{item}: an error of {share:.3g} times what is allowed")
        except (AssertionError, driver.DriverError) as error:
            self.note(f"{item}: {error}")
            taken = float("nan")
        torch.cuda.empty_cache()
        launches = {name: [launch[name] for launch in item.launches] for name in ("kernel", "registers", "spilled")}
        launches["kernels"] = launches.pop("kernel")
        measured = {"seconds": taken, "bytes": read_bytes(item.call)}
        return {"build": item.build, "call": item.call.as_dict(), **launches, **measured}

    @staticmethod
    def _peers(call) -> dict[str, Any]:
        peers = {"linear": time_linear(call), "int4pack": time_int4pack(call)}
        torch.cuda.empty_cache()
        return {"shape": [call.rows, call.n, call.k], **peers}

    def head(self) -> str:
        copy = f", copy {self.results['copy'] / 1e9:.0f} GB/s" if "copy" in self.results else ""
        device = f"{self.results['device']}, torch {self.results['torch']}, {self.results['date']}{copy}"
        return f"{device}. Metal source; says nothing absolute about Apple GPUs.\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suites", nargs="*", default=list(SUITES), choices=SUITES)
    parser.add_argument("--bundle", type=Path, default=ROOT / "build" / "gpu_lane" / "bundle")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "gpu_lane" / "results")
    parser.add_argument("--markdown", type=Path, help="the tables, for the documentation")
    arguments = parser.parse_args(argv)
    arguments.output.mkdir(parents=True, exist_ok=True)
    torch.cuda.init()
    driver.start()
    run = Run(arguments.bundle, arguments.output)
    for suite in arguments.suites:
        begin = time.monotonic()
        if run.suite(suite):
            getattr(run, suite)()
            print(f"{suite}: {time.monotonic() - begin:.0f} s", flush=True)
        else:
            run.note(f"the bundle has no suite {suite}")
    (arguments.output / "results.json").write_text(json.dumps(run.results))
    if arguments.markdown:
        arguments.markdown.write_text("\n".join([run.head(), *run.tables]))
    print(run.head() + (f"{len(run.wrong)} WRONG" if run.wrong else "all as it should be"))
    return bool(run.wrong)


if __name__ == "__main__":
    sys.exit(main())
