"""Rows of one build on disk, found by what decides them, so that neither a second run nor a killed one judges twice.

    <cache>/rows/<name>.rows     a line of JSON that says whose rows these are, then records, only ever appended:
                                 head (digest [16], length, CRC-32 of digest and payload), payload (JSON, deflated)

A record that is cut short or damaged ends what can be read; it and what follows is dropped, and judged again.
"""

from __future__ import annotations

import base64
import dataclasses
import fcntl
import hashlib
import json
import os
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal

from defaker_opt.drift.rows import ImageRow, MaskFacts, TruthCounts
from defaker_opt.errors import DefakerError, write_failure

_DIGEST_BYTES = 16
_HEAD = struct.Struct(f"<{_DIGEST_BYTES}sII")


@dataclass
class RowCache:
    """The rows of one owner. `places`: digest → where its record begins; the rows themselves stay on disk."""

    path: Path
    places: dict[bytes, int] = field(repr=False)
    end: int

    def __contains__(self, digest: bytes) -> bool:
        return digest[:_DIGEST_BYTES] in self.places

    def append_(self, digest: bytes, row: ImageRow) -> None:
        """Keep a row. Raises DefakerError if it cannot be written; then nothing of it is found later."""
        payload = zlib.compress(json.dumps(_as_json(row)).encode(), 6)
        short = digest[:_DIGEST_BYTES]
        record = _HEAD.pack(short, len(payload), zlib.crc32(short + payload)) + payload
        try:
            with _locked(self.path) as stream:
                # Another process may have added rows meanwhile, or been killed while it did.
                self._catch_up(stream)
                stream.seek(self.end)
                stream.truncate()
                stream.write(record)
        except OSError as error:
            raise write_failure(self.path, error) from error
        self.places[short] = self.end
        self.end += len(record)

    def read(self, digest: bytes, key: str, label: Literal[0, 1]) -> ImageRow:
        """A kept row, as one of the item that has this key and label. Raises DefakerError if it was damaged since."""
        with self.path.open("rb") as stream:
            stream.seek(self.places[digest[:_DIGEST_BYTES]])
            record = _read_record(stream)
        if record is None or record[0] != digest[:_DIGEST_BYTES]:
            raise DefakerError(f"{self.path}: changed while it was read; run again, what was damaged is judged anew")
        return _from_json(json.loads(zlib.decompress(record[1])), key, label)

    def _catch_up(self, stream: BinaryIO) -> None:
        stream.seek(self.end)
        for place, short in _records(stream):
            self.places[short] = place
            self.end = stream.tell()


def open_cache(folder: Path, owner: Mapping[str, Any]) -> RowCache:
    """The rows kept for an owner: everything beside the picture that decides a row (build, threads, versions).

    Raises DefakerError if the folder cannot be written.
    """
    head = json.dumps(owner, sort_keys=True).encode() + b"\n"
    path = folder / "rows" / f"{hashlib.sha256(head).hexdigest()[:24]}.rows"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path) as stream:
            if stream.read(len(head)) != head:
                stream.seek(0)
                stream.truncate()
                stream.write(head)
            cache = RowCache(path, {}, len(head))
            stream.seek(len(head))
            cache._catch_up(stream)
    except OSError as error:
        raise write_failure(path, error) from error
    return cache


def empty_cache(folder: Path, owner: Mapping[str, Any]) -> None:
    """Forget the rows of an owner; a run that reads them meanwhile ends with an error. Raises DefakerError."""
    cache = open_cache(folder, owner)
    try:
        with _locked(cache.path) as stream:
            stream.truncate(0)
    except OSError as error:
        raise write_failure(cache.path, error) from error


class _locked:  # noqa: N801 - reads as a verb in `with`
    """The file open for reading and writing, made if need be; only one process at a time."""

    def __init__(self, path: Path) -> None:
        self.stream = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+b")

    def __enter__(self) -> BinaryIO:
        fcntl.flock(self.stream, fcntl.LOCK_EX)
        return self.stream

    def __exit__(self, *_: object) -> None:
        self.stream.close()


def _records(stream: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Where each whole record begins, and its digest; the stream then stands behind that record."""
    place = stream.tell()
    while (record := _read_record(stream)) is not None:
        yield place, record[0]
        place = stream.tell()


def _read_record(stream: BinaryIO) -> tuple[bytes, bytes] | None:
    """Digest and payload of the record that begins here; None if it is not whole."""
    head = stream.read(_HEAD.size)
    if len(head) < _HEAD.size:
        return None
    short, length, checksum = _HEAD.unpack(head)
    payload = stream.read(length)
    if len(payload) < length or zlib.crc32(short + payload) != checksum:
        return None
    return short, payload


def _as_json(row: ImageRow) -> dict[str, Any]:
    """Everything but key and label, which belong to the item."""
    data = dataclasses.asdict(row)
    del data["key"], data["label"]
    data["latency_ms"] = dict(row.latency_ms)
    data["mask"]["packed"] = base64.b64encode(row.mask.packed).decode()
    return data


def _from_json(data: dict[str, Any], key: str, label: Literal[0, 1]) -> ImageRow:
    mask = data.pop("mask")
    truth = mask.pop("truth")
    counts = truth and TruthCounts(**{**truth, **{name: tuple(truth[name]) for name in ("forged", "authentic")}})
    packed = base64.b64decode(mask.pop("packed"))
    logits = tuple(data.pop("verdict_logits"))
    facts = MaskFacts(**mask, packed=packed, truth=counts)
    return ImageRow(key=key, label=label, verdict_logits=logits, mask=facts, **data)
