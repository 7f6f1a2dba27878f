"""Texts to token ids, and the chat template around them. A user's text never becomes a special token."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE

from reca.errors import CheckpointError
from reca.models.harmon.config import HarmonConfig, SpecialTokens

UNCONDITIONAL = "Generate an image."
_SPECIAL = {"im_start": "<|im_start|>", "im_end": "<|im_end|>", "endoftext": "<|endoftext|>"}
# how Qwen2 cuts a text into words; from its released tokenizer.json
QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class TextTokenizer(Protocol):
    """What the template needs of a tokenizer."""

    def encode(self, text: str) -> tuple[int, ...]:
        """Ids of a text, without any special token."""
        ...


class FileTokenizer:
    """A tokenizer of the release, from which all added tokens are taken away."""

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


class Template:
    """The chat template without a system prompt.

    <|im_start|>user\\n{instruction}<|im_end|>\\n<|im_start|>assistant\\n{answer}<|im_end|>\\n

    What lies between two special tokens is tokenised as one string: a newline at the start of an instruction
    merges with the template's into one token.
    """

    def __init__(self, tokenizer: TextTokenizer, special: SpecialTokens) -> None:
        self.tokenizer, self.special = tokenizer, special

    def instruction(self, text: str) -> tuple[int, ...]:
        """Ids up to the start of the answer."""
        return (self.special.im_start, *self.tokenizer.encode("user\n" + text), *self._turn())

    def instruction_after_image(self, text: str) -> tuple[int, ...]:
        """The same where an image follows `user\\n` and a newline follows the image."""
        before = (self.special.im_start, *self.tokenizer.encode("user\n"))
        return (*before, *self.tokenizer.encode("\n" + text), *self._turn())

    def answer(self, text: str) -> tuple[int, ...]:
        """Ids of an answer and its end; a newline follows."""
        return (*self.tokenizer.encode(text), self.special.im_end)

    def newline(self) -> tuple[int, ...]:
        """What separates an answer from the next turn."""
        return self.tokenizer.encode("\n")

    def _turn(self) -> tuple[int, ...]:
        assistant = self.tokenizer.encode("assistant\n")
        return (self.special.im_end, *self.newline(), self.special.im_start, *assistant)


def read_template(config: HarmonConfig, folder: Path | None) -> Template:
    """The template over the tokenizer of a variant: `tokenizer.json`, else `vocab.json` and `merges.txt`.

    Raises: CheckpointError if the files are missing, broken, or belong to another model.
    """
    if config.tokenizer == "bytes":
        return Template(ByteTokenizer(), config.special)
    if folder is None:
        raise CheckpointError("the tokenizer is missing; give the folder of the weights with tokenizer.json")
    folder = folder if folder.is_dir() else folder.parent
    description = _read_description(folder)
    added = {token["content"]: token["id"] for token in description.get("added_tokens", [])}
    for field, text in _SPECIAL.items():
        expected = getattr(config.special, field)
        if added.get(text, expected) != expected:
            raise CheckpointError(
                f"{folder}: the tokenizer gives {text} the id {added[text]}, the model expects {expected}; "
                "use the tokenizer of Qwen2.5"
            )
    largest = max(description["model"]["vocab"].values(), default=0)
    if largest >= config.llm.vocab_size:
        raise CheckpointError(
            f"{folder}: the tokenizer has ids up to {largest}, the model {config.llm.vocab_size} embeddings; "
            "use the tokenizer of Qwen2.5"
        )
    template = Template(FileTokenizer(description), config.special)
    before = len(template.tokenizer.encode("user\n")) + 1
    if before != config.image_index:
        raise CheckpointError(
            f"{folder}: the tokenizer puts {before} tokens before an image, the model expects "
            f"{config.image_index}; use the tokenizer of Qwen2.5"
        )
    return template


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
            f"{folder}: expected tokenizer.json, or vocab.json and merges.txt; copy those of Qwen2.5 "
            "beside the weights"
        )
    tokenizer = Tokenizer(BPE.from_file(str(vocabulary), str(merges)))
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(QWEN2_WORDS), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    return json.loads(tokenizer.to_str())
