"""Recipes for Janus-Pro. Nobody has published any: numbers are carried over from the other families.

Both tasks share all parameters: reconstruction alone would wear away what the model understands, so every
reconstruction microbatch has one of image to text beside it, each with the weight 1, as in Show-o's RecA.
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

_IMAGES = 128  # of each task and step; the other families' published steps hold 48 to 192
_STEPS = 5000  # what the paper's autoregressive models were trained for


def _proposal(name: str, variant: str, *, micro_images: int) -> TrainConfig:
    return TrainConfig(
        recipe=name,
        model=f"janus/{variant}",
        data=DataConfig(
            prompt_dropout=0.0,
            images=_IMAGES,
            max_tokens=_IMAGES * 1280,  # an image takes about 1,181 tokens
            max_sample_tokens=1280,
            micro_images=micro_images,
            workers=8,
        ),
        image_to_text=ConversationConfig(
            images=_IMAGES,
            max_tokens=_IMAGES * 2048,  # the image and about 250 tokens of text; at most what fits here
            max_sample_tokens=2048,
            micro_images=micro_images,
        ),
        loss_weights={"reconstruction": 1.0, "image_to_text": 1.0},
        optim=OptimConfig(
            lr=1e-5,
            betas=(0.9, 0.95),
            eps=1e-8,
            weight_decay=0.05,
            schedule="cosine",
            warmup_steps=_STEPS // 100,
            clip_norm=1.0,
        ),
        compute=ComputeConfig(precision="bf16"),
        sample=SampleConfig(every=500, images=4, text_guidance=5.0),
        checkpoint=CheckpointConfig(every=500, keep=2),
        normalize="microbatch",  # a mean over each microbatch's own answers, as the loss is defined
        steps=_STEPS,
        seed=42,
    )


def janus_pro_1b() -> TrainConfig:
    """RecA on Janus-Pro-1B: image to codes, with conversations mixed in. A proposal, not tested at scale."""
    return _proposal("janus-pro-1b", "pro-1b", micro_images=8)


def janus_pro_7b() -> TrainConfig:
    """The same on Janus-Pro-7B, in smaller microbatches."""
    return _proposal("janus-pro-7b", "pro-7b", micro_images=4)


def janus_smoke() -> TrainConfig:
    """A few seconds of the same code on a CPU: tiny random weights and the shipped photographs."""
    return TrainConfig(
        recipe="janus-smoke",
        model="janus/tiny",
        weights="random",
        data=DataConfig(path="package:photos", images=4, micro_images=2, workers=0),
        optim=OptimConfig(lr=2e-3, warmup_steps=2),
        sample=SampleConfig(images=1, text_guidance=2.0),
        checkpoint=CheckpointConfig(every=10),
        steps=20,
    )
