"""Sa2VA-style folders, the joint layout in which DeFakerOne-like detectors are released."""

from __future__ import annotations

from defaker_opt.sources import Checkpoint, Plan
from defaker_opt.sources._internvl_names import ORIGINAL
from defaker_opt.sources._joint import Release, plan_joint, read_release

MODEL_TYPE = "sa2va_chat"


def plan(checkpoint: Checkpoint) -> Plan:
    """See `Source`."""
    release: Release = read_release(checkpoint)
    return plan_joint(checkpoint, release, ORIGINAL)
