"""Judge the same pictures with one build, or with two in turns, and keep every sample."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from PIL import Image

from defaker_opt.runtime import Build, Session
from defaker_opt.runtime.clock import Span

# Told what is being done and how much of it is behind us, 0…1.
Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Sample:
    """One picture judged once; `latency_ms` as in Verdict. Samples of two builds are pairs by round and image."""

    round: int
    image: int
    latency_ms: Mapping[str, float]
    timeline: tuple[Span, ...]


@dataclass(frozen=True)
class Throughput:
    """Pictures a second with so many judged at once, each on `threads` threads."""

    concurrency: int
    threads: int
    images: int
    images_per_second: float


def judge_in_turns(
    sessions: Sequence[Session],
    images: Sequence[Image.Image],
    gate: float,
    warm_up: int,
    repeat: int,
    progress: Progress,
) -> tuple[list[Sample], ...]:
    """Samples of each session: every round judges every picture once with each.

    The order is drawn for every second round and turned round for the next, so that who comes first, which costs or
    saves some percent, is the same for all.
    """
    generator, reverse = np.random.default_rng(), dict[int, list[int]]()
    samples: tuple[list[Sample], ...] = tuple([] for _ in sessions)
    for number in range(-warm_up, repeat):
        progress("warm up" if number < 0 else "measure", (number + warm_up) / (warm_up + repeat))
        for index, image in enumerate(images):
            order = reverse.pop(index, None) if number > 0 else None
            if order is None:
                order = generator.permutation(len(sessions)).tolist()
                reverse[index] = order[::-1]
            for which in order:
                verdict = sessions[which].judge(image, gate)
                if number >= 0:
                    samples[which].append(Sample(number, index, verdict.latency_ms, verdict.timeline))
    return samples


def measure_throughput(
    build: Build, images: Sequence[Image.Image], gate: float, cores: int, at_least: int
) -> tuple[Throughput, ...]:
    """One picture at a time on all cores, then one a core; stages are opened once and shared."""
    results = []
    for concurrency in sorted({1, cores}):
        threads = max(1, cores // concurrency)
        session = Session(build, threads)
        session.judge(images[0], gate)
        work = [images[index % len(images)] for index in range(max(at_least, 2 * concurrency))]
        started = time.perf_counter()
        with ThreadPoolExecutor(concurrency) as workers:
            list(workers.map(lambda image, session=session: session.judge(image, gate), work))
        seconds = time.perf_counter() - started
        session.close()
        results.append(Throughput(concurrency, threads, len(work), len(work) / seconds))
    return tuple(results)
