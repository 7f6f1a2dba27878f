"""The mathematics in plain torch, forward and explicit backward; fp32 inside, fp64 for fp64 inputs.

summed_id = x_id + residual_id                                (rounded: it is the residual stream)
rstd_i    = (mean_d summed_id^2 + eps)^-1/2
normed_id = summed_id * rstd_i * weight_d                     (rounded once, at the end)
"""

from __future__ import annotations

import torch
from torch import Tensor

from reca.kernels._checks import compute_dtype


def forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(normed [rows, dim] in the dtype of x, rstd [rows] in the dtype of the arithmetic)."""
    dtype = compute_dtype(x)
    wide = x.to(dtype)
    rstd = torch.rsqrt(wide.square().mean(dim=-1) + eps)
    return (wide * rstd[..., None] * weight.to(dtype)).to(x.dtype), rstd


def backward(
    d_normed: Tensor, d_summed: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    """(dx, dweight). `d_summed` is the gradient that reaches x past the norm, None if there is none."""
    dtype = compute_dtype(x)
    hat = x.to(dtype) * rstd[:, None]  # [rows, dim]
    d_hat = d_normed.to(dtype) * weight.to(dtype)
    dx = rstd[:, None] * (d_hat - hat * (d_hat * hat).mean(dim=1, keepdim=True))
    if d_summed is not None:
        dx = dx + d_summed.to(dtype)
    return dx.to(x.dtype), (d_normed.to(dtype) * hat).sum(dim=0).to(weight.dtype)
