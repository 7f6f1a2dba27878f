"""Flat storage of the trained tensors: halves of masters, sums of gradients, what is kept in fewer bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from toy import ToyModel, toy_batch, toy_config

from reca.config import ComputeConfig, OptimConfig
from reca.engine.checkpoint import load_checkpoint, save_checkpoint
from reca.engine.gradients import Gradients
from reca.engine.state import TrainState
from reca.engine.step import accumulate_gradients, train_step
from reca.engine.weights import ALIGNMENT, Weights, read_in_bf16, trained_parameters
from reca.errors import CheckpointError
from reca.kernels import interpreted_kernels, triton_interprets
from reca.randomness import RandomSource

CPU = torch.device("cpu")
BF16 = ComputeConfig(precision="bf16")
SMALL: dict[str, Any] = {"weights": "bf16", "gradients": "bf16", "moments": "8bit"}


def start(**optim: Any) -> TrainState:
    plain = {"lr": 3e-2, "warmup_steps": 3, "ema": 0.9, "clip_norm": 0.5, "weight_decay": 0.01}
    config = toy_config(compute=BF16, optim=OptimConfig.model_validate(plain | optim))
    return TrainState.start(ToyModel(), config, CPU)


def train(state: TrainState, steps: int) -> list[float]:
    batches = [[toy_batch(range(k, k + 4)), toy_batch(range(k + 4, k + 6))] for k in range(0, 6 * steps, 6)]
    return [float(train_step(state, batch).loss) for batch in batches]


def tensors(state: TrainState) -> dict[str, Tensor]:
    assert state.ema is not None
    masters = {f"weight/{name}": tensor for name, tensor in state.optimizer.weights.masters().items()}
    averages = {f"ema/{name}": tensor for name, tensor in state.ema.state().items()}
    return {name: t.clone() for name, t in (masters | averages | state.optimizer.state()).items()}


# What lies where


def test_every_parameter_is_an_aligned_view_of_a_flat_buffer_and_keeps_its_values() -> None:
    model = ToyModel()
    before = {name: p.detach().clone() for name, p in trained_parameters(model).items()}
    weights = Weights(trained_parameters(model), OptimConfig())
    for group in weights.groups:
        assert group.count == group.weight.numel() and group.count % ALIGNMENT == 0
        for slot in group.slots:
            parameter = weights.parameters[slot.name]
            assert slot.start % ALIGNMENT == 0
            assert parameter.data_ptr() == group.weight[slot.start :].data_ptr()
            assert torch.equal(parameter, before[slot.name])
    assert [*weights.by_name([group.weight for group in weights.groups])] == [*before]


def test_only_linear_layers_and_convolutions_are_read_in_bf16() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5), nn.LayerNorm(5), nn.Conv1d(2, 3, 1))
    model.append(nn.Linear(4, 5, bias=False))
    model[4].weight = model[0].weight  # tied: the embedding looks it up in fp32
    model[3].bias.requires_grad_(False)
    assert read_in_bf16(model) == {"1.weight", "1.bias", "3.weight"}


def test_masters_come_back_bit_for_bit_from_their_two_halves() -> None:
    model = ToyModel()
    with torch.no_grad():
        model.head.weight.copy_(torch.randn(model.head.weight.shape) * 2.0 ** torch.randint(-30, 30, (5, 7)))
    masters = {name: p.detach().clone() for name, p in trained_parameters(model).items()}
    weights = Weights(trained_parameters(model), OptimConfig(), read_in_bf16(model))
    assert all(group.weight.dtype == torch.bfloat16 for group in weights.groups)
    assert weights.masters().keys() == masters.keys() and len(weights.masters()) == len(masters)
    for name, master in masters.items():
        assert torch.equal(weights.masters()[name], master)
        assert torch.equal(weights.parameters[name], master.to(torch.bfloat16))  # what autocast would cast to
    other = Weights(trained_parameters(ToyModel(seed=1)), OptimConfig(), read_in_bf16(model))
    other.restore(weights.masters())
    assert all(torch.equal(other.masters()[name], master) for name, master in masters.items())


def test_masters_that_do_not_fit_are_refused_before_anything_is_copied() -> None:
    weights = Weights(trained_parameters(ToyModel()), OptimConfig(), read_in_bf16(ToyModel()))
    before = {name: tensor.clone() for name, tensor in weights.masters().items()}
    wrong = {name: torch.zeros_like(tensor) for name, tensor in before.items()}
    wrong["head.bias"] = wrong["head.bias"].to(torch.bfloat16)
    with pytest.raises(CheckpointError, match=r"must be \(5,\) torch.float32, got \(5,\) torch.bfloat16"):
        weights.restore(wrong)
    assert all(torch.equal(weights.masters()[name], tensor) for name, tensor in before.items())


# What a step computes


class Skewed(ToyModel):
    """Also an fp32 matrix, an odd vector that not every microbatch reaches, and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(3, 7)
        self.norm = nn.LayerNorm(7)
        self.sometimes = nn.Parameter(torch.ones(301))

    def forward(self, batch: Any, draws: Any) -> dict[str, Tensor]:
        terms = super().forward(batch, draws)
        rows = self.norm(self.table(batch.sample_ids % 3))
        extra = F.linear(rows, self.head.weight, self.head.bias).float().square().sum()
        if batch.num_images > 2:
            extra = extra + self.sometimes.square().sum()
        return {"reconstruction": terms["reconstruction"] + extra}


def test_sums_of_gradients_are_those_that_autocast_gives_fp32_masters() -> None:
    parts = [toy_batch(range(4)), toy_batch(range(4, 6))]
    plain, stored = Skewed(), Skewed()
    stored.load_state_dict(plain.state_dict())
    for parameter in trained_parameters(plain).values():
        parameter.grad = torch.zeros_like(parameter)
    weights = Weights(trained_parameters(stored), OptimConfig(), read_in_bf16(stored))
    gradients = Gradients(weights)
    losses = []
    for model, collect in ((plain, lambda: None), (stored, gradients.collect)):
        draws = [model.draw(part, RandomSource(1)) for part in parts]
        with gradients.attached():
            options: dict[str, Any] = {"precision": "bf16", "collect": collect}
            losses.append(accumulate_gradients(model, parts, draws, {"reconstruction": 1.0}, **options).total)
    assert torch.equal(*losses)
    for name, gradient in gradients.by_name().items():
        assert torch.equal(gradient, plain.get_parameter(name).grad), name  # type: ignore[arg-type]
    assert all(parameter.grad is None for parameter in weights.parameters.values())
    expected = torch.cat([p.grad.flatten() for p in trained_parameters(plain).values()]).double().norm()  # type: ignore[union-attr]
    torch.testing.assert_close(gradients.norm().double(), expected, rtol=1e-6, atol=0)


def test_a_tensor_that_no_microbatch_reaches_has_a_zero_gradient() -> None:
    model = Skewed()
    weights = Weights(trained_parameters(model), OptimConfig())
    gradients = Gradients(weights)
    with gradients.attached():
        model.head(torch.ones(1, 7)).sum().backward()
    gradients.collect()
    reached = {name for name, gradient in gradients.by_name().items() if torch.count_nonzero(gradient)}
    assert reached == {"head.weight", "head.bias"}
    gradients.zero()
    assert not any(torch.count_nonzero(flat) for flat in gradients.flats)


def test_gradients_stay_where_autograd_puts_them_outside_a_step() -> None:
    model = ToyModel()
    gradients = Gradients(Weights(trained_parameters(model), OptimConfig()))
    with gradients.attached():
        pass
    model.head(torch.ones(1, 7)).sum().backward()
    assert model.head.weight.grad is not None
    assert not any(torch.count_nonzero(flat) for flat in gradients.flats)


def test_bf16_training_learns_as_fp32_training_does() -> None:
    exact = TrainState.start(ToyModel(), start().config.model_copy(update={"compute": ComputeConfig()}), CPU)
    expected, got = train(exact, 60), train(start(), 60)
    assert sum(got[-10:]) == pytest.approx(sum(expected[-10:]), rel=0.02)
    assert sum(got[-10:]) < 0.9 * sum(got[:10])


# What is kept in fewer bits


def test_small_state_learns_too_and_takes_five_bytes_per_weight() -> None:
    small = start(**SMALL)
    expected, got = train(start(), 60), train(small, 60)
    assert sum(got[-10:]) == pytest.approx(sum(expected[-10:]), rel=0.05)
    matrices = [group for group in small.optimizer.weights.groups if not group.is_small]
    assert [(group.weight.dtype, group.low) for group in matrices] == [(torch.bfloat16, None)]
    state = small.optimizer.state()
    assert state["exp_avg/head.weight"].dtype == state["exp_avg_sq/head.weight"].dtype == torch.uint8
    assert state["exp_avg_scale/head.weight"].shape == (1,)
    assert state["exp_avg/head.bias"].dtype == torch.float32
    assert small.optimizer.gradients.by_name()["head.weight"].dtype == torch.bfloat16


def test_random_rounding_moves_the_mean_where_rounding_to_nearest_would_stand_still() -> None:
    state = start(weights="bf16", ema=None, weight_decay=0.0, warmup_steps=0, lr=1e-4, clip_norm=None)
    weights, gradients = state.optimizer.weights, state.optimizer.gradients
    (group,) = [group for group in weights.groups if not group.is_small]
    group.weight.fill_(1.0)
    for _ in range(20):  # AdamW with a constant gradient moves every weight by lr: a 40th of a bf16 step
        for flat in gradients.flats:
            flat.fill_(1.0)
        state.optimizer.step(torch.tensor(1.0))
    used = torch.cat([slot.view(group.weight).flatten() for slot in group.slots]).double()
    assert float(used.std()) > 0
    assert 1 - float(used.mean()) == pytest.approx(20e-4, rel=0.35)  # 4 standard deviations of 189 weights


@pytest.mark.parametrize("optim", [{}, SMALL, {"moments": "8bit"}, {"weights": "bf16"}])
def test_a_run_goes_on_bit_for_bit_from_its_checkpoint(optim: dict[str, Any], tmp_path: Any) -> None:
    straight, first = start(**optim), start(**optim)
    train(straight, 3), train(first, 3)
    folder = save_checkpoint(tmp_path, 3, first.to_checkpoint({"config": "x"}), keep=1)
    resumed = start(**optim)
    resumed.restore(load_checkpoint(folder))
    assert train(straight, 3) == train(resumed, 3)
    expected = tensors(straight)
    assert tensors(resumed).keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors(resumed).items())


@pytest.mark.parametrize("optim", [{}, SMALL])
def test_a_skipped_step_changes_no_bit(optim: dict[str, Any]) -> None:
    state = start(**optim)
    train(state, 3)
    before = tensors(state)
    bad = toy_batch(range(4))
    train_step(state, [bad, toy_batch([7], mask=torch.full((1,), float("nan")))])
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors(state).items())
    assert float(state.optimizer.updates) == 3


def test_an_evaluation_computes_with_the_average_and_the_weights_come_back() -> None:
    state = start()
    train(state, 3)
    assert state.ema is not None
    before, average = tensors(state), state.ema.state()["head.weight"].clone()
    with state.averaged():
        assert torch.equal(state.model.head.weight, average)
        assert state.model.head.weight.dtype == torch.float32
    assert state.model.head.weight.dtype == torch.bfloat16
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors(state).items())
    train(state, 1)


@pytest.mark.skipif(not triton_interprets(), reason="Triton runs on a CPU only with TRITON_INTERPRET=1")
@pytest.mark.parametrize("optim", [{}, SMALL])
def test_the_kernel_updates_what_the_reference_updates(optim: dict[str, Any]) -> None:
    expected, got = start(**optim), start(**optim)
    train(expected, 2)
    with interpreted_kernels():
        train(got, 2)
    reference = tensors(expected)
    for name, tensor in tensors(got).items():
        if tensor.dtype == torch.float32:
            torch.testing.assert_close(tensor, reference[name], rtol=1e-5, atol=1e-6, msg=name)
