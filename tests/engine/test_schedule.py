"""The learning rate as a function of the updates done."""

from __future__ import annotations

import math

import pytest
import torch

from reca.config import OptimConfig
from reca.engine.schedule import learning_rate


def rates(optim: OptimConfig, steps: int) -> list[float]:
    return learning_rate(torch.arange(steps), optim, steps).tolist()


def test_warm_up_starts_at_exactly_zero_and_reaches_the_peak_after_its_last_step() -> None:
    optim = OptimConfig(lr=4e-5, warmup_steps=1000)
    all_rates = rates(optim, 1001)
    assert all_rates[0] == 0.0
    assert all_rates[1] == pytest.approx(4e-8, rel=1e-6)
    assert all_rates[999] == pytest.approx(0.999 * 4e-5, rel=1e-6)
    assert all_rates[1000] == pytest.approx(4e-5, rel=1e-7)


def test_a_thousand_warm_up_steps_train_at_half_the_peak_on_average() -> None:
    published = rates(OptimConfig(lr=4e-5, warmup_steps=1000), 1000)
    assert sum(published) / 1000 == pytest.approx(1.998e-5, rel=1e-6)


def test_no_warm_up_starts_at_the_peak() -> None:
    assert rates(OptimConfig(lr=1e-3), 3) == pytest.approx([1e-3] * 3)


def test_cosine_falls_from_the_peak_after_warm_up_to_the_floor() -> None:
    optim = OptimConfig(lr=1.0, min_lr=0.1, schedule="cosine", warmup_steps=4)
    got = learning_rate(torch.tensor([4, 7, 10, 16, 99]), optim, 16).tolist()
    quarter = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4))
    assert got == pytest.approx([1.0, quarter, 0.55, 0.1, 0.1], rel=1e-6)


def test_warm_up_scales_the_cosine_too() -> None:
    optim = OptimConfig(lr=1.0, schedule="cosine", warmup_steps=4)
    assert rates(optim, 16)[:4] == pytest.approx([0.0, 0.25, 0.5, 0.75])


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_a_run_that_is_all_warm_up_has_finite_rates(schedule: str) -> None:
    optim = OptimConfig.model_validate({"lr": 1.0, "schedule": schedule, "warmup_steps": 5})
    assert rates(optim, 5) == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8])
