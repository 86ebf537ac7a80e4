"""Stage by stage: an engine that is built, right and not slower, or the next wider form of the stage, and why."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from defaker_opt.compiling import Built, EngineJob, Ranges
from defaker_opt.compiling.check import Call, compare_verdicts, judge_picture, milliseconds, tolerance, worst_difference
from defaker_opt.compiling.relax import Wide, product_kinds, relax_graph
from defaker_opt.compiling.shapes import sizes_of, stage_ranges
from defaker_opt.errors import BuildError, write_failure
from defaker_opt.files import held, read_json_object, write_json
from defaker_opt.progress import Progress, part_named, part_of
from defaker_opt.runtime.backends import OpenStage
from defaker_opt.runtime.build import Build, file_sha256
from defaker_opt.runtime.cuda import Gpu
from defaker_opt.runtime.engines import RECORD, engines_folder
from defaker_opt.runtime.self_test import SelfTest, run_self_test
from defaker_opt.runtime.session import open_session
from defaker_opt.runtime.spec import StageSpec

AS_BUILT = "as built"

_PARTIAL, _TIMING, _LOG = ".engines.partial.json", "timing.cache", "compile.log"


@dataclass(frozen=True)
class Hands:
    """What compiling is done with. tensorrt: name and version; gpu: the one that will run the engines."""

    tensorrt: str
    gpu: Gpu
    build_engine: Callable[[EngineJob, Progress], Built]
    open_engine: Callable[[Path, StageSpec], OpenStage]


@dataclass(frozen=True)
class Settings:
    """workspace_mb: of the builder's kernels. never_slower: also time each stage without codes, and keep the faster."""

    workspace_mb: int
    never_slower: bool = False


@dataclass(frozen=True)
class Compiled:
    """record: what engines.json holds. self_test: of the whole build with its engines."""

    folder: Path
    record: dict[str, Any]
    self_test: SelfTest


def compile_build(build: Build, settings: Settings, hands: Hands, progress: Progress) -> Compiled:
    """Make a build's engines; what an interrupted call finished is kept. Raises BuildError if a stage has none."""
    folder = engines_folder(build.folder)
    try:
        with held(folder, BuildError(f"{folder}: another process is compiling this build; wait for it")):
            record = _begin(folder, build, settings, hands)
            progress("run the graphs", 0.0)
            reference, expected = judge_picture(build)
            stages = list(build.manifest.data["stages"])
            for index, stage in enumerate(stages):
                share = part_of(progress, 0.05 + 0.9 * index / len(stages), 0.9 / len(stages))
                if not _is_finished(folder, record["stages"].get(stage)):
                    calls = [call for call in expected if call.stage == stage]
                    record["stages"][stage] = _compile_stage(build, stage, calls, settings, hands, share)
                    write_json(folder / _PARTIAL, record)
            write_json(folder / RECORD, record)
            (folder / _PARTIAL).unlink(missing_ok=True)
            progress("self-test", 0.96)
            ours, calls = judge_picture(build)
            record["agreement"] = compare_verdicts(ours, reference, calls, expected)
            self_test = run_self_test(open_session(build))
            write_json(folder / RECORD, record)
    except OSError as error:
        raise write_failure(folder, error) from error
    progress("done", 1.0)
    return Compiled(folder, record, self_test)


def _begin(folder: Path, build: Build, settings: Settings, hands: Hands) -> dict[str, Any]:
    """What is finished of the same engines, or nothing. Until they are all there, the build runs without engines."""
    made = {"build": build.digest, "tensorrt": hands.tensorrt, "gpu": vars(hands.gpu), "settings": vars(settings)}
    folder.mkdir(parents=True, exist_ok=True)
    found = read_json_object(folder / _PARTIAL) or read_json_object(folder / RECORD)
    (folder / RECORD).unlink(missing_ok=True)
    if found and all(found.get(key) == value for key, value in made.items()):
        return found
    for leftover in folder.glob("*.engine"):
        leftover.unlink()
    return {**made, "stages": {}}


def _is_finished(folder: Path, entry: dict[str, Any] | None) -> bool:
    if entry is None or not (folder / entry["file"]).is_file():
        return False
    return file_sha256(folder / entry["file"]) == str(entry["sha256"])


def _compile_stage(
    build: Build, stage: str, calls: Sequence[Call], settings: Settings, hands: Hands, progress: Progress
) -> dict[str, Any]:
    """The first form of the stage that is built and right; or, if asked, the fastest. Raises BuildError without one."""
    spec, ranges = build.manifest.spec(stage), stage_ranges(sizes_of(open_session(build)), stage)
    folder = engines_folder(build.folder)
    tried: list[dict[str, Any]] = []
    right: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=folder) as work:
        for precision, graph in _forms(build.folder / f"{stage}.onnx", Path(work)):
            what = f"build {stage}, {precision}"
            progress(what, 0.0)
            job = _job(folder, graph, Path(work) / f"{precision}.engine", ranges, settings)
            built = hands.build_engine(job, part_named(progress, what, 0.0, 0.9))
            entry = _judged(build, spec, precision, job, built, calls, hands)
            (tried if "why" in entry else right).append(entry)
            if right and not (settings.never_slower and precision == AS_BUILT):
                break
        if not right:
            reasons = "\n  ".join(f"{each['precision']}: {each['why']}" for each in tried)
            raise BuildError(f"{stage}: no engine of it works here; see {folder / _LOG}\n  {reasons}")
        best = min(right, key=lambda entry: entry["milliseconds"])
        tried += [{**each, "why": _slower(each, best)} for each in right if each is not best]
        file = folder / f"{stage}.engine"
        (Path(work) / f"{best['precision']}.engine").replace(file)
    return {**best, "file": file.name, "sha256": file_sha256(file), "tried": tried}


def _forms(graph: Path, work: Path) -> Iterator[tuple[str, Path]]:
    """The stage as it was built, then without its codes."""
    yield AS_BUILT, graph
    wides: tuple[Wide, ...] = ("float16", "float32") if any(product_kinds(graph)) else ()
    for wide in wides:
        folder = work / wide
        folder.mkdir()
        yield wide, relax_graph(graph, folder, wide)


def _job(folder: Path, graph: Path, output: Path, ranges: tuple[Ranges, ...], settings: Settings) -> EngineJob:
    return EngineJob(graph, output, ranges, settings.workspace_mb, timing_cache=folder / _TIMING, log=folder / _LOG)


def _judged(
    build: Build, spec: StageSpec, precision: str, job: EngineJob, built: Built, calls: Sequence[Call], hands: Hands
) -> dict[str, Any]:
    """Facts of an engine, with the reason if it cannot be used."""
    facts: dict[str, Any] = {"precision": precision, **dataclasses.asdict(built)}
    facts["refused"] = list(built.refused)
    if built.refused:
        return {**facts, "why": f"TensorRT refused it: {built.refused[0]}"}
    assert job.output is not None
    engine = hands.open_engine(job.output, spec)
    output, difference = worst_difference(engine, calls)
    facts |= {"difference": difference, "milliseconds": milliseconds(engine, calls)}
    allowed = tolerance(build, spec.name)
    if difference > allowed:
        return {**facts, "why": f"{output} is {difference:.1%} away from ONNX Runtime, where {allowed:.1%} is allowed"}
    return facts


def _slower(each: dict[str, Any], best: dict[str, Any]) -> str:
    return f"{each['milliseconds']:.2f} ms, and {best['precision']} {best['milliseconds']:.2f} ms"
