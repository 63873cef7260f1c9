"""MetalKernelLibrary, dispatch_kernel and buffers, on Metal code of the tests' own."""

from __future__ import annotations

import ctypes
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from devices import DEVICES
from quantization_mlx import explain, fast
from quantization_mlx.marlin import (
    MetalKernelLibrary,
    dispatch_kernel,
    get_default_library,
    metal_buffer_to_numpy,
    mps_tensor_to_metal_buffer,
)

GPUS = [name for name in DEVICES if name != "cpu"][-1:]
on_a_gpu = pytest.mark.parametrize("device", GPUS, indirect=True)

SOURCE = """#include <metal_stdlib>
using namespace metal;

kernel void scale(
    device float* x [[buffer(0)]],
    constant float& factor [[buffer(1)]],
    constant int& shift [[buffer(2)]],
    uint i [[thread_position_in_grid]]) {
  x[i] = x[i] * factor + shift;
}

kernel void group_sums(
    const device float* x [[buffer(0)]],
    device float* sums [[buffer(1)]],
    uint i [[thread_position_in_grid]],
    uint lane [[thread_position_in_threadgroup]],
    uint group [[threadgroup_position_in_grid]],
    threadgroup float* shared [[threadgroup(0)]]) {
  shared[lane] = x[i];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (lane == 0) {
    float sum = 0;
    for (int k = 0; k < 16; ++k) {
      sum += shared[k];
    }
    sums[group] = sum;
  }
}

struct Range {
  uint start;
  ushort step;
  bool down;
};

kernel void ranges(constant Range& range [[buffer(0)]], device int* y [[buffer(1)]],
                   uint2 at [[thread_position_in_grid]], uint2 size [[threads_per_grid]]) {
  int value = range.start + range.step * (at.y * size.x + at.x);
  y[at.y * size.x + at.x] = range.down ? -value : value;
}

kernel void long_sum(device long* y [[buffer(0)]], constant long& a [[buffer(1)]], constant uint& b [[buffer(2)]]) {
  y[0] = a + b;
}
"""


@pytest.fixture
def library(device: str) -> MetalKernelLibrary:
    library = MetalKernelLibrary(device)
    library.compile_source("mine", SOURCE)
    return library


# --- Libraries -------------------------------------------------------------------------------------------------------


@on_a_gpu
def test_what_a_library_has(device: str, library: MetalKernelLibrary) -> None:
    names = ["group_sums", "long_sum", "ranges", "scale"]
    assert library.list_functions("mine") == names
    assert sorted(library.compile_source("again", SOURCE).functionNames()) == names
    other = MetalKernelLibrary(device)
    other.compile_source("mine", SOURCE)
    pipeline = library.get_pipeline("scale")
    assert pipeline.maxTotalThreadsPerThreadgroup() >= 32 and pipeline.threadExecutionWidth() == 32
    assert other.get_pipeline("scale", "mine").address == pipeline.address  # of the same source
    assert library.device.type == "mps" and library.command_queue.address != 0


@on_a_gpu
def test_threads_compile_a_source_once(device: str) -> None:
    source = "kernel void once(device float* x [[buffer(0)]]) { x[0] = 1; }"
    libraries = [MetalKernelLibrary(device) for _ in range(4)]

    def compiled(library: MetalKernelLibrary) -> int:
        library.compile_source("once", source)
        return library.get_pipeline("once").address

    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(compiled, libraries))) == 1


@on_a_gpu
def test_directories_with_headers(device: str, tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    (tmp_path / "common.h").write_text("#pragma once\nconstant int three = 3;\n")
    (tmp_path / "more" / "helpers.h").write_text('#include "common.h"\ninline int six() { return 2 * three; }\n')
    both = '#include "common.h"\n#include "helpers.h"\n'
    body = "kernel void six_and_three(device int* y [[buffer(0)]]) { y[0] = six() + three; }\n"
    (tmp_path / "more" / "sums.metal").write_text(both + body)
    (tmp_path / "plain.metal").write_text("kernel void one(device int* y [[buffer(0)]]) { y[0] = 1; }\n")
    library = MetalKernelLibrary.from_source_dir(tmp_path)
    assert library.list_functions("more/sums") == ["six_and_three"]
    y = torch.zeros(1, dtype=torch.int32, device=device)
    dispatch_kernel(library, "six_and_three", (1, 1, 1), (1, 1, 1), [y])
    assert y.item() == 9
    dispatch_kernel(library, "one", (1, 1, 1), (1, 1, 1), [y])
    assert y.item() == 1


@on_a_gpu
def test_the_packages_own_shaders(device: str) -> None:
    library = MetalKernelLibrary.from_source_dir()
    assert "rms_norm_float16" in library.list_functions("norm")
    assert library.get_pipeline("sort_pairs", "sort_pairs").maxTotalThreadsPerThreadgroup() >= 32


@on_a_gpu
def test_the_compilers_messages_have_file_and_line(device: str, tmp_path: Path) -> None:
    (tmp_path / "first.h").write_text("\n\n")
    (tmp_path / "wrong.metal").write_text('#include "first.h"\n\nkernel void f(device int* y) { y[0] = nothing; }\n')
    with pytest.raises(
        RuntimeError, match=r"\[from_source_dir\] Metal does not compile wrong:\n.*wrong.metal:3:.*noth"
    ):
        MetalKernelLibrary.from_source_dir(tmp_path)
    with pytest.raises(RuntimeError, match=r"\[compile_source\] Metal does not compile broken:\n(.*\n)*broken:2:"):
        MetalKernelLibrary(device).compile_source("broken", "\nkernel int f() {")
    forget_the_compilers_errors()


def forget_the_compilers_errors() -> None:
    """Which are expected: the software device keeps what it finds wrong for the end of the test."""
    if GPUS != ["mps"]:
        from softmetal import mps

        mps.clear()


@on_a_gpu
def test_libraries_and_files_that_are_not_there(device: str, library: MetalKernelLibrary, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\[list_functions\] there is no library 'yours'; there are 'mine'"):
        library.list_functions("yours")
    with pytest.raises(ValueError, match=r"\[get_pipeline\] mine has no kernel 'f'; it has .*scale"):
        library.get_pipeline("f", "mine")
    with pytest.raises(ValueError, match=r"\[get_pipeline\] no library has a kernel 'f'; there are 'mine'"):
        library.get_pipeline("f")
    with pytest.raises(ValueError, match=r"\[compile_source\] name is empty"):
        library.compile_source("", SOURCE)
    with pytest.raises(FileNotFoundError, match=r"there is no directory .*absent"):
        MetalKernelLibrary.from_source_dir(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match=r"has no .metal files"):
        MetalKernelLibrary.from_source_dir(tmp_path)
    (tmp_path / "f.metal").write_text('\n#include "absent.h"\n')
    with pytest.raises(FileNotFoundError, match=r'f.metal:2: there is no "absent.h"'):
        MetalKernelLibrary.from_source_dir(tmp_path)


def test_math_modes() -> None:
    with pytest.raises(ValueError, match=r"math_mode is 'exact'"):
        MetalKernelLibrary(math_mode="exact")


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(NotImplementedError, match=r"\[compile_source\] runs Metal code, which needs an Apple GPU"):
        MetalKernelLibrary().compile_source("mine", SOURCE)
    with pytest.raises(NotImplementedError, match=r"\[from_source_dir\] runs Metal code"):
        MetalKernelLibrary.from_source_dir()
    assert get_default_library() is get_default_library()


# --- Launches --------------------------------------------------------------------------------------------------------


@on_a_gpu
@pytest.mark.parametrize("wait", [True, False])
def test_tensors_are_changed_in_place_behind_torchs_ops(device: str, library: MetalKernelLibrary, wait: bool) -> None:
    whole = torch.arange(64.0, device=device)
    part = whole[16:48].view(4, 8)  # with an offset
    part += 1
    dispatch_kernel(library, "scale", (4, 1, 1), (8, 1, 1), [part, np.float32(0.5), -3], wait=wait)
    part *= 2
    expected = torch.arange(64.0)
    expected[16:48] = ((expected[16:48] + 1) * 0.5 - 3) * 2
    assert torch.equal(whole.cpu(), expected)


@on_a_gpu
def test_threadgroup_memory(device: str, library: MetalKernelLibrary) -> None:
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(3))
    sums = torch.empty(5, device=device)
    dispatch_kernel(library, "group_sums", (5, 1, 1), (16, 1, 1), [x.to(device), sums], threadgroup_memory=[64])
    torch.testing.assert_close(sums.cpu(), x.double().sum(1).float(), rtol=1e-5, atol=1e-5)


@on_a_gpu
@pytest.mark.parametrize("down", [False, True])
def test_structs_as_bytes(device: str, library: MetalKernelLibrary, down: bool) -> None:
    y = torch.empty(6, 8, dtype=torch.int32, device=device)
    fields = struct.pack("=IH?x", 5, 3, down)
    dispatch_kernel(library, "ranges", (2, 3, 1), (4, 2, 1), [fields, y])
    expected = 5 + 3 * torch.arange(48).view(6, 8)
    assert torch.equal(y.cpu().long(), -expected if down else expected)


@on_a_gpu
def test_integers_of_other_sizes(device: str, library: MetalKernelLibrary) -> None:
    y = torch.empty(1, dtype=torch.int64, device=device)
    dispatch_kernel(library, "long_sum", (1, 1, 1), (1, 1, 1), [y, np.int64(2**40), 2**32 - 1])
    assert y.item() == 2**40 + 2**32 - 1


@on_a_gpu
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"function_name": "f"}, ValueError, "no library has a kernel 'f'"),
        ({"grid": (1, 1)}, ValueError, r"scale's grid is \(1, 1\)"),
        ({"grid": (2**30, 1, 1)}, ValueError, "scale: a grid of 1073741824 threadgroups"),
        ({"threadgroup": (8, 0, 1)}, ValueError, r"scale's threadgroup is \(8, 0, 1\)"),
        ({"threadgroup": (1024, 2, 1)}, ValueError, "scale: a threadgroup of 1024 x 2 x 1 threads"),
        ({"buffers": 2}, ValueError, "scale: the kernel uses buffer 2, and 2 arguments are given"),
        ({"buffers": [1, 2, 3, 4]}, ValueError, "scale: 4 arguments are given and the kernel takes 3"),
        ({"buffers": [1.0, 2.0, 3]}, ValueError, "scale: the kernel takes buffer 0 to write to it"),
        ({"buffers": [torch.ones(8)]}, ValueError, "scale: buffer 0 is a tensor on cpu"),
        ({"buffers": "transposed"}, ValueError, r"scale: buffer 0 is a tensor of shape \(2, 4\) and strides \(1, 2\)"),
        ({"buffers": "empty"}, ValueError, r"scale: buffer 0 is a tensor of shape \(0,\), which has no memory"),
        ({"buffers": [b"x" * 4097]}, ValueError, "scale: buffer 0 has 4097 bytes"),
        ({"buffers": [2**40]}, ValueError, "scale: buffer 0 is 1099511627776, which 32 bits do not hold"),
        ({"buffers": ["x"]}, TypeError, "scale: buffer 0 is a str"),
        ({"threadgroup_memory": [20]}, ValueError, r"scale: threadgroup_memory is \[20\]"),
        ({"threadgroup_memory": [2**15, 16]}, ValueError, r"scale: threadgroup_memory is \[32768, 16\]"),
    ],
)
def test_what_does_not_fit(
    device: str, library: MetalKernelLibrary, changes: dict, error: type[Exception], message: str
) -> None:
    x = torch.ones(8, device=device)
    named = {"transposed": [x.view(4, 2).T], "empty": [x[:0]], 2: [x, 1.0]}
    arguments = {"function_name": "scale", "grid": (1, 1, 1), "threadgroup": (8, 1, 1), "buffers": [x, 2.0, 1]}
    arguments |= changes
    if not isinstance(arguments["buffers"], list):
        arguments["buffers"] = named[arguments["buffers"]]
    with pytest.raises(error, match=r"^\[dispatch_kernel\] " + message):
        dispatch_kernel(library, **arguments)
    assert x.tolist() == [1.0] * 8


# --- Function constants ----------------------------------------------------------------------------------------------

SPECIALISED = """#include <metal_stdlib>
constant bool doubled [[function_constant(0)]];
constant int shift [[function_constant(3)]];
constant uchar step [[function_constant(4)]];
constant half factor [[function_constant(7)]];
constant float start [[function_constant(8)]];
constant float from = is_function_constant_defined(start) ? start : 100.0f;

kernel void line(device float* y [[buffer(0)]], uint i [[thread_position_in_grid]]) {
  const float value = from + shift + float(factor) * (step * i);
  y[i] = doubled ? 2 * value : value;
}

constant int2 place [[function_constant(9)]];
kernel void at_a_place(device float* y [[buffer(0)]]) { y[place.x] = place.y; }

kernel void plain(device float* y [[buffer(0)]]) { y[0] = 1; }
"""
NEEDED = {"doubled": True, "shift": -3, "step": 2, "factor": 0.5}


@pytest.fixture
def specialised(device: str) -> MetalKernelLibrary:
    library = MetalKernelLibrary(device)
    library.compile_source("lines", SPECIALISED)
    return library


@on_a_gpu
@pytest.mark.parametrize(
    ("constants", "expected"),
    [
        (NEEDED, lambda i: 2 * (97 + 0.5 * 2 * i)),
        ({0: False, 3: 2**31 - 1 - 2**24, 4: 255, 7: -65504, 8: 1}, lambda i: 2**31 - 2**24 - 65504 * 255 * i),
        ({**NEEDED, 8: 7.25}, lambda i: 2 * (4.25 + 0.5 * 2 * i)),
    ],
)
def test_function_constants(device: str, specialised: MetalKernelLibrary, constants: dict, expected) -> None:
    y = torch.empty(8, device=device)
    dispatch_kernel(specialised, "line", (2, 1, 1), (4, 1, 1), [y], constants=constants)
    torch.testing.assert_close(y.cpu().double(), expected(torch.arange(8, dtype=torch.float64)), rtol=1e-6, atol=0)
    pipeline = specialised.get_pipeline("line", constants=constants)
    assert pipeline.address == specialised.get_pipeline("line", "lines", constants=constants).address
    others = [specialised.get_pipeline("line", constants={**constants, 8: start}) for start in (9, 9.000001)]
    assert len({pipeline.address, *(other.address for other in others)}) == 3


@on_a_gpu
@pytest.mark.parametrize("statistics", [False, True])
@pytest.mark.parametrize("key", [6, "has_bias"])
def test_a_kernel_of_this_package_with_constants(device: str, key: int | str, statistics: bool) -> None:
    """On the arguments that `explain` names."""
    x = torch.rand(2, 3, 9, 14, generator=torch.Generator().manual_seed(3)).to(device)
    options = {name: torch.tensor([0.5, 1, 2], device=device) for name in ("mean", "std") if statistics}
    y = fast.resample_image(x, (13, 6), **options)
    (launch,) = explain(fast.resample_image, x, (13, 6), **options)[0].launches
    result = torch.empty_like(y)
    buffers = [x, options.get("mean", x), options.get("std", x), result, launch.params]
    library, size = MetalKernelLibrary.from_source_dir(), (launch.threads, 1, 1)
    assert library.get_pipeline(launch.kernel, constants={key: statistics}).name == launch.kernel
    dispatch_kernel(library, launch.kernel, launch.threadgroups, size, buffers, constants={key: statistics})
    assert torch.equal(result.cpu(), y.cpu())


@on_a_gpu
@pytest.mark.parametrize(
    ("constants", "error", "message"),
    [
        (None, ValueError, r"needs values of the function constants doubled \(0, bool\), shift \(3, int\), step .*"),
        ({"doubled": True, 3: 1, 7: 1}, ValueError, r"needs values of the function constants step \(4, uchar\)\."),
        ({**NEEDED, "stepp": 1}, ValueError, r"has no function constant 'stepp'; it has doubled \(0, bool\), .*"),
        ({**NEEDED, 5: 1}, ValueError, r"has no function constant '5'; it has .*"),
        ({**NEEDED, 4: 1}, ValueError, "function constant step is given twice"),
        ({**NEEDED, "doubled": 1}, ValueError, "function constant doubled is 1; it has the type bool"),
        ({**NEEDED, "shift": True}, ValueError, "function constant shift is true; it has the type int"),
        ({**NEEDED, "shift": 1.5}, ValueError, "function constant shift is 1.5; it has the type int"),
        ({**NEEDED, "step": 256}, ValueError, "function constant step is 256; it has the type uchar"),
        ({**NEEDED, "factor": 1e6}, ValueError, r"function constant factor is 1e\+06; it has the type half"),
        ({**NEEDED, "start": False}, ValueError, "function constant start is false; it has the type float"),
    ],
)
def test_constants_that_do_not_fit(
    device: str, specialised: MetalKernelLibrary, constants: dict | None, error: type[Exception], message: str
) -> None:
    y = torch.zeros(8, device=device)
    with pytest.raises(error, match=r"^\[get_pipeline\] line: (the kernel )?" + message):
        specialised.get_pipeline("line", constants=constants)
    with pytest.raises(error, match=r"^\[dispatch_kernel\] line: (the kernel )?" + message):
        dispatch_kernel(specialised, "line", (1, 1, 1), (8, 1, 1), [y], constants=constants)
    assert y.tolist() == [0] * 8


@on_a_gpu
def test_constants_of_no_kind(device: str, specialised: MetalKernelLibrary) -> None:
    for constants, error, message in (
        ({True: 1}, TypeError, "constants has the key True"),
        ({"shift": "1"}, TypeError, "function constant shift is '1'"),
        ({"shift": 2**63}, ValueError, "function constant shift is 9223372036854775808"),
        ({}, ValueError, r"at_a_place: the kernel needs values of the function constants place \(9, of another type\)"),
        ({"place": 1}, ValueError, "at_a_place: function constant place is neither a bool nor a number"),
        ({"shift": 1}, ValueError, "plain: the kernel has no function constant 'shift'; it has none"),
    ):
        with pytest.raises(error, match=r"^\[get_pipeline\] " + message):
            specialised.get_pipeline("at_a_place" if "place" in message else "plain", constants=constants)
    assert specialised.get_pipeline("plain").maxTotalThreadsPerThreadgroup() >= 32


# --- Buffers ---------------------------------------------------------------------------------------------------------


class OfPyObjC:
    """An MTLBuffer in the form in which PyObjC has it."""

    def __init__(self, address: int, length: int) -> None:
        self._address = address
        self._length = length

    def __c_void_p__(self) -> ctypes.c_void_p:
        return ctypes.c_void_p(self._address)

    def length(self) -> int:
        return self._length


@on_a_gpu
def test_buffers_are_shared_and_read(device: str, library: MetalKernelLibrary) -> None:
    x = torch.arange(24.0, device=device)
    buffer = mps_tensor_to_metal_buffer(x[8:], library.device)
    assert buffer.offset == 32 and buffer.length() >= 96
    dispatch_kernel(library, "scale", (2, 1, 1), (8, 1, 1), [buffer, 2.0, 0], wait=False)
    values = metal_buffer_to_numpy(buffer, np.float32, (2, 3))
    assert values.tolist() == [[16.0, 18.0, 20.0], [22.0, 24.0, 26.0]]
    values[:] = 0  # a copy
    assert x[8:14].tolist() == [16.0, 18.0, 20.0, 22.0, 24.0, 26.0]
    theirs = OfPyObjC(buffer.address, buffer.length())
    dispatch_kernel(library, "scale", (1, 1, 1), (8, 1, 1), [theirs, 1.0, 100])
    assert metal_buffer_to_numpy(theirs, "float32", (2,)).tolist() == [100.0, 101.0]
    assert metal_buffer_to_numpy(theirs, "int16", (0, 4)).shape == (0, 4)


@on_a_gpu
def test_buffers_that_cannot_be_shared(device: str) -> None:
    x = torch.ones(4, 6, device=device)
    for wrong, error, message in (
        (x.cpu(), ValueError, "tensor is a tensor on cpu"),
        (x.T, ValueError, r"strides \(1, 6\) that is not contiguous"),
        (x[:0], ValueError, "has no memory"),
        ([1.0], TypeError, "tensor is a list"),
    ):
        with pytest.raises(error, match=r"^\[mps_tensor_to_metal_buffer\] .*" + message):
            mps_tensor_to_metal_buffer(wrong, device)
    with pytest.raises(ValueError, match="device is 'cpu'"):
        mps_tensor_to_metal_buffer(x, "cpu")
    buffer = mps_tensor_to_metal_buffer(x[1:], device)
    with pytest.raises(ValueError, match=r"\(19,\) of float32 are 76 bytes; the buffer has 72"):
        metal_buffer_to_numpy(buffer, np.float32, (19,))
    with pytest.raises(TypeError, match="buffer is a Tensor"):
        metal_buffer_to_numpy(x, np.float32, (1,))
