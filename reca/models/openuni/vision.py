"""InternViT: the frozen understanding encoder, and what turns its patches into words."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reca.kernels import Impl, gate_residual
from reca.layers.attention import attention
from reca.layers.norm import LayerNorm
from reca.layers.segments import Segments
from reca.models.openuni.config import VisionConfig

_MEAN = (0.485, 0.456, 0.406)
_STD = (0.229, 0.224, 0.225)


class VisionLayer(nn.Module):
    """One pre-norm transformer layer whose branches are scaled per channel."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        dim = config.hidden_size
        self.head_dim = config.head_dim
        self.attention_backend = "auto"
        self.kernels: Impl = "auto"
        self.norm1 = LayerNorm(dim, eps=config.layer_norm_eps)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.scale1 = nn.Parameter(torch.ones(dim))
        self.norm2 = LayerNorm(dim, eps=config.layer_norm_eps)
        self.fc1 = nn.Linear(dim, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, dim)
        self.scale2 = nn.Parameter(torch.ones(dim))

    def forward(self, hidden: Tensor, images: Segments, kept: Tensor | None) -> Tensor:
        """Advance all images.

        Args:
            hidden: [images, rows, dim].
            images: rows of each image.
            kept: [2, images, 1, 1] factors of the attention and the MLP branch; None keeps both.

        Returns: [images, rows, dim].
        """
        rows = self.qkv(self.norm1(hidden)).flatten(0, 1).unflatten(-1, (3, -1, self.head_dim))
        query, key, value = rows.unbind(1)
        attended = attention(query, key, value, images, backend=self.attention_backend)
        branch = self.out(attended.flatten(1)).view(hidden.shape)
        hidden = self._add(hidden, branch, self.scale1, None if kept is None else kept[0])
        branch = self.fc2(F.gelu(self.fc1(self.norm2(hidden))))
        return self._add(hidden, branch, self.scale2, None if kept is None else kept[1])

    def _add(self, hidden: Tensor, branch: Tensor, scale: Tensor, kept: Tensor | None) -> Tensor:
        """hidden + kept * scale * branch."""
        if kept is not None:
            return hidden + kept * (scale * branch)
        gate = scale.to(hidden.dtype).expand(hidden.shape)
        return gate_residual(branch, gate, hidden, impl=self.kernels)


class VisionEncoder(nn.Module):
    """Images -> patches, as the last layer leaves them: there is no final norm."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        dim = config.hidden_size
        self.image_size = config.image_size
        self.class_embedding = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
        self.patch_embedding = nn.Conv2d(3, dim, config.patch_size, config.patch_size)
        self.position_embedding = nn.Parameter(torch.randn(1, config.num_patches + 1, dim) * 0.02)
        self.layers = nn.ModuleList(VisionLayer(config) for _ in range(config.num_hidden_layers))

    def view(self, pixels: Tensor) -> Tensor:
        """[images, 3, image_size, image_size]: pixels in [-1, 1] as the encoder was trained on them.

        The resize is bilinear without antialiasing, as in the official code.
        """
        mean, std = pixels.new_tensor(_MEAN)[:, None, None], pixels.new_tensor(_STD)[:, None, None]
        normalised = ((pixels + 1) / 2 - mean) / std
        return F.interpolate(normalised, (self.image_size, self.image_size), mode="bilinear")

    def embed(self, view: Tensor) -> Tensor:
        """[images, 1 + patches, dim]: the class token and the patches of `view`, with their positions."""
        patches = self.patch_embedding(view.to(self.patch_embedding.weight.dtype)).flatten(2).mT
        first = self.class_embedding.to(patches.dtype).expand(patches.shape[0], -1, -1)
        return torch.cat([first, patches], dim=1) + self.position_embedding.to(patches.dtype)

    def forward(self, pixels: Tensor, images: Segments, kept: Tensor | None = None) -> Tensor:
        """Encode images.

        Args:
            pixels: [images, 3, height, width] in [-1, 1], of any one size.
            images: 1 + patches rows of each image.
            kept: [layers, 2, images] factors of stochastic depth; None keeps every branch.

        Returns: [images, patches, dim].
        """
        hidden = self.embed(self.view(pixels))
        for index, layer in enumerate(self.layers):
            factors = None if kept is None else kept[index, :, :, None, None].to(hidden.dtype)
            hidden = layer(hidden, images, factors)
        return hidden[:, 1:]


class Aligner(nn.Module):
    """2 x 2 patches -> one embedding of the language model.

    Weights: norm [4 * dim] with eps 1e-5, other than in the encoder; fc1, fc2 with exact GELU between them.
    """

    def __init__(self, config: VisionConfig, out: int) -> None:
        super().__init__()
        self.side = config.patches_per_side
        self.norm = LayerNorm(4 * config.hidden_size, eps=1e-5)
        self.fc1 = nn.Linear(4 * config.hidden_size, out)
        self.fc2 = nn.Linear(out, out)

    def group(self, patches: Tensor) -> Tensor:
        """[images, patches, dim] -> [images, patches / 4, 4 * dim]; channels (row, column, channel)."""
        half = self.side // 2
        grid = patches.unflatten(1, (half, 2, half, 2))  # [images, rows, 2, columns, 2, dim]
        grouped: Tensor = grid.transpose(2, 3).flatten(3).flatten(1, 2)
        return grouped

    def forward(self, patches: Tensor) -> Tensor:
        """[images, patches, dim] -> [images, patches / 4, out]."""
        output: Tensor = self.fc2(F.gelu(self.fc1(self.norm(self.group(patches)))))
        return output
