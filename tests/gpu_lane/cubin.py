"""Metal shaders to machine code for NVIDIA GPUs, on a machine without one.

    shader -> preprocessor and rewriter of the software device -> clang, C++ for OpenCL -> PTX -> ptxas -> cubin

The rewriter's output is what the software device runs; other are only the primitives underneath (include/gpu_lane) and
the entry points. Function constants are folded into the code, as Metal does when it makes a pipeline.
"""

from __future__ import annotations

import inspect
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "softmetal"))

from softmetal.msl import rewrite as msl
from softmetal.msl import toolchain

HERE = Path(__file__).resolve().parent
STANDARD = "metal3.2"
ALL_KERNELS = {"QUANTIZATION_MLX_ALL_KERNELS": 1}  # metal/quantized/formats.h
ARCHITECTURE = "sm_90"
TARGET = [*("-target", "nvptx64-nvidia-cuda", "-nogpulib", "-Xclang", "-target-cpu", "-Xclang", ARCHITECTURE)]
TARGET += ["-Xclang", "-target-feature", "-Xclang", "+ptx80", "-w"]
LANGUAGE = [
    *("-x", "clcpp", "-cl-std=clc++2021", "-cl-no-stdinc", "-cl-single-precision-constant", "-ffp-contract=on"),
    *("-Xclang", "-cl-ext=-all,+cl_khr_fp16,+__cl_clang_function_pointers,+__opencl_c_generic_address_space"),
    f"-D__METAL_VERSION__={toolchain.VERSIONS[STANDARD]}",
    *(f"-I{HERE / 'include'}", f"-I{toolchain.SHIM}"),
]
# Everything becomes part of the kernel, and what the shader wants unrolled is, as by Apple's compiler; or as little as
# makes a kernel correct, where thousands are compiled.
INLINE = ["-mllvm", "-inline-threshold=20000"]
OPTIMISE = {True: ["-O3", *INLINE, "-mllvm", "-unroll-threshold=2000"], False: ["-O1", *INLINE, "-fno-unroll-loops"]}
# LLVM takes a float4 that is loaded apart, which makes our kernels slower and MLX's faster.
KEEP_VECTORS = ["-mllvm", "-disable-vector-combine"]
ASSEMBLE = {True: ["-O3"], False: ["-O1"]}
POSITION, BUFFER = "position", "buffer"


class BuildError(Exception):
    """Something of the tool chain is missing or refuses the shader."""


@dataclass(frozen=True)
class Entry:
    """One kernel of a cubin.

    symbol: its name there. kernel: the shader's. constants: indices of the function constants that are true.
    threads: of a threadgroup, by x, y and z. params: the bytes of its `constant T&` arguments by index, where they
    shall be known to the compiler; the others are arguments of the launch.
    """

    symbol: str
    kernel: str
    constants: frozenset[int]
    threads: tuple[int, int, int]
    params: tuple[tuple[int, bytes], ...] = ()


@dataclass(frozen=True)
class Resources:
    """What ptxas says of one entry: registers of a thread, bytes of shared memory, bytes spilled to memory."""

    registers: int
    shared: int
    spilled: int


@dataclass(frozen=True)
class Source:
    """A shader: a .metal file, or the text of one; change: an edit of its preprocessed text.

    optimised: as by Apple's compiler, with loops unrolled where the shader says so. keeps_vectors: those that are
    loaded stay whole. lines: those of the shader, for the reports of sanitizers; cubins are three times as large.
    """

    path: Path | None
    text: str = ""
    include_dirs: tuple[Path, ...] = ()
    change: Callable[[str], str] | None = None
    defines: tuple[str, ...] = ()
    optimised: bool = True
    keeps_vectors: bool = True
    lines: bool = False

    @property
    def name(self) -> str:
        stem = self.path.stem if self.path else "text"
        return " ".join([stem, *([] if self.optimised else ["plain"]), *self.defines])

    def program(self) -> msl.Program:
        return _program(self)


@cache
def _program(source: Source) -> msl.Program:
    text = f'# 1 "{source.path}"\n{source.path.read_text()}' if source.path else source.text
    includes = [source.path.parent, *source.include_dirs] if source.path else list(source.include_dirs)
    preprocessed = toolchain.preprocess(text, STANDARD, includes, ALL_KERNELS)
    if source.change:
        changed = source.change(preprocessed)
        if changed == preprocessed:
            raise BuildError(f"an edit of {source.name} finds nothing to change: {source.change}")
        preprocessed = changed
    preprocessed = preprocessed.replace("#pragma METAL fp contract(off)", "#pragma clang fp contract(off)")
    return msl.rewrite(preprocessed, str(toolchain.SHIM), unroll=source.optimised)


@cache
def ptxas() -> str:
    installed = Path(sys.prefix).glob("lib/*/site-packages/nvidia/*/bin/ptxas")
    found = shutil.which("ptxas") or next(map(str, installed), None)
    if found is None:
        raise BuildError('ptxas is missing: pip install ".[gpu-lane]", or have CUDA\'s on the PATH')
    return found


@cache
def identity() -> str:
    """Of all that a cubin depends on besides the shader."""
    folders = (HERE / "include", toolchain.SHIM)
    headers = [path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()]
    versions = [_run([tool, "--version"]) for tool in (toolchain.clang(), ptxas())]
    steps = [inspect.getsource(step) for step in (compile_cubin, _entry_point, _link)]
    options = repr((TARGET, LANGUAGE, OPTIMISE, ASSEMBLE))
    return "\0".join([*versions, *steps, options, *(path.read_text() for path in headers)])


def compile_cubin(source: Source, entries: Sequence[Entry]) -> tuple[bytes, dict[str, Resources]]:
    """Compiles entries with equal function constants to one cubin; also what ptxas says of each.

    Raises BuildError, and RewriteError where the shader is not what the software device runs.
    """
    program = source.program()
    (constants,) = {entry.constants for entry in entries}
    text = "#include <metal_stdlib>\n" + program.text + "".join(_entry_point(program, entry) for entry in entries)
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        defines = [f"-D{name}" for name in source.defines]
        emit = ["-S", "-emit-llvm", "-O2", "-Xclang", "-disable-llvm-passes", *defines]
        emit += ["-gline-tables-only"] if source.lines else []
        code = _run([toolchain.clang(), *TARGET, *LANGUAGE, *emit, "-o", "-", "-"], text)
        (place / "code.ll").write_text(_link(code, program, constants))
        ptx = place / "code.ptx"
        optimise = [*OPTIMISE[source.optimised], *(KEEP_VECTORS if source.keeps_vectors else [])]
        _run([toolchain.clang(), *TARGET, *optimise, "-S", "-x", "ir", str(place / "code.ll"), "-o", str(ptx)])
        undefined = re.findall(r"^\.extern .*", ptx.read_text(), re.MULTILINE)
        if undefined:
            raise BuildError(f"the GPU lane has no primitive for: {'; '.join(undefined)[:2000]}")
        cubin = place / "code.cubin"
        assemble = [*ASSEMBLE[source.optimised], *(["-lineinfo"] if source.lines else [])]
        command = [ptxas(), f"-arch={ARCHITECTURE}", *assemble, "-v", "-o", str(cubin), str(ptx)]
        report = subprocess.run(command, capture_output=True, text=True)
        if report.returncode:
            raise BuildError(report.stderr[:4000])
        return cubin.read_bytes(), _resources(report.stderr)


def _run(command: Sequence[str], text: str | None = None) -> str:
    result = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    if result.returncode:
        raise BuildError(f"{' '.join(command[:3])} ...: {result.stderr[:4000]}")
    return result.stdout


def _entry_point(program: msl.Program, entry: Entry) -> str:
    kernel = program.kernels[entry.kernel]
    known = dict(entry.params)
    parameters, arguments, values = [], [], []
    for position, parameter in enumerate(kernel.parameters):
        kind = f"S_{entry.symbol}::argument<{position}>"
        if parameter.kind == POSITION:
            arguments.append(f"__softmetal_position<{kind}>::get({parameter.index})")
        elif parameter.index in known:
            data = known[parameter.index]
            words = [int.from_bytes(data[i : i + 8].ljust(8, b"\0"), "little") for i in range(0, len(data), 8)]
            name = f"{entry.symbol}_params_{parameter.index}"
            values.append(f"const __constant ulong {name}[] = {{{', '.join(f'{word}ul' for word in words)}}};\n")
            arguments.append(f"*(__constant __gpu_lane_argument<{kind}>::type*)(ulong)&{name}[0]")
        else:
            name = f"b{parameter.index}"
            parameters.append(f"__gpu_lane_argument<{kind}>::type {name}")
            arguments.append(f"__gpu_lane_pass<{kind}>::get({name})")
    namespace = kernel.instance.split("<")[0].rpartition("::")[0]
    scope = f"using namespace {namespace};\n" if namespace else ""
    x, y, z = entry.threads
    return (
        f'\n# 1 "<entry point>"\n{scope}using S_{entry.symbol} = __softmetal_signature<decltype({kernel.instance})>;\n'
        + "".join(values)
        + f"__attribute__((reqd_work_group_size({x}, {y}, {z}))) "
        + f"__kernel void {entry.symbol}({', '.join(parameters)}) {{ __gpu_lane_begin(); "
        + f"{kernel.instance}({', '.join(arguments)}); }}\n"
    )


def buffers_of(program: msl.Program, entry: Entry) -> list[int]:
    """Indices of the arguments that a launch passes, in order."""
    known = dict(entry.params)
    parameters = program.kernels[entry.kernel].parameters
    return [p.index for p in parameters if p.kind == BUFFER and p.index not in known]


THREADGROUP_CALL = re.compile(
    r"(%\S+ = )(?:tail )?call [^@\n]*@__softmetal_threadgroup_variable\(i32 noundef (\d+), i64 noundef (\d+)\)[^\n]*"
)


def _link(code: str, program: msl.Program, constants: frozenset[int]) -> str:
    """What the runtime does for the software device, done to the compiler's intermediate code instead."""
    # Values behind `constant T&` are arguments, which live in registers once all is inlined: one address space.
    code = re.sub(r"addrspacecast \(ptr addrspace\(4\) (\S+) to ptr\)", r"\1", code)
    code = re.sub(r"addrspacecast ptr addrspace\(4\) (\S+) to ptr\b(?! addrspace)", r"bitcast ptr \1 to ptr", code)
    code = code.replace(" addrspace(4)", "")
    for constant in program.constants:
        declaration = rf"(@softmetal_slot_{constant.slot} = )external (?:dso_local )?constant i8"
        code = re.sub(declaration, rf"\1internal constant i8 {int(constant.index in constants)}", code)
    variables: dict[str, int] = {}

    def variable(match: re.Match[str]) -> str:
        name = f"@threadgroup_variable_{match[2]}_{match[3]}"
        variables[name] = int(match[3])
        return f"{match[1]}ptrtoint ptr addrspace(3) {name} to i64"

    code = THREADGROUP_CALL.sub(variable, code)
    place = code.index("\ndefine ")
    space = "internal addrspace(3) global"
    declared = "".join(f"\n{name} = {space} [{size} x i8] undef, align 16" for name, size in variables.items())
    return code[:place] + declared + "\n" + code[place:]


def _resources(report: str) -> dict[str, Resources]:
    resources = {}
    for part in report.split("Compiling entry function '")[1:]:
        name = part.split("'")[0]
        registers = int(re.search(r"Used (\d+) registers", part)[1])
        shared = re.search(r"(\d+) bytes smem", part)
        spilled = re.search(r"(\d+) bytes spill stores", part)
        stack = re.search(r"(\d+) bytes stack frame", part)
        memory = int(spilled[1]) + int(stack[1]) if spilled and stack else 0
        resources[name] = Resources(registers, int(shared[1]) if shared else 0, memory)
    return resources
