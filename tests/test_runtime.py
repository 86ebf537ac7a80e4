"""The runtime alone: what it may import, what it may leave behind, and that old Pythons read it."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from defaker_opt.runtime import open_build, open_session
from tests.conftest import ROOT

PACKAGE = ROOT / "toolkit" / "defaker_opt"
BLOCKED = ("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "yaml", "safetensors", "tokenizers", "skimage")

BLOCK_IMPORTS = f"""
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {BLOCKED!r}:
            raise ImportError("blocked: " + name)
sys.meta_path.insert(0, Block())
"""


def python(code: str, *arguments: object, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=120, check=False)


def test_the_runtime_imports_with_numpy_and_pillow_alone() -> None:
    code = BLOCK_IMPORTS + (
        "sys.modules['onnxruntime'] = None\n"
        + "import defaker_opt.runtime, defaker_opt.runtime.self_test, defaker_opt.runtime.overlay\n"
        + "loaded = {name.partition('.')[0] for name in sys.modules}\n"
        + "print(sorted(loaded - set(sys.stdlib_module_names) - {'defaker_opt', 'numpy', 'PIL', 'onnxruntime'}))"
    )
    done = python(code)
    assert done.returncode == 0, done.stderr
    left = eval(done.stdout)
    assert not [name for name in left if not name.startswith("_")], left


def test_a_build_is_judged_without_torch_onnx_or_yaml(int8_build: Path, tmp_path: Path) -> None:
    from PIL import Image

    from defaker_opt.sample import sample_image

    Image.fromarray(sample_image()).save(tmp_path / "photo.png")
    code = BLOCK_IMPORTS + "sys.argv[0] = 'defaker-opt'\nfrom defaker_opt.cli import main\nmain()"
    done = python(code, "run", int8_build, tmp_path / "photo.png", "--gate", "0", "--overlay-dir", tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "photo_overlay.png").is_file()


def test_nothing_is_left_in_an_empty_home(int8_build: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
    env = {**kept, "HOME": str(home), "XDG_CACHE_HOME": str(home / "cache"), "TMPDIR": str(tmp_path)}
    done = python(
        "import sys; sys.argv[0] = 'defaker-opt'; from defaker_opt.cli import main; main()",
        "run",
        int8_build,
        "--self-test",
        env=env,
    )
    assert done.returncode == 0, done.stderr
    assert list(home.rglob("*")) == []


def runtime_files() -> list[Path]:
    return [*sorted((PACKAGE / "runtime").rglob("*.py")), PACKAGE / "errors.py", PACKAGE / "cli" / "run.py"]


@pytest.mark.parametrize("path", runtime_files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_the_runtime_is_written_for_python_3_10(path: Path) -> None:
    tree = ast.parse(path.read_text(), feature_version=(3, 10))
    newer = {"tomllib", "file_digest", "StrEnum", "ExceptionGroup", "Self", "batched"}
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    names |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    names |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert not names & newer


def test_threads_of_a_stage_rest_when_it_is_done(float_build: Path) -> None:
    """Threads that spin for more work, 30 ms after each call, would take the cores from the next stage."""
    session = open_session(open_build(float_build), threads=2)
    stage, spec = session.open_stage("mask_encoder"), session.spec("mask_encoder")
    tensors = {tensor.name: np.zeros(tensor.shape, np.float32) for tensor in spec.inputs}
    used = []
    for _ in range(5):
        stage(tensors, tuple(tensor.name for tensor in spec.outputs))
        before = time.process_time()
        time.sleep(0.1)
        used.append(time.process_time() - before)
    assert np.median(used) < 0.01


def test_a_flipped_bit_is_found_before_anything_runs(int8_build: Path, tmp_path: Path) -> None:
    import shutil

    from defaker_opt.errors import BuildError
    from defaker_opt.runtime import open_build

    copy = tmp_path / "copy"
    shutil.copytree(int8_build, copy)
    data = copy / "language.onnx.data"
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    with pytest.raises(BuildError, match=r"language\.onnx\.data.*SHA-256"):
        open_build(copy)
