"""BAGEL's sampler: the official runs, passes that are spared, pictures that ignore their batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from reca.errors import ConfigError
from reca.images import to_tensor
from reca.models.bagel.batch import BagelDraws, BagelProcessor
from reca.models.bagel.config import VARIANTS
from reca.models.bagel.context import Canvas, Context, latent_grid, with_image, with_latents, with_text
from reca.models.bagel.model import BagelModel
from reca.models.bagel.parity_sampling import reproduce_sampler
from reca.models.bagel.sampler import BagelSampler, Conditions, guide, time_grid, trajectory
from reca.models.family import Pack, SampleOptions
from reca.models.parity import compare, read_pack
from reca.objectives.flow_matching import interpolate
from reca.randomness import RandomSource

PACKS = Path(__file__).resolve().parents[1] / "data" / "parity" / "bagel"
VARIANT = VARIANTS["tiny"]
OPTIONS = SampleOptions(steps=4, text_guidance=3.0, image_guidance=1.5, guidance_interval=(0.4, 1.0))


@pytest.fixture(scope="module")
def model() -> BagelModel:
    torch.manual_seed(0)
    built = BagelModel(VARIANT.config)
    torch.nn.init.normal_(built.llm2vae.weight, std=0.2)
    return built


@pytest.fixture(scope="module")
def sampler(model: BagelModel) -> BagelSampler:
    return BagelSampler(model, VARIANT)


def photographs() -> list[Image.Image]:
    generator = np.random.default_rng(0)
    sizes = [(48, 64), (40, 40), (64, 33)]
    return [Image.fromarray(generator.integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in sizes]


@pytest.mark.parity
@pytest.mark.parametrize("case", ["generate", "edit"])
def test_every_official_run_is_reproduced(case: str) -> None:
    pack = read_pack(PACKS / case)
    result = compare(pack, reproduce_sampler(pack))
    assert result.failures == ()
    assert {name.split(".")[-1] for name in result.not_formed} <= {"forward_calls"}


@pytest.mark.parity
def test_a_sampler_pack_with_an_unknown_condition_is_refused() -> None:
    pack = read_pack(PACKS / "generate")
    runs = [pack.description["runs"][0] | {"image": "depth"}]
    with pytest.raises(ConfigError, match="got 'depth'"):
        reproduce_sampler(Pack(pack.folder, {**pack.description, "runs": runs}, pack.inputs, pack.expected))


def conditions_of(model: BagelModel, *, with_picture: bool) -> Conditions:
    empty = Context.empty(model)
    text = with_text(model, empty, [1, 2, 3])
    if not with_picture:
        return Conditions(text, empty)
    seen = with_image(model, empty, torch.zeros(3, 28, 42))
    return Conditions(with_text(model, seen, [1, 2, 3]), seen, text)


def steps_of(model: BagelModel, conditions: Conditions, **changes: Any) -> list[Any]:
    noise = torch.randn(6, model.config.latent_dim, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return list(
            trajectory(model, conditions, noise, latent_grid(model, 2, 3), replace(OPTIONS, **changes))
        )


def test_passes_are_run_only_where_they_count(model: BagelModel) -> None:
    text, both = (conditions_of(model, with_picture=picture) for picture in (False, True))
    passes = {
        "no guidance": [step.num_passes for step in steps_of(model, both, text_guidance=1.0)],
        "text": [step.num_passes for step in steps_of(model, both, image_guidance=1.0)],
        "text and image": [step.num_passes for step in steps_of(model, both)],
        "no image given": [step.num_passes for step in steps_of(model, text)],
        "interval": [step.num_passes for step in steps_of(model, both, guidance_interval=(0.7, 0.9))],
    }
    assert passes == {
        "no guidance": [1, 1, 1],
        "text": [2, 2, 2],
        "text and image": [3, 3, 3],
        "no image given": [2, 2, 2],
        "interval": [1, 3, 1],
    }


def test_guidance_acts_above_the_lower_and_up_to_the_upper_edge(model: BagelModel) -> None:
    times = time_grid(4, OPTIONS.shift)
    edges = (float(times[2]), float(times[1]))
    steps = steps_of(model, conditions_of(model, with_picture=True), guidance_interval=edges)
    assert [step.num_passes for step in steps] == [1, 3, 1]


def test_an_edge_is_compared_in_fp32(model: BagelModel) -> None:
    edge = 1.5 * 0.5 / (1 + 0.5 * 0.5)
    assert float(time_grid(3, 1.5)[1]) > edge  # fp32 rounds this time up, and the edge alike
    conditions = conditions_of(model, with_picture=True)
    steps = steps_of(model, conditions, steps=3, shift=1.5, guidance_interval=(edge, 0.9))
    assert [step.num_passes for step in steps] == [1, 1]


def test_image_guidance_without_an_image_strengthens_text_guidance(model: BagelModel) -> None:
    conditions = conditions_of(model, with_picture=False)
    both = steps_of(model, conditions, text_guidance=3.0, image_guidance=1.5, renorm_min=1.0)
    text = steps_of(model, conditions, text_guidance=1 + 1.5 * (3 - 1), image_guidance=1.0, renorm_min=1.0)
    torch.testing.assert_close(both[-1].after, text[-1].after)


def test_passes_run_together_give_what_each_gives_alone(model: BagelModel) -> None:
    conditions = conditions_of(model, with_picture=True)
    contexts = [conditions.full, conditions.without_text, Context.empty(model)]
    grid, time = latent_grid(model, 2, 3), torch.tensor([0.7])
    noised = torch.randn(6, model.config.latent_dim, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        together = Canvas(model, contexts, grid).velocity(noised, time)
        alone = [Canvas(model, [context], grid).velocity(noised, time)[0] for context in contexts]
    torch.testing.assert_close(together, torch.stack(alone))
    assert (together[0] - together[1]).abs().max() > 1e-3


def test_the_pass_agrees_with_the_training_forward(model: BagelModel) -> None:
    processor = BagelProcessor(VARIANT)
    batch = processor.collate([processor.prepare(photographs()[0], "a cat", RandomSource(0), 0)], [0])
    clean, noise = torch.randn(2, sum(batch.layout.latent_lengths), model.config.latent_dim)
    time = torch.tensor([0.3])
    noised = interpolate(clean, noise, time)
    with torch.no_grad():
        latents = model.embed_latents(
            batch, clean, BagelDraws(counts={}, time=time, noise=noise, posterior=())
        )
        latents = model.transform(batch, model.understand(batch), latents)
        trained = model.llm2vae(model.norm_gen(latents))
        seen = with_image(model, Context.empty(model), to_tensor(photographs()[0], VARIANT.understanding))
        context = with_text(model, seen, processor.tokenizer.encode("a cat"))
        sampled = Canvas(model, [context], latent_grid(model, *batch.latent_grids[0])).velocity(noised, time)[
            0
        ]
    torch.testing.assert_close(sampled, trained)


def test_renorm_pulls_each_picture_or_each_token_back_to_the_unguided_norm() -> None:
    full, without = torch.tensor([[3.0, 4.0], [0.0, 1.0]]), torch.zeros(2, 2)
    options = SampleOptions(text_guidance=2.0, renorm_min=0.0)
    for renorm in ("global", "channel", "text_channel"):
        torch.testing.assert_close(guide(full, without, None, replace(options, renorm=renorm)), full)
    mixed = guide(full, torch.tensor([[3.0, 4.0], [0.0, -1.0]]), None, replace(options, renorm="channel"))
    torch.testing.assert_close(mixed, full)
    whole = guide(full, torch.tensor([[3.0, 4.0], [0.0, -1.0]]), None, options)
    torch.testing.assert_close(whole.norm(), full.norm())
    assert float(whole[1].norm()) > 2.0
    unbounded = guide(full, without, None, replace(options, renorm_min=1.0))
    torch.testing.assert_close(unbounded, 2 * full)


def test_text_channel_leaves_image_guidance_unnormalised() -> None:
    full, options = (
        torch.ones(1, 4),
        replace(OPTIONS, image_guidance=3.0, renorm="text_channel", renorm_min=0.0),
    )
    torch.testing.assert_close(guide(full, torch.zeros(1, 4), torch.zeros(1, 4), options), 3 * full)


def test_an_unknown_renorm_names_its_neighbour(model: BagelModel) -> None:
    with pytest.raises(ConfigError, match="unknown renorm 'chanel'; did you mean 'channel'"):
        steps_of(model, conditions_of(model, with_picture=False), renorm="chanel")


def bits(images: list[Image.Image]) -> list[bytes]:
    return [image.tobytes() for image in images]


@pytest.mark.parametrize("task", ["text_to_image", "reconstruct", "edit"])
def test_a_picture_has_the_same_bits_whatever_the_batch(sampler: BagelSampler, task: str) -> None:
    prompts, images = ["a cat", "two dogs", "a red house"], photographs()

    def run(chosen: slice, options: SampleOptions) -> list[bytes]:
        if task == "text_to_image":
            return bits(sampler.text_to_image(prompts[chosen], (16, 24), options))
        function: Callable[..., list[Image.Image]] = getattr(sampler, task)
        return bits(function(images[chosen], prompts[chosen], options))

    together = run(slice(0, 3), OPTIONS)
    assert run(slice(0, 2), OPTIONS) == together[:2]
    assert run(slice(1, 3), replace(OPTIONS, first_index=1)) == together[1:]
    assert len(set(together)) == 3
    assert run(slice(0, 1), replace(OPTIONS, seed=1)) != together[:1]


def test_pictures_have_the_target_size_of_their_input(sampler: BagelSampler) -> None:
    for task in (sampler.reconstruct, sampler.edit):
        sizes = [image.size for image in task(photographs(), ["x"] * 3, OPTIONS)]
        assert sizes == [(64, 48), (40, 40), (32, 64)]


def test_a_size_that_is_no_grid_is_refused(sampler: BagelSampler) -> None:
    for size in ((20, 16), (16, 72), (0, 16)):
        with pytest.raises(ConfigError, match="multiples of 8 up to 64 pixels"):
            sampler.text_to_image(["x"], size, OPTIONS)


def test_every_condition_reaches_the_picture(sampler: BagelSampler) -> None:
    first, second = photographs()[1], photographs()[1].transpose(Image.Transpose.ROTATE_90)
    for task in (sampler.reconstruct, sampler.edit):
        reference = bits(task([first], ["a cat"], OPTIONS))
        assert bits(task([second], ["a cat"], OPTIONS)) != reference
        assert bits(task([first], ["a dog"], OPTIONS)) != reference
    edited, rebuilt = (task([first], ["a cat"], OPTIONS) for task in (sampler.edit, sampler.reconstruct))
    assert bits(edited) != bits(rebuilt)


def test_an_edit_sees_latents_at_time_zero_and_images_at_one_position_each(model: BagelModel) -> None:
    with torch.no_grad():
        context = with_latents(model, Context.empty(model), torch.zeros(4, 4, 6))
        context = with_text(model, with_image(model, context, torch.zeros(3, 14, 28)), [5])
    assert context.positions.tolist() == [0] * 8 + [1] * 4 + [2, 3, 4]
    assert (context.next_position, context.length) == (5, 15)


def test_understanding_is_one_mean_embedding_per_image(sampler: BagelSampler) -> None:
    embeddings = sampler.understand(photographs())
    assert (embeddings.shape, embeddings.dtype) == ((3, VARIANT.config.llm.hidden_size), torch.float32)
    torch.testing.assert_close(sampler.understand(photographs()[1:2])[0], embeddings[1])
    assert sampler.understand([]).shape == (0, VARIANT.config.llm.hidden_size)


def test_frozen_bf16_weights_beside_trained_fp32_ones_can_be_sampled(model: BagelModel) -> None:
    torch.manual_seed(0)
    mixed = BagelModel(VARIANT.config)
    mixed.load_state_dict(model.state_dict())
    for name, parameter in mixed.named_parameters():
        if not parameter.requires_grad and not name.startswith("vae."):
            parameter.data = parameter.data.bfloat16()
    images = [BagelSampler(m, VARIANT).text_to_image(["a cat"], (16, 16), OPTIONS)[0] for m in (mixed, model)]
    difference = np.abs(np.asarray(images[0], dtype=float) - np.asarray(images[1], dtype=float))
    assert 0 < difference.mean() < 4
