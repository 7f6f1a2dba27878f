"""Janus-Pro's sampler: the official run, the likelihood of training, pictures that ignore their batch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from reca.errors import ConfigError
from reca.images import to_tensor
from reca.layers.segments import Segments
from reca.models.family import SampleOptions
from reca.models.janus import FAMILY
from reca.models.janus.batch import GenerationExample, collate_generation
from reca.models.janus.config import VARIANTS, JanusConfig
from reca.models.janus.model import JanusModel
from reca.models.janus.sampler import JanusSampler, embed_prompts, generate
from reca.models.parity import compare, read_pack
from reca.randomness import RandomSource

PACKS = Path(__file__).resolve().parents[1] / "data" / "parity" / "janus"
VARIANT = VARIANTS["tiny"]
CONFIG: JanusConfig = VARIANT.config
SIZE = (CONFIG.image_size, CONFIG.image_size)
OPTIONS = SampleOptions(text_guidance=3.0, seed=5)


@pytest.fixture(scope="module")
def model() -> JanusModel:
    torch.manual_seed(0)
    return JanusModel(CONFIG)


@pytest.fixture(scope="module")
def sampler(model: JanusModel) -> JanusSampler:
    return JanusSampler(model, VARIANT)


def photographs() -> list[Image.Image]:
    generator = np.random.default_rng(0)
    sizes = [(48, 64), (40, 40), (64, 33)]
    return [Image.fromarray(generator.integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in sizes]


def bits(images: list[Image.Image]) -> list[bytes]:
    return [image.tobytes() for image in images]


@pytest.mark.parity
def test_the_official_run_conditioned_on_an_image_is_reproduced() -> None:
    pack = read_pack(PACKS / "generate_recon")
    result = compare(pack, FAMILY.reproduce(pack))
    assert result.failures == ()
    assert result.not_formed == {}


def test_the_likelihood_of_the_codes_is_that_of_training(model: JanusModel, sampler: JanusSampler) -> None:
    pad = sampler.tokenizer.special.pad
    prompt = sampler.tokenizer.reconstruction("Describe it.")
    pixels = to_tensor(photographs()[0], VARIANT.target)
    with torch.no_grad():
        seen = model.aligner(model.vision(pixels[None], Segments.of([CONFIG.vision.num_tokens])))
        rows = embed_prompts(model, prompt, seen, pad, guided=False)
        generated = generate(model, rows, 1.0, None)
        example = GenerationExample(
            prompt=prompt, pixels=pixels, num_tokens=0, is_reconstruction=True, codes=generated.codes
        )
        batch = collate_generation(CONFIG, pad, [example], [0])
        loss = model(batch, model.draw(batch, RandomSource(0)))["reconstruction"]
    expected = F.cross_entropy(generated.logits, generated.codes, reduction="sum")
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)


def test_guidance_moves_the_logits_away_from_the_hidden_prompt(
    model: JanusModel, sampler: JanusSampler
) -> None:
    pad, prompt = sampler.tokenizer.special.pad, sampler.tokenizer.text_to_image("A red cube.")
    hidden = (prompt[0], *[pad] * (len(prompt) - 2), prompt[-1])
    with torch.no_grad():
        both = embed_prompts(model, prompt, None, pad, guided=True)
        first = [
            generate(model, rows, scale, None).logits[0]
            for rows, scale in (
                (both, 3.0),
                (embed_prompts(model, prompt, None, pad, guided=False), 3.0),
                (embed_prompts(model, hidden, None, pad, guided=False), 3.0),
            )
        ]
    assert len(both) == 2
    torch.testing.assert_close(first[0], first[2] + 3.0 * (first[1] - first[2]), rtol=1e-4, atol=1e-5)


def test_codes_are_drawn_from_the_softmax_of_their_logits(model: JanusModel) -> None:
    with torch.no_grad():
        rows = embed_prompts(model, [256, 1, 259], None, 258, guided=False)
        greedy = generate(model, rows, 1.0, None)
        chances = greedy.logits[0].softmax(dim=-1).cumsum(dim=-1)
        for code in (0, 1, 77, CONFIG.vq.num_embeddings - 1):
            below = chances[code - 1] if code else torch.tensor(0.0)
            inside = (below + chances[code]) / 2
            drawn = generate(model, rows, 1.0, inside.expand(CONFIG.num_codes))
            assert drawn.codes[0] == code


def test_a_picture_depends_on_seed_and_number_and_not_on_its_batch(sampler: JanusSampler) -> None:
    prompts = ["a cat", "a dog", "a cat"]
    whole = bits(sampler.text_to_image(prompts, SIZE, OPTIONS))
    parts = bits(sampler.text_to_image(prompts[:1], SIZE, OPTIONS)) + bits(
        sampler.text_to_image(prompts[1:], SIZE, replace(OPTIONS, first_index=1))
    )
    assert whole == parts
    assert whole[0] != whole[2]
    assert whole != bits(sampler.text_to_image(prompts, SIZE, replace(OPTIONS, seed=6)))


def test_reconstructions_follow_their_image_at_the_size_of_the_model(sampler: JanusSampler) -> None:
    images = photographs()
    pictures = sampler.reconstruct(images[:2], ["Repeat."] * 2, OPTIONS)
    assert {picture.size for picture in pictures} == {SIZE}
    swapped = sampler.reconstruct(images[1::-1], ["Repeat."] * 2, OPTIONS)
    assert bits(pictures)[0] != bits(swapped)[0]


def test_understanding_is_the_mean_of_the_aligned_embeddings(
    model: JanusModel, sampler: JanusSampler
) -> None:
    images = photographs()
    pooled = sampler.understand(images)
    assert pooled.shape == (3, CONFIG.text.hidden_size) and pooled.dtype == torch.float32
    pixels = torch.stack([to_tensor(image, VARIANT.understanding) for image in images])
    with torch.no_grad():
        embedded = model.aligner(model.vision(pixels, Segments.of([CONFIG.vision.num_tokens] * 3)))
    torch.testing.assert_close(pooled, embedded.unflatten(0, (3, -1)).mean(dim=1), rtol=1e-5, atol=1e-6)
    assert sampler.understand([]).shape == (0, CONFIG.text.hidden_size)


def test_mixed_precision_is_entered_by_the_sampler_itself() -> None:
    torch.manual_seed(0)
    mixed = JanusModel(CONFIG)
    for part in (mixed.vision, mixed.aligner):
        part.to(torch.bfloat16)
    sampler = JanusSampler(mixed, VARIANT)
    picture = sampler.reconstruct(photographs()[:1], ["Repeat."], OPTIONS)[0]
    assert picture.size == SIZE


def test_what_janus_cannot_do_is_said(sampler: JanusSampler) -> None:
    with pytest.raises(ConfigError, match="Janus-Pro cannot edit"):
        sampler.edit(photographs()[:1], ["make it blue"], OPTIONS)
    with pytest.raises(ConfigError, match="picture of 64x32: Janus-Pro makes 32x32 pixels only"):
        sampler.text_to_image(["a cat"], (64, 32), OPTIONS)
