"""SAM2's mask decoder with the prompt encoder folded into constants: features and [SEG] embedding → mask logits."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn
from transformers import Sam2MaskDecoderConfig
from transformers.models.sam2.modeling_sam2 import Sam2MaskDecoder

from defaker_opt.config import DetectorConfig, SegmenterConfig
from defaker_opt.runtime.spec import StageSpec, TensorSpec
from defaker_opt.savings import Savings
from defaker_opt.stages import Read

# SAM2 makes 4 masks; with a prompt like ours the first is not used, the best of the others is.
_FIRST_MASK = 1

# See `StageFile`.
BLOCKS = ""


class MaskDecoder(nn.Module):
    """The two-way transformer, the upscaling, and the choice of the mask with the best predicted IoU."""

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__()
        segmenter = config.segmenter
        width, side = segmenter.hidden_size, segmenter.feature_size
        whole = Sam2MaskDecoder(_decoder_config(segmenter))
        self.obj_score_token, self.iou_token, self.mask_tokens = (
            whole.obj_score_token,
            whole.iou_token,
            whole.mask_tokens,
        )
        self.transformer = whole.transformer
        self.upscale_conv1, self.upscale_layer_norm = whole.upscale_conv1, whole.upscale_layer_norm
        self.upscale_conv2, self.activation = whole.upscale_conv2, whole.activation
        self.hypernetworks = nn.ModuleList(list(whole.output_hypernetworks_mlps)[_FIRST_MASK:])
        self.iou_head = whole.iou_prediction_head
        self.not_a_point = nn.Parameter(torch.zeros(1, width))
        self.no_mask = nn.Parameter(torch.zeros(1, width))
        self.image_position = nn.Parameter(torch.zeros(1, width, side, side))

    def forward(
        self, image_embed: torch.Tensor, high_res_0: torch.Tensor, high_res_1: torch.Tensor, seg_embedding: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Feature maps and seg_embedding [1, C] → mask_logits [1, s/4, s/4] of the best mask, iou [1] it predicts.

        The prompt is what the original's empty point prompt becomes: two "not a point" tokens, then the embedding.
        """
        tokens = torch.cat(
            (
                self.obj_score_token.weight,
                self.iou_token.weight,
                self.mask_tokens.weight,
                self.not_a_point,
                self.not_a_point,
                seg_embedding,
            )
        )[None, None]  # [1, 1, 9, C]
        tokens, image = self.transformer(
            point_embeddings=tokens,
            image_embeddings=image_embed + self.no_mask[:, :, None, None],
            image_positional_embeddings=self.image_position,
            attention_similarity=None,
        )
        iou = self.iou_head(tokens[:, 0, 1])[:, _FIRST_MASK:]  # [1, 3]
        best = iou.argmax(dim=1)  # [1]; TensorRT chooses only along the second axis or a later one
        weights = torch.cat(
            [net(tokens[:, 0, 2 + _FIRST_MASK + i]) for i, net in enumerate(self.hypernetworks)]
        )  # [3, C/8]
        upscaled = self._upscale(image.transpose(2, 3).reshape(image_embed.shape), high_res_0, high_res_1)
        masks = weights[best] @ upscaled.flatten(2)[0]
        return masks.reshape(1, *upscaled.shape[2:]), iou[:, best][0]

    def candidates(
        self, image_embed: torch.Tensor, high_res_0: torch.Tensor, high_res_1: torch.Tensor, seg_embedding: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """For training: all three masks [B, 3, s/4, s/4] that `forward` chooses from, and their predicted IoUs [B, 3].

        The maps have B pictures, seg_embedding is [B, C].
        """
        fixed = (self.obj_score_token.weight, self.iou_token.weight, self.mask_tokens.weight)
        start = torch.cat((*fixed, self.not_a_point, self.not_a_point)).expand(len(seg_embedding), -1, -1)
        tokens, image = self.transformer(
            point_embeddings=torch.cat((start, seg_embedding[:, None]), dim=1)[:, None],  # [B, 1, 9, C]
            image_embeddings=image_embed + self.no_mask[:, :, None, None],
            image_positional_embeddings=self.image_position,
            attention_similarity=None,
        )
        iou = self.iou_head(tokens[:, 0, 1])[:, _FIRST_MASK:]
        weights = torch.stack(
            [net(tokens[:, 0, 2 + _FIRST_MASK + i]) for i, net in enumerate(self.hypernetworks)], dim=1
        )  # [B, 3, C/8]
        upscaled = self._upscale(image.transpose(2, 3).reshape(image_embed.shape), high_res_0, high_res_1)
        return torch.einsum("bkc,bchw->bkhw", weights, upscaled), iou

    def _upscale(self, image: torch.Tensor, high_res_0: torch.Tensor, high_res_1: torch.Tensor) -> torch.Tensor:
        half = self.activation(self.upscale_layer_norm(self.upscale_conv1(image) + high_res_1))
        upscaled: torch.Tensor = self.activation(self.upscale_conv2(half) + high_res_0)
        return upscaled  # [1, C/8, s/4, s/4]


def _decoder_config(segmenter: SegmenterConfig) -> Sam2MaskDecoderConfig:
    return Sam2MaskDecoderConfig(
        hidden_size=segmenter.hidden_size,
        mlp_dim=segmenter.decoder_intermediate_size,
        num_hidden_layers=segmenter.decoder_layers,
        num_attention_heads=segmenter.decoder_heads,
        attention_downsample_rate=segmenter.attention_downsample,
        iou_head_hidden_dim=segmenter.iou_hidden_size,
        attn_implementation="eager",
    )


def spec(config: DetectorConfig) -> StageSpec:
    """See `StageFile`."""
    size, width = config.segmenter.image_size, config.segmenter.hidden_size
    return StageSpec(
        "mask_decoder",
        (
            TensorSpec("image_embed", "float32", (1, width, size // 16, size // 16)),
            TensorSpec("high_res_0", "float32", (1, width // 8, size // 4, size // 4)),
            TensorSpec("high_res_1", "float32", (1, width // 4, size // 8, size // 8)),
            TensorSpec("seg_embedding", "float32", (1, width)),
        ),
        (
            TensorSpec("mask_logits", "float32", (1, size // 4, size // 4)),
            TensorSpec("iou", "float32", (1,)),
        ),
    )


def build(config: DetectorConfig, savings: Savings) -> nn.Module:
    """See `StageFile`."""
    return MaskDecoder(config)


def stored_only(config: DetectorConfig) -> dict[str, tuple[int, ...]]:
    """See `StageFile`: the random matrix behind the positions of the image embedding."""
    return {"position_matrix": (2, config.segmenter.hidden_size // 2)}


def derived(config: DetectorConfig, read: Read) -> dict[str, Callable[[], torch.Tensor]]:
    """See `StageFile`."""
    return {
        "image_position": lambda: image_position(read("mask_decoder.position_matrix"), config.segmenter.feature_size)
    }


def image_position(matrix: torch.Tensor, side: int) -> torch.Tensor:
    """Fourier features of the cell centres [1, C, side, side] (Tancik et al. 2020, section 3; SAM uses them)."""
    centre = (torch.arange(side, dtype=torch.float32) + 0.5) / side
    y, x = torch.meshgrid(centre, centre, indexing="ij")
    angles = 2 * math.pi * ((2 * torch.stack((x, y), dim=-1) - 1) @ matrix.to(torch.float32))
    return torch.cat((angles.sin(), angles.cos()), dim=-1).permute(2, 0, 1)[None]
