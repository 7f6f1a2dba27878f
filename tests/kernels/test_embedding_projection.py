"""embedding_projection: features of an encoder, projected and put into rows of a sequence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from reca.kernels import embedding_projection
from reca.kernels.embedding_projection import kernel, op, reference
from reca.kernels.gelu_mlp import op as mlp_op
from reca.kernels.testing import assert_within_budget, make_normal, misaligned

TRAINED = ("features", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias", "destination")
NORM = ("norm_weight", "norm_bias")


def make_inputs(
    tokens: int, dim: int, inner: int, width: int, *, total: int | None = None, **kind: Any
) -> dict[str, Any]:
    """Every argument but the norm; tokens go to distinct rows of `total`, in no order."""
    total = tokens + 3 if total is None else total
    shapes = {
        "features": (tokens, dim),
        "fc1_weight": (inner, dim),
        "fc1_bias": (inner,),
        "fc2_weight": (width, inner),
        "fc2_bias": (width,),
        "position": (5, width),
        "destination": (total, width),
    }
    inputs: dict[str, Any] = {
        name: make_normal(*shape, seed=seed, **kind) for seed, (name, shape) in enumerate(shapes.items())
    }
    order = torch.randperm(total, generator=torch.Generator().manual_seed(9))[:tokens]
    device = kind.get("device", "cpu")
    return inputs | {"rows": order.to(device), "position_ids": (torch.arange(tokens) * 3 % 5).to(device)}


def make_norm(dim: int, **kind: Any) -> dict[str, Tensor]:
    return {name: make_normal(dim, seed=20 + i, **kind) for i, name in enumerate(NORM)}


def plain(
    features: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor | None = None,
    fc2_bias: Tensor | None = None,
    *,
    activation: str = "gelu",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    position: Tensor | None = None,
    position_ids: Tensor | None = None,
    destination: Tensor | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    """The same as models write it, for distinct rows in range."""
    if norm_weight is not None:
        features = F.layer_norm(features, features.shape[-1:], norm_weight, norm_bias, 1e-5)
    out = F.linear(features, fc1_weight, fc1_bias)
    if fc2_weight is not None:
        act = F.silu(out) if activation == "silu" else F.gelu(out, approximate=activation[5:] or "none")
        out = F.linear(act, fc2_weight, fc2_bias)
    if position is not None:
        out = out + position[position_ids].to(out.dtype)
    return out if destination is None else destination.index_copy(0, rows, out.to(destination.dtype))


def doubled(inputs: dict[str, Any]) -> dict[str, Any]:
    is_wide = {name: torch.is_tensor(value) and value.is_floating_point() for name, value in inputs.items()}
    return {name: value.detach().double() if is_wide[name] else value for name, value in inputs.items()}


def through_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (op, mlp_op):
        monkeypatch.setattr(module, "_forward", module._cuda)
        monkeypatch.setattr(module, "_backward", module._backward_cuda)


FORMS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "tanh, position, placed": ({"activation": "gelu_tanh"}, ()),
    "erf, placed": ({}, ("position", "position_ids")),
    "erf, returned": ({}, ("position", "position_ids", "destination", "rows")),
    "silu, position, returned": ({"activation": "silu"}, ("destination", "rows")),
    "norm, erf, placed": (make_norm(4), ("position", "position_ids")),
    "one layer, position, placed": ({"fc1_weight": make_normal(6, 4, seed=30)}, ("fc2_weight", "fc2_bias")),
    "one layer, returned": (
        {},
        ("fc2_weight", "fc2_bias", "position", "position_ids", "destination", "rows"),
    ),
}


def make_form(name: str) -> dict[str, Any]:
    """The arguments of a form that some connector has; inner and width are both 6."""
    changes, absent = FORMS[name]
    inputs = make_inputs(9, 4, 6, 6) | changes
    return {key: value for key, value in inputs.items() if key not in absent}


@pytest.mark.parametrize("impl", ["reference", "kernel"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_what_models_write_with_all_its_gradients(
    monkeypatch: pytest.MonkeyPatch, form: str, impl: Any
) -> None:
    if impl == "kernel":
        through_kernel(monkeypatch)
    inputs = make_form(form)
    leaves = {name: inputs[name].clone().requires_grad_() for name in (*TRAINED, *NORM) if name in inputs}
    exact = doubled(inputs)
    truths = {name: exact[name].requires_grad_() for name in leaves}
    out = embedding_projection(**inputs | leaves, impl="auto" if impl == "kernel" else impl)
    expected = plain(**exact | truths)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    d_out = make_normal(*out.shape, seed=8)
    got = torch.autograd.grad(out, list(leaves.values()), d_out)
    wanted = torch.autograd.grad(expected, list(truths.values()), d_out.double())
    for one, truth in zip(got, wanted, strict=True):
        torch.testing.assert_close(one.double(), truth, rtol=1e-5, atol=1e-5)


@given(st.integers(0, 40), st.integers(0, 7), st.sampled_from([1, 3, 16, 100, 513, 1030]), st.booleans())
def test_the_kernels_stay_within_the_error_budget(
    device: str, tokens: int, others: int, width: int, shifted: bool
) -> None:
    inputs = make_inputs(tokens, 1, 1, width, total=tokens + others, device=device)
    projected = make_normal(tokens, width, seed=11, device=device)
    shift = misaligned if shifted else lambda tensor: tensor
    rows, destination, bias = inputs["rows"], inputs["destination"], inputs["fc2_bias"]
    tables = {name: inputs[name] for name in ("position", "position_ids")}
    source = reference.sources(rows, tokens + others)
    wide = (projected.double(), bias.double(), tables["position"].double(), tables["position_ids"])
    embedded = projected + bias + tables["position"][tables["position_ids"]]
    exact = wide[0] + wide[1] + wide[2][wide[3]]
    places = (shift(projected), shift(bias), *tables.values())
    assert_within_budget("returned", kernel.place(*places, None, None), embedded, exact)
    placed = kernel.place(*places, shift(destination), source)
    honest = destination.index_copy(0, rows, embedded)
    assert_within_budget("placed", placed, honest, destination.double().index_copy(0, rows, exact))
    d_out = make_normal(tokens + others, width, seed=12, device=device)
    d_projected, d_bias = kernel.place_backward(shift(d_out), bias, rows, source, True)
    assert torch.equal(d_projected, d_out[rows])
    assert_within_budget("d_bias", d_bias, d_out[rows].sum(0), d_out[rows].double().sum(0))


def test_tokens_over_several_steps_of_a_program_all_reach_the_bias_gradient(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel, "column_tiles", lambda *_, reduces: ((3, 2), 2, 4, 4 if reduces else 1, 4))
    inputs = make_inputs(19, 1, 1, 7, device=device)
    source = reference.sources(inputs["rows"], 22)
    d_out = make_normal(22, 7, seed=12, device=device)
    arguments = (d_out, inputs["fc2_bias"], inputs["rows"], source)
    expected = reference.place_backward(*arguments)
    torch.testing.assert_close(kernel.place_backward(*arguments, True), expected)


def test_bf16_is_storage_and_a_destination_of_another_dtype_decides_the_result(device: str) -> None:
    inputs = make_inputs(9, 1, 1, 48, device=device)
    low = {name: inputs[name].bfloat16() for name in ("destination", "fc2_bias")}
    projected = make_normal(9, 48, seed=11, dtype=torch.bfloat16, device=device)
    source = reference.sources(inputs["rows"], 12)
    tables = (inputs["position"], inputs["position_ids"])
    for destination in (low["destination"], inputs["destination"]):
        arguments = (projected, low["fc2_bias"], *tables, destination, source)
        got, expected = kernel.place(*arguments), reference.place(*arguments)
        assert got.dtype == expected.dtype == destination.dtype
        # One unit in the last place: the interpreter truncates where the GPU rounds.
        torch.testing.assert_close(got, expected, rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("needed", range(1, 64))
def test_every_subset_of_required_gradients_is_served(
    monkeypatch: pytest.MonkeyPatch, needed: int, fused: bool
) -> None:
    if fused:
        through_kernel(monkeypatch)
    inputs = make_inputs(5, 3, 4, 2)
    exact = doubled(inputs)
    leaves = {n: inputs[n].requires_grad_(bool(needed >> i & 1)) for i, n in enumerate(TRAINED)}
    truths = {name: exact[name].requires_grad_() for name in TRAINED}
    d_out = make_normal(8, 2, seed=8)
    embedding_projection(**inputs).backward(d_out)
    plain(**exact).backward(d_out.double())
    for i, name in enumerate(TRAINED):
        got = leaves[name].grad
        assert (got is not None) == bool(needed >> i & 1)
        if got is not None:
            torch.testing.assert_close(got.double(), truths[name].grad, rtol=1e-5, atol=1e-5)


def test_the_explicit_backward_passes_gradcheck() -> None:
    inputs = make_inputs(4, 2, 3, 2, dtype=torch.float64)
    leaves = [inputs.pop(name).requires_grad_() for name in TRAINED]

    def embed(*tensors: Tensor) -> Tensor:
        return embedding_projection(**inputs, **dict(zip(TRAINED, tensors, strict=True)))

    assert torch.autograd.gradcheck(embed, leaves)


@pytest.mark.parametrize("impl", ["reference", "auto", "kernel"])
def test_of_equal_rows_the_last_token_wins_and_only_it_receives_a_gradient(
    monkeypatch: pytest.MonkeyPatch, impl: Any
) -> None:
    if impl == "kernel":
        through_kernel(monkeypatch)
    inputs = make_inputs(4, 3, 3, 3) | {"rows": torch.tensor([2, 5, 2, 0])}
    inputs["features"].requires_grad_()
    out = embedding_projection(**inputs, impl="reference" if impl == "reference" else "auto")
    winners = {name: inputs[name][1:] for name in ("features", "position_ids", "rows")}
    torch.testing.assert_close(out, plain(**inputs | winners))
    out.sum().backward()
    is_reached = inputs["features"].grad.abs().sum(dim=1) > 0
    assert is_reached.tolist() == [False, True, True, True]


@pytest.mark.parametrize("impl", ["reference", "auto", "kernel"])
def test_indices_out_of_range_give_nan_near_them_and_touch_no_other_row(
    monkeypatch: pytest.MonkeyPatch, impl: Any
) -> None:
    if impl == "kernel":
        through_kernel(monkeypatch)
    inputs = make_inputs(4, 3, 3, 3) | {"rows": torch.tensor([-1, 2, 7, 0])}
    inputs["position_ids"][1] = 5
    inputs["features"].requires_grad_()
    out = embedding_projection(**inputs, impl="reference" if impl == "reference" else "auto")
    # Row 0 is claimed by a token in range as well; the sign of the mistake outlives it.
    assert out.isnan().all(dim=1).tolist() == [True, False, True, False, False, False, True]
    assert torch.equal(out[[1, 3, 4, 5]], inputs["destination"][[1, 3, 4, 5]])
    out.sum().backward()
    assert not inputs["features"].grad[[0, 2]].any()


def test_a_source_out_of_range_reads_nothing_behind_the_tokens(device: str) -> None:
    projected, bias = make_normal(6, 3, seed=0, device=device), torch.zeros(3, device=device)
    source = torch.tensor([4, -1, 3], dtype=torch.int32, device=device)
    out = kernel.place(projected[:4], bias, None, None, torch.ones(3, 3, device=device), source)
    assert out.isnan().all(dim=1).tolist() == [True, False, False]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("tokens", "total"), [(0, 3), (0, 0), (2, 0)])
def test_without_tokens_or_rows_there_is_nothing_to_place(
    monkeypatch: pytest.MonkeyPatch, tokens: int, total: int, fused: bool
) -> None:
    if fused:
        through_kernel(monkeypatch)
    inputs = make_inputs(tokens, 3, 4, 2, total=total) | {"rows": torch.zeros(tokens, dtype=torch.int64)}
    leaves = [inputs[name].requires_grad_() for name in TRAINED]
    out = embedding_projection(**inputs)
    assert torch.equal(out, inputs["destination"])
    *rest, d_destination = torch.autograd.grad(out.sum(), leaves)
    assert not any(gradient.any() for gradient in rest)
    assert torch.equal(d_destination, torch.ones(total, 2))


def test_the_destination_is_left_as_it_was_and_nothing_of_its_size_is_kept() -> None:
    inputs = make_inputs(5, 3, 4, 2, total=100)
    before = inputs["destination"].clone()
    inputs["features"].requires_grad_()
    inputs["destination"].requires_grad_()
    kept: list[tuple[int, ...]] = []

    def remember(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        embedding_projection(**inputs)
    assert torch.equal(inputs["destination"], before)
    # fc1_weight, fc1_bias, fc2_weight, the product before the first bias; the last bias, rows, sources.
    assert sorted(kept) == sorted([(4, 3), (4,), (2, 4), (5, 4), (2,), (5,), (100,)])


def test_autocast_changes_neither_result_nor_gradient() -> None:
    results = []
    for enabled in (False, True):
        inputs = make_inputs(5, 3, 4, 2) | make_norm(3)
        leaves = [inputs[name].requires_grad_() for name in (*TRAINED, *NORM)]
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = embedding_projection(**inputs)
            results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    for inside, outside in zip(*results, strict=True):
        assert torch.equal(inside, outside)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_operators_keep_the_contracts_of_the_dispatcher(dtype: torch.dtype) -> None:
    inputs = make_inputs(5, 3, 4, 2, dtype=dtype)
    bias, rows, destination = inputs["fc2_bias"], inputs["rows"], inputs["destination"]
    source = reference.sources(rows, 8)
    projected = make_normal(5, 2, seed=11, dtype=dtype)
    places = (inputs["position"], inputs["position_ids"])
    for arguments in ((*places, destination, source), (None, None, destination.float(), source)):
        torch.library.opcheck(torch.ops.reca.place_embeddings.default, (projected, bias, *arguments))
    torch.library.opcheck(torch.ops.reca.place_embeddings.default, (projected, bias, *places, None, None))
    for flag in (False, True):
        arguments = (destination, bias, rows, source, flag)
        torch.library.opcheck(torch.ops.reca.place_embeddings_backward.default, arguments)


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_the_public_function_compiles_to_one_graph(impl: Any) -> None:
    inputs = make_inputs(5, 3, 4, 2) | make_norm(3)
    leaves = [inputs.pop(name).requires_grad_() for name in TRAINED]

    def embed(*tensors: Tensor) -> Tensor:
        return embedding_projection(**inputs, **dict(zip(TRAINED, tensors, strict=True)), impl=impl)

    compiled = torch.compile(embed, fullgraph=True, backend="aot_eager")
    results = [torch.autograd.grad(f(*leaves).square().sum(), leaves) for f in (embed, compiled)]
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"features": torch.zeros(3)}, ValueError, r"features must be \[tokens, dim > 0\], got \[3\]; fla"),
        ({"features": torch.zeros(5, 0)}, ValueError, r"features must be .*got \[5, 0\]"),
        ({"fc1_weight": torch.zeros(4, 2)}, ValueError, r"fc1_weight must be \[out > 0, 3\], got \[4, 2\]"),
        ({"fc2_weight": torch.zeros(2, 3)}, ValueError, r"fc2_weight must be \[out > 0, 4\], got \[2, 3\]"),
        ({"fc2_bias": None}, ValueError, r"fc2_weight and fc2_bias go together, got one of them; pass both"),
        ({"fc2_bias": torch.zeros(2).half()}, TypeError, r"fc2_bias must be float32 like features, got fl"),
        ({"activation": "relu"}, ValueError, r"activation must be one of gelu, gelu_tanh, .*, silu"),
        ({"norm_weight": torch.zeros(3)}, ValueError, r"norm_weight and norm_bias go together"),
        (
            {"norm_weight": torch.zeros(4), "norm_bias": torch.zeros(4)},
            ValueError,
            r"norm_weight must be \[3\], got \[4\]; one value per column of features",
        ),
        ({"position": None}, ValueError, r"position and position_ids go together"),
        ({"position": torch.zeros(0, 2)}, ValueError, r"position must be \[positions > 0, 2\], got no rows"),
        ({"position": torch.zeros(5, 3)}, ValueError, r"position must be \[5, 2\], got \[5, 3\]"),
        ({"position": torch.zeros(5, 2).int()}, TypeError, r"position must be one of bfloat16.*, got int32"),
        ({"position_ids": torch.zeros(5)}, TypeError, r"position_ids must be one of int64, got float32"),
        ({"destination": torch.zeros(9, 3)}, ValueError, r"destination must be \[9, 2\], got \[9, 3\]"),
        ({"destination": None}, ValueError, r"destination and rows go together"),
        ({"rows": torch.zeros(4).long()}, ValueError, r"rows must be \[5\], got \[4\]; one per row of feat"),
        ({"rows": torch.zeros(5).long().to("meta")}, ValueError, r"rows must be on cpu like features, got m"),
        ({"impl": "fused"}, ValueError, r"impl='fused' needs CUDA tensors, got cpu"),
    ],
)
def test_bad_input_is_refused_with_a_cure(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^embedding_projection: {message}"):
        embedding_projection(**make_inputs(5, 3, 4, 2) | change)


@pytest.mark.gpu
def test_on_a_gpu_bf16_stays_within_the_error_budget_and_a_graph_replays_on_new_values() -> None:
    kind: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
    inputs = make_inputs(1029, 128, 256, 3584, total=1300, **kind)
    for name in ("fc1_weight", "fc2_weight"):
        inputs[name] = inputs[name] / 16
    leaves = [inputs[name].requires_grad_() for name in TRAINED]
    d_out = make_normal(1300, 3584, seed=8, **kind)

    def step() -> tuple[Tensor, ...]:
        out = embedding_projection(**inputs)
        return out, *torch.autograd.grad(out, leaves, d_out)

    def honest(tensors: dict[str, Any]) -> tuple[Tensor, ...]:
        trained = [tensors[name].requires_grad_() for name in TRAINED]
        out = plain(**tensors)
        return out, *torch.autograd.grad(out, trained, d_out.to(out.dtype))

    for name, *results in zip(
        ("out", *TRAINED), step(), honest(inputs), honest(doubled(inputs)), strict=True
    ):
        assert_within_budget(name, *results)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        inputs["features"].mul_(2)
        inputs["rows"].add_(1)
    graph.replay()
    for got, want in zip(captured, step(), strict=True):
        assert torch.equal(got, want)
