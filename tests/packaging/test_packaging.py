"""The project as a Hub kernel: what kernel-builder sees, builds and checks, and what loads the result."""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cases
import kernel_builder
import oracle
from kernel_builder import PACKAGE, ROOT
from process import NO_NETWORK, printed, python

PUBLISHED = "kernels-community/mlx-quantization-metal-kernels"
CPP = {".cpp", ".h", ".hpp", ".mm", ".metal"}
PYTHON = sorted(path for path in (ROOT / "torch-ext" / PACKAGE).rglob("*.py") if path.name != "_ops.py")
EXPLICIT_OPS = ["affine_qmv", "affine_qmm_t", "affine_qmm_n", "affine_qmm_t_nax", "affine_qmm_n_nax"]
EXPLICIT_OPS += ["affine_gather_qmm_rhs_nax"]
EXPLICIT_OPS += [f"{mode}_{op}" for mode in ("mxfp4", "mxfp8", "nvfp4") for op in ("qmv", "qmm_t", "qmm_n")]
# libstdc++'s headers use this symbol where <sys/single_threaded.h> exists: since glibc 2.32, so not in the glibc 2.28
# against which kernel-builder compiles.
FROM_NEWER_GLIBC_HEADERS = {("__libc_single_threaded", "GLIBC", "2.32")}
# One process builds the variant for all of them.
pytestmark = [pytest.mark.xdist_group("packaging"), pytest.mark.first]
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="the local build stands for kernel-builder's Linux build")


# --- Fixtures --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def pip():
    """The installed package."""
    return importlib.import_module(PACKAGE)


def run_python(code: str, folder: Path, **environment: str) -> str:
    """Run code in a fresh interpreter, in a folder from which nothing of the tree can be imported; its output."""
    return printed("-c", code, cwd=folder, env=os.environ | environment)


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    """The variant is the CPU's. A device "mps" in the same process would make `kernels` want the other one."""
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


# --- What kernel-builder reads ---------------------------------------------------------------------------------------


def test_build_toml_has_the_schema_of_kernel_builder(tmp_path):
    """`kernels` carries kernel-builder's own parser, which refuses unknown and missing fields."""
    rust = importlib.import_module("kernels._rust")
    try:
        build = rust.Build.open(ROOT)
    except ValueError as error:
        assert "unsupported build edition 6" in str(error)
        kernel_builder.write_as_edition_5(tmp_path)
        build = rust.Build.open(tmp_path)
    assert {str(backend).lower() for backend in build.general.backends} == {"cpu", "metal"}


def test_build_toml_lists_every_source():
    files = [path for folder in ("csrc", "metal", "torch-ext") for path in (ROOT / folder).rglob("*")]
    on_disk = {path.relative_to(ROOT).as_posix() for path in files if path.suffix in CPP}
    assert set(kernel_builder.sources()) == on_disk


def test_shaders_have_stems_of_their_own():
    """kernel-builder names what it compiles of them by the stem alone."""
    stems = [Path(path).stem for path in kernel_builder.sources() if path.endswith(".metal")]
    assert len(stems) == len(set(stems)) > 1


def test_every_backend_has_a_kernel_section():
    """Without one, nix builds the backend as pure Python."""
    build = kernel_builder.configuration()
    kernels = build["kernel"].values()
    assert {kernel_builder.backend_of(kernel) for kernel in kernels} == set(build["general"]["backends"])
    assert all(kernel["language"].startswith("cpp-") for kernel in kernels)


def test_cmake_compiles_what_build_toml_compiles():
    cmake = re.sub(r"#.*", "", (ROOT / "CMakeLists.txt").read_text())
    everywhere, on_apple = cmake.split("if(APPLE)")

    def compiled(backend: str) -> set[str]:
        return {path for path in kernel_builder.sources(backend=backend) if path.endswith((".cpp", ".mm"))}

    def named(text: str) -> set[str]:
        return set(re.findall(r"(?:csrc|torch-ext)/[\w./-]+\.(?:cpp|mm)", text))

    assert named(everywhere) == compiled("cpu")
    assert named(on_apple) == compiled("metal") - compiled("cpu")


def test_metal_build_has_the_cpu_ops():
    units = {backend: set(kernel_builder.sources(backend=backend)) for backend in ("cpu", "metal")}
    assert units["cpu"] <= units["metal"]


def test_no_pybind11_in_the_sources():
    pattern = re.compile(r"#\s*include\s*[<\"](pybind11|torch/extension\.h|torch/python\.h)|PYBIND11_")
    found = [path for path in kernel_builder.sources() if pattern.search((ROOT / path).read_text())]
    assert found == []


def module_level_imports(tree: ast.AST):
    """The import statements that run when the module is imported."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from module_level_imports(node)


def imported_names(node: ast.Import | ast.ImportFrom) -> list[str]:
    """Top-level names of the packages that a statement imports absolutely."""
    if isinstance(node, ast.ImportFrom):
        return [] if node.level else [node.module.partition(".")[0]]
    return [alias.name.partition(".")[0] for alias in node.names]


@pytest.mark.parametrize("path", PYTHON, ids=lambda path: path.name)
def test_python_is_what_the_hub_allows(path):
    """Standard library, torch and relative imports; ops and registrations under the namespace of the build."""
    text = path.read_text()
    tree = ast.parse(text)
    at_import = {name for node in module_level_imports(tree) for name in imported_names(node)}
    assert at_import <= set(sys.stdlib_module_names) | {"torch"}
    anywhere = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert PACKAGE not in {name for node in anywhere for name in imported_names(node)}
    assert f"torch.ops.{PACKAGE}" not in text
    assert f'"{PACKAGE}::' not in text


def public_names() -> list[str]:
    """`__all__` as kernel-builder reads it: from the source, as a list of string literals."""
    tree = ast.parse((ROOT / "torch-ext" / PACKAGE / "__init__.py").read_text())
    (value,) = (node.value for node in tree.body if ast.unparse(node).startswith("__all__ = "))
    assert isinstance(value, ast.List)
    return ast.literal_eval(value)


def test_tests_of_a_variant_are_found(tmp_path):
    """In what nix copies, and with none of the packages that it does not have."""
    kernel_builder.copy_sources(tmp_path)
    (tmp_path / "peft.py").write_text("raise ImportError")
    options = ("-m", "pytest", "-m", "kernels_ci", "--collect-only", "-q", "tests")
    assert "ops/test_matmul.py::" in printed(*options, cwd=tmp_path)


def test_public_names(pip):
    names = public_names()
    assert set(names) >= {"layers", "quantize", "dequantize", "quantized_matmul", "gather_qmm", *EXPLICIT_OPS}
    assert len(names) == len(set(names))
    assert all(hasattr(pip, name) for name in names)


def test_card_is_filled():
    """The card is a Jinja template that the build fills from build.toml and `__all__`."""
    jinja2 = importlib.import_module("jinja2")
    build = kernel_builder.configuration()
    template = jinja2.Environment(trim_blocks=True, undefined=jinja2.StrictUndefined)
    functions = [name for name in public_names() if name != "layers"]
    repo_id = build["general"]["hub"]["repo-id"]
    card = template.from_string((ROOT / "CARD.md").read_text()).render(
        repo_id=repo_id, functions=functions, layers=["MetalLinear"], has_benchmark=True, upstream=None, license="mit"
    )
    assert (ROOT / "benchmarks" / "benchmark.py").is_file() and f"kernels benchmark {repo_id}" in card
    front_matter = card.split("---\n")[1]
    assert front_matter.split("\n")[:2] == ["library_name: kernels", "license: mit"]
    assert f'get_kernel("{repo_id}", version={build["general"]["version"]}' in card
    assert all(f"- `{name}`" in card for name in [*functions, "MetalLinear"])
    assert "{{" not in card and "{%" not in card


# --- The build from an empty folder ----------------------------------------------------------------------------------


@LINUX
@pytest.mark.parametrize("format", cases.SOME_FORMATS, ids=oracle.name_of)
def test_variant_computes(hub, format):
    weights = oracle.random_quantized(format, 48, 256)
    x = oracle.random_x(2, 5, 256)
    y = hub.quantized_matmul(x, *weights.tensors, **format.options)
    oracle.assert_product(y, x, weights.dense.T, torch.float32)


@LINUX
def test_submodules_are_attributes_of_a_variant(repository, tmp_path):
    """In a fresh process, whose only import is that of `kernels`."""
    code = f"""
import pathlib, kernels, torch
hub = kernels.get_local_kernel(pathlib.Path({str(repository)!r}), backend="cpu")
w, scales = hub.marlin.pack_fp4_weights(6 * torch.eye(64), 32)
print(hub.marlin.dispatch_gemm_fp4(hub.marlin.MetalKernelLibrary("cpu"), torch.eye(64), w, scales, 64, 64, 64).trace())
print(hub.int4.quantize_to_int4([0.0, 15.0])[0].tolist())
"""
    assert run_python(code, tmp_path).splitlines() == ["tensor(384.)", "[-8, 7]"]


@LINUX
def test_metadata_is_what_kernels_reads(variant):
    rust = importlib.import_module("kernels._rust")
    metadata = rust.Metadata.read_from_file(variant / "metadata.json")
    assert metadata.name.python_name == PACKAGE
    assert (metadata.version, metadata.license, metadata.python_depends) == (1, "MIT", [])
    assert (variant / f"{metadata.id}.abi3.so").is_file()
    metadata.digest.validate(rust.Digest.hash_variant(rust.DigestAlgorithm.SHA256, variant))


@LINUX
def test_both_builds_in_one_process(pip, hub):
    prefixes = {build: build._ops.add_op_namespace_prefix("quantize") for build in (pip, hub)}
    assert prefixes[pip] == f"{PACKAGE}::quantize"
    assert re.fullmatch(rf"_{PACKAGE}_cpu_\w+::quantize", prefixes[hub])
    weight, x = oracle.random_x(40, 128, seed=2), oracle.random_x(3, 7, 128)
    for mode in ("affine", "mxfp4", "mxfp8", "nvfp4"):
        quantized = {build: build.quantize(weight, mode=mode) for build in (pip, hub)}
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(*quantized.values(), strict=True))
        products = [build.quantized_matmul(x, *quantized[build], mode=mode) for build in (pip, hub)]
        assert torch.equal(*products)


@LINUX
@pytest.mark.parametrize("build", ["pip", "hub"])
def test_extension_is_abi_clean(build, variant, pip):
    """kernel-builder's own checker: the limited Python API since 3.9, symbol versions of manylinux_2_28."""
    kernel_abi_check = importlib.import_module("kernel_abi_check")
    folder = variant if build == "hub" else Path(importlib.import_module(f"{PACKAGE}._C").__file__).parent
    (library,) = folder.glob("*.abi3.so")
    extension = kernel_abi_check.ObjectFile(library)
    assert extension.check_python_abi("3.9") == []
    found = {(symbol.name, symbol.dep, symbol.version) for symbol in extension.check_manylinux("manylinux_2_28")}
    assert found <= FROM_NEWER_GLIBC_HEADERS


@LINUX
def test_extension_needs_torch_alone(variant):
    """A second OpenMP runtime or Python library beside torch's would be a fault."""
    (library,) = variant.glob("*.abi3.so")
    dynamic = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
    needed = set(re.findall(r"\(NEEDED\).*\[(.*?)\]", dynamic))
    system = {"libc.so.6", "libm.so.6", "libstdc++.so.6", "libgcc_s.so.1", "ld-linux-x86-64.so.2"}
    assert needed - system <= {"libtorch.so", "libtorch_cpu.so", "libc10.so"}


@LINUX
def test_variant_uses_torchs_threads(repository, tmp_path):
    """torch.empty starts no thread, so the first thread beside the main one is started by the op."""
    code = f"""
import os, pathlib, torch, kernels
hub = kernels.get_local_kernel(pathlib.Path({str(repository)!r}), backend="cpu")
torch.set_num_threads(2)
x, w = torch.empty(1, 4096), torch.empty(4096, 512, dtype=torch.int32)
scales = torch.empty(4096, 64)
before = len(os.listdir("/proc/self/task"))
hub.quantized_matmul(x, w, scales, scales)
print(len(os.listdir("/proc/self/task")) - before)
"""
    assert int(run_python(code, tmp_path)) == 1


# --- Loading in the place of the published kernel --------------------------------------------------------------------


@LINUX
def test_local_kernels_replaces_the_published_kernel(repository, variant, tmp_path):
    code = f"""{NO_NETWORK}
import json, torch
from kernels import get_kernel

kernel = get_kernel({PUBLISHED!r}, version=1)
w, scales, biases = kernel.quantize(torch.ones(8, 64))
y = kernel.affine_qmm_t(torch.ones(3, 2, 64), w, scales, biases, 64, 4)
print(json.dumps([kernel.__file__, y.tolist()]))
"""
    file, y = json.loads(run_python(code, tmp_path, LOCAL_KERNELS=f"{PUBLISHED}={repository}"))
    assert Path(file) == variant / "__init__.py"
    assert y == torch.full((3, 2, 8), 64.0).tolist()


@LINUX
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_metal_linear_of_transformers_with_a_batch(hub, monkeypatch, bits, bias):
    """The published kernel is right for batch element 0 only."""
    metal = importlib.import_module("transformers.integrations.metal_quantization")
    monkeypatch.setattr(metal, "_metal_kernel", hub)
    layer, weights = metal_linear(metal.MetalLinear, bits, bias)
    x = oracle.random_x(3, 5, 128)
    oracle.assert_product(layer(x) - (layer.bias if bias else 0), x, weights.dense.T, torch.float32)


def metal_linear(cls, bits: int, bias: bool) -> tuple[torch.nn.Module, oracle.Quantized]:
    """A layer of Transformers with random weights, quantized by Transformers, and the weights."""
    metal = importlib.import_module("transformers.integrations.metal_quantization")
    layer = cls(128, 24, bias=bias, bits=bits, group_size=32)
    weights = metal._affine_quantize_tensor(oracle.random_x(24, 128), 32, bits)
    layer.weight.data, layer.scales.data, layer.qbiases.data = weights
    if bias:
        torch.nn.init.normal_(layer.bias)
    return layer, oracle.Quantized(oracle.Format("affine", 32, bits), *weights)


# --- Layers for kernelize --------------------------------------------------------------------------------------------


def kernelized(layer: torch.nn.Module, name: str, repository: Path) -> torch.nn.Module:
    """The layer with the forward of the variant's layer `name`, for training and torch.compile."""
    kernels = importlib.import_module("kernels")
    mode = kernels.Mode.TRAINING | kernels.Mode.TORCH_COMPILE
    local = kernels.LocalLayerRepository(repository, layer_name=name)
    with kernels.use_kernel_mapping({name: {"cpu": {mode: local}}}, inherit_mapping=False):
        return kernels.kernelize(layer, mode=mode, device="cpu", use_fallback=False)


@LINUX
def test_kernelized_metal_linear(hub, repository, monkeypatch):
    kernels = importlib.import_module("kernels")
    metal = importlib.import_module("transformers.integrations.metal_quantization")
    monkeypatch.setattr(metal, "_metal_kernel", None)  # any use of Transformers' own way would fail

    @kernels.use_kernel_forward_from_hub("MetalLinear")
    class Layer(metal.MetalLinear):
        pass

    layer, weights = metal_linear(Layer, 4, bias=False)
    layer = kernelized(layer, "MetalLinear", repository)
    assert layer.forward.__func__ is hub.layers.MetalLinear.forward
    for dtype in cases.DTYPES:
        x = oracle.random_x(3, 5, 128, dtype=dtype).requires_grad_()
        y = torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
        oracle.assert_product(y, x, weights.dense.T, dtype)
        upstream = oracle.random_x(3, 5, 24, dtype=dtype)
        (gradient,) = torch.autograd.grad(y, x, upstream)
        oracle.assert_product(gradient, upstream, weights.dense, dtype)


@LINUX
def test_kernelized_layer_of_this_package(pip, hub, repository):
    kernels = importlib.import_module("kernels")

    @kernels.use_kernel_forward_from_hub("QuantizedLinear")
    class Layer(pip.QuantizedLinear):
        pass

    linear = torch.nn.Linear(128, 40)
    x = oracle.random_x(3, 5, 128)
    for mode in ("affine", "mxfp4"):
        layer = Layer.from_linear(linear, mode=mode)
        expected = layer(x)
        layer = kernelized(layer, "QuantizedLinear", repository)
        assert layer.forward.__func__ is hub.layers.QuantizedLinear.forward
        assert torch.equal(layer(x), expected)


# --- Environment variables -------------------------------------------------------------------------------------------


def test_empty_variables_are_unset(tmp_path):
    """The variables that the CPU reads; those of "mps" are read by the same function."""
    code = f"""
import torch, {PACKAGE} as package
y = package.quantized_matmul(torch.ones(64), *package.quantize(torch.ones(2, 64)))
[plan] = package.explain(package.quantized_matmul, torch.ones(64), *package.quantize(torch.ones(2, 64)))
print(y.tolist(), package.get_cpu_activations(), plan.instruction_set)
"""
    names = ("QUANTIZATION_MLX_CPU", "QUANTIZATION_MLX_CPU_ACTIVATIONS")
    unset = {name: value for name, value in os.environ.items() if name not in names}
    runs = [python("-c", code, cwd=tmp_path, env=env) for env in (unset, unset | dict.fromkeys(names, ""))]
    assert runs[1].stdout == runs[0].stdout != "", runs[1].stderr


def test_every_variable_is_read_by_the_one_function():
    reads = {path for path in kernel_builder.sources() if "getenv(" in (ROOT / path).read_text()}
    assert reads == {"csrc/environment.h"}
    assert not [path for path in PYTHON if re.search(r"\bos\.(environ|getenv)\b", path.read_text())]


# --- Nothing but torch -----------------------------------------------------------------------------------------------


def test_import_without_any_optional_package(tmp_path):
    """Nothing beside the standard library and torch is needed, or even imported where it is installed."""
    optional = "transformers safetensors numpy tqdm huggingface_hub kernels accelerate gguf mlx mlx_lm tokenizers"
    optional += " sentencepiece regex requests httpx yaml packaging psutil rich hypothesis pytest pybind11 PIL"
    code = f"""
import sys, warnings

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {optional.split()!r}:
            raise ModuleNotFoundError(f"{{name}} is blocked", name=name)

sys.meta_path.insert(0, Blocked())
warnings.simplefilter("ignore")  # torch tells that numpy is missing
import torch
before = set(sys.modules)
import {PACKAGE} as package
imported = {{name.partition(".")[0] for name in set(sys.modules) - before}}
assert imported <= set(sys.stdlib_module_names) | {{"torch", {PACKAGE!r}}}, imported
w, scales, biases = package.quantize(torch.eye(64))
assert torch.allclose(package.quantized_matmul(torch.eye(64), w, scales, biases), torch.eye(64), atol=1e-6)
assert package.marlin.pack_fp4_weights(torch.eye(64), 32)[0].shape == (8, 64)
try:
    package.int4.quantize_to_int4([1.0])
except ImportError as error:
    assert "numpy" in str(error)
layer = package.QuantizedLinear.from_linear(torch.nn.Linear(64, 8))
assert layer(torch.zeros(2, 64)).shape == (2, 8)
try:
    package.load_checkpoint("nowhere")
except ImportError as error:
    print(error)
"""
    assert 'pip install "quantization-mlx[transformers]"' in run_python(code, tmp_path)
