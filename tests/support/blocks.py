"""Layers of small decoders of Transformers, Marlin's blocks made of them, and twins with the values that these hold."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import oracle
import tiny
from quantization_mlx.marlin import MetalKVCache, MetalKVCacheConfig, MetalQuantizedLinear, MetalTransformerBlock
from quantization_mlx.marlin.experts import ColumnPackedSwitchLinear

HIDDEN, BATCH, GROUP_SIZE = 128, 2, 32
_EXPERTS = {"num_experts_per_tok": 3, "moe_intermediate_size": 64}
_LATENT = {"kv_lora_rank": 64, "q_lora_rank": 96, "qk_rope_head_dim": 16, "qk_nope_head_dim": 24, "v_head_dim": 32}
_LATENT |= {**_EXPERTS, "num_key_value_heads": 4, "n_routed_experts": 8}
# By the names that Transformers' classes begin with: options of the config. The second layer has experts.
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Mistral": {"sliding_window": 8},
    "Qwen2": {},
    "Qwen3": {"head_dim": 64},
    "SmolLM3": {"no_rope_layers": [1, 0], "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1},
    "Mixtral": {**_EXPERTS, "num_local_experts": 8},
    "Qwen3Moe": {**_EXPERTS, "num_experts": 8, "head_dim": 64, "norm_topk_prob": True},
    "DeepseekV3": {**_LATENT, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1},
    "Glm4MoeLite": {**_LATENT, "q_lora_rank": None},
}
MIXTURES = ("Mixtral", "Qwen3Moe", "DeepseekV3", "Glm4MoeLite")
LATENT = ("DeepseekV3", "Glm4MoeLite")


def decoder(family: str, **options: Any) -> PreTrainedModel:
    """A small model, whose code is the plainest that Transformers has."""
    model = tiny.tiny_model(family=family, attn_implementation="eager", **{**FAMILIES[family], **options})
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(torch.linspace(-0.5, 0.5, len(buffer)).roll(3))
    if family in MIXTURES:
        model.set_experts_implementation("eager")
    return model


def twin(ours: nn.Module, module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of `module` with the weights that the packed layers of `ours` hold, in this dtype."""
    made = copy.deepcopy(module).double()
    for path, layer in ours.named_modules():
        if isinstance(layer, MetalQuantizedLinear):
            made.get_submodule(path).weight = nn.Parameter(oracle.values_of(layer).T)
        elif isinstance(layer, ColumnPackedSwitchLinear):
            holder, _, name = path.rpartition(".")
            setattr(made.get_submodule(holder), name, nn.Parameter(oracle.values_of(layer).mT.contiguous()))
    return made.to(dtype)


def additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask that Transformers' eager attention adds."""
    return torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)


def causal(tokens: int, window: int | None = None) -> Tensor:
    """bool [1, 1, tokens, tokens]."""
    seen = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    return (seen if window is None else seen.triu(1 - window))[None, None]


def layer_output(
    model: PreTrainedModel, layer: nn.Module, x: Tensor, visible: Tensor | None = None, part: str = ""
) -> Tensor:
    """What a layer of the model, or its attention, gives for a text from its beginning."""
    positions = torch.arange(x.shape[1])[None]
    if visible is None:
        visible = causal(x.shape[1], getattr(model.config, "sliding_window", None))
    options = {"position_embeddings": model.model.rotary_emb(x, positions), "position_ids": positions}
    y = layer(hidden_states=x, attention_mask=additive(visible, x.dtype), **options)
    return y[0] if isinstance(y, tuple) else y


def new_cache(
    attention: nn.Module, dtype: torch.dtype = torch.float32, layers: int = 1, most: int = 64
) -> MetalKVCache:
    config = MetalKVCacheConfig(num_layers=layers, max_seq_len=most, dtype=dtype, **attention.cache_sizes)
    return MetalKVCache(config, BATCH)


@torch.no_grad()
def in_chunks(block: nn.Module, x: Tensor, chunks: Sequence[int], cache: Any, masks: Any = None) -> Tensor:
    """What a block gives for the tokens of x, so many at a time."""
    parts = []
    for new in x.split(list(chunks), 1):
        mask = None if masks is None else masks[..., : cache.seq_len + new.shape[1]]
        parts.append(block(new, mask, cache))
        cache.advance(new.shape[1])
    return torch.cat(parts, 1)


def randomized(module: nn.Module, seed: int = 0) -> nn.Module:
    """A module that was made from sizes, with random weights in its packed layers, norms and routers."""
    torch.manual_seed(seed)
    for layer in module.modules():
        if isinstance(layer, MetalQuantizedLinear | ColumnPackedSwitchLinear):
            layer.pack(torch.randn(layer.weight.shape) * layer.in_features**-0.5)
        elif isinstance(layer, nn.Linear | nn.Embedding):
            nn.init.normal_(layer.weight, std=0.5)
    return module


def assert_as_good(ours: Tensor, exact: Tensor, own: Tensor) -> None:
    """ours is within twice the error that `own`, of the same dtype, has against float64, and rounding."""
    assert ours.dtype == own.dtype
    error, largest = (own.double() - exact).abs().max(), exact.abs().max()
    oracle.assert_within(ours, exact, 2 * error + 4 * torch.finfo(own.dtype).eps * largest)


class Decoder(nn.Module):
    """Embedding, blocks, norm and output head, as `generate` takes a model."""

    def __init__(self, blocks: Sequence[MetalTransformerBlock], vocab_size: int = tiny.VOCABULARY) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.embed = nn.Embedding(vocab_size, blocks[0].hidden_size)
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(blocks[0].hidden_size, vocab_size, bias=False)
        self.norm = nn.RMSNorm(blocks[0].hidden_size, eps=1e-6)

    def forward(self, input_ids: Tensor, kv_cache: MetalKVCache | None = None) -> Tensor:
        x = self.embed(input_ids)
        for index, block in enumerate(self.blocks):
            x = block(x, kv_cache=kv_cache, layer_idx=index)
        return self.head(self.norm(x))

    def create_kv_cache(self, batch_size: int = 1) -> MetalKVCache:
        attention = self.blocks[0].self_attn
        most = attention.rotary.max_position_embeddings
        sizes = {"num_layers": len(self.blocks), "max_seq_len": most, "dtype": self.embed.weight.dtype}
        return MetalKVCache(MetalKVCacheConfig(**sizes, **attention.cache_sizes), batch_size)


@torch.no_grad()
def greedy(model: nn.Module, prompt: Tensor, tokens: int, cached: bool = True) -> list[int]:
    """The likeliest tokens, one after the other; without a cache, each time from the whole text."""
    text, cache = prompt, model.create_kv_cache() if cached else None
    new = prompt
    for _ in range(tokens):
        logits = model(new if cached else text, cache)
        if cached:
            cache.advance(new.shape[1])
        new = logits[:, -1:].argmax(-1)
        text = torch.cat((text, new), 1)
    return text[0, prompt.shape[1] :].tolist()
