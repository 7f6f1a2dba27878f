"""The two kinds of transformer layers: ViT blocks of the masked autoencoder and Qwen2 decoder layers.

All work on packed rows of the samples of a microbatch: no padding, no mask tensor.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from reca.kernels import Impl, bias_gelu, gelu_mlp, qk_norm_rope
from reca.layers.attention import attention
from reca.layers.implementation import activation_dtype
from reca.layers.mlp import SwiGLU
from reca.layers.norm import LayerNorm, RMSNorm
from reca.layers.segments import Segments
from reca.layers.stream import Stream
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
        self.norm1 = LayerNorm(dim, eps=NORM_EPS)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm2 = LayerNorm(dim, eps=NORM_EPS)
        self.fc1 = nn.Linear(dim, mlp_ratio * dim)
        self.fc2 = nn.Linear(mlp_ratio * dim, dim)

    def forward(self, stream: Stream, segments: Segments, dropout: BlockDropout | None) -> Stream:
        """Advance packed rows [rows, dim]; `dropout` is None outside of training."""
        normed, hidden = stream.read(self.norm1)
        heads = self.qkv(normed).unflatten(-1, (3, -1, self.head_dim))
        if dropout is not None and dropout.attention:
            attended = dropout.attend(heads, segments, self.kernels)
        else:
            query, key, value = heads.unbind(1)
            attended = attention(query, key, value, segments, backend=self.attention_backend)
        projected = self.proj(attended.flatten(1))
        dtype, fc1, fc2 = activation_dtype(self.fc1.weight), self.fc1, self.fc2
        if dropout is None or not dropout.projection:
            normed, hidden = Stream(hidden, projected).read(self.norm2)
            weights = (tensor.to(dtype) for tensor in (fc1.weight, fc1.bias, fc2.weight, fc2.bias))
            return Stream(hidden, gelu_mlp(normed, *weights, impl=self.kernels))
        projected = dropout.rows(projected, "attn.proj_drop", segments, self.kernels)
        normed, hidden = Stream(hidden, projected).read(self.norm2)
        inner = bias_gelu(F.linear(normed, fc1.weight), fc1.bias.to(dtype), impl=self.kernels)
        inner = dropout.rows(inner, "mlp.drop1", segments, self.kernels)
        return Stream(hidden, dropout.rows(fc2(inner), "mlp.drop2", segments, self.kernels))


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
        stream: Stream,
        rotation: tuple[Tensor, Tensor],
        segments: Segments,
        readout: Readout | None = None,
    ) -> Stream:
        """Advance packed rows [rows, dim]; with a readout only the rows it names, [m, dim].

        Args:
            rotation: cosines and sines of the rows' positions.
            segments: causal, one per sample.
        """
        if readout is None:
            query, key, value, hidden = self.project(stream, rotation)
            return self.finish(hidden, attention(query, key, value, segments, backend=self.attention_backend))
        (normed, hidden), width = stream.read(self.input_norm), self.heads[0] * self.head_dim
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

    def project(
        self, stream: Stream, rotation: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Query [rows, heads, head_dim], key, value [rows, kv_heads, head_dim]; the rows of the stream."""
        normed, hidden = stream.read(self.input_norm)
        return *self._turn(self.qkv(normed), rotation, *self.heads[:2]), hidden

    def finish(self, hidden: Tensor, attended: Tensor) -> Stream:
        """Residual stream after attention output [rows, heads, head_dim] and MLP."""
        normed, hidden = self.post_norm.add(self.o(attended.flatten(1)), hidden)
        return Stream(hidden, self.mlp(normed))

    def _turn(
        self, projected: Tensor, rotation: tuple[Tensor, Tensor], heads: int, kv_heads: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value heads of projected rows; no norm, so eps has no use."""
        return qk_norm_rope(
            projected, None, None, *rotation, heads=heads, kv_heads=kv_heads, eps=0.0, impl=self.kernels
        )
