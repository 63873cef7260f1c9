"""The command line, called in this process."""

from __future__ import annotations

import pytest

from quantization_mlx.cli import main


def run(capsys: pytest.CaptureFixture[str], *argv: object, code: int = 0) -> tuple[str, str]:
    """What the command prints, after checking its exit code."""
    capsys.readouterr()
    assert main([str(argument) for argument in argv]) == code
    captured = capsys.readouterr()
    return captured.out, captured.err
