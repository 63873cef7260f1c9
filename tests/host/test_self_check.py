"""Kernels that a compiler got wrong, each for some of its shapes alone: the check before their first use finds them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import oracle
import quantization_mlx as q
import software_gpu
from covering import mostly_exhaustive
from quantization_mlx import fast
from softmetal import mps


@dataclass(frozen=True)
class Mutant:
    """A kernel, by part of its name, with one text in the place of another; and a call whose plan names it."""

    kernel: str
    old: str
    new: str
    rows: int
    K: int = 64
    N: int = 72
    transpose: bool = True
    experts: tuple[int, ...] = ()
    activation: str = ""  # of a gated product


STORED_ROW = "(row < end_row"
SPLIT_TILE = "min(params.k, k_begin + params.part_k)"
SPLIT_ROW = "min(params.k, begin + params.part_k)"
STORED, LOST = "if (row < params.rows &&", "if (row + 1 < params.rows &&"
LOST_PAIR = ("set_rows(tile.count, ", "set_rows(tile.count - (tile.first > 0 ? 1 : 0), ")
PAIR = "rhs_indices, params, threadgroup_index.z"
SORTED = (0,) * 9 + (1,) * 16 + (2,) * 30
FEW = (2, 0, 1, 1) * 6


def lost_row(kernel: str, rows: int, condition: str, **call: object) -> Mutant:
    """Without the last row of some tiles."""
    return Mutant(kernel, STORED_ROW, f"{STORED_ROW} - (end_row {condition} ? 1 : 0)", rows, **call)


MUTANTS = {
    "tile of 16, whole": lost_row("qmm_t_float16_gs_64_b_4_rows_16", 16, "== 16"),
    "tile of 16, partial": lost_row("qmm_t_float16_gs_64_b_4_rows_16", 14, "< 16"),
    "tile of 32, whole": lost_row("qmm_t_float16_gs_64_b_4_rows_32", 32, "== 32"),
    "tile of 32, partial": lost_row("qmm_t_float16_gs_64_b_4_rows_32", 20, "< 32"),
    "tile of 64, whole": lost_row("qmm_t_float16_gs_64_b_4_rows_64", 64, "== 64"),
    "tile of 64, partial": lost_row("qmm_t_float16_gs_64_b_4_rows_64", 40, "< 64"),
    "tile, ragged columns": Mutant("qmm_t_float16", "if (n + 1 < params.n) {", "if (n + 2 < params.n) {", 20),
    "tile, w not transposed": lost_row("qmm_n_float16_gs_64_b_4_rows_32", 20, "< 32", N=64, transpose=False),
    "tile, split": Mutant("qmm_t_splitk", SPLIT_TILE, f"({SPLIT_TILE} - (k_begin > 0 ? 64 : 0))", 20, K=4096, N=64),
    "tile, gathered": Mutant("gather_qmm_t_", PAIR, f"{PAIR} == 3 ? 2 : threadgroup_index.z", 20, experts=(0, 2, 1, 1)),
    "tile, sorted": Mutant("gather_qmm_rhs_t_", *LOST_PAIR, 1, experts=SORTED),
    "tile, few of each expert": Mutant("gather_qmm_rhs_t_", *LOST_PAIR, 1, experts=FEW),
    "tile, sorted by another expert": Mutant(
        *("sort_pairs", "? matrix : -1", "? (matrix == 2 ? 0 : matrix) : -1", 1), experts=FEW
    ),
    "tensor of 32, whole": lost_row("qmm_t_nax_float16_gs_64_b_4_rows_32", 32, "== 32"),
    "tensor of 32, partial": lost_row("qmm_t_nax_float16_gs_64_b_4_rows_32", 20, "< 32"),
    "tensor of 64, whole": lost_row("qmm_t_nax_float16_gs_64_b_4_rows_64", 64, "== 64"),
    "tensor of 64, partial": lost_row("qmm_t_nax_float16_gs_64_b_4_rows_64", 40, "< 64"),
    "tensor of 128, whole": lost_row("qmm_t_nax_float16_gs_64_b_4_rows_128", 512, "== 128", N=384),
    "tensor of 128, partial": lost_row("qmm_t_nax_float16_gs_64_b_4_rows_128", 500, "< 128", N=384),
    "tensor, split": Mutant("qmm_t_nax_splitk", SPLIT_TILE, f"({SPLIT_TILE} - (part > 0 ? 64 : 0))", 20, K=4096, N=64),
    "tensor, sorted": Mutant("gather_qmm_rhs_t_nax", *LOST_PAIR, 1, experts=SORTED),
    "matvec of 1 row, long": Mutant(
        *(
            "qmv_float16_gs_64_b_4",
            "elements < params.k;",
            "elements < params.k - (params.k > 2048 ? elements : 0);",
            1,
        ),
        K=4096,
    ),
    "matvec of 8 rows, ragged": Mutant("_rows_8", "column < params.n)", "column < params.n - 1)", 7),
    "matvec of 8 rows, the last": Mutant("_rows_8", STORED, "if (row < params.rows - (params.rows > 6 ? 1 : 0) &&", 7),
    "matvec, gated": Mutant("qmv_float16", "place + half_columns)", "place)", 1, activation="silu"),
    "matvec, rows of values": Mutant("qmv_float16", "(r - qmv_y_outputs())", "0", 2, activation="gelu"),
    "matvec, activation": Mutant("qmv_float16", "x * x, tanh_third", "x, tanh_third", 3, activation="gelu_tanh"),
    "matvec, gathered": Mutant("gather_qmv_float16_gs_64_b_4_rows_4", STORED, LOST, 3, experts=(2, 0, 1)),
    "matvec, not transposed": Mutant("qvm_float16_gs_64_b_4_rows_2", STORED, LOST, 2, N=64, transpose=False),
    "matvec, not transposed, split": Mutant(
        "qvm_splitk", SPLIT_ROW, f"{SPLIT_ROW} - (part > 0 ? 1 : 0)", 1, K=4096, N=64, transpose=False
    ),
}


# Of norms, which no other kernels replace: a text of theirs and another, and a call that needs it.
NORM_MUTANTS = {
    "sum of squares": ("values[i] * values[i]", "values[i]", lambda x, w: fast.rms_norm(x, w, 0.1)),
    "the next step": ("first += step", "first += 2 * step", lambda x, w: fast.rms_norm(x.repeat(1, 200), None, 0.1)),
    "elements past the end": (
        "? values[i] - mean : 0.0f",
        "? values[i] - mean : 1.0f",
        lambda x, w: fast.layer_norm(x[:, :33], None, None, 0.1),
    ),
    "residual": ("x_factor, addends[i]", "x_factor, -addends[i]", lambda x, w: fast.add_rms_norm(x, x + 1, w, 0.1)),
    "norm of x": ("squares / length", "squares", lambda x, w: fast.add_rms_norm(x, x + 1, w, 0.1, x_weight=w)),
    "weight of x": ("*= factors[i];", "*= 1.0f;", lambda x, w: fast.add_rms_norm(x, x + 1, w, 0.1, x_weight=w)),
    "scale of x": ("= params.scale;", "= 1.0f;", lambda x, w: fast.add_rms_norm(x, x + 1, w, 0.1, scale=0.25)),
    "weight": ("normal * factors[i]", "normal", lambda x, w: fast.rms_norm(x, w, 0.1)),
    "bias": ("scaled + offsets[i]", "scaled - offsets[i]", lambda x, w: fast.layer_norm(x, None, w, 0.1)),
}


# Likewise of sampling, whose text may be of a header that it has in common with the CPU.
SAMPLE_MUTANTS = {
    "weights": ("-6.9314706e-1f", "-5.9314706e-1f", {}),
    "generator": ("first_key += 0x9E3779B9u", "first_key += 0x9E3779B8u", {}),
    "threshold": ("in_upper < left", "in_upper > left", {"top_k": 3}),
    "order": ("sum > place", "sum >= place + own", {}),
    "penalty": ("logit * penalty", "logit", {"previous": torch.zeros(3, 2).long(), "repetition_penalty": 2.0}),
    "most probable": ("keys[i] > greatest ? first + i", "keys[i] > greatest ? first", {}),
}


# Likewise of mixtures of experts: a family, a text of its kernels and another.
MOE_MUTANTS = {
    "other experts": ("router", "best_of_simdgroup({own, lane})", "best_of_simdgroup({own, 31 - lane})"),
    "bias": ("router", "choice += expert", "choice -= expert"),
    "sum of two": ("router", "logit_of_key(first.key) + logit_of_key(second.key)", "logit_of_key(first.key)"),
    "sigmoid": ("router", "exp(-logits[i])", "exp(logits[i])"),
    "scale": ("router", "own * params.scale", "own"),
    "last experts": ("router", "i < width; ++i) {\n    if (keys", "i < width - 1; ++i) {\n    if (keys"),
    "weights": ("combine", "static_cast<float>(weight[row])", "static_cast<float>(weight[0])"),
    "sum": ("combine", "fma(factor, values[j], sums[j])", "factor * values[j]"),
    "residual": ("combine", "token * params.residual_stride", "params.residual_stride"),
    "biases of experts": ("combine", "exists ? expert * params.bias_stride : 0", "0"),
}

# Of attention, whose three forms take each other's place: part of a kernel's name, a text of it and another, and the
# queries, keys and options of a call that needs it.
TOTAL = "(has_sinks ? weight_of(sink, largest) : 0.0f)"
ATTENTION_MUTANTS = {
    "the last key": ("attention_64", "key < mask.last", "key < mask.last - 1", 1, 50, {}),
    "the window": ("attention_64", "key >= mask.first", "key > mask.first", 2, 50, {"mask": "causal", "window": 9}),
    "the last row": ("attention_64", "row < row_count", "row + 1 < row_count", 3, 50, {}),
    "parts of the keys": ("attention_64", "part_begin + params.part_keys,", "part_begin + 200,", 1, 2000, {}),
    "parts put together": ("_combine_", "(first + i)), sums[i], sum)", "(first + i)), sums[0], sum)", 1, 2000, {}),
    "sinks": ("attention_64", TOTAL, "0.0f", 1, 50, {"sinks": torch.full((4,), 3.0)}),
    "softcap": ("attention_64", "score / mask.softcap", "score", 1, 50, {"softcap": 0.5}),
    "hidden keys": ("_tile_", "end > range.seen_end", "end > range.seen_end + 40", 40, 40, {"mask": "causal"}),
    "weights of a tile": ("_tile_", "weights *= factor;", "", 40, 90, {}),
    "values of a tile": ("_tile_", "left > 0 ? row * rows", "left > 0 ? (row & 15) * rows", 40, 90, {}),
    "tensor, hidden keys": ("_nax_", "end > range.seen_end", "end > range.seen_end + 40", 40, 40, {"mask": "causal"}),
    "tensor, the last keys": ("_nax_", "min(keys, range.end - begin)", "min(keys, range.end - begin - 1)", 40, 90, {}),
    "tensor, the last row": ("_nax_", "first_row + row < params", "first_row + row + 1 < params", 40, 90, {}),
    "tensor, another row": ("_nax_", "sums[i] * factors[place[1]]", "sums[i] * factors[place[1] / 2 * 2]", 40, 90, {}),
    "tensor, sums of before": ("_nax_", "multiply_rows(sums, factors);", "", 40, 90, {}),
    "tensor, weights of before": ("_nax_", "state.weights *= factor;", "", 40, 90, {}),
    "tensor, the largest score": ("_nax_", "largest = max_of_row<simdgroup_rows>(largest);", "", 40, 90, {}),
}


# Of attention to packed keys and values, likewise: a text of the kernels and another, queries, keys and bits.
PACKED_MUTANTS = {
    "codes in turns": ("set_pair(code_pair(halves, 4, 4), 1, 3", "set_pair(code_pair(halves, 4, 0), 1, 3", 12, 90, 4),
    "upper codes": ("(word & 0xFF00u) << 8", "(word & 0xFFu) << 16", 12, 90, 4),
    "pairs of codes": ("(word >> bits & mask) << 16", "(word & mask) << 16", 1, 50, 4),
    "bytes": ("code_pair(word >> 8, 8, 0)", "code_pair(word, 8, 0)", 12, 90, 8),
    "width": ("load_codes<count, 8>", "load_codes<count, 4>", 1, 50, 8),
    "scales": ("rows.scales[own >> rows.group_shift]", "rows.scales[0]", 1, 50, 8),
    "biases": ("rows.biases[own >> rows.group_shift]", "rows.biases[0]", 1, 50, 4),
    "rows of scales": ("rows.scales += count * rows.scale_stride", "rows.scales += 0", 1, 50, 4),
    "rows of biases": ("rows.biases += count * rows.scale_stride", "rows.biases += 0", 40, 90, 8),
}


@dataclass(frozen=True)
class FastMutant:
    """Part of the kernel's name, its family, what the warning says of it, a text and another, and a call."""

    kernel: str
    family: str
    described: str
    old: str
    new: str
    call: Callable[[Tensor], Tensor]


def to_mps(options: dict[str, object]) -> dict[str, object]:
    return {name: each.to("mps") if isinstance(each, Tensor) else each for name, each in options.items()}


def rope_mutant(old: str, new: str, dims: int = 48, traditional: bool = False, **given: object) -> FastMutant:
    options = {"traditional": traditional, "base": 10000.0, "scale": 1.0, "offset": 0, **given}
    described = f"rope with traditional={traditional}"
    return FastMutant("rope_", "rope", described, old, new, lambda x: fast.rope(x[None], dims, **to_mps(options)))


def gate_mutant(kernel: str, old: str, new: str, call: Callable[[Tensor], Tensor]) -> FastMutant:
    return FastMutant(f"{kernel}_float16", "gate", kernel.removesuffix("_tanh"), old, new, call)


OFFSETS = {"offset": torch.tensor([3])}
FREQS = {"base": None, "freqs": torch.ones(24)}
FAST_MUTANTS = {
    "rope, quadrants": rope_mutant("cosine = (quadrant & 1u) != 0 ? s : c", "cosine = c"),
    "rope, high bits of pairs": rope_mutant("bit = 2; first >> bit", "bit = 2; bit < 5 && first >> bit"),
    "rope, low bits of pairs": rope_mutant("(i & 2) != 0", "(i & 4) != 0"),
    "rope, the lower float": rope_mutant("turns.y - rint(turns.y)", "0.0f"),
    "rope, heads": rope_mutant("head + params.thread_heads, params.heads", "head + 1, params.heads"),
    "rope, the rest": rope_mutant("load_some<1>(source + begin, params", "load_some<1>(source, params", dims=32),
    "rope, neighbours": rope_mutant("next = traditional ? 2 : 1", "next = traditional ? 1 : 1", traditional=True),
    "rope, offsets": rope_mutant("sequence * params.offset_stride", "0 * params.offset_stride", **OFFSETS),
    "rope, freqs": rope_mutant("quotient(common, freq)", "product(common, float2(freq, 0.0f))", **FREQS),
    "swiglu, limit": gate_mutant("swiglu", "? -params.limit : high", "? high : high", lambda x: fast.swiglu(x, x)),
    "swiglu, alpha": gate_mutant("swiglu", "alpha * x", "x", lambda x: fast.swiglu(x, x)),
    "swiglu, stride": gate_mutant(
        "swiglu", "row[(first + i) * stride]", "row[first + i]", lambda x: fast.swiglu(x[:, ::2], x[:, 1::2])
    ),
    "swiglu, biases": gate_mutant(
        "swiglu",
        "exists ? expert * row_stride : 0",
        "0",
        lambda x: fast.swiglu(x, x, gate_bias=x, value_bias=x, experts=torch.arange(3).to("mps")),
    ),
    "geglu, tail": gate_mutant(
        "geglu", "? tail : 1.0f - tail", "? tail : 1.0f", lambda x: fast.geglu(x, x, approximate="none")
    ),
    "geglu, tanh": gate_mutant("geglu_tanh", "x * x, tanh_third", "x, tanh_third", lambda x: fast.geglu(x, x)),
}


# A text of the shader and another.
IMAGE_MUTANTS = {
    "coefficient": ("antialias ? -0.5f : -0.75f", "-0.75f"),
    "border": ("side.antialias != 0 && first < 0", "first < 0"),
    "width of the filter": ("antialias && from > to", "from > to"),
    "later columns": ("tx += step_columns", "tx += end_of_columns"),
    "later channels": ("+ channel * params.channel_stride", ""),
    "statistics": ("mean[channel + c]", "mean[c]"),
    "scale": ("/ sums.weights * params.scale", "/ sums.weights"),
    "images": ("image * params.image_stride + ", ""),
}


@contextmanager
def compiled_as(mutant: Mutant) -> Iterator[list[str]]:
    """For a while, the names of the kernels that were compiled as the mutant says."""
    changed: list[str] = []
    compile = mps.device.compile

    def compile_mutant(source, **options):
        [name] = re.findall(r'host_name\("(\w+)"\)', source)
        if mutant.kernel in name and "sum_parts" not in name:
            assert mutant.old in source, f"{name} has no {mutant.old}"
            source = source.replace(mutant.old, mutant.new)
            changed.append(name)
        return compile(source, **options)

    mps.device.compile = compile_mutant
    try:
        yield changed
    finally:
        mps.device.compile = compile


@pytest.mark.parametrize("name", NORM_MUTANTS)
def test_wrong_norm_is_refused(name, monkeypatch, capfd):
    old, new, call = NORM_MUTANTS[name]
    monkeypatch.setenv("CI", "")  # where the check itself would be an error
    software_gpu.install()
    x, w = oracle.random_x(3, 48).to(torch.float16), oracle.random_x(48, seed=2).to(torch.float16)
    gpu = f"applegpu_g{500 + list(NORM_MUTANTS).index(name)}p"
    with mps.gpu(gpu, 2600), compiled_as(Mutant("_norm_", old, new, 3)), pytest.raises(RuntimeError, match="norm"):
        call(x.to("mps"), w.to("mps"))
    kind = "layer_norm" if name in ("elements past the end", "bias") else "rms_norm"
    assert f'family "norm" fails its self-check for Half and {kind} on' in capfd.readouterr().err
    mps.clear()


@pytest.mark.parametrize("name", IMAGE_MUTANTS)
def test_wrong_image_is_refused(name, monkeypatch, capfd):
    old, new = IMAGE_MUTANTS[name]
    monkeypatch.setenv("CI", "")
    software_gpu.install()
    x = oracle.random_x(3, 6, 5).to("mps")
    gpu = f"applegpu_g{400 + list(IMAGE_MUTANTS).index(name)}p"
    with mps.gpu(gpu, 2600), compiled_as(Mutant("image", old, new, 3)), pytest.raises(RuntimeError, match="resample"):
        fast.resample_image(x, (4, 4), mean=(1.0, 2.0, 3.0))
    assert 'family "image" fails its self-check for Float on' in capfd.readouterr().err
    mps.clear()


@pytest.mark.parametrize("name", SAMPLE_MUTANTS)
def test_wrong_sampling_is_refused(name, monkeypatch, capfd):
    old, new, rules = SAMPLE_MUTANTS[name]
    monkeypatch.setenv("CI", "")
    software_gpu.install()
    rules = {key: rule.to("mps") if isinstance(rule, Tensor) else rule for key, rule in rules.items()}
    logits = oracle.random_x(3, 48).to("mps")
    gpu = f"applegpu_g{600 + list(SAMPLE_MUTANTS).index(name)}p"
    with mps.gpu(gpu, 2600), compiled_as(Mutant("sample", old, new, 3)), pytest.raises(RuntimeError, match="sample"):
        fast.sample(logits, 0, **rules)
    assert 'family "sample" fails its self-check for Float on' in capfd.readouterr().err
    mps.clear()


@pytest.mark.parametrize("name", MOE_MUTANTS)
def test_wrong_mixture_is_refused(name, monkeypatch, capfd):
    family, old, new = MOE_MUTANTS[name]
    monkeypatch.setenv("CI", "")
    software_gpu.install()
    x = oracle.random_x(3, 40).to("mps")
    gpu = f"applegpu_g{700 + list(MOE_MUTANTS).index(name)}p"
    with mps.gpu(gpu, 2600), compiled_as(Mutant("moe", old, new, 3)), pytest.raises(RuntimeError, match="moe"):
        if family == "router":
            fast.moe_router(x, 2, bias=x[0])
        else:
            fast.moe_combine(x[:, None], x[:, :1], residual=x, bias=x, experts=torch.zeros(3, 1).long().to("mps"))
    assert f'family "{family}" fails its self-check for Float on' in capfd.readouterr().err
    mps.clear()


@pytest.mark.parametrize("name", ATTENTION_MUTANTS)
def test_wrong_attention_is_found(name, monkeypatch, capfd):
    kernel, old, new, queries, keys, options = ATTENTION_MUTANTS[name]
    monkeypatch.setenv("CI", "")  # where the check itself would be an error
    software_gpu.install()
    q, k = oracle.random_x(1, 4, queries, 64).half(), oracle.random_x(1, 2, keys, 64, seed=2).half()

    def call(device: str) -> Tensor:
        moved = {key: value.half().to(device) if isinstance(value, Tensor) else value for key, value in options.items()}
        return fast.scaled_dot_product_attention(
            q.to(device), k.to(device), k.flip(3).to(device), scale=0.125, **moved
        ).cpu()

    gpu = f"applegpu_g{800 + list(ATTENTION_MUTANTS).index(name)}p"
    family = "tensor" if "nax" in kernel else ("tile" if "tile" in kernel else "attention")
    macos = 2602 if family == "tensor" else 2600
    with mps.gpu(gpu, macos), compiled_as(Mutant(kernel, old, new, queries)) as changed:
        result = call("mps")
    found = capfd.readouterr().err
    assert changed and f'family "{family}" fails its self-check for Half on' in found
    assert family != "tensor" or mps.launched()[-1].kernel == "attention_tile_64_float16"
    torch.testing.assert_close(result, call("cpu"), rtol=1e-2, atol=1e-3)
    assert not mps.errors()
    mps.clear()


@pytest.mark.parametrize(("kernel", "macos"), [("_tile_", 2600), ("_nax_", 2602)])
def test_wrong_attention_of_many_heads_is_found(kernel, macos, monkeypatch, capfd):
    """Sixteen heads of queries to one of keys: so many rows that few queries would be enough of them."""
    monkeypatch.setenv("CI", "")
    software_gpu.install()
    q, k = oracle.random_x(1, 16, 12, 64).half().to("mps"), oracle.random_x(1, 1, 20, 64).half().to("mps")
    mutant = Mutant(kernel, "key < mask.last", "key < mask.last - 1", 12)
    with mps.gpu(f"applegpu_g{890 + macos % 100}p", macos), compiled_as(mutant) as changed:
        fast.scaled_dot_product_attention(q, k, k, scale=0.125)
    found = capfd.readouterr().err
    assert changed and f"is not used: {changed[0]}: its result differs" in found
    assert not mps.errors()
    mps.clear()


@pytest.mark.parametrize("name", PACKED_MUTANTS)
def test_wrong_attention_to_packed_keys_is_found(name, monkeypatch, capfd):
    old, new, queries, keys, bits = PACKED_MUTANTS[name]
    monkeypatch.setenv("CI", "")  # where the check itself would be an error
    software_gpu.install()
    format = oracle.Format("affine", 32, bits)
    x = oracle.random_x(1, 4, queries, 64).half()
    heads = [oracle.random_quantized(format, 1, 2, keys, 64, dtype=torch.float16, seed=seed) for seed in (2, 3)]

    def call(device: str) -> Tensor:
        k, v = (each.to(device).tensors for each in heads)
        return fast.quantized_scaled_dot_product_attention(
            x.to(device), k, v, scale=0.125, group_size=32, bits=bits
        ).cpu()

    family = "tile" if queries > 8 else "attention"
    kernel = "_tile_" if queries > 8 else "attention_64"
    gpu = f"applegpu_g{900 + list(PACKED_MUTANTS).index(name)}p"
    with mps.gpu(gpu, 2600), compiled_as(Mutant(kernel, old, new, queries)) as changed:
        result = call("mps")
    found = capfd.readouterr().err
    assert changed and f'family "{family}" fails its self-check for Half and keys of {bits} bits on' in found
    torch.testing.assert_close(result, call("cpu"), rtol=1e-2, atol=1e-3)
    assert not mps.errors()
    mps.clear()


@pytest.mark.parametrize("name", FAST_MUTANTS)
def test_wrong_fast_kernel_is_refused(name, monkeypatch, capfd):
    mutant = FAST_MUTANTS[name]
    monkeypatch.setenv("CI", "")  # where the check itself would be an error
    software_gpu.install()
    x = oracle.random_x(3, 48).to(torch.float16)
    changed = Mutant(mutant.kernel, mutant.old, mutant.new, 3)
    gpu = f"applegpu_g{850 + list(FAST_MUTANTS).index(name)}p"
    with mps.gpu(gpu, 2600), compiled_as(changed), pytest.raises(RuntimeError, match="self-check"):
        mutant.call(x.to("mps"))
    warning = f'family "{mutant.family}" fails its self-check for Half and {mutant.described} on'
    assert warning in capfd.readouterr().err
    mps.clear()


def call(mutant: Mutant, x: Tensor, packed: tuple[Tensor, ...]) -> Tensor:
    if mutant.activation:
        return fast.quantized_gated_matmul(x, *packed, 64, 4, activation=mutant.activation)
    if not mutant.experts:
        return q.quantized_matmul(x, *packed, mutant.transpose, 64, 4)
    experts = torch.tensor(mutant.experts, device=x.device)
    is_sorted = list(mutant.experts) == sorted(mutant.experts)
    return q.gather_qmm(x, *packed, None, experts, mutant.transpose, 64, 4, sorted_indices=is_sorted)


ALWAYS = ("tile of 32, partial", "tensor of 64, whole", "tile, sorted", "matvec, gated")


@pytest.mark.parametrize("name", mostly_exhaustive(MUTANTS, *ALWAYS))
def test_wrong_kernel_is_found(name, monkeypatch, capfd):
    mutant = MUTANTS[name]
    monkeypatch.setenv("CI", "")  # where it would be an error
    software_gpu.install()
    sizes = (mutant.N, mutant.K) if mutant.transpose else (mutant.K, mutant.N)
    w = oracle.random_x(*((3,) if mutant.experts else ()), *sizes).to(torch.float16)
    packed = q.quantize(w, 64, 4)
    leading = (len(mutant.experts),) if mutant.experts else ()
    x = oracle.random_x(*leading, mutant.rows, mutant.K).to(torch.float16)
    # A GPU that no other test uses has no kernels yet.
    generation = (30 if "nax" in mutant.kernel else 400) + list(MUTANTS).index(name)
    gpu, macos = (f"applegpu_g{generation}p", 2602) if generation < 400 else (f"applegpu_g{generation}p", 2600)
    moved = tuple(tensor.to("mps") for tensor in packed)
    with mps.gpu(gpu, macos), compiled_as(mutant) as changed:
        result = call(mutant, x.to("mps"), moved).cpu()
    found = capfd.readouterr().err
    # What sorts pairs is checked with the product that follows it.
    wrong = "affine_gather_qmm_rhs_t_float16_gs_64_b_4_rows_16" if mutant.kernel == "sort_pairs" else changed[0]
    assert "fails its self-check" in found and f"is not used: {wrong}: its result differs" in found
    expected = call(mutant, x, packed)
    torch.testing.assert_close(result, expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max()))
    assert not mps.errors()
    mps.clear()
