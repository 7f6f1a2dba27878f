"""philox: words, uniforms and normals of samples in one launch, bit for bit those of plain integers."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from reca.kernels import philox, philox4x32, uniform_of
from reca.kernels._launch import record_launches
from reca.kernels._philox import signed_key
from reca.kernels.philox import kernel, op, reference
from reca.kernels.philox.op import Distribution
from reca.kernels.testing import assert_within_budget

KEY = 0xF123_4567_89AB_CDEF
IDS = (0, (1 << 63) - 1, -1, -(1 << 63), (5 << 32) | 7)
DISTRIBUTIONS = get_args(Distribution)
# Five roundings of a normal of at most 5.7, and as many of its logarithm and cosine.
NORMALS_DIFFER_BY = 4e-6


def ids_on(device: str, ids: tuple[int, ...] = IDS) -> Tensor:
    return torch.tensor(ids, dtype=torch.int64, device=device)


def by_kernel(samples: Tensor, count: int, distribution: str, key: int = KEY, step: int = 3) -> Tensor:
    return kernel.forward(samples, count, signed_key(key), step, op._KINDS[distribution])


def words_one_by_one(ids: tuple[int, ...], count: int, key: int, step: int) -> list[list[int]]:
    """The definition, in plain integers."""
    low, high = [i & 0xFFFFFFFF for i in ids], [(i >> 32) & 0xFFFFFFFF for i in ids]
    return [
        [philox4x32(key, p // 4, step, low[i], high[i])[p % 4] for p in range(count)] for i in range(len(ids))
    ]


@given(
    st.lists(st.one_of(st.sampled_from(IDS), st.integers(-(1 << 63), (1 << 63) - 1)), max_size=5).map(tuple),
    st.sampled_from([0, 1, 2, 3, 4, 7, 31, 513]),
    st.integers(-(1 << 63), (1 << 64) - 1),
    st.one_of(st.sampled_from([0, 1, 1 << 31, (1 << 32) - 1]), st.integers(0, (1 << 32) - 1)),
)
def test_kernel_and_reference_give_the_words_of_plain_integers(
    device: str, ids: tuple[int, ...], count: int, key: int, step: int
) -> None:
    expected = torch.tensor(words_one_by_one(ids, count, key, step), dtype=torch.int64).view(len(ids), count)
    samples = ids_on(device, ids)
    drawn = by_kernel(samples, count, "words", key, step)
    assert torch.equal(drawn.cpu(), expected)
    assert torch.equal(philox(samples, count, key=key, step=step, distribution="words").cpu(), expected)
    uniform = by_kernel(samples, count, "uniform", key, step)
    assert torch.equal(uniform.cpu(), uniform_of(expected))


@pytest.mark.parametrize("count", [0, 1, 2, 4, 5, 700, 4099])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_every_distribution_is_the_reference_s(device: str, distribution: str, count: int) -> None:
    ids = (IDS * 3)[:11]  # more than two tiles of rows
    drawn = by_kernel(ids_on(device, ids), count, distribution).cpu()
    expected = reference.forward(ids_on("cpu", ids), count, signed_key(KEY), 3, op._KINDS[distribution])
    assert (drawn.dtype, drawn.shape) == (expected.dtype, expected.shape)
    assert drawn.is_contiguous() and expected.is_contiguous()
    tolerance = NORMALS_DIFFER_BY if distribution == "normal" else 0
    torch.testing.assert_close(drawn, expected, rtol=0, atol=tolerance)


def test_normals_err_no_more_than_plain_torch(device: str) -> None:
    samples, count = ids_on(device), 2048
    exact = torch.stack(
        [
            value
            for pair in by_kernel(samples, count, "uniform").cpu().double().view(-1, 2)
            for value in box_muller(*pair)
        ]
    )
    plain = philox(samples, count, key=KEY, step=3, distribution="normal", impl="reference").cpu()
    got = by_kernel(samples, count, "normal").cpu()
    assert_within_budget("normals", got.flatten(), plain.flatten(), exact)


def box_muller(radius_draw: Tensor, angle_draw: Tensor) -> tuple[Tensor, Tensor]:
    radius = (-2 * radius_draw.clamp_min(1e-7).log()).sqrt()
    return radius * (2 * torch.pi * angle_draw).cos(), radius * (2 * torch.pi * angle_draw).sin()


@pytest.mark.parametrize("fused", [False, True])
def test_a_sample_ignores_its_neighbours_and_a_prefix_the_length(
    device: str, monkeypatch: pytest.MonkeyPatch, fused: bool
) -> None:
    if fused:
        monkeypatch.setattr(op, "_forward", op._cuda)
    samples = ids_on(device)
    whole = philox(samples, 37, key=KEY, distribution="normal")
    assert torch.equal(philox(samples[3:4], 37, key=KEY, distribution="normal"), whole[3:4])
    assert torch.equal(philox(samples, 6, key=KEY, distribution="normal"), whole[:, :6])
    assert torch.equal(philox(samples.repeat(2)[::2], 37, key=KEY, distribution="normal")[1], whole[2])
    others = [philox(samples, 37, key=KEY, step=1), philox(samples, 37, key=KEY + 1)]
    assert all(not torch.isclose(whole, other).any() for other in others)


@pytest.mark.parametrize(("samples", "count", "programs"), [(48, 262_144, 6144), (48, 1, 1), (3, 5, 1)])
def test_a_draw_is_one_launch_whose_programs_share_rows(samples: int, count: int, programs: int) -> None:
    grids: list[tuple[int, ...]] = []
    with pytest.MonkeyPatch.context() as patch, record_launches(90):
        patch.setattr(kernel, "launch", lambda _, grid, *rest, **constants: grids.append(grid))
        kernel.forward(torch.empty(samples, dtype=torch.int64, device="meta"), count, 1, 0, reference.NORMAL)
    assert grids == [(programs,)]


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("count", [0, 1, 6])
def test_the_operator_keeps_the_contracts_of_the_dispatcher(distribution: str, count: int) -> None:
    arguments = (ids_on("cpu"), count, signed_key(KEY), 2, op._KINDS[distribution])
    torch.library.opcheck(torch.ops.reca.philox.default, arguments)


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_the_public_function_compiles_to_one_graph(impl: Any) -> None:
    def drawn(samples: Tensor) -> Tensor:
        return philox(samples + 1, 6, key=KEY, step=2, distribution="normal", impl=impl) * 2

    compiled = torch.compile(drawn, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(ids_on("cpu")), drawn(ids_on("cpu")))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"samples": torch.zeros(2, 3).long()}, ValueError, r"samples must be \[samples\], got \[2, 3\]"),
        ({"samples": torch.zeros(2).int()}, TypeError, r"samples must be one of int64, got int32; convert"),
        ({"count": -1}, ValueError, r"count must be 0 to 2\^34, got -1; draw under several purposes"),
        ({"count": (1 << 34) + 1}, ValueError, r"count must be 0 to 2\^34, got 17179869185"),
        ({"step": -1}, ValueError, r"step must be 0 to 2\^32 - 1, got -1; take another key beyond that"),
        ({"step": 1 << 32}, ValueError, r"step must be 0 to 2\^32 - 1, got 4294967296"),
        ({"key": 1 << 64}, ValueError, r"key must have 64 bits, got 18446744073709551616; hash what"),
        ({"key": -(1 << 63) - 1}, ValueError, r"key must have 64 bits, got -9223372036854775809"),
        (
            {"distribution": "gamma"},
            ValueError,
            r"distribution must be one of words, uniform, normal, got 'gamma'",
        ),
        ({"impl": "fast"}, ValueError, r"impl must be one of auto, fused, reference, got 'fast'"),
        ({"impl": "fused"}, ValueError, r"impl='fused' needs CUDA tensors, got cpu"),
    ],
)
def test_bad_input_is_refused_with_a_cure(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    given: dict[str, Any] = {"samples": ids_on("cpu"), "count": 3, "key": KEY}
    with pytest.raises(error, match=f"^philox: {message}"):
        philox(**given | changes)


@pytest.mark.gpu
def test_on_a_gpu_large_draws_are_those_of_the_cpu() -> None:
    samples, count = torch.arange(11) * 7919, 200_003
    for distribution in DISTRIBUTIONS:
        drawn = philox(samples.cuda(), count, key=KEY, step=9, distribution=distribution)
        expected = philox(samples, count, key=KEY, step=9, distribution=distribution)
        tolerance = NORMALS_DIFFER_BY if distribution == "normal" else 0
        torch.testing.assert_close(drawn.cpu(), expected, rtol=0, atol=tolerance)


@pytest.mark.gpu
def test_on_a_gpu_a_draw_can_be_captured() -> None:
    samples = ids_on("cuda")
    expected = philox(samples, 64, key=KEY, distribution="normal")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = philox(samples, 64, key=KEY, distribution="normal")
    graph.replay()
    assert torch.equal(captured, expected)
