"""What the miniature is trained on: rows of tokens about scenes, perhaps with pictures, of a fixed length.

Rows are padded, not packed: with four cells and a few words a padded row costs less than what packs it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reca.models.family import Variant
from reca.types import Batch, Draws
from reca.world.language import dense_caption, image_rows
from reca.world.render import SIDE
from reca.world.scenes import MAX_OBJECTS, NUM_CELLS


@dataclass(frozen=True, slots=True, kw_only=True)
class MiniatureBatch(Batch):
    """What is given.

    Attributes:
        term: name of the loss term.
        tokens: [n, length] int64, START first, PAD on the right; IMAGE in the places of embeddings.
        pixels: [n, 3, 16, 16] fp32 in about [-1, 1]: what the encoder sees; None for text alone.
        rotation: [dim, dim] orthogonal, applied to the embeddings; None leaves them as they are.
        embeddings: [n, 4, dim] in place of those of the encoder; None takes the encoder's.
    """

    term: str
    tokens: Tensor
    pixels: Tensor | None = None
    rotation: Tensor | None = None
    embeddings: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationBatch(MiniatureBatch):
    """Scenes to be generated from what is given.

    Attributes:
        codes: [n, 4] int64.
        dropout: probability that a sample is trained without what is given, for guidance.
    """

    codes: Tensor
    dropout: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LanguageBatch(MiniatureBatch):
    """Rows to be continued.

    Attributes:
        labels: [n, length] int64, the next token, or -100 where it does not count.
    """

    labels: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderBatch(MiniatureBatch):
    """Pictures to be read cell by cell.

    Attributes:
        codes: [n, 4] int64.
    """

    codes: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class MiniatureDraws(Draws):
    """Random decisions of one microbatch.

    Attributes:
        is_given: [n] bool; False trains without the condition. None where nothing is generated.
        is_masked: [n, 4] bool, cells whose code is hidden and counts (masked generator).
        noise: [n, 4, latent_dim] fp32 (flow generator).
        time: [n] fp32 in [0, 1] (flow generator).
    """

    is_given: Tensor | None = None
    is_masked: Tensor | None = None
    noise: Tensor | None = None
    time: Tensor | None = None


def example(variant: Variant, task: str, num_samples: int) -> MiniatureBatch:
    """`num_samples` pictures, captions or descriptions of three objects, for planning without data."""
    codes = (torch.arange(NUM_CELLS) < MAX_OBJECTS).long().expand(num_samples, -1)
    rows = image_rows(num_samples)
    pixels = torch.zeros(num_samples, 3, SIDE, SIDE)
    common: dict[str, Any] = {
        "sample_ids": torch.arange(num_samples),
        "num_images": num_samples,
        "term": task,
    }
    if task == "image_to_text":
        tokens = torch.cat([rows, dense_caption(codes)[:, 1:]], dim=1)
        return LanguageBatch(
            **common, num_tokens=tokens.numel(), tokens=tokens, pixels=pixels, labels=torch.zeros_like(tokens)
        )
    seen = task == "reconstruction"
    tokens = rows if seen else dense_caption(codes)
    return GenerationBatch(
        **common,
        num_tokens=tokens.numel() + codes.numel(),
        tokens=tokens,
        pixels=pixels if seen else None,
        codes=codes,
        dropout=0.0,
    )
