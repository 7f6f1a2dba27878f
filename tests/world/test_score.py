"""The exact scorer, its prompts and its intervals."""

from __future__ import annotations

import math

import pytest
import torch

from reca.config import WorldConfig
from reca.randomness import RandomSource
from reca.world.prompts import CATEGORIES, HELD_OUT, make_prompts
from reca.world.scenes import COLOURS, NUM_CODES, PLACES, SHAPES, World, code_of
from reca.world.score import is_right, paired_bootstrap, score, summarise

WORLD = World.of(WorldConfig(stage="arm").held_out)


def scene(*objects: str) -> list[int]:
    """Codes of a scene from texts such as "red circle northwest"."""
    codes = [0] * 4
    for text in objects:
        colour, shape, place = text.split()
        code = code_of(torch.tensor(SHAPES.index(shape)), torch.tensor(COLOURS.index(colour)))
        codes[PLACES.index(place)] = int(code)
    return codes


def right(codes: list[int], *required: list[int]) -> bool:
    rows = [*required, *[[-1] * 4] * (3 - len(required))]
    return bool(is_right(torch.tensor([codes]), torch.tensor([rows]))[0])


CIRCLE, SQUARE = SHAPES.index("circle"), SHAPES.index("square")
RED = COLOURS.index("red")


def test_a_picture_is_right_when_it_shows_all_that_is_asked():
    codes = scene("red circle northwest", "blue square southeast")
    assert right(codes, [CIRCLE, -1, -1, -1])
    assert right(codes, [CIRCLE, RED, 0, -1], [SQUARE, -1, 3, -1])
    assert not right(codes, [SQUARE, RED, -1, -1])
    assert not right(codes, [CIRCLE, -1, 1, -1])
    assert not right(codes, [CIRCLE, -1, -1, -1], [SHAPES.index("ring"), -1, -1, -1])


def test_counts_are_exact():
    two = scene("red circle northwest", "blue circle southeast")
    three = scene("red circle northwest", "blue circle southeast", "red circle southwest")
    assert right(two, [CIRCLE, -1, -1, 2]) and not right(three, [CIRCLE, -1, -1, 2])
    assert right(three, [CIRCLE, -1, -1, 3])


def test_a_crowded_picture_is_wrong_whatever_it_shows():
    crowd = scene(*(f"red circle {place}" for place in PLACES))
    assert not right(crowd, [CIRCLE, -1, -1, -1])
    assert not right([0] * 4, [CIRCLE, -1, -1, -1])


@pytest.mark.parametrize("category", CATEGORIES)
def test_prompts_say_what_they_require(category):
    prompts = make_prompts(WORLD, category, 60, seed=3)
    again = make_prompts(WORLD, category, 60, seed=3)
    assert prompts.texts == again.texts and torch.equal(prompts.required, again.required)
    held_out = set(WorldConfig(stage="arm").held_out)
    for text, required in zip(prompts.texts, prompts.required.tolist(), strict=True):
        asked = [row for row in required if row != [-1] * 4]
        if category == "count":
            number, shape = text.split()
            assert asked == [[SHAPES.index(shape), -1, -1, ("zero", "one", "two", "three").index(number)]]
            continue
        words = [
            " ".join(
                ([COLOURS[colour]] if colour >= 0 else [])
                + [SHAPES[shape]]
                + ([PLACES[place]] if place >= 0 else [])
            )
            for shape, colour, place, _ in asked
        ]
        assert text == " and ".join(words)
        named = any(pair in text for pair in held_out)
        assert named == (category == HELD_OUT)


def test_a_guess_is_seldom_right():
    codes = torch.randint(NUM_CODES, (600, 4), generator=torch.Generator().manual_seed(0))
    codes[:, 2:] = 0
    for category in ("pair", "full", HELD_OUT):
        prompts = make_prompts(WORLD, category, 300, seed=0)
        shares = is_right(codes[:300], prompts.required).float().mean()
        assert float(shares) < 0.1


def test_the_standard_error_counts_prompts_not_pictures():
    rows = torch.tensor([[True] * 4] * 3 + [[False] * 4])
    one = score(rows)
    assert one.value == 0.75
    assert math.isclose(one.standard_error, 0.5 / 2)
    both = summarise({"single": rows, HELD_OUT: ~rows})
    assert both["mean"].value == 0.5 and both["mean_without_held_out"].value == 0.75
    assert math.isclose(both["mean"].standard_error, math.hypot(0.25, 0.25) / 2)


def test_the_paired_interval_holds_the_true_difference_and_narrows_with_prompts():
    generator = torch.Generator().manual_seed(1)
    few, many = (
        {
            "single": 0.1 + torch.randn(n, generator=generator),
            "pair": 0.1 + torch.randn(n, generator=generator),
        }
        for n in (50, 5000)
    )
    wide, narrow = (paired_bootstrap(rows, RandomSource(0), 500) for rows in (few, many))
    assert wide[1] - wide[0] > 5 * (narrow[1] - narrow[0])
    assert narrow[0] < 0.1 < narrow[1]
    expected = 2 * 1.96 / math.sqrt(2 * 5000)
    assert abs((narrow[1] - narrow[0]) / expected - 1) < 0.1
