"""The Objective-C++ host of the ops on the software Metal device."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import oracle
import quantization_mlx as q
import software_gpu
from process import python
from repository import ROOT
from softmetal import mps

MODES = {"affine": (64, 4), "mxfp4": (32, 4), "mxfp8": (32, 8), "nvfp4": (16, 4)}


@pytest.fixture(autouse=True)
def software_device(monkeypatch) -> Iterator[None]:
    software_gpu.install()
    mps.clear()
    monkeypatch.setenv("CI", "true")  # a kernel that fails its self-check is an error
    for name in ("QUANTIZATION_MLX_GPU", "QUANTIZATION_MLX_DEBUG"):
        monkeypatch.delenv(name, raising=False)
    with mps.gpu("applegpu_g17s", 2602):
        yield
    assert not mps.errors()


def weights(n: int, k: int, mode: str = "affine", dtype: torch.dtype = torch.float16) -> tuple[Tensor, ...]:
    """w, scales and, in affine mode, biases, on the host."""
    return q.quantize(oracle.random_x(n, k).to(dtype), *MODES[mode], mode)


def product(x: Tensor, packed: tuple[Tensor, ...], mode: str = "affine", transpose: bool = True) -> Tensor:
    w, scales, biases = (*packed, None)[:3]
    return q.quantized_matmul(x, w, scales, biases, transpose, *MODES[mode], mode)


def on_mps(packed: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(tensor.to("mps") for tensor in packed)


def assert_close(result: Tensor, expected: Tensor) -> None:
    assert result.device.type == "mps"
    tolerance = 1e-5 if expected.dtype == torch.float32 else 1e-2
    torch.testing.assert_close(result.cpu(), expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


def in_new_process(code: str, metallib: bool = False, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs code after install(), with `q`, `mps` and this file's helpers."""
    program = f"from test_metal_host import *\nsoftware_gpu.install({metallib})\n" + textwrap.dedent(code)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "CI": "", **environment}
    return python("-c", program, env=environment, timeout=300)


def printed(code: str, metallib: bool = False, **environment: str) -> Any:
    """The JSON that it prints, in a process that ends well."""
    done = in_new_process(code, metallib, **environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# --- Products through the whole path ------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rows", [1, 5, 33])
def test_product(mode, rows):
    packed = weights(72, 128, mode)
    x = oracle.random_x(rows, 128).to(torch.float16)
    assert_close(product(x.to("mps"), on_mps(packed), mode), product(x, packed, mode))


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("rows", [3, 40])
def test_any_order_of_threads(rows, seed):
    packed = weights(72, 2048)
    x = oracle.random_x(rows, 2048).to(torch.float16)
    with mps.gpu("applegpu_g14s"):
        in_order = product(x.to("mps"), on_mps(packed))
        with mps.shuffled(seed):
            assert torch.equal(product(x.to("mps"), on_mps(packed)).cpu(), in_order.cpu())


def test_attention_to_more_parts_of_keys_than_lanes():
    """160 parts, of which a simdgroup of the kernel that puts them together has 40."""
    query, keys, values = (oracle.random_x(1, 1, length, 64, seed=length).half() for length in (1, 10240, 10241))
    values = values[:, :, 1:]
    with mps.gpu("applegpu_g14d"):
        operands = [each.to("mps") for each in (query, keys, values)]
        y = q.fast.scaled_dot_product_attention(*operands, scale=1.0)
        *_, combine = mps.launched()
    assert combine.kernel == "attention_combine_float16"
    assert_close(y, F.scaled_dot_product_attention(query, keys, values, scale=1.0))


def expected_launches(plan: str) -> list[str]:
    return [launch["kernel"] for launch in json.loads(plan)["launches"]]


@pytest.mark.parametrize("gpu", ["applegpu_g14s", "applegpu_g17s"])
@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("transpose", [True, False])
def test_the_kernels_that_the_plan_names_are_launched(gpu, rows, transpose):
    packed = on_mps(weights(128, 128))
    x = oracle.random_x(rows, 128).to(torch.float16).to("mps")
    with mps.gpu(gpu):
        product(x, packed, transpose=transpose)  # with the self-check
        mps.clear()
        product(x, packed, transpose=transpose)
        plan = torch.ops.quantization_mlx.explain_quantized_matmul(x, *packed, transpose, 64, 4)
    assert json.loads(plan)["gpu"] == gpu
    assert [launch.kernel for launch in mps.launched()] == expected_launches(plan)
    constants = ["aligned_outputs", "aligned_weights", "aligned_x", "aligned_k", "has_global_scale"]
    for launch, planned in zip(mps.launched(), json.loads(plan)["launches"], strict=True):
        assert [constants[index] for index in launch.constants] == planned["constants"]
        assert list(launch.threadgroups) == planned["threadgroups"]
        assert launch.threads == (planned["threads"], 1, 1)


def test_nothing_but_commands_is_done():
    """No copy, no synchronisation, no op of torch's beside the allocation of the result."""
    packed = on_mps(weights(72, 128))
    x = oracle.random_x(2, 128).to(torch.float16).to("mps")
    product(x, packed)
    mps.clear()
    product(x, packed)
    log = mps.logs()
    assert (len(log["launches"]), log["counts"]["checked plans"]) == (1, 1)
    assert (log["transfers"], log["synchronizations"], log["fallbacks"]) == (0, 0, [])


def test_storage_offsets_are_bytes_from_the_beginning_of_the_buffer():
    packed = weights(72, 128)
    x = oracle.random_x(9, 128).to(torch.float16)
    w, scales, biases = on_mps(packed)
    padded = [torch.cat([tensor[:3], tensor])[3:] for tensor in (w, scales, biases)]
    assert all(tensor.storage_offset() > 0 for tensor in padded)
    result = product(x.to("mps")[4:7], tuple(padded))
    assert_close(result, product(x[4:7], packed))


def test_unaligned_view_of_x():
    packed = weights(72, 128)
    x = oracle.random_x(1, 129).to(torch.float16)
    assert_close(product(x.to("mps")[:, 1:], on_mps(packed)), product(x[:, 1:], packed))


def test_gather_quantize_and_dequantize():
    dense = oracle.random_x(3, 64, 128).to(torch.float16)
    packed = q.quantize(dense, 64, 4)
    for result, expected in zip(q.quantize(dense.to("mps"), 64, 4), packed, strict=True):
        assert torch.equal(result.cpu(), expected)
    moved = on_mps(packed)
    assert torch.equal(q.dequantize(*moved, 64, 4).cpu(), q.dequantize(*packed, 64, 4))
    narrow = q.dequantize(*moved, 64, 4, dtype=torch.float32)
    assert torch.equal(narrow.cpu(), q.dequantize(*packed, 64, 4, dtype=torch.float32))
    x = oracle.random_x(5, 1, 128).to(torch.float16)
    indices = torch.tensor([2, 0, 1, 2, 0])
    lhs = torch.arange(5)
    expected = q.gather_qmm(x, *packed, lhs, indices, group_size=64, bits=4)
    assert_close(q.gather_qmm(x.to("mps"), *moved, lhs.to("mps"), indices.to("mps"), group_size=64, bits=4), expected)


def test_scales_of_a_wider_dtype():
    w, scales, biases = weights(72, 128)
    x = oracle.random_x(3, 128).to(torch.float16)
    packed = (w, scales.float(), biases)
    assert_close(product(x.to("mps"), on_mps(packed)), product(x, packed))


def test_empty_operands_launch_nothing():
    packed = on_mps(weights(72, 128))
    assert product(torch.empty(0, 128, dtype=torch.float16, device="mps"), packed).shape == (0, 72)
    assert all(tensor.numel() == 0 for tensor in q.quantize(torch.empty(0, 128, device="mps"), 64, 4))
    assert mps.launched() == []


def test_gradients():
    packed = weights(64, 128, dtype=torch.float32)
    results = []
    for name in ("cpu", "mps"):
        x = oracle.random_x(3, 128).float().to(name).requires_grad_()
        product(x, tuple(tensor.to(name) for tensor in packed)).square().sum().backward()
        results.append(x.grad)
    assert_close(results[1], results[0])


@pytest.mark.parametrize("mask", [None, torch.bool, torch.float32], ids=str)
def test_attention_of_torch(mask):
    results = []
    for name in ("cpu", "mps"):
        query, keys = (oracle.random_x(2, heads, 5, 16, seed=heads).to(name).requires_grad_() for heads in (4, 2))
        bias = None if mask is None else (oracle.random_x(5, 5) + 9 * torch.eye(5)).to(name)
        bias = bias > 0 if mask is torch.bool else bias
        y = F.scaled_dot_product_attention(query, keys, keys, bias, is_causal=mask is None, enable_gqa=True)
        results.append([y, *torch.autograd.grad(y.square().sum(), (query, keys))])
    for ours, expected in zip(*results[::-1], strict=True):
        assert_close(ours, expected)


def test_events_have_happened():
    event = torch.Event("mps")
    event.record()
    event.wait()
    assert event.query()
    event.synchronize()
    assert mps.logs()["synchronizations"] > 0


def test_no_op_of_ours_falls_back_to_the_cpu():
    x = torch.zeros(1, device="mps")
    with torch.library._scoped_library("quantization_mlx", "FRAGMENT") as library:
        library.define("without_mps_kernel(Tensor x) -> Tensor")
        library.impl("without_mps_kernel", lambda x: x + 1, "CPU")
        op = torch.ops.quantization_mlx.without_mps_kernel
        assert op(torch.zeros(1)) == 1
        with pytest.raises(RuntimeError, match="quantization_mlx::without_mps_kernel has no kernel for MPS"):
            op(x)
    mps.clear()
    assert x.cos().cpu() == 1
    assert mps.logs()["fallbacks"] == ["aten::cos"]


def test_objects_are_released():
    packed = on_mps(weights(72, 128))
    x = oracle.random_x(14, 128).to(torch.float16).to("mps")
    product(x, packed)
    before = mps.live_objects()
    for _ in range(5):
        product(x, packed)
        product(x[:1], packed)
    kept = {"SoftmetalPipelineState", "SoftmetalLibrary"}
    grown = {name for name, count in mps.live_objects().items() if count > before.get(name, 0)}
    assert grown <= kept


def instances_in(compiled: dict) -> list[str]:
    """Names of the kernels that a library was compiled for."""
    return re.findall(r'host_name\("(\w+)"\)', compiled["source"])


def test_pipelines_are_made_once_by_many_threads():
    packed = on_mps(weights(72, 128, "nvfp4"))
    x = oracle.random_x(3, 128).to(torch.bfloat16)
    expected = product(x, weights(72, 128, "nvfp4"), "nvfp4")
    # A GPU that no other test uses, so that its self-check is still to be made.
    with mps.gpu("applegpu_g16d"), ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: product(x.to("mps"), packed, "nvfp4"), range(16)))
    for result in results:
        assert_close(result, expected)
    compiled = [instance for record in mps.logs()["compiles"] for instance in instances_in(record)]
    assert len(compiled) == len(set(compiled))


# --- Bad indices --------------------------------------------------------------------------------------------------


def gathered(index: int) -> Tensor:
    packed = on_mps(q.quantize(oracle.random_x(3, 64, 128).to(torch.float16), 64, 4))
    x = oracle.random_x(1, 1, 128).to(torch.float16).to("mps")
    rhs = torch.tensor([0, index, 2]).to("mps")
    return q.gather_qmm(x, *packed, torch.zeros(3, dtype=torch.int64).to("mps"), rhs, group_size=64, bits=4)


@pytest.mark.parametrize("index", [-1, 3])
def test_bad_index_gives_nan(index):
    result = gathered(index).cpu()
    assert result[1].isnan().all() and not result[[0, 2]].isnan().any()


@pytest.mark.parametrize("index", [-1, 3])
def test_bad_index_raises_while_debugging(index):
    done = in_new_process(f"assert not gathered(1).isnan().any()\ngathered({index})", QUANTIZATION_MLX_DEBUG="1")
    message = rf"IndexError: \[gather_qmm\] rhs_indices holds {index} at position 1; .* below 3"
    assert re.match(message, done.stderr.splitlines()[-1])


# --- The choice of a GPU and what is compiled for it --------------------------------------------------------------


@pytest.mark.parametrize(("name", "output"), [("", "True"), ("applegpu_g13g", "False"), ("M1", "")])
def test_environment_names_another_gpu(name, output):
    done = in_new_process(
        """
        x = oracle.random_x(40, 128).to(torch.float16).to("mps")
        product(x, on_mps(weights(72, 128)))
        print(any("nax" in launch.kernel for launch in mps.launched()))
        """,
        QUANTIZATION_MLX_GPU=name,
    )
    assert done.stdout.strip() == output
    assert output or done.stderr.splitlines()[-1].startswith('ValueError: The GPU is named "M1"')


@pytest.mark.parametrize(("macos", "version"), [(1400, 310), (1500, 320), (2600, 400), (2602, 400)])
def test_language(macos, version):
    compiles, kernels = printed(
        f"""
        mps.set_gpu("applegpu_g17s", {macos})
        packed = on_mps(weights(72, 128, "mxfp8", torch.bfloat16))
        x = oracle.random_x(40, 128).to(torch.bfloat16).to("mps")
        product(x, packed, "mxfp8")
        assert not mps.errors(), mps.errors()
        print(json.dumps([mps.logs()["compiles"], [launch.kernel for launch in mps.launched()]]))
        """
    )
    assert compiles
    for record in compiles:
        assert record["version"] == version
        assert record["safe_math"]
        assert len(instances_in(record)) == 1 and not record["macros"]
    assert {name for record in compiles for name in instances_in(record)} >= set(kernels)
    assert any("nax" in kernel for kernel in kernels) == (macos == 2602)


def test_error_of_the_compiler_reaches_the_caller():
    done = in_new_process(
        """
        compile = mps.device.compile
        def broken(source, **options):
            raise mps.device.CompileError("metal/quantize.h:7: error: something is wrong")
        mps.device.compile = broken
        w = torch.ones(8, 64).to("mps")
        for _ in range(2):
            try:
                q.quantize(w, 64, 4)
            except RuntimeError as error:
                print(error)
        mps.device.compile = compile
        print(q.quantize(w, 64, 4)[0].device)
        """
    )
    assert done.returncode == 0, done.stderr
    message = (
        "[quantization_mlx] Metal does not compile affine_quantize_float32_gs_64_b_4 of quantize.metal:\n"
        "metal/quantize.h:7: error: something is wrong\n"
    )
    assert done.stdout == message * 2 + "mps:0\n"


def test_shader_that_the_library_does_not_have():
    done = in_new_process(
        """
        mps.device.Library.kernels = property(lambda library: [])
        q.quantize(torch.ones(8, 64).to("mps"), 64, 4)
        """
    )
    assert "there is no shader affine_quantize_float32_gs_64_b_4: Function" in done.stderr


def test_pipeline_of_too_few_threads():
    done = in_new_process(
        """
        make = mps.device.Library.pipeline
        def of_32_threads(*arguments):
            pipeline = make(*arguments)
            pipeline.structure.max_threads = 32
            return pipeline
        mps.device.Library.pipeline = of_32_threads
        q.quantize(torch.ones(8, 64).to("mps"), 64, 4)
        """
    )
    assert "runs with at most 32 threads in a threadgroup on this GPU and needs 64." in done.stderr


def test_library_that_was_compiled_beforehand():
    """kernel-builder's builds have all shaders in one metallib, of language 4.0."""
    found = printed(
        """
        for rows in (1, 40):
            packed = weights(72, 128)
            x = oracle.random_x(rows, 128).to(torch.float16)
            for gpu in ("applegpu_g14s", "applegpu_g17s"):
                with mps.gpu(gpu):
                    assert_close(product(x.to("mps"), on_mps(packed)), product(x, packed))
        print(json.dumps([mps.errors(), mps.logs()["compiles"]]))
        """,
        metallib=True,
        CI="true",
    )
    assert found == [[], []]


def test_library_for_a_later_macos():
    """Its kernels are compiled from source instead."""
    found = printed(
        """
        mps.set_gpu("applegpu_g14s", 1500)
        w = torch.rand(8, 64)
        for ours, expected in zip(q.quantize(w.to("mps"), 64, 4), q.quantize(w, 64, 4), strict=True):
            assert torch.equal(ours.cpu(), expected)
        print(json.dumps([instances_in(record) for record in mps.logs()["compiles"]]))
        """,
        metallib=True,
    )
    assert found == [["affine_quantize_float32_gs_64_b_4"]]


# --- Self-check ---------------------------------------------------------------------------------------------------

FORTY_ROWS = """
packed = weights(72, 128)
x = oracle.random_x(40, 128).to(torch.float16)
result = product(x.to("mps"), on_mps(packed))
assert_close(result, product(x, packed))
plan = json.loads(torch.ops.quantization_mlx.explain_quantized_matmul(x.to("mps"), *on_mps(packed), True, 64, 4))
print(json.dumps([plan["excluded"], plan["launches"][0]["family"], mps.launched()[-1].kernel]))
"""


@pytest.mark.parametrize(
    ("broken", "excluded", "family"),
    [("nothing", [], "tensor"), ("_nax_", ["tensor"], "tile"), ("_qmm_t", ["tensor", "tile"], "matvec")],
)
def test_wrong_family_is_not_used(broken, excluded, family):
    done = in_new_process(f"with mps.corrupted({broken!r}):" + textwrap.indent(FORTY_ROWS, "    "))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)[:2] == [excluded, family]
    for name in excluded:
        assert done.stderr.count(f'Kernel family "{name}" fails its self-check') == 1
    assert done.stderr.count("fails its self-check") == len(excluded)


def test_wrong_kernels_of_packed_columns_are_not_used():
    """Their self-check has weights of its own."""
    done = in_new_process(
        """
        packed = q.quantize(oracle.random_x(256, 72).to(torch.float16), mode="marlin_int4")
        x = oracle.random_x(20, 256).to(torch.float16)
        with mps.corrupted("marlin_int4_qmm_n"):
            ours = q.quantized_matmul(x.to("mps"), *on_mps(packed), transpose=False, mode="marlin_int4")
        assert_close(ours, q.quantized_matmul(x, *packed, transpose=False, mode="marlin_int4"))
        print(json.dumps([launch.kernel for launch in mps.launched()][-1]))
        """
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == "marlin_int4_qvm_float16_gs_128_b_4_rows_8"
    assert [done.stderr.count(f'"{name}" fails its self-check') for name in ("tensor", "tile", "matvec")] == [1, 1, 0]


def test_split_product_where_matvecs_are_wrong():
    """Its parts are summed by a kernel of the matvecs' file, which is not what their check is about."""
    found = printed(
        """
        mps.set_gpu("applegpu_g14d")
        packed = weights(64, 4096)
        with mps.corrupted("_qmv_"):
            for rows in (1, 20):
                x = oracle.random_x(rows, 4096).to(torch.float16)
                assert_close(product(x.to("mps"), on_mps(packed)), product(x, packed))
        print(json.dumps([launch.kernel for launch in mps.launched()][-2:]))
        """
    )
    assert found == ["affine_qmm_t_splitk_float16_gs_64_b_4_rows_32", "sum_parts_float16"]


GATHER = """
packed = on_mps(weights(64, 256))
packed = tuple(tensor[None] for tensor in packed)
x = torch.ones(3, 1, 256, dtype=torch.float16, device="mps")
y = q.gather_qmm(x, *packed, None, torch.zeros(3, dtype=torch.int64, device="mps"))
assert not y.isnan().any()
print(mps.launched()[-1].kernel)
"""


def test_wrong_family_is_not_used_for_pairs():
    done = in_new_process("with mps.corrupted('_qmv_'):" + textwrap.indent(GATHER, "    "))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "affine_gather_qmm_t_float16_gs_64_b_4_rows_32"


def test_error_where_every_family_for_pairs_is_wrong():
    code = "with mps.corrupted('_qm'):" + textwrap.indent(GATHER, "    ")
    done = in_new_process("mps.set_gpu('applegpu_g14s')\n" + code)
    assert "every kernel family that could serve failed its self-check" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(("broken", "message"), [("quantize", "codes are not the CPU's"), ("dequantize", "differs")])
def test_wrong_conversion_is_an_error(broken, message):
    """And of no other conversion."""
    calls = {
        "quantize": "q.quantize(torch.ones(4, 64, dtype=torch.float16, device='mps'))",
        "dequantize": "q.dequantize(*on_mps(weights(72, 128)), 64, 4)",
    }
    wrong = calls.pop(broken)
    [right] = calls.values()
    done = in_new_process(f"with mps.corrupted('_{broken}_'):\n    {right}\n    print('right')\n    {wrong}")
    assert done.stdout == "right\n"
    assert f'Kernel family "{broken}" fails its self-check' in done.stderr and message in done.stderr
    assert "[" + broken + "] every kernel family that could serve failed" in done.stderr.splitlines()[-1]


def test_error_where_every_family_is_wrong():
    done = in_new_process("with mps.corrupted('affine_'):" + textwrap.indent(FORTY_ROWS, "    "))
    assert "every kernel family that could serve failed its self-check" in done.stderr.splitlines()[-1]


def test_failed_self_check_is_an_error_in_ci():
    done = in_new_process("with mps.corrupted('_nax_'):" + textwrap.indent(FORTY_ROWS, "    "), CI="true")
    assert done.returncode != 0
    assert 'Kernel family "tensor" fails its self-check' in done.stderr.splitlines()[-1]


# --- The embedded source ------------------------------------------------------------------------------------------


SOURCES = """
x = torch.ones(40, 128, dtype=torch.float16, device="mps")
packed = q.quantize(x, 64, 4)
long = x.repeat(1, 32)
for gpu in ("applegpu_g14s", "applegpu_g17s"):
    with mps.gpu(gpu):
        for rows in (1, 40):
            product(x[:rows], packed)
        q.fast.rms_norm(x, None, 1e-5)
        q.fast.swiglu(x, x)
        q.fast.rope(x[None], 128, traditional=False, base=1e4, scale=1.0, offset=0)
        cache = torch.zeros(1, 1, 40, 32, dtype=torch.float16, device="mps")
        q.fast.rope_into_cache(x[None], None, None, cache, cache.clone(), 0)
        for queries in (1, 40):
            heads = x[None, None, :queries]
            q.fast.scaled_dot_product_attention(heads, x[None, None], x[None, None], scale=0.1)
        q.fast.moe_router(x, 2)
        q.fast.sample(x, 0)
        q.fast.resample_image(x[None], (20, 30))
        product(long, q.quantize(long, 64, 4))  # its K is split
        experts = [part[None] for part in packed]
        pairs = torch.zeros(40, dtype=torch.int64, device="mps")  # which are sorted
        q.gather_qmm(x[:, None], *experts, None, pairs, True, 64, 4)
print(json.dumps([record["source"] for record in mps.logs()["compiles"]]))
"""


def test_sources_hold_each_header_once():
    stems = set()
    for source in printed(SOURCES):
        assert '#include "' not in source and "#pragma once" not in source
        paths = [line.split('"')[1] for line in source.splitlines() if line.startswith("#line 1 ")]
        assert len(paths) == len(set(paths))
        stems.add(Path(paths[0]).stem)
        text = source[: source.rindex("\nnamespace quantization_mlx {\ntemplate [[host_name")]
        for path in paths:
            original = (ROOT / path).read_text().splitlines()
            marked = lines_of(text, path)
            assert marked, f"no line of {path}"
            for number, line in marked.items():
                assert line == "" or line == original[number - 1], f"{path}:{number}"
    assert stems == {path.stem for path in (ROOT / "metal").rglob("*.metal")}


def lines_of(source: str, path: str) -> dict[int, str]:
    """The lines of one file in a flattened source, by the number that #line gives them."""
    result: dict[int, str] = {}
    current, number = "", 0
    for line in source.splitlines():
        if line.startswith("#line "):
            _, digits, name = line.split(" ", 2)
            current, number = name.strip('"'), int(digits)
            continue
        if current == path:
            result[number] = line
        number += 1
    return result
