"""Whether an engine says what the graph says: on the build's own picture, against ONNX Runtime on the CPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from defaker_opt.runtime.backends import OpenStage
from defaker_opt.runtime.build import SELF_TEST, Build
from defaker_opt.runtime.recording import Call, RecordingSession
from defaker_opt.runtime.self_test import relative_difference
from defaker_opt.runtime.session import Verdict

# Engines multiply float32 with 10 bits of fraction (TF32) and may add up in float16.
_ENGINE_TOLERANCE = 0.02
_ROUNDS = 7


def judge_picture(session: RecordingSession) -> Verdict:
    """Judge the picture that the build carries, so that every stage is called."""
    with np.load(session.build.folder / SELF_TEST, allow_pickle=False) as stored:
        picture = Image.fromarray(stored["image"])
    return session.judge(picture, gate=0.0, explain_words=int("explain" in session.build.manifest.data))


def tolerance(build: Build, stage: str) -> float:
    """How far any output of an engine may be from the graph's, as ‖difference‖ / ‖graph's‖."""
    return max(float(build.manifest.data["stages"][stage]["parity_tolerance"]), _ENGINE_TOLERANCE)


def worst_difference(engine: OpenStage, calls: Sequence[Call]) -> tuple[str, float]:
    """The output that is furthest from what was recorded, and how far; not a number counts as infinitely far."""
    assert calls, "a stage that the picture does not call"
    worst, name = -1.0, ""
    for call in calls:
        got = engine(call.tensors, call.outputs)
        for output, expected in call.results.items():
            difference = relative_difference(got[output], expected)
            difference = difference if np.isfinite(difference) else np.inf
            if difference > worst:
                worst, name = difference, output
    return name, worst


def milliseconds(engine: OpenStage, calls: Sequence[Call]) -> float:
    """Of all calls together, the median over rounds; one round goes before."""
    took = []
    for _ in range(_ROUNDS + 1):
        started = time.perf_counter()
        for call in calls:
            engine(call.tensors, call.outputs)
        took.append(1e3 * (time.perf_counter() - started))
    return statistics.median(took[1:])


def compare_verdicts(
    ours: Verdict, reference: Verdict, calls: Sequence[Call], expected: Sequence[Call]
) -> dict[str, float]:
    """Largest difference of verdict logits, cosine of segmentation embeddings, IoU of masks (1 if both are empty)."""
    first, second = (_embedding(each) for each in (calls, expected))
    assert ours.mask is not None and reference.mask is not None
    union = int((ours.mask | reference.mask).sum())
    return {
        "verdict_logit_difference": float(np.abs(ours.verdict_logits - reference.verdict_logits).max()),
        "seg_cosine": float(first @ second / (np.linalg.norm(first) * np.linalg.norm(second) + 1e-30)),
        "mask_iou": float((ours.mask & reference.mask).sum() / union) if union else 1.0,
    }


def _embedding(calls: Sequence[Call]) -> NDArray[np.float64]:
    given = next(call.tensors["seg_embedding"] for call in calls if call.stage == "mask_decoder")
    return given.astype(np.float64).reshape(-1)
