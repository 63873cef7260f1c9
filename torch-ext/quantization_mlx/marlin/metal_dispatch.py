"""The functions and classes that metal_marlin has in its module of this name."""

from .dispatch import dispatch_kernel, metal_buffer_to_numpy, mps_tensor_to_metal_buffer
from .functions import (
    benchmark_dequant_fp4,
    dispatch_dequant_fp4,
    dispatch_gemm_fp4,
    dispatch_gemm_fp8,
    dispatch_gemm_int2,
)
from .library import MetalKernelLibrary, get_default_library
from .moe_dispatch import dispatch_moe_decode, dispatch_moe_optimized

__all__ = [
    "MetalKernelLibrary",
    "benchmark_dequant_fp4",
    "dispatch_dequant_fp4",
    "dispatch_gemm_fp4",
    "dispatch_gemm_fp8",
    "dispatch_gemm_int2",
    "dispatch_kernel",
    "dispatch_moe_decode",
    "dispatch_moe_optimized",
    "get_default_library",
    "metal_buffer_to_numpy",
    "mps_tensor_to_metal_buffer",
]
