"""rms_norm and add_rms_norm: the norm alone, and after a residual add, with every gradient."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from reca.kernels import add_rms_norm, rms_norm
from reca.kernels.rms_norm import kernel, op, reference
from reca.kernels.testing import assert_within_budget, make_normal, misaligned

EPS = 1e-6


def make_inputs(
    rows: int, dim: int, *, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    """x, residual [rows, dim] and a weight [dim] around one."""
    x, residual = (make_normal(rows, dim, seed=seed, dtype=dtype, device=device) for seed in range(2))
    return x, residual, 1 + make_normal(dim, seed=2, dtype=dtype, device=device) / 4


def plain(x: Tensor, weight: Tensor, eps: float = EPS) -> Tensor:
    """The norm as models write it: statistics in fp32, the quotient cast back before the weight."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return weight * (wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)).to(x.dtype)


def gradients(
    function: Callable[..., Tensor], inputs: tuple[Tensor, ...], d_out: Tensor
) -> tuple[Tensor, ...]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    return torch.autograd.grad(function(*leaves), leaves, d_out)


def test_the_reference_is_the_formula() -> None:
    x, _, weight = make_inputs(3, 5, dtype=torch.float64)
    normed, rstd = reference.forward(x, weight, 0.5)
    for i in range(3):
        scale = (sum(x[i, d] ** 2 for d in range(5)) / 5 + 0.5) ** -0.5
        torch.testing.assert_close(rstd[i], scale)
        torch.testing.assert_close(normed[i], x[i] * scale * weight)


def test_the_explicit_backward_of_the_reference_is_that_of_autograd() -> None:
    x, d_normed, weight = make_inputs(7, 5, dtype=torch.float64)
    _, rstd = reference.forward(x, weight, EPS)
    expected = gradients(lambda x, w: reference.forward(x, w, EPS)[0], (x, weight), d_normed)
    for got, want in zip(reference.backward(d_normed, None, x, weight, rstd), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)


def test_the_public_functions_pass_gradcheck() -> None:
    x, residual, weight = (t.requires_grad_() for t in make_inputs(4, 3, dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, eps=0.1), (x, weight))
    assert torch.autograd.gradcheck(lambda x, r, w: add_rms_norm(x, r, w, eps=0.1), (x, residual, weight))


@given(st.integers(0, 40), st.sampled_from([1, 3, 16, 100, 129, 1025]), st.booleans(), st.booleans())
def test_the_kernels_stay_within_the_error_budget(
    device: str, rows: int, dim: int, with_residual: bool, shifted: bool
) -> None:
    # One column without eps is a sign: its gradient is nothing but cancellation.
    eps = 0.5 if dim == 1 else EPS
    x, residual, weight = make_inputs(rows, dim, device=device)
    d_normed, d_summed = (make_normal(rows, dim, seed=seed, device=device) for seed in (5, 6))
    shift = misaligned if shifted else lambda tensor: tensor
    summed, normed, rstd = kernel.forward(shift(x), shift(residual) if with_residual else None, weight, eps)
    stream = x + residual if with_residual else x
    assert torch.equal(summed, stream) if with_residual else summed.numel() == 0
    assert_within_budget(
        "normed", normed, plain(stream, weight, eps), plain(stream.double(), weight.double(), eps)
    )

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return plain(x, weight, eps)

    past = shift(d_summed) if with_residual else None
    dx, dweight = kernel.backward(shift(d_normed), past, shift(stream), weight, rstd, True, True)
    got = (dx - d_summed if with_residual else dx, dweight)
    honest = gradients(norm, (stream, weight), d_normed)
    exact = gradients(norm, (stream.double(), weight.double()), d_normed.double())
    if with_residual:
        got, honest, exact = (
            (dx, dweight),
            (honest[0] + d_summed, honest[1]),
            (exact[0] + d_summed, exact[1]),
        )
    for name, *tensors in zip(("dx", "dweight"), got, honest, exact, strict=True):
        assert_within_budget(name, *tensors)


def test_many_rows_per_program_are_all_summed_into_the_weight_gradient(device: str) -> None:
    x, d_normed, weight = make_inputs(300, 2100, device=device)
    rstd = reference.forward(x, weight, EPS)[1]
    _, dweight = kernel.backward(d_normed, None, x, weight, rstd, False, True)
    honest = gradients(plain, (x, weight), d_normed)[1]
    exact = gradients(plain, (x.double(), weight.double()), d_normed.double())[1]
    assert_within_budget("dweight", dweight, honest, exact)


@pytest.mark.parametrize("with_dx", [False, True])
@pytest.mark.parametrize("with_dweight", [False, True])
@pytest.mark.parametrize("backward", [kernel.backward, op._backward_cpu], ids=["kernel", "reference"])
def test_a_gradient_that_is_not_needed_is_not_formed(
    device: str, backward: Callable[..., tuple[Tensor, Tensor]], with_dx: bool, with_dweight: bool
) -> None:
    x, d_normed, weight = make_inputs(6, 5, device=device)
    _, _, rstd = kernel.forward(x, None, weight, EPS)
    dx, dweight = backward(d_normed, None, x, weight, rstd, with_dx, with_dweight)
    full = backward(d_normed, None, x, weight, rstd, True, True)
    assert torch.equal(dx, full[0]) if with_dx else dx.numel() == 0
    assert torch.equal(dweight, full[1]) if with_dweight else dweight.numel() == 0


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("needed", range(1, 8))
def test_every_subset_of_required_gradients_is_served(
    device: str, monkeypatch: pytest.MonkeyPatch, needed: int, fused: bool
) -> None:
    if fused:
        monkeypatch.setattr(op, "_forward", op._cuda)
        monkeypatch.setattr(op, "_backward", op._backward_cuda)
    inputs = make_inputs(6, 5, device=device)
    leaves = [t.clone().requires_grad_(bool(needed >> i & 1)) for i, t in enumerate(inputs)]
    normed, summed = add_rms_norm(leaves[0], leaves[1], leaves[2], eps=EPS)
    (normed.square().sum() + (3 * summed).sum()).backward()
    exact = [t.double().requires_grad_() for t in inputs]
    stream = exact[0] + exact[1]
    (plain(stream, exact[2]).square().sum() + (3 * stream).sum()).backward()
    for i, (leaf, truth) in enumerate(zip(leaves, exact, strict=True)):
        assert (leaf.grad is not None) == bool(needed >> i & 1)
        if leaf.grad is not None:
            torch.testing.assert_close(leaf.grad.double(), truth.grad, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("used", ["normed", "summed"])
def test_an_output_that_is_not_used_sends_no_gradient(used: str) -> None:
    x, residual, weight = (t.requires_grad_() for t in make_inputs(4, 3, dtype=torch.float64))
    normed, summed = add_rms_norm(x, residual, weight, eps=EPS)
    (normed if used == "normed" else summed).sum().backward()
    y = (x + residual).detach().requires_grad_()
    (plain(y, weight.detach()) if used == "normed" else y).sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    torch.testing.assert_close(residual.grad, y.grad)


def test_leading_dimensions_are_kept() -> None:
    x, residual, weight = make_inputs(12, 5)
    shaped = [t.view(2, 3, 2, 5) for t in (x, residual)]
    assert torch.equal(rms_norm(shaped[0], weight, eps=EPS).view(12, 5), rms_norm(x, weight, eps=EPS))
    assert add_rms_norm(*shaped, weight, eps=EPS)[1].shape == (2, 3, 2, 5)


def test_bf16_is_storage_and_the_arithmetic_is_fp32(device: str) -> None:
    x, residual, weight = make_inputs(9, 48, dtype=torch.bfloat16, device=device)
    summed, normed, _ = kernel.forward(x, residual, weight, EPS)
    # One unit in the last place each: the interpreter truncates where the GPU rounds.
    torch.testing.assert_close(summed.double(), x.double() + residual.double(), rtol=2**-7, atol=0)
    torch.testing.assert_close(normed.double(), plain(summed.double(), weight.double()), rtol=2**-7, atol=0)


def test_fp32_weights_may_stand_beside_bf16_rows() -> None:
    x, _, weight = make_inputs(4, 6)
    leaf = weight.clone().requires_grad_()
    normed = rms_norm(x.bfloat16(), leaf, eps=EPS)
    normed.float().sum().backward()
    assert normed.dtype == torch.bfloat16
    assert leaf.grad is not None
    assert leaf.grad.dtype == torch.float32


def test_a_row_of_zeros_gives_zeros_and_finite_gradients(device: str) -> None:
    x, d_normed, weight = make_inputs(2, 5, device=device)
    x[0] = 0
    _, normed, rstd = kernel.forward(x, None, weight, EPS)
    assert torch.equal(normed[0], torch.zeros_like(normed[0]))
    assert kernel.backward(d_normed, None, x, weight, rstd, True, True)[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_operators_keep_the_contracts_of_the_dispatcher(dtype: torch.dtype) -> None:
    x, residual, weight = make_inputs(5, 3, dtype=dtype)
    _, rstd = reference.forward(x, weight, EPS)
    for optional in (None, residual):
        torch.library.opcheck(torch.ops.reca.rms_norm.default, (x, optional, weight, EPS))
        for flags in ((True, True), (True, False), (False, True)):
            arguments = (residual, optional, x, weight, rstd, *flags)
            torch.library.opcheck(torch.ops.reca.rms_norm_backward.default, arguments)


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_the_public_functions_compile_to_one_graph(impl: str) -> None:
    def block(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
        normed, summed = add_rms_norm(2 * x, residual, weight, eps=EPS, impl=impl)
        return rms_norm(normed * summed, weight, eps=EPS, impl=impl)

    inputs = make_inputs(5, 3)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    d_out = make_normal(5, 3, seed=9)
    for got, want in zip(gradients(compiled, inputs, d_out), gradients(block, inputs, d_out), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


X, W = torch.zeros(4, 3), torch.ones(3)


@pytest.mark.parametrize(
    ("inputs", "impl", "error", "message"),
    [
        (
            (X[0, 0], X, W),
            "auto",
            ValueError,
            r"x must be \[..., 1 to 32768\], got \[\]; normalise over the last",
        ),
        ((X[:, :0], X, W), "auto", ValueError, r"x must be .*got \[4, 0\]"),
        (
            (X[:1, :1].expand(1, 32769), X, W),
            "auto",
            ValueError,
            r"x must be .*got \[1, 32769\]; .*split wider rows",
        ),
        ((X, X[:2], W), "auto", ValueError, r"residual must be \[4, 3\], got \[2, 3\]; shaped like x"),
        ((X, X, W[:2]), "auto", ValueError, r"weight must be \[3\], got \[2\]; one scale per column of x"),
        ((X.long(), X, W), "auto", TypeError, r"x must be one of bfloat16.*, got int64; convert it first"),
        ((X, X.half(), W), "auto", TypeError, r"residual must be float32 like x, got float16; convert one"),
        ((X, X, W.int()), "auto", TypeError, r"weight must be one of bfloat16.*, got int32"),
        ((X, X, W.to("meta")), "auto", ValueError, r"weight must be on cpu like x, got meta; move it there"),
        ((X, X, W), "fused", ValueError, r"impl='fused' needs CUDA tensors, got cpu"),
        ((X, X, W), "eager", ValueError, r"impl must be one of auto, fused, reference, got 'eager'"),
    ],
)
def test_bad_input_is_refused_with_a_cure(
    inputs: tuple[Tensor, Tensor, Tensor], impl: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^add_rms_norm: {message}"):
        add_rms_norm(*inputs, eps=EPS, impl=impl)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [100, 3584, 8192])
def test_on_a_gpu_low_precision_stays_within_the_error_budget(dtype: torch.dtype, dim: int) -> None:
    x, residual, weight = make_inputs(517, dim, dtype=dtype, device="cuda")
    d_normed = make_normal(517, dim, seed=5, dtype=dtype, device="cuda")
    summed, normed, rstd = kernel.forward(x, residual, weight, EPS)
    assert torch.equal(summed, x + residual)
    assert_within_budget("normed", normed, plain(summed, weight), plain(summed.double(), weight.double()))
    got = kernel.backward(d_normed, None, summed, weight, rstd, True, True)
    honest = gradients(plain, (summed, weight), d_normed)
    exact = gradients(plain, (summed.double(), weight.double()), d_normed.double())
    for name, *tensors in zip(("dx", "dweight"), got, honest, exact, strict=True):
        assert_within_budget(name, *tensors)


@pytest.mark.gpu
def test_on_a_gpu_a_captured_graph_replays_on_new_values() -> None:
    inputs = make_inputs(129, 3584, device="cuda")
    static = [tensor.clone().requires_grad_() for tensor in inputs]

    def step() -> tuple[Tensor, ...]:
        normed, summed = add_rms_norm(*static, eps=EPS)
        return torch.autograd.grad((normed * summed).sum(), static)

    step()  # warm-up compiles outside of the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        static[0].copy_(2 * inputs[0])
    graph.replay()
    for got, want in zip(captured, step(), strict=True):
        assert torch.equal(got, want)
