"""Names and shapes of released checkpoints: every one is used or ignored for a reason, and none is missing.

Every JSON file in $DEFAKER_MODEL_KEYS_DIR is taken: {name: shape}. Nothing is allocated.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from defaker_opt.checkpoint.segmenter import ORIGINAL, TRANSFORMERS
from defaker_opt.convert import plan_conversion
from defaker_opt.detector import stored_shapes
from defaker_opt.presets import parse_preset, preset_config
from defaker_opt.presets.tables import DECODERS, SAM2_TRUNKS, Decoder
from tests.conftest import ROOT

KEYS = Path(os.environ.get("DEFAKER_MODEL_KEYS_DIR", ROOT.parent / "shared" / "facts" / "model_keys"))

Shapes = dict[str, tuple[int, ...]]


def read(file: Path) -> Shapes:
    return {name: tuple(shape) for name, shape in json.loads(file.read_text()).items()}


FILES = {file.stem: file for file in sorted(KEYS.glob("*.json"))}
SEGMENTERS = [stem for stem in FILES if "sam2" in stem and ("hf_sam2" in stem or "sam2_large_keys" in stem)]
JOINT = [stem for stem in FILES if stem not in SEGMENTERS and any(ORIGINAL in name for name in read(FILES[stem]))]
ALONE = [stem for stem in FILES if stem not in SEGMENTERS and stem not in JOINT]

pytestmark = pytest.mark.skipif(not FILES, reason=f"no lists of names in {KEYS}; set DEFAKER_MODEL_KEYS_DIR")


class Listed:
    """Names and shapes without tensors."""

    def __init__(self, *lists: Shapes) -> None:
        self.all = {name: shape for each in lists for name, shape in each.items()}

    def shapes(self) -> Shapes:
        return self.all


def decoder_of(shapes: Shapes) -> Decoder:
    """The released language model with this width and number of layers."""
    table = next(s for n, s in shapes.items() if n.endswith(("tok_embeddings.weight", "embed_tokens.weight")))
    layers = {n.split("layers.")[1].split(".")[0] for n in shapes if "language_model" in n and "layers." in n}
    return next(d for d in DECODERS.values() if (d.hidden_size, d.layers) == (table[1], len(layers)))


def decoder_config(shapes: Shapes, kind: str) -> dict[str, Any]:
    decoder = decoder_of(shapes)
    return {
        "model_type": kind,
        "hidden_size": decoder.hidden_size,
        "intermediate_size": decoder.intermediate_size,
        "num_hidden_layers": decoder.layers,
        "num_attention_heads": decoder.heads,
        "num_key_value_heads": decoder.kv_heads,
        "rms_norm_eps": decoder.family.norm_eps,
        "rope_theta": decoder.family.rope_theta,
        "max_position_embeddings": 32768,
    }


VISION = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}


def original_config(shapes: Shapes, model_type: str) -> dict[str, Any]:
    kind = "internlm2" if any("wqkv" in name for name in shapes) else "qwen2"
    return {
        "model_type": model_type,
        "force_image_size": 448,
        "template": "internlm2_chat",
        "vision_config": {**VISION, "patch_size": 14},
        "llm_config": decoder_config(shapes, kind),
    }


def transformers_config(shapes: Shapes) -> dict[str, Any]:
    return {
        "model_type": "internvl",
        "vision_config": {**VISION, "patch_size": [14, 14], "image_size": [448, 448], "attention_bias": True},
        "text_config": decoder_config(shapes, "llama"),
    }


def check(folder: Path, config: dict[str, Any], *lists: Shapes) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    listed = Listed(*lists)
    plan = plan_conversion(folder, listed)  # type: ignore[arg-type]
    assert set(plan.takes) | set(plan.drawn) == set(stored_shapes(plan.config))
    assert {take.source for take in plan.takes.values()} | set(plan.ignored) == set(listed.all)
    assert not {take.source for take in plan.takes.values()} & set(plan.ignored)
    assert all(plan.ignored.values())


def as_segmenter(stem: str) -> Shapes:
    """The names that `open_segmenter` shows."""
    prefix = TRANSFORMERS if "hf" in stem else ORIGINAL
    return {prefix + name.removeprefix("sam2_model."): shape for name, shape in read(FILES[stem]).items()}


def without_segmenter(shapes: Shapes) -> Shapes:
    return {name: shape for name, shape in shapes.items() if not name.startswith((ORIGINAL, "text_hidden_fcs"))}


def test_lists_were_found() -> None:
    assert {*SEGMENTERS, *JOINT, *ALONE} == set(FILES)
    assert SEGMENTERS
    assert JOINT


@pytest.mark.parametrize("stem", JOINT)
def test_a_joint_checkpoint_is_accounted_for(stem: str, tmp_path: Path) -> None:
    shapes = read(FILES[stem])
    check(tmp_path / "checkpoint", original_config(shapes, "sa2va_chat"), shapes)


@pytest.mark.parametrize("segmenter", SEGMENTERS)
@pytest.mark.parametrize("stem", [stem for stem in FILES if "internvl2" in stem])
def test_a_language_model_and_a_segmenter_of_its_own_are_accounted_for(
    stem: str, segmenter: str, tmp_path: Path
) -> None:
    shapes = without_segmenter(read(FILES[stem]))
    config = transformers_config(shapes) if stem in ALONE else original_config(shapes, "internvl_chat")
    check(tmp_path / "checkpoint", config, shapes, as_segmenter(segmenter))


@pytest.mark.parametrize(
    ("stem", "preset"),
    [
        ("keys_defakerone_like_internvl2_2b_sam2L_vocab92558", "defakerone-2b"),
        ("keys_sa2va_1b", "sa2va-1b"),
        ("keys_sa2va_4b", "sa2va-4b"),
        ("keys_sa2va_8b", "sa2va-8b"),
    ],
)
def test_a_preset_has_the_shapes_of_the_release(stem: str, preset: str, tmp_path: Path) -> None:
    if stem not in FILES:
        pytest.skip(f"no list {stem}")
    shapes = read(FILES[stem])
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(original_config(shapes, "sa2va_chat")))
    plan = plan_conversion(folder, Listed(shapes))  # type: ignore[arg-type]
    config = preset_config(parse_preset(f"{preset}:random"))
    assert stored_shapes(config) == stored_shapes(plan.config)
    assert config.segmenter == plan.config.segmenter
    assert config.vision == plan.config.vision
    assert config.language == plan.config.language


@pytest.mark.parametrize("trunk", SAM2_TRUNKS)
def test_a_trunk_has_the_shapes_of_the_release(trunk: str, tmp_path: Path) -> None:
    stem = f"keys_hf_sam2_{trunk.replace('+', '_plus')}"
    joined = [each for each in JOINT if "internvl2_2b" in each]
    if stem not in FILES or not joined:
        pytest.skip(f"no list {stem}")
    shapes = without_segmenter(read(FILES[joined[0]]))
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(original_config(shapes, "internvl_chat")))
    plan = plan_conversion(folder, Listed(shapes, as_segmenter(stem)))  # type: ignore[arg-type]
    assert preset_config(parse_preset(f"internvl2-2b+sam2-{trunk}:random")).segmenter == plan.config.segmenter


@pytest.mark.parametrize("change", ["missing", "unexpected"])
def test_a_name_too_few_or_too_many_is_told(change: str, tmp_path: Path) -> None:
    """The test above can fail."""
    from defaker_opt.errors import SourceError

    shapes = read(FILES[JOINT[0]])
    name = "vision_model.encoder.layers.7.ls1"
    if change == "missing":
        del shapes[name]
        words = r"vision_encoder\.tower\.encoder\.layer\.7\.lambda_1: \[1024\], missing"
    else:
        shapes[name + "x"] = (3,)
        words = r"layers\.7\.ls1x: \[3\], unexpected"
    with pytest.raises(SourceError, match=words):
        check(tmp_path / "checkpoint", original_config(shapes, "sa2va_chat"), shapes)
