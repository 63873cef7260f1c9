"""Metal 4's tensor operations on the software device: its detectors, foreign kernels, and the shaders that use them."""

from __future__ import annotations

import functools
import struct

import numpy as np
import pytest
import torch
from torch import Tensor

import cases
import oracle
import softmetal
from cases import FORMATS
from oracle import Format, Quantized
from repository import ROOT

DTYPES = (torch.float16, torch.bfloat16)
STANDARD = "metal4.0"
HEADER = """#include <metal_stdlib>
#include <metal_tensor>
#include <MetalPerformancePrimitives/MetalPerformancePrimitives.h>
using namespace metal;
using namespace mpp::tensor_ops;
"""

# --- Detectors -------------------------------------------------------------------------------------------------------

ARGUMENTS = """device half* x [[buffer(0)]], device float* y [[buffer(1)]],
  uint tid [[thread_index_in_threadgroup]], uint simd [[simdgroup_index_in_threadgroup]],
  uint lane [[thread_index_in_simdgroup]]"""
# x holds 64 x 64 values, y takes 32 x 32. Four simdgroups.
TYPES = """
  using Matrix = tensor<device half, dextents<int, 2>, tensor_inline>;
  using Tile = tensor<threadgroup half, dextents<int, 2>, tensor_inline>;
  Matrix wide(x, dextents<int, 2>(64, 64));
  auto a = wide.slice<32, 32>(0, 0);
  auto b = wide.slice<32, 32>(32, 32);
  constexpr auto product = matmul2d_descriptor(32, 32, 32);
  constexpr auto sum =
      matmul2d_descriptor(32, 32, 32, false, false, true, matmul2d_descriptor::mode::multiply_accumulate);
  matmul2d<product, execution_simdgroups<4>> multiply;
  matmul2d<sum, execution_simdgroups<4>> accumulate;
  matmul2d<product, execution_simdgroup> alone;
  auto c = multiply.get_destination_cooperative_tensor<decltype(a), decltype(b), float>();
  threadgroup half s[32 * 32];
  Tile tile(s, dextents<int, 2>(32, 32));
"""
CLEAR = "for (ushort i = 0; i < c.get_capacity(); ++i) c[i] = 0.0f;"
FILL = "for (uint i = tid; i < 32 * 32; i += 128) s[i] = x[i];"
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
STORE = """
  for (ushort i = 0; i < c.get_capacity(); ++i) {
    auto place = c.get_multidimensional_index(i);
    if (c.is_valid_element(i)) y[place[1] * 32 + place[0]] = c[i];
  }
"""

# name: (kind, wrong body, legal twin).
SEEDED = {
    "no_barrier_before_run": (
        "threadgroup-race",
        f"{FILL} multiply.run(tile, tile, c); {STORE}",
        f"{FILL} {BARRIER} multiply.run(tile, tile, c); {STORE}",
    ),
    "no_barrier_after_run": (
        "threadgroup-race",
        f"{FILL} {BARRIER} multiply.run(tile, tile, c); {FILL} {STORE}",
        f"{FILL} {BARRIER} multiply.run(tile, tile, c); {BARRIER} {FILL} {STORE}",
    ),
    "simdgroup_barrier_before_run_of_several": (
        "threadgroup-race",
        f"{FILL} simdgroup_barrier(mem_flags::mem_threadgroup); multiply.run(tile, tile, c); {STORE}",
        f"{FILL} {BARRIER} multiply.run(tile, tile, c); {STORE}",
    ),
    # A simdgroup's own tile needs no more than a simdgroup_barrier.
    "no_barrier_within_a_simdgroup": (
        "threadgroup-race",
        "if (simd == 0) { for (uint i = lane; i < 1024; i += 32) s[i] = x[i];"
        " auto d = alone.get_destination_cooperative_tensor<Tile, Tile, float>(); alone.run(tile, tile, d); }",
        "if (simd == 0) { for (uint i = lane; i < 1024; i += 32) s[i] = x[i];"
        " simdgroup_barrier(mem_flags::mem_threadgroup);"
        " auto d = alone.get_destination_cooperative_tensor<Tile, Tile, float>(); alone.run(tile, tile, d); }",
    ),
    "run_is_no_barrier": (
        "threadgroup-race",
        f"s[tid] = x[tid]; multiply.run(a, b, c); {STORE} y[tid] = s[127 - tid];",
        f"s[tid] = x[tid]; multiply.run(a, b, c); {STORE} y[1024 + tid] = s[tid];",
    ),
    "tile_not_filled": (
        "threadgroup-uninitialized",
        f"for (uint i = tid; i < 32 * 31; i += 128) s[i] = x[i]; {BARRIER} multiply.run(tile, tile, c); {STORE}",
        f"{FILL} {BARRIER} multiply.run(tile, tile, c); {STORE}",
    ),
    "accumulate_into_nothing": (
        "tensor-uninitialized",
        f"accumulate.run(a, b, c); {STORE}",
        f"{CLEAR} accumulate.run(a, b, c); {STORE}",
    ),
    "accumulate_with_one_element_forgotten": (
        "tensor-uninitialized",
        f"for (ushort i = 1; i < c.get_capacity(); ++i) c[i] = 0.0f; accumulate.run(a, b, c); {STORE}",
        f"{CLEAR} accumulate.run(a, b, c); {STORE}",
    ),
    "store_of_nothing": (
        "tensor-uninitialized",
        "tensor<device float, dextents<int, 2>, tensor_inline> out(y, dextents<int, 2>(32, 32)); c.store(out);",
        "tensor<device float, dextents<int, 2>, tensor_inline> out(y, dextents<int, 2>(32, 32));"
        f" {CLEAR} c.store(out);",
    ),
    "element_beyond_the_capacity": (
        "tensor-out-of-bounds",
        f"{CLEAR} c[c.get_capacity()] = 0.0f; {STORE}",
        f"{CLEAR} c[c.get_capacity() - 1] = 0.0f; {STORE}",
    ),
    "extents_larger_than_the_memory": (
        "device-out-of-bounds",
        f"Matrix more(x, dextents<int, 2>(64, 65)); auto last = more.slice(0, 40); multiply.run(last, b, c); {STORE}",
        f"Matrix all(x, dextents<int, 2>(64, 64)); auto last = all.slice(0, 40); multiply.run(last, b, c); {STORE}",
    ),
    "static_slice_over_the_edge": (
        "tensor-out-of-extents",
        f"auto last = wide.slice<32, 32>(0, 33); multiply.run(last, b, c); {STORE}",
        f"auto last = wide.slice<32, 32>(0, 32); multiply.run(last, b, c); {STORE}",
    ),
    "static_k_beyond_the_extent": (
        "tensor-out-of-extents",
        f"Matrix narrow(x, dextents<int, 2>(24, 32)); multiply.run(narrow, b, c); {STORE}",
        f"Matrix exact(x, dextents<int, 2>(32, 24)); multiply.run(exact, b, c); {STORE}",
    ),
    "different_k": (
        "tensor-extents",
        "matmul2d<matmul2d_descriptor(32, 32), execution_simdgroups<4>> op; auto l = wide.slice(8, 0);"
        f" auto r = wide.slice(0, 16); op.run(l, r, c); {STORE}",
        "matmul2d<matmul2d_descriptor(32, 32), execution_simdgroups<4>> op; auto l = wide.slice(16, 0);"
        f" auto r = wide.slice(0, 16); op.run(l, r, c); {STORE}",
    ),
    "inner_stride": (
        "tensor-stride",
        f"Matrix other(x, dextents<int, 2>(32, 32), array<int, 2>{{2, 64}}); multiply.run(other, b, c); {STORE}",
        f"Matrix other(x, dextents<int, 2>(32, 32), array<int, 2>{{1, 64}}); multiply.run(other, b, c); {STORE}",
    ),
    "slice_far_away": (
        "tensor-slice",
        "Matrix far(x, dextents<int, 2>(64, 64), array<int, 2>{1, 1 << 28}); auto last = far.slice(0, 4);"
        f" if (last.get_extent(0) > 64) multiply.run(last, b, c); {CLEAR} {STORE}",
        "Matrix far(x, dextents<int, 2>(64, 64), array<int, 2>{1, 1 << 28}); auto last = far.slice(0, 3);"
        f" if (last.get_extent(0) > 64) multiply.run(last, b, c); {CLEAR} {STORE}",
    ),
    "run_of_some_threads": (
        "divergent-barrier",
        f"{CLEAR} if (simd < 2) multiply.run(a, b, c); {STORE}",
        f"{CLEAR} if (simd < 9) multiply.run(a, b, c); {STORE}",
    ),
    "two_runs": (
        "divergent-barrier",
        f"{CLEAR} if (simd < 2) multiply.run(a, b, c); else multiply.run(b, a, c); {STORE}",
        f"{CLEAR} if (simd < 9) multiply.run(a, b, c); else multiply.run(b, a, c); {STORE}",
    ),
    "run_of_some_lanes": (
        "divergent-simd",
        "auto d = alone.get_destination_cooperative_tensor<decltype(a), decltype(b), float>();"
        f" if (lane < 8) alone.run(a, b, d); {CLEAR} {STORE}",
        "auto d = alone.get_destination_cooperative_tensor<decltype(a), decltype(b), float>();"
        f" if (simd == 2) alone.run(a, b, d); {CLEAR} {STORE}",
    ),
    "tensors_differ_between_threads": (
        "nonuniform-operand",
        f"auto own = wide.slice(0, simd); multiply.run(own, b, c); {STORE}",
        f"auto own = wide.slice(0, simd / 9); multiply.run(own, b, c); {STORE}",
    ),
    "wrong_number_of_simdgroups": (
        "tensor-scope",
        f"matmul2d<product, execution_simdgroups<2>> two; auto d = two.get_destination_cooperative_tensor<decltype(a),"
        f" decltype(b), float>(); two.run(a, b, d); {CLEAR} {STORE}",
        f"matmul2d<product, execution_simdgroups<4>> four; four.run(a, b, c); {STORE}",
    ),
    "two_simdgroups_write_one_destination": (
        "device-race",
        "tensor<device float, dextents<int, 2>, tensor_inline> out(y, dextents<int, 2>(32, 32)); alone.run(a, b, out);",
        "tensor<device float, dextents<int, 2>, tensor_inline> out(y + simd * 1024, dextents<int, 2>(32, 32));"
        " alone.run(a, b, out);",
    ),
}


def seeded_source() -> str:
    return HEADER + "".join(
        f"kernel void {name}_{form}({ARGUMENTS}) {{ {TYPES} {body} }}\n"
        for name, (_, wrong, legal) in SEEDED.items()
        for form, body in (("wrong", wrong), ("legal", legal))
    )


@functools.cache
def seeded_library():
    return softmetal.compile(seeded_source(), standard=STANDARD)


def run_seeded(name: str, seed: int):
    x = np.random.default_rng(0).normal(size=64 * 64).astype(np.float16)
    y = np.empty(4 * 32 * 32, np.float32)
    return seeded_library().launch(name, [x, y], (1,), (128,), seed=seed, uninitialized=[1])


@pytest.mark.parametrize("name", SEEDED)
def test_seeded_bug(name):
    report = run_seeded(f"{name}_wrong", seed=1)
    assert SEEDED[name][0] in report.kinds, report.errors


@pytest.mark.parametrize("name", SEEDED)
def test_legal_twin(name):
    assert run_seeded(f"{name}_legal", seed=2).errors == []


@pytest.mark.parametrize(
    "line, message",
    [
        ("matmul2d<matmul2d_descriptor(24, 8, 32), execution_simdgroup> op; op.run(a, b, y);", "multiple of 16"),
        ("matmul2d<matmul2d_descriptor(32, 12), execution_simdgroup> op; op.run(a, b, y);", "multiples of 8"),
        ("matmul2d<matmul2d_descriptor(32, 32), int> op; op.run(a, b, y);", "the scope is"),
        ("matmul2d<tile, execution_simdgroup> op; op.run(a, w, y);", "multiplies these element types"),
        ("matmul2d<tile, execution_simdgroup> op; op.run(a, b, h);", "multiplies these element types"),
        ("matmul2d<tile, execution_simdgroup> op; op.run(a, fixed, y);", "no const elements"),
        ("matmul2d<tile, execution_simdgroup> op; op.run(a, parameters, y);", "device or threadgroup memory"),
        ("matmul2d<tile, execution_thread> op; op.run(a, shared, y);", "device or thread memory"),
        ("matmul2d<tile, execution_simdgroup> op; op.run(a, b.slice(0, 0), y);", "no matching member function"),
        (
            "matmul2d<tile, execution_simdgroup> op;"
            " auto c = op.get_destination_cooperative_tensor<half, half, float>();",
            "for the types of two tensors",
        ),
        (
            "matmul2d<tile, execution_simdgroup> op; matmul2d<matmul2d_descriptor(64, 32), execution_simdgroup> other;"
            " auto c = other.get_destination_cooperative_tensor<decltype(a), decltype(b), float>(); op.run(a, b, c);",
            "belongs to another operation",
        ),
        ("tensor<device half, dextents<int, 2>> handle(x, dextents<int, 2>(32, 32));", "tensor_inline only"),
        ("dextents<int, 2> sizes(32);", "give the size"),
    ],
)
def test_rejected_as_by_a_compiler(line, message):
    arguments = (
        "device half* x [[buffer(0)]], device float* f [[buffer(1)]], const device half* r [[buffer(2)]],"
        " device int* i [[buffer(3)]], device bfloat* z [[buffer(4)]], constant half* p [[buffer(5)]]"
    )
    body = """
  dextents<int, 2> size(32, 32);
  auto a = tensor(x, size); auto b = tensor(x, size); auto y = tensor(f, size); auto w = tensor(i, size);
  auto h = tensor(z, size);
  tensor<const device half, dextents<int, 2>, tensor_inline> fixed(r, size);
  tensor<constant half, dextents<int, 2>, tensor_inline> parameters(p, size);
  threadgroup half s[1024]; auto shared = tensor(s, size);
  constexpr auto tile = matmul2d_descriptor(32, 32);
"""
    with pytest.raises(softmetal.CompileError) as caught:
        softmetal.compile(f"{HEADER}kernel void k({arguments}) {{ {body}\n{line}\n}}\n", standard=STANDARD)
    assert message in str(caught.value)


def test_exists_from_language_4_on():
    line = "matmul2d_descriptor f() { return matmul2d_descriptor(32, 32); }"
    softmetal.compile(f"{HEADER}{line}", standard="metal4.0")
    header = HEADER.replace("using namespace mpp::tensor_ops;", "")
    assert softmetal.compile(header + "kernel void k(device int* p) { p[0] = 1; }", standard="metal3.1").kernels == [
        "k"
    ]
    with pytest.raises(softmetal.CompileError, match="mpp"):
        softmetal.compile(HEADER + line, standard="metal3.1")


# --- Kernels in the style of other projects --------------------------------------------------------------------------

PRODUCT = """
// y [M, N] = a [M, K] b, and b is [K, N] or, transposed, [N, K]. TM x TN tiles; `simdgroups` of them share one.
template <typename T, int TM, int TN, bool transpose, int simdgroups>
[[kernel]] void product(
    device T* a [[buffer(0)]],
    device T* b [[buffer(1)]],
    device float* y [[buffer(2)]],
    constant int3& shape [[buffer(3)]],
    uint2 group [[threadgroup_position_in_grid]]) {
  const int M = shape.x, N = shape.y, K = shape.z;
  auto left = tensor(a, dextents<int, 2>(K, M));
  auto right = tensor(b, transpose ? dextents<int, 2>(K, N) : dextents<int, 2>(N, K));
  constexpr auto description = matmul2d_descriptor(TM, TN, static_cast<int>(dynamic_extent), false, transpose);
  matmul2d<description, execution_simdgroups<simdgroups>> op;
  const int row = group.y * TM, column = group.x * TN;
  auto tile_a = left.slice(0, row);
  auto tile_b = transpose ? right.slice(0, column) : right.slice(column, 0);
  auto sums = op.template get_destination_cooperative_tensor<decltype(tile_a), decltype(tile_b), float>();
  op.run(tile_a, tile_b, sums);
  auto out = tensor(y, dextents<int, 2>(N, M));
  sums.store(out.slice(column, row));
}
#define PRODUCT(name, ...) template [[host_name(name)]] [[kernel]] decltype(product<__VA_ARGS__>) product<__VA_ARGS__>;
PRODUCT("half_nn", half, 64, 32, false, 4)
PRODUCT("half_nt", half, 32, 64, true, 4)
PRODUCT("bfloat_nt", bfloat, 32, 32, true, 1)
// llama.cpp's way to instantiate.
typedef decltype(product<float, 16, 48, false, 2>) product_t;
template [[host_name("float_nn")]] kernel product_t product<float, 16, 48, false, 2>;

// K in steps, through threadgroup memory; accumulates into memory.
kernel void steps(
    device half* a [[buffer(0)]],
    device half* b [[buffer(1)]],
    device float* y [[buffer(2)]],
    constant int3& shape [[buffer(3)]],
    uint tid [[thread_index_in_threadgroup]]) {
  const int M = shape.x, N = shape.y, K = shape.z;
  threadgroup half tile_b[32 * 32];
  using Shared = tensor<threadgroup half, extents<int, 32, 32>, tensor_inline>;
  Shared shared(tile_b, extents<int, 32, 32>());
  auto whole = tensor(a, dextents<int, 2>(K, M), array<int, 2>{1, K});
  auto out = tensor(y, dextents<int, 2>(N, M));
  matmul2d<
      matmul2d_descriptor(32, 32, 32, false, false, true, matmul2d_descriptor::mode::multiply_accumulate),
      execution_simdgroups<2>> op;
  for (int i = tid; i < M * N; i += 64) {
    y[i] = 0.0f;
  }
  for (int k = 0; k < K; k += 32) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int i = tid; i < 1024; i += 64) {
      tile_b[i] = i % 32 < N ? b[(k + i / 32) * N + i % 32] : half(0);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup | mem_flags::mem_device);
    auto left = whole.slice<32, 32>(k, 0);
    op.run(left, shared, out);
  }
}

// A 16 x 32 x 16 product in registers, as MLX does it.
kernel void registers(
    const device bfloat* a [[buffer(0)]], const device bfloat* b [[buffer(1)]], device float* y [[buffer(2)]]) {
  constexpr auto description =
      matmul2d_descriptor(16, 32, 16, false, true, true, matmul2d_descriptor::mode::multiply_accumulate);
  matmul2d<description, execution_simdgroup> op;
  auto left = op.get_left_input_cooperative_tensor<bfloat, bfloat, float>();
  auto right = op.get_right_input_cooperative_tensor<bfloat, bfloat, float>();
  auto sums = op.get_destination_cooperative_tensor<decltype(left), decltype(right), float>();
  for (auto it = left.begin(); it != left.end(); ++it) {
    auto place = it.get_multidimensional_index();
    *it = a[place[1] * 16 + place[0]];
  }
  for (ushort i = 0; i < right.get_capacity(); ++i) {
    auto place = right.get_multidimensional_index(i);
    right[i] = b[place[1] * 16 + place[0]];
  }
  for (ushort i = 0; i < sums.get_capacity(); ++i) {
    sums[i] = 1.0f;
  }
  op.run(left, right, sums);
  for (ushort i = 0; i < sums.get_capacity(); ++i) {
    auto place = sums.get_multidimensional_index(i);
    y[place[1] * 32 + place[0]] = sums[i];
  }
}

// One thread for itself.
kernel void lonely(device char* a [[buffer(0)]], device char* b [[buffer(1)]], device int* y [[buffer(2)]]) {
  auto left = tensor((device int8_t*)a, dextents<int, 2>(5, 2));
  auto right = tensor((device int8_t*)b, dextents<int, 2>(4, 5));
  auto out = tensor(y, dextents<int, 2>(4, 2));
  matmul2d<matmul2d_descriptor(2, 4, dynamic_length_v<int>), execution_thread> op;
  op.run(left, right, out);
}
"""


@functools.cache
def products():
    return softmetal.compile(HEADER + PRODUCT, standard=STANDARD)


def random_values(*shape: int, dtype: torch.dtype, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Random numbers of a dtype, as the device sees them and in float64."""
    values = oracle.random_x(*shape, dtype=dtype, seed=seed)
    return memory(values).reshape(shape), values.double().numpy()


@pytest.mark.parametrize(
    "name, dtype, tile, simdgroups",
    [
        ("half_nn", torch.float16, (64, 32), 4),
        ("half_nt", torch.float16, (32, 64), 4),
        ("bfloat_nt", torch.bfloat16, (32, 32), 1),
        ("float_nn", torch.float32, (16, 48), 2),
    ],
)
@pytest.mark.parametrize("shape", [(64, 192, 64), (70, 45, 37), (1, 1, 1)])
def test_foreign_product(name, dtype, tile, simdgroups, shape):
    m, n, k = shape
    a, left = random_values(m, k, dtype=dtype, seed=1)
    b, right = random_values(*((n, k) if name.endswith("nt") else (k, n)), dtype=dtype, seed=2)
    y = np.empty((m, n), np.float32)
    size = np.array([m, n, k, 0], np.int32).tobytes()
    grid = (ceil(n, tile[1]), ceil(m, tile[0]))
    report = products().launch(name, [a, b, y, size], grid, (32 * simdgroups,), seed=3, uninitialized=[2])
    assert report.errors == []
    np.testing.assert_allclose(y, left @ (right.T if name.endswith("nt") else right), rtol=1e-5, atol=2e-5)
    whole = m == 64
    if whole:  # in 8x8 products
        assert report.counters["simdgroup_multiplies"] == m * n * k // 512


def test_foreign_product_in_steps():
    a, left = random_values(30, 64, dtype=torch.float16, seed=1)
    b, right = random_values(64, 20, dtype=torch.float16, seed=2)
    y = np.empty((30, 20), np.float32)
    a = np.concatenate([a, np.zeros((2, 64), np.float16)])  # a static slice reads whole tiles
    size = np.array([32, 20, 64, 0], np.int32).tobytes()
    y = np.empty((32, 20), np.float32)
    report = products().launch("steps", [a, b, y, size], (1,), (64,), seed=3, uninitialized=[2])
    assert report.errors == []
    np.testing.assert_allclose(y[:30], left @ right, rtol=1e-5, atol=2e-5)


def test_foreign_product_in_registers():
    a, left = random_values(16, 16, dtype=torch.bfloat16, seed=1)
    b, right = random_values(32, 16, dtype=torch.bfloat16, seed=2)
    y = np.empty((16, 32), np.float32)
    report = products().launch("registers", [a, b, y], (1,), (32,), uninitialized=[2])
    assert report.errors == []
    np.testing.assert_allclose(y, 1 + left @ right.T, rtol=1e-5, atol=1e-5)


def test_foreign_product_of_one_thread():
    rng = np.random.default_rng(1)
    a, b = (rng.integers(-128, 128, shape).astype(np.int8) for shape in ((2, 5), (5, 4)))
    y = np.empty((2, 4), np.int32)
    assert products().launch("lonely", [a, b, y], (1,), (1,), uninitialized=[2]).errors == []
    np.testing.assert_array_equal(y, a.astype(np.int32) @ b.astype(np.int32))


def test_without_checks():
    a, left = random_values(64, 64, dtype=torch.float16, seed=1)
    b, right = random_values(64, 96, dtype=torch.float16, seed=2)
    y = np.empty((64, 96), np.float32)
    size = np.array([64, 96, 64, 0], np.int32).tobytes()
    assert products().launch("half_nn", [a, b, y, size], (3, 1), (128,), check=False).errors == []
    np.testing.assert_allclose(y, left @ right, rtol=1e-5, atol=2e-5)


# --- The shaders -----------------------------------------------------------------------------------------------------

ALIGNED_OUTPUTS, ALIGNED_WEIGHTS, ALIGNED_X, ALIGNED_K, HAS_GLOBAL_SCALE = range(5)  # csrc/gpu/launch.h
PRODUCT_PARAMS, GATHER_PARAMS = "<14q6i", "<14q8i"
SHADER = ROOT / "metal/quantized/matmul_tensor.metal"
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
COLUMNS = DEPTH = 64
GATHER_ROWS = 32
FOUR_BIT = Format("affine", 64, 4)
NVFP4 = Format("nvfp4", 16, 4)
# One format for each width and each kind of scale.
EACH_WIDTH = (
    *(
        Format("affine", group_size, bits)
        for bits, group_size in ((2, 64), (3, 32), (4, 64), (5, 128), (6, 32), (8, 64))
    ),
    *(Format("mxfp4", 32, 4), Format("mxfp8", 32, 8), NVFP4),
)


def ceil(a: int, b: int) -> int:
    return -(-a // b)


def memory(tensor: Tensor | None) -> np.ndarray | None:
    """The whole storage under a tensor, as the device sees it; bfloat16 as uint16."""
    if tensor is None:
        return None
    flat = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
    return flat.view(torch.int16).numpy().view(np.uint16) if tensor.dtype == torch.bfloat16 else flat.numpy()


@functools.cache
def library(constants: frozenset[int], layout: int = 0):
    """layout: which thread holds which of the sums."""
    values = {index: index in constants for index in range(5)}
    defines = {"SOFTMETAL_TENSOR_LAYOUT": layout}
    return softmetal.compile(SHADER, defines=defines, function_constants=values, standard=STANDARD)


def kernel_name(format: Format, op: str, dtype: torch.dtype, rows: int) -> str:
    return f"{format.mode}_{op}_{oracle.name_of(dtype)}_gs_{format.group_size}_b_{format.bits}_rows_{rows}"


def constants_for(weights: Quantized, n: int, k: int, aligned_x: bool, aligned: bool) -> frozenset[int]:
    constants = {HAS_GLOBAL_SCALE} if weights.global_scale is not None else set()
    load_bytes = {2: 8, 4: 16, 6: 8, 8: 16}.get(weights.format.bits, 4)
    if aligned:
        constants |= {ALIGNED_OUTPUTS} if n % COLUMNS == 0 else set()
        constants |= {ALIGNED_K} if k % DEPTH == 0 else set()
        constants |= {ALIGNED_WEIGHTS} if weights.w.shape[-1] * 4 % load_bytes == 0 else set()
        constants |= {ALIGNED_X} if aligned_x else set()
    return frozenset(constants)


def launch(weights, dtype, op, rows, constants, buffers, threadgroups, layout=0):
    arrays = [memory(buffer) if isinstance(buffer, Tensor) else buffer for buffer in buffers]
    kernel = kernel_name(weights.format, op, dtype, rows)
    report = library(constants, layout).launch(kernel, arrays, threadgroups, (128,), seed=1)
    assert not report.errors, "\n".join(report.errors)
    return report


def unwritten(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.full(shape, 77, dtype=dtype)


def columns_of(weights: Quantized, transpose: bool) -> int:
    if weights.format.is_column_packed:
        return weights.w.shape[-1]
    return weights.w.shape[-2] if transpose else weights.w.shape[-1] * 32 // weights.format.bits


def qmm(x: Tensor, weights: Quantized, transpose: bool, rows: int = 32, aligned: bool = True, layout: int = 0):
    """y [B0, B1, M, N] of x [B0, B1, M, K] and matrices with the same batch dimensions, any strides; and the report."""
    outer, inner, m, k = x.shape
    n = columns_of(weights, transpose)
    strides = [n for t in (x, *weights.tensors) for n in ((0, 0) if t is None else t.stride()[:2])]
    y = unwritten(outer, inner, m, n, dtype=x.dtype)
    params = struct.pack(
        PRODUCT_PARAMS, *strides, 0, 0, *y.stride()[:2], x.stride(-2), 0, inner, m, k, n, 1, ceil(k, DEPTH) * DEPTH
    )
    buffers = [x, *weights.tensors, weights.global_scale, y, params]
    constants = constants_for(weights, n, k, False, aligned)
    grid = (ceil(n, COLUMNS), ceil(m, rows), outer * inner)
    report = launch(weights, x.dtype, "qmm_t_nax" if transpose else "qmm_n_nax", rows, constants, buffers, grid, layout)
    return y, report


def expanded(weights: Quantized, outer: int = 1, inner: int = 1) -> Quantized:
    """The matrices [N, K] or [inner, N, K], broadcast to two batch dimensions."""
    shape = (outer, inner, -1, -1)
    w, scales, biases = (None if tensor is None else tensor.expand(shape) for tensor in weights.tensors)
    return Quantized(weights.format, w, scales, biases, weights.global_scale)


def check_qmm(format: Format, dtype: torch.dtype, m: int, n: int, k: int, transpose: bool, **options):
    """One product of random numbers against float64."""
    weights = oracle.random_quantized(format, *((n, k) if transpose else (k, n)), dtype=dtype)
    x = oracle.random_x(1, 1, m, k, dtype=dtype)
    y, report = qmm(x, expanded(weights), transpose, **options)
    oracle.assert_product(y[0, 0], x[0, 0], weights.matrix(transpose), dtype, f"{format} {m}x{k}x{n}")
    return report


@pytest.mark.parametrize("dtype", DTYPES, ids=oracle.name_of)
@pytest.mark.parametrize("format", FORMATS, ids=oracle.name_of)
def test_qmm_every_format(format, dtype):
    """A whole tile of rows and a ragged one; the groups run along K, then along N."""
    grouped = {16: 80, 32: 96, 64: 192, 128: 128}[format.group_size]
    check_qmm(format, dtype, 37, 70, grouped, transpose=True)
    check_qmm(format, dtype, 37, grouped, 70, transpose=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=oracle.name_of)
@pytest.mark.parametrize("mode", cases.MARLIN_BITS)
def test_packed_columns(mode, dtype):
    """Tiles whole and ragged; pairs of sorted experts."""
    for group_size, n in ((64, 37), (32, 128)):
        format = Format(mode, group_size, cases.MARLIN_BITS[mode])
        check_qmm(format, dtype, 37, n, 3 * group_size, transpose=False)
        check_qmm(format, dtype, 64, n, 128, transpose=False, rows=64)
        check_gather(format, dtype, np.arange(45), sorted_pairs(45), False, (3 * group_size, n), 45)


@pytest.mark.parametrize("transpose", (True, False), ids=("t", "n"))
@pytest.mark.parametrize("format", EACH_WIDTH, ids=oracle.name_of)
def test_qmm_shapes(format, transpose):
    """Aligned, the smallest that there are, ragged on the larger tile, and without any alignment."""
    group = format.group_size
    check_qmm(format, torch.float16, 64, 128, 128, transpose, rows=64)
    check_qmm(format, torch.float16, 1, *((1, group) if transpose else (group, 1)), transpose)
    ragged = (37, 3 * group) if transpose else (3 * group, 37)
    check_qmm(format, torch.float16, 70, *ragged, transpose, rows=64)
    check_qmm(format, torch.float16, 33, *ragged, transpose, aligned=False)


@pytest.mark.parametrize("transpose", (True, False), ids=("t", "n"))
def test_qmm_batch(transpose):
    """Two batch dimensions, operands broadcast in different ones, x not contiguous: every operand its own strides."""
    dtype = torch.float16
    stacked = oracle.random_quantized(FOUR_BIT, 3, *((40, 128) if transpose else (72, 192)), dtype=dtype)
    weights = expanded(stacked, 2, 3)
    k = 128 if transpose else 72
    x = oracle.random_x(2, 3, 70, 2 * k, dtype=dtype)[:, :, ::2, :k]
    shared = oracle.random_x(2, 1, 35, k, dtype=dtype).expand(2, 3, 35, k)
    for operand in (x, shared):
        y, _ = qmm(operand, weights, transpose)
        for position in np.ndindex(2, 3):
            matrix = stacked.matrix(transpose)[position[1]]
            oracle.assert_product(y[position], operand[position], matrix, dtype)


@pytest.mark.parametrize("transpose", (True, False), ids=("t", "n"))
def test_qmm_global_scale(transpose):
    dtype = torch.bfloat16
    plain = oracle.random_quantized(NVFP4, *((40, 128) if transpose else (128, 48)), dtype=dtype)
    weights = Quantized(NVFP4, plain.w, plain.scales, None, torch.tensor([900.0]))
    x = oracle.random_x(1, 1, 33, 128, dtype=dtype)
    y, _ = qmm(x, expanded(weights), transpose)
    oracle.assert_product(y[0, 0], x[0, 0], weights.matrix(transpose), dtype)


@pytest.mark.parametrize("rows", (32, 64))
def test_qmm_does_not_assume_who_holds_which_sum(rows):
    check_qmm(FOUR_BIT, torch.float16, rows, 64, 64, transpose=True, rows=rows, layout=1)
    check_qmm(FOUR_BIT, torch.float16, 19, 70, 64, transpose=True, rows=rows, layout=1)


def test_qmm_reads_weights_once_for_each_tile_of_rows():
    n, k = 128, 256
    report = check_qmm(FOUR_BIT, torch.float16, 64, n, k, True, rows=64)
    assert report.counters["buffer_bytes_read"][1] == n * k // 2
    assert report.counters["simdgroup_multiplies"] == 64 * n * k // 512
    assert report.counters["threadgroup_barriers"] == 2 * (k // DEPTH) * (n // COLUMNS)


# --- Gathered products of sorted pairs -------------------------------------------------------------------------------


def gather(x: Tensor, weights: Quantized, lhs: Tensor, rhs: Tensor, transpose: bool, layout: int = 0) -> Tensor:
    """y [P, N] for indices [P] into the rows of x [A, K] and into the matrices [E, ..]."""
    pairs, k = len(rhs), x.shape[-1]
    n = columns_of(weights, transpose)
    matrices = (x, *weights.tensors)
    strides = [number for t in matrices for number in ((0, 0) if t is None else (t.stride(0), 0))]
    scale_each = int(weights.global_scale is not None and weights.global_scale.numel() > 1)
    y = unwritten(pairs, n, dtype=x.dtype)
    params = struct.pack(
        GATHER_PARAMS, *strides, scale_each, 0, n, 0, x.stride(-2), 0, 1, pairs, k, n, 1, ceil(k, DEPTH) * DEPTH,
        len(x), len(weights.w),
    )  # fmt: skip
    aligned_x = x.stride(0) % 8 == 0
    constants = constants_for(weights, n, k, aligned_x, True)
    buffers = [x, *weights.tensors, weights.global_scale, y, params, lhs, rhs]
    op = "gather_qmm_rhs_t_nax" if transpose else "gather_qmm_rhs_n_nax"
    launch(
        weights, x.dtype, op, GATHER_ROWS, constants, buffers, (ceil(n, COLUMNS), ceil(pairs, GATHER_ROWS), 1), layout
    )
    return y


def check_gather(format, dtype, lhs, rhs, transpose, shape, rows_of_x, experts=4, global_scale=None, layout=0):
    lhs, rhs = torch.as_tensor(lhs, dtype=torch.int64), torch.as_tensor(rhs, dtype=torch.int64)
    plain = oracle.random_quantized(format, experts, *shape, dtype=dtype)
    weights = Quantized(format, *plain.tensors, global_scale)
    x = oracle.random_x(rows_of_x, shape[1] if transpose else shape[0], dtype=dtype)
    y = gather(x, weights, lhs, rhs, transpose, layout)
    matrices = weights.matrix(transpose)
    valid = (lhs >= 0) & (lhs < rows_of_x) & (rhs >= 0) & (rhs < experts)
    assert y[~valid].isnan().all()
    for expert in range(experts):
        of_expert = valid & (rhs == expert)
        if of_expert.any():
            oracle.assert_product(y[of_expert], x[lhs[of_expert]], matrices[expert], dtype, f"{format} {expert}")


def sorted_pairs(count: int, experts: int = 4) -> np.ndarray:
    return np.sort(np.random.default_rng(count).integers(0, experts, count))


@pytest.mark.parametrize("dtype", DTYPES, ids=oracle.name_of)
@pytest.mark.parametrize("format", FORMATS, ids=oracle.name_of)
def test_gather_every_format(format, dtype):
    grouped = {16: 80, 32: 96, 64: 64, 128: 128}[format.group_size]
    pairs = np.arange(45)
    check_gather(format, dtype, pairs, sorted_pairs(45), True, (70, grouped), 45)
    check_gather(format, dtype, pairs, sorted_pairs(45), False, (40, grouped), 45)


@pytest.mark.parametrize("transpose", (True, False), ids=("t", "n"))
@pytest.mark.parametrize("order", ("sorted", "unsorted", "invalid", "one", "rows of x shared"))
def test_gather_orders(order, transpose):
    """Whole tiles of one expert, many runs in a tile, indices out of range among and in place of the others."""
    rng = np.random.default_rng(1)
    lhs, rhs = np.arange(80), sorted_pairs(80)
    if order == "unsorted":
        rhs = rng.integers(0, 4, 40)
        lhs = np.arange(40)
    elif order == "invalid":
        rhs[3], rhs[40:44], rhs[79] = -1, 4, 2**32 + 1
        lhs[60], lhs[61] = -(2**40), 80
    elif order == "one":
        lhs, rhs = np.array([2]), np.array([3])
    elif order == "rows of x shared":
        lhs = rng.integers(0, 80, 80)
    check_gather(FOUR_BIT, torch.float16, lhs, rhs, transpose, (64, 128), 80)


def test_gather_does_not_assume_who_holds_which_sum():
    pairs = np.arange(20)
    check_gather(FOUR_BIT, torch.float16, pairs, sorted_pairs(20), True, (70, 64), 20, layout=1)


@pytest.mark.parametrize("scales", ([900.0], [900.0, 2688.0, 5000.0, 100.0]), ids=("one", "each"))
def test_gather_global_scale(scales):
    pairs = np.arange(40)
    check_gather(NVFP4, torch.float16, pairs, sorted_pairs(40), True, (48, 80), 40, global_scale=torch.tensor(scales))


# --- The table of kernels --------------------------------------------------------------------------------------------


def test_kernels():
    """Exactly the kernels that the formats and types call for; none below language 4.0."""
    expected = set()
    for dtype in DTYPES:
        for format in FORMATS:
            for side in "tn":
                expected |= {kernel_name(format, f"qmm_{side}_nax", dtype, rows) for rows in (32, 64)}
                expected |= {kernel_name(format, f"gather_qmm_rhs_{side}_nax", dtype, GATHER_ROWS)}
        for format in cases.MARLIN_FORMATS:
            expected |= {kernel_name(format, "qmm_n_nax", dtype, rows) for rows in (32, 64)}
            expected |= {kernel_name(format, "gather_qmm_rhs_n_nax", dtype, GATHER_ROWS)}
    assert set(softmetal.compile(SHADER, standard="metal4.0").kernels) == expected
    assert softmetal.compile(SHADER, standard="metal3.1").kernels == []


@pytest.mark.parametrize("barrier", range(4))
def test_each_barrier_is_needed(barrier):
    """Without one barrier, be it of the plain product's loop or of the gathered one's, there is a race."""
    parts = SHADER.with_suffix(".h").read_text().split(BARRIER)
    assert len(parts) == 5
    without = BARRIER.join(parts[: barrier + 1]) + BARRIER.join(parts[barrier + 1 :])
    source = SHADER.read_text().replace('#include "matmul_tensor.h"', without)
    format, dtype = Format("mxfp4", 32, 4), torch.float16
    constants = {index: False for index in range(5)}
    broken = softmetal.compile(source, [SHADER.parent], function_constants=constants, standard=STANDARD)
    weights = oracle.random_quantized(format, 64, 128)
    x = oracle.random_x(32, 128, dtype=dtype)
    y = unwritten(32, 64, dtype=dtype)
    buffers = [memory(x), memory(weights.w), memory(weights.scales), None, None, memory(y)]
    if barrier < 2:
        name = kernel_name(format, "qmm_t_nax", dtype, 32)
        buffers += [struct.pack(PRODUCT_PARAMS, *[0] * 12, 128, 0, 1, 32, 128, 64, 1, 128)]
    else:
        name = kernel_name(format, "gather_qmm_rhs_t_nax", dtype, 32)
        buffers += [struct.pack(GATHER_PARAMS, *[0] * 12, 128, 0, 1, 32, 128, 64, 1, 128, 32, 1)]
        buffers += [np.arange(32), np.zeros(32, np.int64)]
    assert "threadgroup-race" in broken.launch(name, buffers, (1,), (128,)).kinds
