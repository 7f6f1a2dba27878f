"""The two kinds of generator: what the cells of the generation expert hold, and what is read from them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from reca.kernels import masked_token_loss
from reca.layers.timestep import timestep_features
from reca.models.miniature.config import MiniatureConfig
from reca.models.miniature.transformer import GenerationExpert
from reca.objectives.flow_matching import flow_matching, interpolate
from reca.world.language import IGNORED
from reca.world.render import CELL, glyphs
from reca.world.scenes import NUM_CODES

Memory = list[tuple[Tensor, Tensor]]
MASK = NUM_CODES
"""The code of a cell that is yet to be filled in."""
_TIME_SCALE = 1000.0
_LEAST_TIME = 0.1


class MaskedGenerator(nn.Module):
    """Discrete: some codes are hidden, and the expert says what they are."""

    def __init__(self, config: MiniatureConfig) -> None:
        super().__init__()
        self.codes = nn.Embedding(NUM_CODES + 1, config.dim)
        self.expert = GenerationExpert(config)
        self.head = nn.Linear(config.dim, NUM_CODES)
        nn.init.normal_(self.codes.weight, std=0.5)

    def forward(self, codes: Tensor, memory: Memory, is_visible: Tensor) -> Tensor:
        """[n, 4] codes with MASK -> [n, 4, 37] logits."""
        logits: Tensor = self.head(self.expert(self.codes(codes), memory, is_visible))
        return logits

    def loss(self, codes: Tensor, is_masked: Tensor, memory: Memory, is_visible: Tensor) -> Tensor:
        """Cross entropy of the masked codes, summed. `codes`, `is_masked`: [n, 4]."""
        shown = torch.where(is_masked, MASK, codes)
        hidden = self.expert(self.codes(shown), memory, is_visible).flatten(0, 1)
        labels = torch.where(is_masked, codes, IGNORED).flatten()
        loss: Tensor = masked_token_loss(hidden, self.head.weight, labels, self.head.bias)
        return loss


class CellTokenizer:
    """A fixed linear map from the picture of a cell to a latent, and the nearest code back.

        latent = (picture - mean) @ basis,      basis: leading principal directions of the 37 pictures

    whitened, so that directions in which few pictures differ are not drowned by noise, and scaled to a mean
    square of 1. Six shapes times three colour channels give 18 directions. Nothing is learnt or stored.
    """

    def __init__(self, dim: int) -> None:
        pictures = glyphs(CELL).flatten(1).double()
        left = torch.linalg.svd(pictures - pictures.mean(dim=0), full_matrices=False).U[:, :dim]
        # The sign of a direction is arbitrary: the largest entry is made positive on every machine.
        table = left * left.gather(0, left.abs().argmax(dim=0, keepdim=True)).sign()
        self.table = (table / table.square().mean().sqrt()).float()  # [37, dim]

    def encode(self, codes: Tensor) -> Tensor:
        """[...] codes -> [..., dim] latents."""
        latents: Tensor = self.table.to(codes.device)[codes]
        return latents

    def decode(self, latents: Tensor) -> Tensor:
        """[..., dim] latents -> [...] nearest codes."""
        table = self.table.to(latents.device)
        return torch.cdist(latents.flatten(0, -2), table).argmin(dim=1).view(latents.shape[:-1])


class FlowGenerator(nn.Module):
    """Continuous: the expert says in which direction noisy latents move.

    It guesses the clean latents, which lie where few numbers describe them, and the velocity follows:

        velocity = (latents - guess) / max(time, 0.1)

    Source: arXiv 2511.13720 for the guess under a loss of the velocity.
    """

    def __init__(self, config: MiniatureConfig) -> None:
        super().__init__()
        self.tokenizer = CellTokenizer(config.latent_dim)
        self.latents = nn.Linear(config.latent_dim, config.dim)
        self.time = nn.Linear(config.dim, config.dim)
        self.expert = GenerationExpert(config)
        self.head = nn.Linear(config.dim, config.latent_dim)

    def forward(self, latents: Tensor, time: Tensor, memory: Memory, is_visible: Tensor) -> Tensor:
        """[n, 4, latent_dim] at times [n] -> velocity of that shape, towards noise."""
        features = timestep_features(_TIME_SCALE * time, self.time.in_features)
        cells = self.latents(latents) + self.time(features)[:, None]
        guess = self.head(self.expert(cells, memory, is_visible))
        velocity: Tensor = (latents - guess) / time.clamp(min=_LEAST_TIME)[:, None, None]
        return velocity

    def loss(self, codes: Tensor, noise: Tensor, time: Tensor, memory: Memory, is_visible: Tensor) -> Tensor:
        """Squared error of the velocity, mean over channels, summed over cells. `codes`: [n, 4]."""
        clean = self.tokenizer.encode(codes)
        rows_time = time[:, None].expand(codes.shape).flatten()
        noisy = interpolate(clean.flatten(0, 1), noise.flatten(0, 1), rows_time).view_as(clean)
        velocity = self(noisy, time, memory, is_visible)
        return flow_matching(velocity.flatten(0, 1), clean.flatten(0, 1), noise.flatten(0, 1))
