"""Mixed recipes against mlx-lm's own, reports of errors against float64, embeddings that scale their rows."""

from __future__ import annotations

import json
import sys
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Gemma3ForCausalLM, LlamaForCausalLM
from transformers import PreTrainedTokenizerFast as Tokenizer
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding

import oracle
import tiny
from cases import FORMATS
from oracle import name_of
from quantization_mlx import QuantizedEmbedding, QuantizedLinear, quantize_model, save_checkpoint
from quantization_mlx.quantization.recipes import RECIPES, mixed_recipe
from quantization_mlx.quantization.report import QuantizationReport
from tiny import TOKENS, VOCABULARY, causal_lm, converted_by_mlx, logits, mlx_logits, relative_error, reloaded

# Recipes look at paths and at how many layers there are; sizes do not matter. The demo's model has 30 layers.
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
ROUNDING = 2 * torch.finfo(torch.float32).eps


def llama(layers: int, tied: bool = False) -> LlamaForCausalLM:
    return causal_lm("Llama", **SIZES, num_hidden_layers=layers, vocab_size=VOCABULARY, tie_word_embeddings=tied)


def gemma(dtype: torch.dtype = torch.float32) -> Gemma3ForCausalLM:
    kinds = ["sliding_attention", "sliding_attention", "full_attention"]
    sizes = {**SIZES, "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 4}
    return causal_lm("Gemma3", **sizes, num_hidden_layers=6, layer_types=2 * kinds, vocab_size=VOCABULARY).to(dtype)


# --- Recipes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [1, 7, 8, 30, 33])
@pytest.mark.parametrize("name", RECIPES)
def test_recipes_choose_what_mlx_lm_chooses(name: str, layers: int) -> None:
    from mlx_lm.convert import QUANT_RECIPES, mixed_quant_predicate_builder
    from mlx_lm.models.llama import Model, ModelArgs

    assert set(QUANT_RECIPES) == set(RECIPES)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    sizes = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": VOCABULARY, "rms_norm_eps": 1e-5}
    theirs = Model(ModelArgs("llama", num_hidden_layers=layers, tie_word_embeddings=False, **heads, **sizes))
    their_predicate = mixed_quant_predicate_builder(name, theirs, 32)
    packable = {path: module for path, module in theirs.named_modules() if hasattr(module, "to_quantized")}
    expected = {path: their_predicate(path, module) for path, module in packable.items()}
    model = quantize_model(llama(layers), group_size=32, predicate=name)
    packed = {path: layer for path, layer in model.named_modules() if hasattr(layer, "weight_packed")}
    found = {path: oracle.format_of(layer).options for path, layer in packed.items()}
    assert found == expected
    assert len({format["bits"] for format in found.values()}) == 2


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_mixed_checkpoint_is_mlx_lms(tied: bool, tmp_path: Path, tokenizer: Tokenizer) -> None:
    """The same tensors, bit for bit, and the same formats as `mlx_lm.convert --quant-predicate mixed_3_6`."""
    model = llama(9, tied).to(torch.bfloat16)
    theirs = converted_by_mlx(model, tokenizer, tmp_path, quant_predicate="mixed_3_6")
    save_checkpoint(quantize_model(model, predicate="mixed_3_6"), tmp_path / "ours", tokenizer)
    tiny.assert_same_tensors(tmp_path / "ours", theirs)
    assert formats(tmp_path / "ours") == formats(theirs)


def formats(directory: Path) -> dict[str, tuple]:
    """Each layer's format, whichever of them config.json calls the common one."""
    tensors = load_file(directory / "model.safetensors")
    record = json.loads((directory / "config.json").read_text())["quantization"]
    paths = [name.removesuffix(".scales") for name in tensors if name.endswith(".scales")]
    default = {"group_size": 64, "bits": record["bits"], "mode": "affine"}
    entries = {path: {**default, **record.get(path, {})} for path in paths}
    # mlx-lm takes a group_size of None for the default.
    return {path: (entry["group_size"] or 64, entry["bits"], entry["mode"]) for path, entry in entries.items()}


def test_unknown_recipes_and_models_without_layers_are_refused() -> None:
    model = llama(1)
    with pytest.raises(ValueError, match=r"no recipe 'mixed_5_6'.*mixed_2_6, mixed_3_4, mixed_3_6, mixed_4_6"):
        quantize_model(model, predicate="mixed_5_6")
    with pytest.raises(ValueError, match=r"'mixed_4_6' is for mode 'affine', not for 'mxfp4'"):
        quantize_model(model, mode="mxfp4", predicate="mixed_4_6")
    with pytest.raises(ValueError, match=r"Sequential has no numbered layers with a down_proj"):
        mixed_recipe("mixed_4_6", nn.Sequential(nn.Linear(64, 64)))
    assert not any(isinstance(module, QuantizedLinear) for module in model.modules())


# --- Reports ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS, ids=name_of)
def test_errors_and_sizes_of_every_format(format: oracle.Format) -> None:
    layer = nn.Linear(256, 48, bias=False)
    layer.weight.data = torch.randn(48, 256, generator=oracle.generator(3)) * torch.logspace(-2, 1, 48)[:, None]
    weight = layer.weight.detach().clone()
    report = QuantizationReport()
    quantized = quantize_model(layer, **format.options, on_layer=report.add)
    [row] = report.layers
    assert (row.path, row.shape, oracle.format_of(row)) == ("", (48, 256), format)
    assert row.relative_error == pytest.approx(relative_error(oracle.values_of(quantized), weight), rel=1e-5)
    overhead = 64 if format.mode == "affine" else 8  # two float32, or one byte, for each group
    assert row.bits_per_weight == pytest.approx(format.bits + overhead / format.group_size)


def test_layers_in_several_parts_and_more_dimensions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantization_mlx.quantization.report._CHUNK", 5 * 64)  # 5 rows at a time, of 3 * 17
    weight = torch.randn(3, 17, 64, generator=oracle.generator(4))
    experts = QuantizedLinear(64, 17, False, 32, 4)
    experts.pack(weight)
    report = QuantizationReport()
    report.add("experts", weight, experts)
    [row] = report.layers
    assert row.shape == (3, 17, 64)
    assert row.relative_error == pytest.approx(relative_error(oracle.values_of(experts), weight), rel=1e-5)


def test_the_total_is_that_of_all_layers_as_one() -> None:
    model = llama(2)
    layers = {path: module for path, module in model.named_modules() if path and hasattr(module, "weight")}
    weights = {path: layer.weight.detach().double().clone() for path, layer in layers.items()}
    report = QuantizationReport()
    quantize_model(model, predicate="mixed_2_6", on_layer=report.add)
    errors, norms, stored, count = 0.0, 0.0, 0, 0
    for path, module in model.named_modules():
        if isinstance(module, (QuantizedLinear, QuantizedEmbedding)):
            errors += (oracle.values_of(module) - weights[path]).square().sum().item()
            norms += weights[path].square().sum().item()
            stored += 8 * sum(parameter.nbytes for parameter in module.parameters())
            count += weights[path].numel()
    assert len(report.layers) == 2 * 7 + 2
    assert report.weights == count
    assert report.relative_error == pytest.approx((errors / norms) ** 0.5, rel=1e-5)
    assert report.bits_per_weight == pytest.approx(stored / count)


def test_layers_are_reported_once_and_their_weights_let_go_one_by_one() -> None:
    model = llama(2, tied=True)
    seen: list[tuple[str, weakref.ref]] = []

    def on_layer(path: str, weight: Tensor, quantized: nn.Module) -> None:
        assert weight.is_floating_point() and quantized.weight_packed.dtype == torch.uint32
        # Of the layers before this one, no float weight is left but, at most, the last one's.
        assert all(reference() is None for _, reference in seen[:-1])
        seen.append((path, weakref.ref(model.get_submodule(path).weight)))

    quantize_model(model, on_layer=on_layer)
    paths = [path for path, _ in seen]
    assert paths[0] == "model.embed_tokens" and "lm_head" not in paths
    assert len(paths) == len(set(paths)) == 2 * 7 + 1


def test_weights_of_zeros_have_no_error() -> None:
    layer = nn.Linear(64, 8, bias=False)
    nn.init.zeros_(layer.weight)
    report = QuantizationReport()
    quantize_model(layer, on_layer=report.add)
    assert report.layers[0].relative_error == report.relative_error == 0


def test_table_and_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = QuantizationReport()
    quantize_model(llama(3), predicate="mixed_4_6", on_layer=report.add)
    header, ruler, *rows, total = report.table().splitlines()
    assert header.split("|")[1].strip() == "layer" and set(ruler) == {"|", "-", " "}
    assert len({len(line) for line in (header, ruler, *rows, total)}) == 1
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [row[0] for row in cells] == [layer.path for layer in report.layers]
    head = next(row for row in cells if row[0] == "lm_head")
    assert head[1:3] == ["96 x 64", "affine, 6 bits, group_size 64"] and float(head[4].rstrip("%")) < 3
    assert f"{report.relative_error:.2%}" in total

    report.plot(tmp_path / "errors.png")
    assert (tmp_path / "errors.png").read_bytes().startswith(b"\x89PNG")
    report.plot(tmp_path / "errors.svg")
    assert "<svg" in (tmp_path / "errors.svg").read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="no layers to draw"):
        QuantizationReport().plot(tmp_path / "none.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"quantization-mlx\[plot\]"):
        report.plot(tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


# --- Embeddings that scale their rows ---------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["affine", "mxfp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=name_of)
def test_scaled_rows_are_those_of_the_float_layer(dtype: torch.dtype, mode: str) -> None:
    """What Transformers' own layer computes from the table, dequantized and rounded; in half precision bit for bit."""
    layer = gemma(dtype).model.embed_tokens
    quantized = QuantizedEmbedding.from_embedding(layer, mode=mode)
    layer.weight.data = oracle.values_of(quantized).to(dtype)
    expected = layer(TOKENS).detach()
    assert quantized(TOKENS).dtype == dtype
    bound = ROUNDING * expected.abs().max() * (dtype == torch.float32)
    oracle.assert_within(quantized(TOKENS), expected.double(), bound)
    assert "scale=8" in repr(quantized)


def test_scales_given_as_plain_numbers() -> None:
    layer = BartScaledWordEmbedding(16, 64, padding_idx=0, embed_scale=3.5)
    quantized = QuantizedEmbedding.from_embedding(layer, bits=8)
    layer.weight.data = oracle.values_of(quantized).float()
    expected = layer(TOKENS % 16).detach()
    oracle.assert_within(quantized(TOKENS % 16), expected.double(), ROUNDING * expected.abs().max())


def test_other_subclasses_are_refused() -> None:
    class Normed(nn.Embedding):
        pass

    with pytest.raises(TypeError, match="Normed may do more than look up and scale rows"):
        QuantizedEmbedding.from_embedding(Normed(8, 64))


@pytest.mark.parametrize("bits", [None, 4])
def test_gemma_goes_through_a_checkpoint_into_mlx_lm(bits: int | None, tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Sliding windows, two rotary bases and a tied head, quantized or not."""
    model = gemma() if bits is None else quantize_model(gemma(), bits=bits)
    assert (type(model.model.embed_tokens) is QuantizedEmbedding) == (bits is not None)
    loaded = reloaded(model, tmp_path, tokenizer)
    tiny.assert_close(logits(loaded), mlx_logits(tmp_path))
