"""Mixtures of experts: layers of one matrix per expert, and their place in Transformers and in MLX checkpoints.

Transformers holds all experts of a layer in one module with fused parameters: `gate_up_proj` [num_experts, 2 *
intermediate_size, hidden_size] (or `up_proj` without a gate), `down_proj` and maybe biases; some models store them
transposed, or the rows of gate and up in turns. MLX has one layer for each of the three projections. Here the module
of Transformers stays, and MLX's three layers are its children, so that names, formats and memory are those of the
checkpoint; `experts_forward` runs them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ._ops import ops
from .modules import _frozen, _QuantizedModule, format_of_tensors
from .ops import dequantize, quantize

IMPLEMENTATION = "quantization_mlx"  # the name under which Transformers knows `experts_forward`

_gather_qmm = ops.gather_qmm.default

# Layers


class SwitchLinear(nn.Module):
    """A linear map for each expert, in floating point: `weight` [num_experts, out_features, in_features] and `bias`
    [num_experts, out_features] or None. It reads indices on the host, so a compiled graph breaks here.

    Args:
        weight, bias: the parameters; they may be views of fused ones.
    """

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


class QuantizedSwitchLinear(_QuantizedModule):
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
        """Quantizes `linear`, one expert after the other; a bias is copied."""
        module = cls.shell(linear, group_size=group_size, bits=bits, mode=mode)
        module._pack(linear.weight)
        if linear.bias is not None:
            module.bias = nn.Parameter(linear.bias.detach().clone(), requires_grad=linear.bias.requires_grad)
        return module.train(linear.training)

    def _pack(self, weight: torch.Tensor) -> None:
        # One at a time, because quantizing copies what is not contiguous.
        packed = [quantize(matrix, self.group_size, self.bits, self.mode) for matrix in weight.detach()]
        for name, tensors in zip(("weight", "scales", "biases"), zip(*packed, strict=True), strict=False):
            setattr(self, name, _frozen(torch.stack(tensors)))

    def forward(self, x: torch.Tensor, indices: torch.Tensor, sorted_indices: bool = False) -> torch.Tensor:
        """Row i of x times the matrix of expert indices[i].

        Args:
            x: [*batch, in_features], whose batch broadcasts with the shape of indices and has as many dimensions.
            indices: the experts, int32 or int64.
            sorted_indices: a promise that indices ascend, as in `gather_qmm`.

        Returns:
            [*indices.shape, out_features], of x's dtype promoted with that of the scales and the bias.
        """
        y = _gather_qmm(
            x.unsqueeze(-2),
            self.weight,
            self.scales,
            self.biases,
            None,
            indices,
            True,
            self.group_size,
            self.bits,
            self.mode,
            None,
            sorted_indices=sorted_indices,
        ).squeeze(-2)
        return y if self.bias is None else y + self.bias[indices]

    def extra_repr(self) -> str:
        return (
            f"{self.num_experts}, in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, {super().extra_repr()}"
        )


# The forward pass in Transformers


def register_experts() -> None:
    """Makes `experts_forward` known to Transformers as the experts implementation "quantization_mlx"; may be repeated.

    Raises:
        ImportError: transformers is not installed.
    """
    _transformers_experts().register(IMPLEMENTATION, experts_forward)


def use_experts(model: nn.Module) -> None:
    """Makes the experts modules in `model` that hold our layers run through `experts_forward`.

    To be called when all layers are in place; `unfused` does. Other experts modules of the model run as Transformers
    runs them by default.
    """
    ours = [module for _, module in _experts_modules(model) if isinstance(module.down_proj, nn.Module)]
    if not ours:
        return
    register_experts()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation(IMPLEMENTATION)
    for experts in ours:
        # A model that is no PreTrainedModel, or whose class's source Transformers cannot read.
        if experts.config._experts_implementation != IMPLEMENTATION:
            experts.config._experts_implementation = IMPLEMENTATION
        # Nothing is left in it that Transformers could initialise.
        experts._is_hf_initialized = True


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
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    except ImportError as error:
        raise ImportError('experts need transformers: pip install "quantization-mlx[transformers]"') from error
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


def _experts_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The paths of the modules that Transformers' decorator for experts has marked, and these."""
    for path, module in model.named_modules():
        if all(hasattr(module, name) for name in ("is_transposed", "is_concatenated", "has_gate", "down_proj")):
            yield path, module


@contextmanager
def unfused(model: nn.Module, keep_gate_up: bool = False) -> Iterator[None]:
    """Within the context, fused experts of `model` appear as `SwitchLinear` layers, which may be replaced.

    Their paths are `….experts.gate_proj`, `up_proj` and `down_proj`, or, with keep_gate_up, `gate_up_proj` and
    `down_proj`; their weights are views of the fused parameters, [num_experts, out_features, in_features] however
    these are stored. Afterwards a module of which no layer was replaced has its fused parameters back, and the others
    run through `experts_forward`.

    To build a model for a checkpoint, on device "meta": within the context, put `QuantizedSwitchLinear.shell(layer,
    dtype, **format)` in the place of each layer that is quantized, where `stored_paths` tells under which name the
    checkpoint has it; then `merge_experts` gives the checkpoint's tensors the names of that model.
    """
    modules = [module for _, module in _experts_modules(model) if isinstance(module.down_proj, nn.Parameter)]
    for experts in modules:
        _unfuse(experts, keep_gate_up)
    try:
        yield
    finally:
        for experts in modules:
            layers = [getattr(experts, name) for name in _PROJECTIONS if name in experts._modules]
            whole = all(type(layer) is SwitchLinear for layer in layers)
            for layer in layers:
                if whole:
                    _restore(experts, layer)
                elif type(layer) is SwitchLinear:
                    _detach(layer)
        use_experts(model)


_PROJECTIONS = ("gate_up_proj", "gate_proj", "up_proj", "down_proj")


def _unfuse(experts: nn.Module, keep_gate_up: bool) -> None:
    for name in ("gate_up_proj" if experts.has_gate else "up_proj", "down_proj"):
        origin = {key: experts._parameters.pop(key) for key in (name, f"{name}_bias") if key in experts._parameters}
        weight, bias = origin[name].detach(), origin.get(f"{name}_bias")
        weight = weight.mT if experts.is_transposed else weight
        parts = {name: (weight, None if bias is None else bias.detach())}
        if name == "gate_up_proj" and not keep_gate_up:
            weights = _halves(weight, not experts.is_concatenated)
            biases = (None, None) if bias is None else _halves(bias.detach(), not experts.is_concatenated)
            parts = dict(zip(("gate_proj", "up_proj"), zip(weights, biases, strict=True), strict=True))
        for part, tensors in parts.items():
            layer = SwitchLinear(*tensors).train(experts.training)
            layer.requires_grad_(origin[name].requires_grad)
            layer._origin = origin  # holds the fused parameters no longer than their last view
            setattr(experts, part, layer)


def _restore(experts: nn.Module, layer: SwitchLinear) -> None:
    """Puts the fused parameters back that `layer` is a part of, which its siblings may have done before."""
    for name in [name for name, child in experts._modules.items() if child is layer]:
        del experts._modules[name]
    for name, parameter in layer._origin.items():
        experts.register_parameter(name, parameter)


def _detach(layer: SwitchLinear) -> None:
    """Lets go of the fused parameters, of which `layer` remains alone."""
    del layer._origin
    for name, parameter in list(layer.named_parameters()):
        own = parameter.detach().clone(memory_format=torch.contiguous_format)
        setattr(layer, name, nn.Parameter(own, requires_grad=parameter.requires_grad))


# Names and tensors of MLX checkpoints

# Where mlx_lm's model has the experts: the name of the block, where that is not Transformers' "mlp", and of the layers
# in it; by model_type.
_BLOCKS = {"mixtral": "block_sparse_moe", "phimoe": "block_sparse_moe", "minimax_m2": "block_sparse_moe"}
_LAYERS = {"gpt_oss": "experts", "dots1": "experts", "afmoe": "experts"}


def stored_paths(model: nn.Module, path: str) -> list[str]:
    """The paths under which an MLX checkpoint has the layer at `path` of the model: two for a `gate_up_proj`."""
    stored = _renamed(path, _stored_prefixes(model))
    head, _, last = stored.rpartition(".")
    return [f"{head}.gate_proj", f"{head}.up_proj"] if last == "gate_up_proj" else [stored]


def merge_experts(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of an MLX checkpoint with mixtures of experts, named and shaped as `model` wants them.

    - `….switch_mlp.{gate,up,down}_proj.*` (or what the family calls it) becomes `….experts.*`, without a copy;
    - floating-point projections of a module that has fused parameters are fused;
    - a quantized router becomes a floating-point one, since Transformers' routers are no layers of their own;
    - gpt-oss as OpenAI stores it, `….experts.{gate_up,down}_proj_{blocks,scales,bias}`, becomes `….experts.{gate_up,
      down}_proj.{weight,scales,bias}` in mode mxfp4: views, without a copy, for a model unfused with keep_gate_up.

    Other tensors pass through. Nothing is checked here: a name that the model does not have stays one.

    Args:
        model: on any device, its quantized layers in place (see `unfused`).
        tensors: by the checkpoint's names.
    """
    names = {stored: own for own, stored in _stored_prefixes(model).items()}
    merged = {_renamed(name, names): tensor for name, tensor in tensors.items()}
    for path, experts in _experts_modules(model):
        if isinstance(experts.down_proj, nn.Parameter):
            _fuse(merged, path, experts)
        else:
            _view_blocks(merged, path)
        for router_path, router in _routers(model, path):
            _dequantize_router(merged, router_path, router)
    return merged


def split_experts(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The opposite of `merge_experts`: the model's tensors, by its own names, as an MLX checkpoint has them.

    Fused experts, quantized or not, become views of their projections; nothing is copied.
    """
    split: dict[str, torch.Tensor] = dict(tensors)
    for path, experts in _experts_modules(model):
        fused = isinstance(experts.down_proj, nn.Parameter)
        for name in ("gate_up_proj", "up_proj", "down_proj"):
            if fused and f"{path}.{name}" in split:
                weight = split.pop(f"{path}.{name}")
                split[f"{path}.{name}.weight"] = weight.mT if experts.is_transposed else weight
                if f"{path}.{name}_bias" in split:
                    split[f"{path}.{name}.bias"] = split.pop(f"{path}.{name}_bias")
        for part in ("weight", "scales", "biases", "bias"):
            if (tensor := split.pop(f"{path}.gate_up_proj.{part}", None)) is not None:
                halves = _halves(tensor, not experts.is_concatenated)
                split[f"{path}.gate_proj.{part}"], split[f"{path}.up_proj.{part}"] = halves
    prefixes = _stored_prefixes(model)
    return {_renamed(name, prefixes): tensor for name, tensor in split.items()}


def _stored_prefixes(model: nn.Module) -> dict[str, str]:
    """MLX's path for that of each experts module, and of the block around it where that has another name."""
    prefixes = {}
    for path, experts in _experts_modules(model):
        family = getattr(getattr(experts, "config", None), "model_type", "")
        block, _, _ = path.rpartition(".")
        outer, _, name = block.rpartition(".")
        stored = ".".join(filter(None, (outer, _BLOCKS.get(family, name) if name == "mlp" else name)))
        prefixes[block] = stored
        prefixes[path] = ".".join(filter(None, (stored, _LAYERS.get(family, "switch_mlp"))))
    return prefixes


def _renamed(name: str, prefixes: Mapping[str, str]) -> str:
    """`name` with the longest of its dotted prefixes that has another name replaced by it."""
    head = name
    while head:
        if head in prefixes:
            return prefixes[head] + name[len(head) :]
        head = head.rpartition(".")[0]
    return name


def _fuse(tensors: dict[str, torch.Tensor], path: str, experts: nn.Module) -> None:
    in_turns = not experts.is_concatenated
    if f"{path}.gate_proj.weight" in tensors and f"{path}.up_proj.weight" in tensors:
        for part in ("weight", "bias"):
            halves = [tensors.pop(f"{path}.{name}.{part}", None) for name in ("gate_proj", "up_proj")]
            if halves[0] is not None and halves[1] is not None:
                tensors[f"{path}.gate_up_proj.{part}"] = _joined(*halves, 1, in_turns)
    for name in ("gate_up_proj", "up_proj", "down_proj"):
        if (weight := tensors.pop(f"{path}.{name}.weight", None)) is not None:
            tensors[f"{path}.{name}"] = weight.mT.contiguous() if experts.is_transposed else weight
        if (bias := tensors.pop(f"{path}.{name}.bias", None)) is not None:
            tensors[f"{path}.{name}_bias"] = bias


def _view_blocks(tensors: dict[str, torch.Tensor], path: str) -> None:
    for name in ("gate_up_proj", "down_proj"):
        if (blocks := tensors.pop(f"{path}.{name}_blocks", None)) is not None:
            # 16 bytes hold 32 values, the even ones in the low halves: the order of MLX's words.
            tensors[f"{path}.{name}.weight"] = blocks.flatten(-2).view(torch.uint32)
        for part in ("scales", "bias"):
            if (tensor := tensors.pop(f"{path}.{name}_{part}", None)) is not None:
                tensors[f"{path}.{name}.{part}"] = tensor


def _routers(model: nn.Module, experts_path: str) -> Iterator[tuple[str, nn.Module]]:
    """The modules beside the experts that have a matrix of their own and are no ordinary layers."""
    block = experts_path.rpartition(".")[0]
    for name, module in model.get_submodule(block).named_children():
        weight = module._parameters.get("weight")
        if (
            weight is not None
            and weight.dim() == 2
            and not isinstance(module, (nn.Linear, nn.Embedding, _QuantizedModule))
        ):
            yield f"{block}.{name}" if block else name, module


def _dequantize_router(tensors: dict[str, torch.Tensor], path: str, router: nn.Module) -> None:
    if (scales := tensors.get(f"{path}.scales")) is None or (weight := tensors.get(f"{path}.weight")) is None:
        return
    format = format_of_tensors(router.weight.shape[-1], weight, scales)
    packed = weight, tensors.pop(f"{path}.scales"), tensors.pop(f"{path}.biases", None)
    tensors[f"{path}.weight"] = dequantize(*packed, **format, dtype=router.weight.dtype)
