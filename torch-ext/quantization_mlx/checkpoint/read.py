"""Reading a checkpoint directory: its JSON files, and the headers of its weight files.

The tensors of a model are those that its `model*.safetensors` files hold. The index is not read: it may be stale, and
it may name files outside of the directory.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

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

# The directories that are read within `reading_once`.
_read: ContextVar[dict[Path, Checkpoint] | None] = ContextVar("_read", default=None)


@contextmanager
def reading_once() -> Iterator[None]:
    """Within, as while one model is loaded, no file is read a second time."""
    token = _read.set({} if _read.get() is None else _read.get())
    try:
        yield
    finally:
        _read.reset(token)


class _Header(NamedTuple):
    metadata: Mapping[str, str]
    tensors: dict[str, torch.Tensor]  # on the meta device


class Checkpoint:
    """What a directory holds, each file being read when it is first asked for.

    Errors begin with the name of `op`.
    """

    def __init__(self, directory: Path, op: str) -> None:
        self.directory = directory
        self._op = op
        self._json: dict[str, dict[str, Any] | None] = {}
        self._headers: dict[Path, _Header] = {}

    @classmethod
    def at(cls, directory: str | Path, op: str = "from_pretrained") -> Checkpoint:
        """Within `reading_once`, the same one for one directory."""
        directory = Path(directory)
        known = _read.get()
        return cls(directory, op) if known is None else known.setdefault(directory, cls(directory, op))

    def json(self, name: str) -> dict[str, Any] | None:
        """The object in a JSON file of that name, None if there is none. Raises ValueError if it is no JSON object."""
        if name not in self._json:
            file = self.directory / name
            self._json[name] = read_json(file, self._op) if file.exists() else None
        return self._json[name]

    @property
    def config(self) -> dict[str, Any] | None:
        """The content of config.json, None if there is none; errors as of `json`."""
        return self.json("config.json")

    @cached_property
    def record(self) -> Mapping[str, Any] | None:
        """The record of formats in config.json, None if it has none."""
        return find_record(self.config or {})

    @cached_property
    def files(self) -> list[Path]:
        """The weight files. Raises FileNotFoundError if there are none."""
        if not (files := sorted(self.directory.glob(WEIGHT_FILES))):
            raise FileNotFoundError(f"[{self._op}] {self.directory} has no {WEIGHT_FILES}")
        return files

    @cached_property
    def is_mlx(self) -> bool:
        """Whether MLX wrote the files: config.json has a record of formats, or else the first weight file says so.
        Raises ValueError if config.json or that file is damaged."""
        if self.config is None or self.record is not None:
            return self.config is not None
        first = next(iter(sorted(self.directory.glob(WEIGHT_FILES))), None)
        return first is not None and self._header(first).metadata.get("format") == "mlx"

    def tensors(self, files: Iterable[Path] | None = None) -> dict[str, torch.Tensor]:
        """The tensors of the weight files, or of these, by name, without their values: on the meta device. Raises
        ValueError if a file is damaged or no safetensors file, has a dtype that is not known, or repeats a tensor."""
        stored: dict[str, torch.Tensor] = {}
        for file in self.files if files is None else files:
            tensors = self._header(file).tensors
            if twice := sorted(stored.keys() & tensors.keys()):
                raise ValueError(f"[{self._op}] {file} repeats tensors of another file: {listed(twice)}")
            stored.update(tensors)
        return stored

    def _header(self, file: Path) -> _Header:
        if file not in self._headers:
            self._headers[file] = _read_header(file, self._op)
        return self._headers[file]


def _read_header(file: Path, op: str) -> _Header:
    safetensors = require("safetensors")
    try:
        opened = safetensors.safe_open(file, framework="pt")
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"[{op}] {file} is damaged or no safetensors file: {error}") from error
    slices = {name: opened.get_slice(name) for name in list(opened.keys())}
    tensors = {}
    for name, header in slices.items():
        if (dtype := _DTYPES.get(header.get_dtype())) is None:
            raise ValueError(f"[{op}] {file}: {name} has the unsupported dtype {header.get_dtype()}")
        tensors[name] = torch.empty(header.get_shape(), dtype=dtype, device="meta")
    return _Header(opened.metadata() or {}, tensors)


def has_tokenizer(directory: Path) -> bool:
    """Whether any file of a tokenizer is there: of some models, Transformers would make one without a vocabulary."""
    return any(any(directory.glob(pattern)) for pattern in _TOKENIZER_FILES)


def read_json(file: Path, op: str) -> dict[str, Any]:
    """The object in a JSON file. Raises ValueError if it is no JSON object; the message begins with the name of
    `op`."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"[{op}] {file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"[{op}] {file} is not a JSON object")
    return content
