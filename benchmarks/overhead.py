"""What one op call costs beyond its work: microseconds over a no-op op of the same schema.

    python benchmarks/overhead.py [--host]

The no-op is compiled at run time, with torch's C++ extension loader, and returns an empty tensor of the result's size.
The product is the smallest there is, one row of 32 values, so that next to nothing is computed; layers and modules are
called the way a model calls them. Medians of interleaved turns on one thread; without a compiler, the no-op is left
out.

--host: of the ops on device "mps", what the host does before the GPU begins, and of a decoder for one token, for which
transformers is needed. On Linux, with the package's Objective-C++ on the software Metal device, whose commands are
encoded and not run; its Objective-C is not Apple's.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch

import quantization_mlx
from quantization_mlx._ops import ops

CALLS = 1000
TURNS = 31
NO_OP = """
#include <torch/library.h>
#include <ATen/ops/empty.h>

using at::Tensor;

Tensor no_op(
    const Tensor& x, const Tensor& w, const Tensor&, const std::optional<Tensor>&, bool, std::optional<int64_t>,
    std::optional<int64_t>, std::string_view, const std::optional<Tensor>&, std::string_view) {
  return at::empty({x.size(0), w.size(0)}, x.options());
}

TORCH_LIBRARY(quantization_mlx_no_op, m) {
  m.def(
      "quantized_matmul(Tensor x, Tensor w, Tensor scales, Tensor? biases=None, bool transpose=True, "
      "int? group_size=None, int? bits=None, str mode='affine', *, Tensor? global_scale=None, "
      "str op='quantized_matmul') -> Tensor");
}

TORCH_LIBRARY_IMPL(quantization_mlx_no_op, CPU, m) { m.impl("quantized_matmul", no_op); }

TORCH_LIBRARY_IMPL(quantization_mlx_no_op, MPS, m) { m.impl("quantized_matmul", no_op); }

TORCH_LIBRARY_IMPL(quantization_mlx_no_op, Autograd, m) {
  m.impl("quantized_matmul", torch::CppFunction::makeFallthrough());
}
"""


def no_op() -> Callable | None:
    from torch.utils.cpp_extension import load_inline

    try:
        load_inline("quantization_mlx_no_op", NO_OP, is_python_module=False, extra_cflags=["-O3"])
    except (OSError, RuntimeError) as error:
        print(f"no compiler, and so no no-op: {error}")
        return None
    return torch.ops.quantization_mlx_no_op.quantized_matmul.default


def contenders() -> dict[str, Callable[[], object]]:
    """On the CPU."""
    x, weight = torch.randn(1, 32), torch.randn(4, 32)
    w, scales, biases = quantization_mlx.quantize(weight, 32, 4)
    layer = quantization_mlx.QuantizedLinear.from_linear(torch.nn.Linear(32, 4, bias=False), 32, 4)
    dense = torch.nn.Linear(32, 4, bias=False)
    overload = ops.quantized_matmul.default
    nothing = no_op()
    result = {
        "no-op, overload": lambda: nothing(x, w, scales, biases, True, 32, 4, "affine"),
        "quantized_matmul, overload": lambda: overload(x, w, scales, biases, True, 32, 4, "affine"),
        "quantized_matmul, function": lambda: quantization_mlx.quantized_matmul(x, w, scales, biases, True, 32, 4),
        "QuantizedLinear": lambda: layer(x),
        "torch.nn.Linear": lambda: dense(x),
    }
    if nothing is None:
        del result["no-op, overload"]
    return result


def host_contenders() -> dict[str, Callable[[], object]]:
    """On "mps": of one row, of a prompt, of one whose parts along K are summed, and of gathered rows."""
    nothing, overload, gather = no_op(), ops.quantized_matmul.default, ops.gather_qmm.default

    def packed(*sizes: int) -> tuple[torch.Tensor, ...]:
        return tuple(tensor.to("mps") for tensor in quantization_mlx.quantize(torch.randn(*sizes).half(), 64, 4))

    one, prompt, tall = (torch.randn(rows, k).half().to("mps") for rows, k in ((1, 512), (40, 512), (40, 4096)))
    wide, narrow, experts = packed(5120, 512), packed(64, 4096), packed(2, 64, 512)
    indices, two = torch.tensor([1, 0]).to("mps"), torch.randn(2, 1, 512).half().to("mps")
    result: dict[str, Callable[[], object]] = {
        "no-op, overload": lambda: nothing(one, *wide, True, 64, 4, "affine"),
        "no-op, 40 rows": lambda: nothing(prompt, *wide, True, 64, 4, "affine"),
        "quantized_matmul, 1 row": lambda: overload(one, *wide, True, 64, 4, "affine"),
        "quantized_matmul, 40 rows": lambda: overload(prompt, *wide, True, 64, 4, "affine"),
        "quantized_matmul, 40 rows, split": lambda: overload(tall, *narrow, True, 64, 4, "affine"),
        "gather_qmm, 2 pairs": lambda: gather(two, *experts, None, indices, True, 64, 4, "affine"),
    }
    return result if nothing is not None else {name: call for name, call in result.items() if "no-op" not in name}


LAYERS = 28


def decoder_step() -> tuple[Callable[[], object], int]:
    """One token through all layers of a small prepared model on "mps", and the launches that this takes."""
    from transformers import DynamicCache, Qwen3Config, Qwen3ForCausalLM

    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = Qwen3Config(**sizes, head_dim=32, num_hidden_layers=LAYERS, vocab_size=64)
    model = quantization_mlx.quantize_model(Qwen3ForCausalLM(config).half().eval(), group_size=64).to("mps")
    stack = quantization_mlx.prepare_for_generation(model).model
    cache = DynamicCache(config=config)
    token = torch.zeros(1, 1, dtype=torch.long, device="mps")
    x = stack.embed_tokens(token)
    with torch.no_grad():
        stack(token, cache=cache)
        angles = stack.rotary_emb(x, token)
    keys, values = zip(*(layer.buffers for layer in cache.layers), strict=True)
    arguments = (stack._decoder()[0], x, *([each] for each in angles), list(keys), list(values), 1)

    def call() -> torch.Tensor:
        return ops.decoder_step(*arguments)

    return call, sum(len(plan.launches) for plan in quantization_mlx.explain(call))


def microseconds(call: Callable[[], object], calls: int = CALLS) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls * 1e6


def measure(made: dict[str, Callable[[], object]]) -> None:
    times: dict[str, list[float]] = {name: [] for name in made}
    for _ in range(TURNS):
        for name, call in made.items():
            times[name].append(microseconds(call))
    medians = {name: statistics.median(each) for name, each in times.items()}
    for name, median in medians.items():
        over = f"{median - medians['no-op, overload']:+8.2f}" if "no-op, overload" in medians else ""
        print(f"  {name:<34}{median:8.2f}{over}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", action="store_true", help='of the ops on device "mps"')
    host = parser.parse_args().host
    torch.set_num_threads(1)
    print(f"{platform.machine()}, torch {torch.__version__}; microseconds of a call, and over the no-op")
    idle = nullcontext
    if host and not torch.backends.mps.is_available():
        root = Path(__file__).resolve().parents[1]
        sys.path.extend(str(root / folder) for folder in ("softmetal", "tests/support"))
        import software_gpu
        from softmetal import mps

        software_gpu.install(check_plans=False)
        mps.set_gpu("applegpu_g14s")
        idle = mps.idle
    made = host_contenders() if host else contenders()
    for call in made.values():  # compiles and checks kernels
        call()
    for context in (torch.inference_mode,) if host else (torch.inference_mode, torch.no_grad, torch.enable_grad):
        print(f"\n{context.__name__}")
        with context(), idle():
            measure(made)
    if host:
        call, launches = decoder_step()
        with torch.inference_mode(), idle():
            of_call = statistics.median(microseconds(call, 20) for _ in range(TURNS))
        print(
            f"\none token through {LAYERS} layers: {launches} launches, {of_call / launches:.2f} microseconds for each"
        )


if __name__ == "__main__":
    main()
