"""Pictures of scenes from files, as any folder of images: what the ordinary recipes and tools need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from reca.images import to_tensor
from reca.models.family import Variant
from reca.models.miniature.batch import GenerationBatch
from reca.randomness import RandomSource
from reca.types import Text
from reca.world.language import image_rows
from reca.world.render import CELL, glyphs
from reca.world.scenes import NUM_CELLS

_DROPOUT = 0.1


@dataclass(frozen=True, slots=True)
class MiniatureExample:
    """One picture.

    Attributes:
        pixels: [3, 16, 16] fp32 in [-1, 1].
        codes: [4] int64, of the nearest pictures of cells.
    """

    pixels: Tensor
    codes: Tensor

    @property
    def num_tokens(self) -> int:
        """Rows of the trunk and of the generation expert."""
        return 1 + 2 * NUM_CELLS


class MiniatureProcessor:
    """Pictures -> batches of reconstruction; implements `reca.types.Processor`.

    Args:
        variant: what it prepares for.
        folder: of the weights; nothing is read there.
        task: reconstruction, the only one that pictures alone can teach.
    """

    def __init__(self, variant: Variant, folder: Path | None = None, task: str = "reconstruction") -> None:
        self.variant, self.task = variant, task

    def prepare(
        self, image: Image.Image, text: Text, random: RandomSource, sample_id: int
    ) -> MiniatureExample:
        """Shrink one RGB image and read its cells; the miniature takes no instruction beside a picture."""
        pixels = to_tensor(image, self.variant.understanding)
        cells = pixels.view(3, 2, CELL, 2, CELL).permute(1, 3, 0, 2, 4).reshape(NUM_CELLS, -1)
        return MiniatureExample(pixels, torch.cdist(cells, glyphs(CELL).flatten(1)).argmin(dim=1))

    def collate(self, examples: Sequence[MiniatureExample], sample_ids: Sequence[int]) -> GenerationBatch:
        """One microbatch, in this order."""
        return GenerationBatch(
            sample_ids=torch.tensor(sample_ids),
            num_images=len(examples),
            num_tokens=sum(example.num_tokens for example in examples),
            term=self.task,
            tokens=image_rows(len(examples)),
            pixels=torch.stack([example.pixels for example in examples]),
            codes=torch.stack([example.codes for example in examples]),
            dropout=_DROPOUT,
        )
