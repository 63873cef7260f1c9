"""What the lane runs, by suite: calls, and how their kernels are built.

check      every kernel without tensor operations, on shapes that no fast path takes and on shapes that all do
sanitize   every family and instance, few enough for NVIDIA's sanitizers
mutants    shaders with a planted bug each, and their twins without it
time       the shapes of language models
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import fast_suites
import mlx_peer
from calls import Call
from fast_calls import AnyCall
from mutants import LATE, MUTANTS
from plans import plan_of
from shapes import (
    EXPERT,
    GATED,
    GATED_ROWS,
    LARGE,
    PLAIN_ROWS,
    ROWS,
    SHAPES,
    SMALL_KS,
    SMALL_N,
    SMALL_PAIRS,
    SWEEP,
    TILE_ROWS,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

from cases import ALL_FORMATS, FORMATS, MARLIN_FORMATS, SOME_FORMATS
from oracle import Format

FOUR_BIT, NVFP4, COLUMN_FP4 = Format("affine", 64, 4), Format("nvfp4", 16, 4), Format("marlin_fp4", 128, 4)
DTYPES = ("float32", "float16", "bfloat16")


def call_of(format: Format, **more) -> Call:
    return Call(**format.options, **more)


@dataclass(frozen=True)
class Item:
    """A call, and how its kernels are built.

    build: "generic"; "known", where the compiler sees the shapes, too; "plain", hardly optimised, loops kept; "late",
    plain, with simdgroups that come late; "mlx", MLX's own kernels; "exchanged", generic, with 8x8 matrices held as
    those want them. change: the name of a mutant.
    tag: items with different ones share no kernel and no cubin, all of which a sanitizer takes in hand.
    """

    suite: str
    call: AnyCall
    build: str = "generic"
    change: str = ""
    tag: str = ""


# --- Calls that reach every kernel ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shapes:
    """Sizes of products: short ones and ones long enough for split-K.

    groups: along the quantized dimension, by group_size. free: along the other one.
    """

    rows: Sequence[int]
    groups: dict[int, tuple[int, int]]
    free_n: int
    free_k: tuple[int, int, int]
    offset: int = 0
    x_padding: int = 0
    invalid: bool = False


# No dimension a multiple of a block's, as far as the format allows, and nothing aligned.
RAGGED = Shapes(
    rows=(*range(1, 18), 20, 29, 40, 61),
    groups={16: (5, 129), 32: (3, 65), 64: (3, 33), 128: (3, 17)},
    free_n=37,
    free_k=(37, 259, 1061),
    offset=1,
    x_padding=3,
    invalid=True,
)
ALIGNED = Shapes(
    rows=(64, 32, 16, 12, 8, 6, 4, 3, 2, 1),
    groups={16: (16, 128), 32: (8, 64), 64: (4, 32), 128: (2, 16)},
    free_n=128,
    free_k=(64, 512, 1024),
)


def products(format: Format, dtype: str, shapes: Shapes) -> Iterator[Call]:
    """Candidates: some for each kernel, in the order in which they are wanted."""
    layout = {"dtype": dtype, "offset": shapes.offset, "x_padding": shapes.x_padding}
    group_size = format.group_size
    grouped = [count * group_size for count in shapes.groups[group_size]]
    columns = format.is_column_packed
    sizes = [{"n": shapes.free_n, "k": k, "transpose": not columns} for k in grouped]
    if not columns:
        sizes += [{"n": grouped[0], "k": k, "transpose": False} for k in shapes.free_k]
    for size, rows in itertools.product(sizes, shapes.rows):
        yield call_of(format, rows=rows, **size, **layout)
    gathered = {**layout, "op": "gather_qmm", "experts": 4, "invalid": shapes.invalid}
    for size in sizes:
        if size["k"] <= max(grouped[0], shapes.free_k[0]):
            yield from (call_of(format, rows=rows, pairs=5, **size, **gathered) for rows in shapes.rows)
            for pairs in (37, 69) if shapes.invalid else (32, 96):  # few of each expert, and more
                yield call_of(format, pairs=pairs, sorted=True, **size, **gathered)
        elif not size["transpose"]:
            yield call_of(format, pairs=5, **size, **gathered)


def gated(format: Format, dtype: str, shapes: Shapes) -> Iterator[Call]:
    """For each activation in turn; rows of a matvec."""
    layout = {"dtype": dtype, "offset": shapes.offset, "x_padding": shapes.x_padding}
    for activation, rows in zip(itertools.cycle(("silu", "gelu", "gelu_tanh")), (1, 2, 3, 4, 6, 8, 12)):
        for count in shapes.groups[format.group_size]:
            sizes = {"n": shapes.free_n, "k": count * format.group_size}
            yield call_of(format, op="quantized_gated_matmul", activation=activation, rows=rows, **sizes, **layout)


def conversions(format: Format, dtype: str, shapes: Shapes) -> Iterator[Call]:
    n, k = (23, 384) if shapes.offset else (16, 256)
    for op in ("quantize", "dequantize"):
        transpose = not format.is_column_packed
        yield call_of(format, op=op, dtype=dtype, n=n, k=k, offset=shapes.offset, transpose=transpose)


def reaching(calls: Iterable[AnyCall]) -> Iterator[AnyCall]:
    """Those calls that run a kernel that none before them runs."""
    seen: set[str] = set()
    for call in calls:
        kernels = {launch.kernel for launch in plan_of(call).launches}
        if not kernels <= seen:
            seen |= kernels
            yield call


def kernels_of(format: Format, dtype: str) -> Iterator[Call]:
    for shapes in (RAGGED, ALIGNED):
        yield from reaching(products(format, dtype, shapes))
        yield from conversions(format, dtype, shapes)


def special() -> Iterator[Call]:
    """Batches, a matrix's own global scale, more than one tile of rows."""
    sizes = ({"n": 112, "k": 192}, {"n": 64, "k": 37, "transpose": False}, {"n": 64, "k": 2176})
    for format, dtype in ((FOUR_BIT, "float16"), (NVFP4, "float32")):
        for size, rows, batch in itertools.product(sizes, (1, 3, 20), (2, 3)):
            yield call_of(format, dtype=dtype, rows=rows, batch=batch, batched_w=batch == 3, **size)
        for size, rows in itertools.product(sizes, (70, 130)):
            yield call_of(format, dtype=dtype, rows=rows, **size)
    for dtype in DTYPES:
        scaled = {"dtype": dtype, "global_scale": True}
        for size in sizes:
            yield from (call_of(NVFP4, rows=rows, **size, **scaled) for rows in (1, 3, 20))
            experts = {"op": "gather_qmm", "experts": 4, "invalid": True}
            yield from (call_of(NVFP4, rows=rows, pairs=5, **experts, **size, **scaled) for rows in (1, 3, 20))
            yield call_of(NVFP4, pairs=40, sorted=True, **experts, **size, **scaled)
        yield from (call_of(NVFP4, op=op, n=23, k=384, **scaled) for op in ("quantize", "dequantize"))
    for experts, pairs in ((1, 70), (10, 40)):
        yield call_of(FOUR_BIT, op="gather_qmm", experts=experts, pairs=pairs, sorted=True, n=72, k=128)


def check_products() -> Iterator[Item]:
    for format, dtype in itertools.product(ALL_FORMATS, DTYPES):
        yield from (Item("check", call, "plain") for call in kernels_of(format, dtype))
    yield from (Item("check", call, "plain") for call in special())
    # The others are in `time`, on large shapes.
    for format in (FOUR_BIT, COLUMN_FP4):
        yield from (Item("check", call) for call in kernels_of(format, "float16"))
    for format, dtype, shapes in itertools.product(FORMATS, DTYPES, (RAGGED, ALIGNED)):
        yield from (Item("check", call, "plain") for call in gated(format, dtype, shapes))
    for format, dtype in itertools.product(FORMATS, DTYPES):
        n, k = RAGGED.free_n, format.group_size * RAGGED.groups[format.group_size][0]
        yield from (Item("check", call_of(format, dtype=dtype, rows=rows, n=n, k=k)) for rows in (1, 29))


def check_fast() -> Iterator[Item]:
    for dtype, ragged in itertools.product(DTYPES, (True, False)):
        yield from (Item("check", call, "plain") for call in fast_suites.candidates(dtype, ragged))
    for ragged in (True, False):
        yield from (Item("check", call) for call in reaching(fast_suites.candidates("float16", ragged)))


# --- Sanitizers -------------------------------------------------------------------------------------------------------


def sanitized() -> Iterator[Call]:
    for shapes, format in itertools.product((RAGGED, ALIGNED), (FOUR_BIT, COLUMN_FP4)):
        yield from reaching(products(format, "float16", shapes))
        yield from conversions(format, "float16", shapes)
    for format, dtype in zip(SOME_FORMATS[1:], itertools.cycle(("bfloat16", "float32", "float16")), strict=False):
        for transpose, rows in itertools.product((True, False), (1, 3, 20)):
            free, grouped = RAGGED.free_n, format.group_size * RAGGED.groups[format.group_size][0]
            n, k = (free, grouped) if transpose else (grouped, free)
            layout = {"transpose": transpose, "offset": RAGGED.offset}
            yield call_of(format, dtype=dtype, rows=rows, n=n, k=k, **layout)
        yield from conversions(format, dtype, RAGGED)
    yield call_of(NVFP4, rows=20, n=64, k=2176, batch=3, batched_w=True, global_scale=True)
    for shapes in (RAGGED, ALIGNED):
        yield from gated(FOUR_BIT, "float16", shapes)


def sanitize_products() -> Iterator[Item]:
    yield from (Item("sanitize", call, "plain", tag="sanitize") for call in sanitized())


def sanitize_fast() -> Iterator[Item]:
    """Every kernel of float16 without a fast path, and every kernel of any type with all of them."""
    ragged = reaching(fast_suites.candidates("float16", True))
    aligned = reaching(call for dtype in DTYPES for call in fast_suites.candidates(dtype, False))
    yield from (Item("sanitize", call, "plain", tag="sanitize") for call in (*ragged, *aligned))


def _mutants(is_wanted: Callable[[AnyCall], bool]) -> Iterator[Item]:
    for name, mutant in MUTANTS.items():
        build = "late" if mutant.tool == LATE else "plain"
        for call in filter(is_wanted, mutant.calls):
            yield Item("mutants", call, build, change=name, tag=name)
            yield Item("mutants", call, build, tag=f"twin of {name}")


# --- Times ------------------------------------------------------------------------------------------------------------


def small_k() -> Iterator[Call]:
    for k in SMALL_KS:
        yield Call(n=SMALL_N, k=k)
        yield Call(op="gather_qmm", n=EXPERT["n"], k=k, experts=SMALL_PAIRS, pairs=SMALL_PAIRS)


def time_products() -> Iterator[Item]:
    for (n, k), rows in itertools.product(SHAPES, ROWS):
        builds = ("generic", "known", "mlx") if mlx_peer.is_installed() else ("generic", "known")
        yield from (Item("time", Call(rows=rows, n=n, k=k), build) for build in builds)
    for (n, k), rows in itertools.product(SHAPES, TILE_ROWS):
        yield Item("time", Call(rows=rows, n=n, k=k), "exchanged")
    for call, build in itertools.product(small_k(), ("generic", "known")):
        yield Item("time", call, build)
    for rows in SWEEP:
        yield Item("time", Call(rows=rows, **LARGE))
    for format, transpose in itertools.product(FORMATS, (True, False)):
        yield Item("time", call_of(format, transpose=transpose, **LARGE))
    yield from (Item("time", Call(rows=rows, **GATED)) for rows in GATED_ROWS)
    for format, dtype in itertools.product(SOME_FORMATS, ("bfloat16", "float32")):
        yield Item("time", call_of(format, dtype=dtype, **LARGE))
    for rows, build in itertools.product(PLAIN_ROWS, ("generic", "known")):
        yield Item("time", Call(rows=rows, transpose=False, **LARGE), build)
    for format in MARLIN_FORMATS:
        yield Item("time", call_of(format, transpose=False, **LARGE))
    for rows in PLAIN_ROWS:
        yield Item("time", call_of(COLUMN_FP4, rows=rows, transpose=False, **LARGE))
    for experts, pairs, sorted in itertools.product((8, 64), (8, 512), (False, True)):
        call = Call(**EXPERT, experts=experts, pairs=pairs, sorted=sorted)
        yield from (Item("time", replace(call, transpose=transpose)) for transpose in (True, False))


def time_fast() -> Iterator[Item]:
    yield from (Item("time", *timed) for timed in fast_suites.timed())


def is_product(call: AnyCall) -> bool:
    return isinstance(call, Call)


# By suite and kind of calls.
SUITES = {
    "check": {"products": check_products, "fast": check_fast},
    "sanitize": {"products": sanitize_products, "fast": sanitize_fast},
    "mutants": {
        "products": lambda: _mutants(is_product),
        "fast": lambda: _mutants(lambda call: not is_product(call)),
    },
    "time": {"products": time_products, "fast": time_fast},
}
KINDS = ("products", "fast")


def items(suites: Iterable[str], kinds: Iterable[str] = KINDS) -> list[Item]:
    """Each once: a call of several tables is timed for all of them."""
    return list(dict.fromkeys(item for suite in suites for kind in kinds for item in SUITES[suite][kind]()))
