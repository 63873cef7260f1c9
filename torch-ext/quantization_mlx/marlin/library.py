"""Marlin's kernel library: its handle for the dispatch functions, and Metal code of the user's."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from .._ops import ops
from ..metal import MATH_MODES, Constants, Source, a_tensor_of_the_gpu, constant_lists, function_names, line_mark


def _default_device() -> torch.device:
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


class MetalObject:
    """A Metal object by its address, for PyObjC where that is installed (`pyobjc`)."""

    def __init__(self, address: int) -> None:
        self.address = address

    def pyobjc(self) -> Any:
        """The object as PyObjC has it. Raises ImportError where that is not installed."""
        import objc

        return objc.objc_object(c_void_p=self.address)


class MetalPipeline(MetalObject):
    """A compute pipeline state of a kernel. The extension keeps it for as long as the process lives."""

    def __init__(self, name: str, address: int, threads: int, width: int) -> None:
        super().__init__(address)
        self.name = name
        self._threads = threads
        self._width = width

    def maxTotalThreadsPerThreadgroup(self) -> int:
        """How many threads a threadgroup of it can have on this GPU."""
        return self._threads

    def threadExecutionWidth(self) -> int:
        """How many threads a simdgroup has."""
        return self._width

    def __repr__(self) -> str:
        return f"MetalPipeline({self.name!r})"


class MetalLibrary:
    """Compiled Metal source."""

    def __init__(self, name: str, functions: list[str]) -> None:
        self.name = name
        self._functions = functions

    def functionNames(self) -> list[str]:
        """Of its kernels."""
        return list(self._functions)

    def __repr__(self) -> str:
        return f"MetalLibrary({self.name!r}, {self._functions})"


class MetalKernelLibrary:
    """The handle that `dispatch_gemm_fp4` and its like take first, and libraries of Metal code of your own.

    The kernels of this package are in its extension, which compiles or loads each once, whatever the handle; and a
    product runs where its tensors are. Source is compiled once per process, however many handles have it. Any thread
    may call.

    Args:
        device: "mps", "cpu" or such a torch.device, where work without tensors of its own (`benchmark_dequant_fp4`)
            runs; None is "mps" where torch has it, else "cpu".
        math_mode: "safe", "relaxed" or "fast", of source that is compiled.

    Raises:
        ValueError: another device or math_mode.
    """

    def __init__(self, device: torch.device | str | None = None, *, math_mode: str = "safe") -> None:
        if device is None and not torch.compiler.is_compiling():
            device = _default_device()
        self._device = None if device is None else torch.device(device)
        if self._device is not None and self._device.type not in ("cpu", "mps"):
            raise ValueError(f"[MetalKernelLibrary] device is {str(self._device)!r}; supported are 'mps' and 'cpu'")
        if math_mode not in MATH_MODES:
            raise ValueError(f"[MetalKernelLibrary] math_mode is {math_mode!r}; supported are {MATH_MODES}")
        self._math_mode = math_mode
        self._sources: dict[str, Source] = {}  # in the order in which kernels are looked for

    @classmethod
    def from_source_dir(cls, src_dir: Path | str | None = None) -> "MetalKernelLibrary":
        """A library for each `.metal` file of a directory and those below it, named by its path without the suffix.

        Headers that a file includes with quotes are looked for beside it and in the directory.

        Args:
            src_dir: None for this package's own shaders. Each of those is compiled when it is asked for, which takes
                minutes for the ones with products.

        Raises:
            FileNotFoundError: no directory, no `.metal` files in it, or a header that is not there.
            RuntimeError: what Metal's compiler says, with file and line.
            NotImplementedError: there is no Apple GPU.
        """
        library = cls("mps" if torch.backends.mps.is_available() else None)
        if src_dir is None:
            texts = iter(ops._metal_shaders(a_tensor_of_the_gpu(), "from_source_dir"))
            for name, text in zip(texts, texts, strict=True):
                library._sources[name] = Source(name, text)
            return library
        for name, text in _files(Path(src_dir)):
            library._add("from_source_dir", name, text)
        return library

    def compile_source(self, name: str, source: str) -> MetalLibrary:
        """Compiles Metal source under a name, in the place of what had it before.

        Raises:
            RuntimeError: what Metal's compiler says, with the name and the line.
            ValueError: an empty name.
            NotImplementedError: there is no Apple GPU.
        """
        if not name:
            raise ValueError("[compile_source] name is empty")
        return self._add("compile_source", name, f"{line_mark(1, name)}{source}")

    def _add(self, op: str, name: str, text: str) -> MetalLibrary:
        source = Source(name, text, self._math_mode)
        functions = function_names(op, source)
        self._sources[name] = source
        return MetalLibrary(name, functions)

    def list_functions(self, library_name: str) -> list[str]:
        """The names of a library's kernels, sorted. Raises ValueError for a name that no library has."""
        return sorted(function_names("list_functions", self._named("list_functions", library_name)))

    def get_pipeline(
        self, function_name: str, library_name: str | None = None, *, constants: Constants | None = None
    ) -> MetalPipeline:
        """A kernel's compute pipeline state, of that library or of the first that has the kernel.

        Args:
            function_name: of the kernel.
            library_name: of the library; None for the first that has it.
            constants: values of its function constants by index or name. A bool for a bool, an int for an integer, an
                int or a float for a half or a float.

        Raises:
            ValueError: a name that no library has; a constant that the kernel does not have, that it needs and is not
                given, that is given twice, or whose type does not have the value.
            TypeError: a constant that is no bool, int or float, or whose key is no index and no name.
        """
        op = "get_pipeline"
        source = self.source_of(op, function_name, library_name)
        gpu = a_tensor_of_the_gpu()
        library = gpu, op, source.name, source.text, source.math_mode
        facts = ops._metal_pipeline(*library, function_name, *constant_lists(op, constants))
        return MetalPipeline(function_name, *facts)

    def source_of(self, op: str, function_name: str, library_name: str | None = None) -> Source:
        """What has a kernel. Raises ValueError, in the name of `op`, where nothing has."""
        if library_name is not None:
            return self._named(op, library_name)
        for source in list(self._sources.values()):
            if function_name in function_names(op, source):
                return source
        raise ValueError(f"[{op}] no library has a kernel '{function_name}'; there are {self._names()}")

    def _named(self, op: str, name: str) -> Source:
        if name not in self._sources:
            raise ValueError(f"[{op}] there is no library '{name}'; there are {self._names()}")
        return self._sources[name]

    def _names(self) -> str:
        return ", ".join(map(repr, self._sources)) or "none: compile_source makes one"

    @property
    def device(self) -> torch.device:
        """Where work without tensors of its own runs."""
        # torch.compile cannot trace the query for a GPU, so a library made while tracing asks later.
        return _default_device() if self._device is None else self._device

    @property
    def command_queue(self) -> MetalObject:
        """The MTLCommandQueue of torch's current stream. Raises NotImplementedError where there is no Apple GPU."""
        return MetalObject(ops._metal_queue(a_tensor_of_the_gpu(), "command_queue"))

    def __repr__(self) -> str:
        return f"MetalKernelLibrary(device={str(self.device)!r})"


# --- Source files ----------------------------------------------------------------------------------------------------

_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*"([^"]+)"')


def _files(folder: Path) -> Iterator[tuple[str, str]]:
    if not folder.is_dir():
        raise FileNotFoundError(f"[from_source_dir] there is no directory {folder}")
    paths = sorted(folder.rglob("*.metal"))
    if not paths:
        raise FileNotFoundError(f"[from_source_dir] {folder} has no .metal files")
    for path in paths:
        yield path.relative_to(folder).with_suffix("").as_posix(), _flattened(path, folder, ())


def _flattened(path: Path, folder: Path, including: tuple[Path, ...]) -> str:
    """A file with the text of its headers in their place: Metal looks for none when it compiles text."""
    parts = [line_mark(1, str(path))]
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        include = _INCLUDE.match(line)
        if include is None:
            parts.append("\n" if re.match(r"\s*#\s*pragma\s+once\b", line) else line)
            continue
        header = _header(include.group(1), path, number, folder)
        if header not in (*including, path.resolve()):
            parts += [_flattened(header, folder, (*including, path.resolve())), "\n", line_mark(number + 1, str(path))]
    text = "".join(parts)
    if not any(re.match(r"\s*#\s*pragma\s+once\b", line) for line in lines):
        return text
    guard = "ONCE_" + re.sub(r"\W", "_", str(path.resolve()))
    return f"#ifndef {guard}\n#define {guard}\n{text}\n#endif\n"


def _header(name: str, path: Path, number: int, folder: Path) -> Path:
    for place in (path.parent, folder):
        if (place / name).is_file():
            return (place / name).resolve()
    raise FileNotFoundError(f'[from_source_dir] {path}:{number}: there is no "{name}" beside it or in {folder}')


_default: dict[str, MetalKernelLibrary] = {}


def get_default_library() -> MetalKernelLibrary:
    """The process's one library for the default device, made by the first call; any thread may call, and so may code
    that torch.compile traces."""
    library = _default.get("library")
    # If several threads get here first, setdefault keeps one library. A lock could not be traced.
    return _default.setdefault("library", MetalKernelLibrary()) if library is None else library
