"""Small models with Marlin's layers, and what a pipeline is asked."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerFast

import tiny
from quantization_mlx import marlin
from quantization_mlx.marlin import ColumnPackedLinear, quantize_model, replace_linear_layers
from tiny import VOCABULARY

IDS = {"bos_token_id": 0, "eos_token_id": 1}
# Each way to quantize, as a call.
QUANTIZED: dict[str, Callable[..., Any]] = {
    **{
        f"bits-{bits}": lambda model, bits=bits, **options: replace_linear_layers(model, bits, **options)
        for bits in (2, 4, 8)
    },
    **{
        kind: lambda model, kind=kind, **options: quantize_model(model, kind, **{"skip_layers": (), **options})
        for kind in ("fp4", "int4", "int4_sym")
    },
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-tied": {"tie_word_embeddings": True},
    "qwen2": {"family": "qwen2"},
    "qwen2-tied": {"family": "qwen2", "tie_word_embeddings": True},
    "gpt2-untied": {"family": "gpt2"},  # whose layers are Conv1D, but for the head
}
PROMPT = "w5 w17 w3 w90"
PROMPTS = [PROMPT, "w44", "w8 w8 w71 w2 w60 w33 w7"]
MESSAGES = [
    {"role": "user", "content": "w9 w12"},
    {"role": "assistant", "content": "w4"},
    {"role": "user", "content": "w6"},
]
TEMPLATE = "{% for m in messages %}w2 {{ m.content }} {% endfor %}{% if add_generation_prompt %}w3 {% endif %}"
NEW_TOKENS = 12


def tiny_model(family: str = "llama", **options: Any) -> PreTrainedModel:
    if family != "gpt2":
        return tiny.tiny_model(family={"llama": "Llama", "qwen2": "Qwen2"}[family], **IDS, **options)
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "n_embd": 128, "n_layer": 1, "n_head": 4, "n_positions": 32}
    more = {"initializer_range": 0.1, "tie_word_embeddings": False, **options}
    return tiny.distinct(GPT2LMHeadModel(GPT2Config(**sizes, **IDS, **more)).eval())


def quantized(model: str = "llama", way: str = "bits-4", **options: Any) -> PreTrainedModel:
    made = tiny_model(**MODELS[model])
    with warnings.catch_warnings():  # that a tied head is left alone
        warnings.simplefilter("ignore")
        QUANTIZED[way](made, **options)
    return made


def reloaded(model: PreTrainedModel, directory: Path, **options: Any) -> PreTrainedModel:
    """The model that was saved and loaded; it computes the same, bit for bit."""
    marlin.save_quantized(model, directory, **options)
    loaded = marlin.load_quantized(directory, "cpu")
    assert torch.equal(tiny.logits(loaded), tiny.logits(model))
    return loaded


def layers_of(model: nn.Module, kind: type = ColumnPackedLinear) -> set[str]:
    kinds = (marlin.MarlinLinear, marlin.MetalQuantizedLinear) if kind is ColumnPackedLinear else (kind,)
    return {path for path, module in model.named_modules(remove_duplicate=False) if type(module) in kinds}


def greedy(pipeline: marlin.TransformersMarlinPipeline, prompt: Any, **options: Any) -> Any:
    return pipeline(prompt, max_tokens=NEW_TOKENS, temperature=0, **options)


def chat_tokenizer() -> PreTrainedTokenizerFast:
    """With nothing to fill rows up with, and no token that ends a text."""
    return tiny.word_tokenizer(None, chat_template=TEMPLATE)
