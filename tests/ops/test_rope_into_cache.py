"""rope_into_cache: against the same in float64, made of Transformers' rotation and torch's norm."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import oracle
from cases import DTYPES
from oracle import name_of
from quantization_mlx import fast
from quantization_mlx._ops import ops

DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)


@dataclass(frozen=True)
class Call:
    batch: int = 1
    tokens: int = 1
    query_heads: int = 4
    key_heads: int = 2
    dim: int = 64
    rotated: int | None = None  # of dim; None for all
    position: int = 5
    angles_of_sequences: bool = False
    has_bias: bool = False
    has_norms: bool = False
    norms_all_heads: bool = False  # together


CALLS = {
    "one token": Call(),
    "prompt": Call(batch=2, tokens=9, position=0),
    "angles of each sequence": Call(batch=3, tokens=2, angles_of_sequences=True),
    "bias": Call(batch=2, has_bias=True),
    "norms": Call(tokens=2, has_norms=True),
    "all of it": Call(batch=2, tokens=5, dim=80, rotated=20, angles_of_sequences=True, has_bias=True, has_norms=True),
    "part of a head": Call(tokens=3, dim=96, rotated=24),
    "not rotated": Call(tokens=3, rotated=0, has_bias=True),
    "one head of keys": Call(query_heads=7, key_heads=1, dim=128),
    "odd sizes": Call(query_heads=3, key_heads=3, dim=34, has_norms=True),
    "norms of all heads": Call(
        batch=2, tokens=3, dim=80, rotated=20, has_bias=True, has_norms=True, norms_all_heads=True
    ),
    "odd norms of all heads": Call(query_heads=5, key_heads=3, dim=6, has_norms=True, norms_all_heads=True),
    "norms of one head": Call(query_heads=4, key_heads=1, dim=34, has_norms=True, norms_all_heads=True),
    "wide heads": Call(dim=576, rotated=64, has_norms=True),
    "nothing": Call(batch=2, tokens=0),
}
EPSILON = 1e-3


def arguments_of(call: Call, dtype: torch.dtype, device: str = "cpu") -> dict[str, Tensor | int | float | None]:
    rotated = call.dim if call.rotated is None else call.rotated
    width = (call.query_heads + 2 * call.key_heads) * call.dim

    def random(seed: int, *sizes: int) -> Tensor:
        return oracle.random_x(*sizes, seed=seed, dtype=dtype).to(device)

    angles = 9 * oracle.random_x(call.batch if call.angles_of_sequences else 1, call.tokens, rotated // 2, seed=1)
    angles = angles.repeat(1, 1, 2)
    cache = (call.batch, call.key_heads, call.position + call.tokens + 2, call.dim)
    normed = (call.query_heads, call.key_heads) if call.norms_all_heads else (1, 1)
    return {
        "x": random(0, call.batch, call.tokens, width),
        "cosines": angles.cos().to(device, dtype) if rotated else None,
        "sines": angles.sin().to(device, dtype) if rotated else None,
        "keys": random(2, *cache),
        "values": random(3, *cache),
        "position": call.position,
        "bias": random(4, width) if call.has_bias else None,
        "query_norm": random(5, normed[0] * call.dim) if call.has_norms else None,
        "key_norm": random(6, normed[1] * call.dim) if call.has_norms else None,
        "eps": EPSILON,
    }


def by_torch(x, cosines, sines, keys, values, position, bias, query_norm, key_norm, eps) -> tuple[Tensor, ...]:
    """Queries, and the whole caches."""
    _, key_heads, _, dim = keys.shape
    x = x if bias is None else x + bias
    heads = x.unflatten(-1, (-1, dim)).transpose(1, 2)
    query, key, value = heads.split([heads.shape[1] - 2 * key_heads, key_heads, key_heads], 1)
    query, key = (normalised(*each, eps) for each in ((query, query_norm), (key, key_norm)))
    if cosines is not None:
        rotated = cosines.shape[-1]
        turned = apply_rotary_pos_emb(query[..., :rotated], key[..., :rotated], cosines, sines)
        query, key = (torch.cat((a, b[..., rotated:]), -1) for a, b in zip(turned, (query, key), strict=True))
    end = position + x.shape[1]
    keys, values = (
        torch.cat((cache[:, :, :position], new, cache[:, :, end:]), 2) for cache, new in ((keys, key), (values, value))
    )
    return query, keys, values


def normalised(heads: Tensor, norm: Tensor | None, eps: float) -> Tensor:
    if norm is None:
        return heads
    if len(norm) == heads.shape[-1]:
        return F.rms_norm(heads, norm.shape, norm, eps)
    together = F.rms_norm(heads.transpose(1, 2).flatten(2), norm.shape, norm, eps)
    return together.unflatten(-1, (heads.shape[1], -1)).transpose(1, 2)


def moved(arguments: dict, **options) -> dict:
    return {name: each.to(**options) if isinstance(each, Tensor) else each for name, each in arguments.items()}


def run(arguments: dict) -> tuple[Tensor, ...]:
    arguments = {name: each.clone() if isinstance(each, Tensor) else each for name, each in arguments.items()}
    return fast.rope_into_cache(**arguments), arguments["keys"], arguments["values"]


@DTYPE
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_values(device: str, dtype: torch.dtype, call: Call) -> None:
    arguments = arguments_of(call, dtype, device)
    on_host = moved(arguments, device="cpu")
    exact = by_torch(**moved(on_host, dtype=torch.float64))
    theirs = by_torch(**on_host)
    for ours, expected, of_torch in zip(run(arguments), exact, theirs, strict=True):
        assert ours.dtype == dtype and ours.shape == expected.shape and ours.is_contiguous()
        error = 2 * (of_torch.double() - expected).abs().amax() if expected.numel() else 0.0
        oracle.assert_within(ours.cpu(), expected, error + torch.finfo(dtype).eps * expected.abs() + 1e-6)


def test_nothing_else_in_the_cache_is_read_or_changed(device: str) -> None:
    arguments = arguments_of(replace(CALLS["all of it"], position=3), torch.float16, device)
    for name in ("keys", "values"):
        arguments[name].fill_(torch.nan)
    queries, *caches = run(arguments)
    assert queries.isfinite().all()
    for cache in caches:
        written = cache.isfinite().all(-1).all(0).all(0).cpu()
        assert written.tolist() == [3 <= position < 8 for position in range(10)]


def test_strides(device: str) -> None:
    """Of all but the caches."""
    arguments = arguments_of(CALLS["all of it"], torch.float32, device)
    views = dict(arguments)
    for name in ("x", "cosines", "sines", "bias", "query_norm", "key_norm"):
        views[name] = torch.stack([arguments[name]] * 2, -1)[..., 1]
    for ours, expected in zip(run(views), run(arguments), strict=True):
        oracle.assert_identical(ours, expected)


# --- As torch's ops ---------------------------------------------------------------------------------------------------


def in_order(arguments: dict) -> tuple[tuple, dict]:
    names = ("x", "cosines", "sines", "keys", "values", "position")
    options = {name: each for name, each in arguments.items() if name not in names}
    return tuple(arguments[name] for name in names), options


@pytest.mark.parametrize("call", [CALLS[name] for name in ("all of it", "not rotated")], ids=("all", "not rotated"))
def test_opcheck(device: str, call: Call) -> None:
    arguments, options = in_order(arguments_of(call, torch.float32, device))
    checks = ["test_schema", "test_faketensor", "test_aot_dispatch_dynamic"]
    if device == "cpu":  # torch has this one for some devices only; the registration is the same for all
        checks.append("test_autograd_registration")
    torch.library.opcheck(ops.rope_into_cache.default, arguments, options, test_utils=checks)


def test_compiles_as_one_graph_for_all_positions() -> None:
    graphs = 0

    def counted(graph: torch.fx.GraphModule, _: list) -> Callable:
        nonlocal graphs
        graphs += 1
        return graph

    compiled = torch.compile(fast.rope_into_cache, fullgraph=True, backend=counted, dynamic=True)
    for position in (3, 4, 7):
        arguments = arguments_of(replace(CALLS["all of it"], position=position), torch.float32)
        expected = run(arguments)
        queries = compiled(**arguments)
        for ours, theirs in zip((queries, arguments["keys"], arguments["values"]), expected, strict=True):
            oracle.assert_identical(ours, theirs)
    assert graphs == 1


def test_gradients_are_refused() -> None:
    arguments = arguments_of(CALLS["one token"], torch.float32)
    arguments["x"].requires_grad_()
    queries = fast.rope_into_cache(**arguments)
    with pytest.raises(RuntimeError, match=r"rope_into_cache.* is not implemented"):
        queries.sum().backward()


def test_explain() -> None:
    arguments, options = in_order(moved(arguments_of(CALLS["all of it"], torch.float16), device="meta"))
    plan = json.loads(ops.explain_rope_into_cache(*arguments, **options, gpu="applegpu_g15s", macos=1500))
    (launch,) = plan["launches"]
    assert (launch["kernel"], launch["threads"]) == ("rope_into_cache_float16", 128)
    assert launch["threadgroups"] == [20, 1, 1]  # 2 sequences of 5 tokens with 8 heads, 4 to each
    assert launch["constants"] == ["has_bias", "has_query_norm", "has_key_norm", "has_angles"]


# --- Errors -----------------------------------------------------------------------------------------------------------

ERRORS = {
    "dtype": ({"x": lambda x: x.double()}, TypeError, r"x has dtype Double"),
    "dtypes": ({"keys": lambda x: x.half()}, TypeError, r"keys has dtype Half and x Float"),
    "width": ({"x": lambda x: x[..., :-1].contiguous()}, ValueError, r"x of shape \[2, 5, 639\] does not fit keys"),
    "few heads": ({"x": lambda x: x[..., :320].contiguous()}, ValueError, r"x of shape \[2, 5, 320\] does not fit"),
    "rank": ({"x": lambda x: x[0]}, ValueError, r"x of shape \[5, 640\] does not fit keys"),
    "batch": ({"x": lambda x: x[:1]}, ValueError, r"x of shape \[1, 5, 640\] does not fit keys"),
    "position": ({"position": lambda x: 8}, ValueError, r"5 tokens from position 8 on are not within the capacity"),
    "negative": ({"position": lambda x: -1}, ValueError, r"5 tokens from position -1 on"),
    "cache": ({"values": lambda x: x[:, :, :-1]}, ValueError, r"values of shape .* must be contiguous"),
    "strides": ({"keys": lambda x: x.mT.contiguous().mT}, ValueError, r"keys of shape .* must be contiguous"),
    "angles": ({"sines": lambda x: None}, ValueError, r"of cosines and sines, only cosines are given"),
    "odd angles": (
        {name: lambda x: x[..., :7] for name in ("cosines", "sines")},
        ValueError,
        r"cosines and sines of shapes \[2, 5, 7\] and \[2, 5, 7\] must both be \[1 or batch, tokens, an even number",
    ),
    "bias": ({"bias": lambda x: x[:3]}, ValueError, r"bias of shape \[3\] must be \[640\]"),
    "norm": ({"key_norm": lambda x: x[None]}, ValueError, r"key_norm of shape \[1, 80\] must be \[80\]"),
    "norm of some heads": (
        {"query_norm": lambda x: x.repeat(2)},
        ValueError,
        r"query_norm of shape \[160\] must be \[80\], for each head, or \[320\], for all heads together",
    ),
}


@pytest.mark.parametrize("where", ["cpu", "meta"])
@pytest.mark.parametrize("changes, error, message", ERRORS.values(), ids=ERRORS.keys())
def test_refuses_what_does_not_fit(where: str, changes: dict, error: type[Exception], message: str) -> None:
    arguments = moved(arguments_of(CALLS["all of it"], torch.float32), device=where)
    arguments |= {name: change(arguments[name]) for name, change in changes.items()}
    with pytest.raises(error, match=rf"\[rope_into_cache\] .*{message}"):
        fast.rope_into_cache(**arguments)


def test_refuses_keys_and_values_of_one_memory() -> None:
    arguments = arguments_of(CALLS["all of it"], torch.float32)
    arguments["keys"], arguments["values"] = torch.zeros(2, *arguments["keys"].shape)
    with pytest.raises(ValueError, match=r"\[rope_into_cache\] keys and values share memory"):
        fast.rope_into_cache(**arguments)


def test_refuses_tensors_of_two_devices() -> None:
    arguments = arguments_of(CALLS["all of it"], torch.float32)
    arguments["query_norm"] = arguments["query_norm"].to("meta")
    with pytest.raises(ValueError, match=r"\[rope_into_cache\] query_norm is on meta and x on cpu"):
        fast.rope_into_cache(**arguments)
