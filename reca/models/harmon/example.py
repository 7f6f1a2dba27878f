"""A microbatch of typical size without data or tokenizer, for planning."""

from __future__ import annotations

import math

import torch

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

_PROMPT = 29  # ids of an instruction of 24 tokens in its turn
_QUESTION, _ANSWER = 103, 150  # ids of a LLaVA dialogue
_MASKED = 0.867  # mean of the law that mask ratios are drawn from


def example(variant: Variant, task: str, num_samples: int) -> GenerationBatch | ImageToTextBatch:
    """`num_samples` images with 86.7 % of their tokens masked, or dialogues of 253 ids with 150 answered."""
    config: HarmonConfig = variant.config
    side = variant.target.max_size
    image, latents = torch.zeros(3, side, side), side // config.vae.stride
    grid = (latents, latents)
    if task == "image_to_text":
        labels = (*[IGNORED] * _QUESTION, *[0] * _ANSWER)
        dialogue = ImageToTextExample(image, grid, (0,) * len(labels), labels, len(labels))
        return collate_image_to_text(config, [dialogue] * num_samples, range(num_samples))
    masked = math.ceil(_MASKED * latents * latents)
    one = GenerationExample(image, grid, (0,) * _PROMPT, masked, num_tokens=0)
    return collate_generation(
        config, [one] * num_samples, range(num_samples), with_understanding=task == "reconstruction"
    )
