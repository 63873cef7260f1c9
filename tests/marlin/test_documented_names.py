"""The documented names of metal_marlin: where they are, and their arguments, which ours may only add to."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from typing import Any

import pytest
import torch

from quantization_mlx import marlin

REQUIRED = inspect.Parameter.empty
# By module and name, the documented arguments in their order, with their defaults; those without one by name alone.
MLP = "hidden_size, num_heads, intermediate_size"
PACKED = {"bits": 4, "group_size": 128}
ROPE = {"rope_theta": 10000.0, "rope_ratio": 1.0, "max_position_embeddings": 4096}
FORWARD = {"attention_mask": None, "kv_cache": None, "layer_idx": 0}
MOE = {"num_experts": 64, "top_k": 4, "group_size": 128}
GEMM = "lib, A, B_packed, scales, M, N, K"
EXPERTS = "lib, activations, router_weights, expert_weights, expert_scales, shared_weights, shared_scales"
RULES = {"temperature": 0.7, "top_p": 0.9, "top_k": 50, "repetition_penalty": 1.1, "eos_token_id": 2}
SIGNATURES: dict[str, tuple[str, dict[str, Any]]] = {
    "marlin_gemm_fp4": ("A, B_packed, scales", {"group_size": 128}),
    "marlin_gemm_int4": ("A, B_packed, scales, zeros", {"group_size": 128}),
    "pack_fp4_weights": ("weights", {"group_size": 128}),
    "MarlinLinear": ("in_features, out_features", {"bias": True, "quant_type": "fp4", "group_size": 128}),
    "MarlinLinear.from_linear": ("linear", {}),
    "quantize_model": (
        "model",
        {"quant_type": "fp4", "group_size": 128, "skip_layers": {"lm_head", "embed_tokens"}},
    ),
    "replace_linear_layers": ("model", {**PACKED, "skip_layers": None, "layer_filter": None}),
    "load_and_quantize": ("model_id_or_path", {**PACKED, "device": "mps"}),
    "save_quantized": ("model, output_dir", {}),
    "load_quantized": ("path", {"device": "mps"}),
    "metal_dispatch.MetalKernelLibrary": ("", {"device": None}),
    "metal_dispatch.MetalKernelLibrary.from_source_dir": ("", {"src_dir": None}),
    "metal_dispatch.MetalKernelLibrary.compile_source": ("self, name, source", {}),
    "metal_dispatch.MetalKernelLibrary.get_pipeline": ("self, function_name", {"library_name": None}),
    "metal_dispatch.MetalKernelLibrary.list_functions": ("self, library_name", {}),
    "metal_dispatch.get_default_library": ("", {}),
    "metal_dispatch.dispatch_kernel": ("lib, function_name, grid, threadgroup, buffers", {"wait": True}),
    "metal_dispatch.mps_tensor_to_metal_buffer": ("tensor", {"device": "mps"}),  # documented without the default
    "metal_dispatch.metal_buffer_to_numpy": ("buffer, dtype, shape", {}),
    "metal_dispatch.dispatch_gemm_fp4": (GEMM, {"group_size": 32}),
    "metal_dispatch.dispatch_gemm_fp8": (GEMM, {"group_size": 128}),
    "metal_dispatch.dispatch_gemm_int2": (GEMM, {"group_size": 128}),
    "metal_dispatch.dispatch_moe_optimized": (f"{EXPERTS}, batch_size, hidden_dim, out_dim", MOE),
    "metal_dispatch.dispatch_moe_decode": (f"{EXPERTS}, hidden_dim, out_dim", MOE),
    "metal_dispatch.dispatch_dequant_fp4": ("lib, packed, scales, K, N", {"group_size": 32}),
    "metal_dispatch.benchmark_dequant_fp4": (
        "lib",
        {"num_packed": 16 * 1024 * 1024, "group_size": 32, "warmup_iters": 10, "benchmark_iters": 100},
    ),
    "inference_metal.MetalQuantizedLinear": ("in_features, out_features", {**PACKED, "bias": False}),
    "inference_metal.MetalQuantizedLinear.forward": ("self, x", {}),
    "inference_metal.MetalQuantizedLinear.from_float": ("linear", PACKED),
    "inference_metal.MetalAttention": (
        "hidden_size, num_heads",
        {"num_kv_heads": None, "head_dim": None, **PACKED, **ROPE, "bias": False},
    ),
    "inference_metal.MetalAttention.forward": ("self, hidden_states", FORWARD),
    "inference_metal.MetalMLAAttention": (
        "hidden_size, num_heads",
        {
            **{"kv_lora_rank": 512, "q_lora_rank": 1536, "qk_rope_head_dim": 64, "head_dim": None},
            **{**ROPE, **PACKED, "bias": False},
        },
    ),
    "inference_metal.MetalMLAAttention.forward": ("self, hidden_states", FORWARD),
    "inference_metal.MetalMoELayer": ("hidden_size, intermediate_size, num_experts", {"top_k": 2, **PACKED}),
    "inference_metal.MetalMoELayer.forward": ("self, hidden_states", {}),
    "inference_metal.MetalTransformerBlock": (MLP, {"num_kv_heads": None, **PACKED, "rms_norm_eps": 1e-6, **ROPE}),
    "inference_metal.MetalTransformerBlock.forward": ("self, hidden_states", FORWARD),
    "inference_metal.MetalKVCacheConfig": (
        "num_layers, num_kv_heads, head_dim, max_seq_len",
        {"dtype": torch.float16},
    ),
    "inference_metal.MetalKVCache": ("config", {"batch_size": 1}),
    "inference_metal.MetalKVCache.update": ("self, layer_idx, k_new, v_new", {}),
    "inference_metal.MetalKVCache.advance": ("self", {"num_tokens": 1}),
    "inference_metal.MetalKVCache.reset": ("self", {}),
    "sampler.MetalSampler": ("vocab_size", {"lib": None, "seed": None}),
    "sampler.MetalSampler.argmax": ("self, logits", {}),
    "sampler.MetalSampler.sample_categorical": ("self, logits", {"temperature": 1.0}),
    "sampler.MetalSampler.sample_top_k": ("self, logits, k", {"temperature": 1.0}),
    "sampler.MetalSampler.sample_top_p": ("self, logits, p", {"temperature": 1.0}),
    "sampler.MetalSampler.apply_repetition_penalty": ("self, logits, generated_ids, penalty", {}),
    "sampler.MetalSampler.sample": (
        "self, logits",
        {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0, "generated_ids": None},
    ),
    "generate.GenerationConfig": ("", {"max_new_tokens": 256, **RULES, "pad_token_id": 0, "do_sample": True}),
    "generate.generate": ("model, input_ids", {"config": None, "kv_cache": None, "streamer": None}),
    "inference_metal.MetalGLM47Model": (
        "",
        {
            **{"vocab_size": 151552, "hidden_size": 4096, "num_layers": 32, "num_heads": 32},
            **{"intermediate_size": 11008, "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_rope_head_dim": 64},
            **{"max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "rope_ratio": 1.0},
            **PACKED,
        },
    ),
    "inference_metal.MetalGLM47Model.forward": ("self, input_ids", {"attention_mask": None, "kv_cache": None}),
    "inference_metal.MetalGLM47Model.create_kv_cache": ("self", {"batch_size": 1}),
    "inference_metal.MetalGLM47Model.generate": ("self, input_ids", {"max_tokens": 256, **RULES, "streamer": None}),
    "inference_metal.MetalGLM47Model.generate_stream": ("self, input_ids, config", {}),
    "inference_metal.MetalGLM47Model.from_quantized": ("model_path", {"bits": 4}),
    "inference_metal.MetalGenerationConfig": ("", {"max_tokens": 256, **RULES}),
    "QuantizedLlamaLayer": ("quantized_model, layer_idx", {"warn_if_standalone": True}),
    "QuantizedLlamaLayer.forward": (
        "self, hidden_states",
        {"attention_mask": None, "position_ids": None, "kv_cache": None, "layer_idx": 0},
    ),
    "vision.vision_metal.VisionMetal": ("", {"device": None}),
    "vision.vision_metal.VisionMetal.uint8_to_float": ("self, image", {}),
    "vision.vision_metal.VisionMetal.center_crop": ("self, image, size", {"nhwc": False}),
    "vision.vision_metal.VisionMetal.resize_bilinear": ("self, input, target_size", {"nhwc": False}),
    "vision.vision_metal.VisionMetal.resize_bicubic": ("self, input, target_size", {"nhwc": False}),
    "vision.vision_metal.VisionMetal.normalize": ("self, image, mean, std", {"nhwc": False}),
    "vision.vision_metal.VisionMetal.resize_and_normalize": ("self, image, size, mean, std", {"nhwc": False}),
    "vision.vision_metal.VisionMetal.extract_patches": ("self, image, patch_size", {}),
    "vision.vision_metal.VisionMetal.preprocess_qwen2vl": (
        "self, image",
        {"max_pixels": 1024 * 1024, "patch_size": 14, "nhwc": False},
    ),
    "vision.vision_metal.preprocess_for_vit": (
        "images",
        {"target_size": (224, 224), "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)},
    ),
    "MarlinPipeline": ("model", {"tokenizer": None, "device": "mps"}),
    "MarlinPipeline.from_pretrained": ("path", {"quant_type": "fp4", "device": None}),
}


def found(name: str) -> Any:
    """By its path in `quantization_mlx.marlin`."""
    at, *attributes = name.split(".")
    if at in ("metal_dispatch", "inference_metal", "sampler", "generate"):
        at, *attributes = importlib.import_module(f"{marlin.__name__}.{at}"), *attributes
    else:
        at = getattr(marlin, at)
    for attribute in attributes:
        at = getattr(at, attribute)
    return at


@pytest.mark.parametrize("name", SIGNATURES)
def test_arguments(name: str) -> None:
    required, defaults = SIGNATURES[name]
    wanted = dict.fromkeys(filter(None, required.split(", ")), REQUIRED) | defaults
    parameters = list(inspect.signature(found(name)).parameters.values())
    by_position = [each for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD]
    assert [(each.name, each.default) for each in by_position[: len(wanted)]] == list(wanted.items())
    added = [each for each in parameters if each not in by_position[: len(wanted)]]
    assert all(each.default is not REQUIRED or each.kind is each.VAR_KEYWORD for each in added)


def test_the_top_level_has_all_of_them() -> None:
    """But for the function that has the name of its module."""
    for name in SIGNATURES:
        *module, last = name.split(".")
        if inspect.isclass(found(name)) or module in ([], ["metal_dispatch"]):
            assert getattr(marlin, last) is found(name) and last in marlin.__all__
    assert inspect.ismodule(marlin.generate)
    for module in ("metal_dispatch", "inference_metal"):
        for name in found(f"{module}.__all__"):
            assert getattr(marlin, name) is found(f"{module}.{name}")


def test_configs_are_dataclasses() -> None:
    for config in (marlin.MetalKVCacheConfig, marlin.GenerationConfig, marlin.MetalGenerationConfig):
        assert dataclasses.is_dataclass(config)
