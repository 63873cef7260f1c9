"""Builds the macOS package on Linux as far as that goes: `make mac-check`, or `python tests/host/mac_check.py`.

- compiles what CMakeLists.txt lists for Apple silicon, with zig's clang, against the headers of each torch release's
  macOS wheel and the declarations in softmetal/host/apple; warnings in Objective-C++ are errors;
- links strictly: every symbol has to be in torch's libraries, in the C++ library or in SYSTEM_LIBRARIES below, so that
  names which torch does not have, and functions that .cpp and .mm files mangle differently, are found here;
- runs clang's retain-count analyzer on the Objective-C++ files, which count references by hand;
- compares the declarations with public type encodings (type_encodings.py).

No Mac and no file of Apple's frameworks is needed; everything comes from Python wheels, kept in build/mac-check.
What this cannot tell: whether Apple's compiler takes the shaders, and anything about a real GPU.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import type_encodings

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / "build" / "mac-check"
TORCH_RELEASES = ("2.12.0", "2.13.0")
DEPLOYMENT_TARGET = "14.0"
JOBS = "2"

# What a process on macOS finds in system libraries, one list for each library that the link names. A symbol that is
# missing here has to exist on macOS 14 before it is added.
SYSTEM_LIBRARIES = {
    # Foundation re-exports libobjc.
    "Foundation.framework/Foundation": {
        "symbols": """_NSLocalizedDescriptionKey __objc_empty_cache ___objc_personality_v0 _objc_alloc _objc_alloc_init
            _objc_autorelease _objc_autoreleasePoolPop _objc_autoreleasePoolPush _objc_autoreleaseReturnValue
            _objc_claimAutoreleasedReturnValue _objc_enumerationMutation _objc_msgSend _objc_opt_class
            _objc_opt_isKindOfClass _objc_opt_new _objc_opt_respondsToSelector _objc_release _objc_retain
            _objc_retainAutorelease _objc_retainAutoreleasedReturnValue ___CFConstantStringClassReference""",
        "classes": """NSArray NSAutoreleasePool NSData NSDictionary NSError NSMutableDictionary NSNumber NSObject
            NSProcessInfo NSString NSURL""",
    },
    "Metal.framework/Metal": {
        "symbols": "_MTLCreateSystemDefaultDevice",
        "classes": "MTLCompileOptions MTLComputePipelineDescriptor MTLFunctionConstantValues",
    },
    # Part of Apple's compiler: what __builtin_available and @available call.
    "compiler": {"symbols": "___isPlatformVersionAtLeast", "classes": ""},
    # The interpreter that loads the module has these; only functions of the stable interface.
    "python": {"symbols": "_PyModule_Create2", "classes": ""},
}
OBJECTIVE_CXX_FLAGS = "-fblocks -Werror -Wundeclared-selector -Wunguarded-availability-new"
# zig would add checks that Apple's clang does not; without optimization every function that a header defines is in the
# object files, and with it all that those functions call.
COMMON_FLAGS = "-O0 -fno-sanitize=undefined"


class CheckFailed(Exception):
    pass


def run(command: list[str | Path], **environment: str) -> str:
    """The output of a command, both streams. Raises CheckFailed with it where the command fails."""
    environment |= {"ZIG_GLOBAL_CACHE_DIR": str(CACHE / "zig"), "ZIG_LOCAL_CACHE_DIR": str(CACHE / "zig")}
    command = [str(part) for part in command]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    done = subprocess.run(command, env=os.environ | environment, text=True, **streams)
    if done.returncode:
        raise CheckFailed(f"{shlex.join(command)}\n{done.stdout}")
    return done.stdout


# --- What comes from wheels ------------------------------------------------------------------------------------------


def zig() -> Path:
    found = importlib.util.find_spec("ziglang")
    if found is None:
        raise CheckFailed("ziglang is not installed: pip install 'quantization-mlx[mac-check]'")
    return Path(found.submodule_search_locations[0]) / "zig"


def unpack_wheel(requirement: str, folder: Path, wanted: tuple[str, ...]) -> None:
    """Those files of a macOS wheel whose names start with one of `wanted`."""
    wheels = folder / "wheels"
    platforms = ["macosx_14_0_arm64", "macosx_11_0_arm64", "macosx_11_0_universal2", "macosx_10_9_universal2"]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version", "3.11", *(f"--platform={platform}" for platform in platforms)]
    run([*command, "--dest", wheels, requirement])
    (wheel,) = wheels.iterdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder, [name for name in archive.namelist() if name.startswith(wanted)])
    shutil.rmtree(wheels)


def cached(folder: Path, make: Callable[[Path], None]) -> Path:
    """The folder, made in one step: an interrupted download leaves nothing that looks complete."""
    if not folder.exists():
        unfinished = folder.with_name(folder.name + ".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        make(unfinished)
        unfinished.rename(folder)
    return folder


def torch_release(version: str) -> Path:
    """A folder to put on PYTHONPATH for CMake, which asks Python's torch where it is."""

    def make(folder: Path) -> None:
        libraries = tuple(f"torch/lib/lib{name}.dylib" for name in ("c10", "torch", "torch_cpu"))
        unpack_wheel(f"torch=={version}", folder, ("torch/include/", "torch/share/cmake/", *libraries))
        (folder / "torch" / "__init__.py").write_text(
            "from types import SimpleNamespace\n"
            "utils = SimpleNamespace(cmake_prefix_path=__path__[0] + '/share/cmake')\n"
        )

    return cached(CACHE / f"torch-{version}", make)


def encodings_packages() -> Path:
    def make(folder: Path) -> None:
        for requirement in type_encodings.PACKAGES:
            unpack_wheel(requirement, folder, ("Metal/", "Foundation/", "objc/", "tinygrad/runtime/autogen/metal"))

    return cached(CACHE / "encodings", make)


# --- A toolchain of zig's -------------------------------------------------------------------------------------------


def write_toolchain() -> Path:
    """The file for CMake, the programs it names and the descriptions of system libraries."""
    folder = CACHE / "toolchain"
    folder.mkdir(parents=True, exist_ok=True)
    for library, content in SYSTEM_LIBRARIES.items():
        write_library_description(folder / f"{library}.tbd", content)
    # CMake builds a bundle that leaves all unknown symbols to the loader, as Python modules do. zig's linker knows no
    # bundles, and this link is to be strict.
    # To learn which compiler this is, CMake is as glad of an object file, for which zig builds no libraries.
    write_program(
        folder / "c++",
        f"""for argument; do
  shift
  case $argument in
    -bundle) set -- "$@" -shared -F{folder} {folder}/compiler.tbd {folder}/python.tbd ;;
    -Xlinker | -undefined | dynamic_lookup) ;;
    *CompilerId.*) set -- "$@" -c "$argument" ;;
    *) set -- "$@" "$argument" ;;
  esac
done
exec {zig()} c++ "$@"
""",
    )
    for tool in ("cc", "ar", "ranlib"):
        write_program(folder / tool, f'exec {zig()} {tool} "$@"\n')
    target = f"aarch64-macos.{DEPLOYMENT_TARGET}"
    lines = ["set(CMAKE_SYSTEM_NAME Darwin)", "set(CMAKE_SYSTEM_PROCESSOR arm64)"]
    lines += [f'set(CMAKE_OSX_DEPLOYMENT_TARGET {DEPLOYMENT_TARGET} CACHE STRING "")']
    lines += ['set(CMAKE_OSX_SYSROOT "" CACHE STRING "")', "set(CMAKE_TRY_COMPILE_TARGET_TYPE STATIC_LIBRARY)"]
    for language, program in (("C", "cc"), ("CXX", "c++"), ("OBJCXX", "c++")):
        lines.append(f"set(CMAKE_{language}_COMPILER {folder / program})")
        lines.append(f"set(CMAKE_{language}_COMPILER_TARGET {target})")
        lines.append(f'set(CMAKE_{language}_FLAGS_CHECK "{COMMON_FLAGS}")')
    lines.append(f'set(CMAKE_OBJCXX_FLAGS_INIT "{OBJECTIVE_CXX_FLAGS} -I{type_encodings.STUBS}")')
    lines += [f"set(CMAKE_{tool.upper()} {folder / tool})" for tool in ("ar", "ranlib")]
    # CMake insists on it for Objective-C++, and uses it only to install.
    lines.append("set(CMAKE_INSTALL_NAME_TOOL install_name_tool)")
    file = folder / "toolchain.cmake"
    write_if_changed(file, "\n".join(lines) + "\n")
    return file


def write_library_description(path: Path, content: dict[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    symbols, classes = (", ".join(content[kind].split()) for kind in ("symbols", "classes"))
    write_if_changed(
        path,
        f"""--- !tapi-tbd
tbd-version: 4
targets: [ arm64-macos ]
install-name: '/System/Library/Frameworks/{path.stem}'
exports:
  - targets: [ arm64-macos ]
    symbols: [ {symbols} ]
    objc-classes: [ {classes} ]
...
""",
    )


def write_program(path: Path, script: str) -> None:
    write_if_changed(path, f"#!/bin/sh\n{script}")
    path.chmod(0o755)


def write_if_changed(path: Path, text: str) -> None:
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


# --- The checks ------------------------------------------------------------------------------------------------------


def configure(version: str, source: Path, folder: Path, *options: str) -> None:
    """Generates the build of the extension for one release of torch."""
    generate = ["cmake", "-S", source, "-B", folder, "-G", "Ninja", "--toolchain", write_toolchain()]
    generate += ["-DCMAKE_BUILD_TYPE=Check", "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON"]
    generate += [f"-DPython_EXECUTABLE={sys.executable}"]
    run([*generate, *options], PATH=program_path(), PYTHONPATH=str(torch_release(version)))


def program_path() -> str:
    """The programs that pip installed beside this Python come first."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])


def build(version: str, source: Path = ROOT, folder: Path | None = None) -> Path:
    """Compiles and links the extension for one release of torch. Returns the build folder."""
    folder = folder or CACHE / f"build-{version}"
    configure(version, source, folder)
    run(["cmake", "--build", folder, "--parallel", JOBS], PATH=program_path())
    return folder


@dataclass(frozen=True)
class CompileCommand:
    """How CMake compiles one file."""

    file: Path
    folder: Path
    arguments: tuple[str, ...]

    def compile(self, file: Path | None = None, flags: Sequence[str] = ()) -> None:
        """Compiles the file, or another one in its place."""
        self._run("-c", file or self.file, CACHE / "scratch.o", flags)

    def preprocess(self, file: Path | None = None) -> Path:
        """The file with all that it includes."""
        result = CACHE / "scratch.ii"
        self._run("-E", file or self.file, result)
        return result

    def _run(self, action: str, file: Path, output: Path, flags: Sequence[str] = ()) -> None:
        command: list[str | Path] = list(self.arguments)
        command[command.index("-c")] = action
        command[command.index(str(self.file))] = file
        command[command.index("-o") + 1] = output
        # Another file finds the headers beside the original.
        run([*command, f"-I{self.file.parent}", *flags])


def objective_cxx_commands(build_folder: Path) -> list[CompileCommand]:
    entries = json.loads((build_folder / "compile_commands.json").read_text())
    commands = [
        CompileCommand(Path(entry["file"]), Path(entry["directory"]), tuple(shlex.split(entry["command"])))
        for entry in entries
        if entry["file"].endswith(".mm")
    ]
    if not commands:
        raise CheckFailed("CMake compiles no Objective-C++ for macOS")
    return commands


def analyze(command: CompileCommand, file: Path | None = None) -> None:
    """Raises CheckFailed where a reference is not given back, or given back twice."""
    # zig's own driver wants an object file, which an analysis does not make; the clang inside needs no more than this.
    arguments = [zig(), "clang", f"--target=arm64-apple-macos{DEPLOYMENT_TARGET}", "-std=c++20", "-fblocks", "-w"]
    arguments += ["-x", "objective-c++-cpp-output", "--analyze", "-Xclang", "-analyzer-output=text"]
    # It gives up on paths with more turns of a loop than that, 4 by default.
    options = ["-analyzer-checker=osx.cocoa.RetainCount", "-analyzer-werror", "-analyzer-max-loop", "16"]
    arguments += [part for option in options for part in ("-Xclang", option)]
    run([*arguments, command.preprocess(file), "-o", CACHE / "scratch.plist"])


def compare_declarations(stubs: Path = type_encodings.STUBS) -> type_encodings.Report:
    declared = type_encodings.declarations(zig(), stubs)
    report = type_encodings.compare(declared, type_encodings.knowledge(encodings_packages()))
    if report.problems:
        raise CheckFailed("\n".join(report.problems))
    return report


def main() -> None:
    def step(what: str, check: Callable[[], Any]) -> Any:
        start = time.monotonic()
        print(f"{what} ...", flush=True)
        result = check()
        print(f"  {time.monotonic() - start:.0f} s", flush=True)
        return result

    try:
        report = step("declarations against public type encodings", compare_declarations)
        print(f"  {report.compared} agree; of {len(report.names_only)} methods only the name is known")
        for version in TORCH_RELEASES:
            step(f"torch {version}, from its wheel", lambda version=version: torch_release(version))
            folder = step("  compile and link", lambda version=version: build(version))
        for command in objective_cxx_commands(folder):
            step(f"references in {command.file.name}", lambda command=command: analyze(command))
    except CheckFailed as failure:
        sys.exit(f"mac-check: FAILED\n{failure}")
    print("mac-check: passed")


if __name__ == "__main__":
    main()
