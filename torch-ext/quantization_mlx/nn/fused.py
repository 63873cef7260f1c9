"""Modules that hold the experts of a layer in fused parameters, as those of Transformers do, and their layers.

The fused parameters are `gate_up_proj` [num_experts, 2 * intermediate_size, hidden_size] (or `up_proj` without a gate),
`down_proj` and maybe biases; some models store them transposed, or the rows of gate and up in turns. MLX has one layer
for each of the three projections. The module stays, and MLX's three layers become its children, so that names, formats
and memory are those of the checkpoint.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import nn
from torch.nn.utils import parametrize

from .obstacles import hooks_that_stay, move_hooks
from .switch import SwitchLinear

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
FUSED = ("gate_up_proj", "down_proj")


def experts_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The paths of the modules that Transformers' decorator for experts has marked, and these."""
    for path, module in model.named_modules():
        if all(hasattr(module, name) for name in ("is_transposed", "is_concatenated", "has_gate", "down_proj")):
            yield path, module


def fused_names(experts: nn.Module) -> tuple[str, str]:
    return "gate_up_proj" if getattr(experts, "has_gate", True) else "up_proj", "down_proj"


def can_be_unfused(experts: nn.Module) -> bool:
    """Whether its fused parameters are ordinary ones, and its forward is that of its class."""
    names = fused_names(experts)
    held = [experts._parameters.get(name) for name in names]
    ordinary = all(type(each) is nn.Parameter and each.layout is torch.strided for each in held)
    as_its_class = "forward" not in vars(experts) and not parametrize.is_parametrized(experts)
    return ordinary and as_its_class and hooks_that_stay(experts) is None


def joined(gate: torch.Tensor, up: torch.Tensor, dim: int, in_turns: bool) -> torch.Tensor:
    """Rows of gate, then of up, along the dimension `dim`, or both in turns."""
    if in_turns:
        dim %= gate.dim()
        return torch.stack((gate, up), dim + 1).flatten(dim, dim + 1)
    return torch.cat((gate, up), dim)


def halves(tensor: torch.Tensor, in_turns: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of the rows of gate and of up in [num_experts, 2 * intermediate_size, ...]."""
    gate, up = (tensor[:, ::2], tensor[:, 1::2]) if in_turns else tensor.chunk(2, 1)
    return gate, up


def unfuse_experts(experts: nn.Module) -> None:
    for name in fused_names(experts):
        origin = {key: experts._parameters.pop(key) for key in (name, f"{name}_bias") if key in experts._parameters}
        weight, bias = origin[name].detach(), origin[f"{name}_bias"].detach() if f"{name}_bias" in origin else None
        weight = weight.mT if experts.is_transposed else weight
        parts = [(name, weight, bias)]
        if name == "gate_up_proj":
            in_turns = not experts.is_concatenated
            biases = (None, None) if bias is None else halves(bias, in_turns)
            parts = zip(("gate_proj", "up_proj"), halves(weight, in_turns), biases, strict=True)
        for part, *tensors in parts:
            layer = SwitchLinear(*tensors).train(experts.training)
            layer.requires_grad_(origin[name].requires_grad)
            # A view keeps its fused parameters alive. On the meta device there is nothing to keep.
            layer.origin = {} if weight.is_meta else origin
            setattr(experts, part, layer)
    experts._is_hf_initialized = True  # else Transformers initialises the fused parameters


def fuse_experts(experts: nn.Module, layers: Mapping[str, SwitchLinear]) -> None:
    for name in layers:
        del experts._modules[name]
    for name in fused_names(experts):
        parts = [layers[part] for part in ((name,) if name in layers else ("gate_proj", "up_proj"))]
        for key, parameter in (parts[0].origin or _joined_parameters(experts, name, parts)).items():
            experts.register_parameter(key, parameter)


def _joined_parameters(experts: nn.Module, name: str, parts: list[SwitchLinear]) -> dict[str, nn.Parameter]:
    """The fused parameters of layers that have come by other weights."""
    in_turns = not experts.is_concatenated
    fused = {}
    for key, attribute in ((name, "weight"), (f"{name}_bias", "bias")):
        tensors = [getattr(part, attribute) for part in parts]
        if tensors[0] is None:
            continue
        tensor = tensors[0].detach() if len(parts) == 1 else joined(*(each.detach() for each in tensors), 1, in_turns)
        tensor = tensor.mT.contiguous() if attribute == "weight" and experts.is_transposed else tensor
        fused[key] = nn.Parameter(tensor, requires_grad=tensors[0].requires_grad)
    return fused


def detach(layer: SwitchLinear) -> None:
    """Lets go of the fused parameters, of which `layer` remains alone."""
    if not layer.origin:
        return
    layer.origin = {}
    for name, parameter in list(layer.named_parameters()):
        own = parameter.detach().clone(memory_format=torch.contiguous_format)
        setattr(layer, name, nn.Parameter(own, requires_grad=parameter.requires_grad))


def experts_mlp(
    experts: nn.Module, x: torch.Tensor, indices: torch.Tensor, sorted_indices: bool = False
) -> torch.Tensor:
    """x [*batch, hidden_size] -> [*indices.shape, hidden_size], before the router's weights."""
    if not experts.has_gate:
        inner = experts.act_fn(experts.up_proj(x, indices, sorted_indices))
    elif "gate_up_proj" in experts._modules:
        inner = experts._apply_gate(experts.gate_up_proj(x, indices, sorted_indices))
    else:
        halves = (layer(x, indices, sorted_indices) for layer in (experts.gate_proj, experts.up_proj))
        inner = experts._apply_gate(joined(*halves, dim=-1, in_turns=not experts.is_concatenated))
    y = experts.down_proj(inner, indices, sorted_indices)
    return experts.post_expert_norm(y) if experts.has_post_expert_norm else y


class StandIn(nn.Module):
    """Takes the place of a module of experts whose forward pass reads its fused parameters, while these are layers.

    stands_for: the name of its class. model_type: of its config.

    Args:
        experts: the module; its parameters move over, until `give_back`.
    """

    is_transposed = is_concatenated = has_gate = True
    has_post_expert_norm = False
    stands_for: str
    model_type: str

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.num_experts, self.hidden_size, self.act_fn = experts.num_experts, experts.hidden_size, experts.act_fn
        for name in FUSED:
            self.register_parameter(name, experts._parameters.pop(name))
        move_hooks(experts, self)  # which shares the tables
        self._stood_in_for = (experts,)  # in a tuple, so that it is no child
        self.train(experts.training)

    def give_back(self) -> nn.Module:
        """The module whose place this one took, with its parameters."""
        (experts,) = self._stood_in_for
        for name in FUSED:
            experts.register_parameter(name, self._parameters.pop(name))
        return experts
