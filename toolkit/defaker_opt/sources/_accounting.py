"""Every tensor of a checkpoint has a place or a reason to be left out; the others are an error that names them all."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from defaker_opt.config import LanguageConfig
from defaker_opt.errors import SourceError
from defaker_opt.sources import Change, Take
from defaker_opt.sources._sam2_names import IGNORED, RENAMED
from defaker_opt.weights import Shapes

_EMBEDDING, _HEAD = "language.embed_tokens.weight", "language.lm_head.weight"


@dataclass(frozen=True)
class Named:
    """sources: name in the detector folder → name in the checkpoint; {part} is left in names of fused projections.

    shapes: the checkpoint's shapes by the names of the detector folder.
    """

    sources: Mapping[str, str]
    shapes: Shapes
    ignored: Mapping[str, str]


def name_tensors(folder: Path, shapes: Shapes, renamed: tuple[tuple[str, str], ...], *, tied: bool) -> Named:
    """Find the place of every tensor by its name. Raises SourceError with all that have none, or share one."""
    sources: dict[str, str] = {}
    ignored: dict[str, str] = {}
    problems: list[str] = []
    for name, shape in sorted(shapes.items()):
        target = _target(name, (*renamed, *RENAMED))
        reason = next((reason for pattern, reason in IGNORED if re.fullmatch(pattern, name)), None)
        if target is None and reason is not None:
            ignored[name] = reason
        elif target is None:
            problems.append(f"{name}: {list(shape)}, unexpected")
        elif target in sources:
            problems.append(f"{name}: {list(shape)}, a second one for {target}, which {sources[target]} gives")
        else:
            sources[target] = name
    if problems:
        raise SourceError(f"{folder}: tensors nobody has a place for:\n  " + "\n  ".join(problems))
    if tied and _HEAD not in sources and _EMBEDDING in sources:
        sources[_HEAD] = sources[_EMBEDDING]
    return Named(sources, {target: shapes[name] for target, name in sources.items()}, ignored)


def _target(name: str, renamed: tuple[tuple[str, str], ...]) -> str | None:
    for pattern, replacement in renamed:
        found = re.fullmatch(pattern, name)
        if found:
            return found.expand(replacement)
    return None


def takes_of(named: Named, language: LanguageConfig) -> dict[str, Take]:
    """Every tensor of the detector folder that one of the checkpoint gives, and how."""
    return {
        made: take
        for target, source in named.sources.items()
        for made, take in _made_from(target, source, named.shapes[target], language)
    }


def drawn_projection(named: Named, width: int, segmenter_width: int) -> Shapes:
    """Shapes of the projection from [SEG] to SAM2 if the checkpoint has nothing of it; none otherwise."""
    prefix = "language.seg_projection."
    if any(target.startswith(prefix) for target in named.sources):
        return {}
    return {
        f"{prefix}0.weight": (width, width),
        f"{prefix}0.bias": (width,),
        f"{prefix}2.weight": (segmenter_width, width),
        f"{prefix}2.bias": (segmenter_width,),
    }


def with_new_rows(takes: Mapping[str, Take], count: int) -> dict[str, Take]:
    """Both vocabulary tables, longer by rows that are the mean of the others, as when transformers resizes them."""

    def lengthen(table: torch.Tensor) -> torch.Tensor:
        mean = table.mean(dim=0, keepdim=True, dtype=torch.float32).to(table.dtype)
        return torch.cat((table, mean.expand(count, -1)))

    changed = {
        name: replace(takes[name], change=lengthen, how=f"{count} rows appended, each the mean of the others")
        for name in (_EMBEDDING, _HEAD)
        if name in takes
    }
    return {**takes, **changed}


def _made_from(
    target: str, source: str, shape: tuple[int, ...], language: LanguageConfig
) -> Iterator[tuple[str, Take]]:
    if "{part}" not in target:
        yield target, Take(source, *_reshaped(target, source))
        return
    for index, part in enumerate("qkv"):
        if "wqkv" in source:
            change, how = _grouped_part(index, language), "rows of the fused wqkv"
        else:
            change, how = _third(index, shape[0] if shape else 0), "rows of the fused qkv"
        yield target.format(part=part), Take(source, change, how)


def _reshaped(target: str, source: str) -> tuple[Change | None, str]:
    if target == "mask_encoder.no_memory_embedding":
        return (lambda tensor: tensor.reshape(1, -1)), "reshaped to one row"
    if target == _HEAD and "embed" in source:
        return None, "tied: the embedding, written once more"
    return None, ""


def _third(index: int, rows: int) -> Change:
    size = math.ceil(rows / 3)  # a surplus row makes one part too long, and its shape is then refused
    return lambda tensor: tensor[index * size : (index + 1) * size]


def _grouped_part(index: int, language: LanguageConfig) -> Change:
    """InternLM2 interleaves by key/value group: each group holds its queries, one key and one value."""
    queries, head_dim = language.heads // language.kv_heads, language.head_dim
    rows = (slice(0, queries), slice(queries, queries + 1), slice(queries + 1, queries + 2))[index]
    return lambda tensor: tensor.reshape(language.kv_heads, queries + 2, head_dim, -1)[:, rows].reshape(
        -1, tensor.shape[-1]
    )
