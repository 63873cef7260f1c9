"""Files that take their places all together, or not at all."""

import contextlib
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from .read import WEIGHT_FILES

_PREFIX = ".save-"  # of scratch directories
_SIGNALS = ("SIGTERM", "SIGHUP", "SIGINT")  # that ask a process to end


@contextlib.contextmanager
def staged(directory: Path) -> Iterator[Path]:
    """A directory to gather files in, which are moved to their places in `directory` when the block ends.

    `directory` is made if it does not exist. Weight files in it that are not written again are removed, other files are
    kept. If the block fails, or a signal tells the process to end, `directory` stays as it was. What a process left
    that was killed without a chance to clean up is removed by the next one.
    """
    is_new = not directory.exists()
    directory.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(directory)
    signals = _Signals()
    with signals:
        try:
            # Inside the directory: a rename cannot cross file systems.
            with tempfile.TemporaryDirectory(prefix=_PREFIX, dir=directory) as scratch, _locked(Path(scratch)):
                yield Path(scratch)
                with signals.held():
                    _move_files(Path(scratch), directory)
        except BaseException:
            if is_new:
                with contextlib.suppress(OSError):  # not empty: someone else wrote there
                    directory.rmdir()
            raise


def is_vacant(directory: Path) -> bool:
    """Whether there is nothing at that path, or a directory without any file but what interrupted saves left."""
    if not directory.is_dir():
        return not directory.exists()
    return all(path.name.startswith(_PREFIX) and path.is_dir() for path in directory.iterdir())


def _move_files(source: Path, target: Path) -> None:
    mode = _mode_of_new_files(source)
    files = sorted(path for path in source.rglob("*") if path.is_file())
    for file in files:
        # safetensors makes its files readable by their owner only.
        file.chmod(file.stat().st_mode | mode)
        place = target / file.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        os.replace(file, place)
    written = {file.name for file in files if file.parent == source}
    for file in target.glob(WEIGHT_FILES):
        if file.name not in written:
            file.unlink()


def _mode_of_new_files(directory: Path) -> int:
    """What the process's umask leaves of 0o666; asking for the umask itself would change it for all threads."""
    probe = directory / "mode"
    probe.touch(exist_ok=False)
    mode = probe.stat().st_mode & 0o666
    probe.unlink()
    return mode


# What is left of processes that were killed


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[bool]:
    """Holds a lock on the directory, which ends with the process at the latest; gives whether it could be had."""
    try:
        import fcntl
    except ImportError:  # Windows has none
        yield False
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # another process holds it, or there are no locks
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)


def _remove_leftovers(directory: Path) -> None:
    for path in directory.glob(f"{_PREFIX}*"):
        if path.is_dir():
            with _locked(path) as is_free:
                if is_free:
                    shutil.rmtree(path)


# Signals


class _Ended(BaseException):
    """A signal told the process to end."""


class _Signals:
    """Within the block, signals that would end the process raise, so that it cleans up before it ends by them.

    Python delivers signals to the main thread alone; in others, and where the program has handlers of its own, nothing
    changes.
    """

    def __init__(self) -> None:
        self._handled: dict[signal.Signals, Any] = {}  # signal -> previous handler
        self._is_held = False
        self._received: int | None = None

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            known = {each: signal.getsignal(each) for name in _SIGNALS if (each := getattr(signal, name, None))}
            by_default = (signal.SIG_DFL, signal.default_int_handler)
            self._handled = {each: handler for each, handler in known.items() if handler in by_default}
            for each in self._handled:
                signal.signal(each, self._receive)

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        for each, handler in self._handled.items():
            signal.signal(each, handler)
        if self._received not in (None, signal.SIGINT):
            os.kill(os.getpid(), self._received)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = number
        if not self._is_held:
            self._end()

    def _end(self) -> None:
        raise KeyboardInterrupt if self._received == signal.SIGINT else _Ended

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Signals wait for the end of this block."""
        self._is_held = True
        try:
            yield
        finally:
            self._is_held = False
        if self._received is not None:
            self._end()
