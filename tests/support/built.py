"""The objects of the last build of the extension, for tests that link the same code in another way."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from repository import ROOT

BUILD = ROOT / "build" / "pip"
SOURCES = {".cpp", ".h"}


def object_of(source: str) -> Path | None:
    """What `make build` compiled of a source; None where that may have been of other text than is there now."""
    path = BUILD / "CMakeFiles" / "_C.dir" / f"{source}.o"
    if not path.exists():
        return None
    texts = (file for folder in ("csrc", "torch-ext") for file in (ROOT / folder).rglob("*") if file.suffix in SOURCES)
    return path if path.stat().st_mtime > max(file.stat().st_mtime for file in texts) else None


def flags() -> list[str]:
    """The compiler's, for every source."""
    text = (BUILD / "build.ninja").read_text()
    found = (re.search(rf"^  {name} = (.*)$", text, re.MULTILINE) for name in ("DEFINES", "FLAGS", "INCLUDES"))
    return shlex.split(" ".join(match[1] for match in found))
