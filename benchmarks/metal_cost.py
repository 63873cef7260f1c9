"""What the Metal kernels of a call read, write and compute, beside the least that any kernel has to.

    python benchmarks/metal_cost.py [--gpu applegpu_g17s] [--csv cost.csv]

Runs on Linux: the software Metal device in softmetal/ counts what the kernels of each call's plan do. Bytes are
those that the compiled code asks for; caches, and lanes that ask for the same bytes at once, make the traffic of a real
GPU smaller. Counts guard against regressions and tell where to look. They are not times, and no time follows from them.

A row is a launch. weights, scales, x: bytes asked for, by the bytes that there are (scales with biases; for experts, of
those that are used). read, write: all buffers, of the call's minimum: every operand once, the result once. multiplies:
of 8x8 matrices (tensor operations: as much work), by the least number, edges padded to 8. barriers: of one
threadgroup. memory: bytes of threadgroup memory. lanes: of qmv, the share that has weights to multiply, in the passes
that its threadgroups make over K.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

sys.path.extend(str(Path(__file__).resolve().parents[1] / folder) for folder in ("softmetal", "tests/support"))

import cases
import quantization_mlx as qm
import software_gpu
from oracle import Format
from softmetal import mps

# Buffers of all product kernels, by their index.
X, WEIGHTS, SCALES, BIASES = range(4)
THREE_TENSORS = ("affine", "marlin_int4")
HELPERS = ("sum_parts", "sort_pairs")  # kernels that multiply nothing
GPU = "applegpu_g14s"  # M2 Pro: no tensor operations
MACOS = 2602


@dataclass(frozen=True)
class Call:
    """A product of x [rows, k] with w [n, k], or [k, n] without transpose; or, with experts, one row for each pair."""

    rows: int
    n: int = 1024
    k: int = 2048
    mode: str = "affine"
    group_size: int = 64
    bits: int = 4
    dtype: torch.dtype = torch.float16
    transpose: bool = True
    experts: int = 0
    op: str = "product"  # or quantize, dequantize: of w

    @property
    def label(self) -> str:
        operand = f"{self.experts} experts " if self.experts else ""
        size = f"{operand}{self.n}x{self.k}"
        format = f"{self.mode} {self.bits} bit /{self.group_size}"
        if self.op != "product":
            return f"{self.op} {size}, {format}"
        return f"{self.rows} rows, {size}{'' if self.transpose else ' (n)'}, {format}"


@dataclass(frozen=True)
class Cost:
    """One launch. Ratios are None where they have no meaning for the kernel."""

    call: str
    kernel: str
    threadgroups: int
    weights: float | None
    scales: float | None
    x: float | None
    read: float
    write: float
    multiplies: float | None
    barriers: float
    memory: int
    lanes: float | None


def costs(call: Call, gpu: str = GPU) -> list[Cost]:
    """Runs the call on the software device. Raises RuntimeError where that finds an error in a kernel."""
    software_gpu.install()
    generator = torch.Generator().manual_seed(0)
    with mps.gpu(gpu, MACOS):
        _run(_operands(call, generator), call)  # a kernel's first use also launches its self-check
        mps.clear()
        operands = _operands(call, generator)
        result = _run(operands, call)
        launches = mps.launched()
        mps.clear()
    least_read = sum(operand.nbytes for operand in operands)
    if call.experts:
        least_read -= _unused_expert_bytes(call, operands)
    least_write = sum(part.nbytes for part in result)
    return [_cost(call, launch, operands, least_read, least_write) for launch in launches]


def _operands(call: Call, generator: torch.Generator) -> list[Tensor]:
    """x, w_q, scales, biases if the mode has them, and the experts' indices if there are experts."""
    shape = (call.n, call.k) if call.transpose else (call.k, call.n)
    matrices = (call.experts,) if call.experts else ()
    w = torch.randn(*matrices, *shape, generator=generator, dtype=torch.float32).to(call.dtype)
    if call.op == "quantize":
        return [w.to("mps")]
    packed = [part.to("mps") for part in qm.quantize(w, call.group_size, call.bits, call.mode)]
    if call.op == "dequantize":
        return packed
    x_shape = (call.rows, 1, call.k) if call.experts else (call.rows, call.k)
    operands = [torch.randn(x_shape, generator=generator).to(call.dtype).to("mps"), *packed]
    if call.experts:
        indices = torch.randint(call.experts, (call.rows,), generator=generator)
        operands.append(indices.sort().values.to("mps"))
    return operands


def _run(operands: Sequence[Tensor], call: Call) -> list[Tensor]:
    format = (call.group_size, call.bits, call.mode)
    if call.op == "quantize":
        return list(qm.quantize(operands[0], *format))
    matrices = operands if call.op == "dequantize" else operands[1:]
    biases = matrices[2] if call.mode in THREE_TENSORS else None
    if call.op == "dequantize":
        return [qm.dequantize(matrices[0], matrices[1], biases, *format, dtype=call.dtype)]
    product = (operands[0], matrices[0], matrices[1], biases)
    if call.experts:
        return [qm.gather_qmm(*product, None, operands[-1], call.transpose, *format, sorted_indices=True)]
    return [qm.quantized_matmul(*product, call.transpose, *format)]


def _used_experts(call: Call, operands: Sequence[Tensor]) -> int:
    return len(operands[-1].cpu().unique())


def _unused_expert_bytes(call: Call, operands: Sequence[Tensor]) -> int:
    unused = call.experts - _used_experts(call, operands)
    return sum(part.nbytes for part in operands[1:-1]) // call.experts * unused


def _cost(call: Call, launch: mps.Launch, operands: Sequence[Tensor], least_read: int, least_write: int) -> Cost:
    groups = launch.threadgroups[0] * launch.threadgroups[1] * launch.threadgroups[2]
    is_product = call.op == "product" and not launch.kernel.startswith(HELPERS)
    weights = scales = x = multiplies = None
    if is_product:
        used = _used_experts(call, operands) / call.experts if call.experts else 1
        parameters = operands[2:-1] if call.experts else operands[2:]
        read = launch.bytes_read
        weights = read[WEIGHTS] / (operands[1].nbytes * used)
        asked = read[SCALES] + (read.get(BIASES, 0) if call.mode in THREE_TENSORS else 0)
        scales = asked / (sum(part.nbytes for part in parameters) * used)
        x = read[X] / operands[0].nbytes
    if is_product and launch.counters["simdgroup_multiplies"]:
        rows = _rows_of_experts(call, operands) if call.experts else [call.rows]
        tiles = sum(-(-count // 8) for count in rows) * -(-call.n // 8) * -(-call.k // 8)
        multiplies = launch.counters["simdgroup_multiplies"] / tiles
    return Cost(
        call=call.label,
        kernel=launch.kernel,
        threadgroups=groups,
        weights=weights,
        scales=scales,
        x=x,
        read=sum(launch.bytes_read.values()) / least_read,
        write=launch.counters["device_bytes_written"] / least_write,
        multiplies=multiplies,
        barriers=launch.counters["threadgroup_barriers"] / groups,
        memory=launch.counters["threadgroup_bytes"],
        lanes=_busy_lanes(call, launch) if "qmv" in launch.kernel else None,
    )


def _busy_lanes(call: Call, launch: mps.Launch) -> float:
    """Lanes are along K, but for the columns of y that a threadgroup has; each has four rows of w (matvec.h)."""
    threads, rows_of_w = 128, 4
    rows = int(launch.kernel.rpartition("_rows_")[2]) if "_rows_" in launch.kernel else 1
    step = 32 if rows <= 3 and call.group_size >= 32 and call.dtype.itemsize == 2 else 16
    along = threads * rows_of_w * launch.threadgroups[0] // call.n
    passes = -(-call.k // (step * along))
    lanes = threads * launch.threadgroups[0] * launch.threadgroups[2]
    weights = launch.bytes_read[WEIGHTS] * 8 / call.bits
    return weights / (lanes * passes * step * rows_of_w)


def _rows_of_experts(call: Call, operands: Sequence[Tensor]) -> list[int]:
    return operands[-1].cpu().bincount().tolist()


# One group size for each: of affine, the default; of packed columns, where w is [k, n], each once.
FORMATS = [format for format in cases.FORMATS if format.mode != "affine" or format.group_size == 64]
COLUMN_FORMATS = [Format("marlin_fp4", 128, 4), Format("marlin_fp8", 128, 8), Format("marlin_int2", 64, 2)]
COLUMN_FORMATS += [Format("marlin_int4", 32, 4), Format("marlin_int4_sym", 64, 4)]

# Of experts and small heads: no multiples of what a threadgroup takes of a long K at a time.
SMALL_OR_ODD_K = (512, 768, 1024, 2880, 3072)

CALLS = [
    *(Call(1, **format.options) for format in FORMATS),
    *(Call(1, transpose=False, **format.options) for format in COLUMN_FORMATS),
    *(Call(rows, mode="marlin_fp4", group_size=128, transpose=False) for rows in (4, 8, 16, 64)),
    Call(1, n=4096, k=4096),
    *(Call(1, n=256, k=k) for k in SMALL_OR_ODD_K),
    *(Call(1, n=256, k=k, experts=2) for k in SMALL_OR_ODD_K),
    *(Call(rows) for rows in (2, 3, 4, 6, 8, 12)),
    *(Call(rows, transpose=False) for rows in (1, 2, 3, 4, 8)),
    *(Call(rows, transpose=transpose) for transpose in (True, False) for rows in (16, 32, 64, 128)),
    Call(33, n=1000, k=2080, group_size=32),
    *(Call(rows, n=512, k=512, experts=8) for rows in (2, 64, 256)),
    Call(1, op="quantize"),
    Call(1, op="dequantize"),
]


def print_table(rows: Sequence[Cost]) -> None:
    columns = [field.name for field in fields(Cost)]
    cells = [[_text(getattr(row, column)) for column in columns] for row in rows]
    widths = [max(len(line[i]) for line in [columns, *cells]) for i in range(len(columns))]
    for line in [columns, *cells]:
        names = [text.ljust(width) for text, width in zip(line[:2], widths[:2], strict=True)]
        numbers = [text.rjust(width) for text, width in zip(line[2:], widths[2:], strict=True)]
        print("  ".join([*names, *numbers]))


def _text(value: str | float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", default=GPU, help="which GPU's kernels, by Metal's name of the architecture")
    parser.add_argument("--csv", type=Path, help="a file to write the table to, too")
    arguments = parser.parse_args()
    rows = [cost for call in CALLS for cost in costs(call, arguments.gpu)]
    print_table(rows)
    if arguments.csv:
        with open(arguments.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, [field.name for field in fields(Cost)])
            writer.writeheader()
            writer.writerows(asdict(row) for row in rows)


if __name__ == "__main__":
    main()
