"""Transformers after `patch_transformers()`: MLX checkpoints in and out, MetalConfig on the CPU, and a real model."""

from __future__ import annotations

import copy
import importlib.util
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MetalConfig, modeling_utils

import oracle
import quantization_mlx as qm
import tiny
from cases import SOME_FORMATS
from covering import mostly_exhaustive
from oracle import name_of
from process import printed
from quantization_mlx import QuantizedLinear, patch_transformers, quantize_model, save_checkpoint, unpatch_transformers
from quantization_mlx.hf.metal_config import metal_to_mlx, mlx_to_metal
from quantization_mlx.hf.patch import patched_transformers
from quantization_mlx.hf.quantizer import MLXConfig
from repository import load_demo
from tiny import TOKENS, assert_close, contents, edit_config, edit_tensors, logits, mlx_logits, tiny_model, wrapper

LAYER, PROJECTION = "model.layers.1.self_attn.q_proj", "model.layers.0.mlp.up_proj"


@pytest.fixture(autouse=True)
def patched() -> Iterator[None]:
    patch_transformers()
    yield
    unpatch_transformers()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A tied model in four bits, on one file."""
    quantize_model(tiny_model(tie_word_embeddings=True)).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def load(directory: Path, **options: Any) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(directory, **options)


# --- The patch --------------------------------------------------------------------------------------------------------


def patched_attributes() -> list[Any]:
    metal = importlib.import_module("transformers.integrations.metal_quantization")
    quantizer = importlib.import_module("transformers.quantizers.quantizer_metal").MetalHfQuantizer
    auto = importlib.import_module("transformers.quantizers.auto")
    return [
        modeling_utils.get_hf_quantizer,
        modeling_utils._get_resolved_checkpoint_files,
        modeling_utils.PreTrainedModel.save_pretrained,
        metal._metal_kernel,
        quantizer.validate_environment,
        quantizer.update_device_map,
        dict(auto.AUTO_QUANTIZER_MAPPING),
        dict(auto.AUTO_QUANTIZATION_CONFIG_MAPPING),
    ]


def test_patching_is_idempotent_and_reversible(saved: Path) -> None:
    changed = patched_attributes()
    patch_transformers()
    assert patched_attributes() == changed
    unpatch_transformers()
    original = patched_attributes()
    assert not any(now == then for now, then in zip(original, changed, strict=True))
    with pytest.raises(ValueError, match="quant_method"):
        load(saved)
    unpatch_transformers()
    assert patched_attributes() == original
    with patched_transformers(), patched_transformers():
        assert type(load(saved).lm_head) is QuantizedLinear
        patch_transformers()
    assert type(load(saved).lm_head) is QuantizedLinear  # the call holds beyond the context
    unpatch_transformers()
    assert patched_attributes() == original


def test_load_checkpoint_patches_for_itself_alone(saved: Path) -> None:
    unpatch_transformers()
    original = patched_attributes()
    model = qm.load_checkpoint(saved)
    assert patched_attributes() == original
    with pytest.raises(ValueError, match="mlx and is not serializable"):
        model.save_pretrained(saved)


# --- There and back ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", SOME_FORMATS, ids=name_of)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_there_and_back(tied: bool, format: oracle.Format, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """quantize_model, save_pretrained, from_pretrained, save_pretrained in shards; mlx-lm computes the same."""
    model = quantize_model(tiny_model(tie_word_embeddings=tied), **format.options)
    model.save_pretrained(tmp_path / "first")
    loaded = load(tmp_path / "first")
    assert torch.equal(logits(loaded), logits(model))
    head, table = loaded.lm_head, loaded.model.embed_tokens
    for name in ("weight", "scales", "biases"):
        assert tied == (getattr(head, name) is getattr(table, name)) or format.mode != "affine"
    frozen = [module for module in loaded.modules() if isinstance(module, (QuantizedLinear, qm.QuantizedEmbedding))]
    assert len(frozen) == 2 * 7 + 2
    assert not any(parameter.requires_grad for module in frozen for parameter in module.parameters())
    loaded.save_pretrained(tmp_path / "second", max_shard_size="40KB")
    assert len(list((tmp_path / "second").glob("*.safetensors"))) > 1
    assert torch.equal(logits(load(tmp_path / "second")), logits(model))
    request.getfixturevalue("tokenizer").save_pretrained(tmp_path / "second")
    assert_close(logits(loaded), mlx_logits(tmp_path / "second", torch.float32))


def test_what_from_pretrained_takes(saved: Path) -> None:
    model = load(saved, dtype=torch.bfloat16, device_map="cpu", attn_implementation="eager")
    assert model.dtype == model.lm_head.scales.dtype == torch.bfloat16
    assert (model.is_quantized, model.quantization_method, model.training) == (True, "mlx", False)
    assert isinstance(model.config.quantization_config, MLXConfig)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@torch.no_grad()
def test_model_without_head(tied: bool, tmp_path: Path) -> None:
    model = quantize_model(tiny_model(tie_word_embeddings=tied))
    model.save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path)
    assert type(base.layers[0].mlp.up_proj) is QuantizedLinear
    assert torch.equal(base(TOKENS).last_hidden_state, model.model(TOKENS).last_hidden_state)


def test_config_names_layers_that_differ(tmp_path: Path) -> None:
    def predicate(path: str, layer: nn.Module) -> bool | dict[str, Any]:
        return "o_proj" not in path and ({"bits": 8, "group_size": 32} if "down_proj" in path else True)

    model = quantize_model(tiny_model(), predicate=predicate)
    model.save_pretrained(tmp_path)
    edit_config(tmp_path, lambda config: config["quantization"].update({"model.layers.0.self_attn.o_proj": False}))
    loaded = load(tmp_path)
    assert type(loaded.model.layers[0].self_attn.o_proj) is nn.Linear
    assert loaded.model.layers[1].mlp.down_proj.bits == 8
    assert torch.equal(logits(loaded), logits(model))


def test_mlx_config_quantizes_a_float_checkpoint(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    model = load(tmp_path, quantization_config=MLXConfig(bits=3, group_size=32, **{"lm_head": False}))
    assert type(model.lm_head) is nn.Linear
    expected = quantize_model(tiny_model(), bits=3, group_size=32, predicate=lambda path, _: path != "lm_head")
    assert torch.equal(logits(model), logits(expected))


def renamed(directory: Path, rename: Callable[[str], str]) -> None:
    tensors = load_file(directory / "model.safetensors")
    save_file({rename(name): tensor.clone() for name, tensor in tensors.items()}, directory / "model.safetensors")


@pytest.mark.parametrize(
    "rename",
    [lambda name: name.removeprefix("model."), lambda name: f"language_model.{name}"],
    ids=["without model", "with language_model"],
)
def test_prefixes_of_names(rename: Callable[[str], str], saved: Path) -> None:
    expected = logits(load(saved))
    renamed(saved, rename)
    edit_config(saved, lambda config: config["quantization"].update({rename(LAYER): {"bits": 4, "group_size": 64}}))
    model = load(saved)
    assert torch.equal(logits(model), expected)
    model.save_pretrained(saved)
    assert "model.embed_tokens.scales" in load_file(saved / "model.safetensors")


def test_tied_weights_that_are_stored_twice(saved: Path) -> None:
    expected = logits(load(saved))
    twice = {part: f"model.embed_tokens.{part}" for part in ("weight", "scales", "biases")}
    edit_tensors(saved, lambda t: t.update({f"lm_head.{part}": t[name].clone() for part, name in twice.items()}))
    model = load(saved)
    assert torch.equal(logits(model), expected)
    assert model.lm_head.scales is model.model.embed_tokens.scales


def test_repository_of_the_hub_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """All weight files of the snapshot count, and the index, which names others, does not."""
    model = quantize_model(tiny_model())
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--some--model"
    snapshot = repository / "snapshots" / commit
    model.save_pretrained(snapshot, max_shard_size="40KB")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    (snapshot / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001-of-00099.safetensors"}}')
    loaded = load("some/model", cache_dir=tmp_path, local_files_only=True)
    assert torch.equal(logits(loaded), logits(model))


# --- One part of a model ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", tiny.WRAPPERS)
def test_the_class_of_a_part_loads_rightly_or_raises(name: str, tmp_path: Path) -> None:
    """The record of formats is the whole model's, and config.json has it beside the part that the class reads."""
    model, text = wrapper(name)
    save_checkpoint(quantize_model(model), tmp_path)
    assert {"quantization", "quantization_config"} <= json.loads((tmp_path / "config.json").read_text()).keys()
    if name == "qwen3_5":  # whose class of the text knows the names of the whole
        assert torch.equal(logits(text.from_pretrained(tmp_path)), logits(model))
    else:
        with pytest.raises(ValueError, match=r"\[from_pretrained\] .*(missing|unexpected) tensors: "):
            text.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["gemma3", "gemma4", "mistral3"])
def test_the_text_that_mlx_lm_keeps_of_a_model(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Converted by mlx-lm, which drops the vision and keeps the config of the whole."""
    from mlx_lm.convert import convert

    model, text = wrapper(name)
    model.save_pretrained(tmp_path / "dense")
    edit_config(tmp_path / "dense", lambda config: config.update(vocab_size=tiny.VOCABULARY))
    request.getfixturevalue("tokenizer").save_pretrained(tmp_path / "dense")
    convert(str(tmp_path / "dense"), str(tmp_path / "mlx"), quantize=True)
    loaded = text.from_pretrained(tmp_path / "mlx")
    assert type(loaded.model.layers[0].mlp.up_proj) is QuantizedLinear
    assert_close(logits(loaded), tiny.mlx_logits_of_tokens(tmp_path / "mlx"))


def test_a_config_without_the_record_is_refused(saved: Path) -> None:
    config = tiny_model(tie_word_embeddings=True).config
    with pytest.raises(ValueError, match=r"config\.json of .* says that the weights are quantized, which the config"):
        load(saved, config=config)
    expected = logits(load(saved))
    assert torch.equal(logits(load(saved, config=transformers.AutoConfig.from_pretrained(saved))), expected)


# --- Memory -----------------------------------------------------------------------------------------------------------

MEASURE = """
import sys, threading, time
import torch
from transformers import AutoModelForCausalLM
from transformers.models.llama import modeling_llama  # otherwise imported by from_pretrained
import quantization_mlx

def anonymous() -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))

quantization_mlx.patch_transformers()
before, peak, done = anonymous(), 0, threading.Event()

def sample() -> None:
    global peak
    while not done.is_set():
        peak = max(peak, anonymous())
        time.sleep(0.005)

thread = threading.Thread(target=sample)
thread.start()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=getattr(torch, sys.argv[2]))
with torch.inference_mode():
    logits = model(torch.arange(8)[None]).logits
done.set()
thread.join()
assert logits.isfinite().all()
print(peak - before)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Half a gigabyte of random words in four bits, each layer of the model in a file of its own."""
    directory = tmp_path_factory.mktemp("large")
    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 13, "vocab_size": 32_000}
    config = LlamaConfig(**sizes, num_attention_heads=16, num_key_value_heads=16, tie_word_embeddings=True)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    shards: dict[str, dict[str, Tensor]] = {}
    for name, shape in shapes.items():
        if name.startswith("lm_head."):
            continue
        shard = shards.setdefault(name.partition("layers.")[2].partition(".")[0], {})
        if len(shape) == 1:
            shard[name] = torch.ones(shape, dtype=torch.bfloat16)
            continue
        rows, columns = shape
        path = name.removesuffix(".weight")
        shard[name] = torch.randint(-(2**31), 2**31, (rows, columns // 8), dtype=torch.int32).view(torch.uint32)
        shard[f"{path}.scales"] = torch.full((rows, columns // 64), 0.01, dtype=torch.bfloat16)
        shard[f"{path}.biases"] = torch.full((rows, columns // 64), -0.075, dtype=torch.bfloat16)
    for index, shard in enumerate(shards.values()):
        save_file(shard, directory / f"model-{index:05d}-of-{len(shards):05d}.safetensors", metadata={"format": "mlx"})
    record = {"group_size": 64, "bits": 4}
    text = json.dumps({**config.to_dict(), "quantization": record, "quantization_config": record})
    (directory / "config.json").write_text(text)
    return directory


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_peak_memory_of_loading(dtype: str, large: Path) -> None:
    size = sum(file.stat().st_size for file in large.glob("*.safetensors"))
    assert size >= 500e6
    assert int(printed("-c", MEASURE, large, dtype)) <= 1.2 * size


# --- Damaged checkpoints ----------------------------------------------------------------------------------------------


def truncate(directory: Path) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def tensors(edit: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    return lambda directory: edit_tensors(directory, edit)


def config(edit: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    return lambda directory: edit_config(directory, edit)


def spoil(name: str, value: float) -> Callable[[Path], None]:
    return tensors(lambda t: t[name][1, 0].fill_(value))


def reshape(name: str) -> Callable[[Path], None]:
    return tensors(lambda t: t.update({name: t[name][:, :-1].clone()}))


def point_outside(directory: Path) -> None:
    """The weights outside of the directory, and an index that leads to them."""
    (directory / "model.safetensors").rename(directory.parent / "outside.safetensors")
    weight_map = dict.fromkeys(load_file(directory.parent / "outside.safetensors"), "../outside.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


NAMED = {LAYER: {"bits": 4, "group_size": 64}}
NO_SCALES = tensors(lambda t: t.pop(f"{LAYER}.scales"))
FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (truncate, r"model\.safetensors is damaged"),
    "missing scales": (NO_SCALES, rf"unexpected tensors: {LAYER}\.biases"),
    "missing scales of a named layer": (
        lambda directory: [config(lambda c: c["quantization"].update(NAMED))(directory), NO_SCALES(directory)],
        rf"missing tensors: {LAYER}\.scales$",
    ),
    "missing layer": (tensors(lambda t: t.pop(f"{PROJECTION}.weight")), rf"missing tensors: {re.escape(PROJECTION)}"),
    "wrong shape": (reshape(f"{LAYER}.weight"), rf"wrong tensors: {LAYER}\.weight is uint32 \[128, 15\]"),
    "wrong shape of scales": (
        reshape(f"{LAYER}.scales"),  # they tell of groups of 128, of which the biases know nothing
        rf"wrong tensors: {LAYER}\.biases is float32 \[128, 2\] and should be float32 \[128, 1\]",
    ),
    "wrong shape of the norm": (
        tensors(lambda t: t.update({"model.norm.weight": torch.ones(5)})),
        r"model\.norm\.weight is float32 \[5\] and should be float32 \[128\]",
    ),
    "unknown tensor": (tensors(lambda t: t.update(extra=torch.ones(1))), "unexpected tensors: extra"),
    "a tensor under two names": (
        tensors(lambda t: t.update({"norm.weight": torch.ones(128)})),
        r"under several names: model\.norm\.weight",
    ),
    "unknown mode": (config(lambda c: c["quantization"].update(mode="int4")), "mode 'int4' is not supported"),
    "unknown bits of a layer": (
        config(lambda c: c["quantization"].update({LAYER: {"bits": 7}})),
        "bits 7 is not supported",
    ),
    "NaN scales": (spoil(f"{LAYER}.scales", torch.nan), rf"{LAYER}\.scales has values that are not finite"),
    "infinite biases": (spoil(f"{LAYER}.biases", torch.inf), rf"{LAYER}\.biases has values that are not finite"),
    "quantized activations": (config(lambda c: c.update(quantize_activations=True)), "quantized activations"),
    "no JSON": (lambda directory: (directory / "config.json").write_text("{"), "not JSON|not a valid JSON"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_damaged_checkpoints_are_refused(fault: str, saved: Path) -> None:
    damage, message = FAULTS[fault]
    damage(saved)
    with pytest.raises((ValueError, OSError), match=message):
        load(saved)


def test_the_index_leads_nowhere(saved: Path) -> None:
    point_outside(saved)
    with pytest.raises(FileNotFoundError, match=r"has no model\*\.safetensors"):
        load(saved)


@pytest.mark.parametrize("mode, byte", [("mxfp4", 255), ("mxfp8", 255), ("nvfp4", 127), ("nvfp4", 255)])
def test_bytes_that_are_no_scales_are_refused(mode: str, byte: int, tmp_path: Path) -> None:
    quantize_model(tiny_model(), mode=mode).save_pretrained(tmp_path)
    load(tmp_path)
    spoil(f"{LAYER}.scales", byte)(tmp_path)
    with pytest.raises(ValueError, match=rf"{LAYER}\.scales has values that are not finite"):
        load(tmp_path)


def test_words_at_odd_addresses(tmp_path: Path) -> None:
    """Files may put a tensor anywhere; the kernels get aligned ones."""
    model = quantize_model(tiny_model(vocab_size=95, hidden_size=96), mode="mxfp4")
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(misaligned({name: tensor.clone() for name, tensor in load_file(file).items()}))
    loaded = load(tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert all(parameter.data_ptr() % parameter.element_size() == 0 for parameter in loaded.parameters())


def misaligned(tensors: dict[str, Tensor]) -> bytes:
    """A safetensors file with one byte too many before each tensor's words."""
    kinds = {torch.uint32: "U32", torch.uint8: "U8", torch.float32: "F32"}
    header, data = {"odd.rotary_emb.inv_freq": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}, b"\0"
    for name, tensor in tensors.items():
        raw = tensor.contiguous().view(torch.uint8).numpy().tobytes()
        offsets = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": kinds[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        data += raw
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data


def test_interrupted_save_leaves_the_old_checkpoint(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(saved)
    model = quantize_model(tiny_model(), bits=8)

    def fail(tensors: dict[str, Tensor], file: Path, metadata: dict[str, str]) -> None:
        Path(file).write_bytes(b"half of a")
        raise KeyboardInterrupt

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(KeyboardInterrupt):
        model.save_pretrained(saved)
    assert contents(saved) == before


# --- MetalConfig ------------------------------------------------------------------------------------------------------

BATCH = torch.cat((TOKENS, TOKENS.flip(-1), TOKENS.roll(3)))


def metal_model(directory: Path, bits: int, tied: bool, **options: Any) -> nn.Module:
    """Quantized by Transformers on the fly; where it sees a GPU, it would put the model there."""
    tiny_model(tie_word_embeddings=tied, attention_bias=True, hidden_size=256).save_pretrained(directory / "dense")
    config = MetalConfig(bits=bits, group_size=64)
    return load(directory / "dense", quantization_config=config, device_map="cpu", **options)


@torch.no_grad()
def reference(model: nn.Module, quantized: type, offsets: str) -> Tensor:
    """Logits of the batch from float64 copies of the layers' exact weights, one row of the batch after the other."""
    dense = copy.deepcopy(model)
    for path, layer in model.named_modules():
        if type(layer) is quantized:
            format = oracle.Format("affine", layer.group_size, layer.bits)
            linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
            values = oracle.dequantize(layer.weight, layer.scales, getattr(layer, offsets), format)
            linear.weight, linear.bias = nn.Parameter(values), copy.deepcopy(layer.bias)
            dense.set_submodule(path, linear)
    dense = dense.double()
    return torch.cat([dense(row[None]).logits for row in BATCH])


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_metal_config_runs_on_the_cpu(bits: int, tmp_path: Path) -> None:
    linear = importlib.import_module("transformers.integrations.metal_quantization").MetalLinear
    model = metal_model(tmp_path, bits, tied=False)
    assert sum(type(module) is linear for module in model.modules()) == 2 * 7
    expected = reference(model, linear, "qbiases")
    with torch.no_grad():
        assert_close(model(BATCH).logits, expected)
    model.save_pretrained(tmp_path / "metal")
    loaded = load(tmp_path / "metal", device_map="cpu")
    assert sum(type(module) is linear for module in loaded.modules()) == 2 * 7
    with torch.no_grad():
        assert_close(loaded(BATCH).logits, expected)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_metal_linear_on_every_device(bits: int, device: str) -> None:
    """The kernel under the patch, on the CPU and on MPS, with a batch."""
    metal = importlib.import_module("transformers.integrations.metal_quantization")
    layer = metal.MetalLinear(128, 24, bits=bits, group_size=32)
    parts = metal._affine_quantize_tensor(oracle.random_x(24, 128), 32, bits)
    layer.weight.data, layer.scales.data, layer.qbiases.data = parts
    matrix = oracle.dequantize(*parts, oracle.Format("affine", 32, bits)).T
    x = oracle.random_x(3, 5, 128)
    oracle.assert_product(layer.to(device)(x.to(device)), x, matrix, torch.float32)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_metal_checkpoints_become_mlx_ones(tied: bool, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    model = metal_model(tmp_path, 4, tied)
    expected = logits(model)
    metal_to_mlx(model).save_pretrained(tmp_path / "mlx")
    assert_close(logits(load(tmp_path / "mlx")), expected)
    request.getfixturevalue("tokenizer").save_pretrained(tmp_path / "mlx")
    assert_close(mlx_logits(tmp_path / "mlx", torch.float32), expected)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("bits", [2, 8])
def test_mlx_checkpoints_become_metal_ones(bits: int, tied: bool, tmp_path: Path) -> None:
    linear = importlib.import_module("transformers.integrations.metal_quantization").MetalLinear
    model = quantize_model(tiny_model(tie_word_embeddings=tied, attention_bias=True), bits=bits)
    model.save_pretrained(tmp_path / "mlx")
    expected = logits(model)
    mlx_to_metal(load(tmp_path / "mlx")).save_pretrained(tmp_path / "metal")
    stored = json.loads((tmp_path / "metal" / "config.json").read_text())
    assert stored["quantization_config"]["quant_method"] == "metal"
    assert "quantization" not in stored
    loaded = load(tmp_path / "metal", device_map="cpu")
    assert sum(type(module) is linear for module in loaded.modules()) == 2 * 7 + (not tied)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert_close(logits(loaded), expected)
    again = metal_to_mlx(loaded)
    for path, layer in load(tmp_path / "mlx").named_modules():
        if type(layer) is QuantizedLinear and "proj" in path:
            for name in ("weight", "scales", "biases"):
                oracle.assert_identical(getattr(again.get_submodule(path), name), getattr(layer, name), path)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"bits": 3}, "'affine' with 3 bits is not supported by MetalConfig"),
        ({"mode": "mxfp4"}, "'mxfp4' with 4 bits is not supported"),
        ({"predicate": lambda path, _: {"bits": 8 if "down" in path else 4}}, "linear layers of one format"),
        ({"predicate": lambda path, _: False}, "linear layers of one format"),
    ],
)
def test_what_metal_config_cannot_have_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mlx_to_metal(quantize_model(tiny_model(), **options))
    with pytest.raises(ValueError, match="no quantized layers of MetalConfig"):
        metal_to_mlx(tiny_model())


# --- A real model -----------------------------------------------------------------------------------------------------

REAL_FORMATS = {
    **{f"{bits} bits": {"q_bits": bits} for bits in (1, 2, 3, 4, 5, 6, 8)},
    **{mode: {"q_mode": mode} for mode in ("mxfp4", "mxfp8", "nvfp4")},
}
NEW_TOKENS = 64


@pytest.fixture(scope="module")
def smollm(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A checkpoint in bfloat16 of the model that the demo takes, and its tokenizer."""
    directory = tmp_path_factory.mktemp("smollm")
    tokenizer, model = load_demo().load_gguf()
    # Not Transformers' save_pretrained: mlx-lm does not know its way to write the base of the rotary frequencies.
    save_checkpoint(model.to(torch.bfloat16), directory, tokenizer)
    return directory, tokenizer


@pytest.mark.xdist_group("real model")
@pytest.mark.parametrize("format", mostly_exhaustive(REAL_FORMATS, "4 bits"))
def test_real_model_is_that_of_mlx_lm(format: str, smollm: tuple[Path, Any], tmp_path: Path) -> None:
    """Converted by mlx-lm, loaded and saved here, loaded by mlx-lm: the same tensors, logits and greedy text."""
    from mlx_lm import load as mlx_load
    from mlx_lm.convert import convert
    from mlx_lm.utils import dequantize_model

    mx = oracle.mlx()
    dense, tokenizer = smollm
    convert(str(dense), str(tmp_path / "theirs"), quantize=True, **REAL_FORMATS[format])
    model = load(tmp_path / "theirs", dtype=torch.float32)
    model.save_pretrained(tmp_path / "ours")
    tokenizer.save_pretrained(tmp_path / "ours")
    theirs, ours = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "ours"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor.to(ours[name].dtype)) for name, tensor in theirs.items())
    if format == "1 bits":
        return  # what is left of this model amplifies rounding: torch in float32 is 1e-3 from torch in float64

    prompt = tokenizer("The lighthouse keeper wrote in his diary that", return_tensors="pt").input_ids
    tokens = model.generate(prompt, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False)
    with torch.no_grad():
        logits = model(tokens).logits[0]

    reference, _ = mlx_load(str(tmp_path / "ours"))

    def mlx_run(tokens: Tensor) -> Tensor:
        reference.set_dtype(mx.float32)
        rows = reference.model.embed_tokens(oracle.to_mlx(tokens)).astype(mx.float32)
        return oracle.from_mlx(reference(oracle.to_mlx(tokens), input_embeddings=rows))[0]

    assert_close(logits[: prompt.shape[1]], mlx_run(prompt), 1e-4)
    # All tokens go through the weights that mlx-lm dequantizes, in a tenth of the time on a CPU.
    reference = dequantize_model(reference)
    expected = mlx_run(tokens)
    assert_close(logits, expected, 1e-4)
    difference = (logits - expected).abs().max()
    last = prompt.shape[1] - 1
    best, second = expected[last:-1].topk(2).values.T
    differs = expected[last:-1].argmax(-1) != tokens[0, last + 1 :]
    first = int(differs.float().argmax()) if differs.any() else None
    assert first is None or best[first] - second[first] <= 2 * difference
