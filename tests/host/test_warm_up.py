"""warm_up: afterwards nothing is left to compile."""

from __future__ import annotations

import pytest
import torch

import quantization_mlx as q
import software_gpu
from quantization_mlx.nn.warm_up import warm_up
from softmetal import mps


@pytest.fixture(autouse=True)
def software_device():
    software_gpu.install()
    # A GPU that no other test uses has no kernels yet.
    with mps.gpu("applegpu_g14d"):
        mps.clear()
        yield


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(
            q.QuantizedLinear.from_linear(torch.nn.Linear(192, 64).half(), bits=bits) for bits in (4, 4, 8)
        )
        self.experts = q.QuantizedSwitchLinear(2, 64, 64).half()

    def forward(self, x):
        first = [layer(x) for layer in self.layers]
        indices = torch.arange(len(x), device=x.device) * 2 // len(x)
        return self.experts(first[0], indices, sorted_indices=len(x) > 1)


def test_nothing_is_compiled_afterwards():
    model = Model().to("mps")
    assert warm_up(model, rows=(1, 20)) == 6  # of 4 bits, of 8 and of experts, each for both
    compiled = len(mps.logs()["compiles"])
    assert compiled >= 6
    for rows in (1, 20):
        model(torch.ones(rows, 192, dtype=torch.float16, device="mps"))
    assert len(mps.logs()["compiles"]) == compiled
    assert warm_up(model, rows=(1, 20)) == 6  # which costs nothing, as everything is known
    assert len(mps.logs()["compiles"]) == compiled


def test_other_devices_need_nothing():
    assert warm_up(Model()) == 0
