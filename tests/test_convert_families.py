"""Every family of checkpoints in its released form: InternVL2 with a SAM2 of its own, and what transformers writes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from defaker_opt.checkpoint import Extras
from defaker_opt.checkpoint.segmenter import ORIGINAL, open_segmenter
from defaker_opt.convert import convert, plan_conversion
from defaker_opt.detector import Detector, load_detector, stored_shapes
from defaker_opt.errors import SourceError
from tests.conftest import defaker_opt
from tests.reference.checkpoint import HIDDEN, SIDECAR, VOCAB, checkpoint_config, write_checkpoint

# What only SAM2.1's files hold, and what the released files call otherwise than Sa2VA does.
NEW_IN_21 = {"no_obj_embed_spatial": (1, 64), "obj_ptr_tpos_proj.weight": (64, 64), "obj_ptr_tpos_proj.bias": (64,)}


def split_checkpoint(tmp_path: Path, kind: str = "internlm2") -> tuple[Path, Path, dict[str, torch.Tensor]]:
    """The tiny Sa2VA checkpoint as an InternVL2 folder and a SAM2.1 `.pt`; its tensors."""
    folder = write_checkpoint(tmp_path / "internvl2", kind)
    tensors = load_file(folder / "model.safetensors")
    sam2 = {name.removeprefix(ORIGINAL): t.float() for name, t in tensors.items() if name.startswith(ORIGINAL)}
    sam2 = {name.replace("g_weight", "gamma"): tensor for name, tensor in sam2.items()}
    sam2 |= {name: torch.zeros(shape) for name, shape in NEW_IN_21.items()}
    torch.save({"model": sam2}, tmp_path / "sam2.1.pt")
    rest = {name: t for name, t in tensors.items() if not name.startswith((ORIGINAL, "text_hidden_fcs"))}
    save_file(rest, folder / "model.safetensors")
    config = {**checkpoint_config(kind), "model_type": "internvl_chat", "template": "internlm2-chat"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder, tmp_path / "sam2.1.pt", tensors


def test_internvl2_and_a_sam2_file_give_what_the_joint_checkpoint_gives(tmp_path: Path) -> None:
    joint = write_checkpoint(tmp_path / "joint", "internlm2")
    convert(joint, tmp_path / "expected")
    folder, sam2, _ = split_checkpoint(tmp_path)
    done = convert(folder, tmp_path / "detector", extras=Extras(segmenter=sam2))
    expected, got = load_detector(str(tmp_path / "expected")), load_detector(str(tmp_path / "detector"))
    projection = {name for name in stored_shapes(expected.config) if "seg_projection" in name}
    assert set(done.drawn) == projection
    for name in set(stored_shapes(expected.config)) - projection:
        tensor = got.weights.read(name)
        if name in ("language.embed_tokens.weight", "language.lm_head.weight"):
            assert tensor.shape[0] == VOCAB + 5
            mean = tensor[:VOCAB].float().mean(dim=0).to(tensor.dtype)
            assert torch.equal(tensor[VOCAB:], mean.expand(5, -1))
            tensor = tensor[:VOCAB]
        assert torch.equal(tensor.float(), expected.weights.read(name).float()), name
    assert expected.config.trained
    assert not got.config.trained
    assert any("untrained: the projection from [SEG]" in note for note in done.notes)
    assert any(f"[SEG], <p>, </p>, <vp>, </vp> appended as tokens {VOCAB} to {VOCAB + 4}" in n for n in done.notes)
    assert {"bfloat16", "float32", "float16"} == {
        str(got.weights.read(name).dtype).removeprefix("torch.") for name in got.weights.shapes()
    }


def test_the_drawn_projection_is_the_same_every_time(tmp_path: Path) -> None:
    folder, sam2, _ = split_checkpoint(tmp_path)
    for name in ("a", "b"):
        convert(folder, tmp_path / name, extras=Extras(segmenter=sam2))
    digests = {load_detector(str(tmp_path / name)).weights.digest() for name in ("a", "b")}
    assert len(digests) == 1
    weight = load_detector(str(tmp_path / "a")).weights.read("language.seg_projection.0.weight").float()
    assert 0.5 < weight.std() * HIDDEN**0.5 < 2


def test_the_command_says_that_the_projection_is_untrained_and_quantize_passes_it_on(tmp_path: Path) -> None:
    folder, sam2, _ = split_checkpoint(tmp_path)
    done = defaker_opt("convert", folder, "--segmenter", sam2, "-o", tmp_path / "detector")
    assert done.returncode == 0, done.stderr
    assert "note: untrained: the projection from [SEG] to SAM2" in done.stdout
    preview = defaker_opt("quantize", "--recipe", "int8", "--source", tmp_path / "detector", "--dry-run")
    assert preview.returncode == 0, preview.stderr
    assert "untrained" in preview.stdout


def test_internvl2_without_a_segmenter_asks_for_one(tmp_path: Path) -> None:
    folder, _, _ = split_checkpoint(tmp_path)
    with pytest.raises(SourceError, match=r"without a segmenter; add SAM2's weights with --segmenter FILE\.pt"):
        convert(folder, tmp_path / "detector")


def test_the_command_names_a_segmenter_it_cannot_take(tmp_path: Path) -> None:
    folder, _, _ = split_checkpoint(tmp_path)
    (tmp_path / "sam2.txt").write_text("")
    for name, words in (
        ("no.pt", "no such file"),
        ("sam2.txt", "a segmenter ends in .pt, .pth or .safetensors, or is a folder"),
    ):
        output = tmp_path / "out" / "detector"
        done = defaker_opt("convert", folder, "--segmenter", tmp_path / name, "-o", output)
        assert done.returncode == 2
        assert f"{tmp_path / name}: {words}" in done.stderr
        assert "Traceback" not in done.stderr
        assert not output.parent.exists()


def test_a_joint_checkpoint_takes_no_second_segmenter(tmp_path: Path) -> None:
    _, sam2, _ = split_checkpoint(tmp_path)
    joint = write_checkpoint(tmp_path / "joint", "internlm2")
    with pytest.raises(SourceError, match="has a segmenter of its own; convert it without --segmenter"):
        convert(joint, tmp_path / "detector", extras=Extras(segmenter=sam2))


class Harmful:
    """What a pickle may do."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("harm-was-done"),))


def bad_segmenter(kind: str, file: Path, sam2: dict[str, torch.Tensor]) -> Path:
    contents: dict[str, Any] = {
        "code": {"model": {**sam2, "x": Harmful()}},
        "number in weights": {"model": {**sam2, "epoch": 3}},
        "list": [1, 2],
        "nothing": {"model": {}},
        "sparse": {"model": {**sam2, "x": torch.eye(3).to_sparse()}},
    }
    if kind in contents:
        torch.save(contents[kind], file)
    elif kind == "cut":
        torch.save({"model": sam2}, file)
        file.write_bytes(file.read_bytes()[:5000])
    elif kind == "text":
        file.write_text("version https://git-lfs\n")
    elif kind == "suffix":
        file = file.with_suffix(".bin")
        torch.save(sam2, file)
    elif kind == "twice":
        torch.save({**sam2, "sam2_model.no_mem_embed": sam2["no_mem_embed"]}, file)
    return file


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("code", "more than tensors and plain containers, so it is not opened"),
        ("number in weights", "not a plain tensor: epoch: int"),
        ("list", "must hold tensors by name"),
        ("nothing", "must hold tensors by name"),
        ("sparse", "not a plain tensor: x: Tensor"),
        ("cut", "cannot be read .*is it complete"),
        ("text", "not opened|cannot be read"),
        ("suffix", r"a segmenter ends in \.pt, \.pth or \.safetensors"),
        ("missing", "no such file; give SAM2's"),
        ("twice", "no_mem_embed is in it twice, with and without a prefix"),
    ],
)
def test_a_segmenter_that_is_no_plain_weights_is_refused(
    kind: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder, sam2, _ = split_checkpoint(tmp_path)
    file = bad_segmenter(kind, tmp_path / "bad.pt", torch.load(sam2)["model"])
    with pytest.raises(SourceError, match=words) as caught:
        convert(folder, tmp_path / "out" / "detector", extras=Extras(segmenter=file))
    assert str(file) in str(caught.value)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "harm-was-done").exists()


@pytest.mark.parametrize("form", ["old pickle", "weights alone", "training state", "safetensors", "prefixed"])
def test_a_segmenter_may_come_in_several_forms(form: str, tmp_path: Path) -> None:
    folder, file, _ = split_checkpoint(tmp_path)
    sam2 = torch.load(file)["model"]
    convert(folder, tmp_path / "expected", extras=Extras(segmenter=file))
    other = tmp_path / "other.pt"
    if form == "old pickle":
        torch.save({"model": sam2}, other, _use_new_zipfile_serialization=False)
    elif form == "weights alone":
        torch.save(sam2, other)
    elif form == "training state":
        torch.save({"model": sam2, "optimizer": {"lr": 1e-3}, "epoch": 7}, other)
    elif form == "safetensors":
        other = tmp_path / "other.safetensors"
        save_file(sam2, other)
    else:
        torch.save({f"sam2_model.{name}": tensor for name, tensor in sam2.items()}, other)
    done = convert(folder, tmp_path / "detector", extras=Extras(segmenter=other))
    assert any("holds epoch, optimizer, which is not converted" in note for note in done.notes) == (
        form == "training state"
    )
    digests = {load_detector(str(tmp_path / name)).weights.digest() for name in ("expected", "detector")}
    assert len(digests) == 1


def test_a_zip_pt_is_memory_mapped(tmp_path: Path) -> None:
    _, file, _ = split_checkpoint(tmp_path)
    tensors = open_segmenter(file)
    maps = Path("/proc/self/maps")
    if not maps.is_file():
        pytest.skip("this system does not tell what is mapped")
    assert tensors.shapes()
    assert str(file) in maps.read_text()


def test_a_type_that_is_no_weight_is_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint", "internlm2")
    tensors = load_file(folder / "model.safetensors")
    tensors["mlp1.3.bias"] = tensors["mlp1.3.bias"].double()
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(SourceError, match=r"mlp1\.3\.bias: is float64; only bfloat16, float16, float32 are converted"):
        convert(folder, tmp_path / "detector")
    assert not (tmp_path / "detector").exists()


@pytest.mark.parametrize("kind", ["qwen2", "internlm2"])
def test_a_tied_head_is_written_once_more(kind: str, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint", kind)
    tensors = load_file(folder / "model.safetensors")
    head = "language_model.output.weight" if kind == "internlm2" else "language_model.lm_head.weight"
    del tensors[head]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(SourceError, match=r"lm_head\.weight: missing"):
        convert(folder, tmp_path / "detector")
    config = json.loads((folder / "config.json").read_text())
    config["llm_config"]["tie_word_embeddings"] = True
    (folder / "config.json").write_text(json.dumps(config))
    convert(folder, tmp_path / "detector")
    read = load_detector(str(tmp_path / "detector")).weights.read
    assert torch.equal(read("language.lm_head.weight"), read("language.embed_tokens.weight"))


def test_two_tensors_for_one_place_are_told(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint", "internlm2")
    tensors = load_file(folder / "model.safetensors")
    tensors["language_model.model.embed_tokens.weight"] = tensors["language_model.model.tok_embeddings.weight"].clone()
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(SourceError, match=r"a second one for language\.embed_tokens\.weight"):
        convert(folder, tmp_path / "detector")


# --- what transformers writes ----------------------------------------------------------------------------------------


def tiny_internvl() -> Any:
    from transformers import InternVLConfig, InternVLForConditionalGeneration, InternVLVisionConfig, LlamaConfig

    text = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, vocab_size=VOCAB, max_position_embeddings=4096, rope_theta=50_000.0, rms_norm_eps=1e-5,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    vision = InternVLVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, patch_size=[14, 14],
        image_size=[56, 56], attention_bias=True,
    )  # fmt: skip
    torch.manual_seed(5)
    config = InternVLConfig(vision_config=vision, text_config=text, image_token_id=3, tie_word_embeddings=False)
    model = InternVLForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2 + (1.0 if "norm" in name and "weight" in name else 0.0))
    return model


def tiny_sam2() -> Any:
    from transformers import Sam2Config, Sam2Model

    torch.manual_seed(6)
    model = Sam2Model(Sam2Config()).eval()  # its default is the released tiny
    with torch.no_grad():
        model.no_memory_embedding.normal_()
    return model


@pytest.fixture(scope="module")
def joined(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Detector]:
    """InternVL and SAM2 as transformers saves them, and the detector they become."""
    place = tmp_path_factory.mktemp("transformers")
    internvl, sam2 = tiny_internvl(), tiny_sam2()
    internvl.save_pretrained(place / "internvl")
    sam2.save_pretrained(place / "sam2")
    (place / "internvl" / "checkpoint_meta.json").write_text(json.dumps({"prompt": SIDECAR["prompt"]}))
    convert(place / "internvl", place / "detector", extras=Extras(segmenter=place / "sam2"))
    return internvl, sam2, load_detector(str(place / "detector"))


def test_vision_tokens_are_those_of_transformers(joined: tuple[Any, Any, Detector]) -> None:
    internvl, _, detector = joined
    tiles = torch.randn(3, 3, 56, 56, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = internvl.get_image_features(pixel_values=tiles)
        expected = getattr(expected, "pooler_output", expected)
        got, _ = detector.load_stage("vision_encoder")(tiles)
    np.testing.assert_allclose(got.numpy(), torch.as_tensor(expected).reshape(got.shape).numpy(), atol=1e-5)


def test_verdict_logits_are_rows_of_transformers_logits(joined: tuple[Any, Any, Detector]) -> None:
    internvl, _, detector = joined
    embeds = torch.randn(1, 9, 64, generator=torch.Generator().manual_seed(2))
    past = [torch.zeros(1, 2, 0, 16)] * 4
    with torch.inference_mode():
        hidden = internvl.model.language_model(inputs_embeds=embeds).last_hidden_state
        expected = internvl.lm_head(hidden[:, -1])
        got = detector.load_stage("language")(embeds, torch.arange(9)[None], *past)[0]
    assert detector.config.prompt is not None
    np.testing.assert_allclose(got.numpy(), expected[:, list(detector.config.prompt.answers)].numpy(), atol=1e-4)


def test_feature_maps_and_masks_are_those_of_transformers(joined: tuple[Any, Any, Detector]) -> None:
    _, sam2, detector = joined
    image = torch.randn(1, 3, 1024, 1024, generator=torch.Generator().manual_seed(3))
    embedding = torch.randn(1, 256, generator=torch.Generator().manual_seed(4))
    with torch.inference_mode():
        high_0, high_1, embed = sam2.get_image_embeddings(image)
        maps = detector.load_stage("mask_encoder")(image)
        for got, expected in zip(maps, (embed, high_0, high_1)):
            np.testing.assert_allclose(got.numpy(), expected.numpy(), atol=1e-4)
        not_a_point = sam2.prompt_encoder.not_a_point_embed.weight
        sparse = torch.cat((not_a_point, not_a_point, embedding))[None, None]
        dense = sam2.prompt_encoder.no_mask_embed.weight.reshape(1, -1, 1, 1).expand(1, -1, 64, 64)
        masks, ious = sam2.mask_decoder(
            image_embeddings=embed,
            image_positional_embeddings=sam2.get_image_wide_positional_embeddings(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=True,
            high_resolution_features=[high_0, high_1],
        )[:2]
        mask, iou = detector.load_stage("mask_decoder")(*maps, embedding)
    best = int(ious[0, 0].argmax())
    np.testing.assert_allclose(iou.numpy(), ious[0, 0, best : best + 1].numpy(), atol=1e-4)
    np.testing.assert_allclose(mask.numpy(), masks[0, 0, best][None].numpy(), atol=1e-3)


def test_the_video_model_of_transformers_is_accounted_for(tmp_path: Path) -> None:
    """SAM2's folders on hubs hold the video model, whose memory is left out."""
    from transformers import Sam2VideoConfig, Sam2VideoModel

    with torch.device("meta"):
        names = {f"segmenter.{n}": tuple(t.shape) for n, t in Sam2VideoModel(Sam2VideoConfig()).state_dict().items()}
    internvl = tiny_internvl()
    internvl.save_pretrained(tmp_path / "internvl")
    language = {name: tuple(tensor.shape) for name, tensor in internvl.state_dict().items()}

    class Listed:
        def shapes(self) -> dict[str, tuple[int, ...]]:
            return {**language, **names}

    plan = plan_conversion(tmp_path / "internvl", Listed())  # type: ignore[arg-type]
    used = {take.source for take in plan.takes.values()}
    assert used | set(plan.ignored) == set(names) | set(language)
    video = [name for name, reason in plan.ignored.items() if "video memory" in reason]
    assert len(video) > 50
    assert all(re.search("memory|object_pointer|mask_downsample|temporal|occlusion", name) for name in video)


# --- Phi-3's long rotary positions -----------------------------------------------------------------------------------

SHORT = [1.0 + 0.07 * i for i in range(8)]
LONG = [3.0 + 2.0 * i for i in range(8)]


def write_phi3(folder: Path, scaling: dict[str, Any]) -> Path:
    write_checkpoint(folder, "phi3", torch.float32)
    config = json.loads((folder / "config.json").read_text())
    config["llm_config"] |= {"rope_scaling": scaling, "original_max_position_embeddings": 256}
    config["llm_config"] |= {"max_position_embeddings": 8192, "rope_theta": 10_000.0, "sliding_window": 262_144}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("kind", ["longrope", "su"])
def test_long_rotary_positions_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    from transformers import Phi3Config, Phi3ForCausalLM

    checkpoint = write_phi3(tmp_path / "phi3", {"type": kind, "short_factor": SHORT, "long_factor": LONG})
    done = convert(checkpoint, tmp_path / "detector")
    assert any("exact up to 256 tokens" in note for note in done.notes)
    detector = load_detector(str(tmp_path / "detector"))
    llm = json.loads((checkpoint / "config.json").read_text())["llm_config"]
    config = Phi3Config(
        **{key: value for key, value in llm.items() if key not in ("model_type", "rope_scaling", "rope_theta")},
        vocab_size=VOCAB,
        pad_token_id=0,
        rope_parameters={
            "rope_type": "longrope", "rope_theta": 10_000.0, "short_factor": SHORT, "long_factor": LONG,
            "original_max_position_embeddings": 256,
        },
    )  # fmt: skip
    model = Phi3ForCausalLM(config).eval()
    state = load_file(checkpoint / "model.safetensors")
    prefix = "language_model."
    model.load_state_dict({n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)})
    embeds = torch.randn(1, 200, 64, generator=torch.Generator().manual_seed(7))
    past = [torch.zeros(1, 2, 0, 16)] * 4
    with torch.inference_mode():
        expected = model(inputs_embeds=embeds).logits[:, -1]
        language = detector.load_stage("language")
        got = language(embeds, torch.arange(200)[None], *past)[0]
        plain = load_detector(str(tmp_path / "detector"))
        unscaled = plain.load_stage("language")
        unscaled.rope_scale = 1.0
        without = unscaled(embeds, torch.arange(200)[None], *past)[0]
    assert detector.config.prompt is not None
    rows = list(detector.config.prompt.answers)
    np.testing.assert_allclose(got.numpy(), expected[:, rows].numpy(), atol=2e-4)
    assert np.abs(without.numpy() - expected[:, rows].numpy()).max() > 1e-3
    np.testing.assert_array_equal(language.inv_freq.numpy(), model.model.rotary_emb.inv_freq.numpy())


def test_long_rotary_positions_beyond_their_context_are_refused(tmp_path: Path) -> None:
    checkpoint = write_phi3(tmp_path / "phi3", {"type": "longrope", "short_factor": SHORT, "long_factor": LONG})
    config = json.loads((checkpoint / "config.json").read_text())
    config["llm_config"]["original_max_position_embeddings"] = 32
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(SourceError, match=r"max_positions 32 is less than the \d+ of a full prompt"):
        convert(checkpoint, tmp_path / "detector")


@pytest.mark.parametrize(
    ("scaling", "words"),
    [
        ({"type": "longrope", "long_factor": LONG}, "longrope needs short_factor"),
        (
            {"type": "longrope", "short_factor": SHORT[:3], "long_factor": LONG},
            "rope_factors must have 8 numbers, got 3",
        ),
        (
            {"type": "longrope", "short_factor": [*SHORT[:7], "x"], "long_factor": LONG},
            "rope_factors.*must be a number",
        ),
        ({"type": "longrope", "short_factor": [*SHORT[:7], 0], "long_factor": LONG}, "rope_factors must be above 0"),
    ],
)
def test_broken_rotary_factors_are_told(scaling: dict[str, Any], words: str, tmp_path: Path) -> None:
    checkpoint = write_phi3(tmp_path / "phi3", scaling)
    with pytest.raises(SourceError, match=words):
        convert(checkpoint, tmp_path / "detector")
