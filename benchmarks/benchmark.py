"""What `kernels benchmark` runs: quantized products beside torch's product with the same weights in floating point.

    kernels benchmark quantization-mlx/quantization-mlx --version 1
    kernels benchmark ./result-of-a-build --iterations 20 --warmup 3   # with benchmarks/ and build/ in it

Each class is a kind of product, each workload a matrix [N, K] and a number of rows of x: one, as in generation, or a
prompt's. The reference is what a model would run without this package, a product with the dequantized weights in x's
dtype: float16 on a GPU; float32 on a CPU, where half precision is slow without instructions for it.
"""

from collections.abc import Callable
from typing import Any

import torch
from kernels.benchmark import Benchmark
from torch import Tensor

MATRICES = {"small": (512, 512), "medium": (4096, 4096), "large": (14336, 4096)}  # N, K
EXPERTS = {"small": (8, 256, 512), "medium": (32, 768, 2048), "large": (128, 768, 2048)}  # experts, N, K
ROWS = {"row": 1, "prompt": 256}
EXPERTS_PER_ROW = 4


def with_workloads(sizes: dict[str, tuple[int, ...]], **format: Any) -> Callable[[type], type]:
    """Gives a class its format, and the methods that the command looks for, a trio for each size and number of rows."""

    def add(cls: type) -> type:
        cls.format = format
        for size, shape in sizes.items():
            for kind, rows in ROWS.items():
                workload = f"{size}_{kind}"
                setattr(cls, f"setup_{workload}", lambda self, shape=shape, rows=rows: self.prepare(rows, *shape))
                setattr(cls, f"benchmark_{workload}", lambda self: self.run())
                setattr(cls, f"verify_{workload}", lambda self: self.reference())
        return cls

    return add


class Product(Benchmark):
    """What the classes below have in common; the file shows it to the command under no name."""

    seed = 0
    format: dict[str, Any]

    def dtype(self) -> torch.dtype:
        return torch.float32 if self.device == "cpu" else torch.float16

    def random(self, *shape: int) -> Tensor:
        """Of such a size that sums over K are about one."""
        return torch.randn(shape, device=self.device, dtype=self.dtype()) * shape[-1] ** -0.25

    def prepare(self, rows: int, *shape: int) -> None:
        w = self.random(*shape)
        self.packed = self.kernel.quantize(w, **self.format)
        self.dense = self.kernel.dequantize(*self.packed, dtype=w.dtype, **self.format)
        self.x = self.random(rows, shape[-1])

    def run(self) -> None:
        self.out = self.kernel.quantized_matmul(self.x, *self.packed, **self.format)

    def reference(self) -> Tensor:
        return self.x @ self.dense.T


@with_workloads(MATRICES, group_size=64, bits=4)
class Affine4Bit(Product):
    pass


@with_workloads(MATRICES, group_size=64, bits=8)
class Affine8Bit(Product):
    pass


@with_workloads(MATRICES, mode="mxfp4")
class Mxfp4(Product):
    pass


@with_workloads(MATRICES, mode="nvfp4")
class Nvfp4Activations(Product):
    """x is quantized, too; the reference multiplies x as it was quantized."""

    def prepare(self, rows: int, *shape: int) -> None:
        super().prepare(rows, *shape)
        codes, scales = self.kernel.quantize(self.x, **self.format)
        self.x_values = self.kernel.dequantize(codes, scales, dtype=self.x.dtype, **self.format)

    def run(self) -> None:
        self.out = self.kernel.qqmm(self.x, *self.packed, **self.format)

    def reference(self) -> Tensor:
        return self.x_values @ self.dense.T


@with_workloads(EXPERTS, group_size=64, bits=4)
class Experts4Bit(Product):
    """A mixture's layer: the rows of x go through some experts each, sorted by expert as such layers do."""

    def prepare(self, rows: int, *shape: int) -> None:
        super().prepare(rows, *shape)
        experts = shape[0]
        chosen = torch.stack([torch.randperm(experts)[:EXPERTS_PER_ROW] for _ in range(rows)]).flatten()
        order = chosen.argsort(stable=True)
        self.experts = chosen[order].to(self.device)
        self.rows_of_experts = chosen.bincount(minlength=experts).tolist()
        self.x = self.x[order.to(self.device) // EXPERTS_PER_ROW]

    def run(self) -> None:
        self.out = self.kernel.gather_qmm(
            self.x.unsqueeze(1), *self.packed, rhs_indices=self.experts, sorted_indices=True, **self.format
        ).squeeze(1)

    def reference(self) -> Tensor:
        """One product for each expert that has rows."""
        parts = self.x.split(self.rows_of_experts)
        return torch.cat([part @ matrix.T for part, matrix in zip(parts, self.dense, strict=True) if len(part)])


del Product  # the command would take it for a class of workloads
