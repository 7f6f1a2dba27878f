"""The microbatches of Janus-Pro's three tasks, on the CPU; the type of a batch is its task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from PIL import Image
from torch import Tensor

from reca.errors import ConfigError, nearest
from reca.images import ImageRejected, ImageSpec, to_tensor
from reca.layers.segments import Segments
from reca.models.family import Variant
from reca.models.janus.config import IGNORED, JanusConfig
from reca.models.janus.tokenizer import IMAGE, read_tokenizer
from reca.models.janus.transformer import Layout
from reca.randomness import RandomSource
from reca.types import Batch

CODE = -2
"""In place of an id: a code of the image that is generated."""

TASKS = ("reconstruction", "image_to_text", "text_to_image")


@dataclass(frozen=True, slots=True, kw_only=True)
class JanusBatch(Batch):
    """A microbatch of one task; a sample is `prompt, codes` or a conversation.

    Attributes:
        layout: rows of each sample, and those that predict something.
        text_ids: [text rows] int64, sample by sample.
        order: [rows] int64, where each row lies in [texts of all samples, understanding embeddings, codes].
        pad_id: token whose embedding is never trained.
        pixels: [images, 3, height, width] fp32 in [-1, 1], understood or generated or both.
        seen: the images that are understood.
        patches: patches of each of them.
    """

    term: ClassVar[str]

    layout: Layout
    text_ids: Tensor
    order: Tensor
    pad_id: int
    pixels: Tensor
    seen: tuple[int, ...]
    patches: Segments


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationBatch(JanusBatch):
    """A microbatch that predicts codes: as many rows per sample as an image has codes.

    Attributes:
        codes: [images, codes] int64; None has `pixels` encoded.
    """

    codes: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ReconstructionBatch(GenerationBatch):
    """Image in, the same image's codes out."""

    term: ClassVar[str] = "reconstruction"


@dataclass(frozen=True, slots=True, kw_only=True)
class TextToImageBatch(GenerationBatch):
    """Caption in, codes out."""

    term: ClassVar[str] = "text_to_image"


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageToTextBatch(JanusBatch):
    """Image and questions in, answers out.

    Attributes:
        predicting: [answer tokens] int64, among the tail rows those that predict an answer token.
        labels: [answer tokens] int64, what they predict.
    """

    term: ClassVar[str] = "image_to_text"

    predicting: Tensor
    labels: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationExample:
    """One prepared image to be generated.

    Attributes:
        prompt: ids up to the start of the image, IMAGE where it is understood.
        pixels: [3, height, width] fp32 in [-1, 1].
        num_tokens: rows of the sample.
        is_reconstruction: which of the two tasks.
        is_unconditional: all of the prompt but its first and last token are hidden behind pads, which are
            attended, as in the sampler.
        codes: [codes] int64, where a cache has them.
    """

    prompt: tuple[int, ...]
    pixels: Tensor
    num_tokens: int
    is_reconstruction: bool
    is_unconditional: bool = False
    codes: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatExample:
    """One prepared conversation.

    Attributes:
        ids: tokens, IMAGE where the image is understood.
        labels: of the same length, IGNORED where no answer stands; the first must be.
        pixels: [3, height, width] fp32 in [-1, 1].
    """

    ids: tuple[int, ...]
    labels: tuple[int, ...]
    pixels: Tensor

    @property
    def num_tokens(self) -> int:
        """Rows of the sample: up to the last that predicts an answer token."""
        return max((index for index, label in enumerate(self.labels) if label != IGNORED), default=0)


def hide(prompt: Sequence[int], pad: int) -> tuple[int, ...]:
    """A prompt of which nothing is known but its length."""
    return (prompt[0], *[pad] * (len(prompt) - 2), prompt[-1])


def collate_generation(
    config: JanusConfig, pad: int, examples: Sequence[GenerationExample], sample_ids: Sequence[int]
) -> ReconstructionBatch | TextToImageBatch:
    """One microbatch of reconstructions or of captions, in this order.

    Raises: ValueError if there are no examples, ids do not match them, or both tasks are among them.
    """
    _check(examples, sample_ids)
    is_reconstruction = examples[0].is_reconstruction
    if any(example.is_reconstruction != is_reconstruction for example in examples):
        raise ValueError("collate: a microbatch has one task, got reconstruction and text to image together")
    prompts = [hide(e.prompt, pad) if e.is_unconditional else e.prompt for e in examples]
    samples = [(*prompt, *[CODE] * (config.num_codes - 1)) for prompt in prompts]
    codes = [example.codes for example in examples if example.codes is not None]
    kind = ReconstructionBatch if is_reconstruction else TextToImageBatch
    seen = [index for index, prompt in enumerate(prompts) if IMAGE in prompt]
    text_ids, order = _stored(samples)
    return kind(
        sample_ids=torch.tensor(sample_ids, dtype=torch.int64),
        num_images=len(examples),
        num_tokens=sum(len(sample) for sample in samples),
        layout=Layout.of([len(sample) for sample in samples], [config.num_codes] * len(samples)),
        text_ids=text_ids,
        order=order,
        pad_id=pad,
        pixels=torch.stack([example.pixels for example in examples]),
        seen=tuple(seen),
        patches=Segments.of([config.vision.num_tokens] * len(seen)),
        codes=torch.stack(codes) if len(codes) == len(examples) else None,
    )


def collate_chats(
    config: JanusConfig, pad: int, examples: Sequence[ChatExample], sample_ids: Sequence[int]
) -> ImageToTextBatch:
    """One microbatch of conversations, in this order. One without any answer has no rows and adds no loss.

    Raises: ValueError if there are no examples, ids do not match them, or a first token is an answer.
    """
    _check(examples, sample_ids)
    if any(example.labels and example.labels[0] != IGNORED for example in examples):
        raise ValueError("collate: a conversation starts with a question, so its first label must be ignored")
    samples = [example.ids[: example.num_tokens] for example in examples]
    tails, predicting, labels = list[int](), list[int](), list[int]()
    for example, sample in zip(examples, samples, strict=True):
        answers = [(index, label) for index, label in enumerate(example.labels) if label != IGNORED]
        first = answers[0][0] - 1 if answers else 0  # a token is predicted by the row before it
        predicting += [sum(tails) + index - 1 - first for index, _ in answers]
        labels += [label for _, label in answers]
        tails.append(len(sample) - first)
    seen = [index for index, sample in enumerate(samples) if IMAGE in sample]
    text_ids, order = _stored(samples)
    return ImageToTextBatch(
        sample_ids=torch.tensor(sample_ids, dtype=torch.int64),
        num_images=0,
        num_tokens=sum(len(sample) for sample in samples),
        layout=Layout.of([len(sample) for sample in samples], tails),
        text_ids=text_ids,
        order=order,
        pad_id=pad,
        pixels=torch.stack([example.pixels for example in examples]),
        seen=tuple(seen),
        patches=Segments.of([config.vision.num_tokens] * len(seen)),
        predicting=torch.tensor(predicting, dtype=torch.int64),
        labels=torch.tensor(labels, dtype=torch.int64),
    )


def _check(examples: Sequence[object], sample_ids: Sequence[int]) -> None:
    if not examples or len(examples) != len(sample_ids):
        raise ValueError(f"collate: expected one id per example, got {len(examples)} and {len(sample_ids)}")


def _stored(samples: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Ids of all texts, and where each row of the samples lies when rows are stored by kind."""
    entries = torch.tensor([entry for sample in samples for entry in sample], dtype=torch.int64)
    kinds = [entries >= 0, entries == IMAGE, entries == CODE]
    order, start = torch.empty_like(entries), 0
    for kind in kinds:
        count = int(kind.sum())
        order[kind] = torch.arange(start, start + count)
        start += count
    return entries[kinds[0]], order


def random_square(image: Image.Image, random: RandomSource, sample_id: int) -> Image.Image:
    """The largest square of an image, at a uniformly drawn place."""
    side = min(image.size)
    left = random.integer("crop/left", sample_id, image.width - side + 1)
    top = random.integer("crop/top", sample_id, image.height - side + 1)
    return image.crop((left, top, left + side, top + side))


def letterbox(image: Image.Image, size: int) -> Image.Image:
    """The whole image in a square: its long side becomes `size`, the rest is the mean colour."""
    scale = size / max(image.size)
    width, height = (max(1, int(side * scale)) for side in image.size)
    square = Image.new("RGB", (size, size), (127, 127, 127))
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    square.paste(resized, ((size - width) // 2, (size - height) // 2))
    return square


class JanusProcessor:
    """Turns images and texts into batches of one task; holds no model and can be sent to worker processes.

    Args:
        variant: architecture and pixels.
        folder: of the weights, with the tokenizer's file; None for variants that need none.
        task: one of `TASKS`.

    Raises: ConfigError for an unknown task; CheckpointError if the tokenizer is missing or does not fit;
    ValueError if pixels and architecture disagree.
    """

    def __init__(self, variant: Variant, folder: Path | None = None, task: str = "reconstruction") -> None:
        config: JanusConfig = variant.config
        if task not in TASKS:
            raise ConfigError(f"Janus-Pro has no task {task!r}; {nearest(task, TASKS)}")
        for name, spec in (("understanding", variant.understanding), ("target", variant.target)):
            if spec.fit == "native" or spec.max_size != config.image_size:
                raise ValueError(
                    f"JanusProcessor: {name} must be squares of {config.image_size} pixels, "
                    f"got fit={spec.fit!r} and {spec.max_size}"
                )
        self.config = config
        self.task = task
        self.target: ImageSpec = variant.target
        self.tokenizer = read_tokenizer(config, folder)

    def prepare(
        self,
        image: Image.Image,
        text: str | Sequence[tuple[str, str]] | None,
        random: RandomSource,
        sample_id: int,
    ) -> GenerationExample | ChatExample:
        """Crop, resize, normalise and tokenise one RGB image.

        Args:
            image: RGB.
            text: instruction or caption, None if dropped; (question, answer) turns for image to text.
            random: draws the place of the crop.
            sample_id: identity of the sample.

        Raises: ImageRejected for a conversation without any answer.
        """
        if self.task == "image_to_text":
            if text is None or isinstance(text, str) or not text:
                raise ImageRejected("it has no conversation: image to text needs (question, answer) turns")
            ids, labels = self.tokenizer.conversation(text)
            square = letterbox(image, self.config.image_size)
            return ChatExample(ids=ids, labels=labels, pixels=to_tensor(square, self.target))
        if text is not None and not isinstance(text, str):
            raise TypeError(f"JanusProcessor: {self.task} takes one text, got {type(text).__name__}")
        is_reconstruction = self.task == "reconstruction"
        make = self.tokenizer.reconstruction if is_reconstruction else self.tokenizer.text_to_image
        prompt = make(text or "")
        return GenerationExample(
            prompt=prompt,
            pixels=to_tensor(random_square(image, random, sample_id), self.target),
            num_tokens=len(prompt) + self.config.num_codes - 1,
            is_reconstruction=is_reconstruction,
            is_unconditional=text is None,
        )

    def collate(
        self, examples: Sequence[GenerationExample] | Sequence[ChatExample], sample_ids: Sequence[int]
    ) -> JanusBatch:
        """One microbatch of prepared samples, in this order."""
        chats = [example for example in examples if isinstance(example, ChatExample)]
        images = [example for example in examples if isinstance(example, GenerationExample)]
        pad = self.tokenizer.special.pad
        if chats and images:
            raise ValueError("collate: a microbatch has one task, got conversations and images together")
        if chats:
            return collate_chats(self.config, pad, chats, sample_ids)
        return collate_generation(self.config, pad, images, sample_ids)
