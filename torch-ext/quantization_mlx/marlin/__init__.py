"""Marlin's interface: weights packed by columns, the products that its documentation names, layers and models."""

from .attention import MetalAttention
from .block import MetalTransformerBlock
from .cache import KVCacheTorch, MetalKVCache, MetalKVCacheConfig
from .deprecated import MetalGenerationConfig, MetalGLM47Model, QuantizedLlamaLayer, QuantizedModel
from .dispatch import MetalBuffer, dispatch_kernel, metal_buffer_to_numpy, mps_tensor_to_metal_buffer
from .functions import (
    benchmark_dequant_fp4,
    dispatch_dequant_fp4,
    dispatch_gemm_fp4,
    dispatch_gemm_fp8,
    dispatch_gemm_int2,
    marlin_gemm_fp4,
    marlin_gemm_int4,
    pack_fp4_weights,
    pack_fp8_weights,
    pack_int2_weights,
    pack_int4_sym_weights,
    pack_int4_weights,
)
from .generate import CacheFullError, CausalLM, GenerationConfig, generate_stream
from .latent_attention import MetalMLAAttention
from .layers import ColumnPackedLinear, MarlinLinear, MetalQuantizedLinear
from .library import MetalKernelLibrary, get_default_library
from .mixture import MetalMoELayer
from .mlp import MetalMLP
from .models import ReplacementStats, load_and_quantize, quantize_model, replace_linear_layers
from .moe_dispatch import dispatch_moe_decode, dispatch_moe_optimized
from .parts import Rotary
from .pipelines import MarlinPipeline, TransformersMarlinPipeline
from .sampler import MetalSampler
from .saved import load_quantized, save_quantized
from .vision import VisionMetal, preprocess_for_vit

__all__ = [
    "CacheFullError",
    "CausalLM",
    "ColumnPackedLinear",
    "GenerationConfig",
    "KVCacheTorch",
    "MarlinLinear",
    "MarlinPipeline",
    "MetalAttention",
    "MetalBuffer",
    "MetalGLM47Model",
    "MetalGenerationConfig",
    "MetalKVCache",
    "MetalKVCacheConfig",
    "MetalKernelLibrary",
    "MetalMLAAttention",
    "MetalMLP",
    "MetalMoELayer",
    "MetalQuantizedLinear",
    "MetalSampler",
    "MetalTransformerBlock",
    "QuantizedLlamaLayer",
    "QuantizedModel",
    "ReplacementStats",
    "Rotary",
    "TransformersMarlinPipeline",
    "VisionMetal",
    "benchmark_dequant_fp4",
    "dispatch_dequant_fp4",
    "dispatch_gemm_fp4",
    "dispatch_gemm_fp8",
    "dispatch_gemm_int2",
    "dispatch_kernel",
    "dispatch_moe_decode",
    "dispatch_moe_optimized",
    "generate_stream",
    "get_default_library",
    "load_and_quantize",
    "load_quantized",
    "marlin_gemm_fp4",
    "marlin_gemm_int4",
    "metal_buffer_to_numpy",
    "mps_tensor_to_metal_buffer",
    "pack_fp4_weights",
    "pack_fp8_weights",
    "pack_int2_weights",
    "pack_int4_sym_weights",
    "pack_int4_weights",
    "preprocess_for_vit",
    "quantize_model",
    "replace_linear_layers",
    "save_quantized",
]
