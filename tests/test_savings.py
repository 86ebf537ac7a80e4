"""The exact savings: each leaves out work and no result. `plain` makes none of them, and all others must equal it."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from PIL import Image

from defaker_opt.config import PromptConfig
from defaker_opt.detector import load_detector
from defaker_opt.errors import BuildError, ConfigError
from defaker_opt.recipe import load_recipe, parse_recipe
from defaker_opt.runtime import Build, Manifest, Session, Verdict, open_build, open_session
from defaker_opt.runtime import session as session_module
from defaker_opt.runtime.clock import Clock
from defaker_opt.runtime.images import image_tiles
from defaker_opt.runtime.spec import VOCABULARY_HEAD
from defaker_opt.sample import sample_image
from defaker_opt.savings import EVERY_SAVING, NO_SAVING, Savings
from tests.conftest import GOLDEN, golden_folders, shared_build

NAMES = tuple(each.name for each in dataclasses.fields(Savings))

# Sums of float32 in another order; a verdict moves by less, a mask only where its logit is that close to zero.
REORDERED = 1e-5

# Those that are a choice of the runtime alone, and need no other files.
AT_RUN_TIME = ("shared_prefix", "concurrent_mask_encoder", "no_padding", "identical_tiles")


def pictures() -> list[Image.Image]:
    """Several tile counts, blank and repeated tiles, and a picture smaller than a tile."""
    noise = np.random.default_rng(3).integers(0, 256, (120, 60, 3), dtype=np.uint8)
    half_blank = np.full((448, 448, 3), 200, np.uint8)
    half_blank[:224] = sample_image()[:224, :448]
    return [Image.fromarray(sample_image(7)), Image.fromarray(noise), Image.fromarray(half_blank)]


def changed(build: Build, **savings: bool) -> Build:
    """The same files, made to run with other savings."""
    data = copy.deepcopy(dict(build.manifest.data))
    data["recipe"]["savings"].update(savings)
    return Build(build.folder, Manifest(data), build.digest)


def assert_same(verdict: Verdict, expected: Verdict) -> None:
    assert abs(verdict.fake_probability - expected.fake_probability) <= REORDERED
    assert verdict.is_fake == expected.is_fake
    np.testing.assert_allclose(verdict.verdict_logits, expected.verdict_logits, rtol=0, atol=10 * REORDERED)
    assert verdict.mask is not None
    assert expected.mask is not None
    np.testing.assert_array_equal(verdict.mask, expected.mask)


@pytest.fixture(scope="module")
def plain_build(builds: Path) -> Path:
    return shared_build(builds, "plain")


@pytest.fixture(scope="module")
def plain_verdicts(plain_build: Path) -> list[Verdict]:
    session = open_session(open_build(plain_build))
    return [session.judge(image) for image in pictures()]


def test_all_together_change_nothing(float_build: Path, plain_verdicts: list[Verdict]) -> None:
    assert load_recipe("float32").savings == EVERY_SAVING
    session = open_session(open_build(float_build))
    for image, expected in zip(pictures(), plain_verdicts):
        assert_same(session.judge(image, gate=0.0), expected)
    assert {verdict.is_fake for verdict in plain_verdicts} <= {True, False}
    assert len({verdict.fake_probability for verdict in plain_verdicts}) == len(plain_verdicts)


@pytest.mark.parametrize("name", AT_RUN_TIME)
def test_each_alone_changes_nothing(
    name: str, plain_build: Path, plain_verdicts: list[Verdict], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "_CORES_FOR_TWO", 1)
    build = open_build(plain_build)
    on = not build.manifest.saves(name)
    session = open_session(changed(build, **{name: on}))
    for image, expected in zip(pictures(), plain_verdicts):
        assert_same(session.judge(image), expected)


def test_the_eight_row_head_alone_changes_nothing(plain_build: Path, plain_verdicts: list[Verdict]) -> None:
    session = open_session(changed(open_build(plain_build), verdict_head=True, appended_answer=True))
    for image, expected in zip(pictures(), plain_verdicts):
        verdict = session.judge(image)
        assert VOCABULARY_HEAD not in verdict.latency_ms
        assert VOCABULARY_HEAD in expected.latency_ms
        assert_same(verdict, expected)


def test_the_appended_answer_alone_changes_nothing(plain_build: Path, plain_verdicts: list[Verdict]) -> None:
    build = open_build(plain_build)
    session = open_session(changed(build, appended_answer=True))
    for image, expected in zip(pictures(), plain_verdicts):
        verdict = session.judge(image)
        assert verdict.greedy_answer == ()
        assert len(expected.greedy_answer) == build.manifest.data["prompt"]["answer_tokens"] == 3
        assert_same(verdict, expected)


def test_decoded_words_are_the_likeliest_after_the_fixed_ones(plain_build: Path) -> None:
    """Greedy words again, each from one pass over everything before it through the whole torch model."""
    session, detector = open_session(open_build(plain_build)), load_detector("reference")
    image, prompt = pictures()[0], detector.config.prompt
    assert prompt is not None
    facts = session.build.manifest.data["input"]
    tiles = image_tiles(image, facts["tile_size"], facts["min_tiles"], facts["max_tiles"])
    with torch.inference_mode():
        tokens = detector.load_stage("vision_encoder")(torch.from_numpy(tiles))[0].flatten(0, 1)
        table, language = detector.read("language.embed_tokens.weight"), detector.load_stage("language")
        head = detector.read("language.lm_head.weight")
        greedy = []
        for end in (-3, -2, -1):
            embeds = torch.cat([table[list(prompt.before)], tokens, table[list(prompt.mask[:end])]])[None]
            past = tuple(torch.zeros(1, 3, 0, 64) for _ in range(6))
            hidden, _ = language.hidden_states(embeds, torch.arange(embeds.shape[1])[None], past)
            greedy.append(int((language.norm(hidden[0, -1]) @ head.T).argmax()))
    assert session.judge(image).greedy_answer == tuple(greedy)


def test_looked_up_prompts_are_the_stored_ones(plain_build: Path, float_build: Path) -> None:
    looked_up, stored = (open_session(open_build(build)).prompts() for build in (plain_build, float_build))
    assert set(looked_up) == set(stored) == {"before", "shared", "verdict", "mask"}
    for name, array in stored.items():
        np.testing.assert_array_equal(looked_up[name], array)
        assert looked_up[name].dtype == np.float32
    assert not (float_build / "embeddings.npy").exists()
    assert not (plain_build / "prompts.npz").exists()


@pytest.mark.parametrize("past", [0, 5])
def test_the_last_row_alone_is_the_last_of_all_rows(past: int) -> None:
    from defaker_opt.stages.language import LastRowLanguage

    detector = load_detector("reference")
    every = detector.load_stage("language")
    alone = LastRowLanguage(detector.config)
    alone.load_state_dict(every.state_dict())
    generator = torch.Generator().manual_seed(4)
    embeds = torch.randn(1, 9, 192, generator=generator)
    known = tuple(torch.randn(1, 3, past, 64, generator=generator) for _ in range(6))
    positions = torch.arange(past, past + 9)[None]
    with torch.inference_mode():
        for one, all_rows in zip(alone(embeds, positions, *known), every(embeds, positions, *known), strict=True):
            torch.testing.assert_close(one, all_rows, rtol=0, atol=1e-5)


def test_the_last_layer_of_a_graph_computes_one_row(float_build: Path, plain_build: Path) -> None:
    """Whatever the graph is asked for, the last layer's other products are of one row."""

    def rows(build: Path) -> int:
        spec = open_build(build).manifest.spec("language")
        inputs = {"inputs_embeds": np.ones((1, 11, 192), np.float32), "position_ids": np.arange(11)[None]}
        inputs |= {each.name: np.zeros((1, 3, 0, 64), np.float32) for each in spec.inputs[2:]}
        graph = ir.load(build / "language.onnx").graph
        product = next(node for node in graph if node.name == "language.layers.2.mlp.down_proj.weight")
        return observed_shape(build / "language.onnx", str(product.outputs[0].name), inputs)[1]

    assert rows(float_build) == 1
    assert rows(plain_build) == 11


def observed_shape(path: Path, name: str, inputs: Mapping[str, np.ndarray]) -> tuple[int, ...]:
    """Shape of an inner value of a graph when it is run."""
    import onnx
    import onnxruntime

    model = onnx.load(path)
    model.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
    shape: tuple[int, ...] = onnxruntime.InferenceSession(model.SerializeToString()).run([name], dict(inputs))[0].shape
    return shape


class Counted:
    """Counts the tiles that the vision encoder is given."""

    def __init__(self, session: Session) -> None:
        self.opened, self.tiles = session.open_stage("vision_encoder"), 0
        session._open["vision_encoder"] = self

    def __call__(self, tensors: Mapping[str, Any], outputs: tuple[str, ...]) -> dict[str, Any]:
        self.tiles += len(tensors["tiles"])
        return self.opened(tensors, outputs)


@pytest.mark.parametrize(
    ("savings", "encoded"),
    [({}, 2), ({"identical_tiles": False}, 4), ({"no_padding": False}, 3), (vars(NO_SAVING), "most")],
    ids=["all", "identical tiles", "padding", "none"],
)
def test_which_tiles_are_encoded(savings: dict[str, bool], encoded: int | str, float_build: Path) -> None:
    """Four tiles of which three are equal, where more could be."""
    session = open_session(changed(open_build(float_build), **savings))
    counted = Counted(session)
    facts = session.build.manifest.data["input"]
    size, most = facts["tile_size"], facts["max_tiles"] + 1
    assert most > 4
    tiles = np.zeros((4, 3, size, size), np.float32)
    tiles[2] = np.random.default_rng(0).standard_normal((3, size, size))
    tiles[[0, 1, 3]] = 1.5
    seen = session.see(tiles, Clock())
    assert counted.tiles == (most if encoded == "most" else encoded)
    assert seen["vision_tokens"].shape[0] == 4
    one_by_one = [session.run("vision_encoder", {"tiles": tile[None]}, Clock())["vision_tokens"][0] for tile in tiles]
    np.testing.assert_allclose(seen["vision_tokens"], one_by_one, rtol=0, atol=1e-5)


def test_tiles_that_differ_in_one_value_are_both_encoded(float_build: Path) -> None:
    session = open_session(open_build(float_build))
    counted = Counted(session)
    size = session.build.manifest.data["input"]["tile_size"]
    tiles = np.zeros((2, 3, size, size), np.float32)
    tiles[1, 2, -1, -1] = np.float32(1e-30)
    session.see(tiles, Clock())
    assert counted.tiles == 2


@pytest.mark.parametrize("tokens", [0, 1, 7, 100_000])
def test_blocks_of_tokens_change_nothing(tokens: int, float_build: Path) -> None:
    build = changed(open_build(float_build))
    build.manifest.data["target"]["session"]["tokens"] = tokens
    session, vision = open_session(build), {"vision_tokens": np.zeros((1, 12, 192), np.float32)}
    vision["vision_tokens"][:] = np.random.default_rng(1).standard_normal((1, 12, 192))
    vision["kept_positions"] = np.arange(12)[None]
    logits = session.ask("verdict", session.read_prefix(vision, Clock()), Clock())
    whole = open_session(changed(build, shared_prefix=False))
    expected = whole.ask("verdict", whole.read_prefix(vision, Clock()), Clock())
    np.testing.assert_allclose(logits, expected, rtol=0, atol=REORDERED * 10)


def test_the_gate_is_open_where_it_saves_nothing(plain_build: Path, float_build: Path) -> None:
    assert open_build(plain_build).manifest.data["thresholds"]["gate"] == 0.0
    assert open_build(float_build).manifest.data["thresholds"]["gate"] == 0.5


@pytest.mark.parametrize(
    ("gate", "cores", "on", "ahead"),
    [
        (0.0, 4, True, True),
        (0.5, 4, True, False),
        (0.0, 2, True, False),
        (0.0, 4, False, False),
        (-1.0, 64, True, True),
    ],
)
def test_the_mask_encoder_begins_early_only_where_it_surely_runs(
    gate: float, cores: int, on: bool, ahead: bool, float_build: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module.os, "cpu_count", lambda: cores)
    session = open_session(changed(open_build(float_build), concurrent_mask_encoder=on))
    begun_before_the_verdict = []
    encode, ask = session._encode_whole, session.ask
    monkeypatch.setattr(
        session, "_encode_whole", lambda *given: begun_before_the_verdict.append(True) or encode(*given)
    )

    def ask_and_look(question: str, *given: Any) -> Any:
        if question == "verdict":
            asked_at.append(len(begun_before_the_verdict))
        return ask(question, *given)

    asked_at: list[int] = []
    monkeypatch.setattr(session, "ask", ask_and_look)
    session.judge(pictures()[1], gate=gate)
    assert asked_at == [int(ahead)]


def test_a_mask_encoder_that_fails_beside_the_others_is_heard(
    float_build: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "_CORES_FOR_TWO", 1)
    session = open_session(open_build(float_build))

    def broken(*_: object) -> None:
        raise BuildError("no mask encoder")

    monkeypatch.setattr(session, "_encode_whole", broken)
    with pytest.raises(BuildError, match="no mask encoder"):
        session.judge(pictures()[1], gate=0.0)


RECIPE = {"description": "d", "source": "reference", "target": "cpu"}


@pytest.mark.parametrize("name", NAMES)
def test_each_has_its_switch(name: str) -> None:
    off = {name: False, **({"verdict_head": False, "prompt_embeddings": False} if name == "appended_answer" else {})}
    recipe = parse_recipe("r", {**RECIPE, "savings": off}, "r.yaml")
    assert dataclasses.asdict(recipe.savings) == {**dict.fromkeys(NAMES, True), **off}
    assert recipe.as_json()["savings"][name] is False


@pytest.mark.parametrize(
    ("savings", "message"),
    [
        ({"verdict_heads": False}, r"savings\.verdict_heads: unknown key.*did you mean 'verdict_head'"),
        ({"no_padding": 1}, r"savings\.no_padding: must be true or false"),
        ({"appended_answer": False}, r"savings: appended_answer: false .* set verdict_head: false and prompt_embedd"),
        (["no_padding"], r"savings: must be a mapping"),
    ],
)
def test_wrong_switches_are_named(savings: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_recipe("r", {**RECIPE, "savings": savings}, "r.yaml")


def test_plain_saves_nothing_but_padding_which_the_original_does_not_do_either() -> None:
    assert load_recipe("plain").savings == dataclasses.replace(NO_SAVING, no_padding=True)
    assert load_recipe("plain").passes == ()


def prompt_of(verdict: tuple[int, ...], mask: tuple[int, ...]) -> PromptConfig:
    return PromptConfig((1,), verdict, mask, (1, 2, 3, 4), (5, 6, 7, 8))


@pytest.mark.parametrize(
    ("verdict", "mask", "tokens"),
    [
        ((9, 11, 12, 20, 21), (9, 13, 14, 20, 21, 30, 31, 32), 3),
        ((9, 11, 20, 21), (9, 11, 20, 21, 30), 1),
        ((9, 21, 20, 21), (9, 21, 13, 20, 21, 30, 31), 2),
        ((9, 10), (7, 8, 6), 1),
    ],
    ids=["closing alike", "questions alike", "closing's words in the question", "nothing alike"],
)
def test_the_answer_is_what_follows_the_common_ending(
    verdict: tuple[int, ...], mask: tuple[int, ...], tokens: int
) -> None:
    assert prompt_of(verdict, mask).answer_tokens() == tokens


@pytest.fixture(scope="module", params=golden_folders(), ids=lambda folder: folder.name)
def golden(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Session, Session]:
    """Builds of a released checkpoint with every saving, and with none."""
    import json

    from safetensors.numpy import load_file

    from defaker_opt.config import load_config
    from defaker_opt.convert import convert
    from defaker_opt.pipeline import make_build, plan_job
    from defaker_opt.target import load_target
    from tests.test_golden import ANSWERS, read_prompt

    source: Path = request.param
    folder = tmp_path_factory.mktemp("golden") / source.name
    convert(source, folder)
    tokens = json.loads((source / "golden_meta.json").read_text())["special_tokens"]
    prompt = read_prompt(load_file(source / "golden.safetensors"), tokens["<IMG_CONTEXT>"], ANSWERS[0])
    (folder / "config.json").write_text(dataclasses.replace(load_config(folder), prompt=prompt).as_json())
    sessions = []
    for name in ("float32", "plain"):
        job = plan_job(load_recipe(name), load_target("cpu"), str(folder))
        sessions.append(open_session(make_build(job, folder.parent / name, lambda what, fraction: None)))
    return sessions[0], sessions[1]


@pytest.mark.slow
@pytest.mark.skipif(not golden_folders(), reason=f"no golden checkpoints in {GOLDEN}; set DEFAKER_GOLDEN_DIR")
def test_released_checkpoints_are_judged_alike(golden: tuple[Session, Session]) -> None:
    every, none = golden
    for image in pictures()[:2]:
        expected = none.judge(image)
        assert expected.greedy_answer
        assert_same(every.judge(image, gate=0.0), expected)
