"""Formats, and the shapes that are timed: what the suites and the tables of their results have in common."""

from __future__ import annotations

from calls import Call

AFFINE = tuple(("affine", group_size, bits) for bits in (2, 3, 4, 5, 6, 8) for group_size in (32, 64, 128))
FORMATS = (*AFFINE, ("mxfp4", 32, 4), ("mxfp8", 32, 8), ("nvfp4", 16, 4))
# Of packed columns.
COLUMN_WIDTHS = {"marlin_fp4": 4, "marlin_fp8": 8, "marlin_int2": 2, "marlin_int4": 4, "marlin_int4_sym": 4}
COLUMN_FORMATS = tuple((mode, group_size, bits) for mode, bits in COLUMN_WIDTHS.items() for group_size in (32, 64, 128))
COLUMN_FP4 = ("marlin_fp4", 128, 4)
SOME_FORMATS = (("affine", 32, 3), *FORMATS[-3:])
FOUR_BIT, NVFP4 = ("affine", 64, 4), ("nvfp4", 16, 4)
DTYPES = ("float32", "float16", "bfloat16")

# Of the timing tables: n and k, rows of x, rows of tiled products, rows where w is not transposed.
SHAPES = ((4096, 4096), (8192, 8192), (4096, 14336), (14336, 4096))  # n, k
ROWS = (1, 2, 4, 8, 16, 32, 64, 512)
LARGE = {"n": 8192, "k": 8192}
EXPERT = {"op": "gather_qmm", "n": 1024, "k": 2048}
TILE_ROWS = (64, 512)
SWEEP = range(1, 65)
PLAIN_ROWS = (1, 2, 4, 8, 16, 64, 512)


def call_of(format: tuple[str, int, int], **more) -> Call:
    mode, group_size, bits = format
    return Call(mode=mode, group_size=group_size, bits=bits, **more)
