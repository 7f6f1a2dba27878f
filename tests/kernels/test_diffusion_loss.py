"""diffusion_noise and diffusion_loss: learned-variance diffusion, with the gradient in the same pass."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from reca.kernels import PhiloxNoise, diffusion_loss, diffusion_noise
from reca.kernels._philox import normal_rows, signed_key
from reca.kernels.diffusion_loss import kernel, op, reference
from reca.kernels.testing import assert_within_budget, make_normal, misaligned
from reca.randomness import RandomSource, key_of

KEY, TIMES = key_of(3, "noise"), 7
ARGUMENTS = ("output", "clean", "noise", "time", "table", "mask")


def make_table(dtype: torch.dtype = torch.float32) -> Tensor:
    """[7, 8]: the smallest and the largest variance differ at every time."""
    betas = torch.tensor([3e-4, 1e-4, 1e-3, 0.01, 0.05, 0.2, 0.5], dtype=torch.float64)
    signal = torch.cumprod(1 - betas, dim=0)
    before = torch.cat([torch.ones(1, dtype=torch.float64), signal[:-1]])
    variance = betas * (1 - before) / (1 - signal)
    columns = (
        signal.sqrt(),
        (1 - signal).sqrt(),
        signal.rsqrt(),
        (1 / signal - 1).sqrt(),
        betas * before.sqrt() / (1 - signal),
        (1 - before) * (1 - betas).sqrt() / (1 - signal),
        torch.cat([variance[1:2], variance[1:]]).log(),
        betas.log(),
    )
    return torch.stack(columns, dim=1).to(torch.float32).to(dtype)


def make_inputs(
    tokens: int, dim: int, *, levels: int = 2, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> dict[str, Any]:
    """Predictions near the noise, every time (the first in a seventh of the rows), every fifth row masked."""
    rows = levels * tokens
    noise = make_normal(rows, dim, seed=0, dtype=dtype, device=device)
    near = noise + 0.3 * make_normal(rows, dim, seed=1, dtype=dtype, device=device)
    mask = make_normal(rows, seed=4, device=device).abs()
    mask[4::5] = 0
    return {
        "output": torch.cat([near, make_normal(rows, dim, seed=2, dtype=dtype, device=device)], dim=1),
        "clean": make_normal(tokens, dim, seed=3, dtype=dtype, device=device),
        "noise": noise,
        "time": torch.arange(rows, device=device) * 3 % TIMES,
        "table": make_table().to(device),
        "mask": mask,
    }


def make_philox(tokens: int, levels: int, device: str) -> dict[str, Any]:
    """Noise of two images by its coordinates, and the image of each row: levels outside, images inside."""
    first = tokens // 3
    image = (torch.arange(tokens) >= first).long()
    within = torch.where(image == 1, torch.arange(tokens) - first, torch.arange(tokens))
    sizes = torch.where(image == 1, tokens - first, first)
    rows = torch.cat([level * sizes + within for level in range(levels)])
    step, samples = torch.tensor(4, device=device), torch.tensor([9, 1 << 35], device=device)
    return {
        "noise": PhiloxNoise(KEY, step, samples, rows.to(device)),
        "images": image.repeat(levels).to(device),
    }


def normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def plain(inputs: dict[str, Tensor]) -> Tensor:
    """The objective as models write it, under autograd; the weighted sum over rows."""
    levels = len(inputs["time"]) // max(len(inputs["clean"]), 1)
    wide = torch.promote_types(inputs["output"].dtype, torch.float32)
    epsilon, v = inputs["output"].to(wide).chunk(2, dim=1)
    clean, noise = inputs["clean"].to(wide).repeat(levels, 1), inputs["noise"].to(wide)
    columns = inputs["table"].to(wide)[inputs["time"]].split(1, dim=1)
    signal, level, inverse_signal, inverse_noise, at_clean, at_noised, smallest, largest = columns
    x_t = signal * clean + level * noise
    mean = at_clean * clean + at_noised * x_t
    other = at_clean * (inverse_signal * x_t - inverse_noise * epsilon.detach()) + at_noised * x_t
    log_variance = (v + 1) / 2 * largest + (1 - v) / 2 * smallest
    p, q = (
        torch.distributions.Normal(m, (s / 2).exp()) for m, s in ((mean, smallest), (other, log_variance))
    )
    first = (inputs["time"] == 0)[:, None]
    deviation = (log_variance / 2).exp()
    centred = torch.where(first, clean - other, 0)
    above, below = normal_cdf((centred + 1 / 255) / deviation), normal_cdf((centred - 1 / 255) / deviation)
    edges = torch.where(clean < -0.999, above, torch.where(clean > 0.999, 1 - below, above - below))
    nats = torch.where(first, -edges.clamp(min=1e-12).log(), torch.distributions.kl_divergence(p, q))
    terms = (noise - epsilon).square() + nats / math.log(2)
    return (inputs["mask"].to(wide) * terms.mean(dim=1)).sum()


def values(inputs: dict[str, Tensor]) -> list[Tensor]:
    return [inputs[name] for name in ARGUMENTS]


def doubled(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.double() if t.is_floating_point() else t for name, t in inputs.items()}


def plain_gradient(inputs: dict[str, Tensor]) -> Tensor:
    leaf = inputs["output"].clone().requires_grad_()
    return torch.autograd.grad(plain(inputs | {"output": leaf}), leaf)[0]


def run_kernel(inputs: dict[str, Any], with_gradient: bool = True) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    names = ("output", "clean", "time", "table", "mask")
    given_ = (None, inputs["noise"], None, None, None, 0)
    return kernel.forward(*(inputs[name] for name in names), *given_, with_gradient)


def through_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "_forward", op._cuda)
    monkeypatch.setattr(op, "_noised", op._noised_cuda)


def test_the_reference_and_its_gradient_are_the_formula() -> None:
    inputs = doubled(make_inputs(40, 5))
    loss, squared, variational, gradient = reference.forward(*values(inputs))
    torch.testing.assert_close(loss, plain(inputs), rtol=1e-10, atol=0)
    torch.testing.assert_close(loss, (inputs["mask"] * (squared + variational)).sum())
    torch.testing.assert_close(gradient, plain_gradient(inputs), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_only_the_output_receives_a_gradient_and_it_is_scaled(impl: Any) -> None:
    inputs = make_inputs(9, 4)
    for name in ("output", "clean", "noise", "mask"):
        inputs[name].requires_grad_()
    loss, squared_error, variational = diffusion_loss(**inputs, impl=impl)
    (-3 * loss).backward()
    assert not squared_error.requires_grad
    assert not variational.requires_grad
    assert inputs["clean"].grad is inputs["noise"].grad is inputs["mask"].grad is None
    expected = -3 * plain_gradient({name: t.detach() for name, t in inputs.items()})
    torch.testing.assert_close(inputs["output"].grad, expected, rtol=1e-4, atol=1e-5)


def test_without_anything_to_train_no_gradient_is_formed(device: str) -> None:
    inputs = make_inputs(9, 4, device=device)
    assert not diffusion_loss(**inputs)[0].requires_grad
    with_gradient, without = run_kernel(inputs), run_kernel(inputs, False)
    assert without[3].numel() == 0
    assert all(torch.equal(a, b) for a, b in zip(with_gradient[:3], without[:3], strict=True))


@given(
    st.sampled_from([0, 1, 17, 64, 130]), st.sampled_from([1, 3, 16, 100]), st.integers(1, 4), st.booleans()
)
def test_the_kernel_stays_within_the_error_budget(
    device: str, tokens: int, dim: int, levels: int, shifted: bool
) -> None:
    inputs = make_inputs(tokens, dim, levels=levels, device=device)
    rows = {name: misaligned(inputs[name]) for name in ("output", "clean", "noise", "mask")}
    loss, squared, variational, gradient = run_kernel(inputs | rows if shifted else inputs)
    exact = doubled(inputs)
    assert_within_budget("loss", loss, plain(inputs), plain(exact))
    assert_within_budget("gradient", gradient, plain_gradient(inputs), plain_gradient(exact))
    rows = (reference.forward(*values(kind))[1:3] for kind in (inputs, exact))
    for tensors in zip((squared, variational), *rows, strict=True):
        assert_within_budget("row", *tensors)


@given(st.sampled_from([0, 1, 37, 200]), st.sampled_from([1, 3, 16, 100]), st.integers(1, 3))
def test_noised_rows_stay_within_the_error_budget(device: str, tokens: int, dim: int, levels: int) -> None:
    inputs = make_inputs(tokens, dim, levels=levels, device=device)
    clean, noise, time, table = (inputs[name] for name in ARGUMENTS[1:5])
    got = kernel.noised(misaligned(clean), time, table, None, noise, None, None, None, 0, torch.float32)
    honest, exact = (
        reference.noised(*(t.to(dtype) for t in (clean, noise)), time, table, dtype)
        for dtype in (torch.float32, torch.float64)
    )
    assert_within_budget("noised", got, honest, exact)
    low = kernel.noised(clean, time, table, None, noise, None, None, None, 0, torch.bfloat16)
    # One unit in the last place: the interpreter truncates where the GPU rounds.
    torch.testing.assert_close(low.double(), exact, rtol=2**-7, atol=1e-6)


def test_bf16_is_storage_and_the_arithmetic_is_fp32(device: str) -> None:
    inputs = make_inputs(40, 16, dtype=torch.bfloat16, device=device)
    loss, _, _, gradient = run_kernel(inputs)
    exact = doubled(inputs)
    assert_within_budget("loss", loss, plain(inputs), plain(exact))
    torch.testing.assert_close(gradient.double(), plain_gradient(exact), rtol=2**-7, atol=1e-6)


def test_the_tails_of_the_likelihood_are_those_of_fp32(device: str) -> None:
    inputs = make_inputs(64, 16, levels=1, device=device)
    # The centre, then the clamp and overflow; between them one rounding of 1 + tanh decides all.
    far = torch.tensor([-1e3, 1e3, -1e9, 1e9, -1e15, 1e15, 0.2, 0.1])
    distances = torch.cat([torch.linspace(-1, 1, 56), far]).to(device)
    inputs["output"][:, :16] = inputs["noise"] + distances[:, None]
    # So wide or so narrow that a bin holds less than fp32 can tell from nothing.
    inputs["output"][:, 16], inputs["output"][:, 17], inputs["mask"] = 60.0, -20.0, None
    inputs["time"] = torch.zeros(64, dtype=torch.int64, device=device)
    _, _, variational, gradient = run_kernel(inputs)
    _, _, honest, honest_gradient = reference.forward(*values(inputs))
    torch.testing.assert_close(variational, honest, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradient[:, 16:], honest_gradient[:, 16:], rtol=1e-3, atol=1e-4)
    assert gradient[:, 16:].isfinite().all()


@pytest.mark.parametrize("fused", [False, True])
def test_regenerated_noise_is_that_of_the_random_source(
    device: str, monkeypatch: pytest.MonkeyPatch, fused: bool
) -> None:
    if fused:
        through_kernel(monkeypatch)
    inputs, drawn = make_inputs(9, 8, levels=3, device=device), make_philox(9, 3, device)
    parts = RandomSource(3, 4).normal_rows("noise", drawn["noise"].samples, [9, 18], 8).split([9, 18])
    noise = torch.cat([part.view(3, -1, 8) for part in parts], dim=1).flatten(0, 1)
    torch.testing.assert_close(
        normal_rows(
            KEY, drawn["noise"].step, drawn["noise"].samples[drawn["images"]], drawn["noise"].rows, 8
        ),
        noise,
        rtol=0,
        atol=0,
    )
    given_ = inputs | {"noise": noise}
    for got, want in zip(diffusion_loss(**inputs | drawn), diffusion_loss(**given_), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    forward = (inputs["clean"], inputs["time"], inputs["table"])
    noised = [
        diffusion_noise(forward[0], n, *forward[1:], images=drawn["images"]) for n in (drawn["noise"], noise)
    ]
    torch.testing.assert_close(*noised, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("fused", [False, True])
def test_a_row_that_does_not_count_may_hold_anything(
    device: str, monkeypatch: pytest.MonkeyPatch, fused: bool
) -> None:
    if fused:
        through_kernel(monkeypatch)
    inputs = make_inputs(10, 4, device=device) | make_philox(10, 2, device)
    inputs["mask"][4] = inputs["mask"][14] = 0
    expected = diffusion_loss(**inputs)
    inputs["output"][4::5], inputs["clean"][4], inputs["time"][4] = float("inf"), float("nan"), -1
    inputs["images"][9] = 7
    inputs["output"].requires_grad_()
    got = diffusion_loss(**inputs)
    got[0].backward()
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)
    assert not got[1][4::5].any()
    assert not inputs["output"].grad[4::5].any()
    assert inputs["output"].grad.isfinite().all()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("name", "value"), [("time", TIMES), ("time", -1), ("images", 2), ("images", -1)])
def test_a_time_or_image_out_of_range_is_nan(
    device: str, monkeypatch: pytest.MonkeyPatch, name: str, value: int, fused: bool
) -> None:
    if fused:
        through_kernel(monkeypatch)
    inputs = make_inputs(5, 4, device=device) | make_philox(5, 2, device)
    inputs[name][1] = value
    assert diffusion_loss(**inputs)[0].isnan()
    arguments = {key: inputs[key] for key in ("clean", "noise", "time", "table", "images")}
    assert diffusion_noise(**arguments).isnan().any(dim=1).tolist() == [i == 1 for i in range(10)]


def test_without_a_mask_every_row_counts_once(device: str) -> None:
    inputs = make_inputs(9, 4, device=device)
    ones = run_kernel(inputs | {"mask": torch.ones_like(inputs["mask"])})
    for got in (run_kernel(inputs | {"mask": None}), reference.forward(*values(inputs)[:5], None)):
        torch.testing.assert_close(got, ones, rtol=1e-4, atol=1e-6)


def test_a_nan_in_a_row_that_counts_reaches_the_loss(device: str) -> None:
    for column in (2, 6):
        inputs = make_inputs(9, 4, device=device)
        inputs["output"][0, column] = float("nan")
        assert run_kernel(inputs)[0].isnan()


@pytest.mark.parametrize("with_gradient", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_operators_keep_the_contracts_of_the_dispatcher(dtype: torch.dtype, with_gradient: bool) -> None:
    inputs, drawn = make_inputs(5, 4, dtype=dtype), make_philox(5, 2, "cpu")
    noise = drawn["noise"]
    coordinates = (drawn["images"], None, noise.samples, noise.rows, noise.step, signed_key(KEY))
    clean, time, table = inputs["clean"], inputs["time"], inputs["table"]
    for others in ((None, inputs["noise"], None, None, None, 0), coordinates):
        arguments = (inputs["output"], clean, time, table, inputs["mask"], *others, with_gradient)
        torch.library.opcheck(torch.ops.reca.diffusion_loss.default, arguments)
        torch.library.opcheck(torch.ops.reca.diffusion_noise.default, (clean, time, table, *others, dtype))


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_the_public_functions_compile_to_one_graph(impl: Any) -> None:
    inputs = make_inputs(5, 4) | make_philox(5, 2, "cpu")

    def loss(output: Tensor) -> Tensor:
        arguments = {name: inputs[name] for name in ("clean", "noise", "time", "table", "images")}
        noised = diffusion_noise(**arguments, impl=impl)
        return 2 * diffusion_loss(**inputs | {"output": 3 * output + noised.repeat(1, 2)}, impl=impl)[0]

    got = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaf = inputs["output"].clone().requires_grad_()
        got += torch.autograd.grad(function(leaf), leaf)
    torch.testing.assert_close(*got)


X, LONG = torch.zeros(8, 4), torch.zeros(8).long()
DRAWN = make_philox(4, 2, "cpu")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"clean": X[0]}, ValueError, r"clean must be \[tokens, 1 to 1024\], got \[4\]; flatten"),
        ({"clean": torch.zeros(4, 1025)}, ValueError, r"clean must be .*got \[4, 1025\]"),
        ({"time": LONG[:7]}, ValueError, r"time must be \[levels \* tokens=4\], got \[7\]; row i belongs"),
        ({"time": LONG[:0]}, ValueError, r"time must be \[levels \* tokens=4\], got \[0\]"),
        ({"clean": X[:0]}, ValueError, r"time must be \[levels \* tokens=0\], got \[8\]"),
        ({"table": X}, ValueError, r"table must be \[times > 0, 8\], got \[8, 4\]; columns signal, noise"),
        ({"table": torch.zeros(0, 8)}, ValueError, r"table must be \[times > 0, 8\], got \[0, 8\]"),
        ({"table": make_table().double()}, TypeError, r"table must be one of float32, got float64"),
        ({"time": LONG.int()}, TypeError, r"time must be one of int64, got int32"),
        ({"clean": X[:4].int()}, TypeError, r"clean must be one of bfloat16.*, got int32"),
        ({"noise": X[:4]}, ValueError, r"noise must be \[8, 4\], got \[4, 4\]"),
        ({"output": X}, ValueError, r"output must be \[8, 8\], got \[8, 4\]; \[rows, 2 \* dim\]"),
        ({"output": X.repeat(1, 2).int()}, TypeError, r"output must be one of bfloat16.*, got int32"),
        ({"mask": X}, ValueError, r"mask must be \[8\], got \[8, 4\]; one weight per row"),
        ({"mask": X[:, 0].bool()}, TypeError, r"mask must be one of float32, got bool"),
        (DRAWN | {"images": None}, ValueError, r"images must be given to regenerate noise, got None"),
        (DRAWN | {"images": LONG[:4]}, ValueError, r"images must be \[8\], got \[4\]; the image of each row"),
        (DRAWN | {"images": X[:, 0]}, TypeError, r"images must be one of int64, got float32"),
        (
            DRAWN | {"noise": replace(DRAWN["noise"], samples=torch.tensor(3))},
            ValueError,
            r"noise.samples must be \[0\], got \[\]; one sample id per image",
        ),
        ({"noise": X.to("meta")}, ValueError, r"noise must be on cpu like output, got meta"),
        ({"impl": "fused"}, ValueError, r"impl='fused' needs CUDA tensors, got cpu"),
    ],
)
def test_bad_input_is_refused_with_a_cure(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^diffusion_loss: {message}"):
        diffusion_loss(**make_inputs(4, 4) | changes)


def test_noise_refuses_what_the_loss_refuses_and_integers() -> None:
    inputs = {name: t for name, t in make_inputs(4, 4).items() if name not in ("output", "mask")}
    with pytest.raises(ValueError, match=r"^diffusion_noise: time must be \[levels \* tokens=4\], got \[7\]"):
        diffusion_noise(**inputs | {"time": LONG[:7]})
    with pytest.raises(TypeError, match=r"^diffusion_noise: dtype must be floating, got torch.int64; leave"):
        diffusion_noise(**inputs, dtype=torch.int64)


@pytest.mark.gpu
def test_on_a_gpu_bf16_stays_within_the_error_budget() -> None:
    inputs = make_inputs(1027, 16, levels=4, dtype=torch.bfloat16, device="cuda")
    loss, _, _, gradient = run_kernel(inputs)
    exact = doubled(inputs)
    assert_within_budget("loss", loss, plain(inputs), plain(exact))
    assert_within_budget("gradient", gradient, plain_gradient(inputs), plain_gradient(exact))


@pytest.mark.gpu
def test_on_a_gpu_a_captured_graph_replays_with_new_noise() -> None:
    inputs = make_inputs(129, 16, device="cuda") | make_philox(129, 2, "cuda")
    inputs["output"].requires_grad_()

    def step() -> tuple[Tensor, Tensor, Tensor]:
        arguments = {name: inputs[name] for name in ("clean", "noise", "time", "table", "images")}
        loss = diffusion_loss(**inputs)[0]
        return loss, *torch.autograd.grad(loss, inputs["output"]), diffusion_noise(**arguments)

    step()  # warm-up compiles outside of the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    inputs["noise"].step.add_(1)
    graph.replay()
    for got, want in zip(captured, step(), strict=True):
        assert torch.equal(got, want)
