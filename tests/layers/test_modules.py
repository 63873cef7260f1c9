"""QuantizedLinear and QuantizedEmbedding against float64 arithmetic on the exactly dequantized weights."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils import parametrize

import oracle
from cases import DTYPES, SOME_FORMATS
from oracle import Format, name_of, values_of
from quantization_mlx import QuantizedEmbedding, QuantizedLinear

AFFINE, _, _, *FLOATS = SOME_FORMATS
FORMAT = pytest.mark.parametrize("format", SOME_FORMATS, ids=name_of)
DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
IN, OUT = 256, 33


def linear(format: Format, device: str, dtype: torch.dtype = torch.float32, bias: bool = True) -> QuantizedLinear:
    torch.manual_seed(0)
    return QuantizedLinear.from_linear(nn.Linear(IN, OUT, bias=bias, device=device, dtype=dtype), **format.options)


def embedding(format: Format, device: str, dtype: torch.dtype = torch.float32) -> QuantizedEmbedding:
    torch.manual_seed(0)
    return QuantizedEmbedding.from_embedding(nn.Embedding(OUT, IN, device=device, dtype=dtype), **format.options)


# --- Values -----------------------------------------------------------------------------------------------------------


@FORMAT
@DTYPE
@pytest.mark.parametrize("shape", [(IN,), (1, IN), (7, IN), (2, 3, IN), (0, IN), (2, 0, IN)], ids=str)
def test_linear_multiplies_by_the_dequantized_weight(
    format: Format, dtype: torch.dtype, shape: tuple[int, ...], device: str
) -> None:
    module = linear(format, device, dtype, bias=False)
    x = oracle.random_x(*shape, dtype=dtype)
    oracle.assert_product(module(x.to(device)), x, values_of(module).mT, dtype, str(format))


@FORMAT
def test_linear_adds_its_bias(format: Format, device: str) -> None:
    with_bias, without = linear(format, device), linear(format, device, bias=False)
    x = oracle.random_x(2, 3, IN).to(device)
    without.share(with_bias)
    assert torch.equal(with_bias(x), without(x) + with_bias.bias)
    assert with_bias.bias.abs().max() > 0


@FORMAT
@pytest.mark.parametrize("bias", [True, False])
def test_autocast_gives_what_it_gives_for_a_linear_layer(bias: bool, format: Format) -> None:
    module, x = linear(format, "cpu", bias=bias), oracle.random_x(3, IN)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert module(x).dtype == nn.Linear(IN, OUT, bias)(x).dtype == torch.bfloat16
        total = torch.zeros(4, OUT, dtype=torch.bfloat16).index_add_(0, torch.tensor([0, 3, 0]), module(x))
    exact = x.double() @ values_of(module).mT + (module.bias.double() if bias else 0)
    oracle.assert_within(total, exact.new_zeros(4, OUT).index_add_(0, torch.tensor([0, 3, 0]), exact), 0.1)


@FORMAT
def test_from_linear_holds_what_mlx_quantize_gives(format: Format, device: str) -> None:
    dense = nn.Linear(IN, OUT, device=device)
    module = QuantizedLinear.from_linear(dense, **format.options)
    tensors = (module.weight_packed, module.scales) + ((module.biases,) if format.is_affine else ())
    for ours, expected in zip(tensors, oracle.mlx_quantize(dense.weight, format), strict=True):
        oracle.assert_identical(ours, expected, str(format))
    assert torch.equal(module.bias, dense.bias) and module.bias.data_ptr() != dense.bias.data_ptr()


@FORMAT
@DTYPE
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=name_of)
@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (2, 1, 4), (0,), (3, 0)], ids=str)
def test_embedding_looks_up_dequantized_rows(
    format: Format, dtype: torch.dtype, index_dtype: torch.dtype, shape: tuple[int, ...], device: str
) -> None:
    module = embedding(format, device, dtype)
    indices = torch.randint(0, OUT, shape, generator=oracle.generator(1)).to(index_dtype)
    rows = module(indices.to(device))
    weight = values_of(module)
    assert rows.dtype == dtype
    # The largest product and one rounding each for the product and the sum.
    bound = 2 * torch.finfo(dtype).eps * weight.abs().max()
    oracle.assert_within(rows, weight[indices.long()].reshape(*shape, IN), bound, str(format))


@FORMAT
@DTYPE
def test_embedding_is_an_output_head(format: Format, dtype: torch.dtype, device: str) -> None:
    module = embedding(format, device, dtype)
    x = oracle.random_x(2, 3, IN, dtype=dtype)
    oracle.assert_product(module.as_linear(x.to(device)), x, values_of(module).mT, dtype, str(format))


@pytest.mark.parametrize("index", [-1, OUT])
def test_embedding_refuses_indices_out_of_range(index: int) -> None:
    with pytest.raises(IndexError):
        embedding(AFFINE, "cpu")(torch.tensor([0, index]))


# --- Gradients --------------------------------------------------------------------------------------------------------


@FORMAT
def test_gradient_of_x(format: Format, device: str) -> None:
    module = linear(format, device)
    x = oracle.random_x(2, 3, IN).to(device).requires_grad_()
    upstream = oracle.random_x(2, 3, OUT, seed=2)
    module(x).backward(upstream.to(device))
    oracle.assert_product(x.grad, upstream, values_of(module), torch.float32, str(format))


def test_packed_parameters_are_frozen_and_the_bias_is_not(device: str) -> None:
    trainable = {name for name, parameter in linear(AFFINE, device).named_parameters() if parameter.requires_grad}
    assert trainable == {"bias"}


def test_scales_and_biases_of_an_embedding_can_be_trained(device: str) -> None:
    module = embedding(AFFINE, device)
    module.scales.requires_grad_()
    module.biases.requires_grad_()
    module(torch.tensor([1, 1, 4], device=device)).sum().backward()
    codes = torch.from_numpy(oracle.unpack(module.weight_packed, AFFINE.bits)).reshape(OUT, -1, AFFINE.group_size)
    times = torch.zeros(OUT, 1, dtype=torch.float64)
    times[1], times[4] = 2, 1
    oracle.assert_within(module.scales.grad, codes.sum(-1) * times, 1e-3)
    oracle.assert_within(module.biases.grad, (AFFINE.group_size * times).expand(codes.shape[:-1]), 0)


# --- As a module ------------------------------------------------------------------------------------------------------


@FORMAT
@pytest.mark.parametrize("make", [linear, embedding])
def test_state_dict_has_the_names_of_mlx_and_round_trips(make, format: Format, device: str) -> None:
    module = make(format, device)
    state = module.state_dict()
    expected = {"weight", "scales"} | ({"biases"} if format.is_affine else set())
    assert set(state) == expected | ({"bias"} if make is linear else set())
    empty = type(module)(*((IN, OUT) if make is linear else (OUT, IN)), **format.options, device=device)
    assert not empty.scales.any()
    empty.load_state_dict(copy.deepcopy(state))
    for name, tensor in empty.state_dict().items():
        oracle.assert_identical(tensor, state[name], name)


@FORMAT
@DTYPE
@pytest.mark.parametrize("make", [linear, embedding])
def test_change_of_dtype_leaves_integers_alone(make, dtype: torch.dtype, format: Format, device: str) -> None:
    module = make(format, device).to(dtype)
    before = make(format, device)
    oracle.assert_identical(module.weight_packed, before.weight_packed)
    if format.is_affine:
        assert module.scales.dtype == module.biases.dtype == dtype
    else:
        oracle.assert_identical(module.scales, before.scales)
    argument = oracle.random_x(3, IN, dtype=dtype) if make is linear else torch.tensor([0, 3])
    assert module(argument.to(device)).dtype == dtype


@pytest.mark.parametrize("move", ["half", "bfloat16", "float"])
def test_shared_parameters_stay_shared(move: str, device: str) -> None:
    table = embedding(AFFINE, device)
    head = linear(AFFINE, device, bias=False)
    head.share(table)
    pair = getattr(nn.ModuleList([table, head]), move)()
    assert all(pair[0].get_parameter(name) is pair[1].get_parameter(name) for name in ("weight", "scales", "biases"))


def test_parametrizations_count() -> None:
    class Twice(nn.Module):
        def forward(self, tensor: Tensor) -> Tensor:
            return 2 * tensor

    layer, x = linear(AFFINE, "cpu"), oracle.random_x(3, IN)
    y = layer(x) - layer.bias
    for name in ("scales", "biases", "bias"):
        parametrize.register_parametrization(layer, name, Twice())
    torch.testing.assert_close(layer(x), 2 * y + layer.bias)
    assert layer.bias.abs().max() > 0


@FORMAT
def test_meta_device_knows_shapes(format: Format) -> None:
    module = QuantizedLinear(IN, OUT, **format.options, device="meta")
    assert module(torch.empty(5, 3, IN, device="meta")).shape == (5, 3, OUT)
    table = QuantizedEmbedding(OUT, IN, **format.options, device="meta")
    assert table(torch.empty(5, 3, dtype=torch.int64, device="meta")).shape == (5, 3, IN)


@pytest.mark.parametrize(
    "mode, expected", {"affine": (64, 4), "mxfp4": (32, 4), "mxfp8": (32, 8), "nvfp4": (16, 4)}.items()
)
def test_mode_decides_what_is_not_given(mode: str, expected: tuple[int, int]) -> None:
    module = QuantizedLinear(IN, OUT, mode=mode)
    group_size, bits = expected
    assert (module.group_size, module.bits) == expected
    assert f"in_features={IN}, out_features={OUT}, bias=True, group_size={group_size}, bits={bits}" in repr(module)


@pytest.mark.parametrize(
    "format",
    [
        *({"bits": bits} for bits in (7, 0, "4", 4.0)),
        *({"group_size": size} for size in (16, -64, "64", 64.0)),
        {"mode": "mxfp4", "bits": 8},
    ],
    ids=str,
)
def test_constructor_refuses_unknown_formats(format: dict) -> None:
    name, value = list(format.items())[-1]
    with pytest.raises(ValueError, match=rf"^\[QuantizedLinear\] .*{name} {value!r}.* is not supported; it takes"):
        QuantizedLinear(64, 8, **format)


def test_constructor_refuses_what_cannot_be() -> None:
    with pytest.raises(ValueError, match=r"100 values .* groups of 64"):
        QuantizedLinear(100, 8)
    with pytest.raises(ValueError, match="'int4' is not supported; supported are affine, mxfp4"):
        QuantizedEmbedding(8, 64, mode="int4")
    with pytest.raises(ValueError, match=r"mode \['affine'\] is not supported"):
        QuantizedEmbedding(8, 64, mode=["affine"])
    with pytest.raises(TypeError, match=r"^\[QuantizedLinear\] sizes must be whole numbers, not '64'"):
        QuantizedLinear("64", 8)


@FORMAT
def test_compiles_to_one_graph_for_all_batch_sizes(format: Format, device: str) -> None:
    torch._dynamo.reset()
    table, layer = embedding(format, device), linear(format, device)
    # In torch 2.13, the Metal that inductor writes has no uint32.
    counter = CompileCounterWithBackend("inductor" if device == "cpu" else "aot_eager")
    compiled = torch.compile(lambda indices: layer(table(indices)), backend=counter, fullgraph=True, dynamic=True)
    for batch in (2, 3, 7):
        indices = torch.randint(0, OUT, (batch, 4), generator=oracle.generator(batch)).to(device)
        torch.testing.assert_close(compiled(indices), layer(table(indices)))
    assert counter.frame_count == 1
