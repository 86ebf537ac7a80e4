"""Answers: the share of eight words that says fake, and text word by word, each the likeliest after those before.

Words are read on key/values that grow by one position a step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from defaker_opt.errors import BuildError
from defaker_opt.runtime.build import VOCABULARY, Build
from defaker_opt.runtime.clock import Clock
from defaker_opt.runtime.prompts import Prefix, extend_, open_table
from defaker_opt.runtime.spec import VOCABULARY_HEAD

if TYPE_CHECKING:
    from defaker_opt.runtime.session import Session

Array = NDArray[np.float32]


def decode_fixed(session: Session, prefix: Prefix, clock: Clock) -> tuple[Array, tuple[int, ...]]:
    """Answer the mask's question one word a step, as long as the fixed answer is, whose words are fed.

    The segmentation embedding [1, C] at its end, and the likeliest word at each step.
    """
    steps = session.build.manifest.data["prompt"]["answer_tokens"]
    question = session.question_input("mask", prefix)
    embeds, positions, past = question.pop("inputs_embeds"), question.pop("position_ids"), dict(question)
    wanted = ("seg_embedding", "last_hidden", *session.present())
    given = {"inputs_embeds": embeds[:, :-steps], "position_ids": positions[:, :-steps]}
    state = session.run("language", {**given, **past}, clock, wanted)
    greedy = []
    for step in range(-steps, 0):
        greedy.append(_likeliest(session, state["last_hidden"], clock))
        extend_(past, state)
        word = slice(step, step + 1 or None)
        given = {"inputs_embeds": embeds[:, word], "position_ids": positions[:, word]}
        state = session.run("language", {**given, **past}, clock, wanted)
    return state["seg_embedding"], tuple(greedy)


def decode_free(session: Session, prefix: Prefix, clock: Clock, limit: int) -> tuple[int, ...]:
    """Answer the verdict's question in the detector's own words: token ids up to an end token, at most `limit`.

    Raises BuildError if the build has no words.
    """
    end = explanation_facts(session.build)["end"]
    table = open_table(session.build)
    question = session.question_input("verdict", prefix)
    embeds, positions, past = question.pop("inputs_embeds"), question.pop("position_ids"), dict(question)
    wanted = ("last_hidden", *session.present())
    words: list[int] = []
    while len(words) < limit:
        state = session.run("language", {"inputs_embeds": embeds, "position_ids": positions, **past}, clock, wanted)
        word = _likeliest(session, state["last_hidden"], clock)
        if word in end:
            break
        words.append(word)
        extend_(past, state)
        embeds, positions = np.array(table[word])[None, None], positions[:, -1:] + 1
    return tuple(words)


def _likeliest(session: Session, last_hidden: Array, clock: Clock) -> int:
    logits = session.run(VOCABULARY_HEAD, {"last_hidden": last_hidden}, clock)["vocabulary_logits"]
    return int(np.asarray(logits).argmax())


def explanation_facts(build: Build) -> Mapping[str, Any]:
    """What the manifest says of explanations. Raises BuildError if the build was made without them."""
    facts = build.manifest.data.get("explain")
    if facts is None:
        raise BuildError(
            f"{build.folder}: has no words to explain with; make a build that has: "
            "defaker-opt quantize --recipe explain"
        )
    known: Mapping[str, Any] = facts
    return known


def text_of(build: Build, words: tuple[int, ...]) -> str:
    """Token ids as text, from the bytes of each token that the build brings along; special tokens have none."""
    with np.load(build.folder / VOCABULARY, allow_pickle=False) as stored:
        text, ends = stored["text"].tobytes(), stored["ends"]
    starts = [int(ends[word - 1]) if word else 0 for word in words]
    pieces = [text[start : int(ends[word])] for start, word in zip(starts, words)]
    return b"".join(pieces).decode("utf-8", errors="replace").strip()


def fake_probability(verdict_logits: Array, temperature: float = 1.0) -> float:
    """Softmax over the eight answer words, then the share of the first four, which say fake (DeFakerOne, 4.6).

    temperature: what the log-odds of that share are divided by; a refitted build has one other than 1.
    """
    logits = verdict_logits.astype(np.float64)
    odds = np.exp(logits - logits.max())
    if temperature == 1.0:
        return float(odds[:4].sum() / odds.sum())
    log_odds = np.logaddexp.reduce(logits[:4]) - np.logaddexp.reduce(logits[4:])
    return float(1 / (1 + np.exp(-log_odds / temperature)))
