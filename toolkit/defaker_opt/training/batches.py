"""Pair numbers → batches, drawn ahead by worker processes and always in the same order.

A batch holds both twins of each of its pairs, and pictures of one tile count, so that no tile is padding: pairs wait
in a bucket for each tile count, in the order of their numbers, until one is full. Pictures keep their size and aspect
ratio, so the share of each tile count is what a user's pictures would give. What waits at the end is not used.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, count
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn import functional

from defaker_opt.config import DetectorConfig
from defaker_opt.forgery import Example
from defaker_opt.forgery.generate import make_pair
from defaker_opt.forgery.sources import Library, load_library
from defaker_opt.runtime.images import IMAGENET_MEAN, IMAGENET_STD, cut_tiles, tile_grid
from defaker_opt.training import PairSource

Bytes = NDArray[np.uint8]

# Pairs in the making for each worker, beyond the one it works on: enough to hide a slow one.
_AHEAD = 4


@dataclass(frozen=True)
class Prepared:
    """A pair as the model reads it, in bytes; the authentic twin first.

    tiles [2, T, tile, tile, 3], image [2, s, s, 3]; masks [2, s/4, s/4] and shares of the tiles' patches
    patch_shares [2, T, n, n]: 255 = all forged. shuffle: so many patches a side are joined to one vision token.
    """

    index: int
    tiles: Bytes
    image: Bytes
    masks: Bytes
    patch_shares: Bytes
    shuffle: int


@dataclass(frozen=True)
class Batch:
    """B pictures: tiles [B, T, 3, tile, tile], image [B, 3, s, s], both normalized; labels [B], 1 forged.

    masks [B, s/4, s/4], patch_shares [B, T, n²] and token_shares [B, T, K]: the forged share of a cell's area, 0…1.
    """

    tiles: torch.Tensor
    image: torch.Tensor
    masks: torch.Tensor
    patch_shares: torch.Tensor
    token_shares: torch.Tensor
    labels: torch.Tensor

    def shares_of(self, patch_logits: torch.Tensor) -> torch.Tensor:
        """The patch_shares of the tiles that were seen, which are all or the last; patch_logits [B, seen, n²]."""
        return self.patch_shares[:, -patch_logits.shape[1] :]


@dataclass(frozen=True)
class Position:
    """Where drawing stands after a batch: the next pair number, and the pairs that wait in buckets."""

    next_index: int = 0
    waiting: tuple[int, ...] = ()


def draw_batches(
    config: DetectorConfig, source: PairSource, position: Position, pairs_per_batch: int, workers: int
) -> Generator[tuple[list[Prepared], Position], None, None]:
    """Batches without end, each with the position after it. workers: processes, 0 to draw in this one."""
    # Pairs that waited are drawn again and fill the same buckets, so an interruption changes nothing.
    numbers = chain(position.waiting, count(position.next_index))
    buckets: dict[int, list[Prepared]] = {}
    for pair in draw_pairs(config, source, numbers, workers):
        bucket = buckets.setdefault(pair.tiles.shape[1], [])
        bucket.append(pair)
        if len(bucket) == pairs_per_batch:
            del buckets[pair.tiles.shape[1]]
            waiting = sorted(waits.index for others in buckets.values() for waits in others)
            yield bucket, Position(max(pair.index + 1, position.next_index), tuple(waiting))


def draw_pairs(config: DetectorConfig, source: PairSource, numbers: Iterable[int], workers: int) -> Iterator[Prepared]:
    """The numbered pairs, in order. workers: processes that draw ahead, 0 to draw in this one."""
    if workers == 0:
        for number in numbers:
            yield prepare_pair(config, source, number)
        return
    # A forked child of a process with torch's threads may hang, so workers start afresh.
    context = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(workers, context, _ignore_interrupts)
    pending: deque[Future[Prepared]] = deque()
    try:
        for number in numbers:
            pending.append(executor.submit(prepare_pair, config, source, number))
            if len(pending) > workers * _AHEAD:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _ignore_interrupts() -> None:
    """Ctrl-C reaches the whole group of processes; only the one that trains decides what to do."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def prepare_pair(config: DetectorConfig, source: PairSource, index: int) -> Prepared:
    """Draw pair `index` and cut both twins as the runtime would. Raises DefakerError as `make_pair` does."""
    number = index % source.distinct if source.distinct else index
    pair = make_pair(source.seed, number, source.split, _library(source.folders), source.size)
    twins = (pair.authentic, pair.forged)
    pictures = [Image.fromarray(twin.image) for twin in twins]
    size = config.segmenter.image_size
    return Prepared(
        index,
        np.stack([_tiles(config, picture) for picture in pictures]),
        np.stack([np.asarray(picture.resize((size, size))) for picture in pictures]),
        np.stack([_shares(_mask(twin), size // 4) for twin in twins]),
        np.stack([_patch_shares(config, _mask(twin)) for twin in twins]),
        config.vision.shuffle,
    )


@lru_cache(maxsize=1)
def _library(folders: tuple[Path, ...]) -> Library:
    """Photographs are decoded once a process."""
    return load_library(folders)


def _tiles(config: DetectorConfig, picture: Image.Image) -> Bytes:
    tiling = config.tiling
    cut = cut_tiles(picture, tiling.tile_size, tiling.min_tiles, tiling.max_tiles)
    return np.stack([np.asarray(tile) for tile in cut])


def _mask(twin: Example) -> Image.Image:
    return Image.fromarray(twin.mask.astype(np.uint8) * 255)


def _shares(mask: Image.Image, side: int) -> Bytes:
    """Forged share of each cell of a side x side grid, 255 = all of it."""
    return np.asarray(mask.resize((side, side), Image.Resampling.BOX))


def _patch_shares(config: DetectorConfig, mask: Image.Image) -> Bytes:
    """Forged share of the area of each patch [T, n, n], cut as the picture is cut."""
    side = config.tiling.tile_size // config.vision.patch_size
    columns, rows = tile_grid(*mask.size, config.tiling.tile_size, config.tiling.min_tiles, config.tiling.max_tiles)
    cells = np.asarray(mask.resize((side * columns, side * rows), Image.Resampling.BOX))
    tiles = cells.reshape(rows, side, columns, side).transpose(0, 2, 1, 3).reshape(rows * columns, side, side)
    return np.concatenate([tiles, _shares(mask, side)[None]]) if len(tiles) > 1 else tiles


def stack_pairs(pairs: list[Prepared], device: torch.device) -> Batch:
    """Prepared pairs of one tile count → a batch on the device; twins stand side by side."""

    def joined(arrays: list[Bytes]) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(arrays)).to(device, non_blocking=True)

    labels = torch.tensor([0, 1] * len(pairs), device=device)
    patch_shares = joined([pair.patch_shares for pair in pairs]) / 255
    return Batch(
        _normalized(joined([pair.tiles for pair in pairs])),
        _normalized(joined([pair.image for pair in pairs])),
        joined([pair.masks for pair in pairs]) / 255,
        patch_shares.flatten(2),
        functional.avg_pool2d(patch_shares, pairs[0].shuffle).flatten(2),
        labels,
    )


def _normalized(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 [..., h, w, 3] → float32 [..., 3, h, w], as `runtime.images.normalize`."""
    mean, std = (torch.from_numpy(values).to(pixels.device) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return ((pixels.float() / 255 - mean) / std).movedim(-1, -3).contiguous()
