"""Attention's scores from codes: ranges of the queries and keys that their product multiplies."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from defaker_opt.config import DetectorConfig
from defaker_opt.detector import OPERANDS, attention_modules
from defaker_opt.histogram import Clip, input_scale
from defaker_opt.methods import Need, Statistics
from defaker_opt.runtime.spec import STAGES


def coded_attentions(config: DetectorConfig, static: Mapping[str, bool]) -> tuple[str, ...]:
    """Attentions of which every layer has static activations. static: of each linear layer that a pass speaks about."""
    return tuple(
        attention
        for stage in STAGES
        for attention in attention_modules(config, stage)
        if all(of := [each for name, each in static.items() if name.startswith(f"{attention}.")]) and of
    )


def operand_needs(attentions: Iterable[str]) -> dict[str, tuple[Need, ...]]:
    """What must be seen of queries and keys."""
    return {f"{attention}.{operand}": ("histogram",) for attention in attentions for operand in OPERANDS}


def operand_scales(attention: str, seen: Mapping[str, Statistics], clip: Clip) -> tuple[float, float]:
    """The steps of queries and of keys."""
    histograms = [seen[f"{attention}.{operand}"].histogram for operand in OPERANDS]
    queries, keys = (input_scale(counts, clip) for counts in histograms if counts is not None)
    return queries, keys
