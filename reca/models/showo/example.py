"""A microbatch of typical size without data or tokenizer, for planning."""

from __future__ import annotations

import math

import torch

from reca.models.family import Variant
from reca.models.showo.batch import ChatExample, MaskedExample, ShowoBatch, collate_chats, collate_masked
from reca.models.showo.config import IGNORED, ShowoConfig

_TEXT = 30  # ids of an instruction of 24 tokens in its template
_QUESTION, _ANSWER = 100, 150  # ids of a LLaVA conversation
_MASKED = 2 / math.pi  # mean of the cosine that mask rates are drawn from


def example(variant: Variant, task: str, num_samples: int) -> ShowoBatch:
    """`num_samples` images with 63.7 % of their codes masked, or chats of 250 ids with 150 answered."""
    config: ShowoConfig = variant.config
    ids = range(num_samples)
    if task == "image_to_text":
        side = config.clip.image_size if config.clip else config.resolution
        chat = ChatExample(
            chat=(0,) * (_QUESTION + _ANSWER),
            labels=(*[IGNORED] * _QUESTION, *[0] * _ANSWER),
            pixels=torch.zeros(3, side, side),
            num_tokens=0,
        )
        return collate_chats(config, [chat] * num_samples, ids)
    one = MaskedExample(
        text=(0,) * _TEXT,
        pixels=torch.zeros(3, config.resolution, config.resolution),
        num_masked=max(1, round(_MASKED * config.num_codes)),
        is_reconstruction=task == "reconstruction",
        num_tokens=0,
    )
    return collate_masked(config, [one] * num_samples, ids)
