"""The KL-16 autoencoder of latent diffusion under its official names: stride 16, deterministic.

    latents = scale * mean(encode(pixels))

The mean of the posterior is taken and never sampled. Attention stands in the encoder after each residual
block of the last level and in both middles; the decoder's levels have none.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from reca.models.autoencoder import AutoencoderKLConfig, autoencoder_slots, build_autoencoder
from reca.models.checkpoint import Slot


class KLVAE(nn.Module):
    """Pixels in [-1, 1] <-> scaled latents.

    Args:
        config: the architecture.
        scale: factor of the latents.
    """

    def __init__(self, config: AutoencoderKLConfig, scale: float) -> None:
        super().__init__()
        self.config = config
        self.scale = scale
        self.autoencoder = build_autoencoder(config, last_level_attends=True, quant_convs=True)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.autoencoder.quant_conv.weight.dtype  # type: ignore[no-any-return]

    def moments(self, pixels: Tensor) -> Tensor:
        """[batch, 2 * z, height / stride, width / stride]: mean and logvar.

        Args:
            pixels: [batch, 3, height, width] in [-1, 1], sides multiples of the stride.
        """
        moments: Tensor = self.autoencoder.quant_conv(self.autoencoder.encoder(pixels))
        return moments

    def encode(self, pixels: Tensor) -> Tensor:
        """[batch, h * w, z] fp32: scaled posterior mean, positions in raster order."""
        mean = self.moments(pixels.to(self.dtype)).chunk(2, dim=1)[0]
        return self.scale * mean.flatten(2).transpose(1, 2).to(torch.float32)

    def decode(self, latents: Tensor, grid: tuple[int, int]) -> Tensor:
        """[batch, 3, h * stride, w * stride]: pixels around [-1, 1], not clamped.

        Args:
            latents: [batch, h * w, z], scaled.
            grid: (h, w).
        """
        mean = (latents / self.scale).transpose(1, 2).unflatten(2, grid).to(self.dtype)
        pixels: Tensor = self.autoencoder.decoder(self.autoencoder.post_quant_conv(mean))
        return pixels


def vae_slots(config: AutoencoderKLConfig, prefix: str = "autoencoder.") -> dict[str, Slot]:
    """Official names of `kl16.ckpt` -> parameters of a `KLVAE` found under `prefix`."""
    return autoencoder_slots(config, prefix, last_level_attends=True, quant_convs=True)
