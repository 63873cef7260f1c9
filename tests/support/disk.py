"""A disk that is full."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import Tensor


def fill_disk(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """From now on, the second file that safetensors saves finds the disk full.

    Returns the files that it was asked to save, a list that grows.
    """
    from safetensors.torch import save_file

    asked: list[Path] = []

    def save(tensors: dict[str, Tensor], file: Path, metadata: dict[str, str]) -> None:
        asked.append(file)
        if len(asked) == 2:
            raise OSError("No space left on device")
        save_file(tensors, file, metadata)

    monkeypatch.setattr("safetensors.torch.save_file", save)
    return asked
