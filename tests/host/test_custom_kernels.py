"""fast.metal_kernel: bodies in the forms that MLX's documentation and code for it use, compared with torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from devices import DEVICES
from quantization_mlx.fast import metal_kernel

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


# --- One thread for an element ---------------------------------------------------------------------------------------


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


def test_positions_of_three_axes(device: str) -> None:
    kernel = metal_kernel(
        name="positions",
        input_names=["x"],
        output_names=["out"],
        source="""
            uint3 at = thread_position_in_grid;
            size_t row = at.y + size_t(threads_per_grid.y) * at.z;
            out[row * threads_per_grid.x + at.x] = x[elem_to_loc(at, x_shape, x_strides, x_ndim)];
        """,
        ensure_row_contiguous=False,
    )
    x = random(2, 3, 5, 7).to(device).permute(3, 0, 2, 1)
    sizes = (x.shape[3], x.shape[2], x.shape[0] * x.shape[1])
    (y,) = kernel(inputs=[x], grid=sizes, threadgroup=(2, 4, 8), output_shapes=[x.shape], output_dtypes=[torch.float32])
    torch.testing.assert_close(y.cpu(), x.cpu().contiguous(), rtol=0, atol=0)


def test_scalars_header_and_template_numbers(device: str) -> None:
    kernel = metal_kernel(
        name="scaled",
        input_names=["x", "scale", "shift", "flag"],
        output_names=["out"],
        header="template <typename T> T squared(T x) { return x * x; }",
        source="""
            uint i = thread_position_in_grid.x;
            float y = scale * squared(x[i]) + shift + N;
            out[i] = (Negative && flag) ? -y : y;
        """,
    )
    x = random(40)
    template = [("N", 3), ("Negative", True)]
    y = elementwise(kernel, x.to(device), 0.5, -2, True, like=x, template=template)
    torch.testing.assert_close(y, -(0.5 * x * x + 1), rtol=1e-6, atol=1e-6)


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


def test_several_outputs_of_other_dtypes(device: str) -> None:
    kernel = metal_kernel(
        name="parts",
        input_names=["x"],
        output_names=["whole", "is_negative", "bits"],
        source="""
            uint i = thread_position_in_grid.x;
            whole[i] = int64_t(x[i]) << 33;
            is_negative[i] = x[i] < 0;
            bits[i] = as_type<uint>(x[i]);
        """,
    )
    x = 10 * random(33)
    whole, negative, bits = kernel(
        inputs=[x.to(device)],
        grid=(33, 1, 1),
        threadgroup=(8, 1, 1),
        output_shapes=[(33,), (3, 11), (33,)],
        output_dtypes=[torch.int64, torch.bool, torch.uint32],
    )
    assert torch.equal(whole.cpu(), x.trunc().long() * 2**33)
    assert torch.equal(negative.cpu(), (x < 0).reshape(3, 11))
    assert torch.equal(bits.cpu().view(torch.float32), x)


# --- Threads together ------------------------------------------------------------------------------------------------


def test_sum_of_a_simdgroup(device: str) -> None:
    kernel = metal_kernel(
        name="row_sums",
        input_names=["x"],
        output_names=["out"],
        source="""
            uint row = threadgroup_position_in_grid.x * simdgroups_per_threadgroup + simdgroup_index_in_threadgroup;
            float sum = 0;
            for (int k = thread_index_in_simdgroup; k < x_shape[1]; k += threads_per_simdgroup) {
              sum += x[row * x_shape[1] + k];
            }
            sum = simd_sum(sum);
            if (thread_index_in_simdgroup == 0) out[row] = sum;
        """,
    )
    x = random(4, 70)
    (y,) = kernel(
        inputs=[x.to(device)],
        grid=(4 * 32, 1, 1),
        threadgroup=(64, 1, 1),
        output_shapes=[(4,)],
        output_dtypes=[torch.float32],
    )
    torch.testing.assert_close(y.cpu(), x.double().sum(1).float(), rtol=1e-5, atol=1e-5)


def test_softmax_in_threadgroup_memory(device: str) -> None:
    kernel = metal_kernel(
        name="softmax",
        input_names=["x"],
        output_names=["out"],
        source="""
            threadgroup float parts[4];
            uint row = threadgroup_position_in_grid.y, lane = thread_position_in_threadgroup.x;
            float value = x[row * 128 + lane];
            float most = simd_max(value);
            if (thread_index_in_simdgroup == 0) parts[simdgroup_index_in_threadgroup] = most;
            threadgroup_barrier(mem_flags::mem_threadgroup);
            most = max(max(parts[0], parts[1]), max(parts[2], parts[3]));
            threadgroup_barrier(mem_flags::mem_threadgroup);
            float part = metal::precise::exp(value - most);
            float sum = simd_sum(part);
            if (thread_index_in_simdgroup == 0) parts[simdgroup_index_in_threadgroup] = sum;
            threadgroup_barrier(mem_flags::mem_threadgroup);
            out[row * 128 + lane] = part / (parts[0] + parts[1] + parts[2] + parts[3]);
        """,
    )
    x = random(3, 128)
    (y,) = kernel(
        inputs=[x.to(device)],
        grid=(128, 3, 1),
        threadgroup=(128, 1, 1),
        output_shapes=[x.shape],
        output_dtypes=[x.dtype],
    )
    torch.testing.assert_close(y.cpu(), x.double().softmax(1).float(), rtol=1e-5, atol=1e-6)


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


def test_padded_channels_and_sums_before_atomics(device: str) -> None:
    """As the gradient of MLX's grid_sample example does it."""
    kernel = metal_kernel(
        name="channel_sums",
        input_names=["x"],
        output_names=["sums"],
        source="""
            int C = x_shape[1];
            int padded = ceildiv(C, threads_per_simdgroup) * threads_per_simdgroup;
            uint row = thread_position_in_grid.x / padded;
            int channel = thread_position_in_grid.x % padded;
            float value = channel < C ? float(x[row * C + channel]) : 0.0f;
            value = simd_sum(value);
            if (thread_index_in_simdgroup == 0) {
              atomic_fetch_add_explicit(&sums[row], value, memory_order_relaxed);
            }
        """,
        atomic_outputs=True,
    )
    x = random(5, 40, dtype=torch.float16)
    (sums,) = kernel(
        inputs=[x.to(device)],
        grid=(5 * 64, 1, 1),
        threadgroup=(64, 1, 1),
        output_shapes=[(5,)],
        output_dtypes=[torch.float32],
        init_value=0,
    )
    torch.testing.assert_close(sums.cpu(), x.double().sum(1).float(), rtol=1e-4, atol=1e-4)


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
