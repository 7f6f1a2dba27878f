"""The diffusion head: a small residual MLP that denoises one latent token at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reca.kernels import Impl, gate_residual, layer_norm_modulate
from reca.layers.timestep import timestep_features
from reca.models.harmon.diffusion import NUM_STEPS
from reca.models.harmon.transformer import NORM_EPS

TIME_FEATURES = 256


class HeadBlock(nn.Module):
    """h + gate * fc2(SiLU(fc1(norm(h) * (1 + scale) + shift))), modulated by the activated condition."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.kernels: Impl = "auto"
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.fc1 = nn.Linear(width, width)
        self.fc2 = nn.Linear(width, width)
        self.modulation = nn.Linear(width, 3 * width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, hidden: Tensor, activated: Tensor) -> Tensor:
        """Advance [rows, width] under [rows, width], the condition after SiLU."""
        shift, scale, gate = self.modulation(activated).chunk(3, dim=1)
        norm, impl = self.norm, self.kernels
        inner = layer_norm_modulate(
            hidden, shift, scale, eps=norm.eps, weight=norm.weight, bias=norm.bias, impl=impl
        )
        return gate_residual(self.fc2(F.silu(self.fc1(inner))), gate, hidden, impl=impl)


class DiffusionHead(nn.Module):
    """Noise and variance of noised latents, given their time and the condition of their token.

    Args:
        channels: of a latent token.
        condition: width of the condition.
        width, depth: of the MLP.
    """

    def __init__(self, channels: int, condition: int, width: int, depth: int) -> None:
        super().__init__()
        self.kernels: Impl = "auto"
        self.time_fc1 = nn.Linear(TIME_FEATURES, width)
        self.time_fc2 = nn.Linear(width, width)
        self.condition = nn.Linear(condition, width)
        self.input = nn.Linear(channels, width)
        self.blocks = nn.ModuleList(HeadBlock(width) for _ in range(depth))
        self.modulation = nn.Linear(width, 2 * width)
        self.output = nn.Linear(width, 2 * channels)
        for zero in (self.modulation, self.output):
            nn.init.zeros_(zero.weight)
            nn.init.zeros_(zero.bias)

    def embed_time(self, time: Tensor) -> Tensor:
        """[rows, width]: embedding of times [rows] int64 in 0..999; each distinct one is computed once."""
        if time.shape[0] <= NUM_STEPS:
            return self._embed_time(time)
        table = self._embed_time(torch.arange(NUM_STEPS, device=time.device))
        return F.embedding(time, table)

    def _embed_time(self, time: Tensor) -> Tensor:
        features = timestep_features(time, TIME_FEATURES).to(self.time_fc1.weight.dtype)
        embedded: Tensor = self.time_fc2(F.silu(self.time_fc1(features)))
        return embedded

    def forward(self, noised: Tensor, time: Tensor, condition: Tensor) -> Tensor:
        """Denoise several noise levels of the same tokens.

        Args:
            noised: [levels * tokens, channels] fp32, levels outermost.
            time: [levels * tokens] int64.
            condition: [tokens, condition width].

        Returns: [levels * tokens, 2 * channels]: noise prediction, then variance interpolation.
        """
        levels = noised.shape[0] // max(condition.shape[0], 1)
        activated = F.silu(self.embed_time(time) + self.condition(condition).repeat(levels, 1))
        hidden: Tensor = self.input(noised.to(self.input.weight.dtype))
        for block in self.block_list():
            hidden = block(hidden, activated)
        shift, scale = self.modulation(activated).chunk(2, dim=1)
        output: Tensor = self.output(
            layer_norm_modulate(hidden, shift, scale, eps=NORM_EPS, impl=self.kernels)
        )
        return output

    def block_list(self) -> Sequence[nn.Module]:
        """The residual blocks, in order."""
        return list(self.blocks)
