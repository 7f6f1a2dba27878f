"""Harmon's samples: images and texts to sequences, what is labelled, and what is refused."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from reca.errors import ConfigError
from reca.images import ImageRejected
from reca.models.harmon.batch import GenerationExample, collate_generation
from reca.models.harmon.config import VARIANTS, HarmonConfig, MarConfig
from reca.models.harmon.processor import HarmonProcessor, mask_ratio, padded, stretched
from reca.randomness import RandomSource

VARIANT = VARIANTS["tiny"]
TINY: HarmonConfig = VARIANT.config
RANDOM = RandomSource(seed=3, step=7)
IDS = [11, 4, 900]
TEXTS: dict[str, list[Any]] = {
    "reconstruction": ["describe", None, "what is to be seen in it?"],
    "text_to_image": ["a cat", None, "a dog on grass"],
    "image_to_text": [[("what?", "a cat"), ("and?", "a dog")], [("<image>\nwhy", "because")], [("a", "b")]],
}


def photographs() -> list[Image.Image]:
    generator = np.random.default_rng(0)
    sizes = [(48, 64), (40, 40), (64, 33)]
    return [Image.fromarray(generator.integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in sizes]


def examples(task: str) -> tuple[HarmonProcessor, list[Any]]:
    processor = HarmonProcessor(VARIANT, task=task)
    samples = zip(photographs(), TEXTS[task], IDS, strict=True)
    return processor, [processor.prepare(image, text, RANDOM, i) for image, text, i in samples]


def tiny_batch(task: str = "reconstruction") -> Any:
    processor, prepared = examples(task)
    return processor.collate(prepared, IDS)


def test_what_an_example_counts_is_what_its_sequence_holds() -> None:
    for task in TEXTS:
        _, prepared = examples(task)
        batch = tiny_batch(task)
        lengths = batch.sequences.segments.query_lengths
        assert lengths == tuple(example.num_tokens for example in prepared)
        assert batch.num_tokens == sum(lengths)


def test_the_mask_ratio_is_a_truncated_normal() -> None:
    draws = np.array([mask_ratio((i + 0.5) / 4000, 0.7) for i in range(4000)])
    assert draws.min() >= 0.7 and draws.max() <= 1.0 and (np.diff(draws) > 0).all()
    # density at 0.7 over density at 1: exp(-(0.3 / 0.25)^2 / 2)
    low, high = ((draws < 0.71).mean(), (draws > 0.99).mean())
    assert low / high == pytest.approx(math.exp(-(1.2**2) / 2), rel=0.06)
    assert draws.mean() == pytest.approx(0.867, abs=5e-4)


def test_images_of_one_microbatch_must_have_one_size() -> None:
    one = GenerationExample(torch.zeros(64, 16), (8, 8), (5,) * 7, 60, 0)
    other = GenerationExample(torch.zeros(16, 16), (4, 4), (5,) * 7, 12, 0)
    with pytest.raises(ValueError, match=r"one size, got grids \[\(4, 4\), \(8, 8\)\]"):
        collate_generation(TINY, [one, other], [1, 2], with_understanding=True)


def test_dialogues_label_answers_and_their_ends() -> None:
    _, prepared = examples("image_to_text")
    two_turns = prepared[0]
    labelled = [label for label in two_turns.labels if label != -100]
    end = TINY.special.im_end
    assert labelled == [*b"a cat", end, *b"a dog", end]
    # the last label is predicted, and never read
    assert len(two_turns.labels) == len(two_turns.token_ids) + 1
    text = bytes(i for i in two_turns.token_ids if i < 256)
    assert text.startswith(b"user\n\nwhat?\nassistant\na cat\nuser\nand?")
    assert b"<image>" not in bytes(i for i in prepared[1].token_ids if i < 256)


def test_a_dialogue_without_an_answer_in_reach_is_rejected() -> None:
    processor = HarmonProcessor(VARIANT, task="image_to_text")
    with pytest.raises(ImageRejected, match="no answer within 1472 tokens"):
        processor.prepare(photographs()[0], [("x" * 1600, "y")], RANDOM, 1)


def test_a_dropped_instruction_changes_the_words_and_keeps_the_image() -> None:
    _, prepared = examples("reconstruction")
    texts = [bytes(i for i in example.token_ids if i < 256) for example in prepared]
    assert texts[0].startswith(b"user\n\ndescribe")
    assert texts[1].startswith(b"user\nGenerate an image.")
    lengths = tiny_batch().sequences.segments.query_lengths
    assert min(lengths) > 64 + 4


def test_long_instructions_are_cut() -> None:
    processor = HarmonProcessor(VARIANT)
    assert len(processor.prepare(photographs()[0], "x" * 500, RANDOM, 1).token_ids) == 127


def test_pictures_are_stretched_to_generate_and_padded_to_understand() -> None:
    wide = Image.new("RGB", (40, 20), (10, 200, 30))
    assert stretched(wide).size == padded(wide).size == (40, 40)
    assert stretched(wide).getpixel((20, 1)) == (10, 200, 30)
    assert padded(wide).getpixel((20, 1)) == (127, 127, 127)
    assert padded(wide).getpixel((20, 20)) == (10, 200, 30)


def test_wrong_pixels_and_tasks_are_refused() -> None:
    with pytest.raises(ConfigError, match="unknown task 'reconstuction'; did you mean 'reconstruction'"):
        HarmonProcessor(VARIANT, task="reconstuction")
    native = dataclasses.replace(VARIANT.target, fit="native")
    with pytest.raises(ValueError, match="one square of pixels"):
        HarmonProcessor(dataclasses.replace(VARIANT, target=native))
    coarse = dataclasses.replace(VARIANT.target, stride=32)
    with pytest.raises(ValueError, match="target needs stride 16, got 32"):
        HarmonProcessor(dataclasses.replace(VARIANT, target=coarse, understanding=coarse))
    with pytest.raises(ValueError, match="share one width"):
        MarConfig(48, 2, 4, 32, 2, 4, diffloss_d=2, diffloss_w=64)
