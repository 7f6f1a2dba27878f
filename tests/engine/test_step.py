"""One step: normalisation, microbatches, names, finiteness, precision; and that the host never waits."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from toy import DIM, ToyBatch, ToyModel, toy_batch, toy_config

from reca.config import ComputeConfig
from reca.engine.state import TrainState, recomputed
from reca.engine.step import StepLoss, accumulate_gradients, train_step
from reca.errors import ConfigError
from reca.randomness import RandomSource

CPU = torch.device("cpu")
WEIGHTS = {"reconstruction": 1.0, "image_to_text": 0.3}


def masked(ids: Sequence[int]) -> ToyBatch:
    """A batch in which every third sample does not count, so that microbatches have unequal counts."""
    return toy_batch(ids, mask=torch.tensor([float(i % 3 > 0) for i in ids]))


def gradients_of(microbatches: list[ToyBatch], **options: Any) -> tuple[StepLoss, dict[str, Tensor]]:
    model = ToyModel(captions=True)
    draws = [model.draw(batch, RandomSource(1, 1)) for batch in microbatches]
    loss = accumulate_gradients(model, microbatches, draws, WEIGHTS, **options)
    return loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("cuts", [[1, 12], [5, 8], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]])
def test_gradients_do_not_depend_on_microbatching(cuts: list[int]) -> None:
    whole, expected = gradients_of([masked(range(13))])
    edges = [0, *cuts, 13]
    parts = [masked(range(a, b)) for a, b in pairwise(edges)]
    loss, got = gradients_of(parts)
    torch.testing.assert_close(loss.total, whole.total, rtol=1e-6, atol=0)
    for name, gradient in expected.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(got[name], gradient, rtol=0, atol=1e-6 * scale)


def test_the_loss_is_the_weighted_mean_over_what_counts() -> None:
    model, batch = ToyModel(captions=True), masked(range(7))
    draws = model.draw(batch, RandomSource(1, 1))
    sums = {name: float(term.detach()) for name, term in model(batch, draws).items()}
    loss, _ = gradients_of([batch])
    counted = float(batch.mask.sum())
    assert float(loss.terms["reconstruction"]) == pytest.approx(sums["reconstruction"] / (counted * DIM))
    assert float(loss.terms["image_to_text"]) == pytest.approx(sums["image_to_text"] / counted)
    total = float(loss.terms["reconstruction"]) + 0.3 * float(loss.terms["image_to_text"])
    assert float(loss.total) == pytest.approx(total)


def test_normalize_microbatch_averages_the_means_of_the_microbatches() -> None:
    parts = [masked(range(4)), masked(range(4, 13))]
    alone = [gradients_of([part]) for part in parts]
    loss, got = gradients_of(parts, normalize="microbatch")
    assert float(loss.total) == pytest.approx(sum(float(one.total) for one, _ in alone) / 2)
    for name, gradient in got.items():
        torch.testing.assert_close(
            gradient, (alone[0][1][name] + alone[1][1][name]) / 2, rtol=1e-5, atol=1e-7
        )
    assert float(loss.total) != pytest.approx(float(gradients_of(parts)[0].total), rel=1e-4)


@pytest.mark.parametrize("normalize", ["global", "microbatch"])
def test_labels_that_are_all_ignored_give_zero_loss_and_zero_gradients(normalize: Any) -> None:
    loss, gradients = gradients_of([toy_batch([0, 1, 2], mask=torch.zeros(3))], normalize=normalize)
    assert float(loss.total) == 0.0
    assert all(float(term) == 0.0 for term in loss.terms.values())
    assert all(torch.count_nonzero(gradient) == 0 for gradient in gradients.values())


def test_a_microbatch_that_reaches_no_weight_is_no_error() -> None:
    class Detached(ToyModel):
        def forward(self, batch: ToyBatch, draws: Any) -> dict[str, Tensor]:
            return {name: term.detach() for name, term in super().forward(batch, draws).items()}

    model, batch = Detached(), toy_batch([0])
    loss = accumulate_gradients(model, [batch], [model.draw(batch, RandomSource(1))], {"reconstruction": 1.0})
    assert float(loss.total) > 0 and all(p.grad is None for p in model.parameters())


def test_a_term_of_weight_zero_is_measured_but_not_trained() -> None:
    model, batch = ToyModel(captions=True), toy_batch([0, 1])
    draws = [model.draw(batch, RandomSource(1))]
    loss = accumulate_gradients(model, [batch], draws, {"reconstruction": 1.0, "image_to_text": 0.0})
    only, plain = ToyModel(), {"reconstruction": 1.0}
    accumulate_gradients(only, [batch], [only.draw(batch, RandomSource(1))], plain)
    assert torch.equal(model.head.weight.grad, only.head.weight.grad)  # type: ignore[arg-type]
    assert float(loss.terms["image_to_text"]) > 0
    model.head.bias.data[0] = float("inf")
    broken = accumulate_gradients(model, [batch], draws, {"reconstruction": 0.0, "image_to_text": 0.0})
    assert float(broken.terms["reconstruction"]) == float("inf") and float(broken.total) == 0.0


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (
            {"reconstruction": 1.0, "image_to_texts": 1.0},
            "no term 'image_to_texts'.*did you mean 'image_to_text'",
        ),
        ({"reconstruction": 1.0}, "'image_to_text' has no weight; add loss_weights.image_to_text=1"),
    ],
)
def test_names_of_losses_must_match_exactly(weights: dict[str, float], message: str) -> None:
    model, batch = ToyModel(captions=True), toy_batch([0])
    with pytest.raises(ConfigError, match=message):
        accumulate_gradients(model, [batch], [model.draw(batch, RandomSource(1))], weights)


def test_terms_that_were_not_counted_are_a_bug_of_the_model() -> None:
    model, batch = ToyModel(), toy_batch([0])
    draws = model.draw(batch, RandomSource(1))
    model.captions = True
    with pytest.raises(
        ValueError, match=r"ToyModel: terms \['image_to_text', 'reconstruction'\] must be those"
    ):
        accumulate_gradients(model, [batch], [draws], {"reconstruction": 1.0})


def test_random_numbers_depend_on_the_step_and_the_sample_only() -> None:
    state = TrainState.start(ToyModel(), toy_config(), CPU)
    first = train_step(state, [toy_batch(range(6))])
    again = TrainState.start(ToyModel(), toy_config(), CPU)
    torch.manual_seed(99)
    second = train_step(again, [toy_batch(range(2)), toy_batch(range(2, 6))])
    assert float(first.loss) == pytest.approx(float(second.loss), rel=1e-6)
    # The first update has a learning rate of 0, so the same batch differs only by its draws.
    assert float(train_step(state, [toy_batch(range(6))]).loss) != pytest.approx(float(first.loss), rel=1e-3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["pixel", "gradient"])
def test_a_bad_step_changes_no_bit_of_weights_moments_average_and_schedule(bad: float, where: str) -> None:
    state = TrainState.start(ToyModel(), toy_config(), CPU)
    for _ in range(3):
        train_step(state, [toy_batch(range(6))])
    before = {name: tensor.clone() for name, tensor in everything(state).items()}
    batch = toy_batch(range(6))
    if where == "pixel":
        batch.clean[3, 2] = bad
    else:
        state.model.head.bias.register_hook(lambda gradient: torch.full_like(gradient, bad))
    metrics = train_step(state, [toy_batch(range(6, 9)), batch])
    assert bool(metrics.skipped)
    assert state.step == 4
    for name, tensor in everything(state).items():
        assert torch.equal(tensor.view(torch.int32), before[name].view(torch.int32)), name


def everything(state: TrainState) -> dict[str, Tensor]:
    assert state.ema is not None
    tensors = {f"weight/{name}": p.detach() for name, p in state.optimizer.weights.parameters.items()}
    tensors |= state.optimizer.state() | {f"ema/{name}": t for name, t in state.ema.state().items()}
    return tensors | {"updates": state.optimizer.updates.reshape(1)}


READS = ["item", "tolist", "__bool__", "__int__", "__float__", "__index__", "numpy", "cpu", "nonzero"]


class NoScalars(TorchDispatchMode):
    """Refuses the operators by which a value leaves the device, also where C++ asks for it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            raise AssertionError(f"the host read a tensor through {func}")
        return func(*args, **(kwargs or {}))


@contextmanager
def no_reads() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch, NoScalars():
        for name in READS:

            def refuse(*args: Any, _name: str = name) -> None:
                raise AssertionError(f"the host read a tensor through {_name}")

            patch.setattr(Tensor, name, refuse)
        yield


@pytest.mark.parametrize(
    "options", [{}, {"normalize": "microbatch"}, {"compute": ComputeConfig(precision="bf16")}]
)
def test_a_step_reads_no_tensor_on_the_host(options: dict[str, Any]) -> None:
    state = TrainState.start(ToyModel(), toy_config(**options), CPU)
    batches = [toy_batch(range(4)), toy_batch(range(4, 6))]
    with no_reads():
        train_step(state, batches)
    assert state.step == 1


@pytest.mark.parametrize(
    "read", [lambda t: t.item(), lambda t: t.tolist(), bool, float, lambda t: torch.nonzero(t)]
)
def test_the_ban_on_reads_catches_each_way_of_reading(read: Any) -> None:
    value = torch.tensor(1.0)
    with pytest.raises(AssertionError, match="the host read a tensor"), no_reads():
        read(value)


def test_a_step_runs_on_tensors_without_values() -> None:
    with FakeTensorMode():
        state = TrainState.of(ToyModel(), toy_config())
        metrics = train_step(state, [toy_batch(range(4)), toy_batch(range(4, 6))])
    assert metrics.loss.shape == metrics.grad_norm.shape == metrics.lr.shape == metrics.skipped.shape == ()


@pytest.mark.gpu
@pytest.mark.parametrize("normalize", ["global", "microbatch"])
def test_a_step_on_the_gpu_never_waits_for_it(normalize: str) -> None:
    device = torch.device("cuda")
    state = TrainState.start(ToyModel(), toy_config(normalize=normalize), device)
    batches = [toy_batch(range(4)).to(device), toy_batch(range(4, 6)).to(device)]
    train_step(state, batches)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        metrics = train_step(state, batches)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not bool(metrics.skipped)


@pytest.mark.gpu
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_step_on_the_gpu_changes_no_bit(bad: float) -> None:
    device = torch.device("cuda")
    state = TrainState.start(ToyModel(), toy_config(), device)
    train_step(state, [toy_batch(range(6)).to(device)])
    before = {name: tensor.clone() for name, tensor in everything(state).items()}
    batch = toy_batch(range(6))
    batch.clean[3, 2] = bad
    assert bool(train_step(state, [batch.to(device)]).skipped)
    for name, tensor in everything(state).items():
        assert torch.equal(tensor.view(torch.int32), before[name].view(torch.int32)), name


def test_bf16_computes_in_bf16_with_fp32_masters_and_frozen_weights_as_loaded() -> None:
    config = toy_config(compute=ComputeConfig(precision="bf16"))
    seen: list[torch.dtype] = []
    model = ToyModel()
    model.encoder.to(torch.bfloat16)
    model.first[0].register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    state = TrainState.start(model, config, CPU)
    exact = TrainState.start(ToyModel(), toy_config(), CPU)
    loss = train_step(state, [toy_batch(range(6))]).loss
    assert seen == [torch.bfloat16]
    assert model.encoder.weight.dtype == torch.bfloat16
    assert {p.dtype for p in state.optimizer.weights.parameters.values()} == {torch.bfloat16}
    assert {p.dtype for p in state.optimizer.weights.masters().values()} == {torch.float32}
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(float(train_step(exact, [toy_batch(range(6))]).loss), rel=2e-2)


def test_recomputed_blocks_give_the_same_gradients_with_fewer_saved_activations() -> None:
    def run(enabled: bool) -> tuple[list[Tensor], int, int]:
        model, batch, calls = ToyModel(), toy_batch(range(6)), []
        model.first[0].register_forward_hook(lambda *_: calls.append(1))
        saved: list[int] = []
        with (
            recomputed(model.blocks(), enabled),
            torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t),
        ):
            accumulate_gradients(
                model, [batch], [model.draw(batch, RandomSource(1))], {"reconstruction": 1.0}
            )
        assert "forward" not in vars(model.first)
        return [p.grad for p in model.parameters() if p.grad is not None], len(calls), sum(saved)

    plain, recomputing = run(False), run(True)
    assert all(torch.equal(a, b) for a, b in zip(plain[0], recomputing[0], strict=True))
    assert (plain[1], recomputing[1]) == (1, 2)
    assert recomputing[2] < plain[2]


def _rank(rank: int, folder: Path, normalize: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    state = TrainState.start(
        ToyModel(captions=True), toy_config(loss_weights=WEIGHTS, normalize=normalize), CPU
    )
    for step in range(3):
        mine = (
            masked(range(13 * step, 13 * step + 4))
            if rank == 0
            else masked(range(13 * step + 4, 13 * step + 13))
        )
        metrics = train_step(state, [mine])
    torch.save({"loss": metrics.loss, "weights": state.model.state_dict()}, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("normalize", ["global", "microbatch"])
def test_two_ranks_take_the_same_step_as_one_process(tmp_path: Path, normalize: str) -> None:
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=_rank, args=(rank, tmp_path, normalize)) for rank in range(2)]
    for process in ranks:
        process.start()
    state = TrainState.start(
        ToyModel(captions=True), toy_config(loss_weights=WEIGHTS, normalize=normalize), CPU
    )
    for step in range(3):
        parts = [masked(range(13 * step, 13 * step + 4)), masked(range(13 * step + 4, 13 * step + 13))]
        metrics = train_step(state, parts)
    for process in ranks:
        process.join(30)
        assert process.exitcode == 0
    got = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert torch.equal(got[0]["loss"], got[1]["loss"])
    assert float(got[0]["loss"]) == pytest.approx(float(metrics.loss), rel=1e-6)
    for name, weight in state.model.state_dict().items():
        assert torch.equal(got[0]["weights"][name], got[1]["weights"][name])
        torch.testing.assert_close(got[0]["weights"][name], weight, rtol=1e-5, atol=1e-6)
