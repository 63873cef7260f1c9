"""Every barrier of the kernels of attention is needed: without it, the device reports a race."""

from __future__ import annotations

from contextlib import suppress

import pytest

import oracle
import software_gpu
from launching import BARRIER
from quantization_mlx import fast
from repository import ROOT
from softmetal import mps

# By header: the headers whose barriers stand before its own in a kernel's source, and queries and keys that its kernels
# take.
HEADERS = {
    "attention": ((), 2, 300),
    "attention_tile": (("attention",), 40, 100),
    "attention_tensor": (("attention", "attention_tile"), 40, 100),
}


def barriers(header: str) -> int:
    return (ROOT / f"metal/fast/{header}.h").read_text().count(BARRIER)


CASES = [(header, number) for header in HEADERS for number in range(barriers(header))]


@pytest.mark.parametrize(("header", "number"), CASES)
def test_every_barrier_is_needed(header, number, monkeypatch):
    before, queries, keys = HEADERS[header]
    index = sum(map(barriers, before)) + number
    compile = mps.device.compile
    changed = []

    def compile_without(source, **options):
        parts = source.split(BARRIER)
        assert len(parts) == 1 + sum(map(barriers, (*before, header)))
        changed.append(index)
        return compile(BARRIER.join(parts[: index + 1]) + BARRIER.join(parts[index + 1 :]), **options)

    software_gpu.install()
    monkeypatch.setenv("CI", "")
    monkeypatch.setattr(mps.device, "compile", compile_without)
    q = oracle.random_x(1, 2, queries, 64).half().to("mps")
    k = oracle.random_x(1, 1, keys, 64, seed=2).half().to("mps")
    mps.clear()
    macos = 2602 if header == "attention_tensor" else 2600
    with mps.gpu(f"applegpu_g{700 + CASES.index((header, number))}p", macos), suppress(RuntimeError):
        fast.scaled_dot_product_attention(q, k, k, scale=0.1).cpu()
    errors = "\n".join(mps.errors())
    mps.clear()
    assert changed and "threadgroup-race" in errors
