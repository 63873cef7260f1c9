"""What the formats of the Marlin layers cost in quality, beside MLX's of as many bits, on the CPU.

    python benchmarks/marlin_quality.py

For each format: bits of a weight with its share of scales and zeros; the relative error of random normal weights; and
the perplexity of the demo's model (examples/demo.py) on the demo's text, with its 210 linear layers in that format. The
embedding, and the output head that is tied to it, stay as they are. All weights are bfloat16 before, as MLX checkpoints
have them, so that scales take 16 bits; everything computes in float32. The model's hidden size is 576, which a
group_size of 128 does not divide.

The model is small, and its weights, from a GGUF file of 4 bits, are rounded for the second time here: the order of the
formats may be another one elsewhere, and 2 bits in every layer leave nothing of it.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import nn

from quantization_mlx import QuantizedLinear, dequantize, quantize, quantize_model
from quantization_mlx.marlin import ColumnPackedLinear, replace_linear_layers
from quantization_mlx.marlin import quantize_model as quantize_to_marlin

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))

import demo  # noqa: E402

K, N = 4096, 512
LAYERS = {"marlin_fp4": "`MarlinLinear` fp4, `MetalQuantizedLinear` 4", "marlin_int4": "`MarlinLinear` int4"}
LAYERS |= {"marlin_int4_sym": "`MarlinLinear` int4_sym", "marlin_fp8": "`MetalQuantizedLinear` 8"}
LAYERS |= {"marlin_int2": "`MetalQuantizedLinear` 2"}
# Mode, bits and sizes of groups; formats of as many bits stand together.
FORMATS = [
    ("marlin_fp8", 8, (64, 32)),
    ("affine", 8, (64, 32)),
    ("mxfp8", 8, (32,)),
    ("marlin_fp4", 4, (64, 32)),
    ("marlin_int4", 4, (64, 32)),
    ("marlin_int4_sym", 4, (64, 32)),
    ("affine", 4, (64, 32)),
    ("mxfp4", 4, (32,)),
    ("nvfp4", 4, (16,)),
    ("marlin_int2", 2, (64, 32)),
    ("affine", 2, (64, 32)),
]


def normal_weights(mode: str, bits: int, group_size: int) -> tuple[float, float]:
    """Stored bits of a weight and the relative error of normal weights."""
    weight = torch.randn(K, N, generator=torch.Generator().manual_seed(0)).bfloat16()
    rows = weight if mode.startswith("marlin") else weight.T
    w, scales, *rest = quantize(rows, group_size, bits, mode)
    stored = sum(tensor.nbytes for tensor in (w, scales, *rest))
    back = dequantize(w, scales, *rest, group_size=group_size, bits=bits, mode=mode, dtype=torch.float32)
    return 8 * stored / (K * N), ((back - rows).norm() / rows.float().norm()).item()


def quantized(dense: nn.Module, mode: str, bits: int, group_size: int) -> nn.Module:
    """A copy of the model with its linear layers in a format, but for the output head."""
    model = copy.deepcopy(dense).bfloat16()
    quant_type = mode.removeprefix("marlin_")
    if quant_type in ("int4", "int4_sym"):
        quantize_to_marlin(model, quant_type, group_size)
    elif mode.startswith("marlin"):
        replace_linear_layers(model, bits, group_size, skip_layers={"lm_head"})
    else:
        quantize_model(model, group_size=group_size, bits=bits, mode=mode, predicate=is_inner_linear)
    modes = [layer.mode for layer in model.modules() if isinstance(layer, QuantizedLinear | ColumnPackedLinear)]
    if modes != [mode] * sum(is_inner_linear(path, layer) for path, layer in dense.named_modules()):
        raise SystemExit(f"{mode} did not take the layers that the others take")
    return model.float()


def is_inner_linear(path: str, layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear) and path != "lm_head"


def shown(perplexity: float) -> str:
    return f"{perplexity:.2f}" if perplexity < 1000 else f"{perplexity:.1e}"


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    tokenizer, dense = demo.load_gguf()
    text = tokenizer((ROOT / "examples" / "harbour.txt").read_text(encoding="utf-8"), return_tensors="pt").input_ids
    print(f"{demo.GGUF}, {text.shape[1]} tokens; normal weights [{K}, {N}]\n")
    print("| mode | layer | group_size | bits of a weight | error, normal weights | perplexity |")
    print("|---|---|---|---|---|---|")
    print(f"| float32 | `nn.Linear` | | 32 | | {shown(demo.perplexity(dense, text, 'float32'))} |", flush=True)
    for mode, bits, group_sizes in FORMATS:
        for group_size in group_sizes:
            stored_bits, error = normal_weights(mode, bits, group_size)
            perplexity = demo.perplexity(
                quantized(dense, mode, bits, group_size), text, f"{mode}, {bits}, {group_size}"
            )
            name, layer = (f"{mode}, {bits} bits", "") if mode == "affine" else (mode, LAYERS.get(mode, ""))
            print(
                f"| {name} | {layer or '`QuantizedLinear`'} | {group_size} | {stored_bits:.2f} | {100 * error:.2f} % "
                f"| {shown(perplexity)} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
