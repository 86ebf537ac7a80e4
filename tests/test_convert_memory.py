"""Converting and drawing take the memory of a tensor, not of a checkpoint; what was killed goes on."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from defaker_opt import convert as convert_module
from defaker_opt.convert import convert
from defaker_opt.shards import Entry, write_shards
from tests.reference.checkpoint import write_checkpoint

# A decoder of this many layers has 16 MB in float32, the largest tensor 4 MB.
WIDTH, LAYER_MB = 512, 16
SMALL, LARGE = 2, 10

# The most memory of a process, in MB; torch and transformers are in it. (ru_maxrss would begin with the parent's.)
PEAK = """
with open("/proc/self/status") as status:
    print(next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024)
"""

CONVERT = """
import sys
from pathlib import Path
from defaker_opt.checkpoint import Extras
from defaker_opt.convert import convert
extras = Extras(adapters=tuple(Path(name) for name in sys.argv[3:]))
convert(Path(sys.argv[1]), Path(sys.argv[2]), extras=extras)
"""

DRAW = """
import sys
from defaker_opt.detector import stored_shapes
from defaker_opt.presets import parse_preset, preset_config
from defaker_opt.presets.drawn import RandomWeights
from defaker_opt.presets.folder import write_folder
from pathlib import Path
config = preset_config(parse_preset("internvl2-1b+sam2-tiny:random,layers=1"))
stored_shapes(config)
weights = RandomWeights({f"layers.{i}.weight": (2048, 1024) for i in range(int(sys.argv[2]))})
write_folder(Path(sys.argv[1]), config, weights, lambda done, total: None)
"""


def write_deep(folder: Path, layers: int) -> Path:
    """The tiny checkpoint with a decoder whose layers all have 16 MB."""
    write_checkpoint(folder, "llama")
    tensors = {n: t for n, t in load_file(folder / "model.safetensors").items() if "language_model" not in n}
    config = json.loads((folder / "config.json").read_text())
    sizes = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_hidden_layers": layers}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": WIDTH // 8}
    config["llm_config"] |= {**sizes, **heads}
    (folder / "config.json").write_text(json.dumps(config))
    half = torch.bfloat16
    for name in ("embed_tokens", "norm"):
        tensors[f"language_model.model.{name}.weight"] = torch.ones(
            (WIDTH,) if name == "norm" else (64, WIDTH), dtype=half
        )
    tensors["language_model.lm_head.weight"] = torch.ones(64, WIDTH, dtype=half)
    for name, shape in {"mlp1.1.weight": (WIDTH, 128), "mlp1.3.weight": (WIDTH, WIDTH)}.items():
        tensors[name] = torch.zeros(shape, dtype=half)
        tensors[name.replace("weight", "bias")] = torch.zeros(WIDTH, dtype=half)
    tensors["text_hidden_fcs.0.weight"] = torch.zeros(WIDTH, WIDTH, dtype=half)
    tensors["text_hidden_fcs.0.bias"] = torch.zeros(WIDTH, dtype=half)
    tensors["text_hidden_fcs.2.weight"] = torch.zeros(64, WIDTH, dtype=half)
    for i in range(layers):
        layer = f"language_model.model.layers.{i}."
        for part in "qkvo":
            tensors[f"{layer}self_attn.{part}_proj.weight"] = torch.full((WIDTH, WIDTH), 0.01 * i)
        for part, shape in {"gate": (4 * WIDTH, WIDTH), "up": (4 * WIDTH, WIDTH), "down": (WIDTH, 4 * WIDTH)}.items():
            tensors[f"{layer}mlp.{part}_proj.weight"] = torch.full(shape, 0.01 * i)
        for norm in ("input", "post_attention"):
            tensors[f"{layer}{norm}_layernorm.weight"] = torch.ones(WIDTH)
    save_file(tensors, folder / "model.safetensors")
    return folder


def write_adapter(folder: Path, layers: int) -> Path:
    folder.mkdir()
    tensors = {}
    for i in range(layers):
        module = f"base_model.model.language_model.model.layers.{i}.mlp.up_proj"
        tensors[f"{module}.lora_A.weight"] = torch.ones(2, WIDTH)
        tensors[f"{module}.lora_B.weight"] = torch.ones(4 * WIDTH, 2)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def peak_mb(code: str, *arguments: object) -> float:
    command = [sys.executable, "-c", code + PEAK, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the process's peak where Linux tells it")
def test_memory_does_not_grow_with_the_checkpoint(tmp_path: Path) -> None:
    """Holding the weights would cost 128 MB more for the larger one; a quarter of that is far above the noise."""
    peaks = []
    for layers in (SMALL, LARGE):
        folder = write_deep(tmp_path / f"checkpoint{layers}", layers)
        adapter = write_adapter(tmp_path / f"adapter{layers}", layers)
        peaks.append(peak_mb(CONVERT, folder, tmp_path / f"detector{layers}", adapter))
        size = (tmp_path / f"detector{layers}" / "model.safetensors").stat().st_size
        assert size > layers * LAYER_MB * 2**20
    assert peaks[1] - peaks[0] < (LARGE - SMALL) * LAYER_MB / 4, peaks


@pytest.mark.skipif(sys.platform != "linux", reason="reads the process's peak where Linux tells it")
def test_memory_does_not_grow_with_a_preset(tmp_path: Path) -> None:
    """Tensors of 4 MB: holding them would cost 128 MB more for the larger one."""
    peaks = [peak_mb(DRAW, tmp_path / str(count), count) for count in (8, 40)]
    assert peaks[1] - peaks[0] < 32, peaks


@pytest.mark.skipif(sys.platform != "linux", reason="reads the process's peak where Linux tells it")
def test_the_measurement_sees_what_is_held(tmp_path: Path) -> None:
    """The twin of the test above: a writer that is given all tensors at once takes that much more."""
    code = """
import sys, torch
from safetensors.torch import save_file
save_file({str(i): torch.ones(2048, 1024, dtype=torch.bfloat16) for i in range(int(sys.argv[2]))}, sys.argv[1])
"""
    peaks = [peak_mb(code, tmp_path / str(count), count) for count in (8, 40)]
    assert peaks[1] - peaks[0] > 100, peaks


class StoppedError(Exception):
    pass


def stop_after(share: float) -> object:
    def progress(done: int, total: int) -> None:
        if done > share * total:
            raise StoppedError

    return progress


@pytest.fixture
def many_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert_module, "SHARD_BYTES", 60_000)


@pytest.mark.usefixtures("many_shards")
def test_a_conversion_that_was_stopped_goes_on_and_ends_with_the_same_bytes(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", "internlm2")
    convert(checkpoint, tmp_path / "whole")
    for share in (0.3, 0.8):
        with pytest.raises(StoppedError):
            convert(checkpoint, tmp_path / "part", stop_after(share))  # type: ignore[arg-type]
        assert not (tmp_path / "part").exists()
    partial = tmp_path / ".part.partial"
    finished = {path.name: path.stat().st_mtime_ns for path in partial.glob("model-*")}
    assert len(finished) > 3
    convert(checkpoint, tmp_path / "part")
    assert not partial.exists()
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "part").iterdir())
    for name in names:
        assert (tmp_path / "part" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert {name: (tmp_path / "part" / name).stat().st_mtime_ns for name in finished} == finished


KILLED = """
import os, signal, sys
from pathlib import Path
from defaker_opt import convert as convert_module

def kill(done, total):
    if done > float(sys.argv[3]) * total:
        os.kill(os.getpid(), signal.SIGKILL)

convert_module.SHARD_BYTES = 60_000
convert_module.convert(Path(sys.argv[1]), Path(sys.argv[2]), kill)
"""


def test_a_conversion_that_was_killed_ends_with_the_same_bytes(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", "internlm2")
    for output, share in (("whole", 2), ("part", 0.5), ("part", 2)):
        command = [sys.executable, "-c", KILLED, str(checkpoint), str(tmp_path / output), str(share)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == (-signal.SIGKILL if share < 1 else 0), done.stderr
        if share < 1:
            kept = {path.name for path in (tmp_path / ".part.partial").glob("model-*")}
            assert kept
            assert not (tmp_path / "part").exists()
    whole, part = ({path.name: path.read_bytes() for path in (tmp_path / n).iterdir()} for n in ("whole", "part"))
    assert whole == part
    assert kept < set(whole)


@pytest.mark.usefixtures("many_shards")
def test_shards_of_another_checkpoint_are_not_taken_over(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", "internlm2")
    with pytest.raises(StoppedError):
        convert(checkpoint, tmp_path / "part", stop_after(0.8))  # type: ignore[arg-type]
    tensors = load_file(checkpoint / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, checkpoint / "model.safetensors")
    convert(checkpoint, tmp_path / "part")
    convert(checkpoint, tmp_path / "whole")
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "part" / path.name).read_bytes() == path.read_bytes()


def test_half_a_shard_is_written_again(tmp_path: Path) -> None:
    tensors = {name: torch.randn(50, 10) for name in "abc"}
    entries = [Entry(name, torch.float32, (50, 10)) for name in "abc"]

    def write(folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        write_shards(folder, entries, lambda name: iter(tensors[name].split(7)), lambda done, total: None, 2500)

    write(tmp_path / "whole")
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / ".model-00002-of-00003.safetensors.partial").write_bytes(b"half")
    write(tmp_path / "part")
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "part").iterdir())
    assert len(names) == 4
    for name in names:
        assert (tmp_path / "part" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
