"""Photographs: one split each, whatever they are called; what cannot be used is named."""

import numpy as np
import pytest
from PIL import Image

from defaker_opt.errors import DefakerError
from defaker_opt.forgery import SPLITS
from defaker_opt.forgery import generate as generate_module
from defaker_opt.forgery import sources as sources_module
from defaker_opt.forgery.generate import make_draft
from defaker_opt.forgery.scans import find_lines
from defaker_opt.forgery.sources import Library, load_built_in_photos, load_library, wheel_folder


def save_photo(path, seed, size=(96, 80)):
    pixels = np.random.Generator(np.random.PCG64(seed)).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(path)


def test_forgeries_of_a_split_use_its_photographs_only():
    library = load_library()
    assigned = {photo.name: photo.split for photo in library.photos}
    used = {split: set() for split in SPLITS}
    for split in SPLITS:
        for index in range(60):
            used[split] |= set(make_draft(1, index, split, library, 256).edit.sources)
    for split, names in used.items():
        assert {assigned.get(name, split) for name in names} == {split}
        assert names - {"procedural", "rendered"}


def test_both_pictures_of_one_scene_share_a_split():
    splits = {photo.name: photo.split for photo in load_built_in_photos()}
    assert splits["motorcycle_left"] == splits["motorcycle_right"]
    assert set(splits.values()) == set(SPLITS)


def test_a_users_photograph_keeps_its_split_under_any_name(tmp_path):
    for folder in ("one", "two/deeper"):
        (tmp_path / folder).mkdir(parents=True)
    for seed in range(40):
        save_photo(tmp_path / "one" / f"{seed}.png", seed)
        save_photo(tmp_path / "two/deeper" / f"renamed {40 - seed}.PNG", seed)
    first, second = (load_library([tmp_path / folder]) for folder in ("one", "two"))
    built_in = {photo.digest for photo in load_built_in_photos()}
    found = {photo.digest: photo.split for photo in first.photos if photo.digest not in built_in}
    assert found == {photo.digest: photo.split for photo in second.photos if photo.digest not in built_in}
    assert set(found.values()) == set(SPLITS)


def test_a_copy_of_a_built_in_photograph_changes_no_split(tmp_path):
    original = wheel_folder("skimage", "data") / "chelsea.png"
    (tmp_path / "my cat.png").write_bytes(original.read_bytes())
    assert load_library([tmp_path]).photos == load_library().photos


def test_users_photographs_are_forged(tmp_path):
    for seed in range(30):
        save_photo(tmp_path / f"own{seed}.png", seed, (300, 200))
    library = load_library([tmp_path])
    used = {name for index in range(40) for name in make_draft(1, index, "train", library, 256).edit.sources}
    assert any(name.startswith("own") for name in used)


def test_lines_of_a_photographed_page_are_found():
    library = load_library()
    [page] = [photo for photo in library.photos if photo.name == "page"]
    grey = library.pixels(page)[..., 1]
    lines = find_lines(np.random.Generator(np.random.PCG64(0)), grey, "DejaVuSans")
    assert 7 <= len(lines) <= 9
    assert all(line.left >= 0 and line.left + line.width <= grey.shape[1] for line in lines)
    assert sum(line.width > 0.8 * grey.shape[1] for line in lines) >= 3


def test_nothing_is_found_on_an_empty_page():
    assert find_lines(np.random.Generator(np.random.PCG64(0)), np.full((200, 200), 230, np.uint8), "") == []


def test_users_documents_become_pages(tmp_path):
    (tmp_path / "documents").mkdir()
    page = wheel_folder("skimage", "data") / "page.png"
    with Image.open(page) as opened:
        for side in range(30):
            opened.convert("RGB").crop((0, 0, 384 - side, 191)).save(tmp_path / "documents" / f"{side}.png")
    library = load_library([tmp_path])
    assert len(library.of("train", ("scan",))) > 5
    assert not any(photo.name.startswith("documents") for photo in library.of("train", ("photo",)))
    used = {make_draft(1, 4 * turn + 1, "train", library, 320).edit.sources[0] for turn in range(12)}
    assert any(name.startswith("documents/") for name in used)


def test_pictures_are_decoded_on_demand_when_they_are_too_many_to_keep():
    kept = load_library()
    bare = Library(kept.photos)
    photo = kept.photos[0]
    assert np.array_equal(kept.pixels(photo), bare.pixels(photo))


def test_photographs_that_leave_nothing_to_forge_are_an_error(monkeypatch):
    monkeypatch.setattr(generate_module, "_acceptable", lambda *_: False)
    with pytest.raises(DefakerError, match=r"pair 4 of split train: no copy_move .* add larger or less uniform ones"):
        make_draft(1, 4, "train", load_library(), 192)


def test_a_missing_folder_is_an_error(tmp_path):
    with pytest.raises(DefakerError, match="nowhere: no such folder; give one that holds photographs"):
        load_library([tmp_path / "nowhere"])


def test_a_folder_without_photographs_is_an_error(tmp_path):
    (tmp_path / "notes.txt").write_text("nothing to see")
    with pytest.raises(DefakerError, match=r"holds no photograph; files named \.jpg, \.jpeg, \.png"):
        load_library([tmp_path])


def test_every_unusable_photograph_is_named_at_once(tmp_path):
    save_photo(tmp_path / "good.png", 1)
    save_photo(tmp_path / "tiny.png", 2, (40, 90))
    (tmp_path / "broken.jpg").write_bytes(b"not a picture")
    with pytest.raises(DefakerError) as raised:
        load_library([tmp_path])
    text = str(raised.value)
    assert "broken.jpg: not a picture of a known format" in text
    assert "tiny.png: 40x90; both sides must be at least 64 px" in text
    assert "good.png" not in text


def test_a_missing_package_says_how_to_install_it():
    with pytest.raises(DefakerError, match=r"no_such_wheel is not installed.*pip install 'defaker-opt\[forgery\]'"):
        wheel_folder("no_such_wheel", "data")


def test_another_photograph_of_the_same_name_is_found(tmp_path, monkeypatch):
    save_photo(tmp_path / "astronaut.png", 1)
    monkeypatch.setattr(sources_module, "wheel_folder", lambda wheel, inner: tmp_path)
    with pytest.raises(DefakerError, match=r"astronaut.png: sha256 must begin with 88431cd9653ccd53, got"):
        load_built_in_photos()
