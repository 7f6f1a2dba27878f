"""The miniature's architecture as data, and its two variants, one for each kind of generator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from reca.images import ImageSpec
from reca.models.family import Variant

TASKS = ("reconstruction", "image_to_text", "text_to_image")


@dataclass(frozen=True, slots=True)
class MiniatureConfig:
    """One miniature.

    Attributes:
        generator: `masked` fills in codes, `flow` follows a velocity to the latents of the cells.
        dim, heads, hidden, layers: width, heads, width between the matrices of the MLP, and depth of the
            language trunk and of the generation expert, which have the same blocks.
        max_tokens: longest row of the trunk.
        vision_channels: channels of the understanding encoder's first and second convolution.
        latent_dim: channels of a cell's latent (flow only).
    """

    generator: Literal["masked", "flow"]
    dim: int = 64
    heads: int = 4
    hidden: int = 160
    layers: int = 4
    max_tokens: int = 40
    vision_channels: tuple[int, int] = (32, 64)
    latent_dim: int = 18


_PIXELS = ImageSpec(max_size=16, min_size=16, stride=16, fit="squash")
VARIANTS = {
    "masked": Variant(MiniatureConfig("masked"), understanding=_PIXELS, target=_PIXELS),
    "flow": Variant(MiniatureConfig("flow"), understanding=_PIXELS, target=_PIXELS),
}
