"""Threshold and temperature from calibration pictures, and a new build that has them."""

from __future__ import annotations

import copy
import hashlib
import os
import shutil
from pathlib import Path

from defaker_opt.benchmarks.refit import at_temperature, fit_temperature, fit_threshold
from defaker_opt.drift.validate import Comparison
from defaker_opt.errors import BuildError, DefakerError, write_failure
from defaker_opt.files import write_json
from defaker_opt.report.evidence import gather
from defaker_opt.report.judge import threshold_of
from defaker_opt.report.values import Refit
from defaker_opt.runtime.build import MANIFEST, SEAL, Build, open_build, seal


def refit(comparison: Comparison, suite: str) -> Refit:
    """Fit to both builds' rows on calibration pictures. Raises DefakerError without authentic ones.

    The temperature is fitted to the labels, the threshold then to the reference's false-positive rate; where no
    temperature fits, it stays 1. Both are on top of a temperature that the build has already.
    """
    evidence = gather(comparison.runs[0])
    threshold = threshold_of(comparison.reference)
    reference, build = evidence.reference["probability"], evidence.build["probability"]
    temperature, note = 1.0, ""
    try:
        temperature = fit_temperature(evidence.labels, build).temperature
    except DefakerError as error:
        note = str(error)
    fitted = fit_threshold(evidence.labels, reference, at_temperature(build, temperature), threshold)
    authentic = evidence.labels == 0
    return Refit(
        suite=suite,
        images=len(evidence),
        threshold=fitted.threshold,
        shipped_threshold=threshold_of(comparison.candidate),
        reference_rate=fitted.reference_rate,
        shipped_rate=float(evidence.build["predicted"][authentic].mean()),
        rate=fitted.rate,
        temperature=temperature,
        temperature_note=note,
        written="",
    )


def check_new_build(output: Path) -> None:
    """Raise BuildError if something is at the place of the new build."""
    if output.exists() or output.is_symlink():
        raise BuildError(
            f"{output}: already there, and a build is never changed; choose another place for --write-refit"
        )


def write_refit(build: Build, fit: Refit, output: Path) -> Build:
    """A copy of a build with the fitted threshold and temperature, whole or not at all. Raises DefakerError."""
    check_new_build(output)
    data = copy.deepcopy(dict(build.manifest.data))
    old = data["thresholds"]
    # Whatever is called forged gets a mask, as before.
    gate = min(float(at_temperature(old["gate"], fit.temperature)), fit.threshold)
    data["thresholds"] = {
        **old,
        "fake_probability": fit.threshold,
        "gate": gate,
        "temperature": float(old.get("temperature", 1.0)) * fit.temperature,
    }
    # No job makes this build, so none may take it for its own.
    data["plan_sha256"] = hashlib.sha256(f"{data['plan_sha256']} {data['thresholds']}".encode()).hexdigest()
    data["refit"] = {"of": build.digest, "suite": fit.suite, "images": fit.images}
    del data[SEAL]
    work = output.with_name(f".{output.name}.partial")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        for name in build.manifest.data["files"]:
            shutil.copyfile(build.folder / name, work / name)
        write_json(work / MANIFEST, {**data, SEAL: seal(data)})
        open_build(work)
        os.replace(work, output)
    except OSError as error:
        raise write_failure(output, error) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return open_build(output)
