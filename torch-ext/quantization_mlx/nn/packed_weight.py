"""What code that reads `layer.weight` of a quantized layer gets: a float matrix that exists packed only.

Model code asks a weight for its dtype, device or shape, and hands it to `F.linear` or `@`. A `PackedWeight` answers the
first from what it is and gives the products to the quantized ops; everything else computes with the values that it
stands for, dequantized for that one call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_any, tree_map_only

from .._ops import add_op_namespace_prefix, ops
from ..formats import FLOATS, MARLIN_MODES
from ..messages import short_name

_NAMESPACE = add_op_namespace_prefix("").removesuffix("::")


class Packed(NamedTuple):
    """The tensors and the format of packed matrices, in the order of the arguments of `dequantize`."""

    words: Tensor
    scales: Tensor
    biases: Tensor | None
    group_size: int
    bits: int
    mode: str

    @property
    def by_columns(self) -> bool:
        """Whether words and groups run along the columns of the matrix, as in the marlin modes."""
        return self.mode in MARLIN_MODES

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the values: [..., rows, columns]."""
        *batch, rows, columns = self.scales.shape
        size = self.group_size
        return (*batch, rows * size, columns) if self.by_columns else (*batch, rows, columns * size)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        return ops.dequantize(*self, None, dtype)

    def to(self, device: torch.device) -> Packed:
        return Packed(*(None if each is None else each.to(device) for each in self[:3]), *self[3:])


# By the ids of the tensors, which the weight keeps alive, device, dtype and orientation.
_known: WeakValueDictionary[tuple[Any, ...], PackedWeight] = WeakValueDictionary()


def packed_weight(packed: Packed, dtype: torch.dtype, transposed: bool = False) -> Tensor:
    """The `PackedWeight` of these tensors, for as long as one is in use one and the same; under `torch.compile` the
    values, which the compiler leaves out where only their dtype or shape is read."""
    if torch.compiler.is_compiling():
        values = packed.dequantize(dtype)
        return values.mT if transposed else values
    key = *map(id, packed[:3]), packed.scales.device, dtype, transposed
    weight = _known.get(key)
    if weight is None:
        weight = _known[key] = PackedWeight(packed, dtype, transposed)
    return weight


class PackedWeight(torch.Tensor):
    """A floating-point matrix [..., rows, columns] that is held packed: the attribute `weight` of a quantized layer.

    It stays packed in products (`F.linear`, `@`, `matmul`, `mm`), `F.embedding`, indexing by rows, transposition, `to`
    and `detach`. Other functions get its values, dequantized for the call, and the ops of this package its words. It
    cannot be written to and has no gradient: gradients reach activations, and affine scales and biases.

    Args:
        packed: the tensors and their format.
        dtype: of the values.
        transposed: whether the values are those of `packed` with the last two dimensions swapped.
    """

    _is_param = True  # isinstance says nn.Parameter, so that code can tie it by assignment
    _is_hf_initialized = True  # Transformers must not initialise it

    def __new__(cls, packed: Packed, dtype: torch.dtype, transposed: bool = False) -> PackedWeight:
        *batch, rows, columns = packed.shape
        shape = (*batch, columns, rows) if transposed else (*batch, rows, columns)
        weight = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=packed.scales.device)
        weight.packed, weight.transposed = packed, transposed
        return weight

    def __init__(self, *_: Any) -> None:
        """Of `torch.Tensor`, which takes no arguments of ours."""

    def dequantize(self) -> Tensor:
        """The values as an ordinary tensor of the same shape and dtype."""
        values = self.packed.dequantize(self.dtype)
        return values.mT if self.transposed else values

    # What keeps it packed

    def detach(self) -> PackedWeight:
        return self

    def requires_grad_(self, requires_grad: bool = True) -> PackedWeight:
        if requires_grad:
            raise _cannot_be_written("requires_grad_")
        return self

    @property
    def data(self) -> PackedWeight:
        return self

    @data.setter
    def data(self, _: Any) -> None:
        raise _cannot_be_written("weight.data")

    @property
    def mT(self) -> PackedWeight:
        return PackedWeight(self.packed, self.dtype, not self.transposed)

    @property
    def T(self) -> Tensor:
        return self.mT if self.dim() == 2 else self.dequantize().T

    def t(self) -> Tensor:
        return self.T

    def transpose(self, dim0: int, dim1: int) -> Tensor:
        last = {self.dim() - 2, self.dim() - 1}
        swapped = {dim0 % self.dim(), dim1 % self.dim()}
        return self.mT if swapped == last else self.dequantize().transpose(dim0, dim1)

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        """As of any tensor; for another floating-point dtype or another device, packed as before."""
        like = args[0] if args else kwargs.get("other")
        if isinstance(like, Tensor):
            args, kwargs = (like.device, like.dtype), {}
        kwargs = {name: value for name, value in kwargs.items() if name != "copy"}  # there is nothing to write to
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        if dtype is not None and not dtype.is_floating_point:
            return self.dequantize().to(*args, **kwargs)
        return PackedWeight(self.packed.to(device or self.device), dtype or self.dtype, self.transposed)

    def float(self) -> Tensor:
        return self.to(torch.float32)

    def half(self) -> Tensor:
        return self.to(torch.float16)

    def bfloat16(self) -> Tensor:
        return self.to(torch.bfloat16)

    def __getitem__(self, index: Any) -> Tensor:
        if self.transposed or self.packed.by_columns or not _chooses_rows(index):
            return self.dequantize()[index]
        words, scales, biases, *format = self.packed
        # Torch cannot gather uint32; int32 has the same bits.
        chosen = words.view(torch.int32)[index], scales[index], None if biases is None else biases[index]
        return Packed(*chosen, *format).dequantize(self.dtype)

    # How others see it

    def data_ptr(self) -> int:
        raise NotImplementedError(
            "[data_ptr] the weight of a quantized layer is packed and has no memory of its own; save the layer's "
            "state_dict(), or what its dequantize() returns"
        )

    def __repr__(self, **_: Any) -> str:
        _, _, _, group_size, bits, mode = self.packed
        return f"PackedWeight({list(self.shape)}, {short_name(self.dtype)}, {group_size=}, {bits=}, {mode=})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.dequantize().detach().clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.dequantize().detach().__reduce_ex__(protocol)

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func in _PRODUCTS and (result := _PRODUCTS[func](*args, **kwargs)) is not NotImplemented:
            return result
        if _writes_to_it(func, args, kwargs):
            raise _cannot_be_written(getattr(func, "__name__", str(func)))
        return func(*_unpacked(func, args), **_unpacked(func, kwargs))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Calls from C++, which do not come by `__torch_function__`."""
        if func is torch.ops.aten.detach.default:
            return args[0]
        return func(*_unpacked(func, args), **_unpacked(func, kwargs or {}))


def _unpacked(func: Any, arguments: Any) -> Any:
    """The arguments with ordinary tensors in the place of packed weights: words for our ops, values for all others."""
    own = isinstance(func, torch._ops.OpOverload | torch._ops.OpOverloadPacket) and str(func).startswith(_NAMESPACE)
    return tree_map_only(PackedWeight, lambda weight: weight.packed.words if own else weight.dequantize(), arguments)


def _chooses_rows(index: Any) -> bool:
    if isinstance(index, list):
        return all(isinstance(each, int) for each in index)
    if not isinstance(index, Tensor):
        return isinstance(index, slice)
    return index.dim() == 1 or (index.dim() > 1 and index.dtype not in (torch.bool, torch.uint8))


# Metadata and writing


def _members(*names: str) -> set[Any]:
    members = (getattr(torch.Tensor, name) for name in names)
    return {member if callable(member) else member.__get__ for member in members}


# Answered by the wrapper, which has no storage.
_METADATA = _members(
    "__hash__", "device", "dim", "dtype", "element_size", "get_device", "grad", "grad_fn", "is_complex", "is_cpu",
    "is_cuda", "is_floating_point", "is_leaf", "is_meta", "is_mps", "is_quantized", "is_sparse", "itemsize", "layout",
    "nbytes", "ndim", "ndimension", "nelement", "numel", "requires_grad", "shape", "size",
) | {torch.is_floating_point, torch.is_complex, torch.numel}  # fmt: skip


_OPERATORS = "add and floordiv lshift matmul mod mul or pow rshift sub truediv xor"
_WRITING = {"__set__", "__setitem__", *(f"__i{operator}__" for operator in _OPERATORS.split())}


def _cannot_be_written(name: str) -> NotImplementedError:
    return NotImplementedError(
        f"[{name}] the weight of a quantized layer is packed and cannot be written to or trained; change the model "
        "before it is quantized, or put what the layer's dequantize() returns in its place"
    )


def _writes_to_it(func: Any, args: tuple, kwargs: dict[str, Any]) -> bool:
    name = getattr(func, "__name__", "")
    if func == torch.Tensor.requires_grad.__set__:
        return args[1]
    in_place = name in _WRITING or (name.endswith("_") and not name.endswith("__"))
    target = (args[:1] or kwargs) if in_place else kwargs.get("out")
    return tree_any(lambda each: isinstance(each, PackedWeight), target)


# Products


def _matmul(left: Any = None, right: Any = None, **options: Any) -> Any:
    """left @ right, of which one is a packed weight."""
    if options or right is None:
        return NotImplemented
    if not isinstance(right, PackedWeight):  # weight @ x = (x.mT @ weight.mT).mT
        is_vector = right.dim() == 1
        result = _matmul(right if is_vector else right.mT, left.mT)
        return result if is_vector or result is NotImplemented else result.mT
    transpose = right.transposed
    if type(left) is PackedWeight or left.dtype not in FLOATS or (transpose and right.packed.by_columns):
        return NotImplemented
    words, scales, biases, *format = right.packed
    return ops.quantized_matmul(left, words, scales, biases, transpose, *format)


def _linear(input: Any, weight: Any, bias: Tensor | None = None) -> Any:
    if not isinstance(weight, PackedWeight):
        return NotImplemented
    y = _matmul(input, weight.mT)
    return y if bias is None or y is NotImplemented else y + bias.to(y.dtype)


def _embedding(input: Tensor, weight: Any, padding_idx: Any = None, max_norm: Any = None, *_: Any, **__: Any) -> Any:
    """The further arguments of `F.embedding` are about gradients, of which there are none."""
    return weight[input] if isinstance(weight, PackedWeight) and max_norm is None else NotImplemented


_PRODUCTS = {
    F.linear: _linear,
    F.embedding: _embedding,
    torch.matmul: _matmul,
    torch.mm: _matmul,
    torch.Tensor.matmul: _matmul,
    torch.Tensor.mm: _matmul,
    torch.Tensor.__matmul__: _matmul,
    torch.Tensor.__rmatmul__: lambda right, left: _matmul(left, right),
}
