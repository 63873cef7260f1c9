"""Checkpoints of AWQ, GPTQ and compressed-tensors, packed by the formats' descriptions, one value at a time."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from tiny import tiny_model

AWQ_FIELDS = (0, 2, 4, 6, 1, 3, 5, 7)
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm", "zero_point": True}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": False, "sym": False}
COMPRESSED = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}}


class Codes:
    """A layer [rows, columns] as integers: codes, the zero and the scale of each group, and the group of each input."""

    def __init__(
        self,
        rows: int = 64,
        columns: int = 256,
        group_size: int = 128,
        bits: int = 4,
        symmetric: bool = False,
        act_order: bool = False,
        dtype: torch.dtype = torch.float16,
        seed: int = 0,
    ) -> None:
        random = np.random.default_rng(seed)
        self.bits = bits
        group_size = columns if group_size == -1 else group_size
        self.groups = np.arange(columns) // group_size
        if act_order:
            self.groups = random.permutation(self.groups)
        count = self.groups.max() + 1
        self.codes = random.integers(0, 1 << bits, (rows, columns))
        # From 1 on: the older form of GPTQ stores them minus one.
        shape = (rows, count)
        self.zeros = np.full(shape, 1 << (bits - 1)) if symmetric else random.integers(1, 1 << bits, shape)
        self.scales = torch.from_numpy(random.uniform(0.01, 0.1, (rows, count)) / (1 << bits)).to(dtype)

    @property
    def values(self) -> Tensor:
        """float64 [rows, columns]"""
        scales = self.scales.double().numpy()
        return torch.from_numpy((self.codes - self.zeros[:, self.groups]) * scales[:, self.groups])

    def awq(self) -> dict[str, Tensor]:
        return {
            "qweight": packed_in_fields(self.codes.T, AWQ_FIELDS),
            "qzeros": packed_in_fields(self.zeros.T, AWQ_FIELDS),
            "scales": self.scales.T.contiguous(),
        }

    def gptq(self, stored_minus: int = 1) -> dict[str, Tensor]:
        return {
            "qweight": packed_in_stream(self.codes, self.bits).T.contiguous(),
            "qzeros": packed_in_stream(self.zeros.T - stored_minus, self.bits),
            "scales": self.scales.T.contiguous(),
            "g_idx": torch.from_numpy(self.groups).to(torch.int32),
        }

    def compressed_tensors(self) -> dict[str, Tensor]:
        return {
            "weight_packed": packed_in_stream(self.codes, self.bits),
            "weight_scale": self.scales,
            "weight_zero_point": packed_in_stream(self.zeros.T, self.bits).T.contiguous(),
            "weight_shape": torch.tensor(self.codes.shape),
            "weight_g_idx": torch.from_numpy(self.groups).to(torch.int32),
        }


def packed_in_fields(codes: np.ndarray, fields: tuple[int, ...]) -> Tensor:
    """int32 [rows, columns / 8]: the 4-bit field i of a word holds the column fields[i] of its eight."""
    words = np.zeros((codes.shape[0], codes.shape[1] // 8), np.uint32)
    for position, column in enumerate(fields):
        words |= codes[:, column::8].astype(np.uint32) << np.uint32(4 * position)
    return torch.from_numpy(words.view(np.int32))


def packed_in_stream(codes: np.ndarray, bits: int) -> Tensor:
    """int32 [rows, columns * bits / 32]: the code i is bits [i * bits, (i + 1) * bits) of its row."""
    words = []
    for row in codes:
        stream = sum(int(code) << (bits * i) for i, code in enumerate(row))
        words.append([stream >> (32 * i) & 0xFFFFFFFF for i in range(len(row) * bits // 32)])
    return torch.from_numpy(np.array(words, np.uint32).view(np.int32))


def foreign_checkpoint(
    directory: Path,
    method: str,
    record: dict[str, Any],
    files: int = 1,
    model: PreTrainedModel | None = None,
    **options: Any,
) -> PreTrainedModel:
    """Writes a tiny model whose linear layers are random codes; returns the float32 model of their values."""
    model = tiny_model(torch.float16, attention_bias=True) if model is None else model
    tensors = {}
    for number, (path, module) in enumerate(model.named_modules()):
        if isinstance(module, nn.Linear) and path != "lm_head":
            codes = Codes(*module.weight.shape, seed=number, **{"group_size": 64, **options})
            tensors.update({f"{path}.{name}": tensor for name, tensor in getattr(codes, method)().items()})
            if module.bias is not None:
                tensors[f"{path}.bias"] = module.bias.detach()
            module.float().weight.data = codes.values.float()
    fused = put_experts(model, lambda *sizes, seed: Codes(*sizes, seed=seed, **{"group_size": 64, **options}))
    for path, codes in fused.items():
        tensors.update({f"{path}.{name}": tensor for name, tensor in getattr(codes, method)().items()})
    packed = {name.removesuffix(".scales") for name in tensors if name.endswith(".scales")}
    others = {name: each for name, each in model.state_dict().items() if name.rpartition(".")[0] not in packed}
    if model.config.model_type == "mixtral":  # whose checkpoints have kept other names
        others = {name.replace(".mlp.", ".block_sparse_moe."): tensor for name, tensor in others.items()}
    tensors = {**{name: tensor for name, tensor in others.items() if tensor.dtype == torch.float16}, **tensors}
    directory.mkdir(parents=True, exist_ok=True)
    names = sorted(tensors)
    for i in range(files):  # the tensors of one layer are in different files
        name = "model.safetensors" if files == 1 else f"model-{i + 1:05d}-of-{files:05d}.safetensors"
        save_file({name: tensors[name].contiguous() for name in names[i::files]}, directory / name)
    config = model.config.to_diff_dict()
    config.update(architectures=[type(model).__name__], torch_dtype="float16", quantization_config=record)
    config["rope_theta"] = 10_000.0
    (directory / "config.json").write_text(json.dumps(config))
    return model.float()


def put_experts(model: nn.Module, codes: Callable[..., Codes]) -> dict[str, Codes]:
    """Gives the fused experts of `model` the values of codes; returns these by the paths of the experts' layers."""
    made: dict[str, Codes] = {}
    for path, module in list(model.named_modules()):
        if not isinstance(getattr(module, "gate_up_proj", None), nn.Parameter):
            continue
        block, names = path.removesuffix(".experts"), ("gate_proj", "up_proj", "down_proj")
        if model.config.model_type == "mixtral":
            block, names = block.replace(".mlp", ".block_sparse_moe"), ("w1", "w3", "w2")
        experts, hidden, inner = module.num_experts, model.config.hidden_size, module.down_proj.shape[-1]
        values: dict[str, list[Tensor]] = {}
        for name, sizes in zip(names, ((inner, hidden), (inner, hidden), (hidden, inner)), strict=True):
            for expert in range(experts):
                layer = made[f"{block}.experts.{expert}.{name}"] = codes(*sizes, seed=1000 + len(made))
                values.setdefault(name, []).append(layer.values.float())
        gate, up, down = (torch.stack(values[name]) for name in names)
        module.gate_up_proj, module.down_proj = nn.Parameter(torch.cat((gate, up), 1)), nn.Parameter(down)
    return made
