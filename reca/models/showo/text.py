"""Words to token ids: phi-1.5's byte-level BPE, instructions in their template, conversations with labels."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE

from reca.errors import CheckpointError
from reca.images import ImageRejected
from reca.models.showo.config import IGNORED, ShowoConfig
from reca.models.tokenizer import ByteTokenizer, TextTokenizer

_END = "<|endoftext|>"
_ASSISTANT = " ASSISTANT:"
_IMAGE = "<image>"
PHI = "phi-1_5"
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json", "tokenizer_config.json")


class PhiTokenizer:
    """The released tokenizer: its whitespace tokens stay, `<|endoftext|>` in a text is plain characters.

    Raises: ValueError if the library would number an added token otherwise than the file.
    """

    def __init__(self, description: Mapping[str, Any]) -> None:
        added = {token["content"]: token["id"] for token in description.get("added_tokens", [])}
        kept = [token for token in description.get("added_tokens", []) if token["content"] != _END]
        # as a word of the vocabulary it keeps its number, but no text spells it
        model = description["model"]
        model = {**model, "vocab": {**model["vocab"], **{k: v for k, v in added.items() if k == _END}}}
        changed = {"added_tokens": kept, "post_processor": None, "model": model}
        self._tokenizer = Tokenizer.from_str(json.dumps({**description, **changed}))
        for token in kept:
            if self._tokenizer.token_to_id(token["content"]) != token["id"]:
                raise ValueError(f"added token {token['content']!r} has no place at id {token['id']}")

    def encode(self, text: str) -> tuple[int, ...]:
        """Ids of a text, without any special token."""
        return tuple(self._tokenizer.encode(text, add_special_tokens=False).ids)


def read_tokenizer(config: ShowoConfig, folder: Path | None) -> TextTokenizer:
    """The tokenizer of a variant, from the weights' folder or from `phi-1_5` inside or beside it.

    Raises: CheckpointError if its files are missing, broken, or belong to another model.
    """
    if config.tokenizer == "bytes":
        return ByteTokenizer()
    if folder is None:
        raise CheckpointError(
            f"the tokenizer is missing; give the folder of the weights, with {PHI} beside it"
        )
    folder = folder if folder.is_dir() else folder.parent
    places = [folder, folder / PHI, folder.parent / PHI]
    found = next(
        (p for p in places if (p / "tokenizer.json").is_file() or (p / "vocab.json").is_file()), None
    )
    if found is None:
        raise CheckpointError(
            f"{folder / PHI}: expected tokenizer.json, or vocab.json and merges.txt; copy {PHI} there"
        )
    description = _read_description(found)
    added = {token["content"]: token["id"] for token in description.get("added_tokens", [])}
    vocabulary = {**description["model"]["vocab"], **added}
    if vocabulary.get(_END) != config.special.eot:
        raise CheckpointError(
            f"{found}: the tokenizer gives {_END} the id {vocabulary.get(_END)}, the model expects "
            f"{config.special.eot}; use the tokenizer of phi-1.5"
        )
    if max(vocabulary.values()) >= config.special.pad:
        raise CheckpointError(
            f"{found}: the tokenizer has ids up to {max(vocabulary.values())}, Show-o's own tokens start at "
            f"{config.special.pad}; use the tokenizer of phi-1.5 without additions"
        )
    try:
        return PhiTokenizer(description)
    except Exception as error:  # the tokenizers library raises bare Exception for a broken file
        raise _unreadable(found, error) from error


def _read_description(folder: Path) -> Mapping[str, Any]:
    """The content of `tokenizer.json`, made from vocabulary and merges where that file is missing."""
    try:
        if (folder / "tokenizer.json").is_file():
            description = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        else:
            tokenizer = Tokenizer(BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
            tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            description = json.loads(tokenizer.to_str())
            extra = folder / "added_tokens.json"
            entries = json.loads(extra.read_text(encoding="utf-8")) if extra.is_file() else {}
            flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
            description["added_tokens"] = [
                {"id": number, "content": content, **flags}
                for content, number in sorted(entries.items(), key=lambda entry: entry[1])
            ]
        if not isinstance(description["model"]["vocab"], dict):
            raise TypeError("model.vocab is no table")
    except Exception as error:  # the tokenizers library raises bare Exception for a broken file
        raise _unreadable(folder, error) from error
    return description  # type: ignore[no-any-return]


def _unreadable(folder: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{folder}: the tokenizer cannot be read ({error}); copy its files again")


def instruction(prompt: str) -> str:
    """A reconstruction prompt in the template it is trained with."""
    return f"USER: \n {prompt}{_ASSISTANT}"


def conversation(
    tokenizer: TextTokenizer, turns: Sequence[tuple[str, str]], end: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ids and labels of a conversation; answers and the token that ends each of them are labelled.

    Args:
        turns: (question, answer) pairs; a placeholder for the image is taken out of the questions.
        end: id that closes every answer.

    Raises: ImageRejected if a turn spells the mark between question and answer, as officially such samples
    teach nothing.
    """
    ids, labels = list[int](), list[int]()
    for question, answer in turns:
        if _IMAGE in question:
            question = question.replace(_IMAGE, "").strip()
        if f"{_ASSISTANT} " in f"{question} {answer}":
            raise ImageRejected(f"a turn of its conversation contains {_ASSISTANT + ' '!r}")
        asked = tokenizer.encode(f"USER: {question}{_ASSISTANT}")
        answered = (*tokenizer.encode(f" {answer}"), end)
        ids += [*asked, *answered]
        labels += [*[IGNORED] * len(asked), *answered]
    return tuple(ids), tuple(labels)
