"""Experts that a checkpoint stores one by one, and MLX stacks."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..families import family_of
from ..messages import listed
from .layer import OP, ConversionReport

# The path of one expert's layer.
_OF_AN_EXPERT = re.compile(r"(.+)\.experts\.(\d+)\.(gate_proj|up_proj|down_proj|w1|w2|w3)")


class StackedExperts:
    """The tensors of layers that each expert has for itself, and that MLX stacks: one layer for a projection of all."""

    def __init__(self, stored: Iterable[str], layers: Mapping[str, Any], config: Mapping[str, Any]) -> None:
        """Raises ValueError if the experts of a projection are not all there, or not all of one kind."""
        text = config.get("text_config") or {}
        family = family_of(text.get("model_type") or config.get("model_type") or "")
        name_of_layers = family.experts.rpartition(".")[2]
        self._paths: dict[str, list[str]] = {}  # stacked layer -> the experts' layers, in order
        self._place: dict[str, tuple[str, int]] = {}  # expert's layer -> stacked layer, expert's index
        found: dict[str, dict[int, str]] = {}
        for path in dict.fromkeys(name.rpartition(".")[0] for name in stored):
            if (match := _OF_AN_EXPERT.fullmatch(path)) is not None:
                block, index, projection = match.groups()
                stacked = f"{block}.{name_of_layers}.{family.projections[projection]}"
                found.setdefault(stacked, {})[int(index)] = path
                self._place[path] = stacked, int(index)
        for stacked, paths in found.items():
            self._paths[stacked] = [paths.get(index, "") for index in range(max(paths) + 1)]
            if missing := [str(index) for index, path in enumerate(self._paths[stacked]) if not path]:
                raise ValueError(f"[{OP}] {stacked}: experts are missing: {listed(missing)}")
            if len({path in layers for path in self._paths[stacked]}) > 1:
                floats = [path for path in self._paths[stacked] if path not in layers]
                raise ValueError(
                    f"[{OP}] {stacked}: experts that are not quantized are among others, which "
                    f"MLX checkpoints cannot express: {listed(floats)}"
                )

    def __contains__(self, name: str) -> bool:
        return name.rpartition(".")[0] in self._place

    def stacked(
        self, name: str, convert: Callable[[str], dict[str, Tensor]], report: ConversionReport
    ) -> dict[str, Tensor]:
        """What `convert` makes of the tensors of that name of all experts, stacked; nothing unless it is the first's.
        Raises ValueError if experts have different formats or shapes."""
        path, _, attribute = name.rpartition(".")
        stacked, index = self._place[path]
        if index != 0:
            return {}
        parts: dict[str, list[Tensor]] = {}
        for each in self._paths[stacked]:
            for made, tensor in convert(f"{each}.{attribute}").items():
                parts.setdefault(made.rpartition(".")[2], []).append(tensor)
        formats = [report.formats.pop(each) for each in self._paths[stacked] if each in report.formats]
        shapes = {tuple(tensor.shape) for tensors in parts.values() for tensor in tensors[:1]}
        uneven = [part for part, tensors in parts.items() if len({tensor.shape for tensor in tensors}) > 1]
        if uneven or any(format != formats[0] for format in formats):
            what = listed(sorted({str(format) for format in formats} or {str(shape) for shape in shapes}))
            raise ValueError(
                f"[{OP}] {stacked}: the experts have different formats or shapes, which MLX "
                f"checkpoints cannot express: {what}"
            )
        if formats:
            report.formats[stacked] = formats[0]
        return {f"{stacked}.{part}": torch.stack(tensors) for part, tensors in parts.items()}
