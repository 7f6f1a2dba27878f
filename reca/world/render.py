"""Pictures of scenes: small noisy ones for the understanding encoder, clean larger ones for people."""

from __future__ import annotations

from functools import cache

import torch
from PIL import Image
from torch import Tensor
from torch._guards import active_fake_mode

from reca.images import to_image
from reca.randomness import RandomSource
from reca.world.scenes import COLOURS, NUM_CODES, SHAPES

CELL = 8
"""Pixels along one side of a cell as the encoder sees it."""
SIDE = 2 * CELL
NOISE = 0.3
"""Standard deviation of the noise on pixels that run from -1 to 1."""

_RGB = {
    "red": (0.90, 0.15, 0.15),
    "green": (0.15, 0.70, 0.25),
    "blue": (0.20, 0.35, 0.95),
    "purple": (0.60, 0.20, 0.75),
    "yellow": (0.95, 0.80, 0.10),
    "cyan": (0.10, 0.75, 0.85),
}
_GROUND = (0.93, 0.93, 0.90)
_OVERSAMPLING = 4


def _inside(shape: str, x: Tensor, y: Tensor) -> Tensor:
    """Whether points of the square [-1, 1]^2, y downwards, belong to a shape."""
    radius = (x.square() + y.square()).sqrt()
    if shape == "circle":
        return radius < 0.8
    if shape == "square":
        return (x.abs() < 0.7) & (y.abs() < 0.7)
    if shape == "triangle":
        return (y < 0.75) & (x.abs() < (y + 0.85) * 0.55)
    if shape == "cross":
        return ((x.abs() < 0.27) | (y.abs() < 0.27)) & (x.abs() < 0.85) & (y.abs() < 0.85)
    if shape == "ring":
        return (radius < 0.85) & (radius > 0.48)
    return x.abs() + y.abs() < 0.9  # diamond


def glyphs(side: int) -> Tensor:
    """[37, 3, side, side] fp32 in [-1, 1]: the picture of every code, anti-aliased."""
    # What is drawn while a step is counted has no values: it must not be kept.
    return _kept_glyphs(side) if active_fake_mode() is None else _draw_glyphs(side)


@cache
def _kept_glyphs(side: int) -> Tensor:
    return _draw_glyphs(side)


def _draw_glyphs(side: int) -> Tensor:
    # On the CPU also where a model is being built on the meta device: the result is kept.
    fine = (torch.arange(side * _OVERSAMPLING, device="cpu") + 0.5) / (side * _OVERSAMPLING) * 2 - 1
    y, x = fine[:, None].expand(len(fine), -1), fine[None].expand(len(fine), -1)
    ground = torch.tensor(_GROUND, device="cpu")[:, None, None]
    pictures = [ground.expand(3, side, side)]
    for shape in SHAPES:
        cover = _inside(shape, x, y).float().view(side, _OVERSAMPLING, side, _OVERSAMPLING).mean(dim=(1, 3))
        for colour in COLOURS:
            ink = torch.tensor(_RGB[colour], device="cpu")[:, None, None]
            pictures.append(ground + (ink - ground) * cover)
    assert len(pictures) == NUM_CODES
    return torch.stack(pictures) * 2 - 1


def render(codes: Tensor, side: int = CELL) -> Tensor:
    """[n, 4] codes -> [n, 3, 2 * side, 2 * side] fp32 pixels in [-1, 1], without noise."""
    cells = glyphs(side).to(codes.device)[codes]  # [n, 4, 3, side, side]
    grid = cells.view(-1, 2, 2, 3, side, side).permute(0, 3, 1, 4, 2, 5)
    return grid.reshape(-1, 3, 2 * side, 2 * side)


def observe(codes: Tensor, random: RandomSource, ids: Tensor) -> Tensor:
    """[n, 3, 16, 16] fp32: what the encoder sees of scenes, with noise of its own for each id."""
    pixels = render(codes)
    noise = random.at(0).normal("observe", ids, pixels[0].numel()).view(pixels.shape)
    return pixels + NOISE * noise


def picture(codes: Tensor, side: int = 48) -> Image.Image:
    """One scene ([4] codes) for people: cells of `side` pixels."""
    return to_image(render(codes[None], side)[0])
