"""Quantized products on an Apple GPU, side by side with what a user would run instead. Needs a Mac.

    make bench

For each shape and number of rows of x, one run times every contender in turn, round after round, with copies of the
weights in rotation. A turn queues many calls and waits once, so that what is timed is the GPU and not the queue. The
table shows the median time of a call, its ratio to this package's, the rate at which packed weights were read, and the
kernel that ran. With it come the chip, macOS and torch: report them together.
"""

from __future__ import annotations

import argparse
import functools
import platform
import statistics
import subprocess
import time
from collections.abc import Callable

import torch
from torch.nn import functional

import quantization_mlx

BITS = 4
GROUP_SIZE = 64
COPIES = 8
CALLS = 32  # of one turn
DTYPE = torch.float16

Run = Callable[[torch.Tensor, int], None]


def ours(weight: torch.Tensor) -> Run:
    packed = quantization_mlx.quantize(weight, GROUP_SIZE, BITS)
    rotation = [tuple(part.clone() for part in packed) for _ in range(COPIES)]
    return lambda x, i: quantization_mlx.quantized_matmul(x, *rotation[i], True, GROUP_SIZE, BITS)


def dense(weight: torch.Tensor) -> Run:
    rotation = [weight.clone() for _ in range(COPIES)]
    return lambda x, i: functional.linear(x, rotation[i])


def mlx_metal(weight: torch.Tensor) -> tuple[Callable[[torch.Tensor], object], Callable[[object, int], object]]:
    import mlx.core as mx

    packed = mx.quantize(mx.array(weight.cpu().numpy()), group_size=GROUP_SIZE, bits=BITS)
    rotation = [tuple(part + 0 for part in packed) for _ in range(COPIES)]
    mx.eval(rotation)
    return (
        lambda x: mx.array(x.cpu().numpy()),
        lambda x, i: mx.quantized_matmul(x, *rotation[i], True, GROUP_SIZE, BITS),
    )


def turn_of_torch(run: Run, x: torch.Tensor) -> float:
    torch.mps.synchronize()
    start = time.perf_counter()
    for call in range(CALLS):
        run(x, call % COPIES)
    torch.mps.synchronize()
    return (time.perf_counter() - start) / CALLS


def turn_of_mlx(run: Callable[[object, int], object], x: object) -> float:
    import mlx.core as mx

    start = time.perf_counter()
    mx.eval([run(x, call % COPIES) for call in range(CALLS)])
    return (time.perf_counter() - start) / CALLS


def measure(turns: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Median seconds of a call. All take turns, so that a slow moment of the machine meets all of them."""
    times: dict[str, list[float]] = {name: [] for name in turns}
    for number in range(1 + rounds):
        for name, turn in turns.items():
            seconds = turn()
            if number > 0:  # the first compiles kernels
                times[name].append(seconds)
    return {name: statistics.median(values) for name, values in times.items()}


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
    for columns, inner in ((4096, 4096), (14336, 4096), (4096, 14336)):
        weight = torch.randn(columns, inner).to("mps", DTYPE)
        packed_bytes = sum(part.nbytes for part in quantization_mlx.quantize(weight, GROUP_SIZE, BITS))
        contenders = {"quantization-mlx": ours(weight), "torch dense": dense(weight)}
        to_mlx, run_mlx = mlx_metal(weight)
        for rows in (1, 2, 4, 8, 12, 16, 32, 64, 512):
            x = torch.randn(rows, inner).to("mps", DTYPE)
            turns = {name: functools.partial(turn_of_torch, run, x) for name, run in contenders.items()}
            turns["mlx"] = functools.partial(turn_of_mlx, run_mlx, to_mlx(x))
            medians = measure(turns, arguments.rounds)
            [plan] = quantization_mlx.explain(contenders["quantization-mlx"], x, 0)
            print(f"\nx [{rows}, {inner}], w [{columns}, {inner}]: {', '.join(step.kernel for step in plan.launches)}")
            for name, seconds in medians.items():
                ratio = seconds / medians["quantization-mlx"]
                rate = packed_bytes / seconds / 1e9
                print(f"  {name:20s}{seconds * 1e6:10.1f} us{ratio:9.2f} x{rate:10.1f} GB/s")


if __name__ == "__main__":
    main()
