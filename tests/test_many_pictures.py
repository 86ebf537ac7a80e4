"""Many pictures: in their order whatever takes how long, bad ones among them, and the same results at once as alone."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from defaker_opt.cli.run import Place, Wish, _judge_all
from defaker_opt.errors import ImageError
from defaker_opt.runtime import images
from defaker_opt.runtime.in_order import in_order
from defaker_opt.sample import sample_image
from tests.conftest import defaker_opt


@pytest.mark.parametrize(("workers", "ahead"), [(1, 1), (1, 4), (3, 4), (8, 2)])
def test_results_come_in_order_and_few_are_begun(workers: int, ahead: int) -> None:
    lock, begun, taken, most = threading.Lock(), [0], [0], [0]

    def work(item: int) -> int:
        with lock:
            begun[0] += 1
            most[0] = max(most[0], begun[0] - taken[0])
        time.sleep(0.004 if item % 3 == 0 else 0.0)
        return item * item

    results = []
    for result in in_order(work, range(40), workers, ahead):
        results.append(result)
        with lock:
            taken[0] += 1
    assert results == [item * item for item in range(40)]
    assert most[0] <= ahead + 1, "one is taken while another begins"


def test_an_error_is_raised_in_its_turn_and_ends_the_work() -> None:
    begun = []

    def work(item: int) -> int:
        begun.append(item)
        if item == 3:
            raise ValueError("three")
        return item

    results = []
    with pytest.raises(ValueError, match="three"):
        for result in in_order(work, range(1000), 1, 2):
            results.append(result)
    assert results == [0, 1, 2]
    assert len(begun) < 8


@pytest.mark.parametrize("failing", ["first", "second"])
@pytest.mark.parametrize("workers", [1, 4])
def test_in_a_chain_what_was_done_before_an_error_comes_out(failing: str, workers: int) -> None:
    def fail_at_five(step: str, item: int) -> int:
        if failing == step and item == 5:
            raise ValueError("five")
        return item

    first = in_order(lambda item: fail_at_five("first", item), range(40), 1, workers + 1)
    results = []
    with pytest.raises(ValueError, match="five"):
        for result in in_order(lambda item: fail_at_five("second", item), first, workers, workers + 1):
            results.append(result)
    assert results == [0, 1, 2, 3, 4]


def test_a_result_is_not_held_back_for_the_next() -> None:
    may_end = threading.Event()

    def work(item: int) -> int:
        if item:
            assert may_end.wait(20)
        return item

    results = in_order(work, range(3), 1, 2)
    assert next(results) == 0
    may_end.set()
    assert list(results) == [1, 2]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Photographs of several sizes, and among them one that is cut off and one that is none."""
    folder = tmp_path_factory.mktemp("pictures")
    for index in range(6):
        Image.fromarray(sample_image(index)[: 300 - 20 * index]).save(folder / f"{index}.png")
    (folder / "2.png").write_bytes((folder / "2.png").read_bytes()[:5000])
    (folder / "4.png").write_text("no picture")
    return sorted(folder.iterdir())


def rows_of(build: Path, pictures: list[Path], folder: Path, *options: str) -> list[dict[str, object]]:
    done = defaker_opt("run", build, *pictures, "--json", "--gate", "0", "--mask-dir", folder, *options)
    assert done.returncode == 2, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_pictures_at_once_get_the_verdicts_they_get_alone(
    float_build: Path, pictures: list[Path], tmp_path: Path
) -> None:
    alone = rows_of(float_build, pictures, tmp_path / "alone", "--threads", "1")
    at_once = rows_of(float_build, pictures, tmp_path / "at-once", "--threads", "1", "--concurrency", "3")
    assert [row["image"] for row in at_once] == [str(path) for path in pictures]
    assert [Path(str(row["image"])).name for row in at_once if "error" in row] == ["2.png", "4.png"]
    for one, other in zip(alone, at_once):
        assert one.get("fake_probability") == other.get("fake_probability")
        if "mask" in one:
            masks = [np.asarray(Image.open(str(row["mask"]))) for row in (one, other)]
            np.testing.assert_array_equal(*masks)


def test_as_many_are_decoded_at_once_as_are_judged(pictures: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a GPU judges them, one that decodes would keep it waiting."""
    both = threading.Barrier(2)

    def load(path: str) -> Image.Image:
        both.wait(60)
        raise ImageError(f"{path}: none")

    monkeypatch.setattr(images, "load_image", load)
    session: Any = SimpleNamespace(build=SimpleNamespace(digest="0", manifest=SimpleNamespace(trained=True)))
    items = [(str(path), Place(path.stem, None, None)) for path in pictures]
    rows = list(_judge_all(session, items, Wish(gate=None, words=0, concurrency=2)))
    assert [row["error"] for row in rows] == [f"{path}: none" for path in pictures]


def test_a_folder_that_cannot_be_written_ends_the_run(float_build: Path, pictures: list[Path], tmp_path: Path) -> None:
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks" / "0_mask.png").mkdir()
    done = defaker_opt("run", float_build, *pictures, "--gate", "0", "--mask-dir", tmp_path / "masks")
    assert done.returncode == 2
    assert "0_mask.png" in done.stderr


def test_a_build_that_opens_stages_in_turn_judges_one_picture_at_a_time(
    float_build: Path, pictures: list[Path], tmp_path: Path
) -> None:
    """The build's own manifest says how many bytes may be open; a target with few makes such a build."""
    import yaml

    from defaker_opt.catalog import find_yaml

    target = yaml.safe_load(find_yaml("profiling/targets", "cpu", "target").read_text())
    target["session"] = {**target["session"], "open_mb": 1}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(target))
    made = defaker_opt("quantize", "--recipe", "float32", "--target", tmp_path / "small.yaml", "-o", tmp_path / "build")
    assert made.returncode == 0, made.stderr
    done = defaker_opt("run", tmp_path / "build", pictures[0], "--concurrency", "2")
    assert done.returncode == 2
    assert "--concurrency 2" in done.stderr and "open_mb: 0" in " ".join(done.stderr.split())
