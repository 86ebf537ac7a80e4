"""A preset's detector folder on disk: written once, tensor by tensor, by one process at a time."""

from __future__ import annotations

import os
from pathlib import Path

from defaker_opt.config import DetectorConfig
from defaker_opt.errors import SourceError, write_failure
from defaker_opt.files import held
from defaker_opt.presets.drawn import DTYPE, RandomWeights
from defaker_opt.shards import SHARD_BYTES, BytesDone, Entry, write_shards


def write_folder(folder: Path, config: DetectorConfig, weights: RandomWeights, progress: BytesDone) -> None:
    """Write a detector folder, or finish one that was begun; it gets its name when it is whole.

    Raises DefakerError if the disk is full or not writable, SourceError if another process is writing it.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    entries = [Entry(name, DTYPE, shape) for name, shape in sorted(weights.shapes().items())]
    busy = SourceError(f"{partial}: another process is writing this preset; wait for it")
    try:
        with held(partial, busy):
            if folder.is_dir():
                return
            partial.mkdir(parents=True, exist_ok=True)
            write_shards(partial, entries, weights.blocks, progress, SHARD_BYTES)
            (partial / "config.json").write_text(config.as_json(), encoding="utf-8")
            os.replace(partial, folder)
    except OSError as error:
        raise write_failure(folder, error) from error
