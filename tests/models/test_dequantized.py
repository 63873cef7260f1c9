"""Quantized models made floating-point again, beside the values that their packed weights stand for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import oracle
from quantization_mlx import QuantizedLinear, dequantize_model, load_checkpoint, quantize_model, save_checkpoint
from quantization_mlx.nn.module import QuantizedModule
from tiny import causal_lm

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 96}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
MODELS = {
    "llama": ("Llama", {}),
    "tied": ("Llama", {"tie_word_embeddings": True}),
    "gemma3": ("Gemma3", {}),
    "qwen3_moe": ("Qwen3Moe", EXPERTS),
    "gpt_oss": ("GptOss", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8}),
}
FORMATS = [("affine", 64, 4), ("mxfp4", 32, 4), ("mxfp8", 32, 8), ("nvfp4", 16, 4)]


def values_of(layer: QuantizedModule, dtype: torch.dtype) -> torch.Tensor:
    return oracle.values_of(layer).to(dtype)


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_comes_back_with_the_classes_it_had(kind: str, tmp_path: Path) -> None:
    """Modules, names and shapes are those of the model that was quantized; results are those of its packed weights,
    up to the rounding of sums. So they are after a checkpoint, quantized or not, was saved and loaded."""
    family, options = MODELS[kind]
    model = causal_lm(family, **SIZES, **HEADS, **options)
    tokens = torch.randint(0, 96, (2, 12))
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    tied = kind == "tied" or model.config.tie_word_embeddings
    quantize_model(model, group_size=32)
    save_checkpoint(model, tmp_path / "quantized")
    with torch.no_grad():
        expected = model(tokens).logits
    for candidate in (model, load_checkpoint(tmp_path / "quantized")):
        assert dequantize_model(candidate) is candidate
        assert {name: tensor.shape for name, tensor in candidate.state_dict().items()} == shapes
        assert not any(isinstance(module, QuantizedModule) for module in candidate.modules())
        assert (candidate.get_input_embeddings().weight is candidate.get_output_embeddings().weight) == tied
        with torch.no_grad():
            torch.testing.assert_close(candidate(tokens).logits, expected, rtol=0, atol=1e-2 * expected.abs().max())
        save_checkpoint(candidate, tmp_path / "dense")
        with torch.no_grad():
            again = load_checkpoint(tmp_path / "dense")(tokens).logits
            torch.testing.assert_close(again, candidate(tokens).logits, rtol=0, atol=1e-4 * expected.abs().max())
        assert quantize_model(candidate, group_size=32).get_input_embeddings().group_size == 32


@pytest.mark.parametrize("dtype", [None, torch.float32])
@pytest.mark.parametrize(("mode", "group_size", "bits"), FORMATS, ids=[mode for mode, *_ in FORMATS])
def test_values_are_those_of_the_format(mode: str, group_size: int, bits: int, dtype: torch.dtype | None) -> None:
    model = nn.Sequential(nn.Embedding(8, 64), nn.Linear(64, 8), nn.Linear(8, 128, False)).to(torch.bfloat16)
    model.append(nn.Linear(128, 4, False, dtype=torch.bfloat16))
    quantize_model(model, group_size, bits, mode)
    quantized = {path: layer for path, layer in model.named_modules() if isinstance(layer, QuantizedModule)}
    dequantize_model(model, dtype)
    assert list(quantized) == ["0", "1", "3"]
    for path, layer in quantized.items():
        oracle.assert_identical(model.get_submodule(path).weight, values_of(layer, dtype or torch.bfloat16), path)
    oracle.assert_identical(model[1].bias, quantized["1"].bias)


def test_a_layer_by_itself_is_returned() -> None:
    layer = QuantizedLinear.from_linear(nn.Linear(64, 8, dtype=torch.bfloat16))
    dense = dequantize_model(layer)
    assert type(dense) is nn.Linear and isinstance(layer, QuantizedLinear)
    oracle.assert_identical(dense.weight, values_of(layer, torch.bfloat16))
