"""Harmon's chat template over Qwen2.5's tokenizer."""

from __future__ import annotations

from pathlib import Path

from reca.errors import CheckpointError
from reca.models.harmon.config import HarmonConfig, SpecialTokens
from reca.models.tokenizer import ByteTokenizer, TextTokenizer, read_qwen2_tokenizer

UNCONDITIONAL = "Generate an image."
_CURE = "use the tokenizer of Qwen2.5"


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
    """The template over the tokenizer of a variant, from the files beside its weights.

    Raises: CheckpointError if the files are missing, broken, or belong to another model.
    """
    if config.tokenizer == "bytes":
        return Template(ByteTokenizer(), config.special)
    special = {
        "<|im_start|>": config.special.im_start,
        "<|im_end|>": config.special.im_end,
        "<|endoftext|>": config.special.endoftext,
    }
    tokenizer = read_qwen2_tokenizer(folder, special, config.llm.vocab_size, cure=_CURE)
    before = len(tokenizer.encode("user\n")) + 1
    if before != config.image_index:
        raise CheckpointError(
            f"{folder}: the tokenizer puts {before} tokens before an image, the model expects "
            f"{config.image_index}; {_CURE}"
        )
    return Template(tokenizer, config.special)
