"""MAGVIT-v2: pixels <-> binary codes, under the official names. Frozen, and always fp32.

A code flips where the encoder's output is near zero, so that a rounding mode would change what is learned.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from reca.layers.autoencoder import GroupNormSilu, Level, Middle
from reca.models.showo.config import MagvitConfig

_GROUPS = 32


class Encoder(nn.Module):
    """Pixels -> one real number per bit."""

    def __init__(self, config: MagvitConfig) -> None:
        super().__init__()
        widths, last = config.encoder_channels, len(config.encoder_channels) - 1
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down = nn.ModuleList(
            Level(
                widths[max(i - 1, 0)],
                widths[i],
                config.encoder_blocks[i],
                resize="downsample" if i < last else None,
            )
            for i in range(len(widths))
        )
        self.mid = Middle(widths[-1])
        self.norm_out = GroupNormSilu(_GROUPS, widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.bits, 3, padding=1)
        self.quant_conv = nn.Conv2d(config.bits, config.bits, 1)

    def forward(self, pixels: Tensor) -> Tensor:
        """[batch, 3, height, width] in [-1, 1] -> [batch, bits, height / stride, width / stride]."""
        hidden = self.conv_in(pixels)
        for level in self.down:
            hidden = level(hidden)
        output: Tensor = self.quant_conv(self.conv_out(self.norm_out(self.mid(hidden))))
        return output


class Decoder(nn.Module):
    """Bits as -1 and 1 -> pixels."""

    def __init__(self, config: MagvitConfig) -> None:
        super().__init__()
        widths, last = config.decoder_channels, len(config.decoder_channels) - 1
        self.post_quant_conv = nn.Conv2d(config.bits, config.bits, 1)
        self.conv_in = nn.Conv2d(config.bits, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1])
        self.up = nn.ModuleList(
            Level(
                widths[min(i + 1, last)],
                widths[i],
                config.decoder_blocks[i],
                resize="upsample" if i else None,
            )
            for i in range(len(widths))
        )
        self.norm_out = GroupNormSilu(_GROUPS, widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, quantized: Tensor) -> Tensor:
        """[batch, bits, height, width] -> [batch, 3, height * stride, width * stride], around [-1, 1]."""
        hidden = self.mid(self.conv_in(self.post_quant_conv(quantized)))
        for level in reversed(self.up):
            hidden = level(hidden)
        output: Tensor = self.conv_out(self.norm_out(hidden))
        return output


class Magvit(nn.Module):
    """The tokenizer. Bit i of a code is (z_i > 0); channel 0 is the most significant."""

    def __init__(self, config: MagvitConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        with torch.device("cpu"):  # computed, never loaded: not on meta either
            powers = 1 << torch.arange(config.bits - 1, -1, -1)
            table = ((torch.arange(1 << config.bits)[:, None] & powers) > 0).float() * 2 - 1
        self.quantize = nn.Module()
        self.quantize.register_buffer("embedding", table, persistent=False)
        self.quantize.register_buffer("power_vals", powers, persistent=False)
        self.requires_grad_(False)

    @property
    def table(self) -> Tensor:
        """[codes, bits] fp32: the bits of each code as -1 and 1."""
        return self.quantize.get_buffer("embedding")

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Codes of images, row by row.

        Args:
            pixels: [batch, 3, height, width] in [-1, 1], sides multiples of the stride.

        Returns: [batch, height / stride * width / stride] int64.
        """
        return self.codes(self.latents(pixels))

    def latents(self, pixels: Tensor) -> Tensor:
        """[batch, bits, height / stride, width / stride] fp32: what the signs are taken of."""
        with (
            torch.autocast(pixels.device.type, enabled=False),
            torch.backends.cudnn.flags(enabled=True, allow_tf32=False),
        ):
            latents: Tensor = self.encoder(pixels.float())
            return latents

    def codes(self, latents: Tensor) -> Tensor:
        """[batch, positions] int64; zero counts as a cleared bit."""
        bits = (latents > 0).flatten(2).transpose(1, 2)
        return (bits * self.quantize.get_buffer("power_vals")).sum(dim=-1)

    @torch.no_grad()
    def decode(self, codes: Tensor, height: int, width: int) -> Tensor:
        """[batch, height * width] int64 codes -> [batch, 3, height * stride, width * stride], not clamped."""
        quantized = self.table[codes].transpose(1, 2).unflatten(2, (height, width))
        with torch.autocast(codes.device.type, enabled=False):
            pixels: Tensor = self.decoder(quantized)
            return pixels
