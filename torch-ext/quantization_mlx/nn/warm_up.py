"""Compiling the Metal kernels of a model before its first token waits for them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from .._ops import ops
from ..optional import progress
from .module import PackedModule


def warm_up(model: nn.Module, rows: Sequence[int] = (1, 512)) -> int:
    """Compiles the kernels, and makes the checks before their first use, of a model's quantized layers on device "mps".

    A kernel takes up to a second or two to compile the first time on a Mac; macOS keeps what was compiled. Several are
    compiled at a time, with a progress bar where that takes more than two seconds and tqdm is installed. Layers on
    other devices need nothing. `load_checkpoint` and `from_pretrained` call it for models that they put on "mps".

    Args:
        model: any module; its packed layers are called once for each kernel that they need.
        rows: the numbers of rows of x, or of tokens that meet an expert, to be ready for: one for generation, and a
            prompt.

    Returns:
        The number of calls that were made: 0 where no layer is on "mps".
    """
    calls: dict[Any, Callable[[], Tensor]] = {}
    layers = [layer for layer in model.modules() if isinstance(layer, PackedModule)]
    layers = [layer for layer in layers if layer.packed().words.device.type == "mps"]
    for layer in sorted(layers, key=lambda layer: layer.packed().words.numel()):  # of one kernel, the smallest
        for count in rows:
            for kernel, call in _calls(layer, count):
                calls.setdefault(kernel, call)
    if not calls:
        return 0
    distinct = list({id(call): call for call in calls.values()}.values())
    with ThreadPoolExecutor(min(len(distinct), os.cpu_count() or 1, 8)) as pool:
        for done in progress([pool.submit(call) for call in distinct], "compiling kernels"):
            done.result()
    return len(distinct)


def _calls(layer: PackedModule, rows: int) -> Iterator[tuple[Any, Callable[[], Tensor]]]:
    """Each kernel that a product of the layer needs, with a function that computes this product."""
    words, scales, biases, *format = layer.packed()
    transpose = not layer.packed_transposed
    columns = layer.packed().shape[-1 if transpose else -2]
    x = torch.zeros(rows, columns, dtype=layer.weight_dtype, device=words.device)
    if words.dim() == 2:
        arguments = (x, words, scales, biases, transpose, *format)
        op, twin = ops.quantized_matmul, ops.explain_quantized_matmul
    else:
        experts = (torch.arange(rows) * words.shape[0] // rows).to(words.device)
        arguments = (x.unsqueeze(-2), words, scales, biases, None, experts, transpose, *format, None)
        op, twin = ops.gather_qmm, ops.explain_gather_qmm

    def call() -> Tensor:
        with torch.no_grad():  # which is of a thread
            return op(*arguments, **options)

    options = {} if words.dim() == 2 else {"sorted_indices": rows > 1}
    for launch in json.loads(twin(*arguments, **options))["launches"]:
        yield (launch["kernel"], *launch["constants"]), call
