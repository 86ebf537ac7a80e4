"""Names in InternVL2 and Sa2VA checkpoints, and in transformers' form of InternVL → names in a detector folder."""

from __future__ import annotations

_LAYER = r"language_model\.model\.layers\.(\d+)\."
_VIT = r"vision_model\.encoder\.layers\.(\d+)\."

# Pattern of the whole source name → name in the detector folder; {part} stands for q, k and v of a fused projection.
ORIGINAL: tuple[tuple[str, str], ...] = (
    # InternViT
    (r"vision_model\.embeddings\.class_embedding", r"vision_encoder.tower.embeddings.cls_token"),
    (r"vision_model\.embeddings\.position_embedding", r"vision_encoder.tower.embeddings.position_embeddings"),
    (
        r"vision_model\.embeddings\.patch_embedding\.(weight|bias)",
        r"vision_encoder.tower.embeddings.patch_embeddings.projection.\1",
    ),
    (_VIT + r"attn\.qkv\.(weight|bias)", r"vision_encoder.tower.encoder.layer.\1.attention.{part}_proj.\2"),
    (_VIT + r"attn\.proj\.(weight|bias)", r"vision_encoder.tower.encoder.layer.\1.attention.projection_layer.\2"),
    (_VIT + r"attn\.([qk]_norm)\.weight", r"vision_encoder.tower.encoder.layer.\1.attention.\2.weight"),
    (_VIT + r"mlp\.(fc[12])\.(weight|bias)", r"vision_encoder.tower.encoder.layer.\1.mlp.\2.\3"),
    (_VIT + r"norm1\.(weight|bias)", r"vision_encoder.tower.encoder.layer.\1.layernorm_before.\2"),
    (_VIT + r"norm2\.(weight|bias)", r"vision_encoder.tower.encoder.layer.\1.layernorm_after.\2"),
    (_VIT + r"ls([12])", r"vision_encoder.tower.encoder.layer.\1.lambda_\2"),
    (r"mlp1\.([013])\.(weight|bias)", r"vision_encoder.projector.\1.\2"),
    # InternLM2, which becomes Llama
    (r"language_model\.model\.tok_embeddings\.weight", r"language.embed_tokens.weight"),
    (_LAYER + r"attention\.wqkv\.weight", r"language.layers.\1.self_attn.{part}_proj.weight"),
    (_LAYER + r"attention\.wo\.weight", r"language.layers.\1.self_attn.o_proj.weight"),
    (_LAYER + r"feed_forward\.w1\.weight", r"language.layers.\1.mlp.gate_proj.weight"),
    (_LAYER + r"feed_forward\.w3\.weight", r"language.layers.\1.mlp.up_proj.weight"),
    (_LAYER + r"feed_forward\.w2\.weight", r"language.layers.\1.mlp.down_proj.weight"),
    (_LAYER + r"attention_norm\.weight", r"language.layers.\1.input_layernorm.weight"),
    (_LAYER + r"ffn_norm\.weight", r"language.layers.\1.post_attention_layernorm.weight"),
    (r"language_model\.output\.weight", r"language.lm_head.weight"),
    # Llama, Qwen2, Phi-3
    (r"language_model\.model\.embed_tokens\.weight", r"language.embed_tokens.weight"),
    (_LAYER + r"self_attn\.(\w+_proj)\.(weight|bias)", r"language.layers.\1.self_attn.\2.\3"),
    (_LAYER + r"mlp\.(\w+_proj)\.weight", r"language.layers.\1.mlp.\2.weight"),
    (_LAYER + r"(input|post_attention)_layernorm\.weight", r"language.layers.\1.\2_layernorm.weight"),
    (r"language_model\.lm_head\.weight", r"language.lm_head.weight"),
    (r"language_model\.model\.norm\.weight", r"language.norm.weight"),
    (r"text_hidden_fcs\.([02])\.(weight|bias)", r"language.seg_projection.\1.\2"),
)

# A checkpoint that transformers wrote may have its language model within `model` or beside it.
_TEXT = r"(?:model\.language_model|language_model\.model|model\.language_model\.model)\."

TRANSFORMERS: tuple[tuple[str, str], ...] = (
    (r"(?:model\.)?vision_tower\.(.+)", r"vision_encoder.tower.\1"),
    (r"(?:model\.)?multi_modal_projector\.layer_norm\.(weight|bias)", r"vision_encoder.projector.0.\1"),
    (r"(?:model\.)?multi_modal_projector\.linear_1\.(weight|bias)", r"vision_encoder.projector.1.\1"),
    (r"(?:model\.)?multi_modal_projector\.linear_2\.(weight|bias)", r"vision_encoder.projector.3.\1"),
    (_TEXT + r"(embed_tokens\.weight|norm\.weight|layers\.\d+\..+)", r"language.\1"),
    (r"(?:language_model\.)?lm_head\.weight", r"language.lm_head.weight"),
    (r"text_hidden_fcs\.([02])\.(weight|bias)", r"language.seg_projection.\1.\2"),
)
