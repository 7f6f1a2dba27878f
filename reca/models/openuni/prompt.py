"""What is said before the meta-queries, as token ids."""

from __future__ import annotations

from reca.models.openuni.config import OpenUniConfig
from reca.models.tokenizer import TextTokenizer

MAX_CAPTION_ROWS = 128
"""Rows of a text-to-image prompt."""
EMPTY_CAPTION = "Generate an image."


class PromptWriter:
    """Chat turns of the two tasks; there is no system turn, and the answer always opens with `<img>`.

    Parts between special tokens are tokenised one by one, so that a text never merges with what surrounds it
    and never becomes a special token.
    """

    def __init__(self, config: OpenUniConfig, tokenizer: TextTokenizer) -> None:
        self.special = config.special
        self.num_embeddings = config.vision.num_embeddings
        self.tokenizer = tokenizer

    def reconstruction(self, text: str | None) -> tuple[int, ...]:
        """`user: <img> image </img> text`; a dropped text is empty."""
        encode, special = self.tokenizer.encode, self.special
        image = (special.start_of_image, *(special.image,) * self.num_embeddings, special.end_of_image)
        return self._turns((*encode("user\n"), *image, *encode(f"\n{text or ''}")))

    def text_to_image(self, caption: str | None) -> tuple[int, ...]:
        """`user: Generate an image: caption`; without caption the prompt of the unconditional pass.

        A prompt above 128 rows loses the end of its caption; officially it loses the turn behind it too, and
        with it the `<img>` that starts generation.
        """
        text = EMPTY_CAPTION if caption is None else f"Generate an image: {caption}"
        content = self.tokenizer.encode(f"user\n{text}")
        excess = max(0, len(self._turns(content)) - MAX_CAPTION_ROWS)
        return self._turns(content[: len(content) - excess])

    def _turns(self, content: tuple[int, ...]) -> tuple[int, ...]:
        encode, special = self.tokenizer.encode, self.special
        answer = (special.im_start, *encode("assistant\n"), special.start_of_image)
        return (special.im_start, *content, special.im_end, *encode("\n"), *answer)
