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
    """Patches are seen four times by learnt attention, and by their mean and their maximum.

    Of a picture of several tiles only the last is judged, which is the whole picture: the others are enlarged pieces of
    it, among which an edit of one is lost.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.patch = nn.Linear(width, 1)
        self.attend = nn.Linear(width, _ATTENDED)
        self.judge = nn.Sequential(nn.Linear((_ATTENDED + 2) * width, _WIDTH), nn.GELU(), nn.Linear(_WIDTH, 1))

    def forward(self, patches: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """From patches of B pictures [B, T, N, D] to log odds of forgery: pictures' [B], patches' [B, T, N]."""
        seen = self.norm(patches)
        whole = seen[:, -1]  # [B, N, D]
        weights = self.attend(whole).float().softmax(dim=1)  # [B, N, 4]
        attended = torch.einsum("bna,bnd->bad", weights, whole.float()).flatten(1)
        pooled = torch.cat((attended, whole.float().mean(dim=1), whole.float().amax(dim=1)), dim=1)
        return self.judge(pooled)[:, 0], self.patch(seen)[..., 0]
