"""The language part as a model of transformers: its names, and its `config.json`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from defaker_opt.config import LanguageConfig
from defaker_opt.sources._vocabulary import open_vocabulary
from defaker_opt.words import END_TOKENS

_STAGE = "language."
# What the names of all decoder layers begin with; heads are not among them.
LAYERS = f"{_STAGE}layers."
_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "phi3": "Phi3ForCausalLM"}


def model_name(name: str) -> str:
    """A detector's name as models of transformers have it."""
    return f"model.{name.removeprefix(_STAGE)}"


def own_name(name: str) -> str:
    """A detector's name for one of such a model."""
    return _STAGE + name.removeprefix("model.")


def model_config(language: LanguageConfig, tokenizer: Path) -> dict[str, Any]:
    """`config.json` in words that transformers 4 and 5 both read."""
    vocabulary = open_vocabulary(tokenizer)
    ends = [token for name in END_TOKENS if vocabulary and (token := vocabulary.find(name)) is not None]
    positions = language.max_positions
    scaling: dict[str, Any] = {}
    if language.rope_factors or language.rope_scale != 1.0:
        scaling = {"rope_scaling": _long_rope(language), "original_max_position_embeddings": positions}
        # The scale of both waves is computed from how much longer than the original context the longest one is
        # (Ding et al. 2024, section 3.3); this is the length that gives ours.
        positions = round(positions ** (language.rope_scale**2))
    return {
        "architectures": [_ARCHITECTURES[language.architecture]],
        "model_type": language.architecture,
        "hidden_size": language.hidden_size,
        "intermediate_size": language.intermediate_size,
        "num_hidden_layers": language.layers,
        "num_attention_heads": language.heads,
        "num_key_value_heads": language.kv_heads,
        "head_dim": language.head_dim,
        "vocab_size": language.vocab_size,
        "hidden_act": language.activation,
        "rms_norm_eps": language.norm_eps,
        "rope_theta": language.rope_theta,
        **scaling,
        "max_position_embeddings": positions,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": ends or None,
        "pad_token_id": ends[0] if ends else None,
        "torch_dtype": "float16",
    }


def _long_rope(language: LanguageConfig) -> dict[str, Any]:
    """A detector keeps the short factors alone, so longer texts than the original context get them too."""
    factors = list(language.rope_factors) or [1.0] * (language.head_dim // 2)
    return {"type": "longrope", "short_factor": factors, "long_factor": factors}
