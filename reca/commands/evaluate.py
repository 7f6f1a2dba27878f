"""`reca evaluate RUN --suite world`: scores with standard errors of a run or of weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from reca.errors import ConfigError, nearest
from reca.models.miniature.model import MiniatureModel
from reca.recipes import get_recipe
from reca.recipes.api import load
from reca.recipes.assemble import Loaded, load_model, sample_options
from reca.recipes.resolve import read_config
from reca.recipes.world.evaluation import (
    SCENES_PER_PROMPT,
    describe_scenes,
    draw_prompts,
    flat_scores,
    reconstruct_scenes,
)
from reca.world.scenes import World
from reca.world.score import summarise


def evaluate(
    source: str, suite: str, *, model: str | None, seed: int | None, prompts: int | None, device: str
) -> dict[str, Any]:
    """Score a run or weights.

    Args:
        source: run folder, folder of weights, or `package:world`.
        suite: one of SUITES.
        model: family/variant of a folder of weights; a run knows its own.
        seed: of prompts, pictures and test scenes; None takes the run's, or 0.
        prompts: of each category; None takes the run's, or the recipe's.
        device: auto, cpu or cuda.

    Returns: `suite`, `model`, `seed`, and `scores`: name -> value and name/standard_error.
    Raises: ConfigError for an unknown suite or a model that the suite cannot score; CheckpointError.
    """
    if suite not in SUITES:
        raise ConfigError(f"unknown suite {suite!r}; {nearest(suite, SUITES)}")
    return {"suite": suite, **SUITES[suite](source, model, seed, prompts, device)}


def _world(
    source: str, name: str | None, seed: int | None, prompts: int | None, device: str
) -> dict[str, Any]:
    """Exact scores in the miniature world."""
    path = Path(source) / "config.yaml"
    config = read_config(path) if path.is_file() else None
    loaded = _load(source, name, device, is_run=config is not None)
    model = loaded.model
    if not isinstance(model, MiniatureModel):
        raise ConfigError(
            f"the suite world scores the family miniature, got {loaded.family.name}; train one with "
            "`reca train world`"
        )
    recipe = "world" if model.config.generator == "masked" else "world-flow"
    config = config if config is not None and config.world is not None else get_recipe(recipe)()
    assert config.world is not None
    seed = config.seed if seed is None else seed
    options = sample_options(config.model_copy(update={"seed": seed}))
    prompts = prompts or config.world.prompts
    drawn = draw_prompts(
        model,
        World.of(config.world.held_out),
        seed=seed,
        prompts=prompts,
        samples=config.world.samples,
        options=options,
    )
    scores = summarise({category: one.right for category, one in drawn.items()})
    count = SCENES_PER_PROMPT * prompts
    scores |= {
        "reconstruction": reconstruct_scenes(model, seed, count, options),
        "descriptions_of_captions": describe_scenes(model, seed, count, is_seen=False),
        "descriptions_of_pictures": describe_scenes(model, seed, count, is_seen=True),
    }
    return {"model": f"miniature/{model.config.generator}", "seed": seed, "scores": flat_scores(scores)}


def _load(source: str, name: str | None, device: str, *, is_run: bool) -> Loaded:
    if source.startswith("package:"):
        compute = get_recipe("world")().compute.model_copy(update={"device": device})
        return load_model(name or "miniature/masked", source, compute)
    return load(source, name if not is_run else None, device=device)


SUITES: Mapping[str, Callable[..., dict[str, Any]]] = {"world": _world}


def render(result: Mapping[str, Any]) -> str:
    """One line for each score, with its standard error."""
    scores = result["scores"]
    lines = [f"suite {result['suite']}, {result['model']}, seed {result['seed']}"]
    for name, value in scores.items():
        if "/" not in name:
            lines.append(f"  {name:<26} {value:.3f}  +- {scores[f'{name}/standard_error']:.3f}")
    return "\n".join(lines)
