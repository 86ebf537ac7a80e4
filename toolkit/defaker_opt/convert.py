"""Turn a released checkpoint into a detector folder: every tensor accounted for, one in memory at a time."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from defaker_opt.catalog import find_module, module_names
from defaker_opt.checkpoint import NO_EXTRAS, Extras, Tensors, gptq, lora, tensors_of
from defaker_opt.checkpoint.segmenter import ORIGINAL, open_segmenter
from defaker_opt.detector import stored_shapes
from defaker_opt.errors import SourceError, one_of, write_failure
from defaker_opt.files import read_json_object, write_json
from defaker_opt.shards import DTYPES, SHARD_BYTES, BytesDone, Entry, write_shards
from defaker_opt.sources import Checkpoint, Plan, Source
from defaker_opt.sources._vocabulary import TOKENIZER_FILES
from defaker_opt.weights import DrawnWeights, open_weights

# Facts a released folder does not state may be given in a JSON file beside its config.json, with this ending.
_FACTS = "_meta.json"

_SEED = 0
# Beside unfinished shards: what they are shards of.
_JOB = "job.json"


@dataclass(frozen=True)
class Conversion:
    """What became of the checkpoint's tensors."""

    folder: Path
    used: int
    folded: Mapping[str, str]
    ignored: Mapping[str, str]
    drawn: tuple[str, ...]
    notes: tuple[str, ...]
    bytes: int


def convert(
    checkpoint: Path,
    output: Path,
    progress: BytesDone = lambda done, total: None,
    extras: Extras = NO_EXTRAS,
) -> Conversion:
    """Write a detector folder. `progress` is called with bytes done and in all.

    Raises SourceError naming every tensor that is missing, unexpected or of another shape; then nothing is written.
    A call that was killed leaves its finished shards in a hidden folder, where the same call goes on.
    """
    if output.exists():
        raise SourceError(f"{output}: already exists; choose another output folder or remove it")
    weights = open_tensors(checkpoint, extras)
    plan = plan_conversion(checkpoint, weights, extras)
    partial = output.with_name(f".{output.name}.partial")
    try:
        _prepare(partial, _job(checkpoint, extras, plan))
        written = _write_weights(plan, weights, partial, progress)
        (partial / "config.json").write_text(plan.config.as_json(), encoding="utf-8")
        for name in TOKENIZER_FILES:
            if (checkpoint / name).is_file():
                shutil.copyfile(checkpoint / name, partial / name)
        (partial / _JOB).unlink()
        os.replace(partial, output)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise write_failure(output, error) from error
    folded = {name: take.how for name, take in plan.takes.items() if take.how}
    used = len({take.source for take in plan.takes.values()})
    notes = (*weights.notes, *plan.notes)
    return Conversion(output, used, folded, plan.ignored, tuple(sorted(plan.drawn)), notes, written)


def open_tensors(checkpoint: Path, extras: Extras = NO_EXTRAS) -> Tensors:
    """All tensors of a checkpoint folder, with its segmenter and its adapters. Raises SourceError."""
    if not checkpoint.is_dir():
        raise SourceError(f"{checkpoint}: no such folder; give the folder that holds config.json and safetensors")
    config = _read_config(checkpoint)
    stored = gptq.unpacked(checkpoint, tensors_of(open_weights(checkpoint)), config)
    tensors = lora.unwrap(checkpoint, stored, config, _read_facts(checkpoint))
    if extras.segmenter is not None:
        if any(name.startswith(ORIGINAL) for name in tensors.places):
            raise SourceError(f"{checkpoint}: has a segmenter of its own; convert it without --segmenter")
        segmenter = open_segmenter(extras.segmenter)
        tensors = Tensors({**tensors.places, **segmenter.places}, (*tensors.notes, *segmenter.notes))
    for adapter in extras.adapters:
        tensors = lora.merge_folder(tensors, adapter)
    return tensors


def plan_conversion(checkpoint: Path, weights: Tensors, extras: Extras = NO_EXTRAS) -> Plan:
    """Find the family of a checkpoint and account for every tensor of it, by name and shape; no weight is read."""
    config, shapes = _read_config(checkpoint), weights.shapes()
    plan = _find_source(checkpoint, config).plan(
        Checkpoint(checkpoint, config, _read_facts(checkpoint), shapes, extras.prompts)
    )
    expected = stored_shapes(plan.config)
    there = set(plan.takes) | set(plan.drawn)
    missing = [f"{name}: {list(expected[name])}, missing" for name in sorted(set(expected) - there)]
    extra = [f"{plan.takes[name].source}: unexpected (as {name})" for name in sorted(set(plan.takes) - set(expected))]
    wrong = [
        f"{plan.takes[name].source}: {list(got)} gives {name}, which must be {list(expected[name])}"
        for name, got in _made_shapes(plan, shapes)
        if name in expected and got != expected[name]
    ]
    if missing or extra or wrong:
        raise SourceError(
            f"{checkpoint}: its tensors do not fit its config.json:\n  " + "\n  ".join(missing + extra + wrong)
        )
    return plan


def _read_config(checkpoint: Path) -> dict[str, Any]:
    config = read_json_object(checkpoint / "config.json")
    if config is None:
        raise SourceError(f"{checkpoint}/config.json: missing or not a JSON object; copy the checkpoint again")
    return config


def _read_facts(checkpoint: Path) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    for path in sorted(checkpoint.glob(f"*{_FACTS}")):
        found = read_json_object(path)
        if found is None:
            raise SourceError(f"{path}: not a JSON object; mend or remove it")
        facts.update(found)
    return facts


def _made_shapes(plan: Plan, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, tuple[int, ...]]]:
    for name, take in plan.takes.items():
        source = torch.empty(shapes[take.source], device="meta")
        try:
            yield name, tuple((take.change(source) if take.change else source).shape)
        except (RuntimeError, IndexError):  # the tensor cannot even be reshaped; its own shape says what is wrong
            yield name, shapes[take.source]


def _find_source(checkpoint: Path, config: Mapping[str, Any]) -> Source:
    files: dict[str, Any] = {}
    for name in module_names("sources"):
        file = find_module("sources", name)
        files[file.MODEL_TYPE] = file
    kind = config.get("model_type")
    if kind not in files:
        raise SourceError(f"{checkpoint}/config.json: model_type {one_of(kind, files)}; only these can be converted")
    found: Source = files[str(kind)]
    return found


def _job(checkpoint: Path, extras: Extras, plan: Plan) -> dict[str, Any]:
    """What decides the bytes of the shards: the files as they are now, the plan, and our own code's version."""
    files = [path for path in checkpoint.iterdir() if path.is_file()]
    files += [path for folder in extras.adapters for path in folder.iterdir() if path.is_file()]
    files += [path for path in (extras.segmenter, extras.prompts) if path is not None and path.is_file()]
    if extras.segmenter is not None and extras.segmenter.is_dir():
        files += [path for path in extras.segmenter.iterdir() if path.is_file()]
    facts = sorted((str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files)
    takes = sorted((name, take.source, take.how) for name, take in plan.takes.items())
    code = [path.read_bytes() for path in sorted(Path(__file__).parent.rglob("*.py"))]
    parts = [json.dumps([facts, takes, SHARD_BYTES]), plan.config.as_json(), hashlib.sha256(b"".join(code)).hexdigest()]
    return {"key": hashlib.sha256("\n".join(parts).encode()).hexdigest()}


def _prepare(partial: Path, job: Mapping[str, Any]) -> None:
    """Keep finished shards of the same job; anything else there is of no use."""
    if read_json_object(partial / _JOB) != job:
        shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True, exist_ok=True)
    write_json(partial / _JOB, job)


def _write_weights(plan: Plan, weights: Tensors, folder: Path, progress: BytesDone) -> int:
    drawn = DrawnWeights(plan.drawn, _SEED)
    shapes = stored_shapes(plan.config)
    entries = [Entry(name, _dtype(plan, weights, name), shapes[name]) for name in sorted(shapes)]

    def blocks(name: str) -> Iterator[torch.Tensor]:
        if name in plan.drawn:
            yield drawn.read(name).to(torch.float16)  # what is drawn is exact in it
            return
        take = plan.takes[name]
        tensor = weights.read(take.source)
        yield take.change(tensor) if take.change else tensor

    return write_shards(folder, entries, blocks, progress, SHARD_BYTES)


def _dtype(plan: Plan, weights: Tensors, name: str) -> torch.dtype:
    """The type a tensor is kept in: that of the checkpoint. Raises SourceError."""
    if name in plan.drawn:
        return torch.float16
    source = plan.takes[name].source
    dtype = weights.dtype(source)
    if dtype not in DTYPES:
        known = ", ".join(str(each).removeprefix("torch.") for each in DTYPES)
        raise SourceError(f"{source}: is {str(dtype).removeprefix('torch.')}; only {known} are converted")
    return dtype
