"""The command line, called in this process: what the fixture `run` in conftest.py is."""

from __future__ import annotations

from collections.abc import Callable

Run = Callable[..., tuple[str, str]]  # of the arguments and the expected exit code: what is printed
