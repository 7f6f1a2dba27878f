"""From a configuration with a world to a finished run whose weights the next stage starts from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from reca.config import ComputeConfig, TrainConfig
from reca.engine.loop import Job, run
from reca.engine.state import select_device
from reca.errors import CheckpointError, ConfigError
from reca.files import publish_dir
from reca.models.miniature.checkpoint import load_understanding, read_description, save
from reca.models.miniature.config import MiniatureConfig
from reca.models.miniature.model import MiniatureModel
from reca.recipes.assemble import (
    RANDOM,
    Loaded,
    load_model,
    sample_options,
    weights_fingerprint,
    weights_folder,
)
from reca.recipes.world.arms import get_arm, loss_weights, trained_parts
from reca.recipes.world.evaluation import WorldEvaluation
from reca.recipes.world.stream import WorldLoader
from reca.world.scenes import World

WEIGHTS = "weights"
"""Folder inside a run with the whole model at its end, which another run can start from."""
FAMILY = "miniature"

_IGNORED = (
    "data",
    "image_to_text",
    "text_to_image",
    "loss_weights",
    "normalize",
    "sample.images",
    "sample.image_guidance",
    "compute.attention",
    "compute.kernels",
    "compute.recompute",
)
_IGNORED_IF_MASKED = ("sample.steps", "sample.shift", "timestep_shift")


def train_world(
    config: TrainConfig,
    folder: Path,
    *,
    resume: Literal["auto"] | Path | None = None,
    on_progress: Callable[[Mapping[str, Any]], None] = lambda record: None,
    on_start: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Run a stage or an arm to its end, write its weights, and check its gate.

    Args: as of `reca.recipes.api.train`.
    Returns: the summary.
    Raises: RecaError; CheckpointError if the gate is missed, after everything is written.
    """
    job = assemble_world(config, folder, on_progress=on_progress, on_start=on_start)
    summary = run(job, resume=resume)
    assert isinstance(job.model, MiniatureModel)
    if not (folder / WEIGHTS).exists():
        _write_weights(config, folder, job.model, summary)
    check_gate(config, folder, summary)
    return summary


def assemble_world(
    config: TrainConfig,
    folder: Path,
    *,
    on_progress: Callable[[Mapping[str, Any]], None],
    on_start: Callable[[], None],
) -> Job:
    """Everything a run in the world needs.

    Raises: ConfigError for what would be ignored, an unknown arm or no held-out pair; CheckpointError for
    weights that do not fit or belong to another world. Nothing is written before.
    """
    assert config.world is not None
    refuse_ignored(config)
    world = World.of(config.world.held_out)
    loaded = starting_model(config)
    model = loaded.model
    assert isinstance(model, MiniatureModel)
    return Job(
        config=config.model_copy(
            update={
                "loss_weights": loss_weights(config),
                "optim": config.optim.model_copy(update={"lr": config.optim.lr * get_arm(config).rate}),
            }
        ),
        model=model,
        loader=WorldLoader(config, model.config),
        folder=folder,
        evaluate=WorldEvaluation(model, config, sample_options(config)),
        fingerprint={"world": world.identity, "weights": weights_fingerprint(loaded.weights)},
        on_progress=on_progress,
        on_start=on_start,
    )


def refuse_ignored(config: TrainConfig) -> None:
    """Raise ConfigError for a value that a run in the world would not use."""
    assert config.world is not None
    if not config.model.startswith(f"{FAMILY}/"):
        raise ConfigError(f"the world is drawn by {FAMILY}/masked or {FAMILY}/flow, got model={config.model}")
    ignored = [*_IGNORED, *(_IGNORED_IF_MASKED if config.model == f"{FAMILY}/masked" else ())]
    ignored += ["arm"] if config.world.stage != "arm" else []
    blank = TrainConfig(recipe=config.recipe, model=config.model)
    for key in ignored:
        if _value(config, key) != _value(blank, key):
            raise ConfigError(
                f"{key} would be ignored by {config.recipe}, a run in the miniature world; drop it"
            )


def _value(config: TrainConfig, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def starting_model(config: TrainConfig, compute: ComputeConfig | None = None) -> Loaded:
    """The model before the first step: loaded as far as its stage goes, the rest drawn from the seed.

    Raises: ConfigError without weights; CheckpointError if they do not fit or belong to another world.
    """
    assert config.world is not None
    compute = compute or config.compute
    stage, identity = config.world.stage, World.of(config.world.held_out).identity
    if stage == "arm":
        loaded = load_model(config.model, config.weights, compute, config.seed)
    else:
        loaded = load_model(config.model, RANDOM, compute, config.seed)
    model = loaded.model
    assert isinstance(model, MiniatureModel)
    if stage == "encoder" or config.weights == RANDOM:
        model.world = identity
    elif stage != "arm":
        folder = weights_folder(config.weights)
        assert folder is not None
        load_understanding(model, folder, select_device(compute))
        loaded = replace(loaded, weights=folder)
    if model.world != identity:
        raise CheckpointError(
            f"{config.weights} was taught in world {model.world}, but this is world {identity} (format and "
            "held-out pairs); use weights of this world, or make them: `reca train world-encoder`, "
            "world-language, world-alignment and world-base"
        )
    if stage == "base":
        model.start_generator()
    if config.timestep_shift is not None:
        model.timestep_shift = config.timestep_shift
    model.train_only(*trained_parts(config))
    return loaded


def _write_weights(
    config: TrainConfig, folder: Path, model: MiniatureModel, summary: Mapping[str, Any]
) -> None:
    assert isinstance(model.config, MiniatureConfig)
    facts = {config.recipe: {"seed": config.seed, "steps": config.steps, "scores": summary["after"]}}
    source = weights_folder(config.weights) if config.weights not in (None, RANDOM) else None
    known = {} if source is None else read_description(source)
    with publish_dir(folder / WEIGHTS) as staging:
        save(model, staging, facts={**known, **facts})


def check_gate(config: TrainConfig, folder: Path, summary: Mapping[str, Any]) -> None:
    """Raise CheckpointError if the stage did not reach its gate: what follows would fail silently."""
    assert config.world is not None
    gate = config.world.gate
    if gate is None:
        return
    after = summary["after"]
    if config.world.stage == "base":
        gain = after.get("gain_of_last_quarter")
        if gain is not None and gain > gate:
            raise CheckpointError(
                f"{folder}: the score rose by {gain:.3f} over the last quarter, more than world.gate={gate}; "
                f"train longer (steps={2 * config.steps})"
            )
        return
    name = {"encoder": "cells", "language": "descriptions_of_captions"}.get(
        config.world.stage, "descriptions_of_pictures"
    )
    if after[name] < gate:
        raise CheckpointError(
            f"{folder}: {name} are right in {after[name]:.3f}, less than world.gate={gate}; train longer "
            f"(steps={2 * config.steps}): a half-trained model reconstructs and yet gains nothing"
        )
