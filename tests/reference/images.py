"""Tiling as the original code states it, and resizing pixel by pixel."""

from __future__ import annotations

import numpy as np
from PIL import Image


def tiles_plain(image: Image.Image, tile_size: int, min_tiles: int, max_tiles: int) -> list[Image.Image]:
    """Every grid is tried; crops are taken one index at a time, the thumbnail last."""
    width, height = image.size
    ratio = width / height
    candidates = set()
    for n in range(min_tiles, max_tiles + 1):
        for i in range(1, n + 1):
            for j in range(1, n + 1):
                if min_tiles <= i * j <= max_tiles:
                    candidates.add((i, j))
    best, nearest = (1, 1), float("inf")
    for grid in sorted(candidates, key=lambda grid: grid[0] * grid[1]):
        difference = abs(ratio - grid[0] / grid[1])
        if difference < nearest:
            nearest, best = difference, grid
        elif difference == nearest and width * height > 0.5 * tile_size * tile_size * grid[0] * grid[1]:
            best = grid
    resized = image.resize((tile_size * best[0], tile_size * best[1]))
    tiles = []
    for index in range(best[0] * best[1]):
        left, top = (index % best[0]) * tile_size, (index // best[0]) * tile_size
        tiles.append(resized.crop((left, top, left + tile_size, top + tile_size)))
    if len(tiles) != 1:
        tiles.append(image.resize((tile_size, tile_size)))
    return tiles


def normalize_plain(image: Image.Image) -> np.ndarray:
    """Channel by channel; float32 [3, height, width]."""
    pixels = np.asarray(image).astype(np.float32) / 255
    channels = []
    for channel, (mean, std) in enumerate(zip((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))):
        channels.append((pixels[:, :, channel] - np.float32(mean)) / np.float32(std))
    return np.stack(channels)
