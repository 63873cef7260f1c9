"""Models in memory are quantized and made floating-point again."""
