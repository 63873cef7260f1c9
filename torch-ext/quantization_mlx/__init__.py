"""MLX-format quantized matrix products for PyTorch."""

from . import fast, layers
from . import int4 as int4
from . import marlin as marlin
from .convert.awq import convert_awq
from .convert.checkpoint import convert_foreign_checkpoint
from .convert.compressed_tensors import convert_compressed_tensors
from .convert.gguf import convert_gguf_checkpoint
from .convert.gptq import convert_gptq
from .hf.decoder import prepare_for_generation
from .hf.distributed import prepare_for_ddp
from .hf.load import load_checkpoint
from .hf.patch import patch_transformers, unpatch_transformers
from .hf.peft import patch_peft, unpatch_peft
from .hf.quantized_cache import quantized_cache
from .hf.save import save_checkpoint
from .nn.embedding import QuantizedEmbedding
from .nn.linear import QuantizedLinear
from .nn.switch import QuantizedSwitchLinear
from .nn.warm_up import warm_up
from .ops import (
    affine_gather_qmm_rhs_nax,
    affine_qmm_n,
    affine_qmm_n_nax,
    affine_qmm_t,
    affine_qmm_t_nax,
    affine_qmv,
    dequantize,
    gather_qmm,
    gather_qqmm,
    mxfp4_qmm_n,
    mxfp4_qmm_t,
    mxfp4_qmv,
    mxfp8_qmm_n,
    mxfp8_qmm_t,
    mxfp8_qmv,
    nvfp4_qmm_n,
    nvfp4_qmm_t,
    nvfp4_qmv,
    qqmm,
    quantize,
    quantized_matmul,
)
from .plans import explain
from .quantization.model import dequantize_model, quantize_model
from .settings import cpu_activations, get_cpu_activations, set_cpu_activations

__all__ = [
    "QuantizedEmbedding",
    "QuantizedLinear",
    "QuantizedSwitchLinear",
    "affine_gather_qmm_rhs_nax",
    "affine_qmm_n",
    "affine_qmm_n_nax",
    "affine_qmm_t",
    "affine_qmm_t_nax",
    "affine_qmv",
    "convert_awq",
    "convert_compressed_tensors",
    "convert_foreign_checkpoint",
    "convert_gguf_checkpoint",
    "convert_gptq",
    "cpu_activations",
    "dequantize",
    "dequantize_model",
    "explain",
    "fast",
    "gather_qmm",
    "gather_qqmm",
    "get_cpu_activations",
    "layers",
    "load_checkpoint",
    "mxfp4_qmm_n",
    "mxfp4_qmm_t",
    "mxfp4_qmv",
    "mxfp8_qmm_n",
    "mxfp8_qmm_t",
    "mxfp8_qmv",
    "nvfp4_qmm_n",
    "nvfp4_qmm_t",
    "nvfp4_qmv",
    "patch_peft",
    "patch_transformers",
    "prepare_for_ddp",
    "prepare_for_generation",
    "qqmm",
    "quantize",
    "quantize_model",
    "quantized_cache",
    "quantized_matmul",
    "save_checkpoint",
    "set_cpu_activations",
    "unpatch_peft",
    "unpatch_transformers",
    "warm_up",
]
