"""InternVL in the form transformers writes it (`InternVLForConditionalGeneration`), to be joined with a SAM2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from defaker_opt.errors import SourceError
from defaker_opt.sources import Checkpoint, Plan
from defaker_opt.sources._internvl_names import TRANSFORMERS
from defaker_opt.sources._joint import Release, plan_joint, read_part, refuse_other_values

MODEL_TYPE = "internvl"

# The chat templates of the released ones, by the decoder inside; InternLM2 has become Llama in this form.
_TEMPLATES = {"llama": "internlm2_chat", "qwen2": "qwen_chat", "phi3": "phi3_chat"}


def plan(checkpoint: Checkpoint) -> Plan:
    """See `Source`."""
    config = checkpoint.config
    refuse_other_values(
        checkpoint, {"vision_feature_layer": -1, "downsample_ratio": 0.5, "vision_feature_select_strategy": "default"}
    )
    for key in ("vision_config", "text_config"):
        if key not in config:
            raise SourceError(f"{checkpoint.folder}/config.json: {key} is missing; copy the checkpoint again")
    decoder = dict(config["text_config"])
    release = Release(
        vision=read_part(checkpoint, "vision_config", _vision),
        decoder=decoder,
        decoder_key="text_config",
        template=_TEMPLATES.get(str(decoder.get("model_type")), ""),
        tile_size=read_part(checkpoint, "vision_config", lambda vision: _side(vision.get("image_size", 448))),
        tied=bool(config.get("tie_word_embeddings", True)),
    )
    return plan_joint(checkpoint, release, TRANSFORMERS)


def _vision(vision: Mapping[str, Any]) -> dict[str, Any]:
    if vision.get("use_mean_pooling", True) is not True:
        raise SourceError("config.json: vision_config.use_mean_pooling is False; only True is converted")
    return {
        "hidden_size": vision["hidden_size"],
        "intermediate_size": vision["intermediate_size"],
        "layers": vision["num_hidden_layers"],
        "heads": vision["num_attention_heads"],
        "patch_size": _side(vision["patch_size"]),
        "norm": vision.get("norm_type", "layer_norm"),
        "norm_eps": vision.get("layer_norm_eps", 1e-6),
        "activation": vision.get("hidden_act", "gelu"),
        "qkv_bias": vision.get("attention_bias", True),
        "qk_norm": vision.get("use_qk_norm", False),
    }


def _side(size: Any) -> Any:
    return size[0] if isinstance(size, list) else size
