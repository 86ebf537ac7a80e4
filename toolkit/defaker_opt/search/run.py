"""From a wish to a build: measure, solve, build, prove; and again with half the harm if it is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from defaker_opt.detector import Detector, load_detector
from defaker_opt.drift.reference import open_reference
from defaker_opt.errors import DefakerError, SourceError
from defaker_opt.files import whole_file
from defaker_opt.limits import Limit
from defaker_opt.pipeline import build_bytes, make_build, plan_job
from defaker_opt.progress import Progress, part_of
from defaker_opt.recipe import Recipe
from defaker_opt.report.gallery import pick_pictures
from defaker_opt.report.validation import Hands, Request, Validated, validate_early
from defaker_opt.report.write import write_report
from defaker_opt.runtime.build import Build, json_text
from defaker_opt.samples import load_samples
from defaker_opt.search import Budget, Choice, Ledger, Search, Trial, fitted_name
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

# The only backend whose products can be timed one by one.
_BACKEND = "onnx_runtime"


# Megabytes and milliseconds.
Measured = tuple[float, float]


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
    """Find, make and judge a build. Raises DefakerError; before any work if the budget or the target is impossible."""
    detector = _checked(wish)
    cache = wish.request.cache
    samples = load_samples(wish.calibration, cache, part_of(progress, 0.0, 0.02))
    seen = see(detector, samples, wish.target, cache, part_of(progress, 0.02, 0.25))
    reference = open_reference(wish.source, cache, part_of(progress, 0.27, 0.05))
    image = picture_of(samples, seen)
    ledger = make_ledger(detector, reference, seen, wish.target, image, part_of(progress, 0.32, 0.08))
    choice = solve(ledger, wish.budget)
    points = tuple(front(ledger, wish.budget.latency_ms))
    attempt = _Attempt(wish, detector, image, output)
    trials: list[Trial] = []
    while True:
        share = part_of(progress, 0.4 + 0.6 * len(trials) / TRIALS, 0.6 / TRIALS)
        build, measured = attempt.build(choice, replace or bool(trials), part_of(share, 0.0, 0.4))
        if not trials:
            ledger, choice, build, measured = _corrected(attempt, ledger, choice, build, measured, share)
        trials.append(attempt.judge(ledger, choice, build, measured, part_of(share, 0.5, 0.5)))
        done = Search(wish.budget, ledger, points, tuple(trials))
        gentler = None if done.accepted or len(trials) == TRIALS else _gentler(ledger, trials[-1], wish.budget)
        if gentler is None:
            _write(done, output)
            progress("done", 1.0)
            return Found(build, done, search_folder(output))
        choice = gentler


def _checked(wish: Wish) -> Detector:
    if wish.target.backend != _BACKEND:
        raise DefakerError(
            f"--recipe {NAME}: products of target {wish.target.name} ({wish.target.backend}) cannot be timed one by "
            f"one; give a --target with the backend {_BACKEND}, such as cpu, or a recipe made for {wish.target.name}"
        )
    detector = load_detector(wish.source)
    if detector.config.prompt is None:
        raise SourceError(
            f"{wish.source}/config.json: prompt is missing, so nothing can be asked; set the token ids of the prompts"
        )
    return detector


def _gentler(ledger: Ledger, trial: Trial, budget: Budget) -> Choice | None:
    """The smallest choice of half the harm, as fast as was asked for if there is one; None if none is gentler."""
    if trial.harm <= 0:
        return None
    return smallest_within(ledger, trial.harm / 2, budget.latency_ms) or smallest_within(ledger, trial.harm / 2)


def _corrected(
    attempt: _Attempt, ledger: Ledger, choice: Choice, build: Build, measured: Measured, progress: Progress
) -> tuple[Ledger, Choice, Build, Measured]:
    """Where the first build misses the budget, what was predicted wrongly of it is corrected, and it is chosen anew.

    Nodes of codes make graphs longer, and layers that share an input round it once.
    """
    budget = attempt.wish.budget
    size_mb, latency_ms = measured[0] - ledger.size_mb(choice), measured[1] - ledger.latency_ms(choice)
    corrected = dataclasses.replace(
        ledger, other_bytes=ledger.other_bytes + round(1e6 * size_mb), other_ms=ledger.other_ms + latency_ms
    )
    if budget.allows(*measured):
        return corrected, choice, build, measured
    try:
        chosen = solve(corrected, budget)
    except DefakerError:  # what it misses it by is more than any choice could make good; the trial says so
        return corrected, choice, build, measured
    return corrected, chosen, *attempt.build(chosen, True, part_of(progress, 0.4, 0.1))


@dataclass(frozen=True)
class _Attempt:
    """What it takes to try a choice."""

    wish: Wish
    detector: Detector
    image: Image.Image
    output: Path

    def build(self, choice: Choice, replace: bool, progress: Progress) -> tuple[Build, Measured]:
        """Write the recipe, make the build, and measure it."""
        wish, folder = self.wish, search_folder(self.output)
        lost = " and ".join(f"{limit.max_drop:g} of {metric}" for metric, limit in wish.limits.items())
        words = (
            f"Found for {self.detector.config.name} by quantize --recipe {NAME}: {wish.budget}, at most {lost} lost."
        )
        data = recipe_data(choice, words, wish.source, wish.target.name, wish.calibration, wish.limits)
        recipe = write_recipe(data, folder / f"{NAME}.yaml")
        _assert_same(recipe, self.detector, wish.target, choice)
        job = plan_job(recipe, wish.target, wish.source, part_of(progress, 0.0, 0.1))
        build = make_build(job, self.output, part_of(progress, 0.1, 0.8), replace)
        return build, (build_bytes(build) / 1e6, time_build(build, self.image, part_of(progress, 0.9, 0.1)))

    def judge(self, ledger: Ledger, choice: Choice, build: Build, measured: Measured, progress: Progress) -> Trial:
        """Ask the drift gate, and keep its report."""
        done = self._judge(build, progress)
        write_report(
            done.report, done.comparison, pick_pictures(done.comparison.runs), search_folder(self.output) / "validation"
        )
        predicted = (ledger.size_mb(choice), ledger.latency_ms(choice))
        return Trial(choice, ledger.harm(choice), predicted, measured, done.report.decision, done.report.summary)

    def _judge(self, build: Build, progress: Progress) -> Validated:
        # Each of several builds may be accepted by luck, so each gets its share of the error (Bonferroni).
        limits = {
            metric: Limit(limit.max_drop, 1 - (1 - limit.confidence) / TRIALS)
            for metric, limit in self.wish.limits.items()
        }
        return validate_early(build, self.wish.source, self.wish.request, self.wish.hands, limits, progress)


def _assert_same(recipe: Recipe, detector: Detector, target: Target, choice: Choice) -> None:
    """The rules say what was chosen."""
    [quantize] = recipe.passes
    said = quantize.check(detector.config, target).schemes
    for name, shape in layer_shapes(detector).items():
        wanted = fitted_name(choice[name], shape[1])
        assert said[name] == wanted, f"{name}: {said[name]} instead of {wanted}"


def _write(done: Search, output: Path) -> None:
    folder = search_folder(output)
    text = (folder / f"{NAME}.yaml").read_text(encoding="utf-8")
    files = {"search.json": json_text(done.as_json()), PAGE: search_as_html(done, output.name, text)}
    for name, content in files.items():
        with whole_file(folder / name) as partial:
            partial.write_text(content, encoding="utf-8")
