"""A small suite on disk: twins of drawn pictures, with a mask where they differ."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from PIL import Image

from defaker_opt.sample import sample_image

SIZE = (96, 64)


def write_pictures(folder: Path, pairs: int, first_seed: int = 0) -> Path:
    """A table of `pairs` authentic pictures and as many forged ones; its path."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for pair in range(pairs):
        name = f"{first_seed + pair:03d}"
        pixels = np.asarray(Image.fromarray(sample_image(first_seed + pair)).resize(SIZE)).copy()
        Image.fromarray(pixels).save(folder / f"{name}-real.png")
        left, top = 5 + 7 * (pair % 5), 4 + 3 * (pair % 7)
        mask = np.zeros(SIZE[::-1], np.uint8)
        mask[top : top + 9 + pair, left : left + 14] = 255
        pixels[mask > 0] = 255 - pixels[mask > 0]
        Image.fromarray(pixels).save(folder / f"{name}-fake.png")
        Image.fromarray(mask).save(folder / f"{name}-mask.png")
        lines.append({"image": f"{name}-real.png", "label": "real", "mask": "", "source": name, "domain": "drawn"})
        lines.append(
            {
                "image": f"{name}-fake.png",
                "label": "fake",
                "mask": f"{name}-mask.png",
                "source": name,
                "domain": "drawn",
            }
        )
    table = folder / f"{folder.name}.csv"
    with table.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)
    return table
