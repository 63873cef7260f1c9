"""The cases of tests, of the GPU lane and of benchmarks: formats and dtypes, from the package's table of modes."""

from __future__ import annotations

import torch

from oracle import Format
from quantization_mlx.formats import MODES

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# All that the package has: test_quantize.py holds its table against mlx, test_marlin_ops.py against the documentation.
ALL_FORMATS = tuple(
    Format(mode.name, group_size, bits)
    for mode in MODES.values()
    for bits in sorted(mode.bits)
    for group_size in sorted(mode.group_sizes)
)
MARLIN_FORMATS = tuple(format for format in ALL_FORMATS if format.is_column_packed)
MARLIN_BITS = {format.mode: format.bits for format in MARLIN_FORMATS}
FORMATS = tuple(format for format in ALL_FORMATS if not format.is_column_packed)
AFFINE_FORMATS = tuple(format for format in FORMATS if format.is_affine)
FLOAT_FORMATS = tuple(format for format in FORMATS if not format.is_affine)
# One of each kind of packing and scale, for tests whose subject is not the number format.
SOME_FORMATS = (Format("affine", 64, 4), Format("affine", 32, 3), Format("affine", 128, 8), *FLOAT_FORMATS)
