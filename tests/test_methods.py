"""Number formats: properties on any weights, and equality with a slow twin."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from defaker_opt.catalog import find_module, module_names
from defaker_opt.graph.packing import pack_codes, unpack_codes
from defaker_opt.methods import (
    FP4,
    FP8,
    NF4,
    SCHEMES,
    Method,
    QuantizedWeight,
    Scheme,
    Statistics,
    _grids,
    parse_scheme,
)
from defaker_opt.spool import SpooledCodes
from tests.reference.nvfp4 import e2m1_numbers, round_to_nvfp4_plain
from tests.reference.quantization import (
    optimal_rounding_plain,
    output_error_plain,
    pack_codes_plain,
    range_asymmetric_plain,
    round_to_fp8_plain,
    round_to_nearest_plain,
    round_to_nf4_plain,
)

METHODS: list[str] = module_names("methods")
# The magnitudes of FP4.
E2M1 = np.array(sorted({abs(number) for number in e2m1_numbers()}))
INT_SCHEMES = [scheme for name in SCHEMES if (scheme := parse_scheme(name))]
SYMMETRIC = [scheme for scheme in INT_SCHEMES if scheme.zero_point == "fixed"]
BLOCKED = [scheme for scheme in INT_SCHEMES if scheme.group_size]


def method(name: str, **knobs: object) -> Method:
    found: Method = find_module("methods", name).METHOD(**knobs)
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


def inputs(tokens: int, columns: int, seed: int = 1) -> np.ndarray:
    """Activations [tokens, in] that share directions; some channels are large, one is dead, two are the same."""
    generator = np.random.default_rng(seed)
    x = generator.standard_normal((tokens, columns // 4)) @ generator.standard_normal((columns // 4, columns))
    x = x / np.sqrt(columns) + 0.3 * generator.standard_normal((tokens, columns))
    x[:, 3::29] *= 15
    x[:, 5] = 0
    x[:, 7] = x[:, 6]
    return x


def seen(x: np.ndarray, before: np.ndarray | None = None) -> Statistics:
    """Statistics of inputs [tokens, in]; before: the same when nothing was quantized."""
    shift = ((x if before is None else before) - x).T @ x / len(x)
    return Statistics(len(x), x.T @ x / len(x), shift, np.abs(x).mean(0))


def output_error(quantized: QuantizedWeight, weight: np.ndarray, x: np.ndarray) -> float:
    return output_error_plain(weight, quantized.dequantize(), x)


def test_methods_and_schemes_were_found() -> None:
    assert len(METHODS) >= 6
    assert len(INT_SCHEMES) >= 9


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("scheme", INT_SCHEMES, ids=str)
@settings(max_examples=8, deadline=None)
@given(weight=weights())
def test_codes_fit_their_scheme_and_decode_to_finite_numbers(name: str, scheme: Scheme, weight: np.ndarray) -> None:
    quantized = method(name).quantize(weight, scheme, seen(inputs(200, 128)))
    groups = 128 // scheme.group_size if scheme.group_size else 1
    assert quantized.scheme == scheme
    assert quantized.codes.shape == weight.shape
    assert quantized.codes.dtype == {"fp": FP8, "nvfp": FP4}.get(scheme.number, np.int8)
    numbers = scheme.numbers(quantized.codes).astype(np.float32)
    assert numbers.min() >= scheme.smallest_code
    assert numbers.max() <= scheme.largest_code
    assert quantized.scale.shape == (len(weight), groups)
    assert quantized.scale.dtype == np.float32
    assert (np.abs(quantized.scale) >= np.finfo(np.float32).tiny).all()
    if scheme.symmetric:
        assert (quantized.scale == quantized.scale.astype(np.float16)).all() and (quantized.scale > 0).all()
    assert (quantized.zero is None) == (scheme.zero_point == "fixed")
    if quantized.zero is not None:
        assert quantized.zero.dtype == np.int8
        assert quantized.zero.shape == quantized.scale.shape
        assert quantized.zero.min() >= scheme.smallest_code
        assert quantized.zero.max() <= scheme.largest_code
    assert np.isfinite(quantized.dequantize()).all()
    assert quantized.dequantize().dtype == np.float32


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("scheme", INT_SCHEMES, ids=str)
def test_zeros_stay_zeros(name: str, scheme: Scheme) -> None:
    weight = np.zeros((3, 128), np.float32)
    assert not method(name).quantize(weight, scheme, seen(inputs(200, 128))).dequantize().any()


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("scheme", INT_SCHEMES, ids=str)
def test_equal_calls_give_equal_bytes(name: str, scheme: Scheme) -> None:
    weight, statistics = correlated(8, 256), seen(inputs(300, 256))
    one, two = (method(name).quantize(weight, scheme, statistics) for _ in range(2))
    assert one.codes.tobytes() == two.codes.tobytes()
    assert one.scale.tobytes() == two.scale.tobytes()


@pytest.mark.parametrize("scheme", INT_SCHEMES, ids=str)
@settings(max_examples=20, deadline=None)
@given(weight=weights())
def test_rounding_moves_no_weight_further_than_half_a_step(scheme: Scheme, weight: np.ndarray) -> None:
    quantized = method("round_to_nearest").quantize(weight, scheme)
    step = np.repeat(quantized.scale, weight.shape[1] // quantized.scale.shape[1], axis=1)
    # A zero point is rounded too, so one end of the range may be cut off by half a step more.
    share = 0.5001 if scheme.zero_point == "fixed" else 1.0001
    if scheme.floating:
        # Steps of FP8 grow with numbers: an eighth of the power of two below, and 2^-9 at least.
        step = step * np.maximum(2.0**-9, 2.0 ** (np.floor(np.log2(np.abs(weight / step) + 1e-30)) - 3))
    if scheme.number == "nf":
        # The step is the gap that a number lies in.
        gap = np.clip(np.searchsorted(NF4, weight / step) - 1, 0, len(NF4) - 2)
        step = step * np.diff(NF4)[gap]
    if scheme.number == "nvfp":
        gap = np.searchsorted(E2M1[1:-1], np.abs(weight) / step)
        step = step * np.diff(E2M1)[gap]
    assert np.all(np.abs(quantized.dequantize() - weight) <= share * step + 1e-30)


@pytest.mark.parametrize("scheme", SYMMETRIC, ids=str)
@settings(max_examples=20, deadline=None)
@given(weight=weights())
def test_quantizing_what_was_decoded_changes_nothing(scheme: Scheme, weight: np.ndarray) -> None:
    decoded = method("round_to_nearest").quantize(weight, scheme).dequantize()
    again = method("round_to_nearest").quantize(decoded, scheme).dequantize()
    np.testing.assert_allclose(again, decoded, rtol=1e-6, atol=0)


@pytest.mark.parametrize("columns", [16, 48, 192, 1024])
@pytest.mark.parametrize("scheme", INT_SCHEMES, ids=str)
def test_round_to_nearest_equals_its_plain_twin(scheme: Scheme, columns: int) -> None:
    fitted = scheme.fitted(columns)
    if fitted is None:
        assert columns % (64 if scheme.symmetric else 32)  # engines and bitsandbytes take no smaller groups
        return
    weight = correlated(7, columns)
    weight[2] = 0
    weight[3, : columns // 2] = 0
    weight[4] = weight[5]
    quantized = method("round_to_nearest").quantize(weight, fitted)
    if fitted.zero_point == "group":
        assert fitted.group_size is not None
        plain = range_asymmetric_plain(weight, fitted.bits, fitted.group_size)
        np.testing.assert_array_equal(quantized.dequantize(), plain)
        return
    if fitted.number == "nf":
        assert fitted.group_size is not None
        np.testing.assert_array_equal(quantized.dequantize(), round_to_nf4_plain(weight, fitted.group_size))
        return
    if fitted.number == "nvfp":
        codes, scale, tensor_scale = round_to_nvfp4_plain(weight)
        np.testing.assert_array_equal(quantized.codes.astype(np.float64), codes)
        np.testing.assert_array_equal(quantized.block_scales().astype(np.float64), scale)
        assert quantized.tensor_scale == tensor_scale
        np.testing.assert_array_equal(quantized.scale, scale.astype(np.float32) * tensor_scale)
        return
    codes, scale = (
        round_to_fp8_plain(weight)
        if fitted.floating
        else round_to_nearest_plain(weight, fitted.bits, fitted.group_size, fitted.symmetric)
    )
    np.testing.assert_array_equal(quantized.codes.astype(np.float64), codes)
    np.testing.assert_array_equal(quantized.scale, scale)


@pytest.mark.parametrize("name", METHODS)
def test_more_bits_and_smaller_groups_are_never_worse(name: str) -> None:
    weight, x = correlated(32, 512), inputs(700, 512)
    statistics = seen(x)

    def error(scheme: Scheme) -> float:
        return output_error(method(name).quantize(weight, scheme, statistics), weight, x)

    by_bits = [error(Scheme(bits, 128, "block", "group")) for bits in (2, 3, 4, 8)]
    by_group = [error(Scheme(4, size, "block")) for size in (512, 128, 32)]
    assert by_bits == sorted(by_bits, reverse=True)
    assert by_group == sorted(by_group, reverse=True)


@pytest.mark.parametrize("scheme", INT_SCHEMES, ids=str)
@settings(max_examples=20, deadline=None)
@given(weight=weights())
def test_a_searched_scale_is_never_worse_than_the_range(scheme: Scheme, weight: np.ndarray) -> None:
    def errors(name: str) -> np.ndarray:
        change = method(name).quantize(weight, scheme).dequantize().astype(np.float64) - weight
        return np.square(change).reshape(len(weight), -1, scheme.group_size or weight.shape[1]).sum(-1)

    assert (errors("mse_clip") <= errors("round_to_nearest") * (1 + 1e-5) + 1e-30).all()


@pytest.mark.parametrize("scheme", BLOCKED, ids=str)
def test_data_free_methods_beat_rounding_on_weights_with_outliers(scheme: Scheme) -> None:
    generator = np.random.default_rng(4)
    weight = generator.standard_t(4, (64, 512)).astype(np.float32)

    def mean_abs(name: str) -> float:
        return float(np.abs(method(name).quantize(weight, scheme).dequantize() - weight).mean())

    # NF4 has its numbers close together where most weights are, so less is left to gain.
    share = 0.98 if scheme.number == "nf" else 0.97
    assert mean_abs("mse_clip") < share * mean_abs("round_to_nearest")
    assert mean_abs("hqq") < share * mean_abs("round_to_nearest")


def rounding(quantized: QuantizedWeight) -> Callable[[int, np.ndarray], np.ndarray]:
    """Rounds a column on the grids that a quantized weight ended with."""
    scheme = quantized.scheme
    size = scheme.group_size or quantized.codes.shape[1]

    def round_column(column: int, weight: np.ndarray) -> np.ndarray:
        scale = quantized.scale[:, column // size]
        zero = 0 if quantized.zero is None else quantized.zero[:, column // size].astype(np.float32)
        codes = np.rint(weight[:, column].astype(np.float32) / scale) + zero
        return (np.clip(codes, scheme.smallest_code, scheme.largest_code) - zero).astype(np.float64) * scale

    return round_column


@pytest.mark.parametrize("order", ["natural", "activation"])
@pytest.mark.parametrize(
    "scheme",
    [
        Scheme(8),
        Scheme(4, 16, "block"),
        Scheme(4, 64, "block", "group"),
        Scheme(4, 192, "block"),
        Scheme(3, 384, "block"),
    ],
    ids=str,
)
def test_gptq_rounds_as_solving_for_every_column_does(scheme: Scheme, order: str) -> None:
    """Correlated inputs with dead and equal columns, and several borders of groups and blocks."""
    weight, x = correlated(6, 384), inputs(500, 384)
    quantized = method("gptq", order=order).quantize(weight, scheme, seen(x))
    hessian = x.T @ x / len(x)
    mean = np.diagonal(hessian).mean()
    hessian += 0.01 * mean * np.eye(384)
    hessian[5, 5] = mean
    columns = list(range(384))
    if order == "activation":
        columns.sort(key=lambda column: -hessian[column, column])
    plain = optimal_rounding_plain(weight, hessian, columns, rounding(quantized))
    np.testing.assert_allclose(quantized.dequantize(), plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scheme", BLOCKED, ids=str)
@pytest.mark.parametrize("columns", [128, 1024])
def test_gptq_and_awq_lose_less_of_the_outputs_than_a_searched_scale(scheme: Scheme, columns: int) -> None:
    weight, x = correlated(48, columns), inputs(3 * columns, columns)

    def error(name: str, **knobs: object) -> float:
        return output_error(method(name, **knobs).quantize(weight, scheme, seen(x)), weight, x)

    # As many columns as a group leave nothing to make up with once the last ones are rounded.
    share = 0.8 if columns == 1024 else 0.98
    assert error("gptq") < share * error("mse_clip")
    assert error("gptq", order="activation") < share * error("mse_clip")
    assert error("awq") < share * error("mse_clip")


def test_gptq_leaves_weights_of_dead_inputs_where_rounding_puts_them() -> None:
    weight, x = correlated(6, 128), inputs(300, 128)
    quantized = method("gptq").quantize(weight, Scheme(8), seen(x))
    assert np.all(np.abs(quantized.dequantize()[:, 5] - weight[:, 5]) <= 0.51 * quantized.scale[:, 0])


def test_gptaq_without_a_shift_is_gptq() -> None:
    weight, statistics = correlated(6, 128), seen(inputs(300, 128))
    one, two = (method(name).quantize(weight, Scheme(4, 32, "block"), statistics) for name in ("gptq", "gptaq"))
    np.testing.assert_array_equal(one.codes, two.codes)


def test_gptaq_comes_nearer_to_what_the_layer_gave_before() -> None:
    """Inputs that earlier layers have changed: the aim is the product with the inputs as they were."""
    weight, before = correlated(32, 128), inputs(800, 128)
    generator = np.random.default_rng(3)
    mixing = np.eye(128) + 0.05 * generator.standard_normal((128, 128))
    now = before @ mixing
    wanted = before @ weight.T.astype(np.float64)

    def error(name: str) -> float:
        quantized = method(name).quantize(weight, Scheme(4, 32, "block"), seen(now, before))
        return float(np.mean(np.square(now @ quantized.dequantize().T.astype(np.float64) - wanted)))

    assert error("gptaq") < 0.3 * error("gptq")


def test_gptaqs_aim_is_the_least_squares_weight() -> None:
    """With codes too fine to matter, what is left is W*, here solved for directly."""
    weight, before = correlated(5, 64), inputs(400, 64)
    now = before + 0.2 * np.random.default_rng(3).standard_normal(before.shape)
    found = method("gptaq", damping=1e-9).quantize(weight, Scheme(8), seen(now, before)).dequantize()
    best = np.linalg.lstsq(now, before @ weight.T.astype(np.float64), rcond=None)[0].T
    fine = method("gptq", damping=1e-9).quantize(best.astype(np.float32), Scheme(8), seen(now)).dequantize()
    np.testing.assert_allclose(found, fine, atol=2e-2 * np.abs(best).max())
    assert np.linalg.norm(found - best) < 0.2 * np.linalg.norm(weight - best)


def test_awqs_factor_and_codes_stand_for_one_weight() -> None:
    weight, x = correlated(24, 256), inputs(500, 256)
    x[:, 9] *= 60
    quantized = method("awq").quantize(weight, Scheme(4, 64, "block"), seen(x))
    assert quantized.input_factor is not None
    without = QuantizedWeight(quantized.codes, quantized.scale, quantized.scheme, quantized.zero)
    apart = (x * quantized.input_factor) @ without.dequantize().T.astype(np.float64)
    np.testing.assert_allclose(x @ quantized.dequantize().T.astype(np.float64), apart, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("value", [0.0, 1e-42, 3e38])
def test_extreme_weights_decode_to_finite_numbers(name: str, value: float) -> None:
    weight = np.full((2, 64), value, np.float32)
    with np.errstate(over="ignore"):
        decoded = method(name).quantize(weight, Scheme(8), seen(inputs(100, 64))).dequantize()
    assert np.isfinite(decoded).all()
    if name == "round_to_nearest":
        np.testing.assert_allclose(decoded, weight, rtol=1e-5, atol=1e-37)


@pytest.mark.parametrize(
    ("columns", "group_size"),
    [(1024, 128), (192, 64), (896, 128), (4864, 128), (144, 16), (588, None), (100, None)],
)
def test_a_group_is_the_largest_that_divides_the_columns(columns: int, group_size: int | None) -> None:
    fitted = Scheme(4, 128, "block").fitted(columns)
    assert (fitted.group_size if fitted else None) == group_size


@pytest.mark.parametrize("bits", [2, 4])
@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_codes_survive_packing(bits: int, data: st.DataObject) -> None:
    shape = st.tuples(st.integers(1, 4), st.integers(1, 33))
    within = st.integers(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    codes = data.draw(arrays(np.int8, shape, elements=within))
    np.testing.assert_array_equal(pack_codes(codes, bits), pack_codes_plain(codes, bits))
    np.testing.assert_array_equal(unpack_codes(pack_codes(codes, bits), bits, codes.shape[1]), codes)


@pytest.mark.parametrize("name", SCHEMES)
def test_a_scheme_is_called_what_it_is_written_as(name: str) -> None:
    scheme = parse_scheme(name)
    assert (str(scheme) if scheme else "float") == name


def test_zero_points_and_input_factors_survive_the_spool(tmp_path: Path) -> None:
    weight, statistics = correlated(8, 128), seen(inputs(300, 128))
    codes = SpooledCodes(tmp_path)
    codes["a.weight"] = method("awq").quantize(weight, Scheme(4, 32, "block", "group"), statistics)
    codes["b.weight"] = method("round_to_nearest").quantize(weight, Scheme(2, 32, "block", "group"))
    codes["c.weight"] = method("gptq").quantize(weight, Scheme(8), statistics)
    four = Scheme(4, 16, "block", number="nvfp")
    codes["d.weight"] = method("awq").quantize(weight, four, statistics)
    again = SpooledCodes(tmp_path)
    assert set(again) == {"a.weight", "b.weight", "c.weight", "d.weight"}
    for name in again:
        np.testing.assert_array_equal(again[name].dequantize(), codes[name].dequantize())
        assert again[name].scheme == codes[name].scheme
        assert again[name].codes.dtype == codes[name].codes.dtype
        assert (again[name].zero is None) == (name in ("c.weight", "d.weight"))
        assert (again[name].input_factor is None) == (name not in ("a.weight", "d.weight"))
        assert again[name].tensor_scale == codes[name].tensor_scale
        assert (again[name].tensor_scale is None) == (name != "d.weight")
    for name in ("a.weight", "d.weight"):
        del again[name]
        assert not [path for path in tmp_path.iterdir() if path.name.startswith(name)]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", ["int4-g64", "int4-sym-g64", "int8", "fp8", "nvfp4-g16"])
def test_grids_searched_in_pieces_are_those_of_the_whole(
    name: str, weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheme = parse_scheme(name)
    assert scheme is not None
    values = _grids.grouped(correlated(13, 128), scheme)
    importance = np.random.default_rng(1).random(values.shape[1:]) if weighted else None
    whole = _grids.searched_grid(values, scheme, importance)
    monkeypatch.setattr(_grids, "_AT_ONCE", 256)
    pieces = _grids.searched_grid(values, scheme, importance)
    np.testing.assert_array_equal(pieces.scale, whole.scale)
    np.testing.assert_array_equal(pieces.zero, whole.zero)
