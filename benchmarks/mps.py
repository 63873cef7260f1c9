"""Quantized products on an Apple GPU, side by side with what a user would run instead. Needs a Mac.

    make bench

For each shape and number of rows of x, one run times every contender in turn, round after round, with copies of the
weights in rotation. A turn queues many calls and waits once, so that what is timed is the GPU and not the queue. The
table shows the median time of a call, its ratio to this package's, the rate at which packed weights were read, and the
kernel that ran. With it come the chip, macOS and torch: report them together (`make mac-report` writes a file).
"""

from __future__ import annotations

import argparse
import functools
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional

import quantization_mlx

BITS = 4
GROUP_SIZE = 64
COPIES = 8
CALLS = 32  # of one turn
DTYPE = torch.float16
OURS = "quantization-mlx"

Turn = Callable[[], float]  # seconds of one call


@dataclass(frozen=True)
class Case:
    """One product: x [rows, inner] with a matrix of `columns` columns.

    transpose: whether the matrix is packed as [columns, inner], as a linear layer's is.
    experts: 0, or of how many such matrices each row takes one, sorted by it.
    """

    columns: int
    inner: int
    rows: int
    transpose: bool = True
    experts: int = 0

    def __str__(self) -> str:
        shape = [self.columns, self.inner] if self.transpose else [self.inner, self.columns]
        return f"x [{self.rows}, {self.inner}], w {[self.experts, *shape] if self.experts else shape}"

    def x(self) -> torch.Tensor:
        shape = (self.rows, 1, self.inner) if self.experts else (self.rows, self.inner)
        return torch.randn(shape).to("mps", DTYPE)

    def experts_of_rows(self) -> torch.Tensor:
        return (torch.arange(self.rows) * self.experts // self.rows).to(torch.int32)


SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336))
ROWS = (1, 2, 4, 8, 12, 16, 32, 64, 512)
CASES = (
    *(Case(columns, inner, rows) for columns, inner in SHAPES for rows in ROWS),
    *(Case(4096, 4096, rows, transpose=False) for rows in (1, 4, 64)),
    *(Case(2048, 2048, rows, experts=16) for rows in (16, 64, 512)),
)


@functools.lru_cache(maxsize=1)  # cases with the same weights follow each other
def weight(columns: int, inner: int, transpose: bool, experts: int) -> torch.Tensor:
    shape = (columns, inner) if transpose else (inner, columns)
    return torch.randn((experts, *shape) if experts else shape).to("mps", DTYPE)


def weight_of(case: Case) -> torch.Tensor:
    return weight(case.columns, case.inner, case.transpose, case.experts)


def quantized(case: Case) -> list[tuple[torch.Tensor, ...]]:
    packed = quantization_mlx.quantize(weight_of(case), GROUP_SIZE, BITS)
    return [tuple(part.clone() for part in packed) for _ in range(COPIES)]


def ours(case: Case, rotation: list[tuple[torch.Tensor, ...]]) -> Callable[[torch.Tensor, int], torch.Tensor]:
    if not case.experts:
        return lambda x, i: quantization_mlx.quantized_matmul(x, *rotation[i], case.transpose, GROUP_SIZE, BITS)
    experts = case.experts_of_rows().to("mps")
    return lambda x, i: quantization_mlx.gather_qmm(
        x, *rotation[i], None, experts, case.transpose, GROUP_SIZE, BITS, sorted_indices=True
    )


def dense(case: Case) -> Callable[[torch.Tensor, int], torch.Tensor]:
    rotation = [weight_of(case).clone() for _ in range(COPIES)]
    if case.transpose:
        return lambda x, i: functional.linear(x, rotation[i])
    return lambda x, i: x @ rotation[i]


def turn_of_torch(run: Callable[[torch.Tensor, int], torch.Tensor], x: torch.Tensor) -> Turn:
    def turn() -> float:
        torch.accelerator.synchronize()
        start = time.perf_counter()
        for call in range(CALLS):
            run(x, call % COPIES)
        torch.accelerator.synchronize()
        return (time.perf_counter() - start) / CALLS

    return turn


def turn_of_mlx(case: Case, x: torch.Tensor) -> Turn:
    """On mlx's default device."""
    import mlx.core as mx

    packed = mx.quantize(mx.array(weight_of(case).cpu().numpy()), group_size=GROUP_SIZE, bits=BITS)
    rotation = [tuple(part + 0 for part in packed) for _ in range(COPIES)]
    operand = mx.array(x.cpu().numpy())
    options = {"transpose": case.transpose, "group_size": GROUP_SIZE, "bits": BITS}
    if case.experts:
        experts = mx.array(case.experts_of_rows().numpy()).astype(mx.uint32)
        product = functools.partial(mx.gather_qmm, rhs_indices=experts, sorted_indices=True, **options)
    else:
        product = functools.partial(mx.quantized_matmul, **options)
    mx.eval(rotation, operand)

    def turn() -> float:
        start = time.perf_counter()
        mx.eval([product(operand, *rotation[call % COPIES]) for call in range(CALLS)])
        return (time.perf_counter() - start) / CALLS

    return turn


def medians(turns: dict[str, Turn], rounds: int) -> dict[str, float]:
    """Median seconds of a call. All take turns, so that a slow moment of the machine meets all of them."""
    times: dict[str, list[float]] = {name: [] for name in turns}
    for number in range(1 + rounds):
        for name, turn in turns.items():
            seconds = turn()
            if number > 0:  # the first compiles kernels
                times[name].append(seconds)
    return {name: statistics.median(values) for name, values in times.items()}


@dataclass(frozen=True)
class Timing:
    """seconds of a call, by contender; kernels of this package's; packed_bytes of the weights."""

    seconds: dict[str, float]
    kernels: list[str]
    packed_bytes: int


def compare(case: Case, rounds: int, with_mlx: bool) -> Timing:
    """Times a case: this package, torch on the dequantized weights where that is one product, and mlx."""
    x = case.x()
    rotation = quantized(case)
    run = ours(case, rotation)
    turns = {OURS: turn_of_torch(run, x)}
    if not case.experts:
        turns["torch dense"] = turn_of_torch(dense(case), x)
    if with_mlx:
        turns["mlx"] = turn_of_mlx(case, x)
    seconds = medians(turns, rounds)
    [plan] = quantization_mlx.explain(run, x, 0)
    return Timing(seconds, [launch.kernel for launch in plan.launches], sum(part.nbytes for part in rotation[0]))


def chip() -> str:
    done = subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True)
    return done.stdout.strip() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    if not torch.backends.mps.is_available():
        parser.error("needs a Mac with a GPU; nothing else can be timed here (benchmarks/cpu.py times the CPU)")
    print(f"{chip()}, macOS {platform.mac_ver()[0]}, torch {torch.__version__}")
    print(
        f"{BITS}-bit affine, group_size {GROUP_SIZE}, {DTYPE}; time, time relative to ours, packed weights per second"
    )
    for case in CASES:
        timing = compare(case, arguments.rounds, with_mlx=True)
        print(f"\n{case}: {', '.join(timing.kernels)}")
        for name, seconds in timing.seconds.items():
            ratio = seconds / timing.seconds[OURS]
            print(f"  {name:20s}{seconds * 1e6:10.1f} us{ratio:9.2f} x{timing.packed_bytes / seconds / 1e9:10.1f} GB/s")


if __name__ == "__main__":
    main()
