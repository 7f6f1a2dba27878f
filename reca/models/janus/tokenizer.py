"""Janus-Pro's templates as token ids. A user's text never becomes a special token, whatever it spells."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from enum import StrEnum
from pathlib import Path
from typing import Any

from reca.errors import CheckpointError
from reca.models.janus.config import IGNORED, JanusConfig, SpecialTokens
from reca.models.tokenizer import ByteTokenizer, FileTokenizer, TextTokenizer

IMAGE = -1
"""In place of an id: a row of the understanding encoder."""

SYSTEM_PROMPT = (
    "You are a helpful language and vision assistant. "
    "You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
)
_SPECIAL = {
    "bos": "<｜begin▁of▁sentence｜>",  # noqa: RUF001 (full-width bars)
    "eos": "<｜end▁of▁sentence｜>",  # noqa: RUF001
    "pad": "<｜▁pad▁｜>",  # noqa: RUF001
    "boi": "<begin_of_image>",
    "eoi": "<end_of_image>",
    "image_placeholder": "<image_placeholder>",
}
# where config.json of the native layout states them
_STATED = {
    "bos": ("text_config", "bos_token_id"),
    "eos": ("text_config", "eos_token_id"),
    "pad": ("text_config", "pad_token_id"),
    "image_placeholder": ("image_token_id",),
}


class Role(StrEnum):
    """Who speaks next; a token of its own where the tokenizer has one."""

    USER = "<|User|>"
    ASSISTANT = "<|Assistant|>"


@dataclass(frozen=True, slots=True)
class JanusTokenizer:
    """The templates of all tasks.

    Attributes:
        plain: for everything between special tokens.
        special: ids that frame a sequence.
        roles: ids of the roles that are tokens; the others are spelled.
        image_tokens: rows of an image that is understood.
    """

    plain: TextTokenizer
    special: SpecialTokens
    roles: Mapping[str, int]
    image_tokens: int

    def reconstruction(self, instruction: str) -> tuple[int, ...]:
        """An image, an instruction, and the start of the image to be generated."""
        return self._join(
            [*self._head(), *self._image(), f"\n{instruction.strip()}\n\n", *self._answer(), self.special.boi]
        )

    def text_to_image(self, caption: str) -> tuple[int, ...]:
        """A caption and the start of its image."""
        caption = f"{caption.strip()}\n\n"
        return self._join([*self._head(), caption, *self._answer(), self.special.boi])

    def conversation(self, turns: Sequence[tuple[str, str]]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """An image and (question, answer) turns: ids, and labels that count answers and their ends."""
        ids, labels = list[int](), list[int]()
        for index, (question, answer) in enumerate(turns):
            start: list[str | int] = [Role.USER, ": "]
            if index == 0:
                start = [self.special.bos, f"{SYSTEM_PROMPT}\n\n", *start, *self._image(), "\n"]
            asked = self._join([*start, f"{question.strip()}\n\n", *self._answer()])
            answered = self._join([f" {answer.strip()}", self.special.eos])
            ids += [*asked, *answered]
            labels += [*[IGNORED] * len(asked), *answered]
        return tuple(ids), tuple(labels)

    def _head(self) -> list[str | int]:
        return [self.special.bos, Role.USER, ": "]

    def _answer(self) -> list[str | int]:
        return [Role.ASSISTANT, ":"]

    def _image(self) -> list[str | int]:
        return [self.special.boi, *[IMAGE] * self.image_tokens, self.special.eoi]

    def _join(self, pieces: Sequence[str | int]) -> tuple[int, ...]:
        """Ids of a template; neighbouring texts are cut into tokens as one."""
        ids, text = list[int](), ""
        for piece in pieces:
            token = self.roles.get(piece) if isinstance(piece, Role) else piece
            if isinstance(token, int):
                ids += [*self.plain.encode(text), token] if text else [token]
                text = ""
            else:
                text += str(piece)
        return (*ids, *self.plain.encode(text)) if text else tuple(ids)


def read_tokenizer(config: JanusConfig, folder: Path | None) -> JanusTokenizer:
    """The tokenizer of a variant: `tokenizer.json` beside the weights, its special tokens found by name.

    Raises: CheckpointError if the file is missing or broken, lacks a special token, or belongs to other
    weights.
    """
    if config.special is not None:
        return JanusTokenizer(ByteTokenizer(), config.special, {}, config.vision.num_tokens)
    if folder is None:
        raise CheckpointError("the tokenizer is missing; give the folder of the weights with tokenizer.json")
    folder = folder if folder.is_dir() else folder.parent
    description = _read_json(folder / "tokenizer.json")
    try:
        known = dict(description["model"]["vocab"])
        known |= {token["content"]: token["id"] for token in description.get("added_tokens", [])}
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{folder / 'tokenizer.json'}: no vocabulary ({error}); copy it again"
        ) from error
    missing = [text for text in _SPECIAL.values() if text not in known]
    if missing:
        raise CheckpointError(
            f"{folder}: the tokenizer lacks {', '.join(missing)}; use the tokenizer of a Janus-Pro release"
        )
    largest = max(known.values())
    if largest >= config.text.vocab_size:
        raise CheckpointError(
            f"{folder}: the tokenizer has ids up to {largest}, the model {config.text.vocab_size} "
            "embeddings; use the tokenizer of the same release"
        )
    special = SpecialTokens(**{field: known[text] for field, text in _SPECIAL.items()})
    _check_stated(folder, special)
    roles = {role.value: known[role] for role in Role if role in known}
    return JanusTokenizer(FileTokenizer(description), special, roles, config.vision.num_tokens)


def _check_stated(folder: Path, special: SpecialTokens) -> None:
    """Compare with the ids that the weights' own configuration states."""
    if not (folder / "config.json").is_file():
        return
    stated = _read_json(folder / "config.json")
    for field in fields(special):
        value: Any = stated
        for key in _STATED.get(field.name, ("",)):
            value = value.get(key) if isinstance(value, dict) else None
        if value is not None and value != getattr(special, field.name):
            raise CheckpointError(
                f"{folder}: the tokenizer gives {_SPECIAL[field.name]} the id "
                f"{getattr(special, field.name)}, config.json {value}; use the tokenizer of the same release"
            )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not a readable JSON file ({error}); copy it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {content!r:.50}")
    return content
