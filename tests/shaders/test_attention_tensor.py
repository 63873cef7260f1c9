"""Attention on Metal 4's tensor operations, on the software device: values against float64, and what it reads."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import oracle
import softmetal
import software_gpu
from quantization_mlx import fast
from repository import ROOT
from softmetal import mps

SHADER = ROOT / "metal/fast/attention_tensor.metal"
DTYPES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Case:
    """Heads of queries and of keys, their sizes and those of values, queries, keys and options."""

    heads: tuple[int, int]
    sizes: tuple[int, int]
    queries: int
    keys: int
    options: dict[str, object]
    factor: float = 1.0

    def tensors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        q = oracle.random_x(2, self.heads[0], self.queries, self.sizes[0], seed=1)
        k = oracle.random_x(2, self.heads[1], self.keys, self.sizes[0], seed=2)
        v = oracle.random_x(2, self.heads[1], self.keys, self.sizes[1], seed=3)
        return (self.factor * q).to(dtype), k.to(dtype), v.to(dtype)

    @property
    def scale(self) -> float:
        return 1.5 * self.sizes[0] ** -0.5


def exact(q: Tensor, k: Tensor, v: Tensor, scale: float, **options: object) -> Tensor:
    """In float64, from the formula; 0 where nothing is seen."""
    q, k, v = (each.double() for each in (q, k, v))
    k, v = (each.repeat_interleave(q.shape[1] // k.shape[1], 1) for each in (k, v))
    scores = q @ k.mT * scale
    if (cap := options.get("softcap")) is not None:
        scores = cap * torch.tanh(scores / cap)
    mask = options.get("mask")
    if isinstance(mask, str):
        own, key = torch.arange(q.shape[2])[:, None] + k.shape[2] - q.shape[2], torch.arange(k.shape[2])
        mask = (key <= own) & (key > own - options.get("window", q.shape[2] + k.shape[2]))
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.double()
    if (sinks := options.get("sinks")) is None:
        return (scores.softmax(-1) @ v).nan_to_num()
    column = sinks.double()[None, :, None, None].expand(*scores.shape[:3], 1)
    return torch.cat([scores, column], -1).softmax(-1)[..., :-1] @ v


def attend(q: Tensor, k: Tensor, v: Tensor, gpu: str = "applegpu_g17s", **options: object) -> tuple[Tensor, mps.Launch]:
    """The result on a GPU with tensor operations, and the launch that made it."""
    software_gpu.install()
    on = {name: each.to("mps") if isinstance(each, Tensor) else each for name, each in options.items()}
    q, k, v = (each.to("mps") for each in (q, k, v))
    mps.clear()
    with mps.gpu(gpu):
        y = fast.scaled_dot_product_attention(q, k, v, **on).cpu()
    errors, launched = mps.errors(), mps.launched()
    mps.clear()
    assert not errors, "\n".join(errors)
    assert "_nax_" in launched[-1].kernel
    return y, launched[-1]


def assert_attention(case: Case, dtype: torch.dtype, **options: object) -> None:
    """Within a rounding of the result and one of each weight, of values up to their largest."""
    q, k, v = case.tensors(dtype)
    y, _ = attend(q, k, v, scale=case.scale, **case.options, **options)
    expected = exact(q, k, v, case.scale, **case.options)
    oracle.assert_within(y, expected, torch.finfo(dtype).eps * (expected.abs() + v.double().abs().max()))


@pytest.fixture(autouse=True)
def failed_checks_raise(monkeypatch):
    monkeypatch.setenv("CI", "true")


SEEN = oracle.random_x(70, 90, seed=4) > 0
SEEN[5] = False
CASES = {
    "whole blocks": Case((2, 2), (64, 64), 64, 96, {}),
    "blocks of two heads": Case((4, 2), (64, 64), 70, 70, {"mask": "causal"}),
    "few rows": Case((1, 1), (128, 128), 9, 33, {"mask": "causal"}),
    "queries before the keys": Case((2, 1), (64, 64), 50, 20, {"mask": "causal"}),
    "smaller heads": Case((3, 1), (96, 80), 40, 161, {"mask": "causal", "window": 33}),
    "odd heads": Case((2, 1), (33, 5), 20, 45, {}),
    "large heads": Case((2, 2), (192, 256), 33, 70, {"mask": "causal", "window": 9}),
    "bool": Case((2, 1), (64, 64), 70, 90, {"mask": SEEN}),
    "added": Case((2, 1), (64, 64), 70, 90, {"mask": oracle.random_x(70, 90, seed=5).half().float()}),
    "infinity added": Case((2, 1), (64, 64), 70, 90, {"mask": torch.where(SEEN, 0.5, -torch.inf)}),
    "sinks": Case((4, 2), (64, 64), 20, 40, {"sinks": torch.tensor([3.0, -2.0, 0.0, 9.0])}),
    "softcap": Case((2, 1), (64, 64), 20, 40, {"softcap": 0.75, "mask": "causal"}),
    "maxima that move": Case((2, 1), (64, 64), 40, 200, {}, factor=8.0),
    "weights beside one": Case((2, 1), (64, 64), 40, 200, {"mask": "causal"}, factor=30.0),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=oracle.name_of)
@pytest.mark.parametrize("name", CASES)
def test_values(name, dtype):
    case = CASES[name]
    narrow = {
        key: each.to(dtype) if isinstance(each, Tensor) and each.dtype != torch.bool else each
        for key, each in case.options.items()
    }
    assert_attention(Case(case.heads, case.sizes, case.queries, case.keys, narrow, case.factor), dtype)


def test_maxima_that_move_in_every_block():
    """Scores that grow from key to key, so that each block's are beyond those of all before."""
    q, k, v = Case((1, 1), (64, 64), 20, 130, {}).tensors(torch.float16)
    q = torch.ones_like(q)
    k = torch.arange(130).half()[:, None].expand_as(k) / 64
    for keys in (k, k.flip(2)):
        y, _ = attend(q, keys.contiguous(), v, scale=0.25)
        expected = exact(q, keys, v, 0.25)
        oracle.assert_within(y, expected, 1e-3 * (expected.abs() + v.double().abs().max()))


def test_what_is_not_finite():
    """Rows that meet it, and no others."""
    q, k, v = Case((2, 1), (64, 64), 20, 40, {}).tensors(torch.float16)
    q[0, 1, 7, 5], k[1, 0, 3, 0] = torch.nan, torch.inf
    y, _ = attend(q, k, v, scale=0.125)
    wrong = torch.zeros(2, 2, 20, dtype=torch.bool)
    wrong[0, 1, 7] = True
    wrong[1] = q[1, :, :, 0] > 0  # infinite scores; those that are minus infinity are no weight
    assert torch.equal(y.isnan().all(-1), wrong) and torch.equal(y.isnan().any(-1), wrong)


def test_does_not_assume_who_holds_which_sum(monkeypatch):
    compile = mps.device.compile

    def compile_otherwise(source, **options):
        options["defines"] = {**options.get("defines", {}), "SOFTMETAL_TENSOR_LAYOUT": 1}
        return compile(source, **options)

    monkeypatch.setattr(mps.device, "compile", compile_otherwise)
    for index, (dim, factor) in enumerate(((64, 8.0), (256, 1.0))):
        case = Case((2, 1), (dim, dim), 40, 100, {"mask": "causal"}, factor)
        q, k, v = case.tensors(torch.float16)
        y, _ = attend(q, k, v, gpu=f"applegpu_g{980 + index}p", scale=case.scale, mask="causal")
        expected = exact(q, k, v, case.scale, mask="causal")
        oracle.assert_within(y, expected, 1e-3 * (expected.abs() + v.double().abs().max()))


@pytest.mark.parametrize(
    ("queries", "options", "blocks"),
    [
        (128, {}, 8),
        (128, {"mask": "causal"}, 2 + 4),
        (128, {"mask": "causal", "window": 1}, 2 + 2),
        (10, {"mask": "causal"}, 4),
    ],
)
def test_hidden_keys_are_not_visited(queries, options, blocks):
    """128 keys, of which causal blocks of 64 rows visit those up to their last query."""
    q, k, v = (oracle.random_x(1, 1, count, 64).half() for count in (queries, 128, 128))
    y, launch = attend(q, k, v, scale=0.125, **options)
    assert launch.threadgroups == (-(-queries // 64), 1, 1)
    assert launch.counters["simdgroup_multiplies"] == blocks * 2 * 64 * 32 * 64 // 512
    assert launch.counters["threadgroup_barriers"] == 2 * blocks + 2 * launch.threadgroups[0]
    oracle.assert_within(y, exact(q, k, v, 0.125, **options), 5e-3)


def test_kernels():
    expected = {f"attention_tile_nax_{dim}_{dtype}" for dim in (64, 128, 256) for dtype in ("float16", "bfloat16")}
    assert set(softmetal.compile(SHADER, standard="metal4.0").kernels) == expected
    assert softmetal.compile(SHADER, standard="metal3.1").kernels == []
