"""layer_norm_modulate and gate_residual: adaptive layer norm around a sub-layer, with every gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from reca.kernels import gate_residual, layer_norm_modulate
from reca.kernels.adaln_modulation import kernel, op, reference
from reca.kernels.testing import assert_within_budget, make_normal, misaligned

EPS = 1e-6
NAMES = ("x", "shift", "scale", "weight", "bias")


def make_inputs(
    rows: int, dim: int, *, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[Tensor, ...]:
    """x, shift, scale [rows, dim]; weight, bias [dim]."""
    matrices = [make_normal(rows, dim, seed=seed, dtype=dtype, device=device) for seed in range(3)]
    vectors = [make_normal(dim, seed=seed, dtype=dtype, device=device) for seed in (3, 4)]
    return 3 + matrices[0], matrices[1], matrices[2], vectors[0], vectors[1]


def plain(x: Tensor, shift: Tensor, scale: Tensor, weight: Any = None, bias: Any = None) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, EPS) * (1 + scale) + shift


def fused(x: Tensor, shift: Tensor, scale: Tensor, weight: Any = None, bias: Any = None) -> Tensor:
    return layer_norm_modulate(x, shift, scale, eps=EPS, weight=weight, bias=bias)


def plain_gate(x: Tensor, gate: Tensor, residual: Tensor) -> Tensor:
    return residual + gate * x


def gradients(
    function: Callable[..., Tensor], inputs: tuple[Tensor, ...], d_out: Tensor
) -> tuple[Tensor, ...]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    return torch.autograd.grad(function(*leaves), leaves, d_out)


def through_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_forward", "_backward", "_gate_forward", "_gate_backward"):
        cuda = {"_forward": "_cuda", "_gate_forward": "_gate_cuda"}.get(name, f"{name}_cuda")
        monkeypatch.setattr(op, name, getattr(op, cuda))


def doubled(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(tensor.double() for tensor in tensors)


@pytest.mark.parametrize("count", [3, 5])
def test_the_reference_is_the_formula_and_passes_gradcheck(count: int) -> None:
    inputs = make_inputs(4, 3, dtype=torch.float64)[:count]
    assert torch.autograd.gradcheck(fused, [tensor.requires_grad_() for tensor in inputs])
    torch.testing.assert_close(fused(*inputs), plain(*inputs))
    named = dict(zip(NAMES, inputs, strict=False))
    torch.testing.assert_close(layer_norm_modulate(**named, eps=EPS, impl="reference"), plain(*inputs))
    rows = inputs[:3]
    assert torch.autograd.gradcheck(gate_residual, rows)
    torch.testing.assert_close(gate_residual(*rows, impl="reference"), plain_gate(*rows))


@given(st.integers(0, 40), st.sampled_from([2, 3, 16, 100, 129, 1025]), st.booleans(), st.booleans())
def test_the_kernels_stay_within_the_error_budget(
    device: str, rows: int, dim: int, affine: bool, shifted: bool
) -> None:
    inputs = make_inputs(rows, dim, device=device)[: 5 if affine else 3]
    d_out = make_normal(rows, dim, seed=5, device=device)
    shift = misaligned if shifted else lambda tensor: tensor
    vectors = inputs[3:] if affine else (None, None)
    x, shift_, scale = (shift(tensor) for tensor in inputs[:3])
    out, mean, rstd = kernel.forward(x, shift_, scale, *vectors, EPS)
    assert_within_budget("out", out, plain(*inputs), plain(*doubled(inputs)))
    got = kernel.backward(shift(d_out), x, scale, *vectors, mean, rstd, True, True, affine)
    honest = gradients(plain, inputs, d_out)
    exact = gradients(plain, doubled(inputs), d_out.double())
    for index, name in ((0, "x"), (2, "scale"), (3, "weight"), (4, "bias")):
        if index < len(inputs):
            assert_within_budget(name, got[max(index - 1, 0)], honest[index], exact[index])


@given(st.integers(0, 40), st.sampled_from([1, 3, 16, 100, 5000]), st.booleans())
def test_the_gate_stays_within_the_error_budget(device: str, rows: int, dim: int, shifted: bool) -> None:
    inputs = make_inputs(rows, dim, device=device)[:3]
    d_out = make_normal(rows, dim, seed=5, device=device)
    x, gate, residual = (misaligned(tensor) if shifted else tensor for tensor in inputs)
    out = kernel.gate_residual(x, gate, residual)
    assert_within_budget("out", out, plain_gate(*inputs), plain_gate(*doubled(inputs)))
    dx, d_gate = kernel.gate_backward(d_out, x, gate, True, True)
    assert torch.equal(dx, d_out * inputs[1])
    assert torch.equal(d_gate, d_out * inputs[0])


def test_slices_of_one_modulation_are_read_in_place(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    through_kernel(monkeypatch)
    x = make_normal(7, 6, seed=0, device=device)
    modulation = make_normal(7, 18, seed=1, device=device).requires_grad_()
    shift, scale, gate = modulation.chunk(3, dim=1)
    gate_residual(layer_norm_modulate(x, shift, scale, eps=EPS), gate, x).square().sum().backward()
    exact = modulation.detach().double().requires_grad_()
    shift, scale, gate = exact.chunk(3, dim=1)
    plain_gate(plain(x.double(), shift, scale), gate, x.double()).square().sum().backward()
    assert modulation.grad is not None
    torch.testing.assert_close(modulation.grad.double(), exact.grad, rtol=1e-4, atol=1e-4)


def test_many_rows_per_program_are_all_summed_into_the_parameter_gradients(device: str) -> None:
    inputs = make_inputs(300, 2100, device=device)
    d_out = make_normal(300, 2100, seed=5, device=device)
    x, _, scale, weight, bias = inputs
    _, mean, rstd = reference.forward(*inputs, EPS)
    got = kernel.backward(d_out, x, scale, weight, bias, mean, rstd, False, False, True)
    assert got[0].numel() == got[1].numel() == 0
    honest, exact = gradients(plain, inputs, d_out), gradients(plain, doubled(inputs), d_out.double())
    for index, name in ((3, "weight"), (4, "bias")):
        assert_within_budget(name, got[index - 1], honest[index], exact[index])


@pytest.mark.parametrize("through", ["kernel", "reference"])
@pytest.mark.parametrize("needed", range(1, 32))
def test_every_subset_of_required_gradients_is_served(
    device: str, monkeypatch: pytest.MonkeyPatch, needed: int, through: str
) -> None:
    if through == "kernel":
        through_kernel(monkeypatch)
    inputs, d_out = make_inputs(6, 5, device=device), make_normal(6, 5, seed=6, device=device)
    for function, honest, tensors in ((fused, plain, inputs), (gate_residual, plain_gate, inputs[:3])):
        subset = needed & ((1 << len(tensors)) - 1)
        leaves = [t.clone().requires_grad_(bool(subset >> i & 1)) for i, t in enumerate(tensors)]
        out = function(*leaves)
        assert out.requires_grad == (subset > 0)
        if subset:
            out.backward(d_out)
        expected = gradients(honest, doubled(tensors), d_out.double())
        for i, (leaf, truth) in enumerate(zip(leaves, expected, strict=True)):
            assert (leaf.grad is not None) == bool(subset >> i & 1)
            if leaf.grad is not None:
                torch.testing.assert_close(leaf.grad.double(), truth, rtol=1e-4, atol=1e-5)


def test_a_large_mean_costs_no_digits(device: str) -> None:
    x, shift, scale, _, _ = make_inputs(40, 64, device=device)
    inputs = (x + 1000, shift, scale)
    out, mean, _ = kernel.forward(*inputs, None, None, EPS)
    assert_within_budget("out", out, plain(*inputs), plain(*doubled(inputs)))
    # Half a unit in the last place of 1000 is 3.05e-5: the kept mean is the nearest fp32.
    assert float((mean.double() - inputs[0].double().mean(dim=1)).abs().max()) < 3.1e-5


def test_bf16_is_storage_and_the_arithmetic_is_fp32(device: str) -> None:
    inputs = make_inputs(9, 48, dtype=torch.bfloat16, device=device)
    # One unit in the last place: the interpreter truncates where the GPU rounds.
    out = kernel.forward(*inputs, EPS)[0]
    torch.testing.assert_close(out.double(), plain(*doubled(inputs)), rtol=2**-7, atol=1e-6)
    gated = kernel.gate_residual(*inputs[:3])
    torch.testing.assert_close(gated.double(), plain_gate(*doubled(inputs[:3])), rtol=2**-7, atol=1e-6)


def test_leading_dimensions_are_kept_and_fp32_weights_may_stand_beside_bf16_rows() -> None:
    inputs = make_inputs(12, 5)
    x, shift, scale = (tensor.bfloat16().view(2, 3, 2, 5) for tensor in inputs[:3])
    weight, bias = (tensor.clone().requires_grad_() for tensor in inputs[3:])
    out = layer_norm_modulate(x, shift, scale, eps=EPS, weight=weight, bias=bias)
    assert (out.shape, out.dtype) == ((2, 3, 2, 5), torch.bfloat16)
    out.float().sum().backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32
    assert gate_residual(x, shift, scale).shape == (2, 3, 2, 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_operators_keep_the_contracts_of_the_dispatcher(dtype: torch.dtype) -> None:
    x, shift, scale, weight, bias = make_inputs(5, 3, dtype=dtype)
    _, mean, rstd = reference.forward(x, shift, scale, None, None, EPS)
    for vectors in ((None, None), (weight, bias)):
        arguments = (x, shift, scale, *vectors, EPS)
        torch.library.opcheck(torch.ops.reca.layer_norm_modulate.default, arguments)
        for flags in ((True, True, True), (False, True, False), (True, False, False)):
            arguments = (shift, x, scale, *vectors, mean, rstd, *flags)
            torch.library.opcheck(torch.ops.reca.layer_norm_modulate_backward.default, arguments)
    torch.library.opcheck(torch.ops.reca.gate_residual.default, (x, shift, scale))
    for flags in ((True, True), (False, True), (True, False)):
        torch.library.opcheck(torch.ops.reca.gate_residual_backward.default, (x, shift, scale, *flags))


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_the_public_functions_compile_to_one_graph(impl: Any) -> None:
    def block(x: Tensor, shift: Tensor, scale: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        inner = layer_norm_modulate(2 * x, shift, scale, eps=EPS, weight=weight, bias=bias, impl=impl)
        return gate_residual(inner, shift, x, impl=impl)

    inputs, d_out = make_inputs(5, 3), make_normal(5, 3, seed=9)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for got, want in zip(gradients(compiled, inputs, d_out), gradients(block, inputs, d_out), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


X, W = torch.zeros(4, 3), torch.ones(3)
GOOD: dict[str, Any] = {"x": X, "shift": X, "scale": X, "eps": EPS}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": X[:, :0]}, ValueError, r"x must be \[..., 1 to 32768\], got \[4, 0\]; normalise over"),
        ({"shift": X[:2]}, ValueError, r"shift must be \[4, 3\], got \[2, 3\]; shaped like x, expand"),
        ({"scale": X[0]}, ValueError, r"scale must be \[4, 3\], got \[3\]; shaped like x"),
        ({"x": X.long()}, TypeError, r"x must be one of bfloat16.*, got int64; convert it first"),
        ({"scale": X.half()}, TypeError, r"scale must be float32 like x, got float16; convert one"),
        ({"shift": X.to("meta")}, ValueError, r"shift must be on cpu like x, got meta; move it there"),
        ({"weight": W}, ValueError, r"weight and bias go together, got one of them; pass both or neither"),
        ({"weight": W, "bias": W[:2]}, ValueError, r"bias must be \[3\], got \[2\]; one value per column"),
        ({"weight": W.int(), "bias": W}, TypeError, r"weight must be one of bfloat16.*, got int32"),
        ({"weight": W, "bias": W.to("meta")}, ValueError, r"bias must be on cpu like x, got meta"),
        ({"impl": "fused"}, ValueError, r"impl='fused' needs CUDA tensors, got cpu"),
    ],
)
def test_bad_input_is_refused_with_a_cure(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^layer_norm_modulate: {message}"):
        layer_norm_modulate(**GOOD | changes)


def test_bad_input_of_the_gate_is_refused_with_a_cure() -> None:
    with pytest.raises(ValueError, match=r"^gate_residual: gate must be \[4, 3\], got \[4, 2\]; shaped like"):
        gate_residual(X, X[:, :2], X)


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [100, 1536, 8192])
def test_on_a_gpu_bf16_stays_within_the_error_budget(dim: int) -> None:
    inputs = make_inputs(517, dim, dtype=torch.bfloat16, device="cuda")
    d_out = make_normal(517, dim, seed=5, dtype=torch.bfloat16, device="cuda")
    for function, honest, tensors in ((fused, plain, inputs), (gate_residual, plain_gate, inputs[:3])):
        assert_within_budget("out", function(*tensors), honest(*tensors), honest(*doubled(tensors)))
        exact = gradients(honest, doubled(tensors), d_out.double())
        found = (gradients(function, tensors, d_out), gradients(honest, tensors, d_out), exact)
        for name, *triple in zip(NAMES, *found, strict=False):
            assert_within_budget(name, *triple)


@pytest.mark.gpu
def test_on_a_gpu_a_captured_graph_replays_on_new_values() -> None:
    static = [tensor.requires_grad_() for tensor in make_inputs(129, 1536, device="cuda")]

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(gate_residual(fused(*static), static[1], static[0]).sum(), static)

    step()  # warm-up compiles outside of the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        static[0].mul_(2)
    graph.replay()
    for got, want in zip(captured, step(), strict=True):
        assert torch.equal(got, want)
