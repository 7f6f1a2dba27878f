"""depthwise_glu: SiLU, depthwise 3x3 convolution and gated linear unit of token rows, with every gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from reca.kernels import _launch, depthwise_glu
from reca.kernels.depthwise_glu import kernel, op, reference
from reca.kernels.testing import assert_within_budget, make_normal

NAMES = ("x", "weight", "bias")


def make_inputs(
    *shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    """x [images, height, width, channels], weight [channels, 1, 3, 3], bias [channels]."""
    channels = shape[3]
    x = make_normal(*shape, seed=0, dtype=dtype, device=device)
    weight = make_normal(channels, 1, 3, 3, seed=1, dtype=dtype, device=device)
    return x, weight, make_normal(channels, seed=2, dtype=dtype, device=device)


def plain(x: Tensor, weight: Tensor, bias: Tensor | None = None, activate: bool = True) -> Tensor:
    images = x.permute(0, 3, 1, 2)
    active = F.silu(images) if activate else images
    value, gate = F.conv2d(active, weight, bias, padding=1, groups=len(weight)).chunk(2, dim=1)
    return (value * F.silu(gate)).permute(0, 2, 3, 1)


def fused(x: Tensor, weight: Tensor, bias: Tensor | None = None, activate: bool = True) -> Tensor:
    return depthwise_glu(x, weight, bias, activate=activate)


def gradients(
    function: Callable[..., Tensor], inputs: tuple[Tensor, ...], d_out: Tensor, activate: bool = True
) -> tuple[Tensor, ...]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    return torch.autograd.grad(function(*leaves, activate=activate), leaves, d_out)


def through_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "_forward", op._cuda)
    monkeypatch.setattr(op, "_backward", op._backward_cuda)


def doubled(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(tensor.double() for tensor in tensors)


@pytest.mark.parametrize("activate", [True, False])
@pytest.mark.parametrize("count", [2, 3])
def test_the_reference_is_the_formula_and_passes_gradcheck(count: int, activate: bool) -> None:
    inputs = make_inputs(2, 3, 2, 4, dtype=torch.float64)[:count]
    assert torch.autograd.gradcheck(
        lambda *leaves: fused(*leaves, activate=activate), [tensor.requires_grad_() for tensor in inputs]
    )
    expected = plain(*inputs, activate=activate)
    torch.testing.assert_close(fused(*inputs, activate=activate), expected)
    torch.testing.assert_close(depthwise_glu(*inputs, activate=activate, impl="reference"), expected)


@given(
    st.tuples(st.integers(0, 2), st.integers(1, 5), st.integers(1, 3), st.sampled_from([1, 3, 16, 300])),
    st.booleans(),
    st.booleans(),
)
def test_the_kernels_stay_within_the_error_budget(
    device: str, shape: tuple[int, int, int, int], activate: bool, biased: bool
) -> None:
    images, height, width, inner = shape
    inputs = make_inputs(images, height, width, 2 * inner, device=device)[: 3 if biased else 2]
    d_out = make_normal(images, height, width, inner, seed=5, device=device)
    bias = inputs[2] if biased else None
    out = kernel.forward(*inputs[:2], bias, activate)
    honest, exact = plain(*inputs, activate=activate), plain(*doubled(inputs), activate=activate)
    assert_within_budget("out", out, honest, exact)
    got = kernel.backward(d_out, *inputs[:2], bias, activate, True, True)
    honest = gradients(plain, inputs, d_out, activate)
    exact = gradients(plain, doubled(inputs), d_out.double(), activate)
    for name, *triple in zip(NAMES, got, honest, exact, strict=False):
        assert_within_budget(name, *triple)


def test_the_border_of_an_image_never_sees_its_neighbour(device: str) -> None:
    x, weight, bias = make_inputs(3, 5, 2, 4, device=device)
    # Copies: behind the border of a slice would lie the neighbour again.
    alone = torch.cat([kernel.forward(image[None].clone(), weight, bias, True) for image in x])
    assert torch.equal(kernel.forward(x, weight, bias, True), alone)


def test_many_strips_per_program_are_all_summed_into_the_gradients_of_the_weights(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Ten strips in four groups of three; the last group is not full.
    monkeypatch.setattr(_launch, "MULTIPROCESSORS", {})
    monkeypatch.setattr(_launch, "DEFAULT_MULTIPROCESSORS", 1)
    inputs = make_inputs(5, 5, 1, 4, device=device)
    d_out = make_normal(5, 5, 1, 2, seed=5, device=device)
    # Behind the last image lies what would show.
    x, d_rows = (torch.cat([t, torch.full_like(t, float("nan"))])[:5] for t in (inputs[0], d_out))
    dx, *got = kernel.backward(d_rows, x, *inputs[1:], True, False, True)
    assert dx.numel() == 0
    honest, exact = gradients(plain, inputs, d_out), gradients(plain, doubled(inputs), d_out.double())
    for name, *triple in zip(NAMES[1:], got, honest[1:], exact[1:], strict=True):
        assert_within_budget(name, *triple)


@pytest.mark.filterwarnings("ignore:overflow encountered")  # an exponential that becomes infinite is meant
def test_large_values_of_either_sign_neither_overflow_nor_turn_into_nan(device: str) -> None:
    x, weight, bias = make_inputs(1, 2, 2, 4, device=device)
    inputs = (300 * x, weight, bias)
    d_out = torch.ones(1, 2, 2, 2, device=device)
    got = (kernel.forward(*inputs, True), *kernel.backward(d_out, *inputs, True, True, True))
    honest = (plain(*inputs), *gradients(plain, inputs, d_out))
    exact = (plain(*doubled(inputs)), *gradients(plain, doubled(inputs), d_out.double()))
    for name, *triple in zip(("out", *NAMES), got, honest, exact, strict=True):
        assert_within_budget(name, *triple)


@pytest.mark.parametrize("through", ["kernel", "reference"])
@pytest.mark.parametrize("needed", range(1, 8))
def test_every_subset_of_required_gradients_is_served(
    device: str, monkeypatch: pytest.MonkeyPatch, needed: int, through: str
) -> None:
    if through == "kernel":
        through_kernel(monkeypatch)
    inputs, d_out = make_inputs(1, 3, 2, 4, device=device), make_normal(1, 3, 2, 2, seed=6, device=device)
    leaves = [tensor.clone().requires_grad_(bool(needed >> i & 1)) for i, tensor in enumerate(inputs)]
    fused(*leaves).backward(d_out)
    expected = gradients(plain, doubled(inputs), d_out.double())
    for i, (leaf, truth) in enumerate(zip(leaves, expected, strict=True)):
        assert (leaf.grad is not None) == bool(needed >> i & 1)
        if leaf.grad is not None:
            torch.testing.assert_close(leaf.grad.double(), truth, rtol=1e-4, atol=1e-5)


def test_strided_images_are_read_right(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    through_kernel(monkeypatch)
    inputs = make_inputs(2, 3, 2, 4, device=device)
    x = inputs[0].permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1).requires_grad_()
    assert not x.is_contiguous()
    fused(x, *inputs[1:]).sum().backward()
    ones = torch.ones(2, 3, 2, 2, device=device)
    torch.testing.assert_close(x.grad, gradients(plain, inputs, ones)[0], rtol=1e-5, atol=1e-5)


def test_bf16_is_storage_and_the_arithmetic_is_fp32(device: str) -> None:
    inputs = make_inputs(1, 5, 3, 8, dtype=torch.bfloat16, device=device)
    # One unit in the last place: the interpreter truncates where the GPU rounds.
    out = kernel.forward(*inputs, True)
    torch.testing.assert_close(out.double(), plain(*doubled(inputs)), rtol=2**-7, atol=1e-6)
    d_out = make_normal(1, 5, 3, 4, seed=5, dtype=torch.bfloat16, device=device)
    _, d_weight, d_bias = kernel.backward(d_out, *inputs, True, False, True)
    exact = gradients(plain, doubled(inputs), d_out.double())
    assert d_weight.dtype == torch.float32
    torch.testing.assert_close(d_weight.double(), exact[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(d_bias.double(), exact[2], rtol=1e-4, atol=1e-5)


def test_fp32_weights_may_stand_beside_bf16_rows() -> None:
    x, weight, bias = make_inputs(1, 3, 2, 4)
    weight.requires_grad_()
    out = fused(x.bfloat16(), weight, bias)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_operators_keep_the_contracts_of_the_dispatcher(dtype: torch.dtype) -> None:
    x, weight, bias = make_inputs(1, 3, 2, 4, dtype=dtype)
    d_out = reference.forward(x, weight, bias, True)
    for vector in (bias, None):
        torch.library.opcheck(torch.ops.reca.depthwise_glu.default, (x, weight, vector, True))
        for flags in ((True, True), (False, True), (True, False)):
            arguments = (d_out, x, weight, vector, True, *flags)
            torch.library.opcheck(torch.ops.reca.depthwise_glu_backward.default, arguments)


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_the_public_function_compiles_to_one_graph(impl: Any) -> None:
    def block(x: Tensor, weight: Tensor, bias: Tensor, activate: bool) -> Tensor:
        return depthwise_glu(2 * x, weight, bias, activate=activate, impl=impl)

    inputs, d_out = make_inputs(1, 3, 2, 4), make_normal(1, 3, 2, 2, seed=9)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for got, want in zip(gradients(compiled, inputs, d_out), gradients(block, inputs, d_out), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_counted_flops_are_those_of_the_convolution_and_of_its_recomputation() -> None:
    inputs = make_inputs(2, 3, 4, 8)
    inputs[1].requires_grad_()
    convolution = 18 * inputs[0].numel()
    with FlopCounterMode(display=False) as counter:
        out = fused(*inputs)
    assert counter.get_total_flops() == convolution
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 2 * convolution


X, W, B = torch.zeros(1, 3, 2, 4), torch.zeros(4, 1, 3, 3), torch.zeros(4)
GOOD: dict[str, Any] = {"x": X, "weight": W, "bias": B, "activate": True}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": X[0]}, ValueError, r"x must be \[images, height, width, 2 \* inner\], got \[3, 2, 4\]; unfl"),
        ({"x": X[..., :3]}, ValueError, r"x must be \[images, .*, got \[1, 3, 2, 3\]; unflatten the tokens"),
        ({"x": X[:, :0]}, ValueError, r"x must be \[images, .*, got \[1, 0, 2, 4\]"),
        ({"weight": W[:, 0]}, ValueError, r"weight must be \[4, 1, 3, 3\], got \[4, 3, 3\]; nine taps"),
        ({"bias": B[:3]}, ValueError, r"bias must be \[4\], got \[3\]; one value per channel of x"),
        ({"x": X.long()}, TypeError, r"x must be one of bfloat16.*, got int64; convert it first"),
        ({"weight": W.int()}, TypeError, r"weight must be one of bfloat16.*, got int32; convert it first"),
        ({"bias": B.to("meta")}, ValueError, r"bias must be on cpu like x, got meta; move it there"),
        ({"impl": "fused"}, ValueError, r"impl='fused' needs CUDA tensors, got cpu"),
    ],
)
def test_bad_input_is_refused_with_a_cure(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^depthwise_glu: {message}"):
        depthwise_glu(**GOOD | changes)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(3, 16, 16, 2240), (2, 7, 9, 100)])
def test_on_a_gpu_bf16_stays_within_the_error_budget(shape: tuple[int, ...]) -> None:
    inputs = make_inputs(*shape, dtype=torch.bfloat16, device="cuda")
    d_out = make_normal(*shape[:3], shape[3] // 2, seed=5, dtype=torch.bfloat16, device="cuda")
    assert_within_budget("out", fused(*inputs), plain(*inputs), plain(*doubled(inputs)))
    exact = gradients(plain, doubled(inputs), d_out.double())
    found = (gradients(fused, inputs, d_out), gradients(plain, inputs, d_out), exact)
    for name, *triple in zip(NAMES, *found, strict=True):
        assert_within_budget(name, *triple)


@pytest.mark.gpu
def test_on_a_gpu_a_captured_graph_replays_on_new_values() -> None:
    static = [tensor.requires_grad_() for tensor in make_inputs(2, 16, 16, 512, device="cuda")]

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(fused(*static).sum(), static)

    step()  # warm-up compiles outside of the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        static[0].mul_(2)
    graph.replay()
    for got, want in zip(captured, step(), strict=True):
        assert torch.equal(got, want)
