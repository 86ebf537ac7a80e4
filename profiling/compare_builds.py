"""Several builds on the same photographs: size, milliseconds, and how far each is from the first.

    python profiling/compare_builds.py BUILD BUILD... --images PHOTO... [--repeat 3]

Builds take turns on every photograph; milliseconds are medians without the first round, which opens the stages.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from defaker_opt.runtime import Session, Verdict, open_build, open_session
from defaker_opt.runtime.images import load_image
from defaker_opt.runtime.spec import STAGES


@dataclass
class Rows:
    """What one build gave: a verdict for each photograph, latencies of each later round."""

    verdicts: list[Verdict] = field(default_factory=list)
    latencies_ms: list[dict[str, float]] = field(default_factory=list)


def measure(sessions: dict[str, Session], images: list[Path], repeat: int) -> dict[str, Rows]:
    rows = {name: Rows() for name in sessions}
    for round_number in range(repeat + 1):
        for path in images:
            image = load_image(path)
            for name, session in sessions.items():
                verdict = session.judge(image, gate=0.0)
                if round_number:
                    rows[name].latencies_ms.append(dict(verdict.latency_ms))
                else:
                    rows[name].verdicts.append(verdict)
    return rows


def mask_iou(verdict: Verdict, reference: Verdict) -> float:
    assert verdict.mask is not None
    assert reference.mask is not None
    union = (verdict.mask | reference.mask).sum()
    return float((verdict.mask & reference.mask).sum() / union) if union else 1.0


def summarize(session: Session, rows: Rows, first: Rows) -> dict[str, object]:
    pairs = list(zip(rows.verdicts, first.verdicts))
    names = (*STAGES, "total")
    return {
        "bytes": sum(path.stat().st_size for path in session.build.folder.iterdir()),
        "latency_ms": {name: float(np.median([each.get(name, 0) for each in rows.latencies_ms])) for name in names},
        "max_probability_difference": max(abs(a.fake_probability - b.fake_probability) for a, b in pairs),
        "flips": sum(a.is_fake != b.is_fake for a, b in pairs),
        "mean_mask_iou": float(np.mean([mask_iou(a, b) for a, b in pairs])),
        "digest": session.build.digest,
        "trained": session.build.manifest.trained,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("builds", nargs="+", type=Path)
    parser.add_argument("--images", nargs="+", type=Path, required=True)
    parser.add_argument("--repeat", type=int, default=3)
    arguments = parser.parse_args()
    sessions = {str(path): open_session(open_build(path)) for path in arguments.builds}
    rows = measure(sessions, arguments.images, arguments.repeat)
    first = rows[next(iter(rows))]
    results = {name: summarize(session, rows[name], first) for name, session in sessions.items()}
    table = Table(title=f"{len(arguments.images)} photographs; differences to the first build")
    for column in ("build", "MB", "ms", *(f"{stage} ms" for stage in STAGES), "largest Δp", "flips", "mask IoU"):
        table.add_column(column, justify="left" if column == "build" else "right")
    for name, result in results.items():
        latency = result["latency_ms"]
        assert isinstance(latency, dict)
        cells = [f"{result['bytes'] / 1e6:.1f}", f"{latency['total']:.0f}"]  # type: ignore[operator]
        cells += [f"{latency[stage]:.1f}" for stage in STAGES]
        cells += [f"{result['max_probability_difference']:.4f}", str(result["flips"]), f"{result['mean_mask_iou']:.3f}"]
        table.add_row(Path(name).name, *cells)
    Console(width=150, file=sys.stdout).print(table)
    machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    versions = {"onnxruntime": __import__("onnxruntime").__version__, "numpy": np.__version__}
    print(json.dumps({"builds": results, "images": len(arguments.images), "machine": machine, "versions": versions}))


if __name__ == "__main__":
    main()
