"""The files of a checkpoint directory: JSON, and the headers of the weight files.

The tensors of a model are those that its `model*.safetensors` files hold. The index is not read: it may be stale, and
it may name files outside of the directory.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from ..messages import listed
from ..optional import require
from .record import find_record

WEIGHT_FILES = "model*.safetensors"
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model")

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


def weight_files(directory: Path, op: str = "from_pretrained") -> list[Path]:
    """The files that hold the tensors.

    Raises:
        FileNotFoundError: there are none; the message begins with the name of `op`.
    """
    files = sorted(directory.glob(WEIGHT_FILES))
    if not files:
        raise FileNotFoundError(f"[{op}] {directory} has no {WEIGHT_FILES}")
    return files


def is_mlx_directory(directory: Path, op: str = "from_pretrained") -> bool:
    """Whether MLX wrote the files: config.json has a record of formats, or else the first weight file says so.

    Raises:
        ValueError: config.json or that file is damaged; the message begins with the name of `op`.
    """
    config = read_config(directory, op)
    if config is None:
        return False
    if find_record(config) is not None:
        return True
    first = next(iter(sorted(directory.glob(WEIGHT_FILES))), None)
    return first is not None and (_open(first, op).metadata() or {}).get("format") == "mlx"


def read_config(directory: Path, op: str = "from_pretrained") -> dict[str, Any] | None:
    """The content of config.json, None if there is none.

    Raises:
        ValueError: it is no JSON object; the message begins with the name of `op`.
    """
    file = directory / "config.json"
    return read_json(file, op) if file.exists() else None


def has_tokenizer(directory: Path) -> bool:
    """Whether any file of a tokenizer is there: of some models, Transformers would make one without a vocabulary."""
    return any(any(directory.glob(pattern)) for pattern in _TOKENIZER_FILES)


def read_json(file: Path, op: str = "from_pretrained") -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: it is no JSON object; the message begins with the name of `op`.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"[{op}] {file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"[{op}] {file} is not a JSON object")
    return content


def read_headers(files: Iterable[Path], op: str = "from_pretrained") -> dict[str, torch.Tensor]:
    """The tensors of the files, by name, without their values: on the meta device.

    Raises:
        ValueError: a file is damaged or no safetensors file, has a dtype that is not known, or repeats a tensor; the
            message begins with the name of `op`.
    """
    stored: dict[str, torch.Tensor] = {}
    for file in files:
        opened = _open(file, op)
        names = list(opened.keys())
        if twice := sorted(stored.keys() & set(names)):
            raise ValueError(f"[{op}] {file} repeats tensors of another file: {listed(twice)}")
        for name in names:
            header = opened.get_slice(name)
            if (dtype := _DTYPES.get(header.get_dtype())) is None:
                raise ValueError(f"[{op}] {file}: {name} has the unsupported dtype {header.get_dtype()}")
            stored[name] = torch.empty(header.get_shape(), dtype=dtype, device="meta")
    return stored


def _open(file: Path, op: str = "from_pretrained") -> Any:
    safetensors = require("safetensors")
    try:
        return safetensors.safe_open(file, framework="pt")
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"[{op}] {file} is damaged or no safetensors file: {error}") from error
