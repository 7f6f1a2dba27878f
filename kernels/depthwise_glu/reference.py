"""The mathematics in plain torch, forward and explicit backward; fp32 inside, fp64 for fp64 inputs.

active      = silu(x) or x
convolved_p = bias + sum_{dy, dx in -1..1} weight_{dy, dx} active_{p + (dy, dx)}      (0 outside of the image)
[value; gate] = convolved,    out = value * silu(gate)                                (rounded once)
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from reca.kernels._checks import compute_dtype
from reca.kernels._library import without_autocast


def _images(x: Tensor) -> Tensor:
    """[images, channels, height, width] in the dtype of the arithmetic."""
    return x.to(compute_dtype(x)).permute(0, 3, 1, 2)


def _convolve(active: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    wide_bias = None if bias is None else bias.to(active.dtype)
    return F.conv2d(active, weight.to(active.dtype), wide_bias, padding=1, groups=weight.shape[0])


def _silu_slope(x: Tensor) -> Tensor:
    sigmoid = torch.sigmoid(x)
    return sigmoid * (1 + x * (1 - sigmoid))


@without_autocast
def forward(x: Tensor, weight: Tensor, bias: Tensor | None, activate: bool) -> Tensor:
    """[images, height, width, inner] in the dtype of x."""
    wide = _images(x)
    value, gate = _convolve(F.silu(wide) if activate else wide, weight, bias).chunk(2, dim=1)
    return (value * F.silu(gate)).permute(0, 2, 3, 1).to(x.dtype).contiguous()


def backward(
    d_out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, activate: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx in the dtype of x; d_weight and d_bias in the dtype of the arithmetic)."""
    wide = _images(x)
    active = F.silu(wide) if activate else wide
    value, gate = _convolve(active, weight, bias).chunk(2, dim=1)
    d_wide = _images(d_out)
    d_convolved = torch.cat([d_wide * F.silu(gate), d_wide * value * _silu_slope(gate)], dim=1)
    # The transposed convolution is the convolution with the taps turned by 180 degrees.
    d_active = _convolve(d_convolved, weight.flip(2, 3), None)
    dx = (d_active * _silu_slope(wide) if activate else d_active).permute(0, 2, 3, 1)
    height, width = x.shape[1:3]
    padded = F.pad(active, (1, 1, 1, 1))
    taps = [
        (d_convolved * padded[:, :, dy : dy + height, dx_ : dx_ + width]).sum(dim=(0, 2, 3))
        for dy in range(3)
        for dx_ in range(3)
    ]
    d_weight = torch.stack(taps, dim=1).view(-1, 1, 3, 3)
    return dx.to(x.dtype).contiguous(), d_weight, d_convolved.sum(dim=(0, 2, 3))
