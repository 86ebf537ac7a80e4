"""Prompts and answer words → token ids, with both kinds of tokenizer files that releases have."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from defaker_opt.checkpoint import Extras
from defaker_opt.config import PromptConfig, load_config
from defaker_opt.convert import convert
from defaker_opt.errors import DefakerError
from defaker_opt.sources._prompts import TEMPLATES, PromptTexts
from defaker_opt.sources._vocabulary import open_vocabulary
from tests.conftest import defaker_opt
from tests.reference.checkpoint import VOCAB, checkpoint_config, write_checkpoint

WORDS = ["Yes", "Yeah", "True", "Sure", "No", "Not", "Never", "None"]
SPECIAL = ["<|im_start|>", "<|im_end|>", "<img>", "</img>", "[SEG]"]
TEXT = "user assistant Are there any signs of tampering in this image Please segment the tampered region It is ? . \n"


def write_sentencepiece(folder: Path, *, dummy_prefix: bool, special: list[str] = SPECIAL) -> Path:
    """A SentencePiece model of single characters and of the words; special tokens as the slow tokenizers keep them."""
    import sentencepiece

    symbols = [*WORDS, *(f"▁{word}" for word in WORDS)] if dummy_prefix else WORDS
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([TEXT.replace("\n", "")] * 20),
        model_writer=model,
        model_type="bpe",
        vocab_size=120,
        character_coverage=1.0,
        add_dummy_prefix=dummy_prefix,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        user_defined_symbols=[*symbols, "\n"],
        hard_vocab_limit=False,
        minloglevel=2,
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    size = pieces(folder).GetPieceSize()
    added = {size + index: token for index, token in enumerate(special)}
    half = len(special) // 2
    (folder / "added_tokens.json").write_text(json.dumps({t: i for i, t in list(added.items())[:half]}))
    listed = {str(i): {"content": t} for i, t in list(added.items())[half:]}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": listed}))
    return folder


def pieces(folder: Path) -> Any:
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor()
    processor.Load(str(folder / "tokenizer.model"))
    return processor


def write_checkpoint_with_vocabulary(folder: Path, rows: int, model_type: str = "sa2va_chat") -> Path:
    """The tiny checkpoint with tables of `rows`, without prompt ids beside it."""
    import torch
    from safetensors.torch import load_file, save_file

    write_checkpoint(folder, "internlm2")
    tensors = load_file(folder / "model.safetensors")
    for name in ("language_model.model.tok_embeddings.weight", "language_model.output.weight"):
        tensors[name] = torch.ones(rows, tensors[name].shape[1], dtype=torch.bfloat16)
    if model_type != "sa2va_chat":
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("text_hidden_fcs")}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**checkpoint_config("internlm2"), "model_type": model_type}))
    facts = json.loads((folder / "checkpoint_meta.json").read_text())
    del facts["prompt"]
    (folder / "checkpoint_meta.json").write_text(json.dumps(facts))
    return folder


def prompt_of(folder: Path) -> PromptConfig:
    prompt = load_config(folder).prompt
    assert prompt is not None
    return prompt


def expected_ids(folder: Path, *parts: str) -> tuple[int, ...]:
    """The slow twin: the caller says where special tokens stand."""
    processor = pieces(folder)
    special = {"<s>": processor.bos_id()}
    special |= {token: processor.GetPieceSize() + index for index, token in enumerate(SPECIAL)}
    ids: list[int] = []
    for part in parts:
        ids += [special[part]] if part in special else processor.EncodeAsIds(part)
    return tuple(ids)


def test_prompts_come_from_sentencepiece(tmp_path: Path) -> None:
    folder = write_checkpoint_with_vocabulary(tmp_path / "checkpoint", 200)
    write_sentencepiece(folder, dummy_prefix=False)
    convert(folder, tmp_path / "detector")
    prompt = prompt_of(tmp_path / "detector")
    closing = ("<|im_end|>", "\n", "<|im_start|>", "assistant\n")
    assert prompt.before == expected_ids(folder, "<s>", "<|im_start|>", "user\n", "<img>")
    question = "\nAre there any signs of tampering in this image?"
    assert prompt.verdict == expected_ids(folder, "</img>", question, *closing)
    question = "\nPlease segment the tampered region in this image."
    assert prompt.mask == expected_ids(folder, "</img>", question, *closing[:3], "assistant\nIt is ", "[SEG]")
    assert prompt.answers == tuple(pieces(folder).PieceToId(word) for word in WORDS)
    assert (tmp_path / "detector" / "tokenizer.model").is_file()


def test_a_new_seg_token_is_appended_for_internvl2(tmp_path: Path) -> None:
    folder = write_checkpoint_with_vocabulary(tmp_path / "checkpoint", 200, "internvl_chat")
    write_sentencepiece(folder, dummy_prefix=False, special=SPECIAL[:-1])
    convert(folder, tmp_path / "detector")
    config = load_config(tmp_path / "detector")
    assert config.language.vocab_size == 205
    assert config.prompt is not None
    assert config.prompt.mask[-1] == 200
    assert config.prompt.mask[:-1] == expected_ids(
        folder, "</img>", "\nPlease segment the tampered region in this image.", "<|im_end|>", "\n",
        "<|im_start|>", "assistant\nIt is ",
    )  # fmt: skip


def test_a_seg_token_that_is_there_is_used_and_nothing_appended(tmp_path: Path) -> None:
    folder = write_checkpoint_with_vocabulary(tmp_path / "checkpoint", 200, "internvl_chat")
    write_sentencepiece(folder, dummy_prefix=False)
    convert(folder, tmp_path / "detector")
    config = load_config(tmp_path / "detector")
    assert config.language.vocab_size == 200
    assert config.prompt is not None
    assert config.prompt.mask[-1] == pieces(folder).GetPieceSize() + 4


def test_yes_and_its_form_after_a_space_are_told_apart(tmp_path: Path) -> None:
    folder = write_checkpoint_with_vocabulary(tmp_path / "checkpoint", 200)
    write_sentencepiece(folder, dummy_prefix=True)
    vocabulary = open_vocabulary(folder)
    assert vocabulary is not None
    with_space, without = vocabulary.find("▁Yes"), vocabulary.find("Yes")
    assert with_space is not None
    assert without is not None
    assert with_space != without
    with pytest.raises(DefakerError, match=r"'Yes' is '▁Yes' \(token") as caught:
        convert(folder, tmp_path / "out" / "detector")
    message = str(caught.value)
    assert f"'▁Yes' (token {with_space}) on its own, but 'Yes' (token {without}) after the question" in message
    assert 'as fake_answers: ["=▁Yes", …], in a file of prompts (--prompts)' in message
    assert not (tmp_path / "out").exists()
    for prefix in ("▁", ""):
        texts = {
            "fake_answers": [f"={prefix}{word}" for word in WORDS[:4]],
            "real_answers": [f"={prefix}{word}" for word in WORDS[4:]],
        }
        (tmp_path / "prompts.yaml").write_text(json.dumps(texts))
        convert(folder, tmp_path / f"detector{prefix}", extras=Extras(prompts=tmp_path / "prompts.yaml"))
        assert prompt_of(tmp_path / f"detector{prefix}").answers == tuple(
            vocabulary.find(prefix + word) for word in WORDS
        )


def write_json_tokenizer(
    folder: Path, *, metaspace: bool, words: list[str] = WORDS, special: list[str] = SPECIAL
) -> Path:
    """A `tokenizer.json` of whole words and characters; metaspace: as Phi-3's, which puts "▁" before every text."""
    characters = sorted({*TEXT, *"".join(WORDS), "▁"} - {" "})
    vocabulary = ["<unk>", *characters, *WORDS, *(f"▁{word}" for word in WORDS)]
    ids = {piece: index for index, piece in enumerate(dict.fromkeys(vocabulary))}
    merges: list[tuple[str, str]] = []
    for word in (*(f"▁{word}" for word in WORDS), *WORDS):
        for end in range(2, len(word) + 1):
            ids.setdefault(word[:end], len(ids))
            merges.append((word[: end - 1], word[end - 1]))
    tokenizer = Tokenizer(models.BPE(ids, list(dict.fromkeys(merges)), unk_token="<unk>"))
    if metaspace:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens([AddedToken(t, rstrip=metaspace and t.endswith("|>")) for t in ("<s>", *special)])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


PHI3 = ["<|user|>", "<|assistant|>", "<|end|>", "<img>", "</img>", "[SEG]"]


@pytest.mark.parametrize("metaspace", [True, False], ids=["▁Yes", "Yes"])
def test_prompts_come_from_a_json_tokenizer(metaspace: bool, tmp_path: Path) -> None:
    folder = write_checkpoint_with_vocabulary(tmp_path / "checkpoint", 300)
    write_json_tokenizer(folder, metaspace=metaspace, special=PHI3)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "template": "phi3_chat"}))
    convert(folder, tmp_path / "detector")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    form = "▁" if metaspace else ""
    assert prompt_of(tmp_path / "detector").answers == tuple(tokenizer.token_to_id(form + word) for word in WORDS)
    assert prompt_of(tmp_path / "detector").mask[-1] == tokenizer.token_to_id("[SEG]")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = write_checkpoint_with_vocabulary(tmp_path / "checkpoint", 300)
    return write_json_tokenizer(folder, metaspace=False)


def test_other_questions_and_a_template_of_ones_own(checkpoint: Path, tmp_path: Path) -> None:
    texts = """\
verdict_question: Is this image real?
mask_question: segment the region
mask_answer: Sure, [SEG]
opening: "user\\n"
closing: "\\nassistant\\n"
"""
    (tmp_path / "mine.yaml").write_text(texts)
    done = defaker_opt("convert", checkpoint, "--prompts", tmp_path / "mine.yaml", "-o", tmp_path / "detector")
    assert done.returncode == 0, done.stderr
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    prompt = prompt_of(tmp_path / "detector")
    assert list(prompt.before) == tokenizer.encode("user\n<img>").ids
    assert list(prompt.verdict) == tokenizer.encode("</img>\nIs this image real?\nassistant\n").ids
    assert list(prompt.mask) == tokenizer.encode("</img>\nsegment the region\nassistant\nSure, [SEG]").ids


PROMPT_MISTAKES = {
    "verdict_queston: a": ["verdict_queston: unknown key.*did you mean 'verdict_question'"],
    "mask_answer: It is": [r"mask_answer must end with its only \[SEG\]"],
    'mask_answer: "[SEG] [SEG]"': [r"mask_answer must end with its only \[SEG\]"],
    "fake_answers: [Yes]": [r"fake_answers\[0\]: must be text, got True"],
    'fake_answers: ["Yes"]': ["fake_answers must have 4 words, got 1"],
    "opening: a": ["opening and closing must be set together, or neither"],
    'real_answers: ["=No", "=Not", "=Nope", "=None"]': ["real_answers: 'Nope' is no piece of the vocabulary"],
    'real_answers: ["No", "Not", "Never", "Nowhere"]': [r"the answer word 'Nowhere' is \d tokens .*; one is needed"],
    'real_answers: ["Yes", "Not", "Never", "None"]': ["the 8 answer words need 8 different token ids"],
}


@pytest.mark.parametrize("text", PROMPT_MISTAKES)
def test_a_mistake_in_a_file_of_prompts_is_told(text: str, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(text + "\n")
    for words in PROMPT_MISTAKES[text]:
        with pytest.raises(DefakerError, match=words):
            convert(checkpoint, tmp_path / "out" / "detector", extras=Extras(prompts=tmp_path / "mine.yaml"))
    assert not (tmp_path / "out").exists()


def test_a_file_of_prompts_that_is_not_there_is_named(checkpoint: Path, tmp_path: Path) -> None:
    done = defaker_opt("convert", checkpoint, "--prompts", tmp_path / "no.yaml", "-o", tmp_path / "out" / "detector")
    assert done.returncode == 2
    assert "no.yaml:\n  no such file" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_file_of_prompts_needs_a_tokenizer(tmp_path: Path) -> None:
    folder = write_checkpoint_with_vocabulary(tmp_path / "checkpoint", VOCAB)
    (tmp_path / "mine.yaml").write_text("verdict_question: Real?\n")
    with pytest.raises(DefakerError, match=r"neither tokenizer\.json nor tokenizer\.model is in it, so .*mine\.yaml"):
        convert(folder, tmp_path / "detector", extras=Extras(prompts=tmp_path / "mine.yaml"))


def test_an_unknown_template_is_told_with_the_way_out(checkpoint: Path, tmp_path: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "template": "internlm_chat"}))
    with pytest.raises(DefakerError, match=r"did you mean 'internlm2_chat'.*set opening and closing in a file"):
        convert(checkpoint, tmp_path / "detector")


@pytest.mark.parametrize("missing", ["<img>", "[SEG]"])
def test_a_tokenizer_of_another_model_is_refused(missing: str, tmp_path: Path) -> None:
    folder = write_checkpoint_with_vocabulary(tmp_path / "checkpoint", 300)
    write_json_tokenizer(folder, metaspace=False, special=[token for token in SPECIAL if token != missing])
    with pytest.raises(DefakerError, match="is not one token of it; is it the tokenizer the detector was trained with"):
        convert(folder, tmp_path / "detector")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("tokenizer.json", "{}", r"tokenizer\.json: has no model, so it is no tokenizer"),
        ("tokenizer.json", "[", r"tokenizer\.json: not a JSON object"),
        ("tokenizer.model", "text", r"tokenizer\.model: not a SentencePiece model"),
        ("added_tokens.json", '{"a": "b"}', r"added_tokens\.json: 'a' must have a token id, got 'b'"),
        ("added_tokens.json", "[1]", r"added_tokens\.json: not a JSON object"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {"content": "a"}}}', "added_tokens_decoder"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"1": {}}}', "added_tokens_decoder"),
    ],
)
def test_a_damaged_tokenizer_is_named(name: str, content: str, words: str, tmp_path: Path) -> None:
    folder = write_checkpoint_with_vocabulary(tmp_path / "checkpoint", 200)
    if name != "tokenizer.json":
        write_sentencepiece(folder, dummy_prefix=False)
    (folder / name).write_text(content)
    with pytest.raises(DefakerError, match=words):
        convert(folder, tmp_path / "detector")


def test_white_space_beside_special_tokens_is_swallowed_where_they_say_so(tmp_path: Path) -> None:
    folder = write_sentencepiece(tmp_path / "tokenizer", dummy_prefix=False)
    size = pieces(folder).GetPieceSize()
    listed = {str(size): {"content": "<a>", "rstrip": True}, str(size + 1): {"content": "<a>>", "lstrip": True}}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": listed}))
    (folder / "added_tokens.json").unlink()
    vocabulary = open_vocabulary(folder)
    assert vocabulary is not None
    plain = pieces(folder).EncodeAsIds
    assert vocabulary.encode("is <a> is <a>> is<a>") == (
        *plain("is "), size, *plain("is"), size + 1, *plain(" is"), size,
    )  # fmt: skip


def test_templates_are_sound() -> None:
    for opening, closing in TEMPLATES.values():
        assert opening
        assert closing.endswith(("assistant\n", "<|assistant|>\n"))
    assert PromptTexts().mask_answer.endswith("[SEG]")
