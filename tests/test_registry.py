"""The entries of the registry, and what `show benchmarks` says of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from defaker_opt.benchmarks.entries import REGISTRY, Entry, entry_names, layout_of, load_entry
from defaker_opt.benchmarks.load import find_presence, load_benchmark
from defaker_opt.catalog import PACKAGE, data_folder, module_names
from defaker_opt.errors import AbsentError, ConfigError, DefakerError
from tests.conftest import defaker_opt

NAMES = entry_names()

# What the users of this detector have, as issues and papers name it.
ASKED_FOR = """
    genimage genimage-adm genimage-biggan genimage-glide genimage-midjourney genimage-sd14 genimage-sd15 genimage-vqdm
    genimage-wukong diffusion-forensics chameleon aigc-detect-benchmark universal-fake-detect drct-2m cifake so-fake-ood
    openfake faceforensics-c23 faceforensics-c40 ff-df-c23 ff-df-c40 ff-f2f-c23 ff-f2f-c40 ff-fs-c23 ff-fs-c40 ff-nt-c23
    ff-nt-c40 celeb-df-v1 celeb-df-v2 dfd dfdc dfdcp faceshifter uadfv df40 wilddeepfake doctamper-test doctamper-fcd
    doctamper-scd t-sroie rtm ostf tampered-ic13 casia-v1 columbia coverage nist16 imd2020 cocoglide autosplice dso-1
    korus opensdi sid-set br-gen openmmsec gpt-image-2-bench
"""


def test_every_benchmark_that_was_asked_for_has_an_entry() -> None:
    assert set(ASKED_FOR.split()) <= set(NAMES)
    assert len(NAMES) >= 59


def test_the_registry_is_part_of_the_package() -> None:
    assert data_folder(REGISTRY).is_relative_to(PACKAGE)
    assert sorted(path.stem for path in data_folder(REGISTRY).iterdir()) == NAMES


@pytest.fixture(params=NAMES)
def entry(request: pytest.FixtureRequest) -> Entry:
    return load_entry(request.param)


def test_an_entry_is_complete(entry: Entry) -> None:
    assert entry.name in NAMES
    (layout,) = entry.layout
    assert layout in module_names("benchmarks.layouts")
    for text in (entry.title, entry.label_rule, entry.licence, entry.citation, *entry.notes, *entry.unverified):
        assert text.strip() == text != ""
    needs_masks = any(metric.startswith("pixel") for metric in entry.metrics)
    assert needs_masks == (entry.masks is not None)
    # Where nobody says how many there are, the entry says so, or does not know its data well enough.
    if entry.expected is not None:
        counts = (entry.expected.authentic, entry.expected.forged, entry.expected.total)
        assert any(count is not None for count in counts)


def test_an_entry_without_its_data_says_so(entry: Entry, tmp_path: Path) -> None:
    with pytest.raises(AbsentError, match=f"benchmark {entry.name}: no folder .*; put the data there or link to it"):
        load_benchmark(entry.name, tmp_path)
    assert find_presence(entry, tmp_path).status == "not found"


def test_an_empty_folder_is_never_a_benchmark(entry: Entry, tmp_path: Path) -> None:
    (tmp_path / entry.folder).mkdir(parents=True)
    with pytest.raises(DefakerError):
        load_benchmark(entry.name, tmp_path)
    assert find_presence(entry, tmp_path).status in ("not found", "unusable")
    assert layout_of(entry) == layout_of(load_entry(entry.name))


def draw(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((4, 5, 3), np.uint8)).save(path)


def chameleon(root: Path, forged: int) -> None:
    draw(root / "Chameleon/0_real/a.png")
    for index in range(forged):
        draw(root / f"Chameleon/1_fake/{index}.png")


def dso(root: Path) -> None:
    for index in range(2):
        draw(root / f"DSO-1/DSO-1/normal-{index}.png")
        draw(root / f"DSO-1/DSO-1/splicing-{index}.png")
    for index in range(2):
        path = root / f"DSO-1/DSO-1-Fake-Images-Masks/splicing-{index}.png"
        draw(path)
        Image.fromarray(np.full((4, 5), 255, np.uint8)).save(path)


def test_presence_counts_and_compares(tmp_path: Path) -> None:
    chameleon(tmp_path, 3)
    dso(tmp_path)
    found = find_presence(load_entry("chameleon"), tmp_path)
    assert (found.status, found.authentic, found.forged, found.left_out, found.detail) == ("found", 1, 3, 0, "")
    differs = find_presence(load_entry("dso-1"), tmp_path)
    assert differs.status == "differs"
    assert differs.detail == "2 authentic images, expected 100; 2 forged images, expected 100"


def test_presence_counts_videos_where_the_entry_does(tmp_path: Path) -> None:
    folder = tmp_path / load_entry("celeb-df-v2-official").folder
    for name in ("Celeb-real/frames/id0/0.png", "Celeb-real/frames/id0/1.png", "YouTube-real/frames/1/0.png"):
        draw(folder / name)
    lines = ["1 Celeb-real/id0.mp4", "1 YouTube-real/1.mp4", "0 Celeb-synthesis/x.mp4"]
    (folder / "List_of_testing_videos.txt").write_text("\n".join(lines))
    found = find_presence(load_entry("celeb-df-v2-official"), tmp_path)
    assert (found.authentic, found.forged, found.left_out) == (2, 0, 1)
    assert found.detail == "2 total videos, expected 518"


def test_memory_is_called_memory(tmp_path: Path) -> None:
    folder = tmp_path / load_entry("ff-df-c23").folder
    draw(folder / "f/0.png")
    data = {"FF-DF": {"FF-real": {"test": {"c23": {"000": {"frames": ["f/0.png"]}}}}}}
    (folder / "FF-DF.json").write_text(json.dumps(data))
    assert find_presence(load_entry("ff-df-c23"), tmp_path).detail.endswith("expected 140 (from memory)")


def test_an_entry_of_ones_own(tmp_path: Path) -> None:
    chameleon(tmp_path, 2)
    text = (data_folder(REGISTRY) / "chameleon.yaml").read_text()
    mine = tmp_path / "mine.yaml"
    mine.write_text(text)
    assert load_benchmark(str(mine), tmp_path).name == "mine"
    mine.write_text(f"{text}\nname: other\n")
    with pytest.raises(ConfigError, match="name: is that of the file; remove it"):
        load_entry(str(mine))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"domains": []}, "domains: must name at least one domain"),
        ({"domains": ["photo"]}, r"domains\[0\]: 'photo' is not one of aigc, deepfake, document, natural"),
        ({"metrics": []}, "metrics: must name at least one metric"),
        ({"metrics": ["acuracy"]}, r"'acuracy' is not one of .*did you mean 'accuracy'"),
        ({"folder": "/data"}, "folder: must be a path below"),
        ({"license": "x"}, "license: unknown key, .*did you mean 'licence'"),
        ({"masks": {"polarity": "black"}}, "masks.polarity: 'black' is not one of"),
        ({"expected": {"evidence": "list", "forged": -1}}, "expected.forged: must be 0 or more, got -1"),
    ],
)
def test_wrong_entries(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    import yaml

    data = yaml.safe_load((data_folder(REGISTRY) / "chameleon.yaml").read_text())
    mine = tmp_path / "mine.yaml"
    mine.write_text(yaml.safe_dump({**data, **change}))
    with pytest.raises(ConfigError, match=message):
        load_entry(str(mine))


def test_an_unknown_benchmark_is_told_with_the_nearest() -> None:
    with pytest.raises(DefakerError, match=r"benchmark 'casia1' is not one of .*did you mean 'casia-v1'"):
        load_entry("casia1")


def test_show_benchmarks_for_people(tmp_path: Path) -> None:
    chameleon(tmp_path, 2)
    dso(tmp_path)
    (tmp_path / "Deepfake").mkdir()
    (tmp_path / "Columbia").mkdir()
    draw(tmp_path / "Columbia/4cam_auth/a.tif")
    done = defaker_opt("show", "benchmarks", "--data", tmp_path)
    assert done.returncode == 0, done.stderr
    lines = [line.strip() for line in done.stdout.splitlines()]
    assert sum(name in NAMES for name in (line.split(" ")[0] for line in lines)) == len(NAMES)
    place = next(index for index, line in enumerate(lines) if line.startswith("chameleon "))
    assert lines[place].endswith("aigc      Chameleon")
    assert lines[place + 1] == "accuracy; licence: academic use only; sent by the authors on request"
    assert lines[place + 2] == "found: 1 authentic, 2 forged, 0 left out"
    place = next(index for index, line in enumerate(lines) if line.startswith("dso-1 "))
    assert lines[place + 2].startswith("differs: 2 authentic, 2 forged, 0 left out (2 authentic images, expected 100")
    place = next(index for index, line in enumerate(lines) if line.startswith("columbia "))
    assert lines[place + 2].startswith("unusable (") and "no fake pictures, looked for 4cam_splc" in lines[place + 2]
    assert sum(line.startswith("not found (") for line in lines) == len(NAMES) - 3


def test_show_benchmarks_for_programs(tmp_path: Path) -> None:
    chameleon(tmp_path, 2)
    done = defaker_opt("show", "benchmarks", "--data", tmp_path, "--json")
    rows = {row["name"]: row for row in map(json.loads, done.stdout.splitlines())}
    assert sorted(rows) == NAMES
    assert rows["chameleon"]["presence"] == {
        "status": "found",
        "authentic": 1,
        "forged": 2,
        "left_out": 0,
        "detail": "",
    }
    assert rows["nist16"]["masks"] == {"polarity": "black-is-forged", "threshold": 128, "channel": "grey"}
    assert rows["nist16"]["presence"]["status"] == "not found"
    plain = [json.loads(line) for line in defaker_opt("show", "benchmarks", "--json").stdout.splitlines()]
    assert not any("presence" in row for row in plain)
    recipes = [json.loads(line) for line in defaker_opt("show", "recipes", "--json").stdout.splitlines()]
    assert "int8" in {row["name"] for row in recipes}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("recipes", "--data", "."), "--data: only benchmarks lie in a folder of yours, not recipes"),
        (("benchmarks", "--data", "nowhere"), "--data nowhere: no such folder"),
        (("benchmark",), "'benchmark' is not one of"),
    ],
)
def test_wrong_calls_of_show(arguments: tuple[str, ...], message: str) -> None:
    done = defaker_opt("show", *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
