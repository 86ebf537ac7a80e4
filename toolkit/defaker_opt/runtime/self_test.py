"""The golden test that travels inside a build: one picture, and the outputs this build gave where it was made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from defaker_opt.runtime.answers import fake_probability
from defaker_opt.runtime.build import SELF_TEST
from defaker_opt.runtime.session import Session


@dataclass(frozen=True)
class SelfTest:
    """How far this machine's outputs are from the expected ones, and how far they may be."""

    probability_difference: float
    probability_tolerance: float
    mask_disagreement: float
    mask_tolerance: float

    @property
    def passed(self) -> bool:
        """Whether both differences are within their tolerance."""
        return (
            self.probability_difference <= self.probability_tolerance and self.mask_disagreement <= self.mask_tolerance
        )


def expected_outputs(session: Session, image: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
    """Judge a picture [height, width, 3] with every stage; what a self-test file holds, tolerances apart."""
    verdict = session.judge(Image.fromarray(image), gate=0.0)
    assert verdict.mask is not None
    return {"image": image, "verdict_logits": verdict.verdict_logits, "mask": verdict.mask}


def run_self_test(session: Session) -> SelfTest:
    """Run the picture in the build through this machine. Raises BuildError if the results are not numbers."""
    folder = session.build.folder
    with np.load(folder / SELF_TEST, allow_pickle=False) as stored:
        expected = {name: stored[name] for name in stored.files}
    tolerance = session.build.manifest.data["self_test"]
    outputs = expected_outputs(session, expected["image"])
    difference = abs(fake_probability(outputs["verdict_logits"]) - fake_probability(expected["verdict_logits"]))
    return SelfTest(
        probability_difference=difference,
        probability_tolerance=tolerance["probability_tolerance"],
        mask_disagreement=float((outputs["mask"] != expected["mask"]).mean()),
        mask_tolerance=tolerance["mask_tolerance"],
    )


def relative_difference(array: NDArray[Any], reference: NDArray[Any]) -> float:
    """‖array - reference‖ / ‖reference‖, in float64; 0 where both are empty or zero."""
    difference = np.linalg.norm(np.asarray(array, np.float64) - np.asarray(reference, np.float64))
    size = np.linalg.norm(np.asarray(reference, np.float64))
    return float(difference / size) if size else float(difference)
