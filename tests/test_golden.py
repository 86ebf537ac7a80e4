"""Exactness: converted checkpoints against what the original code computed, in torch and through the shipped build.

Every folder in $DEFAKER_GOLDEN_DIR is taken; what its files hold is in the README beside them.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file

from defaker_opt.config import DetectorConfig, PromptConfig, load_config
from defaker_opt.convert import convert
from defaker_opt.detector import Detector, load_detector
from defaker_opt.pipeline import make_build, plan_job
from defaker_opt.recipe import load_recipe
from defaker_opt.runtime import Session, open_session
from defaker_opt.runtime.clock import Clock
from defaker_opt.runtime.images import full_size_mask, image_tiles, load_image, mask_image, resized_rows
from defaker_opt.target import load_target
from tests.conftest import GOLDEN, golden_folders

TOLERANCE = 1e-4
FOLDERS = golden_folders()

pytestmark = pytest.mark.skipif(not FOLDERS, reason=f"no golden checkpoints in {GOLDEN}; set DEFAKER_GOLDEN_DIR")

# The answer words of a stand-in vocabulary: any eight tokens do, and several eights cover more rows of the head.
ANSWERS = [tuple(range(1, 9)), tuple(range(200, 208))]


@dataclass(frozen=True)
class Case:
    outputs: dict[str, np.ndarray]
    image: Image.Image
    folder: Path
    detector: Detector
    answers: tuple[int, ...]

    @property
    def config(self) -> DetectorConfig:
        return self.detector.config


def read_prompt(outputs: dict[str, np.ndarray], image_token: int, answers: tuple[int, ...]) -> PromptConfig:
    """The ids of the original prompt: before the image, the question after it, and the last four, the answer."""
    ids = outputs["input_ids"][0].tolist()
    first, last = ids.index(image_token), len(ids) - 1 - ids[::-1].index(image_token)
    seg = int(outputs["seg_position"][0])
    return PromptConfig(
        before=tuple(ids[:first]),
        verdict=tuple(ids[last + 1 : -4]),
        mask=tuple(ids[last + 1 : seg + 1]),
        fake_answers=answers[:4],
        real_answers=answers[4:],
    )


@pytest.fixture(scope="module", params=FOLDERS, ids=lambda folder: folder.name)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    source: Path = request.param
    outputs = load_file(source / "golden.safetensors")
    meta = json.loads((source / "golden_meta.json").read_text())
    folder = tmp_path_factory.mktemp("golden") / source.name
    convert(source, folder)
    prompt = read_prompt(outputs, meta["special_tokens"]["<IMG_CONTEXT>"], ANSWERS[0])
    config = dataclasses.replace(load_config(folder), prompt=prompt)
    (folder / "config.json").write_text(config.as_json())
    return Case(outputs, load_image(source / "image.png"), folder, load_detector(str(folder)), ANSWERS[0])


@pytest.fixture(scope="module")
def tiles(case: Case) -> np.ndarray:
    tiling = case.config.tiling
    return image_tiles(case.image, tiling.tile_size, tiling.min_tiles, tiling.max_tiles)


def assert_close(got: np.ndarray, expected: np.ndarray, what: str) -> None:
    worst = float(np.abs(got - expected).max())
    assert worst <= TOLERANCE, f"{what}: differs by {worst:.2e}"


def test_pixels_equal(case: Case, tiles: np.ndarray) -> None:
    sums = tiles.sum((1, 2, 3), dtype=np.float64)
    np.testing.assert_allclose(sums, case.outputs["tile_sums"], rtol=1e-6)
    whole = mask_image(case.image, case.config.segmenter.image_size).sum(dtype=np.float64)
    np.testing.assert_allclose(whole, case.outputs["mask_image_sum"][0], rtol=1e-6)


def test_torch_stages_equal(case: Case, tiles: np.ndarray) -> None:
    expected, detector = case.outputs, case.detector
    prompt = case.config.prompt
    assert prompt is not None
    with torch.inference_mode():
        tokens, _ = detector.load_stage("vision_encoder")(torch.from_numpy(tiles))
        assert_close(tokens[:, ::4].numpy(), expected["vision_tokens"], "vision tokens")
        table = detector.read("language.embed_tokens.weight")
        embeds = torch.cat(
            [table[list(prompt.before)], tokens.reshape(-1, tokens.shape[-1]), table[list(prompt.mask)]]
        )[None]
        language = detector.load_stage("language")
        spec = detector.spec("language")
        past = tuple(
            torch.zeros([0 if size == "past" else size for size in tensor.shape])
            for tensor in spec.inputs
            if tensor.name.startswith("past_")
        )
        hidden, _ = language.hidden_states(embeds, torch.arange(embeds.shape[1])[None], past)
        hidden = language.norm(hidden)[0]
        verdict_position = len(prompt.before) + tokens.shape[0] * tokens.shape[1] + len(prompt.verdict) - 1
        logits = hidden[verdict_position] @ detector.read("language.lm_head.weight").T
        assert_close(logits.numpy(), expected["verdict_logits"], "verdict logits over the whole vocabulary")
        assert_close(hidden[-1].numpy(), expected["seg_hidden"], "hidden state at [SEG]")
        embedding = language.seg_projection(hidden[-1:])
        assert_close(embedding.numpy(), expected["seg_embedding"], "[SEG] embedding")
        pixels = torch.from_numpy(mask_image(case.image, case.config.segmenter.image_size))
        features = detector.load_stage("mask_encoder")(pixels)
        assert_features(dict(zip(("image_embed", "high_res_0", "high_res_1"), (f.numpy() for f in features))), expected)
        mask_logits, iou = detector.load_stage("mask_decoder")(*features, embedding)
    assert_close(mask_logits.numpy(), expected["mask_logits"][0], "mask logits")
    assert_close(iou.numpy(), expected["iou"].max(keepdims=True)[0], "predicted IoU")
    assert_same_mask(mask_logits[0].numpy(), case)


def assert_features(features: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    steps = {"image_embed": (4, 2), "high_res_0": (4, 4), "high_res_1": (4, 2)}
    for name, (channels, pixels) in steps.items():
        assert_close(features[name][:, ::channels, ::pixels, ::pixels], expected[name], name)


def assert_same_mask(logits: np.ndarray, case: Case) -> None:
    size = case.config.segmenter.image_size
    expected = case.outputs["mask"]
    mask = full_size_mask(logits, size, *case.image.size)
    assert (mask == expected).mean() >= 0.9999
    full = np.concatenate(list(resized_rows(logits, size, *case.image.size)))
    np.testing.assert_allclose(full, case.outputs["mask_logits_full"].astype(np.float32), rtol=1e-3, atol=2e-3)


@pytest.fixture(scope="module")
def session(case: Case) -> Session:
    """The exported float32 build, opened by the runtime."""
    job = plan_job(load_recipe("float32"), load_target("cpu"), str(case.folder))
    return open_session(make_build(job, case.folder.parent / "build", lambda what, fraction: None))


def test_exported_stages_equal(case: Case, tiles: np.ndarray, session: Session) -> None:
    """Through the shipped order of work: prefix once, then both questions on its key/values."""
    expected, clock = case.outputs, Clock()
    vision = session.run("vision_encoder", {"tiles": tiles}, clock)
    assert_close(vision["vision_tokens"][:, ::4], expected["vision_tokens"], "vision tokens")
    prefix = session.read_prefix(vision, clock)
    logits = session.ask("verdict", prefix, clock)[0]
    assert_close(logits, expected["verdict_logits"][list(case.answers)], "verdict logits")
    embedding = session.ask("mask", prefix, clock)
    assert_close(embedding, expected["seg_embedding"], "[SEG] embedding")
    pixels = mask_image(case.image, case.config.segmenter.image_size)
    features = session.run("mask_encoder", {"image": pixels}, clock)
    assert_features(features, expected)
    decoded = session.run("mask_decoder", {**features, "seg_embedding": embedding}, clock)
    assert_close(decoded["mask_logits"], expected["mask_logits"][0], "mask logits")
    assert_same_mask(decoded["mask_logits"][0], case)


def test_judge_gives_the_original_mask(case: Case, session: Session) -> None:
    verdict = session.judge(case.image, gate=0.0)
    assert_close(verdict.verdict_logits, case.outputs["verdict_logits"][list(case.answers)], "verdict logits")
    assert verdict.mask is not None
    assert (verdict.mask == case.outputs["mask"]).mean() >= 0.9999


@pytest.mark.parametrize("answers", ANSWERS)
def test_the_verdict_head_is_rows_of_the_vocabulary_head(case: Case, answers: tuple[int, ...]) -> None:
    assert case.config.prompt is not None
    prompt = dataclasses.replace(case.config.prompt, fake_answers=answers[:4], real_answers=answers[4:])
    detector = Detector(dataclasses.replace(case.config, prompt=prompt), case.detector.weights)
    logits = detector.read("language.verdict_head.weight") @ torch.from_numpy(case.outputs["seg_hidden"])
    whole = detector.read("language.lm_head.weight") @ torch.from_numpy(case.outputs["seg_hidden"])
    assert_close(logits.numpy(), whole[list(answers)].numpy(), "rows of the head")
