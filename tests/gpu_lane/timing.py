"""Times of calls, of what else there is for them, and of a copy: medians of replayed graphs over rotating weights."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch

from bundle import Buffers, Item
from calls import Call
from check import compare
from fast_calls import AnyCall
from fast_operands import operands_of
from operands import random_operands

# Weights rotate through more than the cache of 50 to 60 MB that an H100 or H200 has.
ROTATION_BYTES = 400 * 2**20
WARM_UPS, REPLAYS = 3, 7
GUARD = 256


def seconds(runs: Sequence[Callable[[int], None]]) -> float:
    """Of one run, the median of several replays of a graph that does them all, one after the other.

    runs: functions of the stream, which is torch's current one.
    """
    runs[0](torch.cuda.current_stream().cuda_stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        stream = torch.cuda.current_stream().cuda_stream
        for run in runs:
            run(stream)
    times = []
    for _ in range(WARM_UPS + REPLAYS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1e3 / len(runs))
    return statistics.median(times[WARM_UPS:])


def copies_of(size: int) -> int:
    return max(4, min(64, -(-ROTATION_BYTES // size)))


class Timer:
    """Times items; remembers the last operands, which the builds of one call have in common."""

    def __init__(self) -> None:
        self._call: AnyCall | None = None
        self._operands: dict[str, np.ndarray] = {}

    def __call__(self, item: Item) -> tuple[float, float]:
        """Seconds, and the largest error as a share of what is allowed. Raises AssertionError as compare does."""
        call = item.call
        if call != self._call:
            self._call, self._operands = call, operands_of(call)
        first = Buffers(item, self._operands, GUARD)
        rotation = [first, *(first.moved(*call.rotating) for _ in range(copies_of(call.moved_bytes) - 1))]
        runs = [item.bind(buffers) for buffers in rotation]
        taken = seconds(runs)
        first.clear()
        runs[0](0)
        torch.cuda.synchronize()
        return taken, compare(call, self._operands, first.results())


def read_bytes(call: AnyCall) -> int:
    """That a call has to move, of products the weights that it has to read."""
    if not (isinstance(call, Call) and call.experts):
        return call.moved_bytes
    return len(np.unique(random_operands(call)["rhs_indices"])) * call.matrix_bytes


def time_linear(call: Call) -> float:
    """torch's product of float16 matrices."""
    w = torch.randn(call.n, call.k, device="cuda").half()
    x = torch.randn(call.rows, call.k, device="cuda").half()
    multiply = torch.nn.functional.linear
    return seconds([partial(_ignoring_stream, multiply, x, w.clone()) for _ in range(copies_of(w.nbytes))])


def time_int4pack(call: Call) -> float:
    """torch's product of bfloat16 with its own packing of 4 bits."""
    codes = torch.randint(0, 256, (call.n, call.k // 2), device="cuda", dtype=torch.uint8)
    packed = torch._convert_weight_to_int4pack(codes, 8)
    scales = torch.rand(call.k // call.group_size, call.n, 2, device="cuda").bfloat16()
    x = torch.randn(call.rows, call.k, device="cuda").bfloat16()
    multiply = partial(_ignoring_stream, torch._weight_int4pack_mm, x)
    copies = range(copies_of(packed.nbytes))
    return seconds([partial(multiply, packed.clone(), call.group_size, scales.clone()) for _ in copies])


def _ignoring_stream(function: Callable, *arguments: object) -> None:
    function(*arguments[:-1])


def copy_bandwidth() -> float:
    """Bytes per second, read and written, of copies within the GPU's memory, once its clocks are up.

    Not in a graph, where a copy is not the same kernel and takes half as long again.
    """
    source = torch.randint(0, 256, (2**30,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    copies = 20
    for _ in range(2):  # the first round warms up
        begin.record()
        for _ in range(copies):
            target.copy_(source)
        end.record()
    torch.cuda.synchronize()
    return 2 * source.nbytes * copies / (begin.elapsed_time(end) / 1e3)
