"""The command `info`, and what the headers of a checkpoint tell."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.record import format_of_tensors
from ..formats import format_name
from ..hf.quantizer import columns_of_layers
from ..messages import aligned, short_name
from ..ops import quantize, quantized_matmul
from ..plans import explain
from .arguments import GPU, refuse
from .models import read_mlx_directory

_ROWS = (1, 512)  # of x whose kernels are shown: a generation step and a prompt


def run(arguments: argparse.Namespace) -> None:
    """Describes a checkpoint from its headers, without loading weights: formats, sizes, and which kernels would run."""
    summary = Summary.read(Path(arguments.model))
    if not summary.quantized:
        refuse(
            [("--gpu", arguments.gpu)], f"plans products with quantized weights, of which {arguments.model} has none"
        )
    kernels = {format_name(**each.format): _kernels(each, arguments.gpu or GPU) for each in summary.quantized}
    if arguments.json:
        print(json.dumps({**summary.record(), "kernels": kernels}, indent=2))
        return
    print(f"{arguments.model}: {summary.headline()}\n")
    rows = [("weights as", "tensors", "weights", "MB", "bits per weight")]
    rows += [
        (each.name, f"{each.tensors}", f"{each.weights}", f"{each.bytes / 1e6:.1f}", f"{each.bits_per_weight:.2f}")
        for each in summary.parts
    ]
    _print_table(rows)
    for part in summary.quantized:
        shape = " x ".join(map(str, part.largest))
        print(f"\n{part.name}: kernels for its largest matrix, {shape}")
        _print_table([(name, f"{count} row{'s' * (count > 1)}", kernel) for name, count, kernel in kernels[part.name]])


def _print_table(rows: Iterable[tuple[str, ...]]) -> None:
    for row in aligned(rows):
        print("  ".join(row).rstrip())


def _kernels(part: _Part, gpu: str) -> list[tuple[str, int, str]]:
    """(device, rows of x, kernels) for the product with the part's largest matrix."""
    format, (rows, columns) = part.format, part.largest[-2:]
    small = torch.zeros(1, format["group_size"])  # a CPU's plan takes tensors that exist
    weights = (*quantize(small.expand(2, -1).contiguous(), **format), None)[:3]
    [cpu] = explain(quantized_matmul, small, *weights, **format)
    packed = quantize(torch.empty(rows, columns, dtype=torch.bfloat16, device="meta"), **format)
    packed = (*packed, None)[:3]
    found = [("cpu", count, str(cpu.instruction_set)) for count in _ROWS]
    for count in _ROWS:
        x = torch.empty(count, columns, dtype=torch.bfloat16, device="meta")
        [plan] = explain(quantized_matmul, x, *packed, gpu=gpu, **format)
        found.append((gpu, count, ", ".join(f"{launch.kernel} [{launch.family}]" for launch in plan.launches)))
    return found


@dataclass
class _Part:
    """The weights of a checkpoint that are stored in one way: in a format, or in a dtype."""

    name: str
    format: dict[str, Any] = field(default_factory=dict)
    tensors: int = 0
    weights: int = 0
    bytes: int = 0
    largest: tuple[int, ...] = ()

    def add(self, shape: Sequence[int], stored: Iterable[Tensor]) -> None:
        self.tensors += 1
        self.weights += math.prod(shape)
        self.bytes += sum(tensor.nbytes for tensor in stored)
        self.largest = max(self.largest, tuple(shape), key=lambda each: math.prod(each) if each else 0)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.bytes / max(self.weights, 1)


@dataclass
class Summary:
    """A checkpoint as its headers describe it."""

    model: str
    files: int
    parts: list[_Part]

    @classmethod
    def read(cls, directory: Path) -> Summary:
        """Raises FileNotFoundError and ValueError, which name the directory."""
        checkpoint = read_mlx_directory(directory)
        config, stored, record = checkpoint.config, checkpoint.tensors(), checkpoint.record or {}
        model = (config.get("architectures") or [config.get("model_type", "a model of an unknown kind")])[0]
        columns = columns_of_layers(checkpoint) if record else {}
        parts: dict[str, _Part] = {}
        for name, tensor in stored.items():
            path, _, kind = name.rpartition(".")
            scales = stored.get(f"{path}.scales")
            if scales is None or kind not in ("weight", "scales", "biases"):
                dtype = short_name(tensor.dtype)
                parts.setdefault(dtype, _Part(dtype)).add(tensor.shape, [tensor])
            elif kind == "weight":
                format = _stored_format(path, columns.get(path), record, stored)
                shape = (*tensor.shape[:-1], scales.shape[-1] * format["group_size"])
                biases = stored.get(f"{path}.biases")
                together = [tensor, scales] + ([] if biases is None else [biases])
                parts.setdefault(key := format_name(**format), _Part(key, format)).add(shape, together)
        return cls(model, len(checkpoint.files), sorted(parts.values(), key=lambda part: -part.bytes))

    @property
    def quantized(self) -> list[_Part]:
        return [part for part in self.parts if part.format]

    def headline(self) -> str:
        weights, bytes_ = (sum(getattr(part, name) for part in self.parts) for name in ("weights", "bytes"))
        size = f"{weights / 1e6:.1f} million weights, {bytes_ / 1e6:.1f} MB in {self.files} file(s)"
        return f"{self.model}, {size}, {8 * bytes_ / max(weights, 1):.2f} bits per weight"

    def record(self) -> dict[str, Any]:
        names = ("name", "tensors", "weights", "bytes", "bits_per_weight", "largest")
        return {
            "model": self.model,
            "files": self.files,
            "parts": [{**part.format, **{name: getattr(part, name) for name in names}} for part in self.parts],
        }


def _stored_format(
    path: str, columns: int | None, record: Mapping[str, Any], stored: Mapping[str, Tensor]
) -> dict[str, Any]:
    """The format of a layer whose scales are stored, as loading finds it. Raises ValueError if the stored tensors
    cannot be of that format."""
    format = format_of_tensors(path, columns, record, stored)
    if format is None:
        raise ValueError(f"{path}: config.json says that it is not quantized, and scales are stored")
    weight, scales = stored[f"{path}.weight"], stored[f"{path}.scales"]
    if weight.shape[-1] * 32 != scales.shape[-1] * format["group_size"] * format["bits"]:
        raise ValueError(
            f"{path}: weight {list(weight.shape)} and scales {list(scales.shape)} are not of {format_name(**format)}"
        )
    return format
