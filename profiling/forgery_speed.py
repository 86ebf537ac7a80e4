"""How many forgeries are made in a second: python profiling/forgery_speed.py [--images 160] [--size 512] [--workers 2].

Prints a table for people and one JSON object as its last line.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from defaker_opt.forgery import DOMAINS, Pair
from defaker_opt.forgery.generate import make_pair
from defaker_opt.forgery.sketch import installed_versions
from defaker_opt.forgery.sources import Library, load_library


def measure_domain(library: Library, domain: str, pairs: int, size: int, workers: int) -> dict[str, Any]:
    """Images a second of one domain, wall time, on `workers` threads; each pair counts as two images."""
    offset = DOMAINS.index(domain)

    def make(turn: int) -> Pair:
        return make_pair(0, turn * len(DOMAINS) + offset, "train", library, size)

    make(pairs)
    with ThreadPoolExecutor(workers) as executor:
        start = time.perf_counter()
        made = list(executor.map(make, range(pairs)))
        seconds = time.perf_counter() - start
    pixels = sum(pair.forged.mask.size for pair in made) / len(made)
    return {"images": 2 * pairs, "seconds": round(seconds, 3), "images_per_s": round(2 * pairs / seconds, 1),
            "mean_megapixels": round(pixels / 1e6, 3)}  # fmt: skip


def main() -> None:
    """Measure each domain, and the four together."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=160, help="images a domain")
    parser.add_argument("--size", type=int, default=512, help="longest side of a picture, px")
    parser.add_argument("--workers", type=int, default=2, help="threads")
    options = parser.parse_args()
    library = load_library()
    rows = {name: measure_domain(library, name, options.images // 2, options.size, options.workers) for name in DOMAINS}
    seconds = sum(row["seconds"] for row in rows.values())
    overall = round(sum(row["images"] for row in rows.values()) / seconds, 1)
    print("domain      images  seconds  images/s  megapixels")
    for name, row in rows.items():
        rate, area = row["images_per_s"], row["mean_megapixels"]
        print(f"{name:<10} {row['images']:>7} {row['seconds']:>8.2f} {rate:>9.1f} {area:>11.3f}")
    print(f"all domains together: {overall} images/s on {options.workers} threads")
    versions = {"python": platform.python_version(), **installed_versions()}
    machine = {"cores": os.cpu_count(), "processor": platform.machine(), "system": platform.system()}
    result = {"size": options.size, "workers": options.workers, "images_per_s": overall, "domains": rows}
    print(json.dumps({**result, "machine": machine, "versions": versions}))


if __name__ == "__main__":
    main()
