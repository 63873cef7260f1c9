"""The demo from end to end on the real model, with short timings."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest

DEMO = Path(__file__).resolve().parent.parent / "examples" / "demo.py"


def test_demo_answers_and_compares(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = importlib.util.spec_from_file_location("demo", DEMO)
    demo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(demo)
    monkeypatch.setattr(demo, "TIMED_TOKENS", 4)
    monkeypatch.setattr(demo, "RUNS", 1)
    monkeypatch.setattr(sys, "argv", ["demo.py", "--checkpoint", str(tmp_path / "checkpoint")])
    demo.main()

    output = capsys.readouterr().out
    assert re.search(r"> What is the capital of France\?\n.*Paris", output)
    assert int(re.search(r"(\d+) tokens\. Speed", output)[1]) >= 2000
    number = r"([\d.]+)"
    float32 = re.search(rf"torch, float32 +{number} MB +{number} +{number} +{number}\n", output)
    quantized = re.search(rf"quantization-mlx +{number} MB +{number} +{number} +{number}\n", output)
    megabytes, bits, perplexity, speed = (float(value) for value in quantized.groups())
    assert 4.5 <= bits < 4.6  # 4 and, for each group of 64, a scale and a bias of 16 bits, and the norms
    assert megabytes < 0.15 * float(float32[1])
    assert perplexity < 1.5 * float(float32[3])
    assert speed > 0
    assert re.search(rf"mlx-lm +{megabytes} MB +{bits} +{number}\n", output)
