"""benchmarks/moe_dispatch.py: both of its contenders have the same experts, and it prints a row for each pair."""

from __future__ import annotations

import re
import sys

import pytest
import torch

from repository import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import moe_dispatch as benchmark


def test_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """With one expert for each token, whose weight is 1, product and mixture are the same."""
    results: dict[str, list[torch.Tensor]] = {"product": [], "whole": []}

    def recorded(call, turn: int) -> float:
        results[call.__name__].append(call(turn if call.__name__ == "whole" else turn - benchmark.INPUTS // 2))
        return 1.0 if call.__name__ == "product" else 1.5

    monkeypatch.setattr(benchmark, "seconds", recorded)
    benchmark.main(["--tokens", "1", "6", "--sizes", "128", "24", "4", "1", "--calls", "20"])
    for product, whole in zip(*results.values(), strict=True):
        torch.testing.assert_close(product.flatten(1), whole, rtol=1e-2, atol=1e-3)
    rows = re.findall(r"^\| (\d) \| (\w+) \| 1000.000 ms \| 1500.000 ms \| 1.50 \|$", capsys.readouterr().out, re.M)
    assert rows == [(tokens, dtype) for tokens in "16" for dtype in ("float32", "float16", "bfloat16")]
