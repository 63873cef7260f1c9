"""The GPU lane as far as it goes without a GPU: its calls, its comparisons, its reading of sanitizers' reports."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch

import cases
import oracle
from oracle import Format

if sys.platform == "darwin":
    pytest.skip("the shaders are compiled with what the software Metal device needs", allow_module_level=True)

import build
import bundle
import check
import driver
import fast_calls
import fast_check
import fast_operands
import fast_suites
import fast_tables
import mutants
import operands
import quantization_mlx as qm
import sanitizer
import suites
import tables
from calls import FILLING, NUMPY, Call
from plans import FUNCTIONS, decoder_of, plan_of
from quantization_mlx import fast

MARLIN = Format("marlin_int4", 64, 4)
DTYPES = [oracle.name_of(dtype) for dtype in cases.DTYPES]


def stored(tensor: torch.Tensor) -> np.ndarray:
    """As the lane holds it: bfloat16 as uint16."""
    tensor = tensor.contiguous()
    return tensor.view(torch.int16).numpy().view(np.uint16) if tensor.dtype == torch.bfloat16 else tensor.numpy()


def computed(call: Call, given: dict[str, np.ndarray]) -> torch.Tensor:
    """The result of a product or of dequantize, by the CPU's kernels."""
    w = torch.from_numpy(given["w"][call.offset :].reshape(call.words_shape))
    scales = check.tensor(given["scales"], call.scale_dtype)
    biases = check.tensor(given["biases"], call.scale_dtype) if "biases" in given else None
    format = {"group_size": call.group_size, "bits": call.bits, "mode": call.mode}
    if call.global_scale:
        format["global_scale"] = torch.from_numpy(given["global_scale"])
    if call.op == "dequantize":
        return qm.dequantize(w, scales, biases, **format, dtype=getattr(torch, call.dtype))
    x = check.rows_of_x(call, given)
    if call.activation:
        return fast.quantized_gated_matmul(x, w, scales, biases, **format, activation=call.activation)
    if call.op == "quantized_matmul":
        return qm.quantized_matmul(x, w, scales, biases, transpose=call.transpose, **format)
    lhs, rhs = (torch.from_numpy(given[name]) for name in ("lhs_indices", "rhs_indices"))
    valid = (lhs >= 0) & (lhs < call.pairs) & (rhs >= 0) & (rhs < call.experts)
    indices = (torch.where(valid, index, 0) for index in (lhs, rhs))
    y = qm.gather_qmm(x, w, scales, biases, *indices, transpose=call.transpose, **format)
    y[~valid] = torch.nan
    return y


CALLS = [
    Call(rows=3, n=37, k=192, offset=1, x_padding=3),
    Call(rows=20, n=64, k=37, transpose=False, dtype="bfloat16", batch=3, batched_w=True),
    suites.call_of(suites.NVFP4, op="gather_qmm", n=37, k=80, experts=4, pairs=9, invalid=True, global_scale=True),
    Call(op="quantized_gated_matmul", activation="gelu_tanh", rows=3, n=37, k=192, offset=1, x_padding=3),
    suites.call_of(Format("mxfp8", 32, 8), op="dequantize", n=5, k=96, dtype="float32"),
    suites.call_of(MARLIN, rows=3, n=37, k=192, transpose=False, dtype="bfloat16", offset=1),
    suites.call_of(MARLIN, op="dequantize", n=5, k=192, transpose=False),
]


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_compare(call):
    """Right results are within what is allowed, and one wrong value is not."""
    given = operands.random_operands(call)
    y = computed(call, given)
    assert check.compare(call, given, {"y": stored(y)}) <= 1
    good = next(position for position in range(y.numel()) if not y.view(-1)[position].isnan())
    for wrong in (y.view(-1)[good] * 1.5 + 1, torch.nan):
        broken = y.clone()
        broken.view(-1)[good] = wrong
        assert not check.compare(call, given, {"y": stored(broken)}) <= 1


def test_compare_wants_nan():
    """Of a pair with an index out of range; what nobody wrote is no such NaN."""
    call = CALLS[2]
    given = operands.random_operands(call)
    for bits in (0, -1):
        y = computed(call, given)
        y.view(torch.int16)[y.isnan()] = bits
        with pytest.raises(AssertionError, match="out of range"):
            check.compare(call, given, {"y": stored(y)})


def test_encode():
    values = torch.randn(1000, generator=oracle.generator(0)) * 2.0 ** torch.arange(-40, 60).repeat(10)
    assert np.array_equal(operands.encode(values.numpy(), "bfloat16"), stored(values.bfloat16()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "format",
    [
        suites.FOUR_BIT,
        *(Format(*f) for f in (("affine", 128, 3), ("mxfp8", 32, 8))),
        suites.NVFP4,
        Format("marlin_int4", 32, 4),
    ],
)
def test_calls_meet_and_miss_every_fast_path(format, dtype):
    """The same kernels, with all function constants and with none."""
    seen = {}
    for layout in (suites.RAGGED, suites.ALIGNED):
        plans = map(plan_of, suites.reaching(suites.products(format, dtype, layout)))
        launches = [launch for plan in plans for launch in plan.launches]
        seen[layout.offset] = {launch.kernel for launch in launches}
        products = [launch for launch in launches if launch.kernel.startswith(format.mode)]
        fast = {"aligned_outputs", "aligned_weights", "aligned_x"}
        assert all(bool(fast <= set(launch.constants)) == (layout is suites.ALIGNED) for launch in products)
    assert seen[0] == seen[1]
    ops = {tables.KERNEL.fullmatch(kernel)["op"] for kernel in seen[0] if kernel.startswith(format.mode)}
    expected = {"qvm", "qvm_splitk", "gather_qvm", "qmm_n", "qmm_n_splitk", "gather_qmm_rhs_n"}
    if not format.is_column_packed:
        expected |= {"qmv", "gather_qmv", "gather_qvm_splitk", "qmm_t", "gather_qmm_rhs_t"}
    assert expected <= ops


@pytest.mark.parametrize("name", mutants.MUTANTS)
def test_mutants_edit_their_shader(name):
    mutant = mutants.MUTANTS[name]
    headers = ["operands.h", "tile.h", "dequantize.h", f"{mutant.file}.h", f"{mutant.file}.metal"]
    headers = [
        name for name in dict.fromkeys([*headers, mutant.header]) if name and any(mutants.METAL.glob(f"*/{name}"))
    ]
    text = "".join(f'# 1 "{header}"\n' + mutants.shader(header).read_text() for header in headers)
    assert mutant(text) != text
    kernels = {launch.file for call in mutant.calls for launch in plan_of(call).launches}
    assert mutant.file in kernels


# --- Fast ops and decoder layers --------------------------------------------------------------------------------------


def laid_out(call: fast_calls.FastCall, given: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """The tensors of a call: what it reads, and filled memory for what it writes."""
    tensors = {}
    for role, layout in call.tensors:
        dtype = np.dtype(NUMPY.get(layout.dtype, layout.dtype))
        memory = given.get(role, np.full(layout.size * dtype.itemsize, FILLING, np.uint8).view(dtype)).copy()
        flat = torch.from_numpy(memory).bool() if layout.dtype == "bool" else check.tensor(memory, layout.dtype)
        tensors[role] = flat.as_strided(layout.shape, layout.strides, layout.offset)
    return tensors


def fast_results(call: fast_calls.FastCall, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """By the CPU's kernels."""
    tensors = laid_out(call, given)
    y = FUNCTIONS[call.op](tensors, call.keywords)
    names = [role for role in call.results if role not in call.written]
    results = dict(zip(names, y if isinstance(y, tuple) else (y,), strict=True))
    return {role: stored(each) for role, each in (results | {role: tensors[role] for role in call.written}).items()}


FAST_CALLS = [
    *(fast_calls.norm(op, 3, 37, "bfloat16", padding=3, before=1) for op in fast_suites.NORM_OPS),
    *(fast_calls.gate(op, 3, 37, "float16", step=2, **options) for op, options in fast_suites.GATES),
    fast_calls.rope(3, 5, 50, 36, "bfloat16", traditional=True, has_offsets=True),
    fast_calls.rope(3, 5, 50, 36, "float32", has_freqs=True),
    fast_calls.resample_image((31, 17), (13, 40), 5, "uint8", "bicubic", True, True, True, 1),
    fast_calls.resample_image((31, 17), (13, 40), 5, "bfloat16", "bicubic"),
    fast_calls.resample_image((3, 17), (13, 4), 2, "float32", antialias=True),
    fast_calls.rope_into_cache(7, 1, 90, 20, tokens=3, dtype="float16"),
    fast_calls.rope_into_cache(3, 2, 34, 0, tokens=3, dtype="float16", norms_all_heads=True),
    *(fast_calls.attention(77, queries=5, mask=mask, has_sinks=True, capacity=80) for mask in fast_suites.MASKS),
    fast_calls.attention(77, queries=5, mask="causal", window=9, dtype="bfloat16"),
    *(fast_calls.router(7, 60, 6, "bfloat16", before=3, **rules) for rules in fast_suites.ROUTERS),
    *(fast_calls.combine(3, 4, 37, "bfloat16", wide, wide, 1, 3 * wide) for wide in (False, True)),
    fast_calls.gate("swiglu", 3, 37, "float16", step=2, experts=3, **fast_suites.GATES[1][1]),
    *(
        fast_calls.sample(9, 1037, "float16", 20 * ("top_k" in rules), "top_p" in rules, padding=3, before=1, **rules)
        for rules in fast_suites.RULES
    ),
    *(fast_calls.packed_attention(fast_calls.attention(77, queries=5), *format) for format in fast_suites.PACKED),
]


@pytest.mark.parametrize("call", FAST_CALLS, ids=str)
def test_compare_fast(call):
    """Right results are within what is allowed, and one wrong value in any result is not."""
    assert fast_calls.from_dict(json.loads(json.dumps(call.as_dict()))) == call
    given = fast_operands.operands_of(call)
    results = fast_results(call, given)
    assert check.compare(call, given, results) <= 1
    for role, (_, dtype) in call.results.items():
        if dtype == "int64":  # another expert, or another token
            with pytest.raises(AssertionError):
                check.compare(call, given, {**results, role: results[role] + 1})
            continue
        values = fast_operands.decode(results[role], dtype)
        place = np.unravel_index(np.nanargmax(np.abs(values)), values.shape)
        for wrong in (values[place] * 1.02, np.nan):
            broken = results[role].copy()
            broken[place] = operands.encode(np.array([wrong]), dtype)[0] if wrong == wrong else stored_nan(dtype)
            assert not check.compare(call, given, {**results, role: broken}) <= 1


def test_the_reference_has_known_random_bits():
    assert fast_check._philox(0, 0) == 0x6627E8D5E169C58D
    assert fast_check._philox(2**64 - 1, 2**128 - 1) == 0x408F276D41C83B0E


def stored_nan(dtype: str):
    return np.uint16(0x7FC0) if dtype == "bfloat16" else np.nan


def test_compare_fast_wants_the_rest_of_a_cache_left_alone():
    call = next(call for call in FAST_CALLS if call.op == "rope_into_cache")
    given = fast_operands.operands_of(call)
    results = fast_results(call, given)
    results["keys"][0, 0, 0, 0] = 0
    with pytest.raises(AssertionError, match="left alone"):
        check.compare(call, given, results)


def test_fast_calls_reach_every_kernel():
    """Of one type; those without a fast path, and those with all, reach them by themselves."""
    kernels = {
        kernel
        for file in build.FILES["fast"]
        for kernel in build.source_of(file, "plain").program().kernels
        if "_float16" in kernel
    }
    for ragged in (True, False):
        plans = map(plan_of, fast_suites.candidates("float16", ragged))
        launches = [launch for plan in plans for launch in plan.launches]
        assert {launch.kernel for launch in launches} == kernels
        assert all(set(launch.constants) <= set(build.CONSTANTS) for launch in launches)


def test_compare_layer():
    """The wiring names what the op's plans take, and the reference is what the CPU's kernels give."""
    call = fast_calls.LayerCall(20, hidden=128, query_heads=4, key_heads=2, dim=64, intermediate=192)
    assert fast_calls.from_dict(json.loads(json.dumps(call.as_dict()))) == call
    given = fast_operands.operands_of(call)
    known = {*given, *call.results, "none", "workspace"}
    for launch in plan_of(call).launches:
        assert {name for name, _ in launch.arguments} <= known
    y = decoder_of(call, lambda name, shape, dtype: check.tensor(given[name], dtype).view(shape))()
    assert check.compare(call, given, {"y": stored(y.view(-1))}) <= 1
    assert not check.compare(call, given, {"y": stored(y.view(-1) * 1.05)}) <= 1


def test_fast_tables():
    timed = list(fast_suites.timed())
    launches = {"kernels": ["a", "b"], "registers": [100, 32]}
    results = {"copy": 4e12, "fast_peers": [{"call": call.as_dict(), "seconds": 3e-5} for call, _ in timed]}
    results["fast_times"] = [
        {"call": call.as_dict(), "build": build, "seconds": 1e-5, **launches} for call, build in timed
    ]
    attention, norms, mixtures, sampling, layers = fast_tables.FastTimes(results).tables()
    assert "| 4096  | 2        | 100       | 10.0        | 42%     | 10.0      | 42%     | 30.0 " in attention
    assert "add_rms_norm | 4096" in norms and "3.00" in layers
    assert "moe_combine | 4096" in mixtures and "| top_p 0.9 | 64" in sampling


def test_buffers(monkeypatch):
    """Offsets, guards, and copies of weights, with a driver whose memory is the host's."""
    blocks: dict[int, np.ndarray] = {}

    class Memory:
        def __init__(self, size):
            self.size, self.bytes = size, np.zeros(size, np.uint8)
            self.address = 1000 * (len(blocks) + 1) + 10**6
            blocks[self.address] = self.bytes

        @classmethod
        def of(cls, array):
            memory = cls(array.nbytes)
            memory.bytes[:] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            return memory

        def copy(self):
            return Memory.of(self.bytes)

        def fill(self, byte):
            self.bytes[:] = byte

        def read(self):
            return self.bytes.copy()

    monkeypatch.setattr(bundle, "Memory", Memory)
    call = Call(rows=1, n=4, k=64, offset=3)
    item = bundle.Item(None, {"call": call.as_dict(), "workspace": 0})
    given = operands.random_operands(call)
    buffers = bundle.Buffers(item, given, guard=16)
    bases = {"x": 3 * 2, "w": 3 * 4, "scales": 0, "y": 16}
    addresses = {role: buffers.argument(role, 5) for role in bases}
    item_bytes = {"x": 2, "w": 4, "scales": 2, "y": 2}
    assert all((addresses[role] - base - 5 * item_bytes[role]) in blocks for role, base in bases.items())
    assert np.isnan(buffers.results()["y"]).all()
    moved = buffers.moved("w")
    assert moved.argument("w", 0) != buffers.argument("w", 0) and moved.argument("x", 0) == buffers.argument("x", 0)
    blocks[buffers.argument("y", 0) - 16][-1] = 0
    with pytest.raises(AssertionError, match="outside"):
        buffers.results()


# --- Sanitizers' reports ----------------------------------------------------------------------------------------------

HEAD = "========= COMPUTE-SANITIZER\nlaunches 7\n"
REPORTS = {
    "clean memcheck": (HEAD + "========= ERROR SUMMARY: 0 errors\n", 0, "", ()),
    "clean racecheck": (HEAD + "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n", 0, "", ()),
    "out of bounds": (
        HEAD + "========= Invalid __global__ read of size 16 bytes\n=========     at affine_qmv_1a2b3c4d+0x4d0\n"
        "=========     by thread (8,0,0) in block (1,0,0)\n========= ERROR SUMMARY: 3 errors\n",
        *(3, "", ("affine_qmv_1a2b3c4d",)),
    ),
    "race": (
        HEAD + "========= Error: Race reported between Write access at affine_qvm_00ff00ff+0x310 in matvec.h:478\n"
        "=========     and Read access at affine_qvm_00ff00ff+0x490 [384 hazards]\n"
        "========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)\n",
        *(1, "", ("affine_qvm_00ff00ff",)),
    ),
    "no device": ("========= COMPUTE-SANITIZER\n========= Error: Device not supported\n", None, "not supported", ()),
    "killed": (HEAD.replace("launches 7\n", ""), None, "did not finish", ()),
    "failed launch": (
        HEAD + "failed [sanitize] plain qmv: too many resources (701)\n========= ERROR SUMMARY: 0 errors\n",
        *(0, "too many resources", ()),
    ),
}


@pytest.mark.parametrize("name", REPORTS)
def test_reports(name):
    text, errors, failure, symbols = REPORTS[name]
    report = sanitizer.parse(text, sanitizer.Report("memcheck", ()))
    assert report.errors == errors
    shown = report.as_dict()["failure"]
    assert (failure in shown) if failure else not shown
    assert report.is_clean == (errors == 0 and not failure)
    for symbol in symbols:
        assert report.names(bundle.Item(None, {"launches": [{"symbol": symbol}]}))
    assert not report.names(bundle.Item(None, {"launches": [{"symbol": "affine_qmv_other"}]}))


def test_verdicts_on_mutants():
    """Flagged where the tool names the mutant; a twin that it names, or that did not run, is not clean."""
    items = [
        bundle.Item(None, {"tag": tag, "launches": [{"symbol": symbol}]})
        for tag, symbol in (("bug", "broken"), ("twin of bug", "whole"))
    ]
    failed = "failed [twin of bug] plain qmv: an illegal instruction"
    for words, failures, expected in (
        ({"broken"}, [], (True, True)),
        ({"whole"}, [], (False, False)),
        (set(), [], (False, True)),
        ({"broken"}, [failed.replace("twin of ", "")], (True, True)),
        ({"broken"}, [failed], (True, False)),
    ):
        report = sanitizer.Report("memcheck", (), errors=0, words=words, failed=failures)
        verdict = sanitizer.verdict_on("bug", items, report)
        assert (verdict["flagged"], verdict["twin_is_clean"]) == expected


def test_tables_of_times():
    """From the results of a run; a call that was not timed leaves its cell empty."""
    call = Call(rows=1, n=4096, k=4096)
    measured = {"seconds": 1e-5, "bytes": call.weight_bytes, "kernels": ["affine_qmv_float16_gs_64_b_4"]}
    results = {"copy": 4e12, "peers": [{"shape": [1, 4096, 4096], "linear": 2e-5, "int4pack": 3e-5}]}
    results["times"] = [{"call": call.as_dict(), "build": "generic", **measured}]
    first, *others = tables.Times(results).tables()
    line = next(line for line in first.splitlines() if line.startswith("| 1 "))
    share = f"{100 * call.weight_bytes / 1e-5 / 4e12:.0f}%"
    assert [cell.strip() for cell in line.split("|")[1:-1]] == ["1", "qmv", "10.0", share, "", "", "", "30.0", "20.0"]
    assert others


def test_driver_error_names_the_call(monkeypatch):
    class Library:
        def cuMemAlloc_v2(self, *arguments):
            return 2

        def cuGetErrorString(self, code, text):
            return 0

    monkeypatch.setattr(driver, "_library", Library)
    with pytest.raises(driver.DriverError, match=r"cuMemAlloc_v2.*\(2\)"):
        driver.call("cuMemAlloc_v2")
