"""clang and the linker, with a cache on disk: from rewritten shaders to shared objects.

The shim headers are precompiled once for each language version, and on top of them a program whose kernels are
instances of templates; the compilation of one more kernel then costs the start of clang and the code of that kernel.
"""

from __future__ import annotations

import json
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
    """Runs a command where no source is: relative names are names that the sources give themselves."""
    place = directory()
    place.mkdir(parents=True, exist_ok=True)
    result = subprocess.run(command, input=text, capture_output=True, text=True, check=False, cwd=place)
    if result.returncode:
        # A precompiled header has made such names absolute.
        raise CompileError(result.stderr.strip().replace(f"{place}/", "")[:8000])
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
def identity() -> str:
    """Of all that a compilation depends on besides the shader."""
    sources = [Path(__file__), *(path for path in sorted(SHIM.rglob("*")) if path.is_file())]
    return digest(_clang_identity(), *(path.read_text() for path in sources))


@cache
def _frontends() -> list[list[str]]:
    """The commands of clang's compiler proper, without the driver: without and with checks.

    The source comes from stdin; "HEADER" stands for a precompiled header and "OUTPUT" for the object.
    """

    def plan(path: Path) -> None:
        commands = []
        for checks in ((), CHECK):
            command = [clang(), *LANGUAGE, *checks, "-c", "-", "-o", "OUTPUT", "-###"]
            lines = subprocess.run(command, capture_output=True, text=True, check=True).stderr.split("\n")
            words = shlex.split(next(line for line in lines if '"-cc1"' in line))
            commands.append([*words, "-include-pch", "HEADER", "-fno-validate-pch"])
        path.write_text(json.dumps(commands))

    return json.loads(cached(f"frontends-{identity()}.json", plan).read_text())


@cache
def _shim(standard: str) -> Path:
    key = digest(identity(), standard)

    def preprocess(path: Path) -> None:
        includes = "".join(f"#include <{name}>\n" for name in HEADERS)
        path.write_text(_run([clang(), *LANGUAGE, "-E", f"-I{SHIM}", _version(standard), "-"], includes))

    source = cached(f"shim-{key}.clcpp", preprocess)
    command = [clang(), *LANGUAGE, "-Xclang", "-emit-pch", "-c", str(source), "-o"]
    return cached(f"shim-{key}.pch", lambda path: _run([*command, str(path)], None))


def _compile(text: str, header: Path, output: Path, checked: bool = False, **words: str) -> None:
    # A header has no code that could be checked or not: one serves both. Names in it are absolute.
    words = {"HEADER": str(header), "OUTPUT": str(output), **words}
    command = [words.get(word, word) for word in _frontends()[checked]]
    _run([*command, f"-fdebug-prefix-map={directory()}/="], text)


def precompile(text: str, standard: str) -> Path:
    """The shim, and behind it a program's text, as the header of its kernels. Raises CompileError."""
    shim = _shim(standard)
    _frontends()  # which is made before the lock below is taken
    if not text:
        return shim
    # One header names the other by its path, and counts the lines of a file, which therefore stays.
    key = digest(text, str(shim))
    source = cached(f"header-{key}.clcpp", lambda path: path.write_text(text))

    def build(path: Path) -> None:
        _compile("", shim, path, **{"-emit-obj": "-emit-pch", "-": str(source)})

    return cached(f"header-{key}.pch", build)


def check_syntax(text: str, header: Path) -> None:
    """Raises CompileError where clang complains; generates no code."""

    def check(path: Path) -> None:
        _compile(text, header, path, **{"-emit-obj": "-fsyntax-only"})
        path.touch()

    cached(f"checked-{digest(text, header.name)}", check)


def module_key(text: str, header: Path, checked: bool) -> str:
    return digest(text, header.name, str(checked))


def module_path(key: str) -> Path:
    return directory() / f"kernel-{key}.so"


def compile_module(text: str, header: Path, checked: bool, keys: Sequence[str]) -> None:
    """Compiles one shared object and stores it under every key that is still missing."""

    def build(path: Path) -> None:
        code = path.with_suffix(".o")
        _compile(text, header, code, checked)
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
