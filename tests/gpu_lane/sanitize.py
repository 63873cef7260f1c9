"""Launches the calls of one suite once, without torch: what run.py starts under NVIDIA's compute-sanitizer.

python tests/gpu_lane/sanitize.py BUNDLE SUITE [WHICH]    WHICH: of the mutants, those for this tool, or this one
"""

from __future__ import annotations

import sys
from pathlib import Path

from bundle import Archive, Buffers
from driver import DriverError, start, synchronize
from fast_operands import operands_of
from mutants import MUTANTS

TWIN = "twin of "


def is_for(data: dict, suite: str, which: str | None) -> bool:
    name = data["tag"].removeprefix(TWIN)
    mutant = MUTANTS.get(name)
    return data["suite"] == suite and (mutant is None or which in (mutant.tool, name))


def main(path: str, suite: str, which: str | None = None) -> None:
    start()
    items = [item for item in Archive(Path(path)).items if is_for(item.data, suite, which)]
    launches = 0
    # A mutant may take the context along; twins come before that.
    for item in sorted(items, key=lambda item: not item.data["tag"].startswith(TWIN)):
        try:
            item.bind(Buffers(item, operands_of(item.call)))()
            synchronize()
        except DriverError as error:
            print(f"failed [{item.data['tag']}] {item}: {error}")
        launches += len(item.launches)
    print("launches", launches, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
