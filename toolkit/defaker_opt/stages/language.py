"""The decoder: embeddings → eight verdict logits and the segmentation embedding, with key/values in and out."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from transformers import LlamaConfig, Phi3Config, PreTrainedConfig, Qwen2Config
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding
from transformers.models.phi3.modeling_phi3 import Phi3DecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

from defaker_opt.config import DetectorConfig, LanguageConfig
from defaker_opt.runtime.spec import StageSpec, TensorSpec
from defaker_opt.savings import Savings
from defaker_opt.stages import Read

_CONFIGS: dict[str, type[PreTrainedConfig]] = {"llama": LlamaConfig, "qwen2": Qwen2Config, "phi3": Phi3Config}
_LAYERS: dict[str, type[nn.Module]] = {
    "llama": LlamaDecoderLayer,
    "qwen2": Qwen2DecoderLayer,
    "phi3": Phi3DecoderLayer,
}

# See `StageFile`.
BLOCKS = "layers"


class Language(nn.Module):
    """Decoder layers, final norm, an eight-row verdict head and the projection of the [SEG] state.

    The two heads read the last position only, so each question is one call that ends where its answer is read.
    """

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__()
        language, width = config.language, config.language.hidden_size
        decoder = _decoder_config(language)
        self.layers = nn.ModuleList(_LAYERS[language.architecture](decoder, i) for i in range(language.layers))
        self.norm = LlamaRMSNorm(width, eps=language.norm_eps)
        self.verdict_head = nn.Linear(width, 8, bias=False)
        self.seg_projection = nn.Sequential(
            nn.Linear(width, width), nn.ReLU(), nn.Linear(width, config.segmenter.hidden_size)
        )
        with torch.device("cpu"):  # the frequencies are computed here, not loaded, also where the rest is "meta"
            inv_freq = LlamaRotaryEmbedding(decoder).inv_freq
            if language.rope_factors:
                inv_freq = _longer_waves(language)
        self.inv_freq: torch.Tensor
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.rope_scale = language.rope_scale

    def forward(
        self, inputs_embeds: torch.Tensor, position_ids: torch.Tensor, *past: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """inputs_embeds [1, S, H], position_ids [1, S], past key and value of each layer [1, kv, P, d].

        Returns verdict_logits [1, 8], seg_embedding [1, C], last_hidden [1, H], which a vocabulary head may read, and
        key and value of the S new positions of each layer.
        """
        hidden, present = self.hidden_states(inputs_embeds, position_ids, past)
        last = self.norm(hidden[:, -1])
        return self.verdict_head(last), self.seg_projection(last), last, *present

    def hidden_states(
        self, inputs_embeds: torch.Tensor, position_ids: torch.Tensor, past: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """States after the last layer, before the final norm [1, S, H], and the new key/values."""
        cache, mask = _KeyValues(past), _causal_mask(inputs_embeds, past[0].shape[2])
        rotation = self.rotation(position_ids)
        hidden = inputs_embeds
        for layer in self.layers:
            hidden = layer(hidden, attention_mask=mask, past_key_values=cache, position_embeddings=rotation)
        return hidden, tuple(cache.present)

    def rotation(self, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines [1, S, d] for positions [1, S]."""
        angles = position_ids[:, :, None].float() * self.inv_freq.to(position_ids.device)  # [1, S, d / 2]
        angles = torch.cat((angles, angles), dim=-1)
        if self.rope_scale == 1.0:
            return angles.cos(), angles.sin()
        return angles.cos() * self.rope_scale, angles.sin() * self.rope_scale


class LastRowLanguage(Language):
    """The same for export: of the last layer, keys and values of all rows, and all else of the last row alone."""

    def hidden_states(
        self, inputs_embeds: torch.Tensor, position_ids: torch.Tensor, past: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """State of the last position [1, 1, H], and the new key/values of all."""
        cache, mask = _KeyValues(past), _causal_mask(inputs_embeds, past[0].shape[2])
        cos, sin = self.rotation(position_ids)
        hidden = inputs_embeds
        *earlier, last = self.layers
        for layer in earlier:
            hidden = layer(hidden, attention_mask=mask, past_key_values=cache, position_embeddings=(cos, sin))
        # What this returns is not used, so its graph keeps only what the keys and values need.
        last(hidden, attention_mask=mask, past_key_values=cache, position_embeddings=(cos, sin))
        row = last(
            hidden[:, -1:],
            attention_mask=mask[:, :, -1:],
            past_key_values=_Known(cache.latest),
            position_embeddings=(cos[:, -1:], sin[:, -1:]),
        )
        return row, tuple(cache.present)


class _KeyValues:
    """Stands where transformers expects a cache: prepends the past, and hands out what is new."""

    def __init__(self, past: tuple[torch.Tensor, ...]) -> None:
        self.past = past
        self.present: list[torch.Tensor] = []
        self.latest: tuple[torch.Tensor, torch.Tensor] = (past[0], past[1])

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer: int, *_: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.present += [key, value]
        self.latest = (
            torch.cat((self.past[2 * layer], key), dim=2),
            torch.cat((self.past[2 * layer + 1], value), dim=2),
        )
        return self.latest


class _Known:
    """Stands where transformers expects a cache, for a row whose key and value are among the known ones."""

    def __init__(self, known: tuple[torch.Tensor, torch.Tensor]) -> None:
        self.known = known

    def update(self, *_: object) -> tuple[torch.Tensor, torch.Tensor]:
        return self.known


def _causal_mask(inputs_embeds: torch.Tensor, past_length: int) -> torch.Tensor:
    """Additive mask [1, 1, S, P + S]: each position sees the past, the ones before it, and itself."""
    length, device = inputs_embeds.shape[1], inputs_embeds.device
    query = torch.arange(length, device=device)[:, None] + past_length
    key = torch.arange(past_length + length, device=device)[None, :]
    hidden = torch.finfo(inputs_embeds.dtype).min
    return torch.where(key <= query, 0.0, hidden).to(inputs_embeds.dtype)[None, None]


def _longer_waves(language: LanguageConfig) -> torch.Tensor:
    """LongRoPE's frequencies [d / 2]; the order of operations is that of transformers, to the last bit."""
    exponents = torch.arange(0, language.head_dim, 2, dtype=torch.int64).float() / language.head_dim
    frequencies: torch.Tensor = 1.0 / (torch.tensor(language.rope_factors) * language.rope_theta**exponents)
    return frequencies


def _decoder_config(language: LanguageConfig) -> PreTrainedConfig:
    rope = {"rope_type": "default", "rope_theta": language.rope_theta}
    return _CONFIGS[language.architecture](
        hidden_size=language.hidden_size,
        intermediate_size=language.intermediate_size,
        num_hidden_layers=language.layers,
        num_attention_heads=language.heads,
        num_key_value_heads=language.kv_heads,
        head_dim=language.head_dim,
        vocab_size=language.vocab_size,
        max_position_embeddings=language.max_positions,
        rms_norm_eps=language.norm_eps,
        hidden_act=language.activation,
        rope_parameters=rope,
        pad_token_id=0,
        attn_implementation="eager",
    )


def _key_values(config: DetectorConfig, prefix: str, length: str) -> tuple[TensorSpec, ...]:
    language = config.language
    return tuple(
        TensorSpec(f"{prefix}_{kind}_{layer}", "float32", (1, language.kv_heads, length, language.head_dim))
        for layer in range(language.layers)
        for kind in ("key", "value")
    )


def spec(config: DetectorConfig) -> StageSpec:
    """See `StageFile`."""
    width = config.language.hidden_size
    return StageSpec(
        "language",
        (
            TensorSpec("inputs_embeds", "float32", (1, "tokens", width)),
            TensorSpec("position_ids", "int64", (1, "tokens")),
            *_key_values(config, "past", "past"),
        ),
        (
            TensorSpec("verdict_logits", "float32", (1, 8)),
            TensorSpec("seg_embedding", "float32", (1, config.segmenter.hidden_size)),
            TensorSpec("last_hidden", "float32", (1, width)),
            *_key_values(config, "present", "tokens"),
        ),
    )


def build(config: DetectorConfig, savings: Savings) -> nn.Module:
    """See `StageFile`."""
    return LastRowLanguage(config) if savings.last_layer_rows else Language(config)


def stored_only(config: DetectorConfig) -> dict[str, tuple[int, ...]]:
    """See `StageFile`: the two tables over the whole vocabulary, of which a build takes a few rows."""
    table = (config.language.vocab_size, config.language.hidden_size)
    return {"embed_tokens.weight": table, "lm_head.weight": table}


def derived(config: DetectorConfig, read: Read) -> dict[str, Callable[[], torch.Tensor]]:
    """See `StageFile`: the verdict head is the eight answer rows of the vocabulary head."""

    def verdict_head() -> torch.Tensor:
        assert config.prompt is not None, "a detector without prompts has no verdict head"
        return read("language.lm_head.weight")[list(config.prompt.answers)]

    return {"verdict_head.weight": verdict_head}
