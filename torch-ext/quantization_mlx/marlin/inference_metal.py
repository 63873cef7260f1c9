"""The names of `metal_marlin.inference_metal`."""

from .attention import MetalAttention
from .block import MetalTransformerBlock
from .cache import MetalKVCache, MetalKVCacheConfig
from .deprecated import MetalGenerationConfig, MetalGLM47Model
from .latent_attention import MetalMLAAttention
from .layers import MetalQuantizedLinear
from .mixture import MetalMoELayer

__all__ = [
    "MetalAttention",
    "MetalGLM47Model",
    "MetalGenerationConfig",
    "MetalKVCache",
    "MetalKVCacheConfig",
    "MetalMLAAttention",
    "MetalMoELayer",
    "MetalQuantizedLinear",
    "MetalTransformerBlock",
]
