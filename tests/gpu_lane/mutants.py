"""Planted bugs: edits of a shader, the sanitizer that must flag each, and calls that run into it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from calls import Call
from fast_calls import AnyCall, attention, norm, sample

METAL = Path(__file__).resolve().parents[2] / "metal"
BARRIER = r"threadgroup_barrier\(mem_flags::mem_(threadgroup|device)\);"
LATE = "late"  # no sanitizer: every other simdgroup comes late out of each barrier, and results must be wrong
LINE_MARKER = re.compile(r'^# \d+ "([^"]*)"', re.MULTILINE)  # of the preprocessor: what follows is from this file

ROW_OF_W = r"row_(words|halves|bytes) = ([^;]+);"


def shader(name: str) -> Path:
    """A file of metal/, by its name, which is in one of the folders."""
    [path] = METAL.glob(f"*/{name}")
    return path


@dataclass(frozen=True)
class Mutant:
    """An edit of the preprocessed text of metal/*/<file>.metal: what matches `old` becomes `new`.

    tool: the sanitizer that must flag it, or LATE. header: the one whose text is edited; "" for all of them. only: the
    number of the match there that is edited; None for all.
    """

    tool: str
    file: str
    old: str
    new: str
    calls: tuple[AnyCall, ...]
    header: str = ""
    only: int | None = None

    def __call__(self, text: str) -> str:
        matches = [match for match in re.finditer(self.old, text) if self._is_edited(text[: match.start()])]
        for match in reversed(matches if self.only is None else matches[self.only : self.only + 1]):
            text = text[: match.start()] + match.expand(self.new) + text[match.end() :]
        return text

    def _is_edited(self, before: str) -> bool:
        return not self.header or Path(LINE_MARKER.findall(before)[-1]).name == self.header


QMV = tuple(Call(rows=rows, n=37, k=1088) for rows in (1, 3, 12))
GATED = tuple(replace(call, op="quantized_gated_matmul", activation="silu") for call in QMV)
QVM = tuple(Call(rows=rows, n=192, k=37, transpose=False) for rows in (1, 4))
TILE = Call(rows=29, n=70, k=192)
TILES = (TILE, Call(rows=29, n=192, k=70, transpose=False))
SORTED = Call(op="gather_qmm", n=70, k=192, experts=4, pairs=40, sorted=True)
MANY_SORTED = Call(op="gather_qmm", n=70, k=192, experts=64, pairs=500)
COLUMNS = tuple(Call(mode="marlin_fp4", group_size=128, rows=rows, n=37, k=1152, transpose=False) for rows in (1, 4))
SPLIT = Call(n=64, k=512, transpose=False)

NORMS = (norm("rms_norm", 3, 2560), norm("layer_norm", 3, 2560))
ATTENTION = attention(300, key_heads=2, group=2)
MANY_QUERIES = attention(100, dim=64, queries=40, key_heads=1, group=2)


# With rules that take every step; and the greatest logits alone, of which many are those of previous tokens.
SAMPLES = (
    sample(64, 20011, previous=300, has_seeds=True, temperature=0.4, top_k=300, top_p=0.9, repetition_penalty=3.0),
    sample(200, 1536, previous=600, temperature=0.0, repetition_penalty=3.0),
)


def _barriers(file: str, header: str, *calls: AnyCall, late: Sequence[int] = ()) -> dict[str, Mutant]:
    """late: numbers of those that racecheck does not miss: it looks at threadgroup memory, and no access beside an
    atomic one is a hazard to it.
    """
    count = len(re.findall(BARRIER, shader(header).read_text()))
    return {
        f"{header}: without barrier {i + 1} of {count}": Mutant(
            LATE if i + 1 in late else "racecheck", file, BARRIER, "", calls, header, i
        )
        for i in range(count)
    }


MUTANTS = {
    **_barriers("matvec", "matvec.h", *QMV, *GATED, *QVM),
    **_barriers("matvec", "matvec_columns.h", *COLUMNS),
    **_barriers("matmul", "matmul.h", *TILES, SORTED),
    # Before and after the pairs are counted, and before they are placed, which racecheck sees in some runs only.
    **_barriers("sort_pairs", "sort_pairs.metal", MANY_SORTED, late=(2, 3, 4)),
    **_barriers("norm", "norm.h", *NORMS),
    **_barriers("attention", "attention.h", ATTENTION),
    **_barriers("attention_tile", "attention_tile.h", MANY_QUERIES),
    # Of the bits of previous tokens, then of the histogram.
    **_barriers("sample", "sample.h", *SAMPLES, late=(1, 2, 3, 4, 6)),
    "matmul: rows of x overlap in threadgroup memory": Mutant(
        "racecheck", "matmul", r"row \* padded<T>\(depth\)", "row * (padded<T>(depth) - 16)", (TILE,)
    ),
    "matmul: rows of w overlap in threadgroup memory": Mutant(
        "racecheck", "matmul", r"\* padded<T>\(row_elements\)", "* (padded<T>(row_elements) - 16)", TILES
    ),
    "matmul: threadgroup memory without room for the padding": Mutant(
        "memcheck", "matmul", r"element_size / 16 \+ 1\)", "element_size / 16)", TILES
    ),
    "matvec: rows of w too far apart": Mutant("memcheck", "matvec", ROW_OF_W, r"row_\1 = (\2) + 64;", (*QMV, *QVM)),
    "matmul: rows of w too far apart": Mutant("memcheck", "matmul", ROW_OF_W, r"row_\1 = (\2) + 64;", TILES),
    "matvec: rows of y too far apart": Mutant(
        "memcheck", "matvec", r"\* params\.n \+", "* (params.n + 8) +", (*QMV[1:], QVM[1])
    ),
    "matmul: rows of y too far apart": Mutant(
        "memcheck", "matmul", r"static_cast<long>\(params\.n\) \+ n\b", "static_cast<long>(params.n + 8) + n", TILES
    ),
    "matvec: one row of w more than there is": Mutant(
        "memcheck", "matvec", r"aligned_outputs \|\| ([^|<]+) < params\.n", r"aligned_outputs || \1 <= params.n", QMV
    ),
    "matvec: rows of values too far from those of gates": Mutant(
        "memcheck", "matvec", r"\? params\.n \+", "? params.n + 8 +", GATED
    ),
    "matvec: partial sums over one another": Mutant(
        "initcheck", "matvec", r"part \* params\.y_part_stride", "part / 2 * params.y_part_stride", (SPLIT,)
    ),
    "matmul: partial sums over one another": Mutant(
        *("initcheck", "matmul", r"part \* params\.y_part_stride", "part / 2 * params.y_part_stride"),
        (Call(rows=20, n=64, k=2176),),
    ),
}
