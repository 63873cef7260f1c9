"""What one op call costs beyond its work: microseconds over a no-op op of the same schema.

    python benchmarks/overhead.py

The no-op is compiled at run time, with torch's C++ extension loader, and returns an empty tensor of the result's size.
The product is the smallest there is, one row of 32 values, so that next to nothing is computed; layers and modules are
called the way a model calls them. Medians of interleaved turns on one thread; without a compiler, the no-op is left
out.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable

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


def microseconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    for _ in range(CALLS):
        call()
    return (time.perf_counter() - start) / CALLS * 1e6


def main() -> None:
    torch.set_num_threads(1)
    print(f"{platform.machine()}, torch {torch.__version__}; microseconds of a call, and over the no-op")
    made = contenders()
    for context in (torch.inference_mode, torch.no_grad, torch.enable_grad):
        with context():
            times: dict[str, list[float]] = {name: [] for name in made}
            for _ in range(TURNS):
                for name, call in made.items():
                    times[name].append(microseconds(call))
        medians = {name: statistics.median(each) for name, each in times.items()}
        print(f"\n{context.__name__}")
        for name, median in medians.items():
            over = f"{median - medians['no-op, overload']:+8.2f}" if "no-op, overload" in medians else ""
            print(f"  {name:<28}{median:8.2f}{over}")


if __name__ == "__main__":
    main()
