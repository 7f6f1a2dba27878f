"""The microbatches of Show-o's three tasks, on the CPU; the type of a batch is its task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from reca.models.showo.config import IGNORED, ShowoConfig
from reca.models.showo.sequence import (
    GIVEN,
    IMAGE,
    VISION,
    Block,
    image_to_text,
    reconstruction,
    text_to_image,
)
from reca.models.showo.transformer import Chosen, Layout, Plan
from reca.types import Batch, Draws


@dataclass(frozen=True, slots=True, kw_only=True)
class ShowoBatch(Batch):
    """A microbatch of one task.

    Attributes:
        layout: its rows; see `reca.models.showo.transformer`.
        vision_rows, given_rows, image_rows: [rows] int64, the stored rows of vision embeddings, of codes of
            the images that are given, and of codes to be generated, sample by sample.
        pixels: [samples, 3, height, width] fp32. The images to be generated, in [-1, 1]; for image to text
            those to be understood, as their encoder wants them.
        codes: [samples, codes] int64 of the images to be generated; None has `pixels` encoded.
        given: [samples, codes] int64 of the images that are given; None has them encoded (VQ variants).
    """

    term: ClassVar[str]

    layout: Layout
    vision_rows: Tensor
    given_rows: Tensor
    image_rows: Tensor
    pixels: Tensor
    codes: Tensor | None = None
    given: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskedBatch(ShowoBatch):
    """A microbatch that fills in masked codes.

    Attributes:
        num_masked: masked codes of each sample; drawn while the sample was prepared, so that no shape has to
            be read from the device.
        frame_rows: [2 * samples] int64, rows of the tokens around each image where they are targets too; else
            empty.
        plan: what the rows that predict see.
    """

    num_masked: tuple[int, ...]
    frame_rows: Tensor
    plan: Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class ReconstructionBatch(MaskedBatch):
    """Image in, the same image's masked codes out."""

    term: ClassVar[str] = "reconstruction"


@dataclass(frozen=True, slots=True, kw_only=True)
class TextToImageBatch(MaskedBatch):
    """Caption in, masked codes out."""

    term: ClassVar[str] = "text_to_image"


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageToTextBatch(ShowoBatch):
    """Image and questions in, answers out.

    Attributes:
        chosen: rows from the first that predicts an answer on.
        predicting: [answer tokens] int64, among the chosen rows those that predict an answer token.
        labels: [answer tokens] int64, what they predict.
    """

    term: ClassVar[str] = "image_to_text"

    chosen: Chosen
    predicting: Tensor
    labels: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class ShowoDraws(Draws):
    """The random decisions of a microbatch.

    Attributes:
        masked: [sum of num_masked] int64, masked codes as sample * num_codes + position, sample by sample.
    """

    masked: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskedExample:
    """One prepared sample of a masked task.

    Attributes:
        text: ids of the instruction or caption; empty if dropped.
        pixels: [3, resolution, resolution] fp32 in [-1, 1].
        num_masked: codes to be masked, at least 1.
        is_reconstruction: whether the image is given as well.
        codes, given: [codes] int64 of the image, and of the image given, where a cache has them.
    """

    text: tuple[int, ...]
    pixels: Tensor
    num_masked: int
    is_reconstruction: bool
    num_tokens: int
    codes: Tensor | None = None
    given: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatExample:
    """One prepared sample of image to text.

    Attributes:
        chat: ids of the conversation.
        labels: of the same length, IGNORED where no answer stands; the first must be.
        pixels: [3, height, width] fp32, as the understanding encoder wants them.
        given: [codes] int64 of the image, where a cache has them (VQ variants).
    """

    chat: tuple[int, ...]
    labels: tuple[int, ...]
    pixels: Tensor
    num_tokens: int
    given: Tensor | None = None

    def trimmed(self) -> tuple[int, ...]:
        """The conversation up to the last token that predicts an answer."""
        last = max((i for i, label in enumerate(self.labels) if label != IGNORED), default=0)
        return self.chat[:last]


def collate_masked(
    config: ShowoConfig,
    examples: Sequence[MaskedExample],
    sample_ids: Sequence[int],
    *,
    text_length: int | None = None,
    is_complete: bool = False,
) -> ReconstructionBatch | TextToImageBatch:
    """One microbatch of reconstructions or of captions, in this order.

    Args:
        text_length: text positions of captions; None takes those of training.
        is_complete: with all rows of the official sequence.

    Raises: ValueError if there are no examples, ids do not match them, or both tasks are among them.
    """
    _check(examples, sample_ids)
    is_reconstruction = examples[0].is_reconstruction
    if any(example.is_reconstruction != is_reconstruction for example in examples):
        raise ValueError("collate: a microbatch has one task, got reconstruction and text to image together")
    samples = [
        reconstruction(config, example.text, is_complete=is_complete)
        if is_reconstruction
        else text_to_image(config, example.text, length=text_length, is_complete=is_complete)
        for example in examples
    ]
    layout = Layout.of(samples)
    image_block = [next(i for i, b in enumerate(blocks) if IMAGE in b.ids) for blocks in samples]
    frames = []
    for sample, block in enumerate(image_block):
        start = layout.start(sample, block)
        frames += [start, start + samples[sample][block].rows - 1]
    num_frames = 0 if is_reconstruction else 2
    queries = [
        (example.num_masked + num_frames, layout.seen_by(sample, block), False)
        for sample, (example, block) in enumerate(zip(examples, image_block, strict=True))
    ]
    kind = ReconstructionBatch if is_reconstruction else TextToImageBatch
    return kind(
        sample_ids=torch.tensor(sample_ids, dtype=torch.int64),
        num_images=len(examples),
        num_tokens=sum(layout.lengths),
        layout=layout,
        vision_rows=rows_with(VISION, samples, layout),
        given_rows=rows_with(GIVEN, samples, layout),
        image_rows=rows_with(IMAGE, samples, layout),
        pixels=torch.stack([example.pixels for example in examples]),
        codes=_stack([example.codes for example in examples]),
        given=_stack([example.given for example in examples]),
        num_masked=tuple(example.num_masked for example in examples),
        frame_rows=torch.tensor([] if is_reconstruction else frames, dtype=torch.int64),
        plan=Plan.of(layout.lengths, queries),
    )


def collate_chats(
    config: ShowoConfig,
    examples: Sequence[ChatExample],
    sample_ids: Sequence[int],
    *,
    is_complete: bool = False,
) -> ImageToTextBatch:
    """One microbatch of conversations, in this order. One without any answer adds nothing to the loss.

    With `is_complete` all rows of the official sequence are there, and none is chosen.

    Raises: ValueError if there are no examples, ids do not match them, or a first token is an answer.
    """
    _check(examples, sample_ids)
    if any(example.labels and example.labels[0] != IGNORED for example in examples):
        raise ValueError("collate: a conversation starts with a question, so its first label must be ignored")
    samples = [
        image_to_text(config, example.chat if is_complete else example.trimmed(), is_complete=is_complete)
        for example in examples
    ]
    layout = Layout.of(samples)
    rows, predicting, labels, queries = list[int](), list[int](), list[int](), []
    for sample, (example, blocks) in enumerate(zip(examples, samples, strict=True)):
        answers = [(i, label) for i, label in enumerate(example.labels) if label != IGNORED]
        if is_complete or not answers:
            continue
        block = len(blocks) - 1
        # token i is predicted by the row before it; with a vision encoder the block starts with one more row
        shift = blocks[block].rows - len(example.trimmed())
        first, stop = answers[0][0] - 1 + shift, answers[-1][0] + shift
        predicting += [len(rows) + index - 1 + shift - first for index, _ in answers]
        labels += [label for _, label in answers]
        rows += range(layout.start(sample, block) + first, layout.start(sample, block) + stop)
        queries.append((stop - first, layout.seen_by(sample, block), True))
    return ImageToTextBatch(
        sample_ids=torch.tensor(sample_ids, dtype=torch.int64),
        num_images=0,
        num_tokens=sum(layout.lengths),
        layout=layout,
        vision_rows=rows_with(VISION, samples, layout),
        given_rows=rows_with(GIVEN, samples, layout),
        image_rows=rows_with(IMAGE, samples, layout),
        pixels=torch.stack([example.pixels for example in examples]),
        given=_stack([example.given for example in examples]),
        chosen=Chosen(torch.tensor(rows, dtype=torch.int64), Plan.of(layout.lengths, queries)),
        predicting=torch.tensor(predicting, dtype=torch.int64),
        labels=torch.tensor(labels, dtype=torch.int64),
    )


def rows_with(token: int, samples: Sequence[Sequence[Block]], layout: Layout) -> Tensor:
    """[rows] int64: stored rows that hold `token`, sample by sample."""
    rows: list[int] = []
    for sample, blocks in enumerate(samples):
        for index, block in enumerate(blocks):
            if token in block.ids:
                start = layout.start(sample, index)
                rows += [start + row for row, entry in enumerate(block.ids) if entry == token]
    return torch.tensor(rows, dtype=torch.int64)


def _check(examples: Sequence[object], sample_ids: Sequence[int]) -> None:
    if not examples or len(examples) != len(sample_ids):
        raise ValueError(f"collate: expected one id per example, got {len(examples)} and {len(sample_ids)}")


def _stack(codes: Sequence[Tensor | None]) -> Tensor | None:
    """Codes of all samples, or None unless all have them."""
    known = [entry for entry in codes if entry is not None]
    return torch.stack(known) if len(known) == len(codes) else None
