"""What products lose by quantizing their activations to int8, on the CPU.

    python benchmarks/activations.py

First the root mean square error of a product with w [1024, 4096] and 64 rows of x, relative to that of the exact
result, for several distributions of x and formats of w. Then the demo's model (examples/demo.py) in MLX 4-bit and
8-bit, group_size 64: the same error of each kind of its layers on the demo's text, and its perplexity with and without.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import sys
from collections import defaultdict
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from quantization_mlx import QuantizedLinear, cpu_activations, dequantize, quantize, quantize_model, quantized_matmul

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))

import demo  # noqa: E402

ROWS, K, N = 64, 4096, 1024
FORMATS = {
    "2-bit, 64": {"bits": 2, "group_size": 64},
    "4-bit, 32": {"bits": 4, "group_size": 32},
    "4-bit, 64": {"bits": 4, "group_size": 64},
    "4-bit, 128": {"bits": 4, "group_size": 128},
    "8-bit, 64": {"bits": 8, "group_size": 64},
    "mxfp4, 32": {"mode": "mxfp4"},
    "nvfp4, 16": {"mode": "nvfp4"},
}


def distributions() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(ROWS, K, generator=generator)
    outliers = torch.where(torch.rand(K, generator=generator) < 0.01, 30.0, 1.0)
    return {"Gaussian": normal, "1 % of channels 30 times as large": normal * outliers}


def relative_error(ours: torch.Tensor, exact: torch.Tensor) -> float:
    return ((ours.double() - exact).norm() / exact.norm()).item()


def print_products() -> None:
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(1))
    inputs = distributions()
    print(f"{'relative RMS error':<22}" + "".join(f"{name:>36}" for name in inputs))
    for name, options in FORMATS.items():
        w, scales, *biases = quantize(weight, **options)
        matrix = dequantize(w, scales, *biases, **options, dtype=torch.float32).double().mT
        errors = []
        for x in inputs.values():
            with cpu_activations("int8"):
                y = quantized_matmul(x, w, scales, *biases, **options)
            errors.append(relative_error(y, x.double() @ matrix))
        print(f"{name:<22}" + "".join(f"{100 * error:>34.2f} %" for error in errors))


@torch.inference_mode()
def layer_errors(model, tokens: torch.Tensor) -> dict[str, list[float]]:
    """Of each kind of layer, in an exact forward pass."""
    errors: dict[str, list[float]] = defaultdict(list)

    def compare(name: str):
        def hook(layer, inputs, output) -> None:
            with cpu_activations("int8"):
                errors[name].append(relative_error(layer.forward(inputs[0]), output.double()))

        return hook

    hooks = [
        layer.register_forward_hook(compare(name.rsplit(".", 1)[-1]))
        for name, layer in model.named_modules()
        if isinstance(layer, QuantizedLinear)
    ]
    model(tokens)
    for hook in hooks:
        hook.remove()
    return errors


def print_model() -> None:
    tokenizer, dense = demo.load_gguf()
    text = tokenizer((ROOT / "examples" / "harbour.txt").read_text(encoding="utf-8"), return_tensors="pt").input_ids
    print(f"\n{demo.GGUF}, {text.shape[1]} tokens\nperplexity, dense float32: {demo.perplexity(dense, text, ''):.3f}")
    for bits in (4, 8):
        model = quantize_model(copy.deepcopy(dense), bits=bits, group_size=64)
        errors = layer_errors(model, text[:, : demo.CHUNK])
        exact = demo.perplexity(model, text, "exact")
        with cpu_activations("int8"):
            ours = demo.perplexity(model, text, "int8")
        print(f"perplexity, {bits}-bit: {exact:.3f} exact, {ours:.3f} int8 ({100 * (ours / exact - 1):+.2f} %)")
        print(f"relative RMS error of the {bits}-bit layers, median and largest")
        for name, values in errors.items():
            print(f"  {name:<12}{100 * statistics.median(values):>8.2f} %{100 * max(values):>8.2f} %")


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print_products()
    print_model()


if __name__ == "__main__":
    main()
