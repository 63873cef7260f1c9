"""The int4 helpers against bytes and codes computed by hand, exact fractions, and all 256 bytes."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as numpy_strategies

from process import printed
from quantization_mlx import int4
from quantization_mlx.int4 import dequantize_from_int4, pack_int4_to_int8, quantize_to_int4, unpack_int8_to_int4

VALUES = [0.1, 0.5, -1.3, 2.7, 3.9, -0.8, 5.2, -4.7]
LARGEST = float(np.finfo(np.float32).max)
SMALLEST = float(np.finfo(np.float32).smallest_subnormal)

shapes = numpy_strategies.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=7)
float_arrays = numpy_strategies.arrays(np.float32, shapes, elements=st.floats(-LARGEST, LARGEST, width=32))
code_arrays = numpy_strategies.arrays(np.int8, shapes.filter(bool), elements=st.integers(-8, 7))


# --- Quantizing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "scale", "zero_point", "codes"),
    [
        # 9.9 / 15; -4.7 / 0.66 = -7.1, so that -8 stands for -7 steps and 5.2 / 0.66 = 7.9 fits
        ({}, 0.66, -1, [-1, 0, -3, 3, 5, -2, 7, -8]),
        ({"scale_method": "minmax"}, 0.66, -1, [-1, 0, -3, 3, 5, -2, 7, -8]),
        ({"symmetric": True}, 0.66, 0, [0, 1, -2, 4, 6, -1, 7, -7]),  # the original's; 5.2 takes 7 instead of 8
        ({"scale_method": "absmax"}, 5.2 / 7, 0, [0, 1, -2, 4, 5, -1, 7, -6]),
    ],
)
def test_codes_computed_by_hand(options, scale, zero_point, codes):
    for values in (VALUES, tuple(VALUES), np.array(VALUES), np.array(VALUES, np.float32)):
        found = quantize_to_int4(values, **options)
        assert isinstance(found[0], np.ndarray) and found[0].dtype == np.int8
        assert [type(number) for number in found[1:]] == [float, float]
        assert found[0].tolist() == codes
        assert found[1] == pytest.approx(scale, rel=1e-6)
        assert found[2] == zero_point


def test_ends_of_the_range_are_mapped_to_the_ends_of_the_codes():
    codes, scale, zero_point = quantize_to_int4(list(range(16)))
    assert (codes.tolist(), scale, zero_point) == (list(range(-8, 8)), 1.0, -8.0)
    assert dequantize_from_int4(codes, scale, zero_point).tolist() == list(range(16))


def test_without_a_zero_point_offset_values_saturate():
    codes, scale, zero_point = quantize_to_int4([0, 15], symmetric=True)
    assert (codes.tolist(), scale, zero_point) == ([0, 7], 1.0, 0.0)
    codes, _, zero_point = quantize_to_int4([10, 10.5, 11], symmetric=True)  # quotients of 150 to 165
    assert (codes.tolist(), zero_point) == ([7, 7, 7], 0.0)


def test_zero_point_is_zero_where_codes_fit_without_one():
    codes, scale, zero_point = quantize_to_int4(np.arange(-8, 8) * 0.25)
    assert (codes.tolist(), scale, zero_point) == (list(range(-8, 8)), 0.25, 0.0)


def test_halves_round_to_even():
    codes, _, _ = quantize_to_int4([-7, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 7], "absmax")
    assert codes.tolist() == [-7, -2, -2, 0, 0, 2, 2, 7]


@pytest.mark.parametrize(
    ("values", "scale", "codes"), [([], 1.0, []), ([0.0, -0.0], 1.0, [0, 0]), (np.zeros((2, 0)), 1.0, [[], []])]
)
@pytest.mark.parametrize("options", [{}, {"symmetric": True}, {"scale_method": "absmax"}])
def test_empty_and_zero(values, scale, codes, options):
    found = quantize_to_int4(values, **options)
    assert (found[0].tolist(), *found[1:]) == (codes, scale, 0.0)
    assert found[0].dtype == np.int8
    assert dequantize_from_int4(*found).tolist() == codes


@pytest.mark.parametrize(
    ("value", "code"), [(3.7, 4), (-0.25, 0), (0.5, 0), (5, 5), (100.5, 7), (-1e6, -8), (1e-40, 0), (LARGEST, None)]
)
def test_constant_arrays_come_back(value, code):
    values = np.full((2, 3), value, np.float32)
    codes, scale, zero_point = quantize_to_int4(values)
    assert scale == 1.0
    assert code is None or (codes == code).all()
    np.testing.assert_array_equal(dequantize_from_int4(codes, scale, zero_point), values)


def test_constant_arrays_without_a_zero_point():
    assert quantize_to_int4([3.7, 3.7], symmetric=True)[0].tolist() == [4, 4]
    assert quantize_to_int4([100.0], symmetric=True)[0].tolist() == [7]


@pytest.mark.parametrize(
    "values",
    [
        [-LARGEST, LARGEST],
        [0, SMALLEST],
        [-SMALLEST, SMALLEST, 0],
        [1, 1 + 2**-23],
        [1e30, 1.001e30],
        [-1e-38, LARGEST],
    ],
)
def test_huge_and_tiny_ranges(values):
    for options in ({}, {"scale_method": "absmax"}):
        codes, scale, zero_point = quantize_to_int4(values, **options)
        assert 0 < scale < math.inf and math.isfinite(zero_point)
        assert_within_half_a_step(values, codes, scale, zero_point)
        assert np.isfinite(dequantize_from_int4(codes, scale, zero_point)).all()


@given(float_arrays, st.sampled_from(["minmax", "absmax"]))
def test_values_come_back_within_half_a_step(values, method):
    codes, scale, zero_point = quantize_to_int4(values, method)
    assert codes.shape == values.shape and codes.dtype == np.int8
    assert codes.size == 0 or (codes.min() >= -8 and codes.max() <= 7)
    assert_within_half_a_step(values, codes, scale, zero_point)
    back = dequantize_from_int4(codes, scale, zero_point)
    assert back.shape == values.shape and back.dtype == np.float32
    exact = (codes.astype(np.float64) - zero_point) * scale
    np.testing.assert_allclose(back, np.clip(exact, -LARGEST, LARGEST), rtol=2**-24, atol=SMALLEST / 2)


def assert_within_half_a_step(values, codes, scale, zero_point):
    """In exact arithmetic; what is allowed beside half a step is the rounding of scale and zero point, in float64."""
    values = np.asarray(values, np.float32).ravel().tolist()
    step, zero = Fraction(scale), Fraction(zero_point)
    for value, code in zip(values, codes.ravel().tolist(), strict=True):
        error = abs((code - zero) * step - Fraction(value))
        assert error <= step / 2 + abs(Fraction(value)) * Fraction(2) ** -50 + step * Fraction(2) ** -45


@given(float_arrays)
def test_symmetric_codes_are_the_originals(values):
    """Written again, in fractions: round(value / ((max - min) / 15)), clipped; also where an int8 would wrap around."""
    codes, scale, zero_point = quantize_to_int4(values, symmetric=True)
    assert zero_point == 0
    exact = [Fraction(value) for value in values.ravel().tolist()]
    step = (max(exact) - min(exact)) / 15 if exact else 0
    assert scale == pytest.approx(float(step) if step else 1.0, rel=1e-15)
    for value, code in zip(exact, codes.ravel().tolist(), strict=True):
        position = value / (step or 1)
        nearest = min(max(round(position), -8), 7)
        # Next to a tie, the quotient of floats may fall on the other side.
        assert code == nearest or abs(abs(position - code) - Fraction(1, 2)) < Fraction(1, 10**12)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([0, math.nan], r"finite in float32; values\[1\] is nan"),
        (np.array([[1, 2], [-math.inf, math.nan]]), r"values\[1, 0\] is -inf"),
        ([1e300, 1], r"values\[0\] is 1e\+300"),
        (math.inf, "values is inf"),
        ([[1, 2], [3]], "equal lengths"),
    ],
)
def test_bad_values(values, message):
    with pytest.raises(ValueError, match=rf"\[quantize_to_int4\] values must be .*{message}"):
        quantize_to_int4(values)


@pytest.mark.parametrize("values", [["1", "2"], [1j], [None], [True], "12"])
def test_values_that_are_no_numbers(values):
    with pytest.raises(TypeError, match=r"\[quantize_to_int4\] values must be real numbers"):
        quantize_to_int4(values)


def test_unknown_scale_method():
    with pytest.raises(ValueError, match=r"scale_method 'mean' is not supported; supported are minmax, absmax"):
        quantize_to_int4([1.0], "mean")


# --- Dequantizing -----------------------------------------------------------------------------------------------------


def test_dequantize_by_hand():
    codes = np.array([[-8, 0, 7]], np.int8)
    assert dequantize_from_int4(codes, 0.5).tolist() == [[-4.0, 0.0, 3.5]]
    assert dequantize_from_int4(codes, 0.5, 2).tolist() == [[-5.0, -1.0, 2.5]]
    assert dequantize_from_int4([-8, 7], np.float32(0.25), zero_point=-8.0).tolist() == [0.0, 3.75]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1, 8], 1.0), ValueError, r"quantized_values must be from -8 to 7; quantized_values\[1\] is 8"),
        (([1.0], 1.0), TypeError, "quantized_values must be integers from -8 to 7, not float64"),
        (([1], math.inf), ValueError, "scale must be finite, not inf"),
        (([1], 1.0, math.nan), ValueError, "zero_point must be finite, not nan"),
        (([1], [1.0]), TypeError, r"scale must be one number, not \[1.0\]"),
        (([1], "1"), TypeError, "scale must be one number, not '1'"),
        (([1], 1.0, None), TypeError, "zero_point must be one number, not None"),
    ],
)
def test_bad_arguments_of_dequantize(arguments, error, message):
    with pytest.raises(error, match=rf"\[dequantize_from_int4\] {message}"):
        dequantize_from_int4(*arguments)


# --- Packing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("codes", "packed"),
    [
        ([-8, 7, -1], [0x78, 0x0F]),
        ([1, 2], [0x21]),
        ([-1, -1], [-1]),
        ([0, -8], [-128]),
        ([5], [5]),
        ([], []),
        ([[1, 2, 3], [-4, -5, -6]], [[0x21, 0x03], [0xBC - 256, 0x0A]]),
        ([[[-3]], [[4]]], [[[0x0D]], [[0x04]]]),
        (np.zeros((3, 0), np.int8), [[], [], []]),
    ],
)
def test_packed_bytes_by_hand(codes, packed):
    found = pack_int4_to_int8(codes)
    assert found.dtype == np.int8
    assert found.tolist() == packed


def test_packing_takes_any_integers_and_strides():
    codes = np.array([[1, -2, 3, -4], [5, -6, 7, -8]])
    expected = [[0xE1 - 256, 0xC3 - 256], [0xA5 - 256, 0x87 - 256]]
    for dtype in (np.int8, np.int16, np.int32, np.int64):
        assert pack_int4_to_int8(codes.astype(dtype)).tolist() == expected
    assert pack_int4_to_int8(codes.T.copy().T).tolist() == expected
    assert pack_int4_to_int8(np.array([7, 0, 1], np.uint64)).tolist() == [7, 1]


def test_all_bytes():
    """Both ways; the codes by Python's own integers."""
    packed = np.arange(256, dtype=np.uint8)
    codes = unpack_int8_to_int4(packed)
    nibbles = [nibble for byte in range(256) for nibble in (byte % 16, byte // 16)]
    assert codes.dtype == np.int8
    assert codes.tolist() == [nibble - 16 if nibble > 7 else nibble for nibble in nibbles]
    np.testing.assert_array_equal(unpack_int8_to_int4(packed.view(np.int8)), codes)
    np.testing.assert_array_equal(pack_int4_to_int8(codes).view(np.uint8), packed)


@given(code_arrays)
def test_what_is_packed_comes_back(codes):
    packed = pack_int4_to_int8(codes)
    length = codes.shape[-1]
    assert packed.shape == (*codes.shape[:-1], (length + 1) // 2)
    np.testing.assert_array_equal(unpack_int8_to_int4(packed, length=length), codes)
    padded = unpack_int8_to_int4(packed)
    assert padded.shape == (*codes.shape[:-1], 2 * packed.shape[-1])
    np.testing.assert_array_equal(padded[..., :length], codes)
    assert not padded[..., length:].any()


@pytest.mark.parametrize(
    ("codes", "error", "message"),
    [
        ([0, 8], ValueError, r"from -8 to 7; int4_values\[1\] is 8"),
        ([[0, 1], [-9, 15]], ValueError, r"int4_values\[1, 0\] is -9"),
        (np.array([255], np.uint8), ValueError, r"int4_values\[0\] is 255"),
        ([1.0, 2.0], TypeError, "integers from -8 to 7, not float64"),
        ([True], TypeError, "not bool"),
        (3, ValueError, "have an axis"),
    ],
)
def test_what_cannot_be_packed(codes, error, message):
    with pytest.raises(error, match=rf"\[pack_int4_to_int8\] int4_values must .*{message}"):
        pack_int4_to_int8(np.array(codes))


@pytest.mark.parametrize(
    ("packed", "length", "error", "message"),
    [
        (np.zeros(2, np.int32), None, TypeError, "packed_values must be int8 or uint8, not int32"),
        (np.zeros(2, np.float32), None, TypeError, "not float32"),
        (np.int8(3), None, ValueError, "must have an axis"),
        (np.zeros((5, 2), np.int8), 2, ValueError, "2 bytes hold 3 or 4 codes, not length=2"),
        (np.zeros(2, np.int8), 5, ValueError, "not length=5"),
        (np.zeros(0, np.int8), -1, ValueError, "0 bytes hold 0 codes, not length=-1"),
    ],
)
def test_what_cannot_be_unpacked(packed, length, error, message):
    with pytest.raises(error, match=rf"\[unpack_int8_to_int4\] .*{message}"):
        unpack_int8_to_int4(packed, length=length)


# --- The example, and numpy -------------------------------------------------------------------------------------------


def test_example(capsys):
    values, codes, dequantized = int4.example()
    np.testing.assert_array_equal(values, np.array(VALUES, np.float32))
    assert codes.tolist() == [-1, 0, -3, 3, 5, -2, 7, -8]
    np.testing.assert_allclose(dequantized, [0, 0.66, -1.32, 2.64, 3.96, -0.66, 5.28, -4.62], rtol=1e-6)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "scale 0.6600, zero point -1, 4 bytes packed"
    assert [line.split() for line in lines[-2:]] == [
        ["5.200", "7", "5.280", "0.080"],
        ["-4.700", "-8", "-4.620", "0.080"],
    ]


def test_numpy_is_needed_by_calls_alone(tmp_path):
    code = """
import sys, warnings
warnings.simplefilter("ignore")
sys.modules["numpy"] = None
import quantization_mlx
from quantization_mlx import int4
for call in (int4.example, lambda: int4.quantize_to_int4([1]), lambda: int4.dequantize_from_int4([1], 1),
             lambda: int4.pack_int4_to_int8([1]), lambda: int4.unpack_int8_to_int4([1])):
    try:
        call()
    except ImportError as error:
        print(error)
"""
    message = 'this needs the package numpy: pip install "quantization-mlx[int4]"\n'
    assert printed("-c", code, cwd=tmp_path) == 5 * message
