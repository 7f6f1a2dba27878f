"""Phi with normalised queries and keys, over packed rows; masks are lists of blocks, never tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reca.kernels import Impl, qk_norm_rope, qk_norm_rope_spread
from reca.layers.attention import attention
from reca.layers.implementation import activation_dtype
from reca.layers.mlp import MLP
from reca.layers.norm import LayerNorm
from reca.layers.segments import Segments
from reca.models.showo.config import PhiConfig
from reca.models.showo.sequence import Block
from reca.types import TensorStruct

Heads = tuple[Tensor, Tensor, Tensor]
"""Query, key and value of one attention call: [rows, heads, head_dim] each."""


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
    """Who sees whom: the query rows are [those of `full`; those of `causal`].

    What several segments see lies once in each of them, where attention reads it.

    Attributes:
        full, causal: the two attention calls; one of them may be empty.
        places: [stored rows, copies] int64, where each row's key and value lie among the keys of both calls;
            -1 is nowhere.
    """

    full: View
    causal: View
    places: Tensor

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
        full, causal = views
        return cls(full, causal, _places(lengths, [*full.pieces, *causal.pieces]))

    @property
    def views(self) -> tuple[View, ...]:
        """Those that have queries; at least one."""
        return tuple(view for view in (self.full, self.causal) if view.segments.query_rows) or (self.full,)

    @property
    def query_rows(self) -> list[int]:
        """Query rows of each view."""
        return [view.segments.query_rows for view in self.views]

    @property
    def key_rows(self) -> list[int]:
        """Key rows of each view."""
        return [view.segments.key_rows for view in self.views]

    def attend(self, heads: Sequence[Heads], backend: str) -> Tensor:
        """[query rows, heads, head_dim] from query, key and value of each view."""
        outputs = [
            attention(*rows, view.segments, backend=backend)
            for rows, view in zip(heads, self.views, strict=True)
        ]
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


def _places(lengths: Sequence[int], pieces: Sequence[int]) -> Tensor:
    """[rows, copies]: where each row of these blocks stands in the list of blocks `pieces`."""
    stands: list[list[Tensor]] = [[] for _ in lengths]
    total = sum(lengths[index] for index in pieces)
    for index, rows in zip(pieces, torch.arange(total).split([lengths[i] for i in pieces]), strict=True):
        stands[index].append(rows)
    copies = max([1, *map(len, stands)])
    nowhere = torch.full((max(lengths),), -1)
    return torch.cat(
        [
            torch.stack([*found, *[nowhere[:rows]] * (copies - len(found))], dim=1)
            for found, rows in zip(stands, lengths, strict=True)
        ]
    )


@dataclass(frozen=True, slots=True)
class Layout(TensorStruct):
    """How the rows of a microbatch are stored: full blocks kind by kind, then causal ones sample by sample.

    Attributes:
        lengths: rows of each stored block.
        order: (sample, block of its sequence) of each stored block.
        sees: stored blocks that each stored block sees.
        plan: who sees whom, for all rows.
        token_ids: [rows] int64, negative where no token stands yet.
        positions: [rows] int64.
    """

    lengths: tuple[int, ...]
    order: tuple[tuple[int, int], ...]
    sees: tuple[tuple[int, ...], ...]
    plan: Plan
    token_ids: Tensor
    positions: Tensor

    @classmethod
    def of(cls, samples: Sequence[Sequence[Block]]) -> Self:
        """The layout of these sequences, on the CPU. Equal kinds stand together: one launch serves them.

        A causal block that sees what the one before it saw, and that one, continues its segment.
        """
        full, causal = (
            [
                (sample, index)
                for sample, blocks in enumerate(samples)
                for index, block in enumerate(blocks)
                if block.rows and block.is_causal == is_causal
            ]
            for is_causal in (False, True)
        )
        order = [*sorted(full, key=lambda place: place[::-1]), *causal]
        stored = [samples[sample][index] for sample, index in order]
        number_of = {place: number for number, place in enumerate(order)}
        lengths = [block.rows for block in stored]
        sees, queries = [], list[tuple[int, tuple[int, ...], bool]]()
        for number, ((sample, _), block) in enumerate(zip(order, stored, strict=True)):
            seen = tuple(number_of[sample, i] for i in block.sees if (sample, i) in number_of)
            sees.append(seen)
            continues = bool(queries) and queries[-1][2] and seen == (*queries[-1][1], number)
            rows = queries.pop()[0] if continues else 0
            queries.append((rows + block.rows, seen, block.is_causal))
        return cls(
            tuple(lengths),
            tuple(order),
            tuple(sees),
            Plan.of(lengths, queries),
            token_ids=torch.tensor([token for block in stored for token in block.ids]),
            positions=torch.tensor([position for block in stored for position in block.positions]),
        )

    def start(self, sample: int, block: int) -> int:
        """Row at which a block of a sample is stored."""
        return sum(self.lengths[: self.order.index((sample, block))])

    def seen_by(self, sample: int, block: int) -> tuple[int, ...]:
        """Stored blocks that a block sees."""
        return self.sees[self.order.index((sample, block))]


@dataclass(frozen=True, slots=True)
class Chosen(TensorStruct):
    """The rows that the last layer has to compute.

    Attributes:
        rows: [chosen] int64, stored rows in the order of the plan's queries.
        plan: what they see.
    """

    rows: Tensor
    plan: Plan


class Stream(NamedTuple):
    """A residual stream whose last sum is left to the norm that reads it, which forms it in the same pass.

    Attributes:
        residual: [rows, dim].
        deltas: [rows, dim] each, what attention and MLP of the last layer add; none before the first.
    """

    residual: Tensor
    deltas: tuple[Tensor, ...] = ()

    @property
    def rows(self) -> Tensor:
        """[rows, dim]: the sum."""
        return self.residual + (self.deltas[0] + self.deltas[1]) if self.deltas else self.residual


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
        self.input_layernorm = LayerNorm(dim, eps)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_layernorm = nn.LayerNorm(self.head_dim, eps)
        self.k_layernorm = nn.LayerNorm(self.head_dim, eps)
        self.dense = nn.Linear(dim, dim)
        self.mlp = MLP(dim, config.intermediate_size)

    def forward(
        self,
        stream: Stream,
        layout: Layout,
        rotation: tuple[Tensor, Tensor],
        chosen: Chosen | None = None,
    ) -> Stream:
        """Advance the residual stream.

        Args:
            stream: [rows, dim].
            layout: of these rows.
            rotation: cosines and sines of `layout.positions`.
            chosen: rows to compute; None computes all. The others give keys and values only.

        Returns: [rows, dim], or [chosen rows, dim].
        """
        # The two readers send their gradients apart, and the norm's backward adds them.
        dtype = activation_dtype(self.qkv.weight)
        hidden, normed, fed = self.input_layernorm.add(*stream, dtype=dtype, readers=2)
        if chosen is None:
            plan = layout.plan
            calls = self._calls(self.qkv(normed), rotation, plan, plan.query_rows)
        else:
            plan = chosen.plan
            hidden, fed = hidden.index_select(0, chosen.rows), fed.index_select(0, chosen.rows)
            calls = self._chosen_calls(normed, fed, rotation, chosen)
        attended = plan.attend(calls, self.attention_backend)
        return Stream(hidden, (self.dense(attended.flatten(1)), self.mlp(fed)))

    def _calls(
        self, projected: Tensor, rotation: tuple[Tensor, Tensor], plan: Plan, query_rows: Sequence[int]
    ) -> list[Heads]:
        """Heads for each view of the plan; rows without queries have two thirds of the width."""
        kv_heads = self.qkv.in_features // self.head_dim
        heads = projected.shape[1] // self.head_dim - 2 * kv_heads
        cos, sin = rotation
        rows: Any = {"query_rows": query_rows, "key_rows": plan.key_rows, "destinations": plan.places}
        return qk_norm_rope_spread(
            projected, cos=cos, sin=sin, heads=heads, kv_heads=kv_heads, **rows, **self._norms()
        )

    def _chosen_calls(
        self, normed: Tensor, normed_chosen: Tensor, rotation: tuple[Tensor, Tensor], chosen: Chosen
    ) -> list[Heads]:
        """Heads for each view: queries of the chosen rows, keys and values of all."""
        plan, dim = chosen.plan, normed.shape[1]
        weights, biases = (part.split([dim, 2 * dim]) for part in (self.qkv.weight, self.qkv.bias))
        no_queries = [len(normed), *[0] * (len(plan.views) - 1)]
        stored = self._calls(F.linear(normed, weights[1], biases[1]), rotation, plan, no_queries)
        cos, sin = (angles.index_select(0, chosen.rows) for angles in rotation)
        projected = F.linear(normed_chosen, weights[0], biases[0])
        heads = dim // self.head_dim
        queries, *_ = qk_norm_rope(projected, cos=cos, sin=sin, heads=heads, kv_heads=0, **self._norms())
        parts = queries.split(plan.query_rows)
        return [(query, key, value) for query, (_, key, value) in zip(parts, stored, strict=True)]

    def _norms(self) -> dict[str, Any]:
        """What turns the heads of query and key, but for the angles."""
        return {
            "query_weight": self.q_layernorm.weight,
            "key_weight": self.k_layernorm.weight,
            "query_bias": self.q_layernorm.bias,
            "key_bias": self.k_layernorm.bias,
            "eps": self.q_layernorm.eps,
            "impl": self.kernels,
        }
