"""adamw_ with moments in 8 bits: the same update, no stall, no runaway step, and convergence like fp32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from reca.kernels import adamw_, join_master, split_master
from reca.kernels.adamw import kernel, op
from reca.kernels.adamw.moments import BLOCK, FIRST, SECOND, decode_moment, encode_moment
from reca.kernels.testing import make_normal

SETTINGS: dict[str, Any] = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
MODES = ("fp32", "split", "rounded")


def scalar(value: float, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(value, dtype=dtype, device=device)


def make_state(count: int, mode: str = "fp32", *, device: str = "cpu") -> dict[str, Any]:
    """A group in the middle of training, as keyword arguments of `adamw_`."""
    weight, gradient, m, v, ema = (make_normal(count, seed=i, device=device) for i in range(5))
    words = torch.randint(1 << 16, (count,), generator=torch.Generator().manual_seed(5)).to(device)
    exp_avg, first = encode_moment(m / 10, words, FIRST)
    exp_avg_sq, second = encode_moment(0.1 + v.square(), words, SECOND)
    state: dict[str, Any] = {"weight": weight, "gradient": gradient, "ema": ema}
    state |= {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "moment_scales": (first, second)}
    state |= {"step": scalar(1, device, torch.int64), "key": 7}
    if mode == "split":
        state["weight"], state["low"] = split_master(weight)
    if mode == "rounded":
        state["weight"] = weight.bfloat16()
    return state


def tensors(state: dict[str, Any]) -> list[Tensor]:
    return [t for t in (*state.values(), *state["moment_scales"]) if isinstance(t, Tensor)]


def master(state: dict[str, Any]) -> Tensor:
    return join_master(state["weight"], state["low"]) if "low" in state else state["weight"].float()


def moments(state: dict[str, Any]) -> tuple[Tensor, Tensor]:
    first, second = state["moment_scales"]
    return decode_moment(state["exp_avg"], first, FIRST), decode_moment(state["exp_avg_sq"], second, SECOND)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("count", [0, 1, 256, 2303])
def test_one_update_is_that_of_fp32_moments_and_the_kernel_is_the_reference(
    device: str, monkeypatch: pytest.MonkeyPatch, mode: str, count: int
) -> None:
    states = [make_state(count, mode, device=device) for _ in range(3)]
    options: dict[str, Any] = {"lr": scalar(0.01, device), "updates": scalar(9.0, device)}
    options |= {"divisor": scalar(3.0, device), "ema_decay": 0.5, **SETTINGS}
    m, v = moments(states[2])
    exact = {"weight": master(states[2]).clone(), "gradient": states[2]["gradient"], "ema": states[2]["ema"]}
    adamw_(**exact, exp_avg=m, exp_avg_sq=v, **options)
    adamw_(**states[0], **options)
    monkeypatch.setattr(op, "_step", kernel.step_)
    adamw_(**states[1], **options)
    for state in states[:2]:
        torch.testing.assert_close(
            master(state), exact["weight"], rtol=2**-7 if mode == "rounded" else 1e-5, atol=1e-6
        )
        torch.testing.assert_close(state["ema"], exact["ema"], rtol=1e-5, atol=1e-6)
        for got, want in zip(moments(state), (m, v), strict=True):
            assert bool(((got - want).abs() <= want.abs() / 8 + 2**-15).all())
    # A last bit of the arithmetic may push a value over a random threshold: rarely, and by one code.
    for name in ("exp_avg", "exp_avg_sq"):
        difference = (states[0][name].int() - states[1][name].int()).abs()
        assert int((difference > 0).sum()) <= count // 100
        assert not (difference > 1).any()


@pytest.mark.parametrize("path", ["kernel", "reference"])
@pytest.mark.parametrize("mode", MODES)
def test_a_skipped_step_changes_no_bit_although_the_gradient_is_nan(
    device: str, monkeypatch: pytest.MonkeyPatch, path: str, mode: str
) -> None:
    if path == "kernel":
        monkeypatch.setattr(op, "_step", kernel.step_)
    state = make_state(1030, mode, device=device)
    state["gradient"].fill_(float("nan"))
    before = [tensor.clone() for tensor in tensors(state)]
    options: dict[str, Any] = {"lr": scalar(0.1, device), "updates": scalar(3.0, device), **SETTINGS}
    skipped = scalar(True, device, torch.bool)
    adamw_(**state, **options, divisor=scalar(float("nan"), device), skipped=skipped)
    for tensor, old in zip(tensors(state), before, strict=True):
        assert torch.equal(tensor.view(-1).view(torch.uint8), old.view(-1).view(torch.uint8))
    adamw_(**state, **options, skipped=~skipped)
    assert all(moment.isnan().all() for moment in moments(state))
    assert master(state).isnan().all()


def run(state: dict[str, Any], gradients: list[Tensor], lr: float = 0.0, **changes: Any) -> None:
    for updates, gradient in enumerate(gradients):
        state["gradient"] = gradient
        if "step" in state:
            state["step"] = scalar(updates, dtype=torch.int64)
        adamw_(**state, lr=scalar(lr), updates=scalar(float(updates)), **(SETTINGS | changes))


def start(weight: Tensor, mode: str = "fp32") -> dict[str, Any]:
    """Before the first update."""
    count = len(weight)
    state = make_state(count, mode)
    state["weight"] = weight.bfloat16() if mode == "rounded" else weight.clone()
    if mode == "split":
        state["weight"], state["low"] = split_master(weight)
    for tensor in (state["exp_avg"], state["exp_avg_sq"], *state["moment_scales"]):
        tensor.zero_()
    del state["ema"]
    return state


def test_the_average_of_squares_follows_a_change_far_below_one_code() -> None:
    # Each step changes v by at most a thousandth; rounding to nearest would never leave the first code.
    count, steps = 8 * BLOCK, 300
    state = start(torch.zeros(count))
    loud, quiet = torch.full((count,), 8.0), torch.full((count,), 1.0)
    run(state, [loud] * 20 + [quiet] * steps)
    v = 64 * (1 - 0.999**20) * 0.999**steps + (1 - 0.999**steps)
    got = moments(state)[1]
    assert float(got.mean()) == pytest.approx(v, rel=0.03)
    assert float(got.std()) < 0.3 * v


def test_moments_that_were_rounded_apart_make_no_step_larger_than_adamws(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in (op._step, kernel.step_):
        monkeypatch.setattr(op, "_step", path)
        state = start(torch.zeros(BLOCK))
        state = {name: t.to(device) if isinstance(t, Tensor) else t for name, t in state.items()}
        state["moment_scales"] = tuple(torch.ones(1, device=device) for _ in range(2))
        state["exp_avg"].fill_(1)  # the smallest first moment, beside second moments of zero
        state["gradient"] = torch.full((BLOCK,), 1e-9, device=device)
        options: dict[str, Any] = {"lr": scalar(1.0, device), "updates": scalar(1e6, device)}
        adamw_(**state, **options, **(SETTINGS | {"eps": 1e-30, "weight_decay": 0.0}))
        # (1 - beta1) / sqrt((1 - beta2) (1 - beta1^2 / beta2)) for 0.9 and 0.999
        assert float(state["weight"].abs().max()) <= 7.28


def test_a_bf16_weight_moves_on_average_by_updates_far_below_its_last_place() -> None:
    # A last place of 1 is 2^-8 downwards; rounding to nearest would never leave it.
    state = start(torch.ones(8 * BLOCK), "rounded")
    run(state, [torch.ones(8 * BLOCK)] * 40, lr=1e-4, weight_decay=0.0)
    assert float(state["weight"].float().mean()) == pytest.approx(1 - 40e-4, abs=2e-4)


def regression_loss(mode: str | None, steps: int = 200) -> float:
    """Last loss of a small network on a teacher's outputs; None trains with fp32 moments."""
    inputs, teacher = make_normal(256, 8, seed=0), make_normal(8, 3, seed=1)
    targets = torch.tanh(inputs @ teacher).sum(dim=1, keepdim=True)
    # Columns of very different size, so that blocks mix large and small gradients.
    inputs = inputs * torch.logspace(-2, 1, 8)
    weight = make_normal(8 * 64 + 64, seed=2) / 8
    state = start(weight, mode or "fp32")
    if mode is None:
        zeros = {name: torch.zeros(len(weight)) for name in ("exp_avg", "exp_avg_sq")}
        state = {"weight": weight.clone(), **zeros}
    loss = torch.tensor(0.0)
    for updates in range(steps):
        leaf = master(state).requires_grad_()
        hidden = torch.tanh(inputs @ leaf[:512].view(8, 64))
        loss = (hidden @ leaf[512:].view(64, 1) - targets).square().mean()
        state["gradient"] = torch.autograd.grad(loss, leaf)[0]
        if mode is not None:
            state["step"] = scalar(updates, dtype=torch.int64)
        options: dict[str, Any] = {"lr": scalar(0.01), "updates": scalar(float(updates))}
        adamw_(**state, **options, **(SETTINGS | {"weight_decay": 0.0}))
    return float(loss.detach())


def test_training_converges_as_with_fp32_moments() -> None:
    whole, untrained = regression_loss(None), regression_loss(None, steps=1)
    assert whole < 0.15 * untrained
    for mode in ("split", "rounded"):
        assert regression_loss(mode) < 1.1 * whole, mode


@pytest.mark.parametrize("mode", MODES)
def test_the_operator_keeps_the_contracts_of_the_dispatcher(mode: str) -> None:
    state = make_state(300, mode)
    vectors = [state[name] for name in ("gradient", "exp_avg", "exp_avg_sq", "ema")]
    scalars = (scalar(0.1), scalar(2.0), scalar(1.5), scalar(False, dtype=torch.bool), state["step"])
    settings = (0.9, 0.99, 1e-8, 0.1, 0.9, 3, 8, *state["moment_scales"])
    arguments = (state["weight"], state.get("low"), *vectors, *scalars, *settings)
    torch.library.opcheck(torch.ops.reca.adamw_.default, arguments)


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_the_public_function_compiles_to_one_graph(impl: str) -> None:
    def step(state: dict[str, Any]) -> Tensor:
        adamw_(**state, lr=scalar(0.1), updates=scalar(0.0), **SETTINGS, impl=impl)
        return state["weight"] * 2

    states = [make_state(300), make_state(300)]
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(step(states[0]), compiled(states[1]))
    for got, want in zip(tensors(states[0]), tensors(states[1]), strict=True):
        torch.testing.assert_close(got, want)


V, U, S, ONE = torch.zeros(8), torch.zeros(8, dtype=torch.uint8), torch.zeros(1), torch.ones(())
STEP = torch.tensor(0)
GOOD: dict[str, Any] = {"weight": V, "gradient": V, "exp_avg": U, "exp_avg_sq": U, "lr": ONE, "updates": ONE}
GOOD |= {"moment_scales": (S, S), "step": STEP}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"exp_avg": V}, TypeError, r"exp_avg must be one of uint8, got float32; convert"),
        ({"moment_scales": None}, TypeError, r"exp_avg must be one of float32, got uint8"),
        ({"moment_scales": (S, V)}, ValueError, r"moment_scales\[1\] must be \[1\], got \[8\]; one per 256"),
        (
            {"moment_scales": (S.half(), S)},
            TypeError,
            r"moment_scales\[0\] must be one of float32, got float16",
        ),
        ({"moment_scales": (S, S.to("meta"))}, ValueError, r"moment_scales\[1\] must be on cpu like weight"),
        ({"step": None}, ValueError, r"8-bit moments are rounded at random, got no step; pass key and step"),
        ({"low": V.to(torch.int16)}, ValueError, r"a bfloat16 weight needs .*float32 with 1 of them"),
        (
            {"weight": V.double()},
            TypeError,
            r"a weight with 8-bit moments must be one of float32, bfloat16, got float64",
        ),
    ],
)
def test_bad_input_is_refused_with_a_cure(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^adamw_: {message}"):
        adamw_(**(GOOD | changes), **SETTINGS)


def test_scales_of_a_larger_tensor_must_be_contiguous() -> None:
    big = {"weight": torch.zeros(512), "gradient": torch.zeros(512)}
    codes = {name: torch.zeros(512, dtype=torch.uint8) for name in ("exp_avg", "exp_avg_sq")}
    with pytest.raises(
        ValueError, match=r"^adamw_: moment_scales\[0\] must be contiguous, got a stride of 2"
    ):
        adamw_(**(GOOD | big | codes | {"moment_scales": (torch.zeros(4)[::2], torch.zeros(2))}), **SETTINGS)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
def test_on_a_gpu_a_captured_graph_replays_on_new_values(mode: str) -> None:
    states = [make_state(5000, mode, device="cuda") for _ in range(2)]
    lr, updates = scalar(0.1, "cuda"), scalar(0.0, "cuda")
    adamw_(**states[0], lr=lr, updates=updates, **SETTINGS)  # warm-up compiles outside of the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        adamw_(**states[0], lr=lr, updates=updates, **SETTINGS)
    updates.fill_(1.0)
    graph.replay()
    for count in (0.0, 1.0):
        adamw_(**states[1], lr=lr, updates=scalar(count, "cuda"), **SETTINGS)
    for got, want in zip(tensors(states[0]), tensors(states[1]), strict=True):
        assert torch.equal(got, want)
