"""Compiles the shaders for NVIDIA GPUs: everything that run.py needs, into one folder. Needs no GPU.

    python tests/gpu_lane/build.py [--suites check sanitize mutants time] [--calls products fast]
                                   [--output build/gpu_lane/bundle]

Which kernels a call runs, with which grid and parameters, is asked of the plans that ship. Besides them it takes
clang and ptxas, and the mlx wheel: for the codes that quantize is compared with, and for MLX's own kernels.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import re
import sys
import zipfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

import mlx_peer
import quantization_mlx as qm
import suites
from calls import NUMPY, Call
from check import oracle, tensor
from cubin import Entry, Resources, Source, buffers_of, compile_cubin, identity
from fast_calls import AnyCall
from mutants import MUTANTS, shader
from operands import random_operands
from plans import plan_of
from suites import Item

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / "build" / "gpu_lane" / "cache"
# Without tensor operations, by the calls that run them.
FILES = {
    "products": ("matvec", "matmul", "quantize", "sort_pairs", "sum_parts"),
    "fast": ("norm", "rope_into_cache", "rope", "gates", "attention", "attention_tile", "moe", "sample", "image"),
}
# Of the function constants of launch.h, the indices by name.
CONSTANTS = {
    name.lower(): int(index)
    for name, index in re.findall(
        r"^#define QUANTIZATION_MLX_(\w+) (\d+)", (ROOT / "csrc/gpu/launch.h").read_text(), re.MULTILINE
    )
}
FILLS_FRAGMENTS = ("attention_tile",)  # elements of matrices are written where Apple's GPUs have them
ENTRIES = {True: 8, False: 24}  # of one cubin, by Source.optimised


@dataclass(frozen=True)
class Compiled:
    cubin: str
    resources: Resources


class Builder:
    """Collects entries, compiles them in batches, remembers on disk what was compiled."""

    def __init__(self) -> None:
        self._batches: dict[tuple[Source, frozenset[int], str], dict[Entry, None]] = {}
        self.compiled: dict[str, Compiled] = {}

    def add(
        self,
        source: Source,
        kernel: str,
        constants: Iterable[int],
        threads: tuple[int, int, int],
        params: tuple[tuple[int, bytes], ...] = (),
        tag: str = "",
    ) -> Entry:
        constants = frozenset(constants)
        key = repr((source.name, kernel, sorted(constants), threads, params, tag))
        symbol = f"{kernel}_{hashlib.sha256(key.encode()).hexdigest()[:8]}"
        entry = Entry(symbol, kernel, constants, threads, params)
        self._batches.setdefault((source, constants, tag), {})[entry] = None
        return entry

    def build(self, archive: zipfile.ZipFile) -> None:
        work = []
        for (source, _, _), entries in self._batches.items():
            size = ENTRIES[source.optimised]
            work += [(source, list(entries)[i : i + size]) for i in range(0, len(entries), size)]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for number, ((_, entries), (cubin, resources)) in enumerate(
                zip(work, pool.map(lambda job: _cached(*job), work), strict=True)
            ):
                name = f"{number}.cubin"
                archive.writestr(name, cubin)
                for entry in entries:
                    self.compiled[entry.symbol] = Compiled(name, resources[entry.symbol])
                print(f"\r{number + 1} of {len(work)} cubins", end="", file=sys.stderr, flush=True)
        print(file=sys.stderr)


def _cached(source: Source, entries: Sequence[Entry]) -> tuple[bytes, dict[str, Resources]]:
    parts = [
        identity(),
        source.program().text,
        repr((source.optimised, source.keeps_vectors, source.lines, source.defines)),
    ]
    parts += [repr([(e.symbol, e.kernel, sorted(e.constants), e.threads, e.params) for e in entries])]
    CACHE.mkdir(parents=True, exist_ok=True)
    place = CACHE / hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
    if not place.with_suffix(".json").exists():
        cubin, resources = compile_cubin(source, entries)
        place.with_suffix(".cubin").write_bytes(cubin)
        temporary = place.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps({name: asdict(value) for name, value in resources.items()}))
        temporary.replace(place.with_suffix(".json"))
    stored = json.loads(place.with_suffix(".json").read_text())
    return place.with_suffix(".cubin").read_bytes(), {name: Resources(**value) for name, value in stored.items()}


# --- From calls to launches -------------------------------------------------------------------------------------------


@cache
def source_of(file: str, build: str, change: str = "", lines: bool = False) -> Source:
    mutant = MUTANTS.get(change)
    edit = mutant if mutant and mutant.file == file else None
    defines = (mlx_peer.EXCHANGED,) if build == "exchanged" or file in FILLS_FRAGMENTS else ()
    defines += ("GPU_LANE_LATE",) if build == "late" else ()
    optimised = build not in ("plain", "late")
    return Source(shader(f"{file}.metal"), change=edit, defines=defines, optimised=optimised, lines=lines)


def launches_of(item: Item, builder: Builder) -> list[dict[str, Any]]:
    """What run.py launches for an item; the cubin is yet to come."""
    return [_mlx_launch(item.call, builder)] if item.build == "mlx" else _our_launches(item, builder)


def _our_launches(item: Item, builder: Builder) -> list[dict[str, Any]]:
    launches = []
    for launch in plan_of(item.call).launches:
        source = source_of(launch.file, item.build, item.change, bool(item.tag))
        known = ((launch.params_index, launch.params),) if item.build == "known" else ()
        threads = (launch.threads, 1, 1)
        constants = (CONSTANTS[name] for name in launch.constants)
        entry = builder.add(source, launch.kernel, constants, threads, known, item.tag)
        arguments = {index: _passed(item.call, *argument) for index, argument in enumerate(launch.arguments)}
        arguments[launch.params_index] = ("bytes", launch.params.hex())
        launches.append(_launch(source, entry, launch.kernel, launch.threadgroups, arguments))
    return launches


def _passed(call: AnyCall, role: str, element: int) -> tuple[str, int | str]:
    """An argument as Buffers takes it: numbers that a plan leaves to the call are bytes."""
    return ("bytes", call.numbers[role].hex()) if role == "numbers" else (role, element)


def _mlx_launch(call: Call, builder: Builder) -> dict[str, Any]:
    kernel, threads, threadgroups, arguments = mlx_peer.launch_of(call)
    entry = builder.add(mlx_peer.source(), kernel, (), threads)
    return _launch(mlx_peer.source(), entry, f"mlx {kernel}", threadgroups, arguments)


def _launch(source: Source, entry: Entry, kernel: str, threadgroups, arguments: dict[int, Any]) -> dict[str, Any]:
    passed = [arguments[index] for index in buffers_of(source.program(), entry)]
    named = {"kernel": kernel, "symbol": entry.symbol}
    return {**named, "threads": entry.threads, "threadgroups": threadgroups, "arguments": passed}


def expected(call: Call) -> dict[str, np.ndarray]:
    """What quantize should give, by role: mlx's; of packed columns, which mlx has not, the CPU's."""
    operands = random_operands(call)
    w = tensor(operands["x"][call.offset :].reshape(call.w_shape), call.dtype)
    scale = tensor(operands["global_scale"], "float32")[0] if call.global_scale else None
    format = oracle.Format(call.mode, call.group_size, call.bits)
    parts = qm.quantize(w, **format.options) if call.is_column_packed else oracle.mlx_quantize(w, format, scale)
    results = {}
    for part, (role, (_, dtype)) in zip(parts, call.results.items(), strict=True):
        array = part.view(oracle.torch.int16) if dtype == "bfloat16" else part
        results[role] = array.numpy().view(NUMPY.get(dtype, dtype))
    return results


def not_checked(items: Iterable[Item], kinds: Iterable[str]) -> list[str]:
    """Kernels of the shaders that the suite `check` runs no call of: no plan chooses them, or suites.py is not told."""
    planned = {launch.kernel for item in items if item.suite == "check" for launch in plan_of(item.call).launches}
    kernels = {
        kernel for kind in kinds for file in FILES[kind] for kernel in source_of(file, "plain").program().kernels
    }
    return sorted(kernels - planned)


def build(items: Sequence[Item], output: Path) -> None:
    builder = Builder()
    described: list[dict[str, Any]] = []
    output.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(output / "cubins.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for number, item in enumerate(items):
            workspace = 0 if item.build == "mlx" else plan_of(item.call).workspace
            launches = launches_of(item, builder)
            data = {**asdict(item), "call": item.call.as_dict(), "workspace": workspace, "launches": launches}
            data["expected"] = f"{number}.npz" if item.call.op == "quantize" and item.suite == "check" else ""
            if data["expected"]:
                file = io.BytesIO()
                np.savez(file, **expected(item.call))
                archive.writestr(data["expected"], file.getvalue())
            described.append(data)
        builder.build(archive)
    for data in described:
        for launch in data["launches"]:
            compiled = builder.compiled[launch["symbol"]]
            launch.update(cubin=compiled.cubin, **asdict(compiled.resources))
    (output / "items.json").write_text(json.dumps(described))
    size = sum(path.stat().st_size for path in output.iterdir()) / 2**20
    print(f"{len(described)} calls, {len(builder.compiled)} kernels, {size:.1f} MiB in {output}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suites", nargs="*", default=list(suites.SUITES), choices=suites.SUITES)
    parser.add_argument("--calls", nargs="*", default=list(suites.KINDS), choices=suites.KINDS)
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "gpu_lane" / "bundle")
    arguments = parser.parse_args()
    items = suites.items(arguments.suites, arguments.calls)
    missing = not_checked(items, arguments.calls) if "check" in arguments.suites else []
    if not mlx_peer.is_installed():
        print("mlx is not installed: MLX's own kernels and the check of quantize are left out", file=sys.stderr)
        items = [item for item in items if item.call.op != "quantize"]
    build(items, arguments.output)
    if missing:
        print(f"no call of `check` runs {len(missing)} kernels: {', '.join(missing)}", file=sys.stderr)
    return bool(missing)


if __name__ == "__main__":
    sys.exit(main())
