"""Transformers, PEFT and accelerate."""
