"""The Python face of the device: compilation with a cache on disk, launches, reports."""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from .msl import rewrite as msl

HERE = Path(__file__).resolve().parent
SHIM = HERE / "msl" / "include"
RUNTIME = HERE / "msl" / "runtime.cpp"
CACHE = HERE.parents[1] / "build" / "softmetal" / "cache"

VERSIONS = {"metal3.0": 300, "metal3.1": 310, "metal3.2": 320, "metal4.0": 400}
LANGUAGE = [
    *("-x", "clcpp", "-cl-std=clc++2021", "-cl-no-stdinc", "-cl-single-precision-constant", "-march=x86-64-v3"),
    *("-Wno-unknown-attributes", "-Wno-ignored-pragmas", "-Wno-unknown-pragmas", "-Wno-psabi", "-Wno-comment"),
    *("-Wno-duplicate-decl-specifier", "-Wno-unused-value", "-Wno-pass-failed"),
    *("-Xclang", "-cl-ext=-all,+cl_khr_fp16,+__cl_clang_function_pointers,+__opencl_c_generic_address_space"),
]
GENERATE = [
    *(
        "-O2",
        "-g1",
        "-gdwarf-4",
        "-fdebug-compilation-dir=.",
        "-fPIC",
        "-ffp-contract=off",
        "-Xclang",
        "-fbfloat16-excess-precision=none",
    ),
    # A return address must lie in the caller, at the place of the call.
    "-fno-optimize-sibling-calls",
]
# Accesses stay as the shader wrote them: no combined vector accesses, no copies of loop bodies.
CHECK = [
    *("-fsanitize=thread", "-mllvm", "-tsan-instrument-func-entry-exit=0", "-mllvm", "-tsan-instrument-atomics=0"),
    *("-mllvm", "-tsan-instrument-read-before-write=1", "-fno-vectorize", "-fno-slp-vectorize", "-fno-unroll-loops"),
]
MAX_BUFFERS = 31
MAX_BYTES = 4096
MAX_THREADS = 1024
MAX_THREADGROUP_MEMORY = 32768


class CompileError(Exception):
    """The shader does not compile; the message names file and line."""


@dataclass
class Report:
    """What a launch did.

    errors: one text per distinct error, "kind: file:line: what"; empty when the launch was right.
    counters: totals over the grid. Bytes count what the compiled code loads and stores (an upper bound: a value may be
        loaded again after a store); barriers, reductions, shuffles and multiplies count one per group that executes
        them. buffer_bytes_read and buffer_bytes_written are dicts by buffer index.
    """

    errors: list[str]
    counters: dict[str, Any]

    @property
    def kinds(self) -> set[str]:
        """The kinds of the errors, such as "device-race"."""
        return {error.split(":", 1)[0] for error in self.errors}


class _Allocation(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("size", ctypes.c_uint64),
        ("writable", ctypes.c_uint32),
        ("initialized", ctypes.c_uint32),
        ("bytes_read", ctypes.c_uint64),
        ("bytes_written", ctypes.c_uint64),
    )


class _Binding(ctypes.Structure):
    _fields_ = (("allocation", ctypes.c_int32), ("reserved", ctypes.c_uint32), ("offset", ctypes.c_uint64))


class _Counters(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_uint64)
        for name in (
            *("device_bytes_read", "device_bytes_written", "constant_bytes_read"),
            *("threadgroup_bytes_read", "threadgroup_bytes_written", "threadgroup_bytes"),
            *("device_loads", "device_stores", "threadgroup_barriers", "simdgroup_barriers"),
            *("simd_reductions", "simd_shuffles", "simd_votes", "quad_operations"),
            *("simdgroup_multiplies", "simdgroup_loads", "simdgroup_stores", "atomics"),
        )
    )


class _Launch(ctypes.Structure):
    _fields_ = (
        ("entry", ctypes.c_void_p),
        ("allocations", ctypes.POINTER(_Allocation)),
        ("bindings", ctypes.POINTER(_Binding)),
        ("threadgroup_lengths", ctypes.POINTER(ctypes.c_uint64)),
        ("allocation_count", ctypes.c_uint32),
        ("binding_count", ctypes.c_uint32),
        ("threadgroup_argument_count", ctypes.c_uint32),
        ("threads_per_threadgroup", ctypes.c_uint32 * 3),
        ("threads", ctypes.c_uint32 * 3),
        ("seed", ctypes.c_uint32),
        ("seconds", ctypes.c_double),
    )


@cache
def _clang() -> str:
    names = (os.environ.get("SOFTMETAL_CLANG"), "clang++-19", "clang++-20", "clang++")
    found = next((path for path in map(shutil.which, filter(None, names)) if path), None)
    if found is None:
        raise RuntimeError("the software Metal device needs clang++ (Debian package clang-19)")
    return found


@cache
def _clang_version() -> str:
    return subprocess.run([_clang(), "--version"], capture_output=True, text=True, check=True).stdout


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def _cached(path: Path, build) -> Path:
    """Runs build(temporary path) unless path exists. Two processes may do it at once: the last replaces the first."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as directory:
            temporary = Path(directory) / path.name
            build(temporary)
            os.replace(temporary, path)
    return path


@cache
def _runtime_path() -> Path:
    flags = ["-std=c++20", "-O2", "-g1", "-fPIC", "-shared", "-march=x86-64-v3"]

    def build(path: Path) -> None:
        subprocess.run([_clang(), *flags, str(RUNTIME), "-o", str(path), "-lm"], check=True)

    return _cached(CACHE / f"runtime-{_digest(RUNTIME.read_text(), _clang_version(), *flags)}.so", build)


@cache
def _runtime() -> ctypes.CDLL:
    library = ctypes.CDLL(str(_runtime_path()), mode=ctypes.RTLD_GLOBAL)
    library.softmetal_launch.argtypes = (ctypes.POINTER(_Launch),)
    library.softmetal_counters.argtypes = (ctypes.POINTER(_Counters),)
    library.softmetal_error.argtypes = (
        ctypes.c_int,
        ctypes.POINTER(ctypes.c_char_p),
        ctypes.POINTER(ctypes.c_char_p),
        ctypes.POINTER(ctypes.c_uint64),
        ctypes.POINTER(ctypes.c_uint64),
    )
    return library


_lock = threading.Lock()


def _run_clang(arguments: Sequence[str], text: str) -> str:
    result = subprocess.run([_clang(), *LANGUAGE, *arguments, "-"], input=text, capture_output=True, text=True)
    if result.returncode:
        raise CompileError(result.stderr.strip()[:8000])
    return result.stdout


def compile(
    source: str | Path,
    include_dirs: Sequence[str | Path] = (),
    defines: Mapping[str, object] | None = None,
    function_constants: Mapping[int, object] | None = None,
    standard: str = "metal3.1",
) -> Library:
    """Compiles Metal source, or the file of that path.

    source: a path (a pathlib.Path, or a str that ends in ".metal" or ".h") or the source itself.
    function_constants: values by index; a bool, int, float or a tuple of them.
    standard: one of metal3.0, metal3.1, metal3.2, metal4.0.

    The source and its plain kernels are checked here, instances of templates at their first launch (Library.check does
    it for all), when their code is generated. Everything compiled is cached in build/softmetal/cache.
    Raises CompileError, with file and line; ValueError for an unknown standard.
    """
    if standard not in VERSIONS:
        raise ValueError(f"standard is one of {', '.join(VERSIONS)}, not {standard!r}")
    is_path = isinstance(source, Path) or ("\n" not in source and source.endswith((".metal", ".h")))
    path = Path(source).resolve() if is_path else None
    text = f'# 1 "{path}"\n' + path.read_text() if path else '# 1 "<source>"\n' + str(source)
    includes = [f"-I{Path(d).resolve()}" for d in ([path.parent] if path else []) + list(include_dirs)]
    macros = [f"-D{name}={value}" for name, value in (defines or {}).items()]
    version = f"-D__METAL_VERSION__={VERSIONS[standard]}"
    preprocessed = _run_clang(["-E", f"-I{SHIM}", *includes, *macros, version], text)
    try:
        program = msl.rewrite(preprocessed, str(SHIM), dict(function_constants or {}))
    except msl.RewriteError as error:
        raise CompileError(str(error)) from None
    library = Library(program)
    library.check([name for name in library.kernels if "<" not in program.kernels[name].instance])
    return library


class Library:
    """Compiled shaders. `kernels` lists their host names."""

    def __init__(self, program: msl.Program) -> None:
        self._program = program
        self._functions: dict[tuple[str, bool], tuple[ctypes.CDLL, Path]] = {}

    @property
    def kernels(self) -> list[str]:
        return list(self._program.kernels)

    @property
    def function_constants(self) -> dict[int, str]:
        """Names of the function constants that the source declares, by index."""
        return dict(self._program.function_constants)

    def check(self, names: Sequence[str] | None = None) -> None:
        """Compiles kernels (all by default) as far as the compiler can complain. Raises CompileError."""
        entries = []
        for number, name in enumerate(self.kernels if names is None else names):
            entry = msl.entry_point(self._program.kernels[name])
            entries.append(entry.replace("softmetal_entry", f"softmetal_entry_{number}"))
        text = self._program.text + "".join(entries)
        marker = CACHE / f"checked-{_digest(text, _clang_version(), *LANGUAGE)}"

        def check(path: Path) -> None:
            _run_clang(["-fsyntax-only"], text)
            path.touch()

        _cached(marker, check)

    def _load(self, name: str, check: bool) -> tuple[ctypes.CDLL, Path]:
        if (name, check) not in self._functions:
            text = self._program.text + msl.entry_point(self._program.kernels[name])
            flags = [*GENERATE, *(CHECK if check else ())]
            key = _digest(text, str(_runtime_path()), _clang_version(), *LANGUAGE, *flags)

            def build(path: Path) -> None:
                code = path.with_suffix(".o")
                _run_clang([*flags, "-c", "-o", str(code)], text)
                runtime = [str(_runtime_path()), f"-Wl,-rpath,{_runtime_path().parent}"]
                subprocess.run([_clang(), "-shared", "-o", str(path), str(code), *runtime, "-lm"], check=True)

            path = _cached(CACHE / f"kernel-{key}.so", build)
            self._functions[name, check] = ctypes.CDLL(str(path)), path
        return self._functions[name, check]

    def launch(
        self,
        name: str,
        buffers: Sequence[np.ndarray | np.generic | bytes | None],
        threadgroups: Sequence[int] | None = None,
        threads_per_threadgroup: Sequence[int] = (32, 1, 1),
        check: bool = True,
        seed: int = 0,
        threadgroup_memory: Mapping[int, int] | None = None,
        *,
        threads: Sequence[int] | None = None,
        uninitialized: Sequence[int] = (),
        seconds: float = 120.0,
    ) -> Report:
        """Runs a kernel over a grid.

        buffers: by buffer index. A contiguous array is a device buffer, written in place; a view begins where the
            view begins, and arrays that overlap share memory. bytes and numpy scalars are constants (setBytes, at most
            4 KiB). None is nil.
        threadgroups, or threads: the size of the grid in threadgroups, or in threads (then edge groups are partial).
        check: False runs the kernel without instrumentation; guard zones are still verified.
        seed: 0 runs threads in order, any other number draws the order of threads and of threadgroups.
        threadgroup_memory: bytes by index of each [[threadgroup(i)]] argument, multiples of 16.
        uninitialized: indices of buffers whose contents the kernel may not read before it wrote them; what it
            leaves unwritten comes back as bytes 0xFF.
        seconds: after this time the launch is given up.

        Raises KeyError for an unknown kernel, CompileError, ValueError for arguments that no device would take.
        """
        kernel = self._program.kernels[name]
        size = _three("threads_per_threadgroup", threads_per_threadgroup)
        if (threadgroups is None) == (threads is None):
            raise ValueError("give either threadgroups or threads")
        groups = _three("threadgroups", threadgroups) if threads is None else None
        grid = [g * s for g, s in zip(groups, size, strict=True)] if groups else _three("threads", threads)
        if np.prod(size) > MAX_THREADS:
            raise ValueError(f"a threadgroup has at most {MAX_THREADS} threads, not {size}")
        memory = _Memory(kernel, buffers, set(uninitialized))
        lengths = _threadgroup_lengths(kernel, threadgroup_memory or {})
        library, path = self._load(name, check)
        launch = _Launch(
            entry=ctypes.cast(library.softmetal_entry, ctypes.c_void_p),
            allocations=memory.allocations,
            bindings=memory.bindings,
            threadgroup_lengths=(ctypes.c_uint64 * max(len(lengths), 1))(*lengths),
            allocation_count=memory.allocation_count,
            binding_count=len(memory.bindings),
            threadgroup_argument_count=len(lengths),
            threads_per_threadgroup=(ctypes.c_uint32 * 3)(*size),
            threads=(ctypes.c_uint32 * 3)(*grid),
            seed=seed,
            seconds=seconds,
        )
        with _lock:  # the runtime runs one launch at a time
            _runtime().softmetal_launch(ctypes.byref(launch))
            counters = _Counters()
            _runtime().softmetal_counters(ctypes.byref(counters))
            errors = list(_errors(path))
        totals: dict[str, Any] = {field: getattr(counters, field) for field, _ in _Counters._fields_}
        totals["buffer_bytes_read"] = memory.by_buffer("bytes_read")
        totals["buffer_bytes_written"] = memory.by_buffer("bytes_written")
        return Report([memory.name_buffers(error) for error in errors], totals)


class _Memory:
    """The launch's buffers as allocations: arrays that overlap are one."""

    def __init__(self, kernel: msl.Kernel, buffers: Sequence[Any], uninitialized: set[int]) -> None:
        parameters = {p.index: p for p in kernel.parameters if p.kind == "buffer"}
        count = max([len(buffers), *(index + 1 for index in parameters)], default=0)
        if count > MAX_BUFFERS:
            raise ValueError(f"a kernel has at most {MAX_BUFFERS} buffers, not {count}")
        self.arrays = {i: _as_array(i, buffer) for i, buffer in enumerate(buffers) if buffer is not None}
        for i, array in self.arrays.items():
            if i in parameters and not parameters[i].is_const and not array.flags.writeable:
                raise ValueError(f"buffer {i} is read-only, but kernel {kernel.name} takes it as writable")
        self.owner: dict[int, int] = {}
        extents: list[list[int]] = []
        order = sorted(self.arrays, key=lambda i: self.arrays[i].ctypes.data)
        for i in order:
            begin = self.arrays[i].ctypes.data
            end = begin + self.arrays[i].nbytes
            if not extents or begin >= extents[-1][1]:
                extents.append([begin, end])
            extents[-1][1] = max(extents[-1][1], end)
            self.owner[i] = len(extents) - 1
        self.allocation_count = len(extents)
        self.allocations = (_Allocation * max(len(extents), 1))()
        for number, (begin, end) in enumerate(extents):
            members = [i for i, owner in self.owner.items() if owner == number]
            writable = any(i in parameters and not parameters[i].is_const for i in members)
            self.allocations[number] = _Allocation(begin, end - begin, writable, not set(members) & uninitialized)
        self.bindings = (_Binding * max(count, 1))()
        for i in range(len(self.bindings)):
            owner = self.owner.get(i, -1)
            offset = self.arrays[i].ctypes.data - extents[owner][0] if owner >= 0 else 0
            self.bindings[i] = _Binding(owner, 0, offset)

    def by_buffer(self, counter: str) -> dict[int, int]:
        return {i: getattr(self.allocations[owner], counter) for i, owner in sorted(self.owner.items())}

    def name_buffers(self, error: str) -> str:
        """The runtime numbers allocations, as "memory 0"; the caller knows buffers."""

        def name(match: re.Match[str]) -> str:
            members = sorted(i for i, owner in self.owner.items() if owner == int(match[1]))
            return "buffer " + " and ".join(map(str, members))

        return re.sub(r"\bmemory (\d+)", name, error)


def _as_array(index: int, buffer: Any) -> np.ndarray:
    if isinstance(buffer, (bytes, np.generic)):
        array = np.frombuffer(bytes(buffer) if isinstance(buffer, bytes) else buffer.tobytes(), np.uint8)
        if array.nbytes > MAX_BYTES:
            raise ValueError(f"buffer {index}: setBytes takes at most {MAX_BYTES} bytes, not {array.nbytes}")
        return array
    if not isinstance(buffer, np.ndarray):
        raise TypeError(f"buffer {index} is a numpy array or scalar, bytes or None, not {type(buffer).__name__}")
    if not buffer.flags.c_contiguous:
        raise ValueError(f"buffer {index} is not contiguous")
    return buffer


def _threadgroup_lengths(kernel: msl.Kernel, given: Mapping[int, int]) -> list[int]:
    indices = [p.index for p in kernel.parameters if p.kind == "threadgroup"]
    for index, length in given.items():
        if index not in indices:
            raise ValueError(f"kernel {kernel.name} has no [[threadgroup({index})]] argument")
        if length % 16:
            raise ValueError(f"threadgroup memory {index}: {length} bytes is not a multiple of 16")
    if sum(given.values()) > MAX_THREADGROUP_MEMORY:
        raise ValueError(
            f"a threadgroup has at most {MAX_THREADGROUP_MEMORY} bytes of memory, not {sum(given.values())}"
        )
    return [given.get(i, 0) for i in range(max(indices, default=-1) + 1)]


def _three(name: str, values: Sequence[int]) -> list[int]:
    result = [*map(int, values), 1, 1][:3] if len(values) <= 3 else []
    if not result or min(result) < 1:
        raise ValueError(f"{name} is one to three positive numbers, not {values!r}")
    return result


def _errors(path: Path):
    kind, message = ctypes.c_char_p(), ctypes.c_char_p()
    offset, count = ctypes.c_uint64(), ctypes.c_uint64()
    index = 0
    while _runtime().softmetal_error(
        index, ctypes.byref(kind), ctypes.byref(message), ctypes.byref(offset), ctypes.byref(count)
    ):
        place = f"{_source_line(path, offset.value)}: " if offset.value else ""
        times = f" ({count.value} times)" if count.value > 1 else ""
        yield f"{kind.value.decode()}: {place}{message.value.decode()}{times}"
        index += 1


@cache
def _source_line(path: Path, offset: int) -> str:
    """The innermost frame of the shader itself at an offset of the compiled kernel."""
    lines = subprocess.run(
        ["addr2line", "-i", "-e", str(path), hex(offset)], capture_output=True, text=True, check=True
    ).stdout.split("\n")
    frames = [line.split(" (discriminator")[0] for line in lines if line]
    user = [frame for frame in frames if not frame.startswith(str(SHIM))]
    return (user or frames)[0]
