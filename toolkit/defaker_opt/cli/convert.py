"""`defaker-opt convert`: a released checkpoint → a detector folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def convert(
    checkpoint: Annotated[Path, typer.Argument(help="A Sa2VA or InternVL2 folder: config.json and safetensors.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The detector folder to write.")],
    segmenter: Annotated[
        Path | None, typer.Option(help="SAM2 for an InternVL2 folder: its .pt, safetensors, or a folder of them.")
    ] = None,
    adapter: Annotated[
        list[Path] | None, typer.Option(help="A PEFT folder with LoRA weights to merge; may be repeated.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="A YAML file with other questions or answer words than the usual ones.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="End with one JSON object on standard output.")] = False,
) -> None:
    """Turn a released checkpoint into a detector folder; every tensor is used, folded, or ignored with its reason."""
    from collections import Counter

    from defaker_opt.cli.progress import progress_bar

    with progress_bar() as report:
        report("load torch", 0.0)
        from defaker_opt.checkpoint import Extras
        from defaker_opt.convert import convert as write_detector

        extras = Extras(segmenter, tuple(adapter or ()), prompts)
        done = write_detector(checkpoint, output, lambda part, total: report("write shards", part / total), extras)
    if as_json:
        summary = {
            "detector": str(done.folder),
            "bytes": done.bytes,
            "used": done.used,
            "folded": dict(done.folded),
            "ignored": dict(done.ignored),
            "drawn": list(done.drawn),
            "notes": list(done.notes),
        }
        print(json.dumps(summary))
        return
    print(f"{done.folder}: {done.bytes / 1e6:,.1f} MB from {done.used} tensors, {len(done.folded)} sliced or reshaped")
    for reason, count in Counter(done.ignored.values()).items():
        print(f"  ignored {count} tensors, {reason}")
    for note in done.notes:
        print(f"  note: {note}")
