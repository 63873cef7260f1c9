"""Images for vision models, by the names documented for metal_marlin."""

from .vision_metal import VisionMetal, preprocess_for_vit

__all__ = ["VisionMetal", "preprocess_for_vit"]
