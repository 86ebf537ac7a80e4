"""The four stages as one trainable module, run on batches by the stages' own code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

from defaker_opt.detector import Detector
from defaker_opt.errors import DefakerError
from defaker_opt.stages.language import Language
from defaker_opt.stages.mask_decoder import MaskDecoder
from defaker_opt.stages.mask_encoder import MaskEncoder
from defaker_opt.stages.vision_encoder import VisionEncoder
from defaker_opt.training import Parts
from defaker_opt.training.batches import Batch

Stage = TypeVar("Stage", VisionEncoder, Language, MaskEncoder, MaskDecoder)

# Computed from tensors that are not taught: SAM's random Fourier features stay as they were drawn.
_FIXED = ("mask_decoder.image_position",)
_TABLE = "language.embed_tokens.weight"
_HEAD = "language.lm_head.weight"


@dataclass(frozen=True)
class Outputs:
    """What a batch gave; None for a part that did not run. m = s/4 of the mask image.

    verdict_logits [B, 8], token_logits [B, T, K], mask_logits [B, 3, m, m], iou [B, 3], map_logits: of each of the mask
    encoder's maps, [B, n, n] with n = m/4, m and m/2; seg_embedding [B, C], what the mask decoder was given.
    """

    verdict_logits: torch.Tensor | None
    token_logits: torch.Tensor | None
    mask_logits: torch.Tensor | None
    iou: torch.Tensor | None
    map_logits: tuple[torch.Tensor, ...] = ()
    seg_embedding: torch.Tensor | None = None


class JointModel(nn.Module):
    """A detector's stages with gradients, the embeddings of its prompts' tokens, and heads that only training has."""

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        prompt = detector.config.prompt
        if prompt is None:
            raise DefakerError(
                f"{detector.config.name}: has no prompts, so there is nothing to ask it; add `prompt` to its"
                " config.json"
            )
        self.vision_encoder = _taught(detector, "vision_encoder", VisionEncoder)
        self.language = _taught(detector, "language", Language)
        self.mask_encoder = _taught(detector, "mask_encoder", MaskEncoder)
        self.mask_decoder = _taught(detector, "mask_decoder", MaskDecoder)
        self.token_ids = tuple(sorted({*prompt.before, *prompt.verdict, *prompt.mask}))
        self.token_embeddings = nn.Parameter(detector.rows(_TABLE, self.token_ids))  # [distinct tokens, H]
        self.token_head = nn.Linear(detector.config.language.hidden_size, 1)
        nn.init.zeros_(self.token_head.weight)
        nn.init.zeros_(self.token_head.bias)
        channels = detector.config.segmenter.hidden_size
        self.map_heads = nn.ModuleList(_zero_head(count) for count in (channels, channels // 8, channels // 4))
        self.questions = {
            name: [self.token_ids.index(token) for token in getattr(prompt, name)]
            for name in ("before", "verdict", "mask")
        }
        self.shared = prompt.shared()
        language = detector.config.language
        self.past_shape = (language.kv_heads, 0, language.head_dim)

    def forward(self, batch: Batch, parts: Parts) -> Outputs:
        """Run the parts. Without the verdict's, [SEG] is the bias of its projection, the same for every picture."""
        verdict = tokens = masks = iou = None
        maps: tuple[torch.Tensor, ...] = ()
        seg = self.seg_end().bias.expand(len(batch.labels), -1)
        if parts.verdict:
            verdict, seg, tokens = self._ask(batch.tiles)
        if parts.mask:
            embed, high_res_0, high_res_1 = self.mask_encoder(batch.image)
            masks, iou = self.mask_decoder.candidates(embed, high_res_0, high_res_1, seg)
            maps = tuple(head(each)[:, 0] for head, each in zip(self.map_heads, (embed, high_res_0, high_res_1)))
        return Outputs(verdict, tokens, masks, iou, maps, seg)

    def seg_end(self) -> nn.Linear:
        """The last layer of the projection to [SEG]."""
        end = self.language.seg_projection[-1]
        assert isinstance(end, nn.Linear), "the projection ends with a linear layer"
        return end

    def _ask(self, tiles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Both questions after the prefix they share, as `runtime.Session` asks them.

        tiles [B, T, 3, tile, tile] → verdict_logits [B, 8], seg_embedding [B, C], token_logits [B, T, K].
        """
        pictures, count = tiles.shape[:2]
        vision = self.vision_encoder(tiles.flatten(0, 1))[0]  # [B * T, K, H]
        image = vision.reshape(pictures, -1, vision.shape[-1])
        rows = {name: self.token_embeddings[ids].expand(pictures, -1, -1) for name, ids in self.questions.items()}
        prefix = torch.cat((rows["before"], image, rows["verdict"][:, : self.shared]), dim=1)
        past = [prefix.new_zeros(pictures, *self.past_shape)] * (2 * len(self.language.layers))
        after = torch.arange(prefix.shape[1] + max(map(len, self.questions.values())), device=tiles.device)[None]
        _, present = self.language.hidden_states(prefix, after[:, : prefix.shape[1]], tuple(past))
        answers = []
        for name in ("verdict", "mask"):
            question = rows[name][:, self.shared :]
            positions = after[:, prefix.shape[1] : prefix.shape[1] + question.shape[1]]
            answers.append(self.language(question, positions, *present))
        return answers[0][0], answers[1][1], self.token_head(vision).reshape(pictures, count, -1)


def _zero_head(channels: int) -> nn.Conv2d:
    head = nn.Conv2d(channels, 1, 1)
    nn.init.zeros_(head.weight)
    assert head.bias is not None
    nn.init.zeros_(head.bias)
    return head


def _taught(detector: Detector, stage: str, kind: type[Stage]) -> Stage:
    module = detector.load_stage(stage)
    assert isinstance(module, kind), "a stage's file builds its own module"
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(f"{stage}.{name}" not in _FIXED)
    return module


def use_fused_attention_(model: nn.Module) -> None:
    """Let transformers' layers call torch's fused attention; they read this from their configuration at each call."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and getattr(config, "_attn_implementation", None) == "eager":
            config._attn_implementation = "sdpa"


def stored_tensors(
    detector: Detector, model: JointModel, taught: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Every tensor of the detector folder as float32 on the CPU; `taught` has the model's parameters by name."""
    prompt = detector.config.prompt
    assert prompt is not None, "the model has prompts"
    stored = {}
    for name in detector.weights.shapes():
        stored[name] = (taught[name] if name in taught else detector.read(name)).detach().float().cpu().clone()
    stored[_TABLE][list(model.token_ids)] = taught["token_embeddings"].detach().float().cpu()
    stored[_HEAD][list(prompt.answers)] = taught["language.verdict_head.weight"].detach().float().cpu()
    return stored
