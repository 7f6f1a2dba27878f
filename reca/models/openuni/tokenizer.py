"""Instructions to token ids. A user's text never becomes a special token, whatever it spells."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE

from reca.errors import CheckpointError
from reca.models.openuni.config import OpenUniConfig

_SPECIAL = {
    "im_start": "<|im_start|>",
    "im_end": "<|im_end|>",
    "start_of_image": "<img>",
    "end_of_image": "</img>",
    "image": "<IMG_CONTEXT>",
}
# how Qwen2 cuts a text into words; from its released tokenizer.json
_QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class PromptTokenizer(Protocol):
    """What the processor and the sampler need of a tokenizer."""

    def encode(self, text: str) -> tuple[int, ...]:
        """Ids of a text, without any special token."""
        ...


class FileTokenizer:
    """A tokenizer of the release, from which all added tokens are taken away.

    Officially a prompt that spells `<|im_start|>` yields that token; here its characters are tokenised like
    any others.
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


def read_tokenizer(config: OpenUniConfig, folder: Path | None) -> PromptTokenizer:
    """The tokenizer of a variant, from the language model's folder of a release, or from the folder itself.

    `tokenizer.json`, else `vocab.json` and `merges.txt`.

    Raises: CheckpointError if the files are missing, broken, or belong to another model.
    """
    if config.tokenizer == "bytes":
        return ByteTokenizer()
    if folder is None:
        raise CheckpointError("the tokenizer is missing; give the folder of the weights with tokenizer.json")
    folder = tokenizer_folder(folder if folder.is_dir() else folder.parent)
    description = _read_description(folder)
    added = {token["content"]: token["id"] for token in description.get("added_tokens", [])}
    for name, text in _SPECIAL.items():
        expected = getattr(config.special, name)
        if added.get(text, expected) != expected:
            raise CheckpointError(
                f"{folder}: the tokenizer gives {text} the id {added[text]}, the model expects {expected}; "
                "use the tokenizer of the same release"
            )
    largest = max(description["model"]["vocab"].values(), default=0)
    if largest >= config.llm.vocab_size:
        raise CheckpointError(
            f"{folder}: the tokenizer has ids up to {largest}, the model {config.llm.vocab_size} embeddings; "
            "use the tokenizer of the same release"
        )
    return FileTokenizer(description)


def tokenizer_folder(folder: Path) -> Path:
    """Where a release keeps its tokenizer: the folder itself, else the language model's inside it."""
    candidates = [folder, *sorted(path for path in folder.glob("[iI]ntern[vV][lL]*") if path.is_dir())]
    for candidate in candidates:
        if (candidate / "tokenizer.json").is_file() or (candidate / "vocab.json").is_file():
            return candidate
    return folder


def _read_description(folder: Path) -> Mapping[str, Any]:
    """The content of `tokenizer.json`, made from vocabulary and merges where that file is missing."""
    path = folder / "tokenizer.json"
    try:
        if path.is_file():
            description = json.loads(path.read_text(encoding="utf-8"))
        else:
            description = _from_vocabulary(folder)
        if not isinstance(description["model"]["vocab"], dict):
            raise TypeError("model.vocab is no table")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder}: the tokenizer cannot be read ({error}); copy its files again"
        ) from error
    return description  # type: ignore[no-any-return]


def _from_vocabulary(folder: Path) -> Any:
    """What `tokenizer.json` would say, for a release that ships only the vocabulary and its merges."""
    vocabulary, merges = folder / "vocab.json", folder / "merges.txt"
    if not (vocabulary.is_file() and merges.is_file()):
        raise CheckpointError(
            f"{folder}: expected tokenizer.json, or vocab.json and merges.txt; copy them beside the weights"
        )
    tokenizer = Tokenizer(BPE.from_file(str(vocabulary), str(merges)))
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(_QWEN2_WORDS), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    return json.loads(tokenizer.to_str())
