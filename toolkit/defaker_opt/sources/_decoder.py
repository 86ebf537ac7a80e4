"""The language model's configuration, and the ways of counting positions that are converted."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from defaker_opt.errors import SourceError, one_of
from defaker_opt.weights import Shapes

_ARCHITECTURES = {"internlm2": "llama", "llama": "llama", "qwen2": "qwen2", "phi3": "phi3"}

# 13 tiles of 256 tokens and the questions around them.
_LONGEST_PROMPT = 3500

_LONG_ROPES = ("longrope", "su")  # two names of one thing


def read_decoder(decoder: Mapping[str, Any], shapes: Shapes, key: str) -> tuple[dict[str, Any], list[str]]:
    """The `language` part of a detector's configuration, and notes. shapes: by the names of a detector folder.

    Raises SourceError for what would compute something else, KeyError and TypeError for what is no configuration.
    """
    kind = str(decoder.get("model_type", ""))
    if kind not in _ARCHITECTURES:
        raise SourceError(f"config.json: {key}.model_type {one_of(kind, _ARCHITECTURES)}")
    _refuse_other_decoders(decoder, kind, key)
    table = shapes.get("language.lm_head.weight", ())
    if not table:
        raise SourceError("language.lm_head.weight: missing from the checkpoint; is it complete?")
    heads = decoder["num_attention_heads"]
    language = {
        "architecture": _ARCHITECTURES[kind],
        "hidden_size": decoder["hidden_size"],
        "intermediate_size": decoder["intermediate_size"],
        "layers": decoder["num_hidden_layers"],
        "heads": heads,
        "kv_heads": decoder.get("num_key_value_heads") or heads,
        "head_dim": decoder.get("head_dim") or decoder["hidden_size"] // max(1, heads),
        "vocab_size": table[0],
        "norm_eps": decoder["rms_norm_eps"],
        "rope_theta": _rope(decoder, key).get("rope_theta", decoder.get("rope_theta", 10_000)),
        "max_positions": decoder["max_position_embeddings"],
    }
    changed, notes = _positions(decoder, key)
    return {**language, **changed}, notes


def _rope(decoder: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    scaling = decoder.get("rope_scaling") or decoder.get("rope_parameters") or {}
    if not isinstance(scaling, Mapping):
        raise SourceError(f"{key}.rope_scaling: must be a mapping, got {scaling!r}")
    return scaling


def _positions(decoder: Mapping[str, Any], key: str) -> tuple[dict[str, Any], list[str]]:
    scaling = _rope(decoder, key)
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "default":
        return {}, []
    if kind == "dynamic":
        limit = decoder["max_position_embeddings"]
        return {}, [f"rope_scaling dynamic: without effect below {limit:,} tokens, dropped"]
    if kind in _LONG_ROPES:
        return _long_rope(decoder, scaling, key)
    raise SourceError(f"{key}.rope_scaling: {kind!r} is not converted yet; default, dynamic and longrope are")


def _long_rope(decoder: Mapping[str, Any], scaling: Mapping[str, Any], key: str) -> tuple[dict[str, Any], list[str]]:
    """LongRoPE (Ding et al. 2024, section 3.3) within the original context: short factors, and one scale of both waves.

    A longer sequence would need the long factors, so the original context becomes the limit.
    """
    original = scaling.get("original_max_position_embeddings") or decoder.get("original_max_position_embeddings")
    factors = scaling.get("short_factor")
    if not isinstance(original, int) or not isinstance(factors, list):
        raise SourceError(
            f"{key}.rope_scaling: longrope needs short_factor and original_max_position_embeddings; "
            "copy the checkpoint's config.json again"
        )
    ratio = scaling.get("factor") or decoder["max_position_embeddings"] / original
    scale = scaling.get("attention_factor")
    if scale is None:
        scale = math.sqrt(1 + math.log(ratio) / math.log(original)) if ratio > 1 else 1.0
    note = f"rope_scaling longrope: with its short factors, which are exact up to {original:,} tokens"
    return {"rope_factors": factors, "rope_scale": scale, "max_positions": original}, [note]


def _refuse_other_decoders(decoder: Mapping[str, Any], kind: str, key: str) -> None:
    """Raise SourceError for settings that change results and have no place in the format."""
    partial = _rope(decoder, key).get("partial_rotary_factor", decoder.get("partial_rotary_factor", 1.0))
    if partial != 1.0:
        raise SourceError(f"{key}.partial_rotary_factor: {partial!r}; only 1.0 is converted")
    if decoder.get("hidden_act", "silu") != "silu":
        raise SourceError(f"{key}.hidden_act: {decoder['hidden_act']!r}; only 'silu' is converted")
    window = decoder.get("sliding_window") if kind == "phi3" or decoder.get("use_sliding_window") else None
    if window is not None and window < _LONGEST_PROMPT:
        raise SourceError(f"{key}.sliding_window: {window} is shorter than a prompt, and is not converted")
