"""Texts to token ids. A user's text never becomes a special token, whatever it spells."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE

from reca.errors import CheckpointError

# how Qwen2 cuts a text into words; from its released tokenizer.json
QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class TextTokenizer(Protocol):
    """What templates, processors and samplers need of a tokenizer."""

    def encode(self, text: str) -> tuple[int, ...]:
        """Ids of a text, without any special token."""
        ...


class FileTokenizer:
    """A tokenizer of a release, from which all added tokens are taken away.

    Officially a prompt that spells `<|im_start|>` yields that token; here its characters are tokenised like
    any others.

    Args:
        description: content of a `tokenizer.json`.

    Raises: an exception of the tokenizers library if the description is broken.
    """

    def __init__(self, description: Mapping[str, Any]) -> None:
        self._tokenizer = Tokenizer.from_str(json.dumps({**description, "added_tokens": []}))

    def encode(self, text: str) -> tuple[int, ...]:
        """Ids of a text, without any special token."""
        return tuple(self._tokenizer.encode(text, add_special_tokens=False).ids)


class ByteTokenizer:
    """UTF-8 bytes as ids, for variants that ship no tokenizer."""

    def encode(self, text: str) -> tuple[int, ...]:
        """Ids of a text, without any special token."""
        return tuple(text.encode("utf-8", errors="replace"))


def read_qwen2_tokenizer(
    folder: Path | None, special: Mapping[str, int], vocab_size: int, *, cure: str
) -> FileTokenizer:
    """Qwen2's tokenizer as a release holds it: `tokenizer.json`, else `vocab.json` and `merges.txt`.

    Args:
        folder: folder of the weights, or a file in it.
        special: text of an added token -> the id that the model gives it.
        vocab_size: rows of the model's embedding.
        cure: ends the messages about a tokenizer of another model, e.g. "use the tokenizer of Qwen2.5".

    Raises: CheckpointError if the files are missing, broken, or belong to another model.
    """
    if folder is None:
        raise CheckpointError("the tokenizer is missing; give the folder of the weights with tokenizer.json")
    folder = folder if folder.is_dir() else folder.parent
    try:
        description = _qwen2_description(folder)
        if not isinstance(description["model"]["vocab"], dict):
            raise TypeError("model.vocab is no table")
        added = {token["content"]: token["id"] for token in description.get("added_tokens", [])}
        largest = max(description["model"]["vocab"].values(), default=0)
        tokenizer = FileTokenizer(description)
    except CheckpointError:
        raise
    except Exception as error:  # the tokenizers library raises bare Exception for a broken file
        raise CheckpointError(
            f"{folder}: the tokenizer cannot be read ({error}); copy its files again"
        ) from error
    for text, expected in special.items():
        if added.get(text, expected) != expected:
            raise CheckpointError(
                f"{folder}: the tokenizer gives {text} the id {added[text]}, the model expects {expected}; "
                f"{cure}"
            )
    if largest >= vocab_size:
        raise CheckpointError(
            f"{folder}: the tokenizer has ids up to {largest}, the model {vocab_size} embeddings; {cure}"
        )
    return tokenizer


def _qwen2_description(folder: Path) -> Any:
    """The content of `tokenizer.json`, or what it would say where only vocabulary and merges are shipped."""
    path, vocabulary, merges = (folder / name for name in ("tokenizer.json", "vocab.json", "merges.txt"))
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    if not (vocabulary.is_file() and merges.is_file()):
        raise CheckpointError(
            f"{folder}: expected tokenizer.json, or vocab.json and merges.txt; copy them beside the weights"
        )
    tokenizer = Tokenizer(BPE.from_file(str(vocabulary), str(merges)))
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(QWEN2_WORDS), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    return json.loads(tokenizer.to_str())
