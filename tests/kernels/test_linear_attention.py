"""linear_attention: relu features, one state per head, with every gradient."""

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

from reca.kernels import linear_attention
from reca.kernels._launch import TABLE, Entry, LaunchConfig
from reca.kernels.linear_attention import kernel, op
from reca.kernels.testing import assert_within_budget, make_normal

EPS = 1e-15
NAMES = ("query", "key", "value")


def make_inputs(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[Tensor, ...]:
    """query, key, value [images, tokens, heads, dim], the slices of one fused projection."""
    images, tokens, heads, dim = shape
    fused_rows = make_normal(images, tokens, 3, heads, dim, seed=0, dtype=dtype, device=device)
    # A mean in the keys keeps every denominator away from 0, as a trained model does.
    fused_rows[:, :, :2] += 0.5
    return fused_rows.unbind(dim=2)


def plain(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """With the normaliser as one more column of the values."""
    q, k, v = (tensor.transpose(1, 2) for tensor in (query.relu(), key.relu(), F.pad(value, (0, 1), value=1)))
    dtype = torch.promote_types(query.dtype, torch.float32)
    padded = q.to(dtype) @ (k.to(dtype).mT @ v.to(dtype))
    return (padded[..., :-1] / (padded[..., -1:] + EPS)).transpose(1, 2).to(query.dtype)


def fused(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return linear_attention(query, key, value, eps=EPS)


def gradients(
    function: Callable[..., Tensor], inputs: tuple[Tensor, ...], d_out: Tensor
) -> tuple[Tensor, ...]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    return torch.autograd.grad(function(*leaves), leaves, d_out)


def through_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "_forward", op._cuda)
    monkeypatch.setattr(op, "_backward", op._backward_cuda)


def doubled(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(tensor.double() for tensor in tensors)


def test_the_reference_is_the_formula_and_passes_gradcheck() -> None:
    inputs = make_inputs(2, 5, 3, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(fused, [tensor.clone().requires_grad_() for tensor in inputs])
    torch.testing.assert_close(fused(*inputs), plain(*inputs))
    torch.testing.assert_close(linear_attention(*inputs, eps=EPS, impl="reference"), plain(*inputs))


@given(
    st.tuples(st.integers(0, 2), st.integers(0, 70), st.integers(1, 3), st.sampled_from([1, 3, 16, 31, 32])),
    st.booleans(),
)
def test_the_kernels_stay_within_the_error_budget(
    device: str, shape: tuple[int, int, int, int], contiguous: bool
) -> None:
    inputs = make_inputs(*shape, device=device)
    if contiguous:
        inputs = tuple(tensor.contiguous() for tensor in inputs)
    d_out = make_normal(*shape, seed=5, device=device)
    assert_within_budget("out", kernel.forward(*inputs, EPS), plain(*inputs), plain(*doubled(inputs)))
    got = kernel.backward(d_out, *inputs, EPS, True, True, True)
    honest, exact = gradients(plain, inputs, d_out), gradients(plain, doubled(inputs), d_out.double())
    for name, *triple in zip(NAMES, got, honest, exact, strict=True):
        assert_within_budget(name, *triple)


def test_many_steps_over_the_tokens_are_all_summed(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TABLE, "linear_attention", (Entry(64, LaunchConfig(tile=256, warps=4), ""),))
    inputs = make_inputs(1, 100, 1, 16, device=device)
    d_out = make_normal(1, 100, 1, 16, seed=5, device=device)
    got = (kernel.forward(*inputs, EPS), *kernel.backward(d_out, *inputs, EPS, True, True, True))
    honest = (plain(*inputs), *gradients(plain, inputs, d_out))
    exact = (plain(*doubled(inputs)), *gradients(plain, doubled(inputs), d_out.double()))
    for name, *triple in zip(("out", *NAMES), got, honest, exact, strict=True):
        assert_within_budget(name, *triple)


def test_a_query_without_a_positive_entry_gives_zero_and_finite_gradients(device: str) -> None:
    query, key, value = make_inputs(1, 4, 1, 16, device=device)
    inputs = (-query.abs(), key, value)
    d_out = torch.ones(1, 4, 1, 16, device=device)
    assert torch.equal(kernel.forward(*inputs, EPS), torch.zeros_like(query))
    for got in kernel.backward(d_out, *inputs, EPS, True, True, True):
        assert torch.equal(got, torch.zeros_like(query))


def test_not_a_number_in_a_query_or_a_key_is_not_hidden_by_its_relu(device: str) -> None:
    for poisoned in range(2):
        inputs = [tensor.clone() for tensor in make_inputs(1, 3, 1, 16, device=device)]
        inputs[poisoned][0, 0, 0, 0] = float("nan")
        assert kernel.forward(*inputs, EPS)[0, 0].isnan().all()


def test_gradients_are_orthogonal_to_queries_and_keys_because_scales_cancel(device: str) -> None:
    inputs = make_inputs(2, 20, 2, 32, device=device)
    d_out = make_normal(2, 20, 2, 32, seed=5, device=device)
    d_query, d_key, _ = kernel.backward(d_out, *inputs, EPS, True, True, True)
    bound = 1e-5 * float((d_query * inputs[0]).abs().sum())
    assert float((d_query * inputs[0].relu()).sum(dim=3).abs().max()) < bound
    assert abs(float((d_key * inputs[1].relu()).sum())) < bound


@pytest.mark.parametrize("through", ["kernel", "reference"])
@pytest.mark.parametrize("needed", range(1, 8))
def test_every_subset_of_required_gradients_is_served(
    device: str, monkeypatch: pytest.MonkeyPatch, needed: int, through: str
) -> None:
    if through == "kernel":
        through_kernel(monkeypatch)
    inputs, d_out = make_inputs(1, 6, 2, 5, device=device), make_normal(1, 6, 2, 5, seed=6, device=device)
    leaves = [tensor.clone().requires_grad_(bool(needed >> i & 1)) for i, tensor in enumerate(inputs)]
    fused(*leaves).backward(d_out)
    expected = gradients(plain, doubled(inputs), d_out.double())
    for i, (leaf, truth) in enumerate(zip(leaves, expected, strict=True)):
        assert (leaf.grad is not None) == bool(needed >> i & 1)
        if leaf.grad is not None:
            torch.testing.assert_close(leaf.grad.double(), truth, rtol=1e-4, atol=1e-6)


def test_rows_without_unit_stride_are_read_right(device: str) -> None:
    inputs = make_inputs(2, 6, 2, 5, device=device)
    turned = [tensor.transpose(1, 3).contiguous().transpose(1, 3) for tensor in inputs]
    assert torch.equal(kernel.forward(*turned, EPS), kernel.forward(*inputs, EPS))


def test_bf16_is_storage_and_the_arithmetic_is_fp32(device: str) -> None:
    inputs = make_inputs(1, 40, 2, 32, dtype=torch.bfloat16, device=device)
    # One unit in the last place: the interpreter truncates where the GPU rounds.
    out = kernel.forward(*inputs, EPS)
    torch.testing.assert_close(out.double(), plain(*doubled(inputs)), rtol=2**-7, atol=1e-5)
    d_out = make_normal(1, 40, 2, 32, seed=5, dtype=torch.bfloat16, device=device)
    got = kernel.backward(d_out, *inputs, EPS, True, True, True)
    exact = gradients(plain, doubled(inputs), d_out.double())
    for gradient, truth in zip(got, exact, strict=True):
        torch.testing.assert_close(gradient.double(), truth, rtol=2**-7, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_operators_keep_the_contracts_of_the_dispatcher(dtype: torch.dtype) -> None:
    inputs = make_inputs(1, 5, 2, 3, dtype=dtype)
    d_out = make_normal(1, 5, 2, 3, seed=5, dtype=dtype)
    torch.library.opcheck(torch.ops.reca.linear_attention.default, (*inputs, EPS))
    for flags in ((True, True, True), (False, True, False), (True, False, False)):
        torch.library.opcheck(torch.ops.reca.linear_attention_backward.default, (d_out, *inputs, EPS, *flags))


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_the_public_function_compiles_to_one_graph(impl: Any) -> None:
    def block(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return linear_attention(2 * query, key, value, eps=EPS, impl=impl)

    inputs, d_out = make_inputs(1, 5, 2, 3), make_normal(1, 5, 2, 3, seed=9)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for got, want in zip(gradients(compiled, inputs, d_out), gradients(block, inputs, d_out), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_counted_flops_are_those_of_the_products() -> None:
    query, key, value = make_inputs(2, 6, 3, 4)
    product = 2 * 2 * 6 * 3 * 4 * 4
    with FlopCounterMode(display=False) as counter:
        out = fused(query.clone().requires_grad_(), key, value.clone().requires_grad_())
    assert counter.get_total_flops() == 2 * product
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    # The state and the numerator again, d_query, d_state, d_value.
    assert counter.get_total_flops() == 5 * product


X = torch.zeros(2, 3, 2, 4)
GOOD: dict[str, Any] = {"query": X, "key": X, "value": X, "eps": EPS}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"query": X[0]},
            ValueError,
            r"query must be \[images, tokens, heads, 1 to 32\], got \[3, 2, 4\]; u",
        ),
        ({"query": torch.zeros(1, 1, 1, 33)}, ValueError, r"query must be \[.*, got \[1, 1, 1, 33\]; unfl"),
        ({"key": X[:, :2]}, ValueError, r"key must be \[2, 3, 2, 4\], got \[2, 2, 2, 4\]; shaped like query"),
        ({"value": X[..., :2]}, ValueError, r"value must be \[2, 3, 2, 4\], got \[2, 3, 2, 2\]; shaped like"),
        ({"query": X.long()}, TypeError, r"query must be one of bfloat16.*, got int64; convert it first"),
        ({"value": X.half()}, TypeError, r"value must be float32 like query, got float16; convert one"),
        ({"key": X.to("meta")}, ValueError, r"key must be on cpu like query, got meta; move it there"),
        ({"impl": "fused"}, ValueError, r"impl='fused' needs CUDA tensors, got cpu"),
    ],
)
def test_bad_input_is_refused_with_a_cure(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^linear_attention: {message}"):
        linear_attention(**GOOD | changes)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(3, 256, 70, 32), (2, 77, 3, 20)])
def test_on_a_gpu_every_dtype_stays_within_the_error_budget(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    inputs = make_inputs(*shape, dtype=dtype, device="cuda")
    d_out = make_normal(*shape, seed=5, dtype=dtype, device="cuda")
    assert_within_budget("out", fused(*inputs), plain(*inputs), plain(*doubled(inputs)))
    exact = gradients(plain, doubled(inputs), d_out.double())
    found = (gradients(fused, inputs, d_out), gradients(plain, inputs, d_out), exact)
    for name, *triple in zip(NAMES, *found, strict=True):
        assert_within_budget(name, *triple)


@pytest.mark.gpu
def test_on_a_gpu_a_captured_graph_replays_on_new_values() -> None:
    static = [tensor.clone().requires_grad_() for tensor in make_inputs(2, 256, 4, 32, device="cuda")]

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(fused(*static).square().sum(), static)

    step()  # warm-up compiles outside of the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        static[0].mul_(2).add_(1)
    graph.replay()
    for got, want in zip(captured, step(), strict=True):
        assert torch.equal(got, want)
