"""Scenes: which coloured shape lies in which cell, drawn from counters, so that a scene is its sample id.

A scene is [4] codes, row by row: 0 is an empty cell, 1 + 6 * shape + colour an object. One to three cells are
taken. Shapes have a typical colour, as bananas have, and come in repeats, so that counting means something.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from reca.errors import ConfigError, nearest
from reca.randomness import RandomSource

SHAPES = ("circle", "square", "triangle", "cross", "ring", "diamond")
COLOURS = ("red", "green", "blue", "purple", "yellow", "cyan")
PLACES = ("northwest", "northeast", "southwest", "southeast")
NUM_CELLS = len(PLACES)
NUM_CODES = 1 + len(SHAPES) * len(COLOURS)
MAX_OBJECTS = 3

_COUNT_EDGES = (0.3, 0.7)  # one object below the first, two below the second, else three
_TYPICAL = 0.6
_REPEATED = 0.35
_FORMAT = 1  # raise it when a sample id begins to mean another scene, caption or picture


@dataclass(frozen=True, slots=True)
class World:
    """What is never said: colour-shape pairs whose colour no sparse caption names, though pictures show them.

    Attributes:
        held_out: codes of those pairs, sorted.
    """

    held_out: tuple[int, ...]

    @classmethod
    def of(cls, pairs: tuple[str, ...]) -> World:
        """The world that holds back pairs such as "purple circle".

        Raises: ConfigError if there is no pair, or one is no colour and shape, or a shape's typical one.
        """
        if not pairs:
            raise ConfigError(
                "the world needs at least one held-out pair, else nothing shows what was never captioned; "
                'set world.held_out, as in world.held_out=["purple circle"]'
            )
        return cls(tuple(sorted({_pair_code(pair) for pair in pairs})))

    @property
    def identity(self) -> str:
        """Names this world: weights learnt in another one must not be used here."""
        held_out = hashlib.blake2b(repr(self.held_out).encode(), digest_size=4).hexdigest()
        return f"{_FORMAT}-{held_out}"

    def is_held_out(self, codes: Tensor) -> Tensor:
        """Bool of the shape of `codes`: which cells show a pair whose colour is never said."""
        table = torch.zeros(NUM_CODES, dtype=torch.bool, device=codes.device)
        table[list(self.held_out)] = True
        return table[codes]


def _pair_code(pair: str) -> int:
    words = pair.split()
    if len(words) != 2 or words[0] not in COLOURS or words[1] not in SHAPES:
        known = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
        raise ConfigError(f"world.held_out: {pair!r} is no colour and shape; {nearest(pair, known)}")
    shape, colour = SHAPES.index(words[1]), COLOURS.index(words[0])
    if shape == colour:
        raise ConfigError(
            f"world.held_out: {pair!r} is what a {words[1]} mostly looks like; choose another colour for it"
        )
    return int(code_of(torch.tensor(shape), torch.tensor(colour)))


def code_of(shape: Tensor, colour: Tensor) -> Tensor:
    """Code of an object; `shape` and `colour` are indices."""
    return 1 + len(COLOURS) * shape + colour


def shape_of(codes: Tensor) -> Tensor:
    """Index of the shape in each cell; -1 where it is empty."""
    return torch.where(codes > 0, (codes - 1) // len(COLOURS), -1)


def colour_of(codes: Tensor) -> Tensor:
    """Index of the colour in each cell; -1 where it is empty."""
    return torch.where(codes > 0, (codes - 1) % len(COLOURS), -1)


def draw_scenes(random: RandomSource, ids: Tensor) -> Tensor:
    """The scenes of these sample ids.

    One, two or three objects (30, 40, 30 %) in random cells; a shape repeats the first one's in 35 % of the
    cases; a colour is the shape's typical one in 60 %, else any other.

    Args:
        random: seed of the world; its step does not matter.
        ids: [n] int64.

    Returns: [n, 4] int64 codes.
    """
    draws = random.at(0).uniform("scene", ids, 16)
    edges = torch.tensor(_COUNT_EDGES, device=ids.device)
    count = 1 + torch.bucketize(draws[:, 0].contiguous(), edges, right=True)
    rank = draws[:, 1:5].argsort(dim=1).argsort(dim=1)  # [n, 4], a random order of the cells
    shape = (draws[:, 5:8] * len(SHAPES)).long()
    is_repeat = draws[:, 8:11] < _REPEATED
    is_repeat[:, 0] = False
    shape = torch.where(is_repeat, shape[:, :1], shape)
    scaled = draws[:, 11:14]
    # One number decides both: below the share it is typical, above it chooses among the others.
    other = ((scaled - _TYPICAL) / (1 - _TYPICAL) * (len(COLOURS) - 1)).long().clamp(0, len(COLOURS) - 2)
    other = torch.where(other >= shape, other + 1, other)
    colour = torch.where(scaled < _TYPICAL, shape, other)
    objects = torch.cat([code_of(shape, colour), torch.zeros_like(count)[:, None]], dim=1)  # [n, 4]
    codes = objects.gather(1, rank)
    return torch.where(rank < count[:, None], codes, 0)
