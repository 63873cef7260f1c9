"""Checkpoints of other quantizers into MLX checkpoints."""
