"""Names of SAM2, as released and as transformers writes it → names in a detector folder; what is left out and why."""

from __future__ import annotations

import re

from defaker_opt.checkpoint.segmenter import ORIGINAL as _PREFIX
from defaker_opt.checkpoint.segmenter import TRANSFORMERS as _TRANSFORMERS_PREFIX

_SAM2 = re.escape(_PREFIX)
_DECODER = _SAM2 + r"sam_mask_decoder\."
_TRUNK = _SAM2 + r"image_encoder\.trunk\."
_HF = re.escape(_TRANSFORMERS_PREFIX)

# Pattern of the whole source name → name in the detector folder.
ORIGINAL: tuple[tuple[str, str], ...] = (
    # SAM2 image encoder
    (_TRUNK + r"(pos_embed|pos_embed_window)", r"mask_encoder.trunk.\1"),
    (_TRUNK + r"patch_embed\.proj\.(weight|bias)", r"mask_encoder.trunk.patch_embed.projection.\1"),
    (_TRUNK + r"blocks\.(\d+)\.norm([12])\.(weight|bias)", r"mask_encoder.trunk.blocks.\1.layer_norm\2.\3"),
    (_TRUNK + r"blocks\.(\d+)\.attn\.(qkv|proj)\.(weight|bias)", r"mask_encoder.trunk.blocks.\1.attn.\2.\3"),
    (_TRUNK + r"blocks\.(\d+)\.mlp\.layers\.0\.(weight|bias)", r"mask_encoder.trunk.blocks.\1.mlp.proj_in.\2"),
    (_TRUNK + r"blocks\.(\d+)\.mlp\.layers\.1\.(weight|bias)", r"mask_encoder.trunk.blocks.\1.mlp.proj_out.\2"),
    (_TRUNK + r"blocks\.(\d+)\.proj\.(weight|bias)", r"mask_encoder.trunk.blocks.\1.proj.\2"),
    (_SAM2 + r"image_encoder\.neck\.convs\.(\d)\.conv\.(weight|bias)", r"mask_encoder.neck.\1.\2"),
    (_SAM2 + r"no_mem_embed", r"mask_encoder.no_memory_embedding"),
    (_DECODER + r"conv_s([01])\.(weight|bias)", r"mask_encoder.high_res_\1.\2"),
    # SAM2 prompt encoder, of which three constants remain
    (
        _SAM2 + r"sam_prompt_encoder\.pe_layer\.positional_encoding_gaussian_matrix",
        r"mask_decoder.position_matrix",
    ),
    (_SAM2 + r"sam_prompt_encoder\.not_a_point_embed\.weight", r"mask_decoder.not_a_point"),
    (_SAM2 + r"sam_prompt_encoder\.no_mask_embed\.weight", r"mask_decoder.no_mask"),
    # SAM2 mask decoder
    (_DECODER + r"(iou_token|mask_tokens|obj_score_token)\.weight", r"mask_decoder.\1.weight"),
    (
        _DECODER + r"transformer\.layers\.(\d+)\.(\w*attn\w*)\.out_proj\.(weight|bias)",
        r"mask_decoder.transformer.layers.\1.\2.o_proj.\3",
    ),
    (
        _DECODER + r"transformer\.layers\.(\d+)\.(\w*attn\w*)\.([qkv]_proj)\.(weight|bias)",
        r"mask_decoder.transformer.layers.\1.\2.\3.\4",
    ),
    (
        _DECODER + r"transformer\.layers\.(\d+)\.norm(\d)\.(weight|bias)",
        r"mask_decoder.transformer.layers.\1.layer_norm\2.\3",
    ),
    (
        _DECODER + r"transformer\.layers\.(\d+)\.mlp\.layers\.0\.(weight|bias)",
        r"mask_decoder.transformer.layers.\1.mlp.proj_in.\2",
    ),
    (
        _DECODER + r"transformer\.layers\.(\d+)\.mlp\.layers\.1\.(weight|bias)",
        r"mask_decoder.transformer.layers.\1.mlp.proj_out.\2",
    ),
    (
        _DECODER + r"transformer\.final_attn_token_to_image\.out_proj\.(weight|bias)",
        r"mask_decoder.transformer.final_attn_token_to_image.o_proj.\1",
    ),
    (
        _DECODER + r"transformer\.final_attn_token_to_image\.([qkv]_proj)\.(weight|bias)",
        r"mask_decoder.transformer.final_attn_token_to_image.\1.\2",
    ),
    (_DECODER + r"transformer\.norm_final_attn\.(weight|bias)", r"mask_decoder.transformer.layer_norm_final_attn.\1"),
    (_DECODER + r"output_upscaling\.0\.(weight|bias)", r"mask_decoder.upscale_conv1.\1"),
    (_DECODER + r"output_upscaling\.1\.(weight|bias)", r"mask_decoder.upscale_layer_norm.\1"),
    (_DECODER + r"output_upscaling\.3\.(weight|bias)", r"mask_decoder.upscale_conv2.\1"),
    *(
        (
            _DECODER + rf"output_hypernetworks_mlps\.{mask}\.layers\.{layer}\.(weight|bias)",
            rf"mask_decoder.hypernetworks.{mask - 1}.{name}.\1",
        )
        for mask in (1, 2, 3)
        for layer, name in enumerate(("proj_in", "layers.0", "proj_out"))
    ),
    *(
        (_DECODER + rf"iou_prediction_head\.layers\.{layer}\.(weight|bias)", rf"mask_decoder.iou_head.{name}.\1")
        for layer, name in enumerate(("proj_in", "layers.0", "proj_out"))
    ),
)

# The modules of a detector are those of transformers, so most names stay.
TRANSFORMERS: tuple[tuple[str, str], ...] = (
    (_HF + r"vision_encoder\.backbone\.(.+)", r"mask_encoder.trunk.\1"),
    (_HF + r"vision_encoder\.neck\.convs\.(\d)\.(weight|bias)", r"mask_encoder.neck.\1.\2"),
    (_HF + r"no_memory_embedding", r"mask_encoder.no_memory_embedding"),
    (_HF + r"mask_decoder\.conv_s([01])\.(weight|bias)", r"mask_encoder.high_res_\1.\2"),
    (_HF + r"shared_image_embedding\.positional_embedding", r"mask_decoder.position_matrix"),
    (_HF + r"prompt_encoder\.not_a_point_embed\.weight", r"mask_decoder.not_a_point"),
    (_HF + r"prompt_encoder\.no_mask_embed\.weight", r"mask_decoder.no_mask"),
    (_HF + r"mask_decoder\.(iou_token|mask_tokens|obj_score_token)\.weight", r"mask_decoder.\1.weight"),
    (_HF + r"mask_decoder\.(transformer\..+|upscale_\w+\.(?:weight|bias))", r"mask_decoder.\1"),
    (_HF + r"mask_decoder\.iou_prediction_head\.(.+)", r"mask_decoder.iou_head.\1"),
    *(
        (_HF + rf"mask_decoder\.output_hypernetworks_mlps\.{mask}\.(.+)", rf"mask_decoder.hypernetworks.{mask - 1}.\1")
        for mask in (1, 2, 3)
    ),
)

_VIDEO = "video memory: a still picture has no frames before it"

# Pattern of the whole source name → why it is not in a detector folder.
ORIGINAL_IGNORED: tuple[tuple[str, str], ...] = (
    (_SAM2 + r"(memory_attention|memory_encoder|mask_downsample|obj_ptr_proj|obj_ptr_tpos_proj)\..*", _VIDEO),
    (_SAM2 + r"(maskmem_tpos_enc|no_mem_pos_enc|no_obj_ptr|no_obj_embed_spatial)", _VIDEO),
    (_SAM2 + r"sam_prompt_encoder\.point_embeddings\..*", "click and box prompts: the prompt is always [SEG]"),
    (_SAM2 + r"sam_prompt_encoder\.mask_downscaling\..*", "mask prompts: the prompt is always [SEG]"),
    (_DECODER + r"output_hypernetworks_mlps\.0\..*", "the single-mask output: the best of the other three is used"),
    (_DECODER + r"pred_obj_score_head\..*", "object score: the released code does not read it"),
)

_HF_VIDEO = (
    r"(?:memory_attention|memory_encoder|mask_downsample|object_pointer_proj|"
    r"temporal_positional_encoding_projection_layer)\..*|memory_temporal_positional_encoding|"
    r"no_memory_positional_encoding|no_object_pointer|occlusion_spatial_embedding_parameter"
)

TRANSFORMERS_IGNORED: tuple[tuple[str, str], ...] = (
    (_HF + f"(?:{_HF_VIDEO})", _VIDEO),
    (_HF + r"prompt_encoder\.point_embed\..*", "click and box prompts: the prompt is always [SEG]"),
    (_HF + r"prompt_encoder\.mask_embed\..*", "mask prompts: the prompt is always [SEG]"),
    (_HF + r"prompt_encoder\.shared_embedding\..*", "a copy of shared_image_embedding"),
    (_HF + r"mask_decoder\.output_hypernetworks_mlps\.0\..*", "the single-mask output: the best of three is used"),
    (_HF + r"mask_decoder\.pred_obj_score_head\..*", "object score: the released code does not read it"),
)

RENAMED = ORIGINAL + TRANSFORMERS
IGNORED = ORIGINAL_IGNORED + TRANSFORMERS_IGNORED
