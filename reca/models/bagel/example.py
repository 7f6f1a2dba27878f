"""A microbatch of typical size without data or tokenizer, for planning."""

from __future__ import annotations

import torch

from reca.models.bagel.batch import BagelBatch, BagelExample, collate
from reca.models.bagel.config import BagelConfig
from reca.models.family import Variant

_TEXT = 24  # tokens of an instruction


def example(variant: Variant, task: str, num_samples: int) -> BagelBatch:
    """`num_samples` square images of the largest size, each with an instruction of 24 tokens."""
    config: BagelConfig = variant.config
    patch, seen, side = config.vision.patch_size, variant.understanding.max_size, variant.target.max_size
    patches, latents = seen // patch, side // config.latent_stride
    one = BagelExample(
        patches=torch.zeros(patches * patches, 3 * patch * patch),
        patch_grid=(patches, patches),
        text_ids=(0,) * _TEXT,
        target=torch.zeros(3, side, side),
        latent_grid=(latents, latents),
    )
    return collate(config, [one] * num_samples, range(num_samples))
