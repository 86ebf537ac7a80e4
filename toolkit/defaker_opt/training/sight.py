"""A head that judges pictures by what the vision tower says of their patches; only training has it.

Through the language model a verdict teaches the tower much more slowly: all it says reaches the answer through
few tokens, and rates that suit a tower are too high for a decoder.
"""

from __future__ import annotations

import torch
from torch import nn

_ATTENDED = 4
_WIDTH = 96


class SightHead(nn.Module):
    """Patches are seen four times by learnt attention, and by their mean and their maximum."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.patch = nn.Linear(width, 1)
        self.attend = nn.Linear(width, _ATTENDED)
        self.judge = nn.Sequential(nn.Linear((_ATTENDED + 2) * width, _WIDTH), nn.GELU(), nn.Linear(_WIDTH, 1))

    def forward(self, patches: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """From all patches of B pictures [B, N, D] to log odds that they are forged: pictures' [B], patches' [B, N]."""
        seen = self.norm(patches)
        weights = self.attend(seen).float().softmax(dim=1)  # [B, N, 4]
        attended = torch.einsum("bna,bnd->bad", weights, seen.float()).flatten(1)
        pooled = torch.cat((attended, seen.float().mean(dim=1), seen.float().amax(dim=1)), dim=1)
        return self.judge(pooled)[:, 0], self.patch(seen)[..., 0]
