"""What a build says of pictures and prompts, and the files with their embeddings."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from defaker_opt.detector import Detector
from defaker_opt.explanation import Explanation
from defaker_opt.runtime.build import EMBEDDINGS, PROMPTS, VOCABULARY
from defaker_opt.runtime.spec import VOCABULARY_HEAD
from defaker_opt.words import end_tokens, vocabulary_arrays

# Rows of the table of embeddings that are in memory at once.
_TABLE_ROWS = 4096


def write_prompts(detector: Detector, content: Path) -> None:
    """Write the prompts' embeddings, or the whole table of embeddings for a build that looks its prompts up."""
    if detector.savings.prompt_embeddings:
        write_arrays(content / PROMPTS, prompt_embeddings(detector))
    else:
        write_table(detector, content)


def write_explanation(detector: Detector, explain: Explanation, folder: Path, content: Path) -> dict[str, Any]:
    """Write what explanations take beside the stages: all embeddings, and the text of the tokenizer in `folder`.

    What the manifest says of it. Raises SourceError.
    """
    write_arrays(content / VOCABULARY, vocabulary_arrays(folder, detector.config.language.vocab_size))
    if detector.savings.prompt_embeddings:
        write_table(detector, content)
    return {
        "max_tokens": explain.max_tokens,
        "end": list(end_tokens(folder)),
        "stages": ["language", VOCABULARY_HEAD],
        "files": [EMBEDDINGS, VOCABULARY],
    }


def write_table(detector: Detector, content: Path) -> None:
    """Write the whole table of embeddings as float32 [V, H]."""
    table = detector.weights.read("language.embed_tokens.weight")
    partial = content / f".{EMBEDDINGS}"
    shape = tuple(table.shape)
    written = np.lib.format.open_memmap(str(partial), mode="w+", dtype=np.float32, shape=shape)
    for start in range(0, len(table), _TABLE_ROWS):
        written[start : start + _TABLE_ROWS] = table[start : start + _TABLE_ROWS].to(torch.float32).numpy()
    written.flush()
    os.replace(partial, content / EMBEDDINGS)


def prompt_embeddings(detector: Detector) -> dict[str, np.ndarray]:
    """The fixed prompts as float32 embeddings [tokens, H]: `before` the image, then `shared`, `verdict`, `mask`."""
    prompt = detector.config.prompt
    assert prompt is not None
    shared = prompt.shared()
    ids = {
        "before": prompt.before,
        "shared": prompt.verdict[:shared],
        "verdict": prompt.verdict[shared:],
        "mask": prompt.mask[shared:],
    }
    return {name: detector.rows("language.embed_tokens.weight", rows).numpy() for name, rows in ids.items()}


def input_facts(detector: Detector) -> dict[str, int]:
    """How pictures are cut and resized."""
    config = detector.config
    return {
        "tile_size": config.tiling.tile_size,
        "min_tiles": config.tiling.min_tiles,
        "max_tiles": config.tiling.max_tiles,
        "tokens_per_tile": config.tokens_per_tile,
        "mask_image_size": config.segmenter.image_size,
    }


def prompt_facts(detector: Detector) -> dict[str, Any]:
    """The prompts as token ids, how many both questions share, and how many are the mask's answer."""
    prompt = detector.config.prompt
    assert prompt is not None
    return {
        "before": list(prompt.before),
        "verdict": list(prompt.verdict),
        "mask": list(prompt.mask),
        "answers": list(prompt.answers),
        "shared_tokens": prompt.shared(),
        "answer_tokens": prompt.answer_tokens(),
    }


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write an .npz file; equal arrays give equal bytes."""
    with path.open("wb") as stream:
        np.savez(stream, allow_pickle=False, **arrays)
