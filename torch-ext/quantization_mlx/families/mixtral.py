"""Mixtral and its like: `mlp` of Transformers is `block_sparse_moe` in an MLX checkpoint."""

from .family import Family


class Mixtral(Family):
    also = ("phimoe", "minimax_m2")
    experts = "block_sparse_moe.switch_mlp"
