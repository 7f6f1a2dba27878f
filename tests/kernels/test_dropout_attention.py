"""dropout_attention: packed self-attention whose dropped probabilities are drawn again in the backward."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from reca.kernels import PhiloxDropout, dropout_attention
from reca.kernels._philox import signed_key
from reca.kernels.dropout_attention import op, reference
from reca.kernels.testing import assert_within_budget, make_normal
from reca.randomness import RandomSource, key_of

KEY, RATE = key_of(3, "dropout/place"), 0.1
IDS = (5, 1 << 40, (1 << 33) + 7)


def make_inputs(
    lengths: tuple[int, ...],
    heads: int,
    dim: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> dict[str, Any]:
    """Packed rows of some samples, and where their masks come from."""
    step, samples = torch.tensor(11, device=device), torch.tensor(IDS[: len(lengths)], device=device)
    return {
        "qkv": make_normal(sum(lengths), 3, heads, dim, seed=0, dtype=dtype, device=device),
        "random": PhiloxDropout(KEY, step, samples),
        "cu_lengths": torch.tensor((0, *lengths), device=device).cumsum(0).int(),
        "lengths": lengths,
        "rate": RATE,
    }


def plain(qkv: Tensor, inputs: dict[str, Any]) -> Tensor:
    """Dense attention sample by sample, as models write it, with masks of the random source."""
    source, parts = RandomSource(3, 11), []
    samples = qkv.split(list(inputs["lengths"]))
    for rows, sample in zip(samples, inputs["random"].samples, strict=True):
        query, key, value = rows.unbind(1)
        scores = torch.einsum("qhd,khd->hqk", query, key) * qkv.shape[-1] ** -0.5
        uniform = source.uniform("dropout/place", sample[None], scores.numel()).view(scores.shape)
        weights = scores.softmax(dim=-1) * (uniform >= inputs["rate"]) / (1 - inputs["rate"])
        parts.append(torch.einsum("hqk,khd->qhd", weights.to(value.dtype), value))
    return torch.cat(parts)


def both(qkv: Tensor, inputs: dict[str, Any], impl: Any = None) -> tuple[Tensor, Tensor]:
    """Out and gradient of the operator, or of plain torch where `impl` is None."""
    leaf = qkv.detach().clone().requires_grad_()
    changed = inputs | {"qkv": leaf}
    out = plain(leaf, inputs) if impl is None else dropout_attention(**changed, impl=impl)
    d_out = make_normal(*out.shape, seed=7, dtype=out.dtype, device=str(out.device))
    return out.detach(), torch.autograd.grad(out, leaf, d_out)[0]


def through_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "_forward", op._cuda)
    monkeypatch.setattr(op, "_backward", op._backward_cuda)


def assert_budget(inputs: dict[str, Any], got: tuple[Tensor, Tensor]) -> None:
    honest, exact = both(inputs["qkv"], inputs), both(inputs["qkv"].double(), inputs)
    for name, *tensors in zip(("out", "d_qkv"), got, honest, exact, strict=True):
        assert_within_budget(name, *tensors)


@settings(max_examples=8)
@given(
    st.sampled_from([(5,), (8, 0, 12), (65, 1, 3), (20, 68)]),
    st.integers(1, 2),
    st.sampled_from([1, 16, 64, 80, 96, 128]),
    st.sampled_from([0.0, 0.1, 0.9]),
)
def test_kernels_and_reference_are_dense_attention_with_the_masks_of_the_random_source(
    device: str, lengths: tuple[int, ...], heads: int, dim: int, rate: float
) -> None:
    inputs = make_inputs(lengths, heads, dim, device=device) | {"rate": rate}
    assert_budget(inputs, both(inputs["qkv"], inputs, "reference"))
    assert_budget(inputs, both(inputs["qkv"], inputs, "auto"))
    with pytest.MonkeyPatch.context() as patch:
        through_kernel(patch)
        assert_budget(inputs, both(inputs["qkv"], inputs, "auto"))


def test_rows_and_gradients_may_be_parts_of_wider_ones(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    through_kernel(monkeypatch)
    inputs = make_inputs((5, 8), 2, 12, device=device)
    wide = torch.cat([inputs["qkv"].flatten(1), torch.full((13, 7), torch.nan, device=device)], dim=1)
    views = (wide[:, :72].view(13, 3, 2, 12), inputs["qkv"].transpose(2, 3).contiguous().transpose(2, 3))
    expected = dropout_attention(**inputs)
    for view in views:
        assert torch.equal(dropout_attention(**inputs | {"qkv": view}), expected)
    leaf = inputs["qkv"].requires_grad_()
    gradients = []
    for expand in (False, True):
        d_out = torch.ones(13, 2, 1, device=device).expand(-1, -1, 12)
        out = dropout_attention(**inputs)
        gradients += torch.autograd.grad(out, leaf, d_out if expand else d_out.contiguous())
    assert torch.equal(*gradients)


def test_scores_far_from_zero_stay_finite(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    through_kernel(monkeypatch)
    inputs = make_inputs((9, 35), 1, 16, device=device)
    for sign in (-1, 1):
        inputs["qkv"][:, 0], inputs["qkv"][:, 1] = 40.0, sign * 40.0
        out, gradient = both(inputs["qkv"], inputs, "auto")
        assert out.isfinite().all()
        assert gradient.isfinite().all()


def test_a_mask_depends_on_its_sample_and_the_step(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    through_kernel(monkeypatch)
    inputs = make_inputs((5, 7), 2, 16, device=device)
    out, random = dropout_attention(**inputs), inputs["random"]
    last = make_inputs((7,), 2, 16, device=device) | {"qkv": inputs["qkv"][5:]}
    last["random"] = replace(random, samples=random.samples[1:])
    torch.testing.assert_close(dropout_attention(**last), out[5:], rtol=1e-6, atol=1e-6)
    other = dropout_attention(**inputs | {"random": replace(random, step=random.step + 1)})
    assert not torch.allclose(other, out)


def test_lengths_that_are_not_those_of_the_device_do_not_lead_out_of_bounds(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    through_kernel(monkeypatch)
    inputs = make_inputs((5, 7), 2, 16, device=device)
    inputs["cu_lengths"] = torch.tensor([0, 5, 4000], device=device)
    expected = make_inputs((5, 7), 2, 16, device=device)
    assert torch.equal(dropout_attention(**inputs), dropout_attention(**expected))


def test_the_public_function_passes_gradcheck() -> None:
    inputs = make_inputs((2, 3), 2, 4, dtype=torch.float64)
    leaf = inputs.pop("qkv").requires_grad_()
    assert torch.autograd.gradcheck(lambda qkv: dropout_attention(qkv, **inputs), (leaf,))


def test_no_graph_is_kept_without_gradients() -> None:
    inputs = make_inputs((4,), 1, 4)
    assert not dropout_attention(**inputs).requires_grad
    with torch.no_grad():
        assert not dropout_attention(**inputs | {"qkv": inputs["qkv"].requires_grad_()}).requires_grad


def test_the_flops_are_those_of_the_dense_products() -> None:
    inputs = make_inputs((4, 6), 2, 8)
    with FlopCounterMode(display=False) as counter:
        both(inputs["qkv"], inputs, "auto")
    products = 2 * 2 * 8 * (16 + 36)
    assert counter.get_total_flops() == 2 * products + 5 * products


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_operators_keep_the_contracts_of_the_dispatcher(dtype: torch.dtype) -> None:
    inputs = make_inputs((3, 2), 2, 4, dtype=dtype)
    random = inputs["random"]
    places = (inputs["cu_lengths"], [3, 2], random.samples, random.step, signed_key(KEY), RATE, 0.5)
    torch.library.opcheck(torch.ops.reca.dropout_attention.default, (inputs["qkv"], *places))
    out, lse = reference.forward(inputs["qkv"], *places)
    saved = (out, inputs["qkv"], out, lse)
    torch.library.opcheck(torch.ops.reca.dropout_attention_backward.default, (*saved, *places))


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_the_public_function_compiles_to_one_graph(impl: Any) -> None:
    inputs = make_inputs((3, 2), 2, 4)

    def summed(qkv: Tensor) -> Tensor:
        return dropout_attention(**inputs | {"qkv": 2 * qkv}, impl=impl).square().sum()

    got = []
    for function in (summed, torch.compile(summed, fullgraph=True, backend="aot_eager")):
        leaf = inputs["qkv"].clone().requires_grad_()
        got += torch.autograd.grad(function(leaf), leaf)
    torch.testing.assert_close(*got)


X = torch.zeros(5, 3, 2, 4)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"qkv": X[0]}, ValueError, r"qkv must be \[rows, 3, heads > 0, 1 to 128\], got \[3, 2, 4\]; query"),
        ({"qkv": X[:, :2]}, ValueError, r"qkv must be .*got \[5, 2, 2, 4\]"),
        ({"qkv": torch.zeros(5, 3, 2, 129)}, ValueError, r"qkv must be .*got \[5, 3, 2, 129\]"),
        ({"qkv": X.int()}, TypeError, r"qkv must be one of bfloat16.*, got int32"),
        ({"lengths": (3, 3)}, ValueError, r"lengths must be 2 counts of rows that sum to 5, got \[3, 3\]"),
        ({"lengths": (5,)}, ValueError, r"lengths must be 2 counts of rows that sum to 5, got \[5\]; those"),
        ({"lengths": (6, -1)}, ValueError, r"lengths must be 2 counts.*got \[6, -1\]"),
        ({"rate": 1.0}, ValueError, r"rate must be in \[0, 1\), got 1.0"),
        ({"cu_lengths": X[0, 0]}, ValueError, r"cu_lengths must be \[samples \+ 1\]"),
        ({"qkv": X.to("meta")}, ValueError, r"random.step must be on meta like qkv, got cpu"),
        (
            {"qkv": torch.empty(1 << 17, 3, 2, 4, device="meta"), "lengths": (0, 1 << 17)},
            ValueError,
            r"heads \* length\^2 must be at most 2\^34, got 2 \* 131072\^2; split",
        ),
        ({"impl": "fused"}, ValueError, r"impl='fused' needs CUDA tensors, got cpu"),
    ],
)
def test_bad_input_is_refused_with_a_cure(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^dropout_attention: {message}"):
        dropout_attention(**make_inputs((3, 2), 2, 4) | changes)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("lengths", "dim"), [((1088, 1088), 80), ((1088, 201), 80), ((201, 65), 64), ((201, 65), 128)]
)
def test_on_a_gpu_bf16_stays_within_the_error_budget(lengths: tuple[int, ...], dim: int) -> None:
    inputs = make_inputs(lengths, 4, dim, dtype=torch.bfloat16, device="cuda")
    assert_budget(inputs, both(inputs["qkv"], inputs, "auto"))


@pytest.mark.gpu
def test_on_a_gpu_a_captured_graph_replays_with_new_masks() -> None:
    inputs = make_inputs((201, 88), 2, 64, dtype=torch.bfloat16, device="cuda")

    def step() -> tuple[Tensor, Tensor]:
        out = dropout_attention(**inputs)
        return out, torch.autograd.grad(out.sum(), inputs["qkv"])[0]

    inputs["qkv"].requires_grad_()
    step()  # warm-up compiles outside of the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    inputs["random"].step.add_(1)
    graph.replay()
    for got, want in zip(captured, step(), strict=True):
        assert torch.equal(got, want)
