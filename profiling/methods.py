"""Quantization methods on the language part: how far verdicts and masks move from the float detector, and seconds.

    python profiling/methods.py [--source reference] [--suite quick] [--quick]
    python profiling/methods.py --suite embedded --methods 'gpt*activation*' --schemes int4-g128 int4-asym-g128 nf4-g64

Only codes differ: the other stages and all activations stay float32, in torch. Methods look at the set `calibration`,
suites are drawn from other photographs. `flips`: verdicts on the other side of 0.5; `KL`: of the eight answer words,
from float, in thousandths of a nat; `IoU`: of a picture's mask with that of the float detector, mean over pictures
where either is not empty. JSON is the last line. --quick: 32 calibration pictures, and 60 of the suite.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import sys
import time
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from defaker_opt.detector import Detector, linear_weights, load_detector, source_digest
from defaker_opt.drift.suites import load_suite
from defaker_opt.files import default_cache_folder
from defaker_opt.methods import parse_scheme
from defaker_opt.observe.inputs import Balance, StageInput, question_inputs, tile_inputs, whole_inputs
from defaker_opt.observe.sweep import Sweep
from defaker_opt.passes.quantize import Rule
from defaker_opt.runtime.answers import fake_probability
from defaker_opt.samples import EMBEDDED, Samples, load_samples

BALANCED = Balance()
ACTIVATION = {"order": "activation"}
SCHEMES = ("int4-g128", "int4-g32", "int4-asym-g128", "nf4-g64", "int2-asym-g32")
METHODS: dict[str, tuple[str, dict[str, object], Balance | None]] = {
    "round_to_nearest": ("round_to_nearest", {}, None),
    "mse_clip": ("mse_clip", {}, None),
    "hqq": ("hqq", {}, None),
    "awq": ("awq", {}, None),
    "gptq": ("gptq", {}, None),
    "gptq, by activation": ("gptq", ACTIVATION, None),
    "gptaq": ("gptaq", {}, None),
    "gptaq, by activation": ("gptaq", ACTIVATION, None),
    "awq, balanced": ("awq", {}, BALANCED),
    "gptq, by activation, balanced": ("gptq", ACTIVATION, BALANCED),
    "gptaq, by activation, balanced": ("gptaq", ACTIVATION, BALANCED),
}

Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Answers:
    """One row a picture: logits [n, 8], probability [n], masks [n, s/4, s/4]."""

    logits: np.ndarray
    probability: np.ndarray
    masks: np.ndarray


def encode(detector: Detector, samples: Samples) -> tuple[list[Tensors], list[Tensors]]:
    """Vision tokens and the mask encoder's maps of each picture, in float."""
    with torch.inference_mode():
        vision, whole = detector.load_stage("vision_encoder"), detector.load_stage("mask_encoder")
        tokens = [vision(*call.tensors) for call in tile_inputs(detector, samples)]
        return tokens, [whole(*call.tensors) for call in whole_inputs(detector, samples)]


def answer(detector: Detector, questions: list[StageInput], maps: list[Tensors]) -> Answers:
    with torch.inference_mode():
        language, decoder = detector.load_stage("language"), detector.load_stage("mask_decoder")
        logits = torch.cat([language(*call.tensors)[0] for call in questions[0::2]]).numpy()
        embeddings = [language(*call.tensors)[1] for call in questions[1::2]]
        masks = torch.cat([decoder(*each, embedding)[0] for each, embedding in zip(maps, embeddings)]).numpy() > 0
    return Answers(logits, np.array([fake_probability(row) for row in logits]), masks)


def quantize(
    detector: Detector,
    vision: list[Tensors],
    scheme: str,
    method: str,
    options: dict[str, object],
    balance: Balance | None,
) -> float:
    """Put codes of the language part into the detector; seconds."""
    started = time.perf_counter()
    rule = Rule("language.*", scheme, method, options)  # type: ignore[arg-type]
    chooser, original = rule.chooser(), dataclasses.replace(detector, codes={})
    detectors = [detector, original][: 1 + ("shift" in chooser.NEEDS)]
    questions = question_inputs(detector, vision, balance)
    # Eight rows decide the verdict; recipes leave them in float.
    names = [name for name in linear_weights(detector.config, "language") if "verdict_head" not in name]
    needs = dict.fromkeys(names, chooser.NEEDS)
    with torch.inference_mode():
        walk = Sweep(detectors, needs).walk("language", lambda: [questions])
        for name, seen in ((name, seen) for group in walk for name, seen in group.items()):
            weight, whole = original.read(name).numpy(), parse_scheme(scheme)
            fitted = whole.fitted(weight.shape[1]) if whole and name in needs else None
            if fitted is not None:
                detector.codes[name] = chooser.quantize(weight, fitted, seen)
    return time.perf_counter() - started


def compare(float_answers: Answers, answers: Answers) -> dict[str, float]:
    first, second = (log_softmax(each.logits.astype(np.float64)) for each in (float_answers, answers))
    union = (float_answers.masks | answers.masks).sum((1, 2))
    common = (float_answers.masks & answers.masks).sum((1, 2))
    seen = union > 0
    return {
        "flips": int(((float_answers.probability > 0.5) != (answers.probability > 0.5)).sum()),
        "mean_kl": float((np.exp(first) * (first - second)).sum(1).mean()),
        "mean_probability_change": float(np.abs(float_answers.probability - answers.probability).mean()),
        "mean_iou_with_float": float((common[seen] / union[seen]).mean()) if seen.any() else 1.0,
    }


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


def show(what: str, fraction: float) -> None:
    print(f"\r{fraction:4.0%} {what:60}", end="", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="reference")
    parser.add_argument("--suite", default="quick")
    parser.add_argument("--schemes", nargs="+", default=SCHEMES)
    parser.add_argument("--methods", default="*", help="a glob over the names in the table")
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    cache = default_cache_folder()
    detector = load_detector(given.source)
    calibration = load_samples(EMBEDDED, cache, show)
    suite = load_suite(given.suite, None, cache, show).items
    if given.quick:
        calibration = dataclasses.replace(calibration, items=calibration.items[:32])
        suite = suite[:60]
    vision, _ = encode(detector, calibration)
    tokens, maps = encode(detector, Samples(given.suite, "", suite))
    questions = question_inputs(detector, tokens, None)
    float_answers = answer(detector, questions, maps)
    rows: dict[str, dict[str, float]] = {}
    chosen = {name: method for name, method in METHODS.items() if fnmatchcase(name, given.methods)}
    for scheme in given.schemes:
        for name, (method, options, balance) in chosen.items():
            changed = dataclasses.replace(detector, codes={})
            seconds = quantize(changed, vision, scheme, method, options, balance)
            row = {**compare(float_answers, answer(changed, questions, maps)), "seconds": seconds}
            rows[f"{scheme} {name}"] = row
            show(
                f"{scheme} {name}: {row['flips']} flips, {row['mean_kl'] * 1e3:.4f}",
                len(rows) / len(chosen) / len(given.schemes),
            )
    print(file=sys.stderr)
    print_table(rows, len(suite))
    machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    facts = {"source": given.source, "sha256": source_digest(detector), "suite": given.suite, "pictures": len(suite)}
    versions = {"torch": torch.__version__, "numpy": np.__version__}
    print(
        json.dumps({"rows": rows, **facts, "calibration": len(calibration), "machine": machine, "versions": versions})
    )


def print_table(rows: dict[str, dict[str, float]], pictures: int) -> None:
    table = Table(title=f"language part quantized, {pictures} pictures, against float")
    for column in ("scheme and method", "flips", "KL / 1000", "mean |Δp|", "IoU with float", "seconds"):
        table.add_column(column, justify="left" if column.startswith("scheme") else "right")
    for name, row in rows.items():
        table.add_row(
            name,
            f"{row['flips']:.0f}",
            f"{row['mean_kl'] * 1e3:.4f}",
            f"{row['mean_probability_change']:.5f}",
            f"{row['mean_iou_with_float']:.4f}",
            f"{row['seconds']:.1f}",
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
