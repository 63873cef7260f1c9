"""Mixtures of experts: layers of one matrix per expert, and their place in Transformers and in MLX checkpoints.

Transformers holds all experts of a layer in one module with fused parameters: `gate_up_proj` [num_experts, 2 *
intermediate_size, hidden_size] (or `up_proj` without a gate), `down_proj` and maybe biases; some models store them
transposed, or the rows of gate and up in turns. MLX has one layer for each of the three projections. Here the module
of Transformers stays, and MLX's three layers are its children, so that names, formats and memory are those of the
checkpoint; `experts_forward` runs them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from . import compat
from ._ops import ops
from .modules import _QuantizedModule
from .obstacles import check_class, check_state, copy_hooks, hooks_that_stay, move_hooks
from .ops import dequantize, quantize
from .packed_weight import PackedModule, frozen, own
from .stored import require

IMPLEMENTATION = "quantization_mlx"  # the name under which Transformers knows `experts_forward`

_gather_qmm = ops.gather_qmm.default

# Layers


class SwitchLinear(nn.Module):
    """A linear map for each expert, in floating point: `weight` [num_experts, out_features, in_features] and `bias`
    [num_experts, out_features] or None. It reads indices on the host, so a compiled graph breaks here.

    Args:
        weight, bias: the parameters; they may be views of fused ones.
    """

    _origin: Mapping[str, nn.Parameter] = {}  # the fused ones by their names

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        super().__init__()
        self.num_experts, self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight, requires_grad=weight.requires_grad)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=bias.requires_grad))

    def forward(self, x: torch.Tensor, indices: torch.Tensor, sorted_indices: bool = False) -> torch.Tensor:
        """As `QuantizedSwitchLinear.forward`."""
        rows = x.expand(*indices.shape, self.in_features).reshape(-1, self.in_features)
        flat = indices.reshape(-1)
        y = rows.new_zeros(len(rows), self.out_features)
        for expert in flat.unique().tolist():
            chosen = (flat == expert).nonzero().squeeze(-1)
            bias = None if self.bias is None else self.bias[expert]
            y = y.index_copy(0, chosen, F.linear(rows[chosen], self.weight[expert], bias))
        return y.view(*indices.shape, self.out_features)

    def extra_repr(self) -> str:
        return f"{self.num_experts}, in_features={self.in_features}, out_features={self.out_features}"


class PackedSwitchLinear(PackedModule):
    """What layers with a packed matrix for each expert have in common."""

    num_experts: int
    in_features: int
    out_features: int

    def dequantize(self) -> SwitchLinear:
        """A floating-point layer with the values of `weight`, of its dtype, and a copy of the bias."""
        return SwitchLinear(self.weight.dequantize().detach(), own(self.bias)).train(self.training)

    def forward(self, x: torch.Tensor, indices: torch.Tensor, sorted_indices: bool = False) -> torch.Tensor:
        """Row i of x times the matrix of expert indices[i].

        Args:
            x: [*batch, in_features], whose batch broadcasts with the shape of indices and has as many dimensions.
            indices: the experts, int32 or int64.
            sorted_indices: a promise that indices ascend, as in `gather_qmm`.

        Returns:
            [*indices.shape, out_features], of x's dtype promoted with that of affine scales.
        """
        words, scales, biases, *format = self.packed()
        transpose = not self.packed_transposed
        y = _gather_qmm(
            x.unsqueeze(-2),
            words,
            scales,
            biases,
            None,
            indices,
            transpose,
            *format,
            None,
            sorted_indices=sorted_indices,
        ).squeeze(-2)
        return y if self.bias is None else y + self.bias[indices].to(y.dtype)

    def extra_repr(self) -> str:
        return (
            f"{self.num_experts}, in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, {super().extra_repr()}"
        )


class QuantizedSwitchLinear(PackedSwitchLinear, _QuantizedModule):
    """A linear map for each expert on packed weights, as `QuantizedLinear` is one: `weight` uint32 [num_experts,
    out_features, in_features * bits / 32], `scales` and `biases` [num_experts, out_features, in_features / group_size],
    `bias` [num_experts, out_features] or None.

    Args:
        num_experts, in_features, out_features: the sizes; in_features is a multiple of group_size.
        bias: whether there is a `bias`.
        group_size, bits, mode: the format, as in QuantizedLinear.
        device, dtype: where the parameters live, and the dtype of the floating-point ones.

    Raises:
        ValueError: the format is not supported, or in_features does not divide into groups.
    """

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        out_features: int,
        bias: bool = False,
        group_size: int | None = None,
        bits: int | None = None,
        mode: str = "affine",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__((num_experts, out_features, in_features), group_size, bits, mode, device, dtype)
        self.num_experts = num_experts
        self.in_features = in_features
        self.out_features = out_features
        self.register_parameter(
            "bias", nn.Parameter(torch.zeros(num_experts, out_features, device=device, dtype=dtype)) if bias else None
        )

    @classmethod
    def shell(cls, linear: SwitchLinear, dtype: torch.dtype | None = None, **format: Any) -> QuantizedSwitchLinear:
        """A layer of the sizes of `linear` on device "meta" that waits for its tensors."""
        sizes = linear.num_experts, linear.in_features, linear.out_features
        return cls(*sizes, linear.bias is not None, **format, device="meta", dtype=dtype)

    @classmethod
    def from_switch_linear(
        cls, linear: SwitchLinear, group_size: int | None = None, bits: int | None = None, mode: str = "affine"
    ) -> QuantizedSwitchLinear:
        """Quantizes `linear`, one expert after the other; a bias and hooks are copied.

        Raises:
            TypeError, ValueError: as in `QuantizedLinear.from_linear`.
        """
        check_class("QuantizedSwitchLinear.from_switch_linear", linear, SwitchLinear)
        check_state("QuantizedSwitchLinear.from_switch_linear", linear)
        module = cls.shell(linear, group_size=group_size, bits=bits, mode=mode)
        module._pack(linear.weight)
        module.bias = own(linear.bias)
        copy_hooks(linear, module)
        return module.train(linear.training)

    def _pack(self, weight: torch.Tensor) -> None:
        # One at a time, because quantizing copies what is not contiguous.
        packed = [quantize(matrix, self.group_size, self.bits, self.mode) for matrix in weight.detach()]
        self._hold([torch.stack(tensors) for tensors in zip(*packed, strict=True)], weight)


# The forward pass in Transformers


def register_experts() -> None:
    """Makes `experts_forward` known to Transformers as the experts implementation "quantization_mlx"; may be repeated.

    Raises:
        ImportError: transformers is not installed.
    """
    _transformers_experts().register(IMPLEMENTATION, experts_forward)


def use_experts(model: nn.Module) -> None:
    """Makes the experts modules in `model` that hold our layers run through `experts_forward`.

    To be called when all layers are in place; `fuse` does. Other experts modules of the model run as Transformers
    runs them by default.
    """
    ours = [
        module
        for _, module in _experts_modules(model)
        if isinstance(module.down_proj, nn.Module) and not isinstance(module, Llama4Experts)
    ]
    if not ours:
        return
    register_experts()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation(IMPLEMENTATION)
    for experts in ours:
        # A model that is no PreTrainedModel, or whose class's source Transformers cannot read.
        if experts.config._experts_implementation != IMPLEMENTATION:
            experts.config._experts_implementation = IMPLEMENTATION


def experts_forward(
    experts: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The experts implementation: the sum of the chosen experts' results, weighted by the router.

    Args:
        experts: an experts module of Transformers, with our layers or, then Transformers' own code runs it, without.
        hidden_states: [tokens, hidden_size].
        top_k_index: int64 [tokens, k]; under expert parallelism, num_experts and more stand for experts elsewhere.
        top_k_weights: [tokens, k].

    Returns:
        [tokens, hidden_size], of the dtype of hidden_states.
    """
    if not isinstance(experts.down_proj, nn.Module):
        return _transformers_experts()["grouped_mm"](experts, hidden_states, top_k_index, top_k_weights)
    if experts._is_expert_parallel:
        top_k_weights = top_k_weights.masked_fill(top_k_index >= experts.num_experts, 0)
        top_k_index = top_k_index.clamp(max=experts.num_experts - 1)
    if _sorting_pays(hidden_states, top_k_index, experts.num_experts):
        indices, order = top_k_index.flatten().sort()
        y = _mlp(experts, hidden_states[order // top_k_index.shape[1]], indices, sorted_indices=True)
        y = torch.zeros_like(y).index_copy(0, order, y).unflatten(0, top_k_index.shape)
    else:
        y = _mlp(experts, hidden_states.unsqueeze(1), top_k_index)
    return (y * top_k_weights.unsqueeze(-1)).sum(1).to(hidden_states.dtype)


def _mlp(experts: nn.Module, x: torch.Tensor, indices: torch.Tensor, sorted_indices: bool = False) -> torch.Tensor:
    """x [*batch, hidden_size] -> [*indices.shape, hidden_size], before the router's weights."""
    if not experts.has_gate:
        inner = experts.act_fn(experts.up_proj(x, indices, sorted_indices))
    elif "gate_up_proj" in experts._modules:
        inner = experts._apply_gate(experts.gate_up_proj(x, indices, sorted_indices))
    else:
        halves = (layer(x, indices, sorted_indices) for layer in (experts.gate_proj, experts.up_proj))
        inner = experts._apply_gate(_joined(*halves, dim=-1, in_turns=not experts.is_concatenated))
    y = experts.down_proj(inner, indices, sorted_indices)
    return experts.post_expert_norm(y) if experts.has_post_expert_norm else y


def _sorting_pays(hidden_states: torch.Tensor, indices: torch.Tensor, num_experts: int) -> bool:
    """Whether sorted pairs choose a kernel that is worth it; the CPU's sorts by itself."""
    return hidden_states.device.type != "cpu" and indices.numel() >= max(16, 4 * num_experts)


def _transformers_experts() -> Any:
    require("transformers")
    compat.check("experts")
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    return ALL_EXPERTS_FUNCTIONS


# Fused parameters and layers


def _joined(gate: torch.Tensor, up: torch.Tensor, dim: int, in_turns: bool) -> torch.Tensor:
    """Rows of gate, then of up, along the dimension `dim`, or both in turns."""
    if in_turns:
        dim %= gate.dim()
        return torch.stack((gate, up), dim + 1).flatten(dim, dim + 1)
    return torch.cat((gate, up), dim)


def _halves(tensor: torch.Tensor, in_turns: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of the rows of gate and of up in [num_experts, 2 * intermediate_size, ...]."""
    gate, up = (tensor[:, ::2], tensor[:, 1::2]) if in_turns else tensor.chunk(2, 1)
    return gate, up


class Llama4Experts(nn.Module):
    """Stands in for the `Llama4TextExperts` of Transformers, whose forward pass reads its fused parameters, while the
    projections are layers.

    Args:
        experts: the module whose place it takes; its parameters move over, until `give_back`.
    """

    is_transposed = is_concatenated = has_gate = True
    has_post_expert_norm = False

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.num_experts, self.hidden_size, self.act_fn = experts.num_experts, experts.hidden_size, experts.act_fn
        for name in _FUSED:
            self.register_parameter(name, experts._parameters.pop(name))
        move_hooks(experts, self)  # which shares the tables
        self._stood_in_for = (experts,)  # in a tuple, so that it is no child
        self.train(experts.training)

    def give_back(self) -> nn.Module:
        """The module whose place this one took, with its parameters."""
        (experts,) = self._stood_in_for
        for name in _FUSED:
            experts.register_parameter(name, self._parameters.pop(name))
        return experts

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, -1)
        return self.act_fn(gate) * up

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[num_experts * tokens, hidden_size] -> the same shape: every token once for each expert, multiplied by the
        router's score. Where that is 0, so is the result, and the expert is not read, but for a compiled graph."""
        rows = hidden_states.view(-1, self.hidden_size)
        indices = torch.arange(self.num_experts, device=rows.device).repeat_interleave(len(rows) // self.num_experts)
        if torch.compiler.is_compiling():
            return _mlp(self, rows, indices, sorted_indices=True).to(rows.dtype)
        chosen = rows.detach().any(-1).nonzero().squeeze(-1)
        y = _mlp(self, rows[chosen], indices[chosen], sorted_indices=True).to(rows.dtype)
        return torch.zeros_like(rows).index_copy(0, chosen, y)


def _experts_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The paths of the modules that Transformers' decorator for experts has marked, and these."""
    for path, module in model.named_modules():
        if all(hasattr(module, name) for name in ("is_transposed", "is_concatenated", "has_gate", "down_proj")):
            yield path, module


def _is_llama4(module: nn.Module) -> bool:
    return type(module).__name__ == "Llama4TextExperts"


def _can_be_unfused(experts: nn.Module) -> bool:
    """Whether its fused parameters are ordinary ones, and its forward is that of its class."""
    names = _fused_names(experts) if not _is_llama4(experts) else _FUSED
    held = [experts._parameters.get(name) for name in names]
    ordinary = all(type(each) is nn.Parameter and each.layout is torch.strided for each in held)
    as_its_class = "forward" not in vars(experts) and not parametrize.is_parametrized(experts)
    return ordinary and as_its_class and hooks_that_stay(experts) is None


_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
_FUSED = ("gate_up_proj", "down_proj")


def _fused_names(experts: nn.Module) -> tuple[str, str]:
    return "gate_up_proj" if experts.has_gate else "up_proj", "down_proj"


@contextmanager
def unfused(model: nn.Module) -> Iterator[None]:
    """`unfuse(model)` before, and `fuse(model)` after what is done within the context, also if that fails."""
    unfuse(model)
    try:
        yield
    finally:
        fuse(model)


def unfuse(model: nn.Module, among: Iterable[str] | None = None) -> None:
    """Puts a `SwitchLinear` in the place of each projection of the fused experts in `model`, to be replaced.

    The paths are `….experts.gate_proj`, `up_proj` and `down_proj`; the weights are views of the fused parameters,
    [num_experts, out_features, in_features] however these are stored. `fuse` has to follow.

    Args:
        among: names of projections; experts without one of them stay fused. None unfuses all.

    Raises:
        ImportError: Transformers marks experts in another way than in the tested versions.
    """
    if any(type(module).__module__.startswith("transformers.") for module in model.modules()):
        compat.check("experts")
    wanted = None if among is None else set(among)

    def is_wanted(path: str) -> bool:
        return wanted is None or any(f"{path}.{name}" in wanted for name in _PROJECTIONS)

    for path, module in list(model.named_modules()):
        if path and _is_llama4(module) and is_wanted(path) and _can_be_unfused(module):
            model.set_submodule(path, Llama4Experts(module))
    for path, experts in _experts_modules(model):
        if is_wanted(path) and _can_be_unfused(experts):
            _unfuse(experts)


def fuse(model: nn.Module) -> None:
    """Gives the experts modules of `model` whose layers are all floating-point ones their fused parameters back.

    The others run through `experts_forward` from now on.
    """
    for path, experts in list(_experts_modules(model)):
        names = dict.fromkeys((*_PROJECTIONS, *_FUSED))
        layers = {name: experts._modules[name] for name in names if name in experts._modules}
        if not layers:
            continue
        if all(type(layer) is SwitchLinear for layer in layers.values()):
            _fuse(experts, layers)
            if isinstance(experts, Llama4Experts):
                model.set_submodule(path, experts.give_back())
        else:
            for layer in layers.values():
                if type(layer) is SwitchLinear:
                    _detach(layer)
    use_experts(model)


def _unfuse(experts: nn.Module) -> None:
    for name in _fused_names(experts):
        origin = {key: experts._parameters.pop(key) for key in (name, f"{name}_bias") if key in experts._parameters}
        weight, bias = origin[name].detach(), origin[f"{name}_bias"].detach() if f"{name}_bias" in origin else None
        weight = weight.mT if experts.is_transposed else weight
        parts = {name: (weight, bias)}
        if name == "gate_up_proj":
            in_turns = not experts.is_concatenated
            biases = (None, None) if bias is None else _halves(bias, in_turns)
            parts = dict(
                zip(("gate_proj", "up_proj"), zip(_halves(weight, in_turns), biases, strict=True), strict=True)
            )
        for part, tensors in parts.items():
            layer = SwitchLinear(*tensors).train(experts.training)
            layer.requires_grad_(origin[name].requires_grad)
            # The fused parameters live as long as one of their views. On the meta device there is nothing to keep.
            layer._origin = {} if weight.is_meta else origin
            setattr(experts, part, layer)
    experts._is_hf_initialized = True  # its class would have Transformers initialise the fused parameters


def _fuse(experts: nn.Module, layers: Mapping[str, SwitchLinear]) -> None:
    for name in layers:
        del experts._modules[name]
    for name in _fused_names(experts):
        parts = [layers[part] for part in ((name,) if name in layers else ("gate_proj", "up_proj"))]
        for key, parameter in (parts[0]._origin or _joined_parameters(experts, name, parts)).items():
            experts.register_parameter(key, parameter)


def _joined_parameters(experts: nn.Module, name: str, parts: list[SwitchLinear]) -> dict[str, nn.Parameter]:
    """The fused parameters of layers that have come by other weights."""
    in_turns = not experts.is_concatenated
    fused = {}
    for key, attribute in ((name, "weight"), (f"{name}_bias", "bias")):
        tensors = [getattr(part, attribute) for part in parts]
        if tensors[0] is None:
            continue
        tensor = tensors[0].detach() if len(parts) == 1 else _joined(*(each.detach() for each in tensors), 1, in_turns)
        tensor = tensor.mT.contiguous() if attribute == "weight" and experts.is_transposed else tensor
        fused[key] = nn.Parameter(tensor, requires_grad=tensors[0].requires_grad)
    return fused


def _detach(layer: SwitchLinear) -> None:
    """Lets go of the fused parameters, of which `layer` remains alone."""
    if not layer._origin:
        return
    layer._origin = {}
    for name, parameter in list(layer.named_parameters()):
        own = parameter.detach().clone(memory_format=torch.contiguous_format)
        setattr(layer, name, nn.Parameter(own, requires_grad=parameter.requires_grad))


# MLX checkpoints
#
# While a model is built for a checkpoint, on the meta device, `place_experts` gives it what the checkpoint stores, and
# after the tensors are loaded `finish_experts` makes of that what the model computes with.

# Where mlx_lm's model has the experts: the name of the block, where that is not Transformers' "mlp", and of the layers
# in it, where that is not "switch_mlp"; by model_type.
_BLOCKS = {"mixtral": "block_sparse_moe", "phimoe": "block_sparse_moe", "minimax_m2": "block_sparse_moe"}
_LAYERS = {"gpt_oss": "experts", "dots1": "experts", "afmoe": "experts"}


def expert_renamings(model: nn.Module) -> list[Any]:
    """The rules of Transformers (`WeightRenaming`) that turn MLX's names of experts into those of `model`."""
    from transformers.core_model_loading import WeightRenaming

    renamed = {stored: own for own, stored in _stored_prefixes(model).items()}
    blocks = {(s.rpartition(".")[2], o.rpartition(".")[2]) for s, o in renamed.items()}
    rules = [(rf"\.{stored}\.", f".{own}.") for stored, own in sorted(blocks) if stored != own]
    if any("gate_up_proj" in experts._modules for _, experts in _experts_modules(model)):
        parts = {"blocks": "weight", "scales": "scales", "bias": "bias"}
        rules += [
            (rf"\.experts\.{name}_{part}$", f".experts.{name}.{own}") for name in _FUSED for part, own in parts.items()
        ]
    return [WeightRenaming(*rule) for rule in rules]


def place_experts(model: nn.Module, stored: Iterable[str]) -> None:
    """Gives `model`, on the meta device, layers for what an MLX checkpoint stores in other ways than Transformers.

    Fused experts are unfused, but for those of gpt-oss as OpenAI stores them, in blocks: these are mode mxfp4 already,
    with the rows of gate and up in turns, and the module wants them so. Attention with a `kv_b_proj` gets the two
    layers that mlx_lm makes of it, `embed_q` and `unembed_out`, if these are stored.

    Args:
        stored: the names of the stored tensors, as they are in the model.
    """
    names = set(stored)
    for path, experts in _experts_modules(model):
        if f"{path}.gate_up_proj_blocks" in names:
            _place_blocks(experts)
    layers = (name.removesuffix(".weight") for name in names if name.endswith(".weight"))
    unfuse(model, [*_projections(model), *layers])
    for path, attention in model.named_modules():
        if f"{path}.embed_q.weight" in names and isinstance(getattr(attention, "kv_b_proj", None), nn.Linear):
            _split_kv_b(attention)


def _projections(model: nn.Module) -> Iterator[str]:
    """The paths that the projections of experts have, but for those of Llama 4, which may be stored in fused form."""
    for path, experts in _experts_modules(model):
        if not isinstance(experts, Llama4Experts):
            yield from (f"{path}.{name}" for name in _PROJECTIONS)


def place_routers(model: nn.Module, format_of: Callable[[str, nn.Module], dict[str, Any] | None]) -> None:
    """Lets the routers of `model`, on the meta device, hold packed weights until `finish_experts` unpacks them.

    Transformers' routers are no layers of their own, so they compute with floating-point weights.

    Args:
        format_of: called with the path and the module; the format, None for a router that is not quantized.
    """
    for path, _ in list(_experts_modules(model)):
        for router_path, router in _routers(model, path):
            if (format := format_of(router_path, router)) is not None:
                packed = _QuantizedModule(
                    tuple(router.weight.shape), **format, device="meta", dtype=router.weight.dtype
                )
                router._packed = {**format, "dtype": router.weight.dtype}
                for name, parameter in packed.named_parameters():
                    router.register_parameter(name, parameter)


def finish_experts(model: nn.Module) -> None:
    """Fuses floating-point experts, and unpacks what Transformers computes with in floating point; see `place_experts`
    and `place_routers`. To be called with the tensors in place.

    Raises:
        ValueError: the scales of a router are not finite numbers.
    """
    for path, module in list(model.named_modules()):
        if (packed := module.__dict__.pop("_packed", None)) is not None:
            weight = dequantize(module.weight, module.scales, module._parameters.pop("biases", None), **packed)
            if not weight.isfinite().all():
                raise ValueError(f"[from_pretrained] {path}.scales has values that are not finite numbers")
            del module.scales
            module.weight = nn.Parameter(weight, requires_grad=False)
        if isinstance(module, QuantizedSwitchLinear) and module.weight_packed.dim() == 4:
            module.weight = frozen(_words_of_blocks(module.weight_packed))
        if "_kv_b_dtype" in module.__dict__:
            _join_kv_b(module)
    fuse(model)


def _routers(model: nn.Module, experts_path: str) -> Iterator[tuple[str, nn.Module]]:
    """The modules beside the experts that have a matrix of their own and are no ordinary layers."""
    block = experts_path.rpartition(".")[0]
    for name, module in model.get_submodule(block).named_children():
        weight = module._parameters.get("weight")
        ordinary = type(module) is nn.Linear or isinstance(module, (nn.Embedding, _QuantizedModule))
        if weight is not None and weight.dim() == 2 and not ordinary:
            yield f"{block}.{name}" if block else name, module


def _place_blocks(experts: nn.Module) -> None:
    for name in _FUSED:
        weight, bias = experts._parameters.pop(name), experts._parameters.pop(f"{name}_bias")
        linear = SwitchLinear(weight.mT if experts.is_transposed else weight, bias)
        layer = QuantizedSwitchLinear.shell(linear, weight.dtype, mode="mxfp4")
        layer.weight = frozen(torch.empty(*layer.scales.shape, 16, dtype=torch.uint8, device="meta"))
        setattr(experts, name, layer)
    experts._is_hf_initialized = True


def _words_of_blocks(blocks: torch.Tensor) -> torch.Tensor:
    """Blocks uint8 [num_experts, rows, groups, 16] as words uint32 [num_experts, rows, groups * 4], without a copy.

    16 bytes hold 32 values, the even ones in their low halves: the order of MLX's words.
    """
    flat = blocks.detach().flatten(-2)
    return (flat.clone() if flat.data_ptr() % 4 else flat).view(torch.uint32)


def _split_kv_b(attention: nn.Module) -> None:
    weight = attention.kv_b_proj.weight
    heads, rank = attention.num_heads, weight.shape[1]
    nope, value = attention.qk_nope_head_dim, attention.v_head_dim
    attention.embed_q = SwitchLinear(weight.new_empty(heads, rank, nope))
    attention.unembed_out = SwitchLinear(weight.new_empty(heads, value, rank))
    attention._kv_b_dtype = weight.dtype
    del attention.kv_b_proj


def _join_kv_b(attention: nn.Module) -> None:
    """`embed_q` has the transposed matrices of the keys, `unembed_out` those of the values, one of each to a head."""
    dtype = attention.__dict__.pop("_kv_b_dtype")
    keys, values = (_float_weight(getattr(attention, name), dtype) for name in ("embed_q", "unembed_out"))
    weight = torch.cat((keys.mT, values), 1).flatten(0, 1)
    del attention.embed_q, attention.unembed_out
    attention.kv_b_proj = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    attention.kv_b_proj.weight = nn.Parameter(weight, requires_grad=False)


def _float_weight(layer: SwitchLinear | QuantizedSwitchLinear, dtype: torch.dtype) -> torch.Tensor:
    if isinstance(layer, SwitchLinear):
        return layer.weight.detach()
    return layer.packed().dequantize(dtype).detach()


def split_experts(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of `model`, by their names in it, as an MLX checkpoint has them.

    The experts get MLX's names; fused parameters become views of the projections, and nothing is copied. Other tensors
    pass through.
    """
    split = dict(tensors)
    for path, experts in _experts_modules(model):
        for part in ("weight", "scales", "biases", "bias"):
            if (tensor := split.pop(f"{path}.gate_up_proj.{part}", None)) is not None:
                halves = _halves(tensor, not experts.is_concatenated)
                split[f"{path}.gate_proj.{part}"], split[f"{path}.up_proj.{part}"] = halves
        if not isinstance(experts.down_proj, nn.Parameter):
            continue
        for name in _fused_names(experts):
            parts = {"weight": split.pop(f"{path}.{name}", None), "bias": split.pop(f"{path}.{name}_bias", None)}
            for part, tensor in parts.items():
                if tensor is None:
                    continue
                tensor = tensor.mT if part == "weight" and experts.is_transposed else tensor
                if name == "gate_up_proj":
                    halves = _halves(tensor, not experts.is_concatenated)
                    split[f"{path}.gate_proj.{part}"], split[f"{path}.up_proj.{part}"] = halves
                else:
                    split[f"{path}.{name}.{part}"] = tensor
    prefixes = _stored_prefixes(model)
    return {_renamed(name, prefixes): tensor for name, tensor in split.items()}


def stored_paths(model: nn.Module) -> Callable[[str], list[str]]:
    """A function from the path of a layer of `model` to those under which an MLX checkpoint has it: two for a
    `gate_up_proj`, else one."""
    prefixes = _stored_prefixes(model)

    def paths(path: str) -> list[str]:
        stored = _renamed(path, prefixes)
        head, _, name = stored.rpartition(".")
        return [f"{head}.gate_proj", f"{head}.up_proj"] if name == "gate_up_proj" else [stored]

    return paths


def _stored_prefixes(model: nn.Module) -> dict[str, str]:
    """MLX's path for that of each experts module, and of the block around it where that has another name."""
    prefixes = {}
    for path, experts in _experts_modules(model):
        family = getattr(getattr(experts, "config", None), "model_type", "")
        block, _, _ = path.rpartition(".")
        outer, _, name = block.rpartition(".")
        stored = ".".join(filter(None, (outer, _BLOCKS.get(family, name) if name == "mlp" else name)))
        prefixes[block] = stored
        name = "experts" if isinstance(experts, Llama4Experts) else _LAYERS.get(family, "switch_mlp")
        prefixes[path] = ".".join(filter(None, (stored, name)))
    return prefixes


def _renamed(name: str, prefixes: Mapping[str, str]) -> str:
    """`name` with the longest of its dotted prefixes that has another name replaced by it."""
    head = name
    while head:
        if head in prefixes:
            return prefixes[head] + name[len(head) :]
        head = head.rpartition(".")[0]
    return name
