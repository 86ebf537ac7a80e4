"""Answers in words: the opt-in recipe `explain`, from the tokenizer to the text, without torch on the device."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from defaker_opt.detector import Detector, load_detector
from defaker_opt.errors import BuildError, ConfigError, SourceError
from defaker_opt.explanation import Explanation
from defaker_opt.pipeline import make_build, plan_job
from defaker_opt.recipe import load_recipe, parse_recipe
from defaker_opt.runtime import Build, Manifest, Session, open_build, open_session
from defaker_opt.runtime.answers import decode_free, text_of
from defaker_opt.runtime.clock import Clock
from defaker_opt.runtime.images import image_tiles
from defaker_opt.runtime.spec import VOCABULARY_HEAD
from defaker_opt.sample import sample_image
from defaker_opt.target import load_target
from defaker_opt.words import end_tokens, tokenizer_digest, vocabulary_arrays
from tests.conftest import GOLDEN, defaker_opt, golden_folders, shared_build

WORDS = 6


@pytest.fixture(scope="module")
def float_with_words(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """The reference detector in float32, so that its words are torch's words."""
    recipe = dataclasses.replace(load_recipe("float32"), explain=Explanation(max_tokens=WORDS))
    job = plan_job(recipe, load_target("cpu"), "reference")
    return make_build(job, tmp_path_factory.mktemp("explain") / "build", lambda what, fraction: None)


def slow_answer(detector: Detector, image: Image.Image, limit: int, end: set[int]) -> tuple[int, ...]:
    """Each word from one pass over everything before it, through the whole torch model without key/values."""
    config, prompt = detector.config, detector.config.prompt
    assert prompt is not None
    tiling = config.tiling
    tiles = image_tiles(image, tiling.tile_size, tiling.min_tiles, tiling.max_tiles)
    words: list[int] = []
    with torch.inference_mode():
        tokens = detector.load_stage("vision_encoder")(torch.from_numpy(tiles))[0].flatten(0, 1)
        table, language = detector.read("language.embed_tokens.weight"), detector.load_stage("language")
        head = detector.read("language.lm_head.weight")
        sizes = config.language
        past = tuple(torch.zeros(1, sizes.kv_heads, 0, sizes.head_dim) for _ in range(2 * sizes.layers))
        while len(words) < limit:
            embeds = torch.cat([table[list(prompt.before)], tokens, table[[*prompt.verdict, *words]]])[None]
            hidden, _ = language.hidden_states(embeds, torch.arange(embeds.shape[1])[None], past)
            word = int((language.norm(hidden[0, -1]) @ head.T).argmax())
            if word in end:
                break
            words.append(word)
    return tuple(words)


def free_words(session: Session, image: Image.Image, limit: int) -> tuple[int, ...]:
    facts, clock = session.build.manifest.data["input"], Clock()
    tiles = image_tiles(image, facts["tile_size"], facts["min_tiles"], facts["max_tiles"])
    return decode_free(session, session.read_prefix(session.see(tiles, clock), clock), clock, limit)


def pictures() -> list[Image.Image]:
    noise = np.random.default_rng(3).integers(0, 256, (120, 60, 3), dtype=np.uint8)
    return [Image.fromarray(sample_image(7)), Image.fromarray(noise)]


def test_words_are_those_of_the_whole_model(float_with_words: Build) -> None:
    session, detector = open_session(float_with_words), load_detector("reference")
    for image in pictures():
        expected = slow_answer(detector, image, WORDS, {4})
        assert free_words(session, image, WORDS) == expected
        assert session.judge(image, explain_words=WORDS).explanation == text_of(float_with_words, expected)


def test_an_answer_ends_at_an_end_token_which_is_no_word(float_with_words: Build) -> None:
    image = pictures()[0]
    words = free_words(open_session(float_with_words), image, WORDS)
    data = {**float_with_words.manifest.data}
    for position, word in enumerate(words):
        data["explain"] = {**data["explain"], "end": [word]}
        ended = Build(float_with_words.folder, Manifest(data), "")
        assert free_words(open_session(ended), image, WORDS) == words[: words.index(word)]
        assert words.index(word) <= position


def test_explaining_changes_neither_verdict_nor_mask(float_with_words: Build, float_build: Path) -> None:
    image = pictures()[0]
    plain = open_session(open_build(float_build)).judge(image, gate=0.0)
    explained = open_session(float_with_words).judge(image, gate=0.0, explain_words=3)
    assert plain.explanation is None
    assert explained.explanation is not None
    assert dataclasses.replace(explained, explanation=None).fake_probability == plain.fake_probability
    np.testing.assert_array_equal(explained.mask, plain.mask)


def test_the_manifest_lists_what_explaining_takes(builds: Path) -> None:
    build = open_build(shared_build(builds, "explain"))
    facts = build.manifest.data["explain"]
    assert facts == {
        "max_tokens": 64,
        "end": [4, 1],
        "stages": ["language", VOCABULARY_HEAD],
        "files": ["embeddings.npy", "vocabulary.npz"],
    }
    assert set(facts["stages"]) <= set(build.manifest.data["stages"])
    assert set(facts["files"]) <= set(build.manifest.data["files"])
    assert (build.folder / "prompts.npz").is_file()


def test_the_command_prints_the_words(builds: Path, tmp_path: Path) -> None:
    photo, build = tmp_path / "photo.png", shared_build(builds, "explain")
    pictures()[1].save(photo)
    [row] = map(json.loads, defaker_opt("run", build, photo, "--explain", "--json").stdout.splitlines())
    assert row["explanation"] == open_session(open_build(build)).judge(pictures()[1], explain_words=64).explanation
    done = defaker_opt("run", build, photo, "--explain")
    assert done.stdout.splitlines()[1] == f"  {row['explanation']}"
    assert "explanation" not in json.loads(defaker_opt("run", build, photo, "--json").stdout)


def test_a_build_without_words_says_how_to_get_some(float_build: Path, tmp_path: Path) -> None:
    photo = tmp_path / "photo.png"
    pictures()[1].save(photo)
    done = defaker_opt("run", float_build, photo, "--explain")
    assert done.returncode == 2
    assert "has no words to explain with; make a build that has: defaker-opt quantize --recipe explain" in done.stderr
    with pytest.raises(BuildError, match="has no words"):
        open_session(open_build(float_build)).judge(pictures()[1], explain_words=1)


def test_a_missing_table_is_found_before_anything_runs(builds: Path, tmp_path: Path) -> None:
    shutil.copytree(shared_build(builds, "explain"), tmp_path / "build")
    (tmp_path / "build" / "vocabulary.npz").unlink()
    with pytest.raises(BuildError, match=r"vocabulary\.npz: missing from the build"):
        open_build(tmp_path / "build")


@pytest.mark.parametrize(
    ("explain", "message"),
    [
        ({"max_tokens": 0}, r"explain\.max_tokens: must be 1 to 4096, got 0"),
        ({"words": 3}, r"explain\.words: unknown key"),
        (True, r"explain: must be a mapping"),
    ],
)
def test_wrong_settings_are_named(explain: object, message: str) -> None:
    recipe = {"description": "d", "source": "reference", "target": "cpu", "explain": explain}
    with pytest.raises(ConfigError, match=message):
        parse_recipe("r", recipe, "r.yaml")


def texts(folder: Path, size: int) -> list[bytes]:
    arrays = vocabulary_arrays(folder, size)
    return [part.tobytes() for part in np.split(arrays["text"], arrays["ends"])[:-1]]


SENTENCES = ["Yes, signs of tampering: naïve café, 日本 🙂!", "No.\n\tTwo  spaces", "Not at all"]
ENDING = {"id": 0, "content": "<|im_end|>", "special": True}


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=["<|im_end|>"])
    tokenizer.train_from_iterator(SENTENCES * 3, trainer)
    return tokenizer


def sentencepiece_like() -> Tokenizer:
    pieces = ["<|im_end|>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *"YesNotalsigfmperin,.:", "\u2581o"]
    unique = list(dict.fromkeys(pieces))
    tokenizer = Tokenizer(
        models.BPE({piece: i for i, piece in enumerate(unique)}, [("\u2581", "o")], byte_fallback=True)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<|im_end|>"])
    return tokenizer


@pytest.mark.parametrize("make", [byte_level, sentencepiece_like])
def test_text_is_what_the_tokenizer_says(make: Any, tmp_path: Path) -> None:
    tokenizer = make()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    pieces = texts(tmp_path, tokenizer.get_vocab_size() + 5)
    assert pieces[-5:] == [b""] * 5
    for sentence in SENTENCES:
        ids = [*tokenizer.encode(sentence).ids, tokenizer.token_to_id("<|im_end|>")]
        got = b"".join(pieces[token] for token in ids).decode("utf-8", "replace").strip()
        assert got == tokenizer.decode(ids, skip_special_tokens=True).strip() == sentence.strip()
    assert end_tokens(tmp_path) == (tokenizer.token_to_id("<|im_end|>"),)


def test_the_reference_detectors_words_are_what_tokenizers_makes_of_them(builds: Path) -> None:
    from defaker_opt.catalog import data_folder

    tokenizer = Tokenizer.from_file(str(data_folder("reference") / "tokenizer.json"))
    words = (33, 31, 15, 16, 17, 4, 27)
    expected = tokenizer.decode(list(words), skip_special_tokens=True)
    assert text_of(open_build(shared_build(builds, "explain")), words) == expected == "Yes , signs of tampering ."


def test_sentencepiece_models_are_read_too(tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(SENTENCES * 20), encoding="utf-8")
    options = {"vocab_size": 300, "byte_fallback": True, "minloglevel": 2, "hard_vocab_limit": False}
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(tmp_path / "tokenizer"), character_coverage=0.98, **options
    )
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    pieces = texts(tmp_path, processor.GetPieceSize())
    for sentence in SENTENCES:
        ids = processor.EncodeAsIds(sentence)
        assert b"".join(pieces[token] for token in ids).decode().strip() == processor.DecodeIds(ids).strip()
    assert end_tokens(tmp_path) == (2,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decoder": {"type": "WordPiece"}}, r"decoder WordPiece; explanations are written with ByteLevel"),
        ({"model": {}}, r"has no vocabulary"),
    ],
)
def test_tokenizers_we_cannot_write_with_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    data = {"model": {"vocab": {"a": 0}}, **change}
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(SourceError, match=message):
        vocabulary_arrays(tmp_path, 4)


def test_a_source_without_words_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"neither tokenizer\.json nor tokenizer\.model .* choose a recipe without"):
        tokenizer_digest(tmp_path)
    tokenizer = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(SourceError, match="no token that ends an answer"):
        end_tokens(tmp_path)


@pytest.mark.skipif(not golden_folders(), reason=f"no golden checkpoints in {GOLDEN}; set DEFAKER_GOLDEN_DIR")
def test_the_first_word_is_the_likeliest_of_the_original_code(tmp_path: Path) -> None:
    """The golden folders hold the original's logits of every word where the answer begins."""
    from safetensors.numpy import load_file

    from defaker_opt.config import load_config
    from defaker_opt.convert import convert
    from tests.test_golden import ANSWERS, read_prompt

    source = golden_folders()[0]
    folder, golden = tmp_path / "detector", load_file(source / "golden.safetensors")
    convert(source, folder)
    names = json.loads((source / "golden_meta.json").read_text())["special_tokens"]
    prompt = read_prompt(golden, names["<IMG_CONTEXT>"], ANSWERS[0])
    (folder / "config.json").write_text(dataclasses.replace(load_config(folder), prompt=prompt).as_json())
    vocabulary = {"<|im_end|>": 0, **{f"w{token}": token for token in range(1, 512)}}
    Tokenizer(models.WordLevel(vocabulary, unk_token="w1")).save(str(folder / "tokenizer.json"))
    recipe = dataclasses.replace(load_recipe("float32"), explain=Explanation(max_tokens=1))
    job = plan_job(recipe, load_target("cpu"), str(folder))
    build = make_build(job, tmp_path / "build", lambda what, fraction: None)
    image = Image.open(source / "image.png").convert("RGB")
    [word] = free_words(open_session(build), image, 1)
    assert word == int(golden["verdict_logits"].argmax())
    assert text_of(build, (word,)) == f"w{word}"
