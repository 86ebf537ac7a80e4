"""Weights of a detector folder as one hash."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from defaker_opt import weights as weights_module
from defaker_opt.weights import open_weights


def test_files_are_hashed_once_and_again_when_they_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[Path] = []
    original = weights_module.file_sha256

    def counted(path: Path) -> str:
        hashed.append(path)
        return original(path)

    monkeypatch.setattr(weights_module, "file_sha256", counted)
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(3)}, file)
    first = open_weights(tmp_path).digest()
    assert first == open_weights(tmp_path).digest() and hashed == [file]
    assert first == hashlib.sha256(hashlib.sha256(file.read_bytes()).hexdigest().encode()).hexdigest()
    # Another file of that size in its place.
    save_file({"a": torch.ones(3)}, tmp_path / "new")
    (tmp_path / "new").replace(file)
    assert open_weights(tmp_path).digest() != first and hashed == [file, file]
