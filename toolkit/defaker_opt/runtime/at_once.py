"""Which builds judge several pictures at once, and which of them share calls of the vision encoder."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from defaker_opt.errors import DefakerError
from defaker_opt.runtime.batching import JOINED, BatchingSession, Company, Meeting
from defaker_opt.runtime.engines import BACKEND, TORCH
from defaker_opt.runtime.session import Session

MOST_WAIT_MS = 1000.0

# Encodings that round what a layer is given by row, by scales that are fixed, or not at all. With any other, such as
# one scale a call, a verdict would depend on which pictures are beside it.
BY_ROW = (
    *("matmul", "matmul_integer_token", "matmul_nbits", "matmul_bnb4"),
    *("qdq_uint8", "qdq_int8", "qdq_fp8", "dq_int8", "dq_int4", "dq_nvfp4"),
)


def check_wait(wait_ms: float, pictures: int) -> None:
    """Raise DefakerError if a picture cannot wait so long for others, or none can come."""
    where = f"--batch-wait {wait_ms:g}"
    if not 0 <= wait_ms <= MOST_WAIT_MS:
        raise DefakerError(
            f"{where}: must be 0 (each picture alone) … {MOST_WAIT_MS:g} milliseconds; a GPU takes a few for some "
            "tiles, so try 5"
        )
    if wait_ms and pictures == 1:
        raise DefakerError(f"{where}: pictures judged one by one have no company; also give --concurrency 2 or more")


def session_at_once(session: Session, pictures: int, wait_ms: float) -> Session:
    """The session for so many pictures at once. Raises DefakerError if its build or its backend takes one alone.

    wait_ms: above 0, pictures share calls of the vision encoder, and wait so long for each other at most.
    """
    where = f"--concurrency {pictures}: {session.build.folder}"
    if not wait_ms and session.backend() in (BACKEND, TORCH):
        raise DefakerError(
            f"{where} runs on {session.backend()}, which takes one picture after another; leave it out, or let them "
            "share calls, for example: --batch-wait 5"
        )
    if session.is_short_of_memory():
        raise DefakerError(
            f"{where} opens its stages one after another, as it is larger than open_mb of its target; leave it out, or "
            "make the build for a target with open_mb: 0"
        )
    if not wait_ms:
        return session
    company = Company(wait_ms, pictures, _most_tiles(session, pictures, wait_ms))
    return BatchingSession(session.build, session.threads, session.choice, session._open, meeting=Meeting(company))


def _most_tiles(session: Session, pictures: int, wait_ms: float) -> int:
    """How many tiles one call takes. Raises DefakerError if only one, or if tiles would not be told from company."""
    where, data = f"--batch-wait {wait_ms:g}: {session.build.folder}", session.build.manifest.data
    by_call = [name for name in _vision_encodings(data) if name not in BY_ROW]
    if by_call:
        raise DefakerError(
            f"{where}: its vision encoder ({data['stages'][JOINED]['scheme']}, written as {', '.join(by_call)}) rounds "
            "by what is largest in a call, so a verdict would depend on the pictures beside it; leave --batch-wait "
            "out, or make a build that rounds by fixed scales: defaker-opt quantize --recipe int8-static"
        )
    limit, largest = int(data["target"]["session"]["tiles"]), int(data["input"]["max_tiles"])
    largest += largest > 1  # the thumbnail
    # Engines are made for the tiles of one picture; others take what there is.
    limits = [limit or pictures * largest, *([largest] if session.backend() == BACKEND else [])]
    if min(limits) == 1:
        raise DefakerError(
            f"{where}: its vision encoder takes one tile a call (tiles: of its target); leave --batch-wait out, or "
            "make the build for a target with tiles: 0, which is all of them"
        )
    return min(limits)


def _vision_encodings(data: Mapping[str, Any]) -> list[str]:
    """How the linear layers of the vision encoder are written: the target's encoding of each of its schemes."""
    schemes = str(data["stages"][JOINED]["scheme"]).split("+")
    kinds = [re.sub(r"(-asym)?(-g\d+)?$", "", scheme) for scheme in schemes]
    return [data["target"]["encodings"].get(kind, kind) for kind in kinds]
