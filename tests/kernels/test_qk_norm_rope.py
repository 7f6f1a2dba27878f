"""qk_norm_rope: fused qkv rows to attention layout, with per-head norm and rotation, and every gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from reca.kernels import qk_norm_rope
from reca.kernels.qk_norm_rope import kernel, op, reference
from reca.kernels.testing import assert_within_budget, make_normal, misaligned

EPS = 1e-6


class Case:
    """Inputs of one call: `tensors` are qkv, the two weights, cos and sin (None where absent)."""

    def __init__(
        self,
        rows: int,
        heads: int,
        kv_heads: int,
        dim: int,
        pairs: int,
        *,
        norm: bool = True,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
    ) -> None:
        self.geometry = (heads, kv_heads, EPS)
        made: dict[str, Any] = {"dtype": dtype, "device": device}
        qkv = make_normal(rows, (heads + 2 * kv_heads) * dim, seed=0, **made)
        weights = [1 + make_normal(dim, seed=seed, **made) / 4 if norm else None for seed in (1, 2)]
        angle = make_normal(rows, pairs, seed=3, device=device)
        self.tensors = (qkv, *weights, *((angle.cos(), angle.sin()) if pairs else (None, None)))
        shapes = ((rows, heads, dim), (rows, kv_heads, dim), (rows, kv_heads, dim))
        self.d_outs = tuple(make_normal(*shape, seed=5 + i, **made) for i, shape in enumerate(shapes))

    def double(self) -> Case:
        """The same values in fp64 (the angles stay what they are)."""
        twin = object.__new__(Case)
        twin.geometry = self.geometry
        twin.tensors = tuple(t if t is None else t.double() for t in self.tensors)
        twin.d_outs = tuple(t.double() for t in self.d_outs)
        return twin

    def plain(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """(outputs, gradients of qkv and the weights) as autograd gives them for the plain formulation."""
        leaves = [t if t is None else t.clone().requires_grad_(i < 3) for i, t in enumerate(self.tensors)]
        outs = plain(*leaves, *self.geometry)
        trained = [leaf for leaf in leaves[:3] if leaf is not None]
        return tuple(out.detach() for out in outs), torch.autograd.grad(outs, trained, self.d_outs)


def plain(
    qkv: Tensor,
    query_weight: Tensor | None,
    key_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    heads: int,
    kv_heads: int,
    eps: float,
) -> tuple[Tensor, ...]:
    """As models write it: slice, norm with fp32 statistics, rotation at the dtype of the rows."""
    outs = []
    parts = qkv.unflatten(1, (heads + 2 * kv_heads, -1)).split([heads, kv_heads, kv_heads], dim=1)
    for part, weight in zip(parts[:2], (query_weight, key_weight), strict=True):
        x = part
        if weight is not None:
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            x = weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
        if cos is not None and sin is not None:
            r = cos.shape[1]
            c, s = cos.to(x.dtype)[:, None], sin.to(x.dtype)[:, None]
            a, b = x[..., :r], x[..., r : 2 * r]
            x = torch.cat([a * c - b * s, b * c + a * s, x[..., 2 * r :]], dim=-1)
        outs.append(x)
    return outs[0], outs[1], parts[2]


def check_against_plain(case: Case, outs: tuple[Tensor, ...], gradients: tuple[Tensor, ...]) -> None:
    honest, exact = case.plain(), case.double().plain()
    for name, *tensors in zip(("query", "key", "value"), outs, honest[0], exact[0], strict=True):
        assert_within_budget(name, *tensors)
    names = ("d_qkv", "d_query_weight", "d_key_weight")[: len(honest[1])]
    for name, *tensors in zip(names, gradients[: len(names)], honest[1], exact[1], strict=True):
        assert_within_budget(name, *tensors)


GEOMETRIES = [
    (1, 1, 4, 2),
    (4, 2, 6, 2),
    (3, 1, 8, 4),
    (2, 2, 10, 3),
    (5, 1, 72, 36),
    (2, 1, 7, 3),
    (2, 1, 5, 0),
]


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "pairs"), GEOMETRIES)
def test_the_reference_and_its_backward_are_those_of_the_plain_formulation(
    heads: int, kv_heads: int, dim: int, pairs: int, norm: bool
) -> None:
    case = Case(3, heads, kv_heads, dim, pairs, norm=norm).double()
    outs, gradients = case.plain()
    for got, want in zip(reference.forward(*case.tensors, *case.geometry), outs, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    got_gradients = reference.backward(*case.d_outs, *case.tensors, *case.geometry)
    for got, want in zip(got_gradients, gradients, strict=False):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
    assert norm or got_gradients[1:] == (None,) * 4


def test_the_public_function_passes_gradcheck() -> None:
    qkv, query_weight, key_weight, cos, sin = Case(2, 2, 1, 4, 1).double().tensors
    angles = (cos.float(), sin.float())
    leaves = tuple(t.requires_grad_() for t in (qkv, query_weight, key_weight))
    assert torch.autograd.gradcheck(
        lambda *t: qk_norm_rope(*t, *angles, heads=2, kv_heads=1, eps=0.1), leaves
    )


@given(st.integers(0, 40), st.sampled_from(GEOMETRIES), st.booleans(), st.booleans())
def test_the_kernels_stay_within_the_error_budget(
    device: str, rows: int, geometry: tuple[int, int, int, int], norm: bool, shifted: bool
) -> None:
    case = Case(rows, *geometry, norm=norm, device=device)
    qkv, *others = case.tensors
    given_ = (misaligned(qkv) if shifted else qkv, *others, *case.geometry)
    outs = kernel.forward(*given_)
    assert all(out.is_contiguous() for out in outs)
    d_outs = tuple(misaligned(t) for t in case.d_outs) if shifted else case.d_outs
    check_against_plain(case, outs, kernel.backward(*d_outs, *given_, True, norm))


def test_bf16_is_storage_and_the_arithmetic_is_fp32(device: str) -> None:
    case = Case(9, 2, 1, 16, 6, dtype=torch.bfloat16, device=device)
    # One unit in the last place: the interpreter truncates where the GPU rounds.
    for got, want in zip(
        kernel.forward(*case.tensors, *case.geometry), case.double().plain()[0], strict=True
    ):
        torch.testing.assert_close(got.double(), want, rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("backward", [kernel.backward, op._backward_cpu], ids=["kernel", "reference"])
@pytest.mark.parametrize(("with_dqkv", "with_dweight"), [(True, False), (False, True)])
def test_a_gradient_that_is_not_needed_is_not_formed(
    device: str, backward: Any, with_dqkv: bool, with_dweight: bool
) -> None:
    case = Case(5, 2, 1, 6, 3, device=device)
    inputs = (*case.d_outs, *case.tensors, *case.geometry)
    full, got = backward(*inputs, True, True), backward(*inputs, with_dqkv, with_dweight)
    expected = (with_dqkv, with_dweight, with_dweight, False, False)
    for tensor, whole, wanted in zip(got, full, expected, strict=True):
        assert torch.equal(tensor, whole) if wanted else tensor.numel() == 0


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("needed", range(1, 8))
def test_every_subset_of_required_gradients_is_served(
    device: str, monkeypatch: pytest.MonkeyPatch, needed: int, fused: bool
) -> None:
    if fused:
        monkeypatch.setattr(op, "_forward", op._cuda)
        monkeypatch.setattr(op, "_backward", op._backward_cuda)
    case = Case(4, 2, 1, 6, 2, device=device)
    leaves = [t.clone().requires_grad_(bool(needed >> i & 1)) for i, t in enumerate(case.tensors[:3])]
    outs = qk_norm_rope(*leaves, *case.tensors[3:], heads=2, kv_heads=1, eps=EPS)
    torch.autograd.backward(outs, case.d_outs)
    for i, (leaf, exact) in enumerate(zip(leaves, case.double().plain()[1], strict=True)):
        assert (leaf.grad is not None) == bool(needed >> i & 1)
        if leaf.grad is not None:
            torch.testing.assert_close(leaf.grad.double(), exact, rtol=2e-5, atol=2e-5)


def test_an_output_that_is_not_used_sends_no_gradient() -> None:
    case = Case(3, 2, 1, 4, 2)
    qkv = case.tensors[0].clone().requires_grad_()
    _, _, value = qk_norm_rope(qkv, *case.tensors[1:], heads=2, kv_heads=1, eps=EPS)
    value.sum().backward()
    assert qkv.grad is not None
    assert torch.equal(qkv.grad, torch.cat([torch.zeros(3, 12), torch.ones(3, 4)], dim=1))


def test_the_value_is_a_copy_and_not_a_view_of_the_projection(device: str) -> None:
    case = Case(3, 2, 1, 4, 2, device=device)
    for forward in (kernel.forward, reference.forward):
        value = forward(*case.tensors, *case.geometry)[2]
        assert torch.equal(value[:, 0], case.tensors[0][:, 12:])
        assert value.untyped_storage().data_ptr() != case.tensors[0].untyped_storage().data_ptr()


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operators_keep_the_contracts_of_the_dispatcher(dtype: torch.dtype, norm: bool) -> None:
    case = Case(3, 2, 1, 6, 2, norm=norm, dtype=dtype)
    inputs = (*case.tensors, *case.geometry)
    torch.library.opcheck(torch.ops.reca.qk_norm_rope.default, inputs)
    for flags in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(torch.ops.reca.qk_norm_rope_backward.default, (*case.d_outs, *inputs, *flags))


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_the_public_function_compiles_to_one_graph(impl: str) -> None:
    case = Case(4, 2, 1, 6, 2)

    def block(*tensors: Tensor) -> Tensor:
        query, key, value = qk_norm_rope(*tensors, heads=2, kv_heads=1, eps=EPS, impl=impl)
        return (query * (key + value)).sum()

    results = []
    for function in (block, torch.compile(block, fullgraph=True, backend="aot_eager")):
        leaves = [t.clone().requires_grad_(i < 3) for i, t in enumerate(case.tensors)]
        results.append(torch.autograd.grad(function(*leaves), leaves[:3]))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


QKV, W, A = torch.zeros(3, 16), torch.ones(4), torch.ones(3, 2)


@pytest.mark.parametrize(
    ("inputs", "options", "error", "message"),
    [
        ((QKV, W, W, A, A), {"heads": -1}, ValueError, r"heads and kv_heads must not be .*got -1 and 1"),
        (
            (QKV, W, W, A, A),
            {"heads": 0, "kv_heads": 0},
            ValueError,
            r"heads and kv_heads must not be negative, nor both 0, got 0 and 0",
        ),
        (
            (QKV[0], W, W, A, A),
            {},
            ValueError,
            r"qkv must be \[rows, \(2 \+ 2 \* 1\) \* dim\], got \[16\]; join query",
        ),
        ((QKV[:, :15], W, W, A, A), {}, ValueError, r"qkv must be .*got \[3, 15\]"),
        (
            (QKV, W, None, A, A),
            {},
            ValueError,
            r"query_weight and key_weight go together, got only query_weight",
        ),
        ((QKV, W, W, None, A), {}, ValueError, r"cos and sin go together, got only sin; pass both or none"),
        (
            (QKV, W, W[:3], A, A),
            {},
            ValueError,
            r"key_weight must be \[4\], got \[3\]; one value per dimension",
        ),
        ((QKV, W.int(), W, A, A), {}, TypeError, r"query_weight must be one of bfloat16.*, got int32"),
        ((QKV, W, W.to("meta"), A, A), {}, ValueError, r"key_weight must be on cpu like qkv, got meta"),
        (
            (QKV, W, W, A[:2], A),
            {},
            ValueError,
            r"cos must be \[3, 1 to 2\], got \[2, 2\]; one angle per row",
        ),
        ((QKV, W, W, torch.ones(3, 3), A), {}, ValueError, r"cos must be \[3, 1 to 2\], got \[3, 3\]"),
        ((QKV, W, W, A[:, :1], A), {}, ValueError, r"sin must be \[3, 1\], got \[3, 2\]; shaped like cos"),
        ((QKV, W, W, A, A.half()), {}, TypeError, r"sin must be one of float32, got float16; convert it"),
        ((QKV.int(), W, W, A, A), {}, TypeError, r"qkv must be one of bfloat16.*, got int32"),
        ((QKV, W, W, A, A), {"impl": "fused"}, ValueError, r"impl='fused' needs CUDA tensors, got cpu"),
        (
            (QKV, W, W, A, A),
            {"impl": "x"},
            ValueError,
            r"impl must be one of auto, fused, reference, got 'x'",
        ),
    ],
)
def test_bad_input_is_refused_with_a_cure(
    inputs: tuple[Any, ...], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^qk_norm_rope: {message}"):
        qk_norm_rope(*inputs, **{"heads": 2, "kv_heads": 1, "eps": EPS, **options})


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("geometry", [(28, 4, 128, 64), (32, 32, 64, 16)])
def test_on_a_gpu_low_precision_stays_within_the_error_budget(
    dtype: torch.dtype, geometry: tuple[int, int, int, int]
) -> None:
    case = Case(517, *geometry, dtype=dtype, device="cuda")
    inputs = (*case.tensors, *case.geometry)
    check_against_plain(case, kernel.forward(*inputs), kernel.backward(*case.d_outs, *inputs, True, True))


@pytest.mark.gpu
def test_on_a_gpu_a_captured_graph_replays_on_new_values() -> None:
    case = Case(129, 4, 2, 64, 32, device="cuda")
    static = [t.clone().requires_grad_(i < 3) for i, t in enumerate(case.tensors)]

    def step() -> tuple[Tensor, ...]:
        outs = qk_norm_rope(*static, heads=4, kv_heads=2, eps=EPS)
        return torch.autograd.grad(outs, static[:3], case.d_outs)

    step()  # warm-up compiles outside of the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        static[0].copy_(2 * case.tensors[0])
    graph.replay()
    for got, want in zip(captured, step(), strict=True):
        assert torch.equal(got, want)
