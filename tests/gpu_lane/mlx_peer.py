"""MLX's own kernels, from the headers of the installed mlx wheel, built and launched as ours are."""

from __future__ import annotations

import importlib.util
import struct
from functools import cache
from pathlib import Path

from calls import Call
from cubin import Source

KERNELS = """
#include "mlx/backend/metal/kernels/utils.h"
#include "mlx/backend/metal/kernels/steel/gemm/gemm.h"
#include "mlx/backend/metal/kernels/quantized_utils.h"
#include "mlx/backend/metal/kernels/quantized.h"
instantiate_kernel("qmv_fast", affine_qmv_fast, half, 64, 4, false)
instantiate_kernel("qmm_t", affine_qmm_t, half, 64, 4, true, false)
"""
# They have more than one dimension of threads, and fill fragments by themselves.
EXCHANGED = "GPU_LANE_APPLE_LAYOUT"
DEFINES = ("GPU_LANE_THREE_DIMENSIONS", EXCHANGED)
ROLES = ("w", "scales", "biases", "x", "y")
QMV_ROWS = 8  # mlx's limit depends on the GPU: from 6 on to 18


@cache
def include_dir() -> Path | None:
    """Of the installed mlx, whose package may have more than one place."""
    spec = importlib.util.find_spec("mlx")
    places = [Path(place) / "include" for place in (spec.submodule_search_locations or ())] if spec else []
    return next((place for place in places if (place / "mlx" / "backend").is_dir()), None)


def is_installed() -> bool:
    return include_dir() is not None


@cache
def source() -> Source:
    return Source(None, KERNELS, (include_dir(),), defines=DEFINES, keeps_vectors=False)


def launch_of(call: Call) -> tuple[str, tuple[int, int, int], tuple[int, int, int], dict[int, tuple[str, int | str]]]:
    """Kernel, threads, threadgroups and arguments by index, for float16, 4 bits, group_size 64, one matrix."""
    if call.rows <= QMV_ROWS:
        kernel, threads, threadgroups = "qmv_fast", (32, 2, 1), (call.rows, call.n // 8, 1)
        sizes = (call.k, call.n)
    else:
        kernel, threads, threadgroups = "qmm_t", (32, 2, 2), (call.n // 32, -(-call.rows // 32), 1)
        sizes = (call.k, call.n, call.rows)
    arguments: dict[int, tuple[str, int | str]] = {index: (role, 0) for index, role in enumerate(ROLES)}
    for size in sizes:
        arguments[len(arguments)] = ("bytes", struct.pack("<i", size).hex())
    # Counts of batch dimensions, 0, are values; their shapes and strides are pointers: x's, then w's.
    first = len(arguments)
    for index in range(first, first + 8):
        arguments[index] = ("bytes", bytes(4).hex()) if index in (first, first + 3) else ("none", 0)
    return kernel, threads, threadgroups, arguments
