"""The deprecated classes: against Transformers' own models on the same packed layers, and what their warnings say."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import marlin_models
import oracle
import tiny
from quantization_mlx.marlin import (
    MetalGenerationConfig,
    MetalGLM47Model,
    MetalKVCache,
    MetalKVCacheConfig,
    MetalTransformerBlock,
    QuantizedLlamaLayer,
    QuantizedModel,
    load_quantized,
    quantize_model,
    replace_linear_layers,
    save_quantized,
)
from quantization_mlx.marlin.generate import GenerationConfig, generate

LATENT = {
    **{"kv_lora_rank": 64, "q_lora_rank": 64, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 32},
    **{"num_key_value_heads": 4, "moe_intermediate_size": 64, "n_routed_experts": 8, "num_experts_per_tok": 2},
    **{"n_shared_experts": 1, "rms_norm_eps": 1e-6, **marlin_models.IDS},
}
# Models by name: the family of Transformers with its options.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("Glm4MoeLite", {**LATENT, "mlp_layer_types": ["dense", "dense"]}),
    "mixture": ("Glm4MoeLite", {**LATENT, "mlp_layer_types": ["dense", "sparse"]}),
    "deepseek": ("DeepseekV3", {**LATENT, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1}),
    "llama": ("Llama", marlin_models.IDS),
}
# The sizes of "dense", by the documented names.
SIZES = {
    **{"vocab_size": tiny.VOCABULARY, "hidden_size": 128, "num_layers": 2, "num_heads": 4, "intermediate_size": 256},
    **{"kv_lora_rank": 64, "q_lora_rank": 64, "qk_rope_head_dim": 16, "group_size": 64},
}
NO_END = {"eos_token_id": None}


def quiet(call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return call(*arguments, **options)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The directory of a model of `FAMILIES`, with packed layers; its head stays in floating point."""
    made: dict[tuple[str, int], Path] = {}

    def directory(name: str, bits: int = 4) -> Path:
        if (name, bits) not in made:
            family, options = FAMILIES[name]
            model = tiny.tiny_model(family=family, **options)
            for buffer_name, buffer in model.named_buffers():
                if buffer_name.endswith("e_score_correction_bias"):
                    buffer.copy_(torch.linspace(-0.2, 0.2, 8).roll(3))
            replace_linear_layers(model, bits, 64, skip_layers={"lm_head"})
            made[name, bits] = tmp_path_factory.mktemp(name)
            save_quantized(model, made[name, bits])
        return made[name, bits]

    return directory


# --- MetalGLM47Model --------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name, bits", [("dense", 4), ("mixture", 4), ("mixture", 8), ("deepseek", 4), ("llama", 2)])
def test_a_saved_model(name: str, bits: int, saved: Callable[..., Path]) -> None:
    """Logits, as a whole and token by token, and text."""
    directory = saved(name, bits)
    theirs = load_quantized(directory, "cpu")
    ours = quiet(MetalGLM47Model.from_quantized, str(directory), bits, device="cpu")
    assert not ours.training and ours.vocab_size == tiny.VOCABULARY
    expected = theirs(tiny.TOKENS).logits
    tiny.assert_close(ours(tiny.TOKENS), expected)
    cache = ours.create_kv_cache(max_seq_len=32)
    assert isinstance(cache, MetalKVCache) and cache.config.dtype == torch.float32
    parts = []
    for chunk in tiny.TOKENS.split([6, 1, 3], 1):
        parts.append(ours(chunk, kv_cache=cache))
        cache.advance(chunk.shape[1])
    tiny.assert_close(torch.cat(parts, 1), expected)
    wanted = theirs.generate(tiny.TOKENS, max_new_tokens=16, do_sample=False, pad_token_id=0, **NO_END)
    assert torch.equal(ours.generate(tiny.TOKENS, 16, temperature=0, repetition_penalty=1.0, **NO_END), wanted)


@torch.no_grad()
def test_a_model_of_sizes(saved: Callable[..., Path]) -> None:
    """Its tensors have the names and the shapes of those of Transformers' model."""
    stored = quiet(MetalGLM47Model.from_quantized, saved("dense"), device="cpu")
    theirs = load_quantized(saved("dense"), "cpu")
    ours = quiet(MetalGLM47Model, **SIZES).eval()
    assert ours.state_dict().keys() == stored.state_dict().keys() == theirs.state_dict().keys()
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(ours(tiny.TOKENS), stored(tiny.TOKENS))
    tiny.assert_close(ours(tiny.TOKENS), theirs(tiny.TOKENS).logits)
    assert ours.create_kv_cache().max_seq_len == ours.create_kv_cache(2, 10**6).max_seq_len == 4096
    assert ours.create_kv_cache(max_seq_len=5).max_seq_len == 5
    half = quiet(MetalGLM47Model, **SIZES, dtype=torch.bfloat16)
    half.load_state_dict(theirs.state_dict())
    tiny.assert_close(half(tiny.TOKENS), theirs(tiny.TOKENS).logits, 0.05)
    assert half.create_kv_cache().config.dtype == torch.bfloat16


@torch.no_grad()
def test_a_model_of_sizes_is_saved_and_loaded(saved: Callable[..., Path], tmp_path: Path) -> None:
    """Into another one of these sizes, whose layers are packed already; or of other bits, which change with them."""
    stored = quiet(MetalGLM47Model.from_quantized, saved("dense"), device="cpu")
    save_quantized(stored, tmp_path)
    with pytest.raises(ValueError, match="holds a model of the class MetalGLM47Model, which is none of Transformers"):
        quiet(MetalGLM47Model.from_quantized, tmp_path, device="cpu")
    for sizes in (SIZES, {**SIZES, "bits": 8}):
        loaded = load_quantized(tmp_path, "cpu", model=quiet(MetalGLM47Model, **sizes))
        assert torch.equal(loaded(tiny.TOKENS), stored(tiny.TOKENS))
    before = quiet(MetalGLM47Model, **{**SIZES, "hidden_size": 256})
    tensors = {name: tensor.clone() for name, tensor in before.state_dict().items()}
    with pytest.raises(ValueError, match=r"wrong tensors: .*q_a_proj\.weight_packed is uint32 \[16, 64\] and should"):
        load_quantized(tmp_path, "cpu", model=before)
    assert all(torch.equal(before.state_dict()[name], tensor) for name, tensor in tensors.items())


@torch.no_grad()
def test_padding(saved: Callable[..., Path]) -> None:
    model = quiet(MetalGLM47Model.from_quantized, saved("dense"), device="cpu")
    rows = torch.cat([torch.zeros(1, 3, dtype=torch.int64), tiny.TOKENS[:, :7]], 1)
    mask = torch.tensor([[0] * 3 + [1] * 7])
    alone = model(tiny.TOKENS[:, :7])
    tiny.assert_close(model(torch.cat([rows, tiny.TOKENS]), torch.cat([mask, torch.ones_like(mask)]))[:1, 3:], alone)


def test_text(saved: Callable[..., Path]) -> None:
    """By the function of this name, whose defaults these are."""
    model = quiet(MetalGLM47Model.from_quantized, saved("dense"), device="cpu")
    config = GenerationConfig(12, 0.9, 0.8, 20, 1.3, NO_END["eos_token_id"])
    state = torch.get_rng_state()
    torch.manual_seed(3)
    wanted = generate(model, tiny.TOKENS, config)
    torch.manual_seed(3)
    streamed: list[int] = []
    found = model.generate(tiny.TOKENS, 12, 0.9, 0.8, 20, 1.3, None, streamed.append)
    assert torch.equal(found, wanted) and wanted[0, 10:].tolist() == streamed
    torch.manual_seed(3)
    given = quiet(MetalGenerationConfig, 12, 0.9, 0.8, 20, 1.3, None)
    assert list(model.generate_stream(tiny.TOKENS, given)) == streamed
    torch.manual_seed(3)
    with_defaults = model.generate(tiny.TOKENS)
    torch.manual_seed(3)
    assert torch.equal(generate(model, tiny.TOKENS), with_defaults)
    torch.set_rng_state(state)
    with pytest.raises(TypeError, match="config is of type GenerationConfig; it must be a MetalGenerationConfig"):
        model.generate_stream(tiny.TOKENS, config)
    with pytest.raises(ValueError, match=r"\[generate\] top_p is 0; it must be"):
        model.generate(tiny.TOKENS, top_p=0)


def test_what_a_model_refuses(saved: Callable[..., Path], tmp_path: Path) -> None:
    load = MetalGLM47Model.from_quantized
    with pytest.raises(ValueError, match=r"^\[MetalGLM47Model.from_quantized\] bits is 8; the layers in .* have \[4\]"):
        quiet(load, saved("dense"), 8, device="cpu")
    with pytest.raises(ValueError, match=r"from_quantized\] bits is 3; supported are \[2, 4, 8\]"):
        quiet(load, saved("dense"), 3, device="cpu")
    with pytest.raises(FileNotFoundError, match="nowhere is no directory"):
        quiet(load, tmp_path / "nowhere", device="cpu")
    gpt2 = marlin_models.quantized("gpt2-untied")
    save_quantized(gpt2, tmp_path / "gpt2")
    with pytest.raises(TypeError, match="GPT2LMHeadModel has no decoder layers that are known here"):
        quiet(load, tmp_path / "gpt2", device="cpu")
    olmo = tiny.tiny_model(family="Olmo2", **marlin_models.IDS, pad_token_id=0)
    replace_linear_layers(olmo, group_size=64)
    save_quantized(olmo, tmp_path / "olmo")
    with pytest.raises(TypeError, match="module is of type Olmo2DecoderLayer; supported are classes of Transformers"):
        quiet(load, tmp_path / "olmo", device="cpu")
    partly = tiny.tiny_model(**marlin_models.IDS)
    replace_linear_layers(partly, group_size=64, skip_layers={"q_proj"})
    save_quantized(partly, tmp_path / "partly")
    with pytest.raises(ValueError, match=r"layers of a LlamaDecoderLayer are in floating point: self_attn\.q_proj"):
        quiet(load, tmp_path / "partly", device="cpu")
    with pytest.raises(ValueError, match=r"\[MetalGLM47Model\] num_layers is 0; it must be at least 1"):
        quiet(MetalGLM47Model, **{**SIZES, "num_layers": 0})
    model = quiet(MetalGLM47Model, **SIZES)
    with pytest.raises(ValueError, match=r"\[MetalGLM47Model\] input_ids has shape \[10\]; it must have 2 dimensions"):
        model(tiny.TOKENS[0])
    with pytest.raises(ValueError, match="max_seq_len is 0; it must be at least 1"):
        model.create_kv_cache(max_seq_len=0)


# --- A layer by itself ------------------------------------------------------------------------------------------------


def inputs_and_outputs(model: PreTrainedModel) -> Iterator[tuple[Tensor, Tensor]]:
    """Of each layer, for one text."""
    seen: list[tuple[Tensor, Tensor]] = []

    def record(_: nn.Module, given: tuple, options: dict, result: Any) -> None:
        states = given[0] if given else options["hidden_states"]
        seen.append((states, result[0] if isinstance(result, tuple) else result))

    handles = [layer.register_forward_hook(record, with_kwargs=True) for layer in model.model.layers]
    model(tiny.TOKENS)
    for handle in handles:
        handle.remove()
    return iter(seen)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "mixture"])
def test_a_layer_computes_what_transformers_does(name: str, saved: Callable[..., Path]) -> None:
    model = quiet(QuantizedModel.load, saved(name), device="cpu")
    positions = torch.arange(10)
    for index, (x, expected) in enumerate(inputs_and_outputs(load_quantized(saved(name), "cpu"))):
        layer = quiet(QuantizedLlamaLayer, model, index)
        assert isinstance(layer, MetalTransformerBlock) and not layer.training
        tiny.assert_close(layer(x), expected)
        tiny.assert_close(layer(x, None, positions + 7), expected, 1e-3)
        cache = MetalKVCache(MetalKVCacheConfig(1, max_seq_len=16, dtype=torch.float32, **layer.self_attn.cache_sizes))
        parts = []
        for chunk, places in zip(x.split([4, 1, 5], 1), positions[None].split([4, 1, 5], 1), strict=True):
            parts.append(layer(chunk, position_ids=places, kv_cache=cache))
            cache.advance(chunk.shape[1])
        tiny.assert_close(torch.cat(parts, 1), expected)


def test_a_layer_shares_what_is_packed(saved: Callable[..., Path]) -> None:
    model = quiet(QuantizedModel.load, saved("llama"), device="cpu")
    layer = quiet(QuantizedLlamaLayer, model, 1)
    assert layer.self_attn.q_proj.weight_packed is model.model.model.layers[1].self_attn.q_proj.weight_packed


def test_the_tensors_of_a_model(saved: Callable[..., Path]) -> None:
    """Each stored tensor is there; the packed ones stand for the values of the layer."""
    model = quiet(QuantizedModel.load, saved("llama"), device="cpu")
    assert model.config["model_type"] == "llama" and model.config["hidden_size"] == 128
    layers = marlin_models.layers_of(model.model)
    assert model.weights.keys() == {f"{path}.weight" for path in layers} and len(layers) == 14
    for path in layers:
        values = oracle.values_of(model.model.get_submodule(path))
        oracle.assert_identical(model.weights[f"{path}.weight"].dequantize(torch.float32), values.float())
    assert model.bf16_weights.keys() == {
        *("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"),
        *(f"model.layers.{i}.{name}_layernorm.weight" for i in range(2) for name in ("input", "post_attention")),
    }


def test_what_a_layer_refuses(saved: Callable[..., Path]) -> None:
    model = quiet(QuantizedModel.load, saved("llama"), device="cpu")
    with pytest.raises(IndexError, match=r"\[QuantizedLlamaLayer\] layer_idx is 2; the model has 2 layers"):
        quiet(QuantizedLlamaLayer, model, 2)
    with pytest.raises(ValueError, match="layer_idx is -1; it must be at least 0"):
        quiet(QuantizedLlamaLayer, model, -1)
    with pytest.raises(TypeError, match="quantized_model is of type LlamaForCausalLM; it must be a QuantizedModel"):
        quiet(QuantizedLlamaLayer, model.model, 0)
    layer = quiet(QuantizedLlamaLayer, model, 0)
    x = torch.zeros(1, 4, 128)
    cache = MetalKVCache(MetalKVCacheConfig(1, max_seq_len=16, dtype=torch.float32, **layer.self_attn.cache_sizes))
    for positions, kv_cache, message in (
        (torch.tensor([0, 1, 3, 4]), None, "of shape [4] are not 4 numbers that follow one another from any number on"),
        (torch.arange(5), None, "of shape [5] are not 4 numbers"),
        (torch.arange(4).view(4, 1), None, "of shape [4, 1] are not 4 numbers"),
        (torch.arange(2, 6), cache, "from 0, behind the cache on"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            layer(x, position_ids=positions, kv_cache=kv_cache)


# --- Warnings ---------------------------------------------------------------------------------------------------------


def test_warnings_name_what_to_use(saved: Callable[..., Path]) -> None:
    """Each use warns once, at the caller."""
    directory, transformers = saved("llama"), "use AutoModelForCausalLM with replace_linear_layers"
    model = quiet(QuantizedModel.load, directory, device="cpu")
    calls: dict[str, tuple[Callable[[], Any], str]] = {
        "MetalGLM47Model is": (lambda: MetalGLM47Model(**SIZES), transformers),
        "MetalGLM47Model.from_quantized is": (
            lambda: MetalGLM47Model.from_quantized(directory, device="cpu"),
            "use load_quantized",
        ),
        "MetalGenerationConfig is": (lambda: MetalGenerationConfig(), "use GenerationConfig"),
        "QuantizedModel.load is": (lambda: QuantizedModel.load(directory, device="cpu"), "use load_quantized"),
        "QuantizedLlamaLayer is": (lambda: QuantizedLlamaLayer(model, 0), transformers),
    }
    for name, (call, replacement) in calls.items():
        with pytest.warns(DeprecationWarning) as caught:
            call()
        found = [str(each.message) for each in caught if each.category is DeprecationWarning]
        assert found == [f"{name} deprecated; {replacement}"]
        assert [Path(each.filename).name for each in caught] == [Path(__file__).name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        QuantizedLlamaLayer(model, 0, warn_if_standalone=False)


# --- The documented replacements, with another import and model -------------------------------------------------------


def test_documented_replacement(tmp_path: Path) -> None:
    tiny.tiny_model().save_pretrained(tmp_path)
    model_id = str(tmp_path)

    model = AutoModelForCausalLM.from_pretrained(model_id)
    replace_linear_layers(model, bits=4, group_size=128)
    assert len(marlin_models.layers_of(model)) == 15


def test_other_formats_of_layers(tmp_path: Path) -> None:
    """Those of `MarlinLinear`, with zero points, which `bits` counts as 4."""
    model = tiny.tiny_model(family="Glm4MoeLite", **FAMILIES["mixture"][1])
    quiet(quantize_model, model, "int4", 64)
    save_quantized(model, tmp_path)
    ours = quiet(MetalGLM47Model.from_quantized, tmp_path, device="cpu")
    with torch.no_grad():
        tiny.assert_close(ours(tiny.TOKENS), load_quantized(tmp_path, "cpu")(tiny.TOKENS).logits)
