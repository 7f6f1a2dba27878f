"""From images and texts to microbatches, on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import torch
from PIL import Image
from torch import Tensor

from reca.images import to_tensor
from reca.layers.segments import Segments
from reca.models.family import Variant
from reca.models.openuni.config import OpenUniConfig
from reca.models.openuni.prompt import PromptWriter
from reca.models.openuni.tokenizer import read_tokenizer
from reca.models.openuni.transformer import Layout
from reca.randomness import RandomSource
from reca.types import Batch, Draws, TensorStruct, Text

Task = Literal["reconstruction", "text_to_image"]
TASKS: tuple[Task, ...] = ("reconstruction", "text_to_image")


@dataclass(frozen=True, slots=True)
class Prompts(TensorStruct):
    """Prompts of some samples, packed without padding.

    Attributes:
        layout: rows of each sample.
        token_ids: [prompt rows] int64.
        image_rows: [images * embeddings] int64, rows that understanding embeddings take.
        vision: rows of each image inside the understanding encoder; None where no prompt has an image.
    """

    layout: Layout
    token_ids: Tensor
    image_rows: Tensor
    vision: Segments | None

    @classmethod
    def of(cls, config: OpenUniConfig, prompts: Sequence[Sequence[int]]) -> Self:
        """Pack prompts; either all of them show an image, or none does."""
        ids = torch.tensor([token for prompt in prompts for token in prompt], dtype=torch.int64)
        is_image = ids == config.special.image
        num_images = int(is_image.sum()) // config.vision.num_embeddings
        vision = Segments.of([config.vision.num_patches + 1] * num_images) if num_images else None
        return cls(
            layout=Layout.of([len(prompt) for prompt in prompts], config.num_queries),
            token_ids=ids,
            image_rows=is_image.nonzero().flatten(),
            vision=vision,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenUniBatch(Batch):
    """A microbatch of one task.

    Attributes:
        prompts: what the queries follow.
        pixels: [images, 3, height, width] fp32 in [-1, 1]: the targets, and in reconstruction also what the
            understanding encoder sees; None where `latents` (and `embeddings`) are given.
        latents: [images, channels, h, w] fp32, scaled latents of the targets; None encodes `pixels`.
        embeddings: [images * embeddings, dim], understanding embeddings of the images in the prompts; None
            encodes `pixels`.
        latent_shape: (channels, h, w) of every target.
    """

    prompts: Prompts
    pixels: Tensor | None
    latents: Tensor | None = None
    embeddings: Tensor | None = None
    latent_shape: tuple[int, int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReconstructionBatch(OpenUniBatch):
    """Images that are to be reconstructed from their own understanding embeddings."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextToImageBatch(OpenUniBatch):
    """Captions and their images."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenUniDraws(Draws):
    """The random decisions of a microbatch.

    Attributes:
        time: [images] fp32, a multiple of 1/1000 in (0, 1] before the shift.
        noise: [images, channels, h, w] fp32 standard normal.
        kept: [layers, 2, images] fp32 factors of the understanding encoder's stochastic depth; None if off.
    """

    time: Tensor
    noise: Tensor
    kept: Tensor | None = None


@dataclass(frozen=True, slots=True)
class OpenUniExample:
    """One prepared sample.

    Attributes:
        task: what it trains.
        prompt_ids: ids of the whole prompt.
        pixels: [3, size, size] fp32 in [-1, 1].
        num_tokens: rows of prompt, queries and latents.
    """

    task: Task
    prompt_ids: tuple[int, ...]
    pixels: Tensor
    num_tokens: int


def collate(
    config: OpenUniConfig, examples: Sequence[OpenUniExample], sample_ids: Sequence[int]
) -> ReconstructionBatch | TextToImageBatch:
    """One microbatch of prepared samples, in this order.

    Raises: ValueError if there are no examples, ids do not match them, or both tasks are among them.
    """
    if not examples or len(examples) != len(sample_ids):
        raise ValueError(f"collate: expected one id per example, got {len(examples)} and {len(sample_ids)}")
    task, size = examples[0].task, examples[0].pixels.shape
    if any(example.task != task or example.pixels.shape != size for example in examples):
        raise ValueError("collate: the samples of a microbatch share task and size; sort them first")
    kind = ReconstructionBatch if task == "reconstruction" else TextToImageBatch
    stride = config.autoencoder.stride
    return kind(
        sample_ids=torch.tensor(sample_ids, dtype=torch.int64),
        num_images=len(examples),
        num_tokens=sum(example.num_tokens for example in examples),
        prompts=Prompts.of(config, [example.prompt_ids for example in examples]),
        pixels=torch.stack([example.pixels for example in examples]),
        latent_shape=(config.autoencoder.latent_channels, size[1] // stride, size[2] // stride),
    )


class OpenUniProcessor:
    """Turns images and texts into batches; holds no model and can be sent to worker processes.

    Args:
        variant: architecture and pixels.
        folder: of the weights, with the tokenizer's files; None for variants that need none.
        task: `reconstruction` takes instructions, `text_to_image` captions.

    Raises: CheckpointError if the tokenizer is missing or does not fit; ValueError for another task, or if
    pixels and architecture disagree.
    """

    def __init__(
        self, variant: Variant, folder: Path | None = None, *, task: Task = "reconstruction"
    ) -> None:
        config: OpenUniConfig = variant.config
        if task not in TASKS:
            raise ValueError(f"OpenUniProcessor: task must be one of {TASKS}, got {task!r}")
        if variant.target.stride % config.autoencoder.stride or variant.target.fit != "center_crop":
            raise ValueError(
                f"OpenUniProcessor: target needs squares with a stride of {config.autoencoder.stride}, "
                f"got {variant.target}"
            )
        self.config = config
        self.target = variant.target
        self.task: Task = task
        self.writer = PromptWriter(config, read_tokenizer(config, folder))

    def prepare(self, image: Image.Image, text: Text, random: RandomSource, sample_id: int) -> OpenUniExample:
        """Cut a random square out of the image, resize and normalise it; write the prompt."""
        if isinstance(text, tuple):
            raise TypeError("OpenUniProcessor.prepare: expected an instruction, a caption or None, got turns")
        side = min(image.size)
        left, top = (
            random.integer("crop", sample_id, length - side + 1) if length > side else 0
            for length in image.size
        )
        pixels = to_tensor(image.crop((left, top, left + side, top + side)), self.target)
        is_reconstruction = self.task == "reconstruction"
        write = self.writer.reconstruction if is_reconstruction else self.writer.text_to_image
        ids, latents = write(text), (self.target.max_size // self.config.autoencoder.stride) ** 2
        return OpenUniExample(self.task, ids, pixels, len(ids) + self.config.num_queries + latents)

    def collate(
        self, examples: Sequence[OpenUniExample], sample_ids: Sequence[int]
    ) -> ReconstructionBatch | TextToImageBatch:
        """One microbatch of prepared samples, in this order."""
        return collate(self.config, examples, sample_ids)
