"""A microbatch of typical size without data or tokenizer, for planning."""

from __future__ import annotations

import torch

from reca.models.family import Variant
from reca.models.janus.batch import (
    ChatExample,
    GenerationExample,
    JanusBatch,
    collate_chats,
    collate_generation,
)
from reca.models.janus.config import IGNORED, JanusConfig
from reca.models.janus.tokenizer import IMAGE

_BEFORE, _TEXT = 5, 26  # tokens before the image; an instruction of 24 with what frames it
_QUESTION, _ANSWER = 100, 150  # tokens of a LLaVA conversation


def example(variant: Variant, task: str, num_samples: int) -> JanusBatch:
    """`num_samples` images with an instruction of 24 tokens, or conversations of 250 with 150 answered."""
    config: JanusConfig = variant.config
    pixels = torch.zeros(3, config.image_size, config.image_size)
    seen, ids = (0,) * _BEFORE + (IMAGE,) * config.vision.num_tokens, range(num_samples)
    if task == "image_to_text":
        asked = (*seen, *[0] * _QUESTION)
        labels = (*[IGNORED] * len(asked), *[0] * _ANSWER)
        chat = ChatExample(ids=(*asked, *[0] * _ANSWER), labels=labels, pixels=pixels)
        return collate_chats(config, 0, [chat] * num_samples, ids)
    is_reconstruction = task == "reconstruction"
    prompt = (*(seen if is_reconstruction else seen[:_BEFORE]), *[0] * _TEXT)
    one = GenerationExample(prompt=prompt, pixels=pixels, num_tokens=0, is_reconstruction=is_reconstruction)
    return collate_generation(config, 0, [one] * num_samples, ids)
