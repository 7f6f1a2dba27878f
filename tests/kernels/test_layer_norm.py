"""layer_norm and add_layer_norm: alone and after residual adds, streams wider than what they feed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from reca.kernels import add_layer_norm, layer_norm
from reca.kernels.layer_norm import kernel, op
from reca.kernels.testing import assert_within_budget, make_normal, misaligned

EPS = 1e-5


def make_inputs(
    rows: int, dim: int, deltas: int, *, device: str = "cpu", narrow: torch.dtype = torch.float32
) -> list[Tensor]:
    """residual, weight, bias in fp32, then the deltas."""
    residual = 3 + make_normal(rows, dim, seed=0, device=device)
    weight, bias = 1 + make_normal(dim, seed=1, device=device) / 4, make_normal(dim, seed=2, device=device)
    return [
        residual,
        weight,
        bias,
        *(make_normal(rows, dim, seed=3 + i, device=device, dtype=narrow) for i in range(deltas)),
    ]


def ours(tensors: list[Tensor], **options: Any) -> list[Tensor]:
    residual, weight, bias, *deltas = tensors
    outs = add_layer_norm(residual, deltas, weight, bias, eps=EPS, **options)
    return list(outs if deltas else outs[1:])


def plain(tensors: list[Tensor], dtype: torch.dtype | None = None, readers: int = 1) -> list[Tensor]:
    """As models write it under autocast: adds, an fp32 norm and a cast."""
    residual, weight, bias, *deltas = tensors
    dtype = dtype or (deltas[0].dtype if deltas else residual.dtype)
    stream = residual + sum(deltas[1:], deltas[0]) if deltas else residual
    normed = F.layer_norm(stream, stream.shape[-1:], weight, bias, EPS).to(dtype)
    return [*([stream] if deltas else []), *[normed] * readers]


def results(function: Any, tensors: list[Tensor], **options: Any) -> list[Tensor]:
    """Outputs and the gradients of all inputs."""
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    outs = function(leaves, **options)
    d_outs = [make_normal(*out.shape, seed=9 + i).bfloat16().to(out) for i, out in enumerate(outs)]
    return [*(out.detach() for out in outs), *torch.autograd.grad(outs, leaves, d_outs)]


def fuse(patch: pytest.MonkeyPatch) -> None:
    """Let the public functions run the Triton code."""
    patch.setattr(op, "_forward", op._cuda)
    patch.setattr(op, "_backward", op._backward_cuda)


@given(st.integers(0, 40), st.sampled_from([1, 5, 64, 100]), st.integers(0, 2), st.integers(1, 2))
def test_operator_and_kernel_stay_within_the_error_budget(
    device: str, rows: int, dim: int, deltas: int, readers: int
) -> None:
    tensors = make_inputs(rows, dim, deltas, device=device)
    exact = results(plain, [t.double() for t in tensors], readers=readers)
    honest = results(plain, tensors, readers=readers)
    for fused in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            if fused:
                fuse(patch)
            found = results(ours, tensors, readers=readers)
        for index, parts in enumerate(zip(found, honest, exact, strict=True)):
            assert_within_budget(f"output or gradient {index}, fused={fused}", *parts)


@pytest.mark.parametrize("fused", [False, True])
def test_a_wide_stream_takes_narrow_deltas_and_is_rounded_once_for_its_readers(
    device: str, monkeypatch: pytest.MonkeyPatch, fused: bool
) -> None:
    if fused:
        fuse(monkeypatch)
    tensors = make_inputs(7, 48, 2, device=device, narrow=torch.bfloat16)
    found = results(ours, tensors, readers=2)
    dtypes = [torch.float32, torch.bfloat16, torch.bfloat16, *[torch.float32] * 3, *[torch.bfloat16] * 2]
    assert [part.dtype for part in found] == dtypes
    exact = results(plain, [t.double() for t in tensors], readers=2)
    for got, want in zip(found, exact, strict=True):
        # One unit in the last place: the interpreter truncates where the GPU rounds.
        tolerance = 2**-7 if got.dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(
            got.double(), want, rtol=tolerance, atol=tolerance * float(want.abs().mean())
        )
    assert torch.equal(found[-1], found[-2])


def test_a_stream_without_deltas_is_returned_as_it_is() -> None:
    residual, weight, bias = make_inputs(3, 5, 0)
    stream, normed = add_layer_norm(residual, (), weight, bias, eps=EPS, dtype=torch.bfloat16)
    assert stream is residual
    assert torch.equal(normed, F.layer_norm(residual, (5,), weight, bias, EPS).bfloat16())
    shaped = layer_norm(residual.view(3, 1, 5), weight, bias, eps=EPS)
    torch.testing.assert_close(shaped[:, 0], F.layer_norm(residual, (5,), weight, bias, EPS))


def test_the_public_functions_pass_gradcheck() -> None:
    tensors = tuple(t.double().requires_grad_() for t in make_inputs(2, 5, 2))
    assert torch.autograd.gradcheck(lambda *t: tuple(ours(list(t), readers=2)), tensors)
    assert torch.autograd.gradcheck(lambda *t: layer_norm(*t, eps=0.1), tensors[:3])


def test_a_large_mean_costs_no_digits(device: str) -> None:
    x, weight, bias = make_inputs(4, 100, 0, device=device)
    x = x + 1000
    exact = F.layer_norm(x.double(), (100,), weight.double(), bias.double(), EPS)
    got = kernel.forward(x, [], weight, bias, EPS, torch.float32)[1]
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-5)


def test_strided_and_misaligned_rows_are_read_as_they_lie(device: str) -> None:
    residual, weight, bias, *deltas = make_inputs(5, 12, 2, device=device)
    want = kernel.forward(residual, deltas, weight, bias, EPS, torch.float32)
    moved = [misaligned(t) for t in (residual, *deltas)]
    for got, expected in zip(
        kernel.forward(moved[0], moved[1:], weight, bias, EPS, torch.float32), want, strict=True
    ):
        assert torch.equal(got, expected)
    d_normed = [make_normal(5, 12, seed=9 + i, device=device) for i in range(2)]
    back = (weight, EPS, True, None, True)
    given_ = kernel.backward(
        [misaligned(d) for d in d_normed], misaligned(residual), misaligned(want[0]), *back
    )
    for got, expected in zip(given_, kernel.backward(d_normed, residual, want[0], *back), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("needed", range(1, 32, 3))
@pytest.mark.parametrize("fused", [False, True])
def test_every_subset_of_required_gradients_is_served(
    device: str, monkeypatch: pytest.MonkeyPatch, needed: int, fused: bool
) -> None:
    if fused:
        fuse(monkeypatch)
    tensors = make_inputs(4, 6, 2, device=device, narrow=torch.bfloat16)
    whole = results(ours, tensors)[2:]
    leaves = [t.clone().requires_grad_(bool(needed >> i & 1)) for i, t in enumerate(tensors)]
    outs = ours(leaves)
    pairs = [
        (o, make_normal(4, 6, seed=9 + i).bfloat16().to(o)) for i, o in enumerate(outs) if o.requires_grad
    ]
    torch.autograd.backward(*zip(*pairs, strict=True))
    for i, (leaf, want) in enumerate(zip(leaves, whole, strict=True)):
        assert (leaf.grad is not None) == bool(needed >> i & 1)
        if leaf.grad is not None and (needed & 0b11001 or i in (1, 2)):
            # Without a gradient of the sum only the norm's own reaches weight and bias: the same.
            torch.testing.assert_close(leaf.grad, want)


def test_the_operator_keeps_the_contracts_of_the_dispatcher() -> None:
    residual, weight, bias, *deltas = make_inputs(3, 5, 2, narrow=torch.bfloat16)
    for parts in ([], deltas):
        arguments = (residual, parts, weight, bias, EPS, torch.bfloat16)
        torch.library.opcheck(torch.ops.reca.layer_norm.default, arguments)
    d_normed = [make_normal(3, 5, seed=9 + i, dtype=torch.bfloat16) for i in range(2)]
    for wanted in ((True, torch.bfloat16, True), (True, None, False), (False, None, True)):
        arguments = (d_normed, residual, residual, weight, EPS, *wanted)
        torch.library.opcheck(torch.ops.reca.layer_norm_backward.default, arguments)


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_the_public_function_compiles_to_one_graph(impl: str) -> None:
    tensors = make_inputs(3, 5, 2, narrow=torch.bfloat16)

    def loss(*leaves: Tensor) -> Tensor:
        summed, first, second = ours(list(leaves), readers=2, impl=impl)
        return summed.square().sum() + (first * second).float().square().sum()

    found = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = [t.clone().requires_grad_() for t in tensors]
        found.append(torch.autograd.grad(function(*leaves), leaves))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want)


X, W = torch.zeros(2, 3), torch.zeros(3)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((torch.zeros(2, 0), (), W, W), {}, ValueError, r"layer_norm: x must be \[..., 1 to 32768\], got"),
        ((X, (X[:1],), W, W), {}, ValueError, r"add_layer_norm: deltas\[0\] must be \[2, 3\], got \[1, 3\]"),
        (
            (X, (X, X, X), W, W),
            {},
            ValueError,
            r"add_layer_norm: takes up to 2 deltas and 1 to 2 readers, got 3",
        ),
        (
            (X, (X,), W, W),
            {"readers": 0},
            ValueError,
            r"add_layer_norm: takes up to 2 deltas and 1 to 2 readers",
        ),
        (
            (X, (), W[:2], W),
            {},
            ValueError,
            r"layer_norm: weight must be \[3\], got \[2\]; one value per column",
        ),
        ((X, (), W, W.long()), {}, TypeError, r"layer_norm: bias must be one of bfloat16, .* got int64"),
        (
            (X, (X, X.half()), W, W),
            {},
            TypeError,
            r"add_layer_norm: deltas\[1\] must be float32 like deltas\[0\]",
        ),
        ((X, (), W, W), {"dtype": torch.int64}, TypeError, r"layer_norm: dtype must be a floating one, got"),
        (
            (X, (X.to("meta"),), W, W),
            {},
            ValueError,
            r"add_layer_norm: deltas\[0\] must be on cpu like residual",
        ),
        (
            (X, (), W, W),
            {"impl": "fast"},
            ValueError,
            r"layer_norm: impl must be one of auto, fused, reference",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_a_cure(
    arguments: tuple[Any, ...], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^{message}"):
        add_layer_norm(*arguments, eps=EPS, **options)


@pytest.mark.gpu
def test_on_a_gpu_the_kernels_agree_with_the_reference_at_full_size() -> None:
    tensors = make_inputs(3300, 2048, 2, device="cuda", narrow=torch.bfloat16)
    exact = results(plain, [t.double() for t in tensors], readers=2)
    honest = results(plain, tensors, readers=2)
    for index, parts in enumerate(zip(results(ours, tensors, readers=2), honest, exact, strict=True)):
        assert_within_budget(f"output or gradient {index}", *parts)
