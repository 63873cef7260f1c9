"""Quantized products on CPU, side by side with what a user would run instead.

    python benchmarks/cpu.py --quick

For each shape and number of rows of x, one run times every contender in turn, round after round, with enough copies of
the weights in rotation that none stays in the last-level cache. The table shows the median time, its ratio to this
package's with the same activations, and the rate in GFLOP/s.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional

import quantization_mlx

BITS = 4
GROUP_SIZE = 64
CACHE_BYTES = 64 * 2**20
CALLS = 3  # timed, of one turn
SLOW = 1.0  # seconds: what takes longer needs no second call


@dataclass
class Contender:
    name: str
    run: Callable[[torch.Tensor, int], None]
    dtype: torch.dtype
    copies: int


def copies_beyond_cache(weight_bytes: int) -> int:
    return max(2, -(-CACHE_BYTES // weight_bytes) + 1)


def ours(weight: torch.Tensor, dtype: torch.dtype, name: str) -> Contender:
    packed = quantization_mlx.quantize(weight.to(dtype), GROUP_SIZE, BITS)
    copies = copies_beyond_cache(sum(part.nbytes for part in packed))
    rotation = [tuple(part.clone() for part in packed) for _ in range(copies)]
    matmul = quantization_mlx.quantized_matmul
    return Contender(name, lambda x, i: matmul(x, *rotation[i], True, GROUP_SIZE, BITS), dtype, copies)


def dense(weight: torch.Tensor, dtype: torch.dtype, name: str) -> Contender:
    copies = copies_beyond_cache(weight.numel() * dtype.itemsize)
    rotation = [weight.to(dtype, copy=True) for _ in range(copies)]
    return Contender(name, lambda x, i: functional.linear(x, rotation[i]), dtype, copies)


def torch_int4(weight: torch.Tensor, dtype: torch.dtype, name: str) -> Contender:
    """torch's weight-only int4 product; it has its own packing, so only the time is comparable."""
    rows, columns = weight.shape
    codes = torch.randint(0, 16, (rows, columns), dtype=torch.int32)
    packed = torch._convert_weight_to_int4pack_for_cpu(codes, 1)
    parameters = torch.rand(columns // GROUP_SIZE, rows, 2, dtype=dtype)
    copies = copies_beyond_cache(packed.nbytes + parameters.nbytes)
    rotation = [(packed.clone(), parameters.clone()) for _ in range(copies)]

    def run(x: torch.Tensor, i: int) -> None:
        words, scales = rotation[i]
        torch._weight_int4pack_mm_for_cpu(x, words, GROUP_SIZE, scales)

    return Contender(name, run, dtype, copies)


def mlx_cpu(weight: torch.Tensor, dtype: torch.dtype, name: str) -> Contender | None:
    try:
        import mlx.core as mx
    except ImportError:
        return None
    packed = mx.quantize(mx.array(weight.numpy()), group_size=GROUP_SIZE, bits=BITS)
    copies = copies_beyond_cache(sum(part.nbytes for part in packed))
    rotation = [tuple(part + 0 for part in packed) for _ in range(copies)]
    mx.eval(rotation)
    activations: dict[int, object] = {}

    def run(x: torch.Tensor, i: int) -> None:
        if x.shape[0] not in activations:
            activations[x.shape[0]] = mx.array(x.numpy())
        mx.eval(mx.quantized_matmul(activations[x.shape[0]], *rotation[i], True, GROUP_SIZE, BITS))

    return Contender(name, run, dtype, copies)


CONTENDERS = (
    (ours, torch.float32, "quantization-mlx f32"),
    (ours, torch.bfloat16, "quantization-mlx bf16"),
    (dense, torch.float32, "torch dense f32"),
    (dense, torch.bfloat16, "torch dense bf16"),
    (torch_int4, torch.bfloat16, "torch int4pack bf16"),
    (mlx_cpu, torch.float32, "mlx f32"),
)


def measure(contenders: list[Contender], rows: int, inner: int, rounds: int) -> dict[str, float]:
    """Median seconds of each contender.

    They take turns, so that a slow moment of the machine meets all of them. A turn is one untimed call, in which the
    contender's own threads wake up and the last one's go to sleep, and some timed ones.
    """
    times: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for turn in range(rounds):
        for contender in contenders:
            measured = times[contender.name]
            if measured and measured[0] > SLOW:
                continue  # once tells enough
            x = torch.randn(rows, inner).to(contender.dtype)
            for call in range(1 + CALLS):
                start = time.perf_counter()
                contender.run(x, (turn * (1 + CALLS) + call) % contender.copies)
                seconds = time.perf_counter() - start
                if call > 0 or seconds > SLOW:
                    measured.append(seconds)
                if seconds > SLOW:
                    break
    return {name: statistics.median(values) for name, values in times.items()}


def print_row(name: str, seconds: float, reference: float, operations: float) -> None:
    print(f"  {name:24s}{seconds * 1e3:10.2f} ms{seconds / reference:9.2f} x{operations / seconds / 1e9:10.0f} GFLOP/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one shape, few rounds: a check, not a measurement")
    arguments = parser.parse_args()
    shapes = [(4096, 4096)] if arguments.quick else [(4096, 4096), (14336, 4096), (4096, 14336), (576, 1536)]
    row_counts = [1, 8, 32, 512] if arguments.quick else [1, 2, 4, 8, 16, 32, 128, 512, 2048]
    rounds = 3 if arguments.quick else 9

    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{BITS}-bit affine, group_size {GROUP_SIZE}; time, time relative to ours with the same activations, rate")
    for columns, inner in shapes:
        weight = torch.randn(columns, inner)
        contenders = [build(weight, dtype, name) for build, dtype, name in CONTENDERS]
        contenders = [contender for contender in contenders if contender is not None]
        for rows in row_counts:
            medians = measure(contenders, rows, inner, rounds)
            print(f"\nx [{rows}, {inner}], w [{columns}, {inner}]")
            for contender in contenders:
                own = "f32" if contender.dtype == torch.float32 else "bf16"
                reference = medians[f"quantization-mlx {own}"]
                print_row(contender.name, medians[contender.name], reference, 2.0 * rows * columns * inner)


if __name__ == "__main__":
    main()
