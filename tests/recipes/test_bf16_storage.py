"""Weights stored in bf16 beside the other half of their masters: a step is as right as autocast's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from reca.config import ComputeConfig, TrainConfig
from reca.engine.state import TrainState, prepare_weights
from reca.engine.step import accumulate_gradients, train_step
from reca.engine.weights import trained_parameters
from reca.models import get_variant
from reca.randomness import RandomSource
from reca.recipes import RECIPES, get_recipe
from reca.recipes.assemble import load_model
from reca.types import Batch

CPU = torch.device("cpu")
SMOKES = [name for name in RECIPES if name.endswith("-smoke")]


def bf16(recipe: str, **optim: Any) -> TrainConfig:
    config = get_recipe(recipe)()
    return config.model_copy(
        update={
            "compute": ComputeConfig(precision="bf16"),
            "optim": config.optim.model_copy(update={"warmup_steps": 0, **optim}),
        }
    )


def examples(config: TrainConfig) -> list[Batch]:
    family, variant = get_variant(config.model)
    return [family.example(variant, task, 2) for task in config.tasks]


def model_of(config: TrainConfig) -> Any:
    return load_model(config.model, config.weights, config.compute, config.seed).model


def gradients_of(config: TrainConfig) -> dict[str, Tensor]:
    """Of one microbatch of each task, by autograd from fp32 masters."""
    model = model_of(config)
    prepare_weights(model, CPU)
    for batch in examples(config):
        draws = model.draw(batch, RandomSource(3, 1))
        weights = dict.fromkeys(draws.counts, 1.0)
        accumulate_gradients(model, [batch], [draws], weights, precision=config.compute.precision)
    trained = trained_parameters(model)
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in trained.items()}


def stored_gradients_of(config: TrainConfig) -> dict[str, Tensor]:
    """The same with weights stored as a step stores them."""
    state = TrainState.start(model_of(config), config, CPU)
    gradients = state.optimizer.gradients
    with gradients.attached():
        for batch in examples(config):
            draws = state.model.draw(batch, RandomSource(3, 1))
            weights = dict.fromkeys(draws.counts, 1.0)
            accumulate_gradients(
                state.model, [batch], [draws], weights, precision="bf16", collect=gradients.collect
            )
    return gradients.by_name()


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return float(sum((one[name].double() - other[name].double()).square().sum() for name in one) ** 0.5)


@pytest.mark.parametrize("recipe", SMOKES)
def test_gradients_are_no_further_from_fp32_than_those_of_fp32_masters_under_autocast(recipe: str) -> None:
    config = bf16(recipe)
    exact = gradients_of(config.model_copy(update={"compute": ComputeConfig()}))
    autocast, stored = gradients_of(config), stored_gradients_of(config)
    scale = distance(exact, {name: torch.zeros_like(gradient) for name, gradient in exact.items()})
    assert 0 < distance(autocast, exact) < 0.05 * scale
    assert distance(stored, exact) <= 1.25 * distance(autocast, exact)


@pytest.mark.parametrize("recipe", SMOKES)
def test_every_family_trains_with_everything_in_few_bits_as_it_does_exactly(recipe: str) -> None:
    ends = []
    for few in ({}, {"weights": "bf16", "gradients": "bf16", "moments": "8bit"}):
        config = bf16(recipe, lr=1e-3, **few)
        state = TrainState.start(model_of(config), config, CPU)
        ends.append([float(train_step(state, examples(config)).loss) for _ in range(5)][-1])
    assert ends[1] == pytest.approx(ends[0], rel=0.03)
