"""Safetensors written block by block: no more of a tensor is in memory than the block that is being written.

The format (8 bytes of header length, a JSON header, the tensors' bytes end to end) is that of
https://github.com/safetensors/safetensors#format; safetensors' own writer wants all tensors of a file at once.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

SHARD_BYTES = 1 << 30

# In pieces of this size a tensor goes to disk, so that progress moves within it.
BLOCK_BYTES = 1 << 25

# The types that weights come in, by safetensors' names for them.
DTYPES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}

_NAMES = {**DTYPES, torch.int32: "I32"}

# Gives a tensor's values in order, cut into any blocks along its first axis.
Blocks = Callable[[str], Iterator[torch.Tensor]]
BytesDone = Callable[[int, int], None]


@dataclass(frozen=True)
class Entry:
    """What is known of a tensor before it is there."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Its size on disk."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_shards(folder: Path, entries: Sequence[Entry], blocks: Blocks, progress: BytesDone, shard_bytes: int) -> int:
    """Write tensors into one file, or shards with an index; bytes in all.

    A shard gets its name when it is whole, and one that is there already is kept: call again to go on where an earlier
    call was stopped, with the same entries and blocks. Raises OSError.
    """
    shards = list(_divided(entries, shard_bytes))
    total = sum(entry.bytes for entry in entries)
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total)

    places: dict[str, str] = {}
    for index, shard in enumerate(shards):
        single = len(shards) == 1
        file = "model.safetensors" if single else f"model-{index + 1:05}-of-{len(shards):05}.safetensors"
        places.update({entry.name: file for entry in shard})
        if (folder / file).is_file():
            advance(sum(entry.bytes for entry in shard))
        else:
            _write_shard(folder / file, shard, blocks, advance)
    if len(shards) > 1:
        index_text = json.dumps({"metadata": {"total_size": total}, "weight_map": places}, indent=1)
        (folder / "model.safetensors.index.json").write_text(index_text + "\n", encoding="utf-8")
    return total


def _divided(entries: Sequence[Entry], shard_bytes: int) -> Iterator[list[Entry]]:
    shard: list[Entry] = []
    for entry in entries:
        if shard and sum(each.bytes for each in shard) + entry.bytes > shard_bytes:
            yield shard
            shard = []
        shard.append(entry)
    yield shard


def _write_shard(path: Path, entries: Sequence[Entry], blocks: Blocks, advance: Callable[[int], None]) -> None:
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as stream:
        stream.write(_header(entries))
        for entry in entries:
            written = 0
            for block in blocks(entry.name):
                assert block.dtype == entry.dtype, entry.name
                raw = memoryview(block.contiguous().reshape(-1).view(torch.uint8).numpy().data)
                for start in range(0, len(raw), BLOCK_BYTES):
                    advance(stream.write(raw[start : start + BLOCK_BYTES]))
                written += len(raw)
            assert written == entry.bytes, entry.name
    os.replace(partial, path)


def _header(entries: Sequence[Entry]) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in entries:
        place = [offset, offset + entry.bytes]
        header[entry.name] = {"dtype": _NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": place}
        offset += entry.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text
