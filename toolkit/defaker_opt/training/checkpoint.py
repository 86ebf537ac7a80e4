"""Where training stands, as one safetensors file that is there whole or not at all; never a pickle."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from defaker_opt.errors import DefakerError, write_failure
from defaker_opt.training.batches import Position
from defaker_opt.training.model import JointModel

_STATE = "training"


@dataclass
class Progress:
    """What changes while training. step: how many are done; averages: name → averaged weight; seconds: spent so far."""

    model: JointModel
    optimizer: torch.optim.AdamW
    averages: dict[str, torch.Tensor]
    step: int = 0
    position: Position = field(default_factory=Position)
    seconds: float = 0.0


def write_checkpoint(path: Path, job: Mapping[str, Any], progress: Progress) -> None:
    """Write under a temporary name, then rename. job: what the weights depend on; a resume must be of the same."""
    state = {
        "job": job,
        "step": progress.step,
        "next_index": progress.position.next_index,
        "waiting": progress.position.waiting,
        "seconds": progress.seconds,
    }
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in _tensors(progress).items()}
    partial = path.with_name(f".{path.name}.partial")
    try:
        save_file(tensors, partial, metadata={_STATE: json.dumps(state)})
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        raise write_failure(path, error if isinstance(error, OSError) else OSError(str(error))) from error


def _tensors(progress: Progress) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for name, value in progress.model.named_parameters():
        tensors[f"weight/{name}"] = value
    tensors |= {f"average/{name}": value for name, value in progress.averages.items()}
    for name, parameter in progress.model.named_parameters():
        for key, value in progress.optimizer.state.get(parameter, {}).items():
            tensors[f"{key}/{name}"] = value
    return tensors


def resume_(path: Path, job: Mapping[str, Any], progress: Progress) -> None:
    """Take up where a checkpoint stands. Raises DefakerError if it is damaged or of another job."""
    try:
        with safe_open(path, framework="pt") as stored:
            state = json.loads(stored.metadata()[_STATE])
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise DefakerError(f"{path}: cannot be read ({error}); remove it to start again") from error
    expected = json.loads(json.dumps(job))
    differing = [name for name in sorted({*expected, *state["job"]}) if expected.get(name) != state["job"].get(name)]
    if differing:
        made_with = "; ".join(f"{name} {state['job'].get(name)}" for name in differing)
        raise DefakerError(
            f"{path}: was made with another {', '.join(differing)}; give the same again ({made_with}), choose another "
            "output, or remove it"
        )
    _take_over_(tensors, progress)
    progress.step, progress.seconds = int(state["step"]), float(state["seconds"])
    progress.position = Position(int(state["next_index"]), tuple(state["waiting"]))


def _take_over_(tensors: Mapping[str, torch.Tensor], progress: Progress) -> None:
    with torch.no_grad():
        for name, parameter in progress.model.named_parameters():
            parameter.copy_(tensors[f"weight/{name}"])
            if name in progress.averages:
                progress.averages[name].copy_(tensors[f"average/{name}"])
            if f"step/{name}" in tensors:
                progress.optimizer.state[parameter] = {
                    key: tensors[f"{key}/{name}"].to("cpu" if key == "step" else parameter.device)
                    for key in ("step", "exp_avg", "exp_avg_sq")
                }


def start(model: nn.Module, optimizer: torch.optim.AdamW) -> Progress:
    """Nothing learnt yet; averages begin as the weights."""
    assert isinstance(model, JointModel)
    averages = {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}
    return Progress(model, optimizer, averages)


def as_job(plan: object, digest: str) -> dict[str, Any]:
    """What the weights depend on, for `write_checkpoint`; the source weights by their digest."""
    assert dataclasses.is_dataclass(plan) and not isinstance(plan, type)
    return {**json.loads(json.dumps(dataclasses.asdict(plan), default=str)), "source weights": digest}
