"""Named sets: made once, resumed, verified; a changed file or another set is found."""

import dataclasses
import json
import re

import numpy as np
import pytest
import yaml

from defaker_opt.catalog import yaml_names
from defaker_opt.errors import ConfigError, DefakerError
from defaker_opt.forgery import GLOBAL_DOMAINS
from defaker_opt.forgery import sets as sets_module
from defaker_opt.forgery.__main__ import main, write_digest
from defaker_opt.forgery.generate import make_pair
from defaker_opt.forgery.sets import load_set, load_spec
from defaker_opt.forgery.sketch import Agreement, draw_sketch, load_sketches, sketch_path
from defaker_opt.forgery.sources import load_library

SHIPPED = yaml_names("calibration")


def silent(what, fraction):
    assert 0 <= fraction <= 1


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A set of 16 small images with its digest, and a filled cache."""
    folder = tmp_path_factory.mktemp("tiny")
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump({"description": "d", "seed": 1, "images": 16, "size": 200, "split": "test"}))
    write_digest(str(path), folder / "first")
    load_set(str(path), folder / "cache", silent)
    return path


@pytest.fixture
def cache(tiny, tmp_path):
    """A private copy of the filled cache."""
    for file in (tiny.parent / "cache").rglob("*.*"):
        if file.is_file():
            copy = tmp_path / file.relative_to(tiny.parent / "cache")
            copy.parent.mkdir(exist_ok=True)
            copy.write_bytes(file.read_bytes())
    return tmp_path


def test_sets_were_found():
    assert {"calibration", "drift-test", "quick"} <= set(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_sets_are_balanced_and_agree_with_their_sketches(name):
    spec, path = load_spec(name)
    sketches = load_sketches(path, spec.images)
    assert len(spec.digest) == 64
    library, beyond = load_library(), 0
    for index in range(0, spec.images // 2, spec.images // 2 // 7):
        pair = make_pair(spec.seed, index, spec.split, library, spec.size)
        for place, example in ((2 * index, pair.authentic), (2 * index + 1, pair.forged)):
            apart = np.abs(draw_sketch(example)[8:].astype(int) - sketches[place, 8:])
            beyond += int(apart.max() > 3)
    assert beyond <= 1


def test_the_quick_set_is_what_its_digest_says(tmp_path):
    images = load_set("quick", tmp_path, silent)
    assert len(images) == 120
    assert images.agreement.redrawn <= 1
    counts = {}
    areas = []
    for example in images:
        counts[example.domain, example.label] = counts.get((example.domain, example.label), 0) + 1
        if example.label and example.domain not in GLOBAL_DOMAINS:
            areas.append(example.mask.mean())
    assert set(counts.values()) == {15}
    assert np.mean(np.array(areas) < 0.02) == pytest.approx(0.25, abs=0.05)


def test_sizes_and_splits_are_as_promised():
    specs = {name: load_spec(name)[0] for name in SHIPPED}
    assert specs["calibration"].images == 128
    assert specs["calibration"].split == "calibration"
    assert specs["drift-test"].images == 1200
    assert specs["drift-test"].split == specs["quick"].split == "test"
    assert len({spec.seed for spec in specs.values()}) == len(specs)


def test_a_second_load_reads_the_cache(tiny, cache, monkeypatch):
    monkeypatch.setattr(sets_module, "make_pair", lambda *_: pytest.fail("made again"))
    images = load_set(str(tiny), cache, silent)
    assert images.agreement == Agreement(16, 0, 0)
    pair = make_pair(1, 3, "test", load_library(), 200)
    for place, example in ((6, pair.authentic), (7, pair.forged)):
        assert np.array_equal(images[place].image, example.image)
        assert np.array_equal(images[place].mask, example.mask)
        assert dataclasses.replace(images[place], image=None, mask=None) == dataclasses.replace(
            example, image=None, mask=None
        )


@pytest.mark.parametrize("workers", [1, 3])
def test_the_cache_is_the_same_on_any_number_of_workers(tiny, tmp_path, workers):
    load_set(str(tiny), tmp_path, silent, workers)
    expected = {file.name: file.read_bytes() for file in (tiny.parent / "cache").rglob("*.*") if file.is_file()}
    assert {file.name: file.read_bytes() for file in tmp_path.rglob("*.*") if file.is_file()} == expected


@pytest.mark.parametrize("pattern", ["000002-0.*", "000005-1-mask.png"])
def test_a_flipped_byte_is_found(tiny, cache, pattern):
    [file] = cache.rglob(pattern)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(DefakerError, match=f"{re.escape(file.name)}: changed since it was written; delete it and run"):
        load_set(str(tiny), cache, silent)
    file.unlink()
    assert load_set(str(tiny), cache, silent).agreement.identical == 16


def test_a_byte_flipped_after_opening_is_found_too(tiny, cache):
    images = load_set(str(tiny), cache, silent)
    [file] = cache.rglob("000002-0.*")
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(DefakerError, match="changed since it was written"):
        images[4]


def test_damaged_facts_are_found(tiny, cache):
    [file] = cache.rglob("000001.json")
    file.write_text("{")
    with pytest.raises(DefakerError, match=r"000001.json:(.|\n)*delete it and run again; pair 1 is then made anew"):
        load_set(str(tiny), cache, silent)


def test_a_damaged_verdict_is_found(tiny, cache):
    [file] = cache.rglob("set.json")
    file.write_text("{}")
    with pytest.raises(DefakerError, match=r"set.json:(.|\n)*delete it and run again; the images are then compared"):
        load_set(str(tiny), cache, silent)


def test_an_interrupted_run_is_resumed(tiny, tmp_path, monkeypatch):
    made = []

    def interrupted(seed, index, split, library, size):
        made.append(index)
        if len(made) == 4:
            raise KeyboardInterrupt
        return make_pair(seed, index, split, library, size)

    monkeypatch.setattr(sets_module, "make_pair", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_set(str(tiny), tmp_path, silent, workers=1)
    assert not list(tmp_path.rglob("set.json"))
    finished = len(list(tmp_path.rglob("*.json")))
    made.clear()
    made.extend([-1] * 10)  # no second interruption
    assert load_set(str(tiny), tmp_path, silent, workers=1).agreement.identical == 16
    assert len(made) - 10 == 8 - finished
    assert not [file for file in tmp_path.rglob(".*") if file.is_file()]


def copy_with(tiny, folder, **changes):
    path = folder / "other.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(tiny.read_text()), **changes}))
    sketch_path(path).write_bytes(sketch_path(tiny).read_bytes())
    return path


def test_rounding_within_the_tolerance_is_accepted_and_counted(tiny, cache):
    path = copy_with(tiny, cache, digest="0" * 64)
    sketches = load_sketches(path, 16)
    sketches[3, 0] ^= 1
    sketches[3, 12] += 1 if sketches[3, 12] < 255 else -1
    np.save(sketch_path(path), sketches)
    assert load_set(str(path), cache, silent).agreement == Agreement(15, 1, 0)
    sketch_path(path).unlink()  # the second time, set.json remembers
    assert load_set(str(path), cache, silent).agreement == Agreement(15, 1, 0)


def test_another_set_is_refused_and_the_first_difference_named(tiny, cache):
    path = copy_with(tiny, cache, seed=2)
    with pytest.raises(DefakerError) as raised:
        load_set(str(path), cache, silent)
    text = str(raised.value)
    assert "of 16 images are not those its digest was taken from; image 0 (natural, splice): " in text
    assert "install those versions, or accept these images with: python -m defaker_opt.forgery" in text


def test_missing_sketches_are_an_error(tiny, cache):
    path = copy_with(tiny, cache, digest="0" * 64)
    sketch_path(path).unlink()
    with pytest.raises(DefakerError, match=r"other.sketch.npy: cannot be read .*run: python -m defaker_opt.forgery"):
        load_set(str(path), cache, silent)


def test_sketches_of_another_set_are_an_error(tiny, cache):
    path = copy_with(tiny, cache, digest="0" * 64)
    np.save(sketch_path(path), np.zeros((8, 76), np.uint8))
    with pytest.raises(DefakerError, match=r"must be uint8 \(16, 76\), got uint8 \(8, 76\)"):
        load_set(str(path), cache, silent)


def test_a_set_without_a_digest_says_how_to_make_one(tiny, tmp_path):
    path = copy_with(tiny, tmp_path, digest="")
    with pytest.raises(ConfigError, match=r"digest: missing; run: python -m defaker_opt.forgery"):
        load_set(str(path), tmp_path, silent)


def test_every_mistake_of_a_description_is_named_at_once(tiny, tmp_path):
    path = copy_with(tiny, tmp_path, images=15, size=10, seed=-1, split="trian", speed=1)
    with pytest.raises(ConfigError) as raised:
        load_spec(str(path))
    text = str(raised.value)
    for part in (
        "images: must be a multiple of 8 (domains x labels), got 15",
        "size: must be 192…1024 px, got 10",
        "seed: must be 0 or more, got -1",
        "split: 'trian' is not one of calibration, test, train (did you mean 'train'?)",
        "speed: unknown key",
    ):
        assert part in text


def test_a_cache_folder_that_cannot_be_written_is_an_error(tiny, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DefakerError, match=r"cannot be written .*choose another output folder"):
        load_set(str(tiny), tmp_path / "file", silent)


def test_the_command_writes_what_sets_are_verified_by(tmp_path, capsys):
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump({"description": "d", "seed": 4, "images": 8, "size": 192, "split": "train"}))
    assert main([str(path)]) == 0
    written = yaml.safe_load(path.read_text())
    assert written["digest"] in capsys.readouterr().out
    assert written["made_with"]["numpy"] == np.__version__
    assert load_set(str(path), tmp_path, silent).agreement.identical == 8
    assert json.loads(next(tmp_path.rglob("set.json")).read_text())["found"] == written["digest"]


def test_the_command_names_the_sets(capsys):
    assert main([]) == 2
    assert "drift-test" in capsys.readouterr().out
    assert main(["drift-tset"]) == 2
    assert "did you mean 'drift-test'" in capsys.readouterr().err
