"""Recipes for OpenUni: the published hyperparameters; where sources disagree, the reason stands beside.

The official `max_iters` counts backward passes, of which DeepSpeed makes one step each 4 (B) or 16 (L):
10,000 and 5,000 are 2,500 and 312 steps. Its warm-up starts at 1e-5 of the peak; here it starts at 0.
"""

from __future__ import annotations

from reca.config import CheckpointConfig, ComputeConfig, DataConfig, OptimConfig, SampleConfig, TrainConfig

_GPUS = 1  # the README's command; no source states another number
_MICRO_IMAGES = 42


def _data(accumulation: int, sample_tokens: int, micro_images: int = _MICRO_IMAGES) -> DataConfig:
    images = _MICRO_IMAGES * accumulation * _GPUS
    return DataConfig(
        prompt_dropout=0.0,  # the official loader always gives the instruction
        images=images,
        micro_images=micro_images,
        max_sample_tokens=sample_tokens,
        max_tokens=images * sample_tokens,  # a step is closed by its images
        workers=8,
    )


def _optim(warmup_steps: int) -> OptimConfig:
    return OptimConfig(
        lr=1e-5,
        betas=(0.9, 0.95),
        eps=1e-8,
        weight_decay=0.05,
        schedule="cosine",
        warmup_steps=warmup_steps,
        clip_norm=1.0,
        ema=None,
    )


def _sample(every: int) -> SampleConfig:
    # 20 evaluations of the solver; points of the grid count its end, too
    return SampleConfig(every=every, images=4, steps=21, text_guidance=4.5, shift=3.0)


def openuni_b_512() -> TrainConfig:
    """RecA on OpenUni-B-512 (InternVL3-1B and SANA-0.6B) as published: 2,500 steps of 168 images.

    Starts from the text-to-image pretraining, not from the model fine-tuned on BLIP3o-60k.
    Source: official RecA release, config `reca_1_0.6`; arXiv 2509.07295.
    """
    return TrainConfig(
        recipe="openuni-b-512",
        model="openuni/b-512",
        data=_data(accumulation=4, sample_tokens=2_048),
        optim=_optim(warmup_steps=25),  # 1 % of all steps
        compute=ComputeConfig(precision="bf16"),
        sample=_sample(every=250),
        checkpoint=CheckpointConfig(every=250, keep=2),  # the config; the README says 5 times as rarely
        steps=2_500,
    )


def openuni_l_512() -> TrainConfig:
    """RecA on OpenUni-L-512 (InternVL3-2B and SANA-1.6B) as published: 312 steps of 672 images.

    Source: official RecA release, config `reca_2_1.6`; the last 8 of its 5,000 backward passes fill no step.
    """
    return TrainConfig(
        recipe="openuni-l-512",
        model="openuni/l-512",
        data=_data(accumulation=16, sample_tokens=2_048),
        optim=_optim(warmup_steps=3),
        compute=ComputeConfig(precision="bf16"),
        sample=_sample(every=62),
        checkpoint=CheckpointConfig(every=62, keep=2),
        steps=312,
    )


def openuni_l_1024() -> TrainConfig:
    """RecA on OpenUni-L-1024 (InternVL3-2B and SANA-1.5): no such run is published; the steps of L-512.

    Microbatches are a quarter as large in images, for four times as many latents in each.
    """
    return TrainConfig(
        recipe="openuni-l-1024",
        model="openuni/l-1024",
        data=_data(accumulation=16, sample_tokens=4_096, micro_images=12),
        optim=_optim(warmup_steps=3),
        compute=ComputeConfig(precision="bf16"),
        sample=_sample(every=62),
        checkpoint=CheckpointConfig(every=62, keep=2),
        steps=312,
    )


def openuni_smoke() -> TrainConfig:
    """A few seconds of the same code on a CPU: tiny random weights and the shipped photographs."""
    return TrainConfig(
        recipe="openuni-smoke",
        model="openuni/tiny",
        weights="random",
        data=DataConfig(path="package:photos", prompt_dropout=0.0, images=4, micro_images=2, workers=0),
        optim=OptimConfig(lr=2e-3, warmup_steps=2),
        sample=SampleConfig(images=1, steps=4),
        checkpoint=CheckpointConfig(every=10),
        steps=20,
    )
