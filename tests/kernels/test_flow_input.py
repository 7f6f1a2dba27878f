"""flow_input: noised latents, their projection and embeddings, with noise that is never stored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from reca.kernels import PhiloxNoise, flow_input
from reca.kernels._philox import normal_rows, signed_key
from reca.kernels.flow_input import kernel, op, reference
from reca.kernels.testing import assert_within_budget, make_normal, misaligned
from reca.randomness import RandomSource, key_of

KEY = key_of(3, "noise")
LENGTHS = (3, 0, 5, 2)
TRAINED = ("weight", "bias", "time_embedding")


def make_latents(
    dim: int, *, repeat: int = 1, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """Tokens of four images, one of them empty, in order."""
    lengths = [repeat * n for n in LENGTHS]
    images = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(device)
    rows = torch.cat([torch.arange(n) for n in lengths]).to(device)
    step = torch.tensor(11, device=device)
    samples = torch.tensor([5, 1 << 40, (1 << 33) + 7, 0], device=device)
    return {
        "clean": make_normal(sum(lengths), dim, seed=0, dtype=dtype, device=device),
        "noise": PhiloxNoise(KEY, step, samples, rows),
        "time": torch.tensor([0.0, 0.5, 0.25, 0.999], device=device),
        "images": images,
    }


def make_tables(width: int, dim: int, tokens: int, **kind: Any) -> dict[str, Tensor]:
    return {
        "weight": make_normal(width, dim, seed=1, **kind),
        "bias": make_normal(width, seed=2, **kind),
        "time_embedding": make_normal(len(LENGTHS), width, seed=3, **kind),
        "position": make_normal(7, width, seed=4, **kind),
        "position_ids": (torch.arange(tokens) * 3 % 7).to(kind.get("device", "cpu")),
    }


def through_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "_forward", op._cuda)
    monkeypatch.setattr(op, "_features", op._features_cuda)


def drawn(latents: dict[str, Any]) -> Tensor:
    """[tokens, dim] fp32: the noise that the coordinates stand for."""
    noise = latents["noise"]
    sample = noise.samples[latents["images"]]
    return normal_rows(KEY, noise.step, sample, noise.rows, latents["clean"].shape[1])


def plain(latents: dict[str, Any], noise: Tensor, tables: dict[str, Tensor]) -> Tensor:
    """The same as models write it."""
    t = latents["time"].to(latents["clean"].dtype)[latents["images"]][:, None]
    noised = (1 - t) * latents["clean"] + t * noise
    out = F.linear(noised.to(tables["weight"].dtype), tables["weight"], tables["bias"])
    out = out + tables["time_embedding"][latents["images"]]
    return out + tables["position"][tables["position_ids"]]


def doubled(tensors: dict[str, Any]) -> dict[str, Any]:
    return {
        k: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for k, t in tensors.items()
    }


def test_the_noise_is_that_of_the_random_source() -> None:
    latents = make_latents(12)
    noise = RandomSource(3, 11).normal_rows("noise", latents["noise"].samples, LENGTHS, 12)
    assert torch.equal(drawn(latents), noise)


def test_the_kernel_regenerates_the_noise_of_the_random_source(device: str) -> None:
    latents = make_latents(20, repeat=40, device=device)
    source = RandomSource(3, 11)
    noise = source.normal_rows("noise", latents["noise"].samples, [40 * n for n in LENGTHS], 20)
    time = torch.ones(4, device=device)
    coordinates = (latents["noise"].samples, latents["noise"].rows, latents["noise"].step, signed_key(KEY))
    got = kernel.features(latents["clean"], time, latents["images"], None, *coordinates, torch.float32)
    # The integers agree bit for bit; sine, cosine and logarithm to a few units in the last place.
    torch.testing.assert_close(got[:, :20], noise, rtol=2e-6, atol=2e-6)


@given(st.sampled_from([4, 12, 16, 64, 100]), st.sampled_from([1, 33, 64, 130]), st.booleans(), st.booleans())
def test_the_kernels_stay_within_the_error_budget(
    device: str, dim: int, width: int, is_given: bool, shifted: bool
) -> None:
    latents = make_latents(dim, repeat=8, device=device)
    tokens = 8 * sum(LENGTHS)
    tables = make_tables(width, dim, tokens, device=device)
    noise = make_normal(tokens, dim, seed=9, device=device) if is_given else drawn(latents)
    coordinates = (latents["noise"].samples, latents["noise"].rows, latents["noise"].step, signed_key(KEY))
    shift = misaligned if shifted else lambda tensor: tensor
    given_ = (shift(noise), None, None, None, 0) if is_given else (None, *coordinates)
    arguments = (shift(latents["clean"]), latents["time"], latents["images"], *given_)
    out = kernel.forward(*arguments, *tables.values())
    exact = plain(doubled(latents), noise.double(), doubled(tables))
    assert_within_budget("embedded", out, plain(latents, noise, tables), exact)
    features = kernel.features(*arguments, torch.float32)
    expected = reference.features(
        reference.noised(latents["clean"], noise, latents["time"], latents["images"], torch.float32),
        latents["images"],
        len(LENGTHS),
    )
    assert torch.equal(features[:, dim:], expected[:, dim:])
    torch.testing.assert_close(features[:, :dim], expected[:, :dim], rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("needed", range(1, 8))
def test_every_subset_of_required_gradients_is_served(
    device: str, monkeypatch: pytest.MonkeyPatch, needed: int, fused: bool
) -> None:
    if fused:
        through_kernel(monkeypatch)
    latents = make_latents(8, repeat=7, device=device)
    tables = make_tables(5, 8, 70, device=device)
    noise, d_out = drawn(latents), make_normal(70, 5, seed=8, device=device)
    exact = doubled(tables)
    for i, name in enumerate(TRAINED):
        tables[name].requires_grad_(bool(needed >> i & 1))
        exact[name].requires_grad_()
    flow_input(**latents, **tables).backward(d_out)
    plain(doubled(latents), noise.double(), exact).backward(d_out.double())
    for i, name in enumerate(TRAINED):
        got = tables[name].grad
        assert (got is not None) == bool(needed >> i & 1)
        if got is not None:
            torch.testing.assert_close(got.double(), exact[name].grad, rtol=1e-5, atol=1e-5)


def test_what_is_not_given_is_not_added(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    latents = make_latents(8, device=device)
    weight = make_normal(5, 8, seed=1, device=device)
    expected = flow_input(**latents, weight=weight, impl="reference")
    through_kernel(monkeypatch)
    torch.testing.assert_close(flow_input(**latents, weight=weight), expected, rtol=1e-5, atol=1e-5)


def test_the_explicit_backward_passes_gradcheck() -> None:
    latents = make_latents(4, dtype=torch.float64)
    tables = make_tables(3, 4, 10, dtype=torch.float64)
    leaves = [tables.pop(name).requires_grad_() for name in TRAINED]

    def embed(weight: Tensor, bias: Tensor, time_embedding: Tensor) -> Tensor:
        return flow_input(**latents, weight=weight, bias=bias, time_embedding=time_embedding, **tables)

    assert torch.autograd.gradcheck(embed, leaves)


@pytest.mark.parametrize("fused", [False, True])
def test_indices_out_of_range_give_nan_and_touch_no_other_row(
    device: str, monkeypatch: pytest.MonkeyPatch, fused: bool
) -> None:
    if fused:
        through_kernel(monkeypatch)
    latents, tables = make_latents(8, device=device), make_tables(5, 8, 10, device=device)
    expected = flow_input(**latents, **tables)
    latents["images"][0], latents["images"][1] = -1, 4
    tables["position_ids"][8], tables["position_ids"][9] = 7, -1
    out = flow_input(**latents, **tables)
    assert out[[0, 1, 8, 9]].isnan().all()
    torch.testing.assert_close(out[2:8], expected[2:8])


def test_another_step_gives_other_noise_and_the_same_key_signed_or_not(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    through_kernel(monkeypatch)
    latents, tables = make_latents(8, device=device), make_tables(5, 8, 10, device=device)
    latents["noise"] = replace(latents["noise"], key=(1 << 63) + 5)
    out = flow_input(**latents, **tables)
    assert torch.equal(
        out, flow_input(**latents | {"noise": replace(latents["noise"], key=5 - (1 << 63))}, **tables)
    )
    latents["noise"] = replace(latents["noise"], step=latents["noise"].step + 1)
    assert not torch.equal(out[3:], flow_input(**latents, **tables)[3:])


def test_without_tokens_there_is_nothing_and_no_gradient(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    through_kernel(monkeypatch)
    latents, tables = make_latents(8, repeat=0, device=device), make_tables(5, 8, 0, device=device)
    tables["weight"].requires_grad_()
    out = flow_input(**latents, **tables)
    assert out.shape == (0, 5)
    out.sum().backward()
    assert tables["weight"].grad is not None
    assert not tables["weight"].grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_operators_keep_the_contracts_of_the_dispatcher(dtype: torch.dtype) -> None:
    latents, tables = make_latents(8), make_tables(5, 8, 10, dtype=dtype)
    noise = latents["noise"]
    drawn_ = (None, noise.samples, noise.rows, noise.step, signed_key(KEY))
    arguments = (latents["clean"], latents["time"], latents["images"], *drawn_)
    torch.library.opcheck(torch.ops.reca.flow_input.default, (*arguments, *tables.values()))
    torch.library.opcheck(torch.ops.reca.flow_input_features.default, (*arguments, dtype))


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_the_public_function_compiles_to_one_graph(impl: str) -> None:
    latents, tables = make_latents(8), make_tables(5, 8, 10)

    def embed(weight: Tensor) -> Tensor:
        return flow_input(**latents, **tables | {"weight": weight}, impl=impl)

    gradients = []
    for function in (embed, torch.compile(embed, fullgraph=True, backend="aot_eager")):
        leaf = tables["weight"].clone().requires_grad_()
        gradients += torch.autograd.grad(function(leaf).square().sum(), leaf)
    torch.testing.assert_close(*gradients)


def changed(**changes: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda inputs: inputs | changes


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (changed(clean=torch.zeros(10)), ValueError, r"clean must be \[tokens, 1 to 256\], got \[10\]"),
        (changed(clean=torch.zeros(10, 257)), ValueError, r"clean must be .*got \[10, 257\]; flatten"),
        (
            changed(clean=torch.zeros(10, 6)),
            ValueError,
            r"dim must be a multiple of 4 .*got 6; pass a tensor",
        ),
        (
            changed(noise=torch.zeros(3, 8)),
            ValueError,
            r"noise must be \[10, 8\], got \[3, 8\]; .*like clean",
        ),
        (changed(noise=torch.zeros(10, 8).int()), TypeError, r"noise must be one of bfloat16.*, got int32"),
        (
            lambda i: i | {"noise": replace(i["noise"], samples=torch.zeros(2).long())},
            ValueError,
            r"noise.samples must be \[4\], got \[2\]; one sample id per image",
        ),
        (
            lambda i: i | {"noise": replace(i["noise"], rows=torch.zeros(10))},
            TypeError,
            r"noise.rows must be one of int64, got float32",
        ),
        (changed(time=torch.zeros(0)), ValueError, r"time must be \[images > 0\], got \[0\]; one per image"),
        (changed(time=torch.zeros(4).half()), TypeError, r"time must be one of float32, got float16"),
        (changed(images=torch.zeros(9).long()), ValueError, r"images must be \[10\], got \[9\]"),
        (changed(weight=torch.zeros(5, 7)), ValueError, r"weight must be \[width > 0, dim=8\], got \[5, 7\]"),
        (changed(bias=torch.zeros(4)), ValueError, r"bias must be \[5\], got \[4\]; one value per row"),
        (changed(bias=torch.zeros(5).half()), TypeError, r"bias must be float32 like weight, got float16"),
        (
            changed(time_embedding=torch.zeros(3, 5)),
            ValueError,
            r"time_embedding must be \[4, 5\], got \[3, 5\]",
        ),
        (changed(position=None), ValueError, r"position and position_ids go together, got one of them"),
        (changed(position_ids=torch.zeros(2).long()), ValueError, r"position_ids must be \[10\], got \[2\]"),
        (changed(weight=torch.zeros(5, 8, device="meta")), ValueError, r"weight must be on cpu like clean"),
        (changed(impl="fused"), ValueError, r"impl='fused' needs CUDA tensors, got cpu"),
    ],
)
def test_bad_input_is_refused_with_a_cure(
    change: Callable[[dict[str, Any]], dict[str, Any]], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^flow_input: {message}"):
        flow_input(**change(make_latents(8) | make_tables(5, 8, 10)))


@pytest.mark.gpu
def test_on_a_gpu_bf16_stays_within_the_error_budget_and_a_graph_replays_with_new_noise() -> None:
    kind: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
    latents, tables = make_latents(64, repeat=50, device="cuda"), make_tables(3584, 64, 500, **kind)
    exact = plain(doubled(latents), drawn(latents).double(), doubled(tables))
    out = flow_input(**latents, **tables)
    assert_within_budget("embedded", out, plain(latents, drawn(latents), tables), exact)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = flow_input(**latents, **tables)
    latents["noise"].step.add_(1)
    graph.replay()
    assert torch.equal(captured, flow_input(**latents, **tables))
