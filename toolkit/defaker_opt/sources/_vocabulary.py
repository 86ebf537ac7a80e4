"""A checkpoint's tokenizer, as far as prompts need it: `tokenizer.json`, or SentencePiece's `tokenizer.model`."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from defaker_opt.errors import SourceError
from defaker_opt.files import read_json_object

Ids = tuple[int, ...]

# All files that a tokenizer of transformers may have.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)


@dataclass(frozen=True)
class Vocabulary:
    """encode: text → ids, special tokens found in it, none added. find: piece → id or None. piece: id → piece."""

    file: Path
    encode: Callable[[str], Ids]
    find: Callable[[str], int | None]
    piece: Callable[[int], str]


@dataclass(frozen=True)
class _Added:
    """A token that is looked for in the text itself; it may swallow the white space beside it."""

    text: str
    id: int
    lstrip: bool = False
    rstrip: bool = False


def open_vocabulary(folder: Path) -> Vocabulary | None:
    """The tokenizer of a checkpoint folder, or None if it has neither file. Raises SourceError."""
    if (folder / "tokenizer.json").is_file():
        return _open_json(folder / "tokenizer.json")
    if (folder / "tokenizer.model").is_file():
        return _open_sentencepiece(folder / "tokenizer.model")
    return None


def _open_json(file: Path) -> Vocabulary:
    data = read_json_object(file)
    if data is None:
        raise SourceError(f"{file}: not a JSON object; copy the checkpoint again")
    if not isinstance(data.get("model"), dict):
        raise SourceError(f"{file}: has no model, so it is no tokenizer; copy the checkpoint again")
    tokenizer = Tokenizer.from_file(str(file))
    return Vocabulary(
        file,
        lambda text: tuple(tokenizer.encode(text, add_special_tokens=False).ids),
        tokenizer.token_to_id,
        lambda token: str(tokenizer.id_to_token(token)),
    )


def _open_sentencepiece(file: Path) -> Vocabulary:
    """SentencePiece cuts what stands between special tokens, as in the tokenizers InternLM2 was trained with."""
    from sentencepiece import SentencePieceProcessor

    processor: Any = SentencePieceProcessor()
    try:
        processor.Load(str(file))
    except (OSError, RuntimeError) as error:
        raise SourceError(f"{file}: not a SentencePiece model ({error}); copy the checkpoint again") from error
    size = processor.GetPieceSize()
    added = {token.text: token for token in _added_tokens(file.parent)}
    for token in range(size):
        if processor.IsControl(token):
            added.setdefault(processor.IdToPiece(token), _Added(processor.IdToPiece(token), token))
    names = {token.id: token.text for token in added.values()}

    def find(piece: str) -> int | None:
        if piece in added:
            return added[piece].id
        token = int(processor.PieceToId(piece))
        return None if processor.IsUnknown(token) or token in names else token

    return Vocabulary(
        file,
        lambda text: _encode_between(text, added, processor.EncodeAsIds),
        find,
        lambda token: names.get(token) or str(processor.IdToPiece(token)),
    )


def _encode_between(text: str, added: dict[str, _Added], encode: Callable[[str], list[int]]) -> Ids:
    longest_first = sorted(added, key=len, reverse=True)
    parts = re.split(f"({'|'.join(map(re.escape, longest_first))})", text) if added else [text]
    ids: list[int] = []
    for index, part in enumerate(parts):
        if part in added:
            ids.append(added[part].id)
            continue
        if index > 0 and added[parts[index - 1]].rstrip:
            part = part.lstrip()
        if index + 1 < len(parts) and added[parts[index + 1]].lstrip:
            part = part.rstrip()
        if part:
            ids += encode(part)
    return tuple(ids)


def _added_tokens(folder: Path) -> list[_Added]:
    """From `added_tokens.json` and `tokenizer_config.json`, where the slow tokenizers of transformers keep them."""
    found: dict[str, _Added] = {}
    for text, token in (_read(folder / "added_tokens.json") or {}).items():
        if not isinstance(token, int):
            raise SourceError(f"{folder}/added_tokens.json: {text!r} must have a token id, got {token!r}")
        found[text] = _Added(text, token)
    listed = (_read(folder / "tokenizer_config.json") or {}).get("added_tokens_decoder") or {}
    try:
        for token, facts in listed.items():
            text = str(facts["content"])
            found[text] = _Added(text, int(token), bool(facts.get("lstrip")), bool(facts.get("rstrip")))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise SourceError(
            f"{folder}/tokenizer_config.json: added_tokens_decoder: {error!r}; copy the checkpoint again"
        ) from error
    return list(found.values())


def _read(file: Path) -> dict[str, Any] | None:
    data = read_json_object(file)
    if data is None and file.is_file():
        raise SourceError(f"{file}: not a JSON object; copy the checkpoint again")
    return data
