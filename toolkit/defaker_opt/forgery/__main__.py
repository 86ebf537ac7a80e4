"""`python -m defaker_opt.forgery NAME…`: draw sets, and write what they are verified by into `calibration/`.

For maintainers: results measured on a set cannot be compared with those from before its digest changed.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from pathlib import Path

import numpy as np

from defaker_opt.catalog import yaml_names
from defaker_opt.errors import EXIT_OK, EXIT_USER_ERROR, DefakerError
from defaker_opt.forgery.sets import ForgerySet, SetSpec, fill_cache, load_spec, rows_digest
from defaker_opt.forgery.sketch import Agreement, draw_sketch, installed_versions, sketch_path


def write_digest(name: str, cache_folder: Path) -> str:
    """Draw a set, and write its digest, the versions used and its sketches beside its YAML; the digest."""
    spec, path = load_spec(name)
    rows = fill_cache(spec, path.stem, cache_folder, _print_progress, 0)
    folder = cache_folder / f"{path.stem}-{spec.key}"
    images = ForgerySet(path.stem, spec, folder, rows, Agreement(len(rows), 0, 0))
    np.save(sketch_path(path), np.stack([draw_sketch(example) for example in images]))
    finished = dataclasses.replace(spec, digest=rows_digest(rows), made_with=installed_versions())
    path.write_text(_as_yaml(finished), encoding="utf-8")
    return finished.digest


def _as_yaml(spec: SetSpec) -> str:
    import yaml

    return yaml.safe_dump(dataclasses.asdict(spec), sort_keys=False, width=120, allow_unicode=True)


def _print_progress(what: str, fraction: float) -> None:
    print(f"\r{fraction:4.0%} {what}", end="", file=sys.stderr, flush=True)


def main(names: list[str]) -> int:
    """Exit code: 0, or 2 for an unknown set or one that cannot be drawn."""
    if not names:
        print(f"usage: python -m defaker_opt.forgery NAME…; sets: {', '.join(yaml_names('calibration'))}")
        return EXIT_USER_ERROR
    try:
        with tempfile.TemporaryDirectory() as cache:
            for name in names:
                print(f"\r{name}: {write_digest(name, Path(cache))}")
    except DefakerError as error:
        print(error, file=sys.stderr)
        return EXIT_USER_ERROR
    return EXIT_OK


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
