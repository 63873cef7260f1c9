"""benchmarks/cpu.py: its contenders compute the same, its clock is read right, and every part of it runs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import oracle
import quantization_mlx as qm
from oracle import name_of
from repository import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import cpu as benchmark
from cpu import Contender, Weights

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
ALL = Weights(48, 128, experts=8, per_token=3)


@pytest.fixture(autouse=True)
def small_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few copies of small matrices."""
    monkeypatch.setattr(benchmark, "cache_bytes", lambda: 2**16)
    benchmark.ceilings.cache_clear()


def exact_weights(*shape: int) -> Tensor:
    """Quantizing them loses nothing, so that dense and quantized products have the same exact result."""
    weights = torch.randint(0, 16, shape, generator=oracle.generator(0)).float()
    weights[..., :: benchmark.GROUP_SIZE], weights[..., 1 :: benchmark.GROUP_SIZE] = 0, 15
    packed = qm.quantize(weights, benchmark.GROUP_SIZE, benchmark.BITS)
    assert torch.equal(qm.dequantize(*packed, benchmark.GROUP_SIZE, benchmark.BITS), weights)
    return weights


@DTYPES
def test_products_are_the_same(dtype: torch.dtype) -> None:
    weight, x = exact_weights(48, 128), oracle.random_x(5, 128, dtype=dtype)
    for build in (benchmark.ours, benchmark.torch_dense):
        contender = build(weight, dtype)
        for _ in range(3):  # copies
            oracle.assert_product(contender.run(x), x, weight.mT.double(), dtype, contender.name)


@DTYPES
@pytest.mark.parametrize("rows", [1, 2, 7])
def test_products_with_experts_are_the_same(rows: int, dtype: torch.dtype) -> None:
    weight, x = exact_weights(ALL.experts, ALL.N, ALL.K), oracle.random_x(rows, ALL.K, dtype=dtype)
    routing = benchmark.routings(ALL, rows)[0]
    pairs = [(row, expert) for row, experts in enumerate(routing.experts.tolist()) for expert in experts]
    in_order = sorted(pairs, key=lambda pair: pair[1])
    for build, order in (
        (benchmark.our_experts(ALL, in_order=False), pairs),
        (benchmark.our_experts(ALL, in_order=True), in_order),
        (benchmark.torch_experts(ALL), pairs),
    ):
        contender = build(weight, dtype)
        reference = torch.stack([x[row].double() @ weight[expert].double().mT for row, expert in order])
        bound = max(oracle.error_bound(x, weight[expert].double().mT, dtype) for _, expert in order)
        oracle.assert_within(contender.run(x).reshape(-1, ALL.N), reference, bound, contender.name)


@pytest.mark.parametrize("rows", [1, 2, 3, 40])
def test_routings(rows: int) -> None:
    """No row has an expert twice, and where calls can do without the experts of the last one, they do."""
    routings = benchmark.routings(ALL, rows)
    for routing in routings:
        assert routing.experts.shape == (rows, ALL.per_token)
        assert all(len(set(experts)) == ALL.per_token for experts in routing.experts.tolist())
        assert set(routing.experts.flatten().tolist()) <= set(range(ALL.experts))
    used = [set(routing.experts.flatten().tolist()) for routing in routings]
    if 2 * rows * ALL.per_token <= ALL.experts:
        assert len(used) > 1 and not set.intersection(*used)
    expected = sum(map(len, used)) / len(used) / ALL.experts
    assert benchmark.part_read(ALL, rows) == pytest.approx(expected)


def test_times_are_those_of_single_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that only the contenders move on: by more in the milliseconds after another one has run."""
    now, running, since = 0.0, "", 0.0
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: now)

    def contender(name: str, seconds: float, products: int = 1) -> tuple[Contender, Tensor]:
        def run(x: Tensor) -> None:
            nonlocal now, running, since
            if running != name:
                running, since = name, now
            now += seconds * (1 if now - since >= benchmark.WARM_UP else 3)

        return Contender(name, "f32", torch.float32, run, 0, products), torch.empty(0)

    turns = [contender("short", 1e-4), contender("ten", 1e-3, 10), contender("long", 0.2), contender("slow", 5.0)]
    short, ten, long, slow = benchmark.measure(turns, rounds=3)
    assert short == pytest.approx([1e-4] * 9)
    assert ten == pytest.approx([1e-4] * 9)
    assert long == pytest.approx([0.6] * 3)  # without warming up
    assert slow == pytest.approx([15])


PARTS = {
    "products": ("--shapes", "64x128", "48x256", "--rows", "1", "5"),
    "experts": ("--experts", "--shapes", "48x128x8x3", "16x128x4x2", "--rows", "1", "5"),
}


@pytest.mark.parametrize("part", PARTS)
def test_tables(part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "results.csv"
    benchmark.main(["--quick", *PARTS[part], "--csv", str(file)])
    printed = capsys.readouterr().out
    rows = benchmark.read_csv(file)
    assert len({(row["w"], row["rows"]) for row in rows}) == 4
    assert {row["contender"] for row in rows} > {benchmark.OURS}
    assert all(row["milliseconds"] > 0 and row["ceiling"] > 0 for row in rows)
    assert all(row["ours_is_faster"] == 1 for row in rows if row["contender"] == benchmark.OURS)
    # The same tables from the file, where only digits are lost.
    benchmark.main(["--from-csv", str(file)])
    again = capsys.readouterr().out
    for text in (printed, again):
        assert sum(line.startswith("| ") for line in text.splitlines()) == 5
        assert text.count("x the speed of the best peer") >= 8


def test_a_peer_without_every_type(capsys: pytest.CaptureFixture[str]) -> None:
    benchmark.main(["--quick", "--shapes", "64x128", "--rows", "1", "--only", "mlx"])
    assert "x mlx" in capsys.readouterr().out


def test_formats(capsys: pytest.CaptureFixture[str]) -> None:
    benchmark.main(["--quick", "--formats", "--shapes", "64x128", "--rows", "1", "8"])
    printed = capsys.readouterr().out
    for options in benchmark.FORMATS:
        name = ", ".join(f"{key} {value}" for key, value in options.items())
        assert printed.count(f"  {name} ") == 2
    assert printed.count(" ms 1.00 x") >= 4  # the first format beside itself


def test_linearity(capsys: pytest.CaptureFixture[str]) -> None:
    benchmark.main(["--quick", "--linearity", "--shapes", "64x128", "32x256", "--rows", "8", "16"])
    printed = capsys.readouterr().out
    assert printed.count("times the smallest") == 4
    assert printed.count("ns per row") == printed.count("ns per weight") == 4
