"""Pictures that lie within another file: an LMDB, a parquet table, a table with base64 in it.

How a Locator's `member` names one:  LMDB: the key.  .parquet: row/column.  .tsv: first byte+length/column.
"""

from __future__ import annotations

import base64
import binascii
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from defaker_opt.benchmarks import Locator
from defaker_opt.errors import SuiteError

# An LMDB must not be open twice in one process; pictures may be read by several threads.
_ONE_LMDB = threading.Lock()

_FIELD = re.compile(r'"((?:[^"]|"")*)"|([^\t]*)')


def read_bytes(locator: Locator) -> bytes:
    """The encoded picture. Raises SuiteError if it is not there."""
    where = f"{locator.path}, {locator.member}" if locator.member else str(locator.path)
    try:
        if not locator.member:
            return locator.path.read_bytes()
        if locator.path.suffix == ".parquet":
            return _read_parquet(locator)
        if locator.path.suffix == ".tsv":
            return _read_tsv(locator)
        return _read_lmdb(locator)
    except OSError as error:
        raise SuiteError(f"{where}: cannot be read ({error.strerror or error}); is the copy complete?") from error


@contextmanager
def open_lmdb(folder: Path) -> Iterator[Any]:
    """A read-only transaction. Raises SuiteError if the folder is no LMDB."""
    try:
        import lmdb
    except ModuleNotFoundError as error:
        raise _missing(folder, "lmdb") from error
    with _ONE_LMDB:
        try:
            with lmdb.open(str(folder), readonly=True, lock=False, create=False) as env, env.begin() as transaction:
                yield transaction
        except lmdb.Error as error:
            raise SuiteError(f"{folder}: cannot be read as an LMDB ({error}); is the copy complete?") from error


def _read_lmdb(locator: Locator) -> bytes:
    with open_lmdb(locator.path) as transaction:
        value: bytes | None = transaction.get(locator.member.encode())
    if value is None:
        raise SuiteError(f"{locator.path}: no entry {locator.member!r}; is the copy complete?")
    return value


@contextmanager
def open_parquet(path: Path) -> Iterator[Any]:
    """A pyarrow ParquetFile. Raises SuiteError if it is none, also if that shows while it is read."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise _missing(path, "pyarrow") from error
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            yield table
    except pyarrow.ArrowException as error:
        raise SuiteError(f"{path}: cannot be read as a parquet table ({error}); is the copy complete?") from error


def _read_parquet(locator: Locator) -> bytes:
    row_text, _, column = locator.member.partition("/")
    row = int(row_text)
    with open_parquet(locator.path) as table:
        for group in range(table.num_row_groups):
            count = table.metadata.row_group(group).num_rows
            if row < count:
                # One row at a time, so that what is held at once stays small.
                batches = table.iter_batches(batch_size=1, row_groups=[group], columns=[column])
                value = next(batch for index, batch in enumerate(batches) if index == row)[column][0].as_py()
                data = value.get("bytes") if isinstance(value, dict) else value
                if isinstance(data, bytes):
                    return data
                break
            row -= count
    raise SuiteError(f"{locator.path}: row {row_text} has no picture in column {column!r}; is it stored as bytes?")


def read_records(path: Path) -> Iterator[tuple[int, bytes]]:
    """The records of a tab-separated table with their first bytes; a quoted field may hold line ends."""
    with path.open("rb") as file:
        start, pending = 0, b""
        for line in file:
            pending += line
            if pending.count(b'"') % 2 == 0:
                yield start, pending
                start, pending = start + len(pending), b""
        if pending:
            yield start, pending


def split_record(record: bytes) -> list[str]:
    """The fields of one record. Raises ValueError if it is not UTF-8."""
    text = record.decode("utf-8-sig").rstrip("\r\n")
    fields, position = [], 0
    while position <= len(text):
        match = _FIELD.match(text, position)
        assert match
        fields.append(match[2] if match[1] is None else match[1].replace('""', '"'))
        position = match.end() + 1
    return fields


def _read_tsv(locator: Locator) -> bytes:
    place, _, column = locator.member.partition("/")
    start, _, length = place.partition("+")
    with locator.path.open("rb") as file:
        file.seek(int(start))
        record = file.read(int(length))
    try:
        return base64.b64decode(split_record(record)[int(column)], validate=True)
    except (ValueError, IndexError, binascii.Error) as error:
        raise SuiteError(f"{locator.path}: byte {start}: no base64 picture there ({error}); did it change?") from error


def _missing(path: Path, package: str) -> SuiteError:
    return SuiteError(f"{path}: reading it needs {package}; install it with: pip install 'defaker-opt[benchmarks]'")
