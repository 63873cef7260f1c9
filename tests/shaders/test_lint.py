"""The shaders keep to what every release of Apple's compiler takes and makes well."""

from __future__ import annotations

import numpy as np
import pytest

import softmetal
from repository import ROOT

SHADERS = sorted((ROOT / "metal").rglob("*.metal"))
SAFE = "#pragma METAL fp math_mode(safe)\n"
HEADER = "#include <metal_stdlib>\nusing namespace metal;\n"
FLAG = "constant bool flag [[function_constant(0)]];\n"
THREADS = "[[kernel, max_total_threads_per_threadgroup(64)]] "
GETTER = "template <typename A, typename B> METAL_FUNC int get_destination_cooperative_tensor(A a, B b) { return 0; }\n"


@pytest.mark.parametrize("version", ["3.1", "4.0"])
@pytest.mark.parametrize("shader", SHADERS, ids=lambda path: path.stem)
def test_lint(shader, version):
    found = softmetal.lint(shader, standard=f"metal{version}", advice=True)
    assert [str(finding) for finding in found if finding.level != "note" and finding.rule != "cpp17"] == []


# rule: (wrong, its right twin).
MISTAKES = {
    "fp-pragma behind an include": (HEADER + SAFE, SAFE + HEADER),
    "fp-pragma behind a function": (
        SAFE + "METAL_FUNC int f() { return 1; }\n#pragma METAL fp contract(off)\n",
        SAFE + "#pragma METAL fp contract(off)\nMETAL_FUNC int f() { return 1; }\n",
    ),
    "fp-pragma in a namespace": (
        SAFE + "namespace n {\n#pragma METAL fp contract(off)\n}\n",
        SAFE + "namespace n {\nMETAL_FUNC float f(float a) {\n#pragma METAL fp contract(off)\nreturn a * a + a; }\n}\n",
    ),
    "safe-math": (HEADER, SAFE + HEADER),
    "max-threads": (
        SAFE + "[[kernel]] void f(device int* p [[buffer(0)]]) { p[0] = 1; }",
        SAFE + THREADS + "void f(device int* p [[buffer(0)]]) { p[0] = 1; }",
    ),
    "always-inline": (
        SAFE + "inline int f(int a) { return a; }",
        SAFE + "METAL_FUNC int f(int a) { return a; }\ninline constexpr int g() { return 1; }",
    ),
    "optional-argument in an expression": (
        SAFE + FLAG + THREADS + "void f(device int* p [[buffer(0)]], device int* q [[buffer(1)]]) "
        "{ p[0] = flag ? q[0] : 1; }",
        SAFE + FLAG + THREADS + "void f(device int* p [[buffer(0)]], "
        "device int* q [[buffer(1), function_constant(flag)]]) { int a = flag ? q[0] : 1; p[0] = a; }",
    ),
    "optional-argument in a block": (
        SAFE + FLAG + THREADS + "void f(device int* p [[buffer(0)]], device int* q [[buffer(1)]]) "
        "{ if (flag) { p[0] = q[0]; } }",
        SAFE + FLAG + THREADS + "void f(device int* p [[buffer(0)]], device int* q [[buffer(1)]]) "
        "{ if (flag) { p[0] = q[0]; } p[1] = q[1]; }",
    ),
    "decltype-local": (
        SAFE
        + GETTER
        + "METAL_FUNC void f() { int a = 0; get_destination_cooperative_tensor<decltype(a), int>(a, 1); }",
        SAFE + GETTER + "METAL_FUNC int g();\n"
        "METAL_FUNC void f() { int a = 0; get_destination_cooperative_tensor<decltype(g()), int>(a, 1); }",
    ),
    "decltype-local by another name": (
        SAFE + GETTER + "METAL_FUNC void f() { int a = 0; typedef decltype(a) A; using B = decltype(a);\n"
        "get_destination_cooperative_tensor<int, B>(a, 1); }",
        SAFE + GETTER + "METAL_FUNC void f() { int a = 0; typedef int A; using B = remove_addrspace_t<decltype(a)>;\n"
        "get_destination_cooperative_tensor<remove_addrspace_t<decltype(a)>, B>(a, 1); }",
    ),
}


@pytest.mark.parametrize("rule", MISTAKES)
def test_mistake(rule):
    wrong, right = MISTAKES[rule]
    found = softmetal.lint(wrong, standard="metal4.0", advice=True)
    assert {finding.rule for finding in found} == {rule.split()[0]}, found
    assert softmetal.lint(right, standard="metal4.0", advice=True) == []


def test_advice_is_asked_for():
    assert softmetal.lint("kernel void f() { }\nint g() { return 1; }\n") == []


@pytest.mark.parametrize("shader", SHADERS, ids=lambda path: path.stem)
def test_nothing_is_included_before_safe_arithmetic(shader):
    """Also not what the preprocessor leaves out here, such as a header of Apple's."""
    before, _, _ = shader.read_text().partition("#pragma METAL fp math_mode(safe)\n")
    assert before != shader.read_text()
    assert "#include" not in before


# --- On the device -----------------------------------------------------------------------------------------------


def test_device_refuses_a_pragma_without_effect():
    with pytest.raises(softmetal.CompileError, match=r"<source>:3:.*before any include"):
        softmetal.compile(HEADER + SAFE + "kernel void f() { }")
    softmetal.compile(SAFE + HEADER + "kernel void f() { }").check()


USES = """
constant bool flag [[function_constant(0)]];
template <int mode>
[[kernel, max_total_threads_per_threadgroup(64)]] void copy(
    device float* to [[buffer(0)]], const device float* from [[buffer(1)]],
    const device float* factor [[buffer(2), function_constant(flag)]], uint i [[thread_position_in_grid]]) {
  const device float* source = mode == 1 ? from : to;
  to[i] = source[i] * (flag ? factor[0] : 2.0f);
}
template [[host_name("reads")]] [[kernel]] decltype(copy<1>) copy<1>;
template [[host_name("reads_not")]] [[kernel]] decltype(copy<0>) copy<0>;
"""


@pytest.mark.parametrize(
    ("kernel", "flag", "bound", "missing"),
    [
        ("reads", False, {0, 1}, None),
        ("reads", False, {0}, 1),
        ("reads", True, {0, 1}, 2),
        ("reads", True, {0, 1, 2}, None),
        ("reads_not", False, {0}, None),
        ("reads_not", True, {0}, 2),
    ],
)
def test_what_a_kernel_uses_is_bound(kernel, flag, bound, missing):
    """What the compiled kernel uses, as Metal's validation layer asks: nothing that a constant rules out."""
    library = softmetal.compile(HEADER + USES)
    arrays = [np.ones(4, np.float32) if index in bound else None for index in range(3)]
    report = library.launch(kernel, arrays, (1,), (4,), function_constants={0: flag})
    unbound = [error for error in report.errors if error.startswith("unbound-argument")]
    assert [f"[[buffer({missing})]]" in error for error in unbound] == ([] if missing is None else [True])
    if missing is None:
        assert report.errors == []
        assert arrays[0].tolist() == [1.0 if flag else 2.0] * 4


def test_threads_that_a_kernel_is_compiled_for():
    """A number, or a constant of the shader's."""
    for value in ("64", "2 * half_of_them", "half_of_them + half_of_them"):
        source = "static constant constexpr const int half_of_them = 32;\n" + USES.replace("(64)", f"({value})")
        library = softmetal.compile(HEADER + source)
        arrays = [np.ones(64, np.float32) for _ in range(3)]
        library.launch("reads", arrays, (1,), (64,), function_constants={0: True})
        with pytest.raises(ValueError, match="at most 64 threads, not"):
            library.launch("reads", arrays, (1,), (65,), function_constants={0: True})
