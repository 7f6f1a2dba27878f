"""Llama over packed rows: causal, without padding, its last layer only for rows that predict something."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reca.kernels import Impl, qk_norm_rope
from reca.layers.attention import attention
from reca.layers.mlp import SwiGLU
from reca.layers.norm import RMSNorm
from reca.layers.segments import Segments
from reca.layers.stream import Stream
from reca.models.janus.config import TextConfig
from reca.types import TensorStruct


@dataclass(frozen=True, slots=True)
class Layout(TensorStruct):
    """Rows of the samples of a microbatch, one sample after another.

    Attributes:
        lengths: rows of each sample; 0 where nothing is predicted.
        tails: its last rows, from the first that predicts something on.
        samples: causal segments of all rows.
        ends: causal segments of the tails over their samples.
        tail_rows: [tail rows] int64.
        positions: [rows] int64, rotary positions, from 0 in each sample.
    """

    lengths: tuple[int, ...]
    tails: tuple[int, ...]
    samples: Segments
    ends: Segments
    tail_rows: Tensor
    positions: Tensor

    @classmethod
    def of(cls, lengths: Sequence[int], tails: Sequence[int]) -> Self:
        """The layout of samples with these lengths and tails, on the CPU."""
        stops = itertools.accumulate(lengths)
        rows = [torch.arange(stop - tail, stop) for stop, tail in zip(stops, tails, strict=True)]
        return cls(
            tuple(lengths),
            tuple(tails),
            samples=Segments.of(tuple(lengths), is_causal=True),
            ends=Segments.of(tuple(tails), tuple(lengths), is_causal=True),
            tail_rows=torch.cat(rows),
            positions=torch.cat([torch.arange(length) for length in lengths]),
        )


class DecoderLayer(nn.Module):
    """One layer: attention, then the gated block, each behind a norm.

    Weights: qkv rows are [query; key; value]; no biases.

    Args:
        config: the shape.
        is_last: keys and values of all rows, but only the tails leave the layer.
    """

    def __init__(self, config: TextConfig, *, is_last: bool) -> None:
        super().__init__()
        dim, eps = config.hidden_size, config.rms_norm_eps
        self.is_last = is_last
        self.head_dim = config.head_dim
        self.heads = config.num_attention_heads
        self.attention_backend = "auto"
        self.kernels: Impl = "auto"
        self.input_norm = RMSNorm(dim, eps)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.o = nn.Linear(dim, dim, bias=False)
        self.post_norm = RMSNorm(dim, eps)
        self.mlp = SwiGLU(dim, config.intermediate_size)

    def forward(self, stream: Stream, layout: Layout, rotation: tuple[Tensor, Tensor]) -> Stream:
        """Advance the residual stream.

        Args:
            stream: of [rows, dim].
            layout: of these rows.
            rotation: cosines and sines of `layout.positions`.

        Returns: [rows, dim]; [tail rows, dim] from the last layer.
        """
        if not self.is_last:
            query, key, value, hidden = self.project(stream, rotation)
            attended = attention(query, key, value, layout.samples, backend=self.attention_backend)
            return self.finish(hidden, attended)
        normed, hidden = stream.read(self.input_norm)
        dim, tails = hidden.shape[-1], layout.tail_rows
        _, key, value = self._turn(F.linear(normed, self.qkv.weight[dim:]), rotation, 0, self.heads)
        query = F.linear(normed.index_select(0, tails), self.qkv.weight[:dim])
        turn = rotation[0].index_select(0, tails), rotation[1].index_select(0, tails)
        query = self._turn(query, turn, self.heads, 0)[0]
        attended = attention(query, key, value, layout.ends, backend=self.attention_backend)
        return self.finish(hidden.index_select(0, tails), attended)

    def project(
        self, stream: Stream, rotation: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Query, key, value, each [rows, heads, head_dim], the first two rotated; and the stream's rows."""
        normed, hidden = stream.read(self.input_norm)
        return *self._turn(self.qkv(normed), rotation, self.heads, self.heads), hidden

    def finish(self, hidden: Tensor, attended: Tensor) -> Stream:
        """Residual stream after attention output [rows, heads, head_dim] and the gated block."""
        normed, hidden = self.post_norm.add(self.o(attended.flatten(1)), hidden)
        return Stream(hidden, self.mlp(normed))

    def _turn(
        self, projected: Tensor, rotation: tuple[Tensor, Tensor], heads: int, kv_heads: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value heads of projected rows; no norm, so eps has no use."""
        return qk_norm_rope(
            projected, None, None, *rotation, heads=heads, kv_heads=kv_heads, eps=0.0, impl=self.kernels
        )
