"""The language part as a GPTQ checkpoint: exactly the codes of the build, and a model that transformers knows."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from defaker_opt.checkpoint import Tensors, gptq, tensors_of
from defaker_opt.config import DetectorConfig
from defaker_opt.detector import REFERENCE, Detector, linear_weights, load_detector, source_folder, stored_shapes
from defaker_opt.errors import DefakerError, PassError, SourceError
from defaker_opt.gptq_folder import check_apart, hold, is_written, write_gptq
from defaker_opt.gptq_folder.layout import Layout, find_layout
from defaker_opt.methods import Statistics, parse_scheme
from defaker_opt.methods.gptq import Gptq
from defaker_opt.passes.quantize import Quantize, Rule
from defaker_opt.stages.language import Language
from defaker_opt.target import load_target
from defaker_opt.weights import DrawnWeights, open_weights
from tests.conftest import defaker_opt
from tests.reference.packing import dequantize_plain

CONFIG = load_detector(REFERENCE).config
SCHEMES = ("int4-g64", "int4-asym-g32", "int4-sym-g64", "int2-asym-g32", "int4-g128")
DOWN = "language.layers.0.mlp.down_proj.weight"


def detector_of(config: DetectorConfig, scheme: str) -> Detector:
    """One layer with drawn weights, its products in this scheme, the heads in float."""
    config = dataclasses.replace(config, language=dataclasses.replace(config.language, layers=1))
    detector = Detector(config, DrawnWeights(stored_shapes(config), 0))
    Quantize((Rule("language.layers.*", scheme), Rule("*", "float"))).apply(detector, lambda what, fraction: None)  # type: ignore[arg-type]
    return detector


def layout_of(detector: Detector) -> Layout:
    schemes = {name: str(weight.scheme) for name, weight in detector.codes.items()}
    return find_layout(linear_weights(detector.config, "language"), schemes, ())


def write(detector: Detector, folder: Path) -> Tensors:
    """What a folder decodes to."""
    write_gptq(detector, layout_of(detector), folder, source_folder(REFERENCE), "key", lambda what, fraction: None)
    config = json.loads((folder / "config.json").read_text())
    return gptq.unpacked(folder, tensors_of(open_weights(folder)), config)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_is_written_decodes_to_the_codes_of_the_build(scheme: str, tmp_path: Path) -> None:
    detector = detector_of(CONFIG, scheme)
    read = write(detector, tmp_path / "folder")
    assert len(detector.codes) == 7
    for name, weight in detector.codes.items():
        half = dataclasses.replace(weight, scale=weight.scale.astype(np.float16).astype(np.float32))
        np.testing.assert_array_equal(read.read(f"model.{name.removeprefix('language.')}"), half.dequantize())
    settings = json.loads((tmp_path / "folder" / "config.json").read_text())["quantization_config"]
    difference = settings["meta"]["largest_float16_difference"]
    assert difference == 0 if "-sym-" in scheme else 0 < difference < 2**-11
    assert settings["checkpoint_format"] == ("gptq_v2" if "asym" in scheme else "gptq")
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
        own = detector.read(f"language.{name.removeprefix('model.')}")
        assert torch.equal(read.read(name), own.to(torch.float16))


def test_the_twin_reads_what_is_written(tmp_path: Path) -> None:
    detector = detector_of(CONFIG, "int4-asym-g64")
    write(detector, tmp_path / "folder")
    stored = load_file(tmp_path / "folder" / "model.safetensors")
    weight = detector.codes["language.layers.0.self_attn.k_proj.weight"]
    parts = [stored[f"model.layers.0.self_attn.k_proj.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx")]
    plain = dequantize_plain(*(part.numpy() for part in parts), 4, 0)
    half = dataclasses.replace(weight, scale=weight.scale.astype(np.float16).astype(np.float32))
    np.testing.assert_array_equal(plain, half.dequantize())


def test_longer_groups_are_cut_to_the_shortest(tmp_path: Path) -> None:
    detector = detector_of(CONFIG, "int4-g128")  # 192 columns are groups of 64, 512 of 128
    assert detector.codes[DOWN].scale.shape == (192, 4)
    assert layout_of(detector) == Layout(4, 64, symmetric=True)
    write(detector, tmp_path / "folder")
    stored = load_file(tmp_path / "folder" / "model.safetensors")
    scales = stored["model.layers.0.mlp.down_proj.scales"]
    assert scales.shape == (8, 192)
    assert torch.equal(scales[::2], scales[1::2])


def test_groups_are_of_columns_as_they_stand_also_where_gptq_took_them_in_another_order(tmp_path: Path) -> None:
    detector = detector_of(CONFIG, "int4-g64")
    scheme = parse_scheme("int4-g64")
    assert scheme is not None
    generator = np.random.default_rng(1)
    inputs = generator.standard_normal((400, 512)) * np.linspace(0.1, 3, 512)[generator.permutation(512)]
    seen = Statistics(hessian=inputs.T @ inputs / 400)
    weight = generator.standard_normal((192, 512)).astype(np.float32)
    natural, ordered = (Gptq(order=order).quantize(weight, scheme, seen) for order in ("natural", "activation"))  # type: ignore[arg-type]
    assert (natural.codes != ordered.codes).any()
    detector.codes[DOWN] = ordered
    got = write(detector, tmp_path / "folder").read("model.layers.0.mlp.down_proj.weight")
    # Exact but for float16's rounding of scales.
    np.testing.assert_allclose(got.numpy(), ordered.dequantize(), rtol=2**-11)


ARCHITECTURES = {
    "llama": {"rope_theta": 1e6},
    "qwen2": {"kv_heads": 1},
    "phi3": {},
    "phi3 longrope": {"rope_factors": tuple(np.linspace(1, 1.4, 32).tolist()), "rope_scale": 1.19},
    "phi3 scaled": {"rope_scale": 1.19},
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_transformers_computes_the_same_logits(name: str, tmp_path: Path) -> None:
    language = dataclasses.replace(CONFIG.language, architecture=name.split()[0], **ARCHITECTURES[name])  # type: ignore[arg-type]
    detector = detector_of(dataclasses.replace(CONFIG, language=language), "int4-sym-g64")
    read = write(detector, tmp_path / "folder")
    config = AutoConfig.from_pretrained(tmp_path / "folder")
    del config.quantization_config  # the weights are given decoded
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict({each: read.read(each).float() for each in read.places})
    tokens = torch.arange(5, 25)[None]
    stage = detector.load_stage("language")
    assert isinstance(stage, Language)
    with torch.inference_mode():
        past = (torch.zeros(1, language.kv_heads, 0, language.head_dim),) * 2
        embedded = detector.read("language.embed_tokens.weight")[tokens]
        hidden, _ = stage.hidden_states(embedded, torch.arange(20)[None], past)
        ours = stage.norm(hidden) @ detector.read("language.lm_head.weight").T
        theirs = model.eval()(input_ids=tokens).logits
    np.testing.assert_allclose(theirs.numpy(), ours.numpy(), atol=1e-4)


def test_words_and_their_ends_are_those_of_the_detector(tmp_path: Path) -> None:
    write(detector_of(CONFIG, "int4-g64"), tmp_path / "folder")
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert config["eos_token_id"] == [4, 1]
    origin = source_folder(REFERENCE) / "tokenizer.json"
    assert (tmp_path / "folder" / "tokenizer.json").read_bytes() == origin.read_bytes()


SHAPES = {DOWN: (64, 128), "language.layers.1.mlp.up_proj.weight": (64, 128), "language.verdict_head.weight": (8, 64)}


def schemes_of(first: str, second: str) -> dict[str, str]:
    return dict(zip(SHAPES, (first, second, "float")))


def test_the_heads_may_have_any_scheme() -> None:
    assert find_layout(SHAPES, {**schemes_of("int4-g64", "int4-asym-g32")}, ()) == Layout(4, 32, symmetric=False)


@pytest.mark.parametrize(
    ("schemes", "factored", "message"),
    [
        (schemes_of("int8", "int8"), (), r"down_proj.weight: scheme int8: what the layer is given is quantized too"),
        (schemes_of("int8-token", "int4-g64"), (), "scheme int8-token: what the layer is given"),
        (schemes_of("nf4-g64", "nf4-g64"), (), "scheme nf4-g64: its codes stand for the numbers of NF4"),
        (schemes_of("nvfp4-g16", "nvfp4-g16"), (), "scheme nvfp4-g16: its codes stand for the numbers of FP4"),
        (schemes_of("fp8-static", "int4-g64"), (), "scheme fp8-static: what the layer is given"),
        (schemes_of("int4-g64", "float"), (), "up_proj.weight: stays in float"),
        (schemes_of("int4-g64", "int2-asym-g32"), (), "layers have codes of 2 and 4 bits"),
        (schemes_of("int4-g64", "int4-g64"), (DOWN,), "its method scales what the layer is given.*another method"),
    ],
)
def test_codes_without_a_place_are_refused(schemes: dict[str, str], factored: tuple[str, ...], message: str) -> None:
    with pytest.raises(PassError, match=message) as refused:
        find_layout(SHAPES, schemes, factored)
    assert "give all layers of the language stage one 4-bit scheme" in str(refused.value)


def test_layers_that_do_not_fill_words_are_refused() -> None:
    with pytest.raises(PassError, match=r"down_proj.weight: \[60, 128\] codes of 4 bits do not fill words of 32 bits"):
        find_layout({DOWN: (60, 128)}, {DOWN: "int4-g64"}, ())


def test_a_method_that_scales_inputs_says_so() -> None:
    rules = (Rule("language.layers.*", "int4-g64", "awq"), Rule("*", "float"))
    preview = Quantize(rules).check(CONFIG, load_target("cpu"))
    assert preview.factored
    assert all(name.startswith("language.layers.") for name in preview.factored)


def test_numbers_that_float16_has_not_are_refused_and_nothing_is_left(tmp_path: Path) -> None:
    detector = detector_of(CONFIG, "int4-g64")
    detector.codes[DOWN] = dataclasses.replace(
        detector.codes[DOWN], scale=detector.codes[DOWN].scale * np.float32(1e-6)
    )
    with pytest.raises(PassError, match=r"down_proj.weight: its scales.* no numbers that float16 holds.*int4-sym-g128"):
        write(detector, tmp_path / "folder")
    detector = detector_of(CONFIG, "int4-g64")
    detector.scale_("language.norm.weight", rows=1e6)
    with pytest.raises(PassError, match=r"model.norm.weight: .* is beyond float16's 65504.* without --gptq"):
        write(detector, tmp_path / "folder")
    assert not list(tmp_path.iterdir())


def test_another_folder_is_left_alone(tmp_path: Path) -> None:
    assert not is_written(tmp_path / "folder", "key")
    write(detector_of(CONFIG, "int4-g64"), tmp_path / "folder")
    assert is_written(tmp_path / "folder", "key")
    for place, key in ((tmp_path / "folder", "other"), (tmp_path, "key")):
        with pytest.raises(SourceError, match="already exists; choose another folder for --gptq or remove it"):
            is_written(place, key)


def test_a_checkpoint_without_its_tensors_is_not_taken_for_whole(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    write(detector_of(CONFIG, "int4-g64"), folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(
        SourceError, match=r"folder: .* damaged \(.*neither model\.safetensors.*remove it, and it is made anew"
    ):
        is_written(folder, "key")


def test_a_folder_that_another_run_writes_is_left_to_it(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    with hold(folder):
        words = r"folder: another process is writing .*wait, or choose another folder"
        with pytest.raises(SourceError, match=words), hold(folder):
            raise AssertionError
        with hold(tmp_path / "other"), hold(None):
            pass
    with hold(folder):
        write(detector_of(CONFIG, "int4-g64"), folder)
        before = (folder / "config.json").stat().st_mtime_ns
        # As for one that held it after the other had finished.
        write(detector_of(CONFIG, "int4-g64"), folder)
        assert (folder / "config.json").stat().st_mtime_ns == before
    assert [path.name for path in folder.parent.iterdir()] == ["folder"]
    (tmp_path / "file").touch()
    with pytest.raises(DefakerError, match=r"file/folder: "), hold(tmp_path / "file" / "folder"):
        raise AssertionError


@pytest.mark.parametrize(
    ("output", "folder"),
    [
        ("a", "a"),
        ("a", "a/g"),
        ("a/b", "a"),
        ("a", "x/../a/"),
        ("a", "link/g"),
        ("link", "a"),
        ("a", ".a.partial/g"),
        ("a", ".a.old"),
    ],
)
def test_a_build_and_its_checkpoint_may_not_overwrite_each_other(output: str, folder: str, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "a")
    words = r"--gptq .*: the build goes to .*, and one would overwrite the other; give each .* example --gptq .*-gptq$"
    with pytest.raises(SourceError, match=words):
        check_apart(tmp_path / folder, tmp_path / output)
    check_apart(tmp_path / "ab", tmp_path / "a")
    check_apart(tmp_path / "x" / "g", tmp_path / "x" / "b")


def test_a_build_and_its_checkpoint_are_made_of_the_same_codes(tmp_path: Path) -> None:
    build = tmp_path / "build"
    command = ("quantize", "--recipe", "int4-data-free", "--output", build, "--json", "--gptq")
    done = defaker_opt(*command, tmp_path / "first")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout.splitlines()[-1])["gptq"]
    assert (facts["bits"], facts["group_size"], facts["checkpoint_format"]) == (4, 64, "gptq")
    assert facts["bytes"] == sum(path.stat().st_size for path in (tmp_path / "first").iterdir())
    before = (build / "manifest.json").stat().st_mtime_ns
    again = defaker_opt(*command, tmp_path / "second")  # of a build that is there
    assert again.returncode == 0, again.stderr
    assert (build / "manifest.json").stat().st_mtime_ns == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["build", "first", "second"]
    first, second = (tmp_path / name / "model.safetensors" for name in ("first", "second"))
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--recipe", "int8"), "a GPTQ checkpoint cannot hold these codes"),
        (("--recipe", "int4-data-free", "--never-slower"), "--gptq, --never-slower: .*give one of them"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(options: tuple[str, ...], message: str, tmp_path: Path) -> None:
    done = defaker_opt("quantize", *options, "-o", tmp_path / "build", "--gptq", tmp_path / "folder")
    assert done.returncode == 2
    assert message.split(".*")[0] in done.stderr
    assert not list(tmp_path.iterdir())


def test_one_folder_for_both_is_refused_before_any_work(tmp_path: Path) -> None:
    one = tmp_path / "one"
    done = defaker_opt("quantize", "--recipe", "int4-data-free", "-o", one, "--gptq", one)
    assert done.returncode == 2
    assert f"--gptq {one}: the build goes to {one}, and one would overwrite the other" in done.stderr
    assert not list(tmp_path.iterdir())
