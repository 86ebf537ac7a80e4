"""DocTamper's LMDB: `image-%09d` (JPEG), `label-%09d` (a mask) and `num-samples`. Every picture is forged."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from defaker_opt.benchmarks import Locator, MaskRule
from defaker_opt.benchmarks.layouts import Draft, Scan
from defaker_opt.benchmarks.members import open_lmdb
from defaker_opt.errors import SuiteError


@dataclass(frozen=True)
class DocTamperLmdb:
    """The benchmark's folder is the LMDB."""

    def find(self, root: Path, masks: MaskRule) -> Scan:
        """List the keys."""
        with open_lmdb(root) as transaction:
            keys = {key.decode("utf-8", "replace") for key in transaction.cursor().iternext(keys=True, values=False)}
            promised = transaction.get(b"num-samples")
        images = sorted(key for key in keys if key.startswith("image-"))
        if promised is None or not promised.strip().isdigit():
            raise SuiteError(f"{root}: num-samples is missing or no number; is this DocTamper's LMDB?")
        if len(images) != int(promised):
            raise SuiteError(f"{root}: {len(images)} pictures, num-samples says {int(promised)}; is the copy complete?")
        draft = Draft(root, masks)
        for key in images:
            label = key.replace("image-", "label-", 1)
            if label in keys:
                draft.add(key, "fake", Locator(root, label), Locator(root, key))
            else:
                draft.leave_out(key, f"its mask is missing: no entry {label!r}")
        return draft.finish()


LAYOUT = DocTamperLmdb
