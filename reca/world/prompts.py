"""Prompts of eight categories, each with what a picture must show to be right."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from reca.randomness import RandomSource
from reca.world.language import NUMBERS
from reca.world.scenes import (
    COLOURS,
    MAX_OBJECTS,
    PLACES,
    SHAPES,
    World,
    draw_scenes,
)

HELD_OUT = "held_out"
CATEGORIES = ("single", "colour", HELD_OUT, "two", "count", "position", "pair", "full")
ANY = -1
"""In a requirement: not asked for."""
FIELDS = ("shape", "colour", "place", "number")
"""Columns of a requirement."""

_POOL = 4096
_FIRST_ID = 1 << 50  # scenes that prompts are taken from are never trained on


@dataclass(frozen=True, slots=True)
class Prompts:
    """Prompts of one category.

    Attributes:
        texts: what is asked for.
        required: [n, 3, 4] int64, up to three requirements of (shape, colour, place, number): so many cells
            match the other three (number ANY: at least one). ANY asks nothing.
    """

    texts: tuple[str, ...]
    required: Tensor


def make_prompts(world: World, category: str, count: int, seed: int) -> Prompts:
    """`count` prompts of a category, taken from scenes of their own; those of a seed are always the same.

    single: a shape. colour: with its colour. held_out: with the colour that no sparse caption names. two: two
    shapes. count: two or three of a shape, no more. position: a shape in its place. pair: two shapes with
    colours. full: everything about two or three objects. Only held_out names a held-out pair.
    """
    random = RandomSource(seed)
    ids = torch.arange(_POOL) + _FIRST_ID
    scenes = draw_scenes(random, ids)
    if category == HELD_OUT:
        # One object each, a held-out one; which scene it came from does not matter.
        scenes = torch.zeros_like(scenes)
        scenes[:, 0] = torch.tensor(world.held_out).repeat(_POOL)[:_POOL]
    else:
        scenes = scenes[~world.is_held_out(scenes).any(dim=1)]
    first = random.uniform(f"prompt/{category}", ids[: len(scenes)], 1)[:, 0].tolist()
    asked = (_ask(category, codes, at) for codes, at in zip(scenes.tolist(), first, strict=True))
    found = list(itertools.islice((wanted for wanted in asked if wanted), count))
    assert len(found) == count, f"{category}: {_POOL} scenes gave only {len(found)} of {count} prompts"
    required = [
        [requirement for _, requirement in wanted] + [[ANY] * len(FIELDS)] * (MAX_OBJECTS - len(wanted))
        for wanted in found
    ]
    return Prompts(
        tuple(" and ".join(text for text, _ in wanted) for wanted in found), torch.tensor(required)
    )


def _ask(category: str, codes: list[int], at: float) -> list[tuple[str, list[int]]]:
    """What to ask about one scene; nothing where that does not fit. `at`, in [0, 1), chooses."""
    cells = [cell for cell, code in enumerate(codes) if code]
    first = cells[int(at * len(cells))]
    shape = _parts(codes[first])[0]
    alike = [cell for cell in cells if _parts(codes[cell])[0] == shape]
    others = [cell for cell in cells if cell not in alike]
    if category == "full":
        return [_named(codes, cell, "colour", "place") for cell in cells] if len(cells) > 1 else []
    if category == "count":
        text = f"{NUMBERS[len(alike)]} {SHAPES[shape]}"
        return [(text, [shape, ANY, ANY, len(alike)])] if len(alike) > 1 else []
    if category in ("two", "pair"):
        told = ("colour",) if category == "pair" else ()
        return [_named(codes, cell, *told) for cell in sorted((first, others[0]))] if others else []
    said: tuple[str, ...] = {"single": (), "position": ("place",)}.get(category, ("colour",))
    return [_named(codes, first, *said)]


def _named(codes: list[int], cell: int, *said: str) -> tuple[str, list[int]]:
    """Words for the object in a cell, and its requirement."""
    shape, colour = _parts(codes[cell])
    words = [COLOURS[colour]] * ("colour" in said) + [SHAPES[shape]] + [PLACES[cell]] * ("place" in said)
    wanted = [shape, colour if "colour" in said else ANY, cell if "place" in said else ANY, ANY]
    return " ".join(words), wanted


def _parts(code: int) -> tuple[int, int]:
    """Indices of shape and colour of an object's code."""
    return divmod(code - 1, len(COLOURS))
