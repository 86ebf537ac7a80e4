"""Recipes, targets, detector folders and checkpoints with mistakes: each is named, and nothing is left behind."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from defaker_opt.catalog import data_folder
from defaker_opt.errors import ConfigError, DefakerError, PassError, SourceError
from defaker_opt.recipe import load_recipe
from defaker_opt.target import load_target
from tests.conftest import defaker_opt, golden_folders

RECIPE = """\
description: A recipe of somebody.
source: reference
target: cpu
passes:
  - quantize:
      rules:
        - {match: "mask_decoder.*", scheme: float}
        - {match: "*", scheme: int8}
"""

TARGET = """\
description: A machine of somebody.
backend: onnx_runtime
encodings:
  float: matmul
  int8: matmul_integer
session:
  threads: 2
"""


def refused(place: Path, *arguments: object) -> str:
    """The message of a command that must end with exit code 2 and leave nothing at its output place."""
    done = defaker_opt(*arguments, "--output", place / "out" / "result")
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert not done.stdout
    assert done.stderr.count("error: ") == 1
    assert not (place / "out").exists(), list((place / "out").iterdir())
    return done.stderr[done.stderr.index("error: ") :]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def problems_of(load: Callable[[str], object], path: Path) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        load(str(path))
    assert str(caught.value).startswith(f"{path}:\n  ")
    return caught.value.problems


def test_the_recipe_and_target_written_here_are_sound(tmp_path: Path) -> None:
    load_recipe(str(write(tmp_path / "mine.yaml", RECIPE)))
    load_target(str(write(tmp_path / "mine.yaml", TARGET)))


@pytest.mark.parametrize(
    ("option", "given", "meant"),
    [("--recipe", "itn8", "int8"), ("--recipe", "float23", "float32"), ("--target", "cpuu", "cpu")],
)
def test_an_unknown_name_gets_the_nearest_spelling(option: str, given: str, meant: str, tmp_path: Path) -> None:
    recipe = [] if option == "--recipe" else ["--recipe", "int8"]
    message = refused(tmp_path, "quantize", *recipe, option, given)
    assert f"{given!r} is not one of" in message
    assert f"did you mean {meant!r}?" in message
    assert message.count("\n") == 1


@pytest.mark.parametrize(("load", "noun"), [(load_recipe, "recipe"), (load_target, "target")])
def test_a_path_that_is_not_there_is_named(load: Callable[[str], object], noun: str, tmp_path: Path) -> None:
    (tmp_path / "folder.yaml").mkdir()
    for name in ("missing.yaml", "folder.yaml", "missing"):
        with pytest.raises(DefakerError, match=f"{noun} .*{name}: no such file; shipped ones are "):
            load(str(tmp_path / name))


# what is changed, into what → every problem that must be told, each by some words
MISTAKES: dict[str, tuple[str, str, list[str]]] = {
    "key": ("source:", "sorce:", ["sorce: unknown key.*did you mean 'source'", "source: missing"]),
    "pass": ("quantize:", "quantise:", [r"passes\[0\].*'quantise'.*did you mean 'quantize'"]),
    "rules key": ("rules:", "rule:", ["rule: unknown key.*did you mean 'rules'", "rules: missing"]),
    "rule key": ('match: "*"', 'mach: "*"', [r"rules\[1\].mach: unknown key.*'match'", r"rules\[1\].match: missing"]),
    "scheme": ("int8}", "int-8}", [r"rules\[1\].scheme: 'int-8' is not one of .*did you mean 'int8'"]),
    "scheme type": ("int8}", "[8]}", [r"rules\[1\].scheme: \[8\] is not one of"]),
    "method": ("int8}", "int8, method: round}", [r"rules\[1\].method: 'round' is not one of awq, .*round_to_nearest"]),
    "match type": ('match: "*"', "match: 7", [r"rules\[1\].match: must be text, got 7"]),
    "description type": ("A recipe of somebody.", "[a, b]", ["description: must be text"]),
    "description date": ("A recipe of somebody.", "2026-02-28", ["description: must be text"]),
    "no rules": (RECIPE[RECIPE.index("rules:") :], "rules: []\n", ["rules must not be empty"]),
    "rules mapping": (RECIPE[RECIPE.index("rules:") :], "rules: {a: 1}\n", ["rules: must be a list"]),
    "passes mapping": (RECIPE[RECIPE.index("passes:") :], "passes: {quantize: {}}\n", ["passes: must be a list"]),
    "passes text": (RECIPE[RECIPE.index("passes:") :], "passes: [quantize]\n", [r"passes\[0\]: must be a mapping"]),
    "two in one": (RECIPE[RECIPE.index("passes:") :], "passes: [{quantize: {}, prune: {}}]\n", ["must be one pass"]),
    "empty pass": (RECIPE[RECIPE.index("passes:") :], "passes: [{}]\n", ["must be one pass.*none"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_a_recipe_is_told_with_its_place(mistake: str, tmp_path: Path) -> None:
    right, wrong, expected = MISTAKES[mistake]
    assert right in RECIPE
    problems = problems_of(load_recipe, write(tmp_path / "mine.yaml", RECIPE.replace(right, wrong)))
    assert len(problems) == len(expected), problems
    for problem, words in zip(problems, expected):
        assert re.search(words, problem), problem


def test_all_mistakes_of_a_recipe_are_told_at_once(tmp_path: Path) -> None:
    text = (
        RECIPE.replace("source:", "sorce:").replace("int8}", "int9, methd: gptq}").replace("A recipe of somebody.", "7")
    )
    path = write(tmp_path / "mine.yaml", text + "  - prune: {}\n")
    message = refused(tmp_path, "quantize", "--recipe", path)
    for words in ("sorce: unknown", "source: missing", "'int9'", "methd: unknown", "description: must be", "'prune'"):
        assert words in message
    assert message.startswith(f"error: {path}:\n")
    assert message.count("\n") == 7


def test_an_unknown_target_is_told_with_the_other_mistakes_of_its_recipe(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.yaml", RECIPE.replace("source:", "sorce:").replace("cpu", "cpuu"))
    message = refused(tmp_path, "quantize", "--recipe", path)
    assert str(path) in message
    assert "sorce: unknown key" in message
    assert "did you mean 'cpu'?" in message


UNREADABLE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "must be a mapping"),
    "comments only": (b"# nothing\n", "must be a mapping"),
    "list": (b"- source: reference\n", "must be a mapping"),
    "text": (b"reference\n", "must be a mapping"),
    "syntax": (b"description: {a\nsource: ]\n", "cannot be read .*line 2"),
    "tab": (b"description:\n\t- a\n", "cannot be read"),
    "two documents": (b"a: 1\n---\nb: 2\n", "cannot be read"),
    "unknown tag": (b"description: !!python/object:os.system {}\n", "cannot be read"),
    "binary": (bytes(range(256)) * 4, "cannot be read"),
    "zeros": (bytes(100), "cannot be read"),
    "utf-16": (RECIPE.encode("utf-16"), "cannot be read"),
    "duplicate": (b"description: a\ndescription: b\n", "line 1: description given twice"),
    "no such day": (b"description: 2026-02-30\n", "cannot be read"),
    "nested": (b"[" * 5000, "cannot be read"),
    "itself": (b"&a [*a]\n", "must be a mapping|cannot be read"),
    "a list as key": (b"? [a]\n: b\n", "cannot be read"),
}


@pytest.mark.parametrize("content", UNREADABLE)
@pytest.mark.parametrize("load", [load_recipe, load_target], ids=["recipe", "target"])
def test_an_unreadable_file_is_one_problem(load: Callable[[str], object], content: str, tmp_path: Path) -> None:
    data, words = UNREADABLE[content]
    (problem,) = problems_of(load, write(tmp_path / "mine.yaml", data))
    assert re.search(words, problem), problem
    assert "\n" not in problem


def test_an_inner_key_given_twice_is_found(tmp_path: Path) -> None:
    text = RECIPE.replace("scheme: int8}", "scheme: int8, scheme: float}")
    assert problems_of(load_recipe, write(tmp_path / "mine.yaml", text)) == ("line 8: scheme given twice",)


def test_all_keys_given_twice_are_told_at_once(tmp_path: Path) -> None:
    text = RECIPE.replace("scheme: int8}", "scheme: int8, scheme: float}") + "source: reference\n"
    problems = problems_of(load_recipe, write(tmp_path / "mine.yaml", text))
    assert any("scheme given twice" in problem for problem in problems)
    assert any("source given twice" in problem for problem in problems)


@pytest.mark.parametrize("content", ["syntax", "binary", "duplicate", "no such day"])
def test_the_command_names_an_unreadable_recipe(content: str, tmp_path: Path) -> None:
    path = write(tmp_path / "mine.yaml", UNREADABLE[content][0])
    assert refused(tmp_path, "quantize", "--recipe", path).startswith(f"error: {path}:\n")


TARGET_MISTAKES: dict[str, tuple[str, str, str]] = {
    "key": ("backend:", "backnd:", "backnd: unknown key.*did you mean 'backend'"),
    "backend": ("onnx_runtime", "onnx_runtim", "backend: 'onnx_runtim'.*did you mean 'onnx_runtime'"),
    "kind": ("int8:", "int-8:", "encodings.*'int-8'.*did you mean 'int8'"),
    "encoding": ("matmul_integer", "matmul_intger", "encodings.int8: .*did you mean 'matmul_integer'"),
    "no float": ("  float: matmul\n", "", "encodings.float: missing"),
    "threads type": ("threads: 2", "threads: two", "session.threads: must be a whole number, got 'two'"),
    "threads boolean": ("threads: 2", "threads: true", "session.threads: must be a whole number"),
    "threads below zero": ("threads: 2", "threads: -3", "session.threads"),
    "session key": ("threads: 2", "threadz: 2", "session.*'threadz'.*did you mean 'threads'"),
}


@pytest.mark.parametrize("mistake", TARGET_MISTAKES)
def test_a_mistake_in_a_target_is_told_with_its_place(mistake: str, tmp_path: Path) -> None:
    right, wrong, words = TARGET_MISTAKES[mistake]
    problems = problems_of(load_target, write(tmp_path / "mine.yaml", TARGET.replace(right, wrong)))
    assert any(re.search(words, problem) for problem in problems), problems


def test_all_mistakes_of_a_target_are_told_at_once(tmp_path: Path) -> None:
    text = TARGET.replace("onnx_runtime", "abacus").replace("int8:", "int-8:").replace("description:", "descripton:")
    path = write(tmp_path / "mine.yaml", text)
    message = refused(tmp_path, "quantize", "--recipe", "int8", "--target", path)
    for words in ("'abacus'", "'int-8'", "descripton: unknown key"):
        assert words in message


def check(rules: str, target: str = "cpu") -> str:
    """The message about rules that fit neither the embedded detector nor the target."""
    from defaker_opt.detector import load_detector
    from defaker_opt.recipe import parse_recipe

    rows = [dict(zip(("match", "scheme"), rule.split())) for rule in rules.split(", ")]
    data = {"description": "", "source": "", "target": "cpu", "passes": [{"quantize": {"rules": rows}}]}
    with pytest.raises(PassError) as caught:
        parse_recipe("mine", data, "mine.yaml").passes[0].check(load_detector("reference").config, load_target(target))
    return str(caught.value)


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ("speech.* int8, * int8", "'speech.*' matches no linear layer; names look like"),
        ("* int8, language.* float", "'language.*' matches only what earlier rules already took; move it up"),
        ("* int8, * int8", "'*' matches only what earlier rules already took"),
        ("language.* int8", "no rule matches vision_encoder."),
        ("Language.* int8, * int8", "'Language.*' matches no linear layer"),
    ],
)
def test_rules_that_do_not_fit_the_detector_are_named(rules: str, words: str) -> None:
    assert words in check(rules)


def test_a_scheme_the_target_cannot_run_is_named_with_those_it_can(tmp_path: Path) -> None:
    path = write(tmp_path / "small.yaml", TARGET)
    message = check("language.* int4-g128, * int8", str(path))
    assert "int4-g128 (language.*) cannot run on target small, which runs float, int8" in message


def test_all_that_is_wrong_with_the_rules_is_told_at_once_with_the_file(tmp_path: Path) -> None:
    target = write(tmp_path / "small.yaml", TARGET)
    text = RECIPE.replace('"*", scheme: int8', '"language.*", scheme: int4-g64').replace("mask_decoder.*", "speech.*")
    recipe = write(tmp_path / "mine.yaml", text)
    message = refused(tmp_path, "quantize", "--recipe", recipe, "--target", target)
    for words in ("cannot run on target small", "no rule matches vision_encoder.", "'speech.*' matches no linear"):
        assert words in message
    assert "mine" in message.replace(str(tmp_path), "")


def reference() -> dict[str, Any]:
    data: dict[str, Any] = json.loads((data_folder("reference") / "config.json").read_text())
    return data


def detector_folder(folder: Path, config: object) -> Path:
    folder.mkdir()
    write(folder / "config.json", config if isinstance(config, (str, bytes)) else json.dumps(config))
    return folder


# place of the value → a value no detector can have
WRONG_SIZES: list[tuple[str, object]] = [
    ("format", 2),
    ("trained", "yes"),
    ("tiling.tile_size", 0),
    ("tiling.tile_size", 225),
    ("tiling.min_tiles", 9),
    ("vision.hidden_size", 0),
    ("vision.hidden_size", "192"),
    ("vision.intermediate_size", -1),
    ("vision.layers", 0),
    ("vision.heads", 0),
    ("vision.shuffle", 0),
    ("vision.norm_eps", float("nan")),
    ("vision.activation", "gleu"),
    ("vision.norm", "batch_norm"),
    ("language.architecture", "lama"),
    ("language.layers", -1),
    ("language.heads", 0),
    ("language.kv_heads", 2),
    ("language.head_dim", 0),
    ("language.activation", "siluu"),
    ("segmenter.image_size", 0),
    ("segmenter.image_size", 100),
    ("segmenter.blocks", [1, 2, 3]),
    ("segmenter.blocks", [0, 0, 0, 0]),
    ("segmenter.heads", [0, 0, 0, 0]),
    ("segmenter.windows", [-1, -1, -1, -1]),
    ("segmenter.widths", [64, 64, 64, 64]),
    ("segmenter.global_blocks", [99]),
    ("segmenter.position_grid", [7]),
    ("segmenter.position_grid", [7, 7, 7]),
    ("segmenter.attention_downsample", 0),
    ("segmenter.decoder_heads", 5),
    ("prompt.fake_answers", [1, 2, 3]),
    ("prompt.fake_answers", [36, 37, 38, 39]),
    ("prompt.verdict", []),
    ("prompt.verdict", [9999]),
    ("prompt.mask", [9999]),
    ("prompt.mask", [-1]),
    ("prompt.before", 5),
]


@pytest.mark.parametrize(("place", "value"), WRONG_SIZES, ids=lambda given: str(given))
def test_a_size_no_detector_can_have_is_named(place: str, value: object, tmp_path: Path) -> None:
    from defaker_opt.detector import load_detector

    config = reference()
    *outer, last = place.split(".")
    inner = config
    for key in outer:
        inner = inner[key]
    inner[last] = value
    folder = detector_folder(tmp_path / "detector", config)
    problems = problems_of(lambda path: load_detector(str(Path(path).parent)), folder / "config.json")
    assert any(last in problem or place.split(".")[0] in problem for problem in problems), problems


def test_all_mistakes_of_a_detectors_config_are_told_at_once(tmp_path: Path) -> None:
    config = reference()
    config["vision"]["heds"] = config["vision"].pop("heads")
    config["language"]["architecture"] = "lama"
    config["segmenter"]["widths"] = [64, "128", 192, 256]
    folder = detector_folder(tmp_path / "detector", config)
    message = refused(tmp_path, "quantize", "--recipe", "int8", "--source", folder)
    assert f"error: {folder / 'config.json'}:\n" in message
    for words in ("vision.heds: unknown key", "did you mean 'heads'", "did you mean 'llama'", "segmenter.widths[1]"):
        assert words in message


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", b"\xff\xfe\x00" * 9, "[" * 100_000, '{"format": ' + "9" * 5000 + "}"],
    ids=["empty", "cut", "list", "null", "binary", "nested", "long number"],
)
def test_an_unreadable_config_is_named(content: str | bytes, tmp_path: Path) -> None:
    from defaker_opt.detector import load_detector

    folder = detector_folder(tmp_path / "detector", content)
    with pytest.raises(ConfigError, match=r"config\.json"):
        load_detector(str(folder))


def test_an_unknown_source_gets_the_nearest_spelling_and_the_next_step(tmp_path: Path) -> None:
    message = refused(tmp_path, "quantize", "--recipe", "int8", "--source", "refrence")
    assert "did you mean 'reference'?" in message
    assert "defaker-opt convert" in message


def test_a_detector_without_weights_or_prompt_is_refused(tmp_path: Path) -> None:
    from defaker_opt.detector import load_detector

    folder = detector_folder(tmp_path / "detector", reference())
    with pytest.raises(SourceError, match=r"detector: neither model.safetensors"):
        load_detector(str(folder))
    save_file({"a": np.zeros(2, np.float32)}, folder / "model.safetensors")
    with pytest.raises(SourceError, match=r"(?s)a: unexpected.*language.embed_tokens.weight: missing"):
        load_detector(str(folder))


SA2VA = {
    "model_type": "sa2va_chat",
    "vision_config": {},
    "llm_config": {"model_type": "qwen2"},
    "force_image_size": 448,
}


def checkpoint(folder: Path) -> Path:
    folder.mkdir()
    write(folder / "config.json", json.dumps(SA2VA))
    save_file({"a": np.zeros((2, 3), np.float32)}, folder / "model.safetensors")
    return folder


def index_of(folder: Path, place: str) -> None:
    write(folder / "model.safetensors.index.json", json.dumps({"weight_map": {"a": place}}))


def only_a_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def truncate(folder: Path) -> None:
    write(folder / "model.safetensors", (folder / "model.safetensors").read_bytes()[:-8])


def other_family(folder: Path) -> None:
    write(folder / "config.json", json.dumps({**SA2VA, "model_type": "llava"}))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda folder: (folder / "config.json").unlink(), r"config\.json: missing or not a JSON object"),
    "config cut": (lambda folder: write(folder / "config.json", "{"), r"config\.json: missing or not a JSON object"),
    "config nested": (lambda folder: write(folder / "config.json", "[" * 100_000), r"config\.json"),
    "config list": (lambda folder: write(folder / "config.json", "[]"), r"config\.json: missing or not a JSON object"),
    "other family": (other_family, "model_type 'llava' is not one of internvl, internvl_chat, sa2va_chat"),
    "only a pickle": (only_a_pickle, r"pytorch_model\.bin would have to be unpickled, which is never done"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "neither model.safetensors nor"),
    "truncated": (truncate, r"model\.safetensors: cannot be read .*is it complete"),
    "emptied": (lambda folder: write(folder / "model.safetensors", ""), r"model\.safetensors: cannot be read"),
    "text": (
        lambda folder: write(folder / "model.safetensors", "git lfs\n" * 9),
        r"model\.safetensors: cannot be read",
    ),
    "index names a missing file": (
        lambda folder: index_of(folder, "gone.safetensors"),
        r"gone\.safetensors: cannot be",
    ),
    "index names a file outside": (
        lambda folder: index_of(folder, "../model.safetensors"),
        "a file outside its folder",
    ),
    "index names an absolute path": (lambda folder: index_of(folder, "/etc/passwd"), "a file outside its folder"),
    "index names the folder above": (lambda folder: index_of(folder, ".."), r"index\.json|cannot be read"),
    "index cut": (lambda folder: write(folder / "model.safetensors.index.json", "{"), "not a safetensors index"),
    "index without map": (
        lambda folder: write(folder / "model.safetensors.index.json", "{}"),
        "not a safetensors index",
    ),
    "nothing of a checkpoint": (lambda folder: None, "vision_config.*not the configuration of a release"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_checkpoint_that_cannot_be_converted_is_named(damage: str, tmp_path: Path) -> None:
    from defaker_opt.convert import convert

    folder = checkpoint(tmp_path / "checkpoint")
    change, words = DAMAGE[damage]
    change(folder)
    with pytest.raises(SourceError, match=words) as caught:
        convert(folder, tmp_path / "out" / "detector")
    assert str(folder) in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", ["no config", "only a pickle", "truncated", "index names a file outside"])
def test_the_command_names_a_checkpoint_that_cannot_be_converted(damage: str, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "checkpoint")
    DAMAGE[damage][0](folder)
    assert str(folder) in refused(tmp_path, "convert", folder)


@pytest.mark.parametrize("what", ["folder", "file"])
def test_convert_writes_over_nothing(what: str, tmp_path: Path) -> None:
    from defaker_opt.convert import convert

    output = tmp_path / "detector"
    if what == "file":
        output.write_text("thesis")
    else:
        output.mkdir()
    with pytest.raises(SourceError, match="detector: already exists; choose another output folder or remove it"):
        convert(checkpoint(tmp_path / "checkpoint"), output)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "detector"]


def test_a_checkpoint_that_is_no_folder_is_named(tmp_path: Path) -> None:
    assert "no such folder" in refused(tmp_path, "convert", tmp_path / "nowhere")


@pytest.fixture
def golden(tmp_path: Path) -> Path:
    """A copy of a real checkpoint whose small files may be damaged; its weights are links."""
    found = golden_folders()
    if not found:
        pytest.skip("no released checkpoint at hand; set DEFAKER_GOLDEN_DIR")
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for path in found[0].iterdir():
        if path.suffix == ".json":
            write(folder / path.name, path.read_bytes())
        elif path.name.startswith("model"):
            (folder / path.name).symlink_to(path)
    return folder


def edit_config(place: str, value: object) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        *outer, last = place.split(".")
        inner = config
        for key in outer:
            inner = inner[key]
        inner[last] = value
        write(folder / "config.json", json.dumps(config))

    return edit


GOLDEN_DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "tokenizer cut": (lambda folder: write(folder / "tokenizer.json", '{"version": "1.0", '), r"tokenizer\.json"),
    "sidecar cut": (lambda folder: write(folder / "golden_meta.json", "{"), r"golden_meta\.json"),
    "sidecar list": (lambda folder: write(folder / "golden_meta.json", "[]"), r"golden_meta\.json"),
    "tile size of no grid": (edit_config("force_image_size", 450), "tile_size"),
    "tile size in words": (edit_config("force_image_size", "large"), "force_image_size|large"),
    "no language config": (edit_config("llm_config", None), "llm_config"),
    "vision width": (edit_config("vision_config.hidden_size", 7), "hidden_size"),
    "vision activation": (edit_config("vision_config.hidden_act", "gleu"), "gleu"),
    "layers in words": (edit_config("llm_config.num_hidden_layers", "two"), "layers|two"),
    "no heads": (edit_config("llm_config.num_attention_heads", 0), "heads"),
    "scaling in words": (edit_config("llm_config.rope_scaling", "linear"), "rope_scaling|linear"),
}


@pytest.mark.parametrize("damage", GOLDEN_DAMAGE)
def test_a_damaged_part_of_a_real_checkpoint_is_named(damage: str, golden: Path, tmp_path: Path) -> None:
    from defaker_opt.convert import convert

    change, words = GOLDEN_DAMAGE[damage]
    change(golden)
    with pytest.raises(DefakerError, match=words):
        convert(golden, tmp_path / "out" / "detector")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("pattern", "shape", "words"),
    [
        (".trunk.blocks.1.proj.weight", None, "blocks"),
        ("vision_model.encoder.layers.0.attn.qkv.bias", (), "qkv"),
        ("vision_model.encoder.layers.0.attn.qkv.bias", (193,), "qkv"),
        ("vision_model.encoder.layers.0.attn.proj.bias", (65,), "proj"),
        ("iou_token.weight", (1, 257), "iou_token|hidden_size"),
        ("vision_model.encoder.layers.0.norm1.bias", None, "layernorm_before.bias"),
    ],
)
def test_a_tensor_of_a_wrong_shape_or_missing_is_named(
    pattern: str, shape: tuple[int, ...] | None, words: str, golden: Path
) -> None:
    from defaker_opt.convert import open_tensors, plan_conversion

    shapes = dict(open_tensors(golden).shapes())
    (name,) = (name for name in shapes if name.endswith(pattern))
    shapes = {key: size for key, size in shapes.items() if key != name} | ({name: shape} if shape is not None else {})

    class Changed:
        def shapes(self) -> dict[str, tuple[int, ...]]:
            return shapes

    with pytest.raises(SourceError, match=words):
        plan_conversion(golden, Changed())  # type: ignore[arg-type]
