"""The two kinds of transformer layers: ViT blocks of the masked autoencoder and Qwen2 decoder layers.

All work on packed rows of the samples of a microbatch: no padding, no mask tensor.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from reca.kernels import Impl, qk_norm_rope
from reca.layers.attention import Segments, attention
from reca.layers.mlp import SwiGLU
from reca.layers.norm import RMSNorm
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
        self.kernels: Impl = "auto"
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.fc1 = nn.Linear(dim, mlp_ratio * dim)
        self.fc2 = nn.Linear(mlp_ratio * dim, dim)

    def forward(self, hidden: Tensor, segments: Segments, dropout: BlockDropout | None) -> Tensor:
        """Advance packed rows [rows, dim]; `dropout` is None outside of training."""
        heads = self.qkv(self.norm1(hidden)).unflatten(-1, (3, -1, self.head_dim))
        if dropout is not None and dropout.attention:
            attended = dropout.attend(heads, segments, self.kernels)
        else:
            query, key, value = heads.unbind(1)
            attended = attention(query, key, value, segments, backend=self.attention_backend)
        projected = self.proj(attended.flatten(1))
        if dropout is None or not dropout.projection:
            hidden = hidden + projected
            return hidden + self.fc2(F.gelu(self.fc1(self.norm2(hidden))))
        hidden = dropout.add(hidden, projected, "attn.proj_drop", segments, self.kernels)
        inner = F.gelu(self.fc1(self.norm2(hidden)))
        inner = dropout.rows(inner, "mlp.drop1", segments, self.kernels)
        return dropout.add(hidden, self.fc2(inner), "mlp.drop2", segments, self.kernels)


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
        self.kernels: Impl = "auto"
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
        weight, bias, (heads, kv_heads, _) = self.qkv.weight, self.qkv.bias, self.heads
        query = F.linear(normed.index_select(0, readout.queries), weight[:width], bias[:width])
        turn = rotation[0].index_select(0, readout.queries), rotation[1].index_select(0, readout.queries)
        query = self._turn(query, turn, heads, 0)[0]
        _, key, value = self._turn(F.linear(normed, weight[width:], bias[width:]), rotation, 0, kv_heads)
        attended = attention(query, key, value, readout.segments, backend=self.attention_backend)
        rows = readout.queries
        if readout.rows is not None:
            attended, rows = attended.index_select(0, readout.rows), rows.index_select(0, readout.rows)
        return self.finish(hidden.index_select(0, rows), attended)

    def project(self, hidden: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """[rows, dim] -> query [rows, heads, head_dim], key, value [rows, kv_heads, head_dim], rotated."""
        return self._turn(self.qkv(self.input_norm(hidden)), rotation, *self.heads[:2])

    def finish(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """Residual stream after attention output [rows, heads, head_dim] and MLP."""
        normed, hidden = self.post_norm.add(self.o(attended.flatten(1)), hidden)
        output: Tensor = hidden + self.mlp(normed)
        return output

    def _turn(
        self, projected: Tensor, rotation: tuple[Tensor, Tensor], heads: int, kv_heads: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value heads of projected rows; no norm, so eps has no use."""
        return qk_norm_rope(
            projected, None, None, *rotation, heads=heads, kv_heads=kv_heads, eps=0.0, impl=self.kernels
        )
