"""One picture drawn from a seed: what stages are compared on, and what a build tests itself with."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

WIDTH, HEIGHT = 640, 400


def sample_image(seed: int = 0) -> NDArray[np.uint8]:
    """Smooth colour, edges, texture and a pasted patch: no stage sees only flat input; uint8 [400, 640, 3].

    Integer arithmetic only, so the pixels are the same on every machine.
    """
    generator = np.random.Generator(np.random.PCG64(seed))
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    channels = [(x * 255 // WIDTH), (y * 255 // HEIGHT), ((x + y) * 255 // (WIDTH + HEIGHT))]
    image = np.stack(channels, axis=-1).astype(np.int64)
    for _ in range(12):
        left, top = int(generator.integers(0, WIDTH)), int(generator.integers(0, HEIGHT))
        right, bottom = left + int(generator.integers(20, 160)), top + int(generator.integers(20, 120))
        image[top:bottom, left:right] = generator.integers(0, 256, 3)
    image += generator.integers(-24, 25, image.shape)
    image[HEIGHT // 2 : HEIGHT // 2 + 80, 40:160] = image[20:100, 300:420]
    return np.clip(image, 0, 255).astype(np.uint8)
