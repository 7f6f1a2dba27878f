"""A microbatch of typical size without data or tokenizer, for planning."""

from __future__ import annotations

import torch

from reca.models.family import Variant
from reca.models.openuni.batch import OpenUniBatch, OpenUniExample, collate
from reca.models.openuni.config import OpenUniConfig

_BEFORE, _AFTER = 4, 34  # tokens of the turns around the image and an instruction of 24 tokens


def example(variant: Variant, task: str, num_samples: int) -> OpenUniBatch:
    """`num_samples` images, each with an instruction or a caption of 24 tokens."""
    config: OpenUniConfig = variant.config
    side, image = variant.target.max_size, (config.special.image,) * config.vision.num_embeddings
    text = 1 if config.special.image == 0 else 0
    is_reconstruction = task == "reconstruction"
    ids = (*[text] * _BEFORE, *(image if is_reconstruction else ()), *[text] * _AFTER)
    one = OpenUniExample(
        task="reconstruction" if is_reconstruction else "text_to_image",
        prompt_ids=ids,
        pixels=torch.zeros(3, side, side),
        num_tokens=len(ids) + config.num_queries + (side // config.autoencoder.stride) ** 2,
    )
    return collate(config, [one] * num_samples, range(num_samples))
