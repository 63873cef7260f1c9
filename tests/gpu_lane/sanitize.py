"""Launches the calls of one suite once, without torch: what run.py starts under NVIDIA's compute-sanitizer. Of the
mutants that no sanitizer sees, it looks at the results, and reports as a sanitizer does.

python tests/gpu_lane/sanitize.py BUNDLE SUITE [WHICH]    WHICH: of the mutants, those for this tool, or this one
"""

from __future__ import annotations

import sys
from pathlib import Path

from bundle import Archive, Buffers, Item
from driver import DriverError, start, synchronize
from fast_operands import operands_of
from mutants import LATE, MUTANTS, Mutant

TWIN = "twin of "
GUARD = 256


def mutant_of(data: dict) -> Mutant | None:
    return MUTANTS.get(data["tag"].removeprefix(TWIN))


def is_for(data: dict, suite: str, which: str | None) -> bool:
    mutant = mutant_of(data)
    wanted = mutant is None or which in (mutant.tool, data["tag"].removeprefix(TWIN))
    return data["suite"] == suite and wanted


def run(item: Item, looks_at_results: bool) -> bool:
    """Launches an item. False where its results are wrong, if it looks at them."""
    operands = operands_of(item.call)
    buffers = Buffers(item, operands, GUARD if looks_at_results else 0)
    item.bind(buffers)()
    synchronize()
    if not looks_at_results:
        return True
    from check import compare  # with torch

    try:
        return compare(item.call, operands, buffers.results()) <= 1
    except AssertionError:
        return False


def main(path: str, suite: str, which: str | None = None) -> None:
    start()
    items = [item for item in Archive(Path(path)).items if is_for(item.data, suite, which)]
    looks_at_results = any(mutant and mutant.tool == LATE for mutant in (mutant_of(item.data) for item in items))
    launches, wrong = 0, 0
    # A mutant may take the context along; twins come before that.
    for item in sorted(items, key=lambda item: not item.data["tag"].startswith(TWIN)):
        is_right = not looks_at_results
        try:
            is_right = run(item, looks_at_results)
        except DriverError as error:
            print(f"failed [{item.data['tag']}] {item}: {error}")
        if not is_right:
            wrong += 1
            print("========= Wrong results of", *(launch["symbol"] for launch in item.launches))
        launches += len(item.launches)
    print("launches", launches)
    if looks_at_results:
        print(f"========= ERROR SUMMARY: {wrong} errors")


if __name__ == "__main__":
    main(*sys.argv[1:])
