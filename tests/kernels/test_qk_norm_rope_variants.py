"""qk_norm_rope: LayerNorm instead of RMSNorm, weights per expert, rounded quotients, and one side alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from reca.kernels import qk_norm_rope
from reca.kernels.qk_norm_rope import kernel, op, reference
from reca.kernels.testing import assert_within_budget, make_normal

EPS = 1e-5
NAMES = ("d_qkv", "d_query_weight", "d_key_weight", "d_query_bias", "d_key_bias")


class Case:
    """`trained` are qkv, two weights and (for a LayerNorm) two biases; `fixed` are cos, sin and experts."""

    def __init__(
        self,
        rows: int,
        heads: int,
        kv_heads: int,
        dim: int,
        pairs: int,
        *,
        num_experts: int = 0,
        is_layer_norm: bool = False,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
    ) -> None:
        self.heads, self.kv_heads = heads, kv_heads
        made: dict[str, Any] = {"dtype": dtype, "device": device}
        shape = (num_experts, dim) if num_experts else (dim,)
        qkv = make_normal(rows, (heads + 2 * kv_heads) * dim, seed=0, **made)
        weights = [1 + make_normal(*shape, seed=seed, **made) / 4 for seed in (1, 2)]
        biases = [make_normal(*shape, seed=seed, **made) / 4 for seed in (3, 4)] if is_layer_norm else []
        self.trained = [qkv, *weights, *biases]
        angle = make_normal(rows, pairs, seed=5, device=device)
        self.cos, self.sin = (angle.cos(), angle.sin()) if pairs else (None, None)
        generator = torch.Generator().manual_seed(6)
        chosen = torch.randint(max(num_experts, 1), (rows,), generator=generator, dtype=torch.int32)
        self.experts = chosen.to(device) if num_experts else None
        shapes = ((rows, heads, dim), (rows, kv_heads, dim), (rows, kv_heads, dim))
        self.d_outs = [make_normal(*shape, seed=7 + i, **made) for i, shape in enumerate(shapes)]

    def inputs(self, *between: Any) -> tuple[Any, ...]:
        """The arguments of the kernels; the backward's switches go between the two halves."""
        qkv, *parameters = self.trained
        biases = parameters[2:] or [None, None]
        geometry = (self.cos, self.sin, self.heads, self.kv_heads, EPS)
        return qkv, *parameters[:2], *geometry, *between, *biases, self.experts

    def plain(self, dtype: torch.dtype | None = None) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """(outputs, gradients) of what models write, at the dtype of the inputs or another."""
        leaves = [t.to(dtype or t.dtype).clone().requires_grad_() for t in self.trained]
        outs = self._plain(*leaves)
        d_outs = [d.to(dtype or d.dtype) for d in self.d_outs]
        gradients = torch.autograd.grad(outs, leaves, d_outs)
        return tuple(out.detach() for out in outs), gradients

    def _plain(self, qkv: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        counts = [self.heads, self.kv_heads, self.kv_heads]
        dim = qkv.shape[1] // sum(counts)
        query, key, value = qkv.view(-1, sum(counts), dim).split(counts, dim=1)
        outs = []
        for i, part in enumerate((query, key)):
            weight, bias = parameters[i], parameters[2 + i] if len(parameters) > 2 else None
            if self.experts is not None:
                weight = weight[self.experts.long()][:, None]
                bias = None if bias is None else bias[self.experts.long()][:, None]
            if bias is None:
                wide = part.to(torch.promote_types(part.dtype, torch.float32))
                hat = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)).to(part.dtype)
                normed = hat * weight
            else:
                normed = F.layer_norm(part, (dim,), eps=EPS) * weight + bias
            outs.append(self._rotate(normed))
        return outs[0], outs[1], value

    def _rotate(self, x: Tensor) -> Tensor:
        if self.cos is None or self.sin is None:
            return x
        r = self.cos.shape[1]
        cos, sin = self.cos.to(x.dtype)[:, None], self.sin.to(x.dtype)[:, None]
        a, b = x[..., :r], x[..., r : 2 * r]
        return torch.cat([a * cos - b * sin, b * cos + a * sin, x[..., 2 * r :]], dim=-1)


def check_kernels(case: Case) -> None:
    honest, exact = case.plain(), case.plain(torch.float64)
    outs = kernel.forward(*case.inputs())
    for name, *tensors in zip(("query", "key", "value"), outs, honest[0], exact[0], strict=True):
        assert_within_budget(name, *tensors)
    gradients = kernel.backward(*case.d_outs, *case.inputs(True, True))
    for name, *tensors in zip(NAMES, gradients, honest[1], exact[1], strict=False):
        assert_within_budget(name, *tensors)


GEOMETRIES = [(4, 2, 6, 2), (3, 1, 8, 4), (2, 2, 10, 3), (5, 1, 72, 20), (2, 1, 7, 3), (2, 1, 5, 0)]
VARIANTS = [(0, True), (2, False), (3, True)]


@pytest.mark.parametrize(("num_experts", "is_layer_norm"), VARIANTS)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_the_reference_and_its_backward_are_those_of_the_plain_formulation(
    geometry: tuple[int, int, int, int], num_experts: int, is_layer_norm: bool
) -> None:
    case = Case(5, *geometry, num_experts=num_experts, is_layer_norm=is_layer_norm, dtype=torch.float64)
    outs, gradients = case.plain()
    for got, want in zip(reference.forward(*case.inputs()), outs, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
    for got, want in zip(reference.backward(*case.d_outs, *case.inputs()), gradients, strict=False):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@given(st.integers(0, 40), st.sampled_from(GEOMETRIES), st.sampled_from(VARIANTS))
def test_the_kernels_stay_within_the_error_budget(
    device: str, rows: int, geometry: tuple[int, int, int, int], variant: tuple[int, bool]
) -> None:
    check_kernels(Case(rows, *geometry, num_experts=variant[0], is_layer_norm=variant[1], device=device))


@pytest.mark.parametrize("geometry", [(0, 2, 8, 2), (3, 0, 8, 4)])
@pytest.mark.parametrize("is_layer_norm", [False, True])
def test_queries_or_keys_alone_are_served(
    device: str, geometry: tuple[int, int, int, int], is_layer_norm: bool
) -> None:
    case = Case(5, *geometry, is_layer_norm=is_layer_norm, device=device)
    for forward in (kernel.forward, reference.forward):
        outs = forward(*case.inputs())
        assert [out.shape[1] for out in outs] == [case.heads, case.kv_heads, case.kv_heads]
    check_kernels(case)


def test_a_quotient_is_rounded_before_the_weight_multiplies_it(device: str) -> None:
    case = Case(64, 2, 1, 16, 0, dtype=torch.bfloat16, device=device)
    qkv, weight = case.trained[:2]
    wide = qkv.view(64, 4, 16)[:, :2].float()
    quotient = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)).bfloat16()
    # In fp32, so that nothing but the quotient is rounded: then two roundings are told from one.
    wanted = (quotient.float() * weight.float()).bfloat16()
    assert not torch.equal(reference.forward(*case.inputs())[0], wanted)
    assert torch.equal(reference.forward(*case.inputs(), True)[0], wanted)
    # One unit in the last place: the interpreter truncates where the GPU rounds.
    got = kernel.forward(*case.inputs(), True)[0]
    torch.testing.assert_close(got.float(), wanted.float(), rtol=2**-6, atol=1e-6)


@pytest.mark.parametrize("path", ["kernel", "reference"])
def test_a_row_that_names_no_expert_is_nan_and_spoils_nothing_else(device: str, path: str) -> None:
    case = Case(6, 2, 1, 6, 2, num_experts=2, is_layer_norm=True, device=device)
    stray = torch.tensor([True, False, False, True, False, False], device=device)
    case.experts = torch.where(stray, torch.tensor([-1, 0, 0, 2, 0, 0], device=device), case.experts).int()
    forward, backward = (
        (kernel.forward, kernel.backward) if path == "kernel" else (reference.forward, op._backward_cpu)
    )
    query, key, value = forward(*case.inputs())
    d_qkv, *d_parameters = backward(*case.d_outs, *case.inputs(True, True))
    for rows in (query.flatten(1), key.flatten(1), d_qkv[:, :18]):
        assert torch.equal(rows.isnan(), stray[:, None].expand_as(rows))
    assert torch.equal(value.flatten(1), case.trained[0][:, 18:])
    assert torch.equal(d_qkv[:, 18:], case.d_outs[2].flatten(1))
    kept = case
    kept.trained[0], kept.experts = case.trained[0][~stray], case.experts[~stray]
    kept.cos, kept.sin = case.cos[~stray], case.sin[~stray]
    kept.d_outs = [d[~stray] for d in case.d_outs]
    for got, want in zip(d_parameters, kept.plain()[1][1:], strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("needed", [*(1 << i for i in range(5)), 0b10010, 0b01101, 0b11111])
def test_every_subset_of_required_gradients_is_served(
    device: str, monkeypatch: pytest.MonkeyPatch, needed: int, fused: bool
) -> None:
    if fused:
        monkeypatch.setattr(op, "_forward", op._cuda)
        monkeypatch.setattr(op, "_backward", op._backward_cuda)
    case = Case(4, 2, 1, 6, 2, num_experts=2, is_layer_norm=True, device=device)
    leaves = [t.clone().requires_grad_(bool(needed >> i & 1)) for i, t in enumerate(case.trained)]
    outs = qk_norm_rope(
        *leaves[:3],
        case.cos,
        case.sin,
        heads=2,
        kv_heads=1,
        eps=EPS,
        query_bias=leaves[3],
        key_bias=leaves[4],
        experts=case.experts,
    )
    torch.autograd.backward(outs, case.d_outs)
    for i, (leaf, exact) in enumerate(zip(leaves, case.plain(torch.float64)[1], strict=True)):
        assert (leaf.grad is not None) == bool(needed >> i & 1)
        if leaf.grad is not None:
            torch.testing.assert_close(leaf.grad.double(), exact, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(("num_experts", "is_layer_norm"), VARIANTS)
def test_the_operators_keep_the_contracts_of_the_dispatcher(num_experts: int, is_layer_norm: bool) -> None:
    case = Case(3, 2, 1, 6, 2, num_experts=num_experts, is_layer_norm=is_layer_norm, dtype=torch.bfloat16)
    torch.library.opcheck(torch.ops.reca.qk_norm_rope.default, (*case.inputs(), True))
    arguments = (*case.d_outs, *case.inputs(True, True))
    torch.library.opcheck(torch.ops.reca.qk_norm_rope_backward.default, arguments)


QKV, W, E = torch.zeros(3, 16), torch.ones(4), torch.zeros(3, dtype=torch.int32)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"query_bias": W},
            ValueError,
            r"query_bias and key_bias go together, got only query_bias; pass both",
        ),
        (
            {"query_weight": None, "key_weight": None, "query_bias": W, "key_bias": W},
            ValueError,
            r"biases and experts need query_weight and key_weight; pass them too",
        ),
        (
            {"query_bias": W, "key_bias": W[:3]},
            ValueError,
            r"key_bias must be \[4\], got \[3\]; one value per",
        ),
        ({"query_bias": W, "key_bias": W.int()}, TypeError, r"key_bias must be one of bfloat16.*got int32"),
        (
            {"experts": E},
            ValueError,
            r"query_weight must be \[1 or more experts, 4\] beside experts, got \[4\]",
        ),
        ({"experts": E[:2]}, ValueError, r"experts must be \[3\], got \[2\]; one expert per row"),
        (
            {"experts": E, "query_weight": W.expand(2, 4), "key_weight": W.expand(3, 4)},
            ValueError,
            r"weights and biases must be of equally many experts, got \{'query_weight': 2, 'key_weight': 3\}",
        ),
    ],
)
def test_bad_input_is_refused_with_a_cure(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    inputs = {"query_weight": W, "key_weight": W, "cos": None, "sin": None} | changes
    with pytest.raises(error, match=f"^qk_norm_rope: {message}"):
        qk_norm_rope(QKV, heads=2, kv_heads=1, eps=EPS, **inputs)


@pytest.mark.gpu
@pytest.mark.parametrize(("geometry", "num_experts"), [((28, 4, 128, 64), 2), ((32, 32, 64, 16), 0)])
def test_on_a_gpu_bf16_stays_within_the_error_budget_and_is_reproducible(
    geometry: tuple[int, int, int, int], num_experts: int
) -> None:
    options: dict[str, Any] = {"num_experts": num_experts, "is_layer_norm": num_experts == 0}
    case = Case(517, *geometry, dtype=torch.bfloat16, device="cuda", **options)
    check_kernels(case)
    first, again = (kernel.backward(*case.d_outs, *case.inputs(True, True)) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))
