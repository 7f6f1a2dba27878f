"""The average of the trained tensors."""

from __future__ import annotations

import pytest
import torch
from toy import ToyModel

from reca.config import OptimConfig
from reca.engine.ema import Ema
from reca.engine.weights import Weights, trained_parameters
from reca.errors import CheckpointError

TAKEN, SKIPPED = torch.tensor(False), torch.tensor(True)


def average_of(model: ToyModel, decay: float) -> Ema:
    return Ema(Weights(trained_parameters(model), OptimConfig()), decay)


def moved(model: ToyModel, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))


def test_only_trained_tensors_are_averaged_and_it_starts_at_the_weights() -> None:
    model = ToyModel()
    ema = average_of(model, 0.9)
    assert set(ema.state()) == set(trained_parameters(model))
    for name, parameter in trained_parameters(model).items():
        assert torch.equal(ema.state()[name], parameter)
        assert ema.state()[name].data_ptr() != parameter.data_ptr()


def test_the_average_follows_its_recurrence() -> None:
    model = ToyModel()
    ema = average_of(model, 0.75)
    expected = {name: p.detach().double() for name, p in trained_parameters(model).items()}
    for step in range(4):
        moved(model, step)
        ema.update(TAKEN)
        expected = {
            name: 0.75 * e + 0.25 * model.get_parameter(name).double() for name, e in expected.items()
        }
    for name, average in ema.state().items():
        torch.testing.assert_close(average.double(), expected[name], rtol=1e-6, atol=1e-6)


def test_a_skipped_step_changes_no_bit_of_the_average_not_even_the_sign_of_zero() -> None:
    model = ToyModel()
    with torch.no_grad():
        model.head.bias.fill_(-0.0)
    ema = average_of(model, 0.9)
    with torch.no_grad():
        model.head.bias.fill_(1.0)
    before = {name: average.clone() for name, average in ema.state().items()}
    ema.update(SKIPPED)
    for name, average in ema.state().items():
        assert torch.equal(average.view(torch.int32), before[name].view(torch.int32)), name


def test_the_model_computes_with_the_average_only_inside_the_context() -> None:
    model = ToyModel()
    ema = average_of(model, 0.5)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    moved(model, 0)
    now = {name: p.detach().clone() for name, p in model.named_parameters()}
    with ema.applied():
        assert all(torch.equal(p, start[name]) for name, p in trained_parameters(model).items())
        assert torch.equal(model.encoder.weight, now["encoder.weight"])
    assert all(torch.equal(p, now[name]) for name, p in model.named_parameters())


def test_the_weights_come_back_when_the_evaluation_fails() -> None:
    model = ToyModel()
    ema = average_of(model, 0.5)
    moved(model, 0)
    now = model.head.weight.detach().clone()
    with pytest.raises(RuntimeError, match="boom"), ema.applied():
        raise RuntimeError("boom")
    assert torch.equal(model.head.weight, now)
    ema.update(TAKEN)
    assert not torch.equal(ema.state()["head.weight"], now)


def test_an_average_that_does_not_fit_is_refused() -> None:
    ema = average_of(ToyModel(), 0.5)
    with pytest.raises(
        CheckpointError, match=r"the average does not fit the model: 6 missing \(first 'first.0.bias'\)"
    ):
        ema.restore({})
