"""The build folder: what is in it, and proof that it is what was written.

manifest.json            recipe, source, files with their SHA-256, parity, thresholds, tool versions
<stage>.onnx, .data      one graph a stage
prompts.npz              the fixed prompts as embeddings; or, in builds made for comparison,
embeddings.npy           the whole table of embeddings, also beside prompts.npz in builds that explain
vocabulary.npz           the bytes of each token, in builds that explain
self_test.npz            one input and the outputs to expect
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from defaker_opt.errors import BuildError
from defaker_opt.runtime.spec import StageSpec, spec_from_json

FORMAT = 2
MANIFEST = "manifest.json"
PROMPTS = "prompts.npz"
EMBEDDINGS = "embeddings.npy"
VOCABULARY = "vocabulary.npz"
SELF_TEST = "self_test.npz"
SEAL = "manifest_sha256"


@dataclass(frozen=True)
class Manifest:
    """`manifest.json` as parsed; the file is the one place where the layout of a build is written down."""

    data: Mapping[str, Any]

    @property
    def trained(self) -> bool:
        """False where the source's weights are drawn at random, so that no verdict means anything."""
        return bool(self.data["source"]["trained"])

    def saves(self, name: str) -> bool:
        """Whether the build was made with one of the exact savings."""
        return bool(self.data["recipe"]["savings"][name])

    def spec(self, stage: str) -> StageSpec:
        """The contract of one stage."""
        return spec_from_json(self.data["stages"][stage]["spec"])


@dataclass(frozen=True)
class Build:
    """A verified build. `digest` is the SHA-256 of its manifest, which holds the hashes of everything else."""

    folder: Path
    manifest: Manifest
    digest: str


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def json_text(data: Mapping[str, Any]) -> str:
    """The one way in which a JSON file of ours is written; any other spelling of the same content is damage."""
    return json.dumps(data, indent=1) + "\n"


def seal(data: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest's content without its own seal, so that a change of the manifest itself is found too."""
    content = {key: value for key, value in data.items() if key != SEAL}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def open_build(folder: Path | str) -> Build:
    """Read a build and verify every file. Raises BuildError naming the file that is missing, damaged or foreign."""
    folder = Path(folder)
    raw = _read_manifest(folder)
    data = _parse_manifest(folder / MANIFEST, raw)
    for name in sorted(_needed_files(data) | set(data["files"])):
        if name not in data["files"] or Path(name).name != name:
            raise BuildError(f"{folder / MANIFEST}: {name} is not a file it may list; copy the build again")
        _verify_file(folder / name, data["files"][name])
    return Build(folder, Manifest(data), hashlib.sha256(raw).hexdigest())


def _needed_files(data: Mapping[str, Any]) -> set[str]:
    prompts = PROMPTS if data["recipe"]["savings"]["prompt_embeddings"] else EMBEDDINGS
    words = {EMBEDDINGS, VOCABULARY} if "explain" in data else set()
    return {prompts, SELF_TEST, *words, *(f"{stage}.onnx" for stage in data["stages"])}


def _read_manifest(folder: Path) -> bytes:
    if folder.is_file():
        raise BuildError(
            f"{folder}: a file, but a build is a folder; make one with: defaker-opt quantize --recipe int8"
        )
    if not folder.is_dir():
        raise BuildError(f"{folder}: no such folder; make a build with: defaker-opt quantize --recipe int8")
    try:
        return (folder / MANIFEST).read_bytes()
    except OSError as error:
        raise BuildError(f"{folder}: no readable {MANIFEST} in it, so it is not a build ({error.strerror})") from error


def _parse_manifest(path: Path, raw: bytes) -> dict[str, Any]:
    try:
        data = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise BuildError(f"{path}: damaged ({error}); copy the build again") from error
    if not isinstance(data, dict) or "format" not in data:
        raise BuildError(f"{path}: damaged, format missing; copy the build again")
    if data["format"] != FORMAT:
        raise BuildError(
            f"{path}: format {data['format']!r}, but this version reads format {FORMAT}; "
            "install the version that wrote it, or quantize again"
        )
    if data.get(SEAL) != seal(data) or raw != json_text(data).encode():
        raise BuildError(
            f"{path}: damaged, its content is not what was written (SHA-256 differs); copy the build again"
        )
    return data


def _verify_file(path: Path, entry: Mapping[str, Any]) -> None:
    try:
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise BuildError(f"{path}: {size:,} bytes where {entry['bytes']:,} were written; copy the build again")
        digest = file_sha256(path)
    except FileNotFoundError as error:
        raise BuildError(f"{path}: missing from the build; copy it again") from error
    except OSError as error:
        raise BuildError(f"{path}: cannot be read ({error.strerror}); check the disk, copy the build again") from error
    if digest != entry["sha256"]:
        raise BuildError(f"{path}: its bytes are not those that were written (SHA-256 differs); copy the build again")
