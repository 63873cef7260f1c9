"""Calls of fast ops and of decoder layers, by suite."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from fast_calls import FastCall, LayerCall, attention, gate, norm, rope, rope_into_cache
from shapes import CONTEXTS, LAYER_CORES, NORM_LENGTH, NORM_ROWS

NORM_OPS = ("rms_norm", "layer_norm", "add_rms_norm")
GATES = (
    ("swiglu", {}),
    ("swiglu", {"alpha": 1.702, "limit": 1.5, "offset": 1.0}),
    ("geglu", {"approximate": "tanh"}),
    ("geglu", {"approximate": "none"}),
)
# Head sizes of queries with keys and of values, by the form that serves them: ragged ones and whole ones.
HEADS = (((50, 50), (64, 64)), ((100, 90), (128, 128)), ((200, 200), (256, 256)), ((570, 500), (576, 512)))
MASKS = ("", "causal", "bool", "added")


def candidates(dtype: str, ragged: bool) -> Iterator[FastCall]:
    """Calls that together reach every kernel: on shapes that no fast path takes, or on those that all do."""
    yield from _norms(dtype, ragged)
    yield from _elementwise(dtype, ragged)
    yield from _caches(dtype, ragged)
    yield from _attention(dtype, ragged)


def _norms(dtype: str, ragged: bool) -> Iterator[FastCall]:
    layout = {"padding": 3, "before": 1} if ragged else {}
    for op, length in itertools.product(NORM_OPS, (37, 2563, 9001) if ragged else (64, 2560, 16384)):
        yield norm(op, 5, length, dtype, **layout)
    for op in NORM_OPS:
        yield norm(op, 3, 133 if ragged else 136, dtype, has_weight=False, **layout)


def _elementwise(dtype: str, ragged: bool) -> Iterator[FastCall]:
    for (op, options), step in itertools.product(GATES, (1, 2)):
        yield gate(op, 3, 1037 if ragged else 1536, dtype, step, int(ragged), **options)
    width, dims = (50, 36) if ragged else (128, 128)
    for traditional, has_offsets, has_freqs in itertools.product((False, True), repeat=3):
        yield rope(9, 5, width, dims, dtype, traditional, has_offsets, has_freqs, int(ragged))


def _caches(dtype: str, ragged: bool) -> Iterator[FastCall]:
    sizes = ((7, 1, 90, 20), (3, 3, 34, 0)) if ragged else ((8, 2, 128, 128), (4, 2, 576, 64))
    for size, has_all in itertools.product(sizes, (True, False)):
        yield rope_into_cache(*size, tokens=3, dtype=dtype, has_all=has_all)


def _attention(dtype: str, ragged: bool) -> Iterator[FastCall]:
    layout = {"dtype": dtype, "before": int(ragged)}
    for number, (sizes, rows) in enumerate(itertools.product(HEADS, (1, 2, 3, 7))):
        dim, value_dim = sizes[0] if ragged else sizes[1]
        heads = {"dim": dim, "value_dim": value_dim, "key_heads": 2, "batch": 2, "group": rows}
        for keys, more in ((77, 0), (1203, 1)):  # alone, and in parts
            mask, has_sinks = MASKS[(number + more) % len(MASKS)], bool((number + more) % 2)
            yield attention(keys, mask=mask, has_sinks=has_sinks, capacity=keys + 5, **heads, **layout)
    for (sizes, mask), queries in itertools.product(zip(HEADS, MASKS, strict=True), (3, 43)):
        dim, value_dim = sizes[0] if ragged else sizes[1]
        window = 31 if mask == "causal" else None
        heads = {"dim": dim, "value_dim": value_dim, "key_heads": 2, "group": 3}
        yield attention(100, queries=queries, mask=mask, window=window, has_sinks=ragged, **heads, **layout)


def timed() -> Iterator[tuple[FastCall | LayerCall, str]]:
    """With how they are built."""
    for build in ("generic", "known"):
        yield from ((attention(context), build) for context in CONTEXTS)
        for op, rows in itertools.product(("rms_norm", "add_rms_norm"), NORM_ROWS):
            yield norm(op, rows, NORM_LENGTH), build
        yield from ((LayerCall(context, cores), build) for context, cores in itertools.product(CONTEXTS, LAYER_CORES))
