"""The arms: what a post-training run draws from, beside sparse captions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from reca.config import TrainConfig
from reca.errors import ConfigError, nearest

Condition = Literal["own", "shuffled", "rotated", "codes", "dense"]


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to post-train. All arms see the same scenes, as many of them, at the same learning rate.

    Attributes:
        condition: what the first part of each step is drawn from: the picture's `own` embeddings; those of
            another picture (`shuffled`); its own after a fixed rotation, which keeps all information but not
            the alignment with words (`rotated`); fixed embeddings of its `codes`; a `dense` caption.
        share: of a step that this part is; the rest is drawn from sparse captions.
        trains_trunk: train the understanding expert and the projector too, not only the generation expert.
        image_to_text: share of the loss that keeps the trunk describing pictures.
        instructions: how many different words may follow the embeddings, as an instruction; 0 is none.
        rate: factor on the learning rate.
        why: one line.
    """

    condition: Condition = "own"
    share: float = 0.5
    trains_trunk: bool = False
    image_to_text: float = 0.0
    instructions: int = 0
    rate: float = 1.0
    why: str = ""


ARMS: Mapping[str, Arm] = {
    "reca_and_captions": Arm(why="RecA and text-to-image, half and half"),
    "captions": Arm(share=0.0, why="control: sparse captions alone"),
    "shuffled": Arm("shuffled", why="control: embeddings of another picture"),
    "rotated": Arm("rotated", why="control: embeddings rotated, so no longer aligned with words"),
    "dense": Arm("dense", why="upper bound: captions that say everything"),
    "pure": Arm(share=1.0, why="RecA alone, without any text-to-image data"),
    "copy": Arm("codes", why="bottleneck too fine: the codes themselves can be copied"),
    "one_instruction": Arm(instructions=1, why="always the same word after the embeddings"),
    "many_instructions": Arm(instructions=8, why="one of eight words after the embeddings"),
    "high_rate": Arm(rate=10.0, why="ten times the learning rate"),
    "trunk": Arm(trains_trunk=True, why="understanding trained too, without image-to-text"),
    "trunk_and_text": Arm(trains_trunk=True, image_to_text=0.25, why="the same with image-to-text mixed in"),
}
DEFAULT_ARM = "reca_and_captions"


def get_arm(config: TrainConfig) -> Arm:
    """The arm of a configuration. Raises ConfigError naming the nearest one."""
    name = config.arm or DEFAULT_ARM
    if name not in ARMS:
        raise ConfigError(f"unknown arm {name!r}; {nearest(name, ARMS)}")
    return ARMS[name]


def loss_weights(config: TrainConfig) -> dict[str, float]:
    """Loss term -> weight of the stage or arm; they sum to 1."""
    assert config.world is not None
    if config.world.stage == "encoder":
        return {"cells": 1.0}
    if config.world.stage == "language":
        return {"language": 1.0}
    if config.world.stage == "alignment":
        return {"image_to_text": 0.5, "language": 0.5}
    if config.world.stage == "base":
        return {"text_to_image": 1.0}
    arm = get_arm(config)
    drawn = 1 - arm.image_to_text
    # Dense captions are text-to-image too, but a term of their own, so that both can be watched.
    first = "dense_captions" if arm.condition == "dense" else "reconstruction"
    weights = {
        first: arm.share * drawn,
        "text_to_image": (1 - arm.share) * drawn,
        "image_to_text": arm.image_to_text,
    }
    return {name: weight for name, weight in weights.items() if weight > 0}


def trained_parts(config: TrainConfig) -> tuple[str, ...]:
    """Parts of the model that the stage or arm trains."""
    assert config.world is not None
    if config.world.stage == "arm":
        return ("generator", "trunk", "projector") if get_arm(config).trains_trunk else ("generator",)
    parts = {
        "encoder": ("encoder",),
        "language": ("trunk",),
        "alignment": ("projector", "trunk"),
        "base": ("generator",),
    }
    return parts[config.world.stage]
