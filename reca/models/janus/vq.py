"""Janus-Pro's VQ autoencoder: pixels <-> codes. Frozen, and always fp32.

The release chooses a code by the cosine between latent and codebook row; transformers' `encode` takes the
nearest row without normalising, which agrees only where all rows have one norm. Targets here follow the
release. `down` counts from full resolution, `up` from the lowest.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reca.layers.autoencoder import Level, Middle, group_norm
from reca.models.janus.config import VQConfig


class Encoder(nn.Module):
    """[batch, 3, height, width] in [-1, 1] -> [batch, latent_channels, height / stride, width / stride]."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        widths, last = config.widths, len(config.widths) - 1
        self.conv_in = nn.Conv2d(3, config.base_channels, 3, padding=1)
        self.down = nn.ModuleList(
            Level(
                widths[level - 1] if level else config.base_channels,
                widths[level],
                config.num_res_blocks,
                attends=level == last,
                resize=None if level == last else "downsample",
            )
            for level in range(len(widths))
        )
        self.mid = Middle(widths[-1])
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.latent_channels, 3, padding=1)

    def forward(self, pixels: Tensor) -> Tensor:
        """Encode pixels."""
        hidden = self.conv_in(pixels)
        for level in self.down:
            hidden = level(hidden)
        output: Tensor = self.conv_out(F.silu(self.norm_out(self.mid(hidden))))
        return output


class Decoder(nn.Module):
    """[batch, latent_channels, height, width] -> [batch, 3, height * stride, width * stride]."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        widths = config.widths[::-1]
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid = Middle(widths[0])
        self.up = nn.ModuleList(
            Level(
                widths[max(level - 1, 0)],
                widths[level],
                config.num_res_blocks + 1,
                attends=level == 0,
                resize=None if level == len(widths) - 1 else "upsample",
            )
            for level in range(len(widths))
        )
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        """Decode latents."""
        hidden = self.mid(self.conv_in(latents))
        for level in self.up:
            hidden = level(hidden)
        output: Tensor = self.conv_out(F.silu(self.norm_out(hidden)))
        return output


class VQModel(nn.Module):
    """The tokenizer of generated images."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        self.encoder = Encoder(config)
        self.quant_conv = nn.Conv2d(config.latent_channels, config.embed_dim, 1)
        self.codebook = nn.Embedding(config.num_embeddings, config.embed_dim)
        self.post_quant_conv = nn.Conv2d(config.embed_dim, config.latent_channels, 1)
        self.decoder = Decoder(config)
        self.requires_grad_(False)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Codes of images, row by row.

        Args:
            pixels: [batch, 3, height, width] in [-1, 1], sides multiples of the stride.

        Returns: [batch, height / stride * width / stride] int64.
        """
        return self.scores(self.latents(pixels)).argmax(dim=-1)

    def latents(self, pixels: Tensor) -> Tensor:
        """[batch, embed_dim, height / stride, width / stride] fp32, before quantisation."""
        with (
            torch.autocast(pixels.device.type, enabled=False),
            torch.backends.cudnn.flags(enabled=True, allow_tf32=False),
        ):
            latents: Tensor = self.quant_conv(self.encoder(pixels.float()))
            return latents

    def scores(self, latents: Tensor) -> Tensor:
        """[batch, positions, codes] fp32: cosine of each latent with each row of the codebook."""
        with torch.autocast(latents.device.type, enabled=False):
            rows = F.normalize(latents.flatten(2).transpose(1, 2), dim=-1)
            return rows @ F.normalize(self.codebook.weight, dim=-1).t()

    @torch.no_grad()
    def decode(self, codes: Tensor, height: int, width: int) -> Tensor:
        """[batch, height * width] int64 codes -> [batch, 3, height * stride, width * stride], not clamped."""
        with torch.autocast(codes.device.type, enabled=False):
            rows = F.normalize(self.codebook.weight[codes], dim=-1)
            grid = rows.transpose(1, 2).unflatten(2, (height, width))
            pixels: Tensor = self.decoder(self.post_quant_conv(grid))
            return pixels
