"""Guards against kernels that read or compute more than they did: ratios that benchmarks/metal_cost.py reports."""

from __future__ import annotations

import sys

import pytest

from oracle import name_of
from repository import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import metal_cost
from metal_cost import COLUMN_FORMATS, FORMATS, Call, Cost

TILE_K = 32  # csrc/gpu/launch.h


def product(call: Call, gpu: str = metal_cost.GPU) -> Cost:
    """The launch that multiplies; a sum of parts may follow it, and pairs may be sorted before."""
    [cost] = [cost for cost in metal_cost.costs(call, gpu) if not cost.kernel.startswith(metal_cost.HELPERS)]
    return cost


def padded_to(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


@pytest.mark.parametrize("format", FORMATS, ids=name_of)
@pytest.mark.parametrize("transpose", [True, False], ids=["t", "n"])
def test_one_row_reads_the_weights_once(format, transpose):
    cost = product(Call(1, 256, 1024, **format.options, transpose=transpose))
    assert cost.weights <= 1.02
    # A lane decodes up to 32 values at a time, so two may ask for one group's scale.
    assert cost.scales <= 2.02


@pytest.mark.parametrize("format", COLUMN_FORMATS, ids=name_of)
@pytest.mark.parametrize("rows", [1, 2, 8])
def test_packed_columns_are_read_once(format, rows):
    cost = product(Call(rows, 256, 1024, **format.options, transpose=False))
    assert "_qvm_" in cost.kernel
    assert cost.weights == 1
    assert cost.scales == 1
    assert cost.barriers == 1
    assert cost.memory <= 60 * 1024 // 3


@pytest.mark.parametrize("rows", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("transpose", [True, False], ids=["t", "n"])
def test_few_rows_share_one_reading_of_the_weights(rows, transpose):
    cost = product(Call(rows, 256, 1024, transpose=transpose))
    assert "_rows_" in cost.kernel and "qmm" not in cost.kernel
    assert cost.weights <= 1.02


@pytest.mark.parametrize("k", metal_cost.SMALL_OR_ODD_K)
@pytest.mark.parametrize("experts", [0, 2], ids=["plain", "experts"])
def test_lanes_have_work_where_k_is_small_or_odd(k, experts):
    cost = product(Call(1, 256, k, experts=experts))
    assert "qmv" in cost.kernel
    assert 0.75 <= cost.lanes <= 1
    assert cost.weights <= 1.02


@pytest.mark.parametrize("rows", [12, 16, 32])
def test_weights_are_read_once_for_all_rows_of_a_tile(rows):
    assert product(Call(rows, 256, 1024)).weights <= 1.02


@pytest.mark.parametrize("rows", [16, 32, 64, 128])
@pytest.mark.parametrize("transpose", [True, False], ids=["t", "n"])
def test_aligned_tiles_compute_nothing_in_vain(rows, transpose):
    call = Call(rows, 256, 1024, transpose=transpose)
    cost = product(call)
    tile_rows = int(cost.kernel.rpartition("_rows_")[2])
    tiles = -(-rows // tile_rows) * call.n // 64
    parts = cost.threadgroups // tiles
    assert cost.multiplies == 1
    assert cost.weights <= 1.02 * max(1, rows // tile_rows)
    # Before a tile is filled its readers are done, and before it is read it is full.
    assert cost.barriers <= 2 * call.k / parts / TILE_K
    # Room for four threadgroups on a core, which has about 60 KiB.
    assert cost.memory <= 60 * 1024 // 4


@pytest.mark.parametrize("rows", [16, 32, 64, 128])
def test_tiles_of_packed_columns_compute_nothing_in_vain(rows):
    """As they do of packed rows."""
    columns = product(Call(rows, 256, 1024, "marlin_int4", 64, transpose=False))
    packed_rows = product(Call(rows, 256, 1024, transpose=True))
    assert columns.kernel.split("_rows_")[1] == packed_rows.kernel.split("_rows_")[1]
    assert columns.multiplies == packed_rows.multiplies == 1
    assert columns.weights == packed_rows.weights
    assert (columns.barriers, columns.memory) == (packed_rows.barriers, packed_rows.memory)


@pytest.mark.parametrize(("n", "k", "transpose"), [(200, 1056, True), (224, 1000, False)], ids=["t", "n"])
def test_edges_cost_no_more_than_padding_to_the_tile(n, k, transpose):
    cost = product(Call(33, n, k, group_size=32, transpose=transpose))
    tile_rows = int(cost.kernel.rpartition("_rows_")[2])
    tiles = -(-33 // tile_rows)
    padded = tiles * tile_rows * padded_to(n, 64) * padded_to(k, TILE_K)
    assert cost.multiplies <= padded / (padded_to(33, 8) * padded_to(n, 8) * padded_to(k, 8))
    assert cost.weights <= 1.02 * tiles


def test_experts_without_rows_are_not_read():
    cost = product(Call(2, 256, 512, experts=8))
    assert cost.weights <= 1.02


@pytest.mark.parametrize("gpu", [metal_cost.GPU, "applegpu_g17s"])
def test_an_expert_is_read_once_for_each_tile_of_its_rows(gpu):
    rows, experts = 128, 4
    cost = product(Call(rows, 256, 512, experts=experts), gpu)
    assert "gather_qmm_rhs" in cost.kernel
    # Of each expert one tile may not be full.
    assert cost.weights * experts <= rows / 32 + experts
    assert cost.multiplies == 1 or "_nax_" in cost.kernel  # which multiplies all rows of a tile


@pytest.mark.parametrize("op", ["quantize", "dequantize"])
def test_conversions_read_and_write_once(op):
    (cost,) = metal_cost.costs(Call(1, 64, 512, op=op))
    assert cost.write == 1
    # Lanes share the words of a group, of which each asks for its own.
    assert cost.read <= (1.02 if op == "quantize" else 2)
    (cost,) = metal_cost.costs(Call(1, 64, 512, "marlin_fp4", 128, transpose=False, op=op))
    assert cost.write == 1
    # A lane goes down its column twice, and four runs share a group.
    assert cost.read <= (2 if op == "quantize" else 1.1)


def test_tensor_operations_read_the_weights_once_for_each_tile():
    cost = product(Call(64, 256, 1024), gpu="applegpu_g17s")
    assert "_nax_" in cost.kernel
    assert cost.weights <= 1.02 * 64 / int(cost.kernel.rpartition("_rows_")[2])
