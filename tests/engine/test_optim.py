"""AdamW: what is trained, what is decayed, how it clips and how it comes back."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from toy import ToyModel

from reca.config import OptimConfig
from reca.engine.optim import AdamW
from reca.engine.weights import Weights, copy_exactly, trained_parameters
from reca.errors import CheckpointError, ConfigError


def fill_gradients(optimizer: AdamW, seed: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for gradient in optimizer.gradients.by_name().values():
        gradient.copy_(scale * torch.randn(gradient.shape, generator=generator))


def optimizer_of(model: nn.Module, steps: int = 20, **optim: object) -> AdamW:
    config = OptimConfig.model_validate({"lr": 1e-2, **optim})
    return AdamW(Weights(trained_parameters(model), config), config, steps)


def test_exactly_the_tensors_that_require_gradients_are_trained() -> None:
    model = ToyModel()
    frozen = {name: p.clone() for name, p in model.encoder.named_parameters()}
    optimizer = optimizer_of(model)
    fill_gradients(optimizer, 0)
    optimizer.step(torch.tensor(1.0))
    assert set(optimizer.weights.parameters) == {
        name for name, _ in model.named_parameters() if "encoder" not in name
    }
    assert all(torch.equal(p, frozen[name]) for name, p in model.encoder.named_parameters())


def test_steps_equal_those_of_torch_with_its_clipping() -> None:
    ours, theirs = ToyModel(), ToyModel()
    optimizer = optimizer_of(ours, lr=1e-2, weight_decay=0.1, decay_vectors=True, clip_norm=0.7, eps=1e-8)
    trained = [p for p in theirs.parameters() if p.requires_grad]
    reference = torch.optim.AdamW(
        trained, lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, foreach=False
    )
    for step in range(5):
        fill_gradients(optimizer, step)
        for parameter, gradient in zip(trained, optimizer.gradients.by_name().values(), strict=True):
            parameter.grad = gradient.clone()
        norm = torch.nn.utils.clip_grad_norm_(trained, 0.7)
        update = optimizer.step(torch.tensor(1.0))
        reference.step()
        torch.testing.assert_close(update.grad_norm, norm, rtol=1e-6, atol=0)
        for mine, other in zip(optimizer.weights.parameters.values(), trained, strict=True):
            torch.testing.assert_close(mine, other, rtol=2e-6, atol=2e-7)


def test_small_gradients_are_not_scaled_up_to_the_clipping_norm() -> None:
    clipped, plain = ToyModel(), ToyModel()
    for model, clip in ((clipped, 1e6), (plain, None)):
        optimizer = optimizer_of(model, clip_norm=clip)
        fill_gradients(optimizer, 3)
        optimizer.step(torch.tensor(1.0))
    assert all(torch.equal(a, b) for a, b in zip(clipped.parameters(), plain.parameters(), strict=True))


@pytest.mark.parametrize(
    ("options", "decayed"),
    [
        ({}, {"first.0.weight", "second.0.weight", "head.weight"}),
        ({"no_decay": ["head"]}, {"first.0.weight", "second.0.weight"}),
        ({"decay_vectors": True, "no_decay": ["first", "second"]}, {"head.weight", "head.bias"}),
    ],
)
def test_weight_decay_acts_only_where_the_configuration_says(
    options: dict[str, object], decayed: set[str]
) -> None:
    model = ToyModel()
    before = {name: p.detach().clone() for name, p in trained_parameters(model).items()}
    optimizer = optimizer_of(model, lr=0.5, weight_decay=0.1, eps=1e-8, **options)
    optimizer.step(torch.tensor(1.0))  # gradients are zero: only the decay can move a weight
    moved = {name for name, p in optimizer.weights.parameters.items() if not torch.equal(p, before[name])}
    assert moved == decayed
    for name in decayed:
        torch.testing.assert_close(optimizer.weights.parameters[name].detach(), 0.95 * before[name])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_no_bit(bad: float, where: str) -> None:
    model = ToyModel()
    optimizer = optimizer_of(model, weight_decay=0.1)
    fill_gradients(optimizer, 0)
    optimizer.step(torch.tensor(1.0))
    weights = optimizer.weights.parameters
    kept = {name: t.clone() for name, t in [*weights.items(), *optimizer.state().items()]}
    fill_gradients(optimizer, 1)
    if where == "gradient":
        optimizer.gradients.by_name()["second.0.weight"].view(-1)[1] = bad
    update = optimizer.step(torch.tensor(bad if where == "loss" else 1.0))
    assert bool(update.skipped)
    assert float(optimizer.updates) == 1.0
    for name, tensor in [*weights.items(), *optimizer.state().items()]:
        assert torch.equal(tensor.detach().view(torch.int32), kept[name].detach().view(torch.int32)), name


def test_a_skipped_step_does_not_move_the_schedule() -> None:
    optimizer = optimizer_of(ToyModel(), lr=1.0, warmup_steps=4)
    seen = []
    for loss in (1.0, float("nan"), 1.0, 1.0):
        fill_gradients(optimizer, 0)
        seen.append(float(optimizer.step(torch.tensor(loss)).lr))
    assert seen == [0.0, 0.25, 0.25, 0.5]


def test_restored_moments_continue_bit_for_bit() -> None:
    straight, resumed = ToyModel(), ToyModel()
    one, two = optimizer_of(straight, warmup_steps=3), optimizer_of(resumed, warmup_steps=3)
    for step in range(6):
        if step == 3:
            saved = {name: tensor.clone() for name, tensor in two.state().items()}
            weights = {name: p.detach().clone() for name, p in two.weights.parameters.items()}
            updates = int(two.updates)
            two = optimizer_of(resumed, warmup_steps=3)
            two.restore(saved, updates)
            copy_exactly("weights", {name: p.detach() for name, p in two.weights.parameters.items()}, weights)
        for optimizer in (one, two):
            fill_gradients(optimizer, step)
            optimizer.step(torch.tensor(1.0))
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters(), strict=True))


def test_a_state_that_does_not_fit_is_refused_before_anything_is_copied() -> None:
    optimizer = optimizer_of(ToyModel())
    good = {name: torch.ones_like(tensor) for name, tensor in optimizer.state().items()}
    missing = {name: tensor for name, tensor in good.items() if name != "exp_avg/head.bias"}
    for state, message in [
        (missing, r"1 missing \(first 'exp_avg/head.bias'\), 0 unexpected"),
        (good | {"exp_avg/tail": torch.ones(1)}, r"0 missing, 1 unexpected \(first 'exp_avg/tail'\)"),
        (good | {"exp_avg/head.bias": torch.ones(6)}, r"must be \(5,\) torch.float32, got \(6,\)"),
        (good | {"exp_avg/head.bias": torch.ones(5).double()}, r"got \(5,\) torch.float64"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            optimizer.restore(state, 1)
    assert all(torch.count_nonzero(tensor) == 0 for tensor in optimizer.state().values())


def test_a_model_without_trained_tensors_is_refused() -> None:
    with pytest.raises(ConfigError, match="nothing to train"):
        trained_parameters(ToyModel().requires_grad_(False))


def test_a_no_decay_pattern_that_matches_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="no trained tensor's name contains 'embeding'"):
        optimizer_of(ToyModel(), weight_decay=0.1, no_decay=["embeding"])


def test_trained_tensors_must_be_fp32_masters() -> None:
    with pytest.raises(TypeError, match=r"float32 masters, got torch.bfloat16 for 'first.0.weight'"):
        optimizer_of(ToyModel().to(torch.bfloat16))
