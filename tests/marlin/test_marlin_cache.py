"""MetalKVCache against the keys and values that it was given, concatenated."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import oracle
from cases import DTYPES
from oracle import name_of
from quantization_mlx.marlin import KVCacheTorch, MetalKVCache, MetalKVCacheConfig
from quantization_mlx.nn.buffers import side_by_side

LAYERS, HEADS, DIM, MOST, BATCH = 2, 3, 8, 16, 2
CHUNKS = (5, 1, 1, 4, 0, 5)  # 16 in all


def cache(batch_size: int = BATCH, **options: Any) -> MetalKVCache:
    sizes = {"num_layers": LAYERS, "num_kv_heads": HEADS, "head_dim": DIM, "max_seq_len": MOST}
    return MetalKVCache(MetalKVCacheConfig(**{**sizes, **options}), batch_size)


def heads(tokens: int, dim: int = DIM, batch: int = BATCH, seed: int = 0, **options: Any) -> Tensor:
    return oracle.random_x(batch, HEADS, tokens, dim, seed=seed, **options)


def write(held: MetalKVCache, tokens: int, seed: int = 0) -> None:
    for layer in range(LAYERS):
        held.update(layer, heads(tokens, seed=seed), heads(tokens, seed=seed + 1))
    held.advance(tokens)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("values_dim", [DIM, 12])
def test_holds_what_it_was_given(values_dim: int, dtype: torch.dtype, device: str) -> None:
    held = cache(dtype=dtype, v_head_dim=values_dim)
    given: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(LAYERS)]
    for step, tokens in enumerate(CHUNKS):
        for layer in range(LAYERS):
            seed = 10 * step + layer
            given[layer].append((heads(tokens, seed=seed), heads(tokens, values_dim, seed=seed + 500)))
            found = held.update(layer, *(new.to(device) for new in given[layer][-1]))
            for ours, parts in zip(found, zip(*given[layer], strict=True), strict=True):
                oracle.assert_identical(ours, torch.cat(parts, 2).to(dtype))
            assert held.seq_len == sum(CHUNKS[:step])
        held.advance(tokens)
    assert held.seq_len == held.max_seq_len == MOST


def test_is_the_documented_one() -> None:
    config = MetalKVCacheConfig(4, 2, 64, 128)
    assert config.dtype == torch.float16
    held = MetalKVCache(config)
    assert isinstance(held, KVCacheTorch) and held.batch_size == 1 and held.config is config
    k, v = held.update(0, torch.randn(1, 2, 3, 64), torch.randn(1, 2, 3, 64))
    assert k.shape == v.shape == (1, 2, 3, 64) and k.dtype == torch.float16
    held.advance()
    assert held.seq_len == 1
    held.reset()
    assert held.seq_len == 0
    assert repr(held).startswith("MetalKVCache(MetalKVCacheConfig(num_layers=4, num_kv_heads=2, head_dim=64, max_")


def test_makes_room_once() -> None:
    held = cache()
    k, v = held.update(0, heads(2), heads(2))
    memory = k.data_ptr(), v.data_ptr()
    held.update(1, heads(2), heads(2))
    held.advance(2)
    write(held, MOST - 2)
    held.reset()
    assert tuple(each.data_ptr() for each in held.update(0, heads(1), heads(1))) == memory
    assert k.untyped_storage().nbytes() == BATCH * HEADS * MOST * DIM * 2


def test_with_a_device_it_makes_room_at_once(device: str) -> None:
    held = cache(device=device)
    buffers = [buffer for layer in held._layers for buffer in layer.buffers]
    assert [tuple(buffer.shape) for buffer in buffers] == 2 * LAYERS * [(BATCH, HEADS, MOST, DIM)]
    assert {buffer.device.type for buffer in buffers} == {device}


def test_a_pass_that_is_repeated_overwrites_the_last_one() -> None:
    held = cache(dtype=torch.float32)
    write(held, 3, seed=1)
    held.update(0, heads(4, seed=20), heads(4, seed=21))  # and then the pass failed
    k, v = held.update(0, heads(2, seed=30), heads(2, seed=31))
    oracle.assert_identical(k, torch.cat((heads(3, seed=1), heads(2, seed=30)), 2))
    oracle.assert_identical(v, torch.cat((heads(3, seed=2), heads(2, seed=31)), 2))


def test_latent_vectors_lie_beside_what_is_rotated() -> None:
    held = MetalKVCache(MetalKVCacheConfig(1, 1, 32, MOST, torch.float32, v_head_dim=8))
    latent, turned = oracle.random_x(1, 1, 3, 32), oracle.random_x(1, 1, 3, 8, seed=2)
    k, v = held.update(0, latent, turned)
    joint = side_by_side(k, v)
    assert joint.data_ptr() == k.data_ptr() and joint.untyped_storage().data_ptr() == k.untyped_storage().data_ptr()
    oracle.assert_identical(joint, torch.cat((latent, turned), -1))
    oracle.assert_identical(joint[..., :32], latent)
    for one, other in ((latent, turned), (k, turned), (v, k), (k[..., :16], v), (k.mT, v.mT[..., :0, :])):
        if one.shape[:-1] == other.shape[:-1]:
            oracle.assert_identical(side_by_side(one, other), torch.cat((one, other), -1))


def test_an_overflow_loses_nothing() -> None:
    held = cache(dtype=torch.float32)
    write(held, 14)
    with pytest.raises(ValueError, match="3 more positions are asked for, and 14 of max_seq_len = 16 are taken"):
        held.update(0, heads(3), heads(3))
    with pytest.raises(ValueError, match=r"\[MetalKVCache.advance\] 3 more positions"):
        held.advance(3)
    assert held.seq_len == 14
    k, _ = held.update(0, heads(2, seed=5), heads(2))
    oracle.assert_identical(k, torch.cat((heads(14), heads(2, seed=5)), 2))


def test_copies_are_independent() -> None:
    held = cache(dtype=torch.float32)
    write(held, 3)
    other = copy.deepcopy(held)
    write(other, 4, seed=9)
    assert (held.seq_len, other.seq_len) == (3, 7)
    k, _ = held.update(0, heads(1, seed=7), heads(1))
    oracle.assert_identical(k, torch.cat((heads(3), heads(1, seed=7)), 2))


def test_what_was_made_under_inference_mode_goes_on_without() -> None:
    held = cache()
    with torch.inference_mode():
        write(held, 3)
    write(held, 2)
    assert held.seq_len == 5


def test_gradients_are_refused() -> None:
    held = cache()
    k = nn.Parameter(heads(1))
    for arguments in ((k, heads(1)), (heads(1), k)):
        with pytest.raises(ValueError, match="requires a gradient, which does not pass a cache"):
            held.update(0, *arguments)
    with torch.no_grad():
        assert not held.update(0, k, k)[0].requires_grad


def of_other_devices() -> None:
    held = cache(device="meta")
    held.update(0, heads(1), heads(1))


def behind() -> None:
    held = cache()
    held.update(0, heads(2), heads(2))
    held.advance(2)
    held.update(1, heads(1), heads(1))


ERRORS: dict[str, tuple[type[Exception], Callable[[], Any], str]] = {
    "config": (TypeError, lambda: MetalKVCache({"num_layers": 2}), "[MetalKVCache] config is of type dict; it must be"),
    "dtype": (TypeError, lambda: cache(dtype=torch.int8), "[MetalKVCache] dtype is torch.int8; supported are"),
    "layers": (ValueError, lambda: cache(num_layers=0), "[MetalKVCache] num_layers is 0; it must be at least 1"),
    "heads": (TypeError, lambda: cache(num_kv_heads="3"), "num_kv_heads is '3'; it must be a whole number"),
    "room": (ValueError, lambda: cache(max_seq_len=-1), "max_seq_len is -1; it must be at least 1"),
    "values": (ValueError, lambda: cache(v_head_dim=0), "v_head_dim is 0; it must be at least 1"),
    "batch_size": (ValueError, lambda: cache(0), "batch_size is 0; it must be at least 1"),
    "layer": (
        IndexError,
        lambda: cache().update(2, heads(1), heads(1)),
        "[MetalKVCache.update] layer_idx is 2; the cache has 2 layers",
    ),
    "negative layer": (IndexError, lambda: cache().update(-1, heads(1), heads(1)), "layer_idx is -1"),
    "no tensor": (TypeError, lambda: cache().update(0, heads(1), None), "v_new is of type NoneType; it must be"),
    "integers": (TypeError, lambda: cache().update(0, heads(1).int(), heads(1)), "k_new has dtype torch.int32; supp"),
    "batch": (
        ValueError,
        lambda: cache().update(0, heads(1, batch=3), heads(1, batch=3)),
        "k_new has shape [3, 3, 1, 8]; with batch_size = 2, num_kv_heads = 3 and heads of 8 elements it must be "
        "[2, 3, 1, 8]",
    ),
    "dimensions": (ValueError, lambda: cache().update(0, heads(1)[0], heads(1)[0]), "k_new has shape [3, 1, 8]"),
    "head_dim": (ValueError, lambda: cache().update(0, heads(1), heads(1, 9)), "v_new has shape [2, 3, 1, 9]"),
    "tokens": (ValueError, lambda: cache().update(0, heads(2), heads(1)), "it must be [2, 3, 2, 8]"),
    "device": (ValueError, of_other_devices, "k_new is on cpu, and layer 0 of the cache on meta"),
    "a layer that is behind": (
        ValueError,
        behind,
        "layer 1 holds 0 of the 2 positions that are taken; every layer must be updated before",
    ),
    "negative advance": (ValueError, lambda: cache().advance(-1), "num_tokens is -1; it must be at least 0"),
    "fraction": (TypeError, lambda: cache().advance(1.5), "[MetalKVCache.advance] num_tokens is 1.5"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_wrong_arguments_are_named(name: str) -> None:
    error, call, message = ERRORS[name]
    with pytest.raises(error, match=re.escape(message)):
        call()
