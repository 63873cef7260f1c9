"""The steps of mac_report.py. Each runs in a process that may crash: python tests/host/mac_steps.py STEP ... EVENTS.

What an item's outcome and the lines on the descriptor EVENTS are is described at mac_report.guarded.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests" / "support"), str(ROOT / "softmetal"), str(ROOT / "benchmarks")]

Facts = dict[str, Any]
Run = Callable[[], Facts]


class Events:
    """The end of the pipe on which mac_report.py listens."""

    def __init__(self, descriptor: int, done: Iterable[str], select: Sequence[str]) -> None:
        self._file = open(descriptor, "w", buffering=1)  # noqa: SIM115 (open as long as the process)
        self._output = os.dup(2)  # pytest puts something else in its place
        self._done = set(done)
        self._select = select

    def wants(self, name: str) -> bool:
        return name not in self._done and (not self._select or any(text in name for text in self._select))

    def begin(self, name: str) -> None:
        self._write({"begin": name})

    def end(self, name: str, outcome: str, **facts: Any) -> None:
        sys.stderr.flush()
        written = os.lseek(self._output, 0, os.SEEK_CUR)
        self._write({"end": {"name": name, "outcome": outcome, **facts}, "written": written})

    def run(self, name: str, run: Run) -> None:
        """One item: passed with what it returns, or failed with what it raises."""
        self.begin(name)
        try:
            outcome, facts = "passed", run()
        except Exception:
            outcome, facts = "failed", {"reason": traceback.format_exc(limit=-4)}
        self.end(name, outcome, **facts)

    def _write(self, event: Facts) -> None:
        self._file.write(json.dumps(event) + "\n")


# --- What the GPU and its software are --------------------------------------------------------------------------------


def gpu_items() -> Iterator[tuple[str, Run]]:
    yield "torch", torch_facts
    yield "copies", copies
    yield "an op of torch", torch_op
    yield "a shader of two lines", small_shader
    yield "package", package_facts
    yield "mlx", mlx_facts


def torch_facts() -> Facts:
    import torch

    built = torch.backends.mps.is_built()
    memory = torch.mps.recommended_max_memory() if built else None
    return {
        "version": torch.__version__,
        "mps is built": built,
        "mps is available": torch.backends.mps.is_available(),
        "recommended memory": memory,
    }


def copies() -> Facts:
    import torch

    x = torch.arange(1 << 16, dtype=torch.float32)
    assert torch.equal(x.to("mps").cpu(), x), "a tensor is another one after it was on the GPU"
    return {}


def torch_op() -> Facts:
    import torch

    a, b = torch.randn(64, 96), torch.randn(96, 32)
    torch.testing.assert_close((a.to("mps") @ b.to("mps")).cpu(), a @ b, rtol=1e-3, atol=1e-3)
    return {}


def small_shader() -> Facts:
    """Where this gives nothing but zeros, as was seen on virtual GPUs, the fault is not this package's."""
    import torch

    if not torch.backends.mps.is_built():
        return {"note": "this torch compiles no shaders"}
    library = torch.mps.compile_shader(
        "#include <metal_stdlib>\n"
        "kernel void twice(device float* x, uint i [[thread_position_in_grid]]) { x[i] = 2 * x[i]; }\n"
    )
    x = torch.arange(100, dtype=torch.float32, device="mps")
    library.twice(x)
    assert torch.equal(x.cpu(), 2 * torch.arange(100, dtype=torch.float32)), f"0 to 99 doubled are {x.cpu().tolist()}"
    return {}


def package_facts() -> Facts:
    """The plan of a call, of which the first also runs the self-check, and whether the result is right."""
    return {"version": metadata.version("quantization-mlx"), **product("affine", 64, 4, "float16", True, 1)()}


def mlx_facts() -> Facts:
    import mlx.core as mx

    device = mx.default_device()
    assert device == mx.gpu, f"mlx runs on {device} here"
    words = mx.quantize(mx.random.normal((64, 128)), group_size=64, bits=4)
    mx.eval(mx.quantized_matmul(mx.random.normal((1, 128)), *words, group_size=64, bits=4))
    return {"version": metadata.version("mlx"), "device": {name: str(fact) for name, fact in mx.device_info().items()}}


# --- Every kernel family for every format -----------------------------------------------------------------------------

# One row, a few, and more than fit into one tile: the three families, and tensor operations where the GPU has them.
ROWS = (1, 6, 70)
DTYPES = ("float16", "bfloat16", "float32")
N, K = 72, 256  # no whole tile of columns
N_OF_COLUMNS = 128  # whole groups, where N is what is packed


def check_items() -> Iterator[tuple[str, Run]]:
    from quantization_mlx.formats import MODES

    for mode in MODES.values():
        group_size = mode.group_sizes[0]
        for bits in mode.bits:
            for dtype in DTYPES if bits == mode.bits[0] else DTYPES[:1]:
                for transpose in (True, False) if mode.packing == "rows" else (False,):
                    orientation = "transposed" if transpose else "not transposed"
                    for rows in ROWS:
                        name = f"{mode.name}-g{group_size}-b{bits} {dtype} {orientation} {rows} rows"
                        yield name, product(mode.name, group_size, bits, dtype, transpose, rows)
                    for pairs, sort in ((5, False), (32, True)):
                        name = f"{mode.name}-g{group_size}-b{bits} {dtype} {orientation} {pairs} pairs"
                        yield name, gathered(mode.name, group_size, bits, dtype, transpose, pairs, sort)
            name = f"{mode.name}-g{group_size}-b{bits} quantize and dequantize"
            yield name, conversion(mode.name, group_size, bits)


def product(mode: str, group_size: int, bits: int, dtype: str, transpose: bool, rows: int) -> Run:
    def run() -> Facts:
        import torch

        import oracle
        import quantization_mlx as q

        format, weights, matrix = operands(mode, group_size, bits, dtype, transpose)
        x = oracle.random_x(rows, matrix.shape[0], dtype=getattr(torch, dtype))
        on_gpu = weights.to("mps")
        call = lambda: q.quantized_matmul(x.to("mps"), *on_gpu.tensors, transpose, **format.options)  # noqa: E731
        facts, result = timed(call)
        oracle.assert_product(result.cpu(), x, matrix, x.dtype, str(format))
        return facts

    return run


def gathered(mode: str, group_size: int, bits: int, dtype: str, transpose: bool, pairs: int, sort: bool) -> Run:
    """Products of one row each, with one of three matrices; sorted by it, tiles walk runs of equal ones."""

    def run() -> Facts:
        import torch

        import oracle
        import quantization_mlx as q

        format, weights, matrices = operands(mode, group_size, bits, dtype, transpose, 3)
        x = oracle.random_x(pairs, 1, matrices.shape[1], dtype=getattr(torch, dtype))
        experts = torch.arange(pairs) % 3
        experts = experts.sort().values if sort else experts
        on_gpu = weights.to("mps")
        call = lambda: q.gather_qmm(  # noqa: E731
            x.to("mps"), *on_gpu.tensors, None, experts.to("mps"), transpose, **format.options, sorted_indices=sort
        )
        facts, result = timed(call)
        for pair, expert in enumerate(experts.tolist()):
            oracle.assert_product(result[pair].cpu(), x[pair], matrices[expert], x.dtype, f"{format}, pair {pair}")
        return facts

    return run


def operands(mode: str, group_size: int, bits: int, dtype: str, transpose: bool, *batch: int) -> tuple[Any, Any, Any]:
    """A format, weights drawn at random and, in float64, the matrices [..., K, N] that they stand for."""
    import torch

    import oracle

    format = oracle.Format(mode, group_size, bits)
    shape = (N, K) if transpose else (K, N if format.is_column_packed else N_OF_COLUMNS)
    weights = oracle.random_quantized(format, *batch, *shape, dtype=getattr(torch, dtype))
    return format, weights, weights.matrix(transpose)


def conversion(mode: str, group_size: int, bits: int) -> Run:
    """Against the CPU's: the codes, of which a few may be rounded to the neighbour, and what they stand for."""

    def run() -> Facts:
        import torch

        import oracle
        import quantization_mlx as q

        format = oracle.Format(mode, group_size, bits)
        matrix = oracle.random_x(*((K, N) if format.is_column_packed else (N, K)))
        expected = q.quantize(matrix, **format.options)
        facts, packed = timed(lambda: q.quantize(matrix.to("mps"), **format.options))
        codes, theirs = (unpacked(words, format) for words in (packed[0], expected[0]))
        different = float((codes != theirs).mean())
        assert different <= 1e-3, f"{different:.1%} of the codes differ from the CPU's"
        y = q.dequantize(*packed, **format.options).cpu().double()
        exact = oracle.dequantize(*(*packed, None)[:3], format)
        torch.testing.assert_close(y, exact, rtol=1e-5, atol=1e-5)
        return {**facts, "different codes": different}

    return run


def unpacked(words: Any, format: Any) -> Any:
    import oracle

    return oracle.unpack(words.mT if format.is_column_packed else words, format.bits)


def timed(call: Callable[[], Any]) -> tuple[Facts, Any]:
    """The result of the second call; what it ran, what was excluded, and the seconds of the first and of the second.

    The first compiles the kernels and runs the self-check, which excludes what fails with a warning.
    """
    import torch

    import quantization_mlx as q

    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        result = call()
        torch.accelerator.synchronize()
        seconds.append(time.perf_counter() - start)
    [plan] = q.explain(call)
    facts = {"gpu": plan.gpu, "kernels": [launch.kernel for launch in plan.launches]}
    excluded = {"excluded": plan.excluded} if plan.excluded else {}
    return {**facts, **excluded, "first": round(seconds[0], 4), "second": round(seconds[1], 6)}, result


# --- The tests of the ops ---------------------------------------------------------------------------------------------

OP_TESTS = ("tests/ops", "tests/marlin/test_marlin_ops.py")


def run_tests(events: Events, device: str) -> None:
    import pytest

    os.environ["TEST_DEVICES"] = device
    arguments = [*(str(ROOT / path) for path in OP_TESTS), f"--rootdir={ROOT}", "-c", str(ROOT / "pyproject.toml")]
    arguments += ["--covering", "-q", "-p", "no:cacheprovider", "-k", device]
    status = pytest.main(arguments, plugins=[TestEvents(events)])
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED):
        sys.exit(f"pytest ends with {status!r}")


class TestEvents:
    """A plugin of pytest."""

    def __init__(self, events: Events) -> None:
        self._events = events
        self._reports: list[Any] = []

    def pytest_collection_finish(self, session: Any) -> None:
        session.items[:] = [item for item in session.items if self._events.wants(item.nodeid)]

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._reports = []
        self._events.begin(nodeid)

    def pytest_runtest_logreport(self, report: Any) -> None:
        self._reports.append(report)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        failed = [report for report in self._reports if report.failed]
        if failed:
            self._events.end(nodeid, "failed", reason=failed[0].longreprtext[-3000:])
        else:
            skipped = any(report.skipped for report in self._reports)
            self._events.end(nodeid, "skipped" if skipped else "passed")


# --- Times ------------------------------------------------------------------------------------------------------------

ROUNDS = 9


def time_items(with_mlx: bool, small: bool) -> Iterator[tuple[str, Run]]:
    import mps as benchmark

    if small:
        benchmark.CALLS = benchmark.COPIES = 1
    small_cases = [benchmark.Case(64, 128, 1), benchmark.Case(64, 128, 33)]
    for case in small_cases if small else benchmark.CASES:
        yield str(case), comparison(benchmark, case, with_mlx, 1 if small else ROUNDS)


def comparison(benchmark: Any, case: Any, with_mlx: bool, rounds: int) -> Run:
    def run() -> Facts:
        timing = benchmark.compare(case, rounds, with_mlx)
        microseconds = {name: round(1e6 * seconds, 2) for name, seconds in timing.seconds.items()}
        rate = timing.packed_bytes / timing.seconds[benchmark.OURS] / 1e9
        return {"kernels": timing.kernels, "microseconds": microseconds, "GB/s of weights": round(rate, 2)}

    return run


# --- All --------------------------------------------------------------------------------------------------------------


@contextmanager
def device(arguments: argparse.Namespace) -> Iterator[None]:
    """The Mac's GPU, or the software Metal device."""
    # A family that fails its self-check is excluded with a warning, as it is for users, and is no error.
    os.environ.pop("CI", None)
    if not arguments.software_gpu:
        yield
        return
    import software_gpu
    from softmetal import mps as software_device

    software_gpu.install()
    software_device.set_gpu(arguments.software_gpu)
    with software_device.corrupted(arguments.corrupt):
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("step", choices=("gpu", "checks", "tests", "times"))
    parser.add_argument("--select", action="append", default=[])
    parser.add_argument("--software-gpu")
    parser.add_argument("--corrupt", default="")
    parser.add_argument("--without-mlx", action="store_true")
    parser.add_argument("events", type=int)
    arguments = parser.parse_args()
    faulthandler.enable()
    select = () if arguments.step == "gpu" else arguments.select  # what comes after it depends on all of that one
    events = Events(arguments.events, json.load(sys.stdin), select)
    with device(arguments):
        if arguments.step == "tests":
            run_tests(events, name_in_tests(arguments.software_gpu))
            return
        items = {
            "gpu": gpu_items,
            "checks": check_items,
            "times": lambda: time_items(not arguments.without_mlx, bool(arguments.software_gpu)),
        }[arguments.step]
        for name, run in items():
            if events.wants(name):
                events.run(name, run)


def name_in_tests(software_gpu: str | None) -> str:
    """What the tests call the device."""
    from devices import SOFTWARE_GPUS

    names = {architecture: name for name, architecture in SOFTWARE_GPUS.items()}
    return names[software_gpu] if software_gpu else "mps"


if __name__ == "__main__":
    main()
