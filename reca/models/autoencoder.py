"""The convolutional autoencoder of latent diffusion: diffusers' module under the names of the original files.

Source: arXiv 2112.10752, appendix G; the original names are those of its published checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from reca.layers.autoencoder import GroupNormSilu
from reca.models.checkpoint import Slot

_GROUPS = 32
# original name inside a residual block -> diffusers
_BLOCK = {
    "norm1": "norm1",
    "conv1": "conv1",
    "norm2": "norm2",
    "conv2": "conv2",
    "nin_shortcut": "conv_shortcut",
}
_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_Names = Iterator[tuple[str, str, tuple[int, ...] | None]]
"""(original name, diffusers', original shape where it differs by a reshape)."""


@dataclass(frozen=True, slots=True)
class AutoencoderKLConfig:
    """Architecture of the autoencoder, under the original names.

    Attributes:
        ch: channels of the first level; level i has ch * ch_mult[i].
        num_res_blocks: residual blocks per encoder level; the decoder has one more.
        z_channels: channels of the latent.
    """

    in_channels: int = 3
    out_ch: int = 3
    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    z_channels: int = 16

    def __post_init__(self) -> None:
        if not self.ch_mult or self.ch_mult[0] != 1:
            raise ValueError(f"AutoencoderKLConfig: ch_mult must start with 1, got {self.ch_mult}")
        if self.ch % _GROUPS:
            raise ValueError(
                f"AutoencoderKLConfig: ch={self.ch} must be a multiple of the {_GROUPS} groups of its norms"
            )

    @property
    def stride(self) -> int:
        """Pixels per latent position along one side."""
        return 1 << (len(self.ch_mult) - 1)


def build_autoencoder(
    config: AutoencoderKLConfig, *, last_level_attends: bool = False, quant_convs: bool = False
) -> AutoencoderKL:
    """The module, on the default device.

    Args:
        config: the architecture.
        last_level_attends: attention after each residual block of the encoder's last level.
        quant_convs: 1 x 1 convolutions on both sides of the latent.
    """
    levels = len(config.ch_mult)
    last = "AttnDownEncoderBlock2D" if last_level_attends else "DownEncoderBlock2D"
    model = AutoencoderKL(
        in_channels=config.in_channels,
        out_channels=config.out_ch,
        down_block_types=(*("DownEncoderBlock2D",) * (levels - 1), last),
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=tuple(config.ch * multiple for multiple in config.ch_mult),
        layers_per_block=config.num_res_blocks,
        latent_channels=config.z_channels,
        norm_num_groups=_GROUPS,
        use_quant_conv=quant_convs,
        use_post_quant_conv=quant_convs,
    )
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, ResnetBlock2D):
                parent.register_module(name, _ResidualBlock(child))
    for half in (model.encoder, model.decoder):
        half.conv_norm_out, half.conv_act = _with_silu(half.conv_norm_out), nn.Identity()
    return model


class _ResidualBlock(nn.Module):
    """Diffusers' block, its norms one with their activations and without its division by one."""

    def __init__(self, block: ResnetBlock2D) -> None:
        super().__init__()
        self.norm1, self.conv1 = _with_silu(block.norm1), block.conv1
        self.norm2, self.conv2 = _with_silu(block.norm2), block.conv2
        self.conv_shortcut = block.conv_shortcut

    def forward(self, x: Tensor, temb: None = None) -> Tensor:
        """[batch, channels, height, width] -> [batch, out, height, width]; an autoencoder has no time."""
        hidden: Tensor = self.conv2(self.norm2(self.conv1(self.norm1(x))))
        return (x if self.conv_shortcut is None else self.conv_shortcut(x)) + hidden


def _with_silu(norm: nn.GroupNorm) -> GroupNormSilu:
    return GroupNormSilu(norm.num_groups, norm.num_channels, norm.eps)


def autoencoder_slots(
    config: AutoencoderKLConfig,
    prefix: str,
    *,
    last_level_attends: bool = False,
    quant_convs: bool = False,
) -> dict[str, Slot]:
    """Original names -> parameters of a `build_autoencoder` found under `prefix`; arguments as there."""
    names = [*_ends(config), *_levels(config, last_level_attends)]
    if quant_convs:
        names += [*_affine("quant_conv", "quant_conv"), *_affine("post_quant_conv", "post_quant_conv")]
    return {original: Slot(prefix + ours, shape=shape) for original, ours, shape in names}


def _ends(config: AutoencoderKLConfig) -> _Names:
    """First and last layers of both halves, and their middles."""
    for half in ("encoder", "decoder"):
        yield from _affine(f"{half}.conv_in", f"{half}.conv_in")
        yield from _affine(f"{half}.norm_out", f"{half}.conv_norm_out")
        yield from _affine(f"{half}.conv_out", f"{half}.conv_out")
        for block in (1, 2):
            yield from _block(
                f"{half}.mid.block_{block}", f"{half}.mid_block.resnets.{block - 1}", shortcut=False
            )
        width = config.ch * config.ch_mult[-1]
        yield from _attention(f"{half}.mid.attn_1", f"{half}.mid_block.attentions.0", width)


def _levels(config: AutoencoderKLConfig, last_level_attends: bool) -> _Names:
    levels = len(config.ch_mult)
    widths = [config.ch * multiple for multiple in (1, *config.ch_mult)]
    for level in range(levels):
        theirs, ours = f"encoder.down.{level}", f"encoder.down_blocks.{level}"
        for block in range(config.num_res_blocks):
            shortcut = block == 0 and widths[level] != widths[level + 1]
            yield from _block(f"{theirs}.block.{block}", f"{ours}.resnets.{block}", shortcut=shortcut)
            if last_level_attends and level == levels - 1:
                yield from _attention(f"{theirs}.attn.{block}", f"{ours}.attentions.{block}", widths[-1])
        if level < levels - 1:
            yield from _affine(f"{theirs}.downsample.conv", f"{ours}.downsamplers.0.conv")
        # The original decoder counts its levels from full resolution, diffusers in order of execution.
        theirs, ours = f"decoder.up.{level}", f"decoder.up_blocks.{levels - 1 - level}"
        above = config.ch * config.ch_mult[min(level + 1, levels - 1)]
        for block in range(config.num_res_blocks + 1):
            shortcut = block == 0 and above != widths[level + 1]
            yield from _block(f"{theirs}.block.{block}", f"{ours}.resnets.{block}", shortcut=shortcut)
        if level > 0:
            yield from _affine(f"{theirs}.upsample.conv", f"{ours}.upsamplers.0.conv")


def _attention(original: str, ours: str, width: int) -> _Names:
    """1 x 1 convolutions in the original file, linear layers here."""
    for theirs, mine in _ATTENTION.items():
        shape = None if theirs == "norm" else (width, width, 1, 1)
        yield f"{original}.{theirs}.weight", f"{ours}.{mine}.weight", shape
        yield f"{original}.{theirs}.bias", f"{ours}.{mine}.bias", None


def _block(original: str, ours: str, *, shortcut: bool) -> _Names:
    for theirs, mine in _BLOCK.items():
        if theirs != "nin_shortcut" or shortcut:
            yield from _affine(f"{original}.{theirs}", f"{ours}.{mine}")


def _affine(original: str, ours: str) -> _Names:
    yield f"{original}.weight", f"{ours}.weight", None
    yield f"{original}.bias", f"{ours}.bias", None
