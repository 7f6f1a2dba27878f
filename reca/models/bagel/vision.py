"""SigLIP-NaViT: the understanding encoder over packed patches of images of any shape."""

from __future__ import annotations

from torch import Tensor, nn

from reca.layers.attention import attention
from reca.layers.mlp import MLP
from reca.layers.norm import LayerNorm
from reca.layers.segments import Segments
from reca.layers.stream import Stream
from reca.models.bagel.config import VisionConfig


class VisionLayer(nn.Module):
    """One pre-norm transformer layer; full attention inside each image only."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        dim = config.hidden_size
        self.head_dim = config.head_dim
        self.attention_backend = "auto"
        self.norm1 = LayerNorm(dim, config.layer_norm_eps)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.norm2 = LayerNorm(dim, config.layer_norm_eps)
        self.mlp = MLP(dim, config.intermediate_size)

    def forward(self, stream: Stream, images: Segments) -> Stream:
        """Advance the residual stream of [patches, dim]."""
        hidden, normed = _read(stream, self.norm1)
        query, key, value = self.qkv(normed).unflatten(-1, (3, -1, self.head_dim)).unbind(1)
        attended = attention(query, key, value, images, backend=self.attention_backend)
        hidden, normed = _read(Stream(hidden, self.out(attended.flatten(1))), self.norm2)
        return Stream(hidden, self.mlp(normed))


def _read(stream: Stream, norm: LayerNorm) -> tuple[Tensor, Tensor]:
    """(the sum of a stream, its norm), both [patches, dim], in one pass."""
    summed, normed = norm.add(stream.residual, [] if stream.delta is None else [stream.delta])
    return summed, normed


class VisionEncoder(nn.Module):
    """Patches of many images, packed -> embeddings.

    The last norm is applied although the release leaves the last layer of the original encoder away.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        dim = config.hidden_size
        self.patch_embedding = nn.Linear(config.patch_dim, dim)
        self.position_embedding = nn.Embedding(config.positions_per_side**2, dim)
        self.layers = nn.ModuleList(VisionLayer(config) for _ in range(config.num_layers))
        self.post_norm = LayerNorm(dim, config.layer_norm_eps)

    def embed(self, patches: Tensor, positions: Tensor) -> Tensor:
        """[patches, dim]: linear patch embedding plus the learned position."""
        embedded: Tensor = self.patch_embedding(patches.to(self.patch_embedding.weight.dtype))
        positioned: Tensor = embedded + self.position_embedding(positions).to(embedded.dtype)
        return positioned

    def forward(self, patches: Tensor, positions: Tensor, images: Segments) -> Tensor:
        """Encode packed patches.

        Args:
            patches: [patches, 3 * patch_size^2], inner order (row, column, channel), pixels in [-1, 1].
            positions: [patches] int64, row * positions_per_side + column inside each image.
            images: patches of each image.

        Returns: [patches, dim].
        """
        stream = Stream(self.embed(patches, positions))
        for layer in self.layers:
            stream = layer(stream, images)
        return _read(stream, self.post_norm)[1]
