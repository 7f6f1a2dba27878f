"""Scenes: a pure function of seed and sample id, with the shares that the documentation states."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from reca.config import WorldConfig
from reca.errors import ConfigError
from reca.randomness import RandomSource
from reca.world.render import CELL, glyphs, observe, picture, render
from reca.world.scenes import (
    COLOURS,
    NUM_CODES,
    SHAPES,
    World,
    code_of,
    colour_of,
    draw_scenes,
    shape_of,
)

WORLD = World.of(WorldConfig(stage="arm").held_out)
RANDOM = RandomSource(5)


def test_a_scene_belongs_to_its_sample_id_whatever_the_batch():
    together = draw_scenes(RANDOM, torch.arange(40))
    alone = torch.cat([draw_scenes(RANDOM, torch.tensor([index])) for index in range(40)])
    assert torch.equal(together, alone)
    assert torch.equal(together, draw_scenes(RANDOM.at(9), torch.arange(40)))
    assert not torch.equal(together, draw_scenes(RandomSource(6), torch.arange(40)))


def test_scenes_have_one_to_three_objects_in_the_stated_shares():
    codes = draw_scenes(RANDOM, torch.arange(10_000))
    counts = torch.bincount((codes > 0).sum(dim=1), minlength=5) / len(codes)
    assert counts[0] == 0 and counts[4] == 0
    torch.testing.assert_close(counts[1:4], torch.tensor([0.3, 0.4, 0.3]), atol=0.015, rtol=0)
    taken = codes[codes > 0]
    assert int(taken.max()) == NUM_CODES - 1
    typical = (shape_of(taken) == colour_of(taken)).float().mean()
    assert abs(float(typical) - 0.6) < 0.015
    # One of the five other colours of each shape is held out: 40 % / 5.
    assert abs(float(WORLD.is_held_out(taken).float().mean()) - 0.08) < 0.01


def test_a_second_object_repeats_the_first_shape_more_often_than_chance():
    codes = draw_scenes(RANDOM, torch.arange(10_000))
    pairs = codes[(codes > 0).sum(dim=1) == 2]
    shapes = shape_of(pairs)[pairs > 0].view(-1, 2)
    # 35 % on purpose, and a sixth of the rest by chance.
    assert abs(float((shapes[:, 0] == shapes[:, 1]).float().mean()) - (0.35 + 0.65 / 6)) < 0.02


def test_codes_name_shape_and_colour():
    shape, colour = torch.meshgrid(torch.arange(len(SHAPES)), torch.arange(len(COLOURS)), indexing="ij")
    codes = code_of(shape, colour)
    assert torch.equal(shape_of(codes), shape) and torch.equal(colour_of(codes), colour)
    assert int(shape_of(torch.tensor(0))) == int(colour_of(torch.tensor(0))) == -1


def test_every_code_looks_different():
    flat = glyphs(CELL).flatten(1)
    apart = torch.cdist(flat, flat) + torch.eye(NUM_CODES) * 100
    assert float(apart.min()) > 1


def test_pictures_put_cells_where_their_codes_say():
    codes = torch.tensor([[1, 0, 8, 15]])
    pixels = render(codes)
    assert pixels.shape == (1, 3, 2 * CELL, 2 * CELL)
    quarters = [pixels[0, :, y : y + CELL, x : x + CELL] for y in (0, CELL) for x in (0, CELL)]
    for quarter, code in zip(quarters, codes[0], strict=True):
        assert torch.equal(quarter, glyphs(CELL)[code])
    assert picture(codes[0], 10).size == (20, 20)


def test_noise_belongs_to_the_sample_id():
    codes = torch.tensor([[1, 0, 8, 15]] * 2)
    first, second = observe(codes, RANDOM, torch.tensor([3, 4]))
    assert torch.equal(second, observe(codes[:1], RANDOM, torch.tensor([4]))[0])
    assert abs(float((first - second).std()) - 0.3 * 2**0.5) < 0.03


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ((), "needs at least one held-out pair"),
        (("purple crcle",), "did you mean 'purple circle'"),
        (("purple",), "is no colour and shape"),
        (("red circle",), "mostly looks like; choose another colour"),
    ],
)
def test_a_world_without_a_usable_held_out_pair_is_refused(pairs, message):
    with pytest.raises(ConfigError, match=message):
        World.of(pairs)


def test_the_identity_changes_with_the_held_out_pairs_but_not_with_their_order():
    one, other = World.of(("purple circle", "red cross")), World.of(("red cross", "purple circle"))
    assert one.identity == other.identity
    assert one.identity != WORLD.identity


def test_glyphs_drawn_without_values_are_not_kept() -> None:
    with FakeTensorMode():
        assert isinstance(glyphs(3), FakeTensor)
    assert not isinstance(glyphs(3), FakeTensor)
