"""What quantization does to each layer of a model: bits per weight and errors, as a table and as a picture."""

import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from ..formats import format_name
from ..messages import aligned
from ..nn.module import QuantizedModule
from ..nn.packed_weight import Packed
from ..optional import require
from .replacement import FloatWeight, share

_CHUNK = 1 << 22  # weights that are dequantized at once
_MARKERS = "osD^vP*X"  # in the picture, one for each format
_SIZE = (9.0, 4.8)  # of the picture, in inches


@dataclass(frozen=True)
class LayerError:
    """What quantization did to one layer.

    path: of the layer, the first one where several share a weight. shape: of its weight.
    group_size, bits, mode: the format.
    stored_bytes: of packed weight, scales and biases.
    relative_error: ||dequantized - weight|| / ||weight||, of all elements; 0 for a weight of zeros kept as such.
    weight_norm: ||weight||.
    """

    path: str
    shape: tuple[int, ...]
    group_size: int
    bits: int
    mode: str
    stored_bytes: int
    relative_error: float
    weight_norm: float

    @property
    def weights(self) -> int:
        return math.prod(self.shape)

    @property
    def bits_per_weight(self) -> float:
        """What is stored for a weight on average, scales and biases included."""
        return 8 * self.stored_bytes / self.weights

    @property
    def format(self) -> str:
        return format_name(self.group_size, self.bits, self.mode)


class QuantizationReport:
    """Bits per weight and relative error of each layer, and what remains in floating point, collected while
    `quantize_model` goes through a model:

    >>> report = QuantizationReport()
    >>> quantize_model(model, predicate="mixed_4_6", report=report)  # doctest: +SKIP
    >>> print(report.table())  # doctest: +SKIP

    Each layer is compared with its original at the one moment when both exist, a few million weights at a time, unless
    `with_errors` is false: then only what remains in floating point is collected.

    layers: what was quantized. skipped: the matrices that remain in floating point, norms and biases left out, with
    the reasons. parameters: how many the model has. The latter two are `quantize_model`'s to fill.
    """

    def __init__(self, with_errors: bool = True) -> None:
        self.with_errors = with_errors
        self.layers: list[LayerError] = []
        self.skipped: list[FloatWeight] = []
        self.parameters = 0

    def add(self, path: str, weight: torch.Tensor, quantized: QuantizedModule) -> None:
        """Notes a layer: weight [..., rows, columns] before, and the module that holds it packed in the same order."""
        packed = quantized.packed()
        error, norm = _error_and_norm(weight, packed)
        stored_bytes = sum(tensor.nbytes for tensor in packed[:3] if tensor is not None)
        relative_error = error / norm if norm else error
        shape = tuple(weight.shape)
        self.layers.append(LayerError(path, shape, *packed[3:], stored_bytes, relative_error, norm))

    def skip(self, weights: Iterable[FloatWeight], parameters: int) -> None:
        """Notes the matrices that remain in floating point in a model of so many parameters."""
        self.skipped += weights
        self.parameters += parameters

    @property
    def skipped_share(self) -> float:
        """The part of the model's parameters that are in matrices of floating point."""
        return share(self.skipped, self.parameters)

    def skipped_summary(self) -> str:
        """How many matrices remain in floating point, and their share of the parameters."""
        return f"{_count(len(self.skipped), 'matrices')}, {self.skipped_share:.1%} of the parameters"

    @property
    def weights(self) -> int:
        """Of all quantized layers."""
        return sum(layer.weights for layer in self.layers)

    @property
    def bits_per_weight(self) -> float:
        return 8 * sum(layer.stored_bytes for layer in self.layers) / max(self.weights, 1)

    @property
    def relative_error(self) -> float:
        """As if all layers were one."""
        error = math.hypot(*(layer.relative_error * (layer.weight_norm or 1) for layer in self.layers))
        norm = math.hypot(*(layer.weight_norm for layer in self.layers))
        return error / norm if norm else error

    def table(self) -> str:
        """All layers and their total, and what remains in floating point, as a table in Markdown."""
        rows = [("layer", "shape", "format", "bits per weight", "relative error")]
        for name, size, format, of in (
            *((layer.path, _times(layer.shape), layer.format, layer) for layer in self.layers),
            ("all", _count(self.weights), "", self),
        ):
            rows.append((name, size, format, f"{of.bits_per_weight:.2f}", f"{of.relative_error:.2%}"))
        rows += [(each.path, _times(each.shape), each.reason, "", "") for each in self.skipped]
        if self.skipped:
            count = _count(sum(each.parameters for each in self.skipped))
            rows.append(("left in floating point", count, f"{self.skipped_share:.1%} of the parameters", "", ""))
        head, *body = aligned(rows)
        ruler = ["-" * len(cell) for cell in head]
        return "\n".join(f"| {' | '.join(row)} |" for row in (head, ruler, *body))

    def plot(self, file: str | os.PathLike[str]) -> None:
        """Draws the error of each layer into an image file of the format that its name ends with.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: there are no layers, or the name ends with no image format.
        """
        if not self.layers:
            raise ValueError("[QuantizationReport] there are no layers to draw")
        figure = require("matplotlib.figure", "plot").Figure(figsize=_SIZE, dpi=120, layout="constrained")
        require("matplotlib.backends.backend_agg", "plot").FigureCanvasAgg(figure)
        line = require("matplotlib.lines", "plot").Line2D
        axes = figure.subplots()
        formats = dict.fromkeys(layer.format for layer in self.layers)
        markers = {name: _MARKERS[i % len(_MARKERS)] for i, name in enumerate(formats)}
        series: dict[str, list[tuple[float, LayerError]]] = {}
        for layer in self.layers:
            number = re.search(r"\.(\d+)\.", layer.path)
            name = layer.path.rpartition(".")[2]
            series.setdefault(name, []).append((float(number[1]) if number else -1.0, layer))
        for color, (name, points) in enumerate(series.items()):
            xs, layers = zip(*points, strict=True)
            ys = [100 * layer.relative_error for layer in layers]
            axes.plot(xs, ys, color=f"C{color % 10}", linewidth=1, alpha=0.6, label=name)
            for x, y, layer in zip(xs, ys, layers, strict=True):
                axes.plot(x, y, markers[layer.format], color=f"C{color % 10}", markersize=5)
        handles = [
            *(line([], [], color=f"C{i % 10}", label=name) for i, name in enumerate(series)),
            *(line([], [], color="black", marker=mark, linestyle="", label=name) for name, mark in markers.items()),
        ]
        axes.legend(handles=handles, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize="small")
        axes.set_xlabel("decoder layer (-1: outside of them)")
        axes.set_ylabel("relative error of the weights, %")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.set_title(f"{self.bits_per_weight:.2f} bits per weight, error {self.relative_error:.2%} over all layers")
        figure.savefig(file)


def _times(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _count(number: int, of: str = "weights") -> str:
    return f"{number:,} {of}".replace(",", " ")


def _error_and_norm(weight: torch.Tensor, packed: Packed) -> tuple[float, float]:
    """||dequantized - weight|| and ||weight||."""
    original, *tensors = (None if each is None else each.detach().flatten(0, -2) for each in (weight, *packed[:3]))
    rows = max(1, _CHUNK // original.shape[-1])
    errors, norms = [0.0], [0.0]
    for start in range(0, original.shape[0], rows):
        part = original[start : start + rows].float()
        held = (None if each is None else each[start : start + rows] for each in tensors)
        restored = Packed(*held, *packed[3:]).dequantize(torch.float32)
        errors.append(torch.linalg.vector_norm(restored - part).item())
        norms.append(torch.linalg.vector_norm(part).item())
    return math.hypot(*errors), math.hypot(*norms)
