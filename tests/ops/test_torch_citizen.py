"""What torch expects of an operator: schemas, fake tensors, tracing, compilation, export, gradients, threads."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

import oracle
import quantization_mlx as qm
from cases import DTYPES, FLOAT_FORMATS, SOME_FORMATS
from devices import NATIVE_DEVICES
from oracle import Format, Quantized, name_of
from packed_columns import BITS, random_packed
from quantization_mlx._ops import ops
from quantization_mlx.marlin import MetalKernelLibrary, dispatch_gemm_fp4, get_default_library, marlin_gemm_int4

TRANSPOSE = pytest.mark.parametrize("transpose", [True, False], ids=["transpose", "no-transpose"])
AFFINE = Format("affine", 64, 4)
MXFP4, MXFP8, NVFP4 = FLOAT_FORMATS


# --- Calls of every op ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """Tensors and what must stand among them by position, the rest by keyword: for Python function and op alike."""

    op: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def on(self, device: str, grad: bool = False) -> Call:
        # Of the marlin modes, only the activations have a gradient.
        constants = self.args[1:] if str(self.kwargs.get("mode")).startswith("marlin") else ()

        def moved(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            trained = grad and value.is_floating_point() and not any(value is constant for constant in constants)
            value = value.to(device)
            return value.detach().requires_grad_() if trained else value

        args = tuple(moved(value) for value in self.args)
        return Call(self.op, args, {name: moved(value) for name, value in self.kwargs.items()})

    def run(self) -> Any:
        """The Python function."""
        return getattr(qm, self.op)(*self.args, **self.kwargs)


class Calls(dict[str, Call]):
    """By name, of which the first word is the op's."""

    def add(self, name: str, *args: Any, **kwargs: Any) -> None:
        self[name] = Call(name.split()[0], args, kwargs)


def _explicit_calls() -> Calls:
    calls = Calls()
    affine = oracle.random_quantized(AFFINE, 64, 128)
    x_t, x_n = oracle.random_x(2, 3, 128), oracle.random_x(2, 3, 64)
    sizes = {"group_size": 64, "bits": 4}
    calls.add("affine_qmv", x_t, *affine.tensors, 64, **sizes)
    for suffix in ("", "_nax"):
        calls.add(f"affine_qmm_t{suffix}", x_t, *affine.tensors, **sizes)
        calls.add(f"affine_qmm_n{suffix}", x_n, *affine.tensors, 128, **sizes)
    experts = oracle.random_quantized(AFFINE, 3, 64, 128)
    indices = torch.tensor([2, 0, 1, 2])
    calls.add("affine_gather_qmm_rhs_nax", oracle.random_x(4, 128), *experts.tensors, indices, 64, **sizes)
    for format in FLOAT_FORMATS:
        w, scales, _ = oracle.random_quantized(format, 64, 128).tensors
        calls.add(f"{format.mode}_qmv", x_t, w, scales, 64)
        calls.add(f"{format.mode}_qmm_t", x_t, w, scales)
        calls.add(f"{format.mode}_qmm_n", x_n, w, scales, 128)
    return calls


def _marlin_calls() -> Calls:
    calls = Calls()
    for kind, bits in BITS.items():
        mode = f"marlin_{kind}"
        options = {"group_size": 32, "bits": bits, "mode": mode}
        forward = {**options, "transpose": False}
        plain = tuple(random_packed(kind, 64, 24, 32))
        experts = tuple(None if t is None else torch.stack([t] * 3) for t in plain)
        calls.add(f"quantize {mode}", oracle.random_x(64, 24), **options)
        calls.add(f"quantize {mode} batched", oracle.random_x(2, 64, 24).half(), **options)
        calls.add(f"dequantize {mode}", *plain, **options)
        calls.add(f"quantized_matmul {mode}", oracle.random_x(2, 5, 64), *plain, **forward)
        calls.add(f"quantized_matmul {mode} 1-D", oracle.random_x(64), *plain, **forward)
        calls.add(f"quantized_matmul {mode} batched", oracle.random_x(2, 1, 5, 64).bfloat16(), *experts, **forward)
        indices = {"rhs_indices": torch.tensor([[2, 0]])}
        calls.add(f"gather_qmm {mode}", oracle.random_x(2, 3, 64), *experts, **indices, **forward)
    return calls


def _all_calls() -> Calls:
    calls = Calls(_explicit_calls() | _marlin_calls())
    for format in (AFFINE, MXFP4, MXFP8, NVFP4):
        options = format.options
        plain = oracle.random_quantized(format, 64, 128)
        batched = oracle.random_quantized(format, 3, 64, 128)
        halved = plain.map(lambda tensor: tensor.bfloat16() if tensor.is_floating_point() else tensor)
        x = oracle.random_x(2, 128)
        calls.add(f"quantize {format}", oracle.random_x(4, 128), **options)
        calls.add(f"dequantize {format}", *plain.tensors, **options)
        calls.add(f"quantized_matmul {format}", x, *plain.tensors, **options)
        calls.add(f"quantized_matmul {format} n", oracle.random_x(2, 64), *plain.tensors, transpose=False, **options)
        calls.add(f"quantized_matmul {format} batched", oracle.random_x(2, 1, 5, 128), *batched.tensors, **options)
        calls.add(f"quantized_matmul {format} bfloat16", x.bfloat16(), *halved.tensors, **options)
        indices = {"lhs_indices": torch.tensor([[0], [1]]), "rhs_indices": torch.tensor([2, 0, 2])}
        calls.add(f"gather_qmm {format}", oracle.random_x(2, 3, 128), *batched.tensors, **indices, **options)
        indices = {"rhs_indices": torch.tensor([0, 0, 2, 2]), "sorted_indices": True}
        calls.add(f"gather_qmm {format} sorted", oracle.random_x(4, 1, 128), *batched.tensors, **indices, **options)
    scaled = {**NVFP4.options, "global_scale": torch.tensor(900.0)}
    nvfp4 = oracle.random_quantized(NVFP4, 64, 128).tensors
    calls.add("quantize global_scale", oracle.random_x(4, 128), **scaled)
    calls.add("dequantize global_scale", *nvfp4, **scaled)
    calls.add("dequantize dtype", *nvfp4, **NVFP4.options, dtype=torch.float16)
    calls.add("quantized_matmul global_scale", oracle.random_x(2, 128), *nvfp4, **scaled)
    calls.add("quantized_matmul 1-D", oracle.random_x(128), *nvfp4, **NVFP4.options)
    calls.add("quantized_matmul empty", oracle.random_x(0, 128), *nvfp4, **NVFP4.options)
    return calls


CALLS = _all_calls()


def test_every_public_op_is_called_here() -> None:
    functions = {name for name in qm.__all__ if callable(getattr(qm, name)) and hasattr(ops, name)}
    assert functions == {call.op for call in CALLS.values()}


# --- opcheck and fake tensors -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("grad", [False, True], ids=["no-grad", "grad"])
@pytest.mark.parametrize("name", CALLS)
def test_opcheck(device: str, name: str, grad: bool) -> None:
    """Schema, autograd registration, fake tensors and ahead-of-time dispatch with symbolic sizes."""
    differentiable = CALLS[name].op != "quantize"
    call = CALLS[name].on(device, grad and differentiable)
    checks = ["test_schema", "test_faketensor", "test_aot_dispatch_dynamic"]
    if device == "cpu":  # torch has this one for some devices only; the registration is the same for all
        checks.append("test_autograd_registration")
    torch.library.opcheck(getattr(ops, call.op).default, call.args, call.kwargs, test_utils=checks)


def _describe(results: Any) -> list[tuple[Any, ...]]:
    tensors = results if isinstance(results, tuple) else (results,)
    return [(tuple(t.shape), t.dtype, t.stride(), t.layout) for t in tensors]


@pytest.mark.parametrize("name", CALLS)
def test_meta_and_fake_results_describe_the_real_ones(device: str, name: str) -> None:
    call = CALLS[name].on(device)
    expected = _describe(call.run())
    meta = call.on("meta")
    assert _describe(meta.run()) == expected
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake_args = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in call.args]
        fake_kwargs = {k: mode.from_tensor(v) if isinstance(v, Tensor) else v for k, v in call.kwargs.items()}
        fake = getattr(qm, call.op)(*fake_args, **fake_kwargs)
    assert _describe(fake) == expected
    assert all(t.device.type == device for t in (fake if isinstance(fake, tuple) else (fake,)))


@pytest.mark.parametrize("name", [name for name in CALLS if CALLS[name].op != "quantize"])
def test_python_function_and_op_agree(device: str, name: str) -> None:
    call = CALLS[name].on(device)
    through_op = getattr(ops, call.op).default(*call.args, **call.kwargs)
    oracle.assert_identical(call.run(), through_op)


def test_quantize_op_returns_three_tensors(device: str) -> None:
    for format in SOME_FORMATS:
        w = oracle.random_x(4, 128).to(device)
        w_q, scales, biases = ops.quantize(w, format.group_size, format.bits, format.mode)
        ours = qm.quantize(w, **format.options)
        assert len(ours) == (3 if format.is_affine else 2)
        assert (biases.numel() == 0) == (not format.is_affine)
        for one, other in zip(ours, (w_q, scales, biases), strict=False):
            oracle.assert_identical(one, other)


def test_results_do_not_alias_inputs(device: str) -> None:
    for name, case in CALLS.items():
        call = case.on(device)
        result = call.run()
        storages = {t.untyped_storage().data_ptr() for t in call.args if isinstance(t, Tensor) and t.numel()}
        for tensor in result if isinstance(result, tuple) else (result,):
            assert not tensor.numel() or tensor.untyped_storage().data_ptr() not in storages, name
            assert tensor.is_contiguous(), name


# --- torch.compile and torch.export -----------------------------------------------------------------------------------


def _batch_cases(device: str) -> dict[str, tuple[Callable[..., Tensor], Callable[[int], tuple[Tensor, ...]]]]:
    """A function to compile, and its arguments for a number of rows."""
    weights = oracle.random_quantized(AFFINE, 64, 128).to(device)
    experts = oracle.random_quantized(AFFINE, 3, 64, 128).to(device)
    nvfp4 = oracle.random_quantized(NVFP4, 64, 128).to(device)

    def x(rows: int, *more: int) -> Tensor:
        return oracle.random_x(rows, *more).to(device)

    def indices(rows: int) -> Tensor:
        return (torch.arange(rows) % 3).to(device)

    def matmul(x: Tensor) -> Tensor:
        return torch.relu(qm.quantized_matmul(x + 1, *weights.tensors, **AFFINE.options)) * 2

    def without_transpose(x: Tensor) -> Tensor:
        return qm.quantized_matmul(x, *weights.tensors, False, **AFFINE.options) - 1

    def floating(x: Tensor) -> Tensor:
        return qm.quantized_matmul(x, nvfp4.w, nvfp4.scales, mode="nvfp4").sin()

    def gather(x: Tensor, rhs: Tensor) -> Tensor:
        return qm.gather_qmm(x, *experts.tensors, rhs_indices=rhs, **AFFINE.options, sorted_indices=True).exp()

    def explicit(x: Tensor) -> Tensor:
        product = qm.affine_qmm_t(x, *weights.tensors, 64, 4)
        return product + qm.affine_qmv(x, *weights.tensors, 64, 64, 4) + qm.nvfp4_qmm_t(x, nvfp4.w, nvfp4.scales)

    def rhs_nax(x: Tensor, rhs: Tensor) -> Tensor:
        return qm.affine_gather_qmm_rhs_nax(x, *experts.tensors, rhs, 64, 64, 4).relu()

    def round_trip(x: Tensor) -> Tensor:
        return qm.dequantize(*qm.quantize(x, **AFFINE.options), **AFFINE.options) + 1

    return {
        "quantized_matmul": (matmul, lambda rows: (x(rows, 128),)),
        "quantized_matmul 3-D": (matmul, lambda rows: (x(rows, 4, 128),)),
        "quantized_matmul middle": (matmul, lambda rows: (x(2, rows, 128),)),
        "quantized_matmul n": (without_transpose, lambda rows: (x(rows, 64),)),
        "nvfp4": (floating, lambda rows: (x(rows, 128),)),
        "gather_qmm": (gather, lambda rows: (x(rows, 1, 128), indices(rows))),
        "explicit": (explicit, lambda rows: (x(rows, 128),)),
        "rhs_nax": (rhs_nax, lambda rows: (x(rows, 128), indices(rows))),
        "quantize": (round_trip, lambda rows: (x(rows, 128),)),
    }


@pytest.mark.parametrize("case", _batch_cases("cpu"))
def test_compile_without_breaks_or_recompilation(device: str, case: str) -> None:
    """The first other batch size makes the size symbolic; after that nothing is compiled again."""
    function, arguments = _batch_cases(device)[case]
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, backend=counter, fullgraph=True)
    for rows in (5, 9, 2, 33, 64, 3):
        expected = function(*arguments(rows))
        oracle.assert_identical(compiled(*arguments(rows)), expected, f"{case} with {rows} rows")
    assert counter.frame_count == 2
    # torch itself gives sizes of one a graph of their own where it must.
    oracle.assert_identical(compiled(*arguments(1)), function(*arguments(1)), f"{case} with one row")
    assert counter.frame_count <= 3


# The compiler of the software device knows only what stands in metal/, not what inductor writes for a GPU.
@pytest.mark.parametrize("device", NATIVE_DEVICES, indirect=True)
def test_compile_with_inductor(device: str) -> None:
    function, arguments = _batch_cases(device)["quantized_matmul"]
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True)
    for rows in (4, 7):
        torch.testing.assert_close(compiled(*arguments(rows)), function(*arguments(rows)))


def test_compile_of_a_training_step(device: str) -> None:
    weights = oracle.random_quantized(AFFINE, 64, 128).to(device)

    def loss(x: Tensor, scales: Tensor, biases: Tensor) -> Tensor:
        return qm.quantized_matmul(x, weights.w, scales, biases, **AFFINE.options).square().sum()

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, backend=counter, fullgraph=True)
    for rows in (5, 9, 2, 33):
        results = []
        for function in (loss, compiled):
            leaves = [t.clone().requires_grad_() for t in (oracle.random_x(rows, 128).to(device), *weights.tensors[1:])]
            results.append(torch.autograd.grad(function(*leaves), leaves))
        for eager, traced in zip(*results, strict=True):
            torch.testing.assert_close(traced, eager)
    assert counter.frame_count == 2


@pytest.mark.parametrize("made", [False, True], ids=["first call", "later call"])
def test_compile_with_the_default_library(made: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qm.marlin.library, "_default", {})
    if made:
        get_default_library()
    w, scales, _ = random_packed("fp4", 64, 24, 32)

    def product(x: Tensor) -> Tensor:
        return dispatch_gemm_fp4(get_default_library(), x, w, scales, len(x), 24, 64, 32)

    torch._dynamo.reset()
    x = oracle.random_x(3, 64)
    oracle.assert_identical(torch.compile(product, backend="aot_eager", fullgraph=True)(x), product(x))
    assert get_default_library() is get_default_library()


class Layer(nn.Module):
    def __init__(self, weights: Quantized) -> None:
        super().__init__()
        self.format = weights.format
        for name, tensor in zip(("w", "scales", "biases"), weights.tensors, strict=True):
            self.register_buffer(name, tensor)

    def forward(self, x: Tensor) -> Tensor:
        return qm.quantized_matmul(x, self.w, self.scales, self.biases, **self.format.options).relu()


@pytest.mark.parametrize("format", [AFFINE, MXFP4], ids=name_of)
def test_export(device: str, format: Format) -> None:
    """Exported with a symbolic batch, saved, loaded, and run on another batch size."""
    layer = Layer(oracle.random_quantized(format, 64, 128).to(device))
    x = oracle.random_x(4, 128).to(device)
    program = torch.export.export(layer, (x,), dynamic_shapes={"x": {0: torch.export.Dim("rows", min=2)}})
    targets = [node.target for node in program.graph.nodes]
    assert ops.quantized_matmul.default in targets
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for rows in (4, 11):
        x = oracle.random_x(rows, 128).to(device)
        oracle.assert_identical(loaded(x), layer(x))


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_jit_trace() -> None:
    """A linear layer's trace serves any number of rows; an embedding says what else there is."""
    linear = qm.QuantizedLinear.from_linear(nn.Linear(64, 8))
    x = oracle.random_x(5, 64)
    oracle.assert_identical(torch.jit.trace(linear, (x[:2],))(x), linear(x))
    embedding = qm.QuantizedEmbedding.from_embedding(nn.Embedding(9, 64))
    message = r"torch\.jit\.trace is not supported; supported are torch\.export and"
    with pytest.raises(NotImplementedError, match=message):
        torch.jit.trace(embedding, (torch.tensor([1, 2]),))
    indices = torch.tensor([1, 8, 0])
    oracle.assert_identical(torch.export.export(embedding, (indices,)).module()(indices), embedding(indices))


# --- Sizes that depend on data ----------------------------------------------------------------------------------------


def _masked_calls(device: str) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Functions of x [6, 128] and of a mask of its rows, whose products have sizes that only the mask tells."""
    plain = oracle.random_quantized(AFFINE, 64, 128).to(device)
    experts = oracle.random_quantized(AFFINE, 3, 64, 128).to(device)
    one = oracle.random_quantized(AFFINE, 1, 64, 128).to(device)
    nvfp4 = oracle.random_quantized(NVFP4, 3, 64, 128).to(device)
    global_scales = torch.tensor([700.0, 900.0, 800.0], device=device)
    marlin = tuple(None if t is None else t.to(device) for t in random_packed("int4", 64, 24, 32))
    marlin_one = tuple(t[None] for t in marlin)
    marlin_options = {"transpose": False, "group_size": 32, "bits": 4, "mode": "marlin_int4"}
    fp4 = tuple(t.to(device) for t in random_packed("fp4", 64, 24, 32)[:2])
    library = MetalKernelLibrary(device)
    pair = torch.tensor([[2, 0]], device=device)

    def cycle(rows: Tensor) -> Tensor:
        return torch.arange(rows.shape[0], device=device) % 3

    def kept(mask: Tensor) -> tuple[Tensor, ...]:
        """The experts that the mask keeps; torch has no indexing of uint32 on CPU."""
        return tuple((t.view(torch.int32) if t.dtype == torch.uint32 else t)[mask[:3]] for t in experts.tensors)

    return {
        "rows": lambda x, m: qm.quantized_matmul(x[m], *plain.tensors),
        "batch of one w": lambda x, m: qm.quantized_matmul(x[m][:, None], *one.tensors),
        "batch of three w": lambda x, m: qm.quantized_matmul(x[m][:, None, None], *experts.tensors),
        "rows of each matrix": lambda x, m: qm.quantized_matmul(x[m][None], *experts.tensors),
        "not transposed": lambda x, m: qm.quantized_matmul(x[m][:, None, :64], *one.tensors, False),
        "number of w": lambda x, m: qm.quantized_matmul(x, *kept(m)),
        "marlin": lambda x, m: qm.quantized_matmul(x[m][:, None, :64], *marlin_one, **marlin_options),
        "marlin_gemm_int4": lambda x, m: marlin_gemm_int4(x[m][:, :64], *marlin, 32),
        "dispatch_gemm_fp4": lambda x, m: dispatch_gemm_fp4(library, x[m][:, :64], *fp4, x[m].shape[0], 24, 64, 32),
        "gather": lambda x, m: qm.gather_qmm(x[m][:, None], *experts.tensors, rhs_indices=cycle(x[m])),
        "gather pairs": lambda x, m: qm.gather_qmm(x[m][:, None, None], *experts.tensors, rhs_indices=pair),
        "gather lhs": lambda x, m: qm.gather_qmm(x[:, None], *experts.tensors, m.nonzero(), rhs_indices=pair),
        "gather global scales": lambda x, m: qm.gather_qmm(
            x[m][:, None], *nvfp4.tensors, rhs_indices=cycle(x[m]), mode="nvfp4", global_scale=global_scales
        ),
        "gather marlin": lambda x, m: qm.gather_qmm(
            x[m][:, None, :64], *marlin_one, rhs_indices=0 * cycle(x[m]), **marlin_options
        ),
        "affine_qmv": lambda x, m: qm.affine_qmv(x[m][:, None], *plain.tensors, 64, 64, 4),
        "affine_qmm_n": lambda x, m: qm.affine_qmm_n(x[m][:, :64], *plain.tensors, 128, 64, 4),
        "rhs_nax": lambda x, m: qm.affine_gather_qmm_rhs_nax(x[m], *experts.tensors, cycle(x[m]), 64, 64, 4),
        "nvfp4_qmm_t": lambda x, m: qm.nvfp4_qmm_t(x[m], nvfp4.w[0], nvfp4.scales[0]),
        "quantize": lambda x, m: qm.dequantize(*qm.quantize(x[m])),
        "quantize marlin": lambda x, m: qm.dequantize(
            *qm.quantize(x[m].T, 64, 4, "marlin_int4"), 64, 4, mode="marlin_int4"
        ),
    }


MASKED_CALLS = tuple(_masked_calls("cpu"))
MASKS = ([1, 0, 1, 1, 0, 1], [0, 0, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0])


class Masked(nn.Module):
    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.function(x, mask)


def _masks(name: str, device: str) -> list[Tensor]:
    masks = [torch.tensor(mask, dtype=torch.bool, device=device) for mask in MASKS]
    # The batches of x and w, traced as equal or as two that broadcast, remain what they were.
    return masks[:1] if name == "number of w" else masks


@pytest.mark.parametrize("name", MASKED_CALLS)
def test_export_with_sizes_that_depend_on_data(device: str, name: str) -> None:
    """As torch.matmul does: nothing is asked of a size that is not known, and the program runs with any."""
    function = _masked_calls(device)[name]
    x = oracle.random_x(6, 128).to(device)
    masks = _masks(name, device)
    program = torch.export.export(Masked(function), (x, masks[0])).module()
    for mask in masks:
        oracle.assert_identical(program(x, mask), function(x, mask), f"{name}, mask {mask.tolist()}")


@pytest.mark.parametrize("name", [name for name in MASKED_CALLS if not name.startswith("quantize")])
def test_compile_with_sizes_that_depend_on_data(device: str, name: str) -> None:
    """Forward and backward, in one graph."""
    function = _masked_calls(device)[name]

    def gradient(function: Callable[..., Tensor], mask: Tensor) -> tuple[Tensor, Tensor]:
        x = oracle.random_x(6, 128).to(device).requires_grad_()
        y = function(x, mask)
        return y.detach(), torch.autograd.grad(y.square().sum(), x)[0]

    torch._dynamo.reset()
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=True)
        for mask in _masks(name, device):
            for ours, expected in zip(gradient(compiled, mask), gradient(function, mask), strict=True):
                torch.testing.assert_close(ours, expected)


def test_sizes_that_turn_out_not_to_fit_raise(device: str) -> None:
    """What tracing took for granted is asserted when the program runs."""
    experts = oracle.random_quantized(AFFINE, 3, 64, 128).to(device)
    x = oracle.random_x(6, 128).to(device)
    masks = [torch.tensor(mask, dtype=torch.bool, device=device) for mask in MASKS]
    masked = Masked(lambda x, m: qm.quantized_matmul(x[m][:, None], *experts.tensors))
    three = torch.tensor([1, 0, 1, 1, 0, 0], dtype=torch.bool, device=device)
    program = torch.export.export(masked, (x, three)).module()
    oracle.assert_identical(program(x, three), masked(x, three))
    with pytest.raises((RuntimeError, ValueError), match=r"u0|broadcast"):
        program(x, masks[0])


# --- Autocast ---------------------------------------------------------------------------------------------------------

PRODUCTS = [name for name, call in CALLS.items() if call.op not in ("quantize", "dequantize") and "empty" not in name]


def _cast(call: Call, dtype: torch.dtype) -> Call:
    """The operands as autocast gives them to a product: x and affine scales and biases in its dtype."""
    affine = call.op.startswith("affine") or call.kwargs.get("mode") == "affine"
    last = 4 if affine else 1
    args = [
        a.to(dtype) if i < last and isinstance(a, Tensor) and a.is_floating_point() else a
        for i, a in enumerate(call.args)
    ]
    return Call(call.op, tuple(args), call.kwargs)


@pytest.mark.parametrize("name", PRODUCTS)
def test_autocast_gives_products_its_dtype(device: str, name: str) -> None:
    """As nn.Linear: the result is that of operands in autocast's dtype, without autocast."""
    dtype = torch.float16 if "bfloat16" in name or "batched" in name else torch.bfloat16
    call = CALLS[name].on(device)
    plain, expected = call.run(), _cast(call, dtype).run()
    assert expected.dtype == dtype
    with torch.autocast(device, dtype=dtype):
        oracle.assert_identical(call.run(), expected)
        with torch.autocast(device, enabled=False):
            oracle.assert_identical(call.run(), plain)
            assert plain.dtype == call.args[0].dtype
        oracle.assert_identical(call.run(), expected)


def test_autocast_leaves_conversions_alone(device: str) -> None:
    for name, case in CALLS.items():
        if case.op not in ("quantize", "dequantize"):
            continue
        call = case.on(device)
        expected = call.run()
        with torch.autocast(device, dtype=torch.bfloat16):
            ours = call.run()
        pairs = zip(ours, expected, strict=True) if isinstance(ours, tuple) else [(ours, expected)]
        for one, other in pairs:
            oracle.assert_identical(one, other, name)


@pytest.mark.parametrize("gathered", [False, True], ids=["matmul", "gather"])
def test_gradients_under_autocast(device: str, gathered: bool) -> None:
    """Leaves get gradients of their own dtype, those of the product in autocast's; so also where a backward pass
    itself runs under autocast."""
    weights = oracle.random_quantized(AFFINE, 2, 64, 128).to(device)
    x = oracle.random_x(5, 1, 128).to(device)
    rhs = torch.tensor([0, 1, 0, 0, 1], device=device)

    def product(x: Tensor, scales: Tensor, biases: Tensor) -> Tensor:
        if gathered:
            return qm.gather_qmm(x, weights.w, scales, biases, rhs_indices=rhs)
        return qm.quantized_matmul(x, weights.w[0], scales[0], biases[0])

    def gradients(forward: bool, backward: bool, dtype: torch.dtype | None = None) -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in (x, weights.scales, weights.biases)]
        with torch.autocast(device, dtype=torch.bfloat16, enabled=forward):
            y = product(*(leaf.to(dtype) for leaf in leaves) if dtype else leaves)
        with torch.autocast(device, dtype=torch.bfloat16, enabled=backward):
            return [y, *torch.autograd.grad(y, leaves, torch.ones_like(y))]

    expected = gradients(False, False, torch.bfloat16)
    assert [t.dtype for t in expected] == [torch.bfloat16, *[torch.float32] * 3]
    for backward in (False, True):
        for ours, reference in zip(gradients(True, backward), expected, strict=True):
            oracle.assert_identical(ours, reference)
    for ours, reference in zip(gradients(False, True), gradients(False, False), strict=True):
        oracle.assert_identical(ours, reference)


def test_autocast_and_a_buffer_of_its_dtype(device: str) -> None:
    """What routed experts do: results are added to the rows of a buffer that has the dtype of other layers' results."""
    weights = oracle.random_quantized(AFFINE, 64, 128).to(device)
    x, rows = oracle.random_x(5, 128).to(device), torch.tensor([2, 0, 1, 2, 0], device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        y = qm.quantized_matmul(x, *weights.tensors)
        buffer = torch.zeros(3, 64, dtype=nn.Linear(128, 64, device=device)(x).dtype, device=device)
        buffer.index_add_(0, rows, y)
    reference = torch.zeros(3, 64, dtype=torch.float64).index_add_(0, rows.cpu(), y.cpu().double())
    oracle.assert_within(buffer, reference, 2 * torch.finfo(torch.bfloat16).eps * y.abs().sum().cpu())


def test_autocast_in_traced_programs(device: str) -> None:
    weights = oracle.random_quantized(AFFINE, 64, 128).to(device)
    x = oracle.random_x(5, 128).to(device)

    def product(x: Tensor) -> Tensor:
        with torch.autocast(device, dtype=torch.bfloat16):
            return qm.quantized_matmul(x, *weights.tensors) * 2

    expected = product(x)
    assert expected.dtype == torch.bfloat16
    torch._dynamo.reset()
    oracle.assert_identical(torch.compile(product, backend="aot_eager", fullgraph=True)(x), expected)
    with torch.autocast(device, dtype=torch.bfloat16):
        plain = torch.compile(qm.affine_qmm_t, backend="aot_eager", fullgraph=True)
        oracle.assert_identical(2 * plain(x, *weights.tensors, 64, 4), expected)


# --- Gradients --------------------------------------------------------------------------------------------------------


def _dense(elements: Tensor, scales: Tensor, biases: Tensor | None, group_size: int) -> Tensor:
    """Dequantization in torch operations, differentiable in scales and biases."""
    groups = elements.to(scales.dtype).unflatten(-1, (-1, group_size)) * scales[..., None]
    return (groups if biases is None else groups + biases[..., None]).flatten(-2)


class Leaves:
    """x, scales and biases of one product, and the same product composed of torch operations in any dtype."""

    def __init__(self, x: Tensor, weights: Quantized, product: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.x, self.weights, self.product = x, weights, product
        codes = oracle.unpack(weights.w, weights.format.bits)
        self.elements = torch.from_numpy(oracle.decode_elements(codes, weights.format.mode))
        self.decoded = torch.from_numpy(oracle.decode_scales(weights.scales, weights.format.mode))

    def composed(self, dtype: torch.dtype, upstream: Tensor) -> list[Tensor]:
        """Gradients of x and, in affine mode, of scales and biases."""
        affine = self.weights.format.is_affine
        x = self.x.to(dtype).requires_grad_()
        scales = self.decoded.to(dtype).requires_grad_(affine)
        biases = self.weights.biases.to(dtype).requires_grad_() if affine else None
        y = self.product(x, _dense(self.elements, scales, biases, self.weights.format.group_size))
        return list(torch.autograd.grad(y, [x, scales, biases] if affine else [x], upstream.to(dtype)))

    def ours(self, device: str, call: Callable[..., Tensor], upstream: Tensor) -> list[Tensor]:
        affine = self.weights.format.is_affine
        x = self.x.to(device).requires_grad_()
        w, scales, biases = self.weights.to(device).tensors
        leaves = [x, scales.requires_grad_(), biases.requires_grad_()] if affine else [x]
        grads = torch.autograd.grad(call(x, w, scales, biases), leaves, upstream.to(device))
        assert [grad.dtype for grad in grads] == [leaf.dtype for leaf in leaves]
        return list(grads)

    def check(self, device: str, call: Callable[..., Tensor], output_dtype: torch.dtype) -> None:
        """Our gradients are as near to float64's as twice those of the composition in the same dtype."""
        dense = _dense(self.elements, self.decoded, self.weights.biases, self.weights.format.group_size)
        shape = self.product(self.x.double(), dense.double()).shape
        upstream = torch.randn(shape, generator=oracle.generator(9)).to(output_dtype)
        exact = self.composed(torch.float64, upstream)
        in_dtype = self.composed(output_dtype, upstream)
        for name, ours, reference, other in zip(
            ("x", "scales", "biases"), self.ours(device, call, upstream), exact, in_dtype, strict=False
        ):
            largest = reference.abs().max() if reference.numel() else torch.zeros(())
            theirs = (other.double() - reference).abs().max() if reference.numel() else 0.0
            bound = 2 * theirs + (2 * torch.finfo(ours.dtype).eps + 32 * torch.finfo(torch.float32).eps) * largest
            oracle.assert_within(ours, reference, bound, f"gradient of {name}")


def _matmul_product(transpose: bool) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, dense: x @ (dense.mT if transpose else dense)


@TRANSPOSE
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("format", SOME_FORMATS, ids=name_of)
def test_gradients_of_quantized_matmul(device: str, format: Format, dtype: torch.dtype, transpose: bool) -> None:
    without = [(x_leading, ()) for x_leading in ((), (1,), (5,), (2, 3, 4), (0,))]
    for x_leading, w_leading in (*without, ((4,), (3,)), ((2, 1, 4), (3,)), ((2, 3, 4), (3,)), ((1, 4), (2, 3))):
        weights = oracle.random_quantized(format, *w_leading, 9, 2 * format.group_size, dtype=dtype)
        x = oracle.random_x(*x_leading, weights.matrix(transpose).shape[-2], dtype=dtype)
        Leaves(x, weights, _matmul_product(transpose)).check(
            device, lambda x, w, s, b: qm.quantized_matmul(x, w, s, b, transpose, **format.options), dtype
        )


def test_gradients_keep_the_dtype_of_each_argument(device: str) -> None:
    base = oracle.random_quantized(AFFINE, 9, 128)
    weights = Quantized(AFFINE, base.w, base.scales.bfloat16(), base.biases)
    x = oracle.random_x(5, 128, dtype=torch.float16)
    Leaves(x, weights, _matmul_product(True)).check(
        device, lambda x, w, s, b: qm.quantized_matmul(x, w, s, b, **AFFINE.options), torch.float32
    )


@pytest.mark.parametrize("transpose", [True, False])
def test_gradient_with_global_scale(device: str, transpose: bool) -> None:
    base = oracle.random_quantized(NVFP4, 48, 64)
    weights = Quantized(NVFP4, base.w, base.scales, None, torch.tensor(700.0)).to(device)
    matrix = weights.matrix(transpose)
    x = oracle.random_x(5, matrix.shape[0]).to(device).requires_grad_()
    y = qm.quantized_matmul(x, *weights.tensors, transpose, mode="nvfp4", global_scale=weights.global_scale)
    upstream = oracle.random_x(*y.shape, seed=4)
    (grad,) = torch.autograd.grad(y, x, upstream.to(device))
    oracle.assert_product(grad, upstream, matrix.mT, torch.float32)


def _gather_product(lhs: Tensor | None, rhs: Tensor | None, transpose: bool) -> Callable[[Tensor, Tensor], Tensor]:
    def product(x: Tensor, dense: Tensor) -> Tensor:
        x_flat, w_flat = x.flatten(0, -3), dense.flatten(0, -3)
        left = torch.arange(len(x_flat)).reshape(x.shape[:-2]) if lhs is None else lhs
        right = torch.arange(len(w_flat)).reshape(dense.shape[:-2]) if rhs is None else rhs
        left, right = torch.broadcast_tensors(left, right)
        matrices = w_flat[right]
        return x_flat[left] @ (matrices.mT if transpose else matrices)

    return product


@TRANSPOSE
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("format", SOME_FORMATS, ids=name_of)
def test_gradients_of_gather_qmm(device: str, format: Format, dtype: torch.dtype, transpose: bool) -> None:
    """Rows and experts used several times collect every contribution, unused ones get zero."""
    weights = oracle.random_quantized(format, 4, 9, 2 * format.group_size, dtype=dtype)
    K = weights.matrix(transpose).shape[-2]
    for x_batch, M, lhs, rhs, sorted_indices in (
        ((3,), 2, None, torch.tensor([2, 0, 2]), False),
        ((3,), 1, None, torch.tensor([0, 2, 2]), True),
        ((3,), 1, torch.tensor([2, 2, 0, 2]), torch.tensor([1, 1, 1, 3]), False),
        ((3, 1), 1, None, torch.tensor([[2, 0], [0, 2], [3, 3]]), False),
        ((5,), 2, torch.tensor([[0], [4]]), torch.tensor([[2, 0, 2]]), False),
        ((5,), 2, torch.tensor([3, 3, 1, 0]), None, False),
        ((4,), 2, None, None, False),
        ((3,), 2, torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64), False),
    ):
        x = oracle.random_x(*x_batch, M, K, dtype=dtype)
        indices = {"lhs_indices": lhs, "rhs_indices": rhs}
        options = {name: None if index is None else index.to(device) for name, index in indices.items()}
        options |= {"transpose": transpose, "sorted_indices": sorted_indices, **format.options}
        call = functools.partial(qm.gather_qmm, **options)
        Leaves(x, weights, _gather_product(lhs, rhs, transpose)).check(device, call, dtype)


@pytest.mark.parametrize("name", _explicit_calls())
def test_gradients_of_explicit_ops(device: str, name: str) -> None:
    call = _explicit_calls()[name]
    x, w, scales, *rest = call.args
    format = next((f for f in FLOAT_FORMATS if name.startswith(f.mode)), AFFINE)
    weights = Quantized(format, w, scales, rest[0] if format.is_affine else None)
    more = [value.to(device) if isinstance(value, Tensor) else value for value in rest[1 if format.is_affine else 0 :]]
    product = _matmul_product("_n" not in name.removesuffix("_nax"))
    if "gather" in name:
        indices = rest[1]
        product = lambda x, dense: (x[:, None] @ dense[indices].mT)[:, 0]  # noqa: E731

    def ours(x: Tensor, w: Tensor, s: Tensor, b: Tensor | None) -> Tensor:
        tensors = (x, w, s) if b is None else (x, w, s, b)
        return getattr(qm, name)(*tensors, *more, **call.kwargs)

    Leaves(x, weights, product).check(device, ours, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("stored", DTYPES, ids=name_of)
def test_gradients_of_dequantize(device: str, stored: torch.dtype, dtype: torch.dtype) -> None:
    for format in (f for f in SOME_FORMATS if f.is_affine):
        weights = oracle.random_quantized(format, 3, 5, 4 * format.group_size, dtype=stored)
        on = weights.to(device)
        scales, biases = on.scales.requires_grad_(), on.biases.requires_grad_()
        dense = qm.dequantize(on.w, scales, biases, **format.options, dtype=dtype)
        upstream = oracle.random_x(*dense.shape, dtype=dtype)
        grads = torch.autograd.grad(dense, [scales, biases], upstream.to(device))
        groups = upstream.double().unflatten(-1, (-1, format.group_size))
        codes = torch.from_numpy(oracle.unpack(weights.w, format.bits)).double().unflatten(-1, (-1, format.group_size))
        for grad, terms in zip(grads, (groups * codes, groups), strict=True):
            assert grad.dtype == stored
            # Each term may be rounded to dtype, and the sum to the stored dtype.
            rounding = torch.finfo(dtype).eps * terms.abs().sum(-1) + torch.finfo(stored).eps * terms.sum(-1).abs()
            oracle.assert_within(grad, terms.sum(-1), rounding, str(format))


def test_backward_twice_through_one_input(device: str) -> None:
    """x feeds two products and a sum; its gradient is the sum of all three."""
    weights = oracle.random_quantized(AFFINE, 128, 128).to(device)
    matrix = weights.matrix(True)
    x = oracle.random_x(5, 128)
    ours = x.to(device).requires_grad_()
    y = qm.quantized_matmul(ours, *weights.tensors) + qm.quantized_matmul(ours, *weights.tensors, False) + ours
    upstream = oracle.random_x(5, 128, seed=4)
    y.backward(upstream.to(device), retain_graph=True)
    first = ours.grad.clone()
    oracle.assert_product(first, upstream, matrix.mT + matrix + torch.eye(128), torch.float32)
    y.backward(upstream.to(device))
    oracle.assert_identical(ours.grad, 2 * first)


def test_second_derivative(device: str) -> None:
    weights = oracle.random_quantized(AFFINE, 7, 128).to(device)
    matrix = weights.matrix(True)

    def second(x: Tensor, product: Callable[[Tensor], Tensor]) -> Tensor:
        x = x.requires_grad_()
        (first,) = torch.autograd.grad(product(x).pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    ours = second(oracle.random_x(3, 128).to(device), lambda x: qm.quantized_matmul(x, *weights.tensors))
    reference = second(oracle.random_x(3, 128).double(), lambda x: x @ matrix)
    oracle.assert_within(ours, reference, 1e-4 * reference.abs().max())


def test_gradients_only_where_asked(device: str) -> None:
    weights = oracle.random_quantized(AFFINE, 7, 128).to(device)
    x = oracle.random_x(3, 128).to(device)
    assert not qm.quantized_matmul(x, *weights.tensors).requires_grad
    with torch.no_grad():
        assert not qm.quantized_matmul(x.clone().requires_grad_(), *weights.tensors).requires_grad
    with torch.inference_mode():
        assert qm.quantized_matmul(x, *weights.tensors).is_inference()
    for wanted in ("x", "scales", "biases"):
        leaves = {"x": x.clone(), "scales": weights.scales.clone(), "biases": weights.biases.clone()}
        leaves[wanted].requires_grad_()
        y = qm.quantized_matmul(leaves["x"], weights.w, leaves["scales"], leaves["biases"])
        y.sum().backward()
        assert {name for name, leaf in leaves.items() if leaf.grad is not None} == {wanted}
        assert weights.w.grad is None


def test_quantized_parameters_are_constants(device: str) -> None:
    """Rounding has no useful derivative; quantizing a layer's weight gives tensors that are ready to use."""
    parts = qm.quantize(torch.nn.Linear(128, 4).to(device).weight)
    assert not any(part.requires_grad for part in parts)


@pytest.mark.parametrize("op", ["quantized_matmul", "gather_qmm", "dequantize"])
def test_forward_mode_is_refused_and_not_dropped(op: str, device: str) -> None:
    weights = oracle.random_quantized(AFFINE, 7, 128).to(device)
    x = oracle.random_x(3, 128).to(device)
    calls = {
        "quantized_matmul": lambda x, scales: qm.quantized_matmul(x, weights.w, scales, weights.biases),
        "gather_qmm": lambda x, scales: qm.gather_qmm(
            x, weights.w, scales, weights.biases, rhs_indices=torch.zeros(1, dtype=torch.int64, device=device)
        ),
        "dequantize": lambda x, scales: qm.dequantize(weights.w, scales, weights.biases),
    }
    tangents = (torch.ones_like(x), torch.ones_like(weights.scales))
    with pytest.raises(NotImplementedError, match=rf"\[{op}\] forward-mode"):
        torch.func.jvp(calls[op], (x, weights.scales), tangents)


def test_gradients_of_empty_results_are_zeros(device: str) -> None:
    weights = oracle.random_quantized(AFFINE, 7, 128).to(device)
    x = oracle.random_x(3, 128).to(device).requires_grad_()
    scales = weights.scales[:0].clone().requires_grad_()
    qm.quantized_matmul(x, weights.w[:0], scales, weights.biases[:0]).sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))
    assert scales.grad.shape == scales.shape

    scales = weights.scales[None].clone().requires_grad_()
    none = torch.zeros(0, dtype=torch.int64, device=device)
    qm.gather_qmm(x, weights.w[None], scales, weights.biases[None], rhs_indices=none).sum().backward()
    assert torch.equal(scales.grad, torch.zeros_like(scales))


def test_gather_compiles_with_a_number_of_rows_that_data_decide(device: str) -> None:
    weights = oracle.random_quantized(AFFINE, 7, 128).to(device)

    def routed(x: Tensor, chosen: Tensor) -> Tensor:
        rows = x[chosen.nonzero().squeeze(1)].unsqueeze(1)
        experts = torch.zeros(rows.shape[0], dtype=torch.int64, device=device)
        return qm.gather_qmm(rows, weights.w[None], weights.scales[None], weights.biases[None], rhs_indices=experts)

    x = oracle.random_x(6, 128).to(device)
    chosen = torch.tensor([True, False, True, True, False, True], device=device)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(routed, backend="aot_eager", fullgraph=True)
        oracle.assert_identical(compiled(x, chosen), routed(x, chosen))


# --- Threads ----------------------------------------------------------------------------------------------------------


def test_calls_from_many_threads(device: str) -> None:
    called = ("quantized_matmul", "gather_qmm", "dequantize")
    calls = [call.on(device) for call in CALLS.values() if call.op in called]
    expected = [call.run() for call in calls]
    with ThreadPoolExecutor(4) as pool:
        for results in pool.map(lambda _: [call.run() for call in calls], range(12)):
            for result, reference in zip(results, expected, strict=True):
                oracle.assert_identical(result, reference)
