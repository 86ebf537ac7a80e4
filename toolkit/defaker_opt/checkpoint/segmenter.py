"""SAM2 on its own: the original `.pt` files, or safetensors in the original or in transformers' layout."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from defaker_opt.checkpoint import TensorFile, Tensors
from defaker_opt.errors import SourceError
from defaker_opt.weights import Shapes, open_weights, open_weights_file

# Under these prefixes its tensors stand in a joint checkpoint: SAM2's own names as in Sa2VA, or those of transformers.
ORIGINAL = "grounding_encoder.sam2_model."
TRANSFORMERS = "segmenter."

_PICKLES = (".pt", ".pth")
_SAFE = "give SAM2's .pt file as released, or safetensors"


@dataclass(frozen=True)
class UnpickledWeights:
    """The tensors of a `.pt` file, memory-mapped where it is a zip archive."""

    file: Path
    tensors: Mapping[str, torch.Tensor]

    def shapes(self) -> Shapes:
        """See `TensorFile`."""
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    def dtype(self, name: str) -> torch.dtype:
        """See `TensorFile`."""
        return self.tensors[name].dtype

    def read(self, name: str) -> torch.Tensor:
        """See `TensorFile`."""
        return self.tensors[name]


def open_segmenter(path: Path) -> Tensors:
    """SAM2's tensors under the names they have in a joint checkpoint. Raises SourceError."""
    notes: list[str] = []
    weights = _open(path, notes)
    shown: dict[str, str] = {}
    for name in weights.shapes():
        plain = name.removeprefix("grounding_encoder.").removeprefix("sam2_model.")
        if plain in shown:
            raise SourceError(f"{path}: {plain} is in it twice, with and without a prefix; {_SAFE}")
        shown[plain] = name
    prefix = TRANSFORMERS if any(name.startswith("vision_encoder.") for name in shown) else ORIGINAL
    return Tensors({prefix + plain: (weights, name) for plain, name in shown.items()}, tuple(notes))


def _open(path: Path, notes: list[str]) -> TensorFile:
    if path.is_dir():
        return open_weights(path)
    if not path.is_file():
        raise SourceError(f"{path}: no such file; {_SAFE}")
    if path.suffix == ".safetensors":
        return open_weights_file(path)
    if path.suffix in _PICKLES:
        return _unpickle(path, notes)
    raise SourceError(f"{path}: a segmenter ends in {', '.join(_PICKLES)} or .safetensors, or is a folder; {_SAFE}")


def _unpickle(path: Path, notes: list[str]) -> UnpickledWeights:
    """torch's restricted unpickler builds tensors and plain containers and runs nothing; what it refuses, we refuse."""
    try:
        data = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        first = str(error).strip().splitlines()[0]
        raise SourceError(
            f"{path}: holds more than tensors and plain containers, so it is not opened ({first}); {_SAFE}"
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        first = (str(error).strip().splitlines() or [repr(error)])[0]
        raise SourceError(f"{path}: cannot be read ({first}); is it complete?") from error
    return UnpickledWeights(path, _state(path, data, notes))


def _state(path: Path, data: object, notes: list[str]) -> dict[str, torch.Tensor]:
    """The weights of `{"model": weights}`, or of weights alone; anything in them that is no tensor is an error."""
    state = data
    if isinstance(data, Mapping) and isinstance(data.get("model"), Mapping):
        state = data["model"]
        others = sorted(str(key) for key in data if key != "model")
        if others:
            notes.append(f"{path.name}: beside the weights it holds {', '.join(others)}, which is not converted")
    if not isinstance(state, Mapping) or not state:
        raise SourceError(f'{path}: must hold tensors by name, or {{"model": tensors by name}}; {_SAFE}')
    wrong = sorted(
        f"{name!s}: {type(value).__name__}"
        for name, value in state.items()
        if not (isinstance(name, str) and isinstance(value, torch.Tensor) and value.layout == torch.strided)
    )
    if wrong:
        raise SourceError(f"{path}: not a plain tensor: {', '.join(wrong[:5])} ({len(wrong)} in all); {_SAFE}")
    return dict(state)
