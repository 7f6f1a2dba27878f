"""The FLUX autoencoder under its official names, with every random number as an argument.

    latent = scale * (mean + exp(logvar / 2) * noise - shift)

The posterior is always sampled, also at inference, and logvar is not clamped: diffusers' own distribution
clamps it to [-30, 20], so the moments are read from the encoder directly. GroupNorm and the attention in the
middle see the whole picture, so zero padding a batch to one size changes the latents of smaller pictures.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from reca.models.autoencoder import AutoencoderKLConfig, autoencoder_slots, build_autoencoder
from reca.models.checkpoint import Slot


@dataclass(frozen=True, slots=True)
class VAEConfig(AutoencoderKLConfig):
    """Architecture of the autoencoder, under the official names.

    Attributes:
        scale_factor, shift_factor: latent = scale * (sample - shift).
    """

    scale_factor: float = 0.3611
    shift_factor: float = 0.1159


class FluxVAE(nn.Module):
    """Pixels in [-1, 1] <-> scaled latents, deterministic given the posterior noise."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.autoencoder = build_autoencoder(config)

    def moments(self, pixels: Tensor) -> Tensor:
        """[batch, 2 * z, height / stride, width / stride]: mean and logvar, unclamped.

        Args:
            pixels: [batch, 3, height, width] in [-1, 1], sides multiples of the stride.
        """
        moments: Tensor = self.autoencoder.encoder(pixels)
        return moments

    def sample(self, moments: Tensor, noise: Tensor) -> Tensor:
        """[batch, z, h, w]: scale * (mean + exp(logvar / 2) * noise - shift); `noise` is standard normal."""
        mean, logvar = moments.chunk(2, dim=1)
        if noise.shape != mean.shape:
            raise ValueError(f"FluxVAE.sample: noise must be {list(mean.shape)}, got {list(noise.shape)}")
        sample = mean + torch.exp(0.5 * logvar) * noise
        return self.config.scale_factor * (sample - self.config.shift_factor)

    def encode(self, pixels: Tensor, noise: Tensor) -> Tensor:
        """[batch, z, h, w]: scaled latents of a sampled posterior."""
        return self.sample(self.moments(pixels), noise)

    def decode(self, latents: Tensor) -> Tensor:
        """[batch, 3, h * stride, w * stride]: pixels around [-1, 1], not clamped."""
        pixels: Tensor = self.autoencoder.decoder(
            latents / self.config.scale_factor + self.config.shift_factor
        )
        return pixels


def vae_slots(config: VAEConfig, prefix: str = "autoencoder.") -> dict[str, Slot]:
    """Official names of `ae.safetensors` -> parameters of a `FluxVAE` found under `prefix`."""
    return autoencoder_slots(config, prefix)
