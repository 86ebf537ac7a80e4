"""A trained model → a detector folder that every other command reads."""

from __future__ import annotations

import dataclasses
import errno
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from defaker_opt.detector import Detector, source_folder
from defaker_opt.errors import DefakerError, write_failure
from defaker_opt.sources._vocabulary import TOKENIZER_FILES
from defaker_opt.training.model import JointModel, stored_tensors


def write_detector(
    detector: Detector, model: JointModel, taught: Mapping[str, torch.Tensor], source: str, output: Path
) -> Path:
    """Write config.json, model.safetensors in float16, and the tokenizer of `source`; under another name until whole.

    taught: the model's parameters by name. Raises DefakerError if the folder exists or a weight is too large for
    float16.
    """
    refuse_existing(output)
    tensors = {name: tensor.to(torch.float16) for name, tensor in stored_tensors(detector, model, taught).items()}
    too_large = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if too_large:
        raise DefakerError(f"{', '.join(too_large)}: beyond float16's range; train with a smaller --learning-rate")
    origin = source_folder(source)
    partial = output.with_name(f".{output.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
        config = dataclasses.replace(detector.config, name=output.name, trained=True)
        (partial / "config.json").write_text(config.as_json(), encoding="utf-8")
        for name in TOKENIZER_FILES:
            if (origin / name).is_file():
                shutil.copyfile(origin / name, partial / name)
        partial.rename(output)
    except SafetensorError as error:  # how safetensors reports a full disk
        raise write_failure(output, OSError(errno.ENOSPC, str(error))) from error
    except OSError as error:
        raise write_failure(output, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return output


def refuse_existing(output: Path) -> None:
    """Raise DefakerError if there is something at the output folder."""
    if output.exists():
        raise DefakerError(f"{output}: already exists; choose another output folder or remove it")
