"""Phi with normalised queries and keys, over packed rows; masks are lists of blocks, never tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from reca.kernels import Impl, qk_norm_rope
from reca.layers.attention import Segments, attention
from reca.layers.implementation import activation_dtype
from reca.layers.mlp import MLP
from reca.models.showo.config import PhiConfig
from reca.models.showo.sequence import Block
from reca.types import TensorStruct


class GatherBlocks(torch.autograd.Function):
    """Keys and values of stored blocks, put together for several views; a block may stand many times.

    The gradients of a block's copies are added list by list: all first copies at once, then all second ones.
    """

    @staticmethod
    def forward(
        ctx: Any, key: Tensor, value: Tensor, lengths: tuple[int, ...], views: tuple[tuple[int, ...], ...]
    ) -> tuple[Tensor, ...]:
        """(keys, values) of each view, one after another: [rows of its blocks, ...]."""
        ctx.lengths, ctx.views = lengths, views
        blocks = key.split(lengths), value.split(lengths)
        return tuple(torch.cat([kind[i] for i in view]) for view in views for kind in blocks)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Sum over the copies of each block, in their order."""
        rounds: list[tuple[list[Tensor], list[Tensor]]] = []
        sums = []
        for kind in (gradients[::2], gradients[1::2]):
            copies: list[list[Tensor]] = [[] for _ in ctx.lengths]
            for view, gradient in zip(ctx.views, kind, strict=True):
                for index, piece in zip(view, gradient.split([ctx.lengths[i] for i in view]), strict=True):
                    copies[index].append(piece)
            shape = kind[0].shape[1:]
            total = torch.cat(
                [
                    found[0] if found else kind[0].new_zeros(rows, *shape)
                    for found, rows in zip(copies, ctx.lengths, strict=True)
                ]
            )
            sums.append(total)
            for into, found in zip(total.split(ctx.lengths), copies, strict=True):
                for number, piece in enumerate(found[1:]):
                    if number == len(rounds):
                        rounds.append(([], []))
                    rounds[number][0].append(into)
                    rounds[number][1].append(piece)
        for into_blocks, pieces in rounds:
            torch._foreach_add_(into_blocks, pieces)
        return sums[0], sums[1], None, None


@dataclass(frozen=True, slots=True)
class View(TensorStruct):
    """Queries of one kind, and the stored blocks that each segment of them sees."""

    segments: Segments
    sees: tuple[tuple[int, ...], ...]

    @property
    def pieces(self) -> tuple[int, ...]:
        """Stored blocks in the order in which their keys are attended to, segment by segment."""
        return tuple(index for seen in self.sees for index in seen)


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

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...], backend: str
    ) -> Tensor:
        """[query rows, heads, head_dim] of queries in the plan's order; `lengths`: of the stored blocks."""
        views = (self.full, self.causal)
        queries = query.split([view.segments.query_rows for view in views])
        parts = [(part, view) for part, view in zip(queries, views, strict=True) if part.shape[0]]
        gathered = GatherBlocks.apply(key, value, lengths, tuple(view.pieces for _, view in parts))  # type: ignore[no-untyped-call]
        pairs = zip(gathered[::2], gathered[1::2], strict=True)
        outputs = [
            attention(part, keys, values, view.segments, backend=backend)
            for (part, view), (keys, values) in zip(parts, pairs, strict=True)
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
        self.kernels: Impl = "auto"
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
        # Autocast leaves the norm in fp32 and would round it twice, once for each layer that reads it.
        normed = self.input_layernorm(hidden).to(activation_dtype(self.qkv.weight))
        heads = hidden.shape[-1] // self.head_dim
        plan = layout.plan
        if chosen is None:
            query, key, value = self._turn(self.qkv(normed), rotation, heads, heads)
        else:
            weight, bias, dim = self.qkv.weight, self.qkv.bias, hidden.shape[-1]
            projected = F.linear(normed, weight[dim:], bias[dim:])
            _, key, value = self._turn(projected, rotation, 0, heads)
            hidden, normed = hidden.index_select(0, chosen.rows), normed.index_select(0, chosen.rows)
            turn = (rotation[0].index_select(0, chosen.rows), rotation[1].index_select(0, chosen.rows))
            query = self._turn(F.linear(normed, weight[:dim], bias[:dim]), turn, heads, 0)[0]
            plan = chosen.plan
        attended = plan.attend(query, key, value, layout.lengths, self.attention_backend)
        output: Tensor = hidden + (self.dense(attended.flatten(1)) + self.mlp(normed))
        return output

    def _turn(
        self, projected: Tensor, rotation: tuple[Tensor, Tensor], heads: int, kv_heads: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value heads of projected rows, normalised and rotated."""
        return qk_norm_rope(
            projected,
            self.q_layernorm.weight,
            self.k_layernorm.weight,
            *rotation,
            heads=heads,
            kv_heads=kv_heads,
            eps=self.q_layernorm.eps,
            query_bias=self.q_layernorm.bias,
            key_bias=self.k_layernorm.bias,
            impl=self.kernels,
        )
