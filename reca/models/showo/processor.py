"""Images and words to prepared samples, one processor per task."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from reca.errors import ConfigError, nearest
from reca.images import ImageRejected, ImageSpec, to_tensor
from reca.models.family import Variant
from reca.models.showo.batch import ChatExample, MaskedExample, ShowoBatch, collate_chats, collate_masked
from reca.models.showo.config import IGNORED, TASKS, ShowoConfig
from reca.models.showo.sequence import image_to_text, reconstruction, text_to_image
from reca.models.showo.text import conversation, instruction, read_tokenizer
from reca.models.showo.vision import CLIP_MEAN, CLIP_STD
from reca.randomness import RandomSource
from reca.types import Text


class ShowoProcessor:
    """Turns images and words into batches of one task; holds no model and can be sent to worker processes.

    Args:
        variant: architecture and pixels.
        folder: of the weights, with the tokenizer beside or in it; None for variants that need none.
        task: `reconstruction`, `image_to_text` or `text_to_image`.

    Raises: ConfigError for an unknown task; CheckpointError if the tokenizer is missing or does not fit.
    """

    def __init__(self, variant: Variant, folder: Path | None = None, task: str = "reconstruction") -> None:
        if task not in TASKS:
            raise ConfigError(f"Show-o has no task {task!r}; {nearest(task, TASKS)}")
        self.config: ShowoConfig = variant.config
        self.task = task
        self.target = variant.target
        self.chat_pixels = chat_pixels(self.config)
        self.tokenizer = read_tokenizer(self.config, folder)

    def prepare(
        self, image: Image.Image, text: Text, random: RandomSource, sample_id: int
    ) -> MaskedExample | ChatExample:
        """Resize, normalise and tokenise one RGB image and its words.

        Args:
            text: the instruction (reconstruction) or caption (text to image), None where it is dropped;
                (question, answer) turns (image to text).

        Raises: ImageRejected for a conversation without an answer that fits; DataError for an instruction
        that is too long.
        """
        if self.task == "image_to_text":
            if not isinstance(text, tuple):
                raise TypeError(
                    f"ShowoProcessor: image to text needs (question, answer) turns, got {text!r:.50}"
                )
            return self._chat(image, text)
        if isinstance(text, tuple):
            raise TypeError(
                f"ShowoProcessor: {self.task} needs one text, got turns; use task='image_to_text'"
            )
        is_reconstruction = self.task == "reconstruction"
        if is_reconstruction:
            ids = () if text is None else self.tokenizer.encode(instruction(text))
            blocks = reconstruction(self.config, ids)
        else:
            ids = () if text is None else self.tokenizer.encode(text)
            blocks = text_to_image(self.config, ids)
        rate = math.cos(math.pi / 2 * random.scalar(f"{self.task}/mask_rate", sample_id))
        return MaskedExample(
            text=ids,
            pixels=to_tensor(image, self.target),
            num_masked=max(1, round(self.config.num_codes * rate)),
            is_reconstruction=is_reconstruction,
            num_tokens=sum(block.rows for block in blocks),
        )

    def _chat(self, image: Image.Image, turns: Sequence[tuple[str, str]]) -> ChatExample:
        ids, labels = conversation(self.tokenizer, turns, self.config.special.eot)
        ids, labels = ids[: self.config.max_chat], labels[: self.config.max_chat]
        if all(label == IGNORED for label in labels):
            raise ImageRejected(f"its conversation has no answer within {self.config.max_chat} tokens")
        example = ChatExample(
            chat=ids, labels=labels, pixels=to_tensor(image, self.chat_pixels), num_tokens=0
        )
        rows = sum(block.rows for block in image_to_text(self.config, example.trimmed()))
        return ChatExample(chat=ids, labels=labels, pixels=example.pixels, num_tokens=rows)

    def collate(self, examples: Sequence[Any], sample_ids: Sequence[int]) -> ShowoBatch:
        """One microbatch of prepared samples, in this order."""
        if self.task == "image_to_text":
            return collate_chats(self.config, examples, sample_ids)
        return collate_masked(self.config, examples, sample_ids)


def chat_pixels(config: ShowoConfig) -> ImageSpec:
    """Pixels of image to text: a central square, normalised as CLIP was trained where CLIP sees it."""
    if config.clip is None:
        size, stride = config.resolution, config.magvit.stride
        return ImageSpec(max_size=size, min_size=size, stride=stride, fit="center_crop")
    return ImageSpec(
        max_size=config.clip.image_size,
        min_size=config.clip.image_size,
        stride=config.clip.patch_size,
        fit="center_crop",
        mean=CLIP_MEAN,
        std=CLIP_STD,
    )
