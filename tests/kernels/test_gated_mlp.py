"""swiglu and gated_mlp: the gated activation alone, and with the projection that follows it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from reca.kernels import gated_mlp, swiglu
from reca.kernels.gated_mlp import kernel, op, reference
from reca.kernels.testing import assert_within_budget, make_normal, misaligned


def plain(gate_up: Tensor) -> Tensor:
    """The activation as models write it, at the dtype of its input."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def gradients(
    function: Callable[..., Tensor], inputs: tuple[Tensor, ...], d_out: Tensor
) -> tuple[Tensor, ...]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    return torch.autograd.grad(function(*leaves), leaves, d_out)


def make_inputs(
    rows: int, inner: int, dim: int, *, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """gate_up [rows, 2 * inner], weight [dim, inner], d_product [rows, inner], d_out [rows, dim]."""
    shapes = ((rows, 2 * inner), (dim, inner), (rows, inner), (rows, dim))
    tensors = [make_normal(*shape, seed=i, dtype=dtype, device=device) for i, shape in enumerate(shapes)]
    return tensors[0], tensors[1], tensors[2], tensors[3]


def test_the_reference_is_the_formula() -> None:
    gate_up = make_normal(3, 8, seed=0, dtype=torch.float64)
    gate, up = gate_up[:, :4], gate_up[:, 4:]
    torch.testing.assert_close(reference.forward(gate_up), gate / (1 + torch.exp(-gate)) * up)


def test_the_explicit_backward_of_the_reference_is_that_of_autograd() -> None:
    gate_up, _, d_product, _ = make_inputs(7, 5, 3, dtype=torch.float64)
    (expected,) = gradients(reference.forward, (gate_up,), d_product)
    torch.testing.assert_close(reference.backward(d_product, gate_up), expected, rtol=1e-12, atol=1e-13)


def test_the_public_functions_pass_gradcheck() -> None:
    gate_up, weight, _, _ = (t.requires_grad_() for t in make_inputs(4, 3, 5, dtype=torch.float64))
    assert torch.autograd.gradcheck(swiglu, (gate_up,))
    assert torch.autograd.gradcheck(gated_mlp, (gate_up, weight))


@given(st.integers(0, 40), st.sampled_from([1, 3, 16, 100, 129, 1025]), st.booleans())
def test_the_kernels_stay_within_the_error_budget(device: str, rows: int, inner: int, shifted: bool) -> None:
    gate_up, _, d_product, _ = make_inputs(rows, inner, 1, device=device)
    shift = misaligned if shifted else lambda tensor: tensor
    exact = plain(gate_up.double())
    assert_within_budget("product", kernel.forward(shift(gate_up)), plain(gate_up), exact)
    d_gate_up, product = kernel.backward(shift(d_product), shift(gate_up), True)
    assert_within_budget("product again", product, plain(gate_up), exact)
    honest = gradients(plain, (gate_up,), d_product)[0]
    assert_within_budget(
        "d_gate_up", d_gate_up, honest, gradients(plain, (gate_up.double(),), d_product.double())[0]
    )


def test_bf16_is_storage_and_the_arithmetic_is_fp32(device: str) -> None:
    gate_up, _, d_product, _ = make_inputs(9, 48, 1, dtype=torch.bfloat16, device=device)
    d_gate_up, product = kernel.backward(d_product, gate_up, True)
    # One unit in the last place: the interpreter truncates where the GPU rounds.
    close = {"rtol": 2**-7, "atol": 1e-6}
    torch.testing.assert_close(kernel.forward(gate_up).double(), plain(gate_up.double()), **close)
    torch.testing.assert_close(product.double(), plain(gate_up.double()), **close)
    exact = reference.backward(d_product.double(), gate_up.double())
    torch.testing.assert_close(d_gate_up.double(), exact, **close)


def test_the_product_is_formed_again_only_when_asked_for(device: str) -> None:
    gate_up, _, d_product, _ = make_inputs(5, 6, 1, device=device)
    d_gate_up, product = kernel.backward(d_product, gate_up, False)
    assert product.numel() == 0
    assert torch.equal(d_gate_up, kernel.backward(d_product, gate_up, True)[0])


def test_large_gates_neither_overflow_nor_leave_a_gradient_that_is_not_finite(device: str) -> None:
    gate_up = torch.tensor([[-1e4, 1e4, -80.0, 0.0, 1.0, 2.0, 3.0, 4.0]], device=device)
    d_product = torch.ones(1, 4, device=device)
    torch.testing.assert_close(kernel.forward(gate_up), plain(gate_up))
    d_gate_up, _ = kernel.backward(d_product, gate_up, False)
    torch.testing.assert_close(d_gate_up, gradients(plain, (gate_up,), d_product)[0], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("needed", [(True, False), (False, True), (True, True)])
def test_every_subset_of_required_gradients_is_served(
    device: str, monkeypatch: pytest.MonkeyPatch, needed: tuple[bool, bool], fused: bool
) -> None:
    if fused:
        monkeypatch.setattr(op, "_forward", op._cuda)
        monkeypatch.setattr(op, "_backward", op._backward_cuda)
    gate_up, weight, _, d_out = make_inputs(6, 5, 3, device=device)
    leaves = [t.clone().requires_grad_(need) for t, need in zip((gate_up, weight), needed, strict=True)]
    gated_mlp(*leaves).backward(d_out)
    exact = gradients(lambda g, w: F.linear(plain(g), w), (gate_up.double(), weight.double()), d_out.double())
    for leaf, need, truth in zip(leaves, needed, exact, strict=True):
        assert (leaf.grad is not None) == need
        if leaf.grad is not None:
            torch.testing.assert_close(leaf.grad.double(), truth, rtol=1e-5, atol=1e-5)


def test_the_activation_alone_sends_its_gradient_through_the_kernel(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(op, "_forward", op._cuda)
    monkeypatch.setattr(op, "_backward", op._backward_cuda)
    gate_up, _, d_product, _ = make_inputs(6, 5, 3, device=device)
    got = gradients(swiglu, (gate_up,), d_product)[0]
    assert torch.equal(got, kernel.backward(d_product, gate_up, False)[0])


def test_the_product_is_not_kept_for_the_backward() -> None:
    gate_up, weight, _, _ = (t.requires_grad_() for t in make_inputs(6, 5, 3))
    kept: list[tuple[int, ...]] = []

    def remember(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        gated_mlp(gate_up, weight)
    assert sorted(kept) == [(3, 5), (6, 10)]


def test_leading_dimensions_are_kept_and_rows_may_be_missing() -> None:
    gate_up, weight, _, _ = make_inputs(12, 4, 3)
    assert torch.equal(swiglu(gate_up.view(3, 2, 2, 8)).view(12, 4), swiglu(gate_up))
    assert gated_mlp(gate_up.view(3, 2, 2, 8), weight).shape == (3, 2, 2, 3)
    assert swiglu(gate_up[:0].view(0, 5, 8)).shape == (0, 5, 4)
    assert gated_mlp(gate_up[:0].view(0, 5, 8), weight).shape == (0, 5, 3)


def test_autocast_changes_neither_result_nor_gradient() -> None:
    gate_up, weight, _, d_out = make_inputs(6, 5, 3)
    with torch.autocast("cpu", torch.bfloat16):
        got = gradients(gated_mlp, (gate_up, weight), d_out)
    for inside, outside in zip(got, gradients(gated_mlp, (gate_up, weight), d_out), strict=True):
        assert torch.equal(inside, outside)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_operators_keep_the_contracts_of_the_dispatcher(dtype: torch.dtype) -> None:
    gate_up, _, d_product, _ = make_inputs(5, 3, 2, dtype=dtype)
    torch.library.opcheck(torch.ops.reca.swiglu.default, (gate_up,))
    for with_product in (False, True):
        arguments = (d_product, gate_up, with_product)
        torch.library.opcheck(torch.ops.reca.swiglu_backward.default, arguments)


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_the_public_functions_compile_to_one_graph(impl: str) -> None:
    def block(gate_up: Tensor, weight: Tensor) -> Tensor:
        return gated_mlp(torch.cat([swiglu(2 * gate_up, impl=impl)] * 2, dim=-1), weight, impl=impl)

    gate_up, weight, _, d_out = make_inputs(5, 4, 3)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    results = [gradients(function, (gate_up, weight), d_out) for function in (compiled, block)]
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


G, W = torch.zeros(4, 6), torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("inputs", "impl", "error", "message"),
    [
        (
            (G[0, 0], W),
            "auto",
            ValueError,
            r"gate_up must be \[..., 2 \* inner\], got \[\]; join the rows of gate",
        ),
        ((G[:, :5], W), "auto", ValueError, r"gate_up must be .*got \[4, 5\]"),
        ((G[:, :0], W), "auto", ValueError, r"gate_up must be .*got \[4, 0\]"),
        ((G.int(), W), "auto", TypeError, r"gate_up must be one of bfloat16.*, got int32; convert it first"),
        (
            (G, W[0]),
            "auto",
            ValueError,
            r"down_weight must be \[dim, inner=3\], got \[3\]; pass layer.weight",
        ),
        (
            (G, W[:, :2]),
            "auto",
            ValueError,
            r"down_weight must be \[2, 3\], got \[2, 2\]; \[dim, inner\], inner half",
        ),
        ((G, W.half()), "auto", TypeError, r"down_weight must be float32 like gate_up, got float16"),
        ((G, W.to("meta")), "auto", ValueError, r"down_weight must be on cpu like gate_up, got meta"),
        ((G, W), "fused", ValueError, r"impl='fused' needs CUDA tensors, got cpu"),
        ((G, W), "best", ValueError, r"impl must be one of auto, fused, reference, got 'best'"),
    ],
)
def test_bad_input_is_refused_with_a_cure(
    inputs: tuple[Tensor, Tensor], impl: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^gated_mlp: {message}"):
        gated_mlp(*inputs, impl=impl)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_a_gpu_low_precision_stays_within_the_error_budget(dtype: torch.dtype) -> None:
    gate_up, _, d_product, _ = make_inputs(257, 18944, 1, dtype=dtype, device="cuda")
    exact = plain(gate_up.double())
    assert_within_budget("product", kernel.forward(gate_up), plain(gate_up), exact)
    d_gate_up, product = kernel.backward(d_product, gate_up, True)
    assert_within_budget("product again", product, plain(gate_up), exact)
    honest = gradients(plain, (gate_up,), d_product)[0]
    assert_within_budget(
        "d_gate_up", d_gate_up, honest, gradients(plain, (gate_up.double(),), d_product.double())[0]
    )


@pytest.mark.gpu
def test_on_a_gpu_a_captured_graph_replays_on_new_values() -> None:
    gate_up, weight, _, d_out = make_inputs(129, 512, 64, device="cuda")
    static = [gate_up.clone().requires_grad_(), weight.clone().requires_grad_()]

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(gated_mlp(*static), static, d_out)

    step()  # warm-up compiles outside of the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        static[0].copy_(2 * gate_up)
    graph.replay()
    for got, want in zip(captured, step(), strict=True):
        assert torch.equal(got, want)
