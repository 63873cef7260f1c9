"""Faster generation on the CPU with Transformers models, without compiling anything.

A step of generation spends more time between the products than in them: Transformers computes norms, rotary embeddings
and gates in many small torch ops, and its cache copies all keys and values for every token. `prepare_for_generation`
gives a model's stack of decoder layers a `forward` with one op for all of them where one token comes at a time, and the
layers one with an op each for norms and gates. What these do not cover is left to the model's own.
"""

from collections.abc import Callable, Mapping
from functools import cache, partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._ops import ops
from ..families import EVERY_FAMILY
from ..formats import MODES
from ..nn.linear import QuantizedLinear
from ..nn.obstacles import HOOKS
from ..optional import PreTrainedModel
from . import compat

# The models whose decoder layer is known to be norm, attention, sum, norm, gated MLP, sum.
_KNOWN_MODELS = {
    f"transformers.models.{name.lower()}.modeling_{name.lower()}": name
    for family in EVERY_FAMILY
    for name in family.decoders
}
_HEAD_MULTIPLE = 32  # of head sizes, in the attention op
_ROW_MULTIPLE = 16  # of row sizes, in the other ops
_SPARE_POSITIONS = 256  # added when a cache grows
_MODES = list(MODES)  # the op for all layers takes a mode's index
# Keyword arguments that request further outputs; False is the same as None.
_REQUESTS = ("output_attentions", "output_hidden_states", "output_router_logits")

# The overloads: the fastest way from Python into the dispatcher.
_add_rms_norm = ops.add_rms_norm.default
_attention = ops.scaled_dot_product_attention.default
_decode_attention = ops._decode_attention.default
_decoder_steps = ops._decoder_steps.default
_quantized_matmul = ops.quantized_matmul.default
_rms_norm = ops.rms_norm.default
_swiglu = ops.swiglu.default


def prepare_for_generation(model: PreTrainedModel) -> PreTrainedModel:
    """Makes `model.generate`, and any forward pass without gradients, faster on the CPU; returns the model.

    Changes the decoder in place, that of a Llama, Mistral, Qwen2 or Qwen3 model, dense or quantized; quantize before.
    Projections of one input are joined, with their parameters as views of the joint tensors, under the same names and
    with the same values; everything that reads or writes the model, `save_checkpoint` too, goes on working. Takes
    milliseconds; a second call changes nothing.

    Results are those of the unprepared model up to rounding: sums are float32, and there are fewer roundings between.
    Steps of one token with quantized layers, a cache that keeps all positions and no padding are fastest. In padded
    batches, with sliding windows and with a static cache, attention is the layer's own; with gradients, on other
    devices, under `torch.autocast` and under `torch.compile` everything is. Projections that have hooks or a forward of
    their own by now are called; hooks on other modules inside of a decoder layer, and later ones, run only where that
    module is called.

    `forward` of the prepared model raises TypeError for keyword arguments that Transformers does not document.

    Raises:
        ImportError: transformers is older than the tested versions, or lacks a name that is needed.
        TypeError: `forward` has other parameters in this version of Transformers than in the known ones.
        ValueError: the model has no decoder layer of a known kind.
    """
    compat.check("prepare_for_generation")
    layers = [module for module in model.modules() if _is_known_layer(module)]
    if not layers and not any(isinstance(module, _FastLayer) for module in model.modules()):
        raise ValueError(
            f"[prepare_for_generation] {type(model).__name__} has no decoder layer of a known kind; known are those of "
            f"{', '.join(_KNOWN_MODELS.values())} models with SiLU, heads whose size is a multiple of {_HEAD_MULTIPLE} "
            f"and other sizes that are multiples of {_ROW_MULTIPLE}"
        )
    for layer in layers:
        layer.__class__ = _mixed(_FastLayer, type(layer))
        layer.join_projections()
        layer.register_load_state_dict_post_hook(_rejoin)
    for module in model.modules():
        if _is_known_stack(module):
            module.__class__ = _mixed(_FastStack, type(module))
    return model


def _rejoin(layer: nn.Module, _: Any) -> None:
    """After loading tensors, which may have taken the place of the parameters."""
    layer.join_projections()


def _is_kind(module: nn.Module, suffix: str) -> bool:
    """Whether `module` is, for example, a LlamaModel for the suffix "Model", and not a prepared one."""
    kind = type(module)
    return not issubclass(kind, _Forward) and kind.__name__ == f"{_KNOWN_MODELS.get(kind.__module__)}{suffix}"


def _is_known_layer(module: nn.Module) -> bool:
    return (
        _is_kind(module, "DecoderLayer")
        and compat.is_known_part(module, "layer")
        and compat.is_known_part(module.self_attn, "attention")
        and compat.is_known_part(module.mlp, "mlp")
        and type(module.mlp.act_fn).__name__ in ("SiLU", "SiLUActivation")
        and module.self_attn.head_dim % _HEAD_MULTIPLE == 0
        and all(size % _ROW_MULTIPLE == 0 for size in (module.hidden_size, module.mlp.intermediate_size))
    )


def _is_known_stack(module: nn.Module) -> bool:
    return (
        _is_kind(module, "Model")
        and compat.is_known_part(module, "model")
        and all(isinstance(layer, _FastLayer) for layer in module.layers)
    )


@cache
def _mixed(mixin: type, kind: type) -> type:
    """`kind` with `mixin` in front, under the same name, by which Transformers knows some things about a class."""
    attributes: dict[str, Any] = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    if issubclass(mixin, _Forward):  # which goes by the names of the `forward` that it overrides
        attributes["cache_name"] = compat.cache_name(kind.forward)
        attributes["option_names"] = compat.forward_options(kind.forward, mixin.overridden)
    return type(kind.__name__, (mixin, kind), attributes)


class _Forward:
    """What the `forward` of a prepared module knows of its keyword arguments."""

    overridden: tuple[str, ...]  # parameters of the original forward, without the cache
    cache_name: str
    option_names: frozenset[str]  # further keyword arguments of the original forward

    def own_options(self, cache: Any, past_key_values: Any, options: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
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

    @staticmethod
    def are_ordinary(options: Mapping[str, Any]) -> bool:
        """Whether these keyword arguments change nothing about what is computed."""
        return all(value is None or (name in _REQUESTS and not value) for name, value in options.items())


def _serves(x: Tensor, norm: nn.Module) -> bool:
    """Whether the ops here take x in the model of this norm."""
    return (
        x.device.type == "cpu"
        and x.dtype == norm.weight.dtype
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


# Products of one input


class _Product:
    """x [..., columns] -> [..., rows] for the rows of a quantized linear layer, or of several."""

    def __init__(self, layer: QuantizedLinear, tensors: dict[str, Tensor]) -> None:
        self.tensors = [tensors.get(name) for name in ("weight", "scales", "biases", "bias")]
        self.format = (layer.group_size, layer.bits, layer.mode)
        self.format_numbers = (layer.group_size, layer.bits, _MODES.index(layer.mode))

    def __call__(self, x: Tensor) -> Tensor:
        *packed, bias = self.tensors
        y = _quantized_matmul(x, *packed, True, *self.format)
        return y if bias is None else y + bias


def _joined(layers: list[nn.Module]) -> Callable[[Tensor], Tensor]:
    """A function of x that gives the outputs of these linear layers side by side.

    Neighbours of one format become one product: their parameters become views of joint ones.
    """
    products = [_join(list(group)) for _, group in groupby(layers, _joint_key)]
    return products[0] if len(products) == 1 else lambda x: torch.cat([product(x) for product in products], -1)


def _joint_key(layer: nn.Module) -> tuple:
    """What neighbours that can be joined have in common; a layer that has to be called has it with none."""
    if not _is_plain(layer):
        return (id(layer),)
    parameters = tuple((name, each.dtype, each.device, each.requires_grad) for name, each in layer.named_parameters())
    format = (layer.group_size, layer.bits, layer.mode) if type(layer) is QuantizedLinear else ()
    return (type(layer), layer.in_features, format, parameters)


def _is_plain(layer: nn.Module) -> bool:
    """Whether a layer computes what its class does with its parameters, without hooks and a forward of its own."""
    known = type(layer) in (nn.Linear, QuantizedLinear) and "forward" not in vars(layer)
    return known and not any(getattr(layer, table) for table in HOOKS)


def _join(layers: list[nn.Module]) -> Callable[[Tensor], Tensor]:
    first = layers[0]
    if not _is_plain(first):
        return first
    joint = {name: parameter.detach() for name, parameter in first.named_parameters()}
    for name in joint if len(layers) > 1 else ():
        joint[name] = torch.cat([layer._parameters[name].detach() for layer in layers])
        parts = joint[name].split([layer.out_features for layer in layers])
        for layer, part in zip(layers, parts, strict=True):
            trained = layer._parameters[name].requires_grad
            setattr(layer, name, nn.Parameter(part, requires_grad=trained))
    return _Product(first, joint) if type(first) is QuantizedLinear else partial(F.linear, **joint)


# Decoders


class _FastLayer(_Forward):
    """What a decoder layer's class has in front of its own `forward`."""

    overridden = ("hidden_states", "attention_mask", "position_ids", "use_cache", "position_embeddings")

    def join_projections(self) -> None:
        query, key, value, output, gate, up, down = projections = self._projections()
        inputs = [query, key, value], [output], [gate, up], [down]
        self._joined = projections, [_joined(layers) for layers in inputs]

    def _projections(self) -> tuple[nn.Module, ...]:
        attention, mlp = self._modules["self_attn"]._modules, self._modules["mlp"]._modules
        names = (attention, ("q_proj", "k_proj", "v_proj", "o_proj")), (mlp, ("gate_proj", "up_proj", "down_proj"))
        return tuple(modules[name] for modules, each in names for name in each)

    @property
    def products(self) -> list[Callable[[Tensor], Tensor]]:
        """Those of the projections, of modules that have taken their places since, such as adapters, as well."""
        if self._joined[0] != self._projections():
            self.join_projections()
        return self._joined[1]

    def norms(self) -> list[nn.Module]:
        """Those before attention and before the MLP, and of queries and keys where they have one."""
        heads = [getattr(self.self_attn, name, None) for name in ("q_norm", "k_norm")]
        return [self.input_layernorm, self.post_attention_layernorm, *(norm for norm in heads if norm is not None)]

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
        cache: Any = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        *,
        past_key_values: Any = None,
        **options: Any,
    ) -> Tensor:
        cache, own_options = self.own_options(cache, past_key_values, options)
        own_options.update(
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=use_cache,
            position_embeddings=position_embeddings,
        )
        first_norm, second_norm, *head_norms = self.norms()
        if not _serves(hidden_states, first_norm):
            return super().forward(hidden_states, **own_options)
        project_in, project_out, gate_and_up, down = self.products
        x = _rms_norm(hidden_states, first_norm.weight, first_norm.variance_epsilon)
        plain = attention_mask is None and self.are_ordinary(options)
        held = _reserved(self.self_attn, cache, x) if plain else None
        if held is None and plain and _is_plain_prompt(self.self_attn, cache, x):
            x = project_out(self._attend_prompt(project_in(x), *position_embeddings, cache))
        elif held is None:
            x, _ = self.self_attn(hidden_states=x, **own_options)
        else:
            y = _decode_attention(
                project_in(x),
                *position_embeddings,
                *held.buffers,
                held.length,
                self.self_attn.scaling,
                *([norm.weight for norm in head_norms] or (None, None)),
                head_norms[0].variance_epsilon if head_norms else 0.0,
            )
            held.length += 1
            x = project_out(y)
        hidden_states, x = _add_rms_norm(x, hidden_states, second_norm.weight, second_norm.variance_epsilon)
        return hidden_states + down(_swiglu(*gate_and_up(x).chunk(2, -1)))

    def _attend_prompt(self, x: Tensor, cosines: Tensor, sines: Tensor, cache: Any) -> Tensor:
        """Attention of tokens to those before them, from their queries, keys and values side by side."""
        attention = self.self_attn
        heads = x.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        key_heads = heads.shape[1] // (attention.num_key_value_groups + 2)
        query, key, value = heads.split([heads.shape[1] - 2 * key_heads, key_heads, key_heads], 1)
        if head_norms := self.norms()[2:]:
            query, key = (
                _rms_norm(states, norm.weight, norm.variance_epsilon)
                for states, norm in zip((query, key), head_norms, strict=True)
            )
        query, key = (_rotated(states, cosines.unsqueeze(1), sines.unsqueeze(1)) for states in (query, key))
        if cache is not None:
            key, value = cache.update(key, value, attention.layer_idx)
        y = _attention(query, key, value, scale=attention.scaling, causal=True)
        return y.transpose(1, 2).flatten(2)


def _rotated(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cosines + torch.cat((-second, first), -1) * sines


def _is_plain_prompt(attention: nn.Module, cache: Any, x: Tensor) -> bool:
    """Whether attention without a mask is of the first tokens, each to all before it, as torch computes it."""
    return (
        x.shape[1] > 1
        and (cache is None or cache.get_seq_length(attention.layer_idx) == 0)
        and attention.is_causal
        and attention.config._attn_implementation == "sdpa"
        and _sliding_window(attention) is None
        and not attention._forward_hooks
        and not attention._forward_pre_hooks
        and not (attention.training and attention.attention_dropout > 0)
    )


class _FastStack(_Forward):
    """What the class of a stack of decoder layers, with embedding and last norm, has in front of its own `forward`."""

    overridden = ("input_ids", "attention_mask", "position_ids", "inputs_embeds", "use_cache")

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
        cache, own_options = self.own_options(cache, past_key_values, options)
        caches = self.config.use_cache if use_cache is None else use_cache
        output = None
        if input_ids is not None and inputs_embeds is None and caches and self.are_ordinary(options):
            output = self._step(input_ids, attention_mask, position_ids, cache)
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

    def _step(self, input_ids: Tensor, mask: Any, position_ids: Tensor | None, cache: Any) -> Any:
        """The output for one new token of each sequence, input_ids [batch, 1]; None where the op does not serve."""
        if input_ids.shape[1] != 1 or cache is None or torch.compiler.is_compiling() or not _hides_nothing(mask):
            return None
        layers = list(self.layers)
        lists = self._lists(layers)
        config = self.config
        if lists is None or config.output_hidden_states or config.output_attentions or not config.return_dict:
            return None
        x = self.embed_tokens(input_ids)
        if not _serves(x, self.norm):
            return None
        held = [_reserved(layer.self_attn, cache, x) for layer in layers]
        length = held[0].length if held[0] is not None else -1
        if any(each is None or each.length != length for each in held):
            return None
        if position_ids is None:
            position_ids = torch.full((1, 1), length)
        epsilon = self.norm.variance_epsilon
        x = _decoder_steps(
            x,
            *self.rotary_emb(x, position_ids),
            [each.buffers[0] for each in held],
            [each.buffers[1] for each in held],
            length,
            *lists,
            layers[0].self_attn.scaling,
            epsilon,
        )
        for each in held:
            each.length += 1
        from transformers.modeling_outputs import BaseModelOutputWithPast

        x = _rms_norm(x, self.norm.weight, epsilon)
        return BaseModelOutputWithPast(last_hidden_state=x, **{self.cache_name: cache})

    def _lists(self, layers: list[nn.Module]) -> tuple[list, list, list] | None:
        """The norms, products and formats of all layers, as the op takes them; None if it does not."""
        products = [layer.products for layer in layers]
        known, lists = self.__dict__.get("_known_lists", ((), None))
        # Replaced parameters make `products` a new list.
        if len(known) != len(products) or any(one is not other for one, other in zip(known, products, strict=True)):
            lists = _step_lists(layers, self.norm.variance_epsilon)
            self._known_lists = (products, lists)
        if any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers):
            return None
        return lists


def _step_lists(layers: list[nn.Module], epsilon: float) -> tuple[list, list, list] | None:
    products = [product for layer in layers for product in layer.products]
    norms = [norm for layer in layers for norm in layer.norms()]
    alike = len({(len(layer.norms()), layer.self_attn.scaling) for layer in layers}) == 1
    if (
        not alike
        or any(type(product) is not _Product for product in products)
        or any(norm.variance_epsilon != epsilon for norm in norms)
        or any(_sliding_window(layer.self_attn) is not None for layer in layers)
    ):
        return None
    weights = [norm.weight.detach() for norm in norms]
    tensors = [tensor for product in products for tensor in product.tensors]
    return weights, tensors, [number for product in products for number in product.format_numbers]


def _sliding_window(attention: nn.Module) -> int | None:
    if hasattr(attention, "sliding_window"):
        return attention.sliding_window
    return getattr(attention.config, "sliding_window", None)


def _hides_nothing(mask: Any) -> bool:
    return mask is None or (isinstance(mask, Tensor) and mask.dim() == 2 and bool(mask.all()))


# Caches


class _GrowingLayer:
    """What the class of a cache's layer has in front, to hold keys and values in buffers with spare capacity.

    While there are `buffers` [batch, heads, capacity, head_dim], of keys and of values, `length` of their positions are
    taken, and `keys` and `values` are views of those. Who assigns to either ends that.
    """

    buffers: tuple[Tensor, Tensor] | None = None
    length: int = 0

    def reserve(self) -> None:
        """Makes sure that the buffers have place for one more position."""
        if self.buffers is None or self.length == self.buffers[0].shape[2]:
            states = (self.keys, self.values)
            self.length = states[0].shape[2]
            spare = max(_SPARE_POSITIONS, self.length // 2)
            self.buffers = tuple(F.pad(state, (0, 0, 0, spare)) for state in states)

    def _state(self, which: int) -> Tensor | None:
        return self._states[which] if self.buffers is None else self.buffers[which].narrow(2, 0, self.length)

    def _assign(self, which: int, state: Tensor | None) -> None:
        if self.buffers is not None:
            self._states = [self._state(0), self._state(1)]
            self.buffers = None
        self._states[which] = state

    keys = property(lambda self: self._state(0), lambda self, state: self._assign(0, state))
    values = property(lambda self: self._state(1), lambda self, state: self._assign(1, state))

    def get_seq_length(self) -> int:
        return super().get_seq_length() if self.buffers is None else self.length


def _reserved(attention: nn.Module, cache: Any, x: Tensor) -> _GrowingLayer | None:
    """The cache's layer with place for one more token, None if attention is not of one token to all before it."""
    layers = getattr(cache, "layers", ())
    index = attention.layer_idx
    if x.shape[1] != 1 or index >= len(layers) or attention._forward_hooks:
        return None
    if attention.training and attention.attention_dropout > 0:
        return None
    layer = layers[index]
    if not isinstance(layer, _GrowingLayer):
        known = type(layer).__name__ == "DynamicLayer" and all(name in compat.CACHE_STATE for name in vars(layer))
        if not known or layer.get_seq_length() == 0:
            return None
        growing = object.__new__(_mixed(_GrowingLayer, type(layer)))
        growing.__dict__.update(layer.__dict__, _states=[layer.keys, layer.values])
        layer = layers[index] = growing
    if layer.get_seq_length() == 0:
        return None
    layer.reserve()
    keys = layer.buffers[0]
    return layer if keys.shape[0] == x.shape[0] and keys.dtype == x.dtype else None
