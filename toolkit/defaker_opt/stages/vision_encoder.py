"""InternViT, pixel shuffle and projector: tiles → vision tokens in the language model's width."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from transformers import InternVLVisionConfig, InternVLVisionModel

from defaker_opt.config import DetectorConfig
from defaker_opt.runtime.spec import StageSpec, TensorSpec
from defaker_opt.savings import Savings
from defaker_opt.stages import Read

# See `StageFile`.
BLOCKS = "tower.encoder.layer"


class VisionEncoder(nn.Module):
    """InternViT without a final norm; its class token is dropped, 2x2 patches become one token (pixel shuffle "v2")."""

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__()
        vision, width = config.vision, config.language.hidden_size
        self.shuffle = vision.shuffle
        self.side = config.tiling.tile_size // vision.patch_size
        self.tower = InternVLVisionModel(_tower_config(config))
        self.projector = nn.Sequential(
            nn.LayerNorm(vision.hidden_size * vision.shuffle**2),
            nn.Linear(vision.hidden_size * vision.shuffle**2, width),
            nn.GELU(),
            nn.Linear(width, width),
        )

    def forward(self, tiles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """From tiles [T, 3, tile, tile] to vision_tokens [T, K, H], kept_positions [T, K] int64 within each tile."""
        tokens = self.tokens(self.patches(tiles))
        kept = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape[0], -1)
        return tokens, kept.clone()

    def patches(self, tiles: torch.Tensor) -> torch.Tensor:
        """What the last block says of every patch, the class token dropped [T, side * side, D]."""
        embeddings = self.tower.embeddings
        patches = embeddings.patch_embeddings(tiles)  # [T, side * side, D]
        class_token = embeddings.cls_token.expand(tiles.shape[0], -1, -1)
        # Not the module's own forward: it resizes the position table with bicubic whenever it is traced.
        hidden: torch.Tensor = torch.cat((class_token, patches), dim=1) + embeddings.position_embeddings
        for layer in self.tower.encoder.layer:
            hidden = layer(hidden)
        return hidden[:, 1:]

    def tokens(self, patches: torch.Tensor) -> torch.Tensor:
        """Patches [T, side * side, D] joined to vision tokens [T, K, H]."""
        projected: torch.Tensor = self.projector(self._pixel_shuffle(patches))
        return projected

    def _pixel_shuffle(self, patches: torch.Tensor) -> torch.Tensor:
        """[T, side * side, D] → [T, (side / s)², D * s²]; InternVL's order: channels of a row, then of the block."""
        s, side, width = self.shuffle, self.side, patches.shape[-1]
        grid = patches.reshape(-1, side, side // s, width * s).permute(0, 2, 1, 3)
        blocks = grid.reshape(-1, side // s, side // s, width * s * s).permute(0, 2, 1, 3)
        return blocks.reshape(-1, (side // s) ** 2, width * s * s)


def _tower_config(config: DetectorConfig) -> InternVLVisionConfig:
    vision, tile_size = config.vision, config.tiling.tile_size
    return InternVLVisionConfig(
        hidden_size=vision.hidden_size,
        intermediate_size=vision.intermediate_size,
        num_hidden_layers=vision.layers,
        num_attention_heads=vision.heads,
        attention_bias=vision.qkv_bias,
        use_qk_norm=vision.qk_norm,
        hidden_act=vision.activation,
        norm_type=vision.norm,
        layer_norm_eps=vision.norm_eps,
        image_size=(tile_size, tile_size),
        patch_size=(vision.patch_size, vision.patch_size),
        attn_implementation="eager",
    )


def spec(config: DetectorConfig) -> StageSpec:
    """See `StageFile`."""
    tile, tokens, width = config.tiling.tile_size, config.tokens_per_tile, config.language.hidden_size
    return StageSpec(
        "vision_encoder",
        (TensorSpec("tiles", "float32", ("tiles", 3, tile, tile)),),
        (
            TensorSpec("vision_tokens", "float32", ("tiles", tokens, width)),
            TensorSpec("kept_positions", "int64", ("tiles", tokens)),
        ),
    )


def build(config: DetectorConfig, savings: Savings) -> nn.Module:
    """See `StageFile`."""
    return VisionEncoder(config)


def stored_only(config: DetectorConfig) -> dict[str, tuple[int, ...]]:
    """See `StageFile`."""
    return {}


def derived(config: DetectorConfig, read: Read) -> dict[str, Callable[[], torch.Tensor]]:
    """See `StageFile`."""
    return {}
