"""sample: the steps against those of Transformers in float64, the draw against a generator written here."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import oracle
from cases import DTYPES
from oracle import name_of
from quantization_mlx import fast
from quantization_mlx._ops import ops

DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
RULES: dict[str, dict[str, Any]] = {
    "none": {},
    "temperature": {"temperature": 0.6},
    "hot": {"temperature": 50.0},
    "top_k": {"top_k": 7},
    "top_k of all": {"top_k": 100_000},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.1},
    "top_k and top_p": {"top_k": 12, "top_p": 0.7},
    "penalty": {"repetition_penalty": 1.7},
    "all": {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.3},
}
RULE = pytest.mark.parametrize("rules", RULES.values(), ids=RULES.keys())


# --- References -------------------------------------------------------------------------------------------------------


def philox(key: tuple[int, int], counter: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """Philox-4x32-10, as its paper has it."""
    a, b, c, d = counter
    for step in range(10):
        words = [(word + step * weyl) % 2**32 for word, weyl in zip(key, (0x9E3779B9, 0xBB67AE85), strict=True)]
        first, second = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b = (second >> 32) ^ b ^ words[0], second % 2**32
        c, d = (first >> 32) ^ d ^ words[1], first % 2**32
    return a, b, c, d


def uniform(seed: int, offset: int, row: int) -> float:
    def halves(number: int) -> tuple[int, int]:
        return number % 2**32, number >> 32 & 0xFFFFFFFF

    high, low, *_ = philox(halves(seed), (*halves(offset), *halves(row)))
    return (high << 32 | low) / 2**64


def probabilities(logits: Tensor, previous: Tensor | None = None, **rules: Any) -> Tensor:
    """What is left of [rows, V] after Transformers' own steps, in float64."""
    from transformers import generation as hf

    scores = logits.cpu().double()
    penalty = rules.get("repetition_penalty", 1.0)
    if previous is not None and penalty != 1.0:
        step = hf.RepetitionPenaltyLogitsProcessor(penalty)
        rows = [step(row[row >= 0][None], each[None]) for row, each in zip(previous, scores, strict=True)]
        scores = torch.cat(rows)
    steps = []
    if "temperature" in rules:
        steps.append(hf.TemperatureLogitsWarper(rules["temperature"]))
    if "top_k" in rules:
        steps.append(hf.TopKLogitsWarper(rules["top_k"]))
    if "top_p" in rules:
        steps.append(hf.TopPLogitsWarper(rules["top_p"]))
    if "min_p" in rules:
        steps.append(hf.MinPLogitsWarper(rules["min_p"]))
    for step in steps:
        scores = step(None, scores)
    return scores.softmax(-1)


def assert_drawn(tokens: Tensor, chances: Tensor, numbers: list[float]) -> None:
    """Each is the token whose part of the sum of probabilities, in the order of tokens, has the row's number."""
    assert tokens.dtype == torch.int64
    for token, row, number in zip(tokens.cpu().tolist(), chances, numbers, strict=True):
        assert row[token] > 0, f"token {token} is not to be drawn"
        below = row[:token].sum().item()
        assert below - 2e-6 <= number <= below + row[token].item() + 2e-6, f"token {token} of {number}"


def previous_tokens(rows: int, vocabulary: int) -> Tensor:
    """With padding, and a token twice."""
    tokens = torch.randint(vocabulary, (rows, 9), generator=oracle.generator(3))
    tokens[:, 4] = tokens[:, 2]
    tokens[:, [0, 7]] = torch.tensor([-1, -100])
    return tokens


def on(device: str, rules: dict[str, Any]) -> dict[str, Any]:
    return {name: each.to(device) if isinstance(each, Tensor) else each for name, each in rules.items()}


# --- The generator ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "counter, key, words",
    [
        ("0" * 32, "0" * 16, "6627e8d5e169c58dbc57ac4c9b00dbd8"),
        ("f" * 32, "f" * 16, "408f276d41c83b0ea20bc7c66d5451fd"),
        ("243f6a8885a308d313198a2e03707344", "a4093822299f31d0", "d16cfe0994fdcceb5001e42024126ea1"),
    ],
)
def test_the_reference_has_the_known_answers(counter: str, key: str, words: str) -> None:
    def split(text: str) -> tuple[int, ...]:
        return tuple(int(text[i : i + 8], 16) for i in range(0, len(text), 8))

    assert philox(split(key), split(counter)) == split(words)


# --- Values -----------------------------------------------------------------------------------------------------------


def distinct_logits(rows: int, vocabulary: int, dtype: torch.dtype) -> Tensor:
    """Without ties, of which the filters of Transformers keep any."""
    values = (3 * torch.randn(300_000, generator=oracle.generator(1))).to(dtype).unique()
    return torch.stack([values[torch.randperm(len(values), generator=oracle.generator(row))] for row in range(rows)])[
        :, :vocabulary
    ]


@RULE
@DTYPE
@pytest.mark.parametrize("vocabulary", [3, 203, 2000])
def test_draws(device: str, dtype: torch.dtype, vocabulary: int, rules: dict[str, Any]) -> None:
    rows, seed, offset = 5, 12345678901234567, 3 << 33
    logits = distinct_logits(rows, vocabulary, dtype)
    given = dict(rules, previous=previous_tokens(rows, vocabulary))
    tokens = fast.sample(logits.to(device), seed, offset=offset, **on(device, given))
    assert_drawn(tokens, probabilities(logits, **given), [uniform(seed, offset, row) for row in range(rows)])


def test_real_vocabulary(device: str) -> None:
    logits = distinct_logits(1, 151_936, torch.float32)
    given = dict(RULES["all"], top_k=3000, previous=previous_tokens(1, 151_936))
    tokens = fast.sample(logits.to(device), 1, **on(device, given))
    assert_drawn(tokens, probabilities(logits, **given), [uniform(1, 0, 0)])


def draw_many(device: str, logits: Tensor, draws: int, **rules: Any) -> Tensor:
    return fast.sample(logits.to(device).expand(draws, -1), 7, **rules).cpu()


@RULE
def test_distribution(rules: dict[str, Any]) -> None:
    """Every token that may be drawn is, as often as its probability says, and no other."""
    draws = 20_000
    logits = distinct_logits(1, 24, torch.float32)
    chances = probabilities(logits, **rules)[0]
    counts = draw_many("cpu", logits, draws, **rules).bincount(minlength=24)
    expected = chances * draws
    assert not counts[chances == 0].any() and counts[expected > 15].all()
    # Tokens that are seldom drawn count as one.
    often, seldom = expected >= 8, expected < 8
    expected = torch.cat([expected[often], expected[seldom].sum()[None]])
    counts = torch.cat([counts[often], counts[seldom].sum()[None]])
    chi_square = ((counts - expected) ** 2 / expected.clamp(min=1e-9)).sum().item()
    freedom = len(expected) - 1
    assert chi_square < freedom + 4 * (2 * freedom) ** 0.5 + 4


def test_rows_offsets_and_seeds_are_independent() -> None:
    logits = torch.zeros(4096, 16)
    draws = [
        fast.sample(logits, 7),
        fast.sample(logits, 8),
        fast.sample(logits, 7, offset=1),
        fast.sample(logits, 7 + (1 << 40)),
        fast.sample(logits, 7, offset=1 << 40),
        fast.sample(logits, 7).roll(1),
        fast.sample(logits, torch.arange(4096)),
        fast.sample(logits, torch.arange(4096)).roll(1),
    ]
    for i, one in enumerate(draws):
        for j, other in enumerate(draws[:i]):
            agree = int((one == other).sum())  # 256 are expected, with a standard deviation of 15.5
            assert 190 < agree < 320 or (i, j) in ((5, 0), (7, 6)), (i, j, agree)
    assert torch.equal(draws[0], fast.sample(logits, 7))


def test_seeds_as_tensors(device: str) -> None:
    logits = oracle.random_x(3, 2, 50).to(device)
    as_number = fast.sample(logits, 99, offset=4)
    assert torch.equal(fast.sample(logits, torch.tensor(99, device=device), offset=4), as_number)
    seeds = torch.tensor([[5, -6], [7, 1 << 50], [5, 0]]).to(device)
    tokens = fast.sample(logits, seeds.mT.contiguous().mT, offset=4)
    assert tokens.shape == (3, 2)
    for i in range(3):
        for j in range(2):  # the same as alone
            assert tokens[i, j] == fast.sample(logits[i, j], int(seeds[i, j]), offset=4)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_ties(device: str, temperature: float) -> None:
    """The most probable token is the first of several; filters keep all that equal the last one."""
    logits = torch.zeros(4, 700)
    logits[:, [13, 444, 600]] = 2.0
    logits[1, 600] = -2.0
    tokens = fast.sample(logits.to(device), 0, temperature=0.0)
    assert tokens.tolist() == [13] * 4
    if temperature:
        for rules in ({"top_k": 1}, {"top_k": 2}, {"top_p": 1e-3}, {"min_p": 1.0}):
            drawn = draw_many(device, logits[:1], 24, **rules)
            assert set(drawn.tolist()) == {13, 444, 600}


@DTYPE
def test_most_probable(device: str, dtype: torch.dtype) -> None:
    logits = distinct_logits(6, 900, dtype)
    logits[0, :] = -torch.inf
    logits[0, 899] = -3.0
    assert torch.equal(fast.sample(logits.to(device), 0, temperature=0.0).cpu(), logits.argmax(-1))
    assert torch.equal(fast.sample(logits.to(device), 3, top_k=1).cpu(), logits.argmax(-1))
    penalised = fast.sample(
        logits.to(device), 0, temperature=0.0, repetition_penalty=1e30, previous=logits.argmax(-1)[:, None].to(device)
    ).cpu()
    assert (penalised[1:] == logits[1:].float().topk(2).indices[:, 1]).all()
    assert penalised[0] == 899  # there is no other


def test_excluded_tokens(device: str) -> None:
    logits = torch.full((1, 300), -torch.inf)
    logits[0, [7, 299]] = torch.tensor([0.0, 0.5])
    for rules in ({}, {"top_k": 40}, {"top_p": 0.99}, {"min_p": 1e-9}):
        assert set(draw_many(device, logits, 24, **rules).tolist()) == {7, 299}


def test_extreme_values(device: str) -> None:
    """Logits at the ends of float32 and temperatures near 0 and far above: no overflow, no subnormals."""
    big = torch.finfo(torch.float32).max
    for logits, rules, allowed in (
        ([-big, big, 0.0], {}, {1}),
        ([1e-40, 0.0, -1e-40, -0.0], {"temperature": 1e-30}, {0, 1, 2, 3}),
        ([1.0, 2.0, 2.0000002], {"temperature": 1e-30}, {2}),
        ([-100.0, 100.0], {"temperature": 1e30}, {0, 1}),
        ([0.0, -19.0], {}, {0}),
    ):
        drawn = draw_many(device, torch.tensor([logits]), 30, **rules)
        assert set(drawn.tolist()) == allowed


def test_strides(device: str) -> None:
    base = oracle.random_x(6, 8, 200, dtype=torch.float16).to(device)
    rules = {"top_k": 9, "previous": torch.arange(60, device=device).view(5, 4, 3), "repetition_penalty": 1.5}
    views = {
        "a part of each row": base[:5, :4, 8:72],
        "one that begins anywhere": base[:5, :4, 3:67],
        "rows swapped with others": base[:4, :5, :64].transpose(0, 1),
        "every other element": base[:5, :4, ::2][..., :64],
        "one row for all": base[:1, :1, :64].expand(5, 4, 64),
    }
    for name, logits in views.items():
        ours = fast.sample(logits, 3, **rules)
        assert torch.equal(ours, fast.sample(logits.contiguous(), 3, **rules)), name
    previous = rules["previous"].transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(ours, fast.sample(logits, 3, top_k=9, previous=previous, repetition_penalty=1.5))


@pytest.mark.parametrize("shape", [(5,), (0, 5), (2, 0, 5), (1, 1, 1), (40, 1)], ids=str)
def test_shapes(device: str, shape: tuple[int, ...]) -> None:
    tokens = fast.sample(oracle.random_x(*shape).to(device), 1)
    assert tokens.shape == shape[:-1]
    assert ((tokens >= 0) & (tokens < shape[-1])).all()


BAD_ROWS = {
    "NaN": [0.0, torch.nan, 1.0],
    "negative NaN": [0.0, -torch.nan, 1.0],
    "infinity": [0.0, torch.inf, 1.0],
    "nothing": [-torch.inf] * 3,
}


@pytest.mark.parametrize("rules", [{}, {"temperature": 0.0}, {"top_k": 1, "top_p": 0.5}], ids=str)
def test_rows_without_distribution(device: str, rules: dict[str, Any]) -> None:
    good = [0.0, 9.0, -torch.inf]
    for bad in BAD_ROWS.values():
        logits = torch.tensor([good, bad, good]).to(device)
        if device == "cpu":
            with pytest.raises(ValueError, match=r"\[sample\] row 1 of logits has no distribution"):
                fast.sample(logits, 0, **rules)
        else:
            tokens = fast.sample(logits, 0, **rules).tolist()
            assert tokens[1] == -1 and tokens[0] in (0, 1) and tokens[2] in (0, 1)


def test_previous_tokens_that_are_none(device: str) -> None:
    logits = torch.zeros(2, 3).to(device)
    previous = torch.tensor([[0, 2], [3, 1]]).to(device)
    if device == "cpu":
        with pytest.raises(IndexError, match=r"\[sample\] previous holds 3 at position 2; it must be below .* 3"):
            fast.sample(logits, 0, previous=previous, repetition_penalty=2.0)
    else:
        tokens = fast.sample(logits, 0, previous=previous, repetition_penalty=2.0).tolist()
        assert tokens[0] in range(3) and tokens[1] == -1


# --- As torch's ops ---------------------------------------------------------------------------------------------------

LOGITS = oracle.random_x(2, 3, 48)
PREVIOUS = torch.arange(12).view(2, 3, 2)
ARGUMENTS = (LOGITS, None, 5, 2, 0.7, 20, 0.9, 0.01, 1.2, PREVIOUS)


@pytest.mark.parametrize("seeds", [None, torch.tensor(4), torch.arange(6).view(2, 3)], ids=["none", "one", "each"])
def test_opcheck(device: str, seeds: Tensor | None) -> None:
    arguments = [each.to(device) if isinstance(each, Tensor) else each for each in ARGUMENTS]
    arguments[1] = None if seeds is None else seeds.to(device)
    checks = ["test_schema", "test_faketensor", "test_aot_dispatch_dynamic"]
    if device == "cpu":  # torch has this one for some devices only; the registration is the same for all
        checks.append("test_autograd_registration")
    torch.library.opcheck(ops.sample.default, tuple(arguments), test_utils=checks)


def test_tokens_have_no_gradient() -> None:
    tokens = fast.sample(LOGITS.clone().requires_grad_(), 1)
    assert not tokens.requires_grad and torch.equal(tokens, fast.sample(LOGITS, 1))


def test_compiles_once_for_all_seeds_and_offsets() -> None:
    def draw(logits: Tensor, seed: int, offset: int) -> Tensor:
        return fast.sample(logits, seed, offset=offset, top_k=5)

    graphs = []

    def counted(graph: torch.fx.GraphModule, _: list) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    compiled = torch.compile(draw, fullgraph=True, backend=counted, dynamic=True)
    for seed in range(5, 15):
        assert torch.equal(compiled(LOGITS, seed, 3 * seed), draw(LOGITS, seed, 3 * seed))
    assert len(graphs) <= 2


def test_exports_with_sizes_that_depend_on_data() -> None:
    class Module(torch.nn.Module):
        def forward(self, mask: Tensor) -> Tensor:
            return fast.sample(torch.arange(6.0)[mask][:, None] * torch.arange(48), 3)

    mask = torch.tensor([True, False, True, True, False, True])
    program = torch.export.export(Module(), (mask,)).module()
    for each in (mask, ~mask):
        assert torch.equal(program(each), Module()(each))


@pytest.mark.parametrize("vocabulary, threads", [(1, 32), (300, 64), (151_936, 1024)])
def test_explain(vocabulary: int, threads: int) -> None:
    logits = torch.empty(4, 7, vocabulary, dtype=torch.float16, device="meta")
    plan = json.loads(ops.explain_sample(logits, None, 1, 2, 1.0, 0, 0.9, 0.0, 1.0, None, "applegpu_g15s", 1500))
    (launch,) = plan["launches"]
    assert (launch["kernel"], launch["file"], launch["threads"]) == ("sample_float16", "sample", threads)
    assert launch["threadgroups"] == [28, 1, 1]
    assert json.loads(ops.explain_sample(*ARGUMENTS, "", 0))["device"] == "cpu"


# --- Errors -----------------------------------------------------------------------------------------------------------

ERRORS: dict[str, tuple[Callable[[], Tensor], type[Exception], str]] = {
    "scalar": (lambda: fast.sample(torch.tensor(1.0), 0), ValueError, r"\[sample\] logits is a scalar"),
    "dtype": (lambda: fast.sample(LOGITS.double(), 0), TypeError, r"\[sample\] logits has dtype Double"),
    "no tokens": (lambda: fast.sample(LOGITS[..., :0], 0), ValueError, r"logits of shape \[2, 3, 0\] has no tokens"),
    "seed dtype": (lambda: fast.sample(LOGITS, torch.tensor(1.0)), TypeError, "seed has dtype Float; it must be int64"),
    "seed shape": (
        lambda: fast.sample(LOGITS, torch.arange(3)),
        ValueError,
        r"seed of shape \[3\] must be a scalar or one for each row of logits, whose shape is \[2, 3, 48\]",
    ),
    "seed device": (
        lambda: fast.sample(LOGITS, torch.arange(6, device="meta").view(2, 3)),
        ValueError,
        "seed is on meta and logits on cpu",
    ),
    "previous dtype": (lambda: fast.sample(LOGITS, 0, previous=PREVIOUS.int()), TypeError, "previous has dtype Int"),
    "previous shape": (
        lambda: fast.sample(LOGITS, 0, previous=PREVIOUS[0]),
        ValueError,
        r"previous of shape \[3, 2\] must have the leading sizes of logits",
    ),
    "temperature": (lambda: fast.sample(LOGITS, 0, temperature=-1.0), ValueError, "temperature is -1; it must be at"),
    "top_k": (lambda: fast.sample(LOGITS, 0, top_k=-1), ValueError, "top_k is -1; it must be at least 0"),
    "top_p": (lambda: fast.sample(LOGITS, 0, top_p=1.5), ValueError, "top_p is 1.5; it must be from 0 to 1"),
    "min_p": (lambda: fast.sample(LOGITS, 0, min_p=float("nan")), ValueError, "min_p is nan; it must be from 0 to 1"),
    "penalty": (
        lambda: fast.sample(LOGITS, 0, repetition_penalty=0.0),
        ValueError,
        "repetition_penalty is 0; it must be above 0",
    ),
}


@pytest.mark.parametrize("call, error, message", ERRORS.values(), ids=ERRORS.keys())
def test_refuses_what_does_not_fit(call: Callable[[], Tensor], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_fake_tensors_raise_the_same() -> None:
    with pytest.raises(ValueError, match=r"\[sample\] seed of shape \[3\] must be"):
        fast.sample(LOGITS.to("meta"), torch.arange(3, device="meta"))
