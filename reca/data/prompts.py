"""The texts of samples: a reconstruction instruction drawn for each, or what its source says about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Protocol

from reca.data.sources import TextSource
from reca.errors import DataError
from reca.randomness import RandomSource
from reca.types import Text

MAX_PROMPT_CHARACTERS = 2_000


class TextProvider(Protocol):
    """The text of a sample; picklable, and a function of its arguments alone."""

    def __call__(self, item: int, sample_id: int, random: RandomSource) -> Text:
        """Text of `item` of the source, which is trained as `sample_id`. Raises ImageRejected."""
        ...


@dataclass(frozen=True, slots=True)
class Instructions:
    """One of `prompts`, whatever the item is; None with probability `dropout`."""

    prompts: tuple[str, ...]
    dropout: float

    def __call__(self, item: int, sample_id: int, random: RandomSource) -> str | None:
        """The instruction that is drawn for the sample."""
        return choose_prompt(self.prompts, self.dropout, random, sample_id)


@dataclass(frozen=True, slots=True)
class OwnTexts:
    """What the source says about its item; None with probability `dropout`."""

    source: TextSource
    dropout: float = 0.0

    def __call__(self, item: int, sample_id: int, random: RandomSource) -> Text:
        """The item's text. It is read even if dropped: an item without one is never trained on."""
        text = self.source.text(item)
        return None if random.scalar("text_dropout", sample_id) < self.dropout else text


def load_prompts(path: Path | None) -> tuple[str, ...]:
    """One instruction per line of a UTF-8 file, blank lines left out; None takes those that ship with reca.

    Raises: DataError if the file cannot be read, is empty, or holds a line above 2,000 characters.
    """
    try:
        if path is None:
            text = (resources.files("reca.assets") / "prompts" / "reconstruction.txt").read_text("utf-8")
        else:
            text = path.read_text("utf-8")
    except OSError as error:
        raise DataError(f"cannot read the prompts in {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} must be UTF-8 text with one instruction per line: {error.reason}") from error
    prompts = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not prompts:
        raise DataError(f"{path} holds no instructions; write one per line, or leave data.prompts unset")
    longest = max(prompts, key=len)
    if len(longest) > MAX_PROMPT_CHARACTERS:
        raise DataError(
            f"{path} holds an instruction of {len(longest)} characters; the limit is {MAX_PROMPT_CHARACTERS}"
        )
    return prompts


def choose_prompt(prompts: Sequence[str], dropout: float, random: RandomSource, sample_id: int) -> str | None:
    """The instruction of a sample, uniform over `prompts`; None with probability `dropout`.

    Both draws depend on (seed, sample id) alone: changing the dropout never changes who gets which prompt.
    """
    if random.scalar("prompt_dropout", sample_id) < dropout:
        return None
    return prompts[random.integer("prompt", sample_id, len(prompts))]
