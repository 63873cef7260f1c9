"""Results as tables in Markdown, for the terminal and for the documentation."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from calls import Call
from shapes import EXPERT, GATED, GATED_ROWS, LARGE, PLAIN_ROWS, ROWS, SHAPES, SMALL_KS, SWEEP, TILE_ROWS

KERNEL = re.compile(
    r"\w+?_(?P<op>(?:gather_q|q|dequantize)\w*?)_(?:float32|float16|bfloat16)_gs_\d+_b_\d+(?P<rows>\w*)"
)
TYPE = re.compile(r"_(?:float32|float16|bfloat16)\w*")  # and the rows of an instance, behind it
NOTHING = ""
OF_COPY = "Of copy: the rate at which packed weights, scales and biases are read, as a share of the copy bandwidth."


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[object]], note: str = "") -> str:
    cells = [list(map(str, row)) for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join([f"### {title}", "", *lines, *(["", note] if note else [])]) + "\n"


def short_name(kernel: str) -> str:
    match = KERNEL.fullmatch(kernel)
    return match["op"] + match["rows"] if match else kernel


# --- Correctness ------------------------------------------------------------------------------------------------------


def checks(results: Sequence[dict[str, Any]]) -> str:
    """results: {"build", "kernels", "share", "wrong"} of each call."""
    kernels, calls, wrong, share = defaultdict(set), Counter(), Counter(), defaultdict(float)
    for result in results:
        for kernel in result["kernels"]:
            match = KERNEL.fullmatch(kernel)
            key = result["build"], match["op"] if match else TYPE.sub("", kernel)
            kernels[key].add(kernel)
            calls[key] += 1
            wrong[key] += bool(result["wrong"])
            share[key] = max(share[key], result["share"])
    rows = [
        (build, op, len(names), calls[build, op], wrong[build, op], f"{share[build, op]:.2f}")
        for (build, op), names in sorted(kernels.items())
    ]
    rows.append(("all", "", sum(map(len, kernels.values())), len(results), sum(bool(r["wrong"]) for r in results), ""))
    header = ("build", "kernels", "instances", "calls", "wrong", "worst error / allowed")
    return table("Results against float64 on the exact weights, and codes against MLX's", header, rows)


# --- Sanitizers -------------------------------------------------------------------------------------------------------


def sanitizers(reports: Sequence[dict[str, Any]]) -> str:
    rows = [(r["tool"], r["options"], r["launches"], r["errors"], r["failure"]) for r in reports]
    return table("compute-sanitizer, every family and instance", ("tool", "options", "launches", "errors", ""), rows)


def mutants(results: Sequence[dict[str, Any]]) -> str:
    verdict = {True: "yes", False: "**no**"}
    rows = [(r["mutant"], r["tool"], verdict[r["flagged"]], verdict[r["twin_is_clean"]]) for r in results]
    return table("Planted bugs", ("mutant", "tool", "flagged", "unmodified twin is clean"), rows)


# --- Times ------------------------------------------------------------------------------------------------------------


class Times:
    """Of the suite `time`; seconds by call and build, NaN where a result was wrong."""

    def __init__(self, results: dict[str, Any]) -> None:
        self._copy = results["copy"]
        self._times = {(Call(**t["call"]), t["build"]): t for t in results["times"]}
        self._timed = list(dict.fromkeys(call for call, _ in self._times))
        self._peers = {tuple(peer["shape"]): peer for peer in results["peers"]}

    def tables(self) -> list[str]:
        shapes = [self._shape(n, k) for n, k in SHAPES]
        kinds = (self._small_k(), self._formats(), self._not_transposed(), self._packed_columns(), self._gathered())
        return [*shapes, self._tiles(), self._steps(), *kinds, self._gated()]

    def _seconds(self, call: Call, build: str = "generic") -> float | None:
        found = self._times.get((call, build))
        return found["seconds"] if found else None

    def _micros(self, call: Call, build: str = "generic") -> str:
        return _micros(self._seconds(call, build))

    def _of_copy(self, call: Call, build: str) -> str:
        taken = self._seconds(call, build)
        return f"{100 * call.weight_bytes / taken / self._copy:.0f}%" if taken else NOTHING

    def _kernel(self, call: Call) -> str:
        found = self._times.get((call, "generic"))
        return " + ".join(map(short_name, found["kernels"])) if found else NOTHING

    def _shape(self, n: int, k: int) -> str:
        rows = []
        for m in ROWS:
            call = Call(rows=m, n=n, k=k)
            peer = self._peers.get((m, n, k), {})
            ours = [f(call, build) for build in ("generic", "known") for f in (self._micros, self._of_copy)]
            peers = [_micros(peer.get(name)) for name in ("int4pack", "linear")]
            rows.append((m, self._kernel(call), *ours, self._micros(call, "mlx"), *peers))
        header = ("rows", "kernel", "generic, us", "of copy", "known, us", "of copy")
        header += ("MLX's, us", "int4pack, us", "fp16 linear, us")
        return table(f"w {n} x {k}, float16, affine, 4 bits, group_size 64", header, rows, OF_COPY)

    def _tiles(self) -> str:
        rows = []
        for n, k in SHAPES:
            for m in TILE_ROWS:
                call = Call(rows=m, n=n, k=k)
                operations = 2 * m * n * k
                ours = [self._seconds(call, build) for build in ("generic", "known", "exchanged", "mlx")]
                linear = self._peers.get((m, n, k), {}).get("linear")
                rows.append((f"{n} x {k}", m, *(_teraflops(operations, taken) for taken in (*ours, linear))))
        header = ("w", "rows", "generic", "known", "exchanged", "MLX's", "fp16 linear")
        note = "Exchanged: generic, with ten exchanges around each multiplication of 8x8 matrices, as MLX's have them."
        return table("Tiled products, TFLOP/s", header, rows, note)

    def _steps(self) -> str:
        times = {m: self._seconds(Call(rows=m, **LARGE)) for m in SWEEP}
        if None in times.values():
            return table("Neighbouring rows", ("not timed",), [])
        rows = []
        for first in range(SWEEP.start, SWEEP.stop, 8):
            these = [m for m in range(first, first + 8) if m in times]
            kernels = dict.fromkeys(self._kernel(Call(rows=m, **LARGE)) for m in these)
            rows.append((f"{these[0]} to {these[-1]}", *(f"{times[m] * 1e6:.0f}" for m in these), ", ".join(kernels)))
        steps = {m: times[m] / times[m - 1] for m in SWEEP if m - 1 in times}
        rising, falling = max(steps, key=steps.get), min(steps, key=steps.get)
        note = f"The largest step up is from {rising - 1} to {rising} rows, {steps[rising]:.2f} times; "
        note += f"the largest down from {falling - 1} to {falling}, {steps[falling]:.2f} times."
        header = ("rows", *map(str, range(1, 9)), "kernels")
        return table("Neighbouring rows, w 8192 x 8192, generic, us", header, rows, note)

    def _small_k(self) -> str:
        """One row, or one row for each pair."""
        calls = [call for call in self._timed if call.k in SMALL_KS and call.rows == 1 and call.transpose]
        rows = []
        for call in calls:
            taken = (self._micros(call, build) for build in ("generic", "known"))
            rows.append((f"{call.n} x {call.k}", call.pairs or NOTHING, self._kernel(call), *taken))
        header = ("w", "pairs", "kernel", "generic, us", "known, us")
        return table("One row, K short or odd, float16, affine, 4 bits, group_size 64", header, rows)

    def _formats(self) -> str:
        """At one row."""
        kinds = {
            "qmv, float16": {},
            "qvm, float16": {"transpose": False},
            "qmv, bfloat16": {"dtype": "bfloat16"},
            "qmv, float32": {"dtype": "float32"},
        }
        rows = []
        plain = Call(transpose=False, **LARGE)
        for format in self._timed:
            other = replace(format, mode=plain.mode, group_size=plain.group_size, bits=plain.bits)
            if other != plain or format.is_column_packed:
                continue
            cells = []
            for more in kinds.values():
                call, four_bits = (replace(c, **{"transpose": True, **more}) for c in (format, plain))
                taken, least = self._seconds(call), self._seconds(four_bits)
                if taken and least:
                    rate = call.weight_bytes / taken
                    share = four_bits.weight_bytes / least / rate
                    cells.append(f"{taken * 1e6:.1f}, {rate / 1e9:.0f} GB/s, {share:.2f}")
                else:
                    cells.append(NOTHING)
            rows.append((format.format, *cells))
        note = "Each: us, rate of the weights, and the time over what the bytes take at the rate of affine g64 b4."
        return table("Formats, one row, w 8192 x 8192, generic", ("format", *kinds), rows, note)

    def _gated(self) -> str:
        calls = [(Call(rows=rows, **GATED), Call(rows=rows, **LARGE)) for rows in GATED_ROWS]
        rows = [
            (gated.rows, self._micros(gated), self._of_copy(gated, "generic"), self._micros(c)) for gated, c in calls
        ]
        header = ("rows", "generic, us", "of copy", "the product alone, us")
        return table("Gates and values, w 8192 x 8192, with the activation, float16, affine, 4 bits", header, rows)

    def _not_transposed(self) -> str:
        calls = [Call(rows=m, transpose=False, **LARGE) for m in PLAIN_ROWS]
        rows = [
            (c.rows, self._kernel(c), *(f(c, b) for b in ("generic", "known") for f in (self._micros, self._of_copy)))
            for c in calls
        ]
        header = ("rows", "kernel", "generic, us", "of copy", "known, us", "of copy")
        return table("w not transposed, 8192 x 8192, float16, affine, 4 bits, group_size 64", header, rows)

    def _packed_columns(self) -> str:
        calls = [call for call in self._timed if call.is_column_packed]
        rows = [(c.format, c.rows, self._kernel(c), self._micros(c), self._of_copy(c, "generic")) for c in calls]
        header = ("format", "rows", "kernel", "generic, us", "of copy")
        return table("Packed columns, w 8192 x 8192, float16", header, rows)

    def _gathered(self) -> str:
        rows = []
        for (call, _), found in self._times.items():
            if call.op == "gather_qmm" and call.k == EXPERT["k"]:
                rate = found["bytes"] / found["seconds"]
                of_copy = f"{100 * rate / self._copy:.0f}%"
                order = "sorted" if call.sorted else "any"
                layout = "yes" if call.transpose else "no"
                cells = (self._kernel(call), _micros(found["seconds"]), of_copy)
                rows.append((call.experts, call.pairs, order, layout, *cells))
        header = ("experts", "pairs", "order", "transposed", "kernel", "us", "of copy")
        note = "Of copy: the rate of the experts that are asked for, each counted once."
        return table(f"Gathered, experts {EXPERT['n']} x {EXPERT['k']}, one row to a pair, generic", header, rows, note)


def _micros(taken: float | None) -> str:
    return NOTHING if taken is None else f"{taken * 1e6:.1f}"


def _teraflops(operations: int, taken: float | None) -> str:
    return f"{operations / taken / 1e12:.1f}" if taken else NOTHING
