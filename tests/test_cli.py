"""The command line as people and scripts meet it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from defaker_opt.cli.run import _output_names
from defaker_opt.runtime import open_build
from defaker_opt.sample import sample_image
from tests.conftest import ROOT, defaker_opt


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A real photograph out of a wheel, with a name that has dots and blanks in it."""
    import skimage

    source = Path(skimage.__file__).parent / "data" / "rocket.jpg"
    path = tmp_path / "my photo.v2.jpg"
    path.write_bytes(source.read_bytes())
    return path


@pytest.mark.parametrize("arguments", [("--help",), ("quantize", "--help"), ("run", "--help"), ("--version",)])
def test_help_needs_no_torch(arguments: tuple[str, ...]) -> None:
    code = (
        "import sys; sys.argv[0] = 'defaker-opt'\n"
        "import atexit; atexit.register(lambda: print('loaded:', 'torch' in sys.modules, 'numpy' in sys.modules))\n"
        "from defaker_opt.cli import main\nmain()"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "loaded: False False" in done.stdout


def test_json_rows_have_the_promised_form(int8_build: Path, photo: Path, tmp_path: Path) -> None:
    folders = ("--mask-dir", tmp_path / "masks", "--overlay-dir", tmp_path / "overlays")
    done = defaker_opt("run", int8_build, photo, photo, "--json", "--gate", 0, *folders)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == 2
    keys = {"image", "verdict", "fake_probability", "mask_area", "mask", "latency_ms", "build"}
    assert set(rows[0]) == keys
    assert rows[0]["image"] == str(photo)
    assert rows[0]["verdict"] in ("real", "fake")
    assert rows[0]["verdict"] == ("fake" if rows[0]["fake_probability"] > 0.5 else "real")
    assert rows[0]["build"] == open_build(int8_build).digest
    stages = {"vision_encoder", "language", "mask_encoder", "mask_decoder", "total"}
    assert stages <= set(rows[0]["latency_ms"])
    assert rows[0]["mask"] != rows[1]["mask"]
    for row in rows:
        mask = np.asarray(Image.open(row["mask"]))
        assert mask.shape == (427, 640)
        assert set(np.unique(mask)) <= {0, 255}
        assert (mask > 0).mean() == pytest.approx(row["mask_area"])
    assert len(list((tmp_path / "overlays").iterdir())) == 2
    assert "untrained" not in done.stderr


def test_a_real_photo_below_the_gate_gets_no_mask(int8_build: Path, photo: Path, tmp_path: Path) -> None:
    done = defaker_opt("run", int8_build, photo, "--json", "--gate", 1, "--mask-dir", tmp_path / "masks")
    row = json.loads(done.stdout)
    assert row["mask"] is None
    assert row["mask_area"] is None
    assert "mask_encoder" not in row["latency_ms"]
    assert list((tmp_path / "masks").iterdir()) == []


def test_whatever_comes_from_drawn_weights_says_untrained(untaught_build: Path, photo: Path) -> None:
    assert json.loads((untaught_build / "manifest.json").read_text())["source"]["trained"] is False
    assert json.loads((untaught_build.parent / "build.json").read_text())["untrained"] is True
    done = defaker_opt("run", untaught_build, photo)
    assert done.stdout.startswith(f"{photo}: ")
    assert "(untrained)" in done.stdout
    done = defaker_opt("run", untaught_build, photo, "--json")
    assert json.loads(done.stdout)["untrained"] is True
    assert "untrained" in done.stderr


def test_overlay_shows_the_photo_the_mask_and_the_verdict(int8_build: Path, tmp_path: Path) -> None:
    from defaker_opt.runtime.overlay import draw_overlay
    from defaker_opt.runtime.session import Verdict

    photo = Image.fromarray(sample_image())
    mask = np.zeros((400, 640), bool)
    mask[100:200, 100:300] = True
    verdict = Verdict(0.9, True, np.zeros(8, np.float32), mask, float(mask.mean()), {})
    pixels = np.asarray(draw_overlay(photo, verdict, trained=True))
    assert pixels.shape[1] == 640
    assert pixels.shape[0] > 400
    np.testing.assert_array_equal(pixels[:99, :], np.asarray(photo)[:99, :])
    tinted, plain = pixels[150, 200].astype(int), sample_image()[150, 200].astype(int)
    assert abs(tinted[0] - (0.55 * plain[0] + 0.45 * 230)) <= 1
    assert abs(tinted[2] - (0.55 * plain[2] + 0.45 * 40)) <= 1
    assert tuple(pixels[100, 200]) == (255, 235, 0)
    assert (pixels[401:] == 255).any()


@pytest.mark.parametrize("size", [(1, 1), (3, 2000), (2000, 3)])
def test_overlays_of_odd_sizes_are_drawn(size: tuple[int, int]) -> None:
    from defaker_opt.runtime.overlay import draw_overlay
    from defaker_opt.runtime.session import Verdict

    mask = np.ones(size[::-1], bool)
    verdict = Verdict(0.1, False, np.zeros(8, np.float32), mask, 1.0, {})
    assert draw_overlay(Image.new("RGB", size), verdict, trained=False).width == size[0]


def test_dry_run_writes_nothing_and_says_all(tmp_path: Path) -> None:
    done = defaker_opt("quantize", "--recipe", "int4", "--dry-run", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    preview = json.loads(done.stdout)
    assert list(tmp_path.iterdir()) == []
    # Of the 23 layers, down_proj alone has columns that 128 divides: 512 of them; 192 leaves groups of 64.
    assert preview["stages"]["language"]["schemes"] == {"int4-g64": 20, "int4-g128": 3, "float": 1}
    assert "untrained" not in preview
    assert preview["recipe"]["name"] == "int4"
    assert preview["left_in_float"]["language.verdict_head.weight"].startswith("rule")
    table = defaker_opt("quantize", "--recipe", "int4", "--dry-run", cwd=tmp_path)
    assert "vision_encoder" in table.stdout
    assert "match:" in table.stdout


def test_the_default_output_is_named_after_source_and_recipe(tmp_path: Path) -> None:
    done = defaker_opt("quantize", "--recipe", "int8", "--dry-run", "--json", cwd=tmp_path)
    assert json.loads(done.stdout)["build"] == str(Path("exported") / "reference-int8")


@pytest.mark.parametrize("arguments", [("run",), ("quantize",), ("quantise",), ("run", "x"), ("show", "recipe")])
def test_wrong_calls_end_with_2_and_no_traceback(arguments: tuple[str, ...]) -> None:
    done = defaker_opt(*arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.strip()


@pytest.mark.parametrize("what", ["recipes", "targets", "presets", "methods", "passes", "backends", "sources"])
def test_show_lists_what_is_there(what: str) -> None:
    done = defaker_opt("show", what)
    assert done.returncode == 0
    known = {"recipes": "int8", "targets": "cpu", "methods": "round_to_nearest", "passes": "quantize"}
    assert {**known, "backends": "onnx_runtime", "sources": "sa2va", "presets": "defakerone-2b:random"}[
        what
    ] in done.stdout


def test_results_of_images_with_one_name_do_not_overwrite_each_other() -> None:
    assert list(_output_names(["a/x.jpg", "b/x.png", "b/x-2.png", "y.jpg"])) == ["x", "x-2", "x-2-2", "y"]


def test_a_missing_host_package_is_said_plainly() -> None:
    code = (
        "import sys; sys.modules['yaml'] = None\nsys.argv = ['defaker-opt', 'quantize', '--recipe', 'int8']\n"
        "from defaker_opt.cli import main\nmain()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "defaker-opt[host]" in done.stderr
    assert "Traceback" not in done.stderr


def test_readme_names_every_recipe_with_its_description() -> None:
    from defaker_opt.catalog import yaml_names
    from defaker_opt.recipe import load_recipe

    readme = (ROOT / "README.md").read_text()
    names = yaml_names("recipes")
    assert len(names) >= 3
    for name in names:
        assert f"| `{name}` | {load_recipe(name).description} |" in readme


def test_every_shipped_target_loads() -> None:
    from defaker_opt.catalog import yaml_names
    from defaker_opt.target import load_target

    names = yaml_names("profiling/targets")
    assert names
    for name in names:
        assert load_target(name).name == name
