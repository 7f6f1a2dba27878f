"""The KL-16 autoencoder of latent diffusion under its official names: stride 16, deterministic.

    latents = scale * mean(encode(pixels))

The mean of the posterior is taken and never sampled. Attention stands in the encoder after each residual
block of the last level and in both middles; the decoder's levels have none.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor, nn

from reca.models.checkpoint import Slot

_GROUPS = 32
# official name inside a residual block -> diffusers
_BLOCK = {
    "norm1": "norm1",
    "conv1": "conv1",
    "norm2": "norm2",
    "conv2": "conv2",
    "nin_shortcut": "conv_shortcut",
}
_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}


@dataclass(frozen=True, slots=True)
class VAEConfig:
    """Architecture of the autoencoder, under the official names.

    Attributes:
        ch: channels of the first level; level i has ch * ch_mult[i].
        num_res_blocks: residual blocks per encoder level; the decoder has one more.
        z_channels: channels of the latent.
    """

    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2
    z_channels: int = 16
    in_channels: int = 3
    out_ch: int = 3

    def __post_init__(self) -> None:
        if not self.ch_mult or self.ch_mult[0] != 1:
            raise ValueError(f"VAEConfig: ch_mult must start with 1, got {self.ch_mult}")
        if self.ch % _GROUPS:
            raise ValueError(
                f"VAEConfig: ch={self.ch} must be a multiple of the {_GROUPS} groups of its norms"
            )

    @property
    def stride(self) -> int:
        """Pixels per latent position along one side."""
        return 1 << (len(self.ch_mult) - 1)


class KLVAE(nn.Module):
    """Pixels in [-1, 1] <-> scaled latents.

    Args:
        config: the architecture.
        scale: factor of the latents.
    """

    def __init__(self, config: VAEConfig, scale: float) -> None:
        super().__init__()
        levels = len(config.ch_mult)
        self.config = config
        self.scale = scale
        self.autoencoder = AutoencoderKL(
            in_channels=config.in_channels,
            out_channels=config.out_ch,
            down_block_types=(*("DownEncoderBlock2D",) * (levels - 1), "AttnDownEncoderBlock2D"),
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=tuple(config.ch * multiple for multiple in config.ch_mult),
            layers_per_block=config.num_res_blocks,
            latent_channels=config.z_channels,
            norm_num_groups=_GROUPS,
            use_quant_conv=True,
            use_post_quant_conv=True,
        )

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


def vae_slots(config: VAEConfig, prefix: str = "autoencoder.") -> dict[str, Slot]:
    """Official names of `kl16.ckpt` -> parameters of a `KLVAE` found under `prefix`."""
    return {official: Slot(prefix + ours, shape=shape) for official, ours, shape in _names(config)}


def _names(config: VAEConfig) -> Iterator[tuple[str, str, tuple[int, ...] | None]]:
    """(official name, ours, official shape where it differs by a reshape)."""
    levels = len(config.ch_mult)
    middle = config.ch * config.ch_mult[-1]
    yield from _affine("quant_conv", "quant_conv")
    yield from _affine("post_quant_conv", "post_quant_conv")
    for half in ("encoder", "decoder"):
        yield from _affine(f"{half}.conv_in", f"{half}.conv_in")
        yield from _affine(f"{half}.norm_out", f"{half}.conv_norm_out")
        yield from _affine(f"{half}.conv_out", f"{half}.conv_out")
        for block in (1, 2):
            yield from _block(
                f"{half}.mid.block_{block}", f"{half}.mid_block.resnets.{block - 1}", shortcut=False
            )
        yield from _attention(f"{half}.mid.attn_1", f"{half}.mid_block.attentions.0", middle)
    widths = [config.ch * multiple for multiple in (1, *config.ch_mult)]
    for level in range(levels):
        down = f"encoder.down_blocks.{level}"
        for block in range(config.num_res_blocks):
            shortcut = block == 0 and widths[level] != widths[level + 1]
            yield from _block(
                f"encoder.down.{level}.block.{block}", f"{down}.resnets.{block}", shortcut=shortcut
            )
            if level == levels - 1:
                yield from _attention(
                    f"encoder.down.{level}.attn.{block}", f"{down}.attentions.{block}", middle
                )
        if level < levels - 1:
            yield from _affine(f"encoder.down.{level}.downsample.conv", f"{down}.downsamplers.0.conv")
        # The official decoder counts its levels from full resolution, diffusers in order of execution.
        up = f"decoder.up_blocks.{levels - 1 - level}"
        above = config.ch * config.ch_mult[min(level + 1, levels - 1)]
        for block in range(config.num_res_blocks + 1):
            shortcut = block == 0 and above != widths[level + 1]
            yield from _block(f"decoder.up.{level}.block.{block}", f"{up}.resnets.{block}", shortcut=shortcut)
        if level > 0:
            yield from _affine(f"decoder.up.{level}.upsample.conv", f"{up}.upsamplers.0.conv")


def _attention(official: str, ours: str, width: int) -> Iterator[tuple[str, str, tuple[int, ...] | None]]:
    """1 x 1 convolutions in the official file, linear layers here."""
    for theirs, mine in _ATTENTION.items():
        shape = None if theirs == "norm" else (width, width, 1, 1)
        yield f"{official}.{theirs}.weight", f"{ours}.{mine}.weight", shape
        yield f"{official}.{theirs}.bias", f"{ours}.{mine}.bias", None


def _block(official: str, ours: str, *, shortcut: bool) -> Iterator[tuple[str, str, None]]:
    for theirs, mine in _BLOCK.items():
        if theirs != "nin_shortcut" or shortcut:
            yield from _affine(f"{official}.{theirs}", f"{ours}.{mine}")


def _affine(official: str, ours: str) -> Iterator[tuple[str, str, None]]:
    yield f"{official}.weight", f"{ours}.weight", None
    yield f"{official}.bias", f"{ours}.bias", None
