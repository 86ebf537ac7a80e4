"""The fixed prompts as token ids, from a checkpoint's tokenizer or from ids written down beside it."""

from __future__ import annotations

from dataclasses import dataclass, field

from defaker_opt.config import PromptConfig
from defaker_opt.errors import ConfigError, SourceError, one_of
from defaker_opt.sources import Checkpoint
from defaker_opt.sources._vocabulary import Vocabulary, open_vocabulary
from defaker_opt.strict import Invalid, read_value, read_yaml

SEG = "[SEG]"

# What Sa2VA's training appends to the vocabulary, in this order.
NEW_TOKENS = (SEG, "<p>", "</p>", "<vp>", "</vp>")

_INTERNLM2 = ("<s><|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n")
_QWEN = ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n")
_PHI3 = ("<|user|>\n", "<|end|>\n<|assistant|>\n")

# What stands before and after the user's words, by the name of the chat template in `config.json`. Those of InternVL2
# itself also begin with a system message, which a joint detector was never taught with.
TEMPLATES = {
    "internlm2_chat": _INTERNLM2,
    "qwen_chat": _QWEN,
    "phi3_chat": _PHI3,
    "internlm2-chat": _INTERNLM2,
    "Hermes-2": _QWEN,
    "internvl2_5": _QWEN,
    "phi3-chat": _PHI3,
}


@dataclass(frozen=True)
class PromptTexts:
    """What is asked, and the eight words that answer; a YAML file may set any of it.

    opening, closing: around the user's words, from the chat template unless set. An answer "=▁Yes" is the piece "▁Yes"
    of the vocabulary, exactly.
    """

    verdict_question: str = "Are there any signs of tampering in this image?"
    mask_question: str = "Please segment the tampered region in this image."
    mask_answer: str = f"It is {SEG}"
    fake_answers: tuple[str, ...] = ("Yes", "Yeah", "True", "Sure")
    real_answers: tuple[str, ...] = ("No", "Not", "Never", "None")
    opening: str | None = None
    closing: str | None = None

    def __post_init__(self) -> None:
        if not self.mask_answer.endswith(SEG) or self.mask_answer.count(SEG) != 1:
            raise Invalid(f"mask_answer must end with its only {SEG}, where the mask is read, got {self.mask_answer!r}")
        for name in ("fake_answers", "real_answers"):
            if len(getattr(self, name)) != 4:
                raise Invalid(f"{name} must have 4 words, got {len(getattr(self, name))}")
        if (self.opening is None) != (self.closing is None):
            raise Invalid("opening and closing must be set together, or neither")


@dataclass(frozen=True)
class FoundPrompt:
    """new_rows: [SEG] is none of the vocabulary's tokens, so rows for `NEW_TOKENS` must be appended to its tables."""

    prompt: PromptConfig | None
    new_rows: bool = False
    notes: tuple[str, ...] = field(default=())


def find_prompt(checkpoint: Checkpoint, template: str, unjoined_rows: int | None) -> FoundPrompt:
    """The prompts of a checkpoint. Raises SourceError if a tokenizer does not fit, ConfigError for a bad file.

    unjoined_rows: rows of the vocabulary if the checkpoint was never joined with a segmenter, whose [SEG] may be new.
    """
    vocabulary = open_vocabulary(checkpoint.folder)
    new_rows = unjoined_rows is not None and (vocabulary is None or vocabulary.find(SEG) is None)
    notes: tuple[str, ...] = ()
    if new_rows and unjoined_rows is not None:
        notes = (
            f"{', '.join(NEW_TOKENS)} appended as tokens {unjoined_rows} to {unjoined_rows + len(NEW_TOKENS) - 1}",
        )
    if checkpoint.prompts is not None:
        texts = read_texts(checkpoint)
    elif "prompt" in checkpoint.facts:
        ids = read_value(PromptConfig, checkpoint.facts["prompt"], f"{checkpoint.folder}: prompt")
        return FoundPrompt(ids, new_rows, notes)
    else:
        texts = PromptTexts()
    if vocabulary is None and checkpoint.prompts is not None:
        raise SourceError(
            f"{checkpoint.folder}: neither tokenizer.json nor tokenizer.model is in it, so {checkpoint.prompts} cannot "
            "be turned into token ids; copy the tokenizer's files there"
        )
    if vocabulary is None:
        lacking = (
            "neither tokenizer.json, nor tokenizer.model, nor prompt ids: the weights are converted, but nothing can "
            "be asked yet; before quantizing, set `prompt` in the new folder's config.json"
        )
        return FoundPrompt(None, new_rows, (*notes, lacking))
    seg = unjoined_rows if new_rows else None
    return FoundPrompt(resolve_prompt(vocabulary, _with_template(checkpoint, texts, template), seg), new_rows, notes)


def read_texts(checkpoint: Checkpoint) -> PromptTexts:
    """The YAML file of texts. Raises ConfigError with every problem of it."""
    file = checkpoint.prompts
    assert file is not None
    if not file.is_file():
        raise ConfigError(file, ["no such file; it may set verdict_question, mask_question, fake_answers …"])
    return read_value(PromptTexts, read_yaml(file), file)


def _with_template(checkpoint: Checkpoint, texts: PromptTexts, template: str) -> PromptTexts:
    if texts.opening is not None:
        return texts
    if template not in TEMPLATES:
        raise SourceError(
            f"{checkpoint.folder}/config.json: template {one_of(template, TEMPLATES)}; for another one, "
            "set opening and closing in a file of prompts (--prompts)"
        )
    opening, closing = TEMPLATES[template]
    values = {name: getattr(texts, name) for name in PromptTexts.__dataclass_fields__}
    return PromptTexts(**{**values, "opening": opening, "closing": closing})


def resolve_prompt(vocabulary: Vocabulary, texts: PromptTexts, seg: int | None) -> PromptConfig:
    """Encode the texts. seg: the id of [SEG] where the vocabulary has none. Raises SourceError."""
    opening, closing = texts.opening, texts.closing
    assert opening is not None
    assert closing is not None
    encode = vocabulary.encode
    for token in ("<img>", "</img>", *(() if seg is not None else (SEG,))):
        if len(encode(token)) != 1:
            raise SourceError(
                f"{vocabulary.file}: {token} is not one token of it; is it the tokenizer the detector was trained with?"
            )
    mask = "</img>\n" + texts.mask_question + closing + texts.mask_answer
    try:
        return PromptConfig(
            before=encode(opening + "<img>"),
            verdict=encode("</img>\n" + texts.verdict_question + closing),
            mask=encode(mask) if seg is None else (*encode(mask.removesuffix(SEG)), seg),
            fake_answers=_answers(vocabulary, "fake_answers", texts.fake_answers, closing),
            real_answers=_answers(vocabulary, "real_answers", texts.real_answers, closing),
        )
    except Invalid as error:
        raise SourceError(f"{vocabulary.file}: {error}; choose other words in a file of prompts (--prompts)") from error


def _answers(vocabulary: Vocabulary, key: str, words: tuple[str, ...], closing: str) -> tuple[int, ...]:
    return tuple(_answer(vocabulary, key, word, closing) for word in words)


def _answer(vocabulary: Vocabulary, key: str, word: str, closing: str) -> int:
    """The token of an answer word.

    Training encodes answers on their own, generating continues the question; vocabularies have "Yes" and "▁Yes", and
    where the two ways give different pieces, only who trained the detector can tell which it learnt.
    """
    if word.startswith("="):
        token = vocabulary.find(word[1:])
        if token is None:
            raise SourceError(f"{vocabulary.file}: {key}: {word[1:]!r} is no piece of the vocabulary")
        return token
    alone, before, after = (vocabulary.encode(text) for text in (word, closing, closing + word))
    continued = after[len(before) :] if after[: len(before)] == before else after
    if alone != continued:
        raise SourceError(
            f"{vocabulary.file}: the answer word {word!r} is {_shown(vocabulary, alone)} on its own, but "
            f"{_shown(vocabulary, continued)} after the question; name the piece that the detector was trained with, "
            f'as {key}: ["={vocabulary.piece(alone[0]) if alone else word}", …], in a file of prompts (--prompts)'
        )
    if len(alone) != 1:
        raise SourceError(
            f"{vocabulary.file}: the answer word {word!r} is {len(alone)} tokens {list(alone)}; one is needed; choose "
            f"another word or a piece of it, with {key} in a file of prompts (--prompts)"
        )
    return alone[0]


def _shown(vocabulary: Vocabulary, ids: tuple[int, ...]) -> str:
    return " + ".join(f"{vocabulary.piece(token)!r} (token {token})" for token in ids) or "nothing"
