"""From images and instructions to microbatches, on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from torch import Tensor

from reca.images import patchify, to_tensor
from reca.kernels import PhiloxNoise
from reca.layers.segments import Segments
from reca.models.bagel.config import BagelConfig
from reca.models.bagel.tokenizer import read_tokenizer
from reca.models.bagel.transformer import MARKERS, Layout
from reca.models.family import Variant
from reca.models.tokenizer import TextTokenizer
from reca.randomness import RandomSource
from reca.types import Batch, Draws, TensorStruct, Text

TargetKind = Literal["pixels", "moments", "latents"]


@dataclass(frozen=True, slots=True)
class TargetGroup(TensorStruct):
    """Images to be reconstructed that are encoded together.

    Attributes:
        kind: how far `values` are on their way through the autoencoder: pixels, the posterior's mean and
            logvar (which a cache may hold: sampling stays random), or latents.
        images: positions of these images in the batch.
        values: [images, channels, height, width] fp32; pixels are in [-1, 1].
    """

    kind: TargetKind
    images: tuple[int, ...]
    values: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class BagelBatch(Batch):
    """A microbatch, stored by kind of row; see `reca.models.bagel.transformer.Layout`.

    Attributes:
        layout: rows of each sample and who sees whom.
        token_ids: [understanding rows] int64; 0 at the rows of ViT patches.
        patch_rows: [patches] int64, the understanding rows of the patches.
        patches: [patches, 3 * patch_size^2] fp32 in [-1, 1], all images packed.
        patch_positions: [patches] int64, row * edge + column in both position tables.
        patch_images: patches of each image.
        latent_positions: [latent rows] int64, row * max_latent_size + column.
        latent_grids: (rows, columns) of latent tokens of each image.
        targets: the images to be reconstructed.
    """

    layout: Layout
    token_ids: Tensor
    patch_rows: Tensor
    patches: Tensor
    patch_positions: Tensor
    patch_images: Segments
    latent_positions: Tensor
    latent_grids: tuple[tuple[int, int], ...]
    targets: tuple[TargetGroup, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class BagelDraws(Draws):
    """The random decisions of a microbatch.

    Attributes:
        time: [images] fp32 in (0, 1), after the shift; one per image, shared by its tokens.
        noise: [latent rows, latent_dim] fp32 standard normal, in the order of the latent tokens; or the
            coordinates of these numbers, from which kernels regenerate them.
        posterior: per target group [images, z, height, width] fp32 standard normal; empty for given latents.
    """

    time: Tensor
    noise: Tensor | PhiloxNoise
    posterior: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class BagelExample:
    """One prepared sample.

    Attributes:
        patches: [rows * columns, 3 * patch_size^2] fp32.
        patch_grid: (rows, columns) of ViT patches.
        text_ids: ids of the instruction without special tokens; None if it is dropped.
        target: [channels, height, width] fp32 of `kind`.
        latent_grid: (rows, columns) of latent tokens.
    """

    patches: Tensor
    patch_grid: tuple[int, int]
    text_ids: tuple[int, ...] | None
    target: Tensor
    latent_grid: tuple[int, int]
    kind: TargetKind = "pixels"

    @property
    def image_length(self) -> int:
        """Understanding rows of the image, with its two special tokens."""
        return self.patches.shape[0] + 2

    @property
    def text_length(self) -> int:
        """Rows of the instruction with its two special tokens; a dropped one takes them along."""
        return 0 if self.text_ids is None else len(self.text_ids) + 2

    @property
    def latent_length(self) -> int:
        """Latent tokens."""
        return self.latent_grid[0] * self.latent_grid[1]

    @property
    def num_tokens(self) -> int:
        """Tokens of the sample as the official packer counts them."""
        return self.image_length + self.text_length + self.latent_length + MARKERS


def grid_positions(rows: int, columns: int, edge: int) -> Tensor:
    """[rows * columns] int64: row * edge + column, the top left corner of a table with `edge` columns."""
    return (torch.arange(rows)[:, None] * edge + torch.arange(columns)).flatten()


def collate(
    config: BagelConfig,
    examples: Sequence[BagelExample],
    sample_ids: Sequence[int],
    *,
    targets: Sequence[TargetGroup] | None = None,
) -> BagelBatch:
    """One microbatch of prepared samples, in this order.

    Args:
        config: of the model.
        examples: at least one.
        sample_ids: identity of each sample in the stream.
        targets: how images are grouped for the autoencoder. None groups those of equal size, which gives each
            image the latents that it has alone. The official code pads all images of a pack with zeros to the
            largest and encodes them together, which changes the latents of smaller ones.
    """
    if not examples or len(examples) != len(sample_ids):
        raise ValueError(f"collate: expected one id per example, got {len(examples)} and {len(sample_ids)}")
    layout = Layout.of(
        [example.image_length for example in examples],
        [example.text_length for example in examples],
        [example.latent_length for example in examples],
    )
    token_ids, patch_rows = _understanding_rows(config, examples)
    edge = config.vit_max_num_patch_per_side
    return BagelBatch(
        sample_ids=torch.tensor(sample_ids, dtype=torch.int64),
        num_images=len(examples),
        num_tokens=sum(example.num_tokens for example in examples),
        layout=layout,
        token_ids=token_ids,
        patch_rows=patch_rows,
        patches=torch.cat([example.patches for example in examples]),
        patch_positions=torch.cat([grid_positions(*example.patch_grid, edge) for example in examples]),
        patch_images=Segments.of([example.patches.shape[0] for example in examples]),
        latent_positions=torch.cat(
            [grid_positions(*example.latent_grid, config.max_latent_size) for example in examples]
        ),
        latent_grids=tuple(example.latent_grid for example in examples),
        targets=tuple(_equal_sizes(examples) if targets is None else targets),
    )


def _understanding_rows(config: BagelConfig, examples: Sequence[BagelExample]) -> tuple[Tensor, Tensor]:
    """Token ids of all understanding rows, and which of them are ViT patches."""
    special, ids, patch_rows = config.special, list[int](), list[Tensor]()
    for example in examples:
        num_patches = example.patches.shape[0]
        patch_rows.append(torch.arange(len(ids) + 1, len(ids) + 1 + num_patches))
        ids += [special.start_of_image, *[0] * num_patches, special.end_of_image]
    for example in examples:
        if example.text_ids is not None:
            ids += [special.bos_token_id, *example.text_ids, special.eos_token_id]
    ids += [special.start_of_image, special.end_of_image] * len(examples)
    return torch.tensor(ids, dtype=torch.int64), torch.cat(patch_rows)


def _equal_sizes(examples: Sequence[BagelExample]) -> list[TargetGroup]:
    groups: dict[tuple[TargetKind, torch.Size], list[int]] = {}
    for index, example in enumerate(examples):
        groups.setdefault((example.kind, example.target.shape), []).append(index)
    return [
        TargetGroup(kind, tuple(images), torch.stack([examples[i].target for i in images]))
        for (kind, _), images in groups.items()
    ]


class BagelProcessor:
    """Turns images and instructions into batches; holds no model and can be sent to worker processes.

    Args:
        variant: architecture and pixels.
        folder: of the weights, with the tokenizer's files; None for variants that need none.

    Raises: CheckpointError if the tokenizer is missing or does not fit; ValueError if pixels and architecture
    disagree.
    """

    def __init__(self, variant: Variant, folder: Path | None = None) -> None:
        config: BagelConfig = variant.config
        for name, spec, stride, edge in (
            (
                "understanding",
                variant.understanding,
                config.vision.patch_size,
                config.vit_max_num_patch_per_side,
            ),
            ("target", variant.target, config.latent_stride, config.max_latent_size),
        ):
            if spec.stride != stride or spec.max_size > edge * stride:
                raise ValueError(
                    f"BagelProcessor: {name} needs stride {stride} and at most {edge * stride} pixels, "
                    f"got stride {spec.stride} and {spec.max_size}"
                )
        self.config = config
        self.understanding = variant.understanding
        self.target = variant.target
        self.tokenizer: TextTokenizer = read_tokenizer(config, folder)

    def prepare(self, image: Image.Image, text: Text, random: RandomSource, sample_id: int) -> BagelExample:
        """Resize, normalise and tokenise one RGB image; nothing here is random."""
        if isinstance(text, tuple):
            raise TypeError("BagelProcessor.prepare: expected an instruction or None, got a conversation")
        patch, stride = self.config.vision.patch_size, self.config.latent_stride
        understanding, target = to_tensor(image, self.understanding), to_tensor(image, self.target)
        _, height, width = understanding.shape
        _, target_height, target_width = target.shape
        return BagelExample(
            patches=patchify(understanding, patch),
            patch_grid=(height // patch, width // patch),
            text_ids=None if text is None else self.tokenizer.encode(text),
            target=target,
            latent_grid=(target_height // stride, target_width // stride),
        )

    def collate(self, examples: Sequence[BagelExample], sample_ids: Sequence[int]) -> BagelBatch:
        """One microbatch of prepared samples, in this order."""
        return collate(self.config, examples, sample_ids)
