"""Presets: released sizes, and random weights that are the same however they are drawn."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from defaker_opt import detector as detector_module
from defaker_opt import shards
from defaker_opt.detector import load_detector, stored_shapes, write_source
from defaker_opt.errors import DefakerError, SourceError
from defaker_opt.passes.quantize import Quantize, Rule
from defaker_opt.presets import folder as folder_module
from defaker_opt.presets import parse_preset, preset_config, preset_folder, preset_names
from defaker_opt.presets.drawn import RandomWeights, outlier_channels
from defaker_opt.presets.folder import write_folder
from defaker_opt.runtime.spec import STAGES
from defaker_opt.target import load_target
from tests.conftest import defaker_opt

# Parameters of the language models, projectors included, as published; of SAM2's trunk and neck, as in its code.
PUBLISHED = {
    "internvl2-1b": 938_158_976,
    "internvl2-2b": 2_205_754_368,
    "internvl2-4b": 4_146_855_936,
    "internvl2-8b": 8_075_365_376,
}
TRUNKS = {
    "tiny": 26_849_472 + 369_664,
    "small": 33_947_328 + 369_664,
    "base+": 68_675_712 + 431_104,
    "large": 212_149_296 + 553_984,
}
NEW_TOKENS = 5


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DEFAKER_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def values(name: str, *prefixes: str) -> int:
    shapes = stored_shapes(preset_config(parse_preset(name)))
    return sum(math.prod(shape) for tensor, shape in shapes.items() if tensor.startswith(prefixes))


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_language_model_has_the_published_number_of_parameters(name: str) -> None:
    source = f"{name}+sam2-tiny:random"
    config = preset_config(parse_preset(source))
    width = config.language.hidden_size
    projection = width * width + width + 256 * width + 256
    got = values(source, "vision_encoder.", "language.") - projection - 2 * NEW_TOKENS * width
    assert got == PUBLISHED[name]


@pytest.mark.parametrize("trunk", TRUNKS)
def test_a_trunk_has_the_published_number_of_parameters(trunk: str) -> None:
    source = f"internvl2-1b+sam2.1-{trunk}:random"
    assert values(source, "mask_encoder.trunk.", "mask_encoder.neck.") == TRUNKS[trunk]


def test_every_name_that_is_shown_is_a_preset_with_its_own_folder() -> None:
    done = defaker_opt("show", "presets")
    assert done.returncode == 0, done.stderr
    sources = [line.split()[0] for line in done.stdout.splitlines()]
    assert len(sources) == len(preset_names()) == 36
    presets = [parse_preset(source) for source in sources]
    assert len({preset_folder(preset) for preset in presets}) == 36
    for preset in presets:
        assert preset_config(preset).trained is False


@pytest.mark.parametrize("name", preset_names())
@pytest.mark.parametrize("layers", [1, 2, 4])
def test_a_limited_preset_keeps_its_widths(name: str, layers: int) -> None:
    whole = preset_config(parse_preset(f"{name}:random"))
    limited = preset_config(parse_preset(f"{name}:random,layers={layers}"))
    assert limited.vision.layers == limited.language.layers == layers
    assert limited.segmenter.widths == whole.segmenter.widths
    assert max(limited.segmenter.blocks) == layers
    assert len(limited.segmenter.global_blocks) == min(layers - 1, len(whole.segmenter.global_blocks))


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("defakerone-3b:random", "'defakerone-3b' is not one of .*did you mean 'defakerone-2b'.*show presets"),
        ("internvl2-2b+sam2-huge:random", "did you mean 'internvl2-2b"),
        ("internvl2-2b:random", "is not one of"),
        ("defakerone-2b:random,layers=0", r"only ,layers=N may follow, with N from 1, got ',layers=0'"),
        ("defakerone-2b:random,layer=2", "only ,layers=N may follow"),
        ("defakerone-2b:randomly", "only ,layers=N may follow"),
    ],
)
def test_a_wrong_preset_gets_the_nearest_name(source: str, words: str) -> None:
    with pytest.raises(SourceError, match=words):
        load_detector(source)
    with pytest.raises(SourceError, match=words):
        write_source(source, lambda done, total: None)


SHAPES = {
    "vision_encoder.a.fc2.weight": (512, 700),
    "language.layers.0.mlp.down_proj.weight": (1024, 96),
    "language.embed_tokens.weight": (3000, 1024),
    "language.norm.weight": (1024,),
    "mask_encoder.trunk.patch_embed.projection.weight": (96, 3, 7, 7),
    "mask_encoder.neck.0.bias": (256,),
}


def test_tensors_do_not_depend_on_order_or_on_each_other() -> None:
    forwards = {name: RandomWeights(SHAPES).read(name) for name in SHAPES}
    for name in reversed(SHAPES):
        alone = RandomWeights({name: SHAPES[name]}).read(name)
        assert torch.equal(alone, forwards[name]), name
        assert alone.shape == SHAPES[name]
    other = RandomWeights(SHAPES, seed=1)
    assert not torch.equal(other.read("language.norm.weight"), forwards["language.norm.weight"])


def test_blocks_are_small_and_make_up_the_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    from defaker_opt.presets import drawn

    whole = RandomWeights(SHAPES).read("language.embed_tokens.weight")
    monkeypatch.setattr(drawn, "_BLOCK_VALUES", 7 * 1024 + 5)
    blocks = list(RandomWeights(SHAPES).blocks("language.embed_tokens.weight"))
    assert max(len(block) for block in blocks) == 7
    assert torch.equal(torch.cat(blocks), whole)


def test_weights_have_realistic_scale_and_outlier_channels() -> None:
    """What the module says it draws, measured."""
    weights = RandomWeights(SHAPES)
    outliers = outlier_channels(1024)
    assert len(outliers) == 2
    down = weights.read("language.layers.0.mlp.down_proj.weight").float().numpy()
    rows = down.std(axis=1) * math.sqrt(96 * 48)
    usual = np.delete(rows, outliers)
    assert 0.9 < np.median(usual) < 1.1
    assert 0.2 < np.log(usual).std() < 0.32
    assert (rows[outliers] > 4).all()
    table = weights.read("language.embed_tokens.weight").float().numpy()
    columns = table.std(axis=0)
    assert (columns[outliers] > 6 * np.median(columns)).all()
    gains = weights.read("language.norm.weight").float().numpy()
    assert (gains[outliers] < 0.4).all()
    assert 0.9 < np.median(gains) < 1.1
    assert outlier_channels(128).size == 0


LIMITED = "internvl2-1b+sam2-tiny:random,layers=1"


def test_a_folder_is_written_once_and_holds_what_is_drawn_in_memory(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the names of a real preset, with everything that is large cut to a few rows."""
    whole = stored_shapes(preset_config(parse_preset(LIMITED)))
    few = {name: (min(shape[0], 64), *shape[1:]) for name, shape in whole.items()}
    monkeypatch.setattr(detector_module, "stored_shapes", lambda config: few)
    drawn = load_detector(LIMITED)
    assert not cache.exists()
    told: list[tuple[int, int]] = []
    folder = write_source(LIMITED, lambda done, total: told.append((done, total)))
    assert folder is not None
    assert folder.is_relative_to(cache)
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert told[-1][0] == told[-1][1] == 2 * sum(math.prod(shape) for shape in few.values())
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    stored = load_detector(LIMITED)
    for name in few:
        assert torch.equal(stored.weights.read(name), drawn.weights.read(name)), name
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert write_source(LIMITED, lambda done, total: pytest.fail("written again")) == folder
    assert before == {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_what_was_stopped_goes_on_after_the_last_whole_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_module, "SHARD_BYTES", 400_000)
    config, weights = preset_config(parse_preset(LIMITED)), RandomWeights(SHAPES)
    write_folder(tmp_path / "whole", config, weights, lambda done, total: None)

    class StoppedError(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done > 0.9 * total:
            raise StoppedError

    with pytest.raises(StoppedError):
        write_folder(tmp_path / "part", config, weights, stop)
    assert not (tmp_path / "part").exists()
    partial = tmp_path / ".part.partial"
    finished = {path.name: path.stat().st_mtime_ns for path in partial.glob("model*")}
    assert finished
    write_folder(tmp_path / "part", config, weights, lambda done, total: None)
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "part" / path.name).read_bytes() == path.read_bytes()
    assert {name: (tmp_path / "part" / name).stat().st_mtime_ns for name in finished} == finished
    assert sorted(path.name for path in tmp_path.iterdir()) == ["part", "whole"]


def test_two_processes_do_not_write_one_preset(tmp_path: Path) -> None:
    config, weights = preset_config(parse_preset(LIMITED)), RandomWeights(SHAPES)

    def again(done: int, total: int) -> None:
        write_folder(tmp_path / "folder", config, weights, lambda done, total: None)

    with pytest.raises(SourceError, match="another process is writing this preset; wait for it"):
        write_folder(tmp_path / "folder", config, weights, again)


@pytest.mark.skipif(os.geteuid() != 0 and not os.access("/proc", os.W_OK), reason="needs a place nobody can write")
def test_a_place_that_cannot_be_written_is_named() -> None:
    config, weights = preset_config(parse_preset(LIMITED)), RandomWeights(SHAPES)
    with pytest.raises(DefakerError, match=r"/proc/presets.*cannot be written"):
        write_folder(Path("/proc/presets/x"), config, weights, lambda done, total: None)


def test_safetensors_reads_what_is_written(tmp_path: Path) -> None:
    """Odd sizes, every type, an empty tensor and a single number."""
    tensors = {
        "b": torch.arange(7, dtype=torch.bfloat16),
        "a": torch.randn(3, 5),
        "c.d": torch.randn(4, 1, 3).half(),
        "empty": torch.zeros(0, 4),
        "one": torch.tensor(2.5),
    }
    entries = [shards.Entry(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    total = shards.write_shards(tmp_path, entries, lambda name: iter([tensors[name]]), lambda done, total: None, 1000)
    assert total == sum(tensor.nbytes for tensor in tensors.values())
    with safe_open(tmp_path / "model.safetensors", framework="pt") as stored:
        assert set(stored.keys()) == set(tensors)
        for name, tensor in tensors.items():
            assert torch.equal(stored.get_tensor(name), tensor)
            assert stored.get_tensor(name).dtype == tensor.dtype


@pytest.mark.parametrize("name", ["defakerone-2b", "sa2va-8b", "sa2va-1b", "internvl2-4b+sam2.1-base+"])
def test_full_size_outlines_and_rules_fit(name: str, cache: Path) -> None:
    """Every stage at full size without its weights; every linear layer gets a scheme."""
    detector = load_detector(f"{name}:random")
    rules = (Rule("language.*", "int4-g128"), Rule("*", "int8"))
    preview = Quantize(rules).check(detector.config, load_target("cpu"))
    for stage in STAGES:
        outline = dict(detector.outline(stage).named_parameters())
        assert outline
        assert detector.spec(stage).inputs
        assert any(scheme.startswith(stage) for scheme in preview.schemes)
    assert not cache.exists()


def test_a_dry_run_writes_nothing(cache: Path, tmp_path: Path) -> None:
    arguments = ("--source", "defakerone-2b:random,layers=1", "--dry-run", "--json", "--output", tmp_path / "build")
    done = defaker_opt("quantize", "--recipe", "int8", *arguments)
    assert done.returncode == 0, done.stderr
    assert '"untrained": true' in done.stdout
    assert not cache.exists()
    assert not (tmp_path / "build").exists()
