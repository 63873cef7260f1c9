"""In the place of the Hub kernel `mlx-quantization-metal-kernels`: functions of both versions, and the benchmark."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import oracle
import quantization_mlx as qm
from cases import DTYPES, FLOAT_FORMATS
from documented import HUB_1, HUB_2, arguments_of
from kernel_builder import ROOT
from oracle import Format, Quantized, name_of
from process import NO_NETWORK, printed

PUBLISHED = "kernels-community/mlx-quantization-metal-kernels"
SIGNATURES = {1: HUB_1, 2: HUB_2}
VERSION = pytest.mark.parametrize("version", SIGNATURES)
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="the local build stands for kernel-builder's Linux build")
pytestmark = pytest.mark.xdist_group("packaging")  # one process builds the variant for all of them

# --- Calls ------------------------------------------------------------------------------------------------------------

AFFINE = Format("affine", 128, 4)  # with version 1's default of group_size
MXFP4, MXFP8, NVFP4 = FLOAT_FORMATS
M, N, K, E = 3, 64, 256, 4


@dataclass(frozen=True)
class Call:
    """Arguments by name, and what holds of the result."""

    function: str
    arguments: dict[str, Any]
    check: Callable[[Any], None]

    def positional(self, version: int) -> list[Any]:
        """As many of all parameters as it takes to reach the last that is given."""
        published = arguments_of(SIGNATURES[version][self.function])
        last = max(list(published).index(name) for name in self.arguments)
        return [self.arguments.get(name, default) for name, default in published.items()][: last + 1]


def named(weights: Quantized) -> dict[str, Tensor]:
    return {"w": weights.w, "scales": weights.scales} | ({} if weights.biases is None else {"biases": weights.biases})


def product(x: Tensor, matrix: Tensor) -> Callable[[Tensor], None]:
    return lambda y: oracle.assert_product(y, x, matrix, x.dtype)


def stacked(x: Tensor, matrices: Tensor) -> Callable[[Tensor], None]:
    """Of one matrix after the other."""

    def check(y: Tensor) -> None:
        assert len(y) == len(x) == len(matrices)
        for ours, rows, matrix in zip(y, x, matrices, strict=True):
            oracle.assert_product(ours, rows, matrix, x.dtype)

    return check


def quantized_by_mlx(tensor: Tensor, format: Format, global_scale: Tensor | None = None) -> Quantized:
    words, scales, *biases = oracle.mlx_quantize(tensor, format, global_scale)
    return Quantized(format, words, scales, *biases or [None], global_scale)


def same(*expected: Tensor) -> Callable[[tuple[Tensor, ...]], None]:
    def check(results: tuple[Tensor, ...]) -> None:
        assert len(results) == len(expected)
        for ours, theirs in zip(results, expected, strict=True):
            oracle.assert_identical(ours, theirs)

    return check


def version_1_calls() -> Iterator[Call]:
    x, x_n = oracle.random_x(2, M, K), oracle.random_x(2, M, N)
    weights = oracle.random_quantized(Format("affine", 64, 4), N, K)
    wide = oracle.random_quantized(AFFINE, N, K)
    sizes = {"group_size": 64, "bits": 4}
    yield Call("affine_qmm_t", {"x": x, **named(wide)}, product(x, wide.dense.T))
    for suffix in ("", "_nax"):
        yield Call(f"affine_qmm_t{suffix}", {"x": x, **named(weights), **sizes}, product(x, weights.dense.T))
        arguments = {"x": x_n, **named(weights), "output_features": K, **sizes}
        yield Call(f"affine_qmm_n{suffix}", arguments, product(x_n, weights.dense))
    yield Call("affine_qmv", {"x": x[0, 0], **named(wide), "output_features": N}, product(x[0, 0], wide.dense.T))
    mxfp4 = oracle.random_quantized(MXFP4, N, K)
    yield Call("mxfp4_qmv", {"x": x[0, 0], **named(mxfp4), "output_features": N}, product(x[0, 0], mxfp4.dense.T))
    yield Call("mxfp4_qmm_n", {"x": x_n, **named(mxfp4), "output_features": K}, product(x_n, mxfp4.dense))
    experts = oracle.random_quantized(AFFINE, E, N, K)
    indices, rows = torch.tensor([3, 0, 0, 2]), oracle.random_x(4, K)
    arguments = {"x": rows, **named(experts), "indices": indices, "output_features": N}
    yield Call("affine_gather_qmm_rhs_nax", arguments, stacked(rows, experts.matrix(True)[indices]))
    forward = oracle.random_quantized(AFFINE, E, K, 128)
    arguments = {"x": rows, **named(forward), "indices": indices, "output_features": 128, "transpose": False}
    yield Call("affine_gather_qmm_rhs_nax", arguments, stacked(rows, forward.dense[indices]))


def version_2_calls() -> Iterator[Call]:
    yield from version_1_calls()
    matrix, x = oracle.random_x(N, K, seed=3), oracle.random_x(2, M, K)
    scale = matrix.abs().max()
    for format, more in ((Format("affine", 32, 8), {}), (MXFP8, {}), (NVFP4, {"global_scale": scale})):
        options = format.options | more
        yield Call("quantize", {"w": matrix, **options}, same(*oracle.mlx_quantize(matrix, format, *more.values())))
        weights = quantized_by_mlx(matrix, format, *more.values())
        for dtype in DTYPES:
            yield Call("dequantize", {**named(weights), **options, "dtype": dtype}, rounded(weights.dense, dtype))
    for format in (Format("affine", 64, 4), *FLOAT_FORMATS):
        for transpose in (True, False):
            weights = oracle.random_quantized(format, *((N, K) if transpose else (K, N)))
            arguments = {"x": x, **named(weights), "transpose": transpose, **format.options}
            yield Call("quantized_matmul", arguments, product(x, weights.matrix(transpose)))
    batched = oracle.random_quantized(MXFP4, 2, N, K)
    yield Call("quantized_matmul", {"x": x, **named(batched), "mode": "mxfp4"}, stacked(x, batched.matrix(True)))

    lhs, rhs = torch.tensor([1, 0, 1]), torch.tensor([0, 3, 3])
    experts = oracle.random_quantized(NVFP4, E, N, K)
    of_experts = Quantized(NVFP4, experts.w, experts.scales, None, torch.tensor([900.0, 2688.0, 5000.0, 100.0]))
    indices = {"lhs_indices": lhs, "rhs_indices": rhs}
    arguments = {"x": x, **named(experts), **indices, "mode": "nvfp4", "global_scale": of_experts.global_scale}
    yield Call("gather_qmm", arguments, stacked(x[lhs], of_experts.matrix(True)[rhs]))
    sorted_rows = oracle.random_x(3, 1, K)
    arguments = {"x": sorted_rows, **named(experts), "rhs_indices": rhs, "mode": "nvfp4", "sorted_indices": True}
    yield Call("gather_qmm", arguments, stacked(sorted_rows, experts.matrix(True)[rhs]))

    for format in FLOAT_FORMATS:
        values, weights = quantized_by_mlx(x, format).dense, quantized_by_mlx(matrix, format)
        check = product(values.float(), weights.dense.T)
        yield Call("qqmm", {"x": x, **named(weights), "mode": format.mode}, check)
        yield Call("qqmm", {"x": x, "w": matrix, "mode": format.mode}, check)
    scales = {"global_scale_x": x.abs().max(), "global_scale_w": scale}
    weights = quantized_by_mlx(matrix, NVFP4, scale)
    values = quantized_by_mlx(x, NVFP4, scales["global_scale_x"]).dense
    check = product(values.float(), weights.dense.T)
    yield Call("qqmm", {"x": x, **named(weights), **scales}, check)
    stack = torch.stack([matrix, 2 * matrix, -matrix, matrix.flip(0)])
    weights = quantized_by_mlx(stack, MXFP8)
    values = quantized_by_mlx(x, MXFP8).dense.float()
    check = stacked(values[lhs], weights.matrix(True)[rhs])
    yield Call("gather_qqmm", {"x": x, **named(weights), **indices, "mode": "mxfp8"}, check)
    scales["global_scale_w"] = stack.abs().max()
    weights = quantized_by_mlx(stack, NVFP4, scales["global_scale_w"])
    values = quantized_by_mlx(sorted_rows, NVFP4, scales["global_scale_x"]).dense.float()
    arguments = {"x": sorted_rows, "w": stack, "rhs_indices": rhs, **scales, "sorted_indices": True}
    yield Call("gather_qqmm", arguments, stacked(values, weights.matrix(True)[rhs]))


def rounded(values: Tensor, dtype: torch.dtype) -> Callable[[Tensor], None]:
    def check(ours: Tensor) -> None:
        assert ours.dtype == dtype
        # A unit in the last place, and the float32 arithmetic of code * scale + bias, whose terms may cancel.
        bound = torch.finfo(dtype).eps * values.abs() + 2.0**-22 * values.abs().max()
        oracle.assert_within(ours, values, bound, name_of(dtype))

    return check


CALLS = {1: version_1_calls, 2: version_2_calls}
# Loads a version without a network, and calls it both ways.
LOAD_AND_CALL = f"""{NO_NETWORK}
import sys, torch
from kernels import get_kernel

kernel = get_kernel({PUBLISHED!r}, version=int(sys.argv[1]))
results = []
for function, arguments, positional in torch.load(sys.argv[2]):
    function = getattr(kernel, function)
    results.append((function(**arguments), function(*positional)))
torch.save((kernel.__file__, results), sys.argv[3])
"""


@LINUX
@VERSION
def test_calls_of_a_version(version: int, repository: Path, variant: Path, tmp_path: Path) -> None:
    calls = list(CALLS[version]())
    assert {call.function for call in calls} == set(SIGNATURES[version])
    given, returned = tmp_path / "calls.pt", tmp_path / "results.pt"
    torch.save([(call.function, call.arguments, call.positional(version)) for call in calls], given)
    run(LOAD_AND_CALL, str(version), str(given), str(returned), folder=tmp_path, repository=repository)
    file, results = torch.load(returned)
    assert Path(file) == variant / "__init__.py"
    for call, both in zip(calls, results, strict=True):
        for result in both:
            call.check(result)


def run(code: str, *arguments: str, folder: Path, repository: Path) -> None:
    """In a fresh interpreter, in a folder from which nothing of the tree can be imported."""
    environment = os.environ | {"LOCAL_KERNELS": f"{PUBLISHED}={repository}"}
    printed("-c", code, *arguments, cwd=folder, env=environment)


# --- Transformers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_metal_linear_asks_for_one_of_these_versions(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """And calls what it gets as that version documents it; on the oldest and the newest Transformers."""
    from transformers.integrations import hub_kernels, metal_quantization

    asked = []

    def get_kernel(name: str, **options: Any) -> Any:
        asked.append((name, options))
        return qm

    monkeypatch.setattr(metal_quantization, "_metal_kernel", None)
    monkeypatch.setattr(hub_kernels, "get_kernel", get_kernel)
    layer = metal_quantization.MetalLinear(K, N, bits=bits, group_size=64)
    parts = metal_quantization._affine_quantize_tensor(oracle.random_x(N, K, seed=5), 64, bits)
    layer.weight.data, layer.scales.data, layer.qbiases.data = parts
    x = oracle.random_x(2, M, K)
    matrix = oracle.dequantize(*parts, Format("affine", 64, bits)).T
    oracle.assert_product(layer(x).detach(), x, matrix, torch.float32)
    [(name, options)] = asked
    assert name == PUBLISHED and set(options) == {"version"} and options["version"] in SIGNATURES


# --- kernels benchmark ------------------------------------------------------------------------------------------------


@pytest.fixture
def with_benchmark(repository: Path, tmp_path: Path) -> Path:
    """The variant with its benchmark beside it, as on the Hub."""
    folder = tmp_path / "repository"
    shutil.copytree(repository / "build", folder / "build")
    (folder / "benchmarks").mkdir()
    shutil.copy(ROOT / "benchmarks" / "benchmark.py", folder / "benchmarks")
    return folder


@LINUX
def test_kernels_benchmark(with_benchmark: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command itself, on the small workloads; it ends with an error where a result is not the reference's."""
    from kernels.cli import benchmark

    discover = benchmark.discover_benchmark_classes
    workloads = {}

    def small_ones(*arguments: Any) -> list[type]:
        classes = discover(*arguments)
        for cls in classes:
            names = [name for name in dir(cls) if name.startswith("benchmark_")]
            workloads[cls.__name__] = {name.removeprefix("benchmark_") for name in names}
            for name in names:
                assert hasattr(cls, name.replace("benchmark_", "setup_")), name
                assert hasattr(cls, name.replace("benchmark_", "verify_")), name
                if "small" not in name:
                    delattr(cls, name)
        return classes

    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)  # the variant is the CPU's
    monkeypatch.setattr(benchmark, "discover_benchmark_classes", small_ones)
    output = tmp_path / "results.json"
    benchmark.run_benchmark(str(with_benchmark), None, None, iterations=2, warmup=1, output=str(output))
    kinds = ("row", "prompt")
    expected = {f"{size}_{kind}" for size in ("small", "medium", "large") for kind in kinds}
    classes = ("Affine4Bit", "Affine8Bit", "Experts4Bit", "Mxfp4", "Nvfp4Activations")
    assert workloads == dict.fromkeys(classes, expected)
    results = json.loads(output.read_text())["results"]
    assert {each["workload"] for each in results} == {f"{cls}.small_{kind}" for cls in classes for kind in kinds}
    assert all(each["verified"] and each["timingResults"]["iterations"] == 2 for each in results)


@LINUX
def test_kernels_benchmark_notices_wrong_results(with_benchmark: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kernels.cli import benchmark

    script = with_benchmark / "benchmarks" / "benchmark.py"
    right, wrong = "quantized_matmul(self.x, ", "quantized_matmul(1.1 * self.x, "
    assert right in script.read_text()
    script.write_text(script.read_text().replace(right, wrong))
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        benchmark.run_benchmark(str(with_benchmark), None, None, iterations=1, warmup=0)
    assert ended.value.code == 1
