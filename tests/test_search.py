"""The search for a recipe: harm against really disturbed layers, budgets against brute force, recipes, the command."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
import yaml
from torch import nn

from defaker_opt.detector import load_detector
from defaker_opt.errors import DefakerError
from defaker_opt.files import default_cache_folder
from defaker_opt.forgery.sets import load_set
from defaker_opt.graph.product import write_product
from defaker_opt.methods import SchemeName, parse_scheme
from defaker_opt.methods.round_to_nearest import METHOD as ROUND
from defaker_opt.passes.quantize import Quantize
from defaker_opt.runtime.backends import find_backend
from defaker_opt.samples import Samples, load_samples, suite_of
from defaker_opt.search import LOSSES, Budget, Ledger, Offer, fitted, offered_schemes, parse_budget
from defaker_opt.search.measure import layer_shapes
from defaker_opt.search.recipe import _NUMBER, recipe_data, rules_of, write_recipe
from defaker_opt.search.run import _corrected
from defaker_opt.search.sensitivity import Blocks, _as_batch, _projections, measure_harms, round_input
from defaker_opt.search.solve import front, smallest_within, solve
from defaker_opt.target import load_target
from defaker_opt.training import Parts
from defaker_opt.training.model import JointModel
from tests.conftest import COMMAND, defaker_opt

CPU = load_target("cpu")
DETECTOR = load_detector("reference")
SHAPES = layer_shapes(DETECTOR)

# One layer of each kind, of every stage, near the beginning and near the end.
WATCHED = (
    "vision_encoder.tower.encoder.layer.1.attention.q_proj.weight",
    "vision_encoder.tower.encoder.layer.2.mlp.fc2.weight",
    "language.layers.0.mlp.up_proj.weight",
    "language.layers.2.self_attn.o_proj.weight",
    "language.verdict_head.weight",
    "mask_encoder.trunk.blocks.2.mlp.proj_in.weight",
    "mask_decoder.transformer.layers.1.mlp.proj_in.weight",
)


def few_samples(count: int) -> Samples:
    whole = load_samples("embedded", default_cache_folder(), lambda what, fraction: None)
    return Samples(whole.name, f"{whole.digest}-{count}", whole.items[:count])


def disturbed_plain(name: str, scheme: SchemeName, image: object) -> np.ndarray:
    """The slow twin: run with one layer really rounded, and look how far the three projections move."""
    model = JointModel(DETECTOR).eval()
    batch = _as_batch(image, DETECTOR.config)  # type: ignore[arg-type]

    def project() -> np.ndarray:
        outputs = model(batch, Parts(verdict=True, mask=True))
        # The projections' factors belong to the undisturbed model, so they are computed from its outputs alone.
        odds = outputs.verdict_logits[0, :4].logsumexp(0) - outputs.verdict_logits[0, 4:].logsumexp(0)
        mask = outputs.mask_logits[0, best]
        return np.array(
            [float(odds * scale), float((direction * outputs.seg_embedding).sum()), float((cells * mask).sum())]
        )

    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        outputs = model(batch, Parts(verdict=True, mask=True))
        best = int(outputs.iou[0].argmax())
        fake = (outputs.verdict_logits[0, :4].logsumexp(0) - outputs.verdict_logits[0, 4:].logsumexp(0)).sigmoid()
        scale = (fake * (1 - fake) / 2).sqrt()
        direction = torch.randn(outputs.seg_embedding.shape, generator=generator) / outputs.seg_embedding.norm()
        share = outputs.mask_logits[0, best].sigmoid()
        cells = torch.randn(share.shape, generator=generator) * (share * (1 - share) / (2 * share.numel())).sqrt()
        before = project()
        layer = model.get_submodule(name.removesuffix(".weight"))
        assert isinstance(layer, nn.Linear)
        parsed = parse_scheme(scheme)
        assert parsed is not None
        fitted = parsed.fitted(layer.in_features)
        assert fitted is not None
        layer.weight.data = torch.from_numpy(ROUND().quantize(layer.weight.numpy(), fitted).dequantize())
        layer.register_forward_pre_hook(lambda module, given: (round_input(given[0], scheme),))
        return project() - before


@pytest.mark.parametrize("name", WATCHED)
def test_harm_is_what_a_really_rounded_layer_does(name: str) -> None:
    """Eight bits move little, so the first order is nearly everything."""
    assert name in SHAPES, f"{name} is no linear layer"
    samples = few_samples(2)
    seen = measure_harms(
        DETECTOR, Samples("one", "", samples.items[:1]), {name: ("float", "int8-token")}, Blocks(), lambda *_: None
    )
    moved = disturbed_plain(name, "int8-token", next(samples.images()))
    got = np.sqrt(seen.harms[name]["int8-token"])
    assert seen.harms[name]["float"] == (0.0,) * len(LOSSES)
    # A hundredth of a percent of the largest effect is lost in float32's own rounding.
    np.testing.assert_allclose(got, np.abs(moved), rtol=0.1, atol=3e-6)
    assert got.max() > 1e-5, "nothing moved, so nothing was compared"


def test_coarser_formats_harm_more() -> None:
    names = WATCHED[:4]
    offered = {name: offered_schemes(CPU, SHAPES[name]) for name in names}
    seen = measure_harms(DETECTOR, few_samples(6), offered, Blocks(), lambda *_: None)
    harm = {
        scheme: np.sum([seen.harms[name][scheme] for name in names], axis=0)
        for scheme in ("int8-token", "int4-g32", "int4-g128")
    }
    assert (harm["int8-token"][:2] < harm["int4-g32"][:2]).all(), harm
    assert (harm["int4-g32"][:2] < harm["int4-g128"][:2]).all(), harm
    side = DETECTOR.config.tiling.tile_size // DETECTOR.config.vision.patch_size
    assert seen.rows[WATCHED[0]] == (1 + side * side,)


def test_the_projections_squares_are_the_losses() -> None:
    """Averaged over many random directions, against the formulas written out."""
    model = JointModel(DETECTOR).eval()
    with torch.no_grad():
        outputs = model(_as_batch(next(few_samples(1).images()), DETECTOR.config), Parts(verdict=True, mask=True))
    # The factors of a projection are the same numbers as those of its gradient.
    moved = torch.randn(outputs.seg_embedding.shape, generator=torch.Generator().manual_seed(1))
    shifted = dataclasses.replace(outputs, seg_embedding=outputs.seg_embedding + 1e-3 * moved)
    squares = []
    for seed in range(3000):
        one, other = (_projections(each, torch.Generator().manual_seed(seed))[1].item() for each in (outputs, shifted))
        squares.append(((other - one) / 1e-3) ** 2)
    expected = float(moved.square().sum() / outputs.seg_embedding.square().sum())
    assert np.mean(squares) == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("rows", [1, 7, 64])
def test_inputs_are_rounded_as_the_runtime_rounds_them(rows: int, tmp_path: Path) -> None:
    x = np.random.default_rng(rows).standard_normal((rows, 96), np.float32) * np.linspace(0.1, 30, 96, dtype=np.float32)
    weight = np.random.default_rng(5).standard_normal((48, 96), np.float32)
    for scheme in offered_schemes(CPU, (48, 96)):
        parsed = parse_scheme(scheme)
        fitted = parsed.fitted(96) if parsed else None
        codes = ROUND().quantize(weight, fitted) if fitted else None
        spec = write_product(tmp_path / "product.onnx", weight, codes, CPU.encodings)
        run = find_backend("onnx_runtime").open_stage(tmp_path / "product.onnx", spec, {"threads": 1})
        got = run({"x": x}, ("y",))["y"]
        rounded = round_input(torch.from_numpy(x), scheme).numpy() if codes else x
        expected = rounded @ (codes.dequantize() if codes else weight).T
        assert np.linalg.norm(got - expected) <= 2e-3 * np.linalg.norm(expected), scheme


def test_a_product_has_the_operators_of_its_encoding(tmp_path: Path) -> None:
    weight = np.ones((32, 64), np.float32)
    scheme = parse_scheme("int4-g32")
    assert scheme is not None
    write_product(tmp_path / "product.onnx", weight, ROUND().quantize(weight, scheme), CPU.encodings)
    session = onnxruntime.InferenceSession(tmp_path / "product.onnx")
    assert session.get_inputs()[0].shape == ["rows", 64]
    assert b"MatMulNBits" in (tmp_path / "product.onnx").read_bytes()


def drawn_ledger(layers: int, seed: int) -> Ledger:
    draw = random.Random(seed)
    offers = {
        f"language.layers.{index}.weight": {
            scheme: Offer(
                tuple(draw.random() * size for _ in LOSSES) if scheme != "float" else (0.0,) * len(LOSSES),
                draw.randint(1, 9) * 1000 * bits,
                draw.random(),
            )
            for scheme, bits, size in (("float", 32, 0.0), ("int8", 8, 0.1), ("int4-g32", 4, 1.0))
        }
        for index in range(layers)
    }
    return Ledger(offers, 5000, 0.5)  # type: ignore[arg-type]


def every_choice(ledger: Ledger) -> list[dict[str, SchemeName]]:
    return [dict(zip(ledger.offers, schemes)) for schemes in itertools.product(*map(tuple, ledger.offers.values()))]


@pytest.mark.parametrize("seed", range(6))
def test_the_solver_finds_what_trying_everything_finds(seed: int) -> None:
    ledger = drawn_ledger(6, seed)
    choices = every_choice(ledger)
    sizes = sorted(ledger.size_mb(choice) for choice in choices)
    times = sorted(ledger.latency_ms(choice) for choice in choices)
    for budget in (
        Budget(size_mb=sizes[len(sizes) // 5]),
        Budget(latency_ms=times[len(times) // 5]),
        Budget(sizes[len(sizes) // 2], times[len(times) // 3]),
        Budget(size_mb=sizes[0]),
    ):
        allowed = [c for c in choices if budget.allows(ledger.size_mb(c) - 1e-9, ledger.latency_ms(c) - 1e-9)]
        best = min(map(ledger.harm, allowed))
        found = solve(ledger, budget)
        assert budget.allows(ledger.size_mb(found) - 1e-9, ledger.latency_ms(found) - 1e-9)
        assert ledger.harm(found) == pytest.approx(best, abs=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_a_gentler_choice_is_the_smallest_of_its_harm(seed: int) -> None:
    ledger = drawn_ledger(5, seed)
    choices = every_choice(ledger)
    harm = ledger.harm(solve(ledger, Budget(size_mb=sorted(map(ledger.size_mb, choices))[10])))
    found = smallest_within(ledger, harm / 2)
    assert found is not None
    smallest = min(ledger.size_mb(choice) for choice in choices if ledger.harm(choice) <= harm / 2)
    assert ledger.size_mb(found) == pytest.approx(smallest)
    assert smallest_within(ledger, harm / 2, latency_ms=0.4) is None


def test_harm_is_kept_also_where_one_layer_does_nearly_all_of_it() -> None:
    """The solver takes sums for equal that differ by a millionth, which may be all that gentle choices do."""
    ledger = drawn_ledger(6, 2)
    name = next(iter(ledger.offers))
    loud = {scheme: dataclasses.replace(offer, harm=(1e7,) * 3) for scheme, offer in ledger.offers[name].items()}
    loud["float"] = ledger.offers[name]["float"]
    ledger = dataclasses.replace(ledger, offers={**ledger.offers, name: loud})
    harm = ledger.harm(
        solve(ledger, Budget(size_mb=ledger.size_mb({**dict.fromkeys(ledger.offers, "int8"), name: "float"})))
    )
    assert 0 < harm < 1e-6
    for _ in range(4):
        found = smallest_within(ledger, harm / 2)
        assert found is not None
        assert ledger.harm(found) <= harm / 2 * (1 + 1e-6)
        harm = ledger.harm(found)


def test_without_a_budget_the_smallest_comes_first() -> None:
    ledger = drawn_ledger(7, 4)
    assert ledger.size_mb(solve(ledger, parse_budget([]))) == min(map(ledger.size_mb, every_choice(ledger)))


def test_a_first_build_corrects_what_is_predicted_of_the_others() -> None:
    ledger = drawn_ledger(5, 5)
    formats = solve(ledger, Budget())
    corrected = _corrected(ledger, formats, (ledger.size_mb(formats) + 0.25, ledger.latency_ms(formats) - 7.0))
    other = dict.fromkeys(ledger.offers, "float")
    assert corrected.size_mb(other) == pytest.approx(ledger.size_mb(other) + 0.25)
    assert corrected.latency_ms(other) == pytest.approx(ledger.latency_ms(other) - 7.0)


def test_blocks_are_the_calls_that_a_target_makes() -> None:
    tiles, prefix = torch.zeros(5, 257, 8), torch.zeros(1, 700, 8)
    blocks = Blocks(tiles=2, tokens=512)
    assert [len(part) for part in blocks.calls("vision_encoder.a", tiles)] == [2, 2, 1]
    assert [part.shape[1] for part in blocks.calls("language.a", prefix)] == [512, 188]
    assert [part.shape for part in blocks.calls("mask_encoder.a", tiles)] == [tiles.shape]
    assert [part.shape for part in Blocks().calls("vision_encoder.a", tiles)] == [tiles.shape]


def test_the_front_rises_in_size_and_falls_in_harm() -> None:
    ledger = drawn_ledger(12, 1)
    points = [(ledger.size_mb(choice), ledger.harm(choice)) for choice in front(ledger)]
    assert len(points) > 5
    assert all(a[0] < b[0] and a[1] > b[1] for a, b in itertools.pairwise(points))
    assert points[-1][1] == 0


def test_solving_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    ledger = drawn_ledger(60, 3)
    for share in (0.2, 0.3, 0.5, 0.7):
        solve(ledger, Budget(size_mb=ledger.size_mb(dict.fromkeys(ledger.offers, "float")) * share))
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("seed", range(8))
def test_rules_say_what_was_chosen(seed: int, tmp_path: Path) -> None:
    """Random choices over the real layers, some of whole kinds of layers alike, through the file and back."""
    draw = random.Random(seed)
    likely = draw.choice(("int8", "int8-token", "int4-g128"))
    choice: dict[str, SchemeName] = {}
    for name, shape in SHAPES.items():
        offered = offered_schemes(CPU, shape)
        choice[name] = likely if likely in offered and draw.random() < seed / 8 else draw.choice(offered)
    data = recipe_data(choice, "found", "reference", "cpu", "embedded", {})
    recipe = write_recipe(data, tmp_path / "auto.yaml")
    assert yaml.safe_load((tmp_path / "auto.yaml").read_text()) == data
    [quantize] = recipe.passes
    assert isinstance(quantize, Quantize)
    said = quantize.check(DETECTOR.config, CPU).schemes
    assert said == {name: str(fitted(scheme, SHAPES[name][1]) or "float") for name, scheme in choice.items()}


@pytest.mark.parametrize("pattern", sorted({_NUMBER.sub("*", name) for name in SHAPES}))
def test_rules_of_one_kind_of_layers_reach_no_other(pattern: str, tmp_path: Path) -> None:
    choice: dict[str, SchemeName] = {name: "float" if _NUMBER.sub("*", name) == pattern else "int8" for name in SHAPES}
    recipe = write_recipe(recipe_data(choice, "found", "reference", "cpu", "embedded", {}), tmp_path / "auto.yaml")
    said = recipe.passes[0].check(DETECTOR.config, CPU).schemes
    assert said == choice


def test_alike_layers_share_a_rule() -> None:
    choice: dict[str, SchemeName] = {
        name: "int4-g32" if ".mlp.down_proj" in name else "int8" for name in SHAPES if name.startswith("language.")
    }
    assert list(rules_of(choice)) == [("language.layers.*.mlp.down_proj.weight", "int4-g32"), ("language.*", "int8")]


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["size=3"], ("size", "size_mb", "latency_ms")),
        (["size_mb"], ("size_mb=20",)),
        (["size_mb=-1"], ("above 0",)),
        (["size_mb=nan"], ("above 0",)),
        (["size_mb=3", "size_mb=4"], ("given twice",)),
    ],
)
def test_wrong_budgets_say_what_is_right(texts: list[str], words: tuple[str, ...]) -> None:
    with pytest.raises(DefakerError) as error:
        parse_budget(texts)
    assert all(word in str(error.value) for word in ("--budget", *words))


def test_an_impossible_budget_says_what_is_possible() -> None:
    ledger = drawn_ledger(4, 0)
    with pytest.raises(DefakerError, match=r"at most 0.001 MB; the smallest has 0\.\d+ MB and .* the fastest"):
        solve(ledger, Budget(size_mb=0.001))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--recipe", "int8", "--budget", "size_mb=3"), "--budget: only a search takes it"),
        (("--recipe", "int8", "--max-drop", "mask_iou=0.1"), "--max-drop: only a search takes it"),
        (("--recipe", "auto", "--dry-run"), "--dry-run: a search does not take it"),
        (("--recipe", "auto", "--target", "orin-nano-super-8gb"), "cannot be timed one by one; give a --target"),
        (("--recipe", "auto", "--max-drop", "speed=1"), "--max-drop speed=1"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: tuple[str, ...], words: str, tmp_path: Path) -> None:
    done = defaker_opt("quantize", *options, "--output", tmp_path / "build")
    assert done.returncode == 2
    assert words in " ".join(done.stderr.split())
    assert not list(tmp_path.iterdir())


def test_what_is_there_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "found.search").mkdir()
    (tmp_path / "found.search" / "auto.yaml").write_text("mine")
    for options, words in (((), "already there; choose another --output, or replace"), (("--replace",), "not ours")):
        if options:
            (tmp_path / "found").mkdir()
        done = defaker_opt("quantize", "--recipe", "auto", "-o", tmp_path / "found", *options)
        assert done.returncode == 2
        assert words in " ".join(done.stderr.split())
        assert (tmp_path / "found.search" / "auto.yaml").read_text() == "mine"


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, object]]:
    """A real search, on few pictures and with limits that few pictures can prove."""
    folder = tmp_path_factory.mktemp("search")
    pictures = load_set("calibration", default_cache_folder() / "forgeries", lambda *_: None)
    rows = [f"{row.file},{row.label},{row.domain}" for row in pictures.rows[:32]]
    for row in pictures.rows[:32]:
        shutil.copy(pictures.folder / row.file, folder / row.file)
    (folder / "few.csv").write_text("\n".join(("image,label,domain", *rows)) + "\n")
    limits = ("--max-drop", "verdict_accuracy=0.15", "--max-drop", "mask_iou=0.3")
    wishes = ("--calibration", folder / "few.csv", "--suite", "quick", "--budget", "size_mb=6.5")
    command = [*COMMAND, "quantize", "--recipe", "auto", "-o", folder / "found", "--json", *limits, *wishes]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stderr
    answer: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return folder / "found", answer


@pytest.mark.slow
def test_a_search_ends_with_an_accepted_build_within_the_budget(searched: tuple[Path, dict[str, object]]) -> None:
    build, answer = searched
    assert answer["decision"] == "ACCEPT"
    assert answer["within_budget"] is True
    size_mb = sum(path.stat().st_size for path in build.iterdir()) / 1e6
    assert answer["size_mb"] == pytest.approx(size_mb)
    assert size_mb < 6.5 * 1.02
    kept = json.loads((build.with_name("found.search") / "search.json").read_text())
    last = kept["trials"][-1]
    assert last["predicted"][0] == pytest.approx(size_mb, rel=0.02)
    assert set(last["choice"]) == set(SHAPES)
    assert len(set(last["choice"].values())) > 1, "a budget between two formats mixes them"


@pytest.mark.slow
def test_what_is_found_is_an_ordinary_recipe(searched: tuple[Path, dict[str, object]], tmp_path: Path) -> None:
    build, answer = searched
    again = defaker_opt("quantize", "--recipe", answer["recipe"], "-o", tmp_path / "again", "--json")
    assert again.returncode == 0, again.stderr
    files = [json.loads((folder / "manifest.json").read_text())["files"] for folder in (build, tmp_path / "again")]
    assert files[0] == files[1]


@pytest.mark.slow
def test_the_page_stands_alone(searched: tuple[Path, dict[str, object]]) -> None:
    build, _ = searched
    page = (build.with_name("found.search") / "search.html").read_text()
    assert "ACCEPT" in page and "<svg" in page and "int4-g128" in page
    assert "http://" not in page.replace("http://www.w3.org", "") and "<script" not in page


def test_pictures_that_were_looked_at_are_kept_from_being_judged() -> None:
    """`embedded` is the calibration set where pictures are looked at, and the test set where they are judged."""
    assert suite_of("embedded") == "calibration"
    first, second = (
        load_samples(name, default_cache_folder(), lambda what, fraction: None) for name in ("embedded", "calibration")
    )
    assert first.digest == second.digest
    assert suite_of("table.csv") == "table.csv"
