"""From a wish to a build: measure, solve, build, prove; and again with half the harm if it is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from defaker_opt.detector import Detector, load_detector, require_prompt
from defaker_opt.drift.reference import open_reference
from defaker_opt.errors import BuildError, DefakerError
from defaker_opt.files import held, move_folder, whole_file
from defaker_opt.limits import Limit
from defaker_opt.pipeline import build_bytes, make_build, plan_job
from defaker_opt.progress import Progress, part_of
from defaker_opt.recipe import Recipe
from defaker_opt.report.gallery import pick_pictures
from defaker_opt.report.validation import Hands, Request, validate_early
from defaker_opt.report.write import write_report
from defaker_opt.runtime.build import MANIFEST, Build, json_text, open_build
from defaker_opt.samples import load_samples
from defaker_opt.search import Budget, Formats, Ledger, Search, Trial, fitted
from defaker_opt.search.measure import layer_shapes, make_ledger, picture_of, see, time_build
from defaker_opt.search.page import search_as_html
from defaker_opt.search.recipe import recipe_data, write_recipe
from defaker_opt.search.solve import front, smallest_within, solve
from defaker_opt.target import Target

# A refused build is followed by the smallest one of half its predicted harm, so often at most.
TRIALS = 5

# The name of a recipe that is found, and of its file.
NAME = "auto"
PAGE = "search.html"

# The build in the making, in the folder of the search.
_BUILD = "build"

# The only backend whose products can be timed one by one.
_BACKEND = "onnx_runtime"


# Megabytes and milliseconds.
Cost = tuple[float, float]

# How often what was predicted wrongly of a first build that misses the budget is corrected.
_CORRECTIONS = 2


@dataclass(frozen=True)
class Wish:
    """What is asked for. limits: how much may be lost, judged on `request`; calibration: see `load_samples`."""

    source: str
    target: Target
    limits: Mapping[str, Limit]
    budget: Budget
    calibration: str
    request: Request
    hands: Hands


@dataclass(frozen=True)
class Found:
    """A build, and the search that found it, whose page, recipe and report lie in `folder`."""

    build: Build
    search: Search
    folder: Path


def search_folder(output: Path) -> Path:
    """Where the search for a build is kept: beside it."""
    return output.with_name(f"{output.name}.search")


def search(wish: Wish, output: Path, replace: bool, progress: Progress) -> Found:
    """Find, make and judge a build. Nothing gets its name before the end; a rerun finds what was measured and built.

    Raises DefakerError: at once for a wrong target, source or output, and for an impossible budget when what everything
    takes has been measured.
    """
    detector = _checked(wish, output, replace)
    cache, work = wish.request.cache, output.with_name(f".{output.name}.search.partial")
    busy = BuildError(f"{work}: another process is searching for this build; wait, or choose another --output")
    with held(work, busy):
        _refuse_existing(output, replace)  # another process may have finished it meanwhile
        samples = load_samples(wish.calibration, cache, part_of(progress, 0.0, 0.02))
        seen = see(detector, samples, wish.target, cache, part_of(progress, 0.02, 0.25))
        reference = open_reference(wish.source, cache, part_of(progress, 0.27, 0.05))
        image = picture_of(samples, seen)
        ledger = make_ledger(detector, reference, seen, wish.target, image, part_of(progress, 0.32, 0.08))
        done = _try_all(_Attempt(wish, detector, image, work), ledger, part_of(progress, 0.4, 0.6))
        _write(done, work, output.name)
        move_folder(work / _BUILD, output)
        move_folder(work, search_folder(output))
    progress("done", 1.0)
    return Found(open_build(output), done, search_folder(output))


def _try_all(attempt: _Attempt, ledger: Ledger, progress: Progress) -> Search:
    """The choice with the least harm within the budget, and gentler ones while the gate does not accept."""
    wish = attempt.wish
    formats = solve(ledger, wish.budget)
    build, measured = attempt.build(formats, part_of(progress, 0.0, 0.4 / TRIALS))
    predicted = _cost(ledger, formats)
    for _ in range(_CORRECTIONS):
        ledger = _corrected(ledger, formats, measured)
        again = None if wish.budget.allows(*measured) else _solved(ledger, wish.budget)
        if again is None or again == formats:
            break
        formats, predicted = again, _cost(ledger, again)
        build, measured = attempt.build(formats, part_of(progress, 0.4 / TRIALS, 0.1 / TRIALS))
    points = tuple(front(ledger, wish.budget.latency_ms))
    trials: list[Trial] = []
    while True:
        judging = part_of(progress, (len(trials) + 0.5) / TRIALS, 0.5 / TRIALS)
        decision, summary = attempt.judge(build, judging)
        trials.append(Trial(formats, ledger.harm(formats), predicted, measured, decision, summary))
        done = Search(wish.budget, ledger, points, tuple(trials))
        gentler = None if done.accepted or len(trials) == TRIALS else _gentler(ledger, trials[-1], wish.budget)
        if gentler is None:
            return done
        formats, predicted = gentler, _cost(ledger, gentler)
        build, measured = attempt.build(formats, part_of(progress, len(trials) / TRIALS, 0.4 / TRIALS))


def _cost(ledger: Ledger, formats: Formats) -> Cost:
    return ledger.size_mb(formats), ledger.latency_ms(formats)


def _solved(ledger: Ledger, budget: Budget) -> Formats | None:
    """None where a corrected ledger leaves nothing within the budget; the trial then says so."""
    try:
        return solve(ledger, budget)
    except DefakerError:
        return None


def _corrected(ledger: Ledger, formats: Formats, measured: Cost) -> Ledger:
    """What a build weighs and takes beside its layers, as one build has shown it.

    Nodes of codes make graphs longer, and layers that share an input round it once.
    """
    predicted = _cost(ledger, formats)
    return dataclasses.replace(
        ledger,
        other_bytes=ledger.other_bytes + round(1e6 * (measured[0] - predicted[0])),
        other_ms=ledger.other_ms + measured[1] - predicted[1],
    )


def _checked(wish: Wish, output: Path, replace: bool) -> Detector:
    """Everything that can be refused before work begins."""
    _refuse_existing(output, replace)
    if wish.target.backend != _BACKEND:
        raise DefakerError(
            f"--recipe {NAME}: products of target {wish.target.name} ({wish.target.backend}) cannot be timed one by "
            f"one; give a --target with the backend {_BACKEND}, such as cpu, or a recipe made for {wish.target.name}"
        )
    detector = load_detector(wish.source)
    require_prompt(detector, wish.source)
    return detector


def _refuse_existing(output: Path, replace: bool) -> None:
    for place in (output, search_folder(output)):
        if place.exists() and not replace:
            raise BuildError(f"{place}: already there; choose another --output, or replace it with --replace")
        if place.exists() and not ((place / MANIFEST).is_file() or (place / f"{NAME}.yaml").is_file()):
            raise BuildError(f"{place}: already there and not ours, so it is left alone; choose another --output")


def _gentler(ledger: Ledger, trial: Trial, budget: Budget) -> Formats | None:
    """The smallest choice of half the harm, as fast as was asked for if there is one; None if none is gentler."""
    if trial.harm <= 0:
        return None
    return smallest_within(ledger, trial.harm / 2, budget.latency_ms) or smallest_within(ledger, trial.harm / 2)


@dataclass(frozen=True)
class _Attempt:
    """What it takes to try formats, in a folder of its own."""

    wish: Wish
    detector: Detector
    image: Image.Image
    work: Path

    def build(self, formats: Formats, progress: Progress) -> tuple[Build, Cost]:
        """Write the recipe, make the build, and measure it."""
        wish = self.wish
        lost = " and ".join(f"{limit.max_drop:g} of {metric}" for metric, limit in wish.limits.items())
        words = f"Found for {self.detector.config.name} by --recipe {NAME}: {wish.budget}, at most {lost} lost."
        data = recipe_data(formats, words, wish.source, wish.target.name, wish.calibration, wish.limits)
        recipe = write_recipe(data, self.work / f"{NAME}.yaml")
        _assert_same(recipe, self.detector, wish.target, formats)
        job = plan_job(recipe, wish.target, wish.source, part_of(progress, 0.0, 0.1))
        build = make_build(job, self.work / _BUILD, part_of(progress, 0.1, 0.8), replace=True)
        return build, (build_bytes(build) / 1e6, time_build(build, self.image, part_of(progress, 0.9, 0.1)))

    def judge(self, build: Build, progress: Progress) -> tuple[str, str]:
        """Ask the drift gate, and keep its report: the decision, and why."""
        wish = self.wish
        # Each of several builds may be accepted by luck, so each gets its share of the error (Bonferroni).
        limits = {
            metric: Limit(limit.max_drop, 1 - (1 - limit.confidence) / TRIALS) for metric, limit in wish.limits.items()
        }
        done = validate_early(build, wish.source, wish.request, wish.hands, limits, progress)
        pictures = pick_pictures(done.comparison.runs)
        write_report(done.report, done.comparison, pictures, self.work / "validation")
        return done.report.decision, done.report.summary


def _assert_same(recipe: Recipe, detector: Detector, target: Target, choice: Formats) -> None:
    """The rules say what was chosen."""
    [quantize] = recipe.passes
    said = quantize.check(detector.config, target).schemes
    for name, shape in layer_shapes(detector).items():
        wanted = str(fitted(choice[name], shape[1]) or "float")
        assert said[name] == wanted, f"{name}: {said[name]} instead of {wanted}"


def _write(done: Search, folder: Path, name: str) -> None:
    text = (folder / f"{NAME}.yaml").read_text(encoding="utf-8")
    files = {"search.json": json_text(done.as_json()), PAGE: search_as_html(done, name, text)}
    for file, content in files.items():
        with whole_file(folder / file) as partial:
            partial.write_text(content, encoding="utf-8")
