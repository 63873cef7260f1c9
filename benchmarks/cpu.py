"""Quantized products on CPU, side by side with what a user would run instead.

    python benchmarks/cpu.py --quick                     # a smoke check
    python benchmarks/cpu.py --csv cpu.csv               # the whole table
    python benchmarks/cpu.py --from-csv cpu.csv --plot docs/cpu.png
    python benchmarks/cpu.py --experts                   # gather_qmm, as a mixture of experts calls it
    python benchmarks/cpu.py --linearity                 # whether time grows as rows and weights do
    python benchmarks/cpu.py --formats                   # what other formats cost beside 4 bits
    python benchmarks/cpu.py --layouts                   # Marlin's column-packed formats beside MLX's

For each matrix and number of rows of x, one run times every contender in turn, round after round, with enough copies of
the weights in rotation that none stays in the last-level cache. The table shows the median time, how many times
faster this package is than the contender with the same activations, and the larger of two fractions: of the best read
bandwidth and of the best multiply rate of torch's dense products, which take their turns like contenders. Contenders
that are not installed are named and left out; `pip install -e ".[bench]"` brings them.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import functools
import itertools
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch.nn import functional

import quantization_mlx

BITS = 4
GROUP_SIZE = 64
OURS = "quantization-mlx"
NAMES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
# What is multiplied; of int8 only by those who quantize x, ours from bfloat16.
ACTIVATIONS = (*NAMES.values(), "int8")
T = TypeVar("T")


@dataclass(frozen=True)
class Weights:
    """The shape of what x is multiplied with: [N, K], or [experts, N, K], of which each row of x meets per_token."""

    N: int
    K: int
    experts: int = 1
    per_token: int = 1

    @classmethod
    def parse(cls, text: str) -> Weights:
        """Of "NxK" or "NxKxEXPERTSxPER_TOKEN"."""
        return cls(*(int(size) for size in text.split("x")))

    def __str__(self) -> str:
        matrix = f"{self.N} x {self.K}"
        return matrix if self.experts == 1 else f"{self.per_token} of {self.experts} experts {matrix}"

    def random(self) -> torch.Tensor:
        return torch.randn((self.experts, self.N, self.K) if self.experts > 1 else (self.N, self.K))


MATRICES = (Weights(4096, 4096), Weights(14336, 4096), Weights(4096, 14336), Weights(576, 1536))
ROWS = (1, 2, 3, 4, 5, 6, 8, 12, 16, 32, 128, 512, 2048)
# What the experts of Qwen3-30B-A3B and of DeepSeek-V2-Lite begin with.
EXPERTS = (Weights(768, 2048, 128, 8), Weights(1408, 2048, 64, 6))
TOKENS = (1, 8, 128, 512)
# From 8 to 200 million weights, and what doubles twice.
GROWING_MATRICES = tuple(map(Weights.parse, ("2048x4096", "4096x4096", "14336x4096", "4096x14336", "14336x14336")))
GROWING_ROWS = (512, 2048)
FORMATS = (
    *({"bits": bits, "group_size": GROUP_SIZE} for bits in (4, 2, 3, 5, 6, 8)),
    *({"bits": 4, "group_size": group_size} for group_size in (32, 128)),
    *({"mode": mode} for mode in ("mxfp4", "mxfp8", "nvfp4")),
)
# Marlin's formats, each with MLX's of equal bits and group_size.
LAYOUTS = (
    *(({"mode": f"marlin_{name}", "group_size": 64}, {"bits": 4, "group_size": 64}) for name in ("int4", "int4_sym")),
    ({"mode": "marlin_fp4", "group_size": 64}, {"bits": 4, "group_size": 64}),
    ({"mode": "marlin_fp4", "group_size": 32}, {"mode": "mxfp4"}),
    ({"mode": "marlin_fp8", "group_size": 64}, {"bits": 8, "group_size": 64}),
    ({"mode": "marlin_fp8", "group_size": 32}, {"mode": "mxfp8"}),
    ({"mode": "marlin_int2", "group_size": 64}, {"bits": 2, "group_size": 64}),
)

# Seconds.
SLOW = 1.0  # what of the others takes longer is timed once, and not at all with more rows
LONG = 0.1  # a call that needs no warming up
WARM_UP = 0.005  # of untimed calls: the last contender's threads spin for a while before they sleep


@dataclass
class Contender:
    """`run(x)` multiplies x with the next copy of the weights, or with all where products_per_run says so."""

    name: str
    activations: str  # what is multiplied: "f32", "bf16", "f16" or "int8"
    dtype: torch.dtype  # of x
    run: Callable[[torch.Tensor], object]
    weight_bytes: int  # of one copy
    products_per_run: int = 1


@functools.cache
def cache_bytes() -> int:
    """Twice the last-level cache where Linux tells it, and not less than 64 MiB."""
    units = {"K": 2**10, "M": 2**20}
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max([64 * 2**20, *(2 * int(size[:-1]) * units[size[-1]] for size in sizes if size[-1:] in units)])


def copies_beyond_cache(weight_bytes: int) -> int:
    return max(2, -(-cache_bytes() // weight_bytes) + 1)


def copies(parts: Sequence[torch.Tensor]) -> list[tuple[torch.Tensor, ...]]:
    """So many copies of a matrix's tensors that each has left the cache when its turn comes again."""
    size = sum(part.nbytes for part in parts)
    return [tuple(part.clone() for part in parts) for _ in range(copies_beyond_cache(size))]


# --- Contenders: each builds itself for a weight [N, K], or raises ImportError ----------------------------------------


def ours(weight: torch.Tensor, dtype: torch.dtype, **options: int | str) -> Contender:
    options = options or {"bits": BITS, "group_size": GROUP_SIZE}
    by_rows = not str(options.get("mode", "")).startswith("marlin_")
    packed = quantization_mlx.quantize((weight if by_rows else weight.mT).to(dtype), **options)
    rotation = itertools.cycle(copies(packed))
    matmul = quantization_mlx.quantized_matmul

    def run(x: torch.Tensor) -> torch.Tensor:
        return matmul(x, *next(rotation), transpose=by_rows, **options)

    return Contender(OURS, NAMES[dtype], dtype, run, sum(part.nbytes for part in packed))


def ours_int8(weight: torch.Tensor, dtype: torch.dtype) -> Contender:
    """With activations quantized to int8."""
    contender = ours(weight, dtype)

    def run(x: torch.Tensor) -> None:
        quantization_mlx.set_cpu_activations("int8")
        contender.run(x)
        quantization_mlx.set_cpu_activations("exact")

    return dataclasses.replace(contender, activations="int8", run=run)


def int8_is_possible() -> bool:
    try:
        with quantization_mlx.cpu_activations("int8"):
            return True
    except ValueError:
        return False


def torch_dense(weight: torch.Tensor, dtype: torch.dtype) -> Contender:
    rotation = itertools.cycle(copies([weight.to(dtype)]))
    size = weight.numel() * dtype.itemsize
    return Contender("torch dense", NAMES[dtype], dtype, lambda x: functional.linear(x, *next(rotation)), size)


def torch_int4(weight: torch.Tensor, dtype: torch.dtype) -> Contender:
    """torch's weight-only int4 product; it has its own packing, so only the time is comparable."""
    rows, columns = weight.shape
    codes = torch.randint(0, 16, (rows, columns), dtype=torch.int32)
    packed = torch._convert_weight_to_int4pack_for_cpu(codes, 1)
    parameters = torch.rand(columns // GROUP_SIZE, rows, 2, dtype=dtype)
    rotation = itertools.cycle(copies([packed, parameters]))

    def run(x: torch.Tensor) -> torch.Tensor:
        words, scales = next(rotation)
        return torch._weight_int4pack_mm_for_cpu(x, words, GROUP_SIZE, scales)

    return Contender("torch int4pack", NAMES[dtype], dtype, run, packed.nbytes + parameters.nbytes)


def onnx_runtime(level: int, zero_points: bool) -> Callable[[torch.Tensor, torch.dtype], Contender]:
    """MatMulNBits; one model holds all copies, because each session would keep threads of its own spinning."""

    def build(weight: torch.Tensor, dtype: torch.dtype) -> Contender:
        import numpy as np
        import onnxruntime
        from onnx import TensorProto, helper, numpy_helper

        N, K = weight.shape
        groups = K // GROUP_SIZE
        size = N * K * BITS // 8 + N * groups * 4 + (N * -(-groups // 2) if zero_points else 0)
        count = copies_beyond_cache(size)
        generator = np.random.default_rng(0)
        nodes, parameters = [], []
        for i in range(count):
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
            [value_info(f"y{i}", TensorProto.FLOAT, ["M", N]) for i in range(count)],
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
        return Contender(name, activations, dtype, lambda x: session.run(None, {"x": x.numpy()}), size, count)

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
        count = copies_beyond_cache(size)
        generator = np.random.default_rng(0)
        x = ops.parameter([-1, K], np.float32)
        products = []
        for _ in range(count):
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

        def run(x: torch.Tensor) -> None:
            request.infer([x.numpy()], share_inputs=True, share_outputs=True)

        activations = "int8" if activation_group else {"f32": "f32", "bf16": "bf16"}[precision]
        return Contender("OpenVINO", activations, dtype, run, size, count)

    return build


def mlx_copies(weight: torch.Tensor) -> tuple[list[tuple], int]:
    import mlx.core as mx

    mx.set_default_device(mx.cpu)
    packed = mx.quantize(mx.array(weight.numpy()), group_size=GROUP_SIZE, bits=BITS)
    size = sum(part.nbytes for part in packed)
    rotation = [tuple(part + 0 for part in packed) for _ in range(copies_beyond_cache(size))]
    mx.eval(rotation)
    return rotation, size


def mlx_cpu(weight: torch.Tensor, dtype: torch.dtype) -> Contender:
    import mlx.core as mx

    every, size = mlx_copies(weight)
    rotation = itertools.cycle(every)

    def run(x: torch.Tensor) -> None:
        mx.eval(mx.quantized_matmul(mx.array(x.numpy()), *next(rotation), True, GROUP_SIZE, BITS))

    return Contender("mlx", NAMES[dtype], dtype, run, size)


CONTENDERS: tuple[tuple[str, Callable[[torch.Tensor, torch.dtype], Contender], torch.dtype], ...] = (
    (OURS, ours, torch.float32),
    (OURS, ours, torch.bfloat16),
    (OURS, ours, torch.float16),
    *([(OURS, ours_int8, torch.bfloat16)] if int8_is_possible() else []),
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


# --- Contenders for experts [experts, N, K], the same ----------------------------------------------------------------


@dataclass
class Routing:
    """Which experts the rows of x meet, row after row and, as pairs of both, expert after expert."""

    experts: torch.Tensor  # int64 [rows, per_token]; no row has one twice

    def __post_init__(self) -> None:
        self.sorted_experts, order = self.experts.flatten().sort(stable=True)
        self.sorted_rows = order // self.experts.shape[1]


@functools.cache
def routings(weights: Weights, rows: int) -> tuple[Routing, ...]:
    """For calls in turn. Where one needs fewer experts than there are, the next has others: none is in the cache."""
    generator = torch.Generator().manual_seed(0)
    pairs = rows * weights.per_token
    if pairs <= weights.experts:
        deck = torch.randperm(weights.experts, generator=generator)
        return tuple(Routing(dealt.view(rows, -1)) for dealt in deck.split(pairs) if len(dealt) == pairs)
    draws = [torch.rand(rows, weights.experts, generator=generator) for _ in range(8)]
    return tuple(Routing(draw.topk(weights.per_token).indices) for draw in draws)


def part_read(weights: Weights, rows: int) -> float:
    """The fraction of the matrices that a product reads."""
    used = [len(routing.sorted_experts.unique()) for routing in routings(weights, rows)]
    return statistics.mean(used) / weights.experts


def calls(weights: Weights, every: list[T]) -> Callable[[int], tuple[Routing, T]]:
    """Of a number of rows: the routing and the copy of the weights of the next call."""

    @functools.cache
    def turns(rows: int) -> Iterator[tuple[Routing, T]]:
        return itertools.cycle(itertools.product(routings(weights, rows), every))

    return lambda rows: next(turns(rows))


def our_experts(weights: Weights, in_order: bool) -> Callable[[torch.Tensor, torch.dtype], Contender]:
    """gather_qmm of x [rows, 1, 1, K] with experts [rows, per_token], or of pairs that are in the experts' order."""

    def build(weight: torch.Tensor, dtype: torch.dtype) -> Contender:
        packed = quantization_mlx.quantize(weight.to(dtype), GROUP_SIZE, BITS)
        call = calls(weights, copies(packed))
        gather = functools.partial(quantization_mlx.gather_qmm, group_size=GROUP_SIZE, bits=BITS)

        def run(x: torch.Tensor) -> torch.Tensor:
            routing, parts = call(len(x))
            if in_order:
                pairs = routing.sorted_rows, routing.sorted_experts
                return gather(x[:, None], *parts, *pairs, sorted_indices=True)
            return gather(x[:, None, None], *parts, None, routing.experts)

        name = f"{OURS}, sorted" if in_order else OURS
        return Contender(name, NAMES[dtype], dtype, run, sum(part.nbytes for part in packed))

    return build


def torch_experts(weights: Weights) -> Callable[[torch.Tensor, torch.dtype], Contender]:
    """One dense product after the other, with the rows that an expert has: what Transformers does unless told else."""

    def build(weight: torch.Tensor, dtype: torch.dtype) -> Contender:
        dense = weight.to(dtype)
        call = calls(weights, copies([dense]))

        def run(x: torch.Tensor) -> torch.Tensor:
            routing, (matrices,) = call(len(x))
            experts = routing.experts.flatten()
            pairs_of_expert = experts.argsort().split(experts.bincount(minlength=weights.experts).tolist())
            y = x.new_empty(len(experts), weights.N)
            for matrix, pairs in zip(matrices, pairs_of_expert, strict=True):
                if len(pairs) > 0:
                    y[pairs] = functional.linear(x.index_select(0, pairs // weights.per_token), matrix)
            return y.view(len(x), weights.per_token, -1)

        return Contender("torch dense loop", NAMES[dtype], dtype, run, dense.nbytes)

    return build


def mlx_experts(weights: Weights) -> Callable[[torch.Tensor, torch.dtype], Contender]:
    def build(weight: torch.Tensor, dtype: torch.dtype) -> Contender:
        import mlx.core as mx

        every, size = mlx_copies(weight)
        call = calls(weights, every)

        def run(x: torch.Tensor) -> None:
            routing, parts = call(len(x))
            operands = mx.array(x.numpy())[:, None, None], *parts
            indices = mx.array(routing.experts.numpy())
            mx.eval(mx.gather_qmm(*operands, rhs_indices=indices, group_size=GROUP_SIZE, bits=BITS))

        return Contender("mlx", NAMES[dtype], dtype, run, size)

    return build


def expert_contenders(weights: Weights) -> tuple[tuple[str, Callable, torch.dtype], ...]:
    return (
        (OURS, our_experts(weights, in_order=False), torch.float32),
        (OURS, our_experts(weights, in_order=True), torch.float32),
        (OURS, our_experts(weights, in_order=False), torch.bfloat16),
        (OURS, our_experts(weights, in_order=True), torch.bfloat16),
        ("torch dense", torch_experts(weights), torch.float32),
        ("torch dense", torch_experts(weights), torch.bfloat16),
        ("mlx", mlx_experts(weights), torch.float32),
    )


def build_all(weights: Weights, only: list[str] | None, missing: set[str]) -> Iterator[Contender]:
    weight = weights.random()
    for package, build, dtype in CONTENDERS if weights.experts == 1 else expert_contenders(weights):
        if only and package not in (OURS, *only):
            continue
        try:
            yield build(weight, dtype)
        except ImportError:
            missing.add(package)


# --- Measuring --------------------------------------------------------------------------------------------------------


def time_turn(contender: Contender, x: torch.Tensor) -> list[float]:
    """Seconds of some runs, after untimed ones, in which its own threads wake up and the last one's go to sleep."""

    def time_run() -> float:
        start = time.perf_counter()
        contender.run(x)
        return time.perf_counter() - start

    begin = time.perf_counter()
    while (seconds := time_run()) < LONG:
        if time.perf_counter() - begin > WARM_UP:
            return [time_run() for _ in range(3 if seconds < 0.02 else 1)]
    return [seconds]


def measure(turns: Sequence[tuple[Contender, torch.Tensor]], rounds: int) -> list[list[float]]:
    """Seconds of each one's products. They take turns, so that a slow moment of the machine meets all of them."""
    times: list[list[float]] = [[] for _ in turns]
    for _ in range(rounds):
        for (contender, x), measured in zip(turns, times, strict=True):
            if not measured or measured[0] < SLOW or contender.name.startswith(OURS):
                measured += [seconds / contender.products_per_run for seconds in time_turn(contender, x)]
    return times


@functools.cache
def ceilings() -> tuple[tuple[Contender, float], ...]:
    """What shows how fast this machine reads, and multiplies in each type; bytes, and multiply-adds as 2 operations.

    Runs are as short as those of few rows: long ones lose more to whatever else the machine does.
    """
    threads, size = torch.get_num_threads(), 512
    parts = torch.ones(cache_bytes() // 2).split(threads * 2**21)
    memory = itertools.cycle(parts)
    square = torch.randn(size, size)
    x = torch.randn(threads * size, size)
    half, half_x = square.to(torch.bfloat16), x.to(torch.bfloat16)
    small, small_x = (torch.randint(-127, 127, like.shape, dtype=torch.int8) for like in (square, x))
    operations = 2.0 * threads * size**3
    runs: tuple[tuple[str, Callable[[], object], float], ...] = (
        ("read", lambda: next(memory).max(), parts[0].nbytes),
        ("f32", lambda: x @ square, operations),
        ("bf16", lambda: half_x @ half, operations),
        ("int8", lambda: torch._int_mm(small_x, small), operations),
    )
    return tuple(
        (Contender(name, name, torch.float32, lambda _, run=run: run(), 0), amount) for name, run, amount in runs
    )


FIELDS = ("w", "rows", "contender", "activations", "milliseconds", "ours_is_faster", "ceiling")


def compare(contenders: Sequence[Contender], weights: Weights, rows: int, rounds: int) -> list[dict]:
    limits, amounts = zip(*ceilings(), strict=True)
    inputs = {dtype: torch.randn(rows, weights.K).to(dtype) for dtype in NAMES}
    part = part_read(weights, rows)  # before anything is timed, because it fills the cache of routings
    times = measure([(contender, inputs[contender.dtype]) for contender in (*contenders, *limits)], rounds)
    medians = [statistics.median(seconds) for seconds in times[: len(contenders)]]
    rates = {
        limit.name: amount / min(seconds)
        for limit, amount, seconds in zip(limits, amounts, times[len(contenders) :], strict=True)
    }
    print_rates(weights, rows, rates)
    own = {c.activations: seconds for c, seconds in zip(contenders, medians, strict=True) if c.name == OURS}
    operations = 2.0 * rows * weights.per_token * weights.N * weights.K
    table = []
    for contender, seconds in zip(contenders, medians, strict=True):
        multiplying = operations / rates.get(contender.activations, rates["f32"])
        ceiling = max(part * contender.weight_bytes / rates["read"], multiplying) / seconds
        reference = own.get(contender.activations, own["bf16"])
        values = (
            *(str(weights), rows, contender.name, contender.activations),
            *(seconds * 1e3, seconds / reference, ceiling),
        )
        table.append(dict(zip(FIELDS, values, strict=True)))
    return table


def compare_all(
    shapes: Iterable[Weights], row_counts: Iterable[int], rounds: int, only: list[str] | None, file: Path | None
) -> list[dict]:
    missing: set[str] = set()
    results = []
    for weights in shapes:
        contenders = list(build_all(weights, only, missing))
        for rows in row_counts:
            table = compare(contenders, weights, rows, rounds if rows < 512 else min(rounds, 3))
            slow = {row["contender"] + row["activations"] for row in table if row["milliseconds"] > SLOW * 1e3}
            contenders = [c for c in contenders if c.name.startswith(OURS) or c.name + c.activations not in slow]
            print_table(table)
            results += table
            if file:
                write_csv(file, table)
    if missing:
        print(f"\nnot installed and left out: {', '.join(sorted(missing))}")
    return results


def time_growth(cases: Sequence[tuple[Weights, int]], unit: str, amounts: Sequence[int], rounds: int) -> None:
    """Prints our times for matrices and numbers of rows, and how far those per unit of amount are apart."""
    matrices = {weights: weights.random() for weights, _ in cases}
    for dtype in (torch.float32, torch.bfloat16):
        contenders = {weights: ours(weight, dtype) for weights, weight in matrices.items()}
        turns = [(contenders[weights], torch.randn(rows, weights.K).to(dtype)) for weights, rows in cases]
        medians = [statistics.median(seconds) for seconds in measure(turns, rounds)]
        each = [seconds / amount for seconds, amount in zip(medians, amounts, strict=True)]
        print(f"\n{NAMES[dtype]}")
        for (weights, rows), seconds, one in zip(cases, medians, each, strict=True):
            print(f"  w {weights!s:16s}{rows:6d} rows{seconds * 1e3:10.3f} ms{one * 1e9:12.5f} ns per {unit}")
        print(f"  the largest time per {unit} is {max(each) / min(each):.2f} times the smallest")


def linearity(one: Weights, row_counts: Sequence[int], shapes: Sequence[Weights], rounds: int) -> None:
    """One matrix with several numbers of rows, and matrices of several sizes with one row."""
    time_growth([(one, rows) for rows in row_counts], "row", row_counts, rounds)
    time_growth([(weights, 1) for weights in shapes], "weight", [weights.N * weights.K for weights in shapes], rounds)


def formats(weights: Weights, row_counts: Sequence[int], rounds: int) -> None:
    """Prints our times in all formats, and how many times those of the first they are, beside the weights' bytes."""
    weight = weights.random()
    for dtype in (torch.float32, torch.bfloat16):
        contenders = [ours(weight, dtype, **options) for options in FORMATS]
        inputs = [torch.randn(rows, weights.K).to(dtype) for rows in row_counts]
        print(f"\n{NAMES[dtype]:34s} bytes" + "".join(f"{rows:13d} rows" for rows in row_counts))
        columns = [measure([(contender, x) for contender in contenders], rounds) for x in inputs]
        medians = [[statistics.median(seconds) for seconds in column] for column in columns]
        for i, (options, contender) in enumerate(zip(FORMATS, contenders, strict=True)):
            cells = "".join(f"{column[i] * 1e3:9.3f} ms{column[i] / column[0]:5.2f} x" for column in medians)
            print(f"  {described(options):32s}{contender.weight_bytes / contenders[0].weight_bytes:4.2f} x{cells}")


def described(options: dict[str, int | str]) -> str:
    return ", ".join(f"{key} {value}" for key, value in options.items())


def layouts(shapes: Sequence[Weights], row_counts: Sequence[int], rounds: int) -> None:
    """Prints our times in Marlin's formats, and how many times those in MLX's formats of equal bits they are."""
    print("\n| format | beside | w | x |" + "".join(f" {rows} rows |" for rows in row_counts))
    print("|---|---|---|---|" + "---|" * len(row_counts))
    worst = 0.0
    for weights, (options, other) in itertools.product(shapes, LAYOUTS):
        weight = weights.random()
        for dtype in NAMES:
            pair = [ours(weight, dtype, **options), ours(weight, dtype, **other)]
            cells = []
            for rows in row_counts:
                x = torch.randn(rows, weights.K).to(dtype)
                columns, by_rows = map(statistics.median, measure([(contender, x) for contender in pair], rounds))
                worst = max(worst, columns / by_rows)
                cells.append(f" {columns * 1e3:.2f} ms, {columns / by_rows:.2f} |")
            print(f"| {described(options)} | {described(other)} | {weights} | {NAMES[dtype]} |" + "".join(cells))
    print(f"\nthe largest ratio is {worst:.2f}")


# --- Output -----------------------------------------------------------------------------------------------------------


def print_machine() -> None:
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{BITS}-bit affine, group_size {GROUP_SIZE}; weights beyond a cache of {cache_bytes() // 2 >> 20} MiB")


def print_rates(weights: Weights, rows: int, rates: dict[str, float]) -> None:
    dense = ", ".join(f"{rate / 1e9:.0f} in {name}" for name, rate in rates.items() if name != "read")
    print(f"\nw {weights}, {rows} rows: {rates['read'] / 1e9:.1f} GB/s read; dense GFLOP/s {dense}")


def print_table(table: list[dict]) -> None:
    for row in table:
        name = f"{row['contender']}, {row['activations']}"
        print(
            f"  {name:38s}{row['milliseconds']:10.3f} ms{row['ours_is_faster']:8.2f} x"
            f"{row['ceiling'] * 100:7.0f} % of the ceiling"
        )
    for activations, (ratio, name) in best_peers(table).items():
        print(f"  ours, {activations}: {ratio:.2f} x the speed of the best peer ({name})")


def tables(results: list[dict]) -> Iterator[tuple[str, int, list[dict]]]:
    """What was measured together, with its weights and rows."""
    for w, rows in dict.fromkeys((row["w"], row["rows"]) for row in results):
        yield w, rows, [row for row in results if (row["w"], row["rows"]) == (w, rows)]


def best_peers(table: list[dict]) -> dict[str, tuple[float, str]]:
    """For each type of activations, how many times faster we are than the fastest other with the same, and its name."""
    peers: dict[str, tuple[float, str]] = {}
    for row in table:
        if not row["contender"].startswith(OURS):
            candidate = row["ours_is_faster"], row["contender"]
            peers[row["activations"]] = min(candidate, peers.get(row["activations"], candidate))
    return {name: peers[name] for name in ACTIVATIONS if name in peers}


def print_markdown(results: list[dict]) -> None:
    """Our time, how many times faster than the best peer that is, and our fraction of the ceiling."""
    names = ACTIVATIONS
    print("\n| w | rows | " + " | ".join(names) + " |\n|---|---|" + "---|" * len(names))
    for w, rows, table in tables(results):
        own = {row["activations"]: row for row in table if row["contender"] == OURS}
        peers = best_peers(table)
        cells = []
        for name in names:
            parts = [f"{own[name]['milliseconds']:.2f} ms"] if name in own else []
            parts += [f"**{peers[name][0]:.2f}** x {peers[name][1]}"] if name in peers else []
            parts += [f"{own[name]['ceiling'] * 100:.0f} %"] if name in own else []
            cells.append(", ".join(parts))
        print(f"| {w} | {rows} | " + " | ".join(cells) + " |")


def read_csv(path: Path) -> list[dict]:
    numbers = {"rows": int, "milliseconds": float, "ours_is_faster": float, "ceiling": float}
    with path.open(newline="") as file:
        return [{key: numbers.get(key, str)(value) for key, value in row.items()} for row in csv.DictReader(file)]


def write_csv(path: Path, table: list[dict]) -> None:
    """Adds to what the file has."""
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        if new:
            writer.writeheader()
        writer.writerows({**row, **{key: f"{row[key]:.4f}" for key in FIELDS[4:]}} for row in table)


def plot(results: list[dict], path: Path) -> None:
    """How many times faster than the best peer with the same activations, over the rows of x, one panel per matrix."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.lines import Line2D

    points = [
        (w, activations, rows, ratio, peer)
        for w, rows, table in tables(results)
        for activations, (ratio, peer) in best_peers(table).items()
    ]
    names = list(dict.fromkeys(w for w, *_ in points))
    colors = dict(zip(ACTIVATIONS, ("tab:blue", "tab:orange", "tab:green", "tab:purple"), strict=True))
    markers = dict(zip(dict.fromkeys(peer for *_, peer in points), itertools.cycle("osD^vP"), strict=False))
    lowest = 0.9 * min([0.9, *(ratio for *_, ratio, _ in points)])
    across = min(2, len(names))
    down = -(-len(names) // across)
    figure, grid = pyplot.subplots(
        down, across, figsize=(4.4 * across + 2, 2.9 * down), sharey=True, squeeze=False, layout="constrained"
    )
    for panel in grid.flat[len(names) :]:
        panel.set_axis_off()
    for panel, name in zip(grid.flat, names, strict=False):
        for activations, color in colors.items():
            line = sorted(point[2:] for point in points if point[:2] == (name, activations))
            panel.plot([rows for rows, *_ in line], [ratio for _, ratio, _ in line], color=color)
            for rows, ratio, peer in line:
                panel.plot(rows, ratio, color=color, marker=markers[peer], markersize=5)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log", base=2)
        counts = sorted({rows for w, _, rows, *_ in points if w == name})
        panel.set_xticks([rows for rows in counts if rows & (rows - 1) == 0])
        panel.xaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_major_formatter("{x:g}")
        panel.axhline(1, color="black", linewidth=0.8)
        panel.axhspan(lowest, 1, color="tab:red", alpha=0.1)
        panel.set_ylim(lowest, 1.15 * max(ratio for *_, ratio, _ in points))
        panel.grid(alpha=0.3)
        panel.set_title(f"w {name}", fontsize=10)
        panel.set_xlabel("rows of x")
    figure.supylabel("times the speed of the fastest peer (red: slower)", fontsize=10)
    keys = [Line2D([], [], color=color, label=activations) for activations, color in colors.items()]
    keys += [Line2D([], [], color="gray", linestyle="", marker=mark, label=peer) for peer, mark in markers.items()]
    figure.legend(handles=keys, loc="outside right upper", title="activations, peer", fontsize=9)
    figure.savefig(path, dpi=110)


# --- Command line -----------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    part = parser.add_mutually_exclusive_group()
    part.add_argument("--experts", action="store_true", help="gather_qmm instead")
    part.add_argument("--linearity", action="store_true", help="our own times per row and per weight instead")
    part.add_argument("--formats", action="store_true", help="our own times in other formats than 4 bits instead")
    part.add_argument("--layouts", action="store_true", help="our own times in Marlin's formats beside MLX's instead")
    parser.add_argument("--quick", action="store_true", help="few shapes, few rounds: a check, not a measurement")
    parser.add_argument(
        "--shapes", type=Weights.parse, nargs="+", metavar="NxK", help="other shapes of w; NxKxEXPERTSxPER_TOKEN"
    )
    parser.add_argument("--rows", type=int, nargs="+", help="other numbers of rows of x")
    peers = sorted({package for package, _, _ in CONTENDERS} - {OURS})
    parser.add_argument("--only", nargs="+", choices=peers, help="leave the other peers out")
    parser.add_argument("--threads", type=int, help="of every contender but mlx, which has its own")
    parser.add_argument("--csv", type=Path, help="add the results to this file")
    parser.add_argument("--from-csv", type=Path, help="measure nothing; print the results in this file")
    parser.add_argument("--plot", type=Path, help="draw the results to this file")
    arguments = parser.parse_args(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    rounds = 3 if arguments.quick else 9

    if arguments.linearity:
        print_machine()
        shapes = arguments.shapes or (GROWING_MATRICES[:2] if arguments.quick else GROWING_MATRICES)
        linearity((arguments.shapes or MATRICES)[0], arguments.rows or GROWING_ROWS, shapes, rounds)
        return
    if arguments.formats:
        print_machine()
        formats((arguments.shapes or MATRICES)[0], arguments.rows or (1, 8, 512), rounds)
        return
    if arguments.layouts:
        print_machine()
        shapes = arguments.shapes or (MATRICES[:1] if arguments.quick else MATRICES[:2])
        layouts(shapes, arguments.rows or ((1, 8) if arguments.quick else (1, 2, 4, 8, 16, 32, 128, 512)), rounds)
        return
    if arguments.from_csv:
        results = read_csv(arguments.from_csv)
        for w, rows, table in tables(results):
            print(f"\nw {w}, {rows} rows")
            print_table(table)
    else:
        print_machine()
        every_shape, every_count = (EXPERTS, TOKENS) if arguments.experts else (MATRICES, ROWS)
        shapes = arguments.shapes or (every_shape[:1] if arguments.quick else every_shape)
        row_counts = arguments.rows or ((1, 8, 32) if arguments.quick else every_count)
        results = compare_all(shapes, row_counts, rounds, arguments.only, arguments.csv)
    print_markdown(results)
    if arguments.plot:
        plot(results, arguments.plot)


if __name__ == "__main__":
    main()
