"""Pictures and descriptions: each depends on its own condition, number and seed, and on nothing else."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from PIL import Image

from reca.errors import ConfigError
from reca.models.family import SampleOptions
from reca.models.miniature.config import VARIANTS
from reca.models.miniature.model import MiniatureModel
from reca.models.miniature.processor import MiniatureProcessor
from reca.models.miniature.sampler import MiniatureSampler, describe, generate, given
from reca.randomness import RandomSource
from reca.world.language import PAD, image_rows, rows_of
from reca.world.render import observe, picture
from reca.world.scenes import NUM_CODES, draw_scenes

OPTIONS = SampleOptions(steps=4, text_guidance=1.5, shift=1.0, seed=3)
SCENES = draw_scenes(RandomSource(0), torch.arange(5))
ROWS = rows_of(["red circle", "ring", "two cross", "circle and ring", "blue diamond southeast"])


@pytest.fixture(scope="module", params=tuple(VARIANTS))
def model(request) -> MiniatureModel:
    torch.manual_seed(1)
    return MiniatureModel(VARIANTS[request.param].config)


def test_a_picture_depends_on_its_own_row_number_and_seed_alone(model):
    whole = generate(model, given(ROWS), OPTIONS)
    assert whole.shape == (5, 4) and int(whole.min()) >= 0 and int(whole.max()) < NUM_CODES
    assert torch.equal(whole[3:], generate(model, given(ROWS[3:]), replace(OPTIONS, first_index=3)))
    assert not torch.equal(whole, generate(model, given(ROWS), replace(OPTIONS, seed=4)))
    assert not torch.equal(whole[3:], generate(model, given(ROWS[3:]), OPTIONS))


def test_padding_changes_no_picture(model):
    padded = torch.cat([ROWS, torch.full((5, 3), PAD)], dim=1)
    assert torch.equal(generate(model, given(ROWS), OPTIONS), generate(model, given(padded), OPTIONS))


def test_guidance_of_zero_hears_nothing_and_of_one_is_the_model_itself(model):
    blind = replace(OPTIONS, text_guidance=0.0)
    numbers = torch.full((5, 1), 5)
    one = generate(model, given(ROWS), blind)
    other = generate(model, given(torch.cat([ROWS[:, :1], numbers], dim=1)), blind)
    assert torch.equal(one, other)
    plain = generate(model, given(ROWS), replace(OPTIONS, text_guidance=1.0))
    assert not torch.equal(plain, one)


def test_a_sure_masked_generator_fills_in_what_it_says():
    torch.manual_seed(1)
    model = MiniatureModel(VARIANTS["masked"].config)
    with torch.no_grad():
        model.generator.head.weight.zero_()
        model.generator.head.bias.fill_(-50.0)
        model.generator.head.bias[[3, 8]] = 0.0
    codes = generate(model, given(ROWS.repeat(200, 1)), replace(OPTIONS, text_guidance=1.0))
    assert set(codes.unique().tolist()) == {3, 8}
    assert abs(float((codes == 3).float().mean()) - 0.5) < 0.03


def test_a_perfect_velocity_reaches_the_codes_from_any_noise():
    torch.manual_seed(1)
    model = MiniatureModel(VARIANTS["flow"].config)
    generator = model.generator
    clean = generator.tokenizer.encode(SCENES)

    def towards(latents, time, memory, is_visible):
        return (latents - clean) / time[:, None, None]

    generator.forward = towards  # type: ignore[method-assign]
    options = replace(OPTIONS, text_guidance=1.0)
    assert torch.equal(generate(model, given(ROWS), options), SCENES)


def test_a_description_is_the_same_with_other_rows_beside_it(model):
    pixels = observe(SCENES, RandomSource(0), torch.arange(5))
    said = describe(model, given(image_rows(5), pixels))
    assert torch.equal(said[2:3], describe(model, given(image_rows(1), pixels[2:3])))
    texts = describe(model, given(ROWS))
    assert torch.equal(texts[:2], describe(model, given(ROWS[:2])))


def test_the_sampler_draws_prompts_and_reconstructs_pictures(model):
    sampler = MiniatureSampler(model, VARIANTS[model.config.generator])
    drawn = sampler.text_to_image(["red circle", "ring northwest"], (32, 48), OPTIONS)
    assert [image.size for image in drawn] == [(48, 32)] * 2
    seen = [picture(scene) for scene in SCENES]
    assert len(sampler.reconstruct(seen, [""] * 5, OPTIONS)) == 5
    assert sampler.understand(seen).shape == (5, model.config.dim)
    with pytest.raises(ConfigError, match="no word 'dog'"):
        sampler.text_to_image(["dog"], (32, 32), OPTIONS)
    with pytest.raises(ConfigError, match="cannot edit"):
        sampler.edit(seen, [""] * 5, OPTIONS)


def test_pictures_from_files_are_read_back_as_their_codes():
    processor = MiniatureProcessor(VARIANTS["masked"])
    images = [picture(scene) for scene in SCENES]
    examples = [processor.prepare(image, None, RandomSource(0), i) for i, image in enumerate(images)]
    batch = processor.collate(examples, range(5))
    assert torch.equal(batch.codes, SCENES)
    assert batch.pixels is not None and batch.pixels.shape == (5, 3, 16, 16)
    assert isinstance(images[0], Image.Image) and batch.num_images == 5
