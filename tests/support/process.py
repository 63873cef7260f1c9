"""Python in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

# What a program begins with that is to reach no network.
NO_NETWORK = """
import socket

def refuse(*arguments, **options):
    raise OSError("no network in this test")

socket.socket.connect = socket.getaddrinfo = socket.create_connection = refuse
"""


def python(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, **options)


def printed(*arguments: object, **options: Any) -> str:
    """What it prints, after checking that it ends well."""
    done = python(*arguments, **options)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout
