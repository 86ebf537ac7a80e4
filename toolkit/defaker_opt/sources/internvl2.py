"""InternVL2 folders, to be joined with a SAM2 of its own; a projection between the two that is missing is drawn."""

from __future__ import annotations

from defaker_opt.sources import Checkpoint, Plan
from defaker_opt.sources._internvl_names import ORIGINAL
from defaker_opt.sources._joint import plan_joint, read_release

MODEL_TYPE = "internvl_chat"


def plan(checkpoint: Checkpoint) -> Plan:
    """See `Source`."""
    return plan_joint(checkpoint, read_release(checkpoint), ORIGINAL)
