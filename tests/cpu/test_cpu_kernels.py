"""Every instruction set's kernels, without torch: natively, under sanitizers, and for 64-bit Arm in an emulator."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

import built
import sanitized_ops
from covering import mostly_exhaustive
from repository import ROOT

TEST = ROOT / "tests/cpu/cpu_kernels.cpp"
KERNELS = [ROOT / f"csrc/cpu/isa/{isa}.cpp" for isa in ("baseline", "avx2", "avx512", "neon")]
SOURCES = (TEST, *KERNELS)
# Those of other processors need the compiler's own headers for them.
X86 = platform.machine() in ("x86_64", "AMD64")
FOREIGN = {"neon.h"} if X86 else {"avx2.h", "avx512.h", "amx.h", "int8.h"}
WITH_TORCH = {"ops.h", "parallel.h", "router_logits.h", "scratch.h"}
HEADERS = [path for path in sorted((ROOT / "csrc/cpu").rglob("*.h")) if path.name not in FOREIGN | WITH_TORCH]


@dataclass(frozen=True)
class Target:
    """How the program is compiled and run."""

    compiler: str = "c++"
    flags: Sequence[str] = ("-O1",)
    launcher: Sequence[str] = ()
    arguments: Sequence[str] = ()
    is_installed: bool = False  # the kernels are those of the extension, where it is of the same sources

    def object_of(self, source: Path) -> Path | None:
        return built.object_of(str(source.relative_to(ROOT))) if self.is_installed else None


TARGETS = {"native": Target(is_installed=True, arguments=("brief",)), "sanitized": Target(flags=sanitized_ops.FLAGS)}
if (platform.system(), platform.machine()) == ("Linux", "x86_64"):
    ARM = Target("aarch64-linux-gnu-g++", ("-O1", "-static"), ("qemu-aarch64",))
    TARGETS |= {"arm": replace(ARM, arguments=("brief",)), "arm-in-full": ARM}
# Processors of qemu-x86_64, and the instruction sets of ours that they have.
OLDER = {"Westmere": ["baseline"], "Haswell": ["baseline", "avx2"]} if X86 else {}


def assert_no_weak_functions(objects: list[Path]) -> None:
    """The linker may take one from any object, and run it on a processor without its instructions."""
    for path in (path for path in objects if path.name.split(".")[0] in ("avx2", "avx512")):
        symbols = subprocess.run(["nm", "-C", path], capture_output=True, text=True, check=True)
        assert not re.search(r"^\w* W .*", symbols.stdout, re.MULTILINE)


def assert_older_processors_choose(program: Path) -> None:
    for processor, names in OLDER.items():
        command = ["qemu-x86_64", "-cpu", processor, program, "names"]
        result = subprocess.run(command, capture_output=True, text=True)
        assert (result.returncode, result.stdout.split()) == (0, names), f"{processor}: {result.stderr}"


@pytest.mark.first
@pytest.mark.parametrize("target", mostly_exhaustive(TARGETS, "native", "arm"))
def test_kernels_against_float64(target: str, tmp_path: Path) -> None:
    how = TARGETS[target]

    def compiled(source: Path) -> Path:
        known = how.object_of(source)
        if known is not None:
            return known
        result = tmp_path / f"{source.stem}.o"
        command = [how.compiler, "-std=c++20", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'csrc'}"]
        subprocess.run([*command, *how.flags, "-c", source, "-o", result], check=True)
        return result

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, SOURCES))
    program = tmp_path / "cpu_kernels"
    subprocess.run([how.compiler, *how.flags, *objects, "-o", program], check=True)
    if target == "native":
        assert_no_weak_functions(objects)
        assert_older_processors_choose(program)
    result = subprocess.run([*how.launcher, program, *how.arguments], capture_output=True, text=True)
    print(result.stdout)
    assert result.returncode == 0, result.stdout + result.stderr
    tested = {line.split(":")[0] for line in result.stdout.splitlines() if line.endswith(", 0 failures")}
    wanted = "neon" if "arm" in target or platform.machine() in ("arm64", "aarch64") else "avx2"
    assert {"baseline", wanted} <= tested


def test_every_header_compiles_by_itself() -> None:
    """Those without torch: they depend on nothing that was included, or defined, before them."""
    command = ["c++", "-std=c++20", "-w", "-fsyntax-only", f"-I{ROOT / 'csrc'}", "-x", "c++", os.devnull, "-include"]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(lambda path: subprocess.run([*command, path], capture_output=True, text=True), HEADERS))
    assert len(HEADERS) > 15
    assert [done.stderr for done in results if done.returncode != 0] == []
