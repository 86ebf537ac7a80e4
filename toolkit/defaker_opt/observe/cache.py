"""Statistics that earlier jobs have found, in the user's cache: they depend on what runs before a layer, not on it.

A group of layers has one file, named by all that decides it: the detector, the pictures, how tokens count, what is
asked for, our code and torch, and what the weights before it and around it decode to. So recipes share what they have
in common: `int8-static` for another target finds everything.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import io
import json
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
import torch

from defaker_opt.catalog import code_digest
from defaker_opt.detector import Detector, source_digest
from defaker_opt.errors import DefakerError
from defaker_opt.files import default_cache_folder, keep_digested, read_digested
from defaker_opt.methods import Need, QuantizedWeight, Statistics
from defaker_opt.observe.inputs import Balance
from defaker_opt.samples import Samples

# Which stages a stage's inputs come from.
_FEEDS = {
    "vision_encoder": (),
    "language": ("vision_encoder",),
    "mask_encoder": (),
    "mask_decoder": ("mask_encoder", "language"),
}

# What has a say in what layers are given: the modules and their arithmetic, and how pictures are decoded.
_TOOLS = ("torch", "transformers", "numpy", "pillow")

# Larger groups are found anew: 8,192 columns, as in the 2B language part, have second moments of half a gigabyte.
_LARGEST_BYTES = 128 << 20

# Beyond it the files that were not used for longest go.
_CACHE_BYTES = 2 << 30

# Of the layers of a block while it is looked at, None for its original weights.
Coded = Mapping[str, QuantizedWeight] | None

_ARRAYS = ("hessian", "shift", "mean_abs", "largest", "histogram")


@dataclasses.dataclass
class StatisticsCache:
    """facts: the hash of what is the same for all layers. weights: by stage, of the codes that were passed in it."""

    folder: Path
    facts: str
    weights: dict[str, str] = dataclasses.field(default_factory=dict)

    def passed(self, stage: str, codes: Mapping[str, QuantizedWeight]) -> None:
        """What comes later in the stage, or is fed by it, meets these codes."""
        for name in sorted(codes):
            self.weights[stage] = _hash([self.weights.get(stage, ""), name, _decoded_digest(codes[name])])

    def read(
        self, stage: str, needs: Mapping[str, Collection[Need]], coded: Coded = None
    ) -> dict[str, Statistics] | None:
        """Of all these layers, None if they were not kept or the file is damaged. coded: see `Sweep`."""
        path = self._path(stage, needs, coded)
        content = read_digested(path)
        if content is None:
            return None
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            arrays = dict(file)
        owners = [_statistics(arrays, index) for index in range(len(arrays["tokens"]))]
        return {str(name): owners[owner] for name, owner in zip(arrays["names"], arrays["owners"], strict=True)}

    def keep(
        self, stage: str, needs: Mapping[str, Collection[Need]], found: Mapping[str, Statistics], coded: Coded = None
    ) -> None:
        """Write what was found of these layers, unless it is too much or there is no room."""
        owners = list({id(seen): seen for seen in found.values()}.values())
        arrays = {
            f"{index}.{field}": array
            for index, seen in enumerate(owners)
            for field in _ARRAYS
            if (array := getattr(seen, field)) is not None
        }
        if sum(array.nbytes for array in arrays.values()) > _LARGEST_BYTES:
            return
        index_of = {id(seen): index for index, seen in enumerate(owners)}
        arrays["tokens"] = np.array([seen.tokens for seen in owners])
        arrays["names"] = np.array(list(found))
        arrays["owners"] = np.array([index_of[id(seen)] for seen in found.values()])
        content = io.BytesIO()
        np.savez(content, **arrays)
        keep_digested(self._path(stage, needs, coded), content.getvalue(), _CACHE_BYTES)

    def _path(self, stage: str, needs: Mapping[str, Collection[Need]], coded: Coded) -> Path:
        before = {each: self.weights.get(each, "") for each in _all_feeds(stage)}
        asked = {name: sorted(wanted) for name, wanted in needs.items()}
        around = None if coded is None else {name: _decoded_digest(weight) for name, weight in coded.items()}
        return self.folder / f"{_hash([self.facts, stage, before, asked, around])[:32]}.statistics"


def open_cache(detector: Detector, samples: Samples, balance: Balance | None) -> StatisticsCache | None:
    """The cache for a detector as it is now; None if there is no place for one."""
    scales = {name: [_digest(part.numpy()) for part in parts] for name, parts in sorted(detector.scales.items())}
    facts = [
        source_digest(dataclasses.replace(detector, codes={})),
        scales,
        [samples.digest, *(str(item.image) for item in samples.items)],
        balance and dataclasses.asdict(balance),
        [code_digest(), torch.get_num_threads(), *(importlib.metadata.version(name) for name in _TOOLS)],
    ]
    try:
        return StatisticsCache(default_cache_folder() / "statistics", _hash(facts))
    except DefakerError:
        return None


def _all_feeds(stage: str) -> list[str]:
    return [stage, *(each for feed in _FEEDS[stage] for each in _all_feeds(feed))]


def _statistics(arrays: Mapping[str, np.ndarray], index: int) -> Statistics:
    return Statistics(int(arrays["tokens"][index]), **{field: arrays.get(f"{index}.{field}") for field in _ARRAYS})


def _decoded_digest(weight: QuantizedWeight) -> str:
    """Of all that decides what codes decode to; ranges of activations do not, as calibration leaves those float."""
    parts = (weight.codes, weight.scale, weight.zero, weight.input_factor)
    return _hash([weight.scheme.number, *("" if part is None else _digest(part) for part in parts)])


def _digest(array: np.ndarray) -> str:
    facts = f"{array.dtype} {array.shape} ".encode()
    return hashlib.sha256(facts + np.ascontiguousarray(array).tobytes()).hexdigest()


def _hash(facts: object) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
