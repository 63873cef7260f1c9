"""What torch has for fast ops and for a decoder layer, timed as ours are."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from calls import Call
from fast_calls import FastCall, LayerCall
from timing import copies_of, seconds


def time_fast_peer(call: FastCall | LayerCall) -> float | None:
    """Seconds; None where torch has nothing."""
    if isinstance(call, LayerCall):
        return _time_layer(call)
    make = PEERS.get(call.op)
    return None if make is None else _time(make, call)


def _time(make: Callable[[FastCall], Callable[[], object]], call: FastCall) -> float:
    """make: draws operands and gives the function that runs on them."""
    return seconds([_without_stream(make(call)) for _ in range(copies_of(call.moved_bytes))])


def _without_stream(run: Callable[[], object]) -> Callable[[int], None]:
    def on_current(stream: int) -> None:
        run()

    return on_current


def _random(*shape: int, dtype: str) -> Tensor:
    return torch.randn(shape, device="cuda").to(getattr(torch, dtype))


def _of_layout(call: FastCall, role: str) -> Tensor:
    return _random(*call.layouts[role].shape, dtype=call.dtype)


def _rms_norm(call: FastCall) -> Callable[[], object]:
    x, weight = _of_layout(call, "x"), _of_layout(call, "weight")
    return lambda: F.rms_norm(x, weight.shape, weight, 1e-5)


def _add_rms_norm(call: FastCall) -> Callable[[], object]:
    x, residual, weight = (_of_layout(call, role) for role in ("x", "residual", "weight"))
    return lambda: F.rms_norm(x + residual, weight.shape, weight, 1e-5)


def _attention(call: FastCall) -> Callable[[], object]:
    q, k, v = (_of_layout(call, role) for role in ("queries", "keys", "values"))
    return lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def _sample(call: FastCall) -> Callable[[], object]:
    """As Transformers' generation does it: logits become float32, and top_p sorts them."""
    x, rules = _of_layout(call, "x"), call.keywords

    def drawn(logits: Tensor) -> Tensor:
        return torch.multinomial(logits.softmax(-1), 1)

    def top_k() -> Tensor:
        values, tokens = (x.float() / rules["temperature"]).topk(rules["top_k"])
        return tokens.gather(1, drawn(values))

    def top_p() -> Tensor:
        logits = x.float() / rules["temperature"]
        values, tokens = logits.sort(dim=-1)
        removed = values.softmax(-1).cumsum(-1) <= 1 - rules["top_p"]
        return drawn(logits.masked_fill(removed.scatter(1, tokens, removed), -torch.inf))

    if "top_p" in rules:
        return top_p
    return top_k if "top_k" in rules else lambda: drawn(x.float() / rules["temperature"])


def _router(call: FastCall) -> Callable[[], object]:
    x, k = _of_layout(call, "x"), call.keywords["k"]

    def route() -> tuple[Tensor, Tensor]:
        weights, experts = x.softmax(-1, dtype=torch.float32).topk(k)
        return (weights / weights.sum(-1, keepdim=True)).to(x.dtype), experts

    return route


def _combine(call: FastCall) -> Callable[[], object]:
    x, weights = _of_layout(call, "x"), _of_layout(call, "weight")
    return lambda: torch.bmm(weights[:, None], x)


PEERS = {
    "rms_norm": _rms_norm,
    "add_rms_norm": _add_rms_norm,
    "scaled_dot_product_attention": _attention,
    "sample": _sample,
    "moe_router": _router,
    "moe_combine": _combine,
}


# --- A decoder layer --------------------------------------------------------------------------------------------------


def _turned(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cosines + torch.cat((-second, first), -1) * sines


def _layer(call: LayerCall) -> Callable[[], object]:
    """The same step with dense matrices, in torch's ops, as a model in eager mode runs them."""

    def matrix(product: Call) -> Tensor:
        return torch.randn(product.n, product.k, device="cuda", dtype=getattr(torch, call.dtype)) / 50

    weights = {name: matrix(product) for name, product in call.products.items()}
    given = {name: _random(*shape, dtype=dtype) for name, (shape, dtype) in call.dense_operands.items()}
    keys, values = given["keys"], given["values"]

    def norm(x: Tensor, name: str) -> Tensor:
        return F.rms_norm(x, given[name].shape, given[name], 1e-6)

    def step() -> Tensor:
        x = given["x"].view(1, 1, -1)
        heads = F.linear(norm(x, "first_norm"), weights["qkv"]).view(1, 1, -1, call.dim).transpose(1, 2)
        q, k, v = heads.split([call.query_heads, call.key_heads, call.key_heads], 1)
        angles = (given["cosines"], given["sines"])
        q, k = _turned(norm(q, "query_norm"), *angles), _turned(norm(k, "key_norm"), *angles)
        keys[:, :, -1:].copy_(k)
        values[:, :, -1:].copy_(v)
        attended = F.scaled_dot_product_attention(q, keys, values, enable_gqa=True)
        middle = x + F.linear(attended.transpose(1, 2).reshape(1, 1, -1), weights["out"])
        gates, up = F.linear(norm(middle, "second_norm"), weights["gate_up"]).chunk(2, -1)
        return norm(middle + F.linear(F.silu(gates) * up, weights["down"]), "last_norm")

    return step


def _time_layer(call: LayerCall) -> float:
    dense_bytes = sum(2 * product.n * product.k for product in call.products.values()) + call.cache_bytes
    return seconds([_without_stream(_layer(call)) for _ in range(copies_of(dense_bytes))])
