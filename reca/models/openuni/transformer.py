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
from reca.layers.attention import Segments, attention
from reca.layers.mlp import MLP, SwiGLU
from reca.layers.norm import RMSNorm
from reca.models.openuni.config import ConnectorConfig, LLMConfig
from reca.types import TensorStruct

Rotation = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class Layout(TensorStruct):
    """Rows of each sample and who sees whom; prompts and queries are stored apart.

    Attributes:
        prompts: prompt rows among themselves, causal.
        queries: query rows over their prompt and the queries before them, causal.
        connector: query rows of a sample among themselves, all of them.
        prompt_positions, query_positions: [rows] int64, rotary positions; queries continue their prompt.
    """

    prompts: Segments
    queries: Segments
    connector: Segments
    prompt_positions: Tensor
    query_positions: Tensor

    @classmethod
    def of(cls, prompt_lengths: Sequence[int], num_queries: int) -> Self:
        """The layout of samples with these prompts, each followed by `num_queries` queries; on the CPU."""
        queries = [num_queries] * len(prompt_lengths)
        positions = [torch.arange(length + num_queries) for length in prompt_lengths]
        return cls(
            prompts=Segments.of(prompt_lengths, is_causal=True),
            queries=Segments.of(queries, [length + num_queries for length in prompt_lengths], is_causal=True),
            connector=Segments.of(queries),
            prompt_positions=torch.cat([position[:-num_queries] for position in positions]),
            query_positions=torch.cat([position[-num_queries:] for position in positions]),
        )

    @property
    def num_samples(self) -> int:
        """Samples of the layout."""
        return len(self.prompts.query_lengths)

    def join(self, prompts: Tensor, queries: Tensor) -> Tensor:
        """[prompt rows, ...], [query rows, ...] -> both, sample by sample: what queries see."""
        parts = zip(
            prompts.split(self.prompts.query_lengths), queries.split(self.queries.query_lengths), strict=True
        )
        return torch.cat([piece for part in parts for piece in part])


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
        prompts: Tensor,
        queries: Tensor,
        layout: Layout,
        rotations: tuple[Rotation, Rotation],
    ) -> tuple[Tensor, Tensor]:
        """Advance both streams.

        Args:
            prompts: [prompt rows, dim]; no gradient passes through them.
            queries: [query rows, dim].
            layout: rows of each sample.
            rotations: cosines and sines of the prompts' and of the queries' positions.

        Returns: both streams after the layer.
        """
        with torch.no_grad():
            prompt_query, prompt_key, prompt_value = self._project_prompts(prompts, rotations[0])
        query, key, value = self._project(queries, rotations[1])
        keys, values = layout.join(prompt_key, key), layout.join(prompt_value, value)
        attended = attention(query, keys, values, layout.queries, backend=self.attention_backend)
        queries = self._finish(queries, attended)
        # last, so that recomputing this layer stops before it: the backward pass needs nothing of it
        if prompt_query is not None:
            with torch.no_grad():
                attended = attention(
                    prompt_query, prompt_key, prompt_value, layout.prompts, backend=self.attention_backend
                )
                prompts = self._finish(prompts, attended)
        return prompts, queries

    def _project(self, hidden: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        return self._turn(self.qkv(self.input_norm(hidden)), rotation, self.heads[0])

    def _project_prompts(self, prompts: Tensor, rotation: Rotation) -> tuple[Tensor | None, Tensor, Tensor]:
        if not self.is_last:
            return self._project(prompts, rotation)
        skipped = self.heads[0] * self.head_dim
        projected = F.linear(self.input_norm(prompts), self.qkv.weight[skipped:], self.qkv.bias[skipped:])
        return None, *self._turn(projected, rotation, 0)[1:]

    def _turn(self, projected: Tensor, rotation: Rotation, heads: int) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value heads of projected rows; no norm, so eps has no use."""
        return qk_norm_rope(
            projected, None, None, *rotation, heads=heads, kv_heads=self.heads[1], eps=0.0, impl=self.kernels
        )

    def _finish(self, hidden: Tensor, attended: Tensor) -> Tensor:
        normed, hidden = self.post_norm.add(self.o(attended.flatten(1)), hidden)
        output: Tensor = hidden + self.mlp(normed)
        return output


class ConnectorLayer(nn.Module):
    """One pre-norm layer over the queries of a sample: no positions, no mask."""

    def __init__(self, config: ConnectorConfig) -> None:
        super().__init__()
        dim = config.hidden_size
        self.head_dim = config.head_dim
        self.attention_backend = "auto"
        self.norm1 = nn.LayerNorm(dim, eps=config.layer_norm_eps)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim, eps=config.layer_norm_eps)
        self.mlp = MLP(dim, config.intermediate_size)
        for linear in (self.qkv, self.out, self.mlp.fc1, self.mlp.fc2):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.normal_(linear.bias, std=1e-6)
        nn.init.zeros_(self.qkv.bias)
        nn.init.zeros_(self.out.bias)

    def forward(self, hidden: Tensor, samples: Segments) -> Tensor:
        """[query rows, dim] -> [query rows, dim]."""
        query, key, value = self.qkv(self.norm1(hidden)).unflatten(-1, (3, -1, self.head_dim)).unbind(1)
        attended = attention(query, key, value, samples, backend=self.attention_backend)
        hidden = hidden + self.out(attended.flatten(1))
        output: Tensor = hidden + self.mlp(self.norm2(hidden))
        return output


class Connector(nn.Module):
    """The trained encoder between query states and captions; it has no final norm."""

    def __init__(self, config: ConnectorConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(ConnectorLayer(config) for _ in range(config.num_hidden_layers))

    def forward(self, hidden: Tensor, samples: Segments) -> Tensor:
        """[query rows, dim] -> [query rows, dim]; rows of each sample see one another."""
        for layer in self.layers:
            hidden = layer(hidden, samples)
        return hidden
