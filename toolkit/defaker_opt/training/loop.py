"""The loop: draw, step, average, evaluate, keep; the same plan goes on where it was interrupted."""

from __future__ import annotations

import contextlib
import json
import math
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from defaker_opt.config import DetectorConfig
from defaker_opt.detector import Detector, source_digest
from defaker_opt.errors import DefakerError, one_of, write_failure
from defaker_opt.training import PHASES, PRECISIONS, PairSource, Plan, Precision
from defaker_opt.training.attune import attune_
from defaker_opt.training.batches import Batch, Prepared, draw_batches, draw_pairs, stack_pairs
from defaker_opt.training.checkpoint import Progress, as_job, resume_, start, write_checkpoint
from defaker_opt.training.evaluate import Scores, area_under_curve, evaluate, fake_probabilities
from defaker_opt.training.losses import joint_losses, total_loss
from defaker_opt.training.model import JointModel, use_fused_attention_
from defaker_opt.training.untouched import hold_untouched_
from defaker_opt.weights import DrawnWeights

Report = Callable[[str, float], None]

# How much smaller the drawn weights that [SEG] ends with begin.
_QUIET = 0.1

# Verdicts behind the AUC that is shown while training.
_RECENT = 512


@dataclass(frozen=True)
class Machine:
    """What a plan is carried out on; decides how fast, not what is learnt. workers: processes that draw pairs."""

    device: torch.device
    workers: int


@dataclass
class Recent:
    """What was seen since the last line of the log, and the last verdicts."""

    losses: dict[str, list[float]] = field(default_factory=dict)
    probabilities: deque[float] = field(default_factory=lambda: deque(maxlen=_RECENT))
    labels: deque[int] = field(default_factory=lambda: deque(maxlen=_RECENT))
    images: int = 0
    since: float = field(default_factory=time.perf_counter)


def find_device(name: str) -> torch.device:
    """Where to train: "auto" is CUDA where there is some. Raises DefakerError for an unknown or missing device."""
    if name not in ("auto", "cpu", "cuda"):
        raise DefakerError(f"device: {one_of(name, ('auto', 'cpu', 'cuda'))}")
    if name == "cuda" and not torch.cuda.is_available():
        raise DefakerError("device: this torch finds no CUDA device; give --device cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def find_precision(name: str, device: torch.device) -> Precision:
    """What to compute in: "auto" is bfloat16 on CUDA, float32 elsewhere. Raises DefakerError for another."""
    if name == "auto":
        return "bfloat16" if device.type == "cuda" else "float32"
    if name not in PRECISIONS:
        raise DefakerError(f"precision: {one_of(name, ('auto', *PRECISIONS))}")
    return PRECISIONS[PRECISIONS.index(name)]


def train(detector: Detector, plan: Plan, machine: Machine, folder: Path, report: Report) -> tuple[Progress, Scores]:
    """Carry out a plan, or the rest of it; `folder` keeps checkpoint.safetensors and log.jsonl.

    Ctrl-C ends the step in hand, writes a checkpoint and raises KeyboardInterrupt. Raises DefakerError if the folder
    belongs to another plan or cannot be written.
    """
    job = as_job(plan, source_digest(detector))
    progress = _begin(detector, plan, machine)
    checkpoint = folder / "checkpoint.safetensors"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_failure(folder, error) from error
    if checkpoint.is_file():
        resume_(checkpoint, job, progress)
    report("draw pictures to evaluate on", 0.0)
    held_out = held_out_pairs(detector.config, plan, machine.workers)
    recent = Recent()
    batches = draw_batches(detector.config, plan.source, progress.position, plan.pairs_per_batch, machine.workers)
    with _interrupts() as interrupted, contextlib.closing(batches):
        for pairs, position in islice(batches, plan.steps - progress.step):
            _step_(progress, plan, stack_pairs(pairs, machine.device), recent)
            progress.position = position
            _keep(progress, plan, folder, recent, report)
            if _due(progress.step, plan, plan.evaluate_every) and progress.step < plan.steps:
                _evaluate(progress, plan, folder, held_out)
            if interrupted() or progress.step == plan.steps or _due(progress.step, plan, plan.checkpoint_every):
                write_checkpoint(checkpoint, job, progress)
            if interrupted():
                raise KeyboardInterrupt
    return progress, _evaluate(progress, plan, folder, held_out)


def _begin(detector: Detector, plan: Plan, machine: Machine) -> Progress:
    model = JointModel(detector).to(machine.device)
    if machine.device.type == "cuda":
        use_fused_attention_(model)
    if isinstance(detector.weights, DrawnWeights):
        # What the mask path learnt alone, with the bias for [SEG], is not drowned in noise when it is joined.
        model.seg_end().weight.data.mul_(_QUIET)
        attune_(model)
    hold_untouched_(model.vision_encoder.tower)
    taught = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in taught if p.ndim >= 2], "weight_decay": plan.weight_decay},
        {"params": [p for p in taught if p.ndim < 2], "weight_decay": 0.0},
    ]
    return start(model, torch.optim.AdamW(groups, lr=plan.learning_rate, betas=(0.9, 0.999)))


def held_out_pairs(config: DetectorConfig, plan: Plan, workers: int) -> list[Prepared]:
    """Pairs of the calibration photographs, which nothing is taught on."""
    source = PairSource(plan.source.seed, "calibration", plan.source.folders, plan.source.size)
    return list(draw_pairs(config, source, range(plan.evaluation_pairs), workers))


def learning_rate(plan: Plan, step: int) -> float:
    """In each phase a linear warm-up, then half a cosine to a hundredth (Loshchilov and Hutter 2017, section 3)."""
    start, steps = plan.span_of(step)
    highest = plan.learning_rate * PHASES[plan.phase_of(step).name].rate
    warmup, step = plan.warmup * steps, step - start
    if step < warmup:
        return highest * (step + 1) / (warmup + 1)
    done = (step - warmup) / max(steps - warmup, 1)
    return highest * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))


def _step_(progress: Progress, plan: Plan, batch: Batch, recent: Recent) -> None:
    model, began = progress.model, time.perf_counter()
    for group in progress.optimizer.param_groups:
        group["lr"] = learning_rate(plan, progress.step)
    with torch.autocast(batch.image.device.type, torch.bfloat16, enabled=plan.precision == "bfloat16"):
        outputs = model(batch, PHASES[plan.phase_of(progress.step).name])
    losses = joint_losses(outputs, batch)
    progress.optimizer.zero_grad()
    torch.autograd.backward(total_loss(losses))
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), plan.clip)
    if not torch.isfinite(norm):
        raise DefakerError(f"step {progress.step}: the gradients are not finite; give a smaller --learning-rate")
    progress.optimizer.step()
    progress.step += 1
    _average_(progress, plan)
    for name, loss in losses.items():
        recent.losses.setdefault(name, []).append(loss.item())
    if outputs.sight_logits is not None:
        recent.probabilities.extend(fake_probabilities(outputs).tolist())
        recent.labels.extend(batch.labels.tolist())
    recent.images += len(batch.labels)
    progress.seconds += time.perf_counter() - began


@torch.no_grad()
def _average_(progress: Progress, plan: Plan) -> None:
    """Averages follow quickly at first, while weights still change a lot."""
    kept = min(plan.average, (1 + progress.step) / (10 + progress.step))
    for name, weight in progress.model.named_parameters():
        if name in progress.averages:
            progress.averages[name].lerp_(weight, 1 - kept)


def _due(step: int, plan: Plan, every: int) -> bool:
    """A multiple of `every` images was passed by the last step."""
    images = 2 * plan.pairs_per_batch
    return step * images // every != (step - 1) * images // every


def _keep(progress: Progress, plan: Plan, folder: Path, recent: Recent, report: Report) -> None:
    """Now and then one line of the log, and the progress bar."""
    if not _due(progress.step, plan, plan.log_every) and progress.step < plan.steps:
        return
    rate = recent.images / (time.perf_counter() - recent.since)
    means = {name: float(np.mean(values)) for name, values in recent.losses.items()}
    auc = area_under_curve(np.array(recent.probabilities), np.array(recent.labels))
    phase = plan.phase_of(progress.step - 1).name
    _log(
        folder,
        {
            "images": progress.step * 2 * plan.pairs_per_batch,
            "phase": phase,
            "learning_rate": learning_rate(plan, progress.step - 1),
            "losses": {name: round(mean, 5) for name, mean in means.items()},
            "recent_auc": None if math.isnan(auc) else round(auc, 4),
            "images_per_second": round(rate, 3),
            "seconds": round(progress.seconds, 1),
        },
    )
    shown = " ".join(f"{name} {mean:.3f}" for name, mean in means.items())
    verdict = "" if math.isnan(auc) else f", AUC {auc:.2f}"
    report(f"{phase}: loss {shown}{verdict}, {rate:.1f} images/s", progress.step / plan.steps)
    recent.losses.clear()
    recent.images, recent.since = 0, time.perf_counter()


def _evaluate(progress: Progress, plan: Plan, folder: Path, held_out: list[Prepared]) -> Scores:
    parts = PHASES[plan.phase_of(progress.step - 1).name]
    scores = evaluate(progress.model, progress.averages, held_out, parts)
    images = progress.step * 2 * plan.pairs_per_batch
    _log(folder, {"images": images, "evaluation": scores.as_json()})
    return scores


def _log(folder: Path, line: dict[str, Any]) -> None:
    try:
        with (folder / "log.jsonl").open("a", encoding="utf-8") as log:
            log.write(json.dumps(line) + "\n")
    except OSError as error:
        raise write_failure(folder / "log.jsonl", error) from error


@contextlib.contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C was pressed; a second one interrupts at once."""
    pressed: list[int] = []

    def note(number: int, frame: object) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)
