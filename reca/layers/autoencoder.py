"""Blocks of the convolutional image tokenizers that are published under the names of the original code."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from reca.kernels import Impl, group_norm_silu
from reca.layers.implementation import activation_dtype

_GROUPS = 32


def group_norm(channels: int) -> nn.GroupNorm:
    """The norm of every block: 32 groups, eps 1e-6."""
    return nn.GroupNorm(_GROUPS, channels, eps=1e-6)


class GroupNormSilu(nn.GroupNorm):
    """GroupNorm and the SiLU after it, rounded once to the dtype of the convolution that reads them.

    Args:
        groups: of neighbouring channels.
        channels: a multiple of `groups`.
        eps: added to the variance.

    Weights: weight [channels], bias [channels].
    Shape: [batch, channels, ...], the same out; under autocast in autocast's dtype.
    Source: arXiv 1803.08494, eq. 7.
    """

    def __init__(self, groups: int, channels: int, eps: float = 1e-6) -> None:
        super().__init__(groups, channels, eps)
        self.kernels: Impl = "auto"

    def forward(self, input: Tensor) -> Tensor:
        """Normalise and activate `input`."""
        parameters, dtype = (self.weight, self.bias), activation_dtype(input)
        return group_norm_silu(
            input, *parameters, groups=self.num_groups, eps=self.eps, dtype=dtype, impl=self.kernels
        )


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))); a 1 x 1 convolution carries x where channels change.

    Shape: [batch, channels, height, width] -> [batch, out, height, width].
    """

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.norm1 = GroupNormSilu(_GROUPS, channels)
        self.conv1 = nn.Conv2d(channels, out, 3, padding=1)
        self.norm2 = GroupNormSilu(_GROUPS, out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.nin_shortcut = nn.Identity() if channels == out else nn.Conv2d(channels, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block."""
        hidden = self.conv2(self.norm2(self.conv1(self.norm1(x))))
        output: Tensor = hidden + self.nin_shortcut(x)
        return output


class PositionAttention(nn.Module):
    """One head over all positions of a picture. Shape: [batch, channels, height, width], the same out."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block."""
        normed = self.norm(x)
        query, key, value = (
            part(normed).flatten(2).transpose(1, 2)[:, None] for part in (self.q, self.k, self.v)
        )
        attended = F.scaled_dot_product_attention(query, key, value)[:, 0].transpose(1, 2).reshape(x.shape)
        output: Tensor = x + self.proj_out(attended)
        return output


class Middle(nn.Module):
    """Residual block, attention, residual block, at the lowest resolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1 = ResidualBlock(channels, channels)
        self.attn_1 = PositionAttention(channels)
        self.block_2 = ResidualBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the three."""
        output: Tensor = self.block_2(self.attn_1(self.block_1(x)))
        return output


class Resize(nn.Module):
    """Halve (zeros at the right and the bottom, stride 2) or double (nearest) both sides, then convolve."""

    def __init__(self, channels: int, *, halves: bool) -> None:
        super().__init__()
        self.halves = halves
        self.conv = nn.Conv2d(channels, channels, 3, stride=2 if halves else 1, padding=0 if halves else 1)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block."""
        x = F.pad(x, (0, 1, 0, 1)) if self.halves else F.interpolate(x, scale_factor=2.0, mode="nearest")
        output: Tensor = self.conv(x)
        return output


class Level(nn.Module):
    """Residual blocks, each followed by attention where the level has it, then a change of size.

    Args:
        channels, out: channels before and after the first block.
        num_blocks: residual blocks.
        attends: attention after each of them.
        resize: `downsample`, `upsample` or None; also the name of that part.
    """

    def __init__(
        self, channels: int, out: int, num_blocks: int, *, resize: str | None, attends: bool = False
    ) -> None:
        super().__init__()
        self.block = nn.ModuleList(
            ResidualBlock(out if index else channels, out) for index in range(num_blocks)
        )
        self.attn = nn.ModuleList(PositionAttention(out) for _ in range(num_blocks if attends else 0))
        self.resize = resize
        if resize is not None:
            self.add_module(resize, Resize(out, halves=resize == "downsample"))

    def forward(self, x: Tensor) -> Tensor:
        """[batch, channels, height, width] -> [batch, out, height', width']."""
        for index, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[index](x)
        return x if self.resize is None else self.get_submodule(self.resize)(x)
