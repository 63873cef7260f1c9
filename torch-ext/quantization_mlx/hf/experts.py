"""Transformers' modules of experts: how they run on our layers, and what MLX checkpoints call these.

While a model is built for a checkpoint, on the meta device, `place_experts` gives it what the checkpoint stores, and
after the tensors are loaded `finish_experts` makes of that what the model computes with.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ..families import EVERY_FAMILY, family_of
from ..formats import Format
from ..nn import fused
from ..nn.module import QuantizedModule
from ..nn.switch import SwitchLinear
from ..ops import dequantize
from . import compat

IMPLEMENTATION = "quantization_mlx"  # the name under which Transformers knows `experts_forward`

FormatOf = Callable[[str, nn.Module], Format | None]  # of a path and a layer; None if it is not quantized
_PARTS = ("weight", "scales", "biases", "bias")  # the names of a layer's tensors

# The forward pass


def register_experts() -> None:
    """Makes `experts_forward` known to Transformers as the experts implementation "quantization_mlx"; may be repeated.
    Raises ImportError if transformers is not installed."""
    _transformers_experts().register(IMPLEMENTATION, experts_forward)


def use_experts(model: nn.Module) -> None:
    """Makes the experts modules in `model` that hold our layers run through `experts_forward`, once all layers are in
    place. Others run as Transformers runs them by default."""
    ours = [
        module
        for _, module in fused.experts_modules(model)
        if isinstance(module.down_proj, nn.Module) and not isinstance(module, fused.StandIn)
    ]
    if not ours:
        return
    register_experts()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation(IMPLEMENTATION)
    for experts in ours:
        # Not a PreTrainedModel, or Transformers could not read the class's source.
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
    y = fused.experts_mlp(experts, hidden_states.unsqueeze(1), top_k_index)
    return (y * top_k_weights.unsqueeze(-1)).sum(1).to(hidden_states.dtype)


def _transformers_experts() -> Any:
    compat.require("transformers")
    compat.check("experts")
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    return ALL_EXPERTS_FUNCTIONS


# Fused parameters and layers


def unfuse(model: nn.Module, among: Iterable[str] | None = None) -> None:
    """Puts a `SwitchLinear` in the place of each projection of the fused experts in `model`, to be replaced.

    The paths are `….experts.gate_proj`, `up_proj` and `down_proj`; the weights are views of the fused parameters,
    [num_experts, out_features, in_features] however these are stored. `fuse` has to follow. Experts of which no
    projection is in `among` stay fused, unless that is None. Raises ImportError if Transformers marks experts in
    another way than in the tested versions.
    """
    if any(type(module).__module__.startswith("transformers.") for module in model.modules()):
        compat.check("experts")
    wanted = None if among is None else set(among)

    def is_wanted(path: str) -> bool:
        return wanted is None or any(f"{path}.{name}" in wanted for name in fused.PROJECTIONS)

    stand_ins = {each.stand_in.stands_for: each.stand_in for each in EVERY_FAMILY if each.stand_in is not None}
    for path, module in list(model.named_modules()):
        stand_in = stand_ins.get(type(module).__name__)
        if path and stand_in is not None and is_wanted(path) and fused.can_be_unfused(module):
            model.set_submodule(path, stand_in(module))
    for path, experts in fused.experts_modules(model):
        if is_wanted(path) and fused.can_be_unfused(experts):
            fused.unfuse_experts(experts)


def fuse(model: nn.Module) -> None:
    """Gives the experts modules of `model` whose layers are all floating-point ones their fused parameters back; the
    others run through `experts_forward` from now on."""
    for path, experts in list(fused.experts_modules(model)):
        names = dict.fromkeys((*fused.PROJECTIONS, *fused.FUSED))
        layers = {name: experts._modules[name] for name in names if name in experts._modules}
        if not layers:
            continue
        if all(type(layer) is SwitchLinear for layer in layers.values()):
            fused.fuse_experts(experts, layers)
            if isinstance(experts, fused.StandIn):
                model.set_submodule(path, experts.give_back())
        else:
            for layer in layers.values():
                if type(layer) is SwitchLinear:
                    fused.detach(layer)
    use_experts(model)


# MLX checkpoints


def expert_renamings(model: nn.Module) -> list[Any]:
    """The rules of Transformers (`WeightRenaming`) that turn MLX's names of experts into those of `model`."""
    from transformers.core_model_loading import WeightRenaming

    renamed = {stored: own for own, stored in _stored_prefixes(model).items()}
    blocks = {(s.rpartition(".")[2], o.rpartition(".")[2]) for s, o in renamed.items()}
    rules = [(rf"\.{stored}\.", f".{own}.") for stored, own in sorted(blocks) if stored != own]
    rules += [rule for family in EVERY_FAMILY for rule in family.renamings(model)]
    return [WeightRenaming(*rule) for rule in rules]


def place_experts(model: nn.Module, stored: Iterable[str]) -> None:
    """Gives `model`, on the meta device, layers for what an MLX checkpoint stores in other ways than Transformers:
    fused experts are unfused, and each family may place layers of its own. `stored` has the tensors' names in the
    model."""
    names = set(stored)
    for path, module in list(model.named_modules()):
        for family in EVERY_FAMILY:
            family.place(path, module, names)
    layers = (name.removesuffix(".weight") for name in names if name.endswith(".weight"))
    # What a stand-in stands for may be stored in fused form.
    experts = (path for path, module in fused.experts_modules(model) if not isinstance(module, fused.StandIn))
    unfuse(model, [*layers, *(f"{path}.{name}" for path in experts for name in fused.PROJECTIONS)])


def place_routers(model: nn.Module, format_of: FormatOf) -> None:
    """Lets the routers of `model`, on the meta device, hold packed weights until `finish_experts` unpacks them: they
    are no layers of their own in Transformers, and compute with floating-point weights."""
    for path, _ in list(fused.experts_modules(model)):
        for router_path, router in _routers(model, path):
            if (format := format_of(router_path, router)) is not None:
                packed = QuantizedModule(tuple(router.weight.shape), **format, device="meta", dtype=router.weight.dtype)
                router._packed = {**format, "dtype": router.weight.dtype}
                for name, parameter in packed.named_parameters():
                    router.register_parameter(name, parameter)


def is_packed_router(module: nn.Module) -> bool:
    """Whether `place_routers` has given it packed weights."""
    return "_packed" in vars(module)


def finish_experts(model: nn.Module) -> None:
    """Fuses floating-point experts, and unpacks what Transformers computes with in floating point; see `place_experts`
    and `place_routers`. To be called with the tensors in place. Raises ValueError if the scales of a router are not
    finite numbers."""
    for path, module in list(model.named_modules()):
        if (packed := module.__dict__.pop("_packed", None)) is not None:
            weight = dequantize(module.weight, module.scales, module._parameters.pop("biases", None), **packed)
            if not weight.isfinite().all():
                raise ValueError(f"[from_pretrained] {path}.scales has values that are not finite numbers")
            del module.scales
            module.weight = nn.Parameter(weight, requires_grad=False)
        for family in EVERY_FAMILY:
            family.finish(module)
    fuse(model)


def _routers(model: nn.Module, experts_path: str) -> Iterator[tuple[str, nn.Module]]:
    """The modules beside the experts that have a matrix of their own and are no ordinary layers."""
    block = experts_path.rpartition(".")[0]
    for name, module in model.get_submodule(block).named_children():
        weight = module._parameters.get("weight")
        ordinary = type(module) is nn.Linear or isinstance(module, (nn.Embedding, QuantizedModule))
        if weight is not None and weight.dim() == 2 and not ordinary:
            yield f"{block}.{name}" if block else name, module


def split_experts(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of `model`, by their names in it, as an MLX checkpoint has them: the experts get MLX's names, fused
    parameters become views of the projections, nothing is copied, and other tensors pass through."""
    split = dict(tensors)
    for path, experts in fused.experts_modules(model):
        for name in fused.fused_names(experts):
            # Either a packed layer's tensors, or a parameter and its bias.
            for part, key in (
                *((part, f"{name}.{part}") for part in _PARTS),
                ("weight", name),
                ("bias", f"{name}_bias"),
            ):
                if (tensor := split.pop(f"{path}.{key}", None)) is None:
                    continue
                if key == name and experts.is_transposed:
                    tensor = tensor.mT
                if name == "gate_up_proj":
                    gate, up = fused.halves(tensor, not experts.is_concatenated)
                    split[f"{path}.gate_proj.{part}"], split[f"{path}.up_proj.{part}"] = gate, up
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
    for path, experts in fused.experts_modules(model):
        family = family_of(experts if hasattr(experts, "config") else getattr(experts, "model_type", ""))
        own_block, _, layers = family.experts.rpartition(".")
        block, _, _ = path.rpartition(".")
        outer, _, name = block.rpartition(".")
        prefixes[block] = ".".join(filter(None, (outer, own_block if name == "mlp" else name)))
        prefixes[path] = ".".join(filter(None, (prefixes[block], layers)))
    return prefixes


def _renamed(name: str, prefixes: Mapping[str, str]) -> str:
    """`name` with the longest of its dotted prefixes that has another name replaced by it."""
    head = name
    while head:
        if head in prefixes:
            return prefixes[head] + name[len(head) :]
        head = head.rpartition(".")[0]
    return name
