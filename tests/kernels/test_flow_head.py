"""flow_head: final norm, projection, velocity target and masked squared error, with every gradient."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from reca.kernels import PhiloxNoise, flow_head
from reca.kernels._philox import normal_rows, signed_key
from reca.kernels.flow_head import kernel, op, reference
from reca.kernels.testing import assert_within_budget, make_normal, misaligned
from reca.randomness import key_of

EPS, KEY = 1e-6, key_of(3, "noise")
TRAINED = ("hidden", "scale", "weight", "bias")


def make_inputs(
    tokens: int, width: int, dim: int, *, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> dict[str, Any]:
    """Rows, the parameters of the head, latents, and a mask in which every third token does not count."""
    shapes = ((tokens, width), (width,), (dim, width), (dim,), (tokens, dim), (tokens, dim))
    names = (*TRAINED, "clean", "noise")
    inputs = {
        name: make_normal(*shape, seed=seed, dtype=dtype, device=device)
        for seed, (name, shape) in enumerate(zip(names, shapes, strict=True))
    }
    inputs["weight"] = inputs["weight"] / width**0.5
    inputs["mask"] = make_normal(tokens, seed=7, device=device).abs()
    inputs["mask"][::3] = 0
    return inputs


def make_philox(tokens: int, device: str) -> dict[str, Any]:
    """Noise of two images by its coordinates, and the image of each token."""
    images = (torch.arange(tokens) >= tokens // 3).long()
    rows = torch.where(images == 1, torch.arange(tokens) - tokens // 3, torch.arange(tokens))
    step, samples = torch.tensor(4, device=device), torch.tensor([9, 1 << 35], device=device)
    return {"noise": PhiloxNoise(KEY, step, samples, rows.to(device)), "images": images.to(device)}


def plain(inputs: dict[str, Tensor]) -> Tensor:
    """Norm, linear layer and loss as models write them; all sums in fp32."""
    hidden = inputs["hidden"]
    wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    normed = (wide * torch.rsqrt(wide.square().mean(dim=1, keepdim=True) + EPS)).to(hidden.dtype)
    prediction = F.linear(inputs["scale"] * normed, inputs["weight"], inputs["bias"]).to(wide.dtype)
    error = prediction - (inputs["noise"].to(wide.dtype) - inputs["clean"].to(wide.dtype))
    return (inputs["mask"].to(wide.dtype) * error.square().mean(dim=1)).sum()


def leaves_of(inputs: dict[str, Any], *, double: bool = False) -> dict[str, Any]:
    """Detached copies, in fp64 if asked for; what is trained requires gradients."""
    copies = {
        name: (t.double() if double else t.clone()) if isinstance(t, Tensor) else t
        for name, t in inputs.items()
    }
    return copies | {name: copies[name].requires_grad_() for name in TRAINED}


def gradients(loss: Tensor, leaves: dict[str, Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, [leaves[name] for name in TRAINED])


def through_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "_forward", op._cuda)
    monkeypatch.setattr(op, "_backward", op._backward_cuda)


def test_the_reference_is_the_formula() -> None:
    inputs = make_inputs(6, 5, 3, dtype=torch.float64)
    torch.testing.assert_close(flow_head(**inputs, eps=EPS, impl="reference"), plain(inputs))


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_the_public_function_passes_gradcheck(impl: Any) -> None:
    inputs = make_inputs(5, 4, 3, dtype=torch.float64)
    leaves = [inputs.pop(name).requires_grad_() for name in TRAINED]

    def loss(*tensors: Tensor) -> Tensor:
        return flow_head(**dict(zip(TRAINED, tensors, strict=True)), **inputs, eps=0.1, impl=impl)

    assert torch.autograd.gradcheck(loss, leaves)


@given(
    st.sampled_from([0, 1, 33, 64, 130]), st.sampled_from([1, 16, 65, 200]), st.sampled_from([1, 4, 64, 100])
)
def test_the_kernels_stay_within_the_error_budget(device: str, tokens: int, width: int, dim: int) -> None:
    # One column without eps is a sign: its gradient is nothing but cancellation.
    inputs = make_inputs(tokens, max(width, 2), dim, device=device)
    given_ = leaves_of(inputs)
    given_["clean"], given_["noise"] = misaligned(inputs["clean"]), misaligned(inputs["noise"])
    with pytest.MonkeyPatch.context() as patch:
        through_kernel(patch)
        loss = flow_head(**given_, eps=EPS)
        got = gradients(loss, given_)
    honest_leaves, exact_leaves = leaves_of(inputs), leaves_of(inputs, double=True)
    honest, exact = plain(honest_leaves), plain(exact_leaves)
    assert_within_budget("loss", loss.detach(), honest.detach(), exact.detach())
    for name, *tensors in zip(
        TRAINED, got, gradients(honest, honest_leaves), gradients(exact, exact_leaves), strict=True
    ):
        assert_within_budget(name, *tensors)


@pytest.mark.parametrize("fused", [False, True])
def test_regenerated_noise_is_as_good_as_given_noise(
    device: str, monkeypatch: pytest.MonkeyPatch, fused: bool
) -> None:
    if fused:
        through_kernel(monkeypatch)
    inputs, drawn = make_inputs(150, 20, 8, device=device), make_philox(150, device)
    sample = drawn["noise"].samples[drawn["images"]]
    noise = normal_rows(KEY, drawn["noise"].step, sample, drawn["noise"].rows, 8)
    losses = [flow_head(**inputs | changes, eps=EPS) for changes in (drawn, {"noise": noise})]
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)
    drawn["images"][1] = 2
    assert flow_head(**inputs | drawn, eps=EPS).isnan()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("needed", range(1, 16))
def test_every_subset_of_required_gradients_is_served_and_scaled(
    device: str, monkeypatch: pytest.MonkeyPatch, needed: int, fused: bool
) -> None:
    if fused:
        through_kernel(monkeypatch)
    inputs = make_inputs(7, 6, 4, device=device)
    exact = leaves_of(inputs, double=True)
    expected = gradients(-3 * plain(exact), exact)
    for i, name in enumerate(TRAINED):
        inputs[name].requires_grad_(bool(needed >> i & 1))
    (-3 * flow_head(**inputs, eps=EPS)).backward()
    for i, (name, truth) in enumerate(zip(TRAINED, expected, strict=True)):
        assert (inputs[name].grad is not None) == bool(needed >> i & 1)
        if inputs[name].grad is not None:
            torch.testing.assert_close(inputs[name].grad.double(), truth, rtol=1e-4, atol=1e-5)


def test_without_a_bias_none_is_added(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(7, 6, 4, device=device)
    expected = flow_head(**inputs | {"bias": torch.zeros(4, device=device)}, eps=EPS)
    through_kernel(monkeypatch)
    torch.testing.assert_close(flow_head(**inputs | {"bias": None}, eps=EPS), expected)


def test_a_token_that_does_not_count_has_no_loss_and_no_gradient(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    through_kernel(monkeypatch)
    inputs = leaves_of(make_inputs(9, 6, 4, device=device))
    d_hidden = gradients(flow_head(**inputs, eps=EPS), inputs)[0]
    assert not d_hidden[::3].any()
    assert d_hidden[1::3].all()


def test_a_nan_in_a_row_that_counts_reaches_the_loss(device: str) -> None:
    inputs = make_inputs(9, 6, 4, device=device)
    inputs["hidden"][1, 2] = float("nan")
    others = (inputs["mask"], None, inputs["noise"], None, None, None, 0, EPS)
    heads = [inputs[name] for name in (*TRAINED, "clean")]
    assert kernel.forward(*heads, *others)[0].isnan()


def test_an_fp32_scale_may_stand_beside_bf16_rows() -> None:
    inputs = make_inputs(5, 6, 4, dtype=torch.bfloat16)
    inputs["scale"] = inputs["scale"].float()
    leaves = leaves_of(inputs)
    got = gradients(flow_head(**leaves, eps=EPS), leaves)
    assert [g.dtype for g in got] == [torch.bfloat16, torch.float32, torch.bfloat16, torch.bfloat16]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_operators_keep_the_contracts_of_the_dispatcher(dtype: torch.dtype) -> None:
    inputs, drawn = make_inputs(5, 6, 4, dtype=dtype), make_philox(5, "cpu")
    heads = [inputs[name] for name in (*TRAINED, "clean", "mask")]
    noise = drawn["noise"]
    coordinates = (None, noise.samples, noise.rows, noise.step, signed_key(KEY))
    for others in ((None, inputs["noise"], None, None, None, 0), (drawn["images"], *coordinates)):
        torch.library.opcheck(torch.ops.reca.flow_head.default, (*heads, *others, EPS))
    loss, *saved = reference.forward(*heads[:5], inputs["noise"], heads[5], EPS)
    for flags in ((True, True), (True, False), (False, True)):
        arguments = (loss, *heads[:3], *saved, *flags)
        torch.library.opcheck(torch.ops.reca.flow_head_backward.default, arguments)


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_the_public_function_compiles_to_one_graph(impl: str) -> None:
    inputs = make_inputs(5, 6, 4) | make_philox(5, "cpu")

    def loss(hidden: Tensor) -> Tensor:
        return flow_head(**inputs | {"hidden": 2 * hidden}, eps=EPS, impl=impl)

    got = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaf = inputs["hidden"].clone().requires_grad_()
        got += torch.autograd.grad(function(leaf), leaf)
    torch.testing.assert_close(*got)


X, DRAWN = torch.zeros(4, 6), make_philox(4, "cpu")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"hidden": X[0]}, ValueError, r"hidden must be \[tokens, width > 0\], got \[6\]; flatten"),
        ({"weight": X}, ValueError, r"clean must be \[4, 4\], got \[4, 8\]; .*column per output"),
        ({"weight": X[:, :5]}, ValueError, r"weight must be \[1 to 256, width=6\], got \[4, 5\]; as nn"),
        ({"scale": X[0, :5]}, ValueError, r"scale must be \[6\], got \[5\]; one scale per column"),
        ({"clean": X[:3]}, ValueError, r"clean must be \[4, 8\], got \[3, 6\]"),
        ({"mask": X}, ValueError, r"mask must be \[4\], got \[4, 6\]; one weight per token"),
        ({"bias": X[0]}, ValueError, r"bias must be \[8\], got \[6\]; one value per row of weight"),
        ({"bias": torch.zeros(8).half()}, TypeError, r"bias must be float32 like hidden, got float16"),
        ({"scale": X[0].int()}, TypeError, r"scale must be one of bfloat16.*, got int32"),
        ({"clean": torch.zeros(4, 8).int()}, TypeError, r"clean must be one of bfloat16.*, got int32"),
        ({"mask": torch.ones(4).bool()}, TypeError, r"mask must be one of float32, got bool"),
        ({"noise": X}, ValueError, r"noise must be \[4, 8\], got \[4, 6\]"),
        (DRAWN | {"images": None}, ValueError, r"images must be given to regenerate noise, got None"),
        (DRAWN | {"images": X[0].long()}, ValueError, r"images must be \[4\], got \[6\]"),
        (DRAWN | {"images": X[:, 0]}, TypeError, r"images must be one of int64, got float32"),
        (
            DRAWN | {"noise": replace(DRAWN["noise"], samples=torch.tensor(3))},
            ValueError,
            r"noise.samples must be \[0\], got \[\]; one sample id per image",
        ),
        ({"clean": torch.zeros(4, 8, device="meta")}, ValueError, r"clean must be on cpu like hidden"),
        ({"impl": "fused"}, ValueError, r"impl='fused' needs CUDA tensors, got cpu"),
    ],
)
def test_bad_input_is_refused_with_a_cure(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^flow_head: {message}"):
        flow_head(**make_inputs(4, 6, 8) | changes, eps=EPS)


@pytest.mark.gpu
def test_on_a_gpu_bf16_stays_within_the_error_budget() -> None:
    inputs = make_inputs(517, 3584, 64, dtype=torch.bfloat16, device="cuda")
    given_, honest, exact = leaves_of(inputs), leaves_of(inputs), leaves_of(inputs, double=True)
    losses = [flow_head(**given_, eps=EPS), plain(honest), plain(exact)]
    assert_within_budget("loss", *(loss.detach() for loss in losses))
    found = [gradients(loss, leaves) for loss, leaves in zip(losses, (given_, honest, exact), strict=True)]
    for name, *tensors in zip(TRAINED, *found, strict=True):
        assert_within_budget(name, *tensors)


@pytest.mark.gpu
def test_on_a_gpu_a_captured_graph_replays_with_new_noise() -> None:
    inputs = leaves_of(make_inputs(517, 3584, 64, device="cuda") | make_philox(517, "cuda"))

    def step() -> tuple[Tensor, ...]:
        return gradients(flow_head(**inputs, eps=EPS), inputs)

    step()  # warm-up compiles outside of the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    inputs["noise"].step.add_(1)
    graph.replay()
    for got, want in zip(captured, step(), strict=True):
        assert torch.equal(got, want)
