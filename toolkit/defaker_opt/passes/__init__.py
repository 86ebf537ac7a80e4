"""What a recipe does to a detector, one pass a file. The file's name is the key in the recipe, PASS the value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from defaker_opt.config import DetectorConfig
from defaker_opt.detector import Detector
from defaker_opt.methods import Need
from defaker_opt.progress import Progress
from defaker_opt.samples import Samples
from defaker_opt.target import Target


@dataclass(frozen=True)
class PassResult:
    """What a pass did, and all it left undone with the reason; goes into the manifest."""

    notes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Preview:
    """What a pass would do: the scheme each linear weight would get, and the reason where it stays float.

    looks: why pictures are needed for it, "" if they are not. needs: what must be seen of which layers.
    factored: layers whose codes may come with an input factor.
    """

    schemes: Mapping[str, str]
    reasons: Mapping[str, str]
    looks: str = ""
    needs: Mapping[str, tuple[Need, ...]] = field(default_factory=dict)
    factored: tuple[str, ...] = ()


class Pass(Protocol):
    """A frozen value with its knobs."""

    def check(self, config: DetectorConfig, target: Target) -> Preview:
        """Say what would be done. Raises PassError with every reason why it cannot be."""
        ...

    def apply(self, detector: Detector, progress: Progress, samples: Samples | None = None) -> PassResult:
        """Change the detector; never the disk. samples: pictures, there if `check` said that they are needed."""
        ...
