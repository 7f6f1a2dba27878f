"""flow_matching_loss: the masked squared error of a velocity, its gradient in the same pass."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from reca.kernels import flow_matching_loss
from reca.kernels.flow_matching_loss import kernel, op, reference
from reca.kernels.testing import assert_within_budget, make_normal, misaligned

OP = torch.ops.reca.flow_matching_loss.default


def make_inputs(
    tokens: int, dim: int, *, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """prediction, clean, noise, and a mask of weights in which every third token does not count."""
    rows = [make_normal(tokens, dim, seed=seed, dtype=dtype, device=device) for seed in range(3)]
    mask = make_normal(tokens, seed=3, device=device).abs()
    mask[::3] = 0
    return rows[0], rows[1], rows[2], mask


def doubled(tensors: tuple[Tensor, ...]) -> list[Tensor]:
    return [tensor.double() for tensor in tensors]


def plain_gradient(prediction: Tensor, clean: Tensor, noise: Tensor, mask: Tensor) -> Tensor:
    """What autograd gives for the reference at the dtype of the inputs."""
    leaf = prediction.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(reference.loss(leaf, clean, noise, mask), leaf)
    return gradient


def test_the_reference_is_the_formula() -> None:
    prediction, clean, noise, mask = doubled(make_inputs(5, 3))
    expected = sum(
        mask[i] * sum((prediction[i, d] - (noise[i, d] - clean[i, d])) ** 2 for d in range(3)) / 3
        for i in range(5)
    )
    torch.testing.assert_close(reference.loss(prediction, clean, noise, mask), expected)


def test_the_explicit_gradient_of_the_reference_is_that_of_autograd() -> None:
    inputs = doubled(make_inputs(7, 5))
    torch.testing.assert_close(reference.gradient(*inputs), plain_gradient(*inputs), rtol=1e-12, atol=0)


def test_the_public_function_passes_gradcheck() -> None:
    prediction, clean, noise, mask = make_inputs(5, 3, dtype=torch.float64)
    prediction.requires_grad_()
    assert torch.autograd.gradcheck(lambda p: flow_matching_loss(p, clean, noise, mask), (prediction,))


@given(st.integers(0, 70), st.sampled_from([1, 3, 16, 64, 100, 129]), st.booleans())
def test_the_kernel_stays_within_the_error_budget(device: str, tokens: int, dim: int, shifted: bool) -> None:
    inputs = make_inputs(tokens, dim, device=device)
    given_ = tuple(misaligned(t) for t in inputs) if shifted else inputs
    loss, gradient = kernel.forward(*given_, True)
    exact = doubled(inputs)
    assert_within_budget("loss", loss, reference.loss(*inputs), reference.loss(*exact))
    assert_within_budget("gradient", gradient, plain_gradient(*inputs), reference.gradient(*exact))


def test_rows_wider_than_a_tile_are_summed_over_all_their_columns(device: str) -> None:
    inputs = make_inputs(3, 5000, device=device)
    loss, gradient = kernel.forward(*inputs, True)
    exact = doubled(inputs)
    assert_within_budget("loss", loss, reference.loss(*inputs), reference.loss(*exact))
    assert_within_budget("gradient", gradient, plain_gradient(*inputs), reference.gradient(*exact))


def test_columns_that_are_not_contiguous_are_handled(device: str) -> None:
    prediction, clean, noise, mask = make_inputs(9, 8, device=device)
    transposed = prediction.t().contiguous().t()
    assert torch.equal(
        kernel.forward(transposed, clean, noise, mask, True)[1],
        kernel.forward(prediction, clean, noise, mask, True)[1],
    )


def test_bf16_is_storage_and_the_arithmetic_is_fp32(device: str) -> None:
    inputs = make_inputs(33, 64, dtype=torch.bfloat16, device=device)
    loss, gradient = kernel.forward(*inputs, True)
    exact = doubled(inputs)
    assert_within_budget("loss", loss, reference.loss(*inputs), reference.loss(*exact))
    # One unit in the last place: the interpreter truncates where the GPU rounds.
    torch.testing.assert_close(gradient.double(), reference.gradient(*exact), rtol=2**-7, atol=0)


def test_without_a_gradient_none_is_formed(device: str) -> None:
    inputs = make_inputs(9, 8, device=device)
    loss, gradient = kernel.forward(*inputs, False)
    assert gradient.numel() == 0
    assert torch.equal(loss, kernel.forward(*inputs, True)[0])


@pytest.mark.parametrize("tokens", [0, 6])
def test_with_no_token_that_counts_loss_and_gradient_are_zero(device: str, tokens: int) -> None:
    prediction, clean, noise, mask = make_inputs(tokens, 4, device=device)
    loss, gradient = kernel.forward(prediction, clean, noise, torch.zeros_like(mask), True)
    assert float(loss) == 0.0
    assert torch.equal(gradient, torch.zeros_like(prediction))


@pytest.mark.parametrize("forward", [kernel.forward, op._cpu], ids=["kernel", "reference"])
def test_a_row_that_does_not_count_may_hold_anything(device: str, forward) -> None:  # type: ignore[no-untyped-def]
    inputs = make_inputs(6, 4, device=device)
    clean_loss, clean_gradient = forward(*inputs, True)
    for tensor in inputs[:3]:
        tensor[::3] = float("inf")
    loss, gradient = forward(*inputs, True)
    assert torch.equal(loss, clean_loss)
    assert torch.equal(gradient, clean_gradient)


def test_a_nan_in_a_row_that_counts_reaches_the_loss(device: str) -> None:
    prediction, clean, noise, mask = make_inputs(6, 4, device=device)
    prediction[1, 2] = float("nan")
    assert kernel.forward(prediction, clean, noise, mask, False)[0].isnan()


def test_the_gradient_is_scaled_by_what_comes_from_above(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(op, "_forward", op._cuda)
    prediction, clean, noise, mask = make_inputs(9, 8, device=device)
    prediction.requires_grad_()
    (-3.0 * flow_matching_loss(prediction, clean, noise, mask)).backward()
    assert prediction.grad is not None
    exact = reference.gradient(*doubled((prediction.detach(), clean, noise, mask)))
    torch.testing.assert_close(prediction.grad.double(), -3.0 * exact, rtol=1e-6, atol=1e-6)


def test_only_the_prediction_receives_a_gradient() -> None:
    inputs = [tensor.requires_grad_() for tensor in make_inputs(4, 3)]
    for impl in ("auto", "reference"):
        for tensor in inputs:
            tensor.grad = None
        flow_matching_loss(*inputs, impl=impl).backward()
        assert [tensor.grad is not None for tensor in inputs] == [True, False, False, False]


def test_without_anything_to_train_the_loss_has_no_graph() -> None:
    prediction, clean, noise, mask = make_inputs(4, 3)
    assert not flow_matching_loss(prediction, clean, noise, mask).requires_grad
    with torch.no_grad():
        assert not flow_matching_loss(prediction.requires_grad_(), clean, noise, mask).requires_grad


@pytest.mark.parametrize("with_gradient", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_operator_keeps_the_contracts_of_the_dispatcher(dtype: torch.dtype, with_gradient: bool) -> None:
    torch.library.opcheck(OP, (*make_inputs(5, 3, dtype=dtype), with_gradient))


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_the_public_function_compiles_to_one_graph(impl: str) -> None:
    def step(prediction: Tensor, clean: Tensor, noise: Tensor, mask: Tensor) -> Tensor:
        return 2 * flow_matching_loss(3 * prediction, clean, noise, mask, impl=impl)

    prediction, clean, noise, mask = make_inputs(5, 3)
    losses, gradients = [], []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaf = prediction.clone().requires_grad_()
        losses.append(function(leaf, clean, noise, mask))
        gradients += torch.autograd.grad(losses[-1], leaf)
    assert torch.equal(*losses)
    assert torch.equal(*gradients)


ROWS = torch.zeros(4, 3)
MASK = torch.ones(4)


@pytest.mark.parametrize(
    ("inputs", "impl", "error", "message"),
    [
        (
            (ROWS[0], ROWS, ROWS, MASK),
            "auto",
            ValueError,
            r"prediction must be \[tokens, dim > 0\], got \[3\]; flatten",
        ),
        ((ROWS[:, :0], ROWS, ROWS, MASK), "auto", ValueError, r"prediction must be .*got \[4, 0\]"),
        (
            (ROWS, ROWS[:2], ROWS, MASK),
            "auto",
            ValueError,
            r"clean must be \[4, 3\], got \[2, 3\]; \[tokens, dim\] like",
        ),
        ((ROWS, ROWS, ROWS[:, :2], MASK), "auto", ValueError, r"noise must be \[4, 3\], got \[4, 2\]"),
        (
            (ROWS, ROWS, ROWS, ROWS),
            "auto",
            ValueError,
            r"mask must be \[4\], got \[4, 3\]; one weight per token",
        ),
        (
            (ROWS.int(), ROWS, ROWS, MASK),
            "auto",
            TypeError,
            r"prediction must be one of bfloat16.*, got int32; convert",
        ),
        (
            (ROWS, ROWS.half(), ROWS, MASK),
            "auto",
            TypeError,
            r"clean must be float32 like prediction, got float16",
        ),
        (
            (ROWS, ROWS, ROWS, MASK.bool()),
            "auto",
            TypeError,
            r"mask must be one of float32, got bool; convert it",
        ),
        (
            (ROWS, ROWS, ROWS.to("meta"), MASK),
            "auto",
            ValueError,
            r"noise must be on cpu like prediction, got meta",
        ),
        (
            (ROWS, ROWS, ROWS, MASK),
            "fused",
            ValueError,
            r"impl='fused' needs CUDA tensors, got cpu; use impl='auto'",
        ),
        (
            (ROWS, ROWS, ROWS, MASK),
            "fast",
            ValueError,
            r"impl must be one of auto, fused, reference, got 'fast'",
        ),
    ],
)
def test_bad_input_is_refused_with_a_cure(
    inputs: tuple[Tensor, ...], impl: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"flow_matching_loss: {message}"):
        flow_matching_loss(*inputs, impl=impl)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_a_gpu_low_precision_stays_within_the_error_budget(dtype: torch.dtype) -> None:
    inputs = make_inputs(1027, 64, dtype=dtype, device="cuda")
    loss, gradient = kernel.forward(*inputs, True)
    exact = doubled(inputs)
    assert_within_budget("loss", loss, reference.loss(*inputs), reference.loss(*exact))
    assert_within_budget("gradient", gradient, plain_gradient(*inputs), reference.gradient(*exact))


@pytest.mark.gpu
def test_on_a_gpu_a_captured_graph_replays_on_new_values() -> None:
    inputs = make_inputs(129, 64, device="cuda")
    static = [tensor.clone() for tensor in inputs]
    static[0].requires_grad_()
    flow_matching_loss(*static).backward()  # warm-up compiles outside of the capture
    graph = torch.cuda.CUDAGraph()
    static[0].grad = None
    with torch.cuda.graph(graph):
        loss = flow_matching_loss(*static)
        (gradient,) = torch.autograd.grad(loss, static[0])
    with torch.no_grad():
        static[0].copy_(2 * inputs[0])
    graph.replay()
    expected = kernel.forward(2 * inputs[0], *inputs[1:], True)
    assert torch.equal(loss, expected[0])
    assert torch.equal(gradient, expected[1])
