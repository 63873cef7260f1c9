"""Plans: every kernel that any of them names exists, on every GPU, and is the one that its reasons ask for."""

from __future__ import annotations

import itertools
import re
import struct
import sys

import pytest
import torch

import cases
import oracle
import quantization_mlx as qm
from cases import DTYPES, FORMATS
from oracle import Format
from quantization_mlx import fast
from repository import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

from metal_library import kernels_in

GPUS = [f"applegpu_g{generation}{variant}" for generation in range(13, 19) for variant in "pgscd"]
# One for each way in which plans differ: no tensor ops on few and on many cores, tensor ops, a phone's chip without.
SOME_GPUS = ["applegpu_g13g", "applegpu_g14d", "applegpu_g17s", "applegpu_g17p"]
FOUR_BIT = Format("affine", 64, 4)


def weights(format: Format, *shape: int, dtype: torch.dtype = torch.float16) -> tuple[torch.Tensor, ...]:
    """Packed weights of a matrix of this shape on device "meta": plans ask for shapes and types alone."""
    if format.is_column_packed:
        *batch, k, n = shape
        words = torch.empty(*batch, k * format.bits // 32, n, dtype=torch.uint32, device="meta")
        scales = torch.empty(*batch, k // format.group_size, n, dtype=torch.float16, device="meta")
        return words, scales, scales if format.has_zeros else None
    groups = (*shape[:-1], shape[-1] // format.group_size)
    words = torch.empty(*shape[:-1], shape[-1] * format.bits // 32, dtype=torch.uint32, device="meta")
    if not format.is_affine:
        return words, torch.empty(groups, dtype=torch.uint8, device="meta"), None
    return words, *(torch.empty(groups, dtype=dtype, device="meta") for _ in range(2))


def matmul_plan(
    gpu: str, M: int, N: int, K: int, format: Format = FOUR_BIT, dtype=torch.float16, transpose=True, macos=(26, 2)
):
    x = torch.empty(M, K, dtype=dtype, device="meta")
    matrix = weights(format, *((N, K) if transpose else (K, N)), dtype=dtype)
    [plan] = qm.explain(qm.quantized_matmul, x, *matrix, transpose=transpose, **format.options, gpu=gpu, macos=macos)
    return plan


def gather_plan(gpu: str, pairs: int, M: int, experts: int, sorted_indices: bool, format: Format = FOUR_BIT, **kwargs):
    dtype, transpose = kwargs.get("dtype", torch.float16), kwargs.get("transpose", True)
    x = torch.empty(pairs, M, 256, dtype=dtype, device="meta")
    indices = torch.empty(pairs, dtype=torch.int64, device="meta")
    matrices = weights(format, experts, *((384, 256) if transpose else (256, 384)), dtype=dtype)
    [plan] = qm.explain(
        qm.gather_qmm, x, *matrices, None, indices, transpose=transpose, sorted_indices=sorted_indices,
        **format.options, gpu=gpu,
    )  # fmt: skip
    return plan


def assert_exists(plan) -> None:
    assert plan.launches
    for launch in plan.launches:
        # A library of many kernels, and one that is compiled for this launch, have the same one of that name.
        assert kernels_in(launch.file, all_kernels=True).get(launch.kernel) == launch.instance, launch.kernel
        assert launch.threads <= 1024
        assert all(launch.threadgroups)


@pytest.mark.parametrize("gpu", GPUS)
def test_every_gpu_has_the_kernels_of_its_plans(gpu):
    for transpose in (True, False):
        for rows in (1, 2, 3, 5, 9, 13, 17, 33, 65, 512):
            for N, K in ((384, 256), (64, 16384), (4096, 4096)):
                assert_exists(matmul_plan(gpu, rows, N, K, transpose=transpose))
        for pairs, rows, sorted_indices in (
            (1, 1, True),
            (33000, 1, True),
            (64, 1, False),
            (6, 5, True),
            (3, 40, False),
        ):
            assert_exists(gather_plan(gpu, pairs, rows, 4, sorted_indices, transpose=transpose))


@pytest.mark.parametrize("dtype", DTYPES, ids=oracle.name_of)
@pytest.mark.parametrize("format", FORMATS, ids=oracle.name_of)
def test_every_format_has_the_kernels_of_its_plans(format, dtype):
    for gpu in SOME_GPUS:
        for transpose in (True, False):
            for rows in (*range(1, 18), 33):
                assert_exists(matmul_plan(gpu, rows, 384, 256, format, dtype, transpose))
            for rows in (1, 3, 7, 20):
                assert_exists(matmul_plan(gpu, rows, 256, 16384, format, dtype, transpose))
            for pairs, rows, sorted_indices in (
                (3, 1, False),
                (64, 1, True),
                (3, 5, False),
                (3, 11, False),
                (3, 20, False),
            ):
                assert_exists(
                    gather_plan(gpu, pairs, rows, 4, sorted_indices, format, dtype=dtype, transpose=transpose)
                )
        x = torch.empty(4, 256, dtype=dtype, device="meta")
        [plan] = qm.explain(qm.quantize, x, **format.options, gpu=gpu)
        assert_exists(plan)
        [plan] = qm.explain(
            qm.dequantize, *weights(format, 4, 256, dtype=dtype), **format.options, dtype=dtype, gpu=gpu
        )
        assert_exists(plan)


@pytest.mark.parametrize("gpu", GPUS)
def test_packed_columns_have_the_kernels_of_their_plans(gpu):
    for format, dtype in itertools.product(cases.MARLIN_FORMATS, DTYPES):
        for N, K in ((384, 256), (64, 16384)):
            for rows in (1, 3, 7, 9, 33, 65):
                assert_exists(matmul_plan(gpu, rows, N, K, format, dtype, transpose=False))
        for pairs, rows, sorted_indices in ((3, 1, False), (64, 1, True), (3, 5, False), (3, 20, False)):
            assert_exists(gather_plan(gpu, pairs, rows, 4, sorted_indices, format, dtype=dtype, transpose=False))
        [plan] = qm.explain(qm.quantize, torch.empty(256, 5, dtype=dtype, device="meta"), **format.options, gpu=gpu)
        assert_exists(plan)
        matrix = weights(format, 256, 5)
        [plan] = qm.explain(qm.dequantize, *matrix, **format.options, dtype=dtype, gpu=gpu)
        assert_exists(plan)


# --- The choices -----------------------------------------------------------------------------------------------------


def families(plan) -> list[str]:
    return [launch.family for launch in plan.launches]


def test_tensor_ops_run_where_gpu_system_and_dtype_have_them():
    assert families(matmul_plan("applegpu_g17s", 64, 16384, 4096)) == ["tensor"]
    assert families(matmul_plan("applegpu_g18p", 64, 16384, 4096)) == ["tensor"]
    for gpu, dtype, macos in (
        ("applegpu_g16s", torch.float16, (26, 2)),
        ("applegpu_g17p", torch.float16, (26, 2)),  # a phone's chip, without matrix units
        ("applegpu_g17s", torch.float32, (26, 2)),  # they would round float32
        ("applegpu_g17s", torch.float16, (26, 1)),
    ):
        assert families(matmul_plan(gpu, 64, 16384, 4096, dtype=dtype, macos=macos)) == ["tile"], (gpu, dtype, macos)


@pytest.mark.parametrize(
    ("gpu", "size", "most"),
    [
        *(("applegpu_g13s", size, most) for size, most in ((2048, 12), (4096, 10), (8192, 8))),
        *(("applegpu_g14g", size, most) for size, most in ((2048, 12), (4096, 10), (8192, 8))),
        *((gpu, 8192, 12) for gpu in ("applegpu_g14d", "applegpu_g15s", "applegpu_g16g", "applegpu_g17s")),
    ],
)
def test_few_rows_are_one_matvec(gpu, size, most):
    assert families(matmul_plan(gpu, most + 1, size, size)) != ["matvec"]
    assert families(matmul_plan(gpu, most + 1, 2048, size)) != ["matvec"]
    for rows in range(1, most + 1):
        plan = matmul_plan(gpu, rows, size, 2048)
        assert families(plan) == ["matvec"]
        instance = int(re.search(r"_rows_(\d+)|$", plan.launches[0].kernel)[1] or 1)
        assert rows <= instance <= 2 * rows, "a matvec for many more rows than there are"
    assert "_rows_16" in matmul_plan("applegpu_g14s", 16, 4096, 4096).launches[0].kernel


def tile_of(plan) -> int:
    return int(plan.launches[0].kernel.split("_rows_")[1])


def test_tiles_follow_the_rows():
    for rows, tile in ((13, 16), (16, 16), (17, 32), (33, 64), (64, 64), (65, 32), (96, 32), (97, 64), (512, 64)):
        assert tile_of(matmul_plan("applegpu_g14s", rows, 4096, 4096)) == tile, rows
    for rows, tile in ((13, 32), (32, 32), (33, 64), (65, 32), (128, 64), (512, 128), (528, 64)):
        assert tile_of(matmul_plan("applegpu_g17s", rows, 4096, 4096)) == tile, rows
    assert tile_of(matmul_plan("applegpu_g17s/64", 512, 2048, 4096)) == 64, "too few tiles of 128 rows for these cores"


def test_tensor_operations_split_k_where_tiles_are_few():
    """Parts are whole steps, and their sums no more bytes than their weights."""
    for gpu, N, K, expected in (
        ("applegpu_g17s", 4096, 4096, 3),  # 12 threadgroups for each of 20 cores
        ("applegpu_g17s/40", 4096, 4096, 4),  # of 1024
        ("applegpu_g17s/40", 4096, 16384, 7),
        ("applegpu_g17s", 16384, 4096, 1),
    ):
        plan = matmul_plan(gpu, 64, N, K)
        *_, parts, part_k = struct.unpack_from("<6i", plan.launches[0].params, 14 * 8)
        assert parts == expected, (gpu, N, K)
        assert plan.launches[0].threadgroups == (N // 64, parts, 1)
        assert part_k % 64 == 0 and (parts - 1) * part_k < K <= parts * part_k
        assert [launch.kernel.split("_float16")[0] for launch in plan.launches] == (
            ["affine_qmm_t_nax_splitk", "sum_parts"] if parts > 1 else ["affine_qmm_t_nax"]
        )
        assert families(plan) == ["tensor"] * len(plan.launches)


def test_simdgroups_of_a_matvec_go_along_n_where_k_is_short():
    """Threadgroups of y's columns: 8, 16 or 32 to each."""
    for K, columns in ((64, 32), (512, 32), (768, 16), (1024, 16), (2048, 8), (2880, 16), (3072, 16), (4096, 8)):
        [launch] = matmul_plan("applegpu_g14s", 1, 4096, K).launches
        assert launch.threadgroups == (4096 // columns, 1, 1), K
        assert launch.threads == 128
    # Of many columns: twice as many, where a lane would have one step.
    for K, columns in ((512, 32), (768, 32), (1024, 32), (2048, 16), (2880, 16), (4096, 8)):
        [launch] = matmul_plan("applegpu_g14s", 1, 16384, K).launches
        assert launch.threadgroups == (16384 // columns, 1, 1), K
    [launch] = matmul_plan("applegpu_g14s", 1, 40, 512).launches
    assert launch.threadgroups == (2, 1, 1)
    assert "aligned_outputs" not in launch.constants


def test_few_rows_of_untransposed_weights():
    for rows, instance in ((1, ""), (2, "_rows_2"), (3, "_rows_4"), (4, "_rows_4"), (5, "_rows_8")):
        [launch] = matmul_plan("applegpu_g14s", rows, 65536, 256, transpose=False).launches
        assert launch.kernel == f"affine_qvm_float16_gs_64_b_4{instance}"


# --- Attention -------------------------------------------------------------------------------------------------------


def attention_plan(
    gpu: str, queries: int, dim: int = 128, dtype=torch.float16, macos=(26, 2), keys=None, value_dim: int | None = None
):
    q = torch.empty(1, 32, queries, dim, dtype=dtype, device="meta")
    k, v = (torch.empty(1, 8, 512, size, dtype=dtype, device="meta") for size in (dim, value_dim or dim))
    k, v = (k, v) if keys is None else (keys, keys)
    [plan] = qm.explain(fast.scaled_dot_product_attention, q, k, v, scale=1.0, mask="causal", gpu=gpu, macos=macos)
    return plan


def assert_attention_exists(plan) -> None:
    for launch in plan.launches:
        assert kernels_in(f"../fast/{launch.file}", all_kernels=True)[launch.kernel] == launch.instance


@pytest.mark.parametrize("gpu", SOME_GPUS)
def test_attention_has_the_kernels_of_its_plans(gpu):
    for queries, dim, dtype in itertools.product((1, 2, 4, 9, 100), (64, 80, 128, 256, 512), DTYPES):
        assert_attention_exists(attention_plan(gpu, queries, dim, dtype))


def test_attention_of_many_queries_runs_on_tensor_operations():
    """Where GPU, system and dtype have them; blocks of 64 rows, of which four heads share one of keys, or of 32."""
    for dim, value_dim, kernel, blocks in (
        (64, 64, "attention_tile_nax_64_float16", 64),
        (96, 96, "attention_tile_nax_128_float16", 64),
        (64, 128, "attention_tile_nax_128_float16", 64),
        (192, 128, "attention_tile_nax_256_float16", 128),
        (256, 256, "attention_tile_nax_256_float16", 128),
    ):
        [launch] = attention_plan("applegpu_g17s", 1024, dim, value_dim=value_dim).launches
        assert (launch.kernel, launch.family) == (kernel, "tensor")
        assert (launch.threadgroups, launch.threads) == ((blocks, 1, 8), 128)
        assert launch.params_index == 12
    assert families(attention_plan("applegpu_g18p", 9)) == ["tensor"]
    for gpu, dtype, macos in (
        ("applegpu_g16s", torch.float16, (26, 2)),
        ("applegpu_g17p", torch.float16, (26, 2)),
        ("applegpu_g17s", torch.float32, (26, 2)),
        ("applegpu_g17s", torch.float16, (26, 1)),
    ):
        assert families(attention_plan(gpu, 1024, dtype=dtype, macos=macos)) == ["tile"], (gpu, dtype, macos)
    assert set(families(attention_plan("applegpu_g17s", 8))) == {"attention"}
    assert families(attention_plan("applegpu_g17s", 9, 512)) == ["attention"], "no tile has so large a head"


def test_attention_to_what_is_packed_or_far_apart_runs_in_tiles():
    far = torch.empty(1, dtype=torch.float16, device="meta").as_strided((1, 8, 512, 128), (128, 128, 2**25, 1))
    assert families(attention_plan("applegpu_g17s", 100, keys=far)) == ["tile"]
    near = far.as_strided((1, 8, 512, 128), (128, 128, 2**24, 1))
    assert families(attention_plan("applegpu_g17s", 100, keys=near)) == ["tensor"]
    q = torch.empty(1, 32, 100, 128, dtype=torch.float16, device="meta")
    packed = weights(FOUR_BIT, 1, 8, 512, 128)
    [plan] = qm.explain(
        fast.quantized_scaled_dot_product_attention, q, packed, packed, scale=1.0, bits=4, gpu="applegpu_g17s"
    )
    assert families(plan) == ["tile"]


# --- The library that is compiled beforehand -------------------------------------------------------------------------


STEMS = ("matvec", "matmul", "matmul_tensor", "quantize", "sort_pairs", "sum_parts")


def is_in_library(plan) -> bool:
    return all(launch.kernel in kernels_in(launch.file) for launch in plan.launches)


def test_library_has_kernels_of_no_other_kind():
    for stem in STEMS:
        everything = kernels_in(stem, all_kernels=True)
        assert kernels_in(stem).items() <= everything.items()
        for kernel in kernels_in(stem):
            assert "float32" not in kernel or not (stem == "matmul_tensor" or kernel.startswith("marlin")), kernel


def test_library_is_small():
    """It is embedded as a C array: thousands of kernels take minutes to compile and many megabytes."""
    count, everything = (sum(len(kernels_in(stem, full)) for stem in STEMS) for full in (False, True))
    assert count <= everything / 5


PUBLISHED = [Format("affine", 64, bits) for bits in (3, 4, 5, 6, 8)]
PUBLISHED += [Format("affine", 32, 4), *cases.FLOAT_FORMATS]


@pytest.mark.parametrize("format", PUBLISHED, ids=oracle.name_of)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=oracle.name_of)
def test_library_has_what_runs_a_published_model(format, dtype):
    """Any number of rows, on any GPU; experts; quantizing and dequantizing."""
    for gpu in SOME_GPUS:
        for rows in (*range(1, 18), 33, 65, 512, 4096):
            for N, K in ((4096, 4096), (512, 16384)):
                assert is_in_library(matmul_plan(gpu, rows, N, K, format, dtype))
        for pairs, rows, sorted_indices in ((8, 1, False), (512, 1, True), (8, 4, False), (8, 20, False)):
            assert is_in_library(gather_plan(gpu, pairs, rows, 8, sorted_indices, format, dtype=dtype))
        x = torch.empty(4, 256, dtype=dtype, device="meta")
        [plan] = qm.explain(qm.quantize, x, **format.options, gpu=gpu)
        assert is_in_library(plan)
        [plan] = qm.explain(
            qm.dequantize, *weights(format, 4, 256, dtype=dtype), **format.options, dtype=dtype, gpu=gpu
        )
        assert is_in_library(plan)


def test_library_has_gradients_and_marlin():
    for gpu in SOME_GPUS:
        for rows in (1, 3, 8, 64, 512):
            assert is_in_library(matmul_plan(gpu, rows, 4096, 4096, transpose=False))
            for mode, bits in cases.MARLIN_BITS.items():
                assert is_in_library(matmul_plan(gpu, rows, 4096, 4096, Format(mode, 128, bits), transpose=False))
    assert is_in_library(matmul_plan("applegpu_g14s", 3, 4096, 4096, dtype=torch.float32))
    assert not is_in_library(matmul_plan("applegpu_g14s", 3, 4096, 4096, Format("affine", 128, 2)))


def test_cores_can_be_named():
    """Fewer cores want a product cut into fewer parts."""
    parts = [
        matmul_plan(f"applegpu_g14d{cores}", 16, 1024, 16384).launches[0].threadgroups[1]
        for cores in ("", "/64", "/16")
    ]
    assert parts[0] == parts[1] > parts[2]


def test_plans_are_complete():
    """A host can run a launch from what explain tells: here that of x [3, 256] and w [40, 256]."""
    [launch] = matmul_plan("applegpu_g14s", 3, 40, 256).launches
    roles = ["x", "w", "scales", "biases", "none", "y"]
    assert launch.arguments == tuple((role, 0) for role in roles)
    assert launch.params_index == 6
    *strides, x_row_stride, _ = struct.unpack_from("<14q", launch.params)
    assert strides == [0] * 12
    assert x_row_stride == 256
    inner_size, rows, k, n, parts, part_k = struct.unpack_from("<6i", launch.params, 14 * 8)
    assert (inner_size, rows, k, n, parts, part_k) == (1, 3, 256, 40, 1, 256)


def test_far_rows_of_x_are_taken_one_by_one():
    """Matvecs of several rows count in 32 bits from one row of x to the others."""
    x = torch.empty(1, dtype=torch.float16, device="meta").as_strided((3, 256), (2**28, 1))
    [plan] = qm.explain(qm.quantized_matmul, x, *weights(FOUR_BIT, 40, 256), group_size=64, bits=4, gpu="applegpu_g14s")
    assert [launch.kernel for launch in plan.launches] == ["affine_qmv_float16_gs_64_b_4"] * 3
    assert [dict(launch.arguments)["x"] for launch in plan.launches] == [0, 2**28, 2**29]


@pytest.mark.parametrize("rows", [1, 4, 20])
@pytest.mark.parametrize("transpose", [True, False], ids=["transposed", "plain"])
def test_long_k_and_short_n_is_split(rows, transpose):
    plan = matmul_plan("applegpu_g14s", rows, 64, 16384, transpose=transpose)
    if transpose and rows < 13:  # the simdgroups of a threadgroup divide K
        assert [launch.kernel.startswith("affine_qmv_float16") for launch in plan.launches] == [True]
        return
    assert [("splitk" in launch.kernel, "sum_parts" in launch.kernel) for launch in plan.launches] == [
        (True, False),
        (False, True),
    ]
    assert len(matmul_plan("applegpu_g14s", rows, 16384, 512).launches) == 1


MARLIN = Format("marlin_fp4", 128, 4)


def test_packed_columns_run_as_any_other_untransposed_weights():
    for gpu in ("applegpu_g14s", "applegpu_g17s"):
        for rows, op in ((1, "qvm"), (4, "qvm"), (8, "qvm"), (9, "qmm_n"), (64, "qmm_n")):
            if op == "qmm_n" and gpu == "applegpu_g17s":
                op = "qmm_n_nax"
            plan = matmul_plan(gpu, rows, 8192, 1024, MARLIN, transpose=False)
            assert [launch.kernel.split("_float16")[0] for launch in plan.launches] == [f"marlin_fp4_{op}"], (gpu, rows)
    assert families(matmul_plan("applegpu_g17s", 64, 16384, 4096, MARLIN, transpose=False)) == ["tensor"]
    assert "nax" in gather_plan("applegpu_g17s", 256, 1, 8, True, MARLIN, transpose=False).launches[1].kernel
    # What a threadgroup computes: 64 columns. K is cut where there are few of them, at whole groups.
    [whole] = matmul_plan("applegpu_g14s", 1, 8192, 1024, MARLIN, transpose=False).launches
    assert (whole.threadgroups, whole.threads) == ((128, 1, 1), 256)
    split, _ = matmul_plan("applegpu_g14s", 1, 64, 16384, MARLIN, transpose=False).launches
    inner_size, rows, k, n, parts, part_k = struct.unpack_from("<6i", split.params, 14 * 8)
    assert (inner_size, rows, k, n) == (1, 1, 16384, 64)
    assert split.threadgroups == (1, parts, 1) and parts > 1
    assert part_k % 128 == 0 and (parts - 1) * part_k < 16384 <= parts * part_k


def test_alignment_of_packed_columns():
    """Words are read by twos, and so are scales."""

    def is_aligned(words, scales):
        x = torch.empty(1, 128, dtype=torch.float16, device="meta")
        [plan] = qm.explain(
            qm.quantized_matmul, x, words, scales, transpose=False, **MARLIN.options, gpu="applegpu_g14s"
        )
        return "aligned_weights" in plan.launches[0].constants

    def after(offset, n, rows, dtype):
        return torch.empty(offset + rows * n, dtype=dtype, device="meta")[offset:].view(rows, n)

    for words, scales, n, expected in ((0, 0, 64, True), (1, 0, 64, False), (0, 1, 64, False), (0, 0, 33, False)):
        given = after(words, n, 16, torch.uint32), after(scales, n, 1, torch.float16)
        assert is_aligned(*given) == expected, (words, scales, n)


def test_pairs_of_an_expert_share_a_tile():
    """Whether they are sorted or not; as many tiles as the worst distribution has."""
    for promise in (True, False):
        sorting, product = gather_plan("applegpu_g14s", 256, 1, 8, promise).launches
        assert (sorting.kernel, sorting.threadgroups) == ("sort_pairs", (1, 1, 1))
        assert "gather_qmm_rhs_t" in product.kernel and product.kernel.endswith("_rows_32")
        assert product.threadgroups == (6, 9 + (256 - 9) // 32, 1)
    assert "nax" in gather_plan("applegpu_g17s", 256, 1, 8, True).launches[1].kernel
    assert gather_plan("applegpu_g14s", 64, 1, 8, True).launches[1].kernel.endswith("_rows_16"), "few for each expert"
    assert "gather_qmv" in gather_plan("applegpu_g14s", 24, 1, 8, True).launches[0].kernel, "too few for each expert"
    assert "gather_qmv" in gather_plan("applegpu_g14s", 4096, 1, 1024, True).launches[0].kernel, "too many experts"


def test_workspace_of_pairs_in_tiles():
    """Three numbers for each tile, then two for each pair."""
    plan = gather_plan("applegpu_g14s", 256, 1, 8, False)
    sorting, product = plan.launches
    pairs, rows_of_x, matrices, rows, tiles = struct.unpack("<5i", sorting.params)
    assert (pairs, rows_of_x, matrices, rows, tiles) == (256, 256, 8, 32, product.threadgroups[1])
    assert plan.workspace == 3 * tiles + 2 * pairs
    assert sorting.arguments[2:] == (("workspace", 0),)
    assert product.arguments[7:] == (("workspace", 0), ("workspace", 3 * tiles))


def test_a_few_pairs_of_untransposed_weights_are_split():
    multiplying, adding = gather_plan("applegpu_g14s", 2, 1, 8, False, transpose=False).launches
    parts, part_k = struct.unpack_from("<2i", multiplying.params, 14 * 8 + 4 * 4)
    assert multiplying.kernel.startswith("affine_gather_qvm_splitk_float16") and adding.kernel == "sum_parts_float16"
    assert (multiplying.threadgroups, adding.threadgroups) == ((2, parts, 2), (384 // 64, 2, 1))
    assert (parts, part_k) == (2, 128)
    [whole] = gather_plan("applegpu_g14s", 200, 1, 128, False, transpose=False).launches
    assert whole.kernel.startswith("affine_gather_qvm_float16")
    for rows in (4, 8):
        [whole] = gather_plan("applegpu_g14s", 2, rows, 8, False, transpose=False).launches
        assert "splitk" not in whole.kernel
    [columns] = gather_plan("applegpu_g14s", 2, 1, 8, False, MARLIN, transpose=False).launches
    assert "splitk" not in columns.kernel


def test_alignment_is_a_constant():
    def constants(x, w):
        [plan] = qm.explain(qm.quantized_matmul, x, w, *weights(FOUR_BIT, 64, 512)[1:], gpu="applegpu_g14s")
        return set(plan.launches[0].constants)

    words = weights(FOUR_BIT, 64, 512)[0]
    shifted = torch.empty(64 * 64 + 1, dtype=torch.uint32, device="meta")[1:].view(64, 64)
    x = torch.empty(3, 520, dtype=torch.float16, device="meta")
    everything = {"aligned_outputs", "aligned_weights", "aligned_x", "aligned_k"}
    assert constants(x[:, :512], words) == everything
    assert constants(x[:, 1:513], words) == everything - {"aligned_x"}
    assert constants(x[:, 8:], words) == everything
    assert constants(x[:, :512], shifted) == everything - {"aligned_weights"}
    odd = torch.empty(3, 513, dtype=torch.float16, device="meta")
    assert constants(odd[:, :512], words) == everything - {"aligned_x"}
    assert constants(odd[:1, :512], words) == everything, "the distance of rows is nothing to a single row"


def test_batches_of_any_layout():
    """Two batch dimensions to a launch; the rest of them as launches of their own."""
    matrices = weights(FOUR_BIT, 4, 1, 3, 1, 64, 128)
    x = torch.empty(2, 1, 5, 3, 128, dtype=torch.float16, device="meta")
    [plan] = qm.explain(qm.quantized_matmul, x, *matrices, gpu="applegpu_g14s")
    assert sum(launch.threadgroups[2] for launch in plan.launches) == 4 * 2 * 3 * 5
    [plan] = qm.explain(
        qm.quantized_matmul, x.expand(4, 2, 3, 5, 3, 128).contiguous(), *weights(FOUR_BIT, 4, 2, 3, 5, 64, 128),
        gpu="applegpu_g14s",
    )  # fmt: skip
    assert [launch.threadgroups[2] for launch in plan.launches] == [120]


# --- The question ----------------------------------------------------------------------------------------------------


def test_explain_follows_a_model():
    model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 64))
    qm.quantize_model(model, bits=4, group_size=32)
    plans = qm.explain(model, torch.randn(20, 64), gpu="applegpu_g15c")
    assert [plan.launches[0].kernel for plan in plans] == ["affine_qmm_t_float32_gs_32_b_4_rows_32"] * 2
    assert [(plan.device, plan.gpu) for plan in plans] == [("mps", "applegpu_g15c")] * 2
    assert "affine_qmm_t_float32_gs_32_b_4_rows_32" in str(plans[0])


def test_explain_on_cpu_names_the_instruction_set():
    [plan] = qm.explain(qm.affine_qmv, torch.randn(3, 128), *qm.quantize(torch.randn(8, 128), 128, 4), 8)
    assert (plan.op, plan.device, plan.launches) == ("affine_qmv", "cpu", ())
    assert plan.instruction_set in ("baseline", "avx2", "avx512", "amx", "neon")


BAD_NAMES = ["m1", "applegpu_g", "applegpu_g16", "applegpu_g16x", "applegpu_gs", "applegpu_g1234s"]


@pytest.mark.parametrize("gpu", [*BAD_NAMES, "applegpu_g16s/", "applegpu_g16s/x", "applegpu_g16s/12345", "/16"])
def test_explain_wants_metals_name_of_a_gpu(gpu):
    with pytest.raises(ValueError, match=f'"{gpu}".*applegpu_g16s'):
        matmul_plan(gpu, 1, 64, 64)


def test_explain_on_meta_wants_a_gpu():
    with pytest.raises(ValueError, match="device meta"):
        qm.explain(qm.quantize, torch.empty(4, 64, device="meta"))


def test_sizes_beyond_the_kernels_counters():
    x = torch.empty(1, 2**31, dtype=torch.float16, device="meta")
    with pytest.raises(NotImplementedError, match=r"\[quantized_matmul\] K is 2147483648"):
        qm.explain(qm.quantized_matmul, x, *weights(FOUR_BIT, 2, 2**31), gpu="applegpu_g14s")
