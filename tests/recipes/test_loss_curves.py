"""Thirty steps of every smoke recipe: the operators' own passes train as plain torch does."""

from __future__ import annotations

import math

import pytest
import torch

from reca.config import TrainConfig
from reca.data.sources import open_source, split_source
from reca.engine.state import TrainState
from reca.engine.step import train_step
from reca.kernels import Impl
from reca.recipes import RECIPES, get_recipe
from reca.recipes.assemble import build_streams, held_out_names, load_model
from reca.types import Batch

STEPS = 30
SMOKES = [name for name in RECIPES if name.endswith("-smoke")]
# Measured: 1.7e-7, one unit in the last place of fp32; a lost term or a wrong gradient shows in step 2.
TOLERANCE = 2e-6


def step_batches(config: TrainConfig) -> list[tuple[Batch, ...]]:
    """The microbatches of the first steps."""
    source = open_source(config.data.path)
    training, _ = split_source(source, held_out_names(source, config))
    loaded = load_model(config.model, config.weights, config.compute, config.seed)
    loader = build_streams(config, loaded, training, {}, lambda reject: None)
    try:
        return [next(loader).microbatches for _ in range(STEPS)]
    finally:
        loader.close()


def loss_curve(config: TrainConfig, batches: list[tuple[Batch, ...]], kernels: Impl) -> list[float]:
    """The loss of each step."""
    compute = config.compute.model_copy(update={"kernels": kernels})
    config = config.model_copy(update={"compute": compute})
    loaded = load_model(config.model, config.weights, config.compute, config.seed)
    state = TrainState.start(loaded.model, config, torch.device("cpu"))
    return [float(train_step(state, microbatches).loss) for microbatches in batches]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", SMOKES)
def test_the_loss_falls_along_the_same_curve_with_and_without_kernels(recipe: str) -> None:
    config = get_recipe(recipe)()
    batches = step_batches(config)
    plain, kernels = (loss_curve(config, batches, impl) for impl in ("reference", "auto"))
    assert plain[-1] < plain[0]
    for step, (expected, got) in enumerate(zip(plain, kernels, strict=True), start=1):
        assert math.isclose(got, expected, rel_tol=TOLERANCE), f"step {step}: {got} instead of {expected}"
