"""Attention over segments: every back end that runs here against the formula, forward and backward."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from reca.layers.attention import attention
from reca.layers.attention_backends import BACKENDS, _compiled
from reca.layers.segments import Segments

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
RIVALS = [name for name in BACKENDS if name != "reference"]
HERE = [name for name in RIVALS if BACKENDS[name].missing(CPU, torch.float32, 16, True) is None]

SEGMENTS = {
    "full_ragged": Segments.of([5, 3, 7]),
    "full_equal": Segments.of([4, 4, 4]),
    "full_more_or_fewer_keys": Segments.of([3, 1, 6, 6], [9, 2, 4, 4]),
    "causal_ragged": Segments.of([5, 3, 3], is_causal=True),
    "causal_more_keys": Segments.of([3, 3, 1, 5], [4, 4, 7, 9], is_causal=True),
    "empty_segments": Segments.of([4, 0, 0, 3], [4, 2, 0, 6], is_causal=True),
    "one_row": Segments.of([1], is_causal=True),
    "many_blocks": Segments.of([130, 0, 257], [140, 3, 259], is_causal=True),
}
HEADS = {"grouped": (6, 2, 10), "one_key_head": (3, 1, 16), "plain_72": (2, 2, 72)}
segment_cases = pytest.mark.parametrize("segments", SEGMENTS.values(), ids=SEGMENTS)
head_cases = pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)


def rows(
    segments: Segments, heads: tuple[int, int, int], dtype: torch.dtype, device: torch.device = CPU
) -> list[Tensor]:
    """Query, key, value and the gradient of the output, seeded."""
    num_heads, kv_heads, dim = heads
    generator = torch.Generator().manual_seed(segments.query_rows)
    shapes = [
        (segments.query_rows, num_heads),
        *[(segments.key_rows, kv_heads)] * 2,
        (segments.query_rows, num_heads),
    ]
    return [torch.randn(*s, dim, generator=generator, dtype=torch.float64).to(device, dtype) for s in shapes]


def results(inputs: list[Tensor], segments: Segments, backend: str) -> list[Tensor]:
    """Output and the gradients of query, key and value."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs[:3]]
    out = attention(*leaves, segments, backend=backend)
    return [out.detach(), *torch.autograd.grad(out, leaves, inputs[3])]


def fp32_rounding(segments: Segments, heads: tuple[int, int, int]) -> float:
    """Largest error of the longest chain of sums: scores, softmax, gradients over the queries of a group."""
    length = heads[2] + max(segments.key_lengths) + max(segments.query_lengths) * heads[0] // heads[1]
    return length * torch.finfo(torch.float32).eps


def truth(inputs: list[Tensor], segments: Segments) -> list[Tensor]:
    return results([tensor.double() for tensor in inputs], segments, "reference")


def formula(query: Tensor, key: Tensor, value: Tensor, segments: Segments) -> Tensor:
    """The definition, one row and head at a time: which keys a row sees is counted by hand."""
    out, group = torch.zeros_like(query), query.shape[1] // key.shape[1]
    row = first = 0
    for length_q, length_k in zip(segments.query_lengths, segments.key_lengths, strict=True):
        for i in range(length_q):
            seen = length_k - (length_q - 1 - i) if segments.is_causal else length_k
            for h in range(query.shape[1]):
                keys, values = (t[first : first + seen, h // group] for t in (key, value))
                out[row, h] = torch.softmax(keys @ query[row, h] / query.shape[2] ** 0.5, dim=0) @ values
            row += 1
        first += length_k
    return out


@segment_cases
@head_cases
def test_the_reference_is_the_formula(segments: Segments, heads: tuple[int, int, int]) -> None:
    query, key, value, _ = rows(segments, heads, torch.float64)
    got = attention(query, key, value, segments, backend="reference")
    torch.testing.assert_close(got, formula(query, key, value, segments), rtol=1e-12, atol=1e-12)


def test_the_gradients_of_the_reference_are_those_of_finite_differences() -> None:
    segments = Segments.of([2, 0, 3], [3, 1, 3], is_causal=True)
    leaves = [t.requires_grad_() for t in rows(segments, (4, 2, 3), torch.float64)[:3]]
    assert torch.autograd.gradcheck(lambda *qkv: attention(*qkv, segments, backend="reference"), leaves)


@segment_cases
@head_cases
@pytest.mark.parametrize("backend", HERE)
def test_fp32_differs_from_the_truth_by_rounding_only(
    backend: str, segments: Segments, heads: tuple[int, int, int]
) -> None:
    inputs = rows(segments, heads, torch.float32)
    for got, expected in zip(results(inputs, segments, backend), truth(inputs, segments), strict=True):
        bound = fp32_rounding(segments, heads) * expected.abs().max().clamp(min=1).item()
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=bound)


def naive(query: Tensor, key: Tensor, value: Tensor, segments: Segments) -> Tensor:
    """Plain torch at the dtype of the inputs, as a model file would write it."""
    group = query.shape[1] // key.shape[1]
    queries = query.split(segments.query_lengths)
    keys, values = (t.repeat_interleave(group, 1).split(segments.key_lengths) for t in (key, value))
    outputs = []
    for q, k, v in zip(queries, keys, values, strict=True):
        scores = torch.einsum("qhd,khd->hqk", q, k) * q.shape[2] ** -0.5
        hidden = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).triu(len(k) - len(q) + 1)
        scores = scores.masked_fill(hidden, -torch.inf) if segments.is_causal else scores
        outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v))
    return torch.cat(outputs)


def assert_within_budget(
    backend: str, segments: Segments, heads: tuple[int, int, int], device: torch.device
) -> None:
    """In bf16 the error against fp64 is at most twice that of plain torch: the output and each gradient.

    Errors are root mean squares: the largest of the twenty values of a small case is mostly luck.
    """
    inputs = rows(segments, heads, torch.bfloat16, device)
    leaves = [t.detach().clone().requires_grad_() for t in inputs[:3]]
    out = naive(*leaves, segments)
    plain = [out.detach(), *torch.autograd.grad(out, leaves, inputs[3])]
    cases = zip(results(inputs, segments, backend), plain, truth(inputs, segments), strict=True)
    for name, (got, honest, expected) in zip(("output", "dquery", "dkey", "dvalue"), cases, strict=True):
        error, budget = ((t.double() - expected).square().mean().sqrt().item() for t in (got, honest))
        # Where plain torch happens to be exact, one rounding of the result and fp32 sums inside are allowed.
        rounding = torch.finfo(torch.bfloat16).eps / 2 * expected.square().mean().sqrt().item()
        allowed = max(2 * budget, rounding + fp32_rounding(segments, heads))
        assert error <= allowed, f"{backend} {name}: {error:.3g} > {allowed:.3g}, plain torch {budget:.3g}"


@segment_cases
@head_cases
@pytest.mark.parametrize("backend", ["reference", *HERE])
def test_bf16_is_within_the_error_budget(
    backend: str, segments: Segments, heads: tuple[int, int, int]
) -> None:
    assert_within_budget(backend, segments, heads, CPU)


@pytest.mark.gpu
@needs_cuda
@segment_cases
@head_cases
@pytest.mark.parametrize("backend", RIVALS)
def test_bf16_on_the_gpu_is_within_the_error_budget(
    backend: str, segments: Segments, heads: tuple[int, int, int]
) -> None:
    reason = BACKENDS[backend].missing(CUDA, torch.bfloat16, heads[2], True)
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")
    assert_within_budget(backend, segments.to(CUDA), heads, CUDA)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("backend", RIVALS)
def test_no_backend_waits_for_the_gpu(backend: str) -> None:
    reason = BACKENDS[backend].missing(CUDA, torch.bfloat16, 64, True)
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")
    segments = SEGMENTS["causal_more_keys"].to(CUDA)
    inputs = rows(segments, (4, 2, 64), torch.bfloat16, CUDA)
    results(inputs, segments, backend)  # compiles and makes the memo
    torch.cuda.set_sync_debug_mode("error")
    try:
        results(inputs, segments, backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=6),
    is_causal=st.booleans(),
)
def test_any_lengths_agree_with_the_reference(lengths: list[tuple[int, int]], is_causal: bool) -> None:
    segments = Segments.of([q for q, _ in lengths], [q + k for q, k in lengths], is_causal=is_causal)
    query, key, value, _ = rows(segments, (4, 2, 8), torch.float64)
    got, expected = (attention(query, key, value, segments, backend=b) for b in ("sdpa", "reference"))
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_flex_runs_compiled_over_full_partial_and_skipped_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, bool]] = []
    compile_really = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **how: asked.append(how) or compile_really(f, **how))
    _compiled.cache_clear()
    segments = SEGMENTS["many_blocks"]
    query, key, value, _ = rows(segments, HEADS["grouped"], torch.float32)
    got, expected = (attention(query, key, value, segments, backend=b) for b in ("flex", "reference"))
    torch.testing.assert_close(got, expected, rtol=0, atol=fp32_rounding(segments, HEADS["grouped"]))
    assert asked == [{"dynamic": False, "fullgraph": True}]
