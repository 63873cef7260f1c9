"""Device "mps" on Linux: a torch extension's own Objective-C++ on the software Metal device, in a torch without MPS.

mps.install(mps.Extension(sources={Path("my_ops.mm"): ()}))   # once; imports nothing, registers what the files register
y = torch.ops.mine.scale(x.to("mps"))
mps.launched()                     # the kernels that ran, in order
mps.errors()                       # what the device found wrong; every test must end with none

The library is compiled at the first use and kept in the cache (cache.py).
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import cache
from importlib.machinery import ExtensionFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

from . import device
from .cache import cached, digest, directory, locked
from .msl.toolchain import clang

HOST = Path(__file__).resolve().parent / "host"
IMITATED = (*("foundation.mm", "device.cpp", "metal.mm", "stream.mm", "backend.cpp", "module.cpp"), "misuse.mm")
STANDARDS = {310: "metal3.1", 320: "metal3.2", 400: "metal4.0"}


# --- The library --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Extension:
    """The files that give a torch extension's ops their kernels for device "mps", unmodified.

    sources: each file, with compiler flags of its own. flags: those of all of them. link_flags: the linker's. objects:
    further files that the device has no part in, compiled already.
    """

    sources: Mapping[Path, Sequence[str]] = field(default_factory=dict)
    flags: Sequence[str] = ()
    link_flags: Sequence[str] = ()
    objects: Sequence[Path] = ()


@cache
def _flags() -> tuple[str, ...]:
    import torch

    headers = Path(torch.__file__).parent / "include"
    return (
        *("-std=gnu++20", "-O1", "-fPIC", "-fvisibility=hidden"),
        *("-fblocks", "-fobjc-runtime=gcc", "-fconstant-string-class=NSConstantString"),
        # The frameworks' protocols have more than is imitated.
        *("-Wno-protocol", "-Wno-objc-property-implementation", "-Wno-incomplete-implementation"),
        *(f"-I{HOST / 'apple'}", f"-I{HOST}", "-include", str(HOST / "prefix.h")),
        *("-isystem", str(headers), "-isystem", str(headers / "torch/csrc/api/include")),
        *("-isystem", sysconfig.get_path("include")),
        f"-DSOFTMETAL_TORCH={torch.__version__}",  # objects belong to one release
    )


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


def _state(paths: list[str]) -> dict[str, str]:
    return {path: digest(Path(path).read_bytes()) if Path(path).exists() else "" for path in paths}


def _build_object(source: Path, flags: Sequence[str]) -> Path:
    """The object of a source; compiled where one of the files that it was made of, torch's aside, has changed."""
    command = [clang(), *_flags(), *flags, *(("-x", "objective-c++") if source.suffix == ".mm" else ())]
    target = directory() / f"object-{digest(str(source), *command)}.o"
    record = target.with_suffix(".json")
    if target.exists() and record.exists():
        known = json.loads(record.read_text())
        if _state(list(known)) == known:
            return target
    listing = target.with_suffix(".d")
    _run([*command, "-MMD", "-MF", str(listing), "-MT", "object", "-c", str(source), "-o", str(target)])
    names = listing.read_text().replace("\\\n", " ").split()[1:]
    record.write_text(json.dumps(_state([str(Path(name).resolve()) for name in names])))
    return target


def _link(objects: list[Path], flags: Sequence[str]) -> Path:
    import torch

    arguments = [
        *(*flags, f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10", "-ldl"),
        *("-l:libobjc.so.4", "-l:libBlocksRuntime.so.0"),  # Debian's libobjc4 and libblocksruntime0
    ]

    def link(path: Path) -> None:
        # Python's symbols are the program's; whatever else is missing is noticed when the library is loaded.
        _run([clang(), "-shared", *map(str, objects), *arguments, "-o", str(path)])

    return cached(f"softmetal_host-{digest(*(path.read_bytes() for path in objects), *arguments)}.so", link)


def metallib_flags(shaders: Sequence[Path]) -> list[str]:
    """What kernel-builder defines for a file that loads a library of shaders, which is compiled as language 4.0."""
    files = "".join(f"{path}\\n" for path in shaders)
    header = f'-DEMBEDDED_METALLIB_HEADER="{HOST / "metallib.h"}"'
    return [header, "-DEMBEDDED_METALLIB_NAMESPACE=softmetal_metallib", f'-DSOFTMETAL_SHADERS="{files}"']


def build(extension: Extension) -> Path:
    """Builds the library of the device and an extension where anything has changed. Returns its path."""
    with locked("host"):
        sources = {HOST / name: () for name in IMITATED}
        sources |= {path: (*extension.flags, *flags) for path, flags in extension.sources.items()}
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(_build_object, sources, sources.values()))
        return _link([*objects, *extension.objects], extension.link_flags)


# --- The device ---------------------------------------------------------------------------------------------------


class _Shaders:
    """An MTLLibrary's shaders: of one source, or of all files of a metallib. Pairs of a library and its source."""

    def __init__(self, *libraries: tuple[device.Library, str]) -> None:
        self._libraries = {name: library for library, _ in libraries for name in library.kernels}
        self._with_tensor_ops = {
            name for library, text in libraries for name in library.kernels if "<MetalPerformancePrimitives/" in text
        }

    @property
    def kernels(self) -> list[str]:
        return list(self._libraries)

    def uses_tensor_ops(self, name: str) -> bool:
        return name in self._with_tensor_ops

    def constants_of(self, name: str) -> list[tuple[int, str, str, bool]]:
        return self._libraries[name].constants_of(name)

    def pipeline(self, name: str, constants: Mapping[int, bytes]) -> device.Pipeline:
        return self._libraries[name].pipeline(name, constants)


def _compile(source: str, macros: Mapping[str, str], version: int) -> _Shaders:
    return _Shaders((device.compile(source, defines=macros, standard=STANDARDS[version]), source))


def _load(data: str) -> _Shaders:
    files = [Path(path) for path in data.removeprefix("MTLB").splitlines()]
    return _Shaders(*((device.compile(path, standard="metal4.0"), _with_own_header(path)) for path in files))


def _with_own_header(path: Path) -> str:
    return "".join(part.read_text() for part in (path, path.with_suffix(".h")) if part.exists())


_module: ModuleType | None = None
_extension: Extension | None = None


def _host() -> ModuleType:
    if _module is None:
        raise RuntimeError("call install() first")
    return _module


def _storage_on_mps(storage: Any) -> Any:
    """A storage's copy on the device, as torch.load makes it. A torch without MPS cannot make such a storage itself."""
    import torch

    bytes_on_host = torch.empty(0, dtype=torch.uint8).set_(storage)
    return bytes_on_host.to("mps").untyped_storage()


def install(extension: Extension | None = None) -> None:
    """Gives torch a device "mps", with an extension's kernels for it. Does nothing the second time.

    Raises RuntimeError where the device is there with another extension.
    """
    global _module, _extension
    extension = extension or Extension()
    if _module is not None:
        if extension != _extension:
            raise RuntimeError("the device is there already, with another extension")
        return
    import torch

    loader = ExtensionFileLoader("softmetal_host", str(build(extension)))
    spec = importlib.util.spec_from_file_location("softmetal_host", loader.path, loader=loader)
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    module.configure(_compile, _load, str(device.runtime_path()))
    torch.UntypedStorage.mps = _storage_on_mps
    torch.backends.mps.is_available.cache_clear()
    _module, _extension = module, extension


@dataclass(frozen=True)
class Launch:
    """A kernel that ran. constants are the indices of the function constants that were true."""

    kernel: str
    constants: tuple[int, ...]
    threadgroups: tuple[int, int, int]
    threads: tuple[int, int, int]
    counters: dict[str, int]
    bytes_read: dict[int, int]  # by index of a buffer, without what setBytes gave


def launched() -> list[Launch]:
    """What has run since the last call of clear()."""
    return [
        Launch(
            record["kernel"],
            tuple(index for index, value in sorted(record["constants"].items()) if any(value)),
            record["threadgroups"],
            record["threads"],
            record["counters"],
            record["bytes_read"],
        )
        for record in _host().logs()["launches"]
    ]


def errors() -> list[str]:
    """What the device has found wrong since the last call of clear()."""
    return _host().errors()


def logs() -> dict:
    """Everything since the last call of clear(): errors, launches, compiles, fallbacks (ops of torch that ran on the
    CPU), transfers (copies between host and device), synchronizations, and counts (by name, of what an extension's
    own checks add with softmetal::count)."""
    return _host().logs()


def clear() -> None:
    _host().clear_logs()


def live_objects() -> dict[str, int]:
    """Objective-C objects in existence, by class."""
    return _host().live_objects()


def misuses() -> list[str]:
    """What a host file can do wrong, of which host/misuse.mm has an example each."""
    return _host().misuses()


def misuse(name: str) -> None:
    """Runs one of misuses(). Raises RuntimeError as the device notices."""
    _host().misuse(name)


@contextmanager
def _changed(**changes: object) -> Iterator[None]:
    before = _host().settings()
    _change(**changes)
    try:
        yield
    finally:
        _change(**{name: getattr(before, name) for name in changes})


def _change(**changes: object) -> None:
    settings = _host().settings()
    for name, value in changes.items():
        setattr(settings, name, value)
    _host().set(settings)


def set_gpu(name: str = "applegpu_g17s", macos: int = 2602) -> None:
    """The GPU and the release of macOS (1400, 1500, 2600 for 26.0, 2602 for 26.2) that the device claims to be."""
    _change(gpu=name, macos=macos)


def gpu(name: str = "applegpu_g17s", macos: int = 2602) -> AbstractContextManager[None]:
    """set_gpu for a while."""
    return _changed(gpu=name, macos=macos)


def corrupted(part_of_name: str) -> AbstractContextManager[None]:
    """For a while, kernels whose names contain this give wrong results."""
    return _changed(corrupted=part_of_name)


def idle() -> AbstractContextManager[None]:
    """For a while, commands are encoded and not run: what is then left of an op's time is the host's."""
    return _changed(idle=True)


def shuffled(seed: int) -> AbstractContextManager[None]:
    """For a while, threads and threadgroups run in an order that the seed draws; 0: in order."""
    return _changed(seed=seed)
