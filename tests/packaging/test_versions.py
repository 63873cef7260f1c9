"""What the package needs of Transformers, PEFT and accelerate, in the versions that it is tested with."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import os
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel, modeling_utils
from transformers.quantizers import HfQuantizer

import quantization_mlx as qm
from kernel_builder import ROOT, tomllib
from process import printed
from quantization_mlx import load_checkpoint, marlin, quantize_model, save_checkpoint
from quantization_mlx.hf import compat
from quantization_mlx.hf.metal_config import metal_to_mlx
from quantization_mlx.hf.patch import patched_transformers

OLDEST = ROOT / "build" / "oldest"
# What runs on the oldest versions, too: loading, saving, generation, experts and adapters; as pytest's option -k.
ON_THE_OLDEST = {
    "test_versions": "private or installed",
    "test_generation": (
        "same_logits and 1-quantized or greedy or beams or others_change or continuous or refused or either or count"
    ),
    "test_transformers": "idempotent or there_and_back or without_head or metal_config_runs or repository_of_the_hub",
    "test_experts": "mlx_lm_computes_the_same or run_as_before",
    "test_hub_kernel": "metal_linear_asks",
    "test_cli": "bounded or adapters_add",
    "test_quantized_cache": "llama or change or generate",
    "test_blocks": "block_computes or mixture_computes or rope_parameters or depends_on_the_length",
    "test_marlin_generate": "transformers",
    "test_deprecated": "saved_model or layer_computes",
    "test_training": "merging_rounds or save_and_load or two_adapters or needs_the_float_weight",
}


def tiny_model() -> LlamaForCausalLM:
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 32}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1)).eval()


def minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def after(version: str) -> str:
    """The minor version that follows."""
    major, last = version.split(".")
    return f"{major}.{int(last) + 1}"


# --- Which versions ---------------------------------------------------------------------------------------------------


def test_pyproject_admits_the_tested_versions() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    found: dict[str, set[str]] = {library: set() for library in compat.TESTED}
    for requirement in (each.partition(";")[0].strip() for requirements in lists for each in requirements):
        name, _, versions = re.fullmatch(r"([\w-]+)(\[[\w,-]+\])?(.*)", requirement).groups()
        if name in found:
            found[name].add(versions)
    assert found == {library: {f">={oldest},<{after(newest)}"} for library, (oldest, newest) in compat.TESTED.items()}


def test_the_documentation_names_the_tested_versions() -> None:
    text = " ".join((ROOT / "docs" / "generate.md").read_text().split())
    names = {"transformers": "Transformers", "peft": "PEFT", "accelerate": "accelerate"}
    for library, versions in compat.TESTED.items():
        assert f"{names[library]} {' and '.join(versions)}" in text


def test_make_installs_the_oldest_versions() -> None:
    (line,) = re.findall(r"^OLDEST \?= (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(line.split()) == {f"{library}=={oldest}.*" for library, (oldest, _) in compat.TESTED.items()}


@pytest.mark.parametrize("library", compat.TESTED)
def test_the_installed_version_is_the_oldest_or_the_newest(library: str) -> None:
    oldest, newest = compat.TESTED[library]
    is_oldest = os.environ.get("PYTHONPATH") == str(OLDEST)
    assert is_oldest == (OLDEST in Path(importlib.import_module(library).__file__).parents)
    assert minor(importlib.metadata.version(library)) == (oldest if is_oldest else newest)


def test_on_the_oldest_versions() -> None:
    assert (OLDEST / ".installed").exists(), "make build/oldest/.installed gets the oldest versions"
    environment = os.environ | {"PYTHONPATH": str(OLDEST), "PYTHONWARNINGS": "ignore"}
    chosen = " or ".join(f"({file} and ({tests}))" for file, tests in ON_THE_OLDEST.items())
    files = [str(next((ROOT / "tests").glob(f"*/{file}.py"))) for file in ON_THE_OLDEST]
    options = ["-v", "-x", "-p", "no:cacheprovider", "-k", f"not mps and ({chosen})"]
    output = printed("-m", "pytest", *options, *files, cwd=ROOT, env=environment)
    for library in compat.TESTED:
        assert f"test_the_installed_version_is_the_oldest_or_the_newest[{library}] PASSED" in output
    for file in ON_THE_OLDEST:
        assert f"{file}.py::" in output


# --- What is needed of them -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", compat.PRIVATE)
def test_private_names_are_there(op: str) -> None:
    assert [lack for name, parameters, _ in compat.PRIVATE[op] for lack in compat.missing_parts(name, parameters)] == []


def test_private_attributes_are_there(tmp_path: Path) -> None:
    """Of what Transformers builds; the package assigns to them, which no version would refuse."""
    save_checkpoint(quantize_model(tiny_model()), tmp_path)
    model = load_checkpoint(tmp_path)
    assert [name for name in compat.LOADED_MODEL if not hasattr(model, name)] == []
    layer = model.model.layers[0]
    parts = {"model": model.model, "layer": layer, "attention": layer.self_attn, "mlp": layer.mlp}
    assert [name for name, part in parts.items() if not compat.is_known_part(part, name)] == []
    cache = DynamicCache(config=model.config)
    model(torch.ones(1, 3, dtype=torch.int64), **{compat.cache_name(): cache})
    assert type(cache.layers[0]).__name__ == "DynamicLayer" and set(vars(cache.layers[0])) <= set(compat.CACHE_STATE)


def test_private_names_that_are_missing() -> None:
    assert compat.missing_parts("transformers.no_module:anything", ()) == ["transformers.no_module.anything"]
    assert compat.missing_parts("transformers:PreTrainedModel.forget", ()) == ["transformers.PreTrainedModel.forget"]
    name = "transformers.modeling_utils:get_hf_quantizer"
    assert compat.missing_parts(name, ("config", "gguf")) == [f"the parameter 'gguf' of {name.replace(':', '.')}"]
    name = "transformers.utils.hub:DownloadKwargs"
    assert compat.missing_parts(name, ("revision", "branch")) == [f"the parameter 'branch' of {name.replace(':', '.')}"]


def test_the_table_has_all_that_is_imported_from_inside_of_the_libraries() -> None:
    listed = {name.replace(":", ".") for rows in compat.PRIVATE.values() for name, _, _ in rows}
    listed |= {"transformers.utils.logging", "transformers.utils.cached_file"}  # these are documented
    for file in (ROOT / "torch-ext" / "quantization_mlx").rglob("*.py"):
        for module, names in re.findall(
            r"^ *from ((?:transformers|peft|accelerate)\.[\w.]+) import (.+)$", file.read_text(), re.M
        ):
            for name in (f"{module}.{each.strip()}" for each in names.split(",")):
                assert any(each == name or each.startswith(f"{name}.") for each in listed), (file.name, name)


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """As in a process in which nothing has been looked up yet."""
    caches = (compat.check, compat.check_version)
    for each in caches:
        each.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    for each in caches:
        each.cache_clear()


def patch_and_unpatch_peft() -> None:
    qm.patch_peft()
    qm.unpatch_peft()


def patch_and_unpatch_transformers() -> None:
    with patched_transformers():
        pass


FIRST_USES: dict[str, tuple[str, Callable[[], Any]]] = {
    "patch_transformers": ("transformers", patch_and_unpatch_transformers),
    "load_checkpoint": ("transformers", lambda: load_checkpoint("/nowhere")),
    "load_quantized": ("transformers", lambda: marlin.load_quantized("/nowhere", "cpu")),
    "prepare_for_generation": ("transformers", lambda: qm.prepare_for_generation(tiny_model())),
    "metal_to_mlx": ("transformers", lambda: metal_to_mlx(tiny_model())),
    "accelerate": ("accelerate", patch_and_unpatch_transformers),
    "patch_peft": ("peft", patch_and_unpatch_peft),
}
FIRST_USE = pytest.mark.parametrize("library, use", FIRST_USES.values(), ids=FIRST_USES.keys())


def pretend(fresh: pytest.MonkeyPatch, library: str, version: str) -> None:
    installed = compat._version
    fresh.setattr(compat, "_version", lambda name: version if name == library else installed(name))


@FIRST_USE
def test_a_newer_version_warns_once(library: str, use: Callable[[], Any], fresh: pytest.MonkeyPatch) -> None:
    oldest, newest = compat.TESTED[library]
    pretend(fresh, library, f"{after(newest)}.0.dev0")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            with contextlib.suppress(FileNotFoundError, ValueError):
                use()
    messages = [str(each.message) for each in caught if each.category is UserWarning and "newer" in str(each.message)]
    assert messages == [
        f"{library} {after(newest)}.0.dev0 is newer than what quantization-mlx is tested with, "
        f"which is {oldest} to {newest}"
    ]


@FIRST_USE
def test_an_older_version_is_refused(library: str, use: Callable[[], Any], fresh: pytest.MonkeyPatch) -> None:
    pretend(fresh, library, "0.9.1")
    for _ in range(2):
        with pytest.raises(ImportError, match=rf"{library} 0\.9\.1 is older than what quantization-mlx supports"):
            use()


REMOVED = {
    "hook of the quantizer": (HfQuantizer, "update_weight_conversions", patch_and_unpatch_transformers),
    "patched function": (modeling_utils, "_get_resolved_checkpoint_files", patch_and_unpatch_transformers),
    "flag of adapters": (PreTrainedModel, "_keys_to_ignore_on_load_missing", patch_and_unpatch_transformers),
}


@pytest.mark.parametrize("owner, name, use", REMOVED.values(), ids=REMOVED.keys())
def test_a_name_that_was_removed_is_an_error(
    owner: Any, name: str, use: Callable[[], Any], fresh: pytest.MonkeyPatch
) -> None:
    """Without its base's hook, for example, an override would never be called, and layers stay random."""
    fresh.delattr(owner, name)
    with pytest.raises(ImportError, match=rf"\[patch_transformers\] transformers .* lacks .*{name}"):
        use()


def test_a_parameter_that_was_renamed_is_an_error(fresh: pytest.MonkeyPatch) -> None:
    """The patched resolver would not find the directory, and go by a stale index."""

    def resolver(path: str, variant: str | None, gguf_file: str | None, download_kwargs: Any = None) -> None: ...

    fresh.setattr(modeling_utils, "_get_resolved_checkpoint_files", resolver)
    message = r"lacks the parameter 'pretrained_model_name_or_path' of .*_get_resolved_checkpoint_files"
    with pytest.raises(ImportError, match=message):
        patch_and_unpatch_transformers()


def test_experts_that_are_marked_otherwise_are_an_error(fresh: pytest.MonkeyPatch) -> None:
    """They would not be found, and stay as they are."""

    def use_experts_implementation(experts_class: Any = None, *, layout: str = "concatenated") -> None: ...

    fresh.setattr("transformers.integrations.moe.use_experts_implementation", use_experts_implementation)
    with pytest.raises(ImportError, match=r"\[experts\] transformers .* lacks the parameter 'is_concatenated'"):
        quantize_model(tiny_model())


def test_weight_files_are_found_however_the_resolver_is_called(tmp_path: Path) -> None:
    save_checkpoint(quantize_model(tiny_model()), tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "model-other.safetensors")
    with patched_transformers():
        resolve = modeling_utils._get_resolved_checkpoint_files
        files, _ = resolve(str(tmp_path), None, None, None, {"quant": "mlx"}, False)
    assert files == [str(tmp_path / "model-other.safetensors")]


@torch.no_grad()
@pytest.mark.parametrize("attribute", ["head_dim", "scaling"])
def test_parts_without_a_known_attribute_are_not_prepared(attribute: str) -> None:
    model = tiny_model()
    del model.model.layers[0].self_attn.__dict__[attribute]
    with pytest.raises(ValueError, match="no decoder layer of a known kind"):
        qm.prepare_for_generation(model)
