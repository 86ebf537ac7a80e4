"""What quantization methods want to know of a layer's inputs, collected on pictures through the joint model.

Stage after stage, block after block: each layer is given what the layers before it, already quantized, make of the
pictures. Activations stay float32 here; how backends round them belongs to an encoding, not to a weight's codes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from defaker_opt.detector import OPERANDS
from defaker_opt.errors import PassError
from defaker_opt.histogram import BINS, FIRST_BIN, FRACTION_SHIFT, WITHOUT_SIGN
from defaker_opt.methods import Need, Statistics
from defaker_opt.observe.operands import noted_operands

# Layers by their full names, and attentions by those of their operands.
Layers = Mapping[str, nn.Module]


@dataclass
class Sums:
    """Running sums over tokens of one layer's inputs, in float64."""

    needs: Collection[Need]
    tokens: int = 0
    weight: float = 0.0
    hessian: torch.Tensor | None = None
    shift: torch.Tensor | None = None
    absolute: torch.Tensor | None = None
    largest: torch.Tensor | None = None
    histogram: torch.Tensor | None = None

    def add_(self, x: torch.Tensor, before: torch.Tensor | None, weights: torch.Tensor | None) -> None:
        """x, before [tokens, in], weights [tokens], None for 1 each; `before` is x when nothing was quantized."""
        self.tokens += len(x)
        self.weight += len(x) if weights is None else float(weights.sum())
        weighted = x if weights is None else x * weights[:, None]
        if "hessian" in self.needs:
            self.hessian = _sum(self.hessian, weighted.T @ x)
        if "shift" in self.needs:
            assert before is not None
            self.shift = _sum(self.shift, (before - x).T @ weighted)
        if "mean_abs" in self.needs:
            self.absolute = _sum(self.absolute, weighted.abs().sum(dim=0))
        if "largest" in self.needs:
            largest = x.abs().amax(dim=0).double()
            self.largest = largest if self.largest is None else torch.maximum(self.largest, largest)
        if "histogram" in self.needs:
            self.histogram = _sum(self.histogram, _magnitudes(x))

    def statistics(self) -> Statistics:
        """The means so far."""
        assert self.weight > 0, "no token with a weight was seen"
        hessian, shift, mean_abs = (
            None if total is None else (total / self.weight).numpy()
            for total in (self.hessian, self.shift, self.absolute)
        )
        largest, histogram = (None if seen is None else seen.numpy() for seen in (self.largest, self.histogram))
        return Statistics(self.tokens, hessian, shift, mean_abs, largest, histogram)


def _sum(total: torch.Tensor | None, more: torch.Tensor) -> torch.Tensor:
    return more.double() if total is None else total.add_(more)


def _magnitudes(x: torch.Tensor) -> torch.Tensor:
    """How many numbers of x fall into each bin; what is smaller or larger than all goes into the outermost."""
    bits = x.float().reshape(-1).view(torch.int32)
    counts = torch.bincount((bits >> FRACTION_SHIFT) & WITHOUT_SIGN, minlength=WITHOUT_SIGN + 1)
    within = counts[FIRST_BIN : FIRST_BIN + BINS].clone()
    within[0] += counts[:FIRST_BIN].sum()
    within[-1] += counts[FIRST_BIN + BINS :].sum()
    return within


@dataclass
class Collector:
    """Sums for each layer that needs any. Layers that are always given one and the same tensor share their sums."""

    needs: Mapping[str, Collection[Need]]
    sums: dict[str, Sums] = field(default_factory=dict)
    shared: dict[str, str] = field(default_factory=dict)

    def add_(
        self,
        seen: Mapping[str, list[torch.Tensor]],
        before: Mapping[str, list[torch.Tensor]],
        weights: torch.Tensor | None,
    ) -> None:
        """Add what layers were given in one call of their block, and what in the same call when nothing was quantized.

        weights: one for each token [tokens]; a layer that is given another number of tokens weighs all alike.
        """
        first: dict[tuple[int, ...], str] = {}
        for name, tensors in seen.items():
            key = (*map(id, tensors), hash(tuple(sorted(self.needs[name]))))
            owner = first.setdefault(key, name)
            if self.shared.setdefault(name, owner) != name:
                continue
            sums = self.sums.setdefault(name, Sums(self.needs[name]))
            earlier = before.get(name, [None] * len(tensors))
            for tensor, other in zip(tensors, earlier, strict=True):
                x = tensor.reshape(-1, tensor.shape[-1])
                # A sum is found much faster, and may overflow where all are finite.
                if not torch.isfinite(x.sum()) and not torch.isfinite(x).all():
                    raise PassError(
                        f"{name}: it is given numbers that are not finite on a calibration picture; "
                        "are all weights of the source finite?"
                    )
                fitting = weights if weights is not None and len(weights) == len(x) else None
                sums.add_(x, None if other is None else other.reshape(x.shape), fitting)

    def found(self) -> dict[str, Statistics]:
        """What was seen of each layer; layers that share their sums share it."""
        by_owner = {owner: sums.statistics() for owner, sums in self.sums.items()}
        return {name: by_owner[owner] for name, owner in self.shared.items()}


@contextmanager
def recorded(layers: Layers) -> Iterator[dict[str, list[torch.Tensor]]]:
    """While it is open, every input of layers, and operand of attentions, is put into the lists it gives."""
    seen: dict[str, list[torch.Tensor]] = {}
    attentions = {
        name.rpartition(".")[0]: module for name, module in layers.items() if name.rpartition(".")[2] in OPERANDS
    }

    def hook(name: str) -> object:
        def note(module: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
            seen.setdefault(name, []).append(given[0])

        return note

    def note_operands(attention: str, *operands: torch.Tensor) -> None:
        for operand, tensor in zip(OPERANDS, operands, strict=True):
            if f"{attention}.{operand}" in layers:
                seen.setdefault(f"{attention}.{operand}", []).append(tensor)

    handles = [
        layer.register_forward_pre_hook(hook(name))  # type: ignore[arg-type]
        for name, layer in layers.items()
        if name.rpartition(".")[0] not in attentions
    ]
    try:
        with noted_operands(attentions, note_operands):
            yield seen
    finally:
        for handle in handles:
            handle.remove()
