"""group_norm_silu: the norm and activation of frozen image encoders, in parts and joined again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from reca.kernels import group_norm_silu
from reca.kernels.group_norm_silu import kernel, op
from reca.kernels.testing import assert_within_budget, make_normal

EPS = 1e-6


def make_inputs(*shape: int, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """x, weight, bias."""
    x = 3 + make_normal(*shape, seed=0, device=device)
    return (
        x,
        1 + make_normal(shape[1], seed=1, device=device) / 4,
        make_normal(shape[1], seed=2, device=device),
    )


def plain(x: Tensor, weight: Tensor, bias: Tensor, groups: int) -> Tensor:
    return F.silu(torch.group_norm(x, groups, weight, bias, EPS))


def fused(inputs: tuple[Tensor, ...], groups: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return kernel.forward(*inputs, groups, EPS, dtype)  # type: ignore[arg-type]


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.sampled_from([1, 7, 100, 4097, 9000]))
def test_operator_and_kernel_stay_within_the_error_budget(
    device: str, batch: int, groups: int, channels: int, positions: int
) -> None:
    inputs = make_inputs(batch, groups * channels, positions, device=device)
    if channels * positions == 1:
        return  # one value has no spread: torch's own norm then only rounds eps
    honest, exact = plain(*inputs, groups), plain(*(t.double() for t in inputs), groups)
    assert_within_budget("kernel", fused(inputs, groups), honest, exact)
    assert_within_budget("operator", group_norm_silu(*inputs, groups=groups, eps=EPS), honest, exact)


def test_groups_that_lie_in_many_parts_are_joined_again(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(1, 4, 3 * 4096 + 5, device=device)
    exact = plain(*(t.double() for t in inputs), 2)
    for processors in (1, 2, 100):  # 4, 7 and 7 parts of each group, the last one short
        monkeypatch.setattr(kernel, "multiprocessors", lambda architecture, n=processors: n)
        torch.testing.assert_close(fused(inputs, 2).double(), exact, rtol=1e-5, atol=1e-5)


def test_the_kernel_rounds_once_where_autocast_rounds_once(device: str) -> None:
    x, weight, bias = make_inputs(2, 6, 5, 7, device=device)
    x = x.bfloat16()
    got = fused((x, weight, bias), 3, torch.bfloat16)
    assert got.dtype == torch.bfloat16 and got.shape == x.shape
    # One unit in the last place: the interpreter truncates where the GPU rounds.
    torch.testing.assert_close(got, plain(x.float(), weight, bias, 3).bfloat16(), rtol=2**-7, atol=2**-9)
    for impl in ("auto", "reference"):
        out = group_norm_silu(x, weight, bias, groups=3, eps=EPS, impl=impl)  # type: ignore[arg-type]
        assert torch.equal(out.cpu(), plain(x.float(), weight, bias, 3).bfloat16().cpu())


def test_a_large_mean_costs_no_digits(device: str) -> None:
    x, weight, bias = make_inputs(1, 4, 6000, device=device)
    x = x + 1000
    exact = plain(x.double(), weight.double(), bias.double(), 2)
    torch.testing.assert_close(fused((x, weight, bias), 2).double(), exact, rtol=1e-4, atol=1e-4)


def test_what_is_not_contiguous_gives_the_same_and_nothing_gives_nothing(device: str) -> None:
    x, weight, bias = make_inputs(2, 4, 3, 5, device=device)
    turned = x.to(memory_format=torch.channels_last)
    assert torch.equal(fused((turned, weight, bias), 2), fused((x, weight, bias), 2))
    for shape in ((0, 4, 3), (2, 4, 0)):
        assert group_norm_silu(x.new_empty(shape), weight, bias, groups=2, eps=EPS).shape == shape
        assert fused((x.new_empty(shape), weight, bias), 2).shape == shape


def test_a_gradient_is_that_of_plain_torch() -> None:
    inputs = [t.double().requires_grad_() for t in make_inputs(2, 4, 5)]
    assert torch.autograd.gradcheck(lambda *t: group_norm_silu(*t, groups=2, eps=EPS), inputs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("reca.kernels._checks.can_run_fused", lambda device: True)
        with pytest.raises(ValueError, match="impl='fused' has no backward; use impl='auto'"):
            group_norm_silu(*inputs, groups=2, eps=EPS, impl="fused")  # type: ignore[misc]


def test_the_operator_is_traced_whole_and_keeps_its_promises() -> None:
    inputs = make_inputs(2, 4, 5)
    torch.library.opcheck(op._forward, (*inputs, 2, EPS, torch.bfloat16))
    compiled = torch.compile(group_norm_silu, fullgraph=True, backend="eager")
    expected = group_norm_silu(*inputs, groups=2, eps=EPS)
    assert torch.equal(compiled(*inputs, groups=2, eps=EPS), expected)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"groups": 3}, ValueError, r"x must be \[batch, a multiple of groups=3, ...\], got \[2, 4, 5\]"),
        ({"groups": 0}, ValueError, "a multiple of groups=0"),
        ({"weight": torch.ones(3)}, ValueError, r"weight must be \[4\], got \[3\]; one value per channel"),
        ({"bias": torch.ones(4).long()}, TypeError, "bias must be one of bfloat16"),
        ({"x": torch.ones(2, 4, 5).long()}, TypeError, "x must be one of bfloat16"),
        ({"dtype": torch.int32}, TypeError, "dtype must be a floating one, got torch.int32"),
        ({"bias": torch.ones(4, device="meta")}, ValueError, "bias must be on cpu like x, got meta"),
        ({"impl": "triton"}, ValueError, "impl must be one of auto, fused, reference, got 'triton'"),
    ],
)
def test_misuse_is_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    x, weight, bias = make_inputs(2, 4, 5)
    arguments: dict[str, Any] = {"x": x, "weight": weight, "bias": bias, "groups": 2, "eps": EPS} | change
    with pytest.raises(error, match=f"group_norm_silu: .*{message}"):
        group_norm_silu(**arguments)
