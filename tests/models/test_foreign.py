"""AWQ, GPTQ and compressed-tensors layers and checkpoints in MLX's format.

Converted values must equal (code - zero) * scale exactly. Whole checkpoints are compared with float models of those
values and with mlx-lm, which reads AWQ by itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

import oracle
import quantization_mlx as qm
from disk import fill_disk
from foreign import AWQ, COMPRESSED, GPTQ, Codes, foreign_checkpoint
from quantization_mlx import convert_awq, convert_foreign_checkpoint, convert_gptq, load_checkpoint, quantized_matmul
from quantization_mlx.convert.layer import ConvertedLinear
from tiny import SIZES, assert_close, causal_lm, contents, edit_config, edit_tensors, logits, mlx_logits


def dequantized(layer: ConvertedLinear) -> Tensor:
    """float64 [rows, columns], by the description of MLX's format, with the columns in the order of the inputs."""
    codes = torch.from_numpy(oracle.unpack(layer.weight, layer.bits)).double()
    scales, biases = (each.double().repeat_interleave(layer.group_size, 1) for each in (layer.scales, layer.biases))
    values = codes * scales + biases
    if layer.permutation is None:
        return values
    return torch.empty_like(values).index_copy_(1, layer.permutation, values)


# --- Layers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group_size, converted", [(32, 32), (64, 64), (128, 128), (256, 128), (-1, 128), (96, 32)])
def test_awq_keeps_every_value(group_size: int, converted: int) -> None:
    codes = Codes(columns=768, group_size=group_size)
    layer = convert_awq(**codes.awq())
    assert torch.equal(dequantized(layer), codes.values)
    assert (layer.group_size, layer.bits, layer.permutation) == (converted, 4, None)
    assert layer.weight.dtype == torch.uint32


@pytest.mark.parametrize("stored_minus", [0, 1], ids=["v2", "v1"])
@pytest.mark.parametrize("act_order", [False, True], ids=["in-order", "act-order"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_keeps_every_value(bits: int, act_order: bool, stored_minus: int) -> None:
    codes = Codes(bits=bits, act_order=act_order)
    layer = convert_gptq(**codes.gptq(stored_minus), bits=bits, zeros_minus_one=stored_minus == 1)
    assert torch.equal(dequantized(layer), codes.values)
    assert (layer.group_size, layer.bits) == (128, bits)
    assert (layer.permutation is not None) == act_order


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize("act_order", [False, True], ids=["in-order", "act-order"])
def test_compressed_tensors_keep_every_value(act_order: bool, symmetric: bool, bits: int) -> None:
    codes = Codes(bits=bits, symmetric=symmetric, act_order=act_order, dtype=torch.bfloat16)
    stored = codes.compressed_tensors()
    del stored["weight_shape"]
    if symmetric:
        del stored["weight_zero_point"]
    layer = qm.convert_compressed_tensors(**stored, bits=bits)
    assert torch.equal(dequantized(layer), codes.values)
    assert layer.scales.dtype == (torch.bfloat16 if symmetric else torch.float32)


def test_mlx_computes_with_a_converted_layer() -> None:
    mx = oracle.mlx()
    codes = Codes()
    layer = convert_awq(**codes.awq())
    arrays = (oracle.to_mlx(tensor) for tensor in layer[:3])
    theirs = oracle.from_mlx(mx.dequantize(*arrays, group_size=layer.group_size, bits=layer.bits))
    assert torch.equal(theirs.double(), codes.values)


def test_act_order_is_a_permutation_of_the_inputs() -> None:
    codes = Codes(act_order=True)
    layer = convert_gptq(**codes.gptq())
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(1))
    y = quantized_matmul(x[..., layer.permutation], *layer[:3], group_size=layer.group_size, bits=layer.bits)
    exact = x.double() @ codes.values.T
    oracle.assert_within(y, exact, 1e-5 * exact.abs().max())


def test_groups_in_another_order_need_no_permutation() -> None:
    codes = Codes(columns=512, group_size=64)
    codes.groups = np.repeat(np.array([3, 1, 0, 2, 7, 5, 6, 4]), 64)
    layer = convert_gptq(**codes.gptq())
    assert layer.permutation is None
    assert torch.equal(dequantized(layer), codes.values)


def test_inputs_of_one_group_that_lie_together_in_part() -> None:
    """Runs of 32 with groups of 128: smaller groups, and still no permutation."""
    codes = Codes(columns=512, group_size=128)
    codes.groups = np.tile(np.repeat(np.arange(4), 32), 4)
    layer = convert_gptq(**codes.gptq())
    assert (layer.group_size, layer.permutation) == (32, None)
    assert torch.equal(dequantized(layer), codes.values)


def test_g_idx_may_be_zeroed_or_absent() -> None:
    codes = Codes(columns=512)
    stored = codes.gptq()
    for g_idx in (None, torch.zeros(512, dtype=torch.int32)):
        assert torch.equal(dequantized(convert_gptq(**{**stored, "g_idx": g_idx})), codes.values)


# --- What rounds ------------------------------------------------------------------------------------------------------


def test_symmetric_layers_keep_their_dtype_and_others_get_float32() -> None:
    symmetric, asymmetric = (convert_gptq(**Codes(symmetric=each).gptq()) for each in (True, False))
    assert symmetric.scales.dtype == symmetric.biases.dtype == torch.float16
    assert asymmetric.scales.dtype == asymmetric.biases.dtype == torch.float32


@pytest.mark.parametrize("bits, bound", [(4, 2**-7), (8, 2**-3)])
def test_float16_rounds_less_than_the_bound(bits: int, bound: float) -> None:
    """A bias below 2^bits steps has a unit in the last place of 2^(bits - 11) steps, and rounds by half of it."""
    codes = Codes(rows=256, columns=1024, bits=bits)
    layer = convert_gptq(**codes.gptq(), bits=bits, dtype=torch.float16)
    steps = (dequantized(layer) - codes.values).abs() / codes.scales.double()[:, codes.groups]
    assert layer.biases.dtype == torch.float16
    assert 0 < steps.max() < bound


def test_scales_that_overflow_the_dtype_are_refused() -> None:
    stored = Codes().awq()
    stored["scales"] = stored["scales"].float() * 1e7
    with pytest.raises(ValueError, match=r"overflow torch\.float16"):
        convert_awq(**stored, dtype=torch.float16)


# --- Errors of layers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "convert, change, message",
    [
        (convert_awq, {"qweight": torch.zeros(256, 8)}, r"qweight is torch\.float32 \[256, 8\] and should be int32"),
        (convert_awq, {"qweight": torch.zeros(256, 9).int()}, r"\[256, 9\] and should be int32 \[256, 8\]"),
        (convert_awq, {"qzeros": torch.zeros(3, 8, dtype=torch.int32)}, r"qzeros .* should be int32 \[2, 8\]"),
        (convert_awq, {"scales": torch.ones(64)}, r"scales \[64\] should be \[groups, out\]"),
        (convert_awq, {"scales": torch.full((2, 64), torch.nan)}, "infinite or NaN"),
        (convert_awq, {"scales": torch.ones(2, 64, dtype=torch.int32)}, "should be floating-point"),
        (convert_gptq, {"bits": 5}, r"5 bits; supported are \(2, 3, 4, 8\)"),
        (convert_gptq, {"g_idx": torch.full((256,), 2)}, "beyond the 2 groups"),
        (convert_gptq, {"g_idx": torch.full((255,), 1)}, r"g_idx \[255\] should be \[256\]"),
        (convert_gptq, {"qzeros": torch.full((2, 8), -1, dtype=torch.int32)}, "qzeros holds 15, which readers"),
    ],
)
def test_wrong_tensors_are_refused(convert: Callable[..., Any], change: dict[str, Any], message: str) -> None:
    codes = Codes()
    stored = codes.awq() if convert is convert_awq else codes.gptq()
    with pytest.raises(ValueError, match=message):
        convert(**{**stored, **change})


def test_groups_of_16_cannot_be_expressed() -> None:
    with pytest.raises(ValueError, match=r"groups of \[16\] inputs do not divide into groups of \[32, 64, 128\]"):
        convert_gptq(**Codes(group_size=16).gptq())


# --- Checkpoints ------------------------------------------------------------------------------------------------------


def tiny_moe(family: str) -> PreTrainedModel:
    options = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "head_dim": 32}
    qwen, mixtral = {**options, "norm_topk_prob": True}, {"num_local_experts": 4}
    name, more = {"mixtral": ("Mixtral", mixtral), "qwen3_moe": ("Qwen3Moe", qwen)}[family]
    return causal_lm(name, **SIZES, tie_word_embeddings=False, **more).to(torch.float16)


@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize(
    "method, record, options",
    [
        ("awq", AWQ, {}),
        ("gptq", GPTQ, {}),
        ("gptq", {**GPTQ, "bits": 8}, {"bits": 8, "group_size": 32}),
        ("gptq", {**GPTQ, "bits": 3}, {"bits": 3, "group_size": -1, "symmetric": True}),
        ("compressed_tensors", COMPRESSED, {"symmetric": True}),
    ],
    ids=["awq", "gptq", "gptq-8-bit", "gptq-3-bit-symmetric", "compressed-tensors"],
)
def test_converted_checkpoints_compute_what_their_values_do(
    method: str, record: dict[str, Any], options: dict[str, Any], files: int, tmp_path: Path, tokenizer: Any
) -> None:
    expected = logits(foreign_checkpoint(tmp_path / "foreign", method, record, files, **options))
    tokenizer.save_pretrained(tmp_path / "foreign")
    report = convert_foreign_checkpoint(tmp_path / "foreign", tmp_path / "mlx")
    assert report.lossless
    assert report.dtype == (torch.float16 if options.get("symmetric") else torch.float32)
    assert len(list((tmp_path / "mlx").glob("*.safetensors"))) == files
    assert_close(logits(load_checkpoint(tmp_path / "mlx", dtype=torch.float32)), expected, 1e-4)
    assert_close(mlx_logits(tmp_path / "mlx", torch.float32), expected, 1e-4)


@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
@pytest.mark.parametrize("method, record", [("awq", AWQ), ("gptq", GPTQ), ("compressed_tensors", COMPRESSED)])
def test_experts_are_stacked(
    method: str, record: dict[str, Any], family: str, files: int, tmp_path: Path, tokenizer: Any
) -> None:
    """Each expert has layers of its own in such checkpoints, whose tensors may be in different files."""
    source = tmp_path / "foreign"
    expected = logits(foreign_checkpoint(source, method, record, files, tiny_moe(family), group_size=32))
    tokenizer.save_pretrained(source)
    report = convert_foreign_checkpoint(source, tmp_path / "mlx")
    assert report.lossless
    block = {"mixtral": "block_sparse_moe", "qwen3_moe": "mlp"}[family]
    assert f"model.layers.1.{block}.switch_mlp.down_proj" in report.formats
    assert not [path for path in report.formats if ".experts." in path]
    loaded = load_checkpoint(tmp_path / "mlx", dtype=torch.float32)
    assert type(loaded.model.layers[0].mlp.experts.down_proj) is qm.QuantizedSwitchLinear
    assert_close(logits(loaded), expected, 1e-4)
    assert_close(mlx_logits(tmp_path / "mlx", torch.float32), expected, 1e-4)


def test_float16_is_what_mlx_lm_makes_of_awq(tmp_path: Path, tokenizer: Any) -> None:
    foreign_checkpoint(tmp_path / "awq", "awq", AWQ)
    tokenizer.save_pretrained(tmp_path / "awq")
    report = convert_foreign_checkpoint(tmp_path / "awq", tmp_path / "mlx", dtype=torch.float16)
    assert 0 < report.rounding < 2**-7
    assert not report.lossless
    theirs = mlx_logits(tmp_path / "awq", torch.float32)
    assert_close(logits(load_checkpoint(tmp_path / "mlx", dtype=torch.float32)), theirs, 1e-4)
    dtypes = {tensor.dtype for tensor in load_file(tmp_path / "mlx" / "model.safetensors").values()}
    assert dtypes == {torch.float16, torch.uint32}


def test_act_order_is_refused_or_quantized_anew(tmp_path: Path) -> None:
    model = foreign_checkpoint(tmp_path / "gptq", "gptq", {**GPTQ, "desc_act": True}, act_order=True)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.down_proj: act-order .* cannot express; requantize="):
        convert_foreign_checkpoint(tmp_path / "gptq", tmp_path / "mlx")
    assert contents(tmp_path / "mlx") == {}
    report = convert_foreign_checkpoint(tmp_path / "gptq", tmp_path / "mlx", requantize={"bits": 8, "group_size": 32})
    loaded = load_checkpoint(tmp_path / "mlx")
    assert len(report.requantized) == 14
    for path, error in report.requantized.items():
        module, values = loaded.get_submodule(path), model.get_submodule(path).weight.detach().double()
        anew = dequantized(ConvertedLinear(module.weight_packed, module.scales, module.biases, 32, 8, None))
        assert error == pytest.approx(float((anew - values).norm() / values.norm()), rel=0.01)
        assert error < 5e-3
    assert not report.lossless


def test_act_order_of_some_layers_leaves_the_others_as_they_are(tmp_path: Path) -> None:
    foreign_checkpoint(tmp_path / "gptq", "gptq", GPTQ, symmetric=True)
    name = "model.layers.1.mlp.up_proj"
    shuffled = Codes(256, 128, 64, act_order=True).gptq()
    edit_tensors(tmp_path / "gptq", lambda t: t.update({f"{name}.{key}": each for key, each in shuffled.items()}), "pt")
    report = convert_foreign_checkpoint(tmp_path / "gptq", tmp_path / "mlx", torch.float32, {"bits": 6})
    assert list(report.requantized) == [name]
    assert report.rounding == 0
    record = json.loads((tmp_path / "mlx" / "config.json").read_text())["quantization"]
    affine = {"group_size": 64, "mode": "affine"}
    assert record == {**affine, "bits": 4, name: {**affine, "bits": 6}}
    assert load_checkpoint(tmp_path / "mlx").get_submodule(name).bits == 6


def test_zero_biases_of_layers_that_have_none_are_left_out(tmp_path: Path) -> None:
    expected = logits(foreign_checkpoint(tmp_path / "gptq", "gptq", GPTQ))
    names = (f"model.layers.{i}.mlp.{name}.bias" for i in range(2) for name in ("gate_proj", "up_proj"))
    superfluous = {name: torch.zeros(256, dtype=torch.float16) for name in names}
    edit_tensors(tmp_path / "gptq", lambda tensors: tensors.update(superfluous), "pt")
    convert_foreign_checkpoint(tmp_path / "gptq", tmp_path / "mlx")
    assert not superfluous.keys() & load_file(tmp_path / "mlx" / "model.safetensors").keys()
    assert_close(logits(load_checkpoint(tmp_path / "mlx")), expected)


def test_old_records_beside_config_json(tmp_path: Path) -> None:
    expected = logits(foreign_checkpoint(tmp_path / "gptq", "gptq", GPTQ))
    edit_config(tmp_path / "gptq", lambda config: config.pop("quantization_config"))
    (tmp_path / "gptq" / "quantize_config.json").write_text('{"bits": 4, "group_size": 64, "desc_act": false}')
    (tmp_path / "gptq" / "model.safetensors").rename(tmp_path / "gptq" / "gptq_model-4bit-64g.safetensors")
    (tmp_path / "gptq" / "modeling.py").write_text("raise SystemExit")
    (tmp_path / "gptq" / "vocab.txt").write_text("words")
    convert_foreign_checkpoint(tmp_path / "gptq", tmp_path / "mlx")
    assert_close(logits(load_checkpoint(tmp_path / "mlx")), expected)
    names = {"config.json", "model.safetensors", "model.safetensors.index.json", "vocab.txt"}
    assert contents(tmp_path / "mlx").keys() == names


EXPERTS = "model.layers.1.mlp.experts"


def test_experts_in_floating_point_are_stacked_too(tmp_path: Path) -> None:
    """As of a method that was told to leave layers alone."""
    model = foreign_checkpoint(tmp_path / "awq", "awq", AWQ, model=tiny_moe("qwen3_moe"), group_size=32)
    expected = logits(model)
    values = model.model.layers[1].mlp.experts.down_proj.detach()

    def edit(tensors: dict[str, Tensor]) -> None:
        for expert, matrix in enumerate(values):
            for name in ("qweight", "qzeros", "scales"):
                del tensors[f"{EXPERTS}.{expert}.down_proj.{name}"]
            tensors[f"{EXPERTS}.{expert}.down_proj.weight"] = matrix.clone()

    edit_tensors(tmp_path / "awq", edit, "pt")
    report = convert_foreign_checkpoint(tmp_path / "awq", tmp_path / "mlx")
    assert {path for path in report.formats if "layers.1.mlp" in path} == {
        "model.layers.1.mlp.switch_mlp.gate_proj",
        "model.layers.1.mlp.switch_mlp.up_proj",
    }
    assert_close(logits(load_checkpoint(tmp_path / "mlx", dtype=torch.float32)), expected, 1e-4)


def rename_projections(tensors: dict[str, Tensor]) -> None:
    for name in [name for name in tensors if ".experts." in name]:
        tensors[name.replace("gate_proj", "linear")] = tensors.pop(name)


@pytest.mark.parametrize(
    "edit, message",
    [
        (
            lambda t: [t.pop(name) for name in list(t) if name.startswith(f"{EXPERTS}.2.up_proj.")],
            r"layers\.1\.mlp\.switch_mlp\.up_proj: experts are missing: 2$",
        ),
        (
            lambda t: [
                [t.pop(name) for name in list(t) if name.startswith(f"{EXPERTS}.2.up_proj.")],
                t.update({f"{EXPERTS}.2.up_proj.weight": torch.zeros(64, 128)}),
            ],
            rf"switch_mlp\.up_proj: experts that are not quantized are among others.*: {EXPERTS}\.2\.up_proj",
        ),
        (
            lambda t: t.update({f"{EXPERTS}.2.up_proj.{n}": v for n, v in Codes(64, 128, 64, seed=9).awq().items()}),
            r"switch_mlp\.up_proj: the experts have different formats or shapes, .*'group_size': 32.*'group_size': 64",
        ),
        (
            lambda t: [t.pop(name) for name in list(t) if name.startswith(f"{EXPERTS}.3.")],
            r"would not load: wrong tensors: model\.layers\.1\.mlp\.experts\.gate_proj\.weight is uint32 \[3, 64, 16\]",
        ),
        (rename_projections, r"would not load: missing tensors: .*experts\..*; unexpected tensors: "),
        (lambda t: t.update(extra=torch.zeros(1)), "would not load: unexpected tensors: extra"),
    ],
)
def test_what_would_not_load_is_refused(edit: Callable[[dict[str, Tensor]], Any], message: str, tmp_path: Path) -> None:
    foreign_checkpoint(tmp_path / "awq", "awq", AWQ, model=tiny_moe("qwen3_moe"), group_size=32)
    edit_tensors(tmp_path / "awq", edit, "pt")
    with pytest.raises(ValueError, match=rf"^\[convert_foreign_checkpoint\] .*{message}"):
        convert_foreign_checkpoint(tmp_path / "awq", tmp_path / "mlx")
    assert not (tmp_path / "mlx").exists()


# --- Errors of checkpoints --------------------------------------------------------------------------------------------


LAYER = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    "record, change, message",
    [
        (
            {"quant_method": "bitsandbytes"},
            {},
            "quantized by 'bitsandbytes'; supported are awq, gptq, compressed-tensors",
        ),
        ({"version": "gemv"}, {}, "awq in the variant 'gemv'; supported are gemm"),
        ({"quant_method": "gptq", "checkpoint_format": "marlin"}, {}, "variant 'marlin'; supported are gptq, gptq_v2"),
        ({"bits": 8}, {}, "awq with 8 bits"),
        ({}, {f"{LAYER}.scales": None}, f"{LAYER}: {LAYER}.scales is missing"),
        ({}, {f"{LAYER}.qzeros": torch.zeros(1)}, f"{LAYER}: qzeros is torch.float32"),
        ({}, {f"{LAYER}.scales": torch.full((2, 256), torch.inf)}, f"{LAYER}: some scales are infinite or NaN"),
        ({}, {f"{LAYER}.input_scale": torch.zeros(1)}, f"{LAYER}.input_scale is not known in a layer of awq"),
    ],
)
def test_faulty_checkpoints_are_refused(
    record: dict[str, Any], change: dict[str, Tensor | None], message: str, tmp_path: Path
) -> None:
    foreign_checkpoint(tmp_path / "awq", "awq", {**AWQ, **record})
    tensors = {**load_file(tmp_path / "awq" / "model.safetensors"), **change}
    present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(present, tmp_path / "awq" / "model.safetensors")
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx" / "model.safetensors").write_text("an older one")
    with pytest.raises(ValueError, match=re.escape(message)):
        convert_foreign_checkpoint(tmp_path / "awq", tmp_path / "mlx")
    assert contents(tmp_path / "mlx") == {"model.safetensors": b"an older one"}


def test_faulty_files_are_refused(tmp_path: Path) -> None:
    source = tmp_path / "awq"

    def refused(error: type[Exception], message: str, target: Path = tmp_path / "mlx") -> None:
        with pytest.raises(error, match=message):
            convert_foreign_checkpoint(source, target)

    refused(FileNotFoundError, r"has no config\.json")
    foreign_checkpoint(source, "awq", AWQ)
    refused(ValueError, "the same directory", source)
    whole = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    refused(ValueError, r"model\.safetensors cannot be read")
    (source / "model.safetensors").unlink()
    (source / "pytorch_model.bin").write_bytes(b"a pickle")
    refused(FileNotFoundError, r"has no \*\.safetensors")
    (source / "config.json").write_text("{")
    refused(ValueError, r"config\.json is not JSON")
    (source / "config.json").write_text('{"model_type": "llama"}')
    refused(ValueError, "is not quantized; supported are")


def test_interrupted_conversion_leaves_the_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    foreign_checkpoint(tmp_path / "awq", "awq", AWQ, files=2)
    convert_foreign_checkpoint(tmp_path / "awq", tmp_path / "mlx")
    before = contents(tmp_path / "mlx")
    written = fill_disk(monkeypatch)
    with pytest.raises(OSError, match="No space left"):
        convert_foreign_checkpoint(tmp_path / "awq", tmp_path / "mlx", dtype=torch.bfloat16)
    assert len(written) == 2
    assert contents(tmp_path / "mlx") == before
