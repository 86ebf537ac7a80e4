"""A tokenizer as a build needs it: the bytes of each token, and the tokens that end an answer."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from defaker_opt.errors import SourceError
from defaker_opt.files import read_json_object
from defaker_opt.runtime.build import file_sha256
from defaker_opt.sources._vocabulary import open_vocabulary

# Whatever a chat template ends a turn with, in the families that are converted.
END_TOKENS = ("<|im_end|>", "<|end|>", "<|endoftext|>", "</s>")

# SentencePiece writes a space as this, and bytes that are no character as <0x0A>.
_SPACE = "\u2581"

_FILES = ("tokenizer.json", "tokenizer.model", "added_tokens.json", "tokenizer_config.json")

_DECODERS = "ByteLevel, SentencePiece's (Replace, ByteFallback, Fuse, Strip, Metaspace) and none"


def tokenizer_digest(folder: Path) -> str:
    """SHA-256 over a folder's tokenizer. Raises SourceError if it has none."""
    if not any((folder / name).is_file() for name in _FILES[:2]):
        raise SourceError(
            f"{folder}: neither tokenizer.json nor tokenizer.model is in it, so there are no words to explain with; "
            "copy the tokenizer's files there, or choose a recipe without `explain`"
        )
    files = [f"{name} {file_sha256(folder / name)}" for name in _FILES if (folder / name).is_file()]
    return hashlib.sha256("\n".join(files).encode()).hexdigest()


def end_tokens(folder: Path) -> tuple[int, ...]:
    """Tokens at which an answer ends. Raises SourceError if the tokenizer has none that we know."""
    vocabulary = open_vocabulary(folder)
    found = [vocabulary.find(name) for name in END_TOKENS] if vocabulary else []
    ends = tuple(token for token in found if token is not None)
    if not ends:
        raise SourceError(
            f"{folder}: its tokenizer has no token that ends an answer ({', '.join(END_TOKENS)}); "
            "choose a recipe without `explain`"
        )
    return ends


def vocabulary_arrays(folder: Path, size: int) -> dict[str, np.ndarray]:
    """text: uint8, the bytes of all `size` tokens in a row; ends: int64 [size], where each token's end. SourceError."""
    pieces = dict(_json_pieces(folder) if (folder / "tokenizer.json").is_file() else _sentencepiece_pieces(folder))
    texts = [pieces.get(token, b"") for token in range(size)]
    ends = np.cumsum([len(text) for text in texts], dtype=np.int64)
    return {"text": np.frombuffer(b"".join(texts), np.uint8), "ends": ends}


def _json_pieces(folder: Path) -> Iterator[tuple[int, bytes]]:
    file = folder / "tokenizer.json"
    data = read_json_object(file) or {}
    model = data.get("model") or {}
    vocab = model.get("vocab")
    kinds = set(_decoder_kinds(data.get("decoder")))
    if isinstance(vocab, list):  # a unigram model's pieces with their scores
        vocab = {entry[0]: index for index, entry in enumerate(vocab)}
    if not isinstance(vocab, Mapping):
        raise SourceError(f"{file}: has no vocabulary; copy the checkpoint again")
    if kinds - {"ByteLevel", "Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}:
        raise SourceError(f"{file}: decoder {', '.join(sorted(kinds))}; explanations are written with {_DECODERS}")
    read = _from_byte_level if "ByteLevel" in kinds else _from_sentencepiece if kinds else _from_word
    for piece, token in vocab.items():
        yield int(token), read(str(piece))
    for added in data.get("added_tokens") or ():
        yield int(added["id"]), b"" if added.get("special") else str(added["content"]).encode()


def _decoder_kinds(decoder: Any) -> Iterator[str]:
    if not isinstance(decoder, Mapping):
        return
    if decoder.get("type") == "Sequence":
        for inner in decoder.get("decoders") or ():
            yield from _decoder_kinds(inner)
    else:
        yield str(decoder.get("type"))


def _sentencepiece_pieces(folder: Path) -> Iterator[tuple[int, bytes]]:
    from sentencepiece import SentencePieceProcessor

    processor: Any = SentencePieceProcessor()
    processor.Load(str(folder / "tokenizer.model"))
    for token in range(processor.GetPieceSize()):
        spoken = not (processor.IsControl(token) or processor.IsUnknown(token))
        yield token, _from_sentencepiece(processor.IdToPiece(token)) if spoken else b""


def _from_word(piece: str) -> bytes:
    """Without a decoder, tokenizers puts a space between any two tokens."""
    return f" {piece}".encode()


def _from_sentencepiece(piece: str) -> bytes:
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return bytes([int(piece[3:5], 16)])
    return piece.replace(_SPACE, " ").encode()


def _from_byte_level(piece: str) -> bytes:
    """GPT-2's alphabet: printable Latin-1 stands for itself, other bytes for U+0100 and on (Radford et al. 2019)."""
    if any(letter not in _BYTES for letter in piece):
        return piece.encode()  # appended to the vocabulary as it is written
    return bytes(_BYTES[letter] for letter in piece)


def _byte_alphabet() -> dict[str, int]:
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTES = _byte_alphabet()
