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

import sanitized_ops
from covering import mostly_exhaustive
from repository import ROOT

TEST = ROOT / "tests/cpu/cpu_kernels.cpp"
KERNELS = {isa: ROOT / f"csrc/cpu/isa/{isa}.cpp" for isa in ("baseline", "avx2", "avx512", "neon")}
SOURCES = (TEST, *KERNELS.values())
# Those of other processors need the compiler's own headers for them.
X86 = platform.machine() in ("x86_64", "AMD64")
FOREIGN = {"neon.h"} if X86 else {"avx2.h", "avx512.h", "amx.h", "int8.h"}
WITH_TORCH = {"ops.h", "parallel.h"}
HEADERS = [path for path in sorted((ROOT / "csrc/cpu").rglob("*.h")) if path.name not in FOREIGN | WITH_TORCH]


@dataclass(frozen=True)
class Target:
    """How the program is compiled and run; under sanitizers, a source takes several times as long to compile."""

    compiler: str = "c++"
    flags: Sequence[str] = ("-O1",)
    launcher: Sequence[str] = ()
    sanitized: Sequence[Path] = ()
    arguments: Sequence[str] = ()

    def flags_of(self, *sources: Path) -> Sequence[str]:
        return self.flags if set(sources).isdisjoint(self.sanitized) else sanitized_ops.FLAGS


TARGETS = {
    # What the sanitizers then see: every allocation, and what the kernels of one instruction set do with it.
    "native": Target(sanitized=(KERNELS["baseline"],), arguments=("brief",)),
    "sanitized": Target(sanitized=SOURCES),
}
if (platform.system(), platform.machine()) == ("Linux", "x86_64"):
    ARM = Target("aarch64-linux-gnu-g++", ("-O1", "-static"), ("qemu-aarch64",))
    TARGETS |= {"arm": replace(ARM, arguments=("brief",)), "arm-in-full": ARM}


@pytest.mark.first
@pytest.mark.parametrize("target", mostly_exhaustive(TARGETS, "native", "arm"))
def test_kernels_against_float64(target: str, tmp_path: Path) -> None:
    how = TARGETS[target]
    objects = [tmp_path / f"{source.stem}.o" for source in SOURCES]

    def compile_source(source: Path, object_file: Path) -> None:
        command = [how.compiler, "-std=c++20", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'csrc'}"]
        subprocess.run([*command, *how.flags_of(source), "-c", source, "-o", object_file], check=True)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_source, SOURCES, objects))
    if target == "native":
        # The linker may take a weak function from any object, and run it on a processor without its instructions.
        for isa in ("avx2", "avx512"):
            symbols = subprocess.run(["nm", "-C", tmp_path / f"{isa}.o"], capture_output=True, text=True, check=True)
            assert not re.search(r"^\w* W .*", symbols.stdout, re.MULTILINE)
    program = tmp_path / "cpu_kernels"
    subprocess.run([how.compiler, *how.flags_of(*SOURCES), *objects, "-o", program], check=True)
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
