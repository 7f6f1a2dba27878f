"""bias_gelu and gelu_mlp: the epilogue between the two products of an MLP, alone and with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from reca.kernels import bias_gelu, gelu_mlp
from reca.kernels.gelu_mlp import kernel, op, reference
from reca.kernels.testing import assert_within_budget, make_normal, misaligned

ACTIVATIONS = ("gelu", "gelu_tanh", "gelu_sigmoid", "silu")
APPROXIMATE = {"none": "gelu", "tanh": "gelu_tanh", "sigmoid": "gelu_sigmoid"}


def plain(x: Tensor, bias: Tensor, activation: str) -> Tensor:
    """The epilogue as models write it, at the dtype of its input."""
    pre = x + bias
    if activation == "gelu_sigmoid":
        return pre * torch.sigmoid(1.702 * pre)
    if activation == "silu":
        return F.silu(pre)
    return F.gelu(pre, approximate="tanh" if activation == "gelu_tanh" else "none")


def plain_mlp(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, activation: str = "gelu") -> Tensor:
    return F.linear(plain(F.linear(x, w1), b1, activation), w2, b2)


def gradients(
    function: Callable[..., Tensor], inputs: tuple[Tensor, ...], d_out: Tensor
) -> tuple[Tensor, ...]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    return torch.autograd.grad(function(*leaves), leaves, d_out)


def make_inputs(rows: int, width: int, **kind: Any) -> tuple[Tensor, Tensor, Tensor]:
    """x and d_out [rows, width], bias [width]."""
    shapes = ((rows, width), (width,), (rows, width))
    x, bias, d_out = (make_normal(*shape, seed=i, **kind) for i, shape in enumerate(shapes))
    return x, bias, d_out


def make_mlp(rows: int, dim: int, inner: int, out: int, **kind: Any) -> tuple[tuple[Tensor, ...], Tensor]:
    """(x, fc1 weight and bias, fc2 weight and bias), d_out."""
    shapes = ((rows, dim), (inner, dim), (inner,), (out, inner), (out,), (rows, out))
    *inputs, d_out = (make_normal(*shape, seed=i, **kind) for i, shape in enumerate(shapes))
    return tuple(inputs), d_out


def through_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "_forward", op._cuda)
    monkeypatch.setattr(op, "_backward", op._backward_cuda)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_reference_is_what_models_write_and_its_backward_that_of_autograd(activation: str) -> None:
    x, bias, d_out = make_inputs(7, 5, dtype=torch.float64)
    torch.testing.assert_close(reference.forward(x, bias, activation), plain(x, bias, activation))
    expected = gradients(lambda x, bias: plain(x, bias, activation), (x, bias), d_out)
    got = reference.backward(d_out, x, bias, activation)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("approximate", APPROXIMATE)
def test_the_public_functions_pass_gradcheck(approximate: Any) -> None:
    x, bias, _ = (t.requires_grad_() for t in make_inputs(3, 4, dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda x, bias: bias_gelu(x, bias, approximate=approximate), (x, bias))
    inputs = tuple(t.requires_grad_() for t in make_mlp(3, 2, 4, 3, dtype=torch.float64)[0])
    assert torch.autograd.gradcheck(lambda *leaves: gelu_mlp(*leaves, approximate=approximate), inputs)


@given(
    st.integers(0, 40),
    st.sampled_from([1, 3, 16, 100, 513, 1025]),
    st.sampled_from(ACTIVATIONS),
    st.booleans(),
)
def test_the_kernels_stay_within_the_error_budget(
    device: str, rows: int, width: int, activation: str, shifted: bool
) -> None:
    x, bias, d_out = make_inputs(rows, width, device=device)
    shift = misaligned if shifted else lambda tensor: tensor

    def epilogue(x: Tensor, bias: Tensor) -> Tensor:
        return plain(x, bias, activation)

    honest, exact = epilogue(x, bias), epilogue(x.double(), bias.double())
    assert_within_budget("out", kernel.forward(shift(x), shift(bias), activation), honest, exact)
    got = kernel.backward(shift(d_out), shift(x), shift(bias), activation, True, True)
    assert_within_budget("out again", got[1], honest, exact)
    honest_gradients = gradients(epilogue, (x, bias), d_out)
    exact_gradients = gradients(epilogue, (x.double(), bias.double()), d_out.double())
    for name, *results in zip(("dx", "d_bias"), got[::2], honest_gradients, exact_gradients, strict=True):
        assert_within_budget(name, *results)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_the_polynomial_of_the_kernel_holds_its_bounds_on_the_whole_line(
    device: str, activation: str
) -> None:
    x = torch.linspace(-40, 40, 16001, device=device)[:, None]
    got = kernel.forward(x, x.new_zeros(1), activation)
    exact = plain(x.double(), x.new_zeros(1).double(), activation)
    error = (got.double() - exact).abs()
    # Two units in the last place of a share of one, times x; then the lower tail by its own size.
    assert (error <= 2**-22 * x.abs().clamp(min=1)).all()
    tail = (x < 0) & (x > -6)
    assert (error <= 2e-5 * exact.abs())[tail].all()


def test_rows_over_several_steps_of_a_program_all_reach_the_bias_gradient(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel, "column_tiles", lambda *_, reduces: ((3, 2), 2, 4, 4 if reduces else 1, 4))
    x, bias, d_out = make_inputs(19, 7, device=device)
    dx, _, d_bias = kernel.backward(d_out, x, bias, "silu", False, True)
    torch.testing.assert_close((dx, d_bias), reference.backward(d_out, x, bias, "silu"), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_bf16_is_storage_and_the_arithmetic_is_fp32(device: str, activation: str) -> None:
    x, bias, d_out = make_inputs(9, 48, dtype=torch.bfloat16, device=device)
    wide = (x.double(), bias.double())
    dx, out, d_bias = kernel.backward(d_out, x, bias, activation, True, True)
    # One unit in the last place: the interpreter truncates where the GPU rounds.
    close = {"rtol": 2**-7, "atol": 1e-6}
    for result in (out, kernel.forward(x, bias, activation)):
        torch.testing.assert_close(result.double(), plain(*wide, activation), **close)
    exact = reference.backward(d_out.double(), *wide, activation)
    torch.testing.assert_close((dx.double(), d_bias.double()), exact, **close)


def test_what_is_not_asked_for_is_empty_and_changes_nothing(device: str) -> None:
    x, bias, d_out = make_inputs(5, 6, device=device)
    dx, out, d_bias = kernel.backward(d_out, x, bias, "gelu", False, False)
    assert out.numel() == d_bias.numel() == 0
    assert torch.equal(dx, kernel.backward(d_out, x, bias, "gelu", True, True)[0])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_large_inputs_neither_overflow_nor_leave_a_gradient_that_is_not_finite(
    device: str, activation: str
) -> None:
    x = torch.tensor([[-1e6, -300.0, -20.0, 0.0, 20.0, 300.0, 1e6]], device=device)
    bias, d_out = torch.zeros(7, device=device), torch.ones(1, 7, device=device)
    torch.testing.assert_close(kernel.forward(x, bias, activation), plain(x, bias, activation))
    expected = reference.backward(d_out.double(), x.double(), bias.double(), activation)[0]
    got = kernel.backward(d_out, x, bias, activation, False, False)[0]
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("needed", range(1, 32))
def test_every_subset_of_required_gradients_is_served(
    device: str, monkeypatch: pytest.MonkeyPatch, needed: int, fused: bool
) -> None:
    if fused:
        through_kernel(monkeypatch)
    inputs, d_out = make_mlp(6, 4, 5, 3, device=device)
    leaves = [t.clone().requires_grad_(bool(needed >> i & 1)) for i, t in enumerate(inputs)]
    gelu_mlp(*leaves).backward(d_out)
    exact = gradients(plain_mlp, tuple(t.double() for t in inputs), d_out.double())
    for i, (leaf, truth) in enumerate(zip(leaves, exact, strict=True)):
        assert (leaf.grad is not None) == bool(needed >> i & 1)
        if leaf.grad is not None:
            torch.testing.assert_close(leaf.grad.double(), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("needed", [(True, False), (False, True), (True, True)])
def test_the_epilogue_alone_serves_every_subset_too(
    device: str, monkeypatch: pytest.MonkeyPatch, needed: tuple[bool, bool]
) -> None:
    through_kernel(monkeypatch)
    x, bias, d_out = make_inputs(6, 5, device=device)
    leaves = [t.clone().requires_grad_(need) for t, need in zip((x, bias), needed, strict=True)]
    bias_gelu(*leaves, approximate="tanh").backward(d_out)
    expected = reference.backward(d_out, x, bias, "gelu_tanh")
    for leaf, need, truth in zip(leaves, needed, expected, strict=True):
        assert (leaf.grad is not None) == need
        if leaf.grad is not None:
            torch.testing.assert_close(leaf.grad, truth, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("is_frozen", [False, True])
def test_the_activation_is_not_kept_for_the_backward_nor_the_input_of_a_frozen_layer(is_frozen: bool) -> None:
    inputs, _ = make_mlp(6, 4, 5, 3)
    kept: list[tuple[int, ...]] = []

    def remember(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        gelu_mlp(inputs[0].requires_grad_(), inputs[1].requires_grad_(not is_frozen), *inputs[2:])
    assert sorted(kept) == sorted([(5, 4), (5,), (3, 5), (6, 5)] + [(6, 4)] * (not is_frozen))


def test_leading_dimensions_are_kept_and_rows_may_be_missing() -> None:
    (x, *layers), _ = make_mlp(12, 4, 5, 3)
    assert torch.equal(gelu_mlp(x.view(3, 2, 2, 4), *layers).view(12, 3), gelu_mlp(x, *layers))
    assert torch.equal(bias_gelu(x.view(3, 4, 4), x[0]).view(12, 4), bias_gelu(x, x[0]))
    empty = x[:0].view(0, 5, 4).requires_grad_()
    leaves = (empty, *(t.requires_grad_() for t in layers))
    out = gelu_mlp(*leaves)
    assert out.shape == (0, 5, 3)
    assert not any(g.any() for g in torch.autograd.grad(out.sum(), leaves))


def test_autocast_changes_neither_result_nor_gradient() -> None:
    inputs, d_out = make_mlp(6, 4, 5, 3)
    with torch.autocast("cpu", torch.bfloat16):
        got = gradients(gelu_mlp, inputs, d_out)
    for inside, outside in zip(got, gradients(gelu_mlp, inputs, d_out), strict=True):
        assert torch.equal(inside, outside)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_operators_keep_the_contracts_of_the_dispatcher(dtype: torch.dtype) -> None:
    x, bias, d_out = make_inputs(5, 3, dtype=dtype)
    torch.library.opcheck(torch.ops.reca.bias_activation.default, (x, bias, "gelu"))
    for flags in ((False, True), (True, False)):
        arguments = (d_out, x, bias, "gelu_tanh", *flags)
        torch.library.opcheck(torch.ops.reca.bias_activation_backward.default, arguments)


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_the_public_functions_compile_to_one_graph(impl: Any) -> None:
    def block(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        return bias_gelu(gelu_mlp(x, w1, b1, w2, b2, impl=impl), b2, approximate="tanh", impl=impl)

    inputs, d_out = make_mlp(5, 4, 6, 3)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    results = [gradients(function, inputs, d_out) for function in (compiled, block)]
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_the_four_products_are_counted_by_the_flop_counter() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    inputs, d_out = make_mlp(6, 4, 5, 3)
    with FlopCounterMode(display=False) as counter:
        gradients(gelu_mlp, inputs, d_out)
    assert counter.get_total_flops() == 3 * 2 * 6 * 5 * (4 + 3)


X, B1, W1, W2, B2 = torch.zeros(6, 3), torch.zeros(4), torch.zeros(4, 3), torch.zeros(2, 4), torch.zeros(2)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": X[0, 0]}, ValueError, r"x must be \[..., width > 0\], got \[\]; rows lie in the last axis"),
        ({"x": X[:, :0]}, ValueError, r"x must be \[..., width > 0\], got \[6, 0\]"),
        ({"x": X.int()}, TypeError, r"x must be one of bfloat16.*, got int32; convert it first"),
        ({"fc1_weight": W1[0]}, ValueError, r"fc1_weight must be \[out > 0, 3\], got \[3\]; as nn.Linear"),
        ({"fc1_weight": W1[:0]}, ValueError, r"fc1_weight must be \[out > 0, 3\], got \[0, 3\]"),
        ({"fc2_weight": W2[:, :3]}, ValueError, r"fc2_weight must be \[out > 0, 4\], got \[2, 3\]"),
        ({"fc1_bias": B1[:3]}, ValueError, r"fc1_bias must be \[4\], got \[3\]; one value per row of fc1_we"),
        ({"fc2_bias": B2.half()}, TypeError, r"fc2_bias must be float32 like x, got float16"),
        ({"fc2_bias": B2.to("meta")}, ValueError, r"fc2_bias must be on cpu like x, got meta"),
        ({"approximate": "erf"}, ValueError, r"approximate must be one of none, tanh, sigmoid, got 'erf'"),
        ({"impl": "fused"}, ValueError, r"impl='fused' needs CUDA tensors, got cpu"),
        ({"impl": "best"}, ValueError, r"impl must be one of auto, fused, reference, got 'best'"),
    ],
)
def test_bad_input_is_refused_with_a_cure(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    inputs = {"x": X, "fc1_weight": W1, "fc1_bias": B1, "fc2_weight": W2, "fc2_bias": B2}
    with pytest.raises(error, match=f"^gelu_mlp: {message}"):
        gelu_mlp(**inputs | change)


def test_a_bias_of_another_width_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^bias_gelu: bias must be \[3\], got \[4\]; one value per column"):
        bias_gelu(X, B1)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_on_a_gpu_low_precision_stays_within_the_error_budget(dtype: torch.dtype, activation: str) -> None:
    x, bias, d_out = make_inputs(1031, 4304, dtype=dtype, device="cuda")

    def epilogue(x: Tensor, bias: Tensor) -> Tensor:
        return plain(x, bias, activation)

    honest, exact = epilogue(x, bias), epilogue(x.double(), bias.double())
    assert_within_budget("out", kernel.forward(x, bias, activation), honest, exact)
    got = kernel.backward(d_out, x, bias, activation, True, True)
    assert_within_budget("out again", got[1], honest, exact)
    honest_gradients = gradients(epilogue, (x, bias), d_out)
    exact_gradients = gradients(epilogue, (x.double(), bias.double()), d_out.double())
    for name, *results in zip(("dx", "d_bias"), got[::2], honest_gradients, exact_gradients, strict=True):
        assert_within_budget(name, *results)


@pytest.mark.gpu
def test_on_a_gpu_a_captured_graph_replays_on_new_values() -> None:
    inputs, d_out = make_mlp(129, 64, 512, 64, device="cuda")
    static = [tensor.clone().requires_grad_() for tensor in inputs]

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(gelu_mlp(*static), static, d_out)

    step()  # warm-up compiles outside of the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        static[0].copy_(2 * inputs[0])
    graph.replay()
    for got, want in zip(captured, step(), strict=True):
        assert torch.equal(got, want)
