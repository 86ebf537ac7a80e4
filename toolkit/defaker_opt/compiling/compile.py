"""Stage by stage: an engine that is built, right and not slower, or the next wider form of the stage, and why."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from defaker_opt.compiling import Built, EngineJob
from defaker_opt.compiling.check import (
    compare_verdicts,
    judge_picture,
    milliseconds,
    tolerance,
    worst_difference,
)
from defaker_opt.compiling.relax import Wide, product_kinds, relax_graph
from defaker_opt.compiling.shapes import sizes_of, stage_ranges
from defaker_opt.errors import BuildError, write_failure
from defaker_opt.files import held, read_json_object, write_json
from defaker_opt.progress import Progress, part_named, part_of
from defaker_opt.runtime.backends import OpenStage
from defaker_opt.runtime.build import Build, file_sha256
from defaker_opt.runtime.cuda import Gpu
from defaker_opt.runtime.engines import RECORD, engines_folder
from defaker_opt.runtime.recording import Call, RecordingSession
from defaker_opt.runtime.self_test import SelfTest, run_self_test
from defaker_opt.runtime.session import open_session
from defaker_opt.runtime.spec import StageSpec

AS_BUILT = "as built"

# Finished stages, which nothing else reads; the folder that engines in the making lie in.
PARTIAL = ".engines.partial.json"
_WORK, _TIMING, _LOG = ".work", "timing.cache", "compile.log"

# A wider form has to take at most this share of the time of one with codes; less than that is noise.
_WORTH = 0.97


@dataclass(frozen=True)
class Hands:
    """What compiling is done with. tensorrt: its module's name and version; gpu: the one that will run the engines.

    open_session: a session that keeps its calls, of a build and the record of its engines, "" for its graphs.
    """

    tensorrt: str
    gpu: Gpu
    build_engine: Callable[[EngineJob, Progress], Built]
    open_engine: Callable[[Path, StageSpec], OpenStage]
    open_session: Callable[[Build, str], RecordingSession]


@dataclass(frozen=True)
class Settings:
    """workspace_mb: of the builder's kernels. never_slower: also time each stage without codes, and keep the faster."""

    workspace_mb: int
    never_slower: bool = False


@dataclass(frozen=True)
class Compiled:
    """record: what engines.json holds, which is there only if the self-test of the whole build passed."""

    folder: Path
    record: dict[str, Any]
    self_test: SelfTest


def compile_build(build: Build, settings: Settings, hands: Hands, progress: Progress) -> Compiled:
    """Make a build's engines; what an interrupted call finished is kept. Raises BuildError if a stage has none.

    Until all are there and have passed the build's self-test, the build runs as if there were none.
    """
    folder = engines_folder(build.folder)
    try:
        with held(folder, BuildError(f"{folder}: another process is compiling this build; wait for it")):
            record = _begin(folder, build, settings, hands)
            progress("run the graphs", 0.0)
            graphs = hands.open_session(build, "")
            reference = judge_picture(graphs)
            graphs.close()
            stages = list(build.manifest.data["stages"])
            for index, stage in enumerate(stages):
                share = part_of(progress, 0.05 + 0.9 * index / len(stages), 0.9 / len(stages))
                if not _is_finished(folder, record["stages"].get(stage)):
                    calls = [call for call in graphs.calls if call.stage == stage]
                    record["stages"][stage] = _compile_stage(build, stage, calls, settings, hands, share)
                    write_json(folder / PARTIAL, record)
            progress("self-test", 0.96)
            engines = hands.open_session(build, PARTIAL)
            ours = judge_picture(engines)
            record["agreement"] = compare_verdicts(ours, reference, engines.calls, graphs.calls)
            compiled = Compiled(folder, record, run_self_test(engines))
            (folder / PARTIAL).unlink()
            if compiled.self_test.passed:
                write_json(folder / RECORD, record)
    except OSError as error:
        raise write_failure(folder, error) from error
    progress("done", 1.0)
    return compiled


def _begin(folder: Path, build: Build, settings: Settings, hands: Hands) -> dict[str, Any]:
    """What is finished of the same engines, or nothing."""
    made: dict[str, Any] = {"build": build.digest, "tensorrt": hands.tensorrt, "gpu": vars(hands.gpu)}
    made["never_slower"] = settings.never_slower
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder / _WORK, ignore_errors=True)
    found = read_json_object(folder / PARTIAL) or read_json_object(folder / RECORD) or {}
    if any(found.get(key) != value for key, value in made.items()):
        for leftover in (*folder.glob("*.engine"), folder / _TIMING):
            leftover.unlink(missing_ok=True)
        found = {**made, "stages": {}}
    write_json(folder / PARTIAL, found)
    (folder / RECORD).unlink(missing_ok=True)
    return found


def _is_finished(folder: Path, entry: dict[str, Any] | None) -> bool:
    if entry is None or not (folder / entry["file"]).is_file():
        return False
    return file_sha256(folder / entry["file"]) == str(entry["sha256"])


def _compile_stage(
    build: Build, stage: str, calls: Sequence[Call], settings: Settings, hands: Hands, progress: Progress
) -> dict[str, Any]:
    """The first form of the stage that is built and right; or, if asked, the faster. Raises BuildError without one."""
    ranges = stage_ranges(sizes_of(open_session(build)), stage)
    folder = engines_folder(build.folder)
    work = folder / _WORK
    tried: list[dict[str, Any]] = []
    right: list[dict[str, Any]] = []
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    for precision, graph in _forms(build.folder / f"{stage}.onnx", work):
        what = f"build {stage}, {precision}"
        progress(what, 0.0)
        output, library = work / f"{precision}.engine", hands.tensorrt.partition(" ")[0]
        cache, log = folder / _TIMING, folder / _LOG
        job = EngineJob(graph, output, ranges, settings.workspace_mb, library, timing_cache=cache, log=log)
        entry = {"precision": precision, **_judged(build, stage, job, calls, hands, part_named(progress, what, 0, 0.9))}
        (tried if "why" in entry else right).append(entry)
        if right and not (settings.never_slower and precision == AS_BUILT):
            break
    if not right:
        reasons = "\n  ".join(f"{each['precision']}: {each['why']}" for each in tried)
        raise BuildError(f"{stage}: no engine of it works here; see {folder / _LOG}\n  {reasons}")
    best = min(right, key=lambda entry: entry["milliseconds"] * (_WORTH if entry["precision"] == AS_BUILT else 1.0))
    tried += [{**each, "why": _slower(each, best)} for each in right if each is not best]
    file = folder / f"{stage}.engine"
    (work / f"{best['precision']}.engine").replace(file)
    shutil.rmtree(work, ignore_errors=True)
    return {**best, "file": file.name, "sha256": file_sha256(file), "tried": tried}


def _forms(graph: Path, work: Path) -> Iterator[tuple[str, Path]]:
    """The stage as it was built, then without its codes."""
    yield AS_BUILT, graph
    wides: tuple[Wide, ...] = ("float16", "float32") if product_kinds(graph) else ()
    for wide in wides:
        folder = work / wide
        folder.mkdir()
        yield wide, relax_graph(graph, folder, wide)


def _judged(
    build: Build, stage: str, job: EngineJob, calls: Sequence[Call], hands: Hands, progress: Progress
) -> dict[str, Any]:
    """Facts of an engine, with the reason if it cannot be used: refused, wrong, or a builder or GPU that gave up."""
    try:
        built = hands.build_engine(job, progress)
        facts: dict[str, Any] = {**dataclasses.asdict(built), "refused": list(built.refused)}
        if built.refused:
            return {**facts, "why": f"TensorRT refused it: {built.refused[0]}"}
        assert job.output is not None
        engine = hands.open_engine(job.output, build.manifest.spec(stage))
        output, difference = worst_difference(engine, calls)
        allowed = tolerance(build, stage)
        if not math.isfinite(difference):
            return {**facts, "why": f"{output} is not a finite number"}
        facts |= {"difference": difference, "milliseconds": milliseconds(engine, calls)}
    except BuildError as error:
        return {"why": str(error)}
    if difference > allowed:
        return {**facts, "why": f"{output} is {difference:.1%} away from ONNX Runtime, where {allowed:.1%} is allowed"}
    return facts


def _slower(each: dict[str, Any], best: dict[str, Any]) -> str:
    return f"{each['milliseconds']:.2f} ms, and {best['precision']} {best['milliseconds']:.2f} ms"
