"""Microbatches of Harmon, one type per task, and the rows of their sequences.

A sequence of the language model is

    reconstruction    [ids before | understanding | ids after | visible tokens | buffers]
    text_to_image     [ids | visible tokens | buffers]
    image_to_text     [ids before | understanding | ids after]

where understanding is [tokens in raster order | buffers]. Sequences are packed without padding and causal;
their rows are picked by index from [text; understanding; generation], which are computed apart.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from reca.layers.segments import Segments
from reca.models.harmon.config import HarmonConfig
from reca.models.harmon.dropout import UNDERSTANDING, VISIBLE, Dropout
from reca.models.harmon.mar import encoder_rows
from reca.models.harmon.transformer import Readout
from reca.types import Batch, Draws, TensorStruct

TargetKind = Literal["pixels", "latents"]
IGNORED = -100


@dataclass(frozen=True, slots=True)
class Images(TensorStruct):
    """The images of a microbatch, all of one size.

    Attributes:
        kind: how far `values` are on their way through the autoencoder.
        values: [images, 3, height, width] pixels in [-1, 1], or [images, h * w, channels] scaled latents;
            fp32.
        grid: (h, w) of latents.
    """

    kind: TargetKind
    values: Tensor
    grid: tuple[int, int]

    @property
    def tokens(self) -> int:
        """Latent tokens of one image."""
        return self.grid[0] * self.grid[1]


@dataclass(frozen=True, slots=True)
class Encoding(TensorStruct):
    """Rows of the encoder: images that are understood, then the visible part of images to be generated.

    Neither sees the other, so that both are one packed run.

    Attributes:
        whole: [whole rows] int64, index into [buffers; tokens of all images]: images that are understood.
        segments: buffers and tokens, of each whole image, then of each visible part.
        passes: which of the two are there, in order: `UNDERSTANDING`, `VISIBLE`.
    """

    whole: Tensor
    segments: Segments
    passes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Sequences(TensorStruct):
    """Packed sequences of the language model.

    Attributes:
        token_ids: [text rows] int64.
        rows: [rows] int64, index into [text; understanding; generation].
        positions: [rows] int64, rotary, from 0 in each sequence.
        segments: causal, one per sequence.
        readout: the rows that are read after the last layer.
    """

    token_ids: Tensor
    rows: Tensor
    positions: Tensor
    segments: Segments
    readout: Readout


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationBatch(Batch):
    """A microbatch whose images are generated.

    Attributes:
        images: to be generated, and in reconstruction also what the sequence shows.
        encoding: rows of the encoder; without understanding the visible parts alone.
        sequences: of the language model.
        num_masked: masked tokens of each image.
        masked_counts: [images] int64, the same on the device.
        canvas_segments: buffers + h * w rows of each image.
        from_llm: [rows] int64, index into the rows read from the language model: buffers first again.
    """

    images: Images
    encoding: Encoding
    sequences: Sequences
    num_masked: tuple[int, ...]
    masked_counts: Tensor
    canvas_segments: Segments
    from_llm: Tensor

    @property
    def num_visible(self) -> tuple[int, ...]:
        """Visible tokens of each image."""
        return tuple(self.images.tokens - masked for masked in self.num_masked)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReconstructionBatch(GenerationBatch):
    """Images that are generated from their own understanding embeddings."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextToImageBatch(GenerationBatch):
    """Images that are generated from their captions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageToTextBatch(Batch):
    """Dialogues about images.

    Attributes:
        images: what the dialogues are about.
        encoding: rows of the encoder, whole images alone.
        sequences: of the language model; its readout names the rows that predict a label.
        labels: [read rows] int64, the next token of each.
    """

    images: Images
    encoding: Encoding
    sequences: Sequences
    labels: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationDraws(Draws):
    """The random decisions of a microbatch of images to be generated.

    Attributes:
        encoder_rows: [rows] int64, index into [buffers; tokens of all images]: the rows of the encoding.
        canvas_rows: [rows] int64, where buffers and visible tokens lie in the decoder's canvases.
        masked: [tokens] int64, sample by sample in raster order: index into [images * h * w].
        masked_positions, masked_rows: the same within their image, and within the decoder's canvases.
        time: [levels * masked tokens] int64 in 0..999, levels outermost.
        noise: [levels * masked tokens, channels] fp32 standard normal.
        dropout: None switches dropout off.
    """

    encoder_rows: Tensor
    canvas_rows: Tensor
    masked: Tensor
    masked_positions: Tensor
    masked_rows: Tensor
    time: Tensor
    noise: Tensor
    dropout: Dropout | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageToTextDraws(Draws):
    """The random decisions of a microbatch of dialogues."""

    dropout: Dropout | None


@dataclass(frozen=True, slots=True)
class GenerationExample:
    """One prepared sample whose image is generated.

    Attributes:
        image: [3, height, width] pixels or [h * w, channels] latents, fp32.
        grid: (h, w) of latents.
        token_ids: the prompt.
        num_masked: masked latent tokens.
        num_tokens: rows of the language model.
    """

    image: Tensor
    grid: tuple[int, int]
    token_ids: tuple[int, ...]
    num_masked: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class ImageToTextExample:
    """One prepared dialogue.

    Attributes:
        image, grid: as in `GenerationExample`.
        token_ids: prompt and answers, without the image.
        labels: of each token, the token itself where it belongs to an answer, else -100.
        num_tokens: rows of the language model.
    """

    image: Tensor
    grid: tuple[int, int]
    token_ids: tuple[int, ...]
    labels: tuple[int, ...]
    num_tokens: int


def collate_generation(
    config: HarmonConfig,
    examples: Sequence[GenerationExample],
    sample_ids: Sequence[int],
    *,
    with_understanding: bool,
) -> GenerationBatch:
    """One microbatch of images to be generated, all of one size."""
    images, buffers = _images(examples), config.mar.buffer_size
    masked = tuple(example.num_masked for example in examples)
    visible = [images.tokens - count for count in masked]
    sequences = _sequences(config, examples, images, with_understanding, visible)
    starts = itertools.accumulate((count + buffers for count in visible), initial=0)
    kind = ReconstructionBatch if with_understanding else TextToImageBatch
    return kind(
        sample_ids=torch.tensor(sample_ids, dtype=torch.int64),
        num_images=len(examples),
        num_tokens=sum(sequences.segments.query_lengths),
        images=images,
        encoding=encoding(config, len(examples) if with_understanding else 0, images.grid, visible),
        sequences=sequences,
        num_masked=masked,
        masked_counts=torch.tensor(masked, dtype=torch.int64),
        canvas_segments=Segments.of([buffers + images.tokens] * len(examples)),
        from_llm=torch.cat(
            [
                start + torch.cat([torch.arange(count, count + buffers), torch.arange(count)])
                for start, count in zip(starts, visible, strict=False)
            ]
        ),
    )


def collate_image_to_text(
    config: HarmonConfig, examples: Sequence[ImageToTextExample], sample_ids: Sequence[int]
) -> ImageToTextBatch:
    """One microbatch of dialogues, packed; each predicts the labelled tokens from the rows before them."""
    images = _images(examples)
    image_rows = images.tokens + config.mar.buffer_size
    lengths, queries, chosen, labels = list[int](), list[Tensor](), list[Tensor](), list[int]()
    start = read = 0
    for example in examples:
        length = len(example.token_ids) + image_rows
        # the row before a labelled token predicts it; tokens after the image lie image_rows later
        predicting = [
            (index + (image_rows if index >= config.image_index else 0) - 1, label)
            for index, label in enumerate(example.labels)
            if label != IGNORED and index > 0
        ]
        first = predicting[0][0] if predicting else length
        queries.append(torch.arange(start + first, start + length))
        chosen.append(torch.tensor([read + row - first for row, _ in predicting], dtype=torch.int64))
        labels += [label for _, label in predicting]
        lengths.append(length)
        start, read = start + length, read + length - first
    suffix = Segments.of([len(rows) for rows in queries], lengths, is_causal=True)
    sequences = _sequences(
        config, examples, images, True, None, Readout(torch.cat(queries), suffix, torch.cat(chosen))
    )
    return ImageToTextBatch(
        sample_ids=torch.tensor(sample_ids, dtype=torch.int64),
        num_images=len(examples),
        num_tokens=sum(lengths),
        images=images,
        encoding=encoding(config, len(examples), images.grid),
        sequences=sequences,
        labels=torch.tensor(labels, dtype=torch.int64),
    )


def encoding(
    config: HarmonConfig, num_whole: int, grid: tuple[int, int], visible: Sequence[int] = ()
) -> Encoding:
    """Rows of the encoder for whole images, then for images of which so many tokens are visible."""
    tokens, buffers = grid[0] * grid[1], config.mar.buffer_size
    own = [torch.arange(tokens * index, tokens * (index + 1)) for index in range(num_whole)]
    return Encoding(
        whole=encoder_rows(buffers, own),
        segments=Segments.of([buffers + count for count in (*[tokens] * num_whole, *visible)]),
        passes=(UNDERSTANDING,) * (num_whole > 0) + (VISIBLE,) * (len(visible) > 0),
    )


def _images(examples: Sequence[GenerationExample | ImageToTextExample]) -> Images:
    grids = {example.grid for example in examples}
    if len(grids) != 1:
        raise ValueError(f"collate: the images of a microbatch must have one size, got grids {sorted(grids)}")
    kind: TargetKind = "pixels" if examples[0].image.ndim == 3 else "latents"
    return Images(kind, torch.stack([example.image for example in examples]), examples[0].grid)


def _sequences(
    config: HarmonConfig,
    examples: Sequence[GenerationExample | ImageToTextExample],
    images: Images,
    with_understanding: bool,
    visible: Sequence[int] | None,
    readout: Readout | None = None,
) -> Sequences:
    """Rows of every sequence; without a readout its last rows, which are generated, are read."""
    buffers, count = config.mar.buffer_size, len(examples)
    seen = images.tokens + buffers if with_understanding else 0
    num_text = sum(len(example.token_ids) for example in examples)
    # the encoder puts buffers first, the language model reads them last
    shown = torch.cat([torch.arange(buffers, seen), torch.arange(buffers)]) if seen else torch.arange(0)
    rows, lengths, generated_lengths = list[Tensor](), list[int](), list[int]()
    text, generated = 0, num_text + count * seen
    for index, example in enumerate(examples):
        ids = torch.arange(text, text + len(example.token_ids))
        own = buffers + visible[index] if visible is not None else 0
        tail = generated + torch.cat([torch.arange(buffers, own), torch.arange(buffers)]) if own else ids[:0]
        split = config.image_index if seen else len(ids)
        rows += [ids[:split], num_text + index * seen + shown, ids[split:], tail]
        lengths.append(len(ids) + seen + own)
        generated_lengths.append(own)
        text, generated = text + len(ids), generated + own
    if readout is None:
        ends = itertools.accumulate(lengths)
        queries = [torch.arange(end - own, end) for end, own in zip(ends, generated_lengths, strict=True)]
        readout = Readout(torch.cat(queries), Segments.of(generated_lengths, lengths, is_causal=True))
    return Sequences(
        token_ids=torch.tensor([i for example in examples for i in example.token_ids], dtype=torch.int64),
        rows=torch.cat(rows),
        positions=torch.cat([torch.arange(length) for length in lengths]),
        segments=Segments.of(lengths, is_causal=True),
        readout=readout,
    )
