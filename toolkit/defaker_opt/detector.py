"""The detector: one joint model, loaded one stage at a time."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from defaker_opt.catalog import data_folder
from defaker_opt.config import DetectorConfig, load_config
from defaker_opt.errors import SourceError, one_of
from defaker_opt.methods import QuantizedWeight
from defaker_opt.presets import is_preset, parse_preset, preset_config, preset_folder
from defaker_opt.presets.drawn import RandomWeights
from defaker_opt.presets.folder import write_folder
from defaker_opt.runtime.spec import STAGES, StageSpec
from defaker_opt.savings import EVERY_SAVING, NO_SAVING, Savings
from defaker_opt.stages import stage_file
from defaker_opt.streaming import set_parameter_, stream_weights_
from defaker_opt.weights import DrawnWeights, Shapes, Weights, open_weights

# The detector inside the package, and the same with drawn weights: what training begins with.
REFERENCE, UNTAUGHT = "reference", "reference:random"
EMBEDDED = (REFERENCE, UNTAUGHT)
_SEED = 0

# What attention's first product multiplies; with the module's name before it, the name of such an operand.
OPERANDS = ("queries", "keys")


@dataclass
class Detector:
    """The joint model and what the passes have done to it. The only noun that changes.

    codes: name of a linear layer's weight → its quantized form, which then stands for that weight everywhere.
    scales: name of a parameter → what its rows and its columns are multiplied by whenever it is read.
    savings: what its graphs leave out; torch leaves out nothing.
    operand_scales: full name of an attention module → by what its queries and its keys are rounded, to -128…127 times
    it, in graphs of targets that have such products; torch leaves them float.
    """

    config: DetectorConfig
    weights: Weights
    codes: MutableMapping[str, QuantizedWeight] = field(default_factory=dict)
    savings: Savings = EVERY_SAVING
    scales: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    operand_scales: MutableMapping[str, tuple[float, float]] = field(default_factory=dict)

    def spec(self, stage: str) -> StageSpec:
        """The contract of one stage."""
        return stage_file(stage).spec(self.config)

    def read(self, name: str) -> torch.Tensor:
        """One tensor as float32: a parameter of a stage by its full name, or one that only the folder has."""
        if name in self.codes:
            return torch.from_numpy(self.codes[name].dequantize())
        stage, _, inner = name.partition(".")
        compute = self._derived(stage).get(inner)
        value = (compute() if compute else self.weights.read(name)).to(torch.float32)
        if name not in self.scales:
            return value
        rows, columns = self.scales[name]
        return value * rows if value.ndim == 1 else value * rows[:, None] * columns

    def scale_(
        self, name: str, rows: NDArray[np.float32] | float = 1.0, columns: NDArray[np.float32] | float = 1.0
    ) -> None:
        """From now on read a vector, or a matrix [rows, columns], times these factors and earlier ones."""
        before = self.scales.get(name, (torch.ones(1), torch.ones(1)))
        self.scales[name] = (before[0] * torch.as_tensor(rows), before[1] * torch.as_tensor(columns))

    def load_stage(self, stage: str) -> nn.Module:
        """A stage in torch, on the CPU, in float32, ready to run."""
        return _filled(self.config, stage, self.read)

    def stream_stage(self, stage: str) -> nn.Module:
        """Like `load_stage`, but weights of repeated blocks are read when a block runs and dropped when it has."""
        module = empty_stage(self.config, stage)
        stream_weights_(module, lambda name: self.read(f"{stage}.{name}"))
        return module.eval()

    def outline(self, stage: str) -> nn.Module:
        """A stage whose parameters have the right shapes and take no memory; for tracing only."""
        shapes = parameter_shapes(self.config, stage)
        return _filled(self.config, stage, lambda name: torch.zeros(1).expand(shapes[name]), self.savings)

    def rows(self, name: str, rows: tuple[int, ...]) -> torch.Tensor:
        """Some rows of a stored table as float32, without reading the rest."""
        return self.weights.read(name)[list(rows)].to(torch.float32)

    def _derived(self, stage: str) -> dict[str, Callable[[], torch.Tensor]]:
        return stage_file(stage).derived(self.config, self.weights.read)


def _filled(
    config: DetectorConfig, stage: str, read: Callable[[str], torch.Tensor], savings: Savings = NO_SAVING
) -> nn.Module:
    module = empty_stage(config, stage, savings)
    for name in parameter_shapes(config, stage):
        set_parameter_(module, name.partition(".")[2], read(name))
    return module.eval()


def empty_stage(config: DetectorConfig, stage: str, savings: Savings = NO_SAVING) -> nn.Module:
    """A stage without memory for its parameters."""
    with torch.device("meta"):
        return stage_file(stage).build(config, savings)


@lru_cache(maxsize=16)
def parameter_shapes(config: DetectorConfig, stage: str) -> Shapes:
    """Full names and shapes of a stage's parameters."""
    return {f"{stage}.{name}": tuple(p.shape) for name, p in empty_stage(config, stage).named_parameters()}


@lru_cache(maxsize=16)
def linear_weights(config: DetectorConfig, stage: str) -> Shapes:
    """Full names and shapes [out, in] of the weights of a stage's linear layers, the only ones that are quantized."""
    modules = empty_stage(config, stage).named_modules()
    return {f"{stage}.{name}.weight": tuple(m.weight.shape) for name, m in modules if isinstance(m, nn.Linear)}


@lru_cache(maxsize=16)
def attention_modules(config: DetectorConfig, stage: str) -> tuple[str, ...]:
    """Full names of a stage's attentions; transformers' all say whether they are causal."""
    return tuple(f"{stage}.{n}" for n, m in empty_stage(config, stage).named_modules() if hasattr(m, "is_causal"))


def stored_shapes(config: DetectorConfig) -> Shapes:
    """Every tensor a detector folder must hold."""
    shapes: dict[str, tuple[int, ...]] = {}
    for stage in STAGES:
        file = stage_file(stage)
        derived = file.derived(config, lambda name: torch.empty(0))
        shapes.update({n: s for n, s in parameter_shapes(config, stage).items() if n.partition(".")[2] not in derived})
        shapes.update({f"{stage}.{name}": shape for name, shape in file.stored_only(config).items()})
    return shapes


def load_detector(source: str) -> Detector:
    """Open an embedded detector or a preset by name, or a detector folder by path; no weight is read yet.

    A preset whose folder is not written (see `write_source`) is drawn in memory, tensor by tensor.
    Raises SourceError or ConfigError with what is missing, unexpected, or of another shape.
    """
    folder = source_folder(source)
    if source == UNTAUGHT:
        config = dataclasses.replace(load_config(folder), name="reference-random", trained=False)
        return Detector(config, DrawnWeights(stored_shapes(config), _SEED))
    if is_preset(source):
        preset = parse_preset(source)
        folder = preset_folder(preset)
        if not folder.is_dir():
            config = preset_config(preset)
            return Detector(config, RandomWeights(stored_shapes(config)))
    if not (folder / "config.json").is_file():
        raise SourceError(
            f"source {one_of(source, EMBEDDED)}, nor a detector folder with a config.json, nor PRESET:random; "
            "make one with: defaker-opt convert CHECKPOINT -o FOLDER"
        )
    config = load_config(folder)
    expected = stored_shapes(config)
    if source in EMBEDDED and not (folder / "model.safetensors").is_file():
        return Detector(config, DrawnWeights(expected, _SEED))
    weights = open_weights(folder)
    problems = list(_differences(expected, weights.shapes()))
    if problems:
        raise SourceError(f"{folder}: not the tensors its config.json asks for:\n  " + "\n  ".join(problems))
    return Detector(config, weights)


def require_prompt(detector: Detector, source: str) -> None:
    """Raise SourceError unless the detector can be asked anything."""
    if detector.config.prompt is None:
        raise SourceError(
            f"{source}/config.json: prompt is missing, so nothing can be asked; set the token ids of the prompts there"
        )


def source_folder(source: str) -> Path:
    """Where the files of an embedded detector or of a detector folder are."""
    return data_folder(REFERENCE) if source in EMBEDDED else Path(source)


def write_source(source: str, progress: Callable[[int, int], None]) -> Path | None:
    """Write the detector folder of a preset, unless it is there; None for sources that are no presets.

    `progress` is called with bytes done and in all. A rerun goes on after the last finished shard. Raises DefakerError.
    """
    if source in EMBEDDED or not is_preset(source):
        return None
    preset = parse_preset(source)
    folder = preset_folder(preset)
    if not folder.is_dir():
        config = preset_config(preset)
        write_folder(folder, config, RandomWeights(stored_shapes(config)), progress)
    return folder


def source_digest(detector: Detector) -> str:
    """SHA-256 over configuration and weights."""
    return hashlib.sha256((detector.config.as_json() + detector.weights.digest()).encode()).hexdigest()


def _differences(expected: Shapes, stored: Shapes) -> Iterator[str]:
    for name in sorted(set(expected) | set(stored)):
        if name not in stored:
            yield f"{name}: missing, {list(expected[name])} expected"
        elif name not in expected:
            yield f"{name}: unexpected"
        elif expected[name] != stored[name]:
            yield f"{name}: {list(stored[name])}, but {list(expected[name])} expected"
