"""rms_norm and add_rms_norm with a weight per expert: each row is scaled by the expert that it names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from reca.kernels import add_rms_norm, rms_norm
from reca.kernels.rms_norm import kernel, op, reference
from reca.kernels.testing import assert_within_budget, make_normal

EPS = 1e-6


def make_case(
    rows: int, dim: int, num_experts: int, *, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x and d_normed [rows, dim], weight [num_experts, dim], experts [rows] in no order."""
    x, d_normed = (make_normal(rows, dim, seed=seed, dtype=dtype, device=device) for seed in (0, 1))
    weight = 1 + make_normal(num_experts, dim, seed=2, dtype=dtype, device=device) / 4
    generator = torch.Generator().manual_seed(3)
    experts = torch.randint(num_experts, (rows,), generator=generator, dtype=torch.int32)
    return x, d_normed, weight, experts.to(device)


def plain(x: Tensor, weight: Tensor, experts: Tensor) -> Tensor:
    """As models write it: norm everything with each weight, keep the rows of its expert."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    hat = (wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + EPS)).to(x.dtype)
    normed = torch.zeros_like(x)
    for expert in range(weight.shape[0]):
        normed = torch.where((experts == expert)[:, None], hat * weight[expert], normed)
    return normed


def gradients(x: Tensor, d_normed: Tensor, weight: Tensor, experts: Tensor) -> tuple[Tensor, ...]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (x, weight)]
    return torch.autograd.grad(plain(*leaves, experts), leaves, d_normed)


def test_each_row_is_scaled_by_its_expert_and_gives_it_its_gradient() -> None:
    x, d_normed, weight, experts = make_case(9, 5, 3, dtype=torch.float64)
    normed, rstd = reference.forward(x, weight, EPS, experts)
    torch.testing.assert_close(normed, plain(x, weight, experts), rtol=1e-12, atol=1e-13)
    expected = gradients(x, d_normed, weight, experts)
    got_gradients = reference.backward(d_normed, None, x, weight, rstd, experts)
    for got, want in zip(got_gradients, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)


def test_the_public_functions_pass_gradcheck() -> None:
    x, residual, weight, experts = make_case(4, 3, 2, dtype=torch.float64)
    leaves = tuple(tensor.requires_grad_() for tensor in (x, residual, weight))
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, eps=0.1, experts=experts), leaves[::2])
    assert torch.autograd.gradcheck(lambda x, r, w: add_rms_norm(x, r, w, eps=0.1, experts=experts), leaves)


@given(st.integers(0, 40), st.sampled_from([2, 3, 100, 1025]), st.integers(1, 3), st.booleans())
def test_the_kernels_stay_within_the_error_budget(
    device: str, rows: int, dim: int, num_experts: int, with_residual: bool
) -> None:
    x, d_normed, weight, experts = make_case(rows, dim, num_experts, device=device)
    residual = make_normal(rows, dim, seed=4, device=device) if with_residual else None
    summed, normed, rstd = kernel.forward(x, residual, weight, EPS, experts)
    stream = x if residual is None else summed
    doubles = [tensor.double() for tensor in (stream, d_normed, weight)]
    exact = plain(doubles[0], doubles[2], experts)
    assert_within_budget("normed", normed, plain(stream, weight, experts), exact)
    got = kernel.backward(d_normed, None, stream, weight, rstd, True, True, experts)
    honest = gradients(stream, d_normed, weight, experts)
    truth = gradients(*doubles, experts)
    for name, *tensors in zip(("dx", "dweight"), got, honest, truth, strict=True):
        assert_within_budget(name, *tensors)


def test_many_rows_per_program_are_summed_expert_by_expert(device: str) -> None:
    x, d_normed, weight, experts = make_case(300, 2100, 2, device=device)
    rstd = reference.forward(x, weight, EPS, experts)[1]
    _, dweight = kernel.backward(d_normed, None, x, weight, rstd, False, True, experts)
    honest = gradients(x, d_normed, weight, experts)[1]
    exact = gradients(x.double(), d_normed.double(), weight.double(), experts)[1]
    assert_within_budget("dweight", dweight, honest, exact)


@pytest.mark.parametrize("path", ["kernel", "reference"])
def test_a_row_that_names_no_expert_is_nan_and_spoils_nothing_else(device: str, path: str) -> None:
    x, d_normed, weight, experts = make_case(6, 5, 2, device=device)
    stray = torch.tensor([True, False, False, True, False, False], device=device)
    experts = torch.where(stray, torch.tensor([-1, 0, 0, 2, 0, 0], device=device), experts).int()
    forward, backward = (kernel.forward, kernel.backward) if path == "kernel" else (op._cpu, op._backward_cpu)
    _, normed, rstd = forward(x, None, weight, EPS, experts)
    dx, dweight = backward(d_normed, d_normed, x, weight, rstd, True, True, experts)
    for rows in (normed, dx):
        assert torch.equal(rows.isnan(), stray[:, None].expand(6, 5))
    kept = gradients(x[~stray], d_normed[~stray], weight, experts[~stray])[1]
    torch.testing.assert_close(dweight, kept)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("needed", range(1, 8))
def test_every_subset_of_required_gradients_is_served(
    device: str, monkeypatch: pytest.MonkeyPatch, needed: int, fused: bool
) -> None:
    if fused:
        monkeypatch.setattr(op, "_forward", op._cuda)
        monkeypatch.setattr(op, "_backward", op._backward_cuda)
    x, residual, weight, experts = make_case(6, 5, 2, device=device)
    inputs = (x, residual, weight)
    leaves = [t.clone().requires_grad_(bool(needed >> i & 1)) for i, t in enumerate(inputs)]
    normed, summed = add_rms_norm(*leaves, eps=EPS, experts=experts)
    (normed.square().sum() + (3 * summed).sum()).backward()
    exact = [t.double().requires_grad_() for t in inputs]
    stream = exact[0] + exact[1]
    (plain(stream, exact[2], experts).square().sum() + (3 * stream).sum()).backward()
    for i, (leaf, truth) in enumerate(zip(leaves, exact, strict=True)):
        assert (leaf.grad is not None) == bool(needed >> i & 1)
        if leaf.grad is not None:
            torch.testing.assert_close(leaf.grad.double(), truth.grad, rtol=2e-5, atol=2e-5)


def test_leading_dimensions_are_kept() -> None:
    x, _, weight, experts = make_case(12, 5, 2)
    shaped = rms_norm(x.view(2, 6, 5), weight, eps=EPS, experts=experts.view(2, 6))
    assert torch.equal(shaped.view(12, 5), rms_norm(x, weight, eps=EPS, experts=experts))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operators_keep_the_contracts_of_the_dispatcher(dtype: torch.dtype) -> None:
    x, d_normed, weight, experts = make_case(5, 3, 2, dtype=dtype)
    _, rstd = reference.forward(x, weight, EPS, experts)
    torch.library.opcheck(torch.ops.reca.rms_norm.default, (x, x, weight, EPS, experts))
    arguments = (d_normed, None, x, weight, rstd, True, True, experts)
    torch.library.opcheck(torch.ops.reca.rms_norm_backward.default, arguments)


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_the_public_functions_compile_to_one_graph(impl: str) -> None:
    x, residual, weight, experts = make_case(5, 3, 2)

    def block(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
        options: dict[str, Any] = {"eps": EPS, "experts": experts, "impl": impl}
        normed, summed = add_rms_norm(2 * x, residual, weight, **options)
        return rms_norm(normed * summed, weight, **options).square().sum()

    results = []
    for function in (block, torch.compile(block, fullgraph=True, backend="aot_eager")):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, residual, weight)]
        results.append(torch.autograd.grad(function(*leaves), leaves))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


X, W, E = torch.zeros(4, 3), torch.ones(2, 3), torch.zeros(4, dtype=torch.int32)


@pytest.mark.parametrize(
    ("weight", "experts", "error", "message"),
    [
        (W, E[:3], ValueError, r"experts must be \[4\], got \[3\]; one expert per row"),
        (W, E.long(), TypeError, r"experts must be one of int32, got int64; convert it first"),
        (W, E.to("meta"), ValueError, r"experts must be on cpu like rows, got meta; move it there"),
        (
            W[0],
            E,
            ValueError,
            r"weight must be \[1 or more experts, 3\] beside experts, got \[3\]; one scale",
        ),
        (W[:0], E, ValueError, r"weight must be \[1 or more .*got \[0, 3\]"),
        (W[:, :2], E, ValueError, r"weight must be \[1 or more .*got \[2, 2\]"),
        (W, None, ValueError, r"weight must be \[3\], got \[2, 3\]; one scale per column of x"),
    ],
)
def test_bad_input_is_refused_with_a_cure(
    weight: Tensor, experts: Tensor | None, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^rms_norm: {message}"):
        rms_norm(X, weight, eps=EPS, experts=experts)


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [128, 3584])
def test_on_a_gpu_bf16_stays_within_the_error_budget_and_is_reproducible(dim: int) -> None:
    x, d_normed, weight, experts = make_case(517, dim, 2, dtype=torch.bfloat16, device="cuda")
    _, normed, rstd = kernel.forward(x, None, weight, EPS, experts)
    exact = plain(x.double(), weight.double(), experts)
    assert_within_budget("normed", normed, plain(x, weight, experts), exact)
    got = kernel.backward(d_normed, None, x, weight, rstd, True, True, experts)
    honest = gradients(x, d_normed, weight, experts)
    truth = gradients(x.double(), d_normed.double(), weight.double(), experts)
    for name, *tensors in zip(("dx", "dweight"), got, honest, truth, strict=True):
        assert_within_budget(name, *tensors)
    again = kernel.backward(d_normed, None, x, weight, rstd, True, True, experts)
    assert torch.equal(got[1], again[1])


@pytest.mark.gpu
def test_on_a_gpu_a_captured_graph_replays_on_new_experts() -> None:
    x, residual, weight, experts = make_case(129, 3584, 2, device="cuda")
    static = [tensor.clone().requires_grad_() for tensor in (x, residual, weight)]

    def step() -> tuple[Tensor, ...]:
        normed, summed = add_rms_norm(*static, eps=EPS, experts=experts)
        return torch.autograd.grad((normed * summed).sum(), static)

    step()  # warm-up compiles outside of the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    experts.copy_(1 - experts)
    graph.replay()
    for got, want in zip(captured, step(), strict=True):
        assert torch.equal(got, want)
