"""How many values were compared with mlx, and how many differed."""

from __future__ import annotations

from collections import defaultdict

from torch import Tensor

import oracle


class Tally:
    """Counts bitwise comparisons by name, so that a run can show how much it compared."""

    def __init__(self) -> None:
        self.compared: dict[str, int] = defaultdict(int)
        self.mismatched: dict[str, int] = defaultdict(int)

    def compare(self, name: str, ours: Tensor, expected: Tensor, what: str) -> None:
        differs = oracle.mismatches(ours, expected)
        self.compared[name] += differs.numel()
        self.mismatched[name] += int(differs.sum())
        oracle.assert_identical(ours, expected, what)

    def counts(self) -> dict[str, tuple[int, int]]:
        return {name: (count, self.mismatched[name]) for name, count in self.compared.items()}

    def add(self, counts: dict[str, tuple[int, int]]) -> None:
        for name, (compared, mismatched) in counts.items():
            self.compared[name] += compared
            self.mismatched[name] += mismatched

    def lines(self) -> list[str]:
        compared = sorted(self.compared.items())
        return [f"{name}: {count} values compared, {self.mismatched[name]} mismatches" for name, count in compared]
