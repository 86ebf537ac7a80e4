"""How much each number format of each layer would disturb the three outputs, from one backward sweep an output.

A layer's rounding moves its output by Δ = Ŵ x̂ - W x, with weight and input both rounded. To first order that moves an
output z by ⟨∂z/∂y, Δ⟩, and what is lost is of second order in it: for probabilities the Kullback-Leibler divergence is
half the square, weighted by the Fisher information (Martens 2020, "New insights and perspectives on the natural
gradient method", section 6). For outputs of many numbers one random projection a picture, scaled by the root of that
weight, stands for all of them, and its square is right on average. So the whole table costs one forward and three
backward passes a picture, however many layers and formats there are; errors of different layers are taken as
independent, and add up.

verdict   half of p (1 - p) Δz², z the log odds of fake: nats of the verdict
segment   ‖Δe‖² / ‖e‖² of the embedding of [SEG]
mask      mean over cells of half of p (1 - p) Δz²: nats a cell of the mask
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from torch import nn

from defaker_opt.config import DetectorConfig
from defaker_opt.detector import Detector
from defaker_opt.methods import QuantizedWeight, SchemeName, parse_scheme
from defaker_opt.methods.round_to_nearest import METHOD as ROUND
from defaker_opt.progress import Progress
from defaker_opt.runtime.images import image_tiles, mask_image
from defaker_opt.samples import Samples
from defaker_opt.search import LOSSES, fitted
from defaker_opt.training import Parts
from defaker_opt.training.batches import Batch
from defaker_opt.training.model import JointModel, Outputs

# Blocked products round what they are given in blocks of this many numbers of a row.
_ACTIVATION_BLOCK = 32

# Harms [3] by layer and scheme.
Harms = Mapping[str, Mapping[SchemeName, tuple[float, ...]]]


@dataclass(frozen=True)
class Seen:
    """What a sweep found. picture: the sample of median work; rows: of the input of each call of a layer on it."""

    harms: Harms
    picture: int
    rows: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Blocks:
    """What one call of a stage takes at the target: so many tiles, or tokens of the prefix; 0 is all of them."""

    tiles: int = 0
    tokens: int = 0

    def calls(self, name: str, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """A layer's input in the parts in which the target would call it: [tiles, …] of the vision encoder, or
        [1, tokens, in] of the language stage.
        """
        stage = name.partition(".")[0]
        if stage == "vision_encoder" and self.tiles:
            return torch.split(x, self.tiles)
        if stage == "language" and self.tokens and x.ndim == 3:
            return torch.split(x, self.tokens, dim=1)
        return (x,)


@dataclass
class _Watch:
    """Layers under observation: moves[name][scheme] collects ⟨∂z/∂y, Δ⟩ over the calls of one picture."""

    rounded: Mapping[str, Mapping[SchemeName, QuantizedWeight]]
    blocks: Blocks
    moves: dict[str, dict[SchemeName, float]] = field(default_factory=dict)
    rows: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))

    def on_call(self, name: str, module: nn.Module, given: tuple[torch.Tensor, ...], result: torch.Tensor) -> None:
        """Note the call, and wait for the gradient of its result."""
        x = given[0].detach()
        self.rows[name] += [part[..., 0].numel() for part in self.blocks.calls(name, x)]
        if result.requires_grad:
            result.register_hook(  # type: ignore[no-untyped-call]
                lambda gradient: self._on_gradient(name, module, x, gradient)
            )

    def _on_gradient(self, name: str, module: nn.Module, x: torch.Tensor, gradient: torch.Tensor) -> None:
        assert isinstance(module, nn.Linear)
        moves = self.moves.setdefault(name, dict.fromkeys(self.rounded[name], 0.0))
        parts = tuple(
            (given, pull, pull @ module.weight)
            for given, pull in zip(self.blocks.calls(name, x), self.blocks.calls(name, gradient))
        )
        for scheme, codes in self.rounded[name].items():
            weight = torch.from_numpy(codes.dequantize())
            for given, pull, pulled in parts:
                # Differences first: the two sums are large and nearly equal.
                rounded = round_input(given, scheme)
                moved = (pull @ (weight - module.weight)) * rounded + pulled * (rounded - given)
                moves[scheme] += float(moved.sum())


def measure_harms(
    detector: Detector,
    samples: Samples,
    offered: Mapping[str, tuple[SchemeName, ...]],
    blocks: Blocks,
    progress: Progress,
) -> Seen:
    """Sweep over all samples. offered: schemes by weight name, "float" among them does no harm.

    Needs the whole detector as float32 in memory, and the activations of one picture. Raises DefakerError if the
    detector has no prompts.
    """
    model = JointModel(detector).eval()
    watch = _Watch(_round_all(model, offered), blocks)
    for name in offered:
        layer = model.get_submodule(name.removesuffix(".weight"))
        layer.register_forward_hook(lambda module, given, result, name=name: watch.on_call(name, module, given, result))
    sums = {name: {scheme: np.zeros(len(LOSSES)) for scheme in schemes} for name, schemes in watch.rounded.items()}
    calls: list[dict[str, list[int]]] = []
    random = torch.Generator().manual_seed(0)
    for index, image in enumerate(samples.images()):
        progress(f"sensitivity, picture {index + 1} of {len(samples)}", index / len(samples))
        watch.rows.clear()
        outputs = model(_as_batch(image, detector.config), Parts(verdict=True, mask=True))
        for loss, scalar in enumerate(_projections(outputs, random)):
            watch.moves.clear()
            torch.autograd.backward(scalar, retain_graph=loss + 1 < len(LOSSES))
            for name, moves in watch.moves.items():
                for scheme, move in moves.items():
                    sums[name][scheme][loss] += move * move
        calls.append({name: list(rows) for name, rows in watch.rows.items()})
    harms: dict[str, dict[SchemeName, tuple[float, ...]]] = {}
    for name, schemes in sums.items():
        harms[name] = {"float": (0.0,) * len(LOSSES)}
        for scheme, total in schemes.items():
            harms[name][scheme] = tuple(float(value) for value in total / len(samples))
    work = [sum(map(sum, rows.values())) for rows in calls]
    median = sorted(range(len(calls)), key=work.__getitem__)[len(calls) // 2]
    return Seen(harms, median, {name: tuple(rows) for name, rows in calls[median].items()})


def _round_all(
    model: JointModel, offered: Mapping[str, tuple[SchemeName, ...]]
) -> dict[str, dict[SchemeName, QuantizedWeight]]:
    """Rounded to nearest, which is what the methods of recipes that are found improve upon."""
    model.requires_grad_(False)
    # Something must ask for gradients, and everything else comes after it.
    model.token_embeddings.requires_grad_(True)
    rounded: dict[str, dict[SchemeName, QuantizedWeight]] = {}
    for name, schemes in offered.items():
        layer = model.get_submodule(name.removesuffix(".weight"))
        assert isinstance(layer, nn.Linear)
        weight = layer.weight.detach().numpy()
        rounded[name] = {}
        for scheme in schemes:
            wanted = fitted(scheme, weight.shape[1])
            if wanted is not None:
                rounded[name][scheme] = ROUND().quantize(weight, wanted)
    return rounded


def _as_batch(image: Image.Image, config: DetectorConfig) -> Batch:
    """One picture as the model takes it; masks, shares and label are of no use here."""
    tiling = config.tiling
    tiles = torch.from_numpy(image_tiles(image, tiling.tile_size, tiling.min_tiles, tiling.max_tiles))[None]
    whole = torch.from_numpy(mask_image(image, config.segmenter.image_size))
    nothing = torch.zeros(1)
    return Batch(
        tiles.requires_grad_(True),
        whole.requires_grad_(True),
        nothing,
        nothing,
        nothing,
        torch.zeros(1, dtype=torch.long),
    )


def _projections(outputs: Outputs, random: torch.Generator) -> tuple[torch.Tensor, ...]:
    """For each loss a number whose square of change is, on average, the loss."""
    verdict, segment, masks = outputs.verdict_logits, outputs.seg_embedding, outputs.mask_logits
    assert verdict is not None and segment is not None and masks is not None and outputs.iou is not None
    odds = verdict[0, :4].logsumexp(0) - verdict[0, 4:].logsumexp(0)
    fake = odds.detach().sigmoid()
    direction = torch.randn(segment.shape, generator=random) / segment.detach().norm()
    mask = masks[0, int(outputs.iou[0].argmax())]
    share = mask.detach().sigmoid()
    cells = torch.randn(mask.shape, generator=random) * (share * (1 - share) / (2 * mask.numel())).sqrt()
    return (fake * (1 - fake) / 2).sqrt() * odds, (direction * segment).sum(), (cells * mask).sum()


def round_input(x: torch.Tensor, scheme: SchemeName) -> torch.Tensor:
    """What a product of that scheme makes of its input [..., in], as float32.

    "tensor": uint8 between the least and the greatest number, zero included; "token": 127 steps to the largest |x| of a
    row; "block": the same for 32 numbers at a time.
    """
    parsed = parse_scheme(scheme)
    assert parsed is not None
    if parsed.activations == "tensor":
        low, high = x.amin().clamp(max=0), x.amax().clamp(min=0)
        step = ((high - low) / 255).clamp(min=1e-30)
        zero = (-low / step).round()
        return ((x / step).round() + zero).clamp(0, 255).sub(zero).mul(step)
    size = x.shape[-1] if parsed.activations == "token" else _ACTIVATION_BLOCK
    if x.shape[-1] % size:
        size = x.shape[-1]
    parts = x.reshape(*x.shape[:-1], -1, size)
    step = (parts.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-30)
    return ((parts / step).round() * step).reshape(x.shape)
