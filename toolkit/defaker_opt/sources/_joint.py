"""From a joint checkpoint's configuration and tensor names to a plan; what the families have in common."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from defaker_opt.config import FORMAT, DetectorConfig
from defaker_opt.errors import ConfigError, SourceError
from defaker_opt.sources import Checkpoint, Plan
from defaker_opt.sources._accounting import Named, drawn_projection, name_tensors, takes_of, with_new_rows
from defaker_opt.sources._decoder import read_decoder
from defaker_opt.sources._prompts import NEW_TOKENS, find_prompt
from defaker_opt.sources._segmenter import read_segmenter
from defaker_opt.strict import read_value

T = TypeVar("T")


@dataclass(frozen=True)
class Release:
    """What a family's `config.json` says, in the words of a detector's; `decoder` is the language model's own part."""

    vision: Mapping[str, Any]
    decoder: Mapping[str, Any]
    decoder_key: str
    template: str
    tile_size: Any
    tied: bool = False


def read_release(checkpoint: Checkpoint) -> Release:
    """The `config.json` of InternVL2 and Sa2VA. Raises SourceError."""
    config = checkpoint.config
    refuse_other_values(
        checkpoint, {"select_layer": -1, "downsample_ratio": 0.5, "ps_version": "v2", "pad2square": False}
    )
    for key in ("vision_config", "llm_config", "force_image_size"):
        if key not in config:
            raise SourceError(f"{checkpoint.folder}/config.json: {key} is missing; copy the checkpoint again")
    return Release(
        vision=read_part(checkpoint, "vision_config", _vision),
        decoder=config["llm_config"],
        decoder_key="llm_config",
        template=str(config.get("template", "")),
        tile_size=config["force_image_size"],
        tied=read_part(checkpoint, "llm_config", lambda llm: bool(llm.get("tie_word_embeddings", False))),
    )


def plan_joint(checkpoint: Checkpoint, release: Release, renamed: tuple[tuple[str, str], ...]) -> Plan:
    """Account for every tensor, and read off their shapes what the configuration does not say. Raises SourceError."""
    folder = checkpoint.folder
    named = name_tensors(folder, checkpoint.shapes, renamed, tied=release.tied)
    decoder, notes = _said_where(
        checkpoint, release.decoder_key, lambda: read_decoder(release.decoder, named.shapes, release.decoder_key)
    )
    segmenter = read_segmenter(checkpoint, named.shapes)
    rows = int(decoder["vocab_size"])
    found = find_prompt(checkpoint, release.template, rows if _unjoined(named) else None)
    decoder["vocab_size"] = rows + (len(NEW_TOKENS) if found.new_rows else 0)
    drawn = drawn_projection(named, decoder["hidden_size"], segmenter["hidden_size"])
    config = _read_config(
        checkpoint,
        {
            "format": FORMAT,
            "name": folder.resolve().name,
            "trained": not drawn,
            # The released code ignores the folder's own tiling limits and always uses these.
            "tiling": {"tile_size": release.tile_size, "min_tiles": 1, "max_tiles": 12},
            "vision": release.vision,
            "language": decoder,
            "segmenter": segmenter,
            "prompt": None if found.prompt is None else dataclasses.asdict(found.prompt),
        },
    )
    takes = takes_of(named, config.language)
    if found.new_rows:
        takes = with_new_rows(takes, len(NEW_TOKENS))
    if drawn:
        notes.append(
            f"untrained: the projection from [SEG] to SAM2 ({', '.join(sorted(drawn))}) is not in the checkpoint; "
            "it is drawn from a seed, so no mask means anything until it is taught"
        )
    return Plan(config, takes, named.ignored, (*notes, *found.notes), drawn)


def _unjoined(named: Named) -> bool:
    """Whether a language model and a segmenter were never taught to speak through [SEG]."""
    return "language.seg_projection.0.weight" not in named.shapes


def _read_config(checkpoint: Checkpoint, data: Mapping[str, Any]) -> DetectorConfig:
    try:
        return read_value(DetectorConfig, data, f"{checkpoint.folder}/config.json, as converted")
    except ConfigError as error:
        raise SourceError(str(error)) from error


def read_part(checkpoint: Checkpoint, key: str, read: Callable[[Any], T]) -> T:
    """Read one part of `config.json`. Raises SourceError where it is not what a release has there."""
    return _said_where(checkpoint, key, lambda: read(checkpoint.config[key]))


def _said_where(checkpoint: Checkpoint, key: str, read: Callable[[], T]) -> T:
    try:
        return read()
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise SourceError(
            f"{checkpoint.folder}/config.json: {key}: {error!r}; not the configuration of a release"
        ) from error


def refuse_other_values(checkpoint: Checkpoint, required: Mapping[str, Any]) -> None:
    """Raise SourceError for a setting that would change results and has no place in the format."""
    for key, value in required.items():
        if checkpoint.config.get(key, value) != value:
            raise SourceError(
                f"{checkpoint.folder}/config.json: {key} is {checkpoint.config[key]!r}; only {value!r} is converted"
            )


def _vision(vision: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "hidden_size": vision["hidden_size"],
        "intermediate_size": vision["intermediate_size"],
        "layers": vision["num_hidden_layers"],
        "heads": vision["num_attention_heads"],
        "patch_size": vision["patch_size"],
        "norm": vision.get("norm_type", "layer_norm"),
        "norm_eps": vision.get("layer_norm_eps", 1e-6),
        "activation": vision.get("hidden_act", "gelu"),
        "qkv_bias": vision.get("qkv_bias", True),
        "qk_norm": vision.get("qk_normalization", False),
    }
