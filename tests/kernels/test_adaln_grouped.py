"""add_layer_norm_modulate and group_gate_residual: a modulation that all rows of a group share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from reca.kernels import add_layer_norm_modulate, group_gate_residual
from reca.kernels.adaln_modulation import grouped, grouped_kernel
from reca.kernels.testing import assert_within_budget, make_normal, misaligned

EPS = 1e-6
MODULATED = ("residual", "delta", "shift", "scale")
GATED = ("x", "gate", "residual")


def make_inputs(groups: int, rows: int, dim: int, *, device: str = "cpu") -> dict[str, Tensor]:
    """All in fp32; the modulation is a slice of a wider tensor."""
    wide = make_normal(groups, 3, dim, seed=1, device=device)
    shift, scale, gate = wide.chunk(3, dim=1)
    residual, x = (make_normal(groups, rows, dim, seed=seed, device=device) for seed in (2, 3))
    return {"residual": 3 + residual, "delta": x, "x": x, "shift": shift, "scale": scale, "gate": gate}


def plain(residual: Tensor, delta: Tensor | None, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    summed = residual if delta is None else residual + delta
    return summed, F.layer_norm(summed, summed.shape[-1:], None, None, EPS) * (1 + scale) + shift


def modulate(residual: Tensor, delta: Tensor | None, shift: Tensor, scale: Tensor, **options: Any) -> Any:
    return add_layer_norm_modulate(residual, delta, shift, scale, eps=EPS, **options)


def plain_gate(x: Tensor, gate: Tensor, residual: Tensor) -> tuple[Tensor]:
    return (residual + gate * x,)


def gate(x: Tensor, shared: Tensor, residual: Tensor, **options: Any) -> tuple[Tensor]:
    return (group_gate_residual(x, shared, residual, **options),)


def results(function: Callable[..., Any], inputs: list[Tensor | None], **options: Any) -> list[Tensor]:
    """Outputs and the gradients of all inputs."""
    leaves = [None if tensor is None else tensor.detach().clone().requires_grad_() for tensor in inputs]
    outs = function(*leaves, **options)
    d_outs = [make_normal(*out.shape, seed=9 + i).to(out) for i, out in enumerate(outs)]
    given_ = [leaf for leaf in leaves if leaf is not None]
    return [*(out.detach() for out in outs), *torch.autograd.grad(outs, given_, d_outs)]


def fuse(patch: pytest.MonkeyPatch) -> None:
    """Let the public functions run the Triton code."""
    for name in ("_forward", "_backward", "_gate_forward", "_gate_backward"):
        cuda = {"_forward": "_cuda", "_gate_forward": "_gate_cuda"}.get(name, f"{name}_cuda")
        patch.setattr(grouped, name, getattr(grouped, cuda))


def compare(name: str, function: Any, honest: Any, inputs: list[Tensor | None], **options: Any) -> None:
    """Outputs and gradients are within the error budget of plain torch."""
    exact = results(honest, [None if tensor is None else tensor.double() for tensor in inputs])
    pairs = zip(results(function, inputs, **options), results(honest, inputs), exact, strict=True)
    for index, (got, rough, true) in enumerate(pairs):
        assert_within_budget(f"{name} {index}", got, rough, true)


@pytest.mark.parametrize("with_delta", [False, True])
def test_the_reference_is_the_formula_and_passes_gradcheck(with_delta: bool) -> None:
    made = {name: tensor.double() for name, tensor in make_inputs(2, 3, 5).items()}
    rows = [made[name].requires_grad_() for name in MODULATED]
    if not with_delta:
        rows[1] = None  # type: ignore[call-overload]
    assert torch.autograd.gradcheck(modulate, rows)
    for impl in ("auto", "reference"):
        torch.testing.assert_close(modulate(*rows, impl=impl), plain(*rows))
    gated = [made[name].requires_grad_() for name in GATED]
    assert torch.autograd.gradcheck(gate, gated)
    for impl in ("auto", "reference"):
        torch.testing.assert_close(gate(*gated, impl=impl), plain_gate(*gated))


@given(
    st.integers(0, 3),
    st.sampled_from([1, 5, 33]),
    st.sampled_from([3, 16, 129, 1030]),
    st.booleans(),
    st.booleans(),
)
def test_the_kernels_stay_within_the_error_budget(
    device: str, groups: int, rows: int, dim: int, with_delta: bool, shifted: bool
) -> None:
    made = make_inputs(groups, rows, dim, device=device)
    if shifted:
        made |= {name: misaligned(made[name]) for name in ("residual", "delta", "x")}
    with pytest.MonkeyPatch.context() as patch:
        fuse(patch)
        modulated = [made[name] if name != "delta" or with_delta else None for name in MODULATED]
        compare("modulated", modulate, plain, modulated)
        compare("gated", gate, plain_gate, [made[name] for name in GATED])


def test_programs_that_sum_many_rows_keep_to_their_group(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fuse(monkeypatch)
    monkeypatch.setattr(grouped_kernel, "rows_per_program", lambda rows, architecture: 16)
    made = make_inputs(3, 37, 1030, device=device)
    compare("modulated", modulate, plain, [made[name] for name in MODULATED])
    compare("gated", gate, plain_gate, [made[name] for name in GATED])


@pytest.mark.parametrize("impl", ["kernel", "auto", "reference"])
def test_a_wide_stream_takes_narrow_deltas_and_feeds_narrow_readers(
    device: str, monkeypatch: pytest.MonkeyPatch, impl: str
) -> None:
    if impl == "kernel":
        fuse(monkeypatch)
    options = {"impl": "reference" if impl == "reference" else "auto"}
    made = make_inputs(2, 7, 36, device=device)
    made |= {name: made[name].bfloat16() for name in ("delta", "x")}
    rows = [made[name] for name in MODULATED]
    got = results(modulate, rows, dtype=torch.bfloat16, **options)
    assert [t.dtype for t in got] == [torch.float32, *[torch.bfloat16, torch.float32] * 2, torch.float32]
    expected = results(lambda *tensors: (lambda s, o: (s, o.bfloat16()))(*plain(*tensors)), rows)
    torch.testing.assert_close(got[0], expected[0])
    for mine, theirs in zip(got[1:], expected[1:], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-2, atol=2e-2)
    got = results(gate, [made[name] for name in GATED], **options)
    assert [t.dtype for t in got] == [torch.float32, torch.bfloat16, torch.float32, torch.float32]
    torch.testing.assert_close(got[0], plain_gate(*(made[name] for name in GATED))[0])


@pytest.mark.parametrize("needed", range(16))
def test_any_subset_of_gradients_can_be_asked_for(
    device: str, monkeypatch: pytest.MonkeyPatch, needed: int
) -> None:
    fuse(monkeypatch)
    made = make_inputs(2, 5, 8, device=device)
    rows = [made[name].requires_grad_(bool(needed >> i & 1)) for i, name in enumerate(MODULATED)]
    expected = plain(*(tensor.detach().clone().requires_grad_(tensor.requires_grad) for tensor in rows))
    _, out = modulate(*rows)
    assert out.requires_grad == bool(needed) == expected[1].requires_grad
    if needed:
        out.sum().backward()
    assert [tensor.grad is not None for tensor in rows] == [bool(needed >> i & 1) for i in range(4)]


def test_a_stream_that_alone_is_read_keeps_its_gradient(device: str) -> None:
    made = make_inputs(2, 5, 8, device=device)
    rows = [made[name].requires_grad_() for name in MODULATED]
    modulate(*rows)[0].sum().backward()
    for row in rows[:2]:
        assert row.grad is not None and torch.equal(row.grad, torch.ones_like(row))
    assert rows[2].grad is None and rows[3].grad is None


def test_the_operators_keep_the_contracts_of_the_dispatcher_and_compile_as_one_graph() -> None:
    made = make_inputs(2, 3, 8)
    flat = {name: tensor.reshape(-1, 8) for name, tensor in made.items()}
    delta = flat["delta"].bfloat16()
    arguments = (flat["residual"], delta, flat["shift"], flat["scale"], EPS, torch.bfloat16)
    torch.library.opcheck(torch.ops.reca.add_layer_norm_modulate.default, arguments)
    gated = (flat["x"], flat["gate"], flat["residual"])
    torch.library.opcheck(torch.ops.reca.group_gate_residual.default, gated)
    torch.library.opcheck(torch.ops.reca.group_gate_residual_backward.default, (flat["residual"], *gated[:2]))
    _, out, mean, rstd = grouped._forward(*arguments)
    for flags in ((torch.bfloat16, True, True), (None, True, False), (None, False, True)):
        inputs = (out, flat["x"], flat["residual"], flat["scale"], mean, rstd, *flags)
        torch.library.opcheck(torch.ops.reca.add_layer_norm_modulate_backward.default, inputs)

    def block(residual: Tensor, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        summed, normed = modulate(residual, x, shift, scale)
        return group_gate_residual(normed, shift, summed)

    inputs = [made[name].detach().requires_grad_() for name in ("residual", "x", "shift", "scale")]
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")(*inputs)
    torch.testing.assert_close(compiled, block(*inputs))


X = torch.zeros(2, 3, 8)
SHARED = torch.zeros(2, 1, 8)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"residual": X[0]}, ValueError, r"residual must be \[groups, rows, dim\], got \[3, 8\]; unflatten"),
        ({"delta": X[:, :2]}, ValueError, r"delta must be \[2, 3, 8\], got \[2, 2, 8\]; shaped like resid"),
        ({"shift": X}, ValueError, r"shift must be \[2, 1, 8\], got \[2, 3, 8\]; one row per group"),
        ({"scale": SHARED.int()}, TypeError, r"scale must be one of bfloat16.*, got int32"),
        ({"scale": SHARED.to("meta")}, ValueError, r"scale must be on cpu like residual, got meta"),
        ({"dtype": torch.int32}, TypeError, r"dtype must be a floating one, got torch.int32; say what"),
        ({"impl": "fused"}, ValueError, r"impl='fused' needs CUDA tensors, got cpu"),
    ],
)
def test_bad_input_is_refused_with_a_cure(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    good = {"residual": X, "delta": None, "shift": SHARED, "scale": SHARED, "eps": EPS}
    with pytest.raises(error, match=f"^add_layer_norm_modulate: {message}"):
        add_layer_norm_modulate(**good | changes)


def test_a_bad_gate_is_refused_with_a_cure() -> None:
    with pytest.raises(ValueError, match=r"^group_gate_residual: gate must be \[2, 1, 8\], got \[2, 8\]"):
        group_gate_residual(X, SHARED[:, 0], X)
    with pytest.raises(
        ValueError, match=r"^group_gate_residual: residual must be \[2, 3, 8\], got \[2, 1, 8\]"
    ):
        group_gate_residual(X, SHARED, SHARED)
