"""Training: losses against plain twins, a tiny detector that learns, resuming, and the folder it leaves."""

from __future__ import annotations

import dataclasses
import json
import signal
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from defaker_opt.cli import app
from defaker_opt.config import DetectorConfig
from defaker_opt.detector import Detector, load_detector, stored_shapes
from defaker_opt.errors import DefakerError
from defaker_opt.forgery.generate import make_pair
from defaker_opt.forgery.sources import load_library
from defaker_opt.runtime.images import image_tiles, mask_image
from defaker_opt.training import PHASES, PairSource, Phase, Plan, parse_phases
from defaker_opt.training.batches import Batch, Position, Prepared, draw_batches, draw_pairs, prepare_pair, stack_pairs
from defaker_opt.training.checkpoint import Progress
from defaker_opt.training.evaluate import area_under_curve, evaluate
from defaker_opt.training.loop import Machine, find_device, learning_rate, train
from defaker_opt.training.losses import agreement_loss, candidate_losses, map_loss, share_loss, true_iou, verdict_loss
from defaker_opt.training.model import JointModel
from defaker_opt.training.write import write_detector
from defaker_opt.weights import DrawnWeights
from tests.conftest import defaker_opt
from tests.test_sight import sighted

CPU = Machine(torch.device("cpu"), 0)
FEW = PairSource(size=192, distinct=4)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@lru_cache(maxsize=1)
def tiny_config() -> DetectorConfig:
    whole = load_detector("reference").config
    return dataclasses.replace(
        whole,
        name="tiny",
        tiling=dataclasses.replace(whole.tiling, tile_size=56, max_tiles=2),
        vision=dataclasses.replace(whole.vision, hidden_size=32, intermediate_size=64, layers=2, heads=2),
        language=dataclasses.replace(
            whole.language, hidden_size=32, intermediate_size=64, layers=2, heads=2, kv_heads=1, head_dim=16
        ),
        segmenter=dataclasses.replace(
            whole.segmenter,
            image_size=128,
            blocks=(1, 1, 1, 1),
            widths=(16, 24, 32, 48),
            heads=(1, 2, 2, 2),
            global_blocks=(),
            hidden_size=32,
            decoder_heads=2,
            decoder_intermediate_size=64,
            iou_hidden_size=32,
        ),
    )


def tiny_detector(seed: int = 0) -> Detector:
    config = tiny_config()
    return Detector(config, DrawnWeights(stored_shapes(config), seed))


def plan_of(*phases: Phase, **knobs: object) -> Plan:
    known = {"source": FEW, "pairs_per_batch": 2, "evaluation_pairs": 2, "log_every": 8, "checkpoint_every": 10**6}
    return Plan(phases, **{**known, **knobs})  # type: ignore[arg-type]


def silent(what: str, fraction: float) -> None:
    assert what
    assert 0 <= fraction <= 1


def test_verdict_loss_is_the_log_of_the_right_words_share() -> None:
    logits = torch.randn(5, 8, generator=torch.manual_seed(0)) * 3
    labels = torch.tensor([0, 1, 1, 0, 1])
    plain = []
    for row, label in zip(logits.tolist(), labels.tolist()):
        odds = np.exp(row)
        plain.append(-np.log(odds[:4].sum() / odds.sum() if label else odds[4:].sum() / odds.sum()))
    assert verdict_loss(logits, labels).item() == pytest.approx(np.mean(plain), rel=1e-5)


def test_the_verdict_follows_the_towers_head_and_does_not_teach_it() -> None:
    logits = (torch.randn(5, 8, generator=torch.manual_seed(0)) * 3).requires_grad_()
    sight = (torch.randn(5, generator=torch.manual_seed(1)) * 3).requires_grad_()
    plain = []
    for row, believed in zip(logits.tolist(), sight.tolist()):
        odds, share = np.exp(row), 1 / (1 + np.exp(-believed))
        said = odds[:4].sum() / odds.sum()
        plain.append(-share * np.log(said) - (1 - share) * np.log(1 - said))
    loss = agreement_loss(logits, sight)
    assert loss.item() == pytest.approx(np.mean(plain), rel=1e-5)
    loss.backward()
    assert logits.grad is not None and logits.grad.abs().sum() > 0
    assert sight.grad is None


def plain_candidate(logits: np.ndarray, mask: np.ndarray) -> tuple[float, float]:
    """Cross-entropy, on forged pictures with Dice loss, and IoU, cell by cell."""
    entropy = overlap = sizes = both = either = 0.0
    for logit, share in zip(logits.ravel().tolist(), mask.ravel().tolist()):
        guess = 1 / (1 + np.exp(-logit))
        entropy -= share * np.log(guess) + (1 - share) * np.log(1 - guess)
        overlap += guess * share
        sizes += guess**2 + share**2
        both += logit > 0 and share > 0.5
        either += logit > 0 or share > 0.5
    dice = 1 - (2 * overlap + 1) / (sizes + 1) if mask.any() else 0.0
    return entropy / mask.size + dice, both / either if either else 1.0


def test_candidate_losses_are_those_of_the_plain_twin() -> None:
    random = np.random.default_rng(1)
    logits = random.normal(0, 3, (4, 3, 7, 5))
    masks = random.random((4, 7, 5)) * (random.random((4, 7, 5)) < 0.5)
    masks[0], logits[0, 1] = 0, -9
    guessed = random.random((4, 3))
    best, errors = [], []
    for image in range(4):
        plain = [plain_candidate(logits[image, k], masks[image]) for k in range(3)]
        best.append(min(loss for loss, _ in plain))
        errors += [(guessed[image, k] - iou) ** 2 for k, (_, iou) in enumerate(plain)]
    loss, error = candidate_losses(*map(torch.from_numpy, (logits, guessed, masks)))
    assert loss.item() == pytest.approx(np.mean(best), rel=1e-6)
    assert error.item() == pytest.approx(np.mean(errors), rel=1e-6)
    assert true_iou(torch.from_numpy(logits), torch.from_numpy(masks))[0, 1] == 1


def test_share_loss_is_cross_entropy() -> None:
    logits, shares = torch.tensor([[[0.0, 2.0]]]), torch.tensor([[[0.5, 1.0]]])
    assert share_loss(logits, shares).item() == pytest.approx((np.log(2) + np.log1p(np.exp(-2.0))) / 2, rel=1e-5)


def test_map_loss_compares_every_map_with_the_share_of_its_cells() -> None:
    random = np.random.default_rng(2)
    masks = random.random((3, 8, 8))
    maps = [random.normal(0, 2, (3, side, side)) for side in (2, 8, 4)]
    plain = []
    for logits in maps:
        side = logits.shape[-1]
        step = 8 // side
        for image, row, column in np.ndindex(3, side, side):
            share = masks[image, row * step : (row + 1) * step, column * step : (column + 1) * step].mean()
            guess = 1 / (1 + np.exp(-logits[image, row, column]))
            plain.append((-(share * np.log(guess) + (1 - share) * np.log(1 - guess)), 1 / (3 * side**2)))
    expected = sum(loss * weight for loss, weight in plain) / len(maps)
    assert map_loss(list(map(torch.from_numpy, maps)), torch.from_numpy(masks)).item() == pytest.approx(expected)


def test_area_under_curve_counts_pairs() -> None:
    random = np.random.default_rng(2)
    scores, labels = random.integers(0, 6, 40).astype(float), random.integers(0, 2, 40)
    won = [(f > a) + (f == a) / 2 for f in scores[labels == 1] for a in scores[labels == 0]]
    assert area_under_curve(scores, labels) == pytest.approx(np.mean(won))
    assert np.isnan(area_under_curve(scores[:0], labels[:0]))


def test_prepared_pictures_are_what_the_runtime_reads() -> None:
    config = load_detector("reference").config
    prepared = prepare_pair(config, PairSource(size=320), 2)
    batch = stack_pairs([prepared], torch.device("cpu"))
    pair = make_pair(0, 2, "train", load_library(), 320)
    for row, twin in enumerate((pair.authentic, pair.forged)):
        picture, tiling = Image.fromarray(twin.image), config.tiling
        tiles = image_tiles(picture, tiling.tile_size, tiling.min_tiles, tiling.max_tiles)
        assert torch.equal(batch.tiles[row], torch.from_numpy(tiles))
        assert torch.equal(batch.image[row], torch.from_numpy(mask_image(picture, config.segmenter.image_size))[0])
        assert batch.masks[row].mean() == pytest.approx(twin.mask.mean(), abs=0.01)
        assert batch.token_shares[row, -1].mean() == pytest.approx(twin.mask.mean(), abs=0.01)
    assert batch.token_shares.shape == (2, tiles.shape[0], config.tokens_per_tile)
    assert batch.patch_shares.shape == (2, tiles.shape[0], (config.tiling.tile_size // config.vision.patch_size) ** 2)
    assert batch.labels.tolist() == [0, 1]


def test_shares_lie_where_the_tiles_are() -> None:
    """Shares from the mask cut as the picture is cut, tile by tile."""
    config = load_detector("reference").config
    prepared = prepare_pair(config, PairSource(size=448), 0)
    mask = make_pair(0, 0, "train", load_library(), 448).forged.mask
    tiling, batch = config.tiling, stack_pairs([prepared], torch.device("cpu"))
    cut = image_tiles(
        Image.fromarray(mask.astype(np.uint8) * 255).convert("RGB"), tiling.tile_size, 1, tiling.max_tiles
    )
    assert len(cut) > 1
    for px, shares in (
        (config.vision.patch_size, batch.patch_shares[1]),
        (config.vision.patch_size * config.vision.shuffle, batch.token_shares[1]),
    ):
        side = tiling.tile_size // px
        cells = cut[:, 0].reshape(len(cut), side, px, side, px).mean((2, 4)).reshape(len(cut), -1)
        assert np.corrcoef(cells.ravel(), shares.ravel())[0, 1] > 0.98


def test_batches_do_not_depend_on_workers_or_interruptions() -> None:
    source = PairSource(seed=3, size=192)

    def draw(position: Position, batches: int, workers: int) -> tuple[list[list[int]], Position]:
        drawn = []
        stream = draw_batches(tiny_config(), source, position, 3, workers)
        for _ in range(batches):
            pairs, position = next(stream)
            assert len({pair.tiles.shape for pair in pairs}) == 1
            drawn.append([pair.index for pair in pairs])
        stream.close()
        return drawn, position

    whole, end = draw(Position(), 5, 0)
    first, middle = draw(Position(), 3, 0)
    rest, resumed_end = draw(middle, 2, 1)
    assert middle.waiting
    assert whole == first + rest
    assert end == resumed_end


def one_batch() -> Batch:
    pairs = [pair for pair in map(few, range(4)) if pair.tiles.shape == few(0).tiles.shape]
    return stack_pairs(pairs, torch.device("cpu"))


@lru_cache(maxsize=4)
def few(index: int) -> Prepared:
    return prepare_pair(tiny_config(), FEW, index)


def test_a_batch_gives_what_the_stages_give_one_by_one() -> None:
    detector, batch = tiny_detector(), one_batch()
    outputs = JointModel(detector)(batch, PHASES["joint"])
    stages = {
        name: detector.load_stage(name) for name in ("vision_encoder", "language", "mask_encoder", "mask_decoder")
    }
    prompt, table = detector.config.prompt, detector.read("language.embed_tokens.weight")
    assert prompt is not None
    none = [torch.zeros(1, 1, 0, 16)] * 4
    assert len(batch.labels) > 2
    for row in range(len(batch.labels)):
        image = stages["vision_encoder"](batch.tiles[row])[0].reshape(-1, 32)
        verdict, seg = (
            stages["language"](embeds[None], torch.arange(len(embeds))[None], *none)[which]
            for which, question in enumerate((prompt.verdict, prompt.mask))
            for embeds in [torch.cat((table[list(prompt.before)], image, table[list(question)]))]
        )
        mask, iou = stages["mask_decoder"](*stages["mask_encoder"](batch.image[row : row + 1]), seg)
        best = outputs.iou[row].argmax()
        torch.testing.assert_close(outputs.verdict_logits[row], verdict[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(outputs.mask_logits[row, best], mask[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(outputs.iou[row, best], iou[0], atol=1e-4, rtol=1e-4)


def test_each_phase_teaches_its_own_path() -> None:
    batch = one_batch()
    for name, taught, left in (
        ("mask", "mask_encoder.trunk.pos_embed", "token_embeddings"),
        ("verdict", "token_embeddings", "mask_encoder.trunk.pos_embed"),
        ("answer", "token_embeddings", "vision_encoder.tower.encoder.layer.1.attention.q_proj.weight"),
        ("sight", "vision_encoder.tower.encoder.layer.1.mlp.fc1.weight", "token_embeddings"),
    ):
        model = JointModel(tiny_detector())
        outputs = model(batch, PHASES[name])
        judged = (outputs.verdict_logits, outputs.sight_logits, outputs.patch_logits, outputs.token_logits)
        one = (*judged, outputs.mask_logits, outputs.iou, *outputs.map_logits)
        sum(value.sum() for value in one if value is not None).backward()
        gradients = {key: value.grad for key, value in model.named_parameters()}
        assert gradients[taught] is not None
        assert gradients[left] is None
        assert (gradients["language.seg_projection.2.bias"] is not None) == (name == "mask")


def test_the_towers_head_judges_the_whole_picture_alone() -> None:
    """The last tile; `sight` does not even compute the others."""
    tiled = next(pair for pair in map(few, range(40)) if pair.tiles.shape[1] > 1)
    batch, model = stack_pairs([tiled], torch.device("cpu")), JointModel(tiny_detector())
    changed = dataclasses.replace(batch, tiles=torch.cat((batch.tiles[:, :-1].neg(), batch.tiles[:, -1:]), dim=1))
    alone = model(batch, PHASES["sight"])
    assert alone.patch_logits.shape[1] == 1
    torch.testing.assert_close(batch.shares_of(alone.patch_logits), batch.patch_shares[:, -1:])
    for each in (model(batch, PHASES["answer"]), model(changed, PHASES["answer"])):
        torch.testing.assert_close(each.sight_logits, alone.sight_logits)
        torch.testing.assert_close(each.patch_logits[:, -1:], alone.patch_logits)
        assert each.patch_logits.shape[:2] == batch.tiles.shape[:2]
        torch.testing.assert_close(batch.shares_of(each.patch_logits), batch.patch_shares)
    assert not torch.equal(each.verdict_logits, model(batch, PHASES["answer"]).verdict_logits)


@pytest.fixture(scope="module")
def overfitted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Detector, Progress, Path]:
    folder = tmp_path_factory.mktemp("overfit")
    plan = plan_of(Phase("joint", 1280), learning_rate=3e-3, average=0.9)
    detector = tiny_detector()
    progress, _ = train(detector, plan, CPU, folder, silent)
    return detector, progress, folder


def test_a_few_pairs_are_learnt_by_heart(overfitted: tuple[Detector, Progress, Path]) -> None:
    detector, progress, folder = overfitted
    pairs = list(map(few, range(4)))
    untaught = JointModel(detector)
    before = evaluate(untaught, dict(untaught.named_parameters()), pairs, PHASES["joint"])
    after = evaluate(progress.model, progress.averages, pairs, PHASES["joint"])
    assert after.auc == 1
    assert after.iou > max(2 * before.iou, 0.35)
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    losses = [line["losses"] for line in lines if "losses" in line]
    assert losses[-1]["verdict"] < losses[0]["verdict"] / 5
    assert losses[-1]["mask"] < losses[0]["mask"]
    assert lines[-1]["evaluation"]["pictures"] == 4


def test_the_written_folder_judges_as_the_model_does(
    overfitted: tuple[Detector, Progress, Path], tmp_path: Path
) -> None:
    detector, progress, _ = overfitted
    write_detector(detector, progress.model, progress.averages, "reference", tmp_path / "written")
    written = load_detector(str(tmp_path / "written"))
    assert written.config == dataclasses.replace(detector.config, name="written", trained=True)
    assert written.weights.shapes() == stored_shapes(detector.config)
    assert (tmp_path / "written" / "tokenizer.json").is_file()
    with torch.no_grad():
        model = progress.model
        expected = torch.func.functional_call(model, progress.averages, (one_batch(), PHASES["joint"]))
        found = JointModel(written)(one_batch(), PHASES["joint"])
    torch.testing.assert_close(found.verdict_logits, expected.verdict_logits, atol=0.05, rtol=0.02)
    torch.testing.assert_close(found.iou, expected.iou, atol=0.02, rtol=0.02)
    agreeing = ((found.mask_logits > 0) == (expected.mask_logits > 0)).float().mean()
    assert agreeing > 0.995
    with pytest.raises(DefakerError, match="already exists"):
        write_detector(detector, progress.model, progress.averages, "reference", tmp_path / "written")


def test_an_interrupted_run_ends_with_the_same_weights(tmp_path: Path) -> None:
    plan = plan_of(Phase("mask", 16), Phase("joint", 24), source=PairSource(size=192))
    whole, scores = train(tiny_detector(), plan, CPU, tmp_path / "whole", silent)
    shown = []

    def interrupt(what: str, fraction: float) -> None:
        shown.append(fraction)
        if fraction == 0.6:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(tiny_detector(), plan, CPU, tmp_path / "parts", interrupt)
    assert shown[-1] == 0.6
    resumed, resumed_scores = train(tiny_detector(), plan, CPU, tmp_path / "parts", silent)
    assert resumed.step == whole.step == plan.steps
    for (name, expected), found in zip(whole.model.named_parameters(), resumed.model.parameters()):
        assert torch.equal(expected, found), name
    assert all(torch.equal(whole.averages[name], resumed.averages[name]) for name in whole.averages)
    assert scores == resumed_scores


def test_a_short_training_finds_forgeries_of_photographs_it_has_not_seen(tmp_path: Path) -> None:
    """A tower with fine patches for about two minutes, without the language model."""
    plan = Plan(
        (Phase("sight", 800),),
        PairSource(size=256),
        evaluate_every=10**6,
        evaluation_pairs=64,
        log_every=80,
        precision="bfloat16",
    )
    config = sighted()
    detector = Detector(config, DrawnWeights(stored_shapes(config), 0))
    _, scores = train(detector, plan, Machine(torch.device("cpu"), 1), tmp_path, silent)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    losses = [line["losses"]["patch"] for line in lines if "losses" in line]
    assert np.mean(losses[-4:]) < 0.85 * np.mean(losses[:4])
    assert scores.patch_auc > 0.75
    assert scores.auc > 0.58


def test_a_checkpoint_of_another_plan_or_a_damaged_one_is_refused(tmp_path: Path) -> None:
    plan = plan_of(Phase("mask", 4))
    train(tiny_detector(), plan, CPU, tmp_path, silent)
    with pytest.raises(DefakerError, match="made with another learning_rate"):
        train(tiny_detector(), dataclasses.replace(plan, learning_rate=0.5), CPU, tmp_path, silent)
    with pytest.raises(DefakerError, match="made with another source weights"):
        train(tiny_detector(seed=1), plan, CPU, tmp_path, silent)
    checkpoint = tmp_path / "checkpoint.safetensors"
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    with pytest.raises(DefakerError, match="cannot be read"):
        train(tiny_detector(), plan, CPU, tmp_path, silent)


def test_the_rate_warms_up_and_falls() -> None:
    plan = plan_of(Phase("joint", 4000), warmup=0.1)
    rates = [learning_rate(plan, step) for step in range(plan.steps)]
    assert np.argmax(rates) in (99, 100)
    assert max(rates) == pytest.approx(plan.learning_rate)
    assert rates[0] < 0.02 * plan.learning_rate
    assert rates[-1] == pytest.approx(0.01 * plan.learning_rate, rel=0.05)


def test_each_phase_warms_up_and_falls() -> None:
    plan = plan_of(Phase("mask", 400), Phase("joint", 1200), warmup=0.1)
    alone = [plan_of(Phase("mask", images), warmup=0.1) for images in (400, 1200)]
    expected = [learning_rate(each, step) for each in alone for step in range(each.steps)]
    assert [learning_rate(plan, step) for step in range(plan.steps)] == expected


def test_a_tower_alone_learns_at_four_times_the_rate() -> None:
    rates = [[learning_rate(plan_of(Phase(name, 400)), step) for step in range(100)] for name in ("sight", "verdict")]
    assert rates[0] == pytest.approx([4 * rate for rate in rates[1]])


def test_phases_are_values() -> None:
    phases = parse_phases("mask:20, joint:81")
    assert phases == (Phase("mask", 20), Phase("joint", 81))
    plan = plan_of(*phases)
    assert plan.steps == 5 + 21
    assert [plan.phase_of(step).name for step in (0, 4, 5, 25)] == ["mask", "mask", "joint", "joint"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("jiont:5", "did you mean 'joint'"),
        ("joint", "needs a number of images above 0, got ''"),
        ("joint:0", "above 0, got '0'"),
        ("mask:5,", "'' is not one of answer, joint, mask, sight, verdict"),
        ("mask:-3", "got '-3'"),
    ],
)
def test_bad_stages(text: str, message: str) -> None:
    with pytest.raises(DefakerError, match=message):
        parse_phases(text)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate: must be above 0, got 0.0"),
        ({"learning_rate": float("nan")}, "learning_rate: must be above 0, got nan"),
        ({"pairs_per_batch": 0}, "pairs_per_batch"),
        ({"average": 1.0}, r"average: must be in \[0, 1\), got 1.0"),
        ({"evaluate_every": 0}, "evaluate_every"),
        ({"precision": "float16"}, "'float16' is not one of bfloat16, float32"),
    ],
)
def test_bad_plans(knobs: dict[str, object], message: str) -> None:
    with pytest.raises(DefakerError, match=message):
        plan_of(Phase("joint", 4), **knobs)


def test_devices() -> None:
    assert find_device("cpu").type == "cpu"
    with pytest.raises(DefakerError, match="did you mean 'cuda'"):
        find_device("cudo")
    if not torch.cuda.is_available():
        assert find_device("auto").type == "cpu"
        with pytest.raises(DefakerError, match="no CUDA device"):
            find_device("cuda")


def test_a_detector_without_prompts_has_nothing_to_learn() -> None:
    detector = tiny_detector()
    with pytest.raises(DefakerError, match="has no prompts"):
        JointModel(Detector(dataclasses.replace(detector.config, prompt=None), detector.weights))


def test_held_out_pairs_come_from_other_photographs() -> None:
    source = PairSource(split="calibration", size=192)
    held_out = list(draw_pairs(tiny_config(), source, range(2), 0))
    assert not any(np.array_equal(pair.image, few(index).image) for index, pair in enumerate(held_out))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--batch", 5), "batch: must be an even number of images"),
        (("--workers", -1), "workers: must be 0 or more"),
        (("--precision", "bfloat"), "did you mean 'bfloat16'?"),
        (("--stages", "mask"), "stages: mask needs a number of images"),
        (("--source", "nowhere"), "source 'nowhere' is not one of reference"),
        (("--photos", "nowhere", "--workers", 0), "nowhere: no such folder"),
    ],
)
def test_mistakes_end_with_one_message(options: tuple[object, ...], message: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["train", "--output", str(tmp_path / "out"), *map(str, options)])
    assert isinstance(done.exception, DefakerError)
    assert message in str(done.exception)


def test_the_command_trains_and_quantize_accepts_it(tmp_path: Path) -> None:
    source = tmp_path / "tiny"
    detector = tiny_detector()
    write_detector(detector, JointModel(detector), dict(JointModel(detector).named_parameters()), "reference", source)
    options = (
        "--source",
        source,
        "--stages",
        "joint:4",
        "--batch",
        2,
        "--size",
        192,
        "--workers",
        1,
        "--evaluation-pairs",
        2,
        "--json",
    )
    done = defaker_opt("train", "--output", tmp_path / "out", *options)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["images"] == 4
    assert 0 <= summary["auc"] <= 1
    assert json.loads((tmp_path / "out" / "config.json").read_text())["trained"] is True
    planned = defaker_opt("quantize", "--recipe", "float32", "--source", tmp_path / "out", "--dry-run", "--json")
    assert planned.returncode == 0, planned.stderr
