"""MLX checkpoint directories."""
