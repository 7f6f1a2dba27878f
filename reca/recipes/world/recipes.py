"""The recipes of the miniature world: four stages from nothing to a base, and what post-training adds."""

from __future__ import annotations

from pathlib import Path

from reca.config import CheckpointConfig, ComputeConfig, OptimConfig, SampleConfig, TrainConfig, WorldConfig
from reca.recipes.world.run import WEIGHTS

_RUNS = Path("runs")
_COMPUTE = ComputeConfig(threads=1)  # a second thread gains little, and loses much if a core is busy
_SHIPPED = "package:world"


def _of(recipe: str) -> str:
    """Weights that a recipe leaves in its default run folder."""
    return str(_RUNS / recipe / WEIGHTS)


def _optim(lr: float) -> OptimConfig:
    return OptimConfig(lr=lr, betas=(0.9, 0.98), eps=1e-8, schedule="cosine", warmup_steps=20)


def _stage(recipe: str, world: WorldConfig, *, weights: str, lr: float, steps: int) -> TrainConfig:
    return TrainConfig(
        recipe=recipe,
        model="miniature/masked",
        weights=weights,
        world=world,
        optim=_optim(lr),
        compute=_COMPUTE,
        sample=SampleConfig(text_guidance=1.5),
        checkpoint=CheckpointConfig(every=200, keep=1),
        steps=steps,
        log_every=20,
    )


def _as_flow(config: TrainConfig, recipe: str) -> TrainConfig:
    """The same recipe for the other kind of generator."""
    sample = config.sample.model_copy(update={"steps": 13, "shift": 3.0})
    return config.model_copy(
        update={
            "recipe": recipe,
            "model": "miniature/flow",
            "sample": sample,
            "optim": _optim(3e-3),
            # The latents of two codes lie several deviations of the noise apart, so which one it will be is
            # decided near time 1; without a shift few steps of training fall there.
            "timestep_shift": 100.0,
        }
    )


def world_encoder() -> TrainConfig:
    """The understanding encoder learns to name every cell of a noisy picture; 10 s on one core."""
    stage = WorldConfig(stage="encoder", gate=0.98)
    return _stage("world-encoder", stage, weights="random", lr=2e-3, steps=350)


def world_language() -> TrainConfig:
    """The trunk learns to answer questions about captions, without any picture; 2.5 minutes on one core."""
    stage = WorldConfig(stage="language", images=96, gate=0.9)
    return _stage("world-language", stage, weights=_of("world-encoder"), lr=2e-3, steps=1600)


def world_alignment() -> TrainConfig:
    """Projector and trunk learn to read pictures as captions are read; a minute on one core."""
    stage = WorldConfig(stage="alignment", images=96, gate=0.95)
    return _stage("world-alignment", stage, weights=_of("world-language"), lr=1.5e-3, steps=1000)


def world_base() -> TrainConfig:
    """The generation expert learns to draw from sparse captions; a minute on one core."""
    stage = WorldConfig(stage="base", gate=0.03)
    config = _stage("world-base", stage, weights=_of("world-alignment"), lr=1.5e-3, steps=1600)
    return config.model_copy(update={"sample": config.sample.model_copy(update={"every": 1200})})


def world_flow_base() -> TrainConfig:
    """The same for the generator that follows a velocity."""
    return _as_flow(world_base(), "world-flow-base")


def world() -> TrainConfig:
    """Post-training of the shipped base on scenes without captions beside others with sparse ones.

    The default arm is RecA and text-to-image, half and half; `arm=captions` and the others are its controls.
    """
    return _stage("world", WorldConfig(stage="arm"), weights=_SHIPPED, lr=6e-4, steps=800)


def world_flow() -> TrainConfig:
    """The same for the generator that follows a velocity."""
    return _as_flow(world(), "world-flow")
