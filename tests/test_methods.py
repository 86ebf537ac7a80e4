"""Number formats: properties on any weights, and equality with a slow twin."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from defaker_opt.catalog import find_module, module_names
from defaker_opt.graph.codes import pack_nibbles, unpack_nibbles
from defaker_opt.methods import SCHEMES, Method, Scheme, parse_scheme
from tests.reference.quantization import pack_nibbles_plain, round_to_nearest_plain

METHODS: list[str] = module_names("methods")
INT_SCHEMES = [scheme for name in SCHEMES if (scheme := parse_scheme(name))]


def method(name: str) -> Method:
    found: Method = find_module("methods", name).METHOD()
    return found


def weights(columns: int = 128) -> st.SearchStrategy[np.ndarray]:
    finite = st.floats(-1e4, 1e4, width=32)
    return arrays(np.float32, st.tuples(st.integers(1, 5), st.just(columns)), elements=finite)


def correlated(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Rows that share directions, a few columns a hundred times larger, as in trained layers."""
    generator = np.random.default_rng(seed)
    weight = generator.standard_normal((rows, 4)) @ generator.standard_normal((4, columns))
    weight += 0.3 * generator.standard_normal((rows, columns))
    weight[:, ::37] *= 100
    return weight.astype(np.float32)


def test_methods_and_schemes_were_found() -> None:
    assert METHODS
    assert len(INT_SCHEMES) >= 5


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("scheme", INT_SCHEMES, ids=str)
@settings(max_examples=30, deadline=None)
@given(weight=weights())
def test_rounding_moves_no_weight_further_than_half_a_step(name: str, scheme: Scheme, weight: np.ndarray) -> None:
    quantized = method(name).quantize(weight, scheme)
    groups = quantized.scale.shape[1]
    step = np.repeat(quantized.scale, weight.shape[1] // groups, axis=1)
    assert np.all(np.abs(quantized.dequantize() - weight) <= 0.5001 * step + 1e-30)
    assert np.abs(quantized.codes).max(initial=0) <= scheme.largest_code
    assert quantized.codes.dtype == np.int8
    assert quantized.scale.dtype == np.float32
    assert np.isfinite(quantized.scale).all()
    assert (quantized.scale > 0).all()


@pytest.mark.parametrize("scheme", INT_SCHEMES, ids=str)
@settings(max_examples=30, deadline=None)
@given(weight=weights())
def test_quantizing_what_was_decoded_changes_nothing(scheme: Scheme, weight: np.ndarray) -> None:
    decoded = method("round_to_nearest").quantize(weight, scheme).dequantize()
    again = method("round_to_nearest").quantize(decoded, scheme).dequantize()
    np.testing.assert_allclose(again, decoded, rtol=1e-6, atol=0)


@pytest.mark.parametrize("columns", [16, 48, 192, 1024])
@pytest.mark.parametrize("scheme", INT_SCHEMES, ids=str)
def test_round_to_nearest_equals_its_plain_twin(scheme: Scheme, columns: int) -> None:
    fitted = scheme.fitted(columns)
    assert fitted is not None
    weight = correlated(7, columns)
    weight[2] = 0
    weight[3, : columns // 2] = 0
    weight[4] = weight[5]
    quantized = method("round_to_nearest").quantize(weight, fitted)
    codes, scale = round_to_nearest_plain(weight, fitted.bits, fitted.group_size)
    np.testing.assert_array_equal(quantized.codes, codes)
    np.testing.assert_array_equal(quantized.scale, scale)


def test_more_bits_and_smaller_groups_are_never_worse() -> None:
    weight = correlated(32, 512)

    def error(scheme: Scheme) -> float:
        return float(np.linalg.norm(method("round_to_nearest").quantize(weight, scheme).dequantize() - weight))

    by_bits = [error(Scheme(bits, 128, "block")) for bits in (3, 4, 8)]
    by_group = [error(Scheme(4, size, "block")) for size in (512, 128, 32)]
    assert by_bits == sorted(by_bits, reverse=True)
    assert by_group == sorted(by_group, reverse=True)


@pytest.mark.parametrize("value", [0.0, 1e-42, 3e38])
def test_extreme_weights_decode_to_finite_numbers(value: float) -> None:
    weight = np.full((2, 64), value, np.float32)
    decoded = method("round_to_nearest").quantize(weight, Scheme(8)).dequantize()
    assert np.isfinite(decoded).all()
    np.testing.assert_allclose(decoded, weight, rtol=1e-5, atol=1e-37)


@pytest.mark.parametrize(
    ("columns", "group_size"),
    [(1024, 128), (192, 64), (896, 128), (4864, 128), (144, 16), (588, None), (100, None)],
)
def test_a_group_is_the_largest_that_divides_the_columns(columns: int, group_size: int | None) -> None:
    fitted = Scheme(4, 128, "block").fitted(columns)
    assert (fitted.group_size if fitted else None) == group_size


@settings(max_examples=50, deadline=None)
@given(codes=arrays(np.int8, st.tuples(st.integers(1, 4), st.just(32)), elements=st.integers(-8, 7)))
def test_nibbles_survive_packing(codes: np.ndarray) -> None:
    np.testing.assert_array_equal(pack_nibbles(codes), pack_nibbles_plain(codes))
    np.testing.assert_array_equal(unpack_nibbles(pack_nibbles(codes)), codes)


@pytest.mark.parametrize("name", SCHEMES)
def test_a_scheme_is_called_what_it_is_written_as(name: str) -> None:
    scheme = parse_scheme(name)
    assert (str(scheme) if scheme else "float") == name
