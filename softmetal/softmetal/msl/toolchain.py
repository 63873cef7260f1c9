"""clang and the linker, with a cache on disk: from rewritten shaders to shared objects.

The shim headers are precompiled once for each language version; a kernel's compilation then costs the start of clang,
the parsing of the shader's own text and the code of that kernel.
"""

from __future__ import annotations

import os
import shlex
import shutil
import struct
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

from ..cache import cached, digest, directory, prune

HERE = Path(__file__).resolve().parent
SHIM = HERE / "include"
RUNTIME = HERE / "runtime.cpp"

# What is precompiled; the tensor operations are empty below language version 4.0.
HEADERS = ("metal_stdlib", "metal_tensor", "MetalPerformancePrimitives/MetalPerformancePrimitives.h")
VERSIONS = {"metal3.0": 300, "metal3.1": 310, "metal3.2": 320, "metal4.0": 400}
LANGUAGE = [
    *("-x", "clcpp", "-cl-std=clc++2021", "-cl-no-stdinc", "-cl-single-precision-constant", "-march=x86-64-v3"),
    "-w",  # warnings would only hide what is an error
    *("-Xclang", "-cl-ext=-all,+cl_khr_fp16,+__cl_clang_function_pointers,+__opencl_c_generic_address_space"),
    *("-O1", "-fPIC", "-ffp-contract=off", "-Xclang", "-fbfloat16-excess-precision=none"),
    *("-Xclang", "-debug-info-kind=line-tables-only", "-gdwarf-4", "-fdebug-compilation-dir=."),
    # A return address must lie in the caller, at the place of the call.
    "-fno-optimize-sibling-calls",
    # As in Metal, functions become part of their callers; arrays that no call takes the address of need no checks.
    *("-mllvm", "-inline-threshold=20000"),
    # A loop stays a loop: less to compile, and the checks see each access where the shader has it.
    *("-fno-vectorize", "-fno-slp-vectorize", "-fno-unroll-loops"),
]
# Accesses stay as the shader wrote them.
CHECK = [
    *("-fsanitize=thread", "-mllvm", "-tsan-instrument-func-entry-exit=0", "-mllvm", "-tsan-instrument-atomics=0"),
    *("-mllvm", "-tsan-instrument-read-before-write=1"),
]
RUNTIME_FLAGS = ["-std=c++20", "-O2", "-g1", "-fPIC", "-shared", "-march=x86-64-v3"]


class CompileError(Exception):
    """The shader does not compile; the message names file and line."""


@cache
def clang() -> str:
    names = (os.environ.get("SOFTMETAL_CLANG"), "clang++-19", "clang++-20", "clang++")
    found = next((path for path in map(shutil.which, filter(None, names)) if path), None)
    if found is None:
        raise RuntimeError("the software Metal device needs clang++ (Debian package clang-19)")
    return found


@cache
def _clang_identity() -> str:
    path = Path(clang()).resolve()
    return f"{path} {path.stat().st_size} {path.stat().st_mtime_ns}"


def runtime_path() -> Path:
    """The runtime's shared library; kernels find its symbols when it is loaded with RTLD_GLOBAL."""
    sources = [path.read_text() for path in (RUNTIME, *sorted(HERE.glob("*.h")))]
    name = f"runtime-{digest(*sources, _clang_identity(), *RUNTIME_FLAGS)}.so"

    def build(path: Path) -> None:
        _run([clang(), *RUNTIME_FLAGS, str(RUNTIME), "-o", str(path), "-lm"], None)

    path = cached(name, build)
    prune()
    return path


def _run(command: Sequence[str], text: str | None) -> str:
    result = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    if result.returncode:
        raise CompileError(result.stderr.strip()[:8000])
    return result.stdout


def _version(standard: str) -> str:
    return f"-D__METAL_VERSION__={VERSIONS[standard]}"


def preprocess(text: str, standard: str, include_dirs: Sequence[Path], defines: Mapping[str, object]) -> str:
    """The shader with macros and includes resolved, but without the declarations of the shim."""
    arguments = [f"-I{SHIM}", *(f"-I{directory}" for directory in include_dirs)]
    arguments += [f"-D{name}={value}" for name, value in defines.items()]
    arguments += [_version(standard), "-DSOFTMETAL_MACROS_ONLY", "-include", str(SHIM / "softmetal" / "macros.h")]
    return _run([clang(), *LANGUAGE, "-E", *arguments, "-"], text)


@cache
def _shim(standard: str) -> str:
    command = [clang(), *LANGUAGE, "-E", f"-I{SHIM}", _version(standard), "-"]
    return _run(command, "".join(f"#include <{name}>\n" for name in HEADERS))


@cache
def _frontend(standard: str, checked: bool) -> tuple[str, ...]:
    """The command of clang's compiler proper, without the driver, that compiles with the precompiled shim.

    The source comes from stdin; "OUTPUT" stands for the object.
    """
    shim = _shim(standard)
    flags = [*LANGUAGE, *(CHECK if checked else ())]
    key = digest(shim, _clang_identity(), *flags)
    source = cached(f"shim-{digest(shim)}.clcpp", lambda path: path.write_text(shim) and None)

    def precompile(path: Path) -> None:
        _run([clang(), *flags, "-Xclang", "-emit-pch", "-c", str(source), "-o", str(path)], None)

    header = cached(f"shim-{key}.pch", precompile)
    command = [clang(), *flags, "-include-pch", str(header), "-Xclang", "-fno-validate-pch", "-c", "-"]
    plan = subprocess.run([*command, "-o", "OUTPUT", "-###"], capture_output=True, text=True, check=True).stderr
    return tuple(shlex.split(next(line for line in plan.split("\n") if '"-cc1"' in line)))


def _compile(text: str, standard: str, checked: bool, output: Path | None) -> None:
    command = list(_frontend(standard, checked))
    if output is None:
        command[command.index("-emit-obj")] = "-fsyntax-only"
        place = command.index("OUTPUT")
        del command[place - 1 : place + 1]
    else:
        command[command.index("OUTPUT")] = str(output)
    _run(command, text)


def check_syntax(text: str, standard: str) -> None:
    """Raises CompileError where clang complains; generates no code."""
    key = digest(text, *_frontend(standard, False))  # which is made before the lock below is taken

    def check(path: Path) -> None:
        _compile(text, standard, False, None)
        path.touch()

    cached(f"checked-{key}", check)


def module_key(text: str, standard: str, checked: bool) -> str:
    return digest(text, *_frontend(standard, checked))


def module_path(key: str) -> Path:
    return directory() / f"kernel-{key}.so"


def compile_module(text: str, standard: str, checked: bool, keys: Sequence[str]) -> None:
    """Compiles one shared object and stores it under every key that is still missing."""

    def build(path: Path) -> None:
        code = path.with_suffix(".o")
        _compile(text, standard, checked, code)
        _run(["ld", "-shared", "-o", str(path), str(code)], None)

    path = cached(module_path(keys[0]).name, build)
    for key in keys[1:]:
        alias = module_path(key)
        if not alias.exists():
            with suppress(FileExistsError):
                os.link(path, alias)


def undefined_symbols(path: Path) -> set[str]:
    """What a shared object wants from others."""
    data = path.read_bytes()
    (sections,) = struct.unpack_from("<Q", data, 0x28)
    size, count = struct.unpack_from("<HH", data, 0x3A)
    headers = [struct.unpack_from("<IIQQQQIIQQ", data, sections + i * size) for i in range(count)]
    names = set()
    for header in headers:
        if header[1] != 11:  # SHT_DYNSYM
            continue
        strings = headers[header[6]][4]
        for place in range(header[4], header[4] + header[5], 24):
            name, _, _, section = struct.unpack_from("<IBBH", data, place)
            if name and not section:
                begin = strings + name
                names.add(data[begin : data.index(b"\0", begin)].decode())
    return names
