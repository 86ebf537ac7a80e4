"""`quantize --locked`: the same build as before, or none."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from defaker_opt.errors import BuildError
from defaker_opt.locked import check_locked
from defaker_opt.pipeline import plan_job
from defaker_opt.recipe import load_recipe
from defaker_opt.runtime import open_build
from defaker_opt.target import load_target
from tests.conftest import ROOT, defaker_opt


def test_the_same_job_is_let_through(int8_build: Path) -> None:
    job = plan_job(load_recipe("int8"), load_target("cpu"), "reference")
    check_locked(job, int8_build)
    assert job.key == open_build(int8_build).manifest.data["plan_sha256"]


def test_what_differs_is_named(int8_build: Path) -> None:
    job = plan_job(load_recipe("int8"), load_target("cpu"), "reference:random")
    with pytest.raises(BuildError) as refused:
        check_locked(job, int8_build)
    words = str(refused.value)
    assert "would not be the same build; restore what differs, or leave --locked out" in words
    was, now = open_build(int8_build).manifest.data["source"]["sha256"], job.plan["source"]["sha256"]
    assert f"source.sha256: {was[:57]}… there, {now[:57]}… now" in words
    assert "source.trained: true there, false now" in words
    assert "recipe.passes" not in words and "tools" not in words


def test_a_changed_recipe_is_refused_before_any_work(int8_build: Path, tmp_path: Path) -> None:
    changed = tmp_path / "int8.yaml"
    data = yaml.safe_load((ROOT / "recipes" / "int8.yaml").read_text())
    data["passes"][0]["quantize"]["rules"][0] = {"match": "mask_decoder.*", "scheme": "int8"}
    changed.write_text(yaml.safe_dump(data))
    done = defaker_opt("quantize", "--recipe", changed, "--output", tmp_path / "build", "--locked", int8_build)
    assert done.returncode == 2
    assert "recipe.passes: " in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "build").exists() and not (tmp_path / ".build.partial").exists()


def test_times_and_locks_do_not_go_together(int8_build: Path, tmp_path: Path) -> None:
    done = defaker_opt(
        "quantize", "--recipe", "int8", "--output", tmp_path / "build", "--locked", int8_build, "--never-slower"
    )
    assert done.returncode == 2 and "--locked, --never-slower: times decide" in done.stderr
