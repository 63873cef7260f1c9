"""MetalSampler: its choices against exact probabilities and torch's, on every device the same."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import oracle
from cases import DTYPES
from oracle import name_of
from quantization_mlx.marlin import MetalKernelLibrary, MetalSampler

V = 24
SHAPES = ((V,), (1, V), (1, 1, V))


def logits_of(vocabulary: int = V, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Without ties."""
    values = torch.linspace(-4, 4, vocabulary)[torch.randperm(vocabulary, generator=oracle.generator(seed))]
    return values.to(dtype)


# --- Statistics -------------------------------------------------------------------------------------------------------


def kept(probabilities: Tensor, k: int = 0, p: float = 1.0) -> Tensor:
    """float64 [V] of what top-k and then top-p leave, normalised."""
    left = probabilities.clone()
    if k:
        left[left.argsort(descending=True)[k:]] = 0
        left /= left.sum()
    order = left.argsort(descending=True)
    before = left[order].cumsum(0) - left[order]
    left[order[before >= p]] = 0
    return left / left.sum()


def penalised(logits: Tensor, tokens: set[int], penalty: float) -> Tensor:
    wanted = logits.double().clone()
    for token in tokens:
        wanted[token] = wanted[token] / penalty if wanted[token] > 0 else wanted[token] * penalty
    return wanted


Draw = Callable[[MetalSampler, Tensor], int]
# How a token is drawn -> the call, and the exact probabilities of logits.
DRAWS: dict[str, tuple[Draw, Callable[[Tensor], Tensor]]] = {
    "categorical": (
        lambda sampler, logits: sampler.sample_categorical(logits),
        lambda logits: logits.double().softmax(-1),
    ),
    "temperature": (
        lambda sampler, logits: sampler.sample_categorical(logits, temperature=2.5),
        lambda logits: (logits.double() / 2.5).softmax(-1),
    ),
    "top_k": (
        lambda sampler, logits: sampler.sample_top_k(logits, 5, 1.5),
        lambda logits: kept((logits.double() / 1.5).softmax(-1), k=5),
    ),
    "top_p": (
        lambda sampler, logits: sampler.sample_top_p(logits, 0.8, 1.5),
        lambda logits: kept((logits.double() / 1.5).softmax(-1), p=0.8),
    ),
    "top_k and top_p": (  # the original passed over top_p
        lambda sampler, logits: sampler.sample(logits, 2.0, top_p=0.6, top_k=12),
        lambda logits: kept((logits.double() / 2).softmax(-1), 12, 0.6),
    ),
    "penalty": (
        lambda sampler, logits: sampler.sample(logits, 1.5, repetition_penalty=1.4, generated_ids=[3, 7, 3, 20]),
        lambda logits: (penalised(logits, {3, 7, 20}, 1.4) / 1.5).softmax(-1),
    ),
}


@pytest.mark.parametrize("name", DRAWS)
def test_tokens_come_as_often_as_their_probability_says(name: str) -> None:
    draw, exact = DRAWS[name]
    logits, sampler, draws = logits_of(), MetalSampler(V, seed=11), 6000
    counts = torch.tensor([draw(sampler, logits) for _ in range(draws)]).bincount(minlength=V).double()
    expected = exact(logits) * draws
    assert not counts[expected == 0].any()
    # Tokens that are seldom drawn count as one.
    seldom = expected < 8
    counts = torch.cat([counts[~seldom], counts[seldom].sum()[None]])
    expected = torch.cat([expected[~seldom], expected[seldom].sum()[None]])
    chi_square = ((counts - expected) ** 2 / expected.clamp(min=1e-9)).sum().item()
    freedom = len(expected) - 1
    assert chi_square < freedom + 4 * (2 * freedom) ** 0.5 + 4


def test_any_token_of_a_large_vocabulary_can_be_drawn() -> None:
    """1024 equally likely tokens: 3000 draws find as many of them as chance does, give or take 5 deviations."""
    sampler = MetalSampler(1024, seed=5)
    found = len({sampler.sample_categorical(torch.zeros(1024)) for _ in range(3000)})
    expected = 1024 * (1 - (1 - 1 / 1024) ** 3000)
    assert abs(found - expected) < 5 * math.sqrt(expected * (1 - expected / 1024))


# --- Choices ----------------------------------------------------------------------------------------------------------


def row_of(dtype: torch.dtype) -> Tensor:
    return (torch.arange(V) % 7 - torch.arange(V) / 8).to(dtype)


def check_dtype(dtype: torch.dtype, device: str) -> None:
    """Each shape gives the tokens of a row of float32."""
    plain = row_of(dtype).float()
    for shape in SHAPES:
        sampler, same, row = MetalSampler(V, seed=1), MetalSampler(V, seed=1), row_of(dtype).to(device).view(shape)
        token = sampler.argmax(row)
        assert type(token) is int and token == int(plain.argmax())
        for _ in range(4):
            token = sampler.sample_categorical(row, 2.0)
            assert type(token) is int and token == same.sample_categorical(plain, 2.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_shapes_and_dtypes(dtype: torch.dtype, device: str) -> None:
    check_dtype(dtype, device)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e5m2], ids=name_of)
def test_other_dtypes_are_taken_as_float32(dtype: torch.dtype) -> None:
    check_dtype(dtype, "cpu")


def test_a_temperature_of_0_takes_the_likeliest(device: str) -> None:
    sampler = MetalSampler(V, seed=1)
    for seed in range(3):
        logits = logits_of(seed=seed)
        likeliest, row = int(logits.argmax()), logits.to(device)
        assert sampler.argmax(row) == likeliest
        assert sampler.sample_categorical(row, 0) == likeliest
        assert sampler.sample_top_k(row, 3, 0.0) == likeliest
        assert sampler.sample_top_p(row, 0.1, 0.0) == likeliest
        assert sampler.sample(row, 0.0, 0.9, 50) == likeliest
        second = int(penalised(logits, {likeliest}, 50.0).argmax())
        assert sampler.sample(row, 0.0, repetition_penalty=50.0, generated_ids=[likeliest]) == second != likeliest
    assert sampler.draws == 0
    assert sampler.argmax(torch.tensor([0.0] * 5 + [1.0, 1.0] + [0.0] * 17).to(device)) == 5  # the first of several


def test_filters_that_leave_one_or_all(device: str) -> None:
    logits = logits_of().to(device)
    likeliest = int(logits_of().argmax())
    sampler = MetalSampler(V, seed=3)
    assert {sampler.sample_top_k(logits, 1, 9.0) for _ in range(5)} == {likeliest}
    assert {sampler.sample_top_p(logits, 1e-6, 9.0) for _ in range(5)} == {likeliest}
    plain, all_kept = (MetalSampler(V, seed=3) for _ in range(2))
    for _ in range(5):
        token = plain.sample_categorical(logits)
        assert token == all_kept.sample(logits, top_k=0, top_p=1.0, repetition_penalty=2.0, generated_ids=[])
    plain, all_kept = (MetalSampler(V, seed=3) for _ in range(2))
    for k in (V, V + 1, 10**6, 2**63, 10**30):
        assert plain.sample_categorical(logits) == all_kept.sample_top_k(logits, k)


def test_excluded_tokens_are_never_drawn(device: str) -> None:
    logits = torch.full((V,), -math.inf)
    logits[[4, 19]] = torch.tensor([0.0, 0.5])
    sampler = MetalSampler(V, seed=2)
    assert {sampler.sample(logits.to(device), top_p=0.99, top_k=10) for _ in range(12)} == {4, 19}


# --- The stream of a seed ---------------------------------------------------------------------------------------------


def tokens_of(sampler: MetalSampler, device: str = "cpu", count: int = 12) -> list[int]:
    logits = logits_of().to(device)
    return [sampler.sample(logits, 3.0, 0.95, 20) for _ in range(count)]


def test_a_seed_gives_the_same_tokens_on_every_device(device: str) -> None:
    assert tokens_of(MetalSampler(V, seed=42), device) == tokens_of(MetalSampler(V, seed=42))


def test_seeds() -> None:
    first = tokens_of(MetalSampler(V, seed=42))
    assert tokens_of(MetalSampler(V, MetalKernelLibrary("cpu"), 42)) == first
    for other in (41, 43, -42, 2**63 - 1, -(2**63)):
        assert tokens_of(MetalSampler(V, seed=other)) != first
    sampler = MetalSampler(V, seed=42)
    for expected in first:  # what draws nothing does not disturb the others
        sampler.argmax(logits_of())
        sampler.sample(logits_of(), temperature=0)
        assert tokens_of(sampler, count=1) == [expected]
    assert sampler.draws == len(first)


def test_without_a_seed_torchs_decides() -> None:
    state = torch.get_rng_state()
    torch.manual_seed(7)
    first, second = tokens_of(MetalSampler(V)), tokens_of(MetalSampler(V))
    torch.manual_seed(7)
    again = tokens_of(MetalSampler(V))
    torch.set_rng_state(state)
    assert again == first != second


# --- The penalty ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_penalty(dtype: torch.dtype, device: str) -> None:
    """Once for each token, however often it is there; by hand."""
    logits = torch.tensor([2.0, -2.0, 0.0, 3.0, -math.inf, 5.0]).to(dtype)
    sampler = MetalSampler(6)
    for given in ([0, 1, 2, 4, 0, 1, 0], torch.tensor([4, 1, 0, 2, 2], device=device), (0, 1, 2, 4), range(5)):
        before = logits.to(device)
        after = sampler.apply_repetition_penalty(before, given, 2.0)
        third = 1.5 if 3 in given else 3.0
        oracle.assert_identical(after, torch.tensor([1.0, -4.0, 0.0, third, -math.inf, 5.0]).to(dtype))
        assert torch.equal(before.cpu(), logits)
    assert torch.equal(sampler.apply_repetition_penalty(before, [], 2.0), before)
    rows = logits.expand(2, 3, 6).to(device)
    after = sampler.apply_repetition_penalty(rows, [0], 0.5)
    oracle.assert_identical(after[1, 2], torch.tensor([4.0, -2.0, 0.0, 3.0, -math.inf, 5.0]).to(dtype))


def test_penalty_has_a_gradient() -> None:
    logits = torch.tensor([2.0, -2.0, 1.0], requires_grad=True)
    MetalSampler(3).apply_repetition_penalty(logits, [0, 1], 4.0).sum().backward()
    assert logits.grad.tolist() == [0.25, 4.0, 1.0]


# --- What is refused --------------------------------------------------------------------------------------------------

ROW = torch.zeros(V)
DRAWN_BY = {
    "argmax": lambda sampler, logits: sampler.argmax(logits),
    "sample_categorical": lambda sampler, logits: sampler.sample_categorical(logits),
    "sample_top_k": lambda sampler, logits: sampler.sample_top_k(logits, 2),
    "sample_top_p": lambda sampler, logits: sampler.sample_top_p(logits, 0.5),
    "sample": lambda sampler, logits: sampler.sample(logits, 0.7, 0.9, 50, 1.1, [1, 2]),
}


@pytest.mark.parametrize("method", DRAWN_BY)
def test_logits_without_distribution(method: str, device: str) -> None:
    """And the sampler goes on as if they had not been there."""
    sampler = MetalSampler(V, seed=1)
    for bad in (math.nan, math.inf):
        logits = ROW.clone()
        logits[9] = bad
        with pytest.raises(ValueError, match=rf"^\[MetalSampler\.{method}\] logits are no distribution: there is NaN"):
            DRAWN_BY[method](sampler, logits.to(device))
    with pytest.raises(ValueError, match="nothing but -infinity"):
        DRAWN_BY[method](sampler, torch.full((V,), -math.inf, device=device))
    assert sampler.draws == 0


OTHER_SHAPES = [(), (0,), (V - 1,), (V + 1,), (2, V), (1, 2, V), (0, V), (1, 1, 1, V), (V, 1)]


@pytest.mark.parametrize("method", DRAWN_BY)
@pytest.mark.parametrize("shape", OTHER_SHAPES, ids=str)
def test_logits_of_other_shapes(method: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=rf"^\[MetalSampler\.{method}\] logits has shape {re.escape(str([*shape]))}"):
        DRAWN_BY[method](MetalSampler(V), torch.zeros(shape))


Call = Callable[[MetalSampler], Any]
VALUE_ERRORS: dict[str, tuple[Call, str]] = {
    **{
        f"temperature of {value}": (
            lambda s, value=value: s.sample_categorical(ROW, value),
            f"[MetalSampler.sample_categorical] temperature is {value!r}; it must be a finite number of at least 0",
        )
        for value in (-1.0, math.nan, math.inf, "1", None)
    },
    **{
        f"k of {value}": (
            lambda s, value=value: s.sample_top_k(ROW, value),
            f"[MetalSampler.sample_top_k] k is {value!r}; it must be a whole number of at least 1",
        )
        for value in (0, -1, 2.0, True, "5")
    },
    **{
        f"p of {value}": (
            lambda s, value=value: s.sample_top_p(ROW, value),
            f"[MetalSampler.sample_top_p] p is {value!r}; it must be a number above 0 and at most 1",
        )
        for value in (0, 0.0, -0.5, 1.01, math.nan)
    },
    **{
        f"penalty of {value}": (
            lambda s, value=value: s.apply_repetition_penalty(ROW, [1], value),
            f"[MetalSampler.apply_repetition_penalty] penalty is {value!r}; it must be a finite number above 0",
        )
        for value in (0, -1.1, math.nan, math.inf)
    },
    "temperature of top-k": (lambda s: s.sample_top_k(ROW, 3, -1), "[MetalSampler.sample_top_k] temperature is -1"),
    "temperature of top-p": (lambda s: s.sample_top_p(ROW, 0.5, -1), "[MetalSampler.sample_top_p] temperature is -1"),
    "temperature of all": (lambda s: s.sample(ROW, temperature=-1), "[MetalSampler.sample] temperature is -1"),
    "top_k of all": (lambda s: s.sample(ROW, top_k=-1), "top_k is -1; it must be a whole number of at least 0"),
    "top_p of all": (lambda s: s.sample(ROW, top_p=0.0), "top_p is 0.0; it must be a number above 0 and at most 1"),
    "penalty of all": (lambda s: s.sample(ROW, repetition_penalty=0), "repetition_penalty is 0; it must be a finite"),
    "vocabulary of 0": (lambda _: MetalSampler(0), "[MetalSampler] vocab_size is 0; it must be at least 1"),
    "seed": (lambda _: MetalSampler(V, seed=2**63), "[MetalSampler] seed is 9223372036854775808; it must be None or"),
    "fraction as seed": (lambda _: MetalSampler(V, seed=0.5), "[MetalSampler] seed is 0.5; it must be None or"),
}
OTHER_ERRORS: dict[str, tuple[type[Exception], Call, str]] = {
    "token beyond the last": (
        IndexError,
        lambda s: s.sample(ROW, generated_ids=[1, V]),
        f"[MetalSampler.sample] generated_ids holds {V}; it must be from 0 to {V - 1}",
    ),
    "negative token": (
        IndexError,
        lambda s: s.apply_repetition_penalty(ROW, torch.tensor([-1]), 1.1),
        "[MetalSampler.apply_repetition_penalty] generated_ids holds -1; it must be from 0",
    ),
    "text as token": (TypeError, lambda s: s.sample(ROW, generated_ids=["1"]), "generated_ids holds '1'; it must hold"),
    "one token": (TypeError, lambda s: s.sample(ROW, generated_ids=3), "[MetalSampler.sample] generated_ids is 3; it"),
    "whole numbers as logits": (TypeError, lambda s: s.argmax(ROW.long()), "[MetalSampler.argmax] logits has dtype"),
    "list as logits": (TypeError, lambda s: s.argmax([0.0] * V), "[MetalSampler.argmax] logits is of type list"),
    "lib": (TypeError, lambda _: MetalSampler(V, "mps"), "[MetalSampler] lib is of type str; it must be a Metal"),
    "text as vocabulary": (TypeError, lambda _: MetalSampler("32"), "[MetalSampler] vocab_size is '32'; it must be a"),
}


@pytest.mark.parametrize("name", [*VALUE_ERRORS, *OTHER_ERRORS])
def test_wrong_arguments_are_named(name: str) -> None:
    error, call, message = OTHER_ERRORS.get(name) or (ValueError, *VALUE_ERRORS[name])
    with pytest.raises(error, match=re.escape(message)):
        call(MetalSampler(V))


# --- The documented example, with another import ----------------------------------------------------------------------


def test_documented_example(device: str) -> None:
    from quantization_mlx.marlin.sampler import MetalSampler

    logits = logits_of(32000).to(device)
    sampler = MetalSampler(vocab_size=32000)

    # Greedy decoding
    token_id = sampler.argmax(logits)
    assert token_id == int(logits_of(32000).argmax())

    # Temperature + top-p sampling
    token_id = sampler.sample(logits, temperature=0.7, top_p=0.9)
    assert kept((logits_of(32000).double() / 0.7).softmax(-1), p=0.9)[token_id] > 0

    # With repetition penalty
    token_id = sampler.sample(
        logits,
        temperature=0.7,
        top_p=0.9,
        generated_ids=[1, 2, 3],
        repetition_penalty=1.1,
    )
    assert kept((penalised(logits_of(32000), {1, 2, 3}, 1.1) / 0.7).softmax(-1), p=0.9)[token_id] > 0
