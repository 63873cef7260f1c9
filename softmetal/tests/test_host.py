"""The device's rules for a Metal host in a torch extension: each is broken once, in a process with no extension."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

if sys.platform == "darwin":
    pytest.skip("the software device runs on Linux", allow_module_level=True)

MISUSES = {
    "nested dispatch_sync": "deadlock",
    "encoder taken off the queue": "outside of dispatch_sync",
    "encoder used off the queue": "outside of dispatch_sync",
    "encoder used after it ended": "encoder that has ended",
    "endEncoding": "torch shares",
    "command buffer": "is torch's",
    "exception leaves dispatch_sync": "thrown in a block",
    "offset past the end": "beyond the buffer's 128 bytes",
    "buffer index 31": "31 buffers",
    "setBytes of 5000 bytes": "1 to 4096 bytes",
    "unbound buffer": "nothing is bound",
    "stale buffer": "another op has bound",
    "stale pipeline": "without a pipeline state",
    "nil that the kernel reads": "uses [[buffer(1)]], to which nothing is bound",
    "setBytes for a writable argument": "as writable",
    "setBytes shorter than the argument": "which has 2 bytes",
    "misaligned offset": "misaligned",
    "output that is also an input": "two of its arguments share",
    "2048 threads": "1 to 1024",
    "no threads": "1 to 1024",
    "more threads than the pipeline takes": "1 to 64",
    "no threadgroups": "empty grid",
    "dispatch without a pipeline": "without a pipeline state",
    "threadgroup memory of 24 bytes": "multiple of 16",
    "threadgroup memory of 40000 bytes": "up to 32768",
    "too little threadgroup memory": "outside every threadgroup variable",
    "write past the end": "which has 64 bytes",
    "read of uninitialised memory": "nothing has written",
    "race": "device-race",
    "unknown function": "absent was not found",
    "function constant without a value": "needs function constant 3",
    "function constant of the wrong type": "has 1 bytes, not 4",
    "source that does not compile": "undeclared identifier 'nonsense'",
    "language of a later macOS": "does not compile Metal 400",
    "mathFloatingPointFunctions before macOS 15": "no mathFloatingPointFunctions before macOS 15",
    "mathMode before macOS 15": "no mathMode before macOS 15",
    "library data that is none": "Invalid library file",
    "method that the class does not have": "has no method setObject:forKey:",
    "autorelease without a pool": "outside of any @autoreleasepool",
}

PROGRAM = """
import json
from softmetal import mps

def outcome(name):
    mps.clear()
    try:
        mps.misuse(name)
    except RuntimeError as error:
        return str(error), mps.errors()
    return "", mps.errors()

mps.install()
mps.set_gpu(macos=1400)
outcomes = {name: outcome(name) for name in mps.misuses()}
outcome("nothing")
print(json.dumps([outcomes, [launch.kernel for launch in mps.launched()]]))
"""


@pytest.fixture(scope="module")
def outcomes() -> tuple[dict[str, tuple[str, list[str]]], list[str]]:
    """What was raised and recorded, by name; and the kernels that right use launches."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_misuse_is_listed(outcomes):
    assert set(outcomes[0]) == {*MISUSES, "nothing"}


def test_right_use_is_accepted(outcomes):
    assert outcomes[0]["nothing"] == ["", []]
    assert outcomes[1] == ["plain", "fill"]


@pytest.mark.parametrize("name", MISUSES)
def test_misuse_is_noticed(outcomes, name):
    raised, recorded = outcomes[0][name]
    assert MISUSES[name] in raised
    assert recorded, "an error that the caller swallows would be lost"
