"""The macOS build, as far as Linux can check it, and that those checks find what they are there for."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

import mac_check
import type_encodings
from covering import mostly_exhaustive
from mac_check import CheckFailed

# One process: the steps share build folders.
pytestmark = [pytest.mark.xdist_group("mac_check"), pytest.mark.first]


@pytest.fixture(scope="module")
def objective_cxx() -> dict[str, mac_check.CompileCommand]:
    folder = mac_check.build(mac_check.TORCH_RELEASES[-1])
    return {command.file.name: command for command in mac_check.objective_cxx_commands(folder)}


@pytest.mark.parametrize("version", mostly_exhaustive(mac_check.TORCH_RELEASES, mac_check.TORCH_RELEASES[-1]))
def test_compiles_and_links_for_apple_silicon(version):
    folder = mac_check.build(version)
    assert (folder / "_C.abi3.so").read_bytes()[:8] == bytes.fromhex("cffaedfe0c000001"), "no arm64 Mach-O file"


def test_declarations_agree_with_public_type_encodings():
    report = mac_check.compare_declarations()
    assert report.compared > 200


def test_references_are_balanced(objective_cxx):
    for command in objective_cxx.values():
        mac_check.analyze(command)


def test_the_form_for_kernel_builder_compiles(objective_cxx, tmp_path):
    """There the shaders are compiled beforehand, and a generated header has the function that loads them."""
    header = tmp_path / "metallib.h"
    header.write_text(
        "#import <Metal/Metal.h>\n"
        "namespace embedded { id<MTLLibrary> createLibrary(id<MTLDevice> device, NSError** error); }\n"
    )
    flags = [f'-DEMBEDDED_METALLIB_HEADER="{header}"', "-DEMBEDDED_METALLIB_NAMESPACE=embedded"]
    objective_cxx["library.mm"].compile(flags=flags)


# --- Shaders compiled beforehand -------------------------------------------------------------------------------------

# Writes down how it was called, and into what it is to make, what that was made of.
COMPILER = """#!/bin/sh
echo "$*" >> {folder}/calls
output=
for argument; do
  [ "$previous" = -o ] && output=$argument
  previous=$argument
done
[ -z "$output" ] || echo "$*" > "$output"
exit {status}
"""


def with_compiler(folder: Path, monkeypatch: pytest.MonkeyPatch, status: int = 0) -> Path:
    """A program xcrun in place of the one of macOS; where it writes down its calls."""
    (folder / "xcrun").write_text(COMPILER.format(folder=folder, status=status))
    (folder / "xcrun").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    return folder / "calls"


def test_metallib_is_compiled_and_installed(tmp_path, monkeypatch):
    calls = with_compiler(tmp_path, monkeypatch)
    folder = tmp_path / "build"
    mac_check.configure(mac_check.TORCH_RELEASES[-1], mac_check.ROOT, folder, "-DQUANTIZATION_MLX_METALLIB=ON")
    calls.write_text("")
    mac_check.run(["cmake", "--build", folder, "--target", "metallib"], PATH=mac_check.program_path())
    *compiled, linked = calls.read_text().splitlines()
    options = "-sdk macosx metal -std=metal4.0 -mmacosx-version-min=26.2"
    shaders = sorted((mac_check.ROOT / "metal").rglob("*.metal"))
    objects = [folder / f"{shader.stem}.air" for shader in shaders]
    pairs = zip(shaders, objects, strict=True)
    assert sorted(compiled) == [f"{options} -O2 -fno-fast-math -c {source} -o {made}" for source, made in pairs]
    assert linked.startswith(options)
    library = str(folder / "quantization_mlx.metallib")
    assert set(linked.removeprefix(options).split()) == {*map(str, objects), "-o", library}
    command = ["cmake", "--install", folder, "--component", "metallib", "--prefix", tmp_path / "prefix"]
    mac_check.run(command, PATH=mac_check.program_path())
    installed = [path for path in (tmp_path / "prefix").rglob("*") if path.is_file()]
    assert installed == [tmp_path / "prefix" / "quantization_mlx" / "quantization_mlx.metallib"]


def test_metallib_needs_a_compiler(tmp_path, monkeypatch):
    with_compiler(tmp_path, monkeypatch, status=72)
    release = mac_check.TORCH_RELEASES[-1]
    with pytest.raises(CheckFailed, match=r"xcodebuild\s+-downloadComponent\s+MetalToolchain"):
        mac_check.configure(release, mac_check.ROOT, tmp_path / "build", "-DQUANTIZATION_MLX_METALLIB=ON")


# --- Seeded mistakes -------------------------------------------------------------------------------------------------


def changed(command: mac_check.CompileCommand, folder: Path, *mistakes: tuple[str, str]) -> Path:
    """A copy of a file with mistakes in it: what stands in place of what is right."""
    text = command.file.read_text()
    for right, wrong in mistakes:
        assert right in text
        text = text.replace(right, wrong, 1)
    copy = folder / command.file.name
    copy.write_text(text)
    return copy


@pytest.mark.parametrize(
    ("file", "right", "wrong", "message"),
    [
        ("encode.mm", "setComputePipelineState:", "setComputePipelineStat:", "setComputePipelineStat:"),
        ("encode.mm", "setBytes:launch.params.data()", "setBytes:launch.params_size", "cannot initialize a parameter"),
        ("compile.mm", "if (__builtin_available(macOS 15.0, *))", "if (true)", "only available on macOS 15.0"),
    ],
    ids=["selector", "argument type", "availability"],
)
def test_compiler_finds(objective_cxx, tmp_path, file, right, wrong, message):
    command = objective_cxx[file]  # which the build has compiled
    with pytest.raises(CheckFailed, match=message):
        command.compile(changed(command, tmp_path, (right, wrong)))


def test_analyzer_finds(objective_cxx, tmp_path):
    """What is never released, and what is released twice."""
    command = objective_cxx["library.mm"]
    leak = ("[[MTLFunctionConstantValues new] autorelease]", "[MTLFunctionConstantValues new]")
    released_twice = ("[state release];", "[state release]; [state release];")
    with pytest.raises(CheckFailed) as failure:
        mac_check.analyze(command, changed(command, tmp_path, leak, released_twice))
    assert "Potential leak" in str(failure.value)
    assert re.search("after it is released|not owned", str(failure.value))


@pytest.mark.parametrize(
    ("right", "wrong", "message"),
    [
        ("setBytes:(const void*)bytes length:(NSUInteger)", "setBytes:(const void*)bytes length:(int)", "argument 2"),
        ("- (BOOL)supportsFamily:", "- (NSUInteger)supportsFamily:", "the result is B, not Q"),
        ("setBufferOffset:(NSUInteger)", "setBufferOfset:(NSUInteger)", "no package knows this selector"),
        ("MTLDataTypeBool = 53", "MTLDataTypeBool = 54", "MTLDataTypeBool is 53, not 54"),
        ("NSUInteger depth;", "uint32_t depth;", "struct MTLSize"),
    ],
    ids=["argument", "result", "selector", "enum", "struct"],
)
def test_type_encodings_find(tmp_path, right, wrong, message):
    stubs = shutil.copytree(type_encodings.STUBS, tmp_path / "apple")
    header = stubs / "Metal" / "Metal.h"
    text = header.read_text()
    assert right in text
    header.write_text(text.replace(right, wrong, 1))
    with pytest.raises(CheckFailed, match=message):
        mac_check.compare_declarations(stubs)


@pytest.mark.parametrize(
    ("caller", "message"),
    [
        (
            "namespace at::mps { void no_such_function(); } void caller() { at::mps::no_such_function(); }",
            "no_such_fun",
        ),
        ("void shared(void* buffer); void caller() { shared(nullptr); }", "sharedPv"),
    ],
    ids=["not in torch", "Objective-C type in a signature"],
)
def test_linker_finds(tmp_path, caller, message):
    (tmp_path / "caller.cpp").write_text(caller)
    (tmp_path / "shared.mm").write_text("#import <Metal/Metal.h>\nvoid shared(id<MTLBuffer>) {}\n")
    torch = mac_check.torch_release(mac_check.TORCH_RELEASES[-1]) / "torch" / "lib"
    toolchain = mac_check.write_toolchain().parent
    target = f"--target=aarch64-macos.{mac_check.DEPLOYMENT_TARGET}"
    command = [toolchain / "c++", target, f"-I{type_encodings.STUBS}", "-bundle", "-o", tmp_path / "_C.so"]
    command += ["-Xlinker", "-undefined", "-Xlinker", "dynamic_lookup"]  # what CMake says to the linker of a module
    with pytest.raises(CheckFailed, match=f"undefined symbol: .*{message}"):
        mac_check.run([*command, tmp_path / "caller.cpp", tmp_path / "shared.mm", torch / "libtorch_cpu.dylib"])
