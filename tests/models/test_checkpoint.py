"""MLX checkpoint directories, written and read, against mlx-lm on small random models."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers import PreTrainedTokenizerFast as Tokenizer

import oracle
import tiny
from cases import FLOAT_FORMATS, SOME_FORMATS
from command import Run
from disk import fill_disk
from oracle import name_of
from quantization_mlx import QuantizedEmbedding, QuantizedLinear, load_checkpoint, quantize_model, save_checkpoint
from quantization_mlx.checkpoint.record import format_of_tensors
from quantization_mlx.checkpoint.staging import staged
from quantization_mlx.hf.patch import patched_transformers
from tiny import TEXT, TWO_KINDS, assert_close, contents, edit_config, edit_tensors, logits, mlx_logits, tiny_model

LLAMA3_ROPE = {"rope_type": "llama3", "rope_theta": 50_000.0, "factor": 8.0, "low_freq_factor": 1.0}
LLAMA3_ROPE |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 32}
# What differs between the models of the Llama family, one at a time.
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "rope-theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 100_000.0}},
    "rope-llama3": {"rope_parameters": LLAMA3_ROPE, "max_position_embeddings": 256},
    "ragged": {"intermediate_size": 160, "tie_word_embeddings": True},  # down_proj's rows are no multiple of 64 or 128
}


def from_pretrained(directory: Path) -> PreTrainedModel:
    with patched_transformers():
        return transformers.AutoModelForCausalLM.from_pretrained(directory)


@pytest.fixture
def saved(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    """A checkpoint of a tied model, quantized to the defaults."""
    save_checkpoint(quantize_model(tiny_model(tie_word_embeddings=True)), tmp_path / "saved", tokenizer)
    return tmp_path / "saved"


# --- mlx-lm reads what we write ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", SOME_FORMATS, ids=name_of)
@pytest.mark.parametrize("variant", VARIANTS)
def test_mlx_lm_computes_the_same_from_our_checkpoint(
    variant: str, format: oracle.Format, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    model = quantize_model(tiny_model(**VARIANTS[variant]), **format.options)
    loaded = tiny.reloaded(model, tmp_path, tokenizer)
    assert_close(logits(loaded), mlx_logits(tmp_path, torch.float32))


def test_bfloat16_is_as_close_as_mlx_lm_in_bfloat16(tmp_path: Path, tokenizer: Tokenizer) -> None:
    save_checkpoint(quantize_model(tiny_model(torch.bfloat16)), tmp_path, tokenizer)
    exact = mlx_logits(tmp_path, torch.float32).double()
    assert_close(logits(load_checkpoint(tmp_path, dtype=torch.float32)), exact)
    loaded = load_checkpoint(tmp_path)
    assert loaded.dtype == torch.bfloat16
    mlx_error = (mlx_logits(tmp_path) - exact).abs().max()
    oracle.assert_within(logits(loaded), exact, 2 * mlx_error)


def test_checkpoint_is_laid_out_as_mlx_lm_does(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """The same tensors, bit for bit, and the same records as mlx-lm's own conversion."""
    model = tiny_model(torch.bfloat16, tie_word_embeddings=True)
    directories = tmp_path / "ours", tiny.converted_by_mlx(model, tokenizer, tmp_path)
    save_checkpoint(quantize_model(model), tmp_path / "ours", tokenizer)
    tiny.assert_same_tensors(*directories)
    ours, theirs = (json.loads((directory / "config.json").read_text()) for directory in directories)
    for name in ("quantization", "quantization_config"):
        assert ours[name] == theirs[name] == {"group_size": 64, "bits": 4, "mode": "affine"}
    ours, theirs = (json.loads((each / "model.safetensors.index.json").read_text()) for each in directories)
    assert ours["weight_map"] == theirs["weight_map"]
    assert ours["metadata"]["total_size"] == theirs["metadata"]["total_size"]


def test_shards(tmp_path: Path, tokenizer: Tokenizer) -> None:
    model = quantize_model(tiny_model())
    save_checkpoint(model, tmp_path, tokenizer, max_shard_bytes=40_000)
    files = sorted(file.name for file in tmp_path.glob("*.safetensors"))
    assert len(files) > 2
    assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    stored = {name: file for file in files for name in load_file(tmp_path / file)}
    assert index["weight_map"] == stored
    assert_close(logits(load_checkpoint(tmp_path)), mlx_logits(tmp_path, torch.float32))


# --- We read what mlx-lm writes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"q_bits": 4, "q_group_size": 64},
        {"q_bits": 3, "q_group_size": 32},
        {"quant_predicate": "mixed_4_6"},
        *({"q_mode": format.mode} for format in FLOAT_FORMATS),
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_conversions_of_mlx_lm_compute_the_same(
    tied: bool, options: dict[str, Any], tmp_path: Path, tokenizer: Tokenizer
) -> None:
    dense = tiny_model(torch.bfloat16, num_hidden_layers=8, tie_word_embeddings=tied)
    theirs = tiny.converted_by_mlx(dense, tokenizer, tmp_path, **options)
    model = load_checkpoint(theirs, dtype=torch.float32)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert_close(logits(model), mlx_logits(theirs, torch.float32))
    if "quant_predicate" in options:
        assert {module.bits for module in model.modules() if isinstance(module, QuantizedLinear)} == {4, 6}


def test_unquantized_conversions_load_too(tmp_path: Path, tokenizer: Tokenizer) -> None:
    model = tiny_model(tie_word_embeddings=True)
    theirs = tiny.converted_by_mlx(model, tokenizer, tmp_path, quantize=False)
    assert torch.equal(logits(load_checkpoint(theirs)), logits(model))


# --- Other families ---------------------------------------------------------------------------------------------------

DECODER = {"is_decoder": True, "max_position_embeddings": 32, "bos_token_id": 0, "eos_token_id": 1}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
# Each has something that stood in the way of reading back what was written.
FAMILIES: dict[str, dict[str, Any]] = {
    "GPT2LMHeadModel": tiny.GPT2,  # ignores stored tensors by a pattern that c_attn.bias matches
    "GPTJForCausalLM": {**tiny.GPT2, "rotary_dim": 16},  # the same, of which mlx-lm knows the family
    "Llama4ForCausalLM": {**tiny.LLAMA4, "num_local_experts": 2},  # is its own base model
    "Gemma4ForCausalLM": {
        **TEXT,
        **TWO_KINDS,
        **tiny.PER_LAYER,
    },  # a scaling of rotary embeddings for one kind of layers
    "XLMRobertaForCausalLM": {**TEXT, **DECODER},  # a tied bias
    "InklingForCausalLM": {**TEXT, **ROUTED},  # a config silent about tying
}


@pytest.mark.parametrize("quantized", [False, True], ids=["dense", "quantized"])
@pytest.mark.parametrize("family", FAMILIES)
def test_families_there_and_back(family: str, quantized: bool, tmp_path: Path, tokenizer: Tokenizer) -> None:
    model = tiny.with_random_vectors(tiny.random_model(family, **copy.deepcopy(FAMILIES[family])))
    if quantized:
        quantize_model(model, group_size=32)
    save_checkpoint(model, tmp_path, tokenizer)
    loaded = load_checkpoint(tmp_path)
    assert type(loaded) is type(model)
    assert loaded.config.to_dict().get("rope_parameters") == model.config.to_dict().get("rope_parameters")
    if quantized:
        assert torch.equal(logits(loaded), logits(model))
    else:  # Transformers computes experts in another order where their weights lie otherwise
        assert_close(logits(loaded), logits(model), 1e-5)
    if family in ("GPTJForCausalLM", "Gemma4ForCausalLM"):
        assert_close(logits(loaded), tiny.mlx_logits_of_tokens(tmp_path))


@pytest.mark.parametrize("command", ["generate", "perplexity", "benchmark"])
def test_activations_beyond_float16_are_an_error_of_the_command(
    command: str, tmp_path: Path, tokenizer: Tokenizer, run: Run
) -> None:
    """As those of Gemma 3, whose weights after the normalisation of each block are as large as here."""
    model = tiny.causal_lm("Gemma3", **TEXT, **TWO_KINDS)
    for layer in model.model.layers:
        nn.init.constant_(layer.post_feedforward_layernorm.weight, 60_000.0)
    save_checkpoint(quantize_model(model), tmp_path, tokenizer)
    (tmp_path / "text").write_text("w3 w4 w5 w6 w7 w8 w9")
    flags = {
        "generate": ["-p", "w3 w4", "-m", "2"],
        "perplexity": ["--data-path", tmp_path / "text", "--sequence-length", "6"],
        "benchmark": ["-p", "4", "-g", "2", "-n", "1"],
    }[command]
    _, err = run(command, "--model", tmp_path, "--dtype", "float16", *flags, code=1)
    assert "computes NaN or infinity in float16; its activations are too large for it" in err
    out, _ = run(command, "--model", tmp_path, "--dtype", "bfloat16", *flags)
    assert out.strip() and "nan" not in out


# --- The rule of which layers are quantized ---------------------------------------------------------------------------


def test_layers_may_differ(tmp_path: Path, tokenizer: Tokenizer) -> None:
    def predicate(path: str, layer: nn.Module) -> bool | dict[str, Any]:
        if "o_proj" in path:
            return False
        return {"bits": 8, "group_size": 32} if "down_proj" in path else {"mode": "mxfp4"} if "v_proj" in path else True

    model = quantize_model(tiny_model(), predicate=predicate)
    attention, mlp = model.model.layers[1].self_attn, model.model.layers[1].mlp
    assert type(attention.o_proj) is nn.Linear
    assert (attention.v_proj.mode, mlp.down_proj.bits, mlp.down_proj.group_size) == ("mxfp4", 8, 32)
    assert (mlp.up_proj.mode, mlp.up_proj.bits, mlp.up_proj.group_size) == ("affine", 4, 64)
    loaded = tiny.reloaded(model, tmp_path, tokenizer)
    record = json.loads((tmp_path / "config.json").read_text())["quantization"]
    assert record.pop("model.layers.1.mlp.down_proj") == {"group_size": 32, "bits": 8, "mode": "affine"}
    assert len(record) == 3 + 3  # the default and the other exceptions
    assert_close(logits(loaded), mlx_logits(tmp_path, torch.float32))


def test_mode_and_exceptions_may_be_absent(saved: Path) -> None:
    expected = logits(load_checkpoint(saved))
    edit_config(saved, lambda config: [config[name].pop("mode") for name in ("quantization", "quantization_config")])
    assert torch.equal(logits(load_checkpoint(saved)), expected)
    edit_config(saved, lambda config: config.pop("quantization"))
    assert torch.equal(logits(load_checkpoint(saved)), expected)


@pytest.mark.parametrize(
    "default, other",
    [
        ({"bits": 4, "group_size": 32}, {"bits": 8, "group_size": 64}),
        ({"bits": 4, "group_size": 64}, {"bits": 8, "group_size": 32}),
        ({"bits": 8, "group_size": 32}, {"bits": 2, "group_size": 128}),
        ({"mode": "mxfp8"}, {"mode": "nvfp4"}),
    ],
    ids=str,
)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_formats_without_an_entry_are_found_by_loading_and_by_info_alike(
    family: str, default: dict[str, Any], other: dict[str, Any], tmp_path: Path, run: Run
) -> None:
    model = tiny_model() if family == "llama" else tiny.random_model("GPT2LMHeadModel", **{**tiny.GPT2, "n_embd": 128})
    exceptional = re.compile("embed_tokens|c_attn")  # the latter's weight is stored transposed where it is dense
    quantize_model(model, **default, predicate=lambda path, _: other if exceptional.search(path) else True)
    save_checkpoint(model, tmp_path)

    def drop(config: dict[str, Any]) -> None:
        for record in (config["quantization"], config["quantization_config"]):
            assert [record.pop(path) for path in list(record) if exceptional.search(path)]

    edit_config(tmp_path, drop)
    assert torch.equal(logits(load_checkpoint(tmp_path)), logits(model))
    out, _ = run("info", "--model", tmp_path, "--json")
    parts = [part for part in json.loads(out)["parts"] if "mode" in part]
    formats = {(part["mode"], part["bits"], part["group_size"]): part["tensors"] for part in parts}
    stored = {id(module.scales): module for module in model.modules() if hasattr(module, "scales")}  # tied ones once
    expected = Counter((module.mode, module.bits, module.group_size) for module in stored.values())
    assert formats == expected and len(expected) == 2


@pytest.mark.parametrize("default, found", [({"bits": 4, "group_size": 64}, 4), ({"bits": 3, "group_size": 32}, None)])
def test_formats_of_a_model_that_transformers_does_not_know(default: dict[str, Any], found: int | None) -> None:
    """8 bits in groups of 32 have the shapes of 4 bits in groups of 64, which a default of that decides."""
    with torch.device("meta"):
        stored = {"head.weight": torch.empty(8, 32, dtype=torch.uint32), "head.scales": torch.empty(8, 4)}
    assert format_of_tensors("head", 128, default, stored) == {"group_size": 32, "bits": 8, "mode": "affine"}
    if found is not None:
        assert format_of_tensors("head", None, default, stored) == {"group_size": 64, "bits": 4, "mode": "affine"}
    else:
        with pytest.raises(ValueError, match=r"^head: its tensors have the shapes of several formats, .*'bits': 4"):
            format_of_tensors("head", None, default, stored)


def test_false_leaves_a_layer_alone(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = "model.layers.0.mlp.up_proj"
    model = quantize_model(tiny_model(), predicate=lambda name, _: name != path)
    save_checkpoint(model, tmp_path, tokenizer)
    edit_config(tmp_path, lambda config: config["quantization"].update({path: False}))
    loaded = load_checkpoint(tmp_path)
    assert type(loaded.get_submodule(path)) is nn.Linear
    assert torch.equal(logits(loaded), logits(model))


def test_rows_that_do_not_divide_into_groups_are_left_alone() -> None:
    model = quantize_model(tiny_model(intermediate_size=160))
    left = {path for path, module in model.named_modules() if type(module) is nn.Linear}
    assert left == {"model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"}


def test_subclasses_are_left_alone() -> None:
    class Scaled(nn.Embedding):
        def forward(self, indices: Tensor) -> Tensor:
            return 2 * super().forward(indices)

    model = quantize_model(nn.ModuleDict({"scaled": Scaled(8, 64), "plain": nn.Embedding(8, 64)}))
    assert type(model["scaled"]) is Scaled
    assert type(model["plain"]) is QuantizedEmbedding


def test_a_head_tied_to_a_subclass_stays_tied() -> None:
    class Scaled(nn.Embedding):
        pass

    model = nn.Module()
    model.embed, model.head = Scaled(32, 64), nn.Linear(64, 32, bias=False)
    model.head.weight = model.embed.weight
    quantize_model(model)
    assert type(model.head) is nn.Linear
    assert model.head.weight is model.embed.weight


@pytest.mark.parametrize("mode", ["affine", "mxfp4"])
def test_an_embedding_tied_to_an_earlier_head_stays_an_embedding(mode: str) -> None:
    model = nn.Module()
    model.head, model.embed = nn.Linear(64, 32, bias=False), nn.Embedding(32, 64)
    model.head.weight = model.embed.weight
    quantize_model(model.to(torch.bfloat16), mode=mode)
    assert isinstance(model.embed, QuantizedEmbedding)
    assert model.head.weight is model.embed.weight
    rows = model.embed(torch.tensor([3, 1]))
    assert rows.dtype == torch.bfloat16
    x = torch.eye(64, dtype=torch.bfloat16)
    oracle.assert_within(rows, model.head(x).T[[3, 1]].double(), 1e-2 * rows.abs().max(), mode)


def test_a_layer_of_two_names_is_replaced_under_both() -> None:
    model = nn.Module()
    model.a = model.b = nn.Linear(64, 8)
    quantize_model(model)
    assert isinstance(model.a, QuantizedLinear)
    assert model.a is model.b


def test_a_layer_by_itself_comes_back_quantized() -> None:
    assert isinstance(quantize_model(nn.Linear(64, 8)), QuantizedLinear)


def test_answers_of_the_predicate() -> None:
    def quantized(answer: Any) -> nn.Module:
        return quantize_model(nn.Sequential(nn.Linear(64, 8)), predicate=lambda path, layer: answer)[0]

    for no in (None, 0, False):
        assert type(quantized(no)) is nn.Linear
    assert quantized(re.match("a", "a")).bits == 4
    assert quantized({"bits": 8}).bits == 8
    where = "the predicate's dict for '0': "
    for wrong, error, message in (
        ({"bit": 8}, TypeError, where + "unknown key 'bit'; supported are 'group_size', 'bits' and 'mode'$"),
        ({"bits": "8"}, ValueError, where + "mode 'affine' with group_size 64 and bits '8' is not supported"),
        ({"mode": None}, ValueError, where + "mode None is not supported"),
        ("mxfp4", TypeError, "the predicate gives 'mxfp4' for '0'; wanted"),
    ):
        with pytest.raises(error, match=rf"^\[quantize_model\] {message}"):
            quantized(wrong)
    with pytest.raises(TypeError, match=r"^\[quantize_model\] predicate is 5; it must be a function"):
        quantize_model(nn.Linear(64, 8), predicate=5)
    with pytest.raises(ValueError, match=r"^\[quantize_model\] mode 'affine' with group_size '64' and bits 4 is not"):
        quantize_model(nn.Linear(64, 8), "64")


def test_a_format_that_is_refused_changes_nothing() -> None:
    model = nn.Sequential(nn.Linear(64, 8), nn.Linear(64, 8))
    with pytest.raises(ValueError, match="bits 7"):
        quantize_model(model, predicate=lambda path, layer: {"bits": 7 if path == "1" else 4})
    assert [type(layer) for layer in model] == [nn.Linear, nn.Linear]


def test_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="'int4' is not supported; supported are affine, mxfp4, mxfp8, nvfp4"):
        quantize_model(tiny_model(), mode="int4")


# --- Tied embeddings --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", SOME_FORMATS, ids=name_of)
def test_tied_embeddings_are_one_packed_copy(format: oracle.Format, tmp_path: Path) -> None:
    model = quantize_model(tiny_model(tie_word_embeddings=True), **format.options)
    save_checkpoint(model, tmp_path)
    assert not [name for name in load_file(tmp_path / "model.safetensors") if name.startswith("lm_head")]
    for each in (model, load_checkpoint(tmp_path), load_checkpoint(tmp_path, dtype=torch.bfloat16)):
        head, table = each.lm_head, each.model.embed_tokens
        assert all(getattr(head, name) is getattr(table, name) for name in ("weight", "scales", "biases"))


def test_what_the_predicate_says_of_the_embedding_holds_for_the_tied_head() -> None:
    model = quantize_model(tiny_model(tie_word_embeddings=True), predicate=lambda path, _: "embed" not in path)
    assert type(model.lm_head) is nn.Linear
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_tying_follows_the_tensors_where_the_config_is_silent(tied: bool, tmp_path: Path) -> None:
    model = quantize_model(tiny_model(tie_word_embeddings=tied))
    save_checkpoint(model, tmp_path)
    edit_config(tmp_path, lambda config: config.pop("tie_word_embeddings"))
    assert torch.equal(logits(load_checkpoint(tmp_path)), logits(model))


# --- Loading ----------------------------------------------------------------------------------------------------------


def test_loaded_model_is_whole(saved: Path) -> None:
    model = load_checkpoint(saved, dtype=torch.float16)
    assert not model.training
    assert not [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    assert model.dtype == model.config.dtype == torch.float16
    assert model.model.layers[0].mlp.up_proj.scales.dtype == torch.float16
    fresh = tiny_model().model.rotary_emb
    for name, buffer in model.model.rotary_emb.named_buffers():
        oracle.assert_identical(buffer, fresh.get_buffer(name), name)


def test_generation_config_is_kept(tmp_path: Path) -> None:
    model = quantize_model(tiny_model())
    model.generation_config = GenerationConfig(max_new_tokens=7, eos_token_id=[1, 9])
    save_checkpoint(model, tmp_path)
    assert load_checkpoint(tmp_path).generation_config.eos_token_id == [1, 9]
    tokens = load_checkpoint(tmp_path).generate(tiny.TOKENS, eos_token_id=None, pad_token_id=0)
    assert tokens.shape[1] == tiny.TOKENS.shape[1] + 7


def test_stale_index_is_ignored(saved: Path) -> None:
    expected = logits(load_checkpoint(saved))
    (saved / "model.safetensors.index.json").write_text('{"weight_map": {"gone": "model-00001-of-00009.safetensors"}}')
    assert torch.equal(logits(load_checkpoint(saved)), expected)


def test_old_rotary_tensors_are_ignored(saved: Path) -> None:
    expected = logits(load_checkpoint(saved))
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_tensors(saved, lambda tensors: tensors.update({name: torch.zeros(16)}))
    assert torch.equal(logits(load_checkpoint(saved)), expected)


PROJECTION = "model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda t: t.pop("model.norm.weight"), r"missing tensors: model\.norm\.weight"),
        (lambda t: t.pop(f"{PROJECTION}.biases"), rf"missing tensors: {PROJECTION}\.biases"),
        (lambda t: t.pop(f"{PROJECTION}.scales"), rf"unexpected tensors: {PROJECTION}\.biases"),
        (lambda t: t.update(extra=torch.ones(1)), "unexpected tensors: extra"),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(5)}),
            r"model\.norm\.weight is float32 \[5\] and should be",
        ),
        (
            lambda t: t.update({f"{PROJECTION}.weight": torch.zeros(128, 16)}),
            rf"{PROJECTION}\.weight is float32 \[128, 16\] and should be uint32 \[128, 16\]",
        ),
        (lambda t: [t.pop(name) for name in list(t) if "layers.0" in name], "missing tensors: .* and 1 more"),
    ],
)
def test_faulty_tensors_are_named(edit: Callable[[dict[str, Tensor]], Any], message: str, saved: Path) -> None:
    edit_tensors(saved, edit)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(saved)


def test_false_for_a_quantized_layer_is_an_error(saved: Path) -> None:
    edit_config(saved, lambda config: config["quantization"].update({PROJECTION: False}))
    with pytest.raises(ValueError, match=rf"unexpected tensors: {PROJECTION}\.biases"):
        load_checkpoint(saved)


def test_other_kinds_of_checkpoints_are_refused(saved: Path, tmp_path: Path) -> None:
    def refused(error: type[Exception], message: str, directory: Path = saved) -> None:
        with pytest.raises(error, match=message):
            load_checkpoint(directory)

    refused(FileNotFoundError, re.escape(f"{tmp_path} has no config.json"), tmp_path)
    shutil.copy(saved / "model.safetensors", saved / "model-00001-of-00002.safetensors")
    refused(ValueError, "repeats tensors of another file")
    edit_config(saved, lambda config: config.update(quantize_activations=True))
    refused(ValueError, "quantized activations")
    edit_config(saved, lambda config: config["quantization"].update(quant_method="awq"))
    refused(ValueError, "'awq'")
    for file in saved.glob("*.safetensors"):
        file.unlink()
    edit_config(saved, lambda config: [config.pop(name) for name in ("quantization", "quantize_activations")])
    refused(FileNotFoundError, r"has no model\*\.safetensors")


@pytest.mark.parametrize("package", ["transformers", "safetensors"])
def test_missing_package_names_the_extra(package: str, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [package, "safetensors.torch"]:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=re.escape(f'{package}: pip install "quantization-mlx[transformers]"')):
        load_checkpoint(saved)


# --- Saving over an older checkpoint ----------------------------------------------------------------------------------


class Failing:
    """Stands for a tokenizer on a full disk."""

    def save_pretrained(self, directory: Path) -> None:
        (Path(directory) / "tokenizer.json").write_text("half of a")
        raise OSError("No space left on device")


def test_failed_save_leaves_the_old_checkpoint(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(saved)
    model = quantize_model(tiny_model(), bits=8)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(model, saved, Failing())
    assert contents(saved) == before

    written = fill_disk(monkeypatch)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(model, saved, max_shard_bytes=40_000)
    assert len(written) == 2
    assert contents(saved) == before


def test_new_checkpoint_replaces_the_weights_and_nothing_else(tmp_path: Path) -> None:
    model = quantize_model(tiny_model())
    save_checkpoint(model, tmp_path, max_shard_bytes=40_000)
    (tmp_path / "notes.txt").write_text("mine")
    other = quantize_model(load_checkpoint(tmp_path))  # its tensors may be backed by the files that are replaced
    save_checkpoint(other, tmp_path)
    assert [file.name for file in tmp_path.glob("*.safetensors")] == ["model.safetensors"]
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert torch.equal(logits(load_checkpoint(tmp_path)), logits(model))


def save_and_be_told_to_end(model: nn.Module, directory: Path, number: signal.Signals) -> None:
    """Saves in another process, which gets the signal when the first weight file is half written."""

    def save(tensors: dict[str, Tensor], file: Path, metadata: dict[str, str]) -> None:
        Path(file).write_bytes(b"half of a")
        os.kill(os.getpid(), number)

    child = os.fork()
    if child == 0:
        try:
            if number != signal.SIGKILL:
                signal.signal(number, signal.SIG_DFL)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("safetensors.torch.save_file", save)
                save_checkpoint(model, directory)
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -number


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGKILL"])
@pytest.mark.parametrize("old", [True, False], ids=["over an older one", "new"])
def test_a_signal_leaves_the_old_checkpoint_and_nothing_in_the_way(
    old: bool, name: str, saved: Path, tmp_path: Path, tokenizer: Tokenizer, run: Run
) -> None:
    """SIGKILL leaves no chance to clean up: what it leaves is no obstacle, and goes with the next save."""
    target = saved if old else tmp_path / "new"
    before = contents(target) if old else {}
    save_and_be_told_to_end(quantize_model(tiny_model()), target, getattr(signal, name))
    left = list(target.glob(".save-*"))
    assert bool(left) == (name == "SIGKILL")
    assert {path: content for path, content in contents(target).items() if not path.startswith(".save-")} == before
    if old:
        save_checkpoint(quantize_model(tiny_model(), bits=8), target)
        assert contents(target).keys() == before.keys()
    else:
        save_checkpoint(tiny_model(), tmp_path / "dense")
        tokenizer.save_pretrained(tmp_path / "dense")
        run("convert", "--hf-path", tmp_path / "dense", "--mlx-path", target, "-q")
    assert not list(target.glob(".save-*"))
    assert load_checkpoint(target).lm_head.bits == (8 if old else 4)


@pytest.mark.parametrize("load", [load_checkpoint, from_pretrained], ids=["load_checkpoint", "from_pretrained"])
def test_each_file_is_read_once(
    load: Callable[[Path], Any], tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By this package: Transformers reads config.json for itself, and the tensors."""
    save_checkpoint(quantize_model(tiny_model()), tmp_path, tokenizer, max_shard_bytes=40_000)
    files = sorted(file.name for file in tmp_path.glob("model*.safetensors"))
    assert len(files) > 1
    read: Counter[str] = Counter()
    safe_open, read_text = safetensors.safe_open, Path.read_text

    def counted_open(file: Path, **options: Any) -> Any:
        read[Path(file).name] += 1
        return safe_open(file, **options)

    def counted_text(file: Path, **options: Any) -> str:
        read[file.name] += 1
        return read_text(file, **options)

    with monkeypatch.context() as patch:
        patch.setattr(safetensors, "safe_open", counted_open)
        patch.setattr(Path, "read_text", counted_text)
        assert load(tmp_path).lm_head.bits == 4
    assert read == Counter(["config.json", *files])


def test_an_interrupt_waits_until_all_files_are_in_place(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace = os.replace

    def interrupted(*arguments: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        replace(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", interrupted)
        save_checkpoint(quantize_model(tiny_model(), bits=8), saved)
    assert load_checkpoint(saved).lm_head.bits == 8
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_what_another_process_is_writing_is_left_alone(saved: Path) -> None:
    with staged(saved) as scratch:
        (scratch / "file").write_text("mine")
        save_checkpoint(quantize_model(tiny_model()), saved)
        assert (scratch / "file").exists()
    assert (saved / "file").read_text() == "mine"


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_files_have_the_mode_that_the_umask_leaves(umask: int, mode: int, tmp_path: Path) -> None:
    old = os.umask(umask)
    try:
        save_checkpoint(quantize_model(tiny_model()), tmp_path / "made")
    finally:
        os.umask(old)
    assert {file.name: file.stat().st_mode & 0o777 for file in (tmp_path / "made").iterdir()} == {
        name: mode
        for name in ("config.json", "generation_config.json", "model.safetensors", "model.safetensors.index.json")
    }
