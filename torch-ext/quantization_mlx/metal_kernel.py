"""`mlx.core.fast.metal_kernel` for torch: from the body of a Metal function to a function of tensors."""

import functools
import re
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .metal import MATH_MODES, Arguments, Source, a_tensor_of_the_gpu, launch, line_mark, three_sizes

_OP = "metal_kernel"

# What kernels written for MLX find in front of them.
_PRELUDE = """#include <metal_stdlib>
#include <metal_atomic>
#include <metal_simdgroup>
#include <metal_simdgroup_matrix>
using namespace metal;

typedef half float16_t;
typedef bfloat bfloat16_t;

// How many parts of `part` elements cover `whole`.
template <typename T, typename U>
METAL_FUNC size_t ceildiv(T whole, U part) {
  return (whole + part - 1) / part;
}

// Where in memory element number `elem` of an array is, counted in row-major order.
template <typename Index = int64_t>
METAL_FUNC Index elem_to_loc(Index elem, constant const int* shape, constant const int64_t* strides, int ndim) {
  Index loc = 0;
  for (int axis = ndim - 1; axis >= 0; --axis) {
    const Index size = Index(shape[axis]);
    loc += (elem % size) * Index(strides[axis]);
    elem /= size;
  }
  return loc;
}

// The same of a position: x along the last axis, y along the one before, z along all others.
template <typename Index = int64_t>
METAL_FUNC Index elem_to_loc(uint3 elem, constant const int* shape, constant const int64_t* strides, int ndim) {
  Index loc = ndim > 0 ? Index(elem.x) * Index(strides[ndim - 1]) : Index(0);
  loc += ndim > 1 ? Index(elem.y) * Index(strides[ndim - 2]) : Index(0);
  return ndim > 2 ? loc + elem_to_loc<Index>(Index(elem.z), shape, strides, ndim - 2) : loc;
}

// Of arrays with as many axes as the name says.
template <typename Index = int64_t>
METAL_FUNC Index elem_to_loc_1(uint elem, constant const int64_t& stride) {
  return Index(elem) * Index(stride);
}

template <typename Index = int64_t>
METAL_FUNC Index elem_to_loc_2(uint2 elem, constant const int64_t* strides) {
  return Index(elem.x) * Index(strides[1]) + Index(elem.y) * Index(strides[0]);
}

template <typename Index = int64_t>
METAL_FUNC Index elem_to_loc_3(uint3 elem, constant const int64_t* strides) {
  return Index(elem.x) * Index(strides[2]) + Index(elem.y) * Index(strides[1]) + Index(elem.z) * Index(strides[0]);
}
"""

_TYPES = {
    torch.bool: "bool",
    torch.uint8: "uint8_t",
    torch.uint16: "uint16_t",
    torch.uint32: "uint32_t",
    torch.uint64: "uint64_t",
    torch.int8: "int8_t",
    torch.int16: "int16_t",
    torch.int32: "int32_t",
    torch.int64: "int64_t",
    torch.float16: "float16_t",
    torch.bfloat16: "bfloat16_t",
    torch.float32: "float",
}
# Of those that torch cannot fill on every system, one of the same bits.
_SIGNED = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}

# The attributes that a body may name, by their types.
_ATTRIBUTES = {
    **dict.fromkeys(
        (
            *("thread_position_in_grid", "thread_position_in_threadgroup", "threadgroup_position_in_grid"),
            *("threads_per_grid", "threads_per_threadgroup", "threadgroups_per_grid"),
            *("dispatch_threads_per_threadgroup", "grid_origin", "grid_size"),
        ),
        "uint3",
    ),
    **dict.fromkeys(
        (
            *("thread_index_in_threadgroup", "thread_index_in_simdgroup", "thread_index_in_quadgroup"),
            *("simdgroup_index_in_threadgroup", "simdgroups_per_threadgroup", "threads_per_simdgroup"),
            *("quadgroup_index_in_threadgroup", "quadgroups_per_threadgroup", "thread_execution_width"),
            *("dispatch_simdgroups_per_threadgroup", "dispatch_quadgroups_per_threadgroup"),
        ),
        "uint",
    ),
}

# What a body may ask of an input: Metal's type, struct's, and the values.
_FACTS: dict[str, tuple[str, str, Callable[[Tensor], Sequence[int]]]] = {
    "shape": ("int*", "i", lambda array: tuple(array.shape)),
    "strides": ("int64_t*", "q", lambda array: array.stride()),
    "ndim": ("int&", "i", lambda array: (array.dim(),)),
}

# Inputs of fewer elements are in the constant address space, as in MLX: bodies may depend on it.
_CONSTANT_BELOW = 8


def _fail(text: str, error: type[Exception] = ValueError) -> Exception:
    return error(f"[{_OP}] {text}")


def _type_of(name: str, dtype: Any) -> str:
    if dtype not in _TYPES:
        supported = ", ".join(str(known).removeprefix("torch.") for known in _TYPES)
        raise _fail(f"{name} has dtype {dtype}; supported are {supported}", TypeError)
    return _TYPES[dtype]


def _words(source: str) -> set[str]:
    return set(re.findall(r"[A-Za-z_]\w*", source))


@dataclass(frozen=True)
class _Parameter:
    """An input or an output as the signature has it."""

    name: str
    type: str
    space: str = "device"
    is_scalar: bool = False


@dataclass(frozen=True)
class _Template:
    """A template argument: its kind, its name and the value, as Metal writes them."""

    kind: str
    name: str
    value: str

    @classmethod
    def of(cls, name: str, value: Any) -> "_Template":
        if isinstance(value, torch.dtype):
            return cls("typename", name, _type_of(f"template argument {name}", value))
        if isinstance(value, bool):
            return cls("bool", name, str(value).lower())
        if isinstance(value, int):
            return cls("int", name, str(value))
        raise _fail(f"template argument {name} is {value!r}; it is a torch.dtype, an int or a bool", TypeError)


def _left_out_of_graphs(method: Callable) -> Callable:
    """`torch.compiler.disable`, which imports the compiler, for when something is compiled."""

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        run = torch.compiler.disable(method) if torch.compiler.is_compiling() else method
        return run(*args, **kwargs)

    return call


class MetalKernel:
    """What `metal_kernel` returns. Called, it generates a Metal function for the types at hand, which is compiled once,
    and gives it to torch's MPS stream."""

    def __init__(
        self,
        name: str,
        input_names: Sequence[str],
        output_names: Sequence[str],
        source: str,
        header: str,
        ensure_row_contiguous: bool,
        atomic_outputs: bool,
        math_mode: str,
    ) -> None:
        self.name = name
        self._inputs = tuple(input_names)
        self._outputs = tuple(output_names)
        self._body = source
        self._header = header
        self._ensure_row_contiguous = ensure_row_contiguous
        self._atomic_outputs = atomic_outputs
        self._math_mode = math_mode
        words = _words(source)
        self._attributes = [name for name in _ATTRIBUTES if name in words]
        self._facts = {name: [fact for fact in _FACTS if f"{name}_{fact}" in words] for name in self._inputs}
        self._sources: dict[object, tuple[str, Source]] = {}

    def __repr__(self) -> str:
        return f"metal_kernel({self.name!r}, inputs={list(self._inputs)}, outputs={list(self._outputs)})"

    @_left_out_of_graphs
    def __call__(
        self,
        *,
        inputs: Sequence[Any],
        grid: Sequence[int],
        threadgroup: Sequence[int],
        output_shapes: Sequence[Sequence[int]],
        output_dtypes: Sequence[torch.dtype],
        template: Sequence[tuple[str, Any]] | None = None,
        init_value: float | None = None,
        verbose: bool = False,
        stream: Any = None,
    ) -> list[Tensor]:
        """Runs the kernel; see `metal_kernel`."""
        self._check_counts(inputs, output_shapes, output_dtypes, stream)
        threads = three_sizes(_OP, f"{self.name}'s grid", grid)
        group = three_sizes(_OP, f"{self.name}'s threadgroup", threadgroup)
        group = tuple(min(pair) for pair in zip(threads, group, strict=True))
        arrays = [self._array(name, value) for name, value in zip(self._inputs, inputs, strict=True)]
        templates = tuple(_Template.of(*argument) for argument in template or ())

        def run(*arrays: Tensor) -> tuple[Tensor, ...]:
            return self._run(arrays, templates, threads, group, output_shapes, output_dtypes, init_value, verbose)

        if torch.is_grad_enabled() and any(array.requires_grad for array in arrays):
            return list(_WithoutGradient.apply(run, self.name, *arrays))
        return list(run(*arrays))

    def _check_counts(self, inputs: Sequence, shapes: Sequence, dtypes: Sequence, stream: Any) -> None:
        for what, given, names in (
            ("inputs", inputs, self._inputs),
            ("output_shapes", shapes, self._outputs),
            ("output_dtypes", dtypes, self._outputs),
        ):
            if len(given) != len(names):
                raise _fail(f"{self.name}: {len(given)} {what} are given for {len(names)} names, {', '.join(names)}")
        if stream is not None and torch.device(stream).type != "mps":
            raise _fail(f"{self.name}: stream is {stream!r}; kernels run on torch's current stream of device 'mps'")

    def _array(self, name: str, value: Any) -> Tensor:
        """An input as a tensor: on the GPU, or a scalar on the CPU."""
        if isinstance(value, int) and not isinstance(value, bool):
            small = -(2**31) <= value < 2**31
            array = torch.tensor(value, dtype=torch.int32 if small else torch.int64)
        elif isinstance(value, float):
            array = torch.tensor(value, dtype=torch.float32)
        else:
            try:
                array = torch.as_tensor(value)
            except (TypeError, ValueError, RuntimeError) as error:
                raise _fail(f"{self.name}: input {name} is {value!r}; it is a tensor or a scalar", TypeError) from error
        _type_of(f"{self.name}'s input {name}", array.dtype)
        if array.device.type != "mps" and array.dim() > 0:
            raise _fail(f"{self.name}: input {name} of shape {tuple(array.shape)} is on {array.device}, not on mps")
        if array.is_sparse or array.is_quantized:
            raise _fail(f"{self.name}: input {name} is not a strided tensor", TypeError)
        return array.contiguous() if self._ensure_row_contiguous else array

    def _run(
        self,
        arrays: Sequence[Tensor],
        templates: tuple[_Template, ...],
        threads: Sequence[int],
        group: Sequence[int],
        shapes: Sequence[Sequence[int]],
        dtypes: Sequence[torch.dtype],
        init_value: float | None,
        verbose: bool,
    ) -> tuple[Tensor, ...]:
        inputs = tuple(map(_input_parameter, self._inputs, arrays))
        outputs = tuple(
            _Parameter(name, _type_of(f"{self.name}'s output {name}", dtype))
            for name, dtype in zip(self._outputs, dtypes, strict=True)
        )
        function, source = self._source(inputs, outputs, templates)
        if verbose:
            print(f"Generated source code for `{function}`:\n```\n{source.text}\n```")
        gpu = a_tensor_of_the_gpu()
        results = tuple(
            _new_output(tuple(shape), dtype, init_value, gpu.device)
            for shape, dtype in zip(shapes, dtypes, strict=True)
        )
        arguments = Arguments()
        for parameter, array in zip(inputs, arrays, strict=True):
            self._add(arguments, parameter, array)
        for result in results:
            arguments.add_tensor(_something(result))
        launch(_OP, source, function, arguments, threads, group, grid_in_threads=True)
        return results

    def _add(self, arguments: Arguments, parameter: _Parameter, array: Tensor) -> None:
        if array.device.type == "mps":
            array = _something(array)
            # The constant address space wants offsets of whole words.
            is_aligned = parameter.space == "device" or array.storage_offset() * array.element_size() % 4 == 0
            array = array if is_aligned else array.clone()
            arguments.add_tensor(array)
        else:
            arguments.add_bytes(_bytes_of(array))
        for fact in self._facts[parameter.name]:
            _, kind, values = _FACTS[fact]
            numbers = values(array)
            arguments.add_bytes(struct.pack(f"={max(len(numbers), 1)}{kind}", *(numbers or (0,))))

    def _source(
        self, inputs: tuple[_Parameter, ...], outputs: tuple[_Parameter, ...], templates: tuple[_Template, ...]
    ) -> tuple[str, Source]:
        key = inputs, outputs, templates
        found = self._sources.get(key)
        if found is None:
            found = self._sources[key] = self._generate(inputs, outputs, templates)
        return found

    def _generate(
        self, inputs: tuple[_Parameter, ...], outputs: tuple[_Parameter, ...], templates: tuple[_Template, ...]
    ) -> tuple[str, Source]:
        values = ", ".join(template.value for template in templates)
        plain = "custom_kernel_" + re.sub(r"\W", "_", self.name)
        name = "_".join([plain, *(re.sub(r"\W", "_", template.value) for template in templates)])
        declared = [*self._input_declarations(inputs), *self._output_declarations(outputs)]
        parameters = [f"{text} [[buffer({index})]]" for index, text in enumerate(declared)]
        parameters += [f"{_ATTRIBUTES[attribute]} {attribute} [[{attribute}]]" for attribute in self._attributes]
        prefix = f"template <{', '.join(f'{each.kind} {each.name}' for each in templates)}>\n" if templates else ""
        signature = f"{prefix}[[kernel]] void {name if not templates else plain}(\n    " + ",\n    ".join(parameters)
        instance = f"{plain}<{values}>"
        parts = [
            _PRELUDE,
            *([f"{line_mark(1, f'{self.name}.header')}{self._header}"] if self._header else []),
            f"{signature}) {{\n{line_mark(1, self.name)}{self._body}",
            "}",
        ]
        if templates:
            parts.append(f'template [[host_name("{name}")]] [[kernel]] decltype({instance}) {instance};')
        return name, Source(self.name, "\n".join(parts) + "\n", self._math_mode)

    def _input_declarations(self, inputs: tuple[_Parameter, ...]) -> list[str]:
        result = []
        for each in inputs:
            result.append(f"const {each.space} {each.type}{'&' if each.is_scalar else '*'} {each.name}")
            result += [f"const constant {_FACTS[fact][0]} {each.name}_{fact}" for fact in self._facts[each.name]]
        return result

    def _output_declarations(self, outputs: tuple[_Parameter, ...]) -> list[str]:
        form = "device atomic<{}>* {}" if self._atomic_outputs else "device {}* {}"
        return [form.format(each.type, each.name) for each in outputs]


def _input_parameter(name: str, array: Tensor) -> _Parameter:
    space = "constant" if array.numel() < _CONSTANT_BELOW else "device"
    return _Parameter(name, _TYPES[array.dtype], space, is_scalar=array.dim() == 0)


def _bytes_of(scalar: Tensor) -> bytes:
    return bytes(scalar.detach().reshape(1).view(torch.uint8).tolist())


def _something(tensor: Tensor) -> Tensor:
    """A tensor that has memory, where one has none."""
    return tensor if tensor.numel() > 0 else tensor.new_empty(1)


def _new_output(shape: tuple[int, ...], dtype: torch.dtype, value: float | None, device: torch.device) -> Tensor:
    if value is None:
        return torch.empty(shape, dtype=dtype, device=device)
    signed = _SIGNED.get(dtype)
    if signed is None:
        return torch.full(shape, value, dtype=dtype, device=device)
    bits = 8 * dtype.itemsize
    number = int(value) % 2**bits
    number -= 2**bits if number >= 2 ** (bits - 1) else 0
    return torch.full(shape, number, dtype=signed, device=device).view(dtype)


class _WithoutGradient(torch.autograd.Function):
    """Says, where a gradient is asked for, that there is none."""

    @staticmethod
    def forward(ctx: Any, run: Callable[..., tuple[Tensor, ...]], name: str, *arrays: Tensor) -> tuple[Tensor, ...]:
        ctx.name = name
        return run(*arrays)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, ...]:
        raise _fail(f"{ctx.name} has no gradient; give it one with torch.autograd.Function", NotImplementedError)


def metal_kernel(
    name: str,
    input_names: Sequence[str],
    output_names: Sequence[str],
    source: str,
    header: str = "",
    ensure_row_contiguous: bool = True,
    atomic_outputs: bool = False,
    compile_options: dict[str, Any] | None = None,
) -> MetalKernel:
    """A Metal kernel of your own from the body of its function, as ``mlx.core.fast.metal_kernel`` makes one.

    The signature is generated: an argument for each input and output; ``<input>_shape``, ``<input>_strides`` and
    ``<input>_ndim`` where the body names them; the attributes of Metal that it names, such as
    ``thread_position_in_grid``; and the template's arguments. ``elem_to_loc``, ``ceildiv`` and ``metal::`` are there.

    Args:
        name: of the kernel, for errors.
        input_names, output_names: of the arguments.
        source: the body.
        header: text in front of the function, for helpers.
        ensure_row_contiguous: copies inputs that are not row-major. False gives them as they are, with their strides.
        atomic_outputs: outputs are ``device atomic<T>*``.
        compile_options: ``{"math_mode": …}``, "safe" (the default), "relaxed" or "fast".

    Returns:
        A function ``kernel(*, inputs, grid, threadgroup, output_shapes, output_dtypes, template=None, init_value=None,
        verbose=False, stream=None)`` whose result is a list of tensors on "mps", given to torch's current stream:

        - inputs: tensors on "mps" of any shape, and scalars (an int is int32, or int64 where it has to be; a float is
          float32). Those of fewer than 8 elements are in the constant address space, 0-dimensional ones references.
        - grid: how many threads there are along x, y and z. threadgroup: how many of a threadgroup; not more than of
          the grid.
        - template: (name, value) pairs; values are torch dtypes, ints and bools.
        - init_value: what outputs hold before the kernel runs; None for anything.
        - verbose: prints the generated source.

    Asked for a gradient, its results raise NotImplementedError: wrap calls in ``torch.autograd.Function``.

    Raises:
        ValueError: names, counts, sizes or a stream that do not fit; inputs on another device.
        TypeError: other dtypes than bool, float32, float16, bfloat16 and integers.
        RuntimeError: what Metal's compiler says, with lines of ``source``.
        NotImplementedError: there is no Apple GPU.
    """
    if not name:
        raise _fail("name is empty")
    names = [*input_names, *output_names]
    for each in names:
        if not each.isidentifier() or names.count(each) > 1:
            raise _fail(f"{name}: {each!r} is no name for an argument, or that of two: {', '.join(names)}")
    if not output_names:
        raise _fail(f"{name} has no outputs")
    options = {"math_mode": "safe", **(compile_options or {})}
    if set(options) != {"math_mode"} or options["math_mode"] not in MATH_MODES:
        raise _fail(f"{name}: compile_options are {compile_options!r}; supported is math_mode, one of {MATH_MODES}")
    return MetalKernel(
        *(name, input_names, output_names, source, header, ensure_row_contiguous, atomic_outputs),
        options["math_mode"],
    )
