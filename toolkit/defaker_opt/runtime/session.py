"""Run the stages in order: a picture → a verdict and, if it is suspicious, a mask."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from defaker_opt.errors import BuildError
from defaker_opt.runtime.answers import decode_fixed, decode_free, fake_probability, text_of
from defaker_opt.runtime.backends import Choice, OpenStage, Tensors, find_backend
from defaker_opt.runtime.build import Build
from defaker_opt.runtime.clock import Clock, Span
from defaker_opt.runtime.engines import backend_of, stand_in
from defaker_opt.runtime.images import distinct_tiles, full_size_mask, image_tiles, mask_image
from defaker_opt.runtime.prompts import Prefix, extend_, load_prompts, question_input
from defaker_opt.runtime.spec import PHASES, VOCABULARY_HEAD, StageSpec

Array = NDArray[np.float32]

# With fewer cores than this, two stages at once only get in each other's way.
_CORES_FOR_TWO = 4


@dataclass(frozen=True)
class Verdict:
    """What one picture was judged to be.

    fake_probability: 0…1, the share of the four "yes" words among the eight answer words, at the build's temperature.
    verdict_logits: float32 [8], first the four that say fake, then the four that say real.
    mask: bool [height, width] of the picture, True where it is tampered with; None if the gate held it back.
    mask_area: share of the picture that the mask covers, 0…1; None without a mask.
    latency_ms: milliseconds by stage, "preprocess", "mask_resize" and "total"; a stage that did not run is absent, and
    two that ran at once count both. A call that several pictures share counts whole for each, with the wait for it.
    greedy_answer: where the mask's answer is decoded (a build without `appended_answer`), the likeliest word at each of
    its steps, as token ids. The fixed answer's own words are fed all the same, so the mask is that of the fixed answer.
    mask_logits: float32 [s/4, s/4] of the mask image's size s, what the mask was made from; None without a mask.
    timeline: when each call of a stage began and ended; two that ran at once overlap.
    explanation: the detector's own answer to the verdict's question, if it was asked for one.
    """

    fake_probability: float
    is_fake: bool
    verdict_logits: Array
    mask: NDArray[np.bool_] | None
    mask_area: float | None
    latency_ms: Mapping[str, float] = field(compare=False)
    mask_logits: Array | None = None
    greedy_answer: tuple[int, ...] = field(default=(), compare=False)
    timeline: tuple[Span, ...] = field(default=(), compare=False)
    explanation: str | None = None


@dataclass
class Session:
    """An open build. Stages are opened when they are first needed, so a real picture never loads the segmenter."""

    build: Build
    threads: int = 0
    # None: what `backend_of` says.
    choice: Choice | None = None
    _open: dict[str, OpenStage] = field(default_factory=dict)
    # Pictures may be judged at once; each stage is opened by the first that needs it.
    _opening: threading.Lock = field(default_factory=threading.Lock)
    _prompts: dict[str, Array] = field(default_factory=dict)

    def judge(self, image: Image.Image, gate: float | None = None, explain_words: int = 0) -> Verdict:
        """Judge one RGB picture. The mask is made if the fake probability reaches `gate` (default: the manifest's).

        explain_words: the most tokens of an explanation, 0 for none. Raises BuildError if the build has no words.
        """
        thresholds, facts = self.build.manifest.data["thresholds"], self.build.manifest.data["input"]
        gate = thresholds["gate"] if gate is None else gate
        clock = Clock()
        with ThreadPoolExecutor(max_workers=1) as beside:
            ahead = beside.submit(self._encode_whole, image, Clock()) if self._encodes_ahead(gate) else None
            with clock("preprocess"):
                tiles = image_tiles(image, facts["tile_size"], facts["min_tiles"], facts["max_tiles"])
            prefix = self.read_prefix(self.see(tiles, clock), clock)
            logits = np.asarray(self.ask("verdict", prefix, clock))[0]
            _refuse_not_finite("language", "verdict_logits", logits)
            probability = fake_probability(logits, thresholds.get("temperature", 1.0))
            mask: NDArray[np.bool_] | None = None
            mask_logits: Array | None = None
            greedy: tuple[int, ...] = ()
            words = decode_free(self, prefix, clock, explain_words) if explain_words else ()
            if probability >= gate:
                if not self.build.manifest.saves("shared_prefix"):
                    prefix = self.read_prefix(self.see(tiles, clock), clock)
                embedding, greedy = self._find_mask(prefix, clock)
                del prefix  # its key/values are large, and the mask encoder needs room
                mask_logits = self._mask_logits(image, embedding, ahead, clock)
                with clock("mask_resize"):
                    size = facts["mask_image_size"]
                    mask = full_size_mask(mask_logits, size, *image.size, thresholds["mask_logit"])
        return Verdict(
            fake_probability=probability,
            is_fake=probability > thresholds["fake_probability"],
            verdict_logits=logits,
            mask=mask,
            mask_area=None if mask is None else float(mask.mean()),
            latency_ms=clock.finish(),
            mask_logits=mask_logits,
            greedy_answer=greedy,
            timeline=clock.timeline(),
            explanation=text_of(self.build, words) if explain_words else None,
        )

    def run(self, stage: str, tensors: Tensors, clock: Clock, outputs: tuple[str, ...] = ()) -> dict[str, NDArray[Any]]:
        """Run one stage, opening it first if need be; the named outputs, or all of them, by name."""
        with clock("load"):
            opened = self.open_stage(stage)
        with clock(stage):
            return opened(tensors, outputs or tuple(tensor.name for tensor in self.spec(stage).outputs))

    def spec(self, stage: str) -> StageSpec:
        """The contract of one stage."""
        return self.build.manifest.spec(stage)

    def open_stage(self, stage: str) -> OpenStage:
        """The stage, opened once."""
        with self._opening:
            if stage not in self._open:
                self._make_room_for(stage)
                backend = find_backend(self.backend())
                file = self.build.folder / f"{stage}.onnx"
                self._open[stage] = backend.open_stage(file, self.spec(stage), self.options())
            return self._open[stage]

    def options(self) -> dict[str, Any]:
        """What the backend is told of how to run stages."""
        target = self.build.manifest.data["target"]
        options = {**target["session"], **({"threads": self.threads} if self.threads else {})}
        as_written = {"as_written": True} if self.backend() != target["backend"] else {}
        chosen = self.choice or stand_in(self.build)
        return {**options, **as_written, **(chosen.options if chosen else {})}

    def backend(self) -> str:
        """What runs the stages here."""
        return self.choice.backend if self.choice else backend_of(self.build)

    def _make_room_for(self, stage: str) -> None:
        """Where not all stages may be open at once, close those of other phases."""
        if self.is_short_of_memory():
            for other in [other for other in self._open if PHASES[other] != PHASES[stage]]:
                del self._open[other]

    def is_short_of_memory(self) -> bool:
        """Whether stages of one phase alone may be open at once."""
        limit_mb = self.build.manifest.data["target"]["session"].get("open_mb", 0)
        # A build in the making knows the size of finished stages only.
        size = sum(entry.get("bytes", 0) for entry in self.build.manifest.data["stages"].values())
        return bool(limit_mb) and size > limit_mb * 1_000_000

    def close(self) -> None:
        """Give back the memory of all stages; they open again when they are needed."""
        self._open.clear()

    def prompts(self) -> dict[str, Array]:
        """Embeddings of the fixed prompts: `before` and the suffixes `shared`, `verdict`, `mask`, each [tokens, H]."""
        if not self._prompts:
            self._prompts.update(load_prompts(self.build))
        return self._prompts

    def see(self, tiles: Array, clock: Clock) -> dict[str, NDArray[Any]]:
        """Run the vision encoder on normalized tiles [T, 3, t, t]; its outputs, tile by tile."""
        manifest, count = self.build.manifest, len(tiles)
        with clock("preprocess"):
            if not manifest.saves("no_padding"):
                empty = np.zeros((manifest.data["input"]["max_tiles"] + 1 - count, *tiles.shape[1:]), np.float32)
                tiles = np.concatenate([tiles, empty])
            same = manifest.saves("identical_tiles")
            first, place = distinct_tiles(tiles) if same else (list(range(len(tiles))),) * 2
        step = manifest.data["target"]["session"]["tiles"] or len(first)
        seen = [
            self.run("vision_encoder", {"tiles": tiles[first[start : start + step]]}, clock)
            for start in range(0, len(first), step)
        ]
        with clock("vision_encoder"):
            whole = {name: np.concatenate([part[name] for part in seen]) for name in seen[0]}
            return {name: array[place[:count]] for name, array in whole.items()}

    def prefix_input(self, vision: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Input of the language stage for what both questions share: prompt, image, start of the question."""
        prompts = self.prompts()
        tokens, kept = vision["vision_tokens"], vision["kept_positions"]
        tiles, _, width = tokens.shape
        per_tile = int(self.build.manifest.data["input"]["tokens_per_tile"])
        before, shared = prompts["before"], prompts["shared"]
        # Pruned tokens leave gaps: positions stay those of the full image, so that the questions stand where they did.
        image_positions = len(before) + np.arange(tiles)[:, None] * per_tile + kept
        after_image = len(before) + tiles * per_tile
        positions = np.concatenate(
            [np.arange(len(before)), image_positions.reshape(-1), after_image + np.arange(len(shared))]
        )
        embeds = np.concatenate([before, tokens.reshape(-1, width), shared])
        return {"inputs_embeds": embeds[None], "position_ids": positions[None].astype(np.int64), **self._empty_past()}

    def _empty_past(self) -> dict[str, Array]:
        past = [tensor for tensor in self.spec("language").inputs if tensor.name.startswith("past_")]
        return {
            tensor.name: np.zeros([0 if size == "past" else int(size) for size in tensor.shape], np.float32)
            for tensor in past
        }

    def read_prefix(self, vision: Mapping[str, NDArray[Any]], clock: Clock) -> Prefix:
        """Compute once what both questions share, block by block of tokens, each on the key/values before it."""
        with clock("language"):
            given = self.prefix_input(vision)
        embeds, positions, past = given.pop("inputs_embeds"), given.pop("position_ids"), dict(given)
        image_tokens = len(vision["vision_tokens"]) * int(self.build.manifest.data["input"]["tokens_per_tile"])
        next_position = len(self.prompts()["before"]) + image_tokens + len(self.prompts()["shared"])
        if not self.build.manifest.saves("shared_prefix"):
            return Prefix(past, next_position, embeds[0], positions[0])
        total = embeds.shape[1]
        step = self.build.manifest.data["target"]["session"]["tokens"] or total
        for start in range(0, total, step):
            block = slice(start, start + step)
            tokens = {"inputs_embeds": embeds[:, block], "position_ids": positions[:, block]}
            extend_(past, self.run("language", {**tokens, **past}, clock, self.present()))
        return Prefix(past, next_position, embeds[0, total:], positions[0, total:])

    def present(self) -> tuple[str, ...]:
        """Names of the outputs with new key/values."""
        return tuple(t.name for t in self.spec("language").outputs if t.name.startswith("present_"))

    def ask(self, question: str, prefix: Prefix, clock: Clock) -> Array:
        """Ask a question after the shared prefix: "verdict" → logits [1, 8], "mask" → segmentation embedding [1, C]."""
        with clock("language"):
            given = self.question_input(question, prefix)
        if question == "mask":
            embedding: Array = self.run("language", given, clock, ("seg_embedding",))["seg_embedding"]
            return embedding
        manifest = self.build.manifest
        if manifest.saves("verdict_head"):
            logits: Array = self.run("language", given, clock, ("verdict_logits",))["verdict_logits"]
            return logits
        hidden = self.run("language", given, clock, ("last_hidden",))
        words: Array = self.run(VOCABULARY_HEAD, hidden, clock)["vocabulary_logits"][
            :, manifest.data["prompt"]["answers"]
        ]
        return words

    def question_input(self, question: str, prefix: Prefix) -> dict[str, NDArray[Any]]:
        """Input of the language stage for one question after the shared prefix."""
        return question_input(prefix, self.prompts()[question])

    def _find_mask(self, prefix: Prefix, clock: Clock) -> tuple[Array, tuple[int, ...]]:
        """The segmentation embedding, and the words of a decoded answer."""
        if self.build.manifest.saves("appended_answer"):
            return self.ask("mask", prefix, clock), ()
        return decode_fixed(self, prefix, clock)

    def _encodes_ahead(self, gate: float) -> bool:
        """Whether the mask encoder may begin before the verdict is known."""
        cores = os.cpu_count() or 1
        allowed = self.build.manifest.saves("concurrent_mask_encoder") and not self.is_short_of_memory()
        return gate <= 0 and cores >= _CORES_FOR_TWO and allowed

    def _encode_whole(self, image: Image.Image, clock: Clock) -> tuple[dict[str, NDArray[Any]], Clock]:
        with clock("preprocess"):
            pixels = mask_image(image, self.build.manifest.data["input"]["mask_image_size"])
        return self.run("mask_encoder", {"image": pixels}, clock), clock

    def _mask_logits(
        self,
        image: Image.Image,
        embedding: Array,
        ahead: Future[tuple[dict[str, NDArray[Any]], Clock]] | None,
        clock: Clock,
    ) -> Array:
        features, encoding = ahead.result() if ahead else self._encode_whole(image, Clock())
        clock.add(encoding)
        decoded = self.run("mask_decoder", {**features, "seg_embedding": embedding}, clock)
        logits: Array = np.asarray(decoded["mask_logits"])[0]
        _refuse_not_finite("mask_decoder", "mask_logits", logits)
        return logits


def _refuse_not_finite(stage: str, output: str, values: NDArray[Any]) -> None:
    if not np.isfinite(values).all():
        raise BuildError(
            f"{stage}: {output} is not a finite number on this machine, so there is no verdict; "
            "try the build's --self-test, or another backend or target"
        )


def open_session(build: Build, threads: int = 0, choice: Choice | None = None) -> Session:
    """Open a build for judging. `threads`: 0 = one for each core. choice: of a backend, if not what the build has."""
    return Session(build, threads, choice)
