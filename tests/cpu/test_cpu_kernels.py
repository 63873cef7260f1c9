"""Every instruction set's kernels, without torch: natively, under sanitizers, and for 64-bit Arm in an emulator."""

from __future__ import annotations

import os
import platform
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


TARGETS = {
    "native": Target(is_installed=True, arguments=("brief",)),
    "sanitized": Target(flags=sanitized_ops.FLAGS),
}
if (platform.system(), platform.machine()) == ("Linux", "x86_64"):
    ARM = Target("aarch64-linux-gnu-g++", ("-O1", "-static"), ("qemu-aarch64",))
    TARGETS |= {"arm": replace(ARM, arguments=("brief",)), "arm-in-full": ARM}


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
    result = subprocess.run([*how.launcher, program, *how.arguments], capture_output=True, text=True)
    print(result.stdout)
    assert result.returncode == 0, result.stdout + result.stderr
    tested = {line.split(":")[0] for line in result.stdout.splitlines() if line.endswith(", 0 failures")}
    wanted = "neon" if "arm" in target or platform.machine() in ("arm64", "aarch64") else "avx2"
    assert {"baseline", wanted} <= tested
