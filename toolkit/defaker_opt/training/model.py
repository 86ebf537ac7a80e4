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
from defaker_opt.training.positions import BY_POSITION
from defaker_opt.training.sight import SightHead

Stage = TypeVar("Stage", VisionEncoder, Language, MaskEncoder, MaskDecoder)

# SAM's random Fourier features stay as they were drawn, and so do InternViT's patches: taught ones gain nothing and
# make training less stable (Chen et al. 2021, "An Empirical Study of Training Self-Supervised Vision Transformers",
# section 4.3).
_PATCHES = "tower.embeddings.patch_embeddings.projection"
_FIXED = ("mask_decoder.image_position", f"vision_encoder.{_PATCHES}.weight")
_TABLE = "language.embed_tokens.weight"
_HEAD = "language.lm_head.weight"


@dataclass(frozen=True)
class Outputs:
    """What a batch gave; None for a part that did not run. m = s/4 of the mask image.

    verdict_logits [B, 8]; of the vision tower's patches sight_logits [B] and patch_logits [B, T, n²], without the
    verdict's part of the last tile alone, and token_logits [B, T, K] of what they are joined to; mask_logits
    [B, 3, m, m], iou [B, 3], map_logits: of each of the mask encoder's maps, [B, n, n] with n = m/4, m and m/2;
    seg_embedding [B, C], what the mask decoder was given.
    """

    verdict_logits: torch.Tensor | None
    sight_logits: torch.Tensor | None
    patch_logits: torch.Tensor | None
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
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.sight_head = SightHead(detector.config.vision.hidden_size)
        self.token_head = nn.Linear(detector.config.language.hidden_size, 1)
        nn.init.zeros_(self.token_head.weight)
        nn.init.zeros_(self.token_head.bias)
        compute_in_float32_(self.vision_encoder.get_submodule(_PATCHES))
        self.attention = "eager"
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
        verdict = sight = patch = tokens = masks = iou = None
        maps: tuple[torch.Tensor, ...] = ()
        seg = self.seg_end().bias.expand(len(batch.labels), -1)
        if parts.sight or parts.verdict:
            tiles = batch.tiles if parts.verdict else batch.tiles[:, -1:]
            patches = self._see(tiles, BY_POSITION if parts.windows else self.attention)
            sight, patch = self.sight_head(patches)
        if parts.verdict:
            verdict, seg, tokens = self._ask(patches)
        if parts.mask:
            embed, high_res_0, high_res_1 = self.mask_encoder(batch.image)
            masks, iou = self.mask_decoder.candidates(embed, high_res_0, high_res_1, seg)
            maps = tuple(head(each)[:, 0] for head, each in zip(self.map_heads, (embed, high_res_0, high_res_1)))
        return Outputs(verdict, sight, patch, tokens, masks, iou, maps, seg)

    def seg_end(self) -> nn.Linear:
        """The last layer of the projection to [SEG]."""
        end = self.language.seg_projection[-1]
        assert isinstance(end, nn.Linear), "the projection ends with a linear layer"
        return end

    def _see(self, tiles: torch.Tensor, attention: str) -> torch.Tensor:
        """The vision tower's patches [B, T, n², D] of tiles [B, T, 3, tile, tile]."""
        # Read by every layer of the tower at each call.
        self.vision_encoder.tower.config._attn_implementation = attention
        patches: torch.Tensor = self.vision_encoder.patches(tiles.flatten(0, 1))
        return patches.reshape(*tiles.shape[:2], *patches.shape[1:])

    def _ask(self, patches: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Both questions after the prefix they share, as `runtime.Session` asks them.

        patches [B, T, n², D] → verdict_logits [B, 8], seg_embedding [B, C], token_logits [B, T, K].
        """
        pictures, count = patches.shape[:2]
        vision = self.vision_encoder.tokens(patches.flatten(0, 1))  # [B * T, K, H]
        image = vision.reshape(pictures, -1, vision.shape[-1])
        rows = {name: self.token_embeddings[ids].expand(pictures, -1, -1) for name, ids in self.questions.items()}
        prefix = torch.cat((rows["before"], image, rows["verdict"][:, : self.shared]), dim=1)
        past = [prefix.new_zeros(pictures, *self.past_shape)] * (2 * len(self.language.layers))
        after = torch.arange(prefix.shape[1] + max(map(len, self.questions.values())), device=patches.device)[None]
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


def compute_in_float32_(module: nn.Module) -> None:
    """Keep a layer out of autocast: bfloat16 has no room for a single grey value beside a picture's light."""
    inner = module.forward

    def forward(pixels: torch.Tensor) -> torch.Tensor:
        with torch.autocast(pixels.device.type, enabled=False):
            found: torch.Tensor = inner(pixels.float())
            return found

    module.forward = forward


def use_fused_attention_(model: JointModel) -> None:
    """Let transformers' layers call torch's fused attention; they read this from their configuration at each call."""
    model.attention = "sdpa"
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
    known = {**dict(model.named_parameters()), **taught}  # what is not taught may have been attuned
    stored = {}
    for name in detector.weights.shapes():
        stored[name] = (known[name] if name in known else detector.read(name)).detach().float().cpu().clone()
    stored[_TABLE][list(model.token_ids)] = taught["token_embeddings"].detach().float().cpu()
    stored[_HEAD][list(prompt.answers)] = taught["language.verdict_head.weight"].detach().float().cpu()
    return stored
