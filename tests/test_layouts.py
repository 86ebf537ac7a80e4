"""Each layout on a small folder of exactly its form, and on what goes wrong with copies of data sets."""

from __future__ import annotations

import base64
import csv
import io
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from defaker_opt.benchmarks import Benchmark, Item, Locator, MaskRule
from defaker_opt.benchmarks.entries import layout_of, parse_entry
from defaker_opt.benchmarks.load import find_benchmark, load_benchmark, load_suite_file
from defaker_opt.benchmarks.patterns import find_files, natural_order, wrong_pattern
from defaker_opt.benchmarks.read import read_image, read_mask
from defaker_opt.catalog import module_names
from defaker_opt.errors import AbsentError, ConfigError, SuiteError

SIZE = (24, 16)  # width, height

# The forged part of every mask that these tests write: rows 4…7, columns 6…11.
FORGED = np.zeros(SIZE[::-1], bool)
FORGED[4:8, 6:12] = True


def unusable(benchmark: Benchmark) -> list[Item]:
    """What a judge would leave out."""

    def fails(item: Item) -> bool:
        try:
            read_mask(item, read_image(item).size)
        except SuiteError:
            return True
        return False

    return [item for item in benchmark.items if fails(item)]


def encode(values: np.ndarray[Any, Any], form: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, form, **options)
    return buffer.getvalue()


def write(path: Path, values: np.ndarray[Any, Any] | None = None, **options: Any) -> Path:
    """A picture (grey steps unless told) in the form that its name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if values is None:
        values = np.arange(SIZE[0] * SIZE[1] * 3, dtype=np.uint8).reshape(SIZE[1], SIZE[0], 3)
    form = {".jpg": "JPEG", ".jpeg": "JPEG", ".tif": "TIFF"}.get(path.suffix.lower(), "PNG")
    path.write_bytes(encode(values, form, **options))
    return path


def mask(white: int = 255, black: int = 0) -> np.ndarray[Any, Any]:
    return np.where(FORGED, white, black).astype(np.uint8)


def entry(layout: Mapping[str, Any], **more: Any) -> Any:
    needed = {
        "title": "a set",
        "domains": ["natural"],
        "folder": "set",
        "label_rule": "as the test says",
        "metrics": ["accuracy"],
        "licence": "ours",
        "citation": "this test",
    }
    return parse_entry("set", {**needed, "layout": dict(layout), **more}, "set.yaml")


def load(root: Path, layout: Mapping[str, Any], **more: Any) -> Benchmark:
    return find_benchmark(entry(layout, **more), root)


def labels(benchmark: Benchmark) -> dict[str, int]:
    return {item.key: item.label for item in benchmark.items}


def check_masks(benchmark: Benchmark) -> None:
    """Every forged picture's mask is the forged part, every authentic one's empty."""
    assert any(item.label for item in benchmark.items)
    for item in benchmark.items:
        found = read_mask(item, read_image(item).size)
        np.testing.assert_array_equal(found, FORGED if item.label else np.zeros_like(FORGED))


def shipped(root: Path, name: str) -> Path:
    """The folder that an entry of the registry looks into."""
    from defaker_opt.benchmarks.entries import load_entry

    folder = root / load_entry(name).folder
    folder.mkdir(parents=True)
    return folder


# --- one test a benchmark with a trap, through its shipped entry ---


def test_nist16_masks_are_inverted_and_found_by_its_table(tmp_path: Path) -> None:
    folder = shipped(tmp_path, "nist16")
    table = folder / "reference" / "manipulation" / "NC2016-manipulation-ref.csv"
    for name in ("probe/NC2016_1.jpg", "probe/NC2016_2.jpg"):
        write(folder / name)
    write(folder / "reference/manipulation/mask/m1.png", mask(0, 255))
    rows = [
        "TaskID|ProbeFileName|ProbeMaskFileName|IsTarget|BaseFileName",
        "manipulation|probe/NC2016_1.jpg|reference/manipulation/mask/m1.png|Y|world/a.jpg",
        "manipulation|probe/NC2016_2.jpg||N|",
    ]
    table.write_text("\n".join(rows) + "\n")
    found = load_benchmark("nist16", tmp_path)
    assert labels(found) == {"probe/NC2016_1.jpg": 1, "probe/NC2016_2.jpg": 0}
    assert [item.source for item in found.items] == ["world/a.jpg", ""]
    assert found.items[0].slices["domain"] == "natural"
    check_masks(found)


def test_columbia_says_forged_in_green(tmp_path: Path) -> None:
    folder = shipped(tmp_path, "columbia")
    write(folder / "4cam_auth/canon_sub_01.tif")
    write(folder / "4cam_splc/canon_nikon_sub_02.tif")
    colours = np.zeros((*FORGED.shape, 3), np.uint8)
    colours[:, :, 0] = np.where(FORGED, 0, 200)
    colours[:, :, 1] = np.where(FORGED, 200, 0)
    # The colours of one JPEG block are exact when they are not subsampled.
    write(folder / "4cam_splc/edgemask/canon_nikon_sub_02_edgemask.jpg", colours, quality=100, subsampling=0)
    found = load_benchmark("columbia", tmp_path)
    assert labels(found) == {"4cam_auth/canon_sub_01.tif": 0, "4cam_splc/canon_nikon_sub_02.tif": 1}
    check_masks(found)


def test_korus_grey_counts_as_forged(tmp_path: Path) -> None:
    folder = shipped(tmp_path, "korus")
    levels = mask()
    levels[4:6][FORGED[4:6]] = 128
    write(folder / "Canon_60D/pristine/r1.TIF")
    write(folder / "Canon_60D/tampered-realistic/r1.TIF")
    write(folder / "Canon_60D/ground-truth/r1.PNG", levels)
    found = load_benchmark("korus", tmp_path)
    assert {item.source for item in found.items} == {"Canon_60D/r1"}
    assert found.items[0].slices["camera"] == "Canon_60D"
    check_masks(found)


@pytest.mark.parametrize("white", [1, 255])
def test_doctamper_lmdb_with_either_masks(tmp_path: Path, white: int) -> None:
    lmdb = pytest.importorskip("lmdb")
    folder = shipped(tmp_path, "doctamper-fcd")
    with lmdb.open(str(folder), map_size=1 << 20) as env, env.begin(write=True) as transaction:
        transaction.put(b"num-samples", b"3")
        for index in range(3):
            values = np.full((*FORGED.shape, 3), 100 + index, np.uint8)
            transaction.put(b"image-%09d" % index, encode(values, "JPEG"))
            if index < 2:
                transaction.put(b"label-%09d" % index, encode(mask(white)))
    found = load_benchmark("doctamper-fcd", tmp_path)
    assert labels(found) == {"image-000000000": 1, "image-000000001": 1}
    assert found.problems == ("image-000000002: its mask is missing: no entry 'label-000000002'",)
    assert np.asarray(read_image(found.items[1])).mean() == pytest.approx(101, abs=1)
    check_masks(found)
    with lmdb.open(str(folder)) as env, env.begin(write=True) as transaction:
        transaction.put(b"num-samples", b"9")
    with pytest.raises(SuiteError, match="3 pictures, num-samples says 9"):
        load_benchmark("doctamper-fcd", tmp_path)


def test_celeb_df_list_says_1_for_real(tmp_path: Path) -> None:
    folder = shipped(tmp_path, "celeb-df-v2-official")
    lines = ["1 YouTube-real/00170.mp4", "0 Celeb-synthesis/id0_id1_0002.mp4", "1 Celeb-real/id5_0001.mp4"]
    (folder / "List_of_testing_videos.txt").write_text("\n".join(lines) + "\n")
    for name in ("YouTube-real/frames/00170/2.png", "YouTube-real/frames/00170/10.png"):
        write(folder / name)
    write(folder / "Celeb-synthesis/frames/id0_id1_0002/1.png")
    found = load_benchmark("celeb-df-v2-official", tmp_path)
    assert labels(found) == {
        "YouTube-real/frames/00170/2.png": 0,
        "YouTube-real/frames/00170/10.png": 0,
        "Celeb-synthesis/frames/id0_id1_0002/1.png": 1,
    }
    assert found.items[0].source == found.items[1].source == "YouTube-real/00170.mp4"
    assert found.problems == ("Celeb-real/id5_0001.mp4: no frames, looked for {folder}/frames/{stem}/*",)


def test_casia_v1_leaves_out_the_picture_without_a_mask(tmp_path: Path) -> None:
    folder = shipped(tmp_path, "casia-v1")
    write(folder / "Au/Au_ani_0001.jpg")
    write(folder / "Au/Au_ani_0002.jpg")
    for kind, stem in (("CM", "Sp_S_NRN_1"), ("Sp", "Sp_D_NRN_2")):
        write(folder / f"Tp/{kind}/{stem}.jpg")
        write(folder / f"CASIA 1.0 groundtruth/{kind}/{stem}_gt.png", mask(250, 5))
    broken = "Tp/Sp/Sp_D_NRN_A_cha0011_sec0011_0542.jpg"
    write(folder / broken)
    found = load_benchmark("casia-v1", tmp_path)
    assert sum(labels(found).values()) == 2
    assert [item.slices["operation"] for item in found.items if item.label] == ["CM", "Sp"]
    assert len(found.problems) == 1
    assert found.problems[0].startswith(f"{broken}: its mask is missing: ")
    assert found.problems[0].endswith("(known: the authors give no mask for it)")
    check_masks(found)


def test_faceforensics_by_compression(tmp_path: Path) -> None:
    folder = shipped(tmp_path, "ff-df-c40")
    videos: dict[str, Any] = {}
    for label, video, place in (("FF-real", "003", "original"), ("FF-DF", "003_000", "forged"), ("FF-DF", "003", "x")):
        for compression in ("c23", "c40"):
            frames = [f"FaceForensics++\\{place}\\{compression}\\frames\\{video}\\{n}.png" for n in (0, 10)]
            for frame in frames:
                write(folder / frame.replace("\\", "/"))
            split = videos.setdefault(label, {}).setdefault("test", {}).setdefault(compression, {})
            split[video] = {"label": label, "frames": frames}
        videos[label]["train"] = {"c40": {"777": {"label": label, "frames": ["nowhere/0.png"]}}}
    file = folder / "FF-DF.json"
    file.write_text(json.dumps({"FF-DF": videos}))
    found = load_benchmark("ff-df-c40", tmp_path)
    assert found.problems == ()
    assert [item.label for item in found.items] == [0, 0, 1, 1, 1, 1]
    assert all("/c40/" in item.key for item in found.items)
    # One name in two classes: two videos.
    assert [item.source for item in found.items[::2]] == ["FF-real/003", "FF-DF/003_000", "FF-DF/003"]
    assert found.items[5].slices["generator"] == "FF-DF"
    assert all("/c23/" in item.key for item in load_benchmark("ff-df-c23", tmp_path).items)
    file.write_text(json.dumps({"FF-DF": {"FF-real": videos["FF-real"], "FF-XX": videos["FF-DF"]}}))
    with pytest.raises(SuiteError, match=r"FF-DF.json: label 'FF-XX' is not one of FF-DF, FF-real .*`labels`"):
        load_benchmark("ff-df-c40", tmp_path)
    one = {"labels": {"*": "fake"}, "files": ["FF-DF.json"]}
    with pytest.raises(SuiteError, match=r"compression '' is not one of c23, c40; set it in the entry"):
        load(tmp_path, {"deepfakebench": one}, folder=str(folder.relative_to(tmp_path)))
    with pytest.raises(SuiteError, match="no videos in split 'val'"):
        load(tmp_path, {"deepfakebench": {**one, "split": "val"}}, folder=str(folder.relative_to(tmp_path)))


def test_drct_takes_its_real_pictures_from_another_tree(tmp_path: Path) -> None:
    folder = shipped(tmp_path, "drct-2m")
    write(folder / "MSCOCO/val2017/1.jpg")
    write(folder / "sd-1.5/val2017/1.png")
    found = load_benchmark("drct-2m", tmp_path)
    assert labels(found) == {"MSCOCO/val2017/1.jpg": 0, "sd-1.5/val2017/1.png": 1}
    assert found.items[1].slices == {"domain": "aigc", "generator": "sd-1.5"}


def test_cocoglide_finds_the_class_in_the_masks_name(tmp_path: Path) -> None:
    folder = shipped(tmp_path, "cocoglide")
    for number, kind in ((12, "dining table"), (112, "cat")):
        write(folder / f"fake/glide_inpainting_val2017_{number}_up.png")
        write(folder / f"real/{kind}_{number}.png")
        write(folder / f"mask/{kind}_{number}_mask.png", mask())
    found = load_benchmark("cocoglide", tmp_path)
    assert len(found.items) == 4
    assert {item.source for item in found.items} == {"12", "112"}
    assert next(item.key for item in found.items if item.label).endswith("_12_up.png")
    check_masks(found)


def test_imd2020_tells_masks_originals_and_forgeries_apart(tmp_path: Path) -> None:
    folder = shipped(tmp_path, "imd2020")
    write(folder / "z14/z14_orig.jpg")
    for name in ("00030.b_fake.jpg", "c_0.png"):
        write(folder / "z14" / name)
        write(folder / "z14" / f"{Path(name).stem}_mask.png", mask())
    found = load_benchmark("imd2020", tmp_path)
    assert labels(found) == {"z14/z14_orig.jpg": 0, "z14/00030.b_fake.jpg": 1, "z14/c_0.png": 1}
    check_masks(found)


def test_coverage_pairs_by_number(tmp_path: Path) -> None:
    folder = shipped(tmp_path, "coverage")
    for number in (1, 2, 10):
        write(folder / f"image/{number}.tif")
        write(folder / f"image/{number}t.tif")
        for part in ("copy", "paste", "forged"):
            write(folder / f"mask/{number}{part}.tif", mask() if part == "forged" else mask(0))
    found = load_benchmark("coverage", tmp_path)
    assert list(labels(found)) == [f"image/{name}.tif" for name in ("1", "2", "10", "1t", "2t", "10t")]
    assert [item.source for item in found.items] == ["1", "2", "10"] * 2
    check_masks(found)


def test_genimage_reads_val_of_either_tree(tmp_path: Path) -> None:
    folder = shipped(tmp_path, "genimage")
    for name in ("ADM/imagenet_ai_0508_adm/val/ai/1.PNG", "ADM/imagenet_ai_0508_adm/val/nature/2.JPEG"):
        write(folder / name)
    for name in ("wukong/val/ai/3.png", "wukong/val/nature/4.JPEG", "wukong/train/ai/5.png"):
        write(folder / name)
    (folder / "wukong/val/ai/readme.txt").write_text("not a picture")
    (folder / "wukong/val/ai/.DS_Store").write_text("hidden")
    found = load_benchmark("genimage", tmp_path)
    assert sorted(labels(found).values()) == [0, 0, 1, 1]
    assert {item.slices["generator"] for item in found.items} == {"ADM", "wukong"}
    assert found.problems == ("wukong/val/ai/readme.txt: not a picture by its name",)
    assert len(load_benchmark("genimage-wukong", tmp_path).items) == 2


# --- the layouts ---


def case_folder_pair(root: Path) -> dict[str, Any]:
    for name in ("0_real/a.v1.jpg", "cat/0_real/b.jpg", "1_fake/c.png"):
        write(root / "gan" / name)
    return {"real": ["{generator}/**/0_real/*"], "fake": ["{generator}/**/1_fake/*"]}


def case_rule_based(root: Path) -> dict[str, Any]:
    write(root / "a/x.png")
    write(root / "b/x.png")
    write(root / "masks/x.png", mask())
    return {
        "rules": [{"files": "a/*", "label": "real"}, {"files": "b/{s}.png", "label": "fake", "mask": "masks/{s}.png"}]
    }


def case_path_label(root: Path) -> dict[str, Any]:
    rows = [
        {"path": str(write(root / name).relative_to(root)), "label": label}
        for name, label in (("a.jpg", 0), ("b.png", 1))
    ]
    (root / "list.json").write_text(json.dumps(rows))
    return {"files": ["list.json"]}


def case_imdl(root: Path) -> dict[str, Any]:
    write(root / "Au/a.jpg")
    write(root / "Tp/b.jpg")
    write(root / "Gt/b_mask.png", mask())
    return {"mask_suffix": "_mask"}


def case_deepfakebench(root: Path) -> dict[str, Any]:
    data: dict[str, Any] = {"UADFV": {}}
    for label in ("UADFV_Real", "UADFV_Fake"):
        frame = write(root / label / "frames/0001/000.png").relative_to(root)
        data["UADFV"][label] = {"test": {"0001": {"label": label, "frames": [f".\\{frame}"]}}}
    (root / "UADFV.json").write_text(json.dumps(data))
    return {"files": ["UADFV.json"], "labels": {"UADFV_Real": "real", "UADFV_Fake": "fake"}}


def case_doctamper_lmdb(root: Path) -> dict[str, Any]:
    lmdb = pytest.importorskip("lmdb")
    with lmdb.open(str(root), map_size=1 << 20) as env, env.begin(write=True) as transaction:
        transaction.put(b"num-samples", b"1")
        transaction.put(b"image-000000001", encode(np.zeros((*FORGED.shape, 3), np.uint8), "JPEG"))
        transaction.put(b"label-000000001", encode(mask()))
    return {}


def case_images_masks(root: Path) -> dict[str, Any]:
    for name, white in (("a", 0), ("b", 255)):
        write(root / f"images/{name}.jpg")
        write(root / f"masks/{name}.png", mask(white))
    return {}


def parquet_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    schema = pyarrow.schema(
        [("image", picture), ("mask", picture), ("label", pyarrow.int64()), ("model", pyarrow.string())]
    )
    parquet.write_table(pyarrow.Table.from_pylist(rows, schema), path, row_group_size=2)


def case_hf_parquet(root: Path) -> dict[str, Any]:
    rows = []
    for index, label in enumerate((0, 1, 2, 0, 2)):
        values = np.full((*FORGED.shape, 3), 40 * index, np.uint8)
        forged = {"bytes": encode(mask()), "path": None} if label == 2 else None
        rows.append({"image": {"bytes": encode(values), "path": None}, "mask": forged, "label": label, "model": "sd"})
    rows[0]["model"] = None
    parquet_rows(root / "data/sd3-00000-of-00001.parquet", rows)
    labels = {"0": "real", "1": "fake", "2": "fake"}
    return {"files": ["data/{subset}-*.parquet"], "labels": labels, "mask": "mask", "slices": ["model"]}


def case_vlmeval_tsv(root: Path) -> dict[str, Any]:
    encoded = [base64.b64encode(encode(np.full((4, 6, 3), 90 * n, np.uint8))).decode() for n in range(3)]
    rows = [
        ["index", "image", "question", "A", "B", "answer", "category"],
        ["0", encoded[0], 'Is it\n"real"?\tSay', "Yes, it is real", "Forged by a model", "A", "x"],
        ["1", encoded[1], "Is it?", "Yes, it is real", "Forged by a model", "B", "x"],
        ["2", "1", "the picture of row 1", "forged", "authentic", "A", "y"],
        ["3", encoded[2], "Where?", "left", "right", "A", "z"],
    ]
    with (root / "set.tsv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter="\t", lineterminator="\r\n").writerows(rows)
    return {
        "file": "set.tsv",
        "labels": {"*real*": "real", "authentic": "real", "forged*": "fake"},
        "slices": ["category"],
    }


def case_csv(root: Path) -> dict[str, Any]:
    write(root / "a.jpg")
    write(root / "b.png")
    write(root / "m.png", mask())
    (root / "set.csv").write_text("image,label,mask\na.jpg,Real,\nb.png,FAKE,m.png\n")
    return {"file": "set.csv"}


CASES: dict[str, Callable[[Path], dict[str, Any]]] = {
    name.removeprefix("case_"): case for name, case in list(globals().items()) if name.startswith("case_")
}


def test_every_layout_has_a_case() -> None:
    assert sorted(CASES) == module_names("benchmarks.layouts")
    assert len(CASES) == 10


@pytest.mark.parametrize("name", CASES)
def test_a_layout_lists_the_same_in_the_same_order(name: str, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    layout = {name: CASES[name](tmp_path / "set")}
    found, again = load(tmp_path, layout), load(tmp_path, layout)
    assert found == again
    assert len({item.key for item in found.items}) == len(found.items)
    assert not any(item.key.startswith("/") or str(tmp_path) in item.key for item in found.items)
    assert {item.label for item in found.items} == ({1} if name == "doctamper_lmdb" else {0, 1})
    for item in found.items:
        assert read_image(item).mode == "RGB"
        forged = read_mask(item, read_image(item).size)
        if item.mask is not None and item.label:
            np.testing.assert_array_equal(forged, FORGED)
        elif item.label:
            assert forged is None
        else:
            assert forged is not None
            assert not forged.any()


@pytest.mark.parametrize("name", CASES)
def test_an_empty_folder_is_an_error_of_any_layout(name: str, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    layout = {name: CASES[name](tmp_path / "elsewhere")}
    with pytest.raises(AbsentError, match=r"set: no folder .*set; put the data there or link to it"):
        load(tmp_path, layout)
    (tmp_path / "set").mkdir()
    with pytest.raises(SuiteError, match=r"check the folder|is the copy complete"):
        load(tmp_path, layout)


def test_parquet_tables(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    settings = case_hf_parquet(tmp_path / "set")
    found = load(tmp_path, {"hf_parquet": settings})
    assert [item.label for item in found.items] == [0, 1, 1, 0, 1]
    assert found.items[4].key == "data/sd3-00000-of-00001.parquet#4"
    assert found.items[4].slices == {"domain": "natural", "subset": "sd3", "model": "sd"}
    assert "model" not in found.items[0].slices
    assert [int(np.asarray(read_image(item))[0, 0, 0]) for item in found.items] == [0, 40, 80, 120, 160]
    assert [item.mask is not None for item in found.items] == [False, False, True, False, True]
    with pytest.raises(SuiteError, match=r"label '2' is not one of 0, 1; say what it means under `labels`"):
        load(tmp_path, {"hf_parquet": {**settings, "labels": {"0": "real", "1": "fake"}}})
    with pytest.raises(SuiteError, match=r"column 'picture' is not one of image, label, mask, model"):
        load(tmp_path, {"hf_parquet": {**settings, "image": "picture"}})
    (tmp_path / "set/data/sd4-0.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(SuiteError, match=r"sd4-0.parquet: cannot be read as a parquet table"):
        load(tmp_path, {"hf_parquet": settings})


def test_vlmeval_tables(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    settings = case_vlmeval_tsv(tmp_path / "set")
    found = load(tmp_path, {"vlmeval_tsv": settings})
    assert labels(found) == {"set.tsv#0": 0, "set.tsv#1": 1, "set.tsv#2": 1}
    assert found.items[2].slices["category"] == "y"
    assert [int(np.asarray(read_image(item))[0, 0, 0]) for item in found.items] == [0, 90, 90]
    assert len(found.problems) == 1
    assert found.problems[0].startswith("row 3: label 'left'")
    (tmp_path / "set/set.tsv").write_text("index\timage\tanswer\n1\tAAAA\n")
    with pytest.raises(SuiteError, match="2 fields, the header has 3"):
        load(tmp_path, {"vlmeval_tsv": {**settings, "slices": []}})


def test_imdl_json(tmp_path: Path) -> None:
    root = tmp_path / "set"
    write(root / "a.jpg")
    write(root / "b.jpg")
    write(root / "b.png", mask())
    (root / "list.json").write_text(json.dumps([["data/a.jpg", "Negative"], ["data/b.jpg", "data/b.png"]]))
    found = load(tmp_path, {"imdl": {"file": "list.json", "strip": "data/"}})
    assert labels(found) == {"a.jpg": 0, "b.jpg": 1}
    check_masks(found)
    (root / "list.json").write_text(json.dumps([["a.jpg"]]))
    with pytest.raises(SuiteError, match=r"list.json: entry 1: must be \[picture, mask or \"Negative\"\]"):
        load(tmp_path, {"imdl": {"file": "list.json"}})


# --- wrong data ---


def images_masks(root: Path, count: int = 4) -> Path:
    for index in range(count):
        write(root / f"set/images/{index}.jpg")
        write(root / f"set/masks/{index}.png", mask())
    return root / "set"


def test_a_missing_mask_shifts_no_other(tmp_path: Path) -> None:
    folder = images_masks(tmp_path)
    (folder / "masks/1.png").unlink()
    write(folder / "masks/7.png", mask())
    found = load(tmp_path, {"images_masks": {}})
    assert list(labels(found)) == ["images/0.jpg", "images/2.jpg", "images/3.jpg"]
    assert found.problems == ("images/1.jpg: 0 masks masks/1.*, must be one", "masks/7.png: a mask without a picture")
    assert [item.mask for item in found.items][1] == Locator(folder / "masks/2.png")


def test_two_masks_for_one_picture(tmp_path: Path) -> None:
    folder = images_masks(tmp_path)
    write(folder / "masks/1.tif", mask())
    assert load(tmp_path, {"images_masks": {}}).problems == ("images/1.jpg: 2 masks masks/1.*, must be one",)


def test_a_mask_of_another_size_is_left_out_and_counted(tmp_path: Path) -> None:
    folder = images_masks(tmp_path)
    write(folder / "masks/2.png", mask()[:, :-1])
    found = load(tmp_path, {"images_masks": {}})
    assert len(found.items) == 4
    with pytest.raises(SuiteError, match=r"masks/2.png: the mask is 23x16, its picture 24x16"):
        read_mask(found.items[2], read_image(found.items[2]).size)
    assert [item.key for item in unusable(found)] == ["images/2.jpg"]


@pytest.mark.parametrize("damage", ["cut", "text", "empty", "16-bit"])
def test_an_unreadable_picture_is_left_out_and_counted(tmp_path: Path, damage: str) -> None:
    path = images_masks(tmp_path) / "images/1.jpg"
    if damage == "16-bit":
        path.write_bytes(encode(np.full(SIZE[::-1], 4000, np.uint16)))
    else:
        whole_file = path.read_bytes()
        path.write_bytes({"cut": whole_file[: len(whole_file) // 2], "text": b"<html>", "empty": b""}[damage])
    found = load(tmp_path, {"images_masks": {}})
    with pytest.raises(SuiteError, match=r"1.jpg: "):
        read_image(found.items[1])
    assert [item.key for item in unusable(found)] == ["images/1.jpg"]


def test_an_unreadable_mask_is_left_out_and_counted(tmp_path: Path) -> None:
    (images_masks(tmp_path) / "masks/1.png").write_bytes(b"nothing")
    found = load(tmp_path, {"images_masks": {}})
    assert len(found.items) == 3
    assert "images/1.jpg: " in found.problems[0]
    by_name = load(tmp_path, {"images_masks": {"label": "fake"}})
    assert len(by_name.items) == 4
    assert [item.key for item in unusable(by_name)] == ["images/1.jpg"]


def test_a_picture_that_vanished_is_an_error(tmp_path: Path) -> None:
    folder = images_masks(tmp_path)
    found = load(tmp_path, {"images_masks": {}})
    (folder / "images/1.jpg").unlink()
    with pytest.raises(SuiteError, match=r"1.jpg: no such file"):
        read_image(found.items[1])


def test_masks_over_half_of_the_area_are_refused(tmp_path: Path) -> None:
    folder = images_masks(tmp_path)
    for index in range(4):
        write(folder / f"masks/{index}.png", mask(0, 255))
    with pytest.raises(SuiteError, match=r"cover 94% on average of 4 masks, so black and white are probably swapped"):
        load(tmp_path, {"images_masks": {}})
    assert len(load(tmp_path, {"images_masks": {}}, large_masks=True).items) == 4
    right = load(tmp_path, {"images_masks": {}}, masks={"polarity": "black-is-forged", "threshold": 128})
    check_masks(right)


def test_a_wrong_layout_is_an_error_not_a_small_benchmark(tmp_path: Path) -> None:
    folder = images_masks(tmp_path)
    for index in range(3):
        (folder / f"masks/{index}.png").unlink()
    with pytest.raises(SuiteError, match="3 of 4 pictures cannot be used, so the layout is probably another one"):
        load(tmp_path, {"images_masks": {}})
    (folder / "masks/3.png").unlink()
    with pytest.raises(SuiteError, match="no pictures found in the layout"):
        load(tmp_path, {"images_masks": {}})


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("/etc/x.png", "absolute path; make it relative"),
        ("C:\\x.png", "absolute path"),
        ("a/../../x.png", "leads out of the benchmark's folder"),
        ("..\\x.png", "leads out"),
        ("", "is empty or no path"),
    ],
)
def test_lists_must_stay_in_their_folder(tmp_path: Path, value: str, message: str) -> None:
    root = tmp_path / "set"
    write(root / "a.png")
    write(tmp_path / "x.png")
    frames = {"d": {"FF-DF": {"test": {"v": {"frames": [value]}}}}}
    (root / "frames.json").write_text(json.dumps(frames))
    (root / "pairs.json").write_text(json.dumps([["a.png", "Negative"], [value, "Negative"]]))
    (root / "paths.json").write_text(json.dumps([{"path": "a.png", "label": 0}, {"path": value, "label": 1}]))
    (root / "table.csv").write_text(f'image,label,mask\na.png,0,\n"{value}",1,\n')
    for layout in (
        {"deepfakebench": {"files": ["frames.json"], "labels": {"*": "fake"}}},
        {"imdl": {"file": "pairs.json"}},
        {"path_label": {"files": ["paths.json"]}},
        {"csv": {"file": "table.csv"}},
    ):
        with pytest.raises(SuiteError, match=message):
            load(tmp_path, layout)


def test_absolute_paths_of_a_list_can_be_stripped(tmp_path: Path) -> None:
    write(tmp_path / "set/a/x.png")
    (tmp_path / "set/list.json").write_text(json.dumps([{"path": "/mnt/data/set/a/x.png", "label": 0}]))
    found = load(tmp_path, {"path_label": {"files": ["list.json"], "strip": "/mnt/data/set/"}})
    assert labels(found) == {"a/x.png": 0}


def test_repeated_rows_are_counted_and_contradicting_ones_refused(tmp_path: Path) -> None:
    write(tmp_path / "set/a.png")
    write(tmp_path / "set/b.png")
    table = tmp_path / "set/t.csv"
    table.write_text("image,label\na.png,0\nb.png,1\n./a.png,real\na.png,0\n")
    found = load(tmp_path, {"csv": {"file": "t.csv"}})
    assert labels(found) == {"a.png": 0, "b.png": 1}
    assert found.problems == ("a.png: listed twice",) * 2
    table.write_text("image,label\na.png,0\na.png,1\n")
    with pytest.raises(SuiteError, match=r"a.png is listed twice, with different labels or masks"):
        load(tmp_path, {"csv": {"file": "t.csv"}})


# --- tables of one's own ---


def test_a_suite_file_has_slices_and_sources(tmp_path: Path) -> None:
    write(tmp_path / "x/a.jpg")
    write(tmp_path / "x/b.png")
    write(tmp_path / "x/m.png", mask())
    table = tmp_path / "mine.csv"
    table.write_text(
        "\ufeffimage,label,mask,domain,source,generator\n"
        "x/b.png,forged,x/m.png,document,s1,inpaint\n\nx\\a.jpg,Authentic,,natural,,\n",
        encoding="utf-8",
    )
    found = load_suite_file(table, None)
    assert found.name == "mine"
    assert [(item.key, item.label, item.source, dict(item.slices)) for item in found.items] == [
        ("x/b.png", 1, "s1", {"domain": "document", "generator": "inpaint"}),
        ("x/a.jpg", 0, "", {"domain": "natural"}),
    ]
    check_masks(found)
    (tmp_path / "lists").mkdir()
    moved = table.rename(tmp_path / "lists/mine.csv")
    assert load_suite_file(moved, tmp_path).items == found.items
    with pytest.raises(SuiteError, match=r"no x/b.png in .*lists; say with --data where its paths begin"):
        load_suite_file(moved, None)
    with pytest.raises(SuiteError, match=r"no x/b.png in .*x or .*lists"):
        load_suite_file(moved, tmp_path / "x")


def test_wrong_rows_are_told_all_at_once(tmp_path: Path) -> None:
    write(tmp_path / "a.png")
    table = tmp_path / "t.csv"
    table.write_text("image,label\na.png,0\na.png,fke\n../a.png,0\n" + "a.png,maybe\n" * 20)
    with pytest.raises(SuiteError) as caught:
        load_suite_file(table, None)
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{table}:"
    assert lines[1].startswith("  line 3: label 'fke' is not one of 0, 1, authentic, fake, forged, real (did you mean")
    assert lines[2].startswith("  line 4: '../a.png' leads out")
    assert lines[-1] == "  and 12 more"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "column 'image' is not one of nothing"),
        ("path,label\na,0\n", r"column 'image' is not one of label, path"),
        ("image,label,label\na.png,0,0\n", "column label given twice"),
        ("image,label\n", "has no rows; give one for each picture"),
        ("image,label\na.png\n", "line 2: must have 2 fields"),
        ("image,label\na.png,0,9\n", "line 2: must have 2 fields"),
        ('image,label\n"a.png,0\n', "cannot be read as a table"),
        (b"image,label\na\xff.png,0\n", "cannot be read as a table"),
    ],
)
def test_wrong_tables(tmp_path: Path, text: str | bytes, message: str) -> None:
    write(tmp_path / "a.png")
    table = tmp_path / "t.csv"
    table.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(SuiteError, match=message):
        load_suite_file(table, None)


def test_a_suite_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SuiteError, match=r"none.csv: cannot be read as a table"):
        load_suite_file(tmp_path / "none.csv", None)


MANIFEST = Path(__file__).parents[2] / "shared" / "data" / "dev" / "manifest.csv"


@pytest.mark.skipif(not MANIFEST.is_file(), reason="needs the real images beside the project")
def test_the_manifest_of_real_images_loads() -> None:
    found = load_suite_file(MANIFEST, MANIFEST.parent.parent)
    assert len(found.items) == 335
    assert sum(item.label for item in found.items) == 164
    assert sum(item.mask is not None for item in found.items) == 34
    masked = [item for item in found.items if item.mask is not None]
    for item in masked[::8]:
        forged = read_mask(item, read_image(item).size)
        assert forged is not None
        assert forged.mean() == pytest.approx(float(item.slices["mask_area"]), abs=1e-4)


# --- what all share ---


@pytest.mark.parametrize("channel", ["grey", "red", "green", "blue"])
@pytest.mark.parametrize("polarity", ["white-is-forged", "black-is-forged"])
def test_mask_rules_against_a_slow_twin(tmp_path: Path, channel: Any, polarity: Any) -> None:
    rng = np.random.default_rng(3)
    values = rng.integers(0, 256, (9, 13, 3), np.uint8)
    write(tmp_path / "m.png", values)
    for threshold in (0, 100, 127, 255):
        rule = MaskRule(polarity, threshold, channel)
        item = Item("k", Locator(tmp_path / "m.png"), 1, Locator(tmp_path / "m.png"), rule)
        found = read_mask(item, (13, 9))
        assert found is not None
        for y in range(9):
            for x in range(13):
                red, green, blue = map(int, values[y, x])
                luma = (19595 * red + 38470 * green + 7471 * blue + 32768) >> 16
                value = {"grey": luma, "red": red, "green": green, "blue": blue}[channel]
                assert found[y, x] == (value > threshold if polarity == "white-is-forged" else value < threshold)


def test_masks_of_odd_modes(tmp_path: Path) -> None:
    forged = Image.fromarray(mask())
    palette = forged.point(lambda value: value // 255).convert("P")
    palette.putpalette([0, 0, 0, 128, 0, 0])
    for name, image in (("bits", forged.convert("1")), ("palette", palette), ("alpha", forged.convert("LA"))):
        image.save(tmp_path / f"{name}.png")
        item = Item("k", Locator(tmp_path), 1, Locator(tmp_path / f"{name}.png"), MaskRule(threshold=0))
        np.testing.assert_array_equal(read_mask(item, SIZE), FORGED)


def test_what_nobody_says_about_a_mask(tmp_path: Path) -> None:
    authentic, forged = (Item("k", Locator(tmp_path), label) for label in (0, 1))
    found = read_mask(authentic, SIZE)
    assert found is not None
    assert found.shape == SIZE[::-1]
    assert not found.any()
    assert read_mask(forged, SIZE) is None


def test_pictures_in_one_lmdb_can_be_read_by_threads(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    (tmp_path / "set").mkdir()
    settings = case_doctamper_lmdb(tmp_path / "set")
    item = load(tmp_path, {"doctamper_lmdb": settings}).items[0]
    with ThreadPoolExecutor(4) as pool:
        assert {image.size for image in pool.map(read_image, [item] * 40)} == {SIZE}


@pytest.mark.parametrize(("package", "layout"), [("lmdb", "doctamper_lmdb"), ("pyarrow", "hf_parquet")])
def test_a_missing_package_is_named_with_its_extra(tmp_path: Path, package: str, layout: str) -> None:
    (tmp_path / "set").mkdir()
    settings = CASES[layout](tmp_path / "set")
    code = (
        f"import sys; sys.modules[{package!r}] = None\n"
        "from pathlib import Path\n"
        "from defaker_opt.benchmarks import MaskRule\n"
        "from defaker_opt.catalog import find_module\n"
        "from defaker_opt.errors import SuiteError\n"
        "from defaker_opt import strict\n"
        f"layout = strict.read_value(find_module('benchmarks.layouts', {layout!r}).LAYOUT, {settings!r}, 'x')\n"
        "try:\n    layout.find(Path(sys.argv[1]), MaskRule())\n"
        "except SuiteError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "set"], capture_output=True, text=True, check=True)
    assert f"reading it needs {package}; install it with: pip install 'defaker-opt[benchmarks]'" in done.stdout


def test_natural_order() -> None:
    names = ["a10.png", "a2.png", "a02.png", "b", "a", "10/1", "9/1"]
    assert sorted(names, key=natural_order) == ["9/1", "10/1", "a", "a02.png", "a2.png", "a10.png", "b"]


def test_patterns(tmp_path: Path) -> None:
    for name in ("x/x_1.png", "x/y_1.png", "deep/er/x/x_2.png", "x/.hidden_3.png", "x/[a]_4.png"):
        write(tmp_path / name)
    (tmp_path / "deep/loop").symlink_to(tmp_path)

    def found(pattern: str) -> list[str]:
        return [match.path for match in find_files(tmp_path, pattern)]

    assert found("{id}/{id}_{n:digits}.png") == ["x/x_1.png"]
    assert found("**/x/*") == ["deep/er/x/x_2.png", "x/[a]_4.png", "x/x_1.png", "x/y_1.png"]
    assert found("x/[a]_4.PNG") == []
    assert found("x/[a]_*.PNG") == ["x/[a]_4.png"]
    assert found("nowhere/*") == []
    assert find_files(tmp_path, "{a}/{b}.*")[0].names == {"a": "x", "b": "[a]_4"}
    assert find_files(tmp_path, "{folder}/*_1.png", {"folder": "x"})[1].path == "x/y_1.png"
    assert wrong_pattern("a/{b}/*_{c:digits}.png") is None
    for wrong in ("", "/a", "a/../b", "{A}", "{a", "a}", "{a:int}"):
        assert wrong_pattern(wrong)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({}, "layout: must be one layout with its settings, got the keys none"),
        ({"csv": {"file": "a"}, "imdl": {}}, "must be one layout"),
        ({"folder_pairs": {}}, "unknown layout, 'folder_pairs' is not one of .*did you mean 'folder_pair'"),
        ({"folder_pair": {"real": ["../x"], "fake": []}}, r"layout.folder_pair.real: must be a path below"),
        ({"folder_pair": {"real": ["*"], "fake": ["{a}/*"], "source": "{a}"}}, r"source: '\*' does not remember a"),
        ({"rule_based": {"rules": [{"files": "{A}", "label": "real"}]}}, "rules.0..files: placeholders are"),
        ({"rule_based": {"rules": [{"files": "a", "label": "real", "source": "{x}"}]}}, "'a' does not remember x"),
        ({"csv": {"file": "a", "delimiter": "||"}}, "delimiter: must be one character"),
        ({"path_label": {"files": ["a"], "frames": "{video}/*"}}, "frames: may use {folder} and {stem}"),
        ({"hf_parquet": {"files": ["/a"]}}, "files: must be a path below"),
        ({"csv": {"file": "a", "labels": {"0": "true"}}}, "labels.0: 'true' is not one of fake, real"),
    ],
)
def test_wrong_settings_name_their_place(layout: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        entry(layout)


def test_layouts_are_values() -> None:
    first, second = (layout_of(entry({"images_masks": {}})) for _ in range(2))
    assert first == second
