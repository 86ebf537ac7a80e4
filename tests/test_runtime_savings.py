"""What the runtime leaves out or gives back by itself: masks below the gate, stages of other phases."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from defaker_opt.runtime import Build, Manifest, open_build, open_session
from defaker_opt.runtime import session as session_module
from defaker_opt.runtime.clock import Clock
from defaker_opt.runtime.prompts import extend_
from defaker_opt.sample import sample_image
from tests.conftest import shared_build

MASK_STAGES = {"mask_encoder", "mask_decoder"}


def pictures() -> list[Image.Image]:
    noise = np.random.default_rng(5).integers(0, 256, (150, 90, 3), dtype=np.uint8)
    return [Image.fromarray(sample_image(7)), Image.fromarray(noise), Image.fromarray(sample_image()[:224, :300])]


def edited(build: Build, **parts: Mapping[str, Any]) -> Build:
    """The same files with another manifest: keys of `parts` are updated."""
    data = copy.deepcopy(dict(build.manifest.data))
    for name, values in parts.items():
        data[name].update(values)
    return Build(build.folder, Manifest(data), build.digest)


def test_a_gate_holds_back_masks_and_changes_nothing_else(float_build: Path) -> None:
    """The gate stands between the pictures' own probabilities, so that some are above and some below it."""
    build, every = open_build(float_build), open_session(open_build(float_build))
    ungated = [every.judge(image, gate=0.0) for image in pictures()]
    gate = float(np.median([verdict.fake_probability for verdict in ungated]))
    gated = open_session(edited(build, thresholds={"gate": gate, "fake_probability": gate}))
    held_back = 0
    for image, expected in zip(pictures(), ungated):
        verdict = gated.judge(image)
        np.testing.assert_array_equal(verdict.verdict_logits, expected.verdict_logits)
        if expected.fake_probability < gate:
            held_back += 1
            assert verdict.mask is None
            assert verdict.mask_area is None
            assert not verdict.is_fake
            assert not MASK_STAGES & set(verdict.latency_ms)
        else:
            np.testing.assert_array_equal(verdict.mask, expected.mask)
            np.testing.assert_array_equal(verdict.mask_logits, expected.mask_logits)
    assert 0 < held_back < len(ungated)


def test_asking_for_fewer_outputs_changes_none_of_them(float_build: Path) -> None:
    """The prefix asks for key/values alone, the questions for one output each."""
    session = open_session(open_build(float_build))
    spec = session.spec("language")
    given: dict[str, Any] = {each.name: np.zeros((1, 3, 0, 64), np.float32) for each in spec.inputs[2:]}
    given |= {"inputs_embeds": np.ones((1, 11, 192), np.float32), "position_ids": np.arange(11)[None]}
    every = session.run("language", given, Clock())
    assert set(every) == {tensor.name for tensor in spec.outputs}
    keys = session.run("language", given, Clock(), session.present())
    assert set(keys) == set(session.present())
    for name, array in keys.items():
        np.testing.assert_array_equal(array, every[name])
        assert array.shape[2] == 11
    assert every["last_hidden"].shape == (1, 192)


@pytest.mark.parametrize("recipe", ["float32", "plain"])
def test_stages_that_take_turns_give_the_same_bits(recipe: str, builds: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = open_build(shared_build(builds, recipe))
    size_mb = sum(entry["bytes"] for entry in build.manifest.data["stages"].values()) / 1e6
    roomy, short = (
        open_session(edited(build, target={"session": {**build.manifest.data["target"]["session"], "open_mb": limit}}))
        for limit in (int(size_mb) + 1, 1)
    )
    monkeypatch.setattr(session_module, "_CORES_FOR_TWO", 1)
    opened: list[set[str]] = []
    open_one = short.open_stage

    def watch(stage: str) -> Any:
        fresh, result = stage not in short._open, open_one(stage)
        if fresh:
            opened.append(set(short._open))
        return result

    monkeypatch.setattr(short, "open_stage", watch)
    # Without savings picture and prefix are read again for the second question.
    questions = [[{"vision_encoder"}, {"language"}]]
    if recipe == "plain":
        questions = 2 * [[{"vision_encoder"}, {"language"}, {"language", "vocabulary_head"}]]
    for image in pictures()[:2]:
        opened.clear()
        expected, verdict = roomy.judge(image, gate=0.0), short.judge(image, gate=0.0)
        np.testing.assert_array_equal(verdict.verdict_logits, expected.verdict_logits)
        np.testing.assert_array_equal(verdict.mask_logits, expected.mask_logits)
        assert opened == [*itertools.chain(*questions), {"mask_encoder"}, MASK_STAGES]
    assert set(roomy._open) == set(build.manifest.data["stages"])


def test_key_values_grow_one_tensor_at_a_time() -> None:
    generator = np.random.default_rng(0)
    past = {f"past_{kind}_0": generator.standard_normal((1, 2, 3, 4)) for kind in ("key", "value")}
    present = {f"present_{kind}_0": generator.standard_normal((1, 2, 5, 4)) for kind in ("key", "value")}
    expected = {
        name: np.concatenate([past[name], present[name.replace("past", "present")]], axis=2) for name in list(past)
    }
    rest = np.zeros(1)
    present["last_hidden"] = rest
    extend_(past, present)
    for name, array in expected.items():
        np.testing.assert_array_equal(past[name], array)
    assert list(present) == ["last_hidden"]
