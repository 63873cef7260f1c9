"""What a family of models can say about itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..nn.fused import StandIn

FAMILIES: dict[str, Family] = {}  # by the model_types in config.json


class Family:
    """Models of the `model_type` that is the name of the file with their subclass. The defaults are what most have.

    also: further model_types of the same models.
    experts: where an MLX checkpoint has the experts of a layer, stacked. The first part takes the place of "mlp", by
        which Transformers knows most blocks of router and experts; other names of blocks are the same in both.
    projections: MLX's names of the projections of an expert, by those in checkpoints that store each expert by itself.
    decoders: by model_type what the names of Transformers' classes begin with, where `prepare_for_generation` knows the
        layers.
    decoder_norms: of these layers, the names of the norms before attention and the MLP ("attention", "mlp") and of what
        these give ("attention_out", "mlp_out").
    norm_offset: what the model adds to the weights of its norms.
    rotates_by_type: whether its rotary embedding depends on the type of a layer.
    halves_angles: whether that gives each angle once, for the two elements that turn together.
    router: the name of the router beside the experts.
    routes_in_float32: whether that computes in float32 in a model of any dtype.
    stand_in: what takes the place of its modules of experts, if their forward pass reads fused parameters.
    """

    also: tuple[str, ...] = ()
    experts = "mlp.switch_mlp"
    projections: Mapping[str, str] = {
        **{name: name for name in ("gate_proj", "up_proj", "down_proj")},
        **{"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"},
    }
    decoders: Mapping[str, str] = {}
    decoder_norms: Mapping[str, str] = {"attention": "input_layernorm", "mlp": "post_attention_layernorm"}
    norm_offset: float = 0.0
    rotates_by_type: bool = False
    halves_angles: bool = False
    router: str = "gate"
    routes_in_float32: bool = False
    stand_in: type[StandIn] | None = None

    def __init_subclass__(cls) -> None:
        FAMILIES.update(dict.fromkeys((cls.__module__.rpartition(".")[2], *cls.also), cls()))

    # Loading: while the model is on the meta device, before and after the tensors are read

    def record(self, config: Any) -> Mapping[str, Any] | None:
        """The record of formats that stands for what the `config` of a model says in other words."""
        return None

    def place(self, path: str, module: nn.Module, stored: set[str]) -> None:
        """Gives a module the layers that a checkpoint has in other forms than the model, if it stores these names."""

    def finish(self, module: nn.Module) -> None:
        """Makes of what `place` has put there, and what has been read, what the model computes with."""

    def renamings(self, model: nn.Module) -> list[tuple[str, str]]:
        """Patterns of stored names and what replaces them, beyond those of experts, for what `place` has put there."""
        return []

    # Generating: mixtures of experts that `prepare_for_generation` knows

    def routing(self, router: nn.Module) -> Mapping[str, Any] | None:
        """How this router chooses experts: arguments of `fast.moe_router`, k among them; None if that cannot do it."""
        return None

    def gate(self, experts: nn.Module) -> Mapping[str, Any]:
        """Arguments of `fast.swiglu` for experts without an activation of their own."""
        return {}

    # The names and the layout of tensors, where an MLX checkpoint has others than Transformers

    def prefix(self, model: nn.Module) -> str | None:
        """What all names in an MLX checkpoint begin with, where those in the model do not."""
        return None

    def stored_name(self, model: nn.Module, name: str) -> str:
        """The name in an MLX checkpoint of a tensor or a layer of `model`."""
        return name

    def stored_tensors(self, model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors of `model`, by their names in it, as an MLX checkpoint has them; nothing is copied."""
        return dict(tensors)

    def complete_config(self, config: dict[str, Any]) -> None:
        """Adds to the content of config.json what MLX looks for in it."""
