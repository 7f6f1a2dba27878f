"""The frozen language model over prompts and meta-queries, and the connector behind it.

Queries follow their prompt under a causal mask, so prompts never see them: the prompt runs without gradient,
and only the rows of the queries are differentiated, against the keys and values of the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reca.kernels import Impl, qk_norm_rope
from reca.layers.attention import attention
from reca.layers.mlp import MLP, SwiGLU
from reca.layers.norm import LayerNorm, RMSNorm
from reca.layers.segments import Segments
from reca.layers.stream import Stream
from reca.models.openuni.config import ConnectorConfig, LLMConfig
from reca.types import TensorStruct

Rotation = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class Layout(TensorStruct):
    """Rows of each sample and who sees whom; prompts and queries are stored apart.

    Attributes:
        lengths: prompt rows of each sample.
        prompts: prompt rows among themselves, causal; empty segments of queries skip the keys of the others.
        queries: query rows over their prompt and the queries before them, causal.
        connector: query rows of a sample among themselves, all of them.
        prompt_positions, query_positions: [rows] int64, rotary positions; queries continue their prompt.
        prompt_places, query_places: [rows] int64, where keys and values lie: each prompt before its queries.
    """

    lengths: tuple[int, ...]
    prompts: Segments
    queries: Segments
    connector: Segments
    prompt_positions: Tensor
    query_positions: Tensor
    prompt_places: Tensor
    query_places: Tensor

    @classmethod
    def of(cls, prompt_lengths: Sequence[int], num_queries: int) -> Self:
        """The layout of samples with these prompts, each followed by `num_queries` queries; on the CPU."""
        queries = [num_queries] * len(prompt_lengths)
        positions = [torch.arange(length + num_queries) for length in prompt_lengths]
        parts = [part for length in prompt_lengths for part in (length, num_queries)]
        blocks = torch.arange(sum(parts)).split(parts)
        return cls(
            tuple(prompt_lengths),
            prompts=Segments.of([part for n in prompt_lengths for part in (n, 0)], parts, is_causal=True),
            queries=Segments.of(queries, [length + num_queries for length in prompt_lengths], is_causal=True),
            connector=Segments.of(queries),
            prompt_positions=torch.cat([position[:-num_queries] for position in positions]),
            query_positions=torch.cat([position[-num_queries:] for position in positions]),
            prompt_places=torch.cat(blocks[0::2]),
            query_places=torch.cat(blocks[1::2]),
        )

    @property
    def num_samples(self) -> int:
        """Samples of the layout."""
        return len(self.lengths)


class DecoderLayer(nn.Module):
    """One frozen layer: grouped-query attention with rotary positions, SwiGLU, both pre-norm.

    Weights: qkv rows are [query; key; value] with biases; `o` and the MLP have none.

    Args:
        config: the shape of the language model.
        is_last: of the prompt rows only keys and values are needed; they leave the layer as they came.
    """

    def __init__(self, config: LLMConfig, *, is_last: bool) -> None:
        super().__init__()
        dim, eps = config.hidden_size, config.rms_norm_eps
        self.is_last = is_last
        self.attention_backend = "auto"
        self.kernels: Impl = "auto"
        self.head_dim = config.head_dim
        self.heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
        self.input_norm = RMSNorm(dim, eps)
        self.qkv = nn.Linear(dim, sum(self.heads) * self.head_dim)
        self.o = nn.Linear(dim, dim, bias=False)
        self.post_norm = RMSNorm(dim, eps)
        self.mlp = SwiGLU(dim, config.intermediate_size)

    def forward(
        self,
        prompts: Stream,
        queries: Stream,
        layout: Layout,
        rotations: tuple[Rotation, Rotation],
    ) -> tuple[Stream, Stream]:
        """Advance both streams.

        Args:
            prompts: of [prompt rows, dim]; no gradient passes through them.
            queries: of [query rows, dim].
            layout: rows of each sample.
            rotations: cosines and sines of the prompts' and of the queries' positions.

        Returns: both streams after the layer.
        """
        normed, query_rows = queries.read(self.input_norm)
        projected = self.qkv(normed)
        places = len(layout.prompt_places) + len(layout.query_places)
        buffers = tuple(projected.new_empty(places, self.heads[1], self.head_dim) for _ in range(2))
        with torch.no_grad():
            normed, prompt_rows = prompts.read(self.input_norm)
            skipped = self.heads[0] * self.head_dim if self.is_last else 0
            projected_prompts = F.linear(normed, self.qkv.weight[skipped:], self.qkv.bias[skipped:])
            prompt_query, *_ = self._turn(projected_prompts, rotations[0], buffers, layout.prompt_places)
        query, keys, values = self._turn(projected, rotations[1], buffers, layout.query_places)
        attended = attention(query, keys, values, layout.queries, backend=self.attention_backend)
        queries = self._finish(query_rows, attended)
        # last, so that recomputing this layer stops before it: the backward pass needs nothing of it
        if not self.is_last:
            with torch.no_grad():
                attended = attention(
                    prompt_query, keys, values, layout.prompts, backend=self.attention_backend
                )
                prompts = self._finish(prompt_rows, attended)
        return prompts, queries

    def _turn(
        self, projected: Tensor, rotation: Rotation, buffers: tuple[Tensor, ...], places: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Query heads of projected rows, and the buffers with their keys and values; no norm, no eps."""
        kv_heads, (keys, values) = self.heads[1], buffers
        return qk_norm_rope(
            projected,
            None,
            None,
            *rotation,
            heads=projected.shape[1] // self.head_dim - 2 * kv_heads,
            kv_heads=kv_heads,
            eps=0.0,
            into=(keys, values, places),
            impl=self.kernels,
        )

    def _finish(self, hidden: Tensor, attended: Tensor) -> Stream:
        normed, hidden = self.post_norm.add(self.o(attended.flatten(1)), hidden)
        return Stream(hidden, self.mlp(normed))


class ConnectorLayer(nn.Module):
    """One pre-norm layer over the queries of a sample: no positions, no mask."""

    def __init__(self, config: ConnectorConfig) -> None:
        super().__init__()
        dim = config.hidden_size
        self.head_dim = config.head_dim
        self.attention_backend = "auto"
        self.norm1 = LayerNorm(dim, eps=config.layer_norm_eps)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.norm2 = LayerNorm(dim, eps=config.layer_norm_eps)
        self.mlp = MLP(dim, config.intermediate_size)
        for linear in (self.qkv, self.out, self.mlp.fc1, self.mlp.fc2):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.normal_(linear.bias, std=1e-6)
        nn.init.zeros_(self.qkv.bias)
        nn.init.zeros_(self.out.bias)

    def forward(self, stream: Stream, samples: Segments) -> Stream:
        """Advance [query rows, dim]."""
        normed, hidden = stream.read(self.norm1)
        query, key, value = self.qkv(normed).unflatten(-1, (3, -1, self.head_dim)).unbind(1)
        attended = attention(query, key, value, samples, backend=self.attention_backend)
        normed, hidden = Stream(hidden, self.out(attended.flatten(1))).read(self.norm2)
        return Stream(hidden, self.mlp(normed))


class Connector(nn.Module):
    """The trained encoder between query states and captions; it has no final norm."""

    def __init__(self, config: ConnectorConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(ConnectorLayer(config) for _ in range(config.num_hidden_layers))

    def forward(self, hidden: Tensor, samples: Segments) -> Tensor:
        """[query rows, dim] -> [query rows, dim]; rows of each sample see one another."""
        stream = Stream(hidden)
        for layer in self.layers:
            stream = layer(stream, samples)
        return stream.rows
