"""OpenUni's sampler: the official runs, guidance, pictures that ignore their batch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from reca.errors import ConfigError
from reca.models.family import SampleOptions
from reca.models.openuni.config import VARIANTS
from reca.models.openuni.model import OpenUniModel
from reca.models.openuni.parity_sampling import reproduce_sampler
from reca.models.openuni.sampler import OpenUniSampler, time_grid
from reca.models.parity import compare, read_pack

PACKS = Path(__file__).resolve().parents[1] / "data" / "parity" / "openuni"
VARIANT = VARIANTS["tiny"]
OPTIONS = SampleOptions(steps=4, text_guidance=3.0, seed=6)


@pytest.fixture(scope="module")
def model() -> OpenUniModel:
    torch.manual_seed(0)
    return OpenUniModel(VARIANT.config)


@pytest.fixture(scope="module")
def sampler(model: OpenUniModel) -> OpenUniSampler:
    return OpenUniSampler(model, VARIANT)


def photographs() -> list[Image.Image]:
    generator = np.random.default_rng(0)
    sizes = [(48, 64), (40, 40), (64, 33)]
    return [Image.fromarray(generator.integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in sizes]


def pixels(images: list[Image.Image]) -> list[bytes]:
    return [image.tobytes() for image in images]


@pytest.mark.parity
def test_the_official_run_is_reproduced() -> None:
    pack = read_pack(PACKS / "generate_recon")
    result = compare(pack, reproduce_sampler(pack))
    assert result.failures == ()
    assert not result.not_formed


def test_the_grid_starts_a_thousandth_below_noise_before_the_shift_and_ends_at_data() -> None:
    grid = time_grid(20, 3.0)
    assert grid.shape == (21,)
    assert float(grid[0]) == pytest.approx(3 * 0.999 / (1 + 2 * 0.999))
    assert float(grid[-1]) == 0
    assert bool((grid.diff() < 0).all())


def test_a_picture_depends_on_its_prompt_its_number_and_the_seed_alone(sampler: OpenUniSampler) -> None:
    together = pixels(sampler.text_to_image(["a", "b", "c"], (64, 32), OPTIONS))
    for index, prompt in enumerate("abc"):
        alone = sampler.text_to_image([prompt], (64, 32), replace(OPTIONS, first_index=index))
        assert pixels(alone) == [together[index]]
    others = pixels(sampler.text_to_image(["a"], (64, 32), replace(OPTIONS, seed=7)))
    assert len({*together, *others}) == 4


def test_a_reconstruction_has_the_size_of_training_and_sees_the_image(sampler: OpenUniSampler) -> None:
    made = sampler.reconstruct(photographs(), ["Keep it."] * 3, OPTIONS)
    assert {image.size for image in made} == {(64, 64)}
    again = sampler.reconstruct(photographs()[:1] * 2, ["Keep it.", "Change it."], OPTIONS)
    assert pixels(again)[0] == pixels(made)[0] != pixels(again)[1]
    assert pixels(sampler.edit(photographs(), ["Keep it."] * 3, OPTIONS)) == pixels(made)


def test_a_guidance_scale_of_one_runs_one_pass_and_the_prompt_runs_once(
    model: OpenUniModel, sampler: OpenUniSampler
) -> None:
    sizes: list[int] = []
    prompts: list[int] = []
    handles = [
        model.sana.register_forward_pre_hook(lambda _, arguments: sizes.append(len(arguments[0]))),
        model.projector.register_forward_pre_hook(lambda _, arguments: prompts.append(len(arguments[0]))),
    ]
    sampler.text_to_image(["a"], (32, 32), replace(OPTIONS, text_guidance=1.0))
    sampler.text_to_image(["a"], (32, 32), OPTIONS)
    sampler.text_to_image(["a"], (32, 32), replace(OPTIONS, guidance_interval=(0.0, 0.9)))
    for handle in handles:
        handle.remove()
    assert sizes == [1, 1, 1, 2, 2, 2, 1, 2, 2]
    assert prompts == [2 * VARIANT.config.num_queries] * 3


def test_understanding_is_one_row_per_image(sampler: OpenUniSampler) -> None:
    rows = sampler.understand(photographs())
    assert rows.shape == (3, VARIANT.config.llm.hidden_size) and rows.dtype == torch.float32
    assert torch.equal(sampler.understand(photographs()[1:2])[0], rows[1])
    assert sampler.understand([]).shape == (0, VARIANT.config.llm.hidden_size)


def test_impossible_wishes_are_refused(sampler: OpenUniSampler) -> None:
    with pytest.raises(ConfigError, match="30x32: sides must be multiples of 8"):
        sampler.text_to_image(["a"], (30, 32), OPTIONS)
    with pytest.raises(ConfigError, match=r"image_guidance=2\.0: OpenUni has no guidance by image"):
        sampler.reconstruct(photographs(), ["x"] * 3, replace(OPTIONS, image_guidance=2.0))


def test_bf16_frozen_weights_sample_beside_fp32_trained_ones() -> None:
    torch.manual_seed(0)
    model = OpenUniModel(VARIANT.config)
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    mixed = OpenUniSampler(model, VARIANT)
    (image,) = mixed.reconstruct(photographs()[:1], ["x"], OPTIONS)
    assert image.size == (64, 64)
    assert mixed.understand(photographs()).dtype == torch.float32
