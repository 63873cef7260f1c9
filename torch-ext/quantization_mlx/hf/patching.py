"""Changes to other libraries that are made while the program runs, and taken back."""

import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any


class Patch:
    """A change that is made when the first one wants it, and undone when the last one does not; from any thread.

    Args:
        apply: makes the change; the stack that it is given gets what undoes it.
    """

    def __init__(self, apply: Callable[[ExitStack], None]) -> None:
        self._apply = apply
        self._lock = threading.RLock()
        self._holders = 0
        self._is_installed = False
        self._undo = ExitStack()

    def install(self) -> None:
        """Makes the change until `remove`; a second call does nothing."""
        with self._lock:
            if not self._is_installed:
                self._acquire()
                self._is_installed = True

    def remove(self) -> None:
        with self._lock:
            if self._is_installed:
                self._is_installed = False
                self._release()

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Makes the change for this block, which may be nested."""
        with self._lock:
            self._acquire()
        try:
            yield
        finally:
            with self._lock:
                self._release()

    def _acquire(self) -> None:
        if self._holders == 0:
            with ExitStack() as stack:
                self._apply(stack)
                self._undo = stack.pop_all()
        self._holders += 1

    def _release(self) -> None:
        self._holders -= 1
        if self._holders == 0:
            self._undo.close()


def replace(stack: ExitStack, owner: Any, name: str, value: Any) -> None:
    """Assigns to an attribute; closing `stack` takes that back."""
    stack.callback(setattr, owner, name, inspect.getattr_static(owner, name))
    setattr(owner, name, value)


def wrap(stack: ExitStack, owner: Any, name: str, around: Callable[..., Any]) -> None:
    """Lets `around(original, *args, **kwargs)` take the place of a function, a method or a class method."""
    held = inspect.getattr_static(owner, name)
    original = getattr(held, "__func__", held)

    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return around(original, *args, **kwargs)

    replace(stack, owner, name, type(held)(wrapper) if original is not held else wrapper)
