"""Converting checkpoints: every tensor accounted for, its numbers where they belong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from defaker_opt import convert as convert_module
from defaker_opt.convert import convert
from defaker_opt.detector import load_detector, stored_shapes
from defaker_opt.errors import SourceError
from defaker_opt.runtime.spec import STAGES
from tests.conftest import defaker_opt
from tests.reference.checkpoint import HEAD_DIM, HEADS, KV_HEADS, VIT, checkpoint_shapes, write_checkpoint

KINDS = ("internlm2", "qwen2", "llama", "phi3")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "checkpoint", "internlm2")


def rewrite(folder: Path, change: object) -> None:
    """Change the tensors of a checkpoint in place."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)  # type: ignore[operator]
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_is_used_folded_or_ignored(kind: str, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint", kind)
    done = convert(folder, tmp_path / "detector")
    assert done.used + len(done.ignored) == len(checkpoint_shapes(kind))
    assert all(done.ignored.values())
    detector = load_detector(str(tmp_path / "detector"))
    assert detector.weights.shapes() == stored_shapes(detector.config)
    assert detector.weights.read("language.norm.weight").dtype == torch.bfloat16


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_decoder_runs(kind: str, tmp_path: Path) -> None:
    convert(write_checkpoint(tmp_path / "checkpoint", kind), tmp_path / "detector")
    detector = load_detector(str(tmp_path / "detector"))
    for stage in STAGES:
        sizes = {"tiles": 2, "tokens": 5, "past": 3}
        given = [
            torch.ones([sizes[s] if isinstance(s, str) else s for s in t.shape], dtype=getattr(torch, t.dtype))
            for t in detector.spec(stage).inputs
        ]
        with torch.inference_mode():
            outputs = detector.load_stage(stage)(*given)
        for tensor, output in zip(detector.spec(stage).outputs, outputs):
            assert list(output.shape) == [sizes[s] if isinstance(s, str) else s for s in tensor.shape], tensor.name
            assert torch.isfinite(output.float()).all()


def test_fused_projections_are_taken_apart_row_by_row(checkpoint: Path, tmp_path: Path) -> None:
    convert(checkpoint, tmp_path / "detector")
    source = load_file(checkpoint / "model.safetensors")
    read = load_detector(str(tmp_path / "detector")).weights.read
    fused = source["language_model.model.layers.1.attention.wqkv.weight"]
    made = {part: read(f"language.layers.1.self_attn.{part}_proj.weight") for part in "qkv"}
    per_group = HEADS // KV_HEADS
    for group in range(KV_HEADS):
        start = group * (per_group + 2) * HEAD_DIM
        for row in range(HEAD_DIM):
            for query in range(per_group):
                head = group * per_group + query
                assert torch.equal(made["q"][head * HEAD_DIM + row], fused[start + query * HEAD_DIM + row])
            assert torch.equal(made["k"][group * HEAD_DIM + row], fused[start + per_group * HEAD_DIM + row])
            assert torch.equal(made["v"][group * HEAD_DIM + row], fused[start + (per_group + 1) * HEAD_DIM + row])
    fused = source["vision_model.encoder.layers.0.attn.qkv.bias"]
    value = read("vision_encoder.tower.encoder.layer.0.attention.v_proj.bias")
    np.testing.assert_array_equal(value.float(), fused[2 * VIT :].float())


def test_shards_hold_the_same_as_one_file(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert(checkpoint, tmp_path / "one")
    monkeypatch.setattr(convert_module, "SHARD_BYTES", 20_000)
    seen: list[int] = []
    convert(checkpoint, tmp_path / "many", lambda done, total: seen.append(done))
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 3
    assert len(seen) > 3
    assert seen == sorted(seen)
    one, many = (load_detector(str(tmp_path / name)) for name in ("one", "many"))
    for name in one.weights.shapes():
        assert torch.equal(one.weights.read(name), many.weights.read(name))


def test_a_missing_tensor_is_named(checkpoint: Path, tmp_path: Path) -> None:
    rewrite(checkpoint, lambda tensors: tensors.pop("text_hidden_fcs.2.bias"))
    with pytest.raises(SourceError, match=r"language\.seg_projection\.2\.bias: \[64\], missing"):
        convert(checkpoint, tmp_path / "detector")
    assert not (tmp_path / "detector").exists()


def test_an_unexpected_tensor_is_named(checkpoint: Path, tmp_path: Path) -> None:
    rewrite(checkpoint, lambda tensors: tensors.update({"mlp1.7.weight": torch.zeros(3)}))
    with pytest.raises(SourceError, match=r"mlp1\.7\.weight: \[3\], unexpected"):
        convert(checkpoint, tmp_path / "detector")


def test_a_tensor_of_another_shape_is_named(checkpoint: Path, tmp_path: Path) -> None:
    rewrite(checkpoint, lambda tensors: tensors.update({"mlp1.3.bias": torch.zeros(5)}))
    with pytest.raises(SourceError, match=r"mlp1\.3\.bias: \[5\] gives vision_encoder\.projector\.3\.bias.*\[64\]"):
        convert(checkpoint, tmp_path / "detector")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("select_layer", -4, "select_layer is -4"),
        ("ps_version", "v1", "ps_version"),
        ("pad2square", True, "pad2square"),
    ],
)
def test_settings_we_do_not_convert_are_refused(
    checkpoint: Path, tmp_path: Path, key: str, value: object, message: str
) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(SourceError, match=message):
        convert(checkpoint, tmp_path / "detector")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}}, "longrope needs"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "'yarn' is not"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"use_sliding_window": True, "sliding_window": 512}, "sliding_window"),
    ],
)
def test_decoders_that_would_compute_something_else_are_refused(
    checkpoint: Path, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    config["llm_config"].update(change)
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(SourceError, match=message):
        convert(checkpoint, tmp_path / "detector")


@pytest.mark.parametrize("name", ["vision_encoder.projector.3.bias", "mask_encoder.neck.1.bias"])
def test_weights_that_are_no_numbers_never_become_a_build(checkpoint: Path, tmp_path: Path, name: str) -> None:
    from defaker_opt.errors import PassError
    from defaker_opt.pipeline import make_build, plan_job
    from defaker_opt.recipe import load_recipe
    from defaker_opt.target import load_target

    convert(checkpoint, tmp_path / "detector")
    rewrite(tmp_path / "detector", lambda tensors: tensors[name].fill_(float("nan")))
    job = plan_job(load_recipe("float32"), load_target("cpu"), str(tmp_path / "detector"))
    with pytest.raises(PassError, match=r"is not a finite number"):
        make_build(job, tmp_path / "build", lambda what, fraction: None)
    assert not (tmp_path / "build").exists()


def test_an_unknown_trunk_asks_for_its_layout(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "checkpoint_meta.json").unlink()
    with pytest.raises(SourceError, match=r"width 16 .* sam2_trunk in .*checkpoint_meta\.json"):
        convert(checkpoint, tmp_path / "detector")


def test_without_prompts_the_weights_are_converted_and_quantize_says_what_is_missing(
    checkpoint: Path, tmp_path: Path
) -> None:
    meta = json.loads((checkpoint / "checkpoint_meta.json").read_text())
    del meta["prompt"]
    (checkpoint / "checkpoint_meta.json").write_text(json.dumps(meta))
    done = defaker_opt("convert", checkpoint, "-o", tmp_path / "detector", "--json")
    assert done.returncode == 0, done.stderr
    assert "prompt" in json.loads(done.stdout)["notes"][-1]
    refused = defaker_opt("quantize", "--recipe", "int8", "--source", tmp_path / "detector", "-o", tmp_path / "build")
    assert refused.returncode == 2
    assert "prompt is missing" in refused.stderr
    assert not (tmp_path / "build").exists()


def test_prompts_come_from_the_tokenizer(checkpoint: Path, tmp_path: Path) -> None:
    from defaker_opt.catalog import data_folder

    meta = json.loads((checkpoint / "checkpoint_meta.json").read_text())
    del meta["prompt"]
    (checkpoint / "checkpoint_meta.json").write_text(json.dumps(meta))
    shutil.copy(data_folder("reference") / "tokenizer.json", checkpoint / "tokenizer.json")
    convert(checkpoint, tmp_path / "detector")
    assert load_detector(str(tmp_path / "detector")).config.prompt == load_detector("reference").config.prompt
    assert (tmp_path / "detector" / "tokenizer.json").is_file()


def test_a_converted_checkpoint_goes_through_the_whole_line(checkpoint: Path, tmp_path: Path) -> None:
    """The other architecture, sizes that are no multiples of 64, and a SAM2 at its full 1024."""
    convert(checkpoint, tmp_path / "detector")
    done = defaker_opt(
        "quantize", "--recipe", "int8", "--source", tmp_path / "detector", "-o", tmp_path / "b", "--json"
    )
    assert done.returncode == 0, done.stderr
    assert "untrained" not in json.loads(done.stdout.splitlines()[-1])
    tested = defaker_opt("run", tmp_path / "b", "--self-test")
    assert tested.returncode == 0, tested.stdout + tested.stderr
