"""adamw_: clipping, update, average and rounding of a flattened group in one pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim.adamw import adamw as torch_adamw

from reca.config import OptimConfig
from reca.engine.optim import AdamW
from reca.engine.weights import Weights
from reca.kernels import adamw_, join_master, split_master
from reca.kernels._philox import philox4x32, rounding_words
from reca.kernels.adamw import kernel, op, reference
from reca.kernels.testing import assert_within_budget, make_normal
from reca.randomness import key_of

SETTINGS: dict[str, Any] = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
KEY = key_of(7, "rounding")


def scalar(value: float, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(value, dtype=dtype, device=device)


def make_state(count: int, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A group in the middle of training."""
    names = ("weight", "gradient", "exp_avg", "exp_avg_sq", "ema")
    state = {name: make_normal(count, seed=i, dtype=dtype, device=device) for i, name in enumerate(names)}
    state["exp_avg_sq"] = state["exp_avg_sq"].square()
    return state


def through_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "_step", kernel.step_)


def plain(state: dict[str, Tensor], lr: float, updates: float, divisor: float, ema_decay: float) -> None:
    """Clip, torch's AdamW, average: one after the other, in place."""
    names = ("weight", "gradient", "exp_avg", "exp_avg_sq")
    lists = [[state[name]] for name in names]
    lists[1] = [state["gradient"] / divisor]
    beta1, beta2 = SETTINGS["betas"]
    torch_adamw(
        *lists,
        [],
        [scalar(updates)],
        foreach=False,
        amsgrad=False,
        maximize=False,
        beta1=beta1,
        beta2=beta2,
        lr=lr,
        weight_decay=SETTINGS["weight_decay"],
        eps=SETTINGS["eps"],
    )
    state["ema"].lerp_(state["weight"], 1 - ema_decay)


@given(st.sampled_from([0, 1, 3, 16, 1000, 1024, 2051]), st.sampled_from([0, 1, 20, 5000]))
def test_the_kernel_stays_within_the_error_budget_of_torchs_formula(
    device: str, count: int, updates: int
) -> None:
    state = make_state(count, device=device)
    given_ = {name: tensor.clone() for name, tensor in state.items()}
    lr, divisor = scalar(0.01, device), scalar(3.0, device)
    arguments = (lr, scalar(updates, device), divisor, None, None, 0.9, 0.999, 1e-8, 0.1, 0.9, 0, 0)
    vectors = [given_[name] for name in ("gradient", "exp_avg", "exp_avg_sq", "ema")]
    kernel.step_(given_["weight"], None, *vectors, *arguments)
    exact = {name: tensor.double() for name, tensor in state.items()}
    plain(exact, float(lr), updates, 3.0, 0.9)
    plain(state, float(lr), updates, 3.0, 0.9)
    assert torch.equal(given_["gradient"], make_state(count, device=device)["gradient"])
    for name in ("weight", "exp_avg", "exp_avg_sq", "ema"):
        assert_within_budget(name, given_[name], state[name], exact[name])


def test_three_steps_of_the_reference_are_those_of_the_engine() -> None:
    weight, gradient = make_normal(5, 4, seed=0), 10 * make_normal(5, 4, seed=1)
    parameter = nn.Parameter(weight.clone())
    config = OptimConfig(lr=0.01, warmup_steps=0, betas=(0.9, 0.95), weight_decay=0.1, clip_norm=1.0)
    optimizer = AdamW(Weights({"w": parameter}, config), config, steps=10)
    master = weight.flatten().double()
    m, v = torch.zeros_like(master), torch.zeros_like(master)
    for updates in range(3):
        optimizer.gradients.by_name()["w"].copy_(gradient)
        update = optimizer.step(scalar(1.0))
        adamw_(
            master,
            gradient.flatten(),
            m,
            v,
            lr=update.lr,
            updates=scalar(updates),
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
            divisor=update.grad_norm.clamp(min=1.0),
        )
    torch.testing.assert_close(parameter.detach().flatten().double(), master, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("path", ["kernel", "reference"])
@pytest.mark.parametrize("mode", ["fp32", "split", "rounded"])
def test_a_skipped_step_changes_no_bit_although_the_gradient_is_nan(
    device: str, monkeypatch: pytest.MonkeyPatch, path: str, mode: str
) -> None:
    if path == "kernel":
        through_kernel(monkeypatch)
    state = make_state(1030, device=device)
    state["gradient"].fill_(float("nan"))
    extra: dict[str, Tensor] = {}
    if mode == "split":
        state["weight"], extra["low"] = split_master(state["weight"])
    if mode == "rounded":
        state["weight"], extra["step"] = state["weight"].bfloat16(), scalar(1, device, torch.int64)
    arguments: dict[str, Any] = {"lr": scalar(0.1, device), "updates": scalar(3.0, device)}
    before = {name: tensor.clone() for name, tensor in (state | extra).items()}
    skipped = scalar(True, device, torch.bool)
    nan = scalar(float("nan"), device)
    adamw_(**state, **extra, **arguments, **SETTINGS, divisor=nan, skipped=skipped)
    for name, tensor in (state | extra).items():
        assert torch.equal(tensor.view(-1).view(torch.uint8), before[name].view(-1).view(torch.uint8))
    adamw_(**state, **extra, **arguments, **SETTINGS, skipped=~skipped)
    assert state["exp_avg"].isnan().all()


def test_the_two_halves_of_a_master_lose_no_bit_and_the_upper_is_the_nearest_bf16() -> None:
    words = torch.arange(0, 1 << 16, dtype=torch.int32)
    bits = torch.cat([words * 65537, (words << 16) + 0x8000, (words << 16) + 0x7FFF, (words << 16) - 1])
    master = bits.view(torch.float32)
    weight, low = split_master(master)
    joined = join_master(weight, low)
    number = ~master.isnan()
    assert torch.equal(joined.view(torch.int32)[number], bits[number])
    assert torch.equal(joined.isnan(), ~number)
    assert torch.equal(weight.isnan(), ~number)
    error = (weight.double() - master.double()).abs()
    nearest = (master.bfloat16().double() - master.double()).abs()
    finite = weight.isfinite() & master.bfloat16().isfinite()
    assert torch.equal(error[finite], nearest[finite])


def test_a_split_master_follows_the_fp32_weight_bit_for_bit(device: str) -> None:
    state = make_state(2051, device=device)
    whole = {name: tensor.clone() for name, tensor in state.items()}
    weight, low = split_master(state["weight"])
    arguments = (scalar(0.1, device), scalar(4.0, device), None, None, None, 0.9, 0.999, 1e-8, 0.1, 0.9, 0, 0)
    for _ in range(3):
        for target, half, other in ((whole["weight"], None, whole), (weight, low, state)):
            vectors = [other[name] for name in ("gradient", "exp_avg", "exp_avg_sq", "ema")]
            kernel.step_(target, half, *vectors, *arguments)
    assert torch.equal(join_master(weight, low), whole["weight"])
    assert torch.equal(state["ema"], whole["ema"])


def test_no_low_half_is_lost_on_the_way_through_the_kernel(device: str) -> None:
    bits = torch.arange(0, 1 << 16, dtype=torch.int32, device=device) + (0x3F80 << 16)
    weight, low = split_master(bits.view(torch.float32))
    zeros = [torch.zeros(1 << 16, device=device) for _ in range(3)]
    scalars = (scalar(0.0, device), scalar(0.0, device), None, None, None)
    kernel.step_(weight, low, *zeros, None, *scalars, 0.9, 0.999, 1e-8, 0.1, 0.0, 0, 0)
    expected = split_master(bits.view(torch.float32))
    assert torch.equal(weight, expected[0])
    assert torch.equal(low, expected[1])


def test_stochastic_rounding_takes_its_documented_words_bit_for_bit(device: str) -> None:
    step, offset = scalar(5, device, torch.int64), (1 << 34) + 8
    words = rounding_words(KEY, step, offset, 10).cpu()
    for p, word in enumerate(words.tolist()):
        block = (offset + p) // 4
        assert word == philox4x32(KEY, block & 0xFFFFFFFF, 5, block >> 32, 0)[p % 4] & 0xFFFF
    states = [make_state(1029, device=device) for _ in range(2)]
    for run, state in zip((kernel.step_, reference.step_), states, strict=True):
        state["weight"] = state["weight"].bfloat16()
        # Without a learning rate the master is the weight: only what the words do is left.
        state["exp_avg"].zero_()
        low = make_normal(1029, seed=9, device=device).abs() * 2**-10
        state["gradient"] = torch.zeros_like(low)
        decay = (scalar(1.0, device), scalar(0.0, device), None, None, step, 0.9, 0.999, 1e-8, 0.25, 0.0)
        vectors = [state[name] for name in ("gradient", "exp_avg", "exp_avg_sq", "ema")]
        run(state["weight"], None, *vectors, *decay, op.signed_key(KEY), offset)
    assert torch.equal(states[0]["weight"], states[1]["weight"])


def test_stochastic_rounding_is_right_on_average_and_never_moves_what_is_exact() -> None:
    values = torch.tensor([1.0, 1 + 2**-9, -3.0 - 2**-8, 0.0, float("inf")]).repeat_interleave(1 << 16)
    rounded = reference.round_randomly(
        values, rounding_words(1, scalar(0, dtype=torch.int64), 0, len(values))
    )
    mean = rounded.float().view(5, -1).mean(dim=1)
    torch.testing.assert_close(mean[1:3], torch.tensor([1 + 2**-9, -3.0 - 2**-8]), rtol=1e-4, atol=0)
    assert torch.equal(mean[[0, 3, 4]], torch.tensor([1.0, 0.0, float("inf")]))
    nan = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)
    assert reference.round_randomly(nan, torch.tensor([0xFFFF])).isnan().all()


@pytest.mark.parametrize("mode", ["fp32", "split", "rounded"])
def test_the_operator_keeps_the_contracts_of_the_dispatcher(mode: str) -> None:
    state = make_state(6)
    low, step = None, None
    if mode == "split":
        state["weight"], low = split_master(state["weight"])
    if mode == "rounded":
        state["weight"], step = state["weight"].bfloat16(), scalar(1, dtype=torch.int64)
    vectors = [state[name] for name in ("gradient", "exp_avg", "exp_avg_sq", "ema")]
    scalars = (scalar(0.1), scalar(2.0), scalar(1.5), scalar(False, dtype=torch.bool))
    arguments = (state["weight"], low, *vectors, *scalars, step, 0.9, 0.99, 1e-8, 0.1, 0.9, 3, 8)
    torch.library.opcheck(torch.ops.reca.adamw_.default, arguments)


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_the_public_function_compiles_to_one_graph(impl: str) -> None:
    def step(state: dict[str, Tensor]) -> Tensor:
        adamw_(**state, lr=scalar(0.1), updates=scalar(0.0), **SETTINGS, ema_decay=0.5, impl=impl)
        return state["weight"] * 2

    states = [make_state(7), make_state(7)]
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(step(states[0]), compiled(states[1]))
    for name in states[0]:
        torch.testing.assert_close(states[0][name], states[1][name])


V, ONE = torch.zeros(8), torch.ones(())
GOOD: dict[str, Any] = {"weight": V, "gradient": V, "exp_avg": V, "exp_avg_sq": V, "lr": ONE, "updates": ONE}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"weight": V.half()}, TypeError, r"weight must be one of float32.*, got float16; convert"),
        ({"gradient": V[:3]}, ValueError, r"gradient must be \[8\], got \[3\]; flatten the group"),
        ({"exp_avg": V.view(2, 4)}, ValueError, r"exp_avg must be \[8\], got \[2, 4\]; flatten"),
        (
            {"exp_avg_sq": torch.zeros(16)[::2]},
            ValueError,
            r"exp_avg_sq must be contiguous, got a stride of 2; it is updated in place",
        ),
        ({"ema": V.bfloat16()}, TypeError, r"ema must be one of float32, got bfloat16"),
        ({"gradient": V.int()}, TypeError, r"gradient must be one of float32.*, got int32"),
        ({"lr": V[:1]}, ValueError, r"lr must be \[\], got \[1\]; a scalar on the device"),
        ({"updates": ONE.long()}, TypeError, r"updates must be one of float32, got int64"),
        ({"skipped": ONE}, TypeError, r"skipped must be one of bool, got float32"),
        ({"weight": V.bfloat16()}, ValueError, r"a bfloat16 weight needs either low .* with 0 of them"),
        ({"low": V.to(torch.int16)}, ValueError, r"a bfloat16 weight needs .*float32 with 1 of them"),
        ({"low": V}, TypeError, r"low must be one of int16, got float32"),
        ({"offset": 6}, ValueError, r"offset must be a multiple of 4 from 0 on, got 6; pad the groups"),
        ({"divisor": ONE.to("meta")}, ValueError, r"divisor must be on cpu like weight, got meta"),
        ({"impl": "fused"}, ValueError, r"impl='fused' needs CUDA tensors, got cpu"),
    ],
)
def test_bad_input_is_refused_with_a_cure(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^adamw_: {message}"):
        adamw_(**(GOOD | changes), **SETTINGS)


@pytest.mark.gpu
def test_on_a_gpu_a_captured_graph_replays_on_new_values() -> None:
    states = [make_state(5000, device="cuda") for _ in range(2)]
    lr, updates = scalar(0.1, "cuda"), scalar(0.0, "cuda")
    adamw_(**states[0], lr=lr, updates=updates, **SETTINGS)  # warm-up compiles outside of the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        adamw_(**states[0], lr=lr, updates=updates, **SETTINGS)
    updates.fill_(1.0)
    graph.replay()
    for count in (0.0, 1.0):
        adamw_(**states[1], lr=lr, updates=scalar(count, "cuda"), **SETTINGS)
    for name in states[0]:
        assert torch.equal(states[0][name], states[1][name])
