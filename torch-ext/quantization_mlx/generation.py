"""Faster generation on the CPU with Transformers models, without compiling anything.

A step of generation spends more time between the products than in them: Transformers computes norms, rotary embeddings
and gates in many small torch ops, and its cache copies all keys and values for every token. `prepare_for_generation`
gives the decoder layers of a model a `forward` with one op for each of these, one product where several have the same
input, and room in the cache. Whatever that `forward` does not cover is left to the layer's own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ._ops import ops
from .modules import QuantizedLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# The decoder layers whose forward is known to be norm, attention, sum, norm, gated MLP, sum.
_KNOWN_LAYERS = {
    f"transformers.models.{model}.modeling_{model}": f"{name}DecoderLayer"
    for model, name in {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}.items()
}
_HEAD_MULTIPLE = 32  # of a head's size, in the op for attention
_ROW_MULTIPLE = 16  # of a row's size, in the others
_SPARE_POSITIONS = 256  # in a cache that has to grow

# The overloads themselves: the shortest way from Python into the dispatcher.
_add_rms_norm = ops._add_rms_norm.default
_decode_attention = ops._decode_attention.default
_rms_norm = ops._rms_norm.default
_silu_mul = ops._silu_mul.default


def prepare_for_generation(model: PreTrainedModel) -> PreTrainedModel:
    """Makes `model.generate`, and any forward pass without gradients, faster on the CPU; returns the model.

    Changes the decoder layers in place, those of Llama, Mistral, Qwen2 and Qwen3 models, dense or quantized; quantize
    before. Projections of one input are joined, with their parameters as views of the joint tensors, under the same
    names and with the same values; everything that reads or writes the model, `save_checkpoint` too, goes on working.
    Takes milliseconds; a second call changes nothing.

    Results are those of the unprepared model up to rounding: sums are float32, and there are fewer roundings between.
    Steps of one token with a cache that keeps all positions and no padding are fastest. Elsewhere (prompts, padded
    batches, sliding windows, a static cache) attention is the layer's own; with gradients, on other devices and under
    `torch.compile` the whole layer is. Hooks on modules inside of a layer run only where that module is called.

    Raises:
        ValueError: the model has no decoder layer of a known kind.
    """
    layers = [module for module in model.modules() if _is_known(module)]
    if not layers and not any(isinstance(module, _FastLayer) for module in model.modules()):
        kinds = ", ".join(name.removesuffix("DecoderLayer") for name in _KNOWN_LAYERS.values())
        raise ValueError(
            f"[prepare_for_generation] {type(model).__name__} has no decoder layer of a known kind; known are the "
            f"layers of {kinds} models with SiLU and sizes that are multiples of {_ROW_MULTIPLE}"
        )
    for layer in layers:
        layer.__class__ = _fast_class(type(layer))
        layer.join_projections()
        layer.register_load_state_dict_post_hook(_rejoin)
    return model


def _rejoin(layer: nn.Module, _: Any) -> None:
    """After loading tensors, which may have taken the place of the parameters."""
    layer.join_projections()


def _is_known(module: nn.Module) -> bool:
    kind = type(module)
    return (
        _KNOWN_LAYERS.get(kind.__module__) == kind.__name__
        and type(module.mlp.act_fn).__name__ in ("SiLU", "SiLUActivation")
        and module.self_attn.head_dim % _HEAD_MULTIPLE == 0
        and all(size % _ROW_MULTIPLE == 0 for size in (module.hidden_size, module.mlp.intermediate_size))
    )


# Products of one input


def _joined(layers: list[nn.Module]) -> Callable[[Tensor], Tensor]:
    """A function of x that gives the outputs of these linear layers side by side.

    Neighbours of one format become one product: their parameters become views of joint ones.
    """
    products = [_join(list(group)) for _, group in groupby(layers, _joint_key)]
    if len(products) == 1:
        return products[0]
    return lambda x: torch.cat([product(x) for product in products], -1)


def _joint_key(layer: nn.Module) -> tuple:
    """What neighbours that can be joined have in common; a layer of an unknown kind has it with none."""
    if type(layer) not in (nn.Linear, QuantizedLinear):
        return (id(layer),)
    parameters = tuple((name, each.dtype, each.device, each.requires_grad) for name, each in layer.named_parameters())
    format = (layer.group_size, layer.bits, layer.mode) if type(layer) is QuantizedLinear else ()
    return (type(layer), layer.in_features, format, parameters)


def _join(layers: list[nn.Module]) -> Callable[[Tensor], Tensor]:
    first = layers[0]
    if len(layers) == 1:
        return first
    joint: dict[str, Tensor | None] = {"bias": None, "biases": None}
    for name, parameter in list(first.named_parameters()):
        joint[name] = torch.cat([layer.get_parameter(name).detach() for layer in layers])
        parts = joint[name].split([len(layer.get_parameter(name)) for layer in layers])
        for layer, part in zip(layers, parts, strict=True):
            setattr(layer, name, nn.Parameter(part, requires_grad=parameter.requires_grad))
    if type(first) is nn.Linear:
        return partial(F.linear, weight=joint["weight"], bias=joint["bias"])
    product = first.product_with(joint["weight"], joint["scales"], joint["biases"])
    bias = joint["bias"]
    return product if bias is None else lambda x: product(x) + bias


# Layers


class _FastLayer:
    """What a decoder layer's class has in front of its own `forward`."""

    def join_projections(self) -> None:
        attention, mlp = self.self_attn, self.mlp
        self._project_in = _joined([attention.q_proj, attention.k_proj, attention.v_proj])
        self._gate_and_up = _joined([mlp.gate_proj, mlp.up_proj])

    def _apply(self, *arguments: Any, **options: Any) -> nn.Module:
        """A change of device or dtype, which gives every parameter memory of its own."""
        super()._apply(*arguments, **options)
        self.join_projections()
        return self

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **options: Any,
    ) -> Tensor:
        first_norm, second_norm = self.input_layernorm, self.post_attention_layernorm
        if (
            torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or hidden_states.device.type != "cpu"
            or hidden_states.dtype != first_norm.weight.dtype
        ):
            return super().forward(
                hidden_states,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                position_embeddings=position_embeddings,
                **options,
            )
        x = _rms_norm(hidden_states, first_norm.weight, first_norm.variance_epsilon)
        room = _room(self.self_attn, past_key_values, hidden_states, attention_mask)
        if room is None:
            x, _ = self.self_attn(
                hidden_states=x,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                position_embeddings=position_embeddings,
                **options,
            )
        else:
            x = self._attend(x, position_embeddings, room)
        hidden_states, x = _add_rms_norm(x, hidden_states, second_norm.weight, second_norm.variance_epsilon)
        return hidden_states + self.mlp.down_proj(_silu_mul(self._gate_and_up(x)))

    def _attend(self, x: Tensor, position_embeddings: tuple[Tensor, Tensor], room: _Room) -> Tensor:
        """Attention of one new token for each sequence, x [batch, 1, hidden_size], whose keys and values enter room."""
        attention = self.self_attn
        query_norm, key_norm, epsilon = self._head_norms
        y = _decode_attention(
            self._project_in(x),
            *position_embeddings,
            room.keys,
            room.values,
            room.length,
            attention.scaling,
            query_norm,
            key_norm,
            epsilon,
        )
        room.lengthen()
        return attention.o_proj(y)

    @property
    def _head_norms(self) -> tuple[Tensor | None, Tensor | None, float]:
        query_norm = getattr(self.self_attn, "q_norm", None)
        if query_norm is None:
            return None, None, 0.0
        return query_norm.weight, self.self_attn.k_norm.weight, query_norm.variance_epsilon


_fast_classes: dict[type, type] = {}


def _fast_class(kind: type) -> type:
    if kind not in _fast_classes:
        _fast_classes[kind] = type(f"Fast{kind.__name__}", (_FastLayer, kind), {})
    return _fast_classes[kind]


# Caches


class _Room:
    """Memory for more positions behind the keys and values of one cache layer [batch, heads, length, head_dim].

    The layer's `keys` and `values` are views of it, of the positions that are taken. Whatever else changes the layer
    puts other tensors there, by which this is known to be out of date.
    """

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self.length: int = layer.keys.shape[-2]
        capacity = self.length + max(_SPARE_POSITIONS, self.length // 2)
        self.keys, self.values = (
            old.new_empty(*old.shape[:-2], capacity, old.shape[-1]) for old in (layer.keys, layer.values)
        )
        for new, old in ((self.keys, layer.keys), (self.values, layer.values)):
            new[:, :, : self.length] = old
        self._show()

    def _show(self) -> None:
        self.shown = self.layer.keys = self.keys.narrow(2, 0, self.length)
        self.layer.values = self.values.narrow(2, 0, self.length)

    def has_place(self) -> bool:
        return self.shown is self.layer.keys and self.length < self.keys.shape[2]

    def lengthen(self) -> None:
        """Makes the position behind the last one a part of the cache."""
        self.length += 1
        self._show()


def _room(attention: nn.Module, cache: Any, x: Tensor, mask: Tensor | None) -> _Room | None:
    """Where the keys and values of one more token go, None if attention is not of one token to all before it."""
    if x.shape[1] != 1 or mask is not None or cache is None or attention._forward_hooks:
        return None
    if attention.training and attention.attention_dropout > 0:
        return None
    layers = getattr(cache, "layers", ())
    if attention.layer_idx >= len(layers):
        return None
    layer = layers[attention.layer_idx]
    if (
        type(layer).__name__ != "DynamicLayer"
        or not layer.is_initialized
        or layer.keys.shape[0] != x.shape[0]
        or layer.keys.dtype != x.dtype
    ):
        return None
    room = layer.__dict__.get("_room")
    if room is None or not room.has_place():
        room = layer._room = _Room(layer)
    return room
