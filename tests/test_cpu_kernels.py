"""Every instruction set's kernels, without torch: natively under sanitizers, and for 64-bit Arm in an emulator."""

from __future__ import annotations

import os
import platform
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import sanitized_ops

ROOT = Path(__file__).parent.parent
SOURCES = [
    ROOT / "tests/cpu_kernels.cpp",
    *(ROOT / f"csrc/cpu/{isa}.cpp" for isa in ("baseline", "avx2", "avx512", "neon")),
]

NATIVE = ("c++", sanitized_ops.FLAGS, [])
EMULATED_ARM = ("aarch64-linux-gnu-g++", ["-O2", "-static"], ["qemu-aarch64"])
TARGETS = {"native": NATIVE}
if (platform.system(), platform.machine()) == ("Linux", "x86_64"):
    TARGETS["arm"] = EMULATED_ARM


@pytest.mark.parametrize("target", TARGETS)
def test_kernels_against_float64(target: str, tmp_path: Path) -> None:
    compiler, flags, launcher = TARGETS[target]
    objects = [tmp_path / f"{source.stem}.o" for source in SOURCES]

    def compile_source(source: Path, object_file: Path) -> None:
        command = [compiler, "-std=c++20", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'csrc'}", *flags]
        subprocess.run([*command, "-c", source, "-o", object_file], check=True)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_source, SOURCES, objects))
    program = tmp_path / "cpu_kernels"
    subprocess.run([compiler, *flags, *objects, "-o", program], check=True)
    result = subprocess.run([*launcher, program], capture_output=True, text=True)
    print(result.stdout)
    assert result.returncode == 0, result.stdout + result.stderr
    tested = {line.split(":")[0] for line in result.stdout.splitlines() if line.endswith(", 0 failures")}
    wanted = "neon" if target == "arm" or platform.machine() in ("arm64", "aarch64") else "avx2"
    assert {"baseline", wanted} <= tested
