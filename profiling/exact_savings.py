"""Each exact saving off against all of them on, picture by picture: verdicts that flip, probabilities and mask pixels.

    python profiling/exact_savings.py [--suite embedded] [--suite TABLE.csv]... [--source reference] [--limit N]

Two builds are made, `float32` with every saving and `plain` with none; a switch alone is the first with the files of
the second that it needs. Every picture gets its mask, whatever the verdict, but in the row of the gate. What is judged
is kept in --work, and a rerun goes on. The last line is one JSON object; the exit code is 1 if a verdict flipped.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from defaker_opt.benchmarks import Item
from defaker_opt.benchmarks.read import read_image
from defaker_opt.drift.suites import load_suite
from defaker_opt.errors import DefakerError
from defaker_opt.files import default_cache_folder
from defaker_opt.runtime import Build, Manifest, Session, Verdict, open_build, open_session
from defaker_opt.runtime import session as session_module

EVERY, PLAIN = "float32", "plain"

# What a build without one saving has that the build with all of them lacks, as files of `plain`.
HEAD = ("vocabulary_head.onnx", "vocabulary_head.onnx.data")
TABLE = ("embeddings.npy",)
GRAPH = ("language.onnx", "language.onnx.data")


@dataclass(frozen=True)
class Variant:
    """What differs from all savings on.

    off: switches. files: those taken from `plain`. gate: None for the build's own. cores: how many the runtime wants
    before it runs two stages at once.
    """

    name: str
    off: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    gate: float | None = 0.0
    cores: int = 1 << 30


VARIANTS = (
    Variant("verdict_head", ("verdict_head",), HEAD),
    Variant("prompt_embeddings", ("prompt_embeddings",), TABLE),
    Variant("shared_prefix", ("shared_prefix",)),
    # Decoding takes the whole vocabulary, so it is off with the two above.
    Variant("appended_answer", ("appended_answer", "verdict_head", "prompt_embeddings"), HEAD + TABLE),
    Variant("last_layer_rows", ("last_layer_rows",), GRAPH),
    Variant("no_padding", ("no_padding",)),
    Variant("identical_tiles", ("identical_tiles",)),
    # These two are on here, and off in what all are compared with.
    Variant("gated_mask", gate=None),
    Variant("concurrent_mask_encoder", cores=1),
)


def make(recipe: str, source: str, work: Path) -> Path:
    output = work / recipe
    if not output.is_dir():
        command = [sys.executable, "-m", "defaker_opt", "quantize", "--recipe", recipe, "--source", source]
        subprocess.run([*command, "--output", str(output)], check=True)  # noqa: S603 - our own
    return output


def compose(variant: Variant, work: Path) -> Build:
    """The build with every saving but those that are off; both builds were verified when they were opened."""
    every, plain = (open_build(work / name) for name in (EVERY, PLAIN))
    folder = work / "variants" / f"{variant.name}-{os.getpid()}"
    folder.mkdir(parents=True, exist_ok=True)
    for source in (every, plain):
        for path in source.folder.iterdir():
            if source is every or path.name in variant.files:
                (folder / path.name).unlink(missing_ok=True)
                os.link(path, folder / path.name)
    data = copy.deepcopy(dict(every.manifest.data))
    data["recipe"]["savings"].update(dict.fromkeys(variant.off, False))
    data["stages"] = {**plain.manifest.data["stages"], **data["stages"]}
    return Build(folder, Manifest(data), digest="")


@functools.lru_cache(maxsize=1)
def sessions(work: Path) -> tuple[Session, dict[str, Session]]:
    """Everything this process runs, opened once: all savings on, and each variant."""
    opened = {variant.name: open_session(compose(variant, work), threads=1) for variant in VARIANTS}
    opened[PLAIN] = open_session(open_build(work / PLAIN), threads=1)
    return open_session(open_build(work / EVERY), threads=1), opened


def differences(expected: Verdict, got: Verdict) -> dict[str, Any]:
    assert expected.mask is not None
    pixels = int((got.mask != expected.mask).sum()) if got.mask is not None else 0
    return {
        "flipped": got.is_fake != expected.is_fake,
        "probability": abs(got.fake_probability - expected.fake_probability),
        "pixels": pixels,
        "held_back": got.mask is None,
        "held_back_of_a_fake": got.mask is None and got.is_fake,
    }


def judge(job: tuple[str, Item, Path]) -> dict[str, Any]:
    """One picture through everything."""
    suite, item, work = job
    every, others = sessions(work)
    image = read_image(item)
    cores = session_module._CORES_FOR_TWO
    by_name = {variant.name: variant for variant in VARIANTS}
    rows = {}
    session_module._CORES_FOR_TWO = 1 << 30
    expected = every.judge(image, gate=0.0)
    for name, session in others.items():
        variant = by_name.get(name, Variant(name))
        session_module._CORES_FOR_TWO = variant.cores
        rows[name] = differences(expected, session.judge(image, gate=variant.gate))
    session_module._CORES_FOR_TWO = cores
    return {"suite": suite, "key": item.key, "pixels": image.width * image.height, "rows": rows}


def judged(jobs: list[tuple[str, Item, Path]], rows: Path, workers: int) -> list[dict[str, Any]]:
    """Rows of all jobs, from the file if they are there."""
    lines = rows.read_text(encoding="utf-8").splitlines() if rows.is_file() else []
    known = {(row["suite"], row["key"]): row for row in map(json.loads, lines)}
    missing = [job for job in jobs if (job[0], job[1].key) not in known]
    context = multiprocessing.get_context("spawn")
    with context.Pool(workers) as pool, rows.open("a", encoding="utf-8") as stream:
        for count, row in enumerate(pool.imap_unordered(judge, missing), 1):
            known[row["suite"], row["key"]] = row
            stream.write(json.dumps(row) + "\n")
            stream.flush()
            if count % 50 == 0:
                print(f"{count} of {len(missing)} pictures", file=sys.stderr)
    return [known[suite, item.key] for suite, item, _ in jobs]


def summaries(rows: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    for name in (*(variant.name for variant in VARIANTS), PLAIN):
        mine = [row["rows"][name] for row in rows]
        yield (
            name,
            {
                "pictures": len(mine),
                "flips": sum(row["flipped"] for row in mine),
                "largest_probability_difference": max(row["probability"] for row in mine),
                "mask_pixels_that_differ": sum(row["pixels"] for row in mine),
                "pictures_whose_mask_differs": sum(row["pixels"] > 0 for row in mine),
                "masks_held_back": sum(row["held_back"] for row in mine),
                "masks_held_back_of_fakes": sum(row["held_back_of_a_fake"] for row in mine),
            },
        )


def show(title: str, results: dict[str, dict[str, Any]]) -> None:
    table = Table(title=title)
    for column in ("switch", "flips", "largest Δp", "mask pixels off", "masks off", "held back", "held back of fakes"):
        table.add_column(column, justify="left" if column == "switch" else "right")
    for name, row in results.items():
        table.add_row(
            "all off (plain)" if name == PLAIN else name,
            str(row["flips"]),
            f"{row['largest_probability_difference']:.1e}",
            str(row["mask_pixels_that_differ"]),
            str(row["pictures_whose_mask_differs"]),
            str(row["masks_held_back"]),
            str(row["masks_held_back_of_fakes"]),
        )
    Console(width=120, file=sys.stdout).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suite", action="append", help="as validate's; embedded unless given")
    parser.add_argument("--data", type=Path, help="where the paths of tables begin")
    parser.add_argument("--source", default="reference")
    parser.add_argument("--limit", type=int, default=0, help="pictures of each suite, evenly spread; 0 for all")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--work", type=Path, default=Path("exported") / "exact-savings")
    arguments = parser.parse_args()
    builds = [open_build(make(recipe, arguments.source, arguments.work)) for recipe in (EVERY, PLAIN)]
    results = {}
    for name in arguments.suite or ["embedded"]:
        try:
            suite = load_suite(name, arguments.data, default_cache_folder(), lambda what, fraction: None)
        except DefakerError as error:
            raise SystemExit(f"error: {error}") from error
        step = max(1, -(-len(suite.items) // arguments.limit)) if arguments.limit else 1
        # Views of mappings cannot be sent to another process.
        items = (dataclasses.replace(item, slices={}) for item in suite.items[::step])
        jobs = [(suite.name, item, arguments.work) for item in items]
        rows = arguments.work / f"rows-{'-'.join(build.digest[:12] for build in builds)}.jsonl"
        results[suite.name] = dict(summaries(judged(jobs, rows, arguments.workers)))
        show(f"{suite.name}: {len(jobs)} pictures, each switch off against all on", results[suite.name])
    versions = {name: __import__(name).__version__ for name in ("onnxruntime", "numpy")}
    digests = {name: build.digest for name, build in zip((EVERY, PLAIN), builds)}
    print(json.dumps({"suites": results, "builds": digests, "versions": versions, "cores": os.cpu_count()}))
    if any(row["flips"] or row["masks_held_back_of_fakes"] for suite in results.values() for row in suite.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
