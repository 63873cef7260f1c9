"""The software Metal device: every detector on a wrong kernel and on its legal twin, and whole kernels on numbers."""

import os
import re
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from twins import twins

import softmetal
from softmetal import cache, device

if sys.platform == "darwin":
    pytest.skip("the software device runs on Linux", allow_module_level=True)

README = Path(__file__).resolve().parents[1] / "README.md"
VERSIONS = ("3.1", "3.2", "4.0")
HEADER = """#include <metal_stdlib>
using namespace metal;
"""
ARGUMENTS = """const device float* x [[buffer(0)]], device float* y [[buffer(1)]], constant int& n [[buffer(2)]],
  threadgroup float* dynamic [[threadgroup(0)]], device atomic_uint* counter [[buffer(3)]],
  uint tid [[thread_index_in_threadgroup]], uint gid [[thread_position_in_grid]],
  uint lane [[thread_index_in_simdgroup]], uint simd [[simdgroup_index_in_threadgroup]],
  uint group [[threadgroup_position_in_grid]]"""
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
FILL = "threadgroup float s[64]; s[tid] = x[gid];"
SIMD_BARRIER = "simdgroup_barrier(mem_flags::mem_threadgroup);"
DEVICE_BARRIER = "threadgroup_barrier(mem_flags::mem_device);"

# kind: {name: body}, of which twins.py says what the @ mean.
# Two threadgroups of 64 threads, 128 elements each in x and y, n = 128.
SEEDED = {
    "threadgroup-race": {
        "missing_barrier": f"{FILL} @@{BARRIER}@ y[gid] = s[63 - tid];",
        "write_after_read": (
            f"{FILL} {BARRIER} float v = s[63 - tid]; @s[tid] = v; {BARRIER}@{BARRIER} s[tid] = v;@ y[gid] = s[tid];"
        ),
        # Lane 0 writes what all 64 have read: its own simdgroup is ordered, the other is not, although it read first.
        "write_after_several_readers": (
            f"threadgroup float s; if (tid == 0) s = x[0]; {BARRIER} float v = s; @{SIMD_BARRIER}@{BARRIER}@"
            f" if (tid == 0) s = v + 1; {BARRIER} y[gid] = s;"
        ),
        "barrier_without_flag": f"{FILL} threadgroup_barrier(mem_flags::mem_none); y[gid] = s[@63 - tid@tid@];",
        "barrier_with_device_flag_only": (
            f"{FILL} threadgroup_barrier(mem_flags::mem_device@@ | mem_flags::mem_threadgroup@); y[gid] = s[63 - tid];"
        ),
        "simdgroup_barrier_across_simdgroups": f"{FILL} {SIMD_BARRIER} y[gid] = s[@63 - tid@tid ^ 1@];",
        "race_within_a_simdgroup": f"@{FILL} y[gid] = s[tid ^ 1];@y[gid] = simd_shuffle_xor(x[gid], 1);@",
        "simd_operation_is_no_barrier": f"{FILL} float v = simd_sum(x[gid]); y[gid] = s[@tid ^ 1@tid@] + v;",
        "buffer_reuse_in_a_loop": (
            "threadgroup float s[64]; float v = 0; for (int i = 0; i < 3; i++) { s[tid] = x[gid] + i;"
            f" {BARRIER} v += s[63 - tid]; @@{BARRIER}@ }} y[gid] = v;"
        ),
        "neighbouring_bytes": (
            f"threadgroup uchar s[64]; s[@tid / 2@tid@] = tid; {BARRIER} @y[gid] = s[tid / 2];@y[gid] = s[63 - tid];@"
        ),
        # Cells of the shadow get narrower as accesses do: a word, then its halves.
        "half_of_a_word": (
            f"threadgroup uint s[64]; s[tid] = tid; {BARRIER} threadgroup ushort* h = (threadgroup ushort*)s;"
            " h[2 * tid + 1] = 1; y[gid] = @s[tid ^ 1]@h[2 * (tid ^ 1)]@;"
        ),
        "matrix_store_and_load": (
            f"{FILL} {BARRIER} simdgroup_float8x8 m; simdgroup_load(m, s); @@{BARRIER}@"
            " if (simd == 0) simdgroup_store(m, s); y[gid] = m.thread_elements()[1];"
        ),
    },
    "threadgroup-uninitialized": {
        "uninitialized_threadgroup_read": (
            f"threadgroup float s[64]; if (tid < 60) s[tid] = x[gid]; {BARRIER}"
            " y[gid] = @s[tid]@tid < 60 ? s[tid] : 0@;"
        ),
        "uninitialized_accumulation": "threadgroup float s[64]; @@s[tid] = 0;@ s[tid] += x[gid]; y[gid] = s[tid];",
    },
    "device-uninitialized": {"uninitialized_device_read": "y[gid] @+= x[gid];@= x[gid]; y[gid] += 1;@"},
    "threadgroup-out-of-bounds": {
        "threadgroup_overrun": f"threadgroup float s[@64@65@]; s[tid + 1] = x[gid]; {BARRIER} y[gid] = x[gid];",
        "threadgroup_underrun": (
            f"threadgroup float s[64]; @@if (tid > 0)@ s[int(tid) - 1] = x[gid]; {BARRIER} y[gid] = x[gid];"
        ),
        "threadgroup_argument_overrun": (
            f"dynamic[@tid + n / 128@tid@] = x[gid]; {BARRIER} y[gid] = @x[gid]@dynamic[63 - tid]@;"
        ),
    },
    "device-out-of-bounds": {
        "device_read_past_the_end": "y[gid] = x[@gid + 1@min(gid + 1, uint(n) - 1)@];",
        "device_read_before_the_start": "y[gid] = x[@int(gid) - 1@max(int(gid) - 1, 0)@];",
        "device_write_past_the_end": "@y[gid] = 0; y[gid + n]@y[gid]@ = x[gid];",
        "device_access_far_away": "y[gid] = x[ulong(gid)@ + (1ul << 40)@@];",
        "vector_read_over_the_end": (
            "float4 v = *(const device packed_float4*)(x + @gid@min(gid, 124u)@); y[gid] = v.x + v.w;"
        ),
    },
    "misaligned": {
        "misaligned_vector": "y[gid] = (*(const device float4*)(x + @(gid & 63) + 1@(gid & 31) * 4@)).x;",
        "misaligned_scalar": "y[gid] = *(const device float*)((const device uchar*)x + 4 * (gid / 2)@ + 2@@);",
    },
    "readonly-write": {
        "write_to_const": "@y[gid] = 0; ((device float*)x)[gid] = 1;@((device float*)y)[gid] = x[gid];@"
    },
    "divergent-simd": {
        "divergent_simd_operation": (
            "@@float v = simd_sum(x[gid]);@ if (lane < 16) y[gid] = @simd_sum(x[gid])@v@; else y[gid] = 0;"
        ),
        "two_simd_operations": "if (@lane < 16@simd == 0@) y[gid] = simd_sum(x[gid]); else y[gid] = simd_max(x[gid]);",
        "two_equal_simd_operations": (
            "if (@lane < 16@simd == 0@) y[gid] = simd_sum(x[gid]); else y[gid] = simd_sum(x[gid]);"
        ),
        "divergent_matrix_load": (
            "simdgroup_float8x8 m; @y[gid] = 0; if (lane < 8) {@@"
            " simdgroup_load(m, x); y[gid] = m.thread_elements()[0]; @}@@"
        ),
    },
    "divergent-barrier": {
        "divergent_barrier": (
            f"{FILL} @if (tid < 32) {{ {BARRIER} y[gid] = s[63 - tid]; }} else {{@@"
            f" {BARRIER} y[gid] = @@tid < 32 ? s[63 - tid] :@ 2 * s[63 - tid]; @}}@@"
        ),
        "return_before_barrier": (
            "threadgroup float s[64]; y[gid] = 0; @if (tid > 60) return;@@ s[tid] = x[gid];"
            f" {BARRIER} @@if (tid > 60) return;@ y[gid] = s[tid];"
        ),
        "divergent_simdgroup_barrier": f"if (@lane < 16@simd == 0@) {SIMD_BARRIER} y[gid] = simd_sum(x[gid]);",
    },
    "nonuniform-operand": {"varying_delta": "y[gid] = @simd_shuffle_down@simd_shuffle@(x[gid], ushort(lane & 1));"},
    "device-race": {
        "two_threadgroups_write": "@y[tid] = x[gid]; y[64 + tid] = 0;@y[gid] = x[gid];@",
        "read_from_another_threadgroup": (
            f"y[gid] = x[gid]; {DEVICE_BARRIER}"
            f" @y[gid] = y[127 - gid];@float v = y[gid ^ 63]; {DEVICE_BARRIER} y[gid] = v;@"
        ),
        "device_hand_over_without_device_flag": (
            f"y[gid] = x[gid]; @{BARRIER}@{DEVICE_BARRIER}@ float v = y[gid ^ 63];"
            f" @{BARRIER}@{DEVICE_BARRIER}@ y[gid] = v;"
        ),
        "plain_access_to_an_atomic": (
            "y[gid] = 0; @((device uint*)counter)[0] += 1;"
            "@atomic_fetch_add_explicit(counter, 1u, memory_order_relaxed);@"
        ),
    },
    "threadgroup-memory-limit": {
        "too_much_threadgroup_memory": f"threadgroup float s[@8192@8128@]; s[tid] = x[gid]; {BARRIER} y[gid] = s[tid];"
    },
}
KINDS = {name: kind for kind, bodies in SEEDED.items() for name in bodies}


@pytest.fixture(scope="module")
def seeded():
    return softmetal.compile(HEADER + twins(SEEDED, ARGUMENTS))


def run_seeded(library, name, seed=0):
    x = np.arange(1, 129, dtype=np.float32)
    y = np.empty(128, np.float32)
    counter = np.zeros(1, np.uint32)
    memory = {"threadgroup_memory": {0: 256}, "uninitialized": [1]}
    return library.launch(name, [x, y, np.int32(128), counter], (2, 1, 1), (64, 1, 1), **memory, seed=seed)


@pytest.mark.parametrize("seed", [0, 7])
@pytest.mark.parametrize("name", KINDS)
def test_seeded_bug(seeded, name, seed):
    report = run_seeded(seeded, f"{name}_wrong", seed)
    assert KINDS[name] in report.kinds, report.errors


@pytest.mark.parametrize("seed", [0, 7])
@pytest.mark.parametrize("name", KINDS)
def test_legal_twin(seeded, name, seed):
    assert run_seeded(seeded, f"{name}_legal", seed).errors == []


def test_errors_name_file_line_and_buffer(tmp_path):
    shader = tmp_path / "overrun.metal"
    body = "  uint i = gid + 1;\n  y[gid] = x[i];\n"
    shader.write_text(f"{HEADER}kernel void overrun({ARGUMENTS}) {{\n{body}}}\n")
    line = shader.read_text()[: shader.read_text().index("y[gid]")].count("\n") + 1
    (error,) = run_seeded(softmetal.compile(shader), "overrun").errors
    assert error.startswith(f"device-out-of-bounds: {shader}:{line}: read of 4 bytes at byte 512 of buffer 0,")
    assert "threadgroup (1, 0, 0), thread 63" in error


def test_guard_zones_without_instrumentation(seeded):
    x = np.zeros(128, np.float32)
    y = np.zeros(128, np.float32)
    buffers = [x, y, np.int32(128), np.zeros(1, np.uint32)]
    report = seeded.launch("device_write_past_the_end_wrong", buffers, (2,), (64,), check=False)
    assert report.errors == ["device-out-of-bounds: overwritten guard zone: 0 bytes past the end of buffer 1"]
    assert seeded.launch("device_write_past_the_end_legal", buffers, (2,), (64,), check=False).errors == []


def test_endless_loop_is_given_up():
    library = softmetal.compile(
        HEADER + "kernel void spin(device int* y [[buffer(0)]]) { volatile device int* p = y; while (p[0] == 0) {} }"
    )
    assert library.launch("spin", [np.zeros(1, np.int32)], (1,), (1,), seconds=0.2).kinds == {"timeout"}


@pytest.mark.parametrize(
    "line, message",
    [
        ("void f(thread float* p); void g(device float* p) { f(p); }", "no matching function"),
        ("void g(device float* p) { threadgroup float* q = (threadgroup float*)p; *q = 0; }", "address space"),
        ("void g(constant int& n) { n = 1; }", "const"),
        ("void g(const device int* n) { n[0] = 1; }", "const"),
        ("float g(float a) { double b = a; return b; }", "no 'double'"),
        ("void g() { throw 1; }", "no 'throw'"),
        ("struct S { virtual void f(); };", "no 'virtual'"),
        ("half g(bfloat a) { half b = a; return b; }", "bfloat"),
        ("kernel int k(device int* p) { return 1; }", "a kernel returns void"),
        (
            "float g(simdgroup_matrix<int, 8, 8> m) { return 0; }\nvoid h() { simdgroup_matrix<int, 8, 8> m; }",
            "float, half",
        ),
        ("bool g(bool a) { return simd_sum(a); }", "simd_sum"),
        (
            "namespace q { template <typename T> kernel void f(device T* p) { *p = 0; } }\nusing namespace q;\n"
            'template [[host_name("g")]] [[kernel]] decltype(f<int>) f<int>;',
            "'q::f' outside of its namespace",
        ),
    ],
)
def test_compile_error_names_its_line(line, message):
    with pytest.raises(softmetal.CompileError, match=r"<source>:[345]:") as caught:
        softmetal.compile(HEADER + line + "\n")
    assert message in str(caught.value).replace("__bf16", "bfloat")


# --- The lint: what Apple's compiler rejects and ours takes ----------------------------------------------------------

# rule: (wrong, legal twin), at language version 3.1.
LINT = {
    "address-space parameter": ("void f(float* p);", "void f(thread float* p);"),
    "address-space reference": ("int f(const int& n) { return n; }", "int f(const thread int& n) { return n; }"),
    "address-space result": ("float* f(device float* p);", "device float* f(device float* p);"),
    "address-space member": ("struct S { float* p; };", "struct S { device float* p; };"),
    "address-space local": (
        "void f(device float* p) { float* q = p; q[0] = 1; }",
        "void f(device float* p) { device float* q = p; q[0] = *p * *q; }",
    ),
    "address-space cast": (
        "uint f(device float* p) { return ((device uint*)(float*)p)[0]; }",
        "uint f(device float* p) { return ((device uint*)p)[0]; }",
    ),
    "address-space template argument": (
        "template <typename T> struct S { T p; };\nvoid f(S<float*> s);",
        "template <typename T> struct S { T p; };\nvoid f(S<device float*> s);",
    ),
    "no-such-word virtual": ("struct S { virtual void f(); };", "struct S { void f(); };"),
    "no-such-word goto": ("void f() { again: goto again; }", "void f() { for (;;) {} }"),
    "no-such-word try": ("void f() { try { } catch (...) { } }", "void f() { { } }"),
    "no-such-word dynamic_cast": ("int f(int a) { return dynamic_cast<int>(a); }", "int f(int a) { return a; }"),
    "no-such-word new": ("void f() { new int(1); }", "void f() { int a(1); }"),
    "no-such-word double": ("float f(float a) { return double(a); }", "float f(float a) { return half(a); }"),
    "no-such-word long long": ("long long f();", "long f();"),
    "std": ("float f(float a) { return std::exp(a); }", "float f(float a) { return metal::exp(a); }"),
    "threadgroup-variable in a function": (
        "void f() { threadgroup float s[4]; }",
        "kernel void f() { threadgroup float s[4]; threadgroup float* p = s; }",
    ),
    "threadgroup-variable with a value": (
        "kernel void f() { threadgroup int s = 1; }",
        "kernel void f() { threadgroup int s; s = 1; }",
    ),
    "kernel-type": ("kernel int f() { return 1; }", "kernel void f() { }"),
    "lambda": (
        "int f() { auto g = [](int a) { return a; }; return g(1); }",
        "int f() { int g[1] = {1}; return g[0]; }",
    ),
    "size-in-argument": ("kernel void f(constant size_t& n) { }", "kernel void f(constant ulong& n) { }"),
    "size-in-argument of a struct": (
        "struct P { size_t n; };\nkernel void f(constant P& p) { }",
        "struct P { ulong n; };\nkernel void f(constant P& p) { }",
    ),
    "host-name": (
        "template <typename T> kernel void f(device T* p) { }\n"
        'template [[host_name("a")]] [[kernel]] decltype(f<int>) f<int>;'
        'template [[host_name("a")]] [[kernel]] decltype(f<half>) f<half>;',
        "template <typename T> kernel void f(device T* p) { }\n"
        'template [[host_name("a")]] [[kernel]] decltype(f<int>) f<int>;'
        'template [[host_name("b")]] [[kernel]] decltype(f<half>) f<half>;',
    ),
    "vector-size": ("void f(vec<half, 8> v);", "void f(vec<half, 4> v);"),
    "cpp17 if constexpr": ("int f() { if constexpr (true) return 1; return 2; }", "int f() { if (true) return 1; }"),
    "cpp17 namespaces": ("namespace a::b { }", "namespace a { namespace b { } }"),
    "cpp17 bindings": (
        "struct S { int a, b; }; int f(S s) { auto [a, b] = s; return a; }",
        "struct S { int a, b; }; int f(S s) { auto a = s.a; return a; }",
    ),
    "cpp17 auto": ("template <auto n> int f();", "template <int n> int f();"),
    "constant": ("float table[2] = {1, 2};", "constant float table[2] = {1, 2};"),
    "constant member": (
        "struct S { static constexpr int n = 1; };",
        "struct S { static constexpr constant int n = 1; };",
    ),
    "argument-index": (
        "kernel void f(device int* p [[buffer(1)]], device int* q [[buffer(1)]]) { }",
        "kernel void f(device int* p [[buffer(1)]], device int* q [[buffer(2)]]) { }",
    ),
    "position-type": (
        "kernel void f(int i [[thread_position_in_grid]]) { }",
        "kernel void f(ushort2 i [[thread_position_in_grid]]) { }",
    ),
    "kernel-call": ("kernel void f() { }\nkernel void g() { f(); }", "void f() { }\nkernel void g() { f(); }"),
    "recursion": ("int f(int n) { return n > 0 ? f(n - 1) : 0; }", "int g(int n);\nint f(int n) { return g(n - 1); }"),
    "main": ("void main();", "void start();"),
}


@pytest.mark.parametrize("rule", LINT)
def test_lint_rule(rule):
    wrong, legal = LINT[rule]
    found = softmetal.lint(HEADER + wrong)
    assert {finding.rule for finding in found} == {rule.split()[0]}, found
    assert softmetal.lint(HEADER + legal) == []


def test_lint_follows_the_language_version():
    source = HEADER + LINT["lambda"][0] + LINT["cpp17 if constexpr"][0].replace("f()", "g()")
    rules = {version: {f.rule for f in softmetal.lint(source, standard=f"metal{version}")} for version in VERSIONS}
    assert rules == {"3.1": {"lambda", "cpp17"}, "3.2": {"cpp17"}, "4.0": set()}


def test_lint_names_the_line(tmp_path):
    shader = tmp_path / "wrong.metal"
    shader.write_text(f"{HEADER}\nvoid f(float* p);\n")
    (finding,) = softmetal.lint(shader)
    assert str(finding).startswith(f"{shader}:4: error: 'float* p' names no address space")


@pytest.mark.parametrize(
    "arguments",
    [
        {"threads_per_threadgroup": (1025,)},
        {"threadgroup_memory": {0: 24}},
        {"threadgroup_memory": {1: 16}},
        {"threadgroups": (0,)},
        {"buffers": [bytes(4097)]},
        {"buffers": [np.zeros((4, 4))[:, 1]]},
        {"buffers": [None] * 32},
        {"buffers": [None, b"read-only"]},
    ],
)
def test_launch_refuses_what_no_device_takes(seeded, arguments):
    with pytest.raises(ValueError):
        seeded.launch("missing_barrier_legal", **{"buffers": [], "threadgroups": (1,), **arguments})


# Sources that end, or stop making sense, where the translator wants more.
UNREADABLE = (
    "using v = vec<float, 4>",
    "constant int n [[function_constant(1 +)]];",
    "kernel void f(device int* p [[buffer(2 -)]]) { }",
    'template [[host_name("g")]] [[kernel]] decltype(f<int>',
)


@pytest.mark.parametrize("line", UNREADABLE)
def test_source_that_cannot_be_read(line):
    with pytest.raises(softmetal.CompileError, match=r"^<source>:3: error: "):
        softmetal.compile(HEADER + line)


def test_cache_is_bounded(tmp_path, monkeypatch):
    """The least recently used files go, but none that another process may be about to load."""
    monkeypatch.setenv("SOFTMETAL_CACHE", str(tmp_path))
    now = time.time()
    hours = {"kernel-unused": 200, "kernel-old": 30, "kernel-older": 40, "kernel-new": 0}
    for name, age in hours.items():
        (tmp_path / name).write_bytes(bytes(100))
        os.utime(tmp_path / name, (now - 3600 * age,) * 2)
    cache.cached("kernel-old", lambda path: path.write_bytes(b""))  # which is a use of it
    cache.prune(limit=250)
    assert {path.name for path in tmp_path.glob("*-*")} == {"kernel-old", "kernel-new"}
    cache.prune(limit=0)
    assert len(list(tmp_path.glob("*-*"))) == 2, "once a day is enough"


def test_example_of_the_readme(capsys):
    example, output = re.findall(r"```(?:python)?\n(.*?)```", README.read_text(), re.DOTALL)[:2]
    assert len([line for line in example.splitlines() if line]) <= 10
    exec(example, {})
    assert capsys.readouterr().out.split() == output.split()


# --- Whole kernels in the style of other projects -------------------------------------------------------------------

SOFTMAX = """
template <typename T, typename AccT = T, int N_READS = 4>
[[kernel]] void softmax(
    const device T* in, device T* out, constant int& axis_size, uint gid [[threadgroup_position_in_grid]],
    uint lid [[thread_position_in_threadgroup]], uint simd_lane_id [[thread_index_in_simdgroup]],
    uint simd_group_id [[simdgroup_index_in_threadgroup]]) {
  constexpr int SIMD_SIZE = 32;
  threadgroup AccT local_max[SIMD_SIZE];
  threadgroup AccT local_normalizer[SIMD_SIZE];
  AccT ld[N_READS];
  in += gid * size_t(axis_size) + lid * N_READS;
  for (int i = 0; i < N_READS; i++) {
    ld[i] = lid * N_READS + i < uint(axis_size) ? AccT(in[i]) : numeric_limits<AccT>::lowest();
  }
  if (simd_group_id == 0) {
    local_max[simd_lane_id] = numeric_limits<AccT>::lowest();
    local_normalizer[simd_lane_id] = 0;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  AccT maxval = numeric_limits<AccT>::lowest();
  for (int i = 0; i < N_READS; i++) { maxval = (maxval < ld[i]) ? ld[i] : maxval; }
  maxval = simd_max(maxval);
  if (simd_lane_id == 0) { local_max[simd_group_id] = maxval; }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  maxval = simd_max(local_max[simd_lane_id]);
  AccT normalizer = 0;
  for (int i = 0; i < N_READS; i++) {
    ld[i] = fast::exp(ld[i] - maxval);
    normalizer += ld[i];
  }
  normalizer = simd_sum(normalizer);
  if (simd_lane_id == 0) { local_normalizer[simd_group_id] = normalizer; }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  normalizer = 1 / simd_sum(local_normalizer[simd_lane_id]);
  out += gid * size_t(axis_size) + lid * N_READS;
  for (int i = 0; i < N_READS; i++) {
    if (lid * N_READS + i < uint(axis_size)) { out[i] = T(ld[i] * normalizer); }
  }
}
#define instantiate_softmax(name, ...) \\
  template [[host_name("softmax_" #name)]] [[kernel]] decltype(softmax<__VA_ARGS__>) softmax<__VA_ARGS__>;
instantiate_softmax(float32, float)
instantiate_softmax(float16, half, float)
instantiate_softmax(bfloat16, bfloat, float)
"""

RMS_NORM = """
typedef struct { int width; float epsilon; } Arguments;
constant bool has_residual [[function_constant(7)]];
constant int rows_per_group [[function_constant(8)]];
constant float scale = rows_per_group > 0 ? 2.0 : 1.0;

kernel void kernel_rms_norm(
    constant Arguments& args, device const char* src,
    device const char* residual [[buffer(2), function_constant(has_residual)]], device char* dst,
    threadgroup float* shmem [[threadgroup(0)]], uint3 tgpig [[threadgroup_position_in_grid]],
    ushort3 tpitg [[thread_position_in_threadgroup]], ushort sgitg [[simdgroup_index_in_threadgroup]],
    ushort tiisg [[thread_index_in_simdgroup]], ushort3 ntg [[threads_per_threadgroup]]) {
  device const float4* x = (device const float4*)src + tgpig.x * args.width / 4;
  device const float4* r = (device const float4*)residual + tgpig.x * args.width / 4;
  device float4* y = (device float4*)dst + tgpig.x * args.width / 4;
  if (sgitg == 0) { shmem[tiisg] = 0.0f; }
  float sum = 0.0f;
  for (int i = tpitg.x; i < args.width / 4; i += ntg.x) {
    const float4 value = has_residual ? x[i] + r[i] : x[i];
    sum += dot(value, value);
  }
  sum = simd_sum(sum);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (tiisg == 0) { shmem[sgitg] = sum; }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  sum = simd_sum(shmem[tiisg]);
  const float factor = scale / sqrt(sum / args.width + args.epsilon);
  for (int i = tpitg.x; i < args.width / 4; i += ntg.x) { y[i] = (has_residual ? x[i] + r[i] : x[i]) * factor; }
}
"""

PRODUCT = """
template <typename T, int BM, int BN, int BK>
struct Tile {
  static constant constexpr int pad = 16 / sizeof(T);
  simdgroup_matrix<float, 8, 8> sums[2][2];
  Tile() thread {
    for (int i = 0; i < 4; i++) {
      sums[i / 2][i % 2] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
    }
  }
  void accumulate(const threadgroup T* a, const threadgroup T* b) thread {
    for (int k = 0; k < BK; k += 8) {
      simdgroup_matrix<T, 8, 8> left, right;
      for (int i = 0; i < 2; i++) {
        simdgroup_load(left, a + i * 8 * (BK + pad) + k, BK + pad);
        for (int j = 0; j < 2; j++) {
          simdgroup_load(right, b + j * 8 * (BK + pad) + k, BK + pad, ulong2(0, 0), true);
          simdgroup_multiply_accumulate(sums[i][j], left, right, sums[i][j]);
        }
      }
    }
  }
};

// y = a b^T: a [M, K], b [N, K]; four simdgroups, each 16 x 16 of a 32 x 32 tile.
template <typename T, int BM = 32, int BN = 32, int BK = 16>
[[kernel, max_total_threads_per_threadgroup(128)]] void product(
    const device T* a [[buffer(0)]], const device T* b [[buffer(1)]], device float* y [[buffer(2)]],
    constant int3& shape [[buffer(3)]], uint2 group [[threadgroup_position_in_grid]],
    uint tid [[thread_index_in_threadgroup]], uint simd [[simdgroup_index_in_threadgroup]]) {
  using tile_t = Tile<T, BM, BN, BK>;
  threadgroup T left[BM * (BK + tile_t::pad)], right[BN * (BK + tile_t::pad)];
  const int M = shape.x, N = shape.y, K = shape.z;
  const int row = group.y * BM, column = group.x * BN;
  tile_t tile;
  for (int k = 0; k < K; k += BK) {
    for (int i = tid; i < BM * BK; i += 128) {
      const int r = i / BK, c = i % BK;
      left[r * (BK + tile_t::pad) + c] = row + r < M && k + c < K ? a[(row + r) * K + k + c] : T(0);
      right[r * (BK + tile_t::pad) + c] = column + r < N && k + c < K ? b[(column + r) * K + k + c] : T(0);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);  // tiles are loaded
    tile.accumulate(left + (simd / 2) * 16 * (BK + tile_t::pad), right + (simd % 2) * 16 * (BK + tile_t::pad));
    threadgroup_barrier(mem_flags::mem_threadgroup);  // tiles are used
  }
  for (int i = 0; i < 2; i++) {
    for (int j = 0; j < 2; j++) {
      simdgroup_store(tile.sums[i][j], y, N, ulong2(column + (simd % 2) * 16 + j * 8, row + (simd / 2) * 16 + i * 8));
    }
  }
}
template [[host_name("product_float")]] [[kernel]] void product<float>(
    const device float*, const device float*, device float*, constant int3&, uint2, uint, uint);
template [[host_name("product_half")]] [[kernel]] decltype(product<half>) product<half>;
template [[host_name("product_bfloat")]] [[kernel]] decltype(product<bfloat>) product<bfloat>;
"""


def to_bfloat16(values):
    """float32 values, rounded to nearest even, as the 16 bits of bfloat16."""
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bfloat16(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


@pytest.mark.parametrize("name, tolerance", [("float32", 1e-6), ("float16", 1e-3), ("bfloat16", 8e-3)])
def test_softmax(name, tolerance):
    values = np.random.default_rng(1).normal(size=(3, 250)).astype(np.float32)
    x = to_bfloat16(values) if name == "bfloat16" else values.astype(name)
    y = np.empty_like(x)
    library = softmetal.compile(HEADER + SOFTMAX)
    report = library.launch(f"softmax_{name}", [x, y, np.int32(250)], (3,), (64,), seed=3, uninitialized=[1])
    assert report.errors == []
    wide = (from_bfloat16(x) if name == "bfloat16" else x).astype(np.float64)
    expected = np.exp(wide - wide.max(-1, keepdims=True))
    expected /= expected.sum(-1, keepdims=True)
    result = from_bfloat16(y) if name == "bfloat16" else y
    np.testing.assert_allclose(result, expected, rtol=tolerance, atol=1e-7)


@pytest.mark.parametrize("residual", [False, True])
def test_rms_norm_with_function_constants(residual):
    random = np.random.default_rng(2)
    x, r = random.normal(size=(2, 4, 320)).astype(np.float32)
    y = np.empty_like(x)
    library = softmetal.compile(HEADER + RMS_NORM, function_constants={7: residual, 8: 1})
    assert library.function_constants == {7: "has_residual", 8: "rows_per_group"}
    arguments = np.array([320], np.int32).tobytes() + np.array([1e-5], np.float32).tobytes()
    report = library.launch(
        "kernel_rms_norm",
        [arguments, x, r if residual else None, y],
        (4,),
        (64,),
        threadgroup_memory={0: 128},
        uninitialized=[3],
    )
    assert report.errors == []
    total = x.astype(np.float64) + (r if residual else 0)
    expected = 2 * total / np.sqrt((total**2).mean(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
    assert report.counters["threadgroup_bytes"] == 128


CONSTANTS = """
namespace settings {
constant bool negate [[function_constant(3)]];
constant int2 offset [[function_constant(4)]];
constant float given [[function_constant(5)]];
constant float factor = is_function_constant_defined(given) ? given : 2.0;
constant float sign = negate ? -factor : factor;
}
kernel void scaled(const device float* x, device float* y,
    device float* extra [[buffer(2), function_constant(settings::negate)]], uint i [[thread_position_in_grid]]) {
  y[i] = settings::sign * x[i] + settings::offset.y;
  if (settings::negate) { extra[i] = 1; }
}
kernel void plain(device float* y) { y[0] = is_function_constant_defined(settings::offset) ? settings::offset.x : 7; }
kernel void other(device float* y) { y[0] = 1; }
"""


def test_function_constants_are_set_by_the_launch(tmp_path, monkeypatch):
    monkeypatch.setenv("SOFTMETAL_CACHE", str(tmp_path))
    library = softmetal.compile(HEADER + CONSTANTS)
    x, y = np.arange(4, dtype=np.float32), np.empty(4, np.float32)
    for negate, given in ((False, None), (True, None), (True, 0.5)):
        extra = np.zeros(4, np.float32)
        values = {3: negate, 4: (1, 2), 5: given}
        report = library.launch("scaled", [x, y, extra], threads=(4,), function_constants=values)
        assert report.errors == []
        np.testing.assert_array_equal(y, x * (given or 2) * (-1 if negate else 1) + 2)
        np.testing.assert_array_equal(extra, [negate] * 4)
    assert len(list(tmp_path.glob("kernel-*.so"))) == 1
    for values, result in (({}, 7), ({4: (5, 6)}, 5), ({4: np.array([8, 9], np.int32).tobytes()}, 8)):
        assert library.launch("plain", [y], threads=(1,), function_constants=values).errors == []
        assert y[0] == result


def test_missing_function_constants():
    library = softmetal.compile(HEADER + CONSTANTS)
    with pytest.raises(ValueError, match=r"kernel scaled needs function constant 3 \(negate\)"):
        library.pipeline("scaled", {4: (1, 2)})
    with pytest.raises(ValueError, match=r"kernel scaled needs function constant 4 \(offset\)"):
        library.pipeline("scaled", {3: True})
    with pytest.raises(ValueError, match=r"function constant 4 \(int2\) has 8 bytes, not 4"):
        library.pipeline("scaled", {3: True, 4: bytes(4)})
    assert library.pipeline("other").name == "other"


def test_constants_of_a_kernel():
    library = softmetal.compile(HEADER + CONSTANTS)
    scaled = [(3, "negate", "bool", True), (4, "offset", "int2", True), (5, "given", "float", False)]
    assert library.constants_of("scaled") == scaled
    assert library.constants_of("plain") == [(4, "offset", "int2", False)]
    assert library.constants_of("other") == []


def raw_launch(pipeline, allocations, threads):
    """A launch as a host makes it; returns the errors' texts."""
    device = softmetal.device
    launch = device._Launch(
        pipeline=device.ctypes.pointer(device._Pipeline.from_address(pipeline.address)),
        allocations=(device._Allocation * len(allocations))(*allocations),
        bindings=(device._Binding * len(allocations))(*(device._Binding(i, 0, 0) for i in range(len(allocations)))),
        allocation_count=len(allocations),
        binding_count=len(allocations),
        threads_per_threadgroup=(32, 1, 1),
        threads=(threads, 1, 1),
        seconds=10,
    )
    runtime = device.ctypes.CDLL(str(softmetal.runtime_path()))
    runtime.softmetal_launch.restype = device.ctypes.POINTER(device._Report)
    report = runtime.softmetal_launch(device.ctypes.byref(launch))
    errors = report.contents.errors[: report.contents.error_count]
    texts = [pipeline.describe(e.kind.decode(), e.message.decode(), e.offset, e.count) for e in errors]
    runtime.softmetal_free_report(report)
    return texts


@pytest.mark.parametrize("check", [True, False])
def test_raw_launch_on_a_hosts_memory(check):
    guard, size = 64, 128
    library = softmetal.compile(
        HEADER + "kernel void add(const device float* x, device float* y, uint i [[thread_position_in_grid]]) "
        "{ y[i + 1] = x[i] + 1; }"
    )
    memory = np.full((2, guard + size + guard), 0xFF, np.uint8)
    inner = memory[:, guard : guard + size].view(np.float32)
    inner[0] = np.arange(32)
    written = np.zeros((2, size), np.uint8)
    written[0, :96] = 1
    kind = {"size": size, "writable": 1, "in_place": 1, "guard": guard}
    places = zip(inner, written, strict=True)
    allocations = [device._Allocation(data=a.ctypes.data, written=b.ctypes.data, **kind) for a, b in places]
    pipeline = library.pipeline("add", check=check)
    assert raw_launch(pipeline, allocations, 24) == []
    np.testing.assert_array_equal(inner[1, 1:25], np.arange(1, 25))
    if check:
        np.testing.assert_array_equal(written[1], [0] * 4 + [1] * 96 + [0] * 28)
        (error,) = raw_launch(pipeline, allocations, 25)
        assert "<source>:3: read of memory 0 byte 96, which nothing has written" in error
    written[:] = 1
    errors = raw_launch(pipeline, allocations, 32)
    assert {error.split(":")[0] for error in errors} == {"device-out-of-bounds"}
    assert "device-out-of-bounds: overwritten guard zone: 0 bytes past the end of memory 1" in errors


def test_sources_that_differ_in_their_last_instance(monkeypatch):
    """What precedes it is rewritten once, and again where the instance has a macro of it."""
    rewritten = []
    rewrite = device.msl.rewrite
    monkeypatch.setattr(device.msl, "rewrite", lambda text, *rest: rewritten.append(text) or rewrite(text, *rest))
    template = f"""{HEADER}// {time.time_ns()}: in no cache
#define WIDE ulong
namespace n {{ template <typename T> kernel void size(device uint* y) {{ y[0] = sizeof(T); }} }}
namespace n {{
template [[host_name("named")]] [[kernel]] decltype(size<TYPE>) size<TYPE>;
}}
"""
    sizes = np.zeros(4, np.uint32)
    for i, kind in enumerate(("ushort", "uint4", "WIDE", "uchar")):
        library = softmetal.compile(template.replace("TYPE", kind))
        assert library.kernels == ["named"]
        assert not library.launch("named", [sizes[i:]], (1,), (1,)).errors
    assert sizes.tolist() == [2, 16, 8, 1]
    assert len(rewritten) == 2
    errors = library.launch("named", [np.zeros(1, np.uint8)], (1,), (1,)).errors
    assert any(": <source>:5: " in error for error in errors), errors
    with pytest.raises(softmetal.CompileError, match=r"<source>:7: error: 'named' instantiates 'n::other<int>'"):
        softmetal.compile(template.replace("size<TYPE>", "other<int>"))


def test_prepare_compiles_in_batches(tmp_path, monkeypatch):
    monkeypatch.setenv("SOFTMETAL_CACHE", str(tmp_path))
    kernels = [f"kernel void k{i}(device int* y) {{ y[0] = {i}; }}" for i in range(20)]
    library = softmetal.compile(HEADER + "\n".join(kernels))
    library.prepare()
    files = sorted(tmp_path.glob("kernel-*.so"))
    assert len(files) == 20 and len({path.stat().st_ino for path in files}) < 20
    y = np.zeros(1, np.int32)
    for i in (0, 7, 19):
        assert library.launch(f"k{i}", [y], threads=(1,)).errors == []
        assert y[0] == i
    assert sorted(tmp_path.glob("kernel-*.so")) == files


# Constructs that shaders of other projects are full of.
LANGUAGE = """
typedef struct { half d; uchar qs[16]; } block;
struct Pair { packed_float3 first; bool flag; };
template <typename V>
void unpack(device const block* b, short part, thread V& out) {
  for (int i = 0; i < 4; i++) { out[i] = b->d * b->qs[part * 4 + i]; }
}
template <short part, typename B, void (*unpacker)(device const B*, short, thread half4&)>
kernel void unpacked(device const B* b, device half4* y, uint i [[thread_position_in_grid]]) {
  half4 value = {0};
  unpacker(b + i, part, value);
  y[i] = value;
}
typedef decltype(unpacked<0, block, unpack>) unpacked_t;
template [[host_name("unpack_0")]] kernel unpacked_t unpacked<0, block, unpack>;
template [[host_name("unpack_3")]] kernel unpacked_t unpacked<3, block, unpack>;

float total(const thread float4& v) { return v.x + v.y + v.z + v.w; }

kernel void language(device float* y, device atomic_ulong* largest, uint i [[thread_position_in_grid]]) {
  threadgroup atomic_uint counts[2];
  threadgroup atomic_uint* count = counts + 1;
  atomic_store_explicit(count, 5u, memory_order_relaxed);
  const float4 a = float4(1, 2, 3, 4);
  const half4 h = (half4)a * 2;
  const float4x4 m = float4x4(2.0);
  const bool4 less = a < float4(2.5);
  short2 pair(3, 4);
  Pair p;
  p.first = float3(5, 6, 7) * 2;
  metal::array<int, 2> both;
  both[1] = 9;
  const float results[] = {
      total(a), total(float4(h)), -((float4)h).y, (m * a).z, m[1][1], float(any(less)), float(all(less)),
      select(a, -a, less).y, select(a, -a, less).z, float(pair.y), p.first[2], float(both[1]), clamp(a, 2, 3).w,
      fmax(2.5, a).x, float(1.5bf), 3 / 2. + 1e-1, float(extract_bits(0xABCDu, 4, 8)),
      float(insert_bits(0u, 5u, 3, 4)), float(popcount(255u)), float(clz(1u)), float(as_type<uint>(1.0f) >> 23),
      precise::exp(0.0f), fast::rsqrt(4.0f), float(half(65504.0h)), float(MAXHALF), float(reverse_bits(1u) >> 31),
      float(atomic_fetch_add_explicit(count, 1u, memory_order_relaxed))};
  for (int k = 0; k < 27; k++) { y[k] = results[k]; }
  atomic_max_explicit(largest, ulong(1) << 40, memory_order_relaxed);
  atomic_thread_fence(mem_flags::mem_device, memory_order_seq_cst, thread_scope_device);
}
"""


def test_language_on_numbers():
    library = softmetal.compile(HEADER + LANGUAGE, standard="metal3.2")
    y, largest = np.empty(27, np.float32), np.zeros(1, np.uint64)
    assert library.launch("language", [y, largest], threads=(1,), uninitialized=[0]).errors == []
    expected = [10, 20, -4, 6, 2, 1, 0, -2, 3, 4, 14, 9, 3, 2.5, 1.5, 1.6, 0xBC, 40, 8, 31, 127, 1, 0.5]
    expected += [65504, 65504, 1, 5]
    np.testing.assert_allclose(y, expected, rtol=1e-6)
    assert largest[0] == 1 << 40
    blocks = np.zeros(3, [("d", np.float16), ("qs", np.uint8, 16)])
    blocks["d"], blocks["qs"] = [0.5, 1, 2], np.arange(48).reshape(3, 16)
    for part in (0, 3):
        y = np.empty((3, 4), np.float16)
        assert library.launch(f"unpack_{part}", [blocks, y], threads=(3,), uninitialized=[1]).errors == []
        np.testing.assert_array_equal(y, blocks["d"].reshape(3, 1) * blocks["qs"][:, part * 4 : part * 4 + 4])


@pytest.mark.parametrize("name, tolerance", [("float", 1e-5), ("half", 1e-5), ("bfloat", 1e-5)])
def test_tiled_product(name, tolerance):
    random = np.random.default_rng(3)
    rows, columns, depth = 64, 32, 40
    a, b = random.normal(size=(rows, depth)), random.normal(size=(columns, depth))
    kinds = {"float": np.float32, "half": np.float16}
    a, b = (to_bfloat16(v) if name == "bfloat" else v.astype(kinds[name]) for v in (a, b))
    y = np.empty((rows, columns), np.float32)
    shape = np.array([rows, columns, depth, 0], np.int32).tobytes()
    library = softmetal.compile(HEADER + PRODUCT)
    assert library.kernels == ["product_float", "product_half", "product_bfloat"]
    report = library.launch(f"product_{name}", [a, b, y, shape], (1, 2), (128,), seed=5, uninitialized=[2])
    assert report.errors == []
    left, right = (from_bfloat16(v) if name == "bfloat" else v for v in (a, b))
    expected = left.astype(np.float64) @ right.astype(np.float64).T
    np.testing.assert_allclose(y, expected, rtol=tolerance, atol=1e-5)
    steps = -(-depth // 16)
    assert report.counters["simdgroup_multiplies"] == 2 * 4 * 4 * 2 * steps
    assert report.counters["threadgroup_barriers"] == 2 * 2 * steps


@pytest.mark.parametrize("barrier", ["loaded", "used"])
def test_each_barrier_of_the_tiled_product_is_needed(barrier):
    source = "\n".join(line for line in PRODUCT.split("\n") if f"// tiles are {barrier}" not in line)
    library = softmetal.compile(HEADER + source)
    a, b, y = np.ones((32, 48), np.float32), np.ones((32, 48), np.float32), np.empty((32, 32), np.float32)
    shape = np.array([32, 32, 48, 0], np.int32).tobytes()
    report = library.launch("product_float", [a, b, y, shape], (1, 1), (128,))
    assert "threadgroup-race" in report.kinds


def test_simd_operations_on_numbers():
    body = """
kernel void operations(const device int* x, device int* y, uint lane [[thread_index_in_simdgroup]]) {
  const int v = x[lane];
  int results[] = {
    simd_sum(v), simd_product(v % 2 + 1), simd_min(v), simd_max(v), simd_xor(v), simd_or(v),
    simd_prefix_inclusive_sum(v), simd_prefix_exclusive_sum(v), simd_shuffle(v, ushort(31 - lane)),
    simd_shuffle_xor(v, 5), simd_shuffle_down(v, 3), simd_shuffle_up(v, 3), simd_shuffle_rotate_down(v, 3),
    simd_shuffle_and_fill_up(v, -1, 2), simd_broadcast(v, 7), quad_sum(v), quad_shuffle_xor(v, 1),
    int(simd_any(v == 3)), int(simd_all(v >= 0)), int(ulong(simd_ballot(v % 3 == 0)) & 0xFFFF), int(simd_is_first()),
    int(simd_sum(half(v))), simd_sum(int2(v, 2 * v)).y};
  for (int i = 0; i < 23; i++) { y[i * 32 + lane] = results[i]; }
}
"""
    x = np.random.default_rng(4).integers(0, 8, 32).astype(np.int32)
    y = np.empty((23, 32), np.int32)
    assert softmetal.compile(HEADER + body).launch("operations", [x, y], (1,), (32,), uninitialized=[1]).errors == []
    lane = np.arange(32)
    everywhere = np.ones(32, np.int32)
    expected = [
        *(f(x) * everywhere for f in (np.sum, lambda v: np.prod(v % 2 + 1), np.min, np.max)),
        np.bitwise_xor.reduce(x) * everywhere,
        np.bitwise_or.reduce(x) * everywhere,
        np.cumsum(x),
        np.cumsum(x) - x,
        x[::-1],
        x[lane ^ 5],
        np.where(lane + 3 < 32, x[(lane + 3) % 32], x),
        np.where(lane >= 3, x[(lane - 3) % 32], x),
        x[(lane + 3) % 32],
        np.where(lane >= 2, x[(lane - 2) % 32], -1),
        x[7] * everywhere,
        np.repeat(x.reshape(8, 4).sum(1), 4),
        x[lane ^ 1],
        int((x == 3).any()) * everywhere,
        everywhere,
        sum(1 << i for i in range(16) if x[i] % 3 == 0) * everywhere,
        lane == 0,
        x.sum() * everywhere,
        2 * x.sum() * everywhere,
    ]
    np.testing.assert_array_equal(y, np.array(expected))


def test_partial_threadgroups_views_and_shared_memory():
    body = """
kernel void shift(const device int* x, device int* y, uint i [[thread_position_in_grid]],
    uint size [[threads_per_grid]], uint threads [[threads_per_threadgroup]]) {
  y[i] = x[i] + 1000 * int(size) + 100000 * int(threads);
}
"""
    library = softmetal.compile(HEADER + body)
    memory = np.arange(100, dtype=np.int32)
    before = memory.copy()
    report = library.launch("shift", [memory[:50], memory[50:]], threads=(50,), threads_per_threadgroup=(32,))
    assert report.errors == []
    threads = np.where(np.arange(50) < 32, 32, 18)
    np.testing.assert_array_equal(memory[50:], before[:50] + 50000 + 100000 * threads)
    assert report.counters["buffer_bytes_read"] == {0: 200, 1: 0}
    report = library.launch("shift", [memory[:50], memory[50:]], threads=(51,), threads_per_threadgroup=(32,))
    assert "device-out-of-bounds" in report.kinds
    overlap = library.launch("shift", [memory[:50], memory[1:51]], threads=(50,), threads_per_threadgroup=(32,))
    assert "device-race" in overlap.kinds


def test_a_kernel_is_compiled_once(tmp_path, monkeypatch):
    monkeypatch.setenv("SOFTMETAL_CACHE", str(tmp_path))
    source = HEADER + "kernel void one(device int* y) { y[0] = 1; }"
    y = np.zeros(1, np.int32)
    softmetal.compile(source).launch("one", [y], (1,), (1,))
    files = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*-*")}
    softmetal.compile(source).launch("one", [y], (1,), (1,))
    assert files == {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*-*")} and len(files) == 3
