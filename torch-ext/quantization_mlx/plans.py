"""Which kernels a call runs: on this device, or on any Apple GPU without having it."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ._ops import ops

__all__ = ["Launch", "Plan", "explain"]

_OPS = (
    *("quantize", "dequantize", "quantized_matmul", "gather_qmm"),
    *("rms_norm", "layer_norm", "add_rms_norm", "rope", "rope_into_cache", "swiglu", "geglu", "quantized_gated_matmul"),
    *("scaled_dot_product_attention", "quantized_scaled_dot_product_attention"),
    *("moe_router", "moe_combine", "sample", "resample_image"),
)


@dataclass(frozen=True)
class Launch:
    """One kernel of a plan.

    kernel: its name, which is its specification; file: the stem of the .metal file that it is in.
    instance: the template of that file, with its arguments, that the kernel is.
    family: "tensor" (Metal 4 tensor operations, "NAX"), "tile" (8x8 simdgroup matrices), "matvec", "gated_matvec",
        "quantize", "dequantize"; between products "norm", "rope", "rope_into_cache", "gate", "attention", "sample",
        "router", "combine" and "image".
    constants: the facts about shapes and alignment that the kernel is specialised for.
    threadgroups: of the grid, by x, y and z; threads: of one threadgroup.
    arguments: by buffer index, the operand's role ("none": left unbound) and the element that it begins with.
    params_index, params: the buffer index and the bytes of the parameter struct (csrc/gpu/launch.h).
    """

    kernel: str
    file: str
    instance: str
    family: str
    constants: tuple[str, ...]
    threadgroups: tuple[int, int, int]
    threads: int
    arguments: tuple[tuple[str, int], ...]
    params_index: int
    params: bytes


@dataclass(frozen=True)
class Plan:
    """How one op call runs.

    op: as the caller named it. device: "cpu" or "mps".
    instruction_set: of the CPU kernels; None on "mps".
    activations: of a product on CPU, "exact" or "int8" (see set_cpu_activations); else None.
    gpu: Metal's name of the architecture; None on "cpu". launches: its kernels, in order; empty on "cpu".
    excluded: kernel families that gave wrong results in their self-check on this GPU and are not used.
    workspace: size of "workspace", which launches hand on, in values of 32 bits.
    """

    op: str
    device: str
    instruction_set: str | None = None
    activations: str | None = None
    gpu: str | None = None
    excluded: tuple[str, ...] = ()
    launches: tuple[Launch, ...] = ()
    workspace: int = 0

    def __str__(self) -> str:
        lines = [f"{self.op} on {self.gpu or self.instruction_set}"]
        lines += ["  activations quantized to int8"] if self.activations == "int8" else []
        lines += [f"  excluded after a failed self-check: {', '.join(self.excluded)}"] if self.excluded else []
        for launch in self.launches:
            threadgroups = "x".join(map(str, launch.threadgroups))
            lines.append(f"  {launch.kernel}  [{launch.family}]  {threadgroups} threadgroups of {launch.threads}")
            lines += [f"    {', '.join(launch.constants)}"] if launch.constants else []
        return "\n".join(lines)


def _launch(fields: dict[str, Any]) -> Launch:
    read = {"constants": tuple, "threadgroups": tuple, "params": bytes.fromhex}
    read["arguments"] = lambda arguments: tuple(map(tuple, arguments))
    return Launch(**{name: read.get(name, lambda value: value)(value) for name, value in fields.items()})


def _plan(op: str, text: str) -> Plan:
    fields = json.loads(text)
    launches = tuple(map(_launch, fields.pop("launches", ())))
    return Plan(op=op, launches=launches, excluded=tuple(fields.pop("excluded", ())), **fields)


class _Recorder(TorchDispatchMode):
    """Asks for the plan of each of this package's ops that runs."""

    def __init__(self, gpu: str, macos: int) -> None:
        super().__init__()
        self.plans: list[Plan] = []
        self._named = {"gpu": gpu, "macos": macos}
        self._decoder_step = ops.decoder_step.default
        self._composite = torch._C.DispatchKeySet(torch._C.DispatchKey.CompositeExplicitAutograd)
        self._twins = {getattr(ops, name).default: getattr(ops, f"explain_{name}").default for name in _OPS}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is self._decoder_step:  # the ops that it is made of are those that have plans
            with self:
                return func.redispatch(self._composite, *args, **kwargs)
        result = func(*args, **kwargs)
        if func in self._twins:  # after the call: a kernel's first use may have excluded it
            name = kwargs.get("op", func._schema.name.split("::")[-1])
            self.plans.append(_plan(name, self._twins[func](*args, **kwargs, **self._named)))
        return result


def explain(
    function: Callable[..., Any], *args: Any, gpu: str | None = None, macos: tuple[int, int] = (26, 2), **kwargs: Any
) -> list[Plan]:
    """The plan of every op of this package that ``function(*args, **kwargs)`` calls, in order.

    function: one of the ops, or anything that calls them, such as a model. It runs, once, where its tensors are; with
        tensors on device "meta" nothing is computed, and a GPU must be named.
    gpu: Metal's name of an Apple GPU ("applegpu_g13g" is an M1, "applegpu_g16s" an M4 Pro or Max, "applegpu_g17g" an
        M5) whose plan is wanted, with a slash and its number of cores where that is not the usual one
        ("applegpu_g16s/16"); None for the device that the tensors are on.
    macos: the version that the named GPU runs under; tensor operations need (26, 2).

    Raises ValueError for an unknown name of a GPU, and what ``function`` raises.

    >>> from quantization_mlx import explain, quantize, quantized_matmul
    >>> weights = quantize(torch.randn(4096, 4096))
    >>> [plan] = explain(quantized_matmul, torch.randn(64, 4096).half(), *(t for t in weights), gpu="applegpu_g17s")
    >>> plan.launches[0].family
    'tile'
    """
    with _Recorder(gpu or "", 100 * macos[0] + macos[1]) as recorder, torch.no_grad():
        function(*args, **kwargs)
    return recorder.plans
