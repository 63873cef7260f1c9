"""Names that metal_marlin has deprecated, or whose classes it has, on the layers of this package."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..messages import listed
from ..nn.packed_weight import Packed
from ..optional import PreTrainedModel
from .block import MetalTransformerBlock
from .cache import MetalKVCache, MetalKVCacheConfig
from .functions import check_size, check_tensor
from .generate import GenerationConfig, generate, generate_stream
from .latent_attention import MetalMLAAttention
from .layers import ColumnPackedModule, mode_of_bits
from .origins import norm_of
from .parts import RMSNorm, check_sizes
from .saved import load_quantized, usable_device

_TRANSFORMERS = "AutoModelForCausalLM with replace_linear_layers"


def _deprecate(name: str, replacement: str = _TRANSFORMERS) -> None:
    """Warns the caller of the caller."""
    warnings.warn(f"{name} is deprecated; use {replacement}", DeprecationWarning, stacklevel=3)


def _decoder_layers(op: str, model: Any) -> nn.ModuleList:
    """Of a model of Transformers. Raises TypeError if it has none where the known decoders have them."""
    layers = getattr(getattr(model, "model", None), "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise TypeError(f"[{op}] a {type(model).__name__} has no decoder layers that are known here")
    return layers


def _block_of(op: str, layer: nn.Module) -> MetalTransformerBlock:
    """With the packed layers of a decoder layer of Transformers. Raises TypeError if that is of no known kind, and
    ValueError if layers are in floating point, or groups differ in size."""
    modules = dict(layer.named_modules())
    floating = [path for path, each in modules.items() if type(each) is nn.Linear or "down_proj" in each._parameters]
    if floating:
        raise ValueError(f"[{op}] layers of a {type(layer).__name__} are in floating point: {listed(floating)}")
    group_sizes = {each.group_size for each in modules.values() if isinstance(each, ColumnPackedModule)}
    if len(group_sizes) != 1:
        raise ValueError(
            f"[{op}] groups of the layers of a {type(layer).__name__} have the sizes {sorted(group_sizes)}"
        )
    return MetalTransformerBlock.from_float(layer, group_size=group_sizes.pop())


def _blocks_of(op: str, layers: nn.ModuleList) -> Iterator[MetalTransformerBlock]:
    for index, layer in enumerate(layers):
        yield _block_of(op, layer)
        layers[index] = nn.Identity()  # what was copied need not be in memory twice


# A whole model


@dataclass
class MetalGenerationConfig:
    """Deprecated: `GenerationConfig`. The numbers of `MetalGLM47Model.generate_stream`, as those of its `generate`."""

    max_tokens: int = 256
    temperature: float = 0.7
    top_p: float = 0.9
    top_k: int = 50
    repetition_penalty: float = 1.1
    eos_token_id: int = 2

    def __post_init__(self) -> None:
        warnings.warn("MetalGenerationConfig is deprecated; use GenerationConfig", DeprecationWarning, stacklevel=3)

    @property
    def of_generate(self) -> GenerationConfig:
        """The same for `generate`."""
        return _config(**vars(self))


def _config(max_tokens: int, **numbers: Any) -> GenerationConfig:
    return GenerationConfig(max_new_tokens=max_tokens, **numbers)


class MetalGLM47Model(nn.Module):
    """Deprecated: a decoder of `MetalTransformerBlock`s with latent attention, between an embedding and a head in
    floating point; its tensors have the names of Transformers' models.

    Args:
        vocab_size, num_layers: how many tokens and layers there are.
        hidden_size, num_heads, intermediate_size, rms_norm_eps: as in `MetalTransformerBlock`.
        kv_lora_rank, q_lora_rank, qk_rope_head_dim, max_position_embeddings, rope_theta, rope_ratio: as in
            `MetalMLAAttention`.
        bits, group_size: as in `MetalQuantizedLinear`.
        device, dtype: where the parameters live, and the dtype of those in floating point.

    Raises:
        TypeError: a size is no whole number.
        ValueError: sizes do not fit, or bits or group_size is not supported.
    """

    def __init__(
        self,
        vocab_size: int = 151552,
        hidden_size: int = 4096,
        num_layers: int = 32,
        num_heads: int = 32,
        intermediate_size: int = 11008,
        kv_lora_rank: int = 512,
        q_lora_rank: int | None = 1536,
        qk_rope_head_dim: int = 64,
        max_position_embeddings: int = 4096,
        rms_norm_eps: float = 1e-6,
        rope_theta: float = 10000.0,
        rope_ratio: float = 1.0,
        bits: int = 4,
        group_size: int = 128,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _deprecate("MetalGLM47Model")
        super().__init__()
        check_sizes("MetalGLM47Model", vocab_size=vocab_size, num_layers=num_layers)
        place = {"device": device, "dtype": dtype}
        packed = {"bits": bits, "group_size": group_size}

        def block() -> MetalTransformerBlock:
            attention = MetalMLAAttention(
                *(hidden_size, num_heads, kv_lora_rank, q_lora_rank, qk_rope_head_dim, None),
                *(rope_theta, rope_ratio, max_position_embeddings),
                rms_norm_eps=rms_norm_eps,
                **packed,
                **place,
            )
            sizes = hidden_size, num_heads, intermediate_size
            return MetalTransformerBlock(*sizes, rms_norm_eps=rms_norm_eps, self_attn=attention, **packed, **place)

        self._assemble(
            nn.Embedding(vocab_size, hidden_size, **place),
            [block() for _ in range(num_layers)],
            RMSNorm(hidden_size, rms_norm_eps, **place),
            nn.Linear(hidden_size, vocab_size, bias=False, **place),
            max_position_embeddings,
        )

    @classmethod
    def from_quantized(
        cls, model_path: str | os.PathLike[str], bits: int = 4, *, device: torch.device | str | None = None
    ) -> MetalGLM47Model:
        """Reads a model of Transformers with GLM-4.7-Flash's decoder, its mixtures of experts included, or with another
        one that `MetalTransformerBlock.from_float` knows, from a directory that `save_quantized` wrote.

        Args:
            model_path: the directory.
            bits: those of its layers: 4, 8 or 2.
            device: "mps" or "cpu"; None is the GPU of a Mac, and the CPU where there is none.

        Raises:
            FileNotFoundError, ImportError: as `load_quantized`.
            TypeError: its decoder is of another kind.
            ValueError: as `load_quantized`; or its layers have other bits.
        """
        _deprecate("MetalGLM47Model.from_quantized", "load_quantized")
        op = f"{cls.__name__}.from_quantized"
        mode_of_bits(op, bits, 128)
        loaded = load_quantized(model_path, usable_device(device, op))
        found = {module.bits for module in loaded.modules() if isinstance(module, ColumnPackedModule)}
        if found != {bits}:
            raise ValueError(f"[{op}] bits is {bits}; the layers in {model_path} have {sorted(found)}")
        layers = _decoder_layers(op, loaded)
        made = cls.__new__(cls)  # __init__ would warn again, and make weights
        nn.Module.__init__(made)
        blocks = list(_blocks_of(op, layers))
        norm, positions = norm_of(op, loaded.model.norm), loaded.config.max_position_embeddings
        made._assemble(loaded.model.embed_tokens, blocks, norm, loaded.lm_head, positions)
        return made.eval()

    def _assemble(
        self, embedding: nn.Module, layers: list[nn.Module], norm: nn.Module, head: nn.Module, positions: int
    ) -> None:
        self.model = nn.Module()
        self.model.embed_tokens = embedding
        self.model.layers = nn.ModuleList(layers)
        self.model.norm = norm
        self.lm_head = head
        self.vocab_size = head.out_features
        self.max_position_embeddings = positions

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, kv_cache: MetalKVCache | None = None
    ) -> Tensor:
        """Logits [B, S, vocab_size] of tokens [B, S]; the other arguments, and what is raised, as in
        `MetalAttention.forward`. Whoever calls this advances the cache."""
        check_tensor("MetalGLM47Model", "input_ids", input_ids, 2)
        x = self.model.embed_tokens(input_ids)
        for index, layer in enumerate(self.model.layers):
            x = layer(x, attention_mask, kv_cache, index)
        return self.lm_head(self.model.norm(x))

    def create_kv_cache(self, batch_size: int = 1, max_seq_len: int | None = None) -> MetalKVCache:
        """An empty cache for so many texts, in the dtype of the model, with room for max_position_embeddings, or for
        max_seq_len if that is less."""
        attention, like = self.model.layers[0].self_attn, self.model.norm.weight
        most = self.max_position_embeddings if max_seq_len is None else max_seq_len
        check_size("MetalGLM47Model.create_kv_cache", "max_seq_len", most, 1)
        most = min(most, self.max_position_embeddings)
        places = {"max_seq_len": most, "dtype": like.dtype, "device": like.device}
        return MetalKVCache(MetalKVCacheConfig(len(self.model.layers), **attention.cache_sizes, **places), batch_size)

    def generate(
        self,
        input_ids: Tensor,
        max_tokens: int = 256,
        temperature: float = 0.7,
        top_p: float = 0.9,
        top_k: int = 50,
        repetition_penalty: float = 1.1,
        eos_token_id: int | Sequence[int] | None = 2,
        streamer: Callable[[int], None] | None = None,
    ) -> Tensor:
        """As the function `generate`, by these numbers."""
        rules = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "repetition_penalty": repetition_penalty}
        return generate(self, input_ids, _config(max_tokens, eos_token_id=eos_token_id, **rules), streamer=streamer)

    def generate_stream(self, input_ids: Tensor, config: MetalGenerationConfig) -> Iterator[int]:
        """As the function `generate_stream`."""
        if not isinstance(config, MetalGenerationConfig):
            raise TypeError(
                f"[MetalGLM47Model.generate_stream] config is of type {type(config).__name__}; it must be a "
                "MetalGenerationConfig"
            )
        return generate_stream(self, input_ids, config.of_generate)


# A layer by itself


class QuantizedModel:
    """Deprecated: what `save_quantized` wrote of a model of Transformers, by the names of its tensors.

    config: the content of config.json.
    weights: the packed tensors of each quantized layer, with their format, under the name that its weight would have.
    bf16_weights: all other tensors, of the dtypes that they are stored in.
    model: the model.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.config: dict[str, Any] = model.config.to_dict()
        modules = dict(model.named_modules())
        layers = {path: module for path, module in modules.items() if isinstance(module, ColumnPackedModule)}
        self.weights: dict[str, Packed] = {f"{path}.weight": layer.packed() for path, layer in layers.items()}
        packed = {f"{path}.{name}" for path in layers for name in ColumnPackedModule.packed_names}
        tensors = model.state_dict()
        self.bf16_weights: dict[str, Tensor] = {name: tensors[name] for name in tensors if name not in packed}

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, device: torch.device | str | None = None) -> QuantizedModel:
        """Reads a directory that `save_quantized` wrote of a model of Transformers.

        Args:
            path, device: as in `MetalGLM47Model.from_quantized`.

        Raises:
            FileNotFoundError, ImportError, ValueError: as `load_quantized`.
        """
        _deprecate("QuantizedModel.load", "load_quantized")
        return cls(load_quantized(path, usable_device(device, "QuantizedModel.load")))


class QuantizedLlamaLayer(MetalTransformerBlock):
    """Deprecated: `MetalTransformerBlock` of a layer of a `QuantizedModel`, whose packed layers it shares.

    Args:
        quantized_model: of a family that `MetalTransformerBlock.from_float` knows.
        layer_idx: which of its layers.
        warn_if_standalone: whether a warning says that this is deprecated.

    Raises:
        IndexError: there is no such layer.
        TypeError: it is no QuantizedModel, or of another family.
    """

    def __init__(self, quantized_model: QuantizedModel, layer_idx: int, warn_if_standalone: bool = True) -> None:
        if warn_if_standalone:
            _deprecate("QuantizedLlamaLayer")
        op = "QuantizedLlamaLayer"
        if not isinstance(quantized_model, QuantizedModel):
            raise TypeError(
                f"[{op}] quantized_model is of type {type(quantized_model).__name__}; it must be a QuantizedModel"
            )
        layers = _decoder_layers(op, quantized_model.model)
        check_size(op, "layer_idx", layer_idx)
        if layer_idx >= len(layers):
            raise IndexError(f"[{op}] layer_idx is {layer_idx}; the model has {len(layers)} layers")
        nn.Module.__init__(self)
        block = _block_of(op, layers[layer_idx])
        self.hidden_size = block.hidden_size
        for name, part in block.named_children():
            self.add_module(name, part)
        self.train(block.training)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        kv_cache: MetalKVCache | None = None,
        layer_idx: int = 0,
    ) -> Tensor:
        """As `MetalTransformerBlock.forward`.

        position_ids: those that follow the cache, or without one any that follow one another, which then give the same:
            [S] or [B or 1, S]. The host reads them.

        Raises:
            ValueError: position_ids are others; and as `MetalTransformerBlock.forward`.
        """
        if position_ids is not None:
            check_tensor("QuantizedLlamaLayer", "position_ids", position_ids)
            _check_positions(position_ids, hidden_states, kv_cache)
        return super().forward(hidden_states, attention_mask, kv_cache, layer_idx)


def _check_positions(position_ids: Tensor, hidden_states: Tensor, kv_cache: MetalKVCache | None) -> None:
    tokens = hidden_states.shape[1]
    fits = position_ids.shape in ((tokens,), (1, tokens), hidden_states.shape[:2])
    if fits and tokens:
        first = position_ids.flatten()[0] if kv_cache is None else kv_cache.seq_len
        fits = bool((position_ids - first == torch.arange(tokens, device=position_ids.device)).all())
    if not fits:
        start = "any number" if kv_cache is None else f"{kv_cache.seq_len}, behind the cache"
        raise ValueError(
            f"[QuantizedLlamaLayer] position_ids of shape {list(position_ids.shape)} are not {tokens} numbers that "
            f"follow one another from {start} on"
        )
