"""How good a model is on pairs it was not taught: verdict AUC and accuracy, and overlap of masks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.func import functional_call

from defaker_opt.training import Parts
from defaker_opt.training.batches import Batch, Prepared, stack_pairs
from defaker_opt.training.losses import true_iou
from defaker_opt.training.model import JointModel, Outputs


@dataclass(frozen=True)
class Scores:
    """Results over some pictures; NaN where the part did not run.

    auc, accuracy (threshold 0.5): of verdicts, 0…1. patch_auc: of the vision tower's patches, those forged for the most
    part against those not at all, whatever picture they are of; the first of all figures to rise. iou: mean over forged
    pictures, of the mask that the graph would choose, in cells of the mask logits. empty: share of authentic pictures
    whose chosen mask is empty.
    """

    pictures: int
    auc: float
    accuracy: float
    patch_auc: float
    iou: float
    empty: float

    def as_json(self) -> dict[str, float | None]:
        """By name, null for NaN."""
        return {name: None if math.isnan(value) else round(value, 4) for name, value in vars(self).items()}


def evaluate(
    model: JointModel, weights: Mapping[str, torch.Tensor], pairs: Sequence[Prepared], parts: Parts, at_once: int = 8
) -> Scores:
    """Score the model with `weights` in place of its own. at_once: pairs in one batch."""
    device = next(iter(weights.values())).device
    probabilities, labels, ious, patches = [], [], [], [np.zeros((2, 0))]
    for batch_pairs in _by_tile_count(pairs, at_once):
        batch = stack_pairs(batch_pairs, device)
        with torch.no_grad():
            outputs = functional_call(model, dict(weights), (batch, parts))
        labels.append(batch.labels.cpu().numpy())
        probabilities.append(fake_probabilities(outputs))
        ious.append(chosen_iou(outputs, batch.masks))
        patches.append(clear_patches(outputs, batch))
    label, iou = np.concatenate(labels), np.concatenate(ious)
    probability = np.concatenate(probabilities)
    patch = np.concatenate(patches, axis=1)
    right = np.where(np.isnan(probability), np.nan, (probability > 0.5) == label)
    return Scores(
        len(label),
        area_under_curve(probability, label),
        float(right.mean()),
        area_under_curve(patch[0], patch[1].astype(np.int64)),
        float(iou[label == 1].mean()),
        float(iou[label == 0].mean()),
    )


def _by_tile_count(pairs: Sequence[Prepared], at_once: int) -> list[list[Prepared]]:
    batches: list[list[Prepared]] = []
    for tiles in sorted({pair.tiles.shape[1] for pair in pairs}):
        same = [pair for pair in pairs if pair.tiles.shape[1] == tiles]
        batches += [same[start : start + at_once] for start in range(0, len(same), at_once)]
    return batches


def fake_probabilities(outputs: Outputs) -> NDArray[np.float64]:
    """Share of the four words that say fake among the eight [B], as `runtime.answers.fake_probability`.

    Where the language model did not run, what the head on the vision tower says; NaN where neither did.
    """
    if outputs.verdict_logits is None and outputs.sight_logits is not None:
        judged: NDArray[np.float64] = outputs.sight_logits.detach().double().sigmoid().cpu().numpy()
        return judged
    if outputs.verdict_logits is None:
        return np.full(len(outputs.mask_logits if outputs.mask_logits is not None else ()), np.nan)
    share: NDArray[np.float64] = outputs.verdict_logits.detach().double().softmax(-1)[:, :4].sum(-1).cpu().numpy()
    return share


def clear_patches(outputs: Outputs, batch: Batch) -> NDArray[np.float64]:
    """Logit and label of the patches that are forged for the most part, or not at all [2, n]."""
    if outputs.patch_logits is None:
        return np.zeros((2, 0))
    shares = batch.shares_of(outputs.patch_logits)
    clear = (shares > 0.5) | (shares == 0)
    both = torch.stack([outputs.patch_logits.double()[clear], (shares[clear] > 0.5).double()])
    found: NDArray[np.float64] = both.cpu().numpy()
    return found


def chosen_iou(outputs: Outputs, masks: torch.Tensor) -> NDArray[np.float64]:
    """True IoU of the candidate with the best predicted one [B]; 1 for an empty mask of an authentic picture."""
    if outputs.mask_logits is None or outputs.iou is None:
        return np.full(len(masks), np.nan)
    chosen = outputs.iou.argmax(dim=1, keepdim=True)
    iou: NDArray[np.float64] = true_iou(outputs.mask_logits, masks).gather(1, chosen)[:, 0].double().cpu().numpy()
    return iou


def area_under_curve(scores: NDArray[np.float64], labels: NDArray[np.int64]) -> float:
    """Chance that a forged picture scores above an authentic one, ties half (Mann-Whitney U); NaN without both."""
    forged, authentic = scores[labels == 1], np.sort(scores[labels == 0])
    if not len(forged) or not len(authentic) or np.isnan(scores).any():
        return math.nan
    below = np.searchsorted(authentic, forged, side="left")
    up_to = np.searchsorted(authentic, forged, side="right")
    return float((below + up_to).mean() / 2 / len(authentic))
