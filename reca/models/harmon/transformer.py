"""The two kinds of transformer layers: ViT blocks of the masked autoencoder and Qwen2 decoder layers.

All work on packed rows of the samples of a microbatch: no padding, no mask tensor.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from reca.layers.attention import Segments, attention
from reca.layers.mlp import SwiGLU
from reca.layers.norm import RMSNorm
from reca.layers.rotary import apply_rotary
from reca.models.harmon.config import LLMConfig
from reca.models.harmon.dropout import BlockDropout
from reca.types import TensorStruct

NORM_EPS = 1e-6


class MarBlock(nn.Module):
    """A pre-norm ViT block, bidirectional within each sample.

    Weights: qkv rows are [query; key; value], heads contiguous; all with biases; GELU is the exact one.
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: int) -> None:
        super().__init__()
        self.head_dim = dim // num_heads
        self.attention_backend = "auto"
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.fc1 = nn.Linear(dim, mlp_ratio * dim)
        self.fc2 = nn.Linear(mlp_ratio * dim, dim)

    def forward(self, hidden: Tensor, segments: Segments, dropout: BlockDropout | None) -> Tensor:
        """Advance packed rows [rows, dim]; `dropout` is None outside of training."""
        heads = self.qkv(self.norm1(hidden)).unflatten(-1, (3, -1, self.head_dim))
        query, key, value = heads.unbind(1)
        if dropout is not None and dropout.attention:
            attended = dropout.attend(query, key, value, segments)
        else:
            attended = attention(query, key, value, segments, backend=self.attention_backend)
        hidden = hidden + self._drop(self.proj(attended.flatten(1)), "attn.proj_drop", segments, dropout)
        inner = self._drop(F.gelu(self.fc1(self.norm2(hidden))), "mlp.drop1", segments, dropout)
        return hidden + self._drop(self.fc2(inner), "mlp.drop2", segments, dropout)

    @staticmethod
    def _drop(values: Tensor, place: str, segments: Segments, dropout: BlockDropout | None) -> Tensor:
        return values if dropout is None else dropout.rows(values, place, segments.query_lengths)


@dataclass(frozen=True, slots=True)
class Readout(TensorStruct):
    """The rows that are read after the last layer; all others stop at their keys and values.

    Attributes:
        queries: [n] int64 packed rows that attend: the last rows of each sample.
        segments: causal, those rows over all rows of their sample.
        rows: [m] int64, which of `queries` are read; None reads all.
    """

    queries: Tensor
    segments: Segments
    rows: Tensor | None = None


class QwenLayer(nn.Module):
    """A Qwen2 decoder layer.

    Weights: qkv rows are [query; key; value] with biases; `o` and the MLP have none.
    """

    def __init__(self, config: LLMConfig) -> None:
        super().__init__()
        dim, eps = config.hidden_size, config.rms_norm_eps
        self.head_dim = config.head_dim
        self.heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
        self.attention_backend = "auto"
        self.input_norm = RMSNorm(dim, eps)
        self.qkv = nn.Linear(dim, sum(self.heads) * self.head_dim)
        self.o = nn.Linear(config.num_attention_heads * self.head_dim, dim, bias=False)
        self.post_norm = RMSNorm(dim, eps)
        self.mlp = SwiGLU(dim, config.intermediate_size)

    def forward(
        self,
        hidden: Tensor,
        rotation: tuple[Tensor, Tensor],
        segments: Segments,
        readout: Readout | None = None,
    ) -> Tensor:
        """Advance packed rows [rows, dim]; with a readout only the rows it names, [m, dim].

        Args:
            rotation: cosines and sines of the rows' positions.
            segments: causal, one per sample.
        """
        if readout is None:
            query, key, value = self.project(hidden, rotation)
            return self.finish(hidden, attention(query, key, value, segments, backend=self.attention_backend))
        normed, width = self.input_norm(hidden), self.heads[0] * self.head_dim
        weight, bias = self.qkv.weight, self.qkv.bias
        query = F.linear(normed.index_select(0, readout.queries), weight[:width], bias[:width])
        key, value = self._heads(F.linear(normed, weight[width:], bias[width:])).split(self.heads[1:], dim=1)
        turned = [table.index_select(0, readout.queries) for table in rotation]
        query = apply_rotary(self._heads(query), turned[0], turned[1])
        key = apply_rotary(key, *rotation)
        attended = attention(query, key, value, readout.segments, backend=self.attention_backend)
        rows = readout.queries
        if readout.rows is not None:
            attended, rows = attended.index_select(0, readout.rows), rows.index_select(0, readout.rows)
        return self.finish(hidden.index_select(0, rows), attended)

    def project(self, hidden: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """[rows, dim] -> query [rows, heads, head_dim], key, value [rows, kv_heads, head_dim], rotated."""
        query, key, value = self._heads(self.qkv(self.input_norm(hidden))).split(self.heads, dim=1)
        return apply_rotary(query, *rotation), apply_rotary(key, *rotation), value

    def finish(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """Residual stream after attention output [rows, heads, head_dim] and MLP."""
        hidden = hidden + self.o(attended.flatten(1))
        output: Tensor = hidden + self.mlp(self.post_norm(hidden))
        return output

    def _heads(self, projected: Tensor) -> Tensor:
        return projected.unflatten(-1, (-1, self.head_dim))
