"""Flow matching: the path between data and noise, and the error of the velocity along it."""

from __future__ import annotations

import pytest
import torch

from reca.objectives.flow_matching import flow_matching, interpolate, shifted_time


def test_the_path_runs_from_data_to_noise_with_the_velocity_as_its_slope() -> None:
    torch.manual_seed(0)
    clean, noise = torch.randn(3, 5), torch.randn(3, 5)
    assert torch.equal(interpolate(clean, noise, torch.zeros(3)), clean)
    assert torch.equal(interpolate(clean, noise, torch.ones(3)), noise)
    early, late = (interpolate(clean, noise, torch.full((3,), t)) for t in (0.25, 0.75))
    torch.testing.assert_close((late - early) / 0.5, noise - clean)
    torch.testing.assert_close(interpolate(clean, noise, torch.tensor([[0.0], [0.25], [1.0]]))[1], early[1])


@pytest.mark.parametrize(("shift", "expected"), [(1.0, 0.25), (3.0, 0.5), (0.5, 1 / 7)])
def test_a_shift_above_one_moves_times_towards_noise(shift: float, expected: float) -> None:
    time = torch.tensor([0.0, 0.25, 1.0])
    torch.testing.assert_close(shifted_time(time, shift), torch.tensor([0.0, expected, 1.0]))


def test_the_loss_is_a_mean_over_channels_and_a_sum_over_counted_tokens() -> None:
    torch.manual_seed(0)
    prediction, clean, noise = torch.randn(4, 6), torch.randn(4, 6), torch.randn(4, 6)
    rows = (prediction - (noise - clean)).square().mean(dim=1)
    mask = torch.tensor([1.0, 0.0, 1.0, 0.0])
    torch.testing.assert_close(flow_matching(prediction, clean, noise), rows.sum())
    torch.testing.assert_close(flow_matching(prediction, clean, noise, mask), rows[0] + rows[2])


def test_a_bf16_prediction_is_compared_in_fp32_with_targets_that_were_not_rounded() -> None:
    torch.manual_seed(0)
    prediction = torch.randn(4, 6).to(torch.bfloat16).requires_grad_()
    clean, noise = torch.randn(4, 6), torch.randn(4, 6)
    loss = flow_matching(prediction, clean, noise)
    assert loss.dtype == torch.float32
    expected = (prediction.detach().float() - (noise - clean)).square().mean(dim=1).sum()
    torch.testing.assert_close(loss.detach(), expected)
    loss.backward()
    exact = 2 * (prediction.detach().float() - (noise - clean)) / 6
    assert prediction.grad is not None and torch.equal(prediction.grad, exact.to(torch.bfloat16))
