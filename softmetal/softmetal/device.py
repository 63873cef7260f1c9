"""The Python face of the device: compilation with a cache on disk, launches, reports."""

from __future__ import annotations

import ctypes
import os
import pickle
import re
import subprocess
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from .cache import cached, digest
from .msl import rewrite as msl
from .msl import toolchain
from .msl.lint import Finding
from .msl.lint import lint as find_faults
from .msl.toolchain import CompileError, runtime_path

MAX_BUFFERS = 31
MAX_BYTES = 4096
MAX_THREADGROUP_MEMORY = 32768
# Kernels that one run of clang compiles: its start is shared, and both cores have work.
BATCH = 8
# Element types of function constants.
CONSTANT_TYPES = {
    name: np.dtype(code)
    for name, code in (
        *(("bool", "u1"), ("char", "i1"), ("uchar", "u1"), ("short", "i2"), ("ushort", "u2"), ("int", "i4")),
        *(("uint", "u4"), ("long", "i8"), ("ulong", "u8"), ("half", "f2"), ("float", "f4")),
        *(("int8_t", "i1"), ("uint8_t", "u1"), ("int16_t", "i2"), ("uint16_t", "u2"), ("int32_t", "i4")),
        *(("uint32_t", "u4"), ("int64_t", "i8"), ("uint64_t", "u8"), ("size_t", "u8")),
    )
}


@dataclass
class Report:
    """What a launch did.

    errors: one text per distinct error, "kind: file:line: what"; empty when the launch was right.
    counters: totals over the grid. Bytes, loads and stores are those of the compiled code, counted with check=True
        only: an upper bound, since a value may be loaded again after a store, and without accesses wider than 16 bytes
        (ulong4, vectors of eight), which the compiler does not instrument: nothing checks those either. Barriers,
        reductions, shuffles, votes, multiplies and matrix loads count one per group that executes them, always.
        buffer_bytes_read and buffer_bytes_written are dicts by buffer index.
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
        ("in_place", ctypes.c_uint32),
        ("guard", ctypes.c_uint32),
        ("written", ctypes.c_void_p),
        ("bytes_read", ctypes.c_uint64),
        ("bytes_written", ctypes.c_uint64),
    )


class _Binding(ctypes.Structure):
    _fields_ = (("allocation", ctypes.c_int32), ("reserved", ctypes.c_uint32), ("offset", ctypes.c_uint64))


class _Constant(ctypes.Structure):
    _fields_ = (("slot", ctypes.c_uint32), ("size", ctypes.c_uint32), ("value", ctypes.c_uint8 * 32))


class _Pipeline(ctypes.Structure):
    _fields_ = (
        ("entry", ctypes.c_void_p),
        ("derive", ctypes.c_void_p),
        ("constants", ctypes.POINTER(_Constant)),
        *((name, ctypes.c_uint32) for name in ("constant_count", "buffers", "writable_buffers")),
        *((name, ctypes.c_uint32) for name in ("threadgroup_arguments", "max_threads", "checked")),
    )


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
        ("pipeline", ctypes.POINTER(_Pipeline)),
        ("allocations", ctypes.POINTER(_Allocation)),
        ("bindings", ctypes.POINTER(_Binding)),
        ("threadgroup_lengths", ctypes.POINTER(ctypes.c_uint64)),
        ("allocation_count", ctypes.c_uint32),
        ("binding_count", ctypes.c_uint32),
        ("threadgroup_length_count", ctypes.c_uint32),
        ("threads_per_threadgroup", ctypes.c_uint32 * 3),
        ("threads", ctypes.c_uint32 * 3),
        ("seed", ctypes.c_uint32),
        ("seconds", ctypes.c_double),
    )


class _Error(ctypes.Structure):
    _fields_ = (
        ("kind", ctypes.c_char_p),
        ("message", ctypes.c_char_p),
        ("offset", ctypes.c_uint64),
        ("count", ctypes.c_uint64),
    )


class _Report(ctypes.Structure):
    _fields_ = (("counters", _Counters), ("errors", ctypes.POINTER(_Error)), ("error_count", ctypes.c_uint32))


@cache
def _runtime() -> ctypes.CDLL:
    library = ctypes.CDLL(str(runtime_path()), mode=ctypes.RTLD_GLOBAL)
    library.softmetal_launch.argtypes = (ctypes.POINTER(_Launch),)
    library.softmetal_launch.restype = ctypes.POINTER(_Report)
    library.softmetal_free_report.argtypes = (ctypes.POINTER(_Report),)
    library.softmetal_free_report.restype = None
    return library


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
    it for all), when their code is generated. Everything compiled is cached (cache.py).
    Raises CompileError, with file and line; ValueError for an unknown standard.
    """
    text, includes = _read(source, include_dirs, standard)
    try:
        program = _program(text, includes, defines or {}, standard)
    except msl.RewriteError as error:
        raise CompileError(str(error)) from None
    return Library(program, standard, dict(function_constants or {}))


def _program(text: str, includes: Sequence[Path], defines: Mapping[str, object], standard: str) -> msl.Program:
    """The rewritten source. Many sources may differ only in the instance at their end: the rest is rewritten once."""
    head, instances = msl.split_instances(text)
    # What no header can define, the preprocessor need not see.
    if instances and not includes and not _words(instances) & _macros(head, defines):
        with suppress(CompileError, msl.RewriteError):
            return msl.add_instances(_rewritten(head, (), defines, standard), instances, str(toolchain.SHIM))
    return _rewritten(text, includes, defines, standard)


def _words(text: str) -> set[str]:
    return set(re.findall(r"[A-Za-z_]\w*", text))


def _macros(text: str, defines: Mapping[str, object]) -> set[str]:
    own = (toolchain.SHIM / "softmetal" / "macros.h").read_text()
    return {*re.findall(r"#\s*define\s+(\w+)", own + text), *defines}


def _rewritten(text: str, includes: Sequence[Path], defines: Mapping[str, object], standard: str) -> msl.Program:
    def preprocess() -> str:
        return toolchain.preprocess(text, standard, includes, defines)

    # Without headers, the text says everything.
    parts = [preprocess()] if includes else [text, standard, repr(sorted(defines.items())), toolchain.identity()]

    def build(path: Path) -> None:
        preprocessed = parts[0] if includes else preprocess()
        path.write_bytes(pickle.dumps(msl.rewrite(preprocessed, str(toolchain.SHIM))))

    return pickle.loads(cached(f"program-{digest(_rewriter_source(), *parts)}", build).read_bytes())


@cache
def _rewriter_source() -> str:
    return Path(msl.__file__).read_text()


def lint(
    source: str | Path,
    include_dirs: Sequence[str | Path] = (),
    defines: Mapping[str, object] | None = None,
    standard: str = "metal3.1",
    *,
    advice: bool = False,
) -> list[Finding]:
    """What Apple's compiler would reject or warn about and compile() does not notice; arguments as for compile().

    advice: also what it takes, and shaders had better not have (msl/lint.py).
    """
    text, includes = _read(source, include_dirs, standard)
    preprocessed = toolchain.preprocess(text, standard, includes, defines or {})
    return find_faults(preprocessed, str(toolchain.SHIM), toolchain.VERSIONS[standard], advice)


def _read(source: str | Path, include_dirs: Sequence[str | Path], standard: str) -> tuple[str, list[Path]]:
    """The text of a source, and where its headers are."""
    if standard not in toolchain.VERSIONS:
        raise ValueError(f"standard is one of {', '.join(toolchain.VERSIONS)}, not {standard!r}")
    is_path = isinstance(source, Path) or ("\n" not in source and source.endswith((".metal", ".h")))
    path = Path(source).resolve() if is_path else None
    text = f'# 1 "{path}"\n' + path.read_text() if path else '# 1 "<source>"\n' + str(source)
    return text, [Path(d).resolve() for d in ([path.parent] if path else []) + list(include_dirs)]


class Library:
    """Compiled shaders. `kernels` lists their host names."""

    def __init__(self, program: msl.Program, standard: str, function_constants: dict[int, object]) -> None:
        self._program = program
        self._constants = function_constants
        self._modules: dict[tuple[str, bool], _Module] = {}
        self._pipelines: dict[object, Pipeline] = {}
        # Of templates, more than one kernel is made: together they parse the program once, and plain ones are checked.
        plain = [name for name, kernel in program.kernels.items() if "<" not in kernel.instance]
        is_shared = len(plain) < len(program.kernels)
        self._header = toolchain.precompile(program.text if is_shared else "", standard)
        self._text = "" if is_shared else program.text
        if plain or not is_shared:
            self.check(plain)

    @property
    def kernels(self) -> list[str]:
        return list(self._program.kernels)

    @property
    def function_constants(self) -> dict[int, str]:
        """Names of the function constants that the source declares, by index."""
        return {constant.index: constant.name for constant in self._program.constants if constant.index >= 0}

    def check(self, names: Sequence[str] | None = None) -> None:
        """Compiles kernels (all by default) as far as the compiler can complain. Raises CompileError."""
        entries = [self._entry(name) for name in (self.kernels if names is None else names)]
        toolchain.check_syntax(self._text + "".join(entries), self._header)

    def prepare(self, names: Sequence[str] | None = None, check: bool = True) -> None:
        """Compiles kernels (all by default) to code that later launches find in the cache, on all cores."""
        missing = []
        for name in dict.fromkeys(self.kernels if names is None else names):
            key = self._key(name, check)
            if not toolchain.module_path(key).exists():
                missing.append((key, self._entry(name)))
        workers = os.cpu_count() or 1
        size = max(1, min(BATCH, -(-len(missing) // workers)))
        batches = [missing[i : i + size] for i in range(0, len(missing), size)]

        def build(batch: list[tuple[str, str]]) -> None:
            text = self._text + "".join(entry for _, entry in batch)
            toolchain.compile_module(text, self._header, check, [key for key, _ in batch])

        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(build, batches))

    def _entry(self, name: str) -> str:
        return msl.entry_point(self._program, name, _symbol(name))

    def _key(self, name: str, check: bool) -> str:
        return toolchain.module_key(self._text + self._entry(name), self._header, check)

    def _load(self, name: str, check: bool) -> _Module:
        if (name, check) not in self._modules:
            key = self._key(name, check)
            toolchain.compile_module(self._text + self._entry(name), self._header, check, [key])
            self._modules[name, check] = _Module(toolchain.module_path(key), _symbol(name))
        return self._modules[name, check]

    def pipeline(
        self, name: str, function_constants: Mapping[int, object] | None = None, check: bool = True
    ) -> Pipeline:
        """A kernel ready for raw launches, for a host-side imitation of Metal; all that such a host needs is here.

        function_constants: values by index, as bytes of the declared type's size (as setConstantValue takes them) or
            as numbers. Values override those given to compile.

        Raises KeyError for an unknown kernel, CompileError, and ValueError where a function constant that the kernel
        uses has no value (unless it asks is_function_constant_defined), or one of the wrong size.

        compile(source, defines=..., standard=...) is newLibraryWithSource; Library.kernels are its function names,
        Library.function_constants the names of its constants by index; Library.prepare(names) compiles many kernels at
        once. Compiling is thread-safe, and processes share the cache on disk.

        Pipeline.address is the address of a SoftmetalPipeline (msl/runtime.h), valid as long as the Pipeline lives. A
        C++ host passes it to softmetal_launch with raw memory, without Python: it loads that function with
        dlopen(runtime_path()), the library that the kernels use, too. msl/runtime.h tells the meaning of every field.
        A host allocates each buffer with `guard` bytes of 0xFF on both sides and sets in_place, or leaves in_place 0
        and has the runtime copy. Errors of a report are turned into texts with file and line by
        Pipeline.describe(kind, message, offset, count).
        """
        kernel = self._program.kernels[name]
        values = {**self._constants, **(function_constants or {})}
        given = (constant for constant in self._program.constants if values.get(constant.index) is not None)
        packed = {constant.slot: _pack_constant(constant, values[constant.index]) for constant in given}
        key = (name, check, tuple(sorted(packed.items())))
        if key not in self._pipelines:
            module = self._load(name, check)
            self._require_constants(name, module, packed)
            self._pipelines[key] = Pipeline(kernel, module, packed, check)
        return self._pipelines[key]

    def constants_of(self, name: str) -> list[tuple[int, str, str, bool]]:
        """The function constants that a kernel uses, by index: index, name, type, and whether it needs a value."""
        used = self._used_constants(self._load(name, True))
        return sorted((c.index, c.name, c.kind, is_needed) for c, is_needed in used)

    def _used_constants(self, module: _Module) -> list[tuple[msl.Constant, bool]]:
        """Those that have an index, and whether the kernel does without asking if they are defined."""
        constants = {constant.slot: constant for constant in self._program.constants}
        used, optional = set(module.slots), set(module.optional_slots)
        for slot in sorted(constants, reverse=True):  # a derived constant comes after its inputs, which may be derived
            if slot in used:
                used.update(constants[slot].inputs)
                optional.update(constants[slot].inputs if constants[slot].is_optional else ())
        return [(constants[slot], slot not in optional) for slot in sorted(used) if constants[slot].index >= 0]

    def _require_constants(self, name: str, module: _Module, packed: Mapping[int, bytes]) -> None:
        for constant, is_needed in self._used_constants(module):
            if is_needed and constant.slot not in packed:
                raise ValueError(f"kernel {name} needs function constant {constant.index} ({constant.name})")

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
        function_constants: Mapping[int, object] | None = None,
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
        function_constants: as in pipeline().

        Raises KeyError for an unknown kernel, CompileError, ValueError for arguments that no device would take.
        """
        kernel = self._program.kernels[name]
        size = _three("threads_per_threadgroup", threads_per_threadgroup)
        if (threadgroups is None) == (threads is None):
            raise ValueError("give either threadgroups or threads")
        groups = _three("threadgroups", threadgroups) if threads is None else None
        grid = [g * s for g, s in zip(groups, size, strict=True)] if groups else _three("threads", threads)
        memory = _Memory(kernel, buffers, set(uninitialized))
        lengths = _threadgroup_lengths(kernel, threadgroup_memory or {})
        pipeline = self.pipeline(name, function_constants, check)
        most = pipeline.structure.max_threads
        if np.prod(size) > most:
            raise ValueError(f"a threadgroup of {kernel.name} has at most {most} threads, not {size}")
        launch = _Launch(
            pipeline=ctypes.pointer(pipeline.structure),
            allocations=memory.allocations,
            bindings=memory.bindings,
            threadgroup_lengths=(ctypes.c_uint64 * max(len(lengths), 1))(*lengths),
            allocation_count=memory.allocation_count,
            binding_count=len(memory.bindings),
            threadgroup_length_count=len(lengths),
            threads_per_threadgroup=(ctypes.c_uint32 * 3)(*size),
            threads=(ctypes.c_uint32 * 3)(*grid),
            seed=seed,
            seconds=seconds,
        )
        report = _runtime().softmetal_launch(ctypes.byref(launch))
        counters = report.contents.counters
        totals: dict[str, Any] = {field: getattr(counters, field) for field, _ in _Counters._fields_}
        errors = [
            memory.name_buffers(pipeline.describe(e.kind.decode(), e.message.decode(), e.offset, e.count))
            for e in report.contents.errors[: report.contents.error_count]
        ]
        _runtime().softmetal_free_report(report)
        totals["buffer_bytes_read"] = memory.by_buffer("bytes_read")
        totals["buffer_bytes_written"] = memory.by_buffer("bytes_written")
        return Report(errors, totals)


class _Module:
    """A loaded shared object with one kernel's entry points."""

    def __init__(self, path: Path, symbol: str) -> None:
        _runtime()  # whose symbols it needs
        self.path = path
        self.library = ctypes.CDLL(str(path))
        self.entry = ctypes.cast(self.library[symbol], ctypes.c_void_p).value
        self.derive = ctypes.cast(self.library[f"{symbol}_derive"], ctypes.c_void_p).value
        self.max_threads: int = self.library[f"{symbol}_max_threads"]()
        symbols = toolchain.undefined_symbols(path)
        self.slots = self._numbers(symbols, "softmetal_slot_")
        self.optional_slots = self._numbers(symbols, "softmetal_defined_")

    @staticmethod
    def _numbers(symbols: set[str], prefix: str) -> list[int]:
        return [int(name.removeprefix(prefix)) for name in symbols if name.startswith(prefix)]


class Pipeline:
    """A compiled kernel with its function constants; `address` is that of its SoftmetalPipeline."""

    def __init__(self, kernel: msl.Kernel, module: _Module, constants: Mapping[int, bytes], check: bool) -> None:
        self.name = kernel.name
        self._path = module.path
        table = (_Constant * max(len(constants), 1))()
        for entry, (slot, value) in zip(table, constants.items(), strict=False):
            entry.slot, entry.size = slot, len(value)
            ctypes.memmove(entry.value, value, len(value))
        buffers = [p for p in kernel.parameters if p.kind == "buffer"]
        self.structure = _Pipeline(
            entry=module.entry,
            derive=module.derive,
            constants=table,
            constant_count=len(constants),
            buffers=sum(1 << p.index for p in buffers),
            writable_buffers=sum(1 << p.index for p in buffers if not p.is_const),
            threadgroup_arguments=max((p.index + 1 for p in kernel.parameters if p.kind == "threadgroup"), default=0),
            max_threads=module.max_threads,
            checked=check,
        )

    @property
    def address(self) -> int:
        return ctypes.addressof(self.structure)

    def describe(self, kind: str, message: str, offset: int, count: int) -> str:
        """The text of an error in a SoftmetalReport: "kind: file:line: what"."""
        place = f"{_source_line(self._path, offset)}: " if offset else ""
        times = f" ({count} times)" if count > 1 else ""
        return f"{kind}: {place}{message}{times}"


def _symbol(name: str) -> str:
    return f"softmetal_entry_{digest(name)}"


def _pack_constant(constant: msl.Constant, value: Any) -> bytes:
    """A function constant's value as the bytes of its declared type."""
    match = re.fullmatch(r"(?:metal *:: *)?([a-z]\w*?)([234])?", constant.kind)
    if not match or match[1] not in CONSTANT_TYPES:
        raise ValueError(f"function constant {constant.index} has the type '{constant.kind}', which is not supported")
    dtype, count = CONSTANT_TYPES[match[1]], int(match[2] or 1)
    size = dtype.itemsize * (4 if count == 3 else count)
    if isinstance(value, bytes):
        packed = value
    else:
        packed = np.broadcast_to(np.asarray(value).astype(dtype), count).tobytes().ljust(size, b"\0")
    if len(packed) != size:
        raise ValueError(f"function constant {constant.index} ({constant.kind}) has {size} bytes, not {len(packed)}")
    return packed


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
            members = {i for i, owner in self.owner.items() if owner == number}
            self.allocations[number] = _Allocation(
                data=begin, size=end - begin, writable=1, initialized=not members & uninitialized
            )
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


@cache
def _source_line(path: Path, offset: int) -> str:
    """The innermost frame of the shader itself at an offset of the compiled kernel."""
    lines = subprocess.run(
        ["addr2line", "-i", "-e", str(path), hex(offset)], capture_output=True, text=True, check=True
    ).stdout.split("\n")
    frames = [line.split(" (discriminator")[0] for line in lines if line]
    user = [frame for frame in frames if not frame.startswith(str(toolchain.SHIM))]
    return (user or frames)[0].removeprefix("./")
