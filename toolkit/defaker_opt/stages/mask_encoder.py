"""SAM2's image encoder: the whole picture → the three feature maps that the mask decoder reads."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional
from transformers import Sam2HieraDetConfig, Sam2HieraDetModel

from defaker_opt.config import DetectorConfig, SegmenterConfig
from defaker_opt.runtime.spec import StageSpec, TensorSpec
from defaker_opt.savings import Savings
from defaker_opt.stages import Read

# See `StageFile`.
BLOCKS = "trunk.blocks"


class MaskEncoder(nn.Module):
    """Hiera trunk and feature pyramid of SAM2 for still pictures, with the decoder's two 1x1 convolutions in it."""

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__()
        segmenter = config.segmenter
        width = segmenter.hidden_size
        self.trunk = Sam2HieraDetModel(_trunk_config(segmenter))
        self.neck = nn.ModuleList(nn.Conv2d(channels, width, 1) for channels in reversed(segmenter.widths))
        self.no_memory_embedding = nn.Parameter(torch.zeros(1, width))
        self.high_res_0 = nn.Conv2d(width, width // 8, 1)
        self.high_res_1 = nn.Conv2d(width, width // 4, 1)
        side = segmenter.image_size // 4
        with torch.device("cpu"):  # constants of the architecture, computed also where the weights are "meta"
            self.register_buffer("rows", _bicubic_matrix(segmenter.position_grid[0], side), persistent=False)
            self.register_buffer("columns", _bicubic_matrix(segmenter.position_grid[1], side), persistent=False)
        self.rows: torch.Tensor
        self.columns: torch.Tensor

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """From image [1, 3, s, s] to the three maps.

        image_embed [1, C, s/16, s/16], high_res_0 [1, C/8, s/4, s/4], high_res_1 [1, C/4, s/8, s/8].
        """
        hidden = self.trunk.patch_embed(image) + self._position_embedding()  # [1, s/4, s/4, width]
        levels = []
        for index, block in enumerate(self.trunk.blocks):
            hidden = block(hidden)
            if index in self.trunk.stage_ends:
                levels.append(hidden.permute(0, 3, 1, 2))
        lateral = [conv(level) for conv, level in zip(self.neck, reversed(levels))]  # low resolution first
        embed = lateral[1] + functional.interpolate(lateral[0], scale_factor=2.0, mode="nearest")
        embed = embed + self.no_memory_embedding[:, :, None, None]
        return embed, self.high_res_0(lateral[3]), self.high_res_1(lateral[2])

    def _position_embedding(self) -> torch.Tensor:
        """Background table resized with bicubic, plus the window table repeated; [1, s/4, s/4, width].

        Resizing one axis is a constant matrix, so the graph holds two small products instead of a table of the
        picture's size, which would be a sixth of an INT8 SAM2-L; runtimes fold them when they load the graph.
        """
        window = self.trunk.pos_embed_window  # [1, width, w, w]
        background = self.rows @ self.trunk.pos_embed @ self.columns.T  # [1, width, s/4, s/4]
        _, width, side, _ = background.shape
        w = window.shape[-1]
        blocks: torch.Tensor = background.reshape(width, side // w, w, side // w, w) + window.reshape(width, 1, w, 1, w)
        return blocks.reshape(1, width, side, side).permute(0, 2, 3, 1)


def _bicubic_matrix(size_in: int, size_out: int) -> torch.Tensor:
    """Matrix [out, in] of torch's bicubic resizing along one axis, read off by resizing unit vectors."""
    unit = torch.eye(size_in)[None, None]
    return functional.interpolate(unit, size=(size_out, size_in), mode="bicubic")[0, 0]


def _trunk_config(segmenter: SegmenterConfig) -> Sam2HieraDetConfig:
    return Sam2HieraDetConfig(
        hidden_size=segmenter.widths[0],
        num_attention_heads=segmenter.heads[0],
        image_size=[segmenter.image_size, segmenter.image_size],
        window_positional_embedding_background_size=list(segmenter.position_grid),
        blocks_per_stage=list(segmenter.blocks),
        embed_dim_per_stage=list(segmenter.widths),
        num_attention_heads_per_stage=list(segmenter.heads),
        window_size_per_stage=list(segmenter.windows),
        global_attention_blocks=list(segmenter.global_blocks),
        attn_implementation="eager",
    )


def spec(config: DetectorConfig) -> StageSpec:
    """See `StageFile`."""
    size, width = config.segmenter.image_size, config.segmenter.hidden_size
    return StageSpec(
        "mask_encoder",
        (TensorSpec("image", "float32", (1, 3, size, size)),),
        (
            TensorSpec("image_embed", "float32", (1, width, size // 16, size // 16)),
            TensorSpec("high_res_0", "float32", (1, width // 8, size // 4, size // 4)),
            TensorSpec("high_res_1", "float32", (1, width // 4, size // 8, size // 8)),
        ),
    )


def build(config: DetectorConfig, savings: Savings) -> nn.Module:
    """See `StageFile`."""
    return MaskEncoder(config)


def stored_only(config: DetectorConfig) -> dict[str, tuple[int, ...]]:
    """See `StageFile`."""
    return {}


def derived(config: DetectorConfig, read: Read) -> dict[str, Callable[[], torch.Tensor]]:
    """See `StageFile`."""
    return {}
