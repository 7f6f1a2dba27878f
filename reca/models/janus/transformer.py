"""Llama over packed rows: causal, without padding, its last layer only for rows that predict something."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reca.layers.attention import Segments, attention
from reca.layers.mlp import SwiGLU
from reca.layers.norm import RMSNorm
from reca.layers.rotary import apply_rotary
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
        self.attention_backend = "auto"
        self.input_norm = RMSNorm(dim, eps)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.o = nn.Linear(dim, dim, bias=False)
        self.post_norm = RMSNorm(dim, eps)
        self.mlp = SwiGLU(dim, config.intermediate_size)

    def forward(self, hidden: Tensor, layout: Layout, rotation: tuple[Tensor, Tensor]) -> Tensor:
        """Advance the residual stream.

        Args:
            hidden: [rows, dim].
            layout: of these rows.
            rotation: cosines and sines of `layout.positions`.

        Returns: [rows, dim]; [tail rows, dim] from the last layer.
        """
        if not self.is_last:
            query, key, value = self.project(hidden, rotation)
            attended = attention(query, key, value, layout.samples, backend=self.attention_backend)
            return self.finish(hidden, attended)
        normed, dim = self.input_norm(hidden), hidden.shape[-1]
        key, value = self._heads(F.linear(normed, self.qkv.weight[dim:])).chunk(2, dim=1)
        tails = layout.tail_rows
        query = self._heads(F.linear(normed.index_select(0, tails), self.qkv.weight[:dim]))
        query = apply_rotary(query, rotation[0][tails], rotation[1][tails])
        key = apply_rotary(key, *rotation)
        attended = attention(query, key, value, layout.ends, backend=self.attention_backend)
        return self.finish(hidden.index_select(0, tails), attended)

    def project(self, hidden: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """[rows, dim] -> query, key, value, each [rows, heads, head_dim]; the first two are rotated."""
        query, key, value = self._heads(self.qkv(self.input_norm(hidden))).chunk(3, dim=1)
        return apply_rotary(query, *rotation), apply_rotary(key, *rotation), value

    def finish(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """Residual stream after attention output [rows, heads, head_dim] and the gated block."""
        hidden = hidden + self.o(attended.flatten(1))
        output: Tensor = hidden + self.mlp(self.post_norm(hidden))
        return output

    def _heads(self, rows: Tensor) -> Tensor:
        return rows.unflatten(-1, (-1, self.head_dim))
