"""Phi with normalised queries and keys, over packed rows; masks are lists of blocks, never tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reca.layers.attention import Segments, attention
from reca.layers.mlp import MLP
from reca.layers.rotary import apply_rotary
from reca.models.showo.config import PhiConfig
from reca.models.showo.sequence import Block
from reca.types import TensorStruct


@dataclass(frozen=True, slots=True)
class View(TensorStruct):
    """Queries of one kind, and the stored blocks that each segment of them sees."""

    segments: Segments
    sees: tuple[tuple[int, ...], ...]

    def gather(self, blocks: Sequence[Tensor]) -> Tensor:
        """[key rows, ...]: keys or values segment by segment."""
        return torch.cat([blocks[index] for seen in self.sees for index in seen])


@dataclass(frozen=True, slots=True)
class Plan(TensorStruct):
    """Who sees whom: the query rows are [those of `full`; those of `causal`]."""

    full: View
    causal: View

    @classmethod
    def of(
        cls,
        lengths: Sequence[int],
        queries: Sequence[tuple[int, tuple[int, ...], bool]],
    ) -> Self:
        """A plan over stored blocks of these lengths.

        Args:
            lengths: rows of each stored block.
            queries: (query rows, blocks seen, whether causal) of each segment, full ones first.
        """
        views = []
        for is_causal in (False, True):
            chosen = [(rows, seen) for rows, seen, causal in queries if causal == is_causal]
            keys = [sum(lengths[index] for index in seen) for _, seen in chosen]
            segments = Segments.of([rows for rows, _ in chosen], keys, is_causal=is_causal)
            views.append(View(segments, tuple(seen for _, seen in chosen)))
        return cls(*views)

    def attend(self, query: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], backend: str) -> Tensor:
        """[query rows, heads, head_dim] of queries in the plan's order; keys and values block by block."""
        rows = self.full.segments.query_rows
        outputs = [
            attention(part, view.gather(keys), view.gather(values), view.segments, backend=backend)
            for part, view in ((query[:rows], self.full), (query[rows:], self.causal))
            if part.shape[0]
        ]
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0] if outputs else query


@dataclass(frozen=True, slots=True)
class Layout(TensorStruct):
    """How the rows of a microbatch are stored: full blocks, then causal ones, kind by kind.

    Attributes:
        lengths: rows of each stored block.
        order: (sample, block of its sequence) of each stored block.
        plan: who sees whom, for all rows.
        token_ids: [rows] int64, negative where no token stands yet.
        positions: [rows] int64.
    """

    lengths: tuple[int, ...]
    order: tuple[tuple[int, int], ...]
    plan: Plan
    token_ids: Tensor
    positions: Tensor

    @classmethod
    def of(cls, samples: Sequence[Sequence[Block]]) -> Self:
        """The layout of these sequences, on the CPU. Equal kinds stand together: one launch serves them."""
        order = [
            (sample, index)
            for is_causal in (False, True)
            for index in range(max(len(blocks) for blocks in samples))
            for sample, blocks in enumerate(samples)
            if index < len(blocks) and blocks[index].rows and blocks[index].is_causal == is_causal
        ]
        stored = [samples[sample][index] for sample, index in order]
        place = {key: number for number, key in enumerate(order)}
        lengths = [block.rows for block in stored]
        queries = [
            (
                block.rows,
                tuple(place[sample, seen] for seen in block.sees if (sample, seen) in place),
                block.is_causal,
            )
            for (sample, _), block in zip(order, stored, strict=True)
        ]
        return cls(
            tuple(lengths),
            tuple(order),
            Plan.of(lengths, queries),
            token_ids=torch.tensor([token for block in stored for token in block.ids]),
            positions=torch.tensor([position for block in stored for position in block.positions]),
        )

    def start(self, sample: int, block: int) -> int:
        """Row at which a block of a sample is stored."""
        return sum(self.lengths[: self.order.index((sample, block))])

    def seen_by(self, sample: int, block: int) -> tuple[int, ...]:
        """Stored blocks that a block sees."""
        number = self.order.index((sample, block))
        sees = (*self.plan.full.sees, *self.plan.causal.sees)
        return sees[number]


@dataclass(frozen=True, slots=True)
class Chosen(TensorStruct):
    """The rows that the last layer has to compute.

    Attributes:
        rows: [chosen] int64, stored rows in the order of the plan's queries.
        plan: what they see.
    """

    rows: Tensor
    plan: Plan


class DecoderLayer(nn.Module):
    """One layer: a single norm feeds attention and MLP, whose sum joins the residual stream.

        h = norm(x);    x + (dense(attention(h)) + mlp(h))

    Weights: qkv rows are [query; key; value]. Every linear layer has a bias. Queries and keys pass a
    LayerNorm over the head that all heads share, then the rotation of part of their channels.
    """

    def __init__(self, config: PhiConfig) -> None:
        super().__init__()
        dim, eps = config.hidden_size, config.layer_norm_eps
        self.head_dim = config.head_dim
        self.attention_backend = "auto"
        self.input_layernorm = nn.LayerNorm(dim, eps)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_layernorm = nn.LayerNorm(self.head_dim, eps)
        self.k_layernorm = nn.LayerNorm(self.head_dim, eps)
        self.dense = nn.Linear(dim, dim)
        self.mlp = MLP(dim, config.intermediate_size)

    def forward(
        self, hidden: Tensor, layout: Layout, rotation: tuple[Tensor, Tensor], chosen: Chosen | None = None
    ) -> Tensor:
        """Advance the residual stream.

        Args:
            hidden: [rows, dim].
            layout: of these rows.
            rotation: cosines and sines of `layout.positions`.
            chosen: rows to compute; None computes all. The others give keys and values only.

        Returns: [rows, dim], or [chosen rows, dim].
        """
        normed = self.input_layernorm(hidden)
        plan, turn = layout.plan, rotation
        if chosen is None:
            query, key, value = self.qkv(normed).chunk(3, dim=-1)
        else:
            weight, bias, dim = self.qkv.weight, self.qkv.bias, hidden.shape[-1]
            key, value = F.linear(normed, weight[dim:], bias[dim:]).chunk(2, dim=-1)
            hidden, normed = hidden.index_select(0, chosen.rows), normed.index_select(0, chosen.rows)
            query = F.linear(normed, weight[:dim], bias[:dim])
            plan, turn = chosen.plan, (rotation[0][chosen.rows], rotation[1][chosen.rows])
        value = value.unflatten(-1, (-1, self.head_dim))
        query = self._turn(query, self.q_layernorm, turn).to(value.dtype)
        key = self._turn(key, self.k_layernorm, rotation).to(value.dtype)
        attended = plan.attend(
            query, key.split(layout.lengths), value.split(layout.lengths), self.attention_backend
        )
        output: Tensor = hidden + (self.dense(attended.flatten(1)) + self.mlp(normed))
        return output

    def _turn(self, rows: Tensor, norm: nn.Module, rotation: tuple[Tensor, Tensor]) -> Tensor:
        return apply_rotary(norm(rows.unflatten(-1, (-1, self.head_dim))), *rotation)
