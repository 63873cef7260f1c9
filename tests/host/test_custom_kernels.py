"""fast.metal_kernel, and dispatch_kernel on the same bodies (support/custom_kernels.py), compared with torch."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from custom_kernels import KERNELS
from devices import DEVICES
from quantization_mlx.fast import metal_kernel
from quantization_mlx.marlin import MetalKernelLibrary, dispatch_kernel

GPUS = [name for name in DEVICES if name != "cpu"][-1:]
pytestmark = pytest.mark.parametrize("device", GPUS, indirect=True)


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(7)).to(dtype)


def elementwise(kernel, *inputs, like: Tensor, threads: int = 256, **options) -> Tensor:
    """One output of the shape and the dtype of `like`, a thread for each element."""
    options = {"output_shapes": [tuple(like.shape)], "output_dtypes": [like.dtype], **options}
    (result,) = kernel(inputs=list(inputs), grid=(like.numel(), 1, 1), threadgroup=(threads, 1, 1), **options)
    assert result.device.type == "mps"
    return result.cpu()


# --- As in MLX's documentation, and in code that uses it --------------------------------------------------------------


def on(device: str, value: Any) -> Any:
    """With its strides."""
    if not isinstance(value, Tensor):
        return value
    there = value.to(device)
    return (
        there
        if there.stride() == value.stride()
        else elements(value).to(device).as_strided(value.shape, value.stride())
    )


def elements(x: Tensor) -> Tensor:
    """All between a tensor's first and last one in memory, gaps included."""
    count = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.as_strided((count,), (1,))


def run_by_metal_kernel(device: str, name: str) -> list[Tensor]:
    """Its body alone; the printed source goes to standard output."""
    kernel = KERNELS[name]
    run = metal_kernel(
        name, list(kernel.inputs), list(kernel.outputs), kernel.source, kernel.header, **kernel.definition
    )
    return run(
        inputs=[on(device, value) for value in kernel.inputs.values()],
        template=list(kernel.template.items()),
        grid=kernel.grid,
        threadgroup=kernel.threadgroup,
        output_shapes=[like.shape for like in kernel.outputs.values()],
        output_dtypes=[like.dtype for like in kernel.outputs.values()],
        init_value=kernel.init_value,
        verbose=True,
    )


def run_by_dispatch_kernel(device: str, name: str, printed: str) -> list[Tensor]:
    """The whole source, as `verbose=True` prints it, on buffers."""
    kernel = KERNELS[name]
    function, source = re.search(r"source code for `(\w+)`:\n```\n(.*)```", printed, re.DOTALL).groups()
    library = MetalKernelLibrary(device)
    library.compile_source(name, source)
    buffers: list[Any] = []
    for input_name, value in kernel.inputs.items():
        value = on(device, value)
        buffers.append(elements(value) if isinstance(value, Tensor) else value)
        buffers += [facts for suffix, facts in facts_of(value) if f"{input_name}_{suffix}" in kernel.source]
    results = [torch.empty(like.shape, dtype=like.dtype, device=device) for like in kernel.outputs.values()]
    for result in results:
        if kernel.init_value is not None:
            result.copy_(torch.full(result.shape, kernel.init_value).to(result.dtype))
    groups = [threads // size for threads, size in zip(kernel.grid, kernel.threadgroup, strict=True)]
    dispatch_kernel(library, function, groups, kernel.threadgroup, [*buffers, *results])
    return results


def facts_of(value: Any) -> list[tuple[str, bytes]]:
    if not isinstance(value, Tensor):
        return []
    shape, strides = np.array(value.shape, np.int32), np.array(value.stride(), np.int64)
    return [("shape", shape.tobytes()), ("strides", strides.tobytes()), ("ndim", np.int32(value.dim()).tobytes())]


@pytest.mark.parametrize("name", KERNELS)
def test_kernels(device: str, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """In both ways, with the same body."""
    kernel = KERNELS[name]
    ours = run_by_metal_kernel(device, name)
    printed = capsys.readouterr().out
    assert kernel.source in printed
    for results in (ours, run_by_dispatch_kernel(device, name, printed)):
        for result, like, exact in zip(results, kernel.outputs.values(), kernel.references(), strict=True):
            assert result.device.type == "mps" and result.shape == like.shape and result.dtype == like.dtype
            if kernel.tolerance == 0:
                assert torch.equal(result.cpu(), exact)
            else:
                torch.testing.assert_close(result.cpu(), exact, rtol=kernel.tolerance, atol=kernel.tolerance)


# --- Variants --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_template_of_a_dtype(device: str, dtype: torch.dtype) -> None:
    kernel = metal_kernel(
        name="exponential",
        input_names=["inp"],
        output_names=["out"],
        source="uint elem = thread_position_in_grid.x; T x = inp[elem]; out[elem] = T(metal::exp(float(x)));",
    )
    x = random(3, 17, dtype=dtype)
    y = elementwise(kernel, x.to(device), like=x, template=[("T", dtype)])
    torch.testing.assert_close(y, x.float().exp().to(dtype), rtol=1e-2 if dtype != torch.float32 else 1e-6, atol=0)


@pytest.mark.parametrize("contiguous", [True, False])
def test_strided_inputs(device: str, contiguous: bool) -> None:
    kernel = metal_kernel(
        name="strided",
        input_names=["inp"],
        output_names=["out"],
        source="""
            uint elem = thread_position_in_grid.x;
            uint loc = elem_to_loc(elem, inp_shape, inp_strides, inp_ndim);
            out[elem] = 2 * inp[loc];
        """,
        ensure_row_contiguous=contiguous,
    )
    x = random(4, 6, 5).to(device)[1:, ::2].transpose(0, 2)
    torch.testing.assert_close(elementwise(kernel, x, like=x), 2 * x.cpu(), rtol=0, atol=0)


@pytest.mark.parametrize("start", [0, 1, 3])
def test_small_inputs_are_constants_and_offsets_count(device: str, start: int) -> None:
    kernel = metal_kernel(
        name="small",
        input_names=["table", "x"],
        output_names=["out"],
        source="""
            constant const uint8_t* row = table;
            uint i = thread_position_in_grid.x;
            out[i] = row[i % table_shape[0]] + x[i];
        """,
    )
    table = torch.arange(10, 20, dtype=torch.uint8)[start : start + 5]
    x = torch.arange(24, dtype=torch.uint8)[start:]
    table_there = torch.arange(10, 20, dtype=torch.uint8).to(device)[start : start + 5]
    x_there = torch.arange(24, dtype=torch.uint8).to(device)[start:]
    expected = table[torch.arange(len(x)) % 5] + x
    assert torch.equal(elementwise(kernel, table_there, x_there, like=x), expected)


@pytest.mark.parametrize(("dtype", "value"), [(torch.float32, 0.0), (torch.int32, 5), (torch.uint32, 7)])
def test_atomic_outputs_start_from_init_value(device: str, dtype: torch.dtype, value: float) -> None:
    kernel = metal_kernel(
        name="histogram",
        input_names=["bins"],
        output_names=["counts"],
        source="""
            uint i = thread_position_in_grid.x;
            atomic_fetch_add_explicit(&counts[bins[i]], 1, memory_order_relaxed);
        """,
        atomic_outputs=True,
    )
    bins = torch.arange(100) ** 2 % 7
    (counts,) = kernel(
        inputs=[bins.to(device)],
        grid=(100, 1, 1),
        threadgroup=(32, 1, 1),
        output_shapes=[(7,)],
        output_dtypes=[dtype],
        init_value=value,
    )
    assert torch.equal(counts.cpu().long(), bins.bincount(minlength=7) + int(value))


# --- Among torch's ops -----------------------------------------------------------------------------------------------

DOUBLE = "uint i = thread_position_in_grid.x; out[i] = 2 * inp[i];"


def double(device: str, **options):
    kernel = metal_kernel("double", ["inp"], ["out"], DOUBLE, **options)
    return lambda x: kernel(
        inputs=[x],
        grid=(max(x.numel(), 1), 1, 1),
        threadgroup=(32, 1, 1),
        output_shapes=[x.shape],
        output_dtypes=[x.dtype],
    )[0]


def test_runs_in_the_order_of_torchs_ops(device: str) -> None:
    kernel = double(device)
    x = random(50).to(device)
    y = kernel(kernel(x + 1) * 3) - x
    torch.testing.assert_close(y.cpu(), (12 * (x + 1) - x).cpu())


def test_compiled_code_calls_it(device: str) -> None:
    kernel = metal_kernel(
        name="doubled",
        input_names=["x"],
        output_names=["out"],
        source="out[thread_position_in_grid.x] = 2 * x[thread_position_in_grid.x];",
    )

    @torch.compile(backend="eager")
    def doubled_and_more(x: Tensor) -> Tensor:
        shapes = {"output_shapes": [x.shape], "output_dtypes": [x.dtype]}
        (y,) = kernel(inputs=[x * 1], grid=(x.numel(), 1, 1), threadgroup=(8, 1, 1), **shapes)
        return y + 1

    x = random(16).to(device)
    torch.testing.assert_close(doubled_and_more(x).cpu(), 2 * x.cpu() + 1)


def test_gradients_are_the_users(device: str) -> None:
    kernel = double(device)

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return kernel(x)

        @staticmethod
        def backward(ctx, gradient):
            return kernel(gradient)

    x = random(9).to(device).requires_grad_()
    Double.apply(x).sum().backward()
    assert x.grad.tolist() == [2.0] * 9
    with pytest.raises(NotImplementedError, match="double has no gradient"):
        kernel(x).sum().backward()


def test_verbose_prints_the_source(device: str, capsys: pytest.CaptureFixture[str]) -> None:
    kernel = metal_kernel("double", ["inp"], ["out"], DOUBLE, compile_options={"math_mode": "fast"})
    elementwise(kernel, random(8).to(device), like=random(8), verbose=True)
    printed = capsys.readouterr().out
    assert DOUBLE in printed and "uint3 thread_position_in_grid [[thread_position_in_grid]]" in printed


# --- What does not fit -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"inputs": []}, ValueError, "0 inputs are given for 1 names, inp"),
        ({"inputs": [torch.ones(9)]}, ValueError, r"input inp of shape \(9,\) is on cpu"),
        ({"inputs": ["x"]}, TypeError, "input inp is 'x'"),
        ({"inputs": [torch.ones((), dtype=torch.complex64)]}, TypeError, "complex64; supported are bool"),
        ({"output_shapes": []}, ValueError, "0 output_shapes are given for 1 names, out"),
        ({"output_dtypes": [torch.float64]}, TypeError, "output out has dtype torch.float64"),
        ({"grid": (0, 1, 1)}, ValueError, r"grid is \(0, 1, 1\)"),
        ({"grid": (2**33, 1, 1)}, ValueError, "a grid of 8589934592 threads"),
        ({"threadgroup": (1, 1)}, ValueError, r"threadgroup is \(1, 1\)"),
        ({"grid": (2048, 2, 1), "threadgroup": (1024, 2, 1)}, ValueError, "a threadgroup of 1024 x 2 x 1 threads"),
        ({"template": [("T", 1.5)]}, TypeError, "template argument T is 1.5"),
        ({"stream": "cpu"}, ValueError, "stream is 'cpu'"),
    ],
)
def test_wrong_arguments(device: str, changes: dict, error: type[Exception], message: str) -> None:
    kernel = metal_kernel("double", ["inp"], ["out"], DOUBLE)
    arguments = {
        "inputs": [torch.ones(9).to(device)],
        "grid": (9, 1, 1),
        "threadgroup": (9, 1, 1),
        "output_shapes": [(9,)],
        "output_dtypes": [torch.float32],
    }
    with pytest.raises(error, match=r"^\[metal_kernel\] .*" + message):
        kernel(**(arguments | changes))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("", ["x"], ["y"], ""), "name is empty"),
        (("f", ["x y"], ["y"], ""), "'x y' is no name"),
        (("f", ["x"], ["x"], ""), "'x' is no name for an argument, or that of two"),
        (("f", ["x"], [], ""), "f has no outputs"),
        (("f", ["x"], ["y"], "", "", True, False, {"math": "safe"}), "supported is math_mode"),
    ],
)
def test_wrong_definitions(device: str, arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=r"^\[metal_kernel\] .*" + message):
        metal_kernel(*arguments)


def test_the_compilers_message_has_the_line_of_the_body(device: str) -> None:
    kernel = metal_kernel("wrong", ["inp"], ["out"], "uint i = thread_position_in_grid.x;\nout[i] = inp[j];")
    with pytest.raises(RuntimeError, match=r"\[metal_kernel\] Metal does not compile wrong:\n(.*\n)*wrong:2:.*'j'"):
        elementwise(kernel, random(8).to(device), like=random(8))
    forget_the_compilers_error()


def forget_the_compilers_error() -> None:
    """Which is expected: the software device keeps what it finds wrong for the end of the test."""
    if GPUS != ["mps"]:
        from softmetal import mps

        mps.clear()
