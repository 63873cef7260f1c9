"""The objects of the last build of the extension, for tests that link the same code in another way."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from repository import ROOT

BUILD = ROOT / "build" / "pip"
SOURCES = {".cpp", ".h"}
# What is parsed once for all sources.
HEADERS = BUILD / "CMakeFiles" / "_C.dir" / "cmake_pch.hxx"


def object_of(source: str) -> Path | None:
    """What `make build` compiled of a source; None where that may have been of other text than is there now."""
    path = BUILD / _object(source)
    if not path.exists():
        return None
    texts = (file for folder in ("csrc", "torch-ext") for file in (ROOT / folder).rglob("*") if file.suffix in SOURCES)
    return path if path.stat().st_mtime > max(file.stat().st_mtime for file in texts) else None


def _object(source: str) -> Path:
    return Path("CMakeFiles", "_C.dir", f"{source}.o")


def dependencies(source: str) -> list[Path]:
    """The files that the object of a source was made of, but for HEADERS and what they include."""
    # ninja is beside this Python, where pip installed it.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    command = ["ninja", "-C", BUILD, "-t", "deps", _object(source)]
    listing = subprocess.check_output(command, text=True, env={**os.environ, "PATH": path})
    files = [Path(line.strip()) for line in listing.splitlines() if line.startswith("    ")]
    assert ROOT / source in files, listing
    return [path for path in files if HEADERS.name not in path.name]


def flags() -> list[str]:
    """The compiler's, for every source."""
    text = (BUILD / "build.ninja").read_text()
    # Those of sources that do without HEADERS are the others' without it.
    found = [re.findall(rf"^  {name} = (.*)$", text, re.MULTILINE) for name in ("DEFINES", "FLAGS", "INCLUDES")]
    return shlex.split(" ".join(min(texts, key=len) for texts in found))
