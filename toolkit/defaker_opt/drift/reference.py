"""What a candidate is compared with: a build, or a detector, which is then built in float32 once."""

from __future__ import annotations

import functools
from pathlib import Path

from defaker_opt.progress import Progress
from defaker_opt.runtime.build import MANIFEST, Build, open_build

_RECIPE = "float32"


def open_reference(source: str, cache_folder: Path, progress: Progress) -> Build:
    """Open a build, or make that of a detector in the cache: of a folder, or an embedded one. Raises DefakerError."""
    folder = Path(source)
    if folder.is_file() or (folder / MANIFEST).exists():
        return open_build(folder)
    progress("load torch", 0.0)
    from defaker_opt.pipeline import make_build, plan_job
    from defaker_opt.recipe import load_recipe
    from defaker_opt.target import load_target

    recipe = load_recipe(_RECIPE)
    job = plan_job(recipe, load_target(recipe.target), source)
    # Named after the job, so that a changed detector, or other tools, get a build of their own.
    output = cache_folder / "builds" / f"{job.detector.config.name}-{_RECIPE}-{job.key[:12]}"
    return make_build(job, output, functools.partial(_prefixed, progress))


def _prefixed(progress: Progress, what: str, fraction: float) -> None:
    progress(f"reference: {what}", fraction)
