"""One transformer block, the language trunk, and the generation expert that reads it layer by layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reca.layers.mlp import SwiGLU
from reca.layers.norm import RMSNorm
from reca.models.miniature.config import MiniatureConfig
from reca.world.language import VOCABULARY
from reca.world.scenes import NUM_CELLS


class Block(nn.Module):
    """Attention and a gated MLP, each after its norm and with a residual; weights of one expert."""

    def __init__(self, config: MiniatureConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.attention_norm = RMSNorm(config.dim)
        self.qkv = nn.Linear(config.dim, 3 * config.dim, bias=False)
        self.out = nn.Linear(config.dim, config.dim, bias=False)
        self.mlp_norm = RMSNorm(config.dim)
        self.mlp = SwiGLU(config.dim, config.hidden)

    def project(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value, each [n, heads, rows, dim / heads], of [n, rows, dim]."""
        rows = self.qkv(self.attention_norm(hidden))
        query, key, value = rows.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return query, key, value

    def finish(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """The block's output, given its input and what its heads gathered."""
        hidden = hidden + self.out(attended.transpose(1, 2).flatten(2))
        output: Tensor = hidden + self.mlp(self.mlp_norm(hidden))
        return output


class Trunk(nn.Module):
    """The understanding expert: a causal language model over words and projected picture embeddings."""

    def __init__(self, config: MiniatureConfig) -> None:
        super().__init__()
        self.words = nn.Embedding(len(VOCABULARY), config.dim)
        self.positions = nn.Parameter(torch.empty(config.max_tokens, config.dim))
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.dim)
        self.head = nn.Linear(config.dim, len(VOCABULARY), bias=False)
        for weight in (self.words.weight, self.positions):
            nn.init.normal_(weight, std=0.5)

    def forward(self, embedded: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Run all layers.

        Args:
            embedded: [n, length, dim] without positions; padding on the right changes nothing before it.

        Returns: [n, length, dim] normed, and each layer's key and value, [n, heads, length, dim / heads].
        """
        hidden = embedded + self.positions[: embedded.shape[1]]
        memory = []
        for layer in self.layers:
            assert isinstance(layer, Block)
            query, key, value = layer.project(hidden)
            attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
            hidden = layer.finish(hidden, attended)
            memory.append((key, value))
        return self.norm(hidden), memory


class GenerationExpert(nn.Module):
    """Blocks of the trunk's shape whose rows, the four cells, see each other and all the trunk remembers."""

    def __init__(self, config: MiniatureConfig) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.empty(NUM_CELLS, config.dim))
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.dim)
        nn.init.normal_(self.positions, std=0.5)

    def forward(self, cells: Tensor, memory: list[tuple[Tensor, Tensor]], is_visible: Tensor) -> Tensor:
        """Run all layers.

        Args:
            cells: [n, 4, dim] without positions.
            memory: of `Trunk.forward`, for the same rows.
            is_visible: [n, length] bool, which positions of the memory are seen.

        Returns: [n, 4, dim], normed.
        """
        own = is_visible.new_ones(is_visible.shape[0], NUM_CELLS)
        mask = torch.cat([is_visible, own], dim=1)[:, None, None]  # [n, 1, 1, length + 4]
        hidden = cells + self.positions
        for layer, (keys, values) in zip(self.layers, memory, strict=True):
            assert isinstance(layer, Block)
            query, key, value = layer.project(hidden)
            key, value = torch.cat([keys, key], dim=2), torch.cat([values, value], dim=2)
            attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
            hidden = layer.finish(hidden, attended)
        output: Tensor = self.norm(hidden)
        return output
