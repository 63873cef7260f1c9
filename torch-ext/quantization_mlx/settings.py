"""Whether products on CPU may quantize their activations to int8."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from ._ops import ops

__all__ = ["cpu_activations", "get_cpu_activations", "set_cpu_activations"]

Activations = Literal["exact", "int8"]


def set_cpu_activations(activations: Activations) -> None:
    """Set what products on CPU multiply, for all threads of the process.

    "exact": the activations that they are given. This is the default, unless the environment variable
    ``QUANTIZATION_MLX_CPU_ACTIVATIONS`` names another.
    "int8": each group of ``group_size`` activations as int8 with one scale, ``max|x| / 127``. It is faster, and wrong
    by about half a percent of a result's typical size; docs/cpu.md has figures. It serves forward products with
    transposed weights, which those of all layers are, in every mode but mxfp8; gradients and other products stay exact.

    Raises ValueError for another name, and for "int8" where the kernels in use lack AVX-512 with VNNI and VBMI.
    """
    ops._set_cpu_activations(activations)


def get_cpu_activations() -> Activations:
    """What products on CPU multiply: "exact" or "int8". Raises what :func:`set_cpu_activations` does where the
    environment variable asks for what cannot be."""
    return ops._get_cpu_activations()


@contextmanager
def cpu_activations(activations: Activations) -> Iterator[None]:
    """:func:`set_cpu_activations` for a while; for all threads, too."""
    before = get_cpu_activations()
    set_cpu_activations(activations)
    try:
        yield
    finally:
        set_cpu_activations(before)
