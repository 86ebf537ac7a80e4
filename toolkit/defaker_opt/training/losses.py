"""What the joint model is taught with; every loss is a mean over the images of a batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional

from defaker_opt.training.batches import Batch
from defaker_opt.training.model import Outputs

# The three candidates' losses are of the size of 1; the verdict's is 0.69 before anything is learnt.
WEIGHTS = {
    "verdict": 1.0,
    "sight": 1.0,
    "agreement": 1.0,
    "patch": 1.0,
    "token": 1.0,
    "mask": 1.0,
    "iou": 0.5,
    "map": 1.0,
}


def joint_losses(outputs: Outputs, batch: Batch) -> dict[str, torch.Tensor]:
    """Every loss of the parts that ran, by the names of WEIGHTS, not yet weighted."""
    losses: dict[str, torch.Tensor] = {}
    if outputs.verdict_logits is not None:
        losses["verdict"] = verdict_loss(outputs.verdict_logits.float(), batch.labels)
    if outputs.sight_logits is not None and outputs.patch_logits is not None:
        losses["sight"] = functional.binary_cross_entropy_with_logits(
            outputs.sight_logits.float(), batch.labels.float()
        )
        losses["patch"] = share_loss(outputs.patch_logits.float(), batch.shares_of(outputs.patch_logits))
    if outputs.verdict_logits is not None and outputs.sight_logits is not None:
        losses["agreement"] = agreement_loss(outputs.verdict_logits.float(), outputs.sight_logits.float())
    if outputs.token_logits is not None:
        losses["token"] = share_loss(outputs.token_logits.float(), batch.token_shares)
    if outputs.mask_logits is not None and outputs.iou is not None:
        losses["mask"], losses["iou"] = candidate_losses(outputs.mask_logits.float(), outputs.iou.float(), batch.masks)
        losses["map"] = map_loss([logits.float() for logits in outputs.map_logits], batch.masks)
    return losses


def total_loss(losses: dict[str, torch.Tensor]) -> torch.Tensor:
    """The weighted sum."""
    return torch.stack([WEIGHTS[name] * loss for name, loss in losses.items()]).sum()


def verdict_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Negative log of the right side's share of the eight answer words.

    logits [B, 8], first the four that say fake; labels [B], 1 forged.
    """
    sides = logits.reshape(-1, 2, 4).logsumexp(-1)  # [B, 2]: fake, real
    return functional.cross_entropy(sides, 1 - labels)


def agreement_loss(logits: torch.Tensor, sight: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of the verdict with what the tower's own head believes (Hinton et al. 2015, section 2, at T = 1).

    logits [B, 8] as `verdict_loss` takes them; sight [B], log odds of forged, which learn nothing by it. The head,
    nearer to the tower, learns faster than the language model, and says how sure a picture lets one be.
    """
    sides = logits.reshape(-1, 2, 4).logsumexp(-1)  # [B, 2]: fake, real
    return functional.binary_cross_entropy_with_logits(sides[:, 0] - sides[:, 1], sight.detach().sigmoid())


def share_loss(logits: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """Cross-entropy with the forged share of the area that each patch or vision token stands for; both [B, T, cells].

    Only training has the heads behind them: one label a picture teaches the vision encoder too slowly.
    """
    return functional.binary_cross_entropy_with_logits(logits, shares)


def map_loss(logits: Sequence[torch.Tensor], masks: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of each map's cells [B, n, n] with their forged share; masks [B, m, m], m a multiple of n.

    Only training has the heads behind them: through the decoder alone, thousands of pictures teach the encoder nothing.
    """
    losses = [
        functional.binary_cross_entropy_with_logits(
            each, functional.avg_pool2d(masks, masks.shape[-1] // each.shape[-1])
        )
        for each in logits
    ]
    return torch.stack(losses).mean()


def candidate_losses(logits: torch.Tensor, iou: torch.Tensor, masks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss of the best candidate of each image, and the squared error of all predicted IoUs (SAM, appendix A).

    logits [B, 3, m, m], iou [B, 3], masks [B, m, m]: the forged share of each cell, 0…1. All predictions are taught,
    not only the best candidate's: the graph chooses by comparing them.
    """
    target = masks[:, None].expand_as(logits)
    cross_entropy = functional.binary_cross_entropy_with_logits(logits, target, reduction="none").mean((2, 3))
    # Dice of an empty mask pulls every cell down long before any forged one is found.
    forged = masks.flatten(1).amax(1, keepdim=True) > 0  # [B, 1]
    best = (cross_entropy + forged * dice_loss(logits, target)).min(dim=1).values  # [B]
    return best.mean(), (iou - true_iou(logits, masks)).square().mean()


def dice_loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """1 - Dice coefficient over the last two axes (Milletari et al. 2016, section 3); [B, 3].

    One cell is added above and below, so that nothing is divided by zero.
    """
    share = logits.sigmoid()
    overlap = (share * target).sum((2, 3))
    sizes = share.square().sum((2, 3)) + target.square().sum((2, 3))
    return 1 - (2 * overlap + 1) / (sizes + 1)


def true_iou(logits: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Intersection over union of each candidate with cells that are mostly forged [B, 3]; 1 where both are empty."""
    found, wanted = logits > 0, (masks > 0.5)[:, None]
    union = (found | wanted).sum((2, 3))
    overlap = (found & wanted).sum((2, 3))
    return torch.where(union > 0, overlap / union.clamp(min=1), 1.0)
