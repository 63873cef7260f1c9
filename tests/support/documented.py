"""The names and the arguments that the documents of metal_marlin, its int4 helpers and the Hub kernel have.

By path in this package: arguments with their defaults, as the document has them, types left out; of classes, those of
the constructor. None is for what has no arguments there, such as a property.
"""

from __future__ import annotations

import ast
import inspect
from typing import Any

import torch

REQUIRED = inspect.Parameter.empty
Documented = dict[str, str | None]


def arguments_of(signature: str) -> dict[str, Any]:
    """Names with defaults, in order; `**` is left out."""
    arguments = ast.parse(f"def f({signature}): pass").body[0].args
    defaults = [eval(ast.unparse(value), {"torch": torch}) for value in arguments.defaults]
    names = [argument.arg for argument in arguments.args]
    return dict(zip(names, [REQUIRED] * (len(names) - len(defaults)) + defaults, strict=True))


# metal_marlin: functions on arrays of mlx.
MARLIN_ARRAYS: Documented = {
    "marlin.marlin_gemm_fp4": "A, B_packed, scales, group_size=128",
    "marlin.marlin_gemm_int4": "A, B_packed, scales, zeros, group_size=128",
    "marlin.pack_fp4_weights": "weights, group_size=128",
    "marlin.MarlinLinear": "in_features, out_features, bias=True, quant_type='fp4', group_size=128",
    "marlin.MarlinLinear.from_linear": "linear, **kwargs",
    "marlin.quantize_model": "model, quant_type='fp4', group_size=128, skip_layers={'lm_head', 'embed_tokens'}",
}

# metal_marlin: everything on tensors.
MARLIN_TORCH: Documented = {
    "marlin.replace_linear_layers": "model, bits=4, group_size=128, skip_layers=None, layer_filter=None",
    "marlin.load_and_quantize": "model_id_or_path, bits=4, group_size=128, device='mps'",
    "marlin.save_quantized": "model, output_dir",
    "marlin.load_quantized": "path, device='mps'",
    "marlin.metal_dispatch.MetalKernelLibrary": "device=None",
    "marlin.metal_dispatch.MetalKernelLibrary.from_source_dir": "src_dir=None",
    "marlin.metal_dispatch.MetalKernelLibrary.compile_source": "self, name, source",
    "marlin.metal_dispatch.MetalKernelLibrary.get_pipeline": "self, function_name, library_name=None",
    "marlin.metal_dispatch.MetalKernelLibrary.list_functions": "self, library_name",
    "marlin.metal_dispatch.MetalKernelLibrary.device": None,
    "marlin.metal_dispatch.MetalKernelLibrary.command_queue": None,
    "marlin.metal_dispatch.dispatch_kernel": "lib, function_name, grid, threadgroup, buffers, wait=True",
    "marlin.metal_dispatch.get_default_library": "",
    "marlin.metal_dispatch.dispatch_gemm_fp4": "lib, A, B_packed, scales, M, N, K, group_size=32",
    "marlin.metal_dispatch.dispatch_gemm_fp8": "lib, A, B_packed, scales, M, N, K, group_size=128",
    "marlin.metal_dispatch.dispatch_gemm_int2": "lib, A, B_packed, scales, M, N, K, group_size=128",
    "marlin.inference_metal.MetalQuantizedLinear": "in_features, out_features, bits=4, group_size=128, bias=False",
    "marlin.inference_metal.MetalQuantizedLinear.forward": "self, x",
    "marlin.inference_metal.MetalQuantizedLinear.from_float": "linear, bits=4, group_size=128",
    "marlin.inference_metal.MetalAttention": (
        "hidden_size, num_heads, num_kv_heads=None, head_dim=None, bits=4, group_size=128, rope_theta=10000.0, "
        "rope_ratio=1.0, max_position_embeddings=4096, bias=False"
    ),
    "marlin.inference_metal.MetalAttention.forward": (
        "self, hidden_states, attention_mask=None, kv_cache=None, layer_idx=0"
    ),
    "marlin.inference_metal.MetalMLAAttention": (
        "hidden_size, num_heads, kv_lora_rank=512, q_lora_rank=1536, qk_rope_head_dim=64, head_dim=None, "
        "rope_theta=10000.0, rope_ratio=1.0, max_position_embeddings=4096, bits=4, group_size=128, bias=False"
    ),
    "marlin.inference_metal.MetalMLAAttention.forward": (
        "self, hidden_states, attention_mask=None, kv_cache=None, layer_idx=0"
    ),
    "marlin.inference_metal.MetalMoELayer": (
        "hidden_size, intermediate_size, num_experts, top_k=2, bits=4, group_size=128"
    ),
    "marlin.inference_metal.MetalMoELayer.forward": "self, hidden_states",
    "marlin.inference_metal.MetalTransformerBlock": (
        "hidden_size, num_heads, intermediate_size, num_kv_heads=None, bits=4, group_size=128, rms_norm_eps=1e-6, "
        "rope_theta=10000.0, rope_ratio=1.0, max_position_embeddings=4096"
    ),
    "marlin.inference_metal.MetalTransformerBlock.forward": (
        "self, hidden_states, attention_mask=None, kv_cache=None, layer_idx=0"
    ),
    "marlin.sampler.MetalSampler": "vocab_size, lib=None, seed=None",
    "marlin.sampler.MetalSampler.argmax": "self, logits",
    "marlin.sampler.MetalSampler.sample_categorical": "self, logits, temperature=1.0",
    "marlin.sampler.MetalSampler.sample_top_k": "self, logits, k, temperature=1.0",
    "marlin.sampler.MetalSampler.sample_top_p": "self, logits, p, temperature=1.0",
    "marlin.sampler.MetalSampler.apply_repetition_penalty": "self, logits, generated_ids, penalty",
    "marlin.sampler.MetalSampler.sample": (
        "self, logits, temperature=1.0, top_p=1.0, top_k=0, repetition_penalty=1.0, generated_ids=None"
    ),
    "marlin.generate.GenerationConfig": (
        "max_new_tokens=256, temperature=0.7, top_p=0.9, top_k=50, repetition_penalty=1.1, eos_token_id=2, "
        "pad_token_id=0, do_sample=True"
    ),
    "marlin.generate.generate": "model, input_ids, config=None, kv_cache=None, streamer=None",
    "marlin.inference_metal.MetalKVCacheConfig": "num_layers, num_kv_heads, head_dim, max_seq_len, dtype=torch.float16",
    "marlin.inference_metal.MetalKVCache": "config, batch_size=1",
    "marlin.inference_metal.MetalKVCache.update": "self, layer_idx, k_new, v_new",
    "marlin.inference_metal.MetalKVCache.advance": "self, num_tokens=1",
    "marlin.inference_metal.MetalKVCache.reset": "self",
    "marlin.metal_dispatch.dispatch_moe_optimized": (
        "lib, activations, router_weights, expert_weights, expert_scales, shared_weights, shared_scales, batch_size, "
        "hidden_dim, out_dim, num_experts=64, top_k=4, group_size=128"
    ),
    "marlin.metal_dispatch.dispatch_moe_decode": (
        "lib, activations, router_weights, expert_weights, expert_scales, shared_weights, shared_scales, hidden_dim, "
        "out_dim, num_experts=64, top_k=4, group_size=128"
    ),
    "marlin.metal_dispatch.dispatch_dequant_fp4": "lib, packed, scales, K, N, group_size=32",
    "marlin.metal_dispatch.benchmark_dequant_fp4": (
        "lib, num_packed=16 * 1024 * 1024, group_size=32, warmup_iters=10, benchmark_iters=100"
    ),
    "marlin.metal_dispatch.mps_tensor_to_metal_buffer": "tensor, device",
    "marlin.metal_dispatch.metal_buffer_to_numpy": "buffer, dtype, shape",
    "marlin.vision.vision_metal.VisionMetal": "device=None",
    "marlin.vision.vision_metal.VisionMetal.uint8_to_float": "self, image",
    "marlin.vision.vision_metal.VisionMetal.center_crop": "self, image, size, nhwc=False",
    "marlin.vision.vision_metal.VisionMetal.resize_bilinear": "self, input, target_size, nhwc=False",
    "marlin.vision.vision_metal.VisionMetal.resize_bicubic": "self, input, target_size, nhwc=False",
    "marlin.vision.vision_metal.VisionMetal.normalize": "self, image, mean, std, nhwc=False",
    "marlin.vision.vision_metal.VisionMetal.resize_and_normalize": "self, image, size, mean, std, nhwc=False",
    "marlin.vision.vision_metal.VisionMetal.extract_patches": "self, image, patch_size",
    "marlin.vision.vision_metal.VisionMetal.preprocess_qwen2vl": (
        "self, image, max_pixels=1024 * 1024, patch_size=14, nhwc=False"
    ),
    "marlin.vision.vision_metal.preprocess_for_vit": (
        "images, target_size=(224, 224), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)"
    ),
    "marlin.inference_metal.MetalGLM47Model": (
        "vocab_size=151552, hidden_size=4096, num_layers=32, num_heads=32, intermediate_size=11008, kv_lora_rank=512, "
        "q_lora_rank=1536, qk_rope_head_dim=64, max_position_embeddings=4096, rms_norm_eps=1e-6, rope_theta=10000.0, "
        "rope_ratio=1.0, bits=4, group_size=128"
    ),
    "marlin.inference_metal.MetalGLM47Model.forward": "self, input_ids, attention_mask=None, kv_cache=None",
    "marlin.inference_metal.MetalGLM47Model.create_kv_cache": "self, batch_size=1",
    "marlin.inference_metal.MetalGLM47Model.generate": (
        "self, input_ids, max_tokens=256, temperature=0.7, top_p=0.9, top_k=50, repetition_penalty=1.1, "
        "eos_token_id=2, streamer=None"
    ),
    "marlin.inference_metal.MetalGLM47Model.generate_stream": "self, input_ids, config",
    "marlin.inference_metal.MetalGLM47Model.from_quantized": "model_path, bits=4",
    "marlin.QuantizedLlamaLayer": "quantized_model, layer_idx, warn_if_standalone=True",
    "marlin.QuantizedLlamaLayer.forward": (
        "self, hidden_states, attention_mask=None, position_ids=None, kv_cache=None, layer_idx=0"
    ),
    "marlin.MarlinPipeline": "model, tokenizer=None, device='mps'",
    "marlin.MarlinPipeline.from_pretrained": "path, quant_type='fp4', device=None, **kwargs",
    "marlin.MarlinPipeline.__call__": "self, prompt, **kwargs",
    # Named in arguments and texts alone.
    "marlin.TransformersMarlinPipeline": None,
    "marlin.generate.CausalLM": None,
    "marlin.generate.KVCacheTorch": None,
    "marlin.inference_metal.MetalGenerationConfig": (
        "max_tokens=256, temperature=0.7, top_p=0.9, top_k=50, repetition_penalty=1.1, eos_token_id=2"
    ),
    "marlin.QuantizedModel": None,
}

INT4: Documented = {
    "int4.quantize_to_int4": "values, scale_method='minmax'",
    "int4.dequantize_from_int4": "quantized_values, scale, zero_point=0",
    "int4.pack_int4_to_int8": "int4_values",
    "int4.unpack_int8_to_int4": "packed_values",
    "int4.example": "",
}

# The Hub kernel: of version 1, whose document has no defaults, those of its code.
HUB_1: Documented = {
    "mxfp4_qmm_n": "x, w, scales, output_features",
    "mxfp4_qmv": "x, w, scales, output_features",
    "affine_qmv": "x, w, scales, biases, output_features, group_size=128, bits=4",
    "affine_qmm_t": "x, w, scales, biases, group_size=128, bits=4",
    "affine_qmm_n": "x, w, scales, biases, output_features, group_size=128, bits=4",
    "affine_qmm_t_nax": "x, w, scales, biases, group_size=128, bits=4",
    "affine_qmm_n_nax": "x, w, scales, biases, output_features, group_size=128, bits=4",
    "affine_gather_qmm_rhs_nax": (
        "x, w, scales, biases, indices, output_features, group_size=128, bits=4, transpose=True"
    ),
}
HUB_2: Documented = {
    **HUB_1,
    "quantize": "w, group_size=None, bits=None, mode='affine', global_scale=None",
    "dequantize": ("w, scales, biases=None, group_size=None, bits=None, mode='affine', global_scale=None, dtype=None"),
    "quantized_matmul": "x, w, scales, biases=None, transpose=True, group_size=None, bits=None, mode='affine'",
    "gather_qmm": (
        "x, w, scales, biases=None, lhs_indices=None, rhs_indices=None, transpose=True, group_size=None, bits=None, "
        "mode='affine', global_scale=None, sorted_indices=False"
    ),
    "qqmm": ("x, w, scales=None, group_size=None, bits=None, mode='nvfp4', global_scale_x=None, global_scale_w=None"),
    "gather_qqmm": (
        "x, w, scales=None, lhs_indices=None, rhs_indices=None, group_size=None, bits=None, mode='nvfp4', "
        "global_scale_x=None, global_scale_w=None, sorted_indices=False"
    ),
}

DOCUMENTS = {"metal_marlin, arrays": MARLIN_ARRAYS, "metal_marlin": MARLIN_TORCH, "int4": INT4, "Hub": HUB_2}
