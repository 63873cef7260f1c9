"""Reads what build.py wrote, and makes its calls ready to launch."""

from __future__ import annotations

import io
import json
import math
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from calls import FILLING, ITEM_BYTES, NUMPY
from driver import Kernel, Memory, Module
from fast_calls import AnyCall, from_dict

MODULES = 64  # that stay loaded


@dataclass
class Item:
    """A call with the launches that its plan asks for. expected: a quantizer's input and results by role."""

    archive: Archive
    data: dict[str, Any]

    @cached_property
    def call(self) -> AnyCall:
        return from_dict(self.data["call"])

    @property
    def suite(self) -> str:
        return self.data["suite"]

    @property
    def build(self) -> str:
        return self.data["build"]

    @property
    def launches(self) -> list[dict[str, Any]]:
        return self.data["launches"]

    @property
    def kernel(self) -> str:
        return self.launches[0]["kernel"]

    @property
    def expected(self) -> dict[str, np.ndarray] | None:
        return self.archive.arrays(self.data["expected"]) if self.data["expected"] else None

    def __str__(self) -> str:
        return f"{self.build} {self.kernel} {self.call}"

    def bind(self, buffers: Buffers) -> Callable[[int], None]:
        """A function that launches all kernels on a stream; it keeps the buffers alive."""
        bound = []
        for launch in self.launches:
            arguments = [buffers.argument(*argument) for argument in launch["arguments"]]
            module = self.archive.module(launch["cubin"])
            bound.append((Kernel(module, launch["symbol"], launch["threads"], arguments), launch["threadgroups"]))

        def run(stream: int = 0) -> None:
            for kernel, threadgroups in bound:
                kernel.launch(threadgroups, stream)

        run.buffers = buffers
        return run


class Archive:
    """A bundle: items.json and cubins.zip."""

    def __init__(self, path: Path) -> None:
        self._zip = zipfile.ZipFile(path / "cubins.zip")
        self._modules: dict[str, Module] = {}
        self.items = [Item(self, data) for data in json.loads((path / "items.json").read_text())]

    def module(self, cubin: str) -> Module:
        if cubin not in self._modules:
            if len(self._modules) >= MODULES:
                self._modules.pop(next(iter(self._modules)))
            self._modules[cubin] = Module(self._zip.read(cubin))
        return self._modules[cubin]

    def arrays(self, name: str) -> dict[str, np.ndarray]:
        return dict(np.load(io.BytesIO(self._zip.read(name))))


class Buffers:
    """The operands and results of an item on the GPU.

    guard: bytes before and after each result and the workspace, filled as those are, which nobody may touch.
    Without one nothing is filled, and no allocation is larger than what it holds.
    """

    def __init__(self, item: Item, operands: dict[str, np.ndarray], guard: int = 0) -> None:
        self._item, self._guard = item, guard
        self._memory = {role: Memory.of(array) for role, array in operands.items()}
        self._item_bytes = {role: array.itemsize for role, array in operands.items()}
        first = item.call.first_elements
        self._first = {role: first[role] * self._item_bytes[role] for role in first if role in operands}
        results = {**item.call.results, "workspace": ((item.data["workspace"],), "float32")}
        for role, (shape, dtype) in results.items():
            self._item_bytes[role] = ITEM_BYTES[dtype]
            self._memory[role] = Memory(math.prod(shape) * ITEM_BYTES[dtype] + 2 * guard)
            self._first[role] = guard
        self._results = results
        self.clear()

    def clear(self) -> None:
        """Fills results and the workspace, so that what is not written shows."""
        for role in self._results if self._guard else ():
            self._memory[role].fill(FILLING)

    def moved(self, *roles: str) -> Buffers:
        """These buffers with copies of some operands."""
        other = object.__new__(Buffers)
        other.__dict__ |= self.__dict__
        other._memory = {role: m.copy() if role in roles else m for role, m in self._memory.items()}
        return other

    def argument(self, role: str, value: int | str) -> int | bytes:
        """Of a launch: the address of element `value` of an operand, or a struct's bytes in hexadecimal."""
        if role == "bytes":
            return bytes.fromhex(value)
        if role == "none":
            return 0
        return self._memory[role].address + self._first.get(role, 0) + value * self._item_bytes[role]

    def results(self) -> dict[str, np.ndarray]:
        """By role. Raises AssertionError where a guard was written to."""
        results = {}
        for role, (shape, dtype) in self._results.items():
            data = self._memory[role].read()
            inside = slice(self._guard, len(data) - self._guard)
            guards = np.delete(data, inside)
            assert (guards == FILLING).all(), f"{role} is written outside of its bounds"
            results[role] = data[inside].view(NUMPY.get(dtype, dtype)).reshape(shape)
        return results
