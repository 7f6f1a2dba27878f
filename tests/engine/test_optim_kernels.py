"""AdamW through the operator of reca: the same update as torch's own, with the average in the same pass."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from toy import ToyModel

from reca.config import OptimConfig
from reca.engine import optim
from reca.engine.ema import Ema
from reca.engine.optim import AdamW
from reca.engine.weights import Weights, trained_parameters

CONFIG = OptimConfig(lr=1e-2, eps=1e-8, weight_decay=0.1, clip_norm=0.7, warmup_steps=2)
DECAY = 0.9


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, but the operator runs its reference."""
    monkeypatch.setattr(optim, "runs_fused", lambda impl, device: impl == "auto")


def run(kernels: str, losses: list[float]) -> tuple[AdamW, Ema]:
    """A few steps with drawn gradients; a loss that is not finite skips its step."""
    model = ToyModel()
    weights = Weights(trained_parameters(model), CONFIG)
    optimizer, ema = AdamW(weights, CONFIG, 20, kernels), Ema(weights, DECAY)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    for loss in losses:
        for gradient in optimizer.gradients.by_name().values():
            gradient.copy_(torch.randn(gradient.shape, generator=generator))
        optimizer.step(torch.tensor(loss), ema)
    return optimizer, ema


def everything(optimizer: AdamW, ema: Ema) -> dict[str, Tensor]:
    weights = {f"weight/{name}": p.detach() for name, p in optimizer.weights.parameters.items()}
    averages = {f"ema/{name}": average for name, average in ema.state().items()}
    return weights | averages | optimizer.state() | {"updates": optimizer.updates}


@pytest.mark.usefixtures("fused")
def test_the_operator_updates_weights_moments_and_average_as_torch_does() -> None:
    expected, got = (everything(*run(kernels, [1.0] * 6)) for kernels in ("reference", "auto"))
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=2e-6, atol=2e-7, msg=name)
    assert float(got["updates"]) == 6


@pytest.mark.usefixtures("fused")
def test_a_step_that_is_not_finite_changes_no_bit_and_does_not_count() -> None:
    before = everything(*run("auto", [1.0] * 3))
    after = everything(*run("auto", [1.0] * 3 + [float("nan")]))
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert float(after["updates"]) == 3


@pytest.mark.usefixtures("fused")
def test_a_run_continues_bit_for_bit_from_its_state() -> None:
    whole, _ = run("auto", [1.0] * 4)
    first, _ = run("auto", [1.0] * 3)
    resumed = AdamW(Weights(trained_parameters(ToyModel()), CONFIG), CONFIG, 20)
    resumed.weights.restore(first.weights.masters())
    resumed.restore(first.state(), int(first.updates))
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):  # the gradients of the fourth step
        for gradient in resumed.gradients.by_name().values():
            gradient.copy_(torch.randn(gradient.shape, generator=generator))
    resumed.step(torch.tensor(1.0))
    for name, parameter in whole.weights.parameters.items():
        assert torch.equal(resumed.weights.parameters[name], parameter), name


def test_on_a_cpu_torch_updates_whatever_is_asked_for_but_fused() -> None:
    for name, tensor in everything(*run("reference", [1.0] * 2)).items():
        assert torch.equal(everything(*run("auto", [1.0] * 2))[name], tensor), name
