"""What `make sanitize` relies on: a library built its way, in its environment, reports what it does wrong."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

import sanitized_ops
from process import python

pytestmark = pytest.mark.xdist_group("sanitized_ops")  # one process compiles the library for all of them

PROBE = """
#include <cstdint>
#include <vector>
extern "C" int element(const int8_t* data, int64_t i) { return data[i]; }
extern "C" int shifted(int amount) { return 1 << amount; }
extern "C" int whole(float value) { return static_cast<int>(value); }
extern "C" int reserved(int i) {
  std::vector<int> numbers(3);
  numbers.reserve(8);
  return numbers[i];
}
"""

PROGRAM = """
import ctypes, gc, sys
import torch
probe = ctypes.CDLL(sys.argv[1])
probe.whole.argtypes = [ctypes.c_float]
probe.element.argtypes = [ctypes.c_void_p, ctypes.c_int64]
x = torch.ones(100, dtype=torch.int8)
view = torch.ones(100, dtype=torch.int8)[20:50]
try:
    x.view(7)
except RuntimeError:  # thrown in C++
    pass
print(eval(sys.argv[2]))
"""

# What is called, and what is printed.
RIGHT = {
    "probe.element(x.data_ptr(), 0) + probe.element(x.data_ptr(), 99)": "2",
    "probe.element(view.data_ptr(), 79)": "1",
    "probe.shifted(30)": str(2**30),
    "probe.whole(3.5)": "3",
    "probe.reserved(2)": "0",
}
# What is called, and a part of the report about it.
WRONG = {
    "probe.element(x.data_ptr(), 100)": "heap-buffer-overflow",
    "probe.element(view.data_ptr(), 80)": "heap-buffer-overflow",
    "probe.element(torch.ones(100).data_ptr(), 0)": "heap-use-after-free",
    "probe.shifted(32)": "shift exponent 32 is too large",
    "probe.whole(1e10)": "1e+10 is outside the range of representable values",
    "probe.reserved(3)": "Assertion '__n < this->size()' failed",
}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("probe")
    (folder / "probe.cpp").write_text(PROBE)
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    command = [compiler, *sanitized_ops.FLAGS, "-shared", "-fPIC", "probe.cpp", "-o", "probe.so"]
    subprocess.run(command, cwd=folder, check=True)
    return folder / "probe.so"


def evaluate(expression: str, library: Path) -> subprocess.CompletedProcess[str]:
    return python("-c", PROGRAM, library, expression, env=sanitized_ops.environment(library))


def test_nothing_is_reported_where_nothing_is_wrong(library: Path) -> None:
    done = evaluate(f"[{', '.join(RIGHT)}]", library)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"[{', '.join(RIGHT.values())}]"
    assert not done.stderr


@pytest.mark.parametrize("expression", WRONG)
def test_errors_are_reported(expression: str, library: Path) -> None:
    done = evaluate(expression, library)
    assert done.returncode != 0, done.stdout
    assert WRONG[expression] in done.stderr
