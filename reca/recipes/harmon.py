"""Recipes for Harmon: the published hyperparameters; where sources disagree, the reason stands beside.

Officially one mask ratio is drawn per microbatch, and every process draws the same random numbers. Here every
sample draws its own ratio from the same law, every number belongs to a sample, and each loss is the mean over
the whole step: how it is cut into microbatches is a question of memory only.
"""

from __future__ import annotations

from reca.config import (
    CheckpointConfig,
    ComputeConfig,
    ConversationConfig,
    DataConfig,
    OptimConfig,
    SampleConfig,
    TrainConfig,
)

_MICROBATCHES = 4  # two of reconstruction, then two of dialogues, make an optimizer step
_MAX_RECONSTRUCTION = 128 + 1088 + 64 + 307  # tokens: prompt, understanding, buffers, visible
_MAX_DIALOGUE = 1472 + 1088


def _official(name: str, variant: str, *, official_images: int) -> TrainConfig:
    """What both sizes share. Source: official RecA release, configuration `examples/reca.py` of Harmon.

    Args:
        official_images: of an official microbatch.
    """
    images = official_images * _MICROBATCHES // 2  # of each task
    return TrainConfig(
        recipe=name,
        model=f"harmon/{variant}",
        data=DataConfig(
            prompt_dropout=0.1,  # only the words change to "Generate an image.": the image stays
            images=images,
            micro_images=2,  # official blocks are recomputed; smaller microbatches need no recomputing
            max_tokens=_MAX_RECONSTRUCTION * images,
            workers=8,
        ),
        # officially LLaVA-1.5's 665k dialogues; those without an image get a grey one there and are left out
        image_to_text=ConversationConfig(images=images, micro_images=2, max_tokens=_MAX_DIALOGUE * images),
        # officially the mean of four microbatches, two of each task
        loss_weights={"reconstruction": 0.5, "image_to_text": 0.5},
        optim=OptimConfig(
            lr=1e-5,
            betas=(0.9, 0.95),
            eps=1e-8,
            weight_decay=0.02,
            no_decay=("diffusion_head",),
            schedule="cosine",
            warmup_steps=500 // _MICROBATCHES,  # the schedule counts microbatches
            clip_norm=1.0,
            ema=None,
        ),
        compute=ComputeConfig(precision="bf16"),
        sample=SampleConfig(every=250, images=4, steps=64, text_guidance=3.0),
        # the configuration says every 1000 microbatches, the README 5000
        checkpoint=CheckpointConfig(every=1000 // _MICROBATCHES, keep=2),
        steps=50_000 // _MICROBATCHES,
        seed=42,
    )


def harmon_05b() -> TrainConfig:
    """RecA on Harmon-0.5B at 512 px.

    No configuration of this size is published; a comment gives 96 images. The README evaluates microbatch
    3000, 750 steps of the 12,500 that the schedule is made for.
    """
    return _official("harmon-0.5b", "0.5b", official_images=96)


def harmon_15b() -> TrainConfig:
    """RecA on Harmon-1.5B at 512 px.

    The README evaluates microbatch 5000, 1250 steps of the 12,500 that the schedule is made for.
    """
    return _official("harmon-1.5b", "1.5b", official_images=48)


def harmon_smoke() -> TrainConfig:
    """A few seconds of the same code on a CPU: tiny random weights and the shipped photographs."""
    return TrainConfig(
        recipe="harmon-smoke",
        model="harmon/tiny",
        weights="random",
        data=DataConfig(path="package:photos", images=4, micro_images=2, workers=0),
        optim=OptimConfig(lr=2e-3, warmup_steps=2),
        sample=SampleConfig(images=1, steps=4),
        checkpoint=CheckpointConfig(every=10),
        steps=20,
    )
