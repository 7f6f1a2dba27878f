"""qk_norm_rope with `into`: keys and values written to given places of larger buffers; their gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from reca.kernels import qk_norm_rope
from reca.kernels.qk_norm_rope import kernel, op
from reca.kernels.testing import make_normal

HEADS, KV_HEADS, DIM = 4, 2, 6
GEOMETRY: dict[str, Any] = {"heads": HEADS, "kv_heads": KV_HEADS, "eps": 1e-6}


def make_inputs(rows: int, *, seed: int = 0, device: str = "cpu") -> tuple[Tensor, ...]:
    """qkv, two weights, cos and sin."""
    qkv = make_normal(rows, (HEADS + 2 * KV_HEADS) * DIM, seed=seed, device=device)
    weights = [1 + make_normal(DIM, seed=seed + i, device=device) / 4 for i in (1, 2)]
    angle = make_normal(rows, 2, seed=seed + 3, device=device)
    return qkv, *weights, angle.cos(), angle.sin()


def make_buffers(places: int, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[Tensor]:
    made: dict[str, Any] = {"dtype": dtype, "device": device}
    return [make_normal(places, KV_HEADS, DIM, seed=seed, **made) for seed in (20, 21)]


def make_destinations(rows: int, places: int, *, device: str = "cpu") -> Tensor:
    generator = torch.Generator().manual_seed(30)
    return torch.randperm(places, generator=generator)[:rows].to(device)


def fuse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the public function run the Triton code."""
    monkeypatch.setattr(op, "_forward_into", op._into_cuda)
    monkeypatch.setattr(op, "_backward", op._backward_cuda)


def test_keys_and_values_land_at_their_places_and_nothing_else_changes(device: str) -> None:
    inputs, buffers = make_inputs(5, device=device), make_buffers(9, device=device)
    query, key, value = qk_norm_rope(*inputs, **GEOMETRY)
    places = torch.tensor([7, 0, 3, 8, 2], device=device)
    geometry = (HEADS, KV_HEADS, 1e-6)
    for write in ("kernel", "operator", "reference"):
        keys, values = (buffer.clone() for buffer in buffers)
        if write == "kernel":
            outs = kernel.forward(*inputs, *geometry, into=(keys, values, places))
        else:
            impl = "auto" if write == "operator" else "reference"
            outs = qk_norm_rope(*inputs, **GEOMETRY, into=(keys, values, places), impl=impl)
        assert outs[1] is keys
        assert outs[2] is values
        torch.testing.assert_close(outs[0], query)
        untouched = [1, 4, 5, 6]
        for got, rows, before in ((keys, key, buffers[0]), (values, value, buffers[1])):
            torch.testing.assert_close(got[places], rows)
            assert torch.equal(got[untouched], before[untouched])


def concatenated(inputs: list[tuple[Tensor, ...]], places: list[Tensor], total: int) -> tuple[Tensor, ...]:
    """What `into` replaces: every part by itself, then joined and reordered."""
    outs = [qk_norm_rope(*part, **GEOMETRY) for part in inputs]
    order = torch.cat(places)
    keys, values = (
        torch.zeros(total, KV_HEADS, DIM, dtype=outs[0][0].dtype, device=order.device).index_copy(
            0, order, torch.cat([out[i] for out in outs])
        )
        for i in (1, 2)
    )
    return torch.cat([out[0] for out in outs]), keys, values


@given(st.integers(0, 20), st.integers(0, 20))
def test_two_parts_into_one_buffer_have_the_gradients_of_their_concatenation(
    device: str, first: int, second: int
) -> None:
    total = first + second + 1
    parts = [make_inputs(first, seed=0, device=device), make_inputs(second, seed=50, device=device)]
    order = make_destinations(total, total, device=device)
    places = [order[:first], order[first : first + second]]
    d_outs = [
        make_normal(rows, heads, DIM, seed=40 + i, device=device)
        for i, (rows, heads) in enumerate(((total - 1, HEADS), (total, KV_HEADS), (total, KV_HEADS)))
    ]
    results = []
    for fused in (False, True):
        leaves = [[t.clone().requires_grad_(i < 3) for i, t in enumerate(part)] for part in parts]
        if fused:
            keys, values = (torch.zeros(total, KV_HEADS, DIM, device=device) for _ in range(2))
            with pytest.MonkeyPatch.context() as patch:
                fuse(patch)
                queries = []
                for leaf, place in zip(leaves, places, strict=True):
                    query, keys, values = qk_norm_rope(*leaf, **GEOMETRY, into=(keys, values, place))
                    queries.append(query)
                outs = (torch.cat(queries), keys, values)
                gradients = torch.autograd.grad(outs, [t for leaf in leaves for t in leaf[:3]], d_outs)
        else:
            outs = concatenated(leaves, places, total)
            gradients = torch.autograd.grad(outs, [t for leaf in leaves for t in leaf[:3]], d_outs)
        results.append((*outs, *gradients))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_what_was_in_the_buffer_keeps_its_gradient_except_where_it_was_overwritten(impl: str) -> None:
    inputs = [t.double() if i < 3 else t for i, t in enumerate(make_inputs(3))]
    places = torch.tensor([4, 0, 2])
    leaves = [t.requires_grad_() for t in (inputs[0], *make_buffers(5, dtype=torch.float64))]

    def function(qkv: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, ...]:
        into = (1 * keys, 1 * values, places)  # a leaf cannot be written
        return qk_norm_rope(qkv, *inputs[1:], **GEOMETRY, into=into, impl=impl)

    assert torch.autograd.gradcheck(function, tuple(leaves))
    _, keys, _ = function(*leaves)
    (d_before,) = torch.autograd.grad(keys.sum(), leaves[1])
    assert torch.equal(d_before[:, 0, 0], torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0], dtype=torch.float64))


@pytest.mark.parametrize("fused", [False, True])
def test_a_row_whose_place_is_outside_is_written_nowhere_and_sends_no_gradient(
    device: str, monkeypatch: pytest.MonkeyPatch, fused: bool
) -> None:
    if fused:
        fuse(monkeypatch)
    inputs, buffers = make_inputs(4, device=device), make_buffers(3, device=device)
    keys, values = (buffer.clone() for buffer in buffers)
    places = torch.tensor([-1, 1, 3, -(1 << 40)], device=device)
    qkv = inputs[0].clone().requires_grad_()
    query, keys, values = qk_norm_rope(qkv, *inputs[1:], **GEOMETRY, into=(keys, values, places))
    assert query.isfinite().all()
    for after, before in ((keys, buffers[0]), (values, buffers[1])):
        assert torch.equal(after[[0, 2]], before[[0, 2]])
    (d_qkv,) = torch.autograd.grad((keys.sum(), values.sum()), qkv)
    written = d_qkv[:, HEADS * DIM :].abs().sum(dim=1) > 0
    assert written.tolist() == [False, True, False, False]


def test_a_buffer_that_autograd_had_saved_is_reported_as_overwritten(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for fused in (False, True):
        if fused:
            fuse(monkeypatch)
        inputs, buffers = make_inputs(3, device=device), make_buffers(3, device=device)
        scale = torch.ones((), device=device, requires_grad=True)
        product = scale * buffers[0]
        with torch.no_grad():
            qk_norm_rope(*inputs, **GEOMETRY, into=(*buffers, make_destinations(3, 3, device=device)))
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.sum().backward()


def test_the_operator_keeps_the_contracts_of_the_dispatcher() -> None:
    qkv, *others = make_inputs(3)
    into = (*make_buffers(5), make_destinations(3, 5))
    arguments = (qkv, *into, *others, HEADS, KV_HEADS, 1e-6)
    torch.library.opcheck(torch.ops.reca.qk_norm_rope_into.default, arguments)
    d_outs = (make_normal(3, HEADS, DIM, seed=9), *make_buffers(5))
    backward = (*d_outs, qkv, *others, HEADS, KV_HEADS, 1e-6, True, True, None, None, None, into[2])
    torch.library.opcheck(torch.ops.reca.qk_norm_rope_backward.default, backward)


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_a_layer_of_two_experts_compiles_to_one_graph(impl: str) -> None:
    frozen, trained = make_inputs(4, seed=0), make_inputs(3, seed=50)
    order = make_destinations(7, 7)

    def layer(*leaves: Tensor) -> Tensor:
        options: dict[str, Any] = {**GEOMETRY, "impl": impl}
        keys, values = (leaves[0].new_empty(7, KV_HEADS, DIM) for _ in range(2))
        with torch.no_grad():
            first, keys, values = qk_norm_rope(*frozen, **options, into=(keys, values, order[:4]))
        query, keys, values = qk_norm_rope(*leaves, *trained[3:], **options, into=(keys, values, order[4:]))
        return (keys * values).square().sum() + query.square().sum() * first.sum()

    results = []
    for function in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        leaves = [t.clone().requires_grad_() for t in trained[:3]]
        results.append(torch.autograd.grad(function(*leaves), leaves))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


KEYS, PLACES = torch.zeros(5, KV_HEADS, DIM), torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("into", "error", "message"),
    [
        ((KEYS, KEYS, PLACES[:2]), ValueError, r"destinations must be \[3\], got \[2\]; one place per row"),
        ((KEYS, KEYS, PLACES.int()), TypeError, r"destinations must be one of int64, got int32"),
        (
            (KEYS[..., 1:], KEYS, PLACES),
            ValueError,
            r"keys must be \[5, 2, 6\], got \[5, 2, 5\]; \[places, kv",
        ),
        ((KEYS, KEYS[:4], PLACES), ValueError, r"values must be \[5, 2, 6\], got \[4, 2, 6\]"),
        (
            (KEYS, torch.zeros(2, 5, DIM).transpose(0, 1), PLACES),
            ValueError,
            r"values must be contiguous, got strides \[6, 30, 1\]; it is written in place",
        ),
        ((KEYS.half(), KEYS, PLACES), TypeError, r"keys must be float32 like qkv, got float16"),
        ((KEYS, KEYS.to("meta"), PLACES), ValueError, r"values must be on cpu like qkv, got meta"),
    ],
)
def test_bad_buffers_are_refused_with_a_cure(
    into: tuple[Tensor, Tensor, Tensor], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^qk_norm_rope: {message}"):
        qk_norm_rope(*make_inputs(3), **GEOMETRY, into=into)


@pytest.mark.gpu
def test_on_a_gpu_a_captured_graph_replays_on_new_places() -> None:
    qkv, *others = make_inputs(129, device="cuda")
    qkv.requires_grad_()
    buffers = make_buffers(200, device="cuda")
    places = make_destinations(129, 200, device="cuda")
    d_outs = (make_normal(129, HEADS, DIM, seed=9, device="cuda"), *make_buffers(200, device="cuda"))

    def step() -> tuple[Tensor, ...]:
        keys, values = (buffer.clone() for buffer in buffers)
        outs = qk_norm_rope(qkv, *others, **GEOMETRY, into=(keys, values, places))
        return *outs, *torch.autograd.grad(outs, [qkv], d_outs)

    step()  # warm-up compiles outside of the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    places.copy_(places.flip(0))
    graph.replay()
    for got, want in zip(captured, step(), strict=True):
        assert torch.equal(got, want)
