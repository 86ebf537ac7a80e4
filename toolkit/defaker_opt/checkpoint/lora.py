"""LoRA: W + (alpha / r) B A, merged in float32 when a weight is read (Hu et al. 2021, section 4.1).

The adapter's tensors are in a PEFT folder, or in the checkpoint itself as PEFT's wrappers name them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from defaker_opt.checkpoint import TensorFile, Tensors, tensors_of
from defaker_opt.errors import SourceError
from defaker_opt.files import read_json_object
from defaker_opt.weights import Shapes, StoredWeights, open_weights_file

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

_SIDE = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(?:\.(?P<adapter>\w+))?\.weight")
_SAVED = re.compile(r"(?P<module>.+)\.modules_to_save\.\w+\.(?P<last>\w+)")
_REPLACED = re.compile(r".+\.original_module\.\w+")

# Settings of PEFT that change what an adapter computes and are not merged here; none of them is on by default.
_REFUSED = (
    "use_dora", "fan_in_fan_out", "lora_bias", "layer_replication", "target_parameters", "trainable_token_indices",
    "alora_invocation_tokens", "use_qalora", "arrow_config",
)  # fmt: skip

# An adapter was trained on the whole model, or on one of these parts of it.
_PARTS = ("", "language_model.", "vision_model.", "model.", "model.language_model.", "model.vision_tower.")


@dataclass(frozen=True)
class Scaling:
    """How the product of an adapter is scaled. ranks, alphas: patterns of module names → another value."""

    alpha: float
    rank: int | None = None
    root: bool = False
    ranks: Mapping[str, int] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)

    def factor(self, module: str, rank: int) -> float:
        """Alpha / r, or alpha / √r for rank-stabilized adapters."""
        alpha = _by_pattern(self.alphas, module, self.alpha)
        return float(alpha) / (math.sqrt(rank) if self.root else rank)

    def expected_rank(self, module: str) -> int | None:
        """The rank that the configuration states for a module; None where it states none."""
        rank: int | None = _by_pattern(self.ranks, module, self.rank)
        return rank


@dataclass(frozen=True)
class Delta:
    """down [r, in], up [out, r]."""

    sides: Tensors
    down: str
    up: str
    factor: float

    def add_to_(self, weight: torch.Tensor) -> None:
        """Add the product to a float32 weight [out, in]."""
        weight.addmm_(self.sides.read(self.up).float(), self.sides.read(self.down).float(), alpha=self.factor)


@dataclass(frozen=True)
class MergedWeights:
    """The weights that adapters change. deltas: name → what is added."""

    base: Tensors
    deltas: Mapping[str, Delta]

    def shapes(self) -> Shapes:
        """See `TensorFile`."""
        return self.base.shapes()

    def dtype(self, name: str) -> torch.dtype:
        """See `TensorFile`."""
        return self.base.dtype(name)

    def read(self, name: str) -> torch.Tensor:
        """See `TensorFile`: computed in float32, rounded once to the type of the base weight."""
        base = self.base.read(name)
        merged = base.to(torch.float32, copy=True)
        self.deltas[name].add_to_(merged)
        return merged.to(base.dtype)


def unwrap(folder: Path, tensors: Tensors, config: Mapping[str, Any], facts: Mapping[str, Any]) -> Tensors:
    """Merge the adapter that a checkpoint's own tensors hold; undo the names PEFT gives. Raises SourceError."""
    if not any(".lora_" in name or ".modules_to_save." in name for name in tensors.places):
        return tensors
    plain: dict[str, tuple[TensorFile, str]] = {}
    saved: dict[str, tuple[TensorFile, str]] = {}
    ignored = 0
    for name, place in tensors.places.items():
        shown = name.replace("base_model.model.", "").replace(".base_layer.", ".")
        found = _SAVED.fullmatch(shown)
        if found:
            saved[f"{found['module']}.{found['last']}"] = place
        elif _REPLACED.fullmatch(shown):
            ignored += 1
        elif shown in plain:
            raise SourceError(f"{folder}: {name}: {shown} is in the checkpoint twice; export it again with LoRA merged")
        else:
            plain[shown] = place
    sides = {name: place for name, place in plain.items() if ".lora_" in name}
    base = Tensors({**{name: place for name, place in plain.items() if name not in sides}, **saved}, tensors.notes)
    merged = _merge(folder, base, Tensors(sides), _own_scaling(folder, config, facts))
    note = f"{len(saved)} modules that were trained beside LoRA replace {ignored} original tensors"
    return Tensors(merged.places, (*merged.notes, note)) if saved else merged


def merge_folder(tensors: Tensors, folder: Path) -> Tensors:
    """Merge a PEFT adapter folder into a checkpoint. Raises SourceError."""
    scaling = _read_scaling(folder / CONFIG)
    adapter = tensors_of(_open_adapter(folder))
    shown = {name.removeprefix("base_model.model."): place for name, place in adapter.places.items()}
    sides = Tensors({name: place for name, place in shown.items() if ".lora_" in name})
    saved = {
        _found(folder, tensors.places, name, ""): place for name, place in shown.items() if name not in sides.places
    }
    base = Tensors({**tensors.places, **saved}, tensors.notes)
    return _merge(folder, base, sides, scaling)


def _open_adapter(folder: Path) -> StoredWeights:
    if not (folder / WEIGHTS).is_file():
        others = sorted(path.name for path in folder.glob("*.bin")) if folder.is_dir() else []
        hint = f" ({', '.join(others)} would have to be unpickled, which is never done)" if others else ""
        raise SourceError(f"{folder}: no {WEIGHTS} in it{hint}; give a folder that PEFT's save_pretrained wrote")
    return open_weights_file(folder / WEIGHTS)


def _read_scaling(file: Path) -> Scaling:
    data = read_json_object(file)
    if data is None:
        raise SourceError(f"{file}: missing or not a JSON object; give a folder that PEFT's save_pretrained wrote")
    if data.get("peft_type") != "LORA":
        raise SourceError(f"{file}: peft_type is {data.get('peft_type')!r}; only 'LORA' is merged")
    if data.get("bias", "none") != "none":
        raise SourceError(f"{file}: bias is {data['bias']!r}; only 'none' is merged; merge it with PEFT first")
    for key in _REFUSED:
        if data.get(key):
            raise SourceError(f"{file}: {key} is {data[key]!r}, which is not merged here; merge it with PEFT first")
    for key in ("r", "lora_alpha"):
        _check_number(file, key, data.get(key))
    return Scaling(
        float(data["lora_alpha"]),
        int(data["r"]),
        bool(data.get("use_rslora")),
        _read_patterns(file, data, "rank_pattern"),
        _read_patterns(file, data, "alpha_pattern"),
    )


def _read_patterns(file: Path, data: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    patterns = data.get(key) or {}
    if not isinstance(patterns, Mapping):
        raise SourceError(f"{file}: {key} must be a mapping, got {patterns!r}; copy the adapter again")
    for pattern, value in patterns.items():
        try:
            re.compile(pattern)
        except re.error as error:
            raise SourceError(f"{file}: {key}: {pattern} is no pattern ({error}); copy the adapter again") from error
        _check_number(file, f"{key}: {pattern}", value)
    return patterns


def _check_number(file: Path, key: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise SourceError(f"{file}: {key} must be a number above 0, got {value!r}; copy the adapter again")


def _own_scaling(folder: Path, config: Mapping[str, Any], facts: Mapping[str, Any]) -> Scaling:
    """Of an adapter inside a checkpoint: a PEFT file beside it, a stated alpha, or what the released code would use."""
    if (folder / CONFIG).is_file():
        return _read_scaling(folder / CONFIG)
    alpha = facts.get("lora_alpha")
    if isinstance(alpha, (int, float)) and not isinstance(alpha, bool) and 0 < alpha < math.inf:
        return Scaling(float(alpha))
    if "lora_alpha" in facts:
        raise SourceError(f"{folder}: lora_alpha must be a number above 0, got {alpha!r}")
    rank = config.get("use_llm_lora") or config.get("use_backbone_lora")
    if isinstance(rank, int) and rank > 0:  # InternVL's and Sa2VA's own code wraps with alpha = 2 r
        return Scaling(2.0 * rank, rank)
    raise SourceError(
        f"{folder}: holds lora_A and lora_B and does not say by which alpha they are scaled; copy the adapter's "
        f'{CONFIG} beside it, or write {{"lora_alpha": 16}} with the alpha of its training into '
        f"{folder}/checkpoint_meta.json"
    )


def _pairs(folder: Path, sides: Tensors) -> dict[str, tuple[str, str]]:
    """Module → names of its A and B. Raises SourceError for half pairs, several adapters, and other kinds of LoRA."""
    halves: dict[str, dict[str, str]] = {}
    adapters: set[str] = set()
    for name in sorted(sides.places):
        found = _SIDE.fullmatch(name)
        if not found:
            raise SourceError(f"{folder}: {name}: only lora_A and lora_B are merged; merge it with PEFT first")
        halves.setdefault(found["module"], {})[found["side"]] = name
        adapters.add(found["adapter"] or "")
    if len(adapters) > 1:
        raise SourceError(f"{folder}: holds several adapters, {', '.join(sorted(adapters))}; export one of them")
    missing = [f"{module}.lora_{side}" for module, half in halves.items() for side in "AB" if side not in half]
    if missing:
        raise SourceError(
            f"{folder}: an incomplete adapter lacks {', '.join(missing[:5])} ({len(missing)} in all); copy it again"
        )
    return {module: (half["A"], half["B"]) for module, half in halves.items()}


def _merge(folder: Path, base: Tensors, sides: Tensors, scaling: Scaling) -> Tensors:
    shapes, side_shapes = base.shapes(), sides.shapes()
    deltas: dict[str, Delta] = {}
    for module, (down, up) in _pairs(folder, sides).items():
        name = _found(folder, base.places, module, ".weight")
        _check_shapes(folder, module, (down, side_shapes[down]), (up, side_shapes[up]), (name, shapes[name]))
        rank, stated = side_shapes[down][0], scaling.expected_rank(module)
        if stated is not None and stated != rank:
            raise SourceError(f"{folder}: {down} has rank {rank}, but r = {stated} is stated; copy the adapter again")
        deltas[name] = Delta(sides, down, up, scaling.factor(module, rank))
    merged = MergedWeights(base, deltas)
    places = {**base.places, **{name: (merged, name) for name in deltas}}
    factors = sorted({f"{delta.factor:g}" for delta in deltas.values()})
    note = f"LoRA merged into {len(deltas)} weights, B A times {', '.join(factors)}"
    return Tensors(places, (*base.notes, note))


def _check_shapes(folder: Path, module: str, *named: tuple[str, tuple[int, ...]]) -> None:
    """A [r, in], B [out, r] and the weight [out, in] belong together."""
    shapes = [shape for _, shape in named]
    if all(len(shape) == 2 for shape in shapes):
        (rank, width), (out, inner), whole = shapes
        if rank == inner and (out, width) == whole:
            return
    told = ", ".join(f"{name} {list(shape)}" for name, shape in named)
    raise SourceError(f"{folder}: {module}: {told} do not fit together; is it an adapter of this checkpoint?")


def _found(folder: Path, places: Mapping[str, object], module: str, ending: str) -> str:
    """The full name of what an adapter belongs to. Raises SourceError where none, or more than one, fits."""
    found = [part + module + ending for part in _PARTS if part + module + ending in places]
    if len(found) == 1:
        return found[0]
    which = f"could be {' or '.join(found)}" if found else "is not in the checkpoint"
    raise SourceError(f"{folder}: {module}{ending} {which}; is it an adapter of this checkpoint?")


def _by_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """PEFT's rule: a pattern stands for the end of a module's name."""
    return next(_matching(patterns, module), default)


def _matching(patterns: Mapping[str, Any], module: str) -> Iterator[Any]:
    for pattern, value in patterns.items():
        if re.fullmatch(rf"(?:.*\.)?(?:{pattern})", module):
            yield value
