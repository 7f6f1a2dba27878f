"""What optional packages are called with: their kernels need a GPU, their published signatures do not."""

from __future__ import annotations

import importlib
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from reca.layers.attention_backends import run_flash, run_reference, run_varlen, run_xformers
from reca.layers.segments import Segments

CPU = torch.device("cpu")
SEGMENTS = Segments.of([3, 0, 2, 2], [5, 1, 2, 2], is_causal=True)


def qkv(segments: Segments = SEGMENTS, dim: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((segments.query_rows, 4), (segments.key_rows, 2), (segments.key_rows, 2))
    query, key, value = (torch.randn(*shape, dim, generator=generator) for shape in shapes)
    return query, key, value


def stand_in_for_flash_attention(with_lse: bool) -> Any:
    """The published keyword signature, computed by the reference from the cumulative lengths."""

    def flash_attn_varlen_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        softmax_scale: float | None = None,
        causal: bool = False,
        deterministic: bool = False,
    ) -> Any:
        lengths = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
        assert (max_seqlen_q, max_seqlen_k) == (max(lengths[0]), max(lengths[1]))
        assert softmax_scale is not None
        out = run_reference(q, k, v, Segments.of(*lengths, is_causal=causal), softmax_scale)
        return (out, torch.zeros(4, 7)) if with_lse else out

    return SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func)


@pytest.mark.parametrize("with_lse", [False, True])
def test_flash_attention_gets_lengths_scale_and_causality(
    monkeypatch: pytest.MonkeyPatch, with_lse: bool
) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn_interface", stand_in_for_flash_attention(with_lse))
    got = run_flash("flash_attn_interface", *qkv(), SEGMENTS, 0.3)
    torch.testing.assert_close(got, run_reference(*qkv(), SEGMENTS, 0.3))


def test_xformers_gets_one_bias_per_segments_and_repeated_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[Segments] = []

    class BlockDiagonalMask:
        def __init__(self, segments: Segments) -> None:
            self.segments = segments
            built.append(segments)

        @classmethod
        def from_seqlens(cls, queries: list[int], keys: list[int], device: torch.device) -> BlockDiagonalMask:
            assert device == CPU
            return cls(Segments.of(queries, keys))

        def make_causal_from_bottomright(self) -> Any:
            lengths = self.segments.query_lengths, self.segments.key_lengths
            return SimpleNamespace(segments=Segments.of(*lengths, is_causal=True))

    def memory_efficient_attention(q: Tensor, k: Tensor, v: Tensor, attn_bias: Any, scale: float) -> Tensor:
        assert q.shape[2] == k.shape[2] == v.shape[2] == 4
        return run_reference(q[0], k[0], v[0], attn_bias.segments, scale)[None]

    fmha = SimpleNamespace(attn_bias=SimpleNamespace(BlockDiagonalMask=BlockDiagonalMask))
    operators = SimpleNamespace(fmha=fmha, memory_efficient_attention=memory_efficient_attention)
    monkeypatch.setattr(importlib, "import_module", {"xformers.ops": operators}.__getitem__)
    segments = Segments.of([3, 2], [5, 2], is_causal=True)
    for _ in range(2):
        got = run_xformers(*qkv(segments), segments, 0.3)
        torch.testing.assert_close(got, run_reference(*qkv(segments), segments, 0.3))
    assert len(built) == 1


@pytest.mark.parametrize("is_causal", [True, False])
def test_varlen_gets_lengths_scale_and_causality(monkeypatch: pytest.MonkeyPatch, is_causal: bool) -> None:
    def varlen_attn(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_q: Tensor,
        cu_k: Tensor,
        max_q: int,
        max_k: int,
        *,
        scale: float,
        window_size: tuple[int, int],
        enable_gqa: bool = False,
    ) -> Tensor:
        assert (max_q, max_k, enable_gqa) == (3, 5, True)
        segments = Segments.of(cu_q.diff().tolist(), cu_k.diff().tolist(), is_causal=window_size == (-1, 0))
        return run_reference(q, k, v, segments, scale)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    segments = Segments.of([3, 0, 2, 2], [5, 1, 2, 2], is_causal=is_causal)
    got = run_varlen(*qkv(), segments, 0.3)
    torch.testing.assert_close(got, run_reference(*qkv(), segments, 0.3))


def test_varlen_accepts_these_arguments_in_the_installed_torch() -> None:
    with FakeTensorMode():
        segments = Segments.of([3, 0, 2, 2], [5, 1, 2, 2], is_causal=True)
        query, key, value = (
            torch.empty(n, h, 8, dtype=torch.bfloat16) for n, h in ((7, 4), (10, 2), (10, 2))
        )
        assert run_varlen(query, key, value, segments, 0.3).shape == (7, 4, 8)
