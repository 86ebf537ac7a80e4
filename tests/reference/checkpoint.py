"""A tiny checkpoint in the released Sa2VA layout, written name by name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

Shapes = Iterator[tuple[str, tuple[int, ...]]]

VIT, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INNER, VOCAB = 32, 64, 4, 2, 16, 96, 64
TRUNK, WIDTH, LAYERS = 16, 64, 2
SAM2 = "grounding_encoder.sam2_model."


def linear(name: str, out: int, inner: int, bias: bool = True) -> Shapes:
    yield f"{name}.weight", (out, inner)
    if bias:
        yield f"{name}.bias", (out,)


def norm(name: str, width: int, bias: bool = True) -> Shapes:
    yield f"{name}.weight", (width,)
    if bias:
        yield f"{name}.bias", (width,)


def vision() -> Shapes:
    yield "vision_model.embeddings.class_embedding", (1, 1, VIT)
    yield "vision_model.embeddings.position_embedding", (1, 17, VIT)
    yield "vision_model.embeddings.patch_embedding.weight", (VIT, 3, 14, 14)
    yield "vision_model.embeddings.patch_embedding.bias", (VIT,)
    for i in range(LAYERS):
        layer = f"vision_model.encoder.layers.{i}."
        yield from linear(layer + "attn.qkv", 3 * VIT, VIT)
        yield from linear(layer + "attn.proj", VIT, VIT)
        yield from linear(layer + "mlp.fc1", 2 * VIT, VIT)
        yield from linear(layer + "mlp.fc2", VIT, 2 * VIT)
        for k in (1, 2):
            yield from norm(layer + f"norm{k}", VIT)
            yield layer + f"ls{k}", (VIT,)
    yield from norm("mlp1.0", 4 * VIT)
    yield from linear("mlp1.1", HIDDEN, 4 * VIT)
    yield from linear("mlp1.3", HIDDEN, HIDDEN)


def internlm2() -> Shapes:
    yield "language_model.model.tok_embeddings.weight", (VOCAB, HIDDEN)
    yield "language_model.output.weight", (VOCAB, HIDDEN)
    yield from norm("language_model.model.norm", HIDDEN, bias=False)
    for i in range(LAYERS):
        layer = f"language_model.model.layers.{i}."
        yield layer + "attention.wqkv.weight", ((HEADS + 2 * KV_HEADS) * HEAD_DIM, HIDDEN)
        yield layer + "attention.wo.weight", (HIDDEN, HEADS * HEAD_DIM)
        yield layer + "feed_forward.w1.weight", (INNER, HIDDEN)
        yield layer + "feed_forward.w3.weight", (INNER, HIDDEN)
        yield layer + "feed_forward.w2.weight", (HIDDEN, INNER)
        yield from norm(layer + "attention_norm", HIDDEN, bias=False)
        yield from norm(layer + "ffn_norm", HIDDEN, bias=False)


def llama_like(kind: str) -> Shapes:
    yield "language_model.model.embed_tokens.weight", (VOCAB, HIDDEN)
    yield "language_model.lm_head.weight", (VOCAB, HIDDEN)
    yield from norm("language_model.model.norm", HIDDEN, bias=False)
    for i in range(LAYERS):
        layer = f"language_model.model.layers.{i}."
        if kind == "phi3":
            yield layer + "self_attn.qkv_proj.weight", ((HEADS + 2 * KV_HEADS) * HEAD_DIM, HIDDEN)
            yield layer + "mlp.gate_up_proj.weight", (2 * INNER, HIDDEN)
        else:
            biased = kind == "qwen2"
            yield from linear(layer + "self_attn.q_proj", HEADS * HEAD_DIM, HIDDEN, biased)
            yield from linear(layer + "self_attn.k_proj", KV_HEADS * HEAD_DIM, HIDDEN, biased)
            yield from linear(layer + "self_attn.v_proj", KV_HEADS * HEAD_DIM, HIDDEN, biased)
            yield layer + "mlp.gate_proj.weight", (INNER, HIDDEN)
            yield layer + "mlp.up_proj.weight", (INNER, HIDDEN)
        yield layer + "self_attn.o_proj.weight", (HIDDEN, HEADS * HEAD_DIM)
        yield layer + "mlp.down_proj.weight", (HIDDEN, INNER)
        yield from norm(layer + "input_layernorm", HIDDEN, bias=False)
        yield from norm(layer + "post_attention_layernorm", HIDDEN, bias=False)


def trunk() -> Shapes:
    base = SAM2 + "image_encoder.trunk."
    yield base + "pos_embed", (1, TRUNK, 7, 7)
    yield base + "pos_embed_window", (1, TRUNK, 8, 8)
    yield base + "patch_embed.proj.weight", (TRUNK, 3, 7, 7)
    yield base + "patch_embed.proj.bias", (TRUNK,)
    width = TRUNK
    for block, stage in enumerate((0, 1, 2, 2, 3)):
        name, old = f"{base}blocks.{block}.", width
        if width != TRUNK * 2**stage:
            width *= 2
            yield from linear(name + "proj", width, old)
        yield from norm(name + "norm1", old)
        yield from linear(name + "attn.qkv", 3 * width, old)
        yield from linear(name + "attn.proj", width, width)
        yield from norm(name + "norm2", width)
        yield from linear(name + "mlp.layers.0", 4 * width, width)
        yield from linear(name + "mlp.layers.1", width, 4 * width)
    for stage in range(4):
        yield f"{SAM2}image_encoder.neck.convs.{3 - stage}.conv.weight", (WIDTH, TRUNK * 2**stage, 1, 1)
        yield f"{SAM2}image_encoder.neck.convs.{3 - stage}.conv.bias", (WIDTH,)


def attention(name: str, inner: int) -> Shapes:
    for part in ("q_proj", "k_proj", "v_proj"):
        yield from linear(f"{name}.{part}", inner, WIDTH)
    yield from linear(f"{name}.out_proj", WIDTH, inner)


def mlp(name: str, sizes: tuple[int, ...]) -> Shapes:
    for i in range(len(sizes) - 1):
        yield from linear(f"{name}.layers.{i}", sizes[i + 1], sizes[i])


def mask_decoder() -> Shapes:
    base = SAM2 + "sam_mask_decoder."
    for token, count in (("iou_token", 1), ("mask_tokens", 4), ("obj_score_token", 1)):
        yield f"{base}{token}.weight", (count, WIDTH)
    for i in range(2):
        layer = f"{base}transformer.layers.{i}."
        yield from attention(layer + "self_attn", WIDTH)
        yield from attention(layer + "cross_attn_token_to_image", WIDTH // 2)
        yield from attention(layer + "cross_attn_image_to_token", WIDTH // 2)
        yield from mlp(layer + "mlp", (WIDTH, 128, WIDTH))
        for k in (1, 2, 3, 4):
            yield from norm(layer + f"norm{k}", WIDTH)
    yield from attention(base + "transformer.final_attn_token_to_image", WIDTH // 2)
    yield from norm(base + "transformer.norm_final_attn", WIDTH)
    yield base + "output_upscaling.0.weight", (WIDTH, WIDTH // 4, 2, 2)
    yield base + "output_upscaling.0.bias", (WIDTH // 4,)
    yield from norm(base + "output_upscaling.1", WIDTH // 4)
    yield base + "output_upscaling.3.weight", (WIDTH // 4, WIDTH // 8, 2, 2)
    yield base + "output_upscaling.3.bias", (WIDTH // 8,)
    for i in range(4):
        yield from mlp(f"{base}output_hypernetworks_mlps.{i}", (WIDTH, WIDTH, WIDTH, WIDTH // 8))
    yield from mlp(base + "iou_prediction_head", (WIDTH, 48, 48, 4))
    yield from mlp(base + "pred_obj_score_head", (WIDTH, WIDTH, WIDTH, 1))
    for i, divisor in ((0, 8), (1, 4)):
        yield f"{base}conv_s{i}.weight", (WIDTH // divisor, WIDTH, 1, 1)
        yield f"{base}conv_s{i}.bias", (WIDTH // divisor,)


def prompts_and_memory() -> Shapes:
    base = SAM2 + "sam_prompt_encoder."
    yield base + "pe_layer.positional_encoding_gaussian_matrix", (2, WIDTH // 2)
    yield base + "not_a_point_embed.weight", (1, WIDTH)
    yield base + "no_mask_embed.weight", (1, WIDTH)
    yield base + "point_embeddings.0.weight", (1, WIDTH)
    yield base + "mask_downscaling.0.weight", (4, 1, 2, 2)
    yield SAM2 + "no_mem_embed", (1, 1, WIDTH)
    yield SAM2 + "maskmem_tpos_enc", (7, 1, 1, 64)
    yield SAM2 + "memory_encoder.fuser.layers.0.g_weight", (WIDTH,)
    yield from linear("text_hidden_fcs.0", HIDDEN, HIDDEN)
    yield from linear("text_hidden_fcs.2", WIDTH, HIDDEN)


def checkpoint_shapes(kind: str) -> dict[str, tuple[int, ...]]:
    language = internlm2() if kind == "internlm2" else llama_like(kind)
    return dict([*vision(), *language, *trunk(), *mask_decoder(), *prompts_and_memory()])


def checkpoint_config(kind: str) -> dict[str, object]:
    vision_config = {"hidden_size": VIT, "intermediate_size": 2 * VIT, "num_hidden_layers": LAYERS}
    llm_config = {"model_type": kind, "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": LAYERS}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM}
    return {
        "model_type": "sa2va_chat",
        "force_image_size": 56,
        "template": "internlm2_chat",
        "vision_config": {**vision_config, "num_attention_heads": 2, "patch_size": 14},
        "llm_config": {**llm_config, **heads, "rms_norm_eps": 1e-5, "max_position_embeddings": 4096},
    }


SIDECAR = {
    "sam2_trunk": {"num_heads": 1, "global_att_blocks": [3], "window_spec": [8, 4, 4, 2]},
    "prompt": {
        "before": [1, 2],
        "verdict": [3, 4, 5],
        "mask": [3, 4, 6, 7],
        "fake_answers": [10, 11, 12, 13],
        "real_answers": [14, 15, 16, 17],
    },
}


def write_checkpoint(folder: Path, kind: str, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Config, weights in one file, and what a release does not state beside them."""
    generator = torch.Generator().manual_seed(3)
    folder.mkdir(parents=True)
    tensors = {
        name: (torch.randn(shape, generator=generator) * 0.2).to(dtype)
        for name, shape in checkpoint_shapes(kind).items()
    }
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(checkpoint_config(kind)))
    (folder / "checkpoint_meta.json").write_text(json.dumps(SIDECAR))
    return folder
