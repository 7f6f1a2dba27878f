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
    d_gate = torch.ops.aten.silu_backward(d_wide * value, gate)
    d_convolved = torch.cat([d_wide * F.silu(gate), d_gate], dim=1)
    settings = (weight.shape[:1], (1, 1), (1, 1), (1, 1), False, (0, 0), weight.shape[0], (True, True, True))
    d_active, d_weight, d_bias = torch.ops.aten.convolution_backward(
        d_convolved, active, weight.to(wide.dtype), *settings
    )
    dx = torch.ops.aten.silu_backward(d_active, wide) if activate else d_active
    return dx.permute(0, 2, 3, 1).to(x.dtype).contiguous(), d_weight, d_bias
