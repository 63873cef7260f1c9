"""Faster generation with Transformers models, without compiling anything.

Between its products a model is many small torch ops, and Transformers' cache copies all keys and values for every
token. `prepare_for_generation` gives a model's stack of decoder layers a `forward` with one op for all of them, whether
a prompt comes or a token. What that op does not cover is left to the model's own.
"""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache as memoized
from itertools import chain, groupby
from operator import getitem, is_
from typing import Any

import torch
from torch import Tensor, nn

from .._ops import ops
from ..families import EVERY_FAMILY, Family
from ..nn.linear import QuantizedLinear
from ..nn.module import PackedModule
from ..nn.obstacles import HOOKS
from ..nn.switch import QuantizedSwitchLinear
from ..optional import PreTrainedModel
from . import compat
from .growing_cache import GrowingLayer, growing_layer

# The names and the families of the models whose decoder layers are known, by the module of their classes.
_KNOWN_MODELS = {
    f"transformers.models.{model_type}.modeling_{model_type}": (name, family)
    for family in EVERY_FAMILY
    for model_type, name in family.decoders.items()
}
_ATTENTION = ("eager", "sdpa")  # the implementations that the op stands for
_HEAD_MULTIPLE = 8  # of head sizes, in the attention op
_MOST_DIM, _MOST_VALUE_DIM = 576, 512  # of these, for keys and for values
_MOST_EXPERTS, _MOST_SELECTED = 512, 32  # of moe_router
# Keyword arguments that request further outputs; False is the same as None.
_REQUESTS = ("output_attentions", "output_hidden_states", "output_router_logits")
_ACTIVATIONS = {"SiLU": "silu", "SiLUActivation": "silu", "GELUTanh": "gelu_tanh"}
# The names of a layer's parts: those before attention and the MLP, of queries, keys and values, of gates with their
# values, and the activation, of which each layer has one choice. Experts have those of an MLP.
_ATTENTION_INPUTS = (
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("q_proj", "kv_a_proj_with_mqa"),
    ("qkv_proj",),
    ("q_proj", "k_proj", "v_proj"),
)
_MLP_INPUTS = (("gate_up_proj",), ("gate_proj", "up_proj"))
# What the op takes of `moe_router` and of `swiglu`, in its order, where a family has nothing else to say.
_ROUTING = {"k": 1, "scoring": "softmax", "bias": None, "groups": 1, "groups_used": 1, "normalise": False, "scale": 1.0}
_GATE = {"alpha": 1.0, "limit": None, "offset": 0.0}

_LINEAR = (nn.Linear, QuantizedLinear, QuantizedSwitchLinear)

_classes = getattr(torch.classes, ops.name)
_decoder_step = ops.decoder_step.default  # the overload: the fastest way from Python into the dispatcher


def prepare_for_generation(model: PreTrainedModel) -> PreTrainedModel:
    """Makes `model.generate`, and any forward pass without gradients, faster on the CPU and on Apple GPUs; returns the
    model.

    Changes the decoder in place, dense or quantized, of the families that README lists; quantize before. Projections of
    one input are joined, with their parameters as views of the joint tensors, under the same names and with the same
    values; everything that reads or writes the model, `save_checkpoint` too, goes on working. Takes milliseconds; a
    second call changes nothing.

    Results are those of the unprepared model up to rounding: sums are float32, and there are fewer roundings between.
    Prompts, single tokens and several at once, padded batches and sliding windows take one op for all layers. With
    gradients, under `torch.autocast` and `torch.compile`, with a cache that does not keep all positions, and where
    anything in a layer has hooks or a forward of its own, everything is the model's own.

    `forward` of the prepared model raises TypeError for keyword arguments that Transformers does not document.

    Raises:
        ImportError: transformers is older than the tested versions, or lacks a name that is needed.
        TypeError: `forward` has other parameters in this version of Transformers than in the known ones.
        ValueError: the model has no decoder layer of a known kind.
    """
    compat.check("prepare_for_generation")
    stacks = [module for module in model.modules() if _is_known_stack(module)]
    if not stacks and not any(isinstance(module, _FastStack) for module in model.modules()):
        raise ValueError(
            f"[prepare_for_generation] {type(model).__name__} has no decoder layer of a known kind; known are those of "
            f"{', '.join(name for name, _ in _KNOWN_MODELS.values())} models with heads whose size is a multiple of "
            f"{_HEAD_MULTIPLE}"
        )
    for stack in stacks:
        for layer in stack.layers:
            layer.__class__ = _mixed(_JoinedLayer, type(layer))
            layer.join_projections()
            layer.register_load_state_dict_post_hook(_rejoin)
        stack.__class__ = _mixed(_FastStack, type(stack))
    return model


def _rejoin(layer: nn.Module, _: Any) -> None:
    """After loading tensors, which may have taken the place of the parameters."""
    layer.join_projections()


def _is_kind(module: nn.Module, *suffixes: str) -> bool:
    """Whether `module` is, for example, a LlamaModel for the suffix "Model", and not a prepared one."""
    kind = type(module)
    name, _ = _KNOWN_MODELS.get(kind.__module__, ("", None))
    return bool(name) and not issubclass(kind, _Prepared) and kind.__name__.removeprefix(name) in suffixes


def _family(module: nn.Module) -> Family:
    return _KNOWN_MODELS[type(module).__module__][1]


def _is_known_layer(module: nn.Module) -> bool:
    return (
        _is_kind(module, "DecoderLayer")
        and compat.is_known_part(module, "layer")
        and all(hasattr(module, name) for name in _family(module).decoder_norms.values())
        and _is_known_attention(module.self_attn)
        and (_is_known_mixture(module.mlp) if hasattr(module.mlp, "experts") else _is_known_mlp(module.mlp))
    )


def _is_known_attention(module: nn.Module) -> bool:
    if not _is_latent(module):
        return compat.is_known_part(module, "attention") and module.head_dim % _HEAD_MULTIPLE == 0
    rank, turned = (getattr(module, name, 0) for name in ("kv_lora_rank", "qk_rope_head_dim"))
    return (
        compat.is_known_part(module, "latent attention")
        and max(rank, module.v_head_dim) <= _MOST_VALUE_DIM
        and max(rank, module.qk_nope_head_dim) + turned <= _MOST_DIM
        and turned % _HEAD_MULTIPLE == 0
        and len({_epsilon(norm) for norm in (module.q_a_layernorm, module.kv_a_layernorm) if norm is not None}) == 1
    )


def _is_latent(attention: nn.Module) -> bool:
    """Whether the keys and values of all heads are made of one vector."""
    return "kv_b_proj" in attention._modules


def _is_known_mlp(module: nn.Module) -> bool:
    return compat.is_known_part(module, "mlp") and _activation(module) is not None


def _is_known_mixture(module: nn.Module) -> bool:
    if not _is_kind(module, "SparseMoeBlock", "MoE", "MLP"):
        return False
    family = _family(module)
    router, experts = module._modules.get(family.router), module.experts
    shared = module._modules.get("shared_experts")
    return (
        _is_kind(router, "TopKRouter", "TopkRouter")
        and _is_kind(experts, "Experts")
        and compat.is_known_part(module, "mixture")
        and compat.is_known_part(router, "router")
        and compat.is_known_part(experts, "experts")
        and family.routing(router) is not None
        and experts.has_gate
        and not experts.has_post_expert_norm
        and (bool(family.gate(experts)) or _activation(experts) == "silu")
        and experts.num_experts <= _MOST_EXPERTS
        and router.top_k <= _MOST_SELECTED
        and (shared is None or (_is_known_mlp(shared) and _activation(shared) == "silu"))
    )


def _activation(mlp: nn.Module) -> str | None:
    modules = mlp._modules
    return _ACTIVATIONS.get(type(modules.get("act_fn", modules.get("activation_fn"))).__name__)


def _is_known_stack(module: nn.Module) -> bool:
    return (
        _is_kind(module, "Model", "TextModel")
        and compat.is_known_part(module, "model")
        and all(_is_known_layer(layer) for layer in module.layers)
    )


class _Prepared:
    """What the class of a prepared module has in front."""


@memoized
def _mixed(mixin: type, kind: type) -> type:
    """`kind` with `mixin` in front, under the same name, by which Transformers knows some things about a class."""
    attributes: dict[str, Any] = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    if mixin is _FastStack:  # which goes by the names of the `forward` that it overrides
        attributes["cache_name"] = compat.cache_name(kind.forward)
        attributes["output_class"] = compat.output_class(kind.forward)
        attributes["option_names"] = compat.forward_options(kind.forward, _FastStack.overridden)
    return type(kind.__name__, (mixin, kind), attributes)


class _Made:
    """What was made for a module, and what for. A copy of the module makes its own."""

    key: Any = None
    value: Any = None

    def __deepcopy__(self, _: Any) -> "_Made":
        return _Made()

    def __reduce__(self) -> tuple:
        return _Made, ()


class _State:
    """What a module's parts with these names hold, to tell whether they still do: modules, parameters, buffers, simple
    attributes and hooks, and the values that `tensors` has copies of.

    Every token asks, of some thousands of things that no cache has at hand: so builtins go through lists of them, and
    each thing is looked at once.
    """

    _SIMPLE = (bool, int, float, str, type(None))
    _OTHERS = ("_is_full_backward_hook", "_is_hf_initialized")  # attributes that no result depends on
    _CALLED = ("_forward_hooks", "_forward_pre_hooks")  # the other tables are of gradients, or of options of these

    def __init__(self, module: nn.Module, names: tuple[str, ...], tensors: "_Tensors") -> None:
        parts = {name: module._modules[name] for name in names}
        every = [part for named in parts.values() for part in named.modules()]
        self._held = [table for part in every for table in (part._modules, part._parameters, part._buffers) if table]
        self._values = [value for table in self._held for value in table.values()]
        attributes = [(module._modules, *each) for each in parts.items()]
        for part in every:
            if not isinstance(part, _LINEAR):  # whose parameters say all
                simple = {name: value for name, value in vars(part).items() if isinstance(value, self._SIMPLE)}
                attributes += [(vars(part), *each) for each in simple.items() if each[0] not in self._OTHERS]
        self._attributes = [*map(list, zip(*attributes, strict=True))]
        self._sized = [*map(vars, every)]  # which grow by a forward of their own
        self._sizes = [*map(len, self._sized)]
        self._hooks = [getattr(part, table) for part in every for table in self._CALLED]
        self._has_hooks = any(self._hooks)  # which may be gone by the next time
        self._tensors = tensors

    def is_current(self) -> bool:
        if self._has_hooks or any(self._hooks) or [*map(len, self._sized)] != self._sizes:
            return False
        values = [*chain.from_iterable(map(dict.values, self._held))]
        if len(values) != len(self._values) or not all(map(is_, values, self._values)):
            return False
        tables, names, attributes = self._attributes
        try:
            return all(map(is_, map(getitem, tables, names), attributes)) and self._tensors.are_current()
        except KeyError:
            return False


class _Same:
    """Objects, equal to the same ones. It keeps them, so that no other one gets their place in memory."""

    def __init__(self, objects: list[Any]) -> None:
        self.objects = objects

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and [*map(id, self.objects)] == [*map(id, other.objects)]


# Layers


class _JoinedLayer(_Prepared):
    """What a decoder layer's class has in front: the projections of one input are joined."""

    def join_projections(self) -> None:
        self._made = _Made()
        inputs = self._projections()
        self._made.value = {name: _joined(layers) for name, layers in inputs.items()}
        self._made.key = inputs, _Same(_parameters_of(inputs))

    def _projections(self) -> dict[str, list[nn.Module | None]]:
        """Those that are there by now. None stands for experts in floating point, which are no modules."""
        attention, mlp = self._modules["self_attn"]._modules, self._modules["mlp"]._modules

        def first_of(modules: Mapping[str, nn.Module], choices: tuple[tuple[str, ...], ...]) -> list[nn.Module | None]:
            return next(([modules[name] for name in names] for names in choices if modules.keys() >= {*names}), [None])

        gated = {name: mlp[name]._modules for name in ("experts", "shared_experts") if name in mlp} or {"mlp": mlp}
        projections = {"attention_in": first_of(attention, _ATTENTION_INPUTS), "attention_out": [attention["o_proj"]]}
        projections |= {name: [attention[name]] for name in ("q_b_proj", "kv_b_proj") if name in attention}
        for name, part in gated.items():
            projections[f"{name}_in"] = first_of(part, _MLP_INPUTS)
            projections[f"{name}_out"] = [part.get("down_proj")]
        return projections

    def products(self) -> dict[str, Any]:
        """For the op, of these; those of modules that have taken places since, such as adapters, are None."""
        inputs = self._projections()
        if self._made.key != (inputs, _Same(_parameters_of(inputs))):
            self.join_projections()
        return self._made.value

    def _apply(self, *arguments: Any, **options: Any) -> nn.Module:
        """A change of device or dtype, which gives every parameter memory of its own."""
        super()._apply(*arguments, **options)
        self.join_projections()
        return self

    def is_plain(self) -> bool:
        """Whether nothing but the parameters decides what it computes."""
        attention = self._modules["self_attn"]
        mlp = self._modules["mlp"]
        if (experts := mlp._modules.get("experts")) is not None and (
            experts._is_expert_parallel or (self.training and getattr(mlp, "jitter_noise", 0.0))
        ):
            return False
        dropouts = (attention.attention_dropout, *(each.p for each in self.children() if isinstance(each, nn.Dropout)))
        changed = not all(map(_computes_as_its_class, self.modules()))
        # Only Transformers' eager attention caps scores.
        capped = _softcap(attention) is not None and attention.config._attn_implementation != "eager"
        clipped = getattr(attention.config, "clip_qkv", None) is not None
        alike = len({_epsilon(norm) for norm in _norms(self).values()}) == 1
        dropped = self.training and any(dropouts)
        return attention.is_causal and alike and not (changed or capped or clipped or dropped)


def _parameters_of(inputs: Mapping[str, list[nn.Module | None]]) -> list[Tensor | None]:
    layers = (layer for layers in inputs.values() for layer in layers if layer is not None)
    return [parameter for layer in layers for parameter in layer._parameters.values()]


def _joined(layers: list[nn.Module]) -> list[Any] | None:
    """The products that give the outputs of these linear layers side by side; None if one of them has to be called.

    Neighbours of one format become one product: their parameters become views of joint ones. With a matrix for each
    expert, the rows of all of them lie side by side in that of an expert.
    """
    if not all(map(_is_plain_linear, layers)):
        return None
    return [_join(list(group)) for _, group in groupby(layers, _joint_key)]


def _joint_key(layer: nn.Module) -> tuple:
    """What neighbours that can be joined have in common."""
    parameters = tuple((name, each.dtype, each.device, each.requires_grad) for name, each in layer.named_parameters())
    return (type(layer), layer.in_features, _format(layer), parameters)


def _format(layer: nn.Module) -> tuple[int, int, str]:
    return (layer.group_size, layer.bits, layer.mode) if isinstance(layer, PackedModule) else (0, 0, "")


def _is_plain_linear(layer: nn.Module) -> bool:
    return type(layer) in _LINEAR and _computes_as_its_class(layer)


def _computes_as_its_class(module: nn.Module) -> bool:
    """Whether it has no hooks, and no forward of its own."""
    return "forward" not in vars(module) and not any(getattr(module, table) for table in HOOKS)


def _join(layers: list[nn.Module]) -> Any:
    first = layers[0]
    joint = {name: parameter.detach() for name, parameter in first.named_parameters()}
    for name in joint if len(layers) > 1 else ():
        dim = -1 if name == "bias" else -2
        joint[name] = torch.cat([layer._parameters[name].detach() for layer in layers], dim)
        parts = joint[name].split([layer.out_features for layer in layers], dim)
        for layer, part in zip(layers, parts, strict=True):
            trained = layer._parameters[name].requires_grad
            setattr(layer, name, nn.Parameter(part, requires_grad=trained))
    tensors = [joint.get(name) for name in ("weight", "scales", "biases", "bias")]
    return _classes.Projection(*tensors, *_format(first))


def _softcap(attention: nn.Module) -> float | None:
    return getattr(attention, "attn_logit_softcapping", None)


def _cache_sizes(attention: nn.Module) -> tuple[int, int, int]:
    """Of what a cache holds of a layer: heads, and the size of one of keys and of values. Latent attention has the
    latent vector and the part of keys that is turned there."""
    if _is_latent(attention):
        return 1, attention.kv_lora_rank, attention.qk_rope_head_dim
    return attention.config.num_key_value_heads, attention.head_dim, attention.head_dim


def _epsilon(norm: nn.Module) -> float:
    return norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps


class _WiderTensor(ValueError):
    """What a model keeps in a wider dtype than that of its hidden states, with values that need it."""


class _Tensors:
    """Tensors of a model as the op takes them, and from which of them it has others made.

    dtype: of hidden states.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._copied: list[tuple[Tensor, int]] = []  # with their versions then

    def __call__(self, tensor: Tensor, dtype: torch.dtype | None = None, offset: float = 0.0) -> Tensor:
        """The values, plus the offset, in this dtype or that of hidden states. Raises _WiderTensor if it does not have
        all of them."""
        tensor, dtype = tensor.detach(), dtype or self.dtype
        given = (tensor.float() + offset).to(tensor.dtype) if offset else tensor
        converted = given.to(dtype)
        if converted is not given and not torch.equal(converted.to(given.dtype), given):
            raise _WiderTensor
        if converted is not tensor:
            self._copied.append((tensor, tensor._version))
        return converted

    def are_current(self) -> bool:
        return all(tensor._version == version for tensor, version in self._copied)


def _norms(layer: nn.Module) -> dict[str, nn.Module]:
    """By the names that the op has for them."""
    attention = layer.self_attn
    norms = {name: getattr(layer, own_name) for name, own_name in _family(layer).decoder_norms.items()}
    heads = {"query": getattr(attention, "q_norm", None), "key": getattr(attention, "k_norm", None)}
    return norms | {name: norm for name, norm in heads.items() if norm is not None}


def _layer_for_op(layer: nn.Module, products: dict[str, Any], rotations: list[str | None], tensors: _Tensors) -> Any:
    """The description of a decoder layer that the op takes. rotations: the types of layers that turn heads alike."""
    attention = layer.self_attn
    norms = _norms(layer)
    rotates = getattr(attention, "use_rope", True)
    sinks = getattr(attention, "sinks", None)
    is_latent = _is_latent(attention)
    return _classes.DecoderLayer(
        [] if is_latent else products["attention_in"],
        _latent_for_op(attention, products, tensors) if is_latent else None,
        products["attention_out"],
        products.get("mlp_in", []),
        products.get("mlp_out", []),
        _mixture_for_op(layer.mlp, products, tensors) if hasattr(layer.mlp, "experts") else None,
        {name: tensors(norm.weight, offset=_family(layer).norm_offset) for name, norm in norms.items()},
        None if sinks is None else tensors(sinks),
        _epsilon(next(iter(norms.values()))),
        attention.scaling,
        _sliding_window(attention),
        _softcap(attention),
        rotations.index(_rotation(layer)) if rotates else -1,
        float(getattr(layer, "residual_multiplier", 1.0)),
        _activation(layer.mlp) or "silu",
    )


def _latent_for_op(attention: nn.Module, products: dict[str, Any], tensors: _Tensors) -> Any:
    """The description of latent attention that the op takes."""
    query_norm, norm = attention._modules.get("q_a_layernorm"), attention.kv_a_layernorm
    return _classes.LatentAttention(
        products["attention_in"],
        products.get("q_b_proj", []),
        None if query_norm is None else tensors(query_norm.weight),
        tensors(norm.weight),
        _epsilon(norm),
        *products["kv_b_proj"],
        attention.num_heads,
        attention.qk_nope_head_dim,
        bool(attention.config.rope_interleave),
    )


def _mixture_for_op(block: nn.Module, products: dict[str, Any], tensors: _Tensors) -> Any:
    """The description of a router and experts that the op takes."""
    family = _family(block)
    router, experts = getattr(block, family.router), block.experts
    dtype = torch.float32 if family.routes_in_float32 else None
    bias = getattr(router, "bias", None)
    of_router = (tensors(router.weight, dtype), None, None, None if bias is None else tensors(bias, dtype))
    routing = _ROUTING | family.routing(router)
    if routing["bias"] is not None:
        routing["bias"] = tensors(routing["bias"], torch.float32)
    return _classes.Mixture(
        _classes.Projection(*of_router, *_format(router)),
        products["experts_in"],
        *products["experts_out"],
        "gate_up_proj" in experts._modules and not experts.is_concatenated,
        products.get("shared_experts_in", []),
        products.get("shared_experts_out", []),
        *routing.values(),
        *(_GATE | family.gate(experts)).values(),
    )


def _rotation(layer: nn.Module) -> str | None:
    """What the model's rotary embedding is asked for; None where all layers have the same."""
    return getattr(layer.self_attn, "layer_type", None) if _family(layer).rotates_by_type else None


def _sliding_window(attention: nn.Module) -> int | None:
    if hasattr(attention, "sliding_window"):
        return attention.sliding_window
    return getattr(attention.config, "sliding_window", None)


# Stacks of layers


@dataclass(frozen=True)
class _Described:
    """A stack's layers for the op: None where it does not take them as they are.

    rotations: the kinds of their rotations. indices: of their layers in a cache. caps_scores: whether one of them does.
    """

    decoder: Any
    rotations: list[str | None]
    indices: list[int]
    caps_scores: bool


class _FastStack(_Prepared):
    """What the class of a stack of decoder layers, with embedding and last norm, has in front of its own `forward`."""

    overridden = ("input_ids", "attention_mask", "position_ids", "inputs_embeds", "use_cache")
    cache_name: str
    output_class: type
    option_names: frozenset[str]  # further keyword arguments of the original forward

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        *,
        past_key_values: Any = None,
        **options: Any,
    ) -> Any:
        cache, own_options = self._own_options(cache, past_key_values, options)
        caches = self.config.use_cache if use_cache is None else use_cache
        output = None
        if (input_ids is None) != (inputs_embeds is None) and _are_ordinary(options):
            inputs = input_ids if inputs_embeds is None else inputs_embeds
            output = self._step(inputs, attention_mask, position_ids, cache, caches)
        if output is None:
            output = super().forward(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                inputs_embeds=inputs_embeds,
                use_cache=use_cache,
                **own_options,
            )
        return output

    def _own_options(self, cache: Any, past_key_values: Any, options: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The cache, by whichever of its names it came, and the keyword arguments for `forward` of the class before.
        Raises TypeError if an option is unknown, or the cache came by both names."""
        if unknown := sorted(options.keys() - self.option_names):
            raise TypeError(
                f"{type(self).__name__}.forward() got unexpected keyword arguments: {', '.join(unknown)}; supported "
                f"are {', '.join(sorted({*self.overridden, self.cache_name, *self.option_names}))}"
            )
        if cache is not None and past_key_values is not None:
            raise TypeError(f"{type(self).__name__}.forward() got the cache twice, as cache and as past_key_values")
        cache = past_key_values if cache is None else cache
        return cache, {**options, compat.paged_cache_name(options) or self.cache_name: cache}

    def _step(self, inputs: Tensor, mask: Any, position_ids: Tensor | None, cache: Any, caches: bool) -> Any:
        """The output for new tokens of each sequence; None where the op does not serve.

        inputs: [batch, tokens] of token numbers, or [batch, tokens, hidden_size] of their embeddings.
        """
        config = self.config
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or inputs.numel() == 0:
            return None
        if config.output_hidden_states or config.output_attentions or not config.return_dict:
            return None
        if getattr(config, "output_router_logits", False):
            return None
        if config._attn_implementation not in _ATTENTION:
            return None
        described = self._decoder()
        like = self._like()
        if described.decoder is None or not _serves(like, inputs.device):
            return None
        if caches and cache is None:
            from transformers import DynamicCache

            cache = DynamicCache(config=config)
        batch, tokens = inputs.shape[:2]
        held = self._held(cache, batch, described) if cache is not None else None
        if cache is not None and held is None:
            return None
        length = held[0].get_seq_length() if held else 0
        visible = _visible(mask, length + tokens, inputs.device)
        if visible is False:
            return None
        x = self.embed_tokens(inputs) if inputs.dim() == 2 else inputs
        if x.dtype != like.dtype:
            return None
        if position_ids is None:
            position_ids = torch.arange(length, length + tokens, device=x.device)[None]
        keys, values, packed_format = self._cached_states(held, batch, tokens)
        x = _decoder_step(
            described.decoder,
            x * self.embedding_multiplier if hasattr(self, "embedding_multiplier") else x,
            *self._angles(x, position_ids, described.rotations),
            keys,
            values,
            length,
            visible,
            *packed_format,
        )
        for each in held or ():
            each.advance(tokens)
        return self.output_class(last_hidden_state=x, **{self.cache_name: cache})

    def _decoder(self) -> "_Described":
        """The description of all layers for the op, which is made again when they have changed."""
        made = self.__dict__.setdefault("_made", _Made())
        config = self.config
        # What no module holds: is_plain asks for them.
        options = (config._attn_implementation, getattr(config, "clip_qkv", None), config.num_hidden_layers)
        if made.key is None or made.key[0] != options or not made.key[1].is_current():
            made.value, state = self._describe()
            made.key = options, state
        return made.value

    def _describe(self) -> tuple["_Described", "_State"]:
        layers = self._layers()
        products = [layer.products() for layer in layers]
        tensors = _Tensors(self._like().dtype)
        described = _Described(None, [], [], False)
        if (
            all(product is not None for each in products for product in each.values())
            and all(layer.is_plain() for layer in layers)
            and _computes_as_its_class(self.norm)
        ):
            rotations = sorted({_rotation(layer) for layer in layers}, key=str)
            with suppress(_WiderTensor):
                described = _Described(
                    self._described(products, rotations, tensors),
                    rotations,
                    [layer.self_attn.layer_idx for layer in layers],
                    any(_softcap(layer.self_attn) is not None for layer in layers),
                )
        return described, _State(self, ("embed_tokens", "norm", "layers"), tensors)

    def _described(self, products: list[dict[str, Any]], rotations: list[str | None], tensors: _Tensors) -> Any:
        layers = [
            _layer_for_op(layer, each, rotations, tensors) for layer, each in zip(self._layers(), products, strict=True)
        ]
        norm = tensors(self.norm.weight, offset=_family(self).norm_offset)
        return _classes.Decoder(layers, norm, _epsilon(self.norm))

    def _like(self) -> Tensor:
        """A tensor of the dtype and the device of hidden states."""
        weight, embedding = self.norm.weight, self.embed_tokens
        dtype = embedding.weight_dtype if isinstance(embedding, PackedModule) else embedding.weight.dtype
        return weight if weight.dtype == dtype else weight.new_empty(0, dtype=dtype)

    def _layers(self) -> list[nn.Module]:
        return list(self.layers)[: self.config.num_hidden_layers]

    def _angles(self, x: Tensor, position_ids: Tensor, rotations: list[str | None]) -> list[list[Tensor]]:
        """Cosines, and sines, by kind of rotation."""
        kinds = [[] if kind is None else [kind] for kind in rotations]
        angles = [self.rotary_emb(x, position_ids, *kind) for kind in kinds]
        if _family(self).halves_angles:
            angles = [[torch.cat((each, each), -1) for each in of_kind] for of_kind in angles]
        return [[each.to(x.dtype) for each in of_kinds] for of_kinds in zip(*angles, strict=True)]

    def _held(self, cache: Any, batch: int, described: "_Described") -> list[GrowingLayer] | None:
        """The cache's layers, of one length; None if these are no such ones."""
        if getattr(cache, "offloading", False):
            return None
        held = [growing_layer(cache, index) for index in described.indices]
        like = self._like()
        if any(each is None or not each.fits(batch, like) for each in held):
            return None
        if held[0].packed_format is not None and described.caps_scores:
            return None
        return held if len({(each.get_seq_length(), each.packed_format) for each in held}) == 1 else None

    def _cached_states(
        self, held: list[GrowingLayer] | None, batch: int, tokens: int
    ) -> tuple[list[Tensor], list[Tensor], tuple[int, int]]:
        """Where each layer writes keys and values, and the format of packed ones, as the op takes them; without a cache
        all layers write to the same ones."""
        heads, *dims = _cache_sizes(self.layers[0].self_attn)
        like = self._like()
        if held is None:
            buffers = [[like.new_empty(batch, heads, tokens, dim) for dim in dims]] * len(self._layers())
        else:
            buffers = [each.reserve(tokens, (batch, heads, *dims), like) for each in held]
            if held[0].packed_format is not None:
                return [part for of_layer in buffers for part in of_layer], [], held[0].packed_format
        return [keys for keys, _ in buffers], [values for _, values in buffers], (0, 0)


def _are_ordinary(options: Mapping[str, Any]) -> bool:
    """Whether these keyword arguments change nothing about what is computed."""
    return all(value is None or (name in _REQUESTS and not value) for name, value in options.items())


def _serves(weight: Tensor, device: torch.device) -> bool:
    """Whether the op takes inputs on this device, of a model whose last norm has this weight."""
    kind = device.type
    return kind in ("cpu", "mps") and weight.device == device and not torch.is_autocast_enabled(kind)


def _visible(mask: Any, length: int, device: torch.device) -> Tensor | bool | None:
    """A mask [batch, length] of positions for the op; None where it hides nothing, False where it is no such mask."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[1] != length:
        return False
    # What is on another device is not waited for.
    if mask.device.type == "cpu" and bool(mask.all()):
        return None
    return mask.to(device, torch.bool)[:, None, None]
