"""Launches the calls of one suite once, without torch: what run.py starts under NVIDIA's compute-sanitizer.

python tests/gpu_lane/sanitize.py BUNDLE SUITE [TOOL]    TOOL: only the mutants and twins for this one
"""

from __future__ import annotations

import sys
from pathlib import Path

from bundle import Archive, Buffers
from driver import DriverError, start, synchronize
from mutants import MUTANTS
from operands import random_operands


def is_for(data: dict, suite: str, tool: str | None) -> bool:
    mutant = MUTANTS.get(data["tag"].removeprefix("twin of "))
    return data["suite"] == suite and (mutant is None or mutant.tool == tool)


def main(path: str, suite: str, tool: str | None = None) -> None:
    start()
    launches = 0
    for item in Archive(Path(path)).items:
        if not is_for(item.data, suite, tool):
            continue
        try:
            item.bind(Buffers(item, random_operands(item.call)))()
            synchronize()
        except DriverError as error:
            print("failed", item, error)
        launches += len(item.launches)
    print("launches", launches, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
