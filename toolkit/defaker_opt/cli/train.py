"""`defaker-opt train`: photographs → a detector that was taught on forgeries of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from defaker_opt.training.evaluate import Scores


def train(
    output: Annotated[Path, typer.Option("--output", "-o", help="The detector folder to write.")],
    source: Annotated[
        str,
        typer.Option(
            help="What to begin with: reference:random (drawn weights), reference, a detector folder, or PRESET:random."
        ),
    ] = "reference:random",
    stages: Annotated[
        str, typer.Option(help="What learns, in this order: mask, sight, answer, verdict or joint, and its images.")
    ] = "joint:100000",
    photos: Annotated[list[Path] | None, typer.Option(help="More photographs to forge; may be repeated.")] = None,
    batch: Annotated[int, typer.Option(help="Images a step; each pair is two.")] = 16,
    learning_rate: Annotated[float, typer.Option(help="Highest rate of AdamW; sight takes four times that.")] = 5e-4,
    size: Annotated[int, typer.Option(help="Longest side of a forged picture, px.")] = 512,
    seed: Annotated[int, typer.Option(help="Decides which pairs are drawn.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    precision: Annotated[
        str, typer.Option(help="float32, bfloat16, or auto: bfloat16 on CUDA. CPUs with AVX512-BF16 gain from it too.")
    ] = "auto",
    workers: Annotated[int, typer.Option(help="Processes that draw pairs; 0 draws between steps.")] = 1,
    evaluate_every: Annotated[int, typer.Option(help="Images between evaluations on held-out photographs.")] = 4000,
    evaluation_pairs: Annotated[int, typer.Option(help="Held-out pairs that evaluations judge.")] = 48,
    checkpoint_every: Annotated[int, typer.Option(help="Images between checkpoints.")] = 2000,
    as_json: Annotated[bool, typer.Option("--json", help="End with one JSON object on standard output.")] = False,
) -> None:
    """Teach a detector; the same command goes on where an interrupted one stopped.

    Until it is finished, OUTPUT.training keeps the checkpoint; its log.jsonl has losses and evaluations.
    """
    from defaker_opt.cli.progress import progress_bar

    _check(batch, workers)
    with progress_bar() as report:
        report("load torch", 0.0)
        from defaker_opt.detector import load_detector, write_source
        from defaker_opt.training import PairSource, Plan, parse_phases
        from defaker_opt.training.loop import Machine, find_device, find_precision
        from defaker_opt.training.loop import train as carry_out
        from defaker_opt.training.write import refuse_existing, write_detector

        refuse_existing(output)
        machine = Machine(find_device(device), workers)
        plan = Plan(
            parse_phases(stages),
            PairSource(seed, "train", tuple(photos or ()), size),
            pairs_per_batch=batch // 2,
            learning_rate=learning_rate,
            evaluate_every=evaluate_every,
            evaluation_pairs=evaluation_pairs,
            checkpoint_every=checkpoint_every,
            precision=find_precision(precision, machine.device),
        )
        write_source(source, lambda part, total: report("draw weights", part / total))
        detector = load_detector(source)
        work = output.with_name(f"{output.name}.training")
        progress, scores = carry_out(detector, plan, machine, work, report)
        write_detector(detector, progress.model, progress.averages, source, output)
    _print_result(output, work, plan.images, progress.seconds, scores, as_json)


def _check(batch: int, workers: int) -> None:
    from defaker_opt.errors import DefakerError

    if batch < 2 or batch % 2:
        raise DefakerError(f"batch: must be an even number of images, as pairs stay together, got {batch}")
    if workers < 0:
        raise DefakerError(f"workers: must be 0 or more, got {workers}")


def _print_result(output: Path, work: Path, images: int, seconds: float, scores: Scores, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"detector": str(output), "images": images, "seconds": round(seconds), **scores.as_json()}))
        return
    print(f"{output}: {images:,} images in {seconds / 60:,.0f} min; log: {work / 'log.jsonl'}")
    print(
        f"  {scores.pictures} pictures of held-out photographs: AUC {scores.auc:.3f}, accuracy {scores.accuracy:.3f}, "
        f"IoU on forged {scores.iou:.3f}, empty mask on authentic {scores.empty:.1%}"
    )
