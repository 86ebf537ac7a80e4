"""Whether TensorRT reads the graphs of a full-size detector, and how large its engines are, without a GPU.

Shapes and types are asked, not results: weights are random, rounded to nearest, and static ranges are about 1. Stages
are written one after another and removed. `compile --check` does the same for a build that is there.

    python profiling/engine_gate.py --source defakerone-2b:random --recipes jetson-int8,jetson-int4,datacenter-fp8
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from defaker_opt.cli.progress import progress_bar
from defaker_opt.compiling import EngineJob
from defaker_opt.compiling.child import build_engine
from defaker_opt.compiling.gate import CAPABILITIES, LIBRARY, WORDS
from defaker_opt.compiling.shapes import Sizes, stage_ranges
from defaker_opt.detector import Detector, linear_weights, load_detector, write_source
from defaker_opt.graph.accepted import check_accepted
from defaker_opt.graph.export import export_stage
from defaker_opt.graph.write import write_graph
from defaker_opt.methods import parse_scheme
from defaker_opt.methods.round_to_nearest import RoundToNearest
from defaker_opt.planning.engines import engine_bytes
from defaker_opt.planning.forecast import predict_sizes
from defaker_opt.progress import Progress
from defaker_opt.recipe import Recipe, load_recipe
from defaker_opt.runtime.spec import STAGES
from defaker_opt.spool import SpooledCodes
from defaker_opt.stage_build import fill_stage_
from defaker_opt.target import Target, load_target

WORKSPACE_MB = 1024


def sizes_for(detector: Detector, target: Target) -> Sizes:
    """What `compiling.shapes.sizes_of` reads off a build, before there is one."""
    config, prompt = detector.config, detector.config.prompt
    assert prompt is not None
    tiles, shared = config.tiling.max_tiles, prompt.shared()
    return Sizes(
        tiles=tiles + (tiles > 1),
        tokens_per_tile=(config.tiling.tile_size // config.vision.patch_size // config.vision.shuffle) ** 2,
        tiles_at_once=target.session.tiles,
        tokens_at_once=target.session.tokens,
        before=len(prompt.before),
        shared=shared,
        question=max(len(prompt.verdict), len(prompt.mask)) - shared,
    )


def write_stage(detector: Detector, target: Target, schemes: dict[str, str], stage: str, folder: Path) -> Path:
    """A stage's graph with codes, which says nothing of pictures."""
    for place, name in enumerate(linear_weights(detector.config, stage)):
        scheme = parse_scheme(schemes[name])
        if scheme is not None:
            codes = RoundToNearest().quantize(detector.weights.read(name).float().numpy(), scheme)
            # Each another, as pictures would have it: with one for all, blocks would share kernels.
            step = (1 + place / 1024) / scheme.largest_code if scheme.activations == "static" else None
            detector.codes[name] = dataclasses.replace(codes, input_scale=step)
    graph = export_stage(detector, stage)
    fill_stage_(graph, detector, target)
    path = write_graph(graph, folder)[0]
    assert target.graph is not None
    check_accepted(path, target.graph, target.name)
    return path


def gate(recipe: Recipe, source: str, capability: str, progress: Progress) -> Iterator[dict[str, Any]]:
    """Write every stage, build its engine, and remove both."""
    target, plain = load_target(recipe.target), load_detector(source)
    checked = [each.check(plain.config, target) for each in recipe.passes]
    schemes = {name: scheme for preview in checked for name, scheme in preview.schemes.items()}
    predicted = engine_bytes(plain.config, predict_sizes(plain, schemes, recipe).stages)
    sizes = sizes_for(plain, target)
    for place, stage in enumerate(STAGES):
        with tempfile.TemporaryDirectory() as work:
            progress(f"{recipe.name}: write {stage}", place / len(STAGES))
            detector = dataclasses.replace(plain, codes=SpooledCodes(Path(work) / "codes"), savings=recipe.savings)
            path = write_stage(detector, target, schemes, stage, Path(work))
            progress(f"{recipe.name}: build {stage}", (place + 0.5) / len(STAGES))
            job = EngineJob(path, None, stage_ranges(sizes, stage), WORKSPACE_MB, LIBRARY, capability)
            built = build_engine(job, lambda what, share: None)
            written = sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*"))
        facts = {"recipe": recipe.name, "stage": stage, "capability": capability, "predicted": predicted[stage]}
        yield {**facts, "written": written, **vars(built), "refused": list(built.refused)}


def show(rows: list[dict[str, Any]], source: str) -> None:
    """The table for people."""
    table = Table("recipe", "stage", "GPU", "predicted MB", "graph MB", "engine MB", "seconds", "answer", title=source)
    for row in rows:
        sizes = (f"{row[name] / 1e6:.1f}" for name in ("predicted", "written", "bytes"))
        answer = row["refused"][0] if row["refused"] else "built"
        table.add_row(row["recipe"], row["stage"], row["capability"], *sizes, f"{row['seconds']:.0f}", answer)
    Console().print(table)
    print(WORDS)


def main() -> int:
    """Ask for all recipes; exit code 1 if any graph is refused."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="reference")
    parser.add_argument("--recipes", default="jetson-int8,jetson-int4,datacenter-int8,datacenter-fp8")
    parser.add_argument("--capability", choices=CAPABILITIES, default="SM89")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with progress_bar() as progress:
        write_source(arguments.source, lambda part, total: progress("draw weights", part / total))
        for name in arguments.recipes.split(","):
            rows += gate(load_recipe(name), arguments.source, arguments.capability, progress)
    show(rows, arguments.source)
    machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    command = f"python profiling/engine_gate.py --source {arguments.source} --recipes {arguments.recipes}"
    print(json.dumps({"command": command, "rows": rows, "machine": machine, "note": WORDS}))
    return int(any(row["refused"] for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
