"""Sentences of a report that the pages share."""

from __future__ import annotations

from collections.abc import Sequence

from defaker_opt.drift.latency import Latency
from defaker_opt.report.values import DriftReport, Figure, Refit, Slice, SuiteReport
from defaker_opt.statistics.decision import Decision

METHODS = (
    "A drop is how much worse the build is than the reference on the same images; intervals are two-sided, 95 %.",
    "ACCEPT: every suite refutes, at the limit's one-sided confidence, a drop of the limit or more. REJECT: one suite "
    "refutes a drop of the limit or less. Otherwise UNDECIDED. An intersection-union test: ACCEPT needs no correction.",
    "Accuracy: exact unconditional test ordered by Tango's score; interval by that score. AUC: paired DeLong. All "
    "other figures: what each cluster adds to the error (influence functions), by Student's t and by the skew; of "
    "either end the farther.",
    "Clusters: photographs, if there are at least 20 of them; else pairs of twins, the authentic and the forged "
    "version of one picture; else images. Twins share every pixel but the forgery, so what a build loses on one may be "
    "lost on the other. Where clusters are finer than photographs, intervals hold for more pictures of the same "
    "photographs, not for new ones.",
    "Without a flip nothing tells how alike twins are, so a pair then counts as one image.",
    "Slices: p is of a drop of the limit or less, by Tango's score or by influences, after Holm over all slices.",
    "Noise floor: the reference against itself with another number of threads. A difference below it means nothing.",
    "Masks are judged whatever the verdict; their figures are means over forged images with a ground truth.",
)

NAMES = {
    "verdict_accuracy": "accuracy",
    "verdict_balanced_accuracy": "balanced accuracy",
    "verdict_true_positive_rate": "true-positive rate",
    "verdict_false_positive_rate": "false-positive rate",
    "verdict_auc": "AUC",
    "verdict_average_precision": "average precision",
    "verdict_equal_error_rate": "equal error rate",
    "verdict_tpr_at_reference_fpr": "TPR at the reference's FPR",
    "verdict_calibration_error": "calibration error (ECE)",
    "verdict_brier": "Brier score",
    "mask_iou": "mask IoU",
    "mask_f1": "pixel F1",
    "mask_best_f1": "best pixel F1",
    "mask_pixel_auc": "pixel AUC",
    "mask_agreement": "mask agreement",
    "mask_area": "mask area",
}


def points(value: float, signed: bool = False) -> str:
    """A share in percentage points, such as 0.42."""
    text = f"{100 * value:+.2f}" if signed else f"{100 * value:.2f}"
    return "0.00" if text in ("-0.00", "+0.00") else text


def limited(suites: Sequence[SuiteReport]) -> list[tuple[SuiteReport, Figure]]:
    """Figures with a limit, those that hold up an ACCEPT first."""
    rank = {"REJECT": 0, "UNDECIDED": 1, "ACCEPT": 2}
    pairs = [(suite, figure) for suite in suites for figure in suite.figures if figure.check]
    return sorted(pairs, key=lambda pair: rank[pair[1].check.decision] if pair[1].check else 3)


def limit_line(suite: SuiteReport, figure: Figure) -> str:
    """One limited figure: what was found, and what was allowed."""
    check = figure.check
    assert check is not None
    line = (
        f"{suite.name}: {NAMES[figure.metric]} {change_words(figure)} "
        f"(95 % interval {points(figure.low)} … {points(figure.high)}, n = {figure.n:,}); "
        f"limit {points(check.max_drop)} pp at {check.confidence:.0%}: {check.decision}"
    )
    return f"{line}; {needed_words(figure)}" if check.decision == "UNDECIDED" else line


def change_words(figure: Figure) -> str:
    """How much worse or better, in words that fit what goes up or down."""
    size = points(abs(figure.drop))
    if size == "0.00":
        return "did not change"
    return f"{'is worse' if figure.drop > 0 else 'is better'} by {size} pp"


def count_words(count: int, noun: str) -> str:
    """Such as 1 flip, 2 flips."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def needed_words(figure: Figure) -> str:
    """How many more images an undecided figure would take."""
    check = figure.check
    assert check is not None
    if check.more is None:
        return "the drop is about the limit, so no number of images would tell"
    return f"about {check.more:,} more images would give {check.answer}, if the drop stays"


def slice_words(each: Slice) -> str:
    """One slice in a sentence."""
    if not each.flips and each.drop == 0:
        return "none; no slice lost anything"
    return (
        f"{each.name}, {NAMES[each.metric]} {points(each.reference)} → {points(each.build)} %, "
        f"drop {points(each.drop)} pp ({points(each.low)} … {points(each.high)}), n = {each.n:,}, "
        f"{count_words(each.flips, 'flip')}, p = {each.p:.2g}{' — surely worse than the limit' if each.worse else ''}"
    )


def refit_words(fit: Refit) -> str:
    """What was fitted, and what it restores."""
    written = f"; written to {fit.written}" if fit.written else ""
    note = f" ({fit.temperature_note})" if fit.temperature_note else ""
    return (
        f"{fit.suite}, {fit.images:,} images: threshold {fit.threshold:.4f} (shipped {fit.shipped_threshold:.4f}), "
        f"temperature {fit.temperature:.3f}{note}; false-positive rate {points(fit.shipped_rate)} % as shipped, "
        f"{points(fit.rate)} % re-fitted, {points(fit.reference_rate)} % of the reference{written}"
    )


def latency_words(latency: Latency) -> str:
    """The latency against its limit."""
    answer = "REJECT" if latency.broken else "ACCEPT"
    return (
        f"latency: median {latency.median_ms:.0f} ms an image, mask included, over {latency.images} images judged "
        f"alone with {latency.threads} threads; limit {latency.max_ms:g} ms: {answer}"
    )


def answer_lines(report: DriftReport) -> list[str]:
    """What a terminal needs: the decision, the limits, the worst slice, and what must not be overlooked."""
    lines = [f"{report.decision}: {report.build.name} against {report.reference.name}"]
    lines += [f"  {limit_line(suite, figure)}" for suite, figure in limited(report.suites)]
    if report.latency:
        lines.append(f"  {latency_words(report.latency)}")
    if report.sequential:
        lines.append(f"  stopped after {report.sequential.judged:,} of {report.sequential.planned:,} images")
    if report.worst:
        lines.append(f"worst slice: {slice_words(report.worst)}")
    if report.refit:
        lines.append(f"re-fit: {refit_words(report.refit)}")
    lines += [f"warning: {warning}" for warning in report.warnings]
    return lines + [f"left out: {problem}" for problem in report.problems]


def summary_of(decision: Decision, suites: Sequence[SuiteReport]) -> str:
    """One sentence under the verdict."""
    pairs = limited(suites)
    if not pairs:
        return "No limit could be measured on any suite."
    if decision == "ACCEPT":
        parts = sorted({f"{NAMES[f.metric]} by {points(f.check.max_drop)} pp" for _, f in pairs if f.check})
        return f"Not worse than the reference by the limit: {', '.join(parts)} or more."
    return "; ".join(limit_line(*pair) for pair in pairs[:2] if pair[1].check and pair[1].check.decision == decision)
