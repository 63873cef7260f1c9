"""Calls of fast ops and of decoder layers, by suite."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from fast_calls import (
    FastCall,
    LayerCall,
    attention,
    combine,
    gate,
    norm,
    packed_attention,
    resample_image,
    rope,
    rope_into_cache,
    router,
    sample,
)
from shapes import (
    CONTEXTS,
    EXPERTS,
    LAYER_CORES,
    MIXTURE_TOKENS,
    NORM_LENGTH,
    NORM_ROWS,
    SAMPLED_ROWS,
    SAMPLING,
    VOCABULARY,
)

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
# What each form of the router scores by, groups among them.
ROUTERS = (
    {"scoring": "sigmoid", "groups": 4, "groups_used": 2, "normalise": True, "scale": 2.5, "has_bias": True},
    {"scoring": "softmax", "normalise": True},
    {"scoring": "softmax", "groups": 2, "groups_used": 1},
    {"scoring": "softmax_of_selected", "has_bias": True, "scale": 0.5},
)
# All rules of sampling, one by one after that, and none; temperatures at which few tokens have most of the weight.
ALL_RULES = {"temperature": 0.4, "top_k": 300, "top_p": 0.9, "min_p": 1e-4, "repetition_penalty": 1.7}
RULES = (
    ALL_RULES,
    {},
    {"temperature": 0.0},
    *({"temperature": 0.4, name: ALL_RULES[name]} for name in ("top_k", "top_p", "min_p")),
)
PACKED = ((32, 4), (64, 8))  # group sizes and bits of packed keys and values


def candidates(dtype: str, ragged: bool) -> Iterator[FastCall]:
    """Calls that together reach every kernel: on shapes that no fast path takes, or on those that all do."""
    yield from _norms(dtype, ragged)
    yield from _elementwise(dtype, ragged)
    yield from _caches(dtype, ragged)
    yield from _attention(dtype, ragged)
    yield from _mixtures(dtype, ragged)
    yield from _samples(dtype, ragged)
    yield from _images(dtype, ragged)


def _norms(dtype: str, ragged: bool) -> Iterator[FastCall]:
    layout = {"padding": 3, "before": 1} if ragged else {}
    for op, length in itertools.product(NORM_OPS, (37, 2563, 9001) if ragged else (64, 2560, 16384)):
        yield norm(op, 5, length, dtype, **layout)
    for op in NORM_OPS:
        yield norm(op, 3, 133 if ragged else 136, dtype, has_weight=False, **layout)


def _elementwise(dtype: str, ragged: bool) -> Iterator[FastCall]:
    for (op, options), step in itertools.product(GATES, (1, 2)):
        for experts in (3, 0) if op == "swiglu" else (0,):
            yield gate(op, 5, 1037 if ragged else 1536, dtype, step, int(ragged), experts, **options)
    width, dims = (50, 36) if ragged else (128, 128)
    for traditional, has_offsets, has_freqs in itertools.product((False, True), repeat=3):
        yield rope(9, 5, width, dims, dtype, traditional, has_offsets, has_freqs, int(ragged))


def _caches(dtype: str, ragged: bool) -> Iterator[FastCall]:
    sizes = ((7, 1, 90, 20), (3, 3, 34, 0)) if ragged else ((8, 2, 128, 128), (4, 2, 576, 64))
    for size, (has_all, norms_all_heads) in itertools.product(sizes, ((True, False), (True, True), (False, False))):
        yield rope_into_cache(*size, tokens=3, dtype=dtype, has_all=has_all, norms_all_heads=norms_all_heads)


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
    for dim, queries, (group_size, bits) in itertools.product((64, 128, 256), (1, 3, 43), PACKED):
        keys = 1203 if queries == 1 else 100
        given = attention(keys, dim, queries=queries, mask="causal", key_heads=2, group=2, capacity=keys + 5, **layout)
        yield packed_attention(given, group_size, bits)
    yield from (packed_attention(attention(77, 576, 512, key_heads=1, **layout), *format) for format in PACKED)


def _mixtures(dtype: str, ragged: bool) -> Iterator[FastCall]:
    before = int(ragged)
    for (experts, k), rules in itertools.product(((24, 3), (60, 6), (124, 8), (256, 4), (512, 32)), ROUTERS):
        yield router(7, experts if ragged else 2 ** (experts - 1).bit_length(), k, dtype, before=before, **rules)
    for is_wide, has_residual in itertools.product((False, True), repeat=2):
        for experts in (3, 0):
            yield combine(5, 3, 1037 if ragged else 1536, dtype, has_residual, is_wide, before, experts)


def _samples(dtype: str, ragged: bool) -> Iterator[FastCall]:
    layout = {"padding": 3, "before": 1} if ragged else {}
    for number, (rules, vocabulary) in enumerate(itertools.product(RULES, (1037, 20011) if ragged else (1536, 65536))):
        penalises = "repetition_penalty" in rules
        yield sample(4, vocabulary, dtype, 40 * penalises, number % 2 == 0, **layout, **rules)


def _images(dtype: str, ragged: bool) -> Iterator[FastCall]:
    """Those of bytes beside those of float32."""
    for pixel, (mode, antialias) in itertools.product(
        (dtype, "uint8") if dtype == "float32" else (dtype,), itertools.product(("bilinear", "bicubic"), (False, True))
    ):
        for has_statistics in (False, True):
            old, channels = ((31, 17), 5) if ragged else ((32, 64), 4)
            options = (mode, antialias, antialias != has_statistics, has_statistics, int(ragged))
            yield resample_image(old, (13, 40), channels, pixel, *options)


def timed() -> Iterator[tuple[FastCall | LayerCall, str]]:
    """With how they are built."""
    for build in ("generic", "known"):
        yield from ((attention(context), build) for context in CONTEXTS)
        for op, rows in itertools.product(("rms_norm", "add_rms_norm"), NORM_ROWS):
            yield norm(op, rows, NORM_LENGTH), build
        for tokens in MIXTURE_TOKENS:
            yield router(tokens, EXPERTS["experts"], EXPERTS["k"], normalise=True), build
        for tokens in MIXTURE_TOKENS:
            yield combine(tokens, EXPERTS["k"], EXPERTS["length"], has_residual=False), build
        for rules, rows in itertools.product(SAMPLING.values(), SAMPLED_ROWS):
            yield sample(rows, VOCABULARY, **rules), build
        yield from ((LayerCall(context, cores), build) for context, cores in itertools.product(CONTEXTS, LAYER_CORES))
