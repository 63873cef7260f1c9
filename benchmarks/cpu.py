"""Quantized products on CPU, side by side with what a user would run instead.

    python benchmarks/cpu.py --quick                     # a smoke check
    python benchmarks/cpu.py --csv cpu.csv               # the whole table
    python benchmarks/cpu.py --from-csv cpu.csv --plot docs/cpu.png

For each shape and number of rows of x, one run times every contender in turn, round after round, with enough copies of
the weights in rotation that none stays in the last-level cache. The table shows the median time, how many times
faster this package is than the contender with the same activations, and the larger of two fractions: of the read
bandwidth and of the multiply rate that this machine reached in the same run. Contenders that are not installed are
named and left out; `pip install -e ".[bench]"` brings them.
"""

from __future__ import annotations

import argparse
import csv
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional

import quantization_mlx

BITS = 4
GROUP_SIZE = 64
CACHE_BYTES = 64 * 2**20
SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (576, 1536))  # N, K
ROWS = (1, 2, 4, 8, 16, 32, 128, 512, 2048)
SLOW = 1.0  # seconds: what takes longer is timed once, and not at all with more rows
OURS = "quantization-mlx"
NAMES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


@dataclass
class Contender:
    """`run(x, i)` multiplies x with copy i of the weights, or with all of them where products_per_run says so."""

    name: str
    activations: str  # what is multiplied: "f32", "bf16", "f16" or "int8"
    dtype: torch.dtype  # of x
    run: Callable[[torch.Tensor, int], object]
    copies: int
    weight_bytes: int
    products_per_run: int = 1


def copies_beyond_cache(weight_bytes: int) -> int:
    return max(2, -(-CACHE_BYTES // weight_bytes) + 1)


# --- Contenders: each builds itself for weights [N, K], or raises ImportError -----------------------------------------


def ours(weight: torch.Tensor, dtype: torch.dtype) -> Contender:
    packed = quantization_mlx.quantize(weight.to(dtype), GROUP_SIZE, BITS)
    size = sum(part.nbytes for part in packed)
    rotation = [tuple(part.clone() for part in packed) for _ in range(copies_beyond_cache(size))]
    matmul = quantization_mlx.quantized_matmul

    def run(x: torch.Tensor, i: int) -> None:
        matmul(x, *rotation[i], True, GROUP_SIZE, BITS)

    return Contender(OURS, NAMES[dtype], dtype, run, len(rotation), size)


def torch_dense(weight: torch.Tensor, dtype: torch.dtype) -> Contender:
    size = weight.numel() * dtype.itemsize
    rotation = [weight.to(dtype, copy=True) for _ in range(copies_beyond_cache(size))]
    return Contender(
        "torch dense", NAMES[dtype], dtype, lambda x, i: functional.linear(x, rotation[i]), len(rotation), size
    )


def torch_int4(weight: torch.Tensor, dtype: torch.dtype) -> Contender:
    """torch's weight-only int4 product; it has its own packing, so only the time is comparable."""
    rows, columns = weight.shape
    codes = torch.randint(0, 16, (rows, columns), dtype=torch.int32)
    packed = torch._convert_weight_to_int4pack_for_cpu(codes, 1)
    parameters = torch.rand(columns // GROUP_SIZE, rows, 2, dtype=dtype)
    size = packed.nbytes + parameters.nbytes
    rotation = [(packed.clone(), parameters.clone()) for _ in range(copies_beyond_cache(size))]

    def run(x: torch.Tensor, i: int) -> None:
        words, scales = rotation[i]
        torch._weight_int4pack_mm_for_cpu(x, words, GROUP_SIZE, scales)

    return Contender("torch int4pack", NAMES[dtype], dtype, run, len(rotation), size)


def onnx_runtime(level: int, zero_points: bool) -> Callable[[torch.Tensor, torch.dtype], Contender]:
    """MatMulNBits; one model holds all copies, because each session would keep threads of its own spinning."""

    def build(weight: torch.Tensor, dtype: torch.dtype) -> Contender:
        import numpy as np
        import onnxruntime
        from onnx import TensorProto, helper, numpy_helper

        N, K = weight.shape
        groups = K // GROUP_SIZE
        size = N * K * BITS // 8 + N * groups * 4 + (N * -(-groups // 2) if zero_points else 0)
        copies = copies_beyond_cache(size)
        generator = np.random.default_rng(0)
        nodes, parameters = [], []
        for i in range(copies):
            names = [f"words{i}", f"scales{i}"] + ([f"zeros{i}"] if zero_points else [])
            values = [
                generator.integers(0, 256, (N, groups, GROUP_SIZE * BITS // 8), np.uint8),
                generator.random(N * groups, np.float32),
                generator.integers(0, 256, N * -(-groups // 2), np.uint8),
            ]
            parameters += [numpy_helper.from_array(value, name) for name, value in zip(names, values, strict=False)]
            options = {"K": K, "N": N, "bits": BITS, "block_size": GROUP_SIZE, "accuracy_level": level}
            nodes.append(helper.make_node("MatMulNBits", ["x", *names], [f"y{i}"], domain="com.microsoft", **options))
        value_info = helper.make_tensor_value_info
        graph = helper.make_graph(
            nodes,
            "products",
            [value_info("x", TensorProto.FLOAT, ["M", K])],
            [value_info(f"y{i}", TensorProto.FLOAT, ["M", N]) for i in range(copies)],
            parameters,
        )
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        session_options = onnxruntime.SessionOptions()
        session_options.intra_op_num_threads = torch.get_num_threads()
        session_options.log_severity_level = 3
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), session_options, providers=["CPUExecutionProvider"]
        )
        name = f"ONNX Runtime level {level}" + (" zero points" if zero_points else "")
        activations = "f32" if level == 1 else "int8"
        return Contender(
            name, activations, dtype, lambda x, i: session.run(None, {"x": x.numpy()}), copies, size, copies
        )

    return build


def open_vino(precision: str, activation_group: int) -> Callable[[torch.Tensor, torch.dtype], Contender]:
    """A linear layer with compressed weights; activation_group > 0 quantizes activations to int8."""

    def build(weight: torch.Tensor, dtype: torch.dtype) -> Contender:
        import numpy as np
        import openvino
        from openvino import opset13 as ops

        N, K = weight.shape
        groups = K // GROUP_SIZE
        size = N * K * BITS // 8 + N * groups * 3
        copies = copies_beyond_cache(size)
        generator = np.random.default_rng(0)
        x = ops.parameter([-1, K], np.float32)
        products = []
        for _ in range(copies):
            shape = openvino.Shape([N, groups, GROUP_SIZE])
            words = openvino.Tensor(openvino.Type.u4, shape)
            words.data[:] = generator.integers(0, 256, words.data.shape, np.uint8)
            zeros = openvino.Tensor(openvino.Type.u4, openvino.Shape([N, groups, 1]))
            zeros.data[:] = generator.integers(0, 256, zeros.data.shape, np.uint8)
            scales = ops.constant(generator.random((N, groups, 1)).astype(np.float16))
            codes = ops.convert(ops.constant(words), np.float16)
            offset = ops.subtract(codes, ops.convert(ops.constant(zeros), np.float16))
            flat = ops.reshape(ops.multiply(offset, scales), np.array([N, K]), False)
            products.append(ops.matmul(x, ops.convert(flat, np.float32), False, True))
        options = {
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "INFERENCE_PRECISION_HINT": precision,
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": activation_group,
            "NUM_STREAMS": 1,
        }
        request = openvino.Core().compile_model(openvino.Model(products, [x]), "CPU", options).create_infer_request()

        def run(x: torch.Tensor, i: int) -> None:
            request.infer([x.numpy()], share_inputs=True, share_outputs=True)

        activations = "int8" if activation_group else {"f32": "f32", "bf16": "bf16"}[precision]
        return Contender("OpenVINO", activations, dtype, run, copies, size, copies)

    return build


def mlx_cpu(weight: torch.Tensor, dtype: torch.dtype) -> Contender:
    import mlx.core as mx

    packed = mx.quantize(mx.array(weight.numpy()), group_size=GROUP_SIZE, bits=BITS)
    size = sum(part.nbytes for part in packed)
    rotation = [tuple(part + 0 for part in packed) for _ in range(copies_beyond_cache(size))]
    mx.eval(rotation)
    activations: dict[int, object] = {}

    def run(x: torch.Tensor, i: int) -> None:
        if x.shape[0] not in activations:
            activations[x.shape[0]] = mx.array(x.numpy())
        mx.eval(mx.quantized_matmul(activations[x.shape[0]], *rotation[i], True, GROUP_SIZE, BITS))

    return Contender("mlx", NAMES[dtype], dtype, run, len(rotation), size)


CONTENDERS: tuple[tuple[str, Callable[[torch.Tensor, torch.dtype], Contender], torch.dtype], ...] = (
    (OURS, ours, torch.float32),
    (OURS, ours, torch.bfloat16),
    (OURS, ours, torch.float16),
    ("torch dense", torch_dense, torch.float32),
    ("torch dense", torch_dense, torch.bfloat16),
    ("torch dense", torch_dense, torch.float16),
    ("torch int4pack", torch_int4, torch.bfloat16),
    ("torch int4pack", torch_int4, torch.float16),
    ("onnxruntime", onnx_runtime(1, False), torch.float32),
    ("onnxruntime", onnx_runtime(1, True), torch.float32),
    ("onnxruntime", onnx_runtime(4, False), torch.float32),
    ("onnxruntime", onnx_runtime(4, True), torch.float32),
    ("openvino", open_vino("f32", 0), torch.float32),
    ("openvino", open_vino("bf16", 0), torch.float32),
    ("openvino", open_vino("f32", 64), torch.float32),
    ("mlx", mlx_cpu, torch.float32),
)


def build_all(weight: torch.Tensor, only: list[str] | None, missing: set[str]) -> Iterator[Contender]:
    for package, build, dtype in CONTENDERS:
        if only and package not in (OURS, *only):
            continue
        try:
            yield build(weight, dtype)
        except ImportError:
            missing.add(package)


# --- Measuring --------------------------------------------------------------------------------------------------------


def measure(contenders: list[Contender], rows: int, inner: int, rounds: int) -> list[float]:
    """Median seconds of one product of each contender.

    They take turns, so that a slow moment of the machine meets all of them. A turn is one untimed call, in which the
    contender's own threads wake up and the last one's go to sleep, and some timed ones, fewer where they are long.
    """
    times: list[list[float]] = [[] for _ in contenders]
    inputs = {dtype: torch.randn(rows, inner).to(dtype) for dtype in NAMES}
    for turn in range(rounds):
        for contender, measured in zip(contenders, times, strict=True):
            if measured and measured[0] > SLOW:
                continue  # once tells enough
            timed_calls = 3 if not measured or measured[0] < 0.02 else 1
            for call in range(1 + timed_calls):
                start = time.perf_counter()
                contender.run(inputs[contender.dtype], (turn * 4 + call) % contender.copies)
                seconds = (time.perf_counter() - start) / contender.products_per_run
                if call > 0 or seconds > 0.1:  # a long call needs no warming up
                    measured.append(seconds)
                if seconds > 0.1:
                    break
    return [statistics.median(measured) for measured in times]


def ceilings() -> dict[str, float]:
    """What this machine reaches: bytes read per second, and multiply-adds of large dense products, as 2 operations."""

    def best(function: Callable[[], object], amount: float) -> float:
        seconds = []
        for _ in range(6):
            start = time.perf_counter()
            function()
            seconds.append(time.perf_counter() - start)
        return amount / min(seconds)

    memory = torch.ones(64 * 2**20)
    size = 2048
    operations = 2.0 * size**3
    square = torch.randn(size, size)
    half = square.to(torch.bfloat16)
    small = torch.randint(-127, 127, (size, size), dtype=torch.int8)
    return {
        "read": best(memory.sum, memory.nbytes),
        "f32": best(lambda: square @ square, operations),
        "bf16": best(lambda: half @ half, operations),
        "int8": best(lambda: torch._int_mm(small, small), operations),
    }


FIELDS = ("N", "K", "rows", "contender", "activations", "milliseconds", "ours_is_faster", "ceiling")


def compare(
    contenders: list[Contender], rows: int, N: int, K: int, rounds: int, limits: dict[str, float]
) -> list[dict]:
    medians = measure(contenders, rows, K, rounds)
    own = {c.activations: seconds for c, seconds in zip(contenders, medians, strict=True) if c.name == OURS}
    table = []
    for contender, seconds in zip(contenders, medians, strict=True):
        rate = limits[contender.activations if contender.activations in limits else "f32"]
        ceiling = max(contender.weight_bytes / limits["read"], 2.0 * rows * N * K / rate) / seconds
        reference = own["bf16" if contender.activations == "int8" else contender.activations]
        values = (N, K, rows, contender.name, contender.activations, seconds * 1e3, seconds / reference, ceiling)
        table.append(dict(zip(FIELDS, values, strict=True)))
    return table


def print_table(table: list[dict]) -> None:
    first = table[0]
    print(f"\nx [{first['rows']}, {first['K']}], w [{first['N']}, {first['K']}]")
    for row in table:
        name = f"{row['contender']}, {row['activations']}"
        print(
            f"  {name:38s}{row['milliseconds']:10.3f} ms{row['ours_is_faster']:8.2f} x"
            f"{row['ceiling'] * 100:7.0f} % of the ceiling"
        )
    for activations, ratio, name in best_peers(table):
        print(f"  ours, {activations}: {ratio:.2f} x the speed of the best peer ({name})")


def best_peers(table: list[dict]) -> Iterator[tuple[str, float, str]]:
    """For each of our activation types, how many times faster we are than the fastest other with the same."""
    for activations in NAMES.values():
        peers = [row for row in table if row["activations"] == activations and row["contender"] != OURS]
        if peers:
            best = min(peers, key=lambda row: row["milliseconds"])
            yield activations, best["ours_is_faster"], best["contender"]


def print_markdown(results: list[dict]) -> None:
    """Our time, how many times faster than the best peer that is, and our fraction of the ceiling."""
    names = tuple(NAMES.values())
    print("\n| w | rows | " + " | ".join(names) + " |\n|---|---|" + "---|" * len(names))
    for N, K, rows in dict.fromkeys((row["N"], row["K"], row["rows"]) for row in results):
        table = [row for row in results if (row["N"], row["K"], row["rows"]) == (N, K, rows)]
        own = {row["activations"]: row for row in table if row["contender"] == OURS}
        peers = {activations: (ratio, name) for activations, ratio, name in best_peers(table)}
        cells = [
            f"{own[name]['milliseconds']:.2f} ms, **{peers[name][0]:.2f}** x {peers[name][1]}, "
            f"{own[name]['ceiling'] * 100:.0f} %"
            for name in names
        ]
        print(f"| {N} x {K} | {rows} | " + " | ".join(cells) + " |")


# --- Output -----------------------------------------------------------------------------------------------------------


def read_csv(path: Path) -> list[dict]:
    numbers = {"N": int, "K": int, "rows": int, "milliseconds": float, "ours_is_faster": float, "ceiling": float}
    with path.open(newline="") as file:
        return [{key: numbers.get(key, str)(value) for key, value in row.items()} for row in csv.DictReader(file)]


def write_csv(path: Path, table: list[dict]) -> None:
    """Adds to what the file has."""
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        if new:
            writer.writeheader()
        writer.writerows({**row, **{key: f"{row[key]:.4f}" for key in FIELDS[5:]}} for row in table)


def plot(results: list[dict], path: Path) -> None:
    """How many times faster than the best peer with the same activations, over the rows of x, one panel per shape."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shapes = list(dict.fromkeys((row["N"], row["K"]) for row in results))
    figure, panels = pyplot.subplots(1, len(shapes), figsize=(4 * len(shapes), 3.4), sharey=True, squeeze=False)
    for (N, K), panel in zip(shapes, panels[0], strict=True):
        lines: dict[str, list[tuple[int, float]]] = {}
        counts = sorted({row["rows"] for row in results if (row["N"], row["K"]) == (N, K)})
        for rows in counts:
            table = [row for row in results if (row["N"], row["K"], row["rows"]) == (N, K, rows)]
            for activations, ratio, _ in best_peers(table):
                lines.setdefault(activations, []).append((rows, ratio))
        for activations, points in lines.items():
            panel.plot(*zip(*points, strict=True), marker="o", label=activations)
        panel.axhline(1, color="black", linewidth=0.8)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log", base=2)
        panel.set_xticks(counts, [str(rows) for rows in counts])
        panel.set_yticks([0.5, 1, 2, 4, 8], ["0.5", "1", "2", "4", "8"])
        panel.set_title(f"w [{N}, {K}]")
        panel.set_xlabel("rows of x")
    panels[0][0].set_ylabel("speed / that of the best peer")
    panels[0][0].legend(title="activations")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def shape(text: str) -> tuple[int, int]:
    N, K = text.split("x")
    return int(N), int(K)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one shape, few rounds: a check, not a measurement")
    parser.add_argument("--shapes", type=shape, nargs="+", metavar="NxK", help="other shapes of w")
    parser.add_argument("--rows", type=int, nargs="+", help="other numbers of rows of x")
    peers = sorted({package for package, _, _ in CONTENDERS} - {OURS})
    parser.add_argument("--only", nargs="+", choices=peers, help="leave the other peers out")
    parser.add_argument("--threads", type=int, help="of every contender but mlx, which has its own")
    parser.add_argument("--csv", type=Path, help="add the results to this file")
    parser.add_argument("--from-csv", type=Path, help="measure nothing; print the results in this file")
    parser.add_argument("--plot", type=Path, help="draw the results to this file")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    shapes = arguments.shapes or (SHAPES[:1] if arguments.quick else SHAPES)
    row_counts = arguments.rows or ((1, 8, 32) if arguments.quick else ROWS)
    rounds = 3 if arguments.quick else 9

    results = read_csv(arguments.from_csv) if arguments.from_csv else []
    for N, K, rows in dict.fromkeys((row["N"], row["K"], row["rows"]) for row in results):
        print_table([row for row in results if (row["N"], row["K"], row["rows"]) == (N, K, rows)])
    if not arguments.from_csv:
        limits = ceilings()
        print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
        print(f"{BITS}-bit affine, group_size {GROUP_SIZE}; weights beyond the cache")
        print(
            f"reads {limits['read'] / 1e9:.1f} GB/s; dense products reach "
            + ", ".join(f"{limits[name] / 1e9:.0f} GFLOP/s in {name}" for name in ("f32", "bf16", "int8"))
        )
        missing: set[str] = set()
        for N, K in shapes:
            contenders = list(build_all(torch.randn(N, K), arguments.only, missing))
            for rows in row_counts:
                table = compare(contenders, rows, N, K, rounds if rows < 512 else min(rounds, 3), limits)
                contenders = [c for c, row in zip(contenders, table, strict=True) if row["milliseconds"] < SLOW * 1e3]
                print_table(table)
                results += table
                if arguments.csv:
                    write_csv(arguments.csv, table)
        if missing:
            print(f"\nnot installed and left out: {', '.join(sorted(missing))}")
    print_markdown(results)
    if arguments.plot:
        plot(results, arguments.plot)


if __name__ == "__main__":
    main()
