"""From images and texts to prepared samples and microbatches, on the CPU, one task per processor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any, Literal

from PIL import Image

from reca.errors import ConfigError, nearest
from reca.images import ImageRejected, to_tensor
from reca.models.family import Variant
from reca.models.harmon.batch import (
    IGNORED,
    GenerationBatch,
    GenerationExample,
    ImageToTextBatch,
    ImageToTextExample,
    collate_generation,
    collate_image_to_text,
)
from reca.models.harmon.config import HarmonConfig
from reca.models.harmon.tokenizer import UNCONDITIONAL, Template, read_template
from reca.randomness import RandomSource

Task = Literal["reconstruction", "image_to_text", "text_to_image"]
TASKS = ("reconstruction", "image_to_text", "text_to_image")
MAX_PROMPT_IDS, MAX_DIALOGUE_IDS = 128, 1472  # the image counts as one
_PLACEHOLDER = "<image>"
_GREY = (127, 127, 127)
_RATIO_SPREAD = 0.25


def mask_ratio(uniform: float, smallest: float) -> float:
    """A share of masked tokens in [smallest, 1] from a uniform number in [0, 1).

    Normal with mean 1 and deviation 0.25, truncated; by inversion. Mean 0.867 for `smallest` 0.7.

    Source: arXiv 2406.11838, section 4.
    """
    normal = NormalDist(1.0, _RATIO_SPREAD)
    low = normal.cdf(smallest)
    return min(max(normal.inv_cdf(low + uniform * (0.5 - low)), smallest), 1.0)


def stretched(image: Image.Image) -> Image.Image:
    """A square by stretching the short side; officially a resize of its own before that to the final size."""
    side = max(image.size)
    return image if image.size == (side, side) else image.resize((side, side), Image.Resampling.BICUBIC)


def padded(image: Image.Image) -> Image.Image:
    """A square by grey borders, the image in the middle."""
    side = max(image.size)
    if image.size == (side, side):
        return image
    square = Image.new("RGB", (side, side), _GREY)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


class HarmonProcessor:
    """Turns images and texts into batches of one task; holds no model and can be sent to worker processes.

    Officially one mask ratio is drawn per microbatch. Here every sample has its own, from the same law: a
    step's gradient then does not depend on how it is cut into microbatches.

    Args:
        variant: architecture and pixels.
        folder: of the weights, with the tokenizer's files; None for variants that need none.
        task: `reconstruction`, `image_to_text` or `text_to_image`.

    Raises: ConfigError for an unknown task; CheckpointError if the tokenizer is missing or does not fit;
        ValueError if pixels and architecture disagree.
    """

    def __init__(self, variant: Variant, folder: Path | None = None, *, task: str = "reconstruction") -> None:
        config: HarmonConfig = variant.config
        if task not in TASKS:
            raise ConfigError(f"harmon: unknown task {task!r}; {nearest(task, TASKS)}")
        if variant.target != variant.understanding or variant.target.fit != "squash":
            raise ValueError("HarmonProcessor: understanding and target must be one square of pixels")
        if variant.target.stride != config.vae.stride or config.vae.stride != config.mar.vae_stride:
            raise ValueError(
                f"HarmonProcessor: target needs stride {config.vae.stride}, got {variant.target.stride}"
            )
        self.config, self.spec, self.task = config, variant.target, task
        self.template: Template = read_template(config, folder)

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) of latents of every image."""
        side = self.spec.max_size // self.spec.stride
        return side, side

    def prepare(
        self, image: Image.Image, text: Any, random: RandomSource, sample_id: int
    ) -> GenerationExample | ImageToTextExample:
        """Resize, normalise and tokenise one RGB image.

        Args:
            image: RGB.
            text: `reconstruction`: an instruction, or None where it is dropped; `text_to_image`: a caption,
                or None; `image_to_text`: (question, answer) turns.
            random: of the run; the mask ratio comes from it.
            sample_id: the identity of the sample.

        Raises: ImageRejected if a dialogue has nothing to learn.
        """
        if self.task == "image_to_text":
            return self._dialogue(image, text)
        tokens = self.grid[0] * self.grid[1]
        ratio = mask_ratio(random.scalar("mask_ratio", sample_id), self.config.mar.mask_ratio_min)
        masked = math.ceil(tokens * ratio)
        ids = self._prompt_ids(text)
        buffers = self.config.mar.buffer_size
        seen = tokens + buffers if self.task == "reconstruction" else 0
        return GenerationExample(
            image=to_tensor(stretched(image), self.spec),
            grid=self.grid,
            token_ids=ids,
            num_masked=masked,
            num_tokens=len(ids) + seen + tokens - masked + buffers,
        )

    def _prompt_ids(self, text: str | None) -> tuple[int, ...]:
        if self.task == "text_to_image":
            prompt = UNCONDITIONAL if text is None else f"Generate an image: {text}"
            return self.template.instruction(prompt)[:MAX_PROMPT_IDS]
        # without an instruction the image stays; only the text changes
        prompt = UNCONDITIONAL if text is None else "\n" + text
        return self.template.instruction(prompt)[: MAX_PROMPT_IDS - 1]

    def _dialogue(self, image: Image.Image, turns: Sequence[tuple[str, str]]) -> ImageToTextExample:
        ids, labels = list[int](), list[int]()
        for index, (question, answer) in enumerate(turns):
            question = question.replace(_PLACEHOLDER, "").strip()
            template = self.template
            asked = template.instruction(question) if index else template.instruction_after_image(question)
            answered, newline = template.answer(answer), template.newline()
            ids += [*asked, *answered, *newline]
            labels += [*[IGNORED] * len(asked), *answered, *[IGNORED] * len(newline)]
        del ids[MAX_DIALOGUE_IDS - 1 :], labels[MAX_DIALOGUE_IDS - 1 :]
        while labels and labels[-1] == IGNORED:  # nothing after the last label is read
            ids.pop(), labels.pop()
        if not labels:
            raise ImageRejected(f"the dialogue has no answer within {MAX_DIALOGUE_IDS} tokens")
        ids.pop()  # the last label is predicted, not read
        seen = self.grid[0] * self.grid[1] + self.config.mar.buffer_size
        return ImageToTextExample(
            image=to_tensor(padded(image), self.spec),
            grid=self.grid,
            token_ids=tuple(ids),
            labels=tuple(labels),
            num_tokens=len(ids) + seen,
        )

    def collate(
        self, examples: Sequence[Any], sample_ids: Sequence[int]
    ) -> GenerationBatch | ImageToTextBatch:
        """One microbatch of prepared samples, in this order."""
        if self.task == "image_to_text":
            return collate_image_to_text(self.config, examples, sample_ids)
        return collate_generation(
            self.config, examples, sample_ids, with_understanding=self.task == "reconstruction"
        )
