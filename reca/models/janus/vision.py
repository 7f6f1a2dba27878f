"""SigLIP as Janus-Pro uses it: every patch of a square image, after the last norm. Frozen."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from reca.layers.attention import attention
from reca.layers.mlp import MLP
from reca.layers.norm import LayerNorm
from reca.layers.segments import Segments
from reca.layers.stream import Stream
from reca.models.janus.config import VisionConfig


class VisionLayer(nn.Module):
    """One pre-norm transformer layer; full attention inside each image."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        dim = config.hidden_size
        self.head_dim = config.head_dim
        self.attention_backend = "auto"
        self.norm1 = LayerNorm(dim, eps=config.layer_norm_eps)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.norm2 = LayerNorm(dim, eps=config.layer_norm_eps)
        self.mlp = MLP(dim, config.intermediate_size, approximate="none")

    def forward(self, stream: Stream, images: Segments) -> Stream:
        """Advance [patches, dim]."""
        normed, hidden = stream.read(self.norm1)
        query, key, value = self.qkv(normed).unflatten(-1, (3, -1, self.head_dim)).unbind(1)
        attended = attention(query, key, value, images, backend=self.attention_backend)
        normed, hidden = Stream(hidden, self.out(attended.flatten(1))).read(self.norm2)
        return Stream(hidden, self.mlp(normed))


class VisionEncoder(nn.Module):
    """Square images -> one embedding per patch; no class token, no pooling."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        dim = config.hidden_size
        self.patch_embedding = nn.Conv2d(3, dim, config.patch_size, stride=config.patch_size)
        self.position_embedding = nn.Embedding(config.num_tokens, dim)
        self.layers = nn.ModuleList(VisionLayer(config) for _ in range(config.num_hidden_layers))
        self.post_norm = LayerNorm(dim, eps=config.layer_norm_eps)
        self.requires_grad_(False)

    @torch.no_grad()
    def forward(self, pixels: Tensor, images: Segments) -> Tensor:
        """Encode images.

        Args:
            pixels: [images, 3, image_size, image_size] in [-1, 1].
            images: patches of each image.

        Returns: [images * patches, dim], row by row.
        """
        weight = self.patch_embedding.weight
        hidden = self.patch_embedding(pixels.to(weight.dtype)).flatten(2).transpose(1, 2)
        hidden = (hidden + self.position_embedding.weight.to(hidden.dtype)).flatten(0, 1)
        stream = Stream(hidden)
        for layer in self.layers:
            stream = layer(stream, images)
        return stream.read(self.post_norm)[0]
