"""The understanding encoder: a small convolutional network with one look around; and the projector."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reca.layers.mlp import MLP
from reca.models.miniature.config import MiniatureConfig
from reca.models.miniature.transformer import Block
from reca.world.scenes import COLOURS, NUM_CELLS, SHAPES, colour_of, shape_of


class Encoder(nn.Module):
    """Pixels -> one embedding for each cell. Trained to name every cell, then frozen, as CLIP is.

    Its heads `shape` and `colour` are only used to train and to probe it; entry 0 is an empty cell.
    """

    def __init__(self, config: MiniatureConfig) -> None:
        super().__init__()
        first, second = config.vision_channels
        self.conv1 = nn.Conv2d(3, first, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(first, second, 3, stride=2, padding=1)
        self.conv3 = nn.Conv2d(second, config.dim, 4, stride=2, padding=1)
        self.positions = nn.Parameter(torch.zeros(NUM_CELLS, config.dim))
        self.block = Block(config)
        self.shape = nn.Linear(config.dim, 1 + len(SHAPES))
        self.colour = nn.Linear(config.dim, 1 + len(COLOURS))

    def forward(self, pixels: Tensor) -> Tensor:
        """[n, 3, 16, 16] -> [n, 4, dim]."""
        features = F.gelu(self.conv2(F.gelu(self.conv1(pixels))))
        hidden = self.conv3(features).flatten(2).transpose(1, 2) + self.positions
        attended = F.scaled_dot_product_attention(*self.block.project(hidden))
        return self.block.finish(hidden, attended)

    def probe_loss(self, embeddings: Tensor, codes: Tensor) -> Tensor:
        """Cross entropies of shape and colour, summed over the cells ([n, 4] codes)."""
        shape = F.cross_entropy(
            self.shape(embeddings).flatten(0, 1), shape_of(codes).flatten() + 1, reduction="sum"
        )
        colour = F.cross_entropy(
            self.colour(embeddings).flatten(0, 1), colour_of(codes).flatten() + 1, reduction="sum"
        )
        return shape + colour

    def probe(self, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        """Index of shape and of colour read from each embedding; -1 where nothing is seen."""
        return self.shape(embeddings).argmax(dim=-1) - 1, self.colour(embeddings).argmax(dim=-1) - 1


class Projector(nn.Module):
    """Embeddings of the encoder -> the width and the language of the trunk's words."""

    def __init__(self, config: MiniatureConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.dim)
        self.mlp = MLP(config.dim, 2 * config.dim)

    def forward(self, embeddings: Tensor) -> Tensor:
        """[..., dim] -> [..., dim]."""
        projected: Tensor = self.mlp(self.norm(embeddings))
        return projected
