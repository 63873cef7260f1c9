"""Qwen2-MoE, Qwen3-MoE and OLMoE: the experts of a layer are `mlp.switch_mlp` in an MLX checkpoint."""

from .family import Family


class Qwen3MoE(Family):
    also = ("qwen2_moe", "olmoe")
    experts = "mlp.switch_mlp"
