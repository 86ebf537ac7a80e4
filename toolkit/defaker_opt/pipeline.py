"""The straight line: a recipe and a source → a build."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import math
import platform
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from defaker_opt import __version__
from defaker_opt.build_facts import input_facts, prompt_facts, write_arrays, write_explanation, write_prompts
from defaker_opt.catalog import code_digest
from defaker_opt.detector import (
    Detector,
    linear_weights,
    load_detector,
    parameter_shapes,
    require_prompt,
    source_digest,
    source_folder,
)
from defaker_opt.errors import BuildError, PassError, write_failure
from defaker_opt.files import default_cache_folder, held, move_folder, read_json_object, write_json
from defaker_opt.gptq_folder import check_apart, hold, is_written, write_gptq
from defaker_opt.gptq_folder.layout import Layout, find_layout
from defaker_opt.progress import Progress, part_of
from defaker_opt.recipe import Recipe, pass_name
from defaker_opt.runtime.backends import find_backend
from defaker_opt.runtime.build import (
    FORMAT,
    MANIFEST,
    SEAL,
    SELF_TEST,
    Build,
    Manifest,
    file_sha256,
    open_build,
    seal,
)
from defaker_opt.runtime.self_test import expected_outputs
from defaker_opt.runtime.session import open_session
from defaker_opt.sample import sample_image
from defaker_opt.samples import Samples, load_samples, require_named
from defaker_opt.spool import SpooledCodes, SpooledScales
from defaker_opt.stage_build import build_stage
from defaker_opt.target import Target, require_backend
from defaker_opt.words import end_tokens, tokenizer_digest

_PASSES_SHARE = 0.1
# Beside the build's own files, the folder for unfinished work has the job's key, the codes of quantized weights, the
# ranges of queries and keys, and a receipt for each finished stage.
_CONTENT = "build"
_PLAN = "plan.json"
_CODES, _OPERANDS = "codes", "operands.json"
_TOOLS = ("torch", "transformers", "onnx-ir", "onnxscript", "onnxruntime", "numpy", "safetensors")
# What also decides a build's numbers, by backend of its target.
_TOOLS_OF = {"openvino": ("openvino",)}

# The self-test's tolerances: rounding moves the outputs of a quantized build from machine to machine.
_EXACT = {"probability_tolerance": 1e-3, "mask_tolerance": 1e-3}
_QUANTIZED = {"probability_tolerance": 0.02, "mask_tolerance": 0.05}
# A code of FP8 on an edge moves by a sixteenth: differences of 1e-7 moved the embedded detector's probability by 0.03.
_FLOATING = {"probability_tolerance": 0.05, "mask_tolerance": 0.05}


@dataclass(frozen=True)
class Job:
    """Everything that decides the bytes of a build."""

    recipe: Recipe
    target: Target
    source: str
    detector: Detector
    plan: Mapping[str, Any]
    samples: Samples | None = None

    @property
    def key(self) -> str:
        """SHA-256 over the plan; equal keys give equal builds."""
        return hashlib.sha256(json.dumps(self.plan, sort_keys=True).encode()).hexdigest()


def _silent(what: str, fraction: float) -> None:
    pass


def plan_job(recipe: Recipe, target: Target, source: str, progress: Progress = _silent) -> Job:
    """Open the source, and the pictures if any pass looks at some, and check that the recipe can be carried out.

    Raises DefakerError before any work is done.
    """
    require_backend(target)
    detector = load_detector(source)
    require_prompt(detector, source)
    try:
        looks = [looks for each in recipe.passes if (looks := each.check(detector.config, target).looks)]
    except PassError as error:
        raise PassError(f"recipe {recipe.name}: {error}") from error
    samples = _samples(recipe, looks, progress)
    folder = source_folder(source)
    words = {}
    if recipe.explain:
        words = {"tokenizer_sha256": tokenizer_digest(folder)}
        end_tokens(folder)
    plan = {
        "recipe": {**recipe.as_json(), "source": detector.config.name, "target": target.name},
        "target": target.as_json(),
        "source": {
            "name": detector.config.name,
            "trained": detector.config.trained,
            "sha256": source_digest(detector),
            **words,
        },
        **({"calibration": samples.as_json()} if samples else {}),
        "tools": tool_versions(target.backend),
    }
    return Job(recipe, target, source, detector, plan, samples)


def _samples(recipe: Recipe, looks: list[str], progress: Progress) -> Samples | None:
    """The pictures that passes look at; None where none does. Raises DefakerError."""
    require_named(recipe.name, recipe.calibration, looks)
    if not looks or recipe.calibration is None:
        return None
    return load_samples(recipe.calibration, default_cache_folder(), progress)


def tool_versions(backend: str) -> dict[str, str]:
    """What a build is made with; our own code by its hash too, so that no stage of older code is ever reused.

    Raises BuildError if the build would be checked with a library that is not installed.
    """
    own = _TOOLS_OF.get(backend, ())
    if own:
        find_backend(backend)
    versions = {name: importlib.metadata.version(name) for name in (*_TOOLS, *own)}
    return {"defaker-opt": f"{__version__}+{code_digest()[:12]}", "python": platform.python_version(), **versions}


def make_build(job: Job, output: Path, progress: Progress, replace: bool = False, gptq: Path | None = None) -> Build:
    """Make the build of a job, or return the one that is there if it is of the same job.

    gptq: where to write the language part as a GPTQ checkpoint too, from the same codes; see `check_gptq`.

    Works in a hidden folder beside `output`, where a later call for the same job finds the finished stages; the folder
    gets its name only when it is complete. Raises BuildError if something else is at `output` and `replace` is not set.
    """
    existing = _existing_build(job, output, replace)
    layout = check_gptq(job, gptq, output) if gptq else None
    wanted = gptq if gptq and not is_written(gptq, job.key) else None
    if existing and not wanted:
        return existing
    work = output.with_name(f".{output.name}.partial")
    busy = BuildError(f"{work}: another process is making this build; wait, or choose another --output")
    try:
        with held(work, busy), hold(wanted):
            _prepare(work, job)
            detector, notes = _apply_passes(job, work, progress)
            if wanted and layout:
                write_gptq(detector, layout, wanted, source_folder(job.source), job.key, progress)
            if existing:
                shutil.rmtree(work, ignore_errors=True)
                return existing
            data = _fill(job, work, detector, notes, progress)
            write_json(work / _CONTENT / MANIFEST, {**data, SEAL: seal(data)})
            progress("verify", 0.98)
            build = open_build(work / _CONTENT)
            move_folder(work / _CONTENT, output)
            shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        raise write_failure(work, error) from error
    progress("done", 1.0)
    return dataclasses.replace(build, folder=output)


def check_gptq(job: Job, folder: Path, output: Path) -> Layout:
    """How the language part of a job will lie in a GPTQ checkpoint.

    output: where the build goes. Raises DefakerError if codes have no place there, or if it has none beside the build.
    """
    check_apart(folder, output)
    schemes: dict[str, str] = {}
    factored: set[str] = set()
    for each in job.recipe.passes:
        preview = each.check(job.detector.config, job.target)
        schemes.update(preview.schemes)
        factored.update(preview.factored)
    is_written(folder, job.key)
    return find_layout(linear_weights(job.detector.config, "language"), schemes, factored)


def _existing_build(job: Job, output: Path, replace: bool) -> Build | None:
    """The build at `output` if it is this job's; None if the place is free or may be made free."""
    if output.name in ("", ".."):
        raise BuildError(f"{output}: give the build a folder of its own, for example {output / 'my-build'}")
    if not output.exists() and not output.is_symlink():
        return None
    manifest = read_json_object(output / MANIFEST)
    if manifest is None or "plan_sha256" not in manifest:
        raise BuildError(f"{output}: already there and not a build, so it is left alone; choose another --output")
    try:
        build = open_build(output)
        if manifest["plan_sha256"] == job.key:
            return build
        reason = "is another build"
    except BuildError as error:
        reason = f"is a damaged build ({error})"
    if replace:
        return None
    raise BuildError(f"{output}: {reason}; choose another --output, or replace it with --replace")


def _prepare(work: Path, job: Job) -> None:
    """Keep finished stages of the same job; anything else there is of no use."""
    plan = read_json_object(work / _PLAN)
    if plan is None or plan.get("key") != job.key:
        shutil.rmtree(work, ignore_errors=True)
    (work / _CONTENT).mkdir(parents=True, exist_ok=True)
    for leftover in (work / _CONTENT).glob(".*"):
        leftover.unlink()
    write_json(work / _PLAN, {"key": job.key})


def _apply_passes(job: Job, work: Path, progress: Progress) -> tuple[Detector, list[dict[str, Any]]]:
    """The detector as the recipe makes it, and what each pass did."""
    detector = dataclasses.replace(
        job.detector,
        codes=SpooledCodes(work / _CODES),
        operand_scales=SpooledScales(work / _OPERANDS),
        savings=job.recipe.savings,
    )
    passes = []
    size = _PASSES_SHARE / max(1, len(job.recipe.passes))
    for index, each in enumerate(job.recipe.passes):
        share = part_of(progress, index * size, size)
        passes.append({pass_name(each): dict(each.apply(detector, share, job.samples).notes)})
    return detector, passes


def _fill(job: Job, work: Path, detector: Detector, passes: list[dict[str, Any]], progress: Progress) -> dict[str, Any]:
    """Write everything but the manifest; the manifest's content."""
    content = work / _CONTENT
    write_prompts(detector, content)
    data: dict[str, Any] = {
        "format": FORMAT,
        "plan_sha256": job.key,
        **job.plan,
        "passes": passes,
        "input": input_facts(detector),
        "prompt": prompt_facts(detector),
        "thresholds": {"fake_probability": 0.5, "gate": 0.5 if detector.savings.gated_mask else 0.0, "mask_logit": 0.0},
        "self_test": _tolerances(passes, job.target),
        "stages": {stage: {"spec": detector.spec(stage).as_json()} for stage in job.recipe.stages()},
    }
    if job.recipe.explain:
        data["explain"] = write_explanation(detector, job.recipe.explain, source_folder(job.source), content)
    # Still being written, but complete enough for finished stages to feed the next ones.
    build = Build(content, Manifest(data), digest="")
    done = 0.0
    for stage, part in _stage_shares(detector, job.recipe.stages()).items():
        progress(f"export {stage}", _PASSES_SHARE + 0.85 * done)
        done += part
        data["stages"][stage] = build_stage(detector, job.target, stage, build, work / f"{stage}.json")
    progress("self-test", 0.95)
    write_arrays(content / SELF_TEST, expected_outputs(open_session(build), sample_image()))
    files = [path for path in sorted(content.iterdir()) if path.name != MANIFEST]
    data["files"] = {path.name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)} for path in files}
    return data


def _tolerances(passes: list[dict[str, Any]], target: Target) -> dict[str, float]:
    """Of the self-test, by the coarsest codes that passes have noted, and by what the rest is computed in."""
    schemes = {scheme for each in passes for notes in each.values() for scheme in notes.get("quantized", {}).values()}
    if any(scheme.startswith("fp8") for scheme in schemes):
        return _FLOATING
    return _QUANTIZED if schemes or target.compute_here != "float32" else _EXACT


def _stage_shares(detector: Detector, stages: tuple[str, ...]) -> dict[str, float]:
    """The share of the work that each stage is: that of its parameters, so that the time left is foreseen."""
    sizes = {
        stage: sum(math.prod(shape) for shape in parameter_shapes(detector.config, stage).values()) for stage in stages
    }
    return {stage: size / sum(sizes.values()) for stage, size in sizes.items()}


def build_bytes(build: Build) -> int:
    """Everything in the folder, the manifest included."""
    return sum(path.stat().st_size for path in build.folder.iterdir())
