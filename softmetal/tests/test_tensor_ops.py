"""Metal 4's tensor operations: every detector on a wrong kernel and on its legal twin, and whole kernels on numbers."""

from __future__ import annotations

import functools
import sys

import numpy as np
import pytest
from twins import twins

import softmetal

if sys.platform == "darwin":
    pytest.skip("the software device runs on Linux", allow_module_level=True)

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
SIMD_BARRIER = "simdgroup_barrier(mem_flags::mem_threadgroup);"
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
STORE = """
  for (ushort i = 0; i < c.get_capacity(); ++i) {
    auto place = c.get_multidimensional_index(i);
    if (c.is_valid_element(i)) y[place[1] * 32 + place[0]] = c[i];
  }
"""

OUT = "tensor<device float, dextents<int, 2>, tensor_inline> out"

# kind: {name: body}, of which twins.py says what the @ mean.
SEEDED = {
    "threadgroup-race": {
        "no_barrier_before_run": f"{FILL} @@{BARRIER}@ multiply.run(tile, tile, c); {STORE}",
        "no_barrier_after_run": f"{FILL} {BARRIER} multiply.run(tile, tile, c); @@{BARRIER}@ {FILL} {STORE}",
        "simdgroup_barrier_before_run_of_several": (
            f"{FILL} @{SIMD_BARRIER}@{BARRIER}@ multiply.run(tile, tile, c); {STORE}"
        ),
        # A simdgroup's own tile needs no more than a simdgroup_barrier.
        "no_barrier_within_a_simdgroup": (
            f"if (simd == 0) {{ for (uint i = lane; i < 1024; i += 32) s[i] = x[i]; @@{SIMD_BARRIER}@"
            " auto d = alone.get_destination_cooperative_tensor<Tile, Tile, float>(); alone.run(tile, tile, d); }"
        ),
        "run_is_no_barrier": (
            f"s[tid] = x[tid]; multiply.run(a, b, c); {STORE} @y[tid] = s[127 - tid];@y[1024 + tid] = s[tid];@"
        ),
    },
    "threadgroup-uninitialized": {
        "tile_not_filled": (
            "for (uint i = tid; i < 32 * @31@32@; i += 128) s[i] = x[i];"
            f" {BARRIER} multiply.run(tile, tile, c); {STORE}"
        )
    },
    "tensor-uninitialized": {
        "accumulate_into_nothing": f"@@{CLEAR}@ accumulate.run(a, b, c); {STORE}",
        "accumulate_with_one_element_forgotten": (
            f"for (ushort i = @1@0@; i < c.get_capacity(); ++i) c[i] = 0.0f; accumulate.run(a, b, c); {STORE}"
        ),
        "store_of_nothing": f"{OUT}(y, dextents<int, 2>(32, 32)); @@{CLEAR}@ c.store(out);",
    },
    "tensor-out-of-bounds": {"element_beyond_the_capacity": f"{CLEAR} c[c.get_capacity()@@ - 1@] = 0.0f; {STORE}"},
    "device-out-of-bounds": {
        "extents_larger_than_the_memory": (
            "Matrix all(x, dextents<int, 2>(64, @65@64@)); auto last = all.slice(0, 40);"
            f" multiply.run(last, b, c); {STORE}"
        )
    },
    "tensor-out-of-extents": {
        "static_slice_over_the_edge": f"auto last = wide.slice<32, 32>(0, @33@32@); multiply.run(last, b, c); {STORE}",
        "static_k_beyond_the_extent": (
            f"Matrix narrow(x, dextents<int, 2>(@24, 32@32, 24@)); multiply.run(narrow, b, c); {STORE}"
        ),
    },
    "tensor-extents": {
        "different_k": (
            "matmul2d<matmul2d_descriptor(32, 32), execution_simdgroups<4>> op; auto l = wide.slice(@8@16@, 0);"
            f" auto r = wide.slice(0, 16); op.run(l, r, c); {STORE}"
        )
    },
    "tensor-stride": {
        "inner_stride": (
            f"Matrix other(x, dextents<int, 2>(32, 32), array<int, 2>{{@2@1@, 64}}); multiply.run(other, b, c); {STORE}"
        )
    },
    "tensor-slice": {
        "slice_far_away": (
            "Matrix far(x, dextents<int, 2>(64, 64), array<int, 2>{1, 1 << 28}); auto last = far.slice(0, @4@3@);"
            f" if (last.get_extent(0) > 64) multiply.run(last, b, c); {CLEAR} {STORE}"
        )
    },
    "divergent-barrier": {
        "run_of_some_threads": f"{CLEAR} if (simd < @2@9@) multiply.run(a, b, c); {STORE}",
        "two_runs": f"{CLEAR} if (simd < @2@9@) multiply.run(a, b, c); else multiply.run(b, a, c); {STORE}",
    },
    "divergent-simd": {
        "run_of_some_lanes": (
            "auto d = alone.get_destination_cooperative_tensor<decltype(a), decltype(b), float>();"
            f" if (@lane < 8@simd == 2@) alone.run(a, b, d); {CLEAR} {STORE}"
        )
    },
    "nonuniform-operand": {
        "tensors_differ_between_threads": f"auto own = wide.slice(0, simd@@ / 9@); multiply.run(own, b, c); {STORE}"
    },
    "tensor-scope": {
        "wrong_number_of_simdgroups": (
            "matmul2d<product, execution_simdgroups<@2@4@>> op;"
            " @auto d = op.get_destination_cooperative_tensor<decltype(a), decltype(b), float>();@@"
            f" op.run(a, b, @d@c@); @{CLEAR}@@ {STORE}"
        )
    },
    "device-race": {
        "two_simdgroups_write_one_destination": (
            f"{OUT}(y@@ + simd * 1024@, dextents<int, 2>(32, 32)); alone.run(a, b, out);"
        )
    },
}
KINDS = {name: kind for kind, bodies in SEEDED.items() for name in bodies}


@functools.cache
def seeded_library():
    return softmetal.compile(HEADER + twins(SEEDED, ARGUMENTS, TYPES), standard=STANDARD)


def run_seeded(name: str, seed: int):
    x = np.random.default_rng(0).normal(size=64 * 64).astype(np.float16)
    y = np.empty(4 * 32 * 32, np.float32)
    return seeded_library().launch(name, [x, y], (1,), (128,), seed=seed, uninitialized=[1])


@pytest.mark.parametrize("name", KINDS)
def test_seeded_bug(name):
    report = run_seeded(f"{name}_wrong", seed=1)
    assert KINDS[name] in report.kinds, report.errors


@pytest.mark.parametrize("name", KINDS)
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
    library = softmetal.compile(header + "kernel void k(device int* p) { p[0] = 1; }", standard="metal3.1")
    assert library.kernels == ["k"]
    with pytest.raises(softmetal.CompileError, match="mpp"):
        softmetal.compile(HEADER + line, standard="metal3.1")


# --- Kernels in the style of other projects --------------------------------------------------------------------------

PRODUCT = """
// y [M, N] = a [M, K] b, and b is [K, N] or, transposed, [N, K]. TM x TN tiles; `simdgroups` of them share one.
template <typename T, int TM, int TN, bool transpose, int simdgroups>
[[kernel]] void product(
    device T* a [[buffer(0)]], device T* b [[buffer(1)]], device float* y [[buffer(2)]],
    constant int3& shape [[buffer(3)]], uint2 group [[threadgroup_position_in_grid]]) {
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
    device half* a [[buffer(0)]], device half* b [[buffer(1)]], device float* y [[buffer(2)]],
    constant int3& shape [[buffer(3)]], uint tid [[thread_index_in_threadgroup]]) {
  const int M = shape.x, N = shape.y, K = shape.z;
  threadgroup half tile_b[32 * 32];
  using Shared = tensor<threadgroup half, extents<int, 32, 32>, tensor_inline>;
  Shared shared(tile_b, extents<int, 32, 32>());
  auto whole = tensor(a, dextents<int, 2>(K, M), array<int, 2>{1, K});
  auto out = tensor(y, dextents<int, 2>(N, M));
  matmul2d<
      matmul2d_descriptor(32, 32, 32, false, false, true, matmul2d_descriptor::mode::multiply_accumulate),
      execution_simdgroups<2>> op;
  for (int i = tid; i < M * N; i += 64) { y[i] = 0.0f; }
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
  for (ushort i = 0; i < sums.get_capacity(); ++i) { sums[i] = 1.0f; }
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


def random_values(*shape: int, dtype: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """As the device has them, bfloat16 as uint16, and as float64."""
    values = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    if dtype != "bfloat16":
        stored = values.astype(dtype)
        return stored, stored.astype(np.float64)
    stored = (values.view(np.uint32) >> 16).astype(np.uint16)
    return stored, (stored.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


@pytest.mark.parametrize(
    "name, dtype, tile, simdgroups",
    [
        ("half_nn", "float16", (64, 32), 4),
        ("half_nt", "float16", (32, 64), 4),
        ("bfloat_nt", "bfloat16", (32, 32), 1),
        ("float_nn", "float32", (16, 48), 2),
    ],
)
@pytest.mark.parametrize("shape", [(64, 192, 64), (70, 45, 37), (1, 1, 1)])
def test_foreign_product(name, dtype, tile, simdgroups, shape):
    m, n, k = shape
    a, left = random_values(m, k, dtype=dtype, seed=1)
    b, right = random_values(*((n, k) if name.endswith("nt") else (k, n)), dtype=dtype, seed=2)
    y = np.empty((m, n), np.float32)
    size = np.array([m, n, k, 0], np.int32).tobytes()
    grid = (-(-n // tile[1]), -(-m // tile[0]))
    report = products().launch(name, [a, b, y, size], grid, (32 * simdgroups,), seed=3, uninitialized=[2])
    assert report.errors == []
    np.testing.assert_allclose(y, left @ (right.T if name.endswith("nt") else right), rtol=1e-5, atol=2e-5)
    if m == 64:  # in 8x8 products
        assert report.counters["simdgroup_multiplies"] == m * n * k // 512


def test_foreign_product_in_steps():
    a, left = random_values(30, 64, dtype="float16", seed=1)
    b, right = random_values(64, 20, dtype="float16", seed=2)
    a = np.concatenate([a, np.zeros((2, 64), np.float16)])  # a static slice reads whole tiles
    size = np.array([32, 20, 64, 0], np.int32).tobytes()
    y = np.empty((32, 20), np.float32)
    report = products().launch("steps", [a, b, y, size], (1,), (64,), seed=3, uninitialized=[2])
    assert report.errors == []
    np.testing.assert_allclose(y[:30], left @ right, rtol=1e-5, atol=2e-5)


def test_foreign_product_in_registers():
    a, left = random_values(16, 16, dtype="bfloat16", seed=1)
    b, right = random_values(32, 16, dtype="bfloat16", seed=2)
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
    a, left = random_values(64, 64, dtype="float16", seed=1)
    b, right = random_values(64, 96, dtype="float16", seed=2)
    y = np.empty((64, 96), np.float32)
    size = np.array([64, 96, 64, 0], np.int32).tobytes()
    assert products().launch("half_nn", [a, b, y, size], (3, 1), (128,), check=False).errors == []
    np.testing.assert_allclose(y, left @ right, rtol=1e-5, atol=2e-5)
