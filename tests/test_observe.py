"""Statistics of layers' inputs: through the whole joint model, each layer on what quantized ones before it give."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from defaker_opt.detector import Detector, linear_weights, load_detector
from defaker_opt.errors import PassError, SuiteError
from defaker_opt.files import default_cache_folder
from defaker_opt.methods import NOTHING_SEEN, QuantizedWeight, Scheme, Statistics, parse_scheme
from defaker_opt.methods.round_to_nearest import RoundToNearest
from defaker_opt.observe import Sums, recorded
from defaker_opt.observe import line as line_module
from defaker_opt.observe import sweep as sweep_module
from defaker_opt.observe.inputs import Balance, question_inputs, tile_inputs, whole_inputs
from defaker_opt.observe.sweep import observe_layers
from defaker_opt.passes.quantize import Quantize, Rule
from defaker_opt.runtime.spec import STAGES
from defaker_opt.samples import Samples, load_samples

LAYERS = [
    "vision_encoder.tower.encoder.layer.0.mlp.fc1.weight",
    "vision_encoder.tower.encoder.layer.2.attention.projection_layer.weight",
    "vision_encoder.projector.3.weight",
    "language.layers.0.self_attn.q_proj.weight",
    "language.layers.2.mlp.down_proj.weight",
    "language.verdict_head.weight",
    "language.seg_projection.2.weight",
    "mask_encoder.trunk.blocks.4.mlp.proj_in.weight",
    "mask_decoder.transformer.layers.1.mlp.proj_out.weight",
]


@pytest.fixture(scope="module")
def samples() -> Samples:
    whole = load_samples("embedded", default_cache_folder(), lambda what, fraction: None)
    return Samples(whole.name, whole.digest, whole.items[:3])


def fresh() -> Detector:
    return replace(load_detector("reference"), codes={})


def plain_inputs(detector: Detector, samples: Samples, name: str) -> list[torch.Tensor]:
    """Every input of one layer, by running whole stages one after the other, picture by picture."""
    stages = {stage: detector.load_stage(stage) for stage in STAGES}
    stage, _, inner = name.removesuffix(".weight").partition(".")
    layer = {name: stages[stage].get_submodule(inner)}
    found = []
    with torch.inference_mode():
        for tiles, whole in zip(tile_inputs(detector, samples), whole_inputs(detector, samples)):
            with recorded(layer) as seen:
                vision = stages["vision_encoder"](*tiles.tensors)
                answers = {}
                for question, call in zip(("verdict", "mask"), question_inputs(detector, [vision], None)):
                    answers[question] = stages["language"](*call.tensors)
                    if inner.startswith("seg_projection") and question == "verdict":
                        seen.clear()
                    if inner == "verdict_head" and question == "mask":
                        seen[name].pop()
                stages["mask_decoder"](*stages["mask_encoder"](*whole.tensors), answers["mask"][1])
            found += [x.reshape(-1, x.shape[-1]).double() for x in seen[name]]
    return found


def swept(
    detector: Detector, samples: Samples, needs: dict[str, tuple[str, ...]], balance: Balance | None = None
) -> dict[str, Statistics]:
    """Sweep with every layer that is in `needs` or comes before it quantized coarsely; the statistics of `needs`."""
    found = {}
    for group in observe_layers(detector, samples, needs, balance):  # type: ignore[arg-type]
        for name, seen in group.items():
            if name in needs:
                found[name] = seen
            if name in COARSE and name not in detector.codes:
                original = replace(detector, codes={}).read(name).numpy()
                detector.codes[name] = RoundToNearest().quantize(original, Scheme(4))
    return found


COARSE = {
    name
    for stage in ("vision_encoder", "language")
    for name in linear_weights(load_detector("reference").config, stage)
    if "layer.1." in name or "layers.0.self_attn.o_proj" in name or "projector.1" in name
}


def test_every_layer_sees_what_quantized_layers_before_it_give(samples: Samples) -> None:
    detector = fresh()
    names = [name for name in LAYERS if name in all_names(detector)]
    assert len(names) == len(LAYERS)
    found = swept(detector, samples, dict.fromkeys(names, ("hessian", "mean_abs", "shift")))
    assert detector.codes
    for name in names:
        now = plain_inputs(detector, samples, name)
        if not name.startswith("vision_encoder.projector.3") and "layers.0.self_attn" not in name:
            x = torch.cat(now)
            assert found[name].tokens == len(x), name
            close(found[name].hessian, x.T @ x / len(x))
            close(found[name].mean_abs, x.abs().mean(0))
            before = torch.cat(plain_inputs(fresh(), samples, name))
            close(found[name].shift, (before - x).T @ x / len(x), 2e-3)


def all_names(detector: Detector) -> set[str]:
    return {name for stage in STAGES for name in linear_weights(detector.config, stage)}


def close(found: np.ndarray | None, expected: torch.Tensor, tolerance: float = 1e-4) -> None:
    assert found is not None
    assert np.linalg.norm(found - expected.numpy()) <= tolerance * max(np.linalg.norm(expected.numpy()), 1e-6)


def test_layers_come_in_the_order_in_which_they_run_and_all_of_them(samples: Samples) -> None:
    detector = fresh()
    name = "language.layers.1.mlp.up_proj.weight"
    groups = list(observe_layers(detector, samples, {name: ("mean_abs",)}))
    order = [layer for group in groups for layer in group]
    assert sorted(order) == sorted(all_names(detector))
    assert [STAGES.index(layer.partition(".")[0]) for layer in order] == sorted(
        STAGES.index(layer.partition(".")[0]) for layer in order
    )
    assert [layer for group in groups for layer, seen in group.items() if seen is not NOTHING_SEEN] == [name]


def coarse(detector: Detector, layers: Collection[str]) -> dict[str, QuantizedWeight]:
    original = replace(detector, codes={})
    return {name: RoundToNearest().quantize(original.read(name).numpy(), Scheme(4)) for name in layers}


def test_codes_that_nothing_seen_would_change_are_there_when_it_is_seen(
    samples: Samples, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each call then passes each block once, and layers are given what the whole coded detector gives them."""
    passed: list[nn.Module] = []
    run = line_module._run

    def counted(block: nn.Module, state: line_module.State) -> torch.Tensor:
        passed.append(block)
        return run(block, state)

    monkeypatch.setattr(line_module, "_run", counted)
    monkeypatch.setattr(sweep_module, "open_cache", lambda *given: None)
    detector = fresh()
    needs = dict.fromkeys(sorted(all_names(detector)), ("largest", "mean_abs"))
    found: dict[str, Statistics] = {}
    for group in observe_layers(detector, samples, needs, None, lambda layers: coarse(detector, layers)):  # type: ignore[arg-type]
        found |= group
        detector.codes.update(coarse(detector, group))
    blocks = {"vision_encoder": 4, "language": 2 * 3, "mask_encoder": 5}
    assert len(passed) == len(samples.items) * sum(blocks.values())
    for name in LAYERS[:2] + LAYERS[3:5] + LAYERS[7:8]:
        x = torch.cat(plain_inputs(detector, samples, name))
        close(found[name].mean_abs, x.abs().mean(0))
        close(found[name].largest, x.abs().amax(0))


def test_a_layer_that_must_be_seen_first_is_seen_with_original_weights_around_it(samples: Samples) -> None:
    name = "language.layers.0.mlp.down_proj.weight"
    detector = fresh()

    def foregone(layers: Collection[str]) -> dict[str, QuantizedWeight] | None:
        return None if name in layers else coarse(detector, layers)

    for group in observe_layers(detector, samples, {name: ("mean_abs",)}, None, foregone):
        if name in group:
            break
    x = torch.cat(plain_inputs(fresh(), samples, name))
    close(group[name].mean_abs, x.abs().mean(0))


STATIC = Quantize((Rule("*.mlp.*", "int8-static", clip="largest"), Rule("*", "float")))


@pytest.mark.parametrize("asked_for_shift", [False, True])
def test_ranges_are_those_of_the_coded_detector_with_what_an_earlier_pass_did(
    asked_for_shift: bool, samples: Samples, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep_module, "open_cache", lambda *given: None)
    detector = fresh()
    earlier = [name for name in all_names(detector) if ".attention." in name or ".self_attn.o_proj" in name]
    detector.codes.update(coarse(detector, earlier))
    quantize = STATIC
    if asked_for_shift:  # in another stage: what is seen in this one stays the same
        quantize = Quantize((Rule("language.layers.2.mlp.down_proj.weight", "int4-g64", "gptaq"), *STATIC.rules))
    quantize.apply(detector, lambda what, fraction: None, samples)
    assert set(earlier) <= set(detector.codes)
    for name in (
        "vision_encoder.tower.encoder.layer.0.mlp.fc1.weight",
        "vision_encoder.tower.encoder.layer.2.mlp.fc2.weight",
        "mask_encoder.trunk.blocks.4.mlp.proj_out.weight",
    ):
        largest = max(float(x.abs().max()) for x in plain_inputs(detector, samples, name))
        assert detector.codes[name].input_scale == pytest.approx(largest / 127, rel=0.01), name


def test_balanced_tokens_count_as_the_kinds_say(samples: Samples) -> None:
    detector = fresh()
    prompt = detector.config.prompt
    assert prompt is not None
    vision = [(torch.zeros(2, 64, 192), torch.arange(64).expand(2, -1))]
    for call, ids in zip(question_inputs(detector, vision, Balance(3, 2, 1)), (prompt.verdict, prompt.mask)):
        assert call.weights is not None
        before = len(prompt.before)
        assert len(call.weights) == before + 128 + len(ids)
        assert float(call.weights[before : before + 128].sum()) == pytest.approx(3)
        assert float(call.weights[-1]) == 1
        assert float(call.weights.sum()) == pytest.approx(6)


def test_sums_are_weighted_means() -> None:
    generator = torch.Generator().manual_seed(0)
    x, before, weights = (torch.randn(shape, generator=generator) for shape in ((5, 3), (5, 3), (5,)))
    weights = weights.abs()
    sums = Sums(("hessian", "shift", "mean_abs"))
    sums.add_(x[:2], before[:2], weights[:2])
    sums.add_(x[2:], before[2:], weights[2:])
    seen = sums.statistics()
    hessian, shift, mean_abs = np.zeros((3, 3)), np.zeros((3, 3)), np.zeros(3)
    for row, earlier, weight in zip(x.double().numpy(), before.double().numpy(), weights.double().numpy()):
        hessian += weight * np.outer(row, row)
        shift += weight * np.outer(earlier - row, row)
        mean_abs += weight * np.abs(row)
    total = float(weights.double().sum())
    np.testing.assert_allclose(seen.hessian, hessian / total, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(seen.shift, shift / total, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(seen.mean_abs, mean_abs / total, rtol=1e-5)
    assert seen.tokens == 5


RULES = (
    Rule("language.layers.*", "int4-g32", "gptaq"),
    Rule("language.*", "float"),
    Rule("vision*", "int8"),
    Rule("*", "float"),
)


def test_a_rerun_gives_the_same_bytes_and_a_killed_run_goes_on_to_them(samples: Samples) -> None:
    whole, again = fresh(), fresh()
    Quantize(RULES).apply(whole, lambda what, fraction: None, samples)

    def stop(what: str, fraction: float) -> None:
        if "layers.1.self_attn.v_proj" in what:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Quantize(RULES).apply(again, stop, samples)
    assert 0 < len(again.codes) < len(whole.codes)
    # Codes of an unfinished group are made anew with those of the group that are there.
    Quantize(RULES).apply(again, lambda what, fraction: None, samples)
    assert again.codes.keys() == whole.codes.keys()
    for name, codes in whole.codes.items():
        assert codes.codes.tobytes() == again.codes[name].codes.tobytes(), name
        assert codes.scale.tobytes() == again.codes[name].scale.tobytes(), name


def write_table(path: Path, items: list[tuple[Path, int, str]]) -> str:
    """A table of pictures that lie beside it."""
    lines = ["image,label,mask,domain"]
    for number, (file, label, domain) in enumerate(items):
        name = f"{number}{file.suffix}"
        if file.exists():
            (path.parent / name).symlink_to(file)
        lines.append(f"{name},{label},,{domain}")
    path.write_text("\n".join(lines) + "\n")
    return str(path)


@pytest.fixture
def rows() -> list[tuple[Path, int, str]]:
    whole = load_samples("embedded", default_cache_folder(), lambda what, fraction: None)
    return [(item.image.path, item.label, item.slices["domain"]) for item in whole.items]


def test_a_table_of_ones_own_is_read(tmp_path: Path, rows: list[tuple[Path, int, str]]) -> None:
    name = write_table(tmp_path / "own.csv", rows[:40])
    found = load_samples(name, tmp_path, lambda what, fraction: None)
    assert len(found) == 40
    assert sum(1 for _ in found.images()) == 40


@pytest.mark.parametrize(
    ("choose", "message"),
    [
        (lambda rows: rows[:20], "20 pictures are too few"),
        (lambda rows: [row for row in rows if row[1] == 0], "only 0 of 64 pictures are forged"),
        (lambda rows: [row for row in rows if row[1] == 1], "only 0 of 64 pictures are authentic"),
        (lambda rows: [(file, label, "natural") for file, label, _ in rows], "all pictures are of the domain"),
        (lambda rows: [*rows, (Path("missing.png"), 1, "natural")], r"128\.png"),
    ],
)
def test_an_unfit_set_is_refused_with_the_reason(
    choose: object, message: str, tmp_path: Path, rows: list[tuple[Path, int, str]]
) -> None:
    name = write_table(tmp_path / "own.csv", choose(rows))  # type: ignore[operator]
    with pytest.raises(SuiteError, match=message):
        load_samples(name, tmp_path, lambda what, fraction: None)


@pytest.mark.parametrize("name", ["quick", "drift-test"])
def test_a_test_set_is_refused(name: str) -> None:
    with pytest.raises(SuiteError, match="would hide drift"):
        load_samples(name, default_cache_folder(), lambda what, fraction: None)


def test_a_picture_of_a_test_set_is_found_though_it_was_saved_again(
    tmp_path: Path, rows: list[tuple[Path, int, str]]
) -> None:
    from PIL import Image

    from defaker_opt.forgery.sets import load_set

    tested = load_set("quick", default_cache_folder() / "forgeries", lambda what, fraction: None)
    Image.fromarray(tested[4].image).save(tmp_path / "holiday.jpg", quality=80)
    name = write_table(tmp_path / "own.csv", [*rows[:40], (tmp_path / "holiday.jpg", 0, "natural")])
    with pytest.raises(SuiteError, match="picture 4 of the test set quick"):
        load_samples(name, tmp_path, lambda what, fraction: None)


def test_a_method_that_looks_at_pictures_needs_some(tmp_path: Path) -> None:
    from defaker_opt.pipeline import plan_job
    from defaker_opt.recipe import load_recipe
    from defaker_opt.target import load_target

    path = tmp_path / "own.yaml"
    path.write_text(
        "description: d\nsource: reference\ntarget: cpu\npasses:\n  - quantize:\n      rules:\n"
        "        - {match: 'language.layers.*', scheme: int4-g64, method: gptq}\n"
        "        - {match: '*', scheme: float}\n"
    )
    with pytest.raises(
        PassError, match="gptq for 21 layers must look at pictures, and none are named; add calibration"
    ):
        plan_job(load_recipe(str(path)), load_target("cpu"), "reference")


@pytest.mark.parametrize("scheme", ["int4-asym-g32", "int8-token"])
def test_options_of_a_method_are_checked(scheme: str) -> None:
    from defaker_opt.strict import Invalid

    assert parse_scheme(scheme)
    with pytest.raises(Invalid, match=r"options\.dampng: unknown key.*did you mean 'damping'"):
        Rule("*", scheme, "gptq", {"dampng": 0.1})  # type: ignore[arg-type]
    assert Rule("*", scheme, "gptq", {"damping": 0.1}).chooser().NEEDS == ("hessian",)  # type: ignore[arg-type]


def test_ranges_belong_to_static_activations() -> None:
    from defaker_opt.strict import Invalid

    assert Rule("*", "int8-static").needs() == ("histogram",)
    assert Rule("*", "int8-static", "gptq", clip="entropy").needs() == ("hessian", "histogram")
    with pytest.raises(Invalid, match="clip: int8 has no static activations; remove it, or choose the scheme int8-st"):
        Rule("*", "int8", clip="mse")
    with pytest.raises(Invalid, match="awq scales what a layer is given, so its range is not what was seen; choose an"):
        Rule("*", "int8-static", "awq")
    with pytest.raises(Invalid, match="clip: mse is about steps of one size, fp8-static has finer ones; give largest"):
        Rule("*", "fp8-static", clip="mse")


def test_a_static_scale_is_of_what_the_layer_was_given() -> None:
    weight = np.random.default_rng(0).standard_normal((4, 32)).astype(np.float32)
    sums = Sums(("histogram",))
    sums.add_(torch.tensor([[5.0] * 32, [-0.5] * 32]), None, None)
    scheme = parse_scheme("int8-static")
    assert scheme
    chosen = Rule("*", "int8-static", clip="largest").codes(weight, scheme, sums.statistics())
    assert chosen.input_scale == pytest.approx(5 / 127, rel=0.02) and chosen.scheme == scheme
    eighths = parse_scheme("fp8-static")
    assert eighths
    assert Rule("*", "fp8-static").codes(weight, eighths, sums.statistics()).input_scale == pytest.approx(
        5 / 448, rel=0.02
    )
