"""Fast ops and a decoder layer in float64, and how far from that what their kernels wrote may be."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from calls import FILLING, Call
from fast_calls import FastCall, LayerCall
from fast_operands import decode, view
from operands import random_weights

Arrays = dict[str, np.ndarray]

# Bits of a float's mantissa, and the smallest step of its subnormal ones.
PRECISION = {"float32": (24, 2.0**-149), "float16": (11, 2.0**-24), "bfloat16": (8, 2.0**-133)}
# float32 operations whose errors may add up, in units of its last place.
ROUNDINGS = 32 * 2.0**-24
# Of a layer, the error of y over y, as vectors: a dozen tensors between are rounded to bfloat16.
LAYER_ERROR = 0.02


def compare_fast(call: FastCall, operands: Arrays, results: Arrays) -> float:
    """The largest error as a share of what is allowed. Raises AssertionError where something is wrong by itself."""
    given = {
        role: decode(view(operands[role], layout), layout.dtype) for role, layout in call.tensors if role in operands
    }
    written = {role: decode(results[role], dtype) for role, (_, dtype) in call.results.items()}
    worst = 0.0
    for role, (expected, slack) in REFERENCES[call.op](call, given, written).items():
        bits, smallest = PRECISION[call.results[role][1]]
        bound = 2.0**-bits * np.abs(expected) + smallest + slack
        left_alone = np.isnan(expected) if role in call.written else np.zeros(expected.shape, bool)
        if left_alone.any():
            untouched = np.ascontiguousarray(results[role]).view(np.uint8).reshape(*expected.shape, -1) == FILLING
            assert untouched[left_alone].all(), f"{role}: something is written that is to be left alone"
        error = np.where(left_alone, 0.0, np.abs(written[role] - expected) / np.where(left_alone, 1.0, bound))
        worst = max(worst, float("inf") if np.isnan(error).any() else float(error.max(initial=0.0)))
    return worst


# --- Norms ------------------------------------------------------------------------------------------------------------


def _rms(x: np.ndarray, weight: np.ndarray | float, eps: float) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def _rms_norm(call: FastCall, given: Arrays, written: Arrays) -> dict[str, tuple]:
    y = _rms(given["x"], given.get("weight", 1.0), call.keywords["eps"])
    return {"y": (y, ROUNDINGS * np.abs(y))}


def _add_rms_norm(call: FastCall, given: Arrays, written: Arrays) -> dict[str, tuple]:
    """The norm is of the sum as it is stored."""
    sum = given["x"] + given["residual"]
    y = _rms(written["sum"], given.get("weight", 1.0), call.keywords["eps"])
    return {"sum": (sum, ROUNDINGS * np.abs(sum)), "y": (y, ROUNDINGS * np.abs(y))}


def _layer_norm(call: FastCall, given: Arrays, written: Arrays) -> dict[str, tuple]:
    x, weight, bias = given["x"], given.get("weight", 1.0), given.get("bias", 0.0)
    mean = x.mean(-1, keepdims=True)
    factor = weight / np.sqrt(x.var(-1, keepdims=True) + call.keywords["eps"])
    y = (x - mean) * factor
    return {"y": (y + bias, ROUNDINGS * ((np.abs(x) + np.abs(mean)) * np.abs(factor) + np.abs(bias)))}


# --- Gates ------------------------------------------------------------------------------------------------------------


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def _gated(x: np.ndarray, values: np.ndarray, size: np.ndarray | float = 0.0) -> dict[str, tuple]:
    """size: of what is added up to values."""
    y = x * values
    return {"y": (y, ROUNDINGS * np.abs(x) * np.maximum(np.abs(values), size) + 4e-7 * np.abs(values))}


def _of_experts(given: Arrays, role: str) -> np.ndarray | float:
    """What a bias adds."""
    return given[role][given["experts"].astype(np.int64)] if role in given else 0.0


def _swiglu(call: FastCall, given: Arrays, written: Arrays) -> dict[str, tuple]:
    options = {"alpha": 1.0, "limit": None, "offset": 0.0} | call.keywords
    limit = math.inf if options["limit"] is None else options["limit"]
    x = np.minimum(given["gates"] + _of_experts(given, "bias"), limit)
    added = _of_experts(given, "value_bias")
    values = np.clip(given["values"] + added, -limit, limit) + options["offset"]
    return _gated(x * _sigmoid(options["alpha"] * x), values, np.abs(given["values"]) + np.abs(added))


def _geglu(call: FastCall, given: Arrays, written: Arrays) -> dict[str, tuple]:
    x = given["gates"]
    if call.keywords["approximate"] == "tanh":
        share = _sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
    else:
        share = np.vectorize(lambda z: math.erfc(-z / math.sqrt(2)) / 2)(x)
    return _gated(x * share, given["values"])


# --- Rotations --------------------------------------------------------------------------------------------------------


def _rope(call: FastCall, given: Arrays, written: Arrays) -> dict[str, tuple]:
    x, options = given["x"], call.keywords
    pairs = options["dims"] // 2
    numbers = np.arange(pairs)
    rates = 1 / given["freqs"] if "freqs" in given else options["base"] ** (-2.0 * numbers / options["dims"])
    begin = given["offsets"][:, None, None, None] if "offsets" in given else options["offset"]
    angles = (begin + np.arange(x.shape[2])[:, None]) * options["scale"] * rates
    first, second = (2 * numbers, 2 * numbers + 1) if options["traditional"] else (numbers, pairs + numbers)
    a, b = x[..., first], x[..., second]
    y, slack = x.copy(), np.zeros_like(x)
    y[..., first], y[..., second] = a * np.cos(angles) - b * np.sin(angles), a * np.sin(angles) + b * np.cos(angles)
    slack[..., first] = slack[..., second] = 1e-6 * (np.abs(a) + np.abs(b))
    return {"y": (y, slack)}


def _turned(heads: np.ndarray, cosines: np.ndarray | None, sines: np.ndarray | None) -> np.ndarray:
    """Heads [batch, heads, tokens, dim]."""
    if cosines is None:
        return heads
    rotated = cosines.shape[-1]
    a, b, rest = np.split(heads, [rotated // 2, rotated], -1)
    swapped = np.concatenate([-b, a], -1)
    turned = heads[..., :rotated] * cosines[:, None] + swapped * sines[:, None]
    return np.concatenate([turned, rest], -1)


def _rope_into_cache(call: FastCall, given: Arrays, written: Arrays) -> dict[str, tuple]:
    shape = call.layouts["keys"].shape
    key_heads, dim = shape[1], shape[3]
    x = given["x"] + given.get("bias", 0.0)
    heads = x.reshape(*x.shape[:2], -1, dim).swapaxes(1, 2)
    count = heads.shape[1] - 2 * key_heads
    parts = np.split(heads, [count, count + key_heads], 1)
    for i, role in enumerate(("query_norm", "key_norm")):
        if role in given:
            heads = 1 if given[role].size == dim else parts[i].shape[1]  # that are normalised together
            normed = parts[i].swapaxes(1, 2).reshape(*x.shape[:2], -1, heads * dim)
            normed = _rms(normed, given[role], call.keywords["eps"])
            parts[i] = normed.reshape(*x.shape[:2], -1, dim).swapaxes(1, 2)
        parts[i] = _turned(parts[i], given.get("cosines"), given.get("sines"))
    results = {"y": (parts[0], 4 * ROUNDINGS * np.abs(parts[0]).max())}
    begin = call.keywords["position"]
    for role, part in zip(("keys", "values"), parts[1:], strict=True):
        cache = np.full(shape, np.nan)
        cache[:, :, begin : begin + x.shape[1]] = part
        results[role] = (cache, 4 * ROUNDINGS * np.abs(part).max())
    return results


# --- Attention --------------------------------------------------------------------------------------------------------


def _visible(call: FastCall, given: Arrays, queries: int, keys: int) -> np.ndarray:
    """Which keys each query sees: [queries, keys], or with batch and heads in front."""
    number, last = np.arange(keys), keys - queries + np.arange(queries)[:, None]
    visible = np.ones((queries, keys), bool)
    if call.keywords["causal"]:
        visible = number <= last
        if call.keywords["window"] is not None:
            visible &= number > last - call.keywords["window"]
    if "mask" in given and call.layouts["mask"].dtype == "bool":
        visible = visible & (given["mask"] != 0)
    return visible


def _attention(call: FastCall, given: Arrays, written: Arrays, key_rounding: float = 0.0) -> dict[str, tuple]:
    """key_rounding: of keys and values before they are multiplied, relative to them."""
    keys, values = given["keys"], given["values"]
    batch, heads, queries, _ = given["queries"].shape
    shape = (batch, heads, queries, keys.shape[2])
    q = call.keywords["scale"] * given["queries"].reshape(batch, keys.shape[1], -1, keys.shape[3])
    scores = (q @ keys.swapaxes(-1, -2)).reshape(shape)
    score_error = (ROUNDINGS + key_rounding) * (np.abs(q) @ np.abs(keys).swapaxes(-1, -2)).reshape(shape)
    if "mask" in given and call.layouts["mask"].dtype != "bool":
        scores = scores + given["mask"]
    scores = np.where(_visible(call, given, queries, shape[3]), scores, -np.inf)
    largest = scores.max(-1, keepdims=True)
    if "sinks" in given:
        sinks = given["sinks"][:, None, None]
        largest = np.maximum(largest, sinks)
    largest = np.where(np.isinf(largest), 0.0, largest)
    weights = np.exp(scores - largest)
    total = weights.sum(-1, keepdims=True) + (np.exp(sinks - largest) if "sinks" in given else 0.0)
    weights = (weights / np.where(total == 0, 1.0, total)).reshape(*q.shape[:3], -1)
    y, size = ((weights @ v).reshape(*shape[:3], -1) for v in (values, np.abs(values)))
    # A weight is off by the error of its score and of those that it is divided by; exp by that of its argument.
    weight_error = 2 * score_error.max(-1, keepdims=True) + ROUNDINGS * (4 + np.abs(largest))
    return {"y": (y, (weight_error + key_rounding) * size)}


def _packed_attention(call: FastCall, given: Arrays, written: Arrays) -> dict[str, tuple]:
    def unpacked(role: str, of_scales: str) -> np.ndarray:
        bits, scales, biases = (call.keywords["bits"], *(given[f"{of_scales}_{name}"] for name in ("scales", "biases")))
        codes = given[role].astype(np.uint32)[..., None] >> np.arange(0, 32, bits, dtype=np.uint32) & (2**bits - 1)
        codes = codes.reshape(*scales.shape, call.keywords["group_size"])
        heads = codes * scales[..., None] + biases[..., None]
        return heads.reshape(*scales.shape[:-1], -1)

    dense = {role: unpacked(role, of_scales) for role, of_scales in (("keys", "key"), ("values", "value"))}
    is_tile = given["queries"].shape[2] > 8  # which rounds them
    return _attention(call, given | dense, written, 2.0 ** -PRECISION[call.dtype][0] if is_tile else 0.0)


# --- Mixtures of experts ----------------------------------------------------------------------------------------------

# Of what experts are chosen by: less than float32's roundings may change its order.
CHOICE_ERROR = 2e-6


def _softmax(x: np.ndarray) -> np.ndarray:
    powers = np.exp(x - x.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def _descending(x: np.ndarray) -> np.ndarray:
    """Indices, of equal values the lower one first."""
    return np.argsort(-x, axis=-1, kind="stable")


def _moe_router(call: FastCall, given: Arrays, written: Arrays) -> dict[str, tuple]:
    """Experts are those of float64; weights, those of the experts that are written."""
    options = {"scoring": "softmax", "groups": 1, "groups_used": 1, "normalise": False, "scale": 1.0} | call.keywords
    x, k = given["x"], options["k"]
    scores = {"softmax": _softmax, "sigmoid": _sigmoid}.get(options["scoring"], np.array)(x)
    choice = scores + given.get("bias", 0.0)
    if options["groups"] > 1:
        grouped = choice.reshape(len(x), options["groups"], -1)
        used = _descending(np.sort(grouped)[..., -2:].sum(-1))[:, : options["groups_used"]]
        unused = np.ones(grouped.shape[:2], bool)
        np.put_along_axis(unused, used, False, -1)
        choice = np.where(unused[..., None], -np.inf, grouped).reshape(choice.shape)
    experts, expected = written["experts"].astype(np.int64), _descending(choice)[:, :k]
    assert ((experts >= 0) & (experts < x.shape[1])).all(), "an index is of no expert"
    assert (np.diff(np.sort(experts)) > 0).all(), "an expert is chosen twice"
    with np.errstate(invalid="ignore"):
        gap = np.abs(np.take_along_axis(choice, experts, -1) - np.take_along_axis(choice, expected, -1))
    assert ((experts == expected) | ((gap > 0) & (gap < CHOICE_ERROR))).all(), "others are chosen than the best experts"
    y = np.take_along_axis(scores, experts, -1)
    y = _softmax(y) if options["scoring"] == "softmax_of_selected" else y
    y = options["scale"] * (y / (y.sum(-1, keepdims=True) + 1e-20) if options["normalise"] else y)
    return {"y": (y, 2 * ROUNDINGS * np.abs(y))}


def _moe_combine(call: FastCall, given: Arrays, written: Arrays) -> dict[str, tuple]:
    weights, residual, added = given["weight"][:, None], given.get("residual", 0.0), _of_experts(given, "bias")
    y = (weights @ (given["x"] + added))[:, 0] + residual
    size = (np.abs(weights) @ (np.abs(given["x"]) + np.abs(added)))[:, 0] + np.abs(residual)
    return {"y": (y, ROUNDINGS * size)}


# --- Sampling ---------------------------------------------------------------------------------------------------------


def _philox(key: int, counter: int) -> int:
    """The first 64 bits of Philox-4x32-10: a key of 64 bits, a counter of 128."""
    a, b, c, d = (counter >> 32 * i & 0xFFFFFFFF for i in range(4))
    for step in range(10):
        low, high = ((key >> 32 * i) + step * weyl & 0xFFFFFFFF for i, weyl in enumerate((0x9E3779B9, 0xBB67AE85)))
        first, second = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = second >> 32 ^ b ^ low, second & 0xFFFFFFFF, first >> 32 ^ d ^ high, first & 0xFFFFFFFF
    return a << 32 | b


def _kept(logits: np.ndarray, weights: np.ndarray, options: dict[str, Any], slack: float) -> np.ndarray:
    """Which tokens of a row may be drawn. slack: of top_p and min_p, of which sums may be either side."""
    order = _descending(logits)
    kept = logits >= logits[order[min(options["top_k"] or len(logits), len(logits)) - 1]]
    if options["top_p"] < 1:
        sums = np.cumsum(np.where(kept, weights, 0.0)[order])
        last = int((sums < options["top_p"] * (1 + slack) * sums[-1]).sum())
        kept &= logits >= logits[order[min(last, len(order) - 1)]]
    return kept & (weights >= options["min_p"] * (1 + slack))


def _sample(call: FastCall, given: Arrays, written: Arrays) -> dict[str, tuple]:
    """Each row's token is the one whose part of the sum of weights, in the order of tokens, has the random number."""
    options = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0} | call.keywords
    for row, logits in enumerate(given["x"].astype(np.float32)):
        if "previous" in given:
            tokens = given["previous"][row].astype(np.int64)
            tokens, penalty = tokens[tokens >= 0], np.float32(options["repetition_penalty"])
            logits[tokens] = np.where(logits[tokens] > 0, logits[tokens] / penalty, logits[tokens] * penalty)
        token = int(written["y"][row])
        assert 0 <= token < len(logits), f"row {row}: {token} is no token"
        if options["temperature"] == 0:
            assert token == logits.argmax(), f"row {row}: {token} is not the most probable token"
            continue
        weights = np.exp((logits - logits.max()).astype(np.float64) / options["temperature"])
        seed, number = (int(given["seeds"][row]), 0) if "seeds" in given else (options["seed"], row)
        place = _philox(seed % 2**64, options["offset"] | number << 64) / 2**64
        assert any(
            _is_drawn(token, place, weights, _kept(logits, weights, options, slack)) for slack in (0, 1e-5, -1e-5)
        ), f"row {row}: {token} is not the token of {place}"
    return {}


def _is_drawn(token: int, place: float, weights: np.ndarray, kept: np.ndarray) -> bool:
    sums = np.cumsum(np.where(kept, weights, 0.0))
    # Weights are integers, in units of 2**-30 of the greatest, of float32 numbers.
    slack = 4e-6 + len(weights) * 2.0**-30 / sums[-1]
    begin = sums[token - 1] if token else 0.0
    return bool(kept[token]) and begin / sums[-1] - slack <= place <= sums[token] / sums[-1] + slack


# --- Images -----------------------------------------------------------------------------------------------------------


def _filter(distance: np.ndarray, mode: str, antialias: bool) -> np.ndarray:
    x = np.abs(distance)
    if mode == "bilinear":
        return np.maximum(1 - x, 0)
    a = -0.5 if antialias else -0.75
    near, far = (a + 2) * x**3 - (a + 3) * x**2 + 1, a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
    return np.where(x < 1, near, np.where(x < 2, far, 0))


def _resampling(old: int, new: int, mode: str, antialias: bool) -> np.ndarray:
    """The matrix [new, old] that resizes a side."""
    centres = (np.arange(new) + 0.5) * old / new - 0.5
    border = 0 if antialias else 3  # pixels that go on beyond the image
    places = np.arange(-border, old + border)
    unit = max(old / new, 1) if antialias else 1
    weights = _filter((places - centres[:, None]) / unit, mode, antialias)
    matrix = np.zeros((new, old))
    np.add.at(matrix.T, np.clip(places, 0, old - 1), weights.T)
    return matrix / matrix.sum(1, keepdims=True)


def _resample_image(call: FastCall, given: Arrays, written: Arrays) -> dict[str, tuple]:
    options = call.keywords
    x = np.moveaxis(given["x"], -1, 1) if options["channels_last"] else given["x"]
    filter = (options["mode"], options["antialias"])
    down, across = (
        _resampling(old, new, *filter)
        for old, new in zip(x.shape[2:], (options["height"], options["width"]), strict=True)
    )
    y = (down @ x @ across.T) * options["scale"]
    # Weights near 0 are differences of larger numbers, so any pixel may count with their error.
    size = np.full(y.shape, np.abs(x).max() * options["scale"])
    if "bias" in given:
        mean, std = (given[role][:, None, None] for role in ("bias", "weight"))
        y, size = (y - mean) / std, (size + np.abs(mean)) / np.abs(std)
    y, size = (np.moveaxis(each, 1, -1) if options["channels_last"] else each for each in (y, size))
    return {"y": (y, ROUNDINGS * size)}


# By op, what each result is compared with and how far from that it may be beyond one rounding. What is no float is
# judged by them.
REFERENCES: dict[str, Callable[[FastCall, Arrays, Arrays], dict[str, tuple]]] = {
    "rms_norm": _rms_norm,
    "add_rms_norm": _add_rms_norm,
    "layer_norm": _layer_norm,
    "swiglu": _swiglu,
    "geglu": _geglu,
    "rope": _rope,
    "rope_into_cache": _rope_into_cache,
    "scaled_dot_product_attention": _attention,
    "moe_router": _moe_router,
    "moe_combine": _moe_combine,
    "sample": _sample,
    "resample_image": _resample_image,
    "quantized_scaled_dot_product_attention": _packed_attention,
}


# --- A decoder layer --------------------------------------------------------------------------------------------------


@cache
def _matrix(call: Call, name: str) -> np.ndarray:
    """float64 w [n, k] of the operands that are drawn for a product of a layer, as its format says."""
    weights = random_weights(call, np.random.default_rng([0, *name.encode()]))
    codes = weights["w"].reshape(call.words_shape)[..., None] >> np.arange(0, 32, call.bits, dtype=np.uint32)
    codes = (codes & (2**call.bits - 1)).reshape(call.n, -1, call.group_size)
    scales, biases = (decode(weights[role], call.scale_dtype)[..., None] for role in ("scales", "biases"))
    return (codes * scales + biases).reshape(call.n, call.k)


def layer_output(call: LayerCall, operands: Arrays) -> np.ndarray:
    """In float64, without roundings between."""
    given = {name: decode(operands[name], dtype) for name, (_, dtype) in call.dense_operands.items()}
    normal = _rms(given["x"], given["first_norm"], 1e-6)
    heads = (_matrix(call.products["qkv"], "qkv") @ normal).reshape(-1, call.dim)
    q, k, v = np.split(heads, [call.query_heads, call.query_heads + call.key_heads])

    def turned(heads: np.ndarray, weight: np.ndarray) -> np.ndarray:
        angles = (given[name][None, None] for name in ("cosines", "sines"))
        return _turned(_rms(heads, weight, 1e-6)[None, :, None], *angles)[0, :, 0]

    keys, values = given["keys"][0], given["values"][0]
    keys[:, -1], values[:, -1] = turned(k, given["key_norm"]), v
    q = turned(q, given["query_norm"]).reshape(call.key_heads, -1, call.dim)
    scores = q @ keys.swapaxes(1, 2) * call.dim**-0.5
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    attended = (weights / weights.sum(-1, keepdims=True) @ values).reshape(-1)
    middle = given["x"] + _matrix(call.products["out"], "out") @ attended
    both = _matrix(call.products["gate_up"], "gate_up") @ _rms(middle, given["second_norm"], 1e-6)
    gates, up = np.split(both, 2)
    out = middle + _matrix(call.products["down"], "down") @ (gates * _sigmoid(gates) * up)
    return _rms(out, given["last_norm"], 1e-6)


def compare_layer(call: LayerCall, operands: Arrays, results: Arrays) -> float:
    expected = layer_output(call, operands)
    error: Any = np.linalg.norm(decode(results["y"], call.dtype) - expected) / np.linalg.norm(expected)
    return float(error) / LAYER_ERROR if error == error else math.inf
