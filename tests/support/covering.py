"""Covering arrays: of the combinations of several parameters, some in which every pair of values occurs.

What they leave out runs with --exhaustive.
"""

from __future__ import annotations

import random
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

import pytest

Combination = Mapping[str, Hashable]


def pairs(combination: Combination) -> Iterator[Hashable]:
    """Each two values that stand in a combination, with the names of their parameters; of a single one, its value."""
    values = sorted(combination.items(), key=lambda item: item[0])
    yield from combinations(values, min(2, len(values)))


def pairwise(all_combinations: Sequence[Combination]) -> list[int]:
    """The indices, in order, of combinations that have together every pair that all of them have.

    Greedy, hence a few more than the fewest: whatever adds the most pairs is taken. Which one of several is drawn with
    a fixed seed, so that no value is preferred and every process chooses the same.
    """
    order = list(range(len(all_combinations)))
    random.Random(1).shuffle(order)
    missing_of = [set(pairs(combination)) for combination in all_combinations]
    covered: set[Hashable] = set()
    chosen: set[int] = set()
    for gain in range(max(map(len, missing_of), default=0), 0, -1):
        for index in order:
            missing_of[index] -= covered
            if len(missing_of[index]) >= gain:
                chosen.add(index)
                covered |= missing_of[index]
    return sorted(chosen)


def mostly_exhaustive(values: Iterable[Any], *kept: Any) -> list[Any]:
    """Values for pytest.mark.parametrize, of one parameter or in tuples of several, of which only `kept` are tested
    without --exhaustive."""

    def param(value: Any) -> Any:
        return pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.exhaustive)

    return [value if value in kept else param(value) for value in values]
