"""Models with Marlin's layers: what is replaced, what they compute, and the directories that they are saved to."""

from __future__ import annotations

import copy
import json
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModel, AutoModelForCausalLM, BertModel, GenerationConfig, PreTrainedModel, Qwen2ForCausalLM
from transformers.pytorch_utils import Conv1D

import oracle
from disk import fill_disk
from marlin_models import MODELS, QUANTIZED, layers_of, quantized, reloaded, tiny_model
from oracle import values_of
from quantization_mlx import load_checkpoint, marlin, patch_transformers, save_checkpoint, unpatch_transformers
from quantization_mlx import quantize_model as quantize_to_mlx
from quantization_mlx.hf.patch import patched_transformers
from quantization_mlx.marlin import load_quantized, quantize_model, replace_linear_layers, save_quantized
from repository import ROOT, load_demo
from tiny import TOKENS, VOCABULARY, contents, edit_config, edit_tensors, logits, wrapper


def dequantized(model: PreTrainedModel, dense: PreTrainedModel) -> PreTrainedModel:
    """`dense` with the weights that the layers of `model` hold."""
    for path, layer in model.named_modules():
        if isinstance(layer, marlin.ColumnPackedLinear):
            twin = dense.get_submodule(path)
            weight = values_of(layer) if isinstance(twin, Conv1D) else values_of(layer).T
            assert twin.weight.shape == weight.shape
            twin.weight = nn.Parameter(weight.to(twin.weight.dtype))
    return dense


def assert_same_state(ours: nn.Module, expected: nn.Module) -> None:
    ours, expected = ours.state_dict(), expected.state_dict()
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        oracle.assert_identical(ours[name], tensor, name)


# --- What they compute ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", QUANTIZED)
@pytest.mark.parametrize("model", MODELS)
def test_quantized_models_compute_with_the_values_that_they_hold(model: str, way: str) -> None:
    made = quantized(model, way, group_size=64)
    expected = logits(dequantized(made, tiny_model(**MODELS[model])))
    assert layers_of(made)
    oracle.assert_within(logits(made), expected.double(), 1e-4 * expected.abs().max())


@pytest.mark.parametrize("way, error", [("bits-2", 1.0), ("bits-4", 0.2), ("int4", 0.2), ("bits-8", 0.05)])
def test_values_are_those_of_the_model_up_to_quantization(way: str, error: float) -> None:
    made, dense = quantized(way=way, group_size=32), tiny_model()
    for path in layers_of(made):
        weight = dense.get_submodule(path).weight.double().T
        assert (values_of(made.get_submodule(path)) - weight).norm() < error * weight.norm(), path


# --- What is replaced -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "skip_layers, left",
    [
        ((), set()),
        (None, set()),
        ({"lm_head", "embed_tokens"}, {"lm_head"}),
        ({"head", "q_pro", "layers.0.self"}, set()),
        ({"o_proj"}, {f"model.layers.{i}.self_attn.o_proj" for i in (0, 1)}),
        ({"mlp.up_proj"}, {f"model.layers.{i}.mlp.up_proj" for i in (0, 1)}),
        ({"model.layers.1.mlp.up_proj"}, {"model.layers.1.mlp.up_proj"}),
        (["layers.0", "lm_head"], {"lm_head", *(p for p in layers_of(tiny_model(), nn.Linear) if ".0." in p)}),
    ],
    ids=["empty", "none", "head", "parts of components", "component", "two components", "path", "block and head"],
)
def test_skip_layers_are_whole_components_of_paths(skip_layers: Any, left: set[str]) -> None:
    model = tiny_model()
    everything = layers_of(model, nn.Linear)
    stats = replace_linear_layers(model, skip_layers=skip_layers)
    assert layers_of(model, nn.Linear) == left
    assert layers_of(model, marlin.MetalQuantizedLinear) == everything - left == set(stats.replaced)
    table = stats.skipped.pop("model.embed_tokens")
    assert table == "in skip_layers" if "embed_tokens" in (skip_layers or ()) else table.startswith("an embedding")
    assert stats.skipped == dict.fromkeys(left, "in skip_layers")
    assert stats == {"replaced_count": len(everything) - len(left), "skipped_count": len(left) + 1}
    assert layers_of(quantize_model(tiny_model(), skip_layers=skip_layers), marlin.MarlinLinear) == everything - left


def test_quantize_model_leaves_the_head_alone_unless_told() -> None:
    assert layers_of(quantize_model(tiny_model()), nn.Linear) == {"lm_head"}
    assert layers_of(quantize_model(tiny_model(), skip_layers=set()), nn.Linear) == set()
    assert layers_of(quantize_model(tiny_model()), nn.Linear) == {"lm_head"}


def test_layer_filter_is_asked_for_each_layer_that_could_be_replaced() -> None:
    asked = {}

    def layer_filter(path: str, layer: nn.Module) -> bool:
        asked[path] = type(layer)
        return "mlp" in path

    model = tiny_model()
    everything = layers_of(model, nn.Linear)
    stats = replace_linear_layers(model, skip_layers={"lm_head"}, layer_filter=layer_filter)
    assert asked == dict.fromkeys(everything - {"lm_head"}, nn.Linear)
    assert set(stats.replaced) == {path for path in everything if "mlp" in path}
    assert stats.skipped["model.layers.0.self_attn.q_proj"] == "refused by layer_filter"


class Zoo(nn.Module):
    """A layer for each reason to leave it alone."""

    def __init__(self) -> None:
        super().__init__()
        self.fits = nn.Linear(256, 7)
        self.ragged = nn.Linear(100, 8)
        self.sub = nn.modules.linear.NonDynamicallyQuantizableLinear(128, 8)
        self.table, self.head = nn.Embedding(8, 128), nn.Linear(128, 8, bias=False)
        self.head.weight = self.table.weight
        self.integer = nn.Linear(128, 8)
        self.integer.weight = nn.Parameter(torch.ones(8, 128, dtype=torch.int8), requires_grad=False)
        self.computed = nn.utils.parametrizations.weight_norm(nn.Linear(128, 8))
        self.skipped, self.refused = nn.Linear(128, 8), nn.Linear(128, 8)
        self.one, self.other = nn.Linear(128, 8), nn.Linear(128, 8)
        self.one.weight = self.other.weight
        self.convolution = nn.Conv1d(128, 8, 1)


REASONS = {
    "table": "an embedding; Marlin's formats are for linear layers",
    "convolution": "a Conv1d, which has no quantized form",
    "ragged": "in_features 100 is not divisible by group_size 128",
    "sub": "a subclass of Linear: NonDynamicallyQuantizableLinear",
    "head": "shares its weight with table",
    "integer": "its weight is int8",
    "computed": "has parametrizations of weight",
    "skipped": "in skip_layers",
    "refused": "refused by layer_filter",
    "one": "shares its weight with other",
    "other": "in skip_layers",
}


def test_every_layer_that_is_left_alone_has_its_reason() -> None:
    zoo = Zoo()
    stats = replace_linear_layers(zoo, skip_layers={"skipped", "other"}, layer_filter=lambda path, _: path != "refused")
    assert stats.replaced == ["fits"]
    assert stats.skipped == REASONS
    assert stats == {"replaced_count": 1, "skipped_count": len(REASONS)}
    assert zoo.head.weight is zoo.table.weight
    assert zoo.one.weight is zoo.other.weight


def test_quantize_model_warns_of_layers_that_nobody_asked_to_leave_alone() -> None:
    with pytest.warns(UserWarning, match=re.escape(f"ragged: {REASONS['ragged']}")) as caught:
        quantize_model(Zoo(), skip_layers={"skipped"})
    assert "skip_layers" not in str(caught[0].message)
    with pytest.warns(UserWarning, match="0 layers were replaced"):
        quantize_model(nn.Sequential(nn.ReLU()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantize_model(tiny_model())


def test_a_tied_head_stays_tied() -> None:
    for model in (quantized("llama-tied"), quantized("llama-tied", "int4")):
        assert type(model.lm_head) is nn.Linear
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert len(layers_of(model)) == 14


@pytest.mark.parametrize("way", QUANTIZED)
def test_linear_layers_of_one_weight_go_on_sharing_it(way: str) -> None:
    model = nn.ModuleDict({"a": nn.Linear(128, 8), "b": nn.Linear(128, 8), "c": nn.Linear(128, 8).eval()})
    model["b"].weight, model["d"] = model["a"].weight, model["c"]
    biases = [layer.bias for layer in model.values()]
    QUANTIZED[way](model)
    assert model["a"].weight_packed is model["b"].weight_packed
    assert model["a"].scales is model["b"].scales
    assert model["a"].zeros is model["b"].zeros
    assert [layer.bias for layer in model.values()] == biases
    assert model["c"] is model["d"]
    assert [layer.training for layer in model.values()] == [True, True, False, False]
    x = torch.randn(3, 128)
    for layer in model.values():
        oracle.assert_within(layer(x), x.double() @ values_of(layer) + layer.bias.double(), 1e-5)


def test_a_layer_by_itself() -> None:
    linear = nn.Linear(128, 8)
    assert isinstance(quantize_model(linear), marlin.MarlinLinear)
    with pytest.raises(TypeError, match=r"\[replace_linear_layers\] .*MetalQuantizedLinear\.from_float"):
        replace_linear_layers(linear)


def test_models_on_the_meta_device_stay_there() -> None:
    with torch.device("meta"):
        model = tiny_model()
    replace_linear_layers(model)
    assert all(tensor.is_meta for tensor in model.state_dict().values())


QUANTIZE, REPLACE = r"\[quantize_model\] ", r"\[replace_linear_layers\] "


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda m: quantize_model(m, "fp8"), ValueError, QUANTIZE + "quant_type is 'fp8'; supported are fp4, int4"),
        (lambda m: quantize_model(m, group_size=48), ValueError, QUANTIZE + "group_size is 48; supported are 128"),
        (lambda m: quantize_model(m, skip_layers="lm_head"), TypeError, "skip_layers is the string 'lm_head'"),
        (lambda m: quantize_model(m.state_dict()), TypeError, QUANTIZE + "model is of type OrderedDict"),
        (lambda m: replace_linear_layers(m, 3), ValueError, REPLACE + r"bits is 3; supported are \[2, 4, 8"),
        (lambda m: replace_linear_layers(m, group_size=0), ValueError, REPLACE + "group_size is 0"),
        (lambda m: replace_linear_layers(m, skip_layers="lm_head"), TypeError, "skip_layers is the string 'lm_head'"),
        (
            lambda m: replace_linear_layers(m, layer_filter=lambda path, _: 1 // (path != "lm_head")),
            ZeroDivisionError,
            "division",
        ),
    ],
)
def test_what_is_refused_changes_nothing(call: Callable[[nn.Module], Any], error: type, message: str) -> None:
    model = tiny_model()
    with pytest.raises(error, match=message):
        call(model)
    assert not layers_of(model)


def test_a_weight_that_is_not_finite_is_named() -> None:
    for quantize in (quantize_model, replace_linear_layers):
        model = tiny_model()
        model.model.layers[1].mlp.up_proj.weight.data[3, 5] = torch.nan
        with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj\.weight has values that are not finite"):
            quantize(model)
        assert not layers_of(model)


# --- Saving and loading -----------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A tied model with int4 layers, the ones that have all kinds of tensors."""
    save_quantized(quantized("qwen2-tied", "int4"), tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize("way", QUANTIZED)
@pytest.mark.parametrize("model", MODELS)
def test_a_loaded_model_is_the_saved_one(model: str, way: str, tmp_path: Path) -> None:
    made = quantized(model, way)
    loaded = reloaded(made, tmp_path)
    assert type(loaded) is type(made)
    assert_same_state(loaded, made)
    assert layers_of(loaded) == layers_of(made)
    for path in layers_of(made):
        ours, expected = loaded.get_submodule(path), made.get_submodule(path)
        assert repr(ours) == repr(expected)
        packed = [parameter for name, parameter in ours.named_parameters() if name != "bias"]
        assert not any(parameter.requires_grad for parameter in packed)
    embedding, head = loaded.get_input_embeddings(), loaded.get_output_embeddings()
    assert (getattr(head, "weight", None) is embedding.weight) == model.endswith("-tied")
    assert not loaded.training
    assert not getattr(loaded, "is_quantized", False)  # as after quantizing in place


def test_what_a_directory_holds(saved: Path) -> None:
    assert {file.name for file in saved.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "model.safetensors.index.json",
        "quantization_config.json",
    }
    record = json.loads((saved / "quantization_config.json").read_text())
    entry = {"class": "MarlinLinear", "mode": "marlin_int4", "group_size": 128, "bits": 4}
    paths = layers_of(quantized("qwen2-tied", "int4"))
    tied = {"lm_head.weight": "model.embed_tokens.weight"}
    assert record == {"format": "marlin", "layers": dict.fromkeys(paths, entry), "tied": tied}
    stored = load_file(saved / "model.safetensors")
    assert "lm_head.weight" not in stored
    path = "model.layers.0.self_attn.q_proj"
    assert {name: (tensor.dtype, list(tensor.shape)) for name, tensor in stored.items() if path in name} == {
        f"{path}.weight_packed": (torch.uint32, [16, 128]),
        f"{path}.scales": (torch.float16, [1, 128]),
        f"{path}.zeros": (torch.float16, [1, 128]),
        f"{path}.bias": (torch.float32, [128]),
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_tensor_keeps_its_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    tiny_model("qwen2").to(dtype).save_pretrained(tmp_path / "dense")
    model, _ = marlin.load_and_quantize(tmp_path / "dense", bits=8, device="cpu")
    model.model.norm.float()
    save_quantized(model, tmp_path / "quantized")
    loaded = load_quantized(tmp_path / "quantized", "cpu")
    assert loaded.model.embed_tokens.weight.dtype == loaded.config.dtype == dtype
    assert loaded.model.norm.weight.dtype == torch.float32
    assert loaded.model.layers[0].mlp.up_proj.scales.dtype == torch.float16
    assert_same_state(loaded, model)
    model.model.norm.to(dtype)
    loaded.model.norm.to(dtype)
    assert torch.equal(logits(loaded), logits(model))


def test_a_model_goes_to_a_device_and_back_whole(saved: Path, device: str) -> None:
    loaded = load_quantized(saved, device)
    assert {tensor.device.type for tensor in [*loaded.parameters(), *loaded.buffers()]} == {device}
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    expected = load_quantized(saved, "cpu")
    assert_same_state(loaded.cpu(), expected)
    assert torch.equal(logits(loaded), logits(expected))


def test_layers_of_one_weight_are_stored_once_and_loaded_as_one(tmp_path: Path) -> None:
    model = tiny_model()
    first, second = model.model.layers
    second.mlp.up_proj.weight = first.mlp.up_proj.weight
    second.self_attn.q_proj = first.self_attn.q_proj
    replace_linear_layers(model)
    loaded = reloaded(model, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert not [name for name in stored if "layers.1.mlp.up_proj" in name or "layers.1.self_attn.q_proj" in name]
    first, second = loaded.model.layers
    for name in ("weight_packed", "scales"):
        assert getattr(first.mlp.up_proj, name) is getattr(second.mlp.up_proj, name)
        assert getattr(first.self_attn.q_proj, name) is getattr(second.self_attn.q_proj, name)


def test_both_kinds_of_layers_in_one_model(tmp_path: Path) -> None:
    model = quantize_model(tiny_model(), "int4_sym", 32, {"mlp", "lm_head"})
    replace_linear_layers(model, 8, 64, {"layers.1"})
    assert repr(reloaded(model, tmp_path)) == repr(model)


def test_a_loaded_model_can_be_saved_again(saved: Path, tmp_path: Path) -> None:
    before = contents(saved)
    save_quantized(load_quantized(saved, "cpu"), tmp_path / "again")
    assert contents(tmp_path / "again") == before
    save_quantized(load_quantized(saved, "cpu"), saved)  # over the files that back its tensors
    assert contents(saved) == before


def test_models_without_a_head(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = BertModel(transformers.BertConfig(**sizes, vocab_size=VOCABULARY)).eval()
    replace_linear_layers(model)
    save_quantized(model, tmp_path)
    loaded = load_quantized(tmp_path, "cpu")
    assert type(loaded) is BertModel
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS).last_hidden_state, model(TOKENS).last_hidden_state)


def test_generation_config_is_kept(tmp_path: Path) -> None:
    model = quantized()
    model.generation_config = GenerationConfig(max_new_tokens=7, eos_token_id=[1, 9])
    save_quantized(model, tmp_path)
    assert load_quantized(tmp_path, "cpu").generation_config.eos_token_id == [1, 9]


class LargestFloat(TorchDispatchMode):
    """The number of elements of the largest floating-point tensor that takes memory."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor) and tensor.is_floating_point() and not tensor.is_meta:
                self.elements = max(self.elements, tensor.numel())
        return result


def test_loading_makes_no_floating_point_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # other threads are not watched
    model = quantized()
    save_quantized(model, tmp_path)
    smallest = min(layer.in_features * layer.out_features for layer in map(model.get_submodule, layers_of(model)))
    table = model.model.embed_tokens.weight.numel()
    assert table > smallest / 2  # the watch would notice a layer's weight by its size alone if there were no table
    with LargestFloat() as largest:
        load_quantized(tmp_path, "cpu")
    assert largest.elements == table
    with LargestFloat() as largest:
        tiny_model()
    assert largest.elements > 2 * smallest


def test_shards(tmp_path: Path) -> None:
    reloaded(quantized(), tmp_path, max_shard_bytes=40_000)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2


def test_failed_save_leaves_the_old_directory(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(saved)
    written = fill_disk(monkeypatch)
    with pytest.raises(OSError, match="No space left"):
        save_quantized(quantized(), saved, max_shard_bytes=40_000)
    assert len(written) == 2
    assert contents(saved) == before


def test_new_model_replaces_the_weights_and_nothing_else(tmp_path: Path) -> None:
    save_quantized(quantized(), tmp_path, max_shard_bytes=40_000)
    (tmp_path / "notes.txt").write_text("mine")
    reloaded(quantized(way="bits-8"), tmp_path)
    assert [file.name for file in tmp_path.glob("*.safetensors")] == ["model.safetensors"]
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    message = r"\[save_quantized\] model is of type OrderedDict; it must be a torch\.nn\.Module"
    with pytest.raises(TypeError, match=message):
        save_quantized(tiny_model().state_dict(), tmp_path)
    with pytest.raises(ValueError, match="no layers of Marlin"):
        save_quantized(tiny_model(), tmp_path)
    mixed = quantize_to_mlx(tiny_model(), predicate=lambda path, _: "layers.0" in path)
    replace_linear_layers(mixed)
    with pytest.raises(ValueError, match=r"save_checkpoint writes: model\.layers\.0\.self_attn\.q_proj"):
        save_quantized(mixed, tmp_path)

    class Own(marlin.MarlinLinear):
        pass

    model = quantized()
    model.lm_head = Own(128, VOCABULARY)
    with pytest.raises(ValueError, match=r"MetalQuantizedLinear or ColumnPackedSwitchLinear: lm_head"):
        save_quantized(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_mlx_checkpoints_have_no_layers_of_marlin(tmp_path: Path) -> None:
    model = quantized()
    for write in (save_checkpoint, lambda model, path: quantize_to_mlx(model) and save_checkpoint(model, path)):
        with pytest.raises(
            ValueError, match=r"\[save_checkpoint\] .*save_quantized writes: model\.layers\.0\.self_attn"
        ):
            write(model, tmp_path)
    assert not list(tmp_path.iterdir())


# --- Damaged directories and other ones -------------------------------------------------------------------------------

LAYER = "model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda t: t.pop("model.norm.weight"), r"missing tensors: model\.norm\.weight"),
        (lambda t: t.pop(f"{LAYER}.zeros"), rf"missing tensors: {LAYER}\.zeros"),
        (lambda t: t.pop("model.embed_tokens.weight"), r"missing tensors: model\.embed_tokens\.weight"),
        (lambda t: t.update(extra=torch.ones(1)), "unexpected tensors: extra"),
        (lambda t: t.update({f"{LAYER}.weight": torch.ones(128, 128)}), rf"unexpected tensors: {LAYER}\.weight"),
        (
            lambda t: t.update({f"{LAYER}.scales": torch.ones(2, 128).half()}),
            rf"{LAYER}\.scales is float16 \[2, 128\] and should be float16 \[1, 128\]",
        ),
        (
            lambda t: t.update({f"{LAYER}.scales": torch.ones(1, 128).bfloat16()}),
            rf"{LAYER}\.scales is bfloat16 \[1, 128\] and should be float16",
        ),
        (
            lambda t: t.update({f"{LAYER}.weight_packed": torch.zeros(16, 128, dtype=torch.int32)}),
            rf"{LAYER}\.weight_packed is int32 \[16, 128\] and should be uint32 \[16, 128\]",
        ),
        (lambda t: t[f"{LAYER}.scales"].fill_(torch.inf), rf"{LAYER}\.scales has values that are not finite"),
        (lambda t: t[f"{LAYER}.zeros"].fill_(torch.nan), rf"{LAYER}\.zeros has values that are not finite"),
        (lambda t: [t.pop(name) for name in list(t) if "layers.0" in name], "missing tensors: .* and [0-9]+ more"),
    ],
)
def test_faulty_tensors_are_named(edit: Callable[[dict[str, Tensor]], Any], message: str, saved: Path) -> None:
    edit_tensors(saved, edit, "pt")
    with pytest.raises(ValueError, match=rf"\[load_quantized\] .*{message}"):
        load_quantized(saved, "cpu")


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda r: r.update(format="fp4"), "has the format 'fp4'; supported is 'marlin'"),
        (lambda r: r.pop("format"), "has the format None; supported is 'marlin'"),
        (lambda r: r.update(layers=[LAYER]), "'layers' is not a JSON object"),
        (lambda r: r["layers"].update({"model.layers.9": {}}), r"layers that the model has not: model\.layers\.9"),
        (lambda r: r["layers"].update({"model.norm": r["layers"][LAYER]}), r"has not: model\.norm"),
        (lambda r: r["layers"].update({LAYER: True}), rf"{LAYER} is True, which is not supported"),
        (lambda r: r["layers"][LAYER].pop("bits"), rf"{LAYER} is \{{.*\}}, which is not supported"),
        (lambda r: r["layers"][LAYER].update({"class": "Linear"}), rf"{LAYER} is .*'Linear'.* not supported"),
        (lambda r: r["layers"][LAYER].update(mode="marlin_fp8"), rf"{LAYER} is .*'marlin_fp8'.* not supported"),
        (lambda r: r["layers"][LAYER].update(bits=8), rf"{LAYER} is .*8.* not supported"),
        (lambda r: r["layers"][LAYER].update(group_size=48), rf"{LAYER} is .*48.* not supported"),
        (lambda r: r["layers"][LAYER].update(mode="marlin_fp4"), rf"unexpected tensors: {LAYER}\.zeros"),
        (lambda r: r["layers"].pop(LAYER), rf"missing tensors: {LAYER}\.weight; unexpected tensors: .*{LAYER}\.scales"),
        (lambda r: r.update(tied={}), r"missing tensors: lm_head\.weight"),
        (lambda r: r["tied"].update({"lm_head.weight": "gone"}), r"ties lm_head\.weight to gone"),
        (lambda r: r["tied"].update({"lm_head.weight": "model.norm.weight"}), r"ties lm_head\.weight to model\.norm"),
    ],
)
def test_faulty_records_are_named(edit: Callable[[dict[str, Any]], Any], message: str, saved: Path) -> None:
    edit_config(saved, edit, "quantization_config.json")
    with pytest.raises(ValueError, match=rf"\[load_quantized\] .*{message}"):
        load_quantized(saved, "cpu")


def test_faulty_files_are_named(saved: Path, tmp_path: Path) -> None:
    def copied(name: str) -> Path:
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        shutil.copytree(saved, tmp_path / "copy")
        return tmp_path / "copy" / name

    def assert_refused(error: type, message: str) -> None:
        with pytest.raises(error, match=rf"\[load_quantized\] .*{message}"):
            load_quantized(tmp_path / "copy", "cpu")

    for name, message in (("config.json", "has no config.json"), ("model.safetensors", r"has no model\*\.safetensors")):
        copied(name).unlink()
        assert_refused(FileNotFoundError, message)
    for name in ("config.json", "quantization_config.json"):
        copied(name).write_text("{")
        assert_refused(ValueError, f"{name} is not JSON")
    file = copied("model.safetensors")
    file.write_bytes(file.read_bytes()[:-100])
    assert_refused(ValueError, r"model\.safetensors is damaged")
    shutil.copy(copied("model.safetensors"), tmp_path / "copy" / "model-00001-of-00002.safetensors")
    assert_refused(ValueError, "the index does not name the weight files that are there")


def test_other_kinds_of_directories_are_refused_with_the_loader_that_takes_them(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is no directory"):
        load_quantized(tmp_path / "nowhere", "cpu")
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        load_quantized(tmp_path, "cpu")
    tiny_model().save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match=r"has no quantization_config\.json and is not quantized; load_and_quantize"):
        load_quantized(tmp_path / "dense", "cpu")
    edit_config(tmp_path / "dense", lambda c: c.update(quantization_config={"quant_method": "awq"}))
    with pytest.raises(ValueError, match="is quantized by 'awq'; Transformers' from_pretrained"):
        load_quantized(tmp_path / "dense", "cpu")
    for model in (quantize_to_mlx(tiny_model()), tiny_model()):
        save_checkpoint(model, saved)  # over the other kind, whose quantization_config.json it leaves there
        for load in (load_quantized, lambda path, device: marlin.load_and_quantize(path, device=device)):
            with pytest.raises(ValueError, match="is an MLX checkpoint; load_checkpoint loads it"):
                load(saved, "cpu")
        assert torch.equal(logits(load_checkpoint(saved)), logits(model))


def test_other_loaders_refuse_a_saved_directory(saved: Path) -> None:
    with pytest.raises(ValueError, match="quantization_mlx_marlin"):
        load_checkpoint(saved)
    with pytest.raises(ValueError, match=r"\[load_and_quantize\] .* is quantized already; load_quantized loads it"):
        marlin.load_and_quantize(saved, device="cpu")


def test_a_device_that_is_not_here_is_refused_before_anything_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for call in (marlin.load_and_quantize, load_quantized):
        for options, device in (({}, "mps"), ({"device": "cuda"}, "cuda")):
            with pytest.raises(ValueError, match=rf"\[{call.__name__}\] device is '{device}'; usable here: 'cpu'"):
                call("nowhere", **options)


@pytest.mark.parametrize("package", ["transformers", "safetensors"])
def test_missing_package_names_the_extra(package: str, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = quantized()
    monkeypatch.setitem(sys.modules, package, None)
    for call in (
        lambda: load_quantized(saved, "cpu"),
        lambda: marlin.load_and_quantize("nowhere", device="cpu"),
        lambda: save_quantized(model, saved),
    ):
        with pytest.raises(ImportError, match=re.escape(f'{package}: pip install "quantization-mlx[transformers]"')):
            call()


# --- Transformers' own loading and saving -----------------------------------------------------------------------------

NO_METHOD = "quantization config .* has no `quant_method`"


@pytest.fixture
def patched() -> Iterator[None]:
    patch_transformers()
    yield
    unpatch_transformers()


def test_transformers_by_itself_refuses_a_saved_directory(saved: Path) -> None:
    """Its own code makes random layers of a method that it does not know, and raises where there is none."""
    for _ in range(2):
        for each in (AutoModelForCausalLM, AutoModel, Qwen2ForCausalLM):
            with pytest.raises(ValueError, match=NO_METHOD):
                each.from_pretrained(saved)
        load_quantized(saved, "cpu")  # changes nothing about that


@pytest.mark.usefixtures("patched")
@pytest.mark.parametrize("older", [False, True], ids=["as saved", "with the name of an older version"])
def test_after_the_patch_a_saved_directory_loads(older: bool, saved: Path, tmp_path: Path) -> None:
    if older:
        method = {"quant_method": "quantization_mlx_marlin"}
        edit_config(saved, lambda c: c.update(quantization_config=method))
    expected = load_quantized(saved, "cpu")
    for each in (AutoModelForCausalLM, Qwen2ForCausalLM):
        loaded = each.from_pretrained(saved)
        assert_same_state(loaded, expected)
        assert torch.equal(logits(loaded), logits(expected))
        assert layers_of(loaded) == layers_of(expected)
    loaded.save_pretrained(tmp_path / "again")
    save_quantized(expected, tmp_path / "expected")
    assert contents(tmp_path / "again") == contents(tmp_path / "expected")
    with pytest.raises(ValueError, match=r"config\.json of .* says that the weights are quantized"):
        Qwen2ForCausalLM.from_pretrained(saved, config=tiny_model("qwen2").config)


@pytest.mark.usefixtures("patched")
def test_after_the_patch_a_repository_of_the_hub_loads(tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--some--model"
    save_quantized(quantized(), repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    loaded = AutoModelForCausalLM.from_pretrained("some/model", cache_dir=tmp_path, local_files_only=True)
    assert torch.equal(logits(loaded), logits(quantized()))


@pytest.mark.usefixtures("patched")
def test_after_the_patch_save_pretrained_is_save_quantized(tmp_path: Path) -> None:
    model = quantized("qwen2-tied", "int4")
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    for loaded in (load_quantized(tmp_path, "cpu"), AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize(
    "part",
    [lambda model: model, lambda model: model.model, lambda model: model.model.layers[1]],
    ids=["all", "base", "layer"],
)
def test_what_transformers_saves_by_itself_is_refused(part: Callable[[Any], nn.Module], tmp_path: Path) -> None:
    """Its save_pretrained has no record of the layers, whatever part of the model they are in."""
    model = tiny_model("qwen2")
    replace_linear_layers(part(model))
    model.save_pretrained(tmp_path / "made")
    save_quantized(model, tmp_path / "quantized")
    load_quantized(tmp_path / "quantized", "cpu").save_pretrained(tmp_path / "loaded")
    model.model.save_pretrained(tmp_path / "base")
    for name in ("made", "loaded", "base"):
        with pytest.raises(ValueError, match=NO_METHOD):
            AutoModel.from_pretrained(tmp_path / name)
        with pytest.raises(ValueError, match=r"has no quantization_config\.json"):
            load_quantized(tmp_path / name, "cpu")
    with patched_transformers(), pytest.raises(ValueError, match=r"has no quantization_config\.json"):
        AutoModel.from_pretrained(tmp_path / "made")


def test_the_class_of_a_part_never_makes_random_layers(tmp_path: Path) -> None:
    model, text = wrapper("gemma3")
    replace_linear_layers(model, group_size=32)
    loaded = reloaded(model, tmp_path)
    with pytest.raises(ValueError, match=NO_METHOD):
        text.from_pretrained(tmp_path)
    with patched_transformers(), pytest.raises(ValueError, match="has layers that the model has not"):
        text.from_pretrained(tmp_path)
    assert type(loaded) is type(model)


# --- Models that are none of Transformers -----------------------------------------------------------------------------


class Plain(nn.Module):
    """A module with a tied layer, layers that stay, buffers and tensors of several dtypes."""

    def __init__(self, outputs: int = 8) -> None:
        super().__init__()
        self.table = nn.Embedding(16, 128)
        self.inner = nn.Sequential(nn.Linear(128, 64), nn.BatchNorm1d(64), nn.Linear(64, 128))
        self.twin = nn.Linear(64, 128)
        self.twin.weight = self.inner[2].weight
        self.head = nn.Linear(128, outputs, dtype=torch.bfloat16)

    def forward(self, indices: Tensor) -> Tensor:
        x = self.inner[:2](self.table(indices))
        return self.head((self.inner[2](x) + self.twin(x)).to(torch.bfloat16))


def plain(seed: int = 0, **options: Any) -> nn.Module:
    torch.manual_seed(seed)
    model = Plain(**options)
    model.inner[1].running_mean.uniform_()
    return model.eval()


@pytest.mark.parametrize("way", ["int4", "bits-8"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_any_module_is_saved_and_loaded_into_one_like_it(device: str, way: str, tmp_path: Path) -> None:
    model = plain()
    QUANTIZED[way](model, group_size=64)
    save_quantized(model, tmp_path, max_shard_bytes=10_000)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    other = plain(seed=1).train().to(device)
    loaded = load_quantized(tmp_path, "cpu", model=other)
    assert loaded is other and not loaded.training
    assert layers_of(loaded) == {"inner.0", "inner.2", "twin", "head"}
    assert_same_state(loaded, model)
    assert loaded.twin.weight_packed is loaded.inner[2].weight_packed
    indices = torch.arange(5)
    with torch.no_grad():
        assert torch.equal(loaded(indices), model(indices))


def test_a_model_of_transformers_can_be_filled_too(saved: Path) -> None:
    loaded = load_quantized(saved, "cpu", model=tiny_model(**MODELS["qwen2-tied"]))
    expected = load_quantized(saved, "cpu")
    assert_same_state(loaded, expected)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_a_module_that_is_not_the_saved_one_is_refused_and_left_as_it_was(tmp_path: Path) -> None:
    model = plain()
    replace_linear_layers(model, group_size=64)
    save_quantized(model, tmp_path)
    with pytest.raises(ValueError, match="a model of the class Plain, which is none of Transformers; make one"):
        load_quantized(tmp_path, "cpu")
    with pytest.raises(ValueError, match=NO_METHOD + "|model_type"):
        AutoModel.from_pretrained(tmp_path)
    smaller = nn.ModuleDict({"inner": plain().inner})
    for other, message in ((plain(outputs=9), r"wrong tensors: head\.weight_packed"), (smaller, "the model has not: ")):
        before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
        with pytest.raises(ValueError, match=rf"\[load_quantized\] .*{message}"):
            load_quantized(tmp_path, "cpu", model=other)
        assert not layers_of(other)
        assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())
    edit_tensors(tmp_path, lambda tensors: tensors["head.scales"].fill_(torch.inf), "pt")
    with pytest.raises(ValueError, match=r"head\.scales has values that are not finite"):
        load_quantized(tmp_path, "cpu", model=plain())


def test_state_that_is_no_tensor_is_refused(tmp_path: Path) -> None:
    class Stateful(Plain):
        def get_extra_state(self) -> dict[str, int]:
            return {"steps": 3}

    model = Stateful()
    replace_linear_layers(model, group_size=64)
    with pytest.raises(ValueError, match="state is no tensor and cannot be written: _extra_state"):
        save_quantized(model, tmp_path)


# --- Loading and quantizing -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_load_and_quantize_is_loading_and_quantizing(bits: int, tmp_path: Path) -> None:
    tiny_model(tie_word_embeddings=True).to(torch.bfloat16).save_pretrained(tmp_path)
    model, stats = marlin.load_and_quantize(str(tmp_path), bits, 64, "cpu")
    expected = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert stats == replace_linear_layers(expected, bits, 64) == {"replaced_count": 14, "skipped_count": 2}
    assert_same_state(model, expected)
    assert not model.training
    assert model.dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"\[load_and_quantize\] bits is 5"):
        marlin.load_and_quantize("nowhere", 5)


def test_remote_code_is_never_implied(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model().save_pretrained(tmp_path / "dense")
    trusted = []

    def recording(original: Callable[..., Any]) -> Callable[..., Any]:
        def from_pretrained(*args: Any, **kwargs: Any) -> Any:
            trusted.append(kwargs["trust_remote_code"])
            return original(*args, **kwargs)

        return from_pretrained

    for each in (transformers.AutoConfig, transformers.AutoModelForCausalLM, Qwen2ForCausalLM):
        monkeypatch.setattr(each, "from_pretrained", recording(each.from_pretrained))
    for options, expected in (({}, False), ({"trust_remote_code": True}, True)):
        trusted.clear()
        marlin.load_and_quantize(tmp_path / "dense", device="cpu", **options)
        load_quantized(saved, "cpu", **options)
        assert len(trusted) >= 3
        assert set(trusted) == {expected}


OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = -output.logits
        return output
"""


def test_models_with_their_own_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "modules")])
    dense, made = tmp_path / "dense", tmp_path / "quantized"
    tiny_model().save_pretrained(dense)
    (dense / "own.py").write_text(OWN_CODE)
    names = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    edit_config(dense, lambda c: c.update(model_type="own", architectures=["Own"], auto_map=names))

    with pytest.raises(ValueError, match="trust_remote_code"):
        marlin.load_and_quantize(dense, device="cpu")
    model, _ = marlin.load_and_quantize(dense, device="cpu", trust_remote_code=True)
    assert torch.equal(logits(model), -logits(quantized()))
    save_quantized(model, made)
    shutil.rmtree(dense)
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_quantized(made, "cpu")
    assert torch.equal(logits(load_quantized(made, "cpu", trust_remote_code=True)), logits(model))


def test_models_that_others_quantized_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    model.is_quantized, model.quantization_method = True, "awq"
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda *args, **kwargs: model)
    with pytest.raises(ValueError, match="some/model is quantized already, by 'awq'"):
        marlin.load_and_quantize("some/model", device="cpu")


# --- A real model -----------------------------------------------------------------------------------------------------

# The format of each decoder layer, in turns; two bits are too few for any but one layer.
REAL_WAYS = ("bits-8", "bits-4", "int4", "int4_sym", "fp4")
TWO_BITS = "model.layers.20.mlp.up_proj"


@pytest.mark.exhaustive
@pytest.mark.xdist_group("real model")
def test_real_model_with_layers_of_every_format(tmp_path: Path) -> None:
    tokenizer, dense = load_demo().load_gguf()
    text = (ROOT / "examples" / "harbour.txt").read_text(encoding="utf-8")
    tokens = tokenizer(text, return_tensors="pt").input_ids[:, :96]

    @torch.no_grad()
    def scores(model: nn.Module) -> Tensor:
        return model(tokens).logits[0]

    def perplexity(scores: Tensor) -> float:
        return nn.functional.cross_entropy(scores[:-1], tokens[0, 1:]).exp().item()

    expected = perplexity(scores(dense))
    model = copy.deepcopy(dense)
    replace_linear_layers(model, 2, 64, layer_filter=lambda path, _: path == TWO_BITS)
    for number, layer in enumerate(model.model.layers):
        QUANTIZED[REAL_WAYS[number % len(REAL_WAYS)]](layer, group_size=64)
    modes = {layer.mode for layer in model.modules() if isinstance(layer, marlin.ColumnPackedLinear)}
    assert modes == {"marlin_fp4", "marlin_fp8", "marlin_int2", "marlin_int4", "marlin_int4_sym"}
    assert len(layers_of(model)) == 210

    computed = scores(model)
    assert perplexity(computed) < 1.5 * expected
    reference = scores(dequantized(model, dense))
    oracle.assert_within(computed, reference.double(), 1e-4 * reference.abs().max())

    save_quantized(model, tmp_path)
    loaded = load_quantized(tmp_path, "cpu")
    assert_same_state(loaded, model)
    assert torch.equal(scores(loaded), computed)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight

    pipeline = marlin.TransformersMarlinPipeline(loaded, tokenizer, "cpu")
    question = [{"role": "user", "content": "What is the capital of France?"}]
    answer = pipeline.chat(question, 24, temperature=0)
    assert "Paris" in answer
    assert "".join(pipeline.chat(question, 24, temperature=0, stream=True)) == answer
