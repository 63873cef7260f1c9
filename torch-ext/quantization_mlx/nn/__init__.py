"""Layers on packed weights."""
