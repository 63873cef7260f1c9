"""Where compiled code is kept: $SOFTMETAL_CACHE, or softmetal/ in the user's directory for caches.

Threads and processes share it. What nothing has used for a week is removed, and the oldest files beyond LIMIT bytes; to
remove all of it, delete the directory.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

LIMIT = 8 << 30
HOUR = 3600.0
DAY = 24 * HOUR


def directory() -> Path:
    given = os.environ.get("SOFTMETAL_CACHE")
    if given:
        return Path(given).absolute()
    caches = os.environ.get("XDG_CACHE_HOME")
    return Path(caches or Path.home() / ".cache") / "softmetal"


def digest(*parts: str | bytes) -> str:
    content = (part if isinstance(part, bytes) else part.encode() for part in parts)
    return hashlib.sha256(b"\0".join(content)).hexdigest()[:24]


@contextmanager
def locked(name: str) -> Iterator[None]:
    """One holder at a time among all threads and processes with this cache."""
    folder = directory() / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / digest(name)[:2], "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def cached(name: str, build: Callable[[Path], object]) -> Path:
    """The file of that name in the cache, made by build(temporary path) where it is missing."""
    path = directory() / name
    if _is_there(path):
        return path
    with locked(name):
        if not path.exists():
            with tempfile.TemporaryDirectory(dir=directory()) as folder:
                temporary = Path(folder) / name
                build(temporary)
                os.replace(temporary, path)
    return path


def _is_there(path: Path) -> bool:
    """Whether the file exists. The time of a file tells when it was last used, to a day."""
    try:
        if time.time() - path.stat().st_mtime > DAY:
            os.utime(path)
    except FileNotFoundError:
        return False
    return True


def prune(limit: int = LIMIT) -> None:
    """Removes what has not been used for a week, then the least recently used files until the rest has limit bytes.

    Files of the last hour stay: another process may be about to load them. Does nothing within a day after it did.
    """
    marker = directory() / "pruned"
    if _is_fresh(marker):
        return
    marker.touch()
    files = []
    for path in directory().glob("*-*"):
        with suppress(FileNotFoundError):
            status = path.stat()
            files.append((status.st_mtime, status.st_size, path))
    now = time.time()
    total = 0
    for used, size, path in sorted(files, reverse=True):
        total += size
        if now - used > 7 * DAY or (total > limit and now - used > HOUR):
            with suppress(FileNotFoundError):
                path.unlink()


def _is_fresh(marker: Path) -> bool:
    try:
        return time.time() - marker.stat().st_mtime < DAY
    except FileNotFoundError:
        return False
