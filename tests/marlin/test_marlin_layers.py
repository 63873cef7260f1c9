"""MarlinLinear and MetalQuantizedLinear against float64 arithmetic on exactly decoded weights."""

from __future__ import annotations

import copy
import io
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode

import oracle
from cases import DTYPES
from oracle import name_of
from packed_columns import DIVISORS, Packed, element_values, exact, reference
from quantization_mlx.marlin import ColumnPackedLinear, MarlinLinear, MetalQuantizedLinear

IN, OUT = 256, 100


class Kind(NamedTuple):
    """A layer class with the option that chooses a format."""

    layer: type[ColumnPackedLinear]
    options: dict[str, Any]
    format: str
    bits: int

    def __str__(self) -> str:
        return f"{self.layer.__name__}-{self.format}"

    def empty(self, *sizes: int, **options: Any) -> ColumnPackedLinear:
        return self.layer(*(sizes or (IN, OUT)), **self.options, **options)

    @property
    def quantized(self) -> Callable[..., ColumnPackedLinear]:
        return self.layer.from_linear if self.layer is MarlinLinear else self.layer.from_float


KINDS = (
    Kind(MarlinLinear, {"quant_type": "fp4"}, "fp4", 4),
    Kind(MarlinLinear, {"quant_type": "int4"}, "int4", 4),
    Kind(MarlinLinear, {"quant_type": "int4_sym"}, "int4_sym", 4),
    Kind(MetalQuantizedLinear, {"bits": 4}, "fp4", 4),
    Kind(MetalQuantizedLinear, {"bits": 8}, "fp8", 8),
    Kind(MetalQuantizedLinear, {"bits": 2}, "int2", 2),
)
FP4, INT4, *_ = KINDS
KIND = pytest.mark.parametrize("kind", KINDS, ids=str)
DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)


def dense(device: str = "cpu", dtype: torch.dtype = torch.float32, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(IN, OUT, bias=bias).to(device, dtype)


def quantized(
    kind: Kind, device: str = "cpu", dtype: torch.dtype = torch.float32, bias: bool = True, group_size: int = 128
) -> ColumnPackedLinear:
    return kind.quantized(dense(device, dtype, bias), **kind.options, group_size=group_size)


def packed(layer: ColumnPackedLinear) -> Packed:
    return Packed(layer.weight_packed, layer.scales, layer.zeros)


def exact_weight(kind: Kind, layer: ColumnPackedLinear) -> Tensor:
    """float64 [in_features, out_features]."""
    return exact(kind.format, packed(layer), layer.group_size)


# --- Values -----------------------------------------------------------------------------------------------------------


@KIND
@DTYPE
def test_multiplies_by_the_packed_weight(kind: Kind, dtype: torch.dtype, device: str) -> None:
    layer = quantized(kind, device, bias=False)
    matrix = exact_weight(kind, layer)
    shapes = ((IN,), (1, IN), (7, IN), (2, 3, IN), (0, IN), (2, 0, IN))
    for shape in shapes if device == "cpu" else shapes[3:5]:
        x = oracle.random_x(*shape, dtype=dtype)
        oracle.assert_product(layer(x.to(device)), x, matrix, dtype, f"{kind} {shape}")


@KIND
def test_holds_what_the_formulas_give(kind: Kind, device: str) -> None:
    linear = dense(device)
    x = oracle.random_x(3, IN)
    for group_size in (32, 64, 128) if device == "cpu" else (64,):
        layer = kind.quantized(linear, **kind.options, group_size=group_size)
        expected = reference(kind.format, linear.weight.T, group_size)
        for ours, theirs in zip((t for t in packed(layer) if t is not None), expected.tensors, strict=True):
            oracle.assert_identical(ours, theirs, f"{kind}, groups of {group_size}")
        assert torch.equal(layer.bias, linear.bias)
        y = layer(x.to(device)) - linear.bias
        oracle.assert_within(y, x.double() @ exact_weight(kind, layer), 1e-4)


@DTYPE
def test_adds_its_bias_in_the_dtype_of_x(dtype: torch.dtype, device: str) -> None:
    """Whatever its own dtype is, for layers with zeros and without."""
    x = oracle.random_x(2, 3, IN, dtype=dtype).to(device)
    for kind in (FP4, INT4):
        for bias_dtype in DTYPES:
            layer = quantized(kind, device)
            layer.bias.data = layer.bias.data.to(bias_dtype)
            without = copy.deepcopy(layer)
            without.bias = None
            oracle.assert_identical(layer(x), without(x) + layer.bias.to(dtype))
            assert layer.bias.abs().max() > 0


def uniform_error(kind: Kind) -> float:
    """The relative RMS error of weights that are uniform between -1 and 1, the largest magnitudes of a group."""
    levels = element_values(kind.format, np.arange(1 << kind.bits))
    levels = np.linspace(-1, 1, 16) if kind.format == "int4" else levels / DIVISORS[kind.format]
    levels = np.unique(levels[np.isfinite(levels)])
    weights = np.linspace(-1, 1, 100_001)
    nearest = levels[np.searchsorted((levels[1:] + levels[:-1]) / 2, weights)]
    return float(np.linalg.norm(nearest - weights) / np.linalg.norm(weights))


@KIND
def test_is_as_near_the_linear_layer_as_its_format(kind: Kind) -> None:
    """nn.Linear begins with uniform weights, and random activations keep the relative error of the weights."""
    linear, x = dense(bias=False), oracle.random_x(64, IN)
    expected = linear(x).detach()
    error = (quantized(kind, bias=False)(x) - expected).norm() / expected.norm()
    assert error.item() == pytest.approx(uniform_error(kind), rel=0.05)


@KIND
def test_made_from_sizes_it_holds_zeros(kind: Kind, device: str) -> None:
    layer = kind.empty(bias=True, device=device)
    assert not any(tensor.cpu().view(torch.uint8).any() for tensor in layer.state_dict().values())
    shape = {"weight_packed": (IN * kind.bits // 32, OUT), "scales": (IN // 128, OUT), "bias": (OUT,)}
    shape |= {"zeros": (IN // 128, OUT)} if kind.format == "int4" else {}
    assert {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()} == shape
    assert torch.equal(layer(oracle.random_x(3, IN).to(device)).cpu(), torch.zeros(3, OUT))


def test_biases_by_default_are_as_documented() -> None:
    assert MarlinLinear(IN, OUT).bias is not None and MarlinLinear(IN, OUT, False).bias is None
    assert MetalQuantizedLinear(IN, OUT).bias is None and MetalQuantizedLinear(IN, OUT, bias=True).bias is not None
    for layer in (MarlinLinear(IN, OUT), MetalQuantizedLinear(IN, OUT)):
        assert (layer.mode, layer.bits, layer.group_size) == ("marlin_fp4", 4, 128)


# --- Gradients --------------------------------------------------------------------------------------------------------


@KIND
@DTYPE
def test_gradient_of_x(kind: Kind, dtype: torch.dtype, device: str) -> None:
    layer = quantized(kind, device)
    x = oracle.random_x(2, 3, IN, dtype=dtype).to(device).requires_grad_()
    upstream = oracle.random_x(2, 3, OUT, seed=2, dtype=dtype)
    layer(x).backward(upstream.to(device))
    oracle.assert_product(x.grad, upstream, exact_weight(kind, layer).T, dtype, str(kind))
    total = upstream.double().sum((0, 1))
    oracle.assert_within(layer.bias.grad, total, 8 * torch.finfo(dtype).eps * upstream.double().abs().sum((0, 1)))


def test_packed_parameters_are_frozen_and_the_bias_is_not() -> None:
    parameters = dict(quantized(INT4).named_parameters())
    assert parameters.keys() == {"weight_packed", "scales", "zeros", "bias"}
    assert {name for name, parameter in parameters.items() if parameter.requires_grad} == {"bias"}


def test_scales_cannot_be_trained() -> None:
    layer = quantized(FP4)
    layer.scales.requires_grad_()
    with pytest.raises(NotImplementedError, match="quantized_matmul"):
        layer(oracle.random_x(2, IN)).sum().backward()


# --- Memory -----------------------------------------------------------------------------------------------------------


def reachable_tensors(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """Those in the attributes of a module and, however deep, in containers and objects that they hold."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from reachable_tensors(item, seen)
    elif isinstance(value, (list, tuple, set)):
        for item in value:
            yield from reachable_tensors(item, seen)
    elif hasattr(value, "__dict__") and not isinstance(value, type):
        yield from reachable_tensors(vars(value), seen)


def held_bytes(layer: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in reachable_tensors(layer, set()))


class Recorder(TorchDispatchMode):
    """The names of the ops that run, and the bytes of the largest tensor that one of them returns."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.names.append(func._schema.name.split("::")[1])
        self.largest = max(self.largest, result.nbytes)
        return result


@KIND
@DTYPE
def test_never_keeps_an_unpacked_weight(kind: Kind, dtype: torch.dtype, device: str) -> None:
    layer = quantized(kind, device, dtype)
    before = held_bytes(layer)
    tables = 2 if kind.format == "int4" else 1
    assert before == IN * OUT * kind.bits // 8 + tables * 2 * IN // 128 * OUT + OUT * layer.bias.element_size()
    x = oracle.random_x(3, IN, dtype=dtype).to(device)
    with Recorder() as recorded, torch.no_grad():
        y = layer(x)
    assert recorded.names == ["quantized_matmul", "add"]
    assert recorded.largest == y.nbytes
    assert held_bytes(layer) == before


# --- As a module ------------------------------------------------------------------------------------------------------


@KIND
def test_state_dict_round_trips(kind: Kind) -> None:
    layer = quantized(kind)
    other = kind.empty(bias=True)
    other.load_state_dict(copy.deepcopy(layer.state_dict()))
    for name, tensor in other.state_dict().items():
        oracle.assert_identical(tensor, layer.state_dict()[name], name)
    x = oracle.random_x(3, IN)
    oracle.assert_identical(other(x), layer(x))
    with pytest.raises(RuntimeError, match="size mismatch for weight_packed"):
        kind.empty(IN, OUT + 1, bias=True).load_state_dict(layer.state_dict())
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict: \"bias\""):
        kind.empty(bias=False).load_state_dict(layer.state_dict())


@KIND
def test_copies_and_pickles(kind: Kind) -> None:
    layer = quantized(kind)
    x = oracle.random_x(3, IN)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    copies = [copy.deepcopy(layer), torch.load(file, weights_only=False)]
    expected = layer(x)
    for other in copies:
        assert other.weight_packed.data_ptr() != layer.weight_packed.data_ptr()
        assert repr(other) == repr(layer)
        oracle.assert_identical(other(x), expected)


@KIND
def test_change_of_dtype_changes_the_bias_alone(kind: Kind) -> None:
    before = quantized(kind)
    layer = nn.Sequential(copy.deepcopy(before))
    x = oracle.random_x(3, IN, dtype=torch.float16)
    for move, dtype in (
        (nn.Module.half, torch.float16),
        (nn.Module.bfloat16, torch.bfloat16),
        (nn.Module.double, torch.float64),
        (lambda module: module.to(torch.float16), torch.float16),
        (lambda module: module.type(torch.float32), torch.float32),  # which converts integers too
    ):
        moved = move(layer)[0]
        for ours, theirs in zip(packed(moved), packed(before), strict=True):
            assert (ours is None) == (theirs is None)
            if ours is not None:
                assert isinstance(ours, nn.Parameter) and not ours.requires_grad
                oracle.assert_identical(ours, theirs)
        assert moved.bias.dtype == dtype and moved.bias.requires_grad
        assert moved(x).dtype == torch.float16


@KIND
def test_moves_between_devices(kind: Kind, device: str) -> None:
    before = quantized(kind)
    layer = copy.deepcopy(before).to(device=device, dtype=torch.float16)
    assert {tensor.device.type for tensor in layer.state_dict().values()} == {device}
    back = layer.to("cpu", torch.float32)
    for name, tensor in back.state_dict().items():
        expected = before.state_dict()[name]
        oracle.assert_identical(tensor, expected.half().float() if name == "bias" else expected, name)


@KIND
def test_meta_device_then_empty_then_loaded(kind: Kind, device: str) -> None:
    layer = kind.empty(device="meta", bias=True)
    assert layer(torch.empty(5, 3, IN, device="meta", dtype=torch.float16)).shape == (5, 3, OUT)
    assert {tensor.device.type for tensor in layer.half().state_dict().values()} == {"meta"}
    layer.to_empty(device=device)
    source = quantized(kind, device).half()
    layer.load_state_dict(source.state_dict())
    x = oracle.random_x(3, IN).to(device)
    oracle.assert_identical(layer(x), source(x))


@KIND
def test_quantizes_a_layer_on_the_meta_device(kind: Kind) -> None:
    layer = kind.quantized(nn.Linear(IN, OUT, device="meta"), **kind.options)
    assert {tensor.device.type for tensor in layer.state_dict().values()} == {"meta"}
    real = kind.empty(bias=True)
    for name, tensor in layer.state_dict().items():
        assert (tensor.shape, tensor.dtype) == (real.state_dict()[name].shape, real.state_dict()[name].dtype)


@KIND
@pytest.mark.parametrize("bias", [True, False])
def test_takes_over_what_the_linear_layer_is(kind: Kind, bias: bool, device: str) -> None:
    dtype = torch.bfloat16
    linear = dense(device, dtype, bias)
    for training in (True, False):
        layer = kind.quantized(linear.train(training), **kind.options)
        assert layer.training == training
        assert torch.equal(layer.bias, linear.bias) if bias else layer.bias is None
        assert (layer.in_features, layer.out_features) == (IN, OUT)
        assert layer.weight_packed.device.type == device
        assert layer.scales.dtype == torch.float16
    assert layer(oracle.random_x(2, IN, dtype=dtype).to(device)).dtype == dtype


def test_shared_parameters_stay_shared() -> None:
    one, other = quantized(INT4), quantized(INT4)
    for name in ("weight_packed", "scales", "zeros"):
        setattr(other, name, getattr(one, name))
    pair = nn.ModuleList([one, other]).half()
    assert all(pair[0].get_parameter(name) is pair[1].get_parameter(name) for name in ("weight_packed", "scales"))
    assert pair[0].zeros is pair[1].zeros and pair[0].zeros.dtype == torch.float16


def test_parametrizations_count() -> None:
    class Twice(nn.Module):
        def forward(self, tensor: Tensor) -> Tensor:
            return 2 * tensor

    layer, x = quantized(FP4), oracle.random_x(3, IN)
    y = layer(x) - layer.bias
    for name in ("scales", "bias"):
        parametrize.register_parametrization(layer, name, Twice())
    torch.testing.assert_close(layer(x), 2 * y + layer.bias)
    assert layer.bias.abs().max() > 0
    assert layer.bfloat16().bias.dtype == torch.bfloat16


@KIND
def test_compiles_to_one_graph_for_all_batch_sizes(kind: Kind, device: str) -> None:
    torch._dynamo.reset()
    layer = quantized(kind, device)
    # In torch 2.13, the Metal that inductor writes has no uint32.
    counter = CompileCounterWithBackend("inductor" if device == "cpu" and kind is FP4 else "aot_eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True, dynamic=True)
    for batch in (2, 3, 7):
        x = oracle.random_x(batch, 4, IN, seed=batch).to(device)
        torch.testing.assert_close(compiled(x), layer(x))
    assert counter.frame_count == 1


def test_representation_says_what_it_is() -> None:
    marlin, metal = repr(quantized(INT4, group_size=64)), repr(MetalQuantizedLinear(IN, OUT, bits=2))
    sizes = f"in_features={IN}, out_features={OUT}"
    assert marlin == f"MarlinLinear({sizes}, bias=True, group_size=64, bits=4, mode='marlin_int4')"
    assert metal.startswith("MetalQuantizedLinear(") and "bias=False, group_size=128, bits=2" in metal


# --- Wrong arguments --------------------------------------------------------------------------------------------------

VALUE_ERRORS: dict[str, tuple[Callable[[], Any], str]] = {
    "quant_type": (
        lambda: MarlinLinear(IN, OUT, quant_type="nf4"),
        "[MarlinLinear] quant_type is 'nf4'; supported are fp4, int4, int4_sym",
    ),
    "bits": (lambda: MetalQuantizedLinear(IN, OUT, bits=3), "bits is 3; supported are [2, 4, 8]"),
    "text as bits": (lambda: MetalQuantizedLinear(IN, OUT, bits="4"), "bits is '4'; supported are [2, 4"),
    "fraction as bits": (lambda: MetalQuantizedLinear(IN, OUT, bits=4.0), "bits is 4.0; supported are"),
    "text as group_size": (lambda: MarlinLinear(IN, OUT, group_size="64"), "group_size is '64'; supported"),
    "bits of from_float": (
        lambda: MetalQuantizedLinear.from_float(dense(), bits=16),
        "[MetalQuantizedLinear] bits is 16",
    ),
    "mode": (lambda: ColumnPackedLinear(IN, OUT, "affine"), "[ColumnPackedLinear] mode is 'affine'; supp"),
    "group_size": (lambda: MarlinLinear(IN, OUT, group_size=16), "[MarlinLinear] group_size is 16; supp"),
    "group_size of from_linear": (
        lambda: MarlinLinear.from_linear(dense(), group_size=-1),
        "[MarlinLinear] group_size is -1; supported are 128, 64, 32",
    ),
    "in_features": (
        lambda: MetalQuantizedLinear(100, OUT, group_size=64),
        "[MetalQuantizedLinear] in_features is 100, which does not divide into groups of 64",
    ),
    "in_features of from_linear": (
        lambda: MarlinLinear.from_linear(nn.Linear(192, OUT)),
        "[MarlinLinear] in_features is 192, which does not divide into groups of 128",
    ),
    "not finite": (
        lambda: MetalQuantizedLinear.from_float(nn.Linear(IN, OUT).requires_grad_(False).apply(_spoil)),
        "[MetalQuantizedLinear.from_float] linear.weight has infinities or NaN",
    ),
    "size of x": (lambda: MarlinLinear(IN, OUT)(torch.zeros(2, 128)), "[quantized_matmul]"),
}
TYPE_ERRORS: dict[str, tuple[Callable[[], Any], str]] = {
    "text as size": (
        lambda: MarlinLinear("256", OUT),
        "[MarlinLinear] in_features is '256'; it must be a whole number",
    ),
    "text as out size": (
        lambda: MarlinLinear(IN, "64"),
        "[MarlinLinear] out_features is '64'; it must be a whole number",
    ),
    "no linear layer": (
        lambda: MarlinLinear.from_linear(nn.Embedding(OUT, IN)),
        "[MarlinLinear.from_linear] linear is of type Embedding; it must be a torch.nn.Linear",
    ),
    "dtype of x": (lambda: MarlinLinear(IN, OUT)(torch.zeros(2, IN).int()), "[quantized_matmul]"),
}


def _spoil(linear: nn.Module) -> None:
    linear.weight[0, 0] = torch.inf


@pytest.mark.parametrize("name", [*VALUE_ERRORS, *TYPE_ERRORS])
def test_wrong_arguments_are_named(name: str) -> None:
    call, message = {**VALUE_ERRORS, **TYPE_ERRORS}[name]
    with pytest.raises(ValueError if name in VALUE_ERRORS else TypeError, match=re.escape(message)):
        call()


# --- The documented example -------------------------------------------------------------------------------------------


def test_documented_example_of_metal_quantized_linear(device: str) -> None:
    # As documented, 4096 and 11008; the software Metal device gets smaller ones.
    sizes = (4096, 11008) if device == "cpu" else (256, 344)

    # Create from scratch
    layer = MetalQuantizedLinear(*sizes, bits=4, group_size=128)

    # Quantize an existing linear layer
    original = nn.Linear(*sizes)
    quantized = MetalQuantizedLinear.from_float(original, bits=4)

    assert layer.weight_packed.shape == quantized.weight_packed.shape
    x = oracle.random_x(2, sizes[0])
    y = quantized.to(device)(x.to(device)).cpu().detach() - original.bias.detach().cpu()
    columns = Packed(quantized.weight_packed.cpu()[:, :40], quantized.scales.cpu()[:, :40])
    oracle.assert_within(y[:, :40], x.double() @ exact("fp4", columns, 128), 1e-3)
