"""An op call of the lane: its shapes, types and format. Plain Python, for machines with and without torch."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "bool": 1, "uint8": 1, "int32": 4, "uint32": 4, "int64": 8}

NUMPY = {"bfloat16": "uint16", "bool": "uint8"}  # others have their own name there
FILLING = 0xFF  # whatever the type, a NaN or a code of all ones


@dataclass(frozen=True)
class Call:
    """A product of x [batch, rows, k] with w [n, k], or [k, n] without transpose; or a conversion of such a w.

    op: quantized_matmul, gather_qmm, quantize, dequantize or, with an activation, quantized_gated_matmul, whose w has
    n rows of gates and n of values. batch: matrices of x, each with its own w where
    batched_w. experts: gather_qmm's matrices of w, for `pairs` pairs of indices, of which some are out of range where
    `invalid`; sorted: one row of x to a pair, the experts in order. x_padding: elements between the rows of x.
    offset: elements before the first one of x, words before the first one of w.
    """

    op: str = "quantized_matmul"
    mode: str = "affine"
    group_size: int = 64
    bits: int = 4
    dtype: str = "float16"
    rows: int = 1
    n: int = 4096
    k: int = 4096
    transpose: bool = True
    batch: int = 1
    batched_w: bool = False
    experts: int = 0
    pairs: int = 0
    invalid: bool = False
    sorted: bool = False
    x_padding: int = 0
    offset: int = 0
    global_scale: bool = False
    activation: str = ""

    @property
    def is_product(self) -> bool:
        return self.op in ("quantized_matmul", "gather_qmm", "quantized_gated_matmul")

    @property
    def is_column_packed(self) -> bool:
        """Then w is [k, n], and zeros take the place of biases."""
        return self.mode.startswith("marlin")

    @property
    def has_biases(self) -> bool:
        return self.mode in ("affine", "marlin_int4")

    @property
    def w_shape(self) -> tuple[int, ...]:
        """Of the dense matrices."""
        rows = 2 * self.n if self.activation else self.n
        matrix = (rows, self.k) if self.transpose else (self.k, rows)
        return (self.experts, *matrix) if self.experts else (self.batch, *matrix) if self.batched_w else matrix

    @property
    def words_shape(self) -> tuple[int, ...]:
        return self._packed(32, self.bits)

    @property
    def groups_shape(self) -> tuple[int, ...]:
        return self._packed(self.group_size, 1)

    def _packed(self, elements: int, words: int) -> tuple[int, ...]:
        """The shape of what holds `elements` of the packed dimension in so many words."""
        *leading, rows, columns = self.w_shape
        if self.is_column_packed:
            return (*leading, rows * words // elements, columns)
        return (*leading, rows, columns * words // elements)

    @property
    def scale_dtype(self) -> str:
        return self.dtype if self.mode == "affine" else "float16" if self.is_column_packed else "uint8"

    @property
    def x_shape(self) -> tuple[int, ...]:
        if self.experts:
            return (self.pairs, 1, self.k) if self.sorted else (self.pairs, self.rows, self.k)
        return (self.batch, self.rows, self.k) if self.batch > 1 else (self.rows, self.k)

    @property
    def y_shape(self) -> tuple[int, ...]:
        return (*self.x_shape[:-1], self.n) if self.is_product else self.w_shape

    @property
    def results(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shapes and types of what the kernels write, by role."""
        if self.op != "quantize":
            return {"y": (self.y_shape, self.dtype)}
        results = {"w": (self.words_shape, "uint32"), "scales": (self.groups_shape, self.scale_dtype)}
        return {**results, "biases": results["scales"]} if self.has_biases else results

    @property
    def matrix_bytes(self) -> int:
        """Of one matrix of w: packed words, scales and biases."""
        elements = math.prod(self.w_shape[-2:])
        scale_bytes = ITEM_BYTES[self.scale_dtype] * (2 if self.has_biases else 1)
        return elements * self.bits // 8 + elements // self.group_size * scale_bytes

    @property
    def weight_bytes(self) -> int:
        return self.matrix_bytes * math.prod(self.w_shape[:-2])

    @property
    def moved_bytes(self) -> int:
        return self.weight_bytes

    @property
    def first_elements(self) -> dict[str, int]:
        """Elements before the first one, by role."""
        return {"x": self.offset, "w": self.offset}

    @property
    def rotating(self) -> tuple[str, ...]:
        """What is not in the cache when a call is timed."""
        return ("w", "scales", "biases")

    @property
    def format(self) -> str:
        return f"{self.mode} g{self.group_size} b{self.bits}"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        changed = [f"{name}={value}" for name, value in asdict(self).items() if value != getattr(Call, name)]
        return f"Call({', '.join(changed)})"
