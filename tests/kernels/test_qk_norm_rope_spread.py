"""qk_norm_rope_spread: keys and values at all the places where two attention calls want them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from reca.kernels import qk_norm_rope, qk_norm_rope_spread
from reca.kernels.qk_norm_rope import spread
from reca.kernels.testing import assert_within_budget, make_normal

DIM, PAIRS, EPS = 6, 2, 1e-6


def make_inputs(
    rows: int, heads: int, kv_heads: int, *, biases: bool = True, device: str = "cpu", **made: Any
) -> tuple[Tensor | None, ...]:
    """qkv, two weights, two biases, cos and sin."""
    qkv = make_normal(rows, (heads + 2 * kv_heads) * DIM, seed=0, device=device, **made)
    weights = [1 + make_normal(DIM, seed=seed, device=device) / 4 for seed in (1, 2)]
    added = [make_normal(DIM, seed=seed, device=device) if biases else None for seed in (3, 4)]
    angle = make_normal(rows, PAIRS, seed=5, device=device)
    return qkv, *weights, *added, angle.cos(), angle.sin()


def make_places(rows: int, copies: int, seed: int, device: str = "cpu") -> tuple[Tensor, int]:
    """(destinations [rows, copies], how many places): a random subset of them, in random order."""
    generator = torch.Generator().manual_seed(seed)
    wanted = torch.rand(rows, copies, generator=generator) < 0.7
    places = int(wanted.sum())
    destinations = torch.full((rows, copies), -1)
    destinations[wanted] = torch.randperm(places, generator=generator)
    return destinations.to(device), places


def call(inputs: tuple[Any, ...], destinations: Tensor, **options: Any) -> list[Tensor]:
    """All outputs: queries, keys, values."""
    qkv, query_weight, key_weight, query_bias, key_bias, cos, sin = inputs
    biases = {"query_bias": query_bias, "key_bias": key_bias}
    arguments = (qkv, query_weight, key_weight, cos, sin, destinations)
    calls = qk_norm_rope_spread(*arguments, eps=EPS, **biases, **options)
    return [part for kind in zip(*calls, strict=True) for part in kind]


def gathered(inputs: tuple[Any, ...], destinations: Tensor, **options: Any) -> list[Tensor]:
    """What it replaces: norm and rotation, then rows picked for each call."""
    qkv, query_weight, key_weight, query_bias, key_bias, cos, sin = inputs
    query_rows, key_rows = options.pop("query_rows"), options.pop("key_rows")
    biases = {"query_bias": query_bias, "key_bias": key_bias}
    query, *stored = qk_norm_rope(
        qkv, query_weight, key_weight, cos, sin, eps=EPS, **biases, **(options | {"impl": "reference"})
    )
    sources = [int((destinations == place).nonzero()[0, 0]) for place in range(sum(key_rows))]
    outs = [*query.split(query_rows)]
    for rows in stored:
        outs += rows[sources].split(key_rows)
    return outs


def results(function: Any, inputs: tuple[Any, ...], destinations: Tensor, **options: Any) -> list[Tensor]:
    """Outputs and the gradients of qkv, weights and biases."""
    leaves = tuple(t if t is None else t.clone().requires_grad_(i < 5) for i, t in enumerate(inputs))
    outs = function(leaves, destinations, **options)
    d_outs = [make_normal(*out.shape, seed=7 + i, device=out.device) for i, out in enumerate(outs)]
    trained = [leaf for leaf in leaves[:5] if leaf is not None]
    pairs = [(out, d.to(out.dtype)) for out, d in zip(outs, d_outs, strict=True) if out.requires_grad]
    used, d_used = zip(*pairs, strict=True)
    found = torch.autograd.grad(used, trained, d_used, allow_unused=True)
    outs = [out.detach() for out in outs]
    return [*outs, *(torch.zeros_like(t) if d is None else d for t, d in zip(trained, found, strict=True))]


def fuse(patch: pytest.MonkeyPatch) -> None:
    """Let the public function run the Triton code."""
    patch.setattr(spread, "_forward", spread._cuda)
    patch.setattr(spread, "_backward", spread._backward_cuda)


@given(
    st.integers(1, 40),
    st.integers(1, 3),
    st.sampled_from([(2, 1), (3, 3), (0, 2)]),
    st.booleans(),
    st.integers(0, 99),
)
def test_every_call_gets_what_it_sees_and_gradients_of_copies_add_up(
    device: str, rows: int, copies: int, heads: tuple[int, int], biases: bool, seed: int
) -> None:
    inputs = make_inputs(rows, *heads, biases=biases, device=device)
    destinations, places = make_places(rows, copies, seed, device)
    first, seen = seed % (rows + 1), seed % (places + 1)
    options: dict[str, Any] = {"heads": heads[0], "kv_heads": heads[1]}
    options |= {"query_rows": [first, rows - first], "key_rows": [seen, places - seen]}
    wide = tuple(t if t is None else t.double() for t in inputs[:5]) + inputs[5:]
    exact = results(gathered, wide, destinations, **options)
    plain = results(gathered, inputs, destinations, **options)
    for fused in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            if fused:
                fuse(patch)
            got = results(call, inputs, destinations, **options)
        for index, tensors in enumerate(zip(got, plain, exact, strict=True)):
            assert tensors[0].is_contiguous()
            assert_within_budget(f"output or gradient {index}, fused={fused}", *tensors)


def test_the_sum_over_copies_is_rounded_once(device: str) -> None:
    rows, copies = 5, 3
    inputs = make_inputs(rows, 1, 1, device=device, dtype=torch.bfloat16)
    destinations = torch.arange(rows * copies, device=device).view(rows, copies)
    geometry: dict[str, Any] = {"heads": 1, "kv_heads": 1, "query_rows": [rows], "key_rows": [15]}
    with pytest.MonkeyPatch.context() as patch:
        for fused in (False, True):
            if fused:
                fuse(patch)
            qkv = inputs[0].clone().requires_grad_()
            *_, value = call((qkv, *inputs[1:]), destinations, **geometry)
            terms = torch.tensor([256.0, 1.0, 1.0], device=device).bfloat16().repeat(rows)
            (d_qkv,) = torch.autograd.grad(value, qkv, terms[:, None, None].expand_as(value))
            # 257 is no bf16 number: summed in bf16 the ones would be lost.
            assert torch.equal(d_qkv[:, -DIM:], torch.full_like(d_qkv[:, -DIM:], 258.0))


@pytest.mark.parametrize("needed", [1, 2, 4, 8, 16, 30])
@pytest.mark.parametrize("fused", [False, True])
def test_a_gradient_is_formed_for_what_requires_one(
    device: str, monkeypatch: pytest.MonkeyPatch, needed: int, fused: bool
) -> None:
    if fused:
        fuse(monkeypatch)
    inputs = make_inputs(4, 2, 1, device=device)
    destinations, places = make_places(4, 2, 0, device)
    options: dict[str, Any] = {"heads": 2, "kv_heads": 1, "query_rows": [3, 1], "key_rows": [2, places - 2]}
    whole = results(call, inputs, destinations, **options)[6:]
    leaves = [t.clone().requires_grad_(bool(needed >> i & 1)) for i, t in enumerate(inputs)]
    outs = call(tuple(leaves), destinations, **options)
    d_outs = [make_normal(*out.shape, seed=7 + i, device=device) for i, out in enumerate(outs)]
    pairs = [(out, d) for out, d in zip(outs, d_outs, strict=True) if out.requires_grad]
    torch.autograd.backward(*map(list, zip(*pairs, strict=True)))
    for i, (leaf, want) in enumerate(zip(leaves, whole, strict=False)):
        assert (leaf.grad is not None) == bool(needed >> i & 1)
        if leaf.grad is not None:
            torch.testing.assert_close(leaf.grad, want, rtol=2e-5, atol=2e-5)


def test_the_operator_keeps_the_contracts_of_the_dispatcher() -> None:
    qkv, query_weight, key_weight, query_bias, key_bias, cos, sin = make_inputs(4, 2, 1)
    destinations, places = make_places(4, 2, 0)
    shared = (query_weight, key_weight, cos, sin, 2, 1, EPS)
    biases = (query_bias, key_bias)
    arguments = (qkv, destinations, places, *shared, *biases, None, False)
    torch.library.opcheck(torch.ops.reca.qk_norm_rope_spread.default, arguments)
    d_outs = ([make_normal(4, 2, DIM, seed=8)], *[[make_normal(places, 1, DIM, seed=9 + i)] for i in (0, 1)])
    for given_biases in (biases, (None, None)):
        backward = (*d_outs, qkv, destinations, *shared, True, True, *given_biases)
        torch.library.opcheck(torch.ops.reca.qk_norm_rope_spread_backward.default, backward)


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_the_public_function_compiles_to_one_graph(impl: str) -> None:
    inputs = make_inputs(4, 2, 1)
    destinations, places = make_places(4, 2, 0)

    def loss(*leaves: Tensor) -> Tensor:
        options: dict[str, Any] = {"query_rows": [3, 1], "key_rows": [2, places - 2], "impl": impl}
        outs = call((*leaves, *inputs[5:]), destinations, heads=2, kv_heads=1, **options)
        return torch.stack([out.square().sum() for out in outs]).sum()

    found = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = [t.clone().requires_grad_() for t in inputs[:5]]
        found.append(torch.autograd.grad(function(*leaves), leaves))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


PLACES = torch.zeros(3, 1, dtype=torch.int64)


@pytest.mark.parametrize(
    ("destinations", "query_rows", "key_rows", "error", "message"),
    [
        (PLACES[:, 0], [3], [1], ValueError, r"destinations must be \[3, copies > 0\], got \[3\]; one line"),
        (PLACES[:2], [3], [1], ValueError, r"destinations must be \[3, copies > 0\], got \[2, 1\]"),
        (PLACES[:, :0], [3], [1], ValueError, r"destinations must be \[3, copies > 0\], got \[3, 0\]"),
        (PLACES.int(), [3], [1], TypeError, r"destinations must be one of int64, got int32"),
        (PLACES.to("meta"), [3], [1], ValueError, r"destinations must be on cpu like qkv, got meta"),
        (PLACES, [1, 1, 1], [1, 1, 1], ValueError, r"query_rows and key_rows must be of 1 or 2 calls, got"),
        (PLACES, [3], [1, 2], ValueError, r"query_rows and key_rows must be of 1 or 2 calls, got \[3\] and"),
        (PLACES, [4, -1], [1, 2], ValueError, r"query_rows and key_rows must be of 1 or 2 calls, got \[4"),
        (PLACES, [1, 1], [1, 2], ValueError, r"query_rows must sum to 3, got \[1, 1\]; every row is a query"),
    ],
)
def test_what_does_not_fit_is_refused_with_a_cure(
    destinations: Tensor, query_rows: list[int], key_rows: list[int], error: type[Exception], message: str
) -> None:
    rows = {"query_rows": query_rows, "key_rows": key_rows}
    with pytest.raises(error, match=f"^qk_norm_rope_spread: {message}"):
        call(make_inputs(3, 2, 1), destinations, heads=2, kv_heads=1, **rows)


@pytest.mark.gpu
def test_on_a_gpu_the_kernel_agrees_with_the_reference_at_full_size() -> None:
    inputs = make_inputs(3300, 32, 32, device="cuda", dtype=torch.bfloat16)
    destinations, places = make_places(3300, 3, 0, "cuda")
    options: dict[str, Any] = {"query_rows": [3000, 300], "key_rows": [places - 900, 900]}
    options |= {"heads": 32, "kv_heads": 32}
    wide = tuple(t.double() for t in inputs[:5]) + inputs[5:]
    exact = results(call, wide, destinations, impl="reference", **options)
    plain = results(call, inputs, destinations, impl="reference", **options)
    for index, tensors in enumerate(
        zip(results(call, inputs, destinations, **options), plain, exact, strict=True)
    ):
        assert_within_budget(f"output or gradient {index}", *tensors)
