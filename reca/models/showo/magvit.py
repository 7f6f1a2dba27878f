"""MAGVIT-v2: pixels <-> binary codes, under the official names. Frozen, and always fp32.

A code flips where the encoder's output is near zero, so that a rounding mode would change what is learned.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reca.models.showo.config import MagvitConfig

_GROUPS = 32


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(_GROUPS, channels, eps=1e-6)


class ResidualBlock(nn.Module):
    """x + conv(swish(norm(conv(swish(norm(x)))))); a 1 x 1 convolution carries x where channels change."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.norm1 = _norm(channels)
        self.conv1 = nn.Conv2d(channels, out, 3, padding=1)
        self.norm2 = _norm(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        if channels != out:
            self.nin_shortcut = nn.Conv2d(channels, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, channels, height, width] -> [batch, out, height, width]."""
        hidden = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        output: Tensor = hidden + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)
        return output


class PositionAttention(nn.Module):
    """One head over all positions of a picture."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels)
        for name in ("q", "k", "v", "proj_out"):
            setattr(self, name, nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """[batch, channels, height, width], the same shape out."""
        normed = self.norm(x)
        query, key, value = (
            self.get_submodule(name)(normed).flatten(2).transpose(1, 2) for name in ("q", "k", "v")
        )
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(x.shape)
        output: Tensor = x + self.get_submodule("proj_out")(attended)
        return output


class _Middle(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1 = ResidualBlock(channels, channels)
        self.attn_1 = PositionAttention(channels)
        self.block_2 = ResidualBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.block_2(self.attn_1(self.block_1(x)))
        return output


class _Resize(nn.Module):
    """Halve (zero padding at the right and the bottom, stride 2) or double (nearest) both sides."""

    def __init__(self, channels: int, *, halves: bool) -> None:
        super().__init__()
        self.halves = halves
        self.conv = nn.Conv2d(channels, channels, 3, stride=2 if halves else 1, padding=0 if halves else 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 1, 0, 1)) if self.halves else F.interpolate(x, scale_factor=2.0, mode="nearest")
        output: Tensor = self.conv(x)
        return output


class _Level(nn.Module):
    def __init__(self, channels: int, out: int, num_blocks: int, resize: str | None) -> None:
        super().__init__()
        self.block = nn.ModuleList(
            ResidualBlock(out if index else channels, out) for index in range(num_blocks)
        )
        self.resize = resize
        if resize is not None:
            setattr(self, resize, _Resize(out, halves=resize == "downsample"))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        return x if self.resize is None else self.get_submodule(self.resize)(x)


class Encoder(nn.Module):
    """Pixels -> one real number per bit."""

    def __init__(self, config: MagvitConfig) -> None:
        super().__init__()
        widths, last = config.encoder_channels, len(config.encoder_channels) - 1
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down = nn.ModuleList(
            _Level(
                widths[max(i - 1, 0)], widths[i], config.encoder_blocks[i], "downsample" if i < last else None
            )
            for i in range(len(widths))
        )
        self.mid = _Middle(widths[-1])
        self.norm_out = _norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.bits, 3, padding=1)
        self.quant_conv = nn.Conv2d(config.bits, config.bits, 1)

    def forward(self, pixels: Tensor) -> Tensor:
        """[batch, 3, height, width] in [-1, 1] -> [batch, bits, height / stride, width / stride]."""
        hidden = self.conv_in(pixels)
        for level in self.down:
            hidden = level(hidden)
        output: Tensor = self.quant_conv(self.conv_out(F.silu(self.norm_out(self.mid(hidden)))))
        return output


class Decoder(nn.Module):
    """Bits as -1 and 1 -> pixels."""

    def __init__(self, config: MagvitConfig) -> None:
        super().__init__()
        widths, last = config.decoder_channels, len(config.decoder_channels) - 1
        self.post_quant_conv = nn.Conv2d(config.bits, config.bits, 1)
        self.conv_in = nn.Conv2d(config.bits, widths[-1], 3, padding=1)
        self.mid = _Middle(widths[-1])
        self.up = nn.ModuleList(
            _Level(widths[min(i + 1, last)], widths[i], config.decoder_blocks[i], "upsample" if i else None)
            for i in range(len(widths))
        )
        self.norm_out = _norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, quantized: Tensor) -> Tensor:
        """[batch, bits, height, width] -> [batch, 3, height * stride, width * stride], around [-1, 1]."""
        hidden = self.mid(self.conv_in(self.post_quant_conv(quantized)))
        for level in reversed(self.up):
            hidden = level(hidden)
        output: Tensor = self.conv_out(F.silu(self.norm_out(hidden)))
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
