"""The shipped photographs: which are trained on, which are held out, and random crops of the former."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from reca.images import load_image
from reca.randomness import RandomSource

_MAX_PIXELS = 1 << 20
_ENLARGED = 1.3  # crops never come from photographs enlarged by more


def photo_folder() -> Path:
    """The folder of the shipped photographs."""
    return Path(str(resources.files("reca.assets"))) / "photos"


def held_out_names() -> list[str]:
    """File names of the photographs that nothing is ever trained on, in the order of the contact sheet."""
    return (photo_folder() / "held_out.txt").read_text(encoding="utf-8").split()


def held_out_photos() -> dict[str, Image.Image]:
    """File name -> photograph that nothing is ever trained on."""
    return {name: load_image(photo_folder() / name, max_pixels=_MAX_PIXELS) for name in held_out_names()}


def training_photos() -> list[Image.Image]:
    """All other photographs, sorted by name."""
    held_out = set(held_out_names())
    paths = [path for path in sorted(photo_folder().glob("*.jpg")) if path.name not in held_out]
    return [load_image(path, max_pixels=_MAX_PIXELS) for path in paths]


def pyramid(photos: list[Image.Image], sides: tuple[int, ...]) -> list[Tensor]:
    """Every photograph with its shortest side resized to each of `sides`: [3, height, width] in [-1, 1]."""
    levels = []
    for photo in photos:
        for side in sides:
            scale = side / min(photo.size)
            if scale <= _ENLARGED:
                width, height = (max(side, round(edge * scale)) for edge in photo.size)
                pixels = np.array(photo.resize((width, height), Image.Resampling.BICUBIC))
                levels.append(torch.from_numpy(pixels).permute(2, 0, 1).float() / 127.5 - 1)
    return levels


def crops(levels: list[Tensor], count: int, side: int, random: RandomSource, jitter: float = 0.15) -> Tensor:
    """[count, 3, side, side]: random places of random photographs, half of them mirrored, in other colours.

    Args:
        levels: what `pyramid` returned; no side is shorter than `side`.
        jitter: largest relative change of contrast, and of brightness in units of the half range.
    """
    draws = random.uniform("crop", torch.arange(count), 10)
    pieces = []
    for level, row, column, mirror in draws[:, :4].tolist():
        photo = levels[int(level * len(levels))]
        top = int(row * (photo.shape[1] - side + 1))
        left = int(column * (photo.shape[2] - side + 1))
        piece = photo[:, top : top + side, left : left + side]
        pieces.append(piece.flip(-1) if mirror < 0.5 else piece)
    change = jitter * (2 * draws[:, 4:, None, None] - 1)
    gain, tint, bias = change[:, :1], change[:, 1:4], change[:, 4:5]
    return (torch.stack(pieces) * (1 + gain + 0.5 * tint) + bias).clamp(-1, 1)
