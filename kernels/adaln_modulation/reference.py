"""The mathematics in plain torch, forward and explicit backward; fp32 inside, fp64 for fp64 inputs.

hat_id    = (x_id - mean_i) rstd_i,    rstd_i = (mean_d (x_id - mean_i)^2 + eps)^-1/2
normed_id = hat_id weight_d + bias_d                       (weight 1 and bias 0 where there are none)
out_id    = normed_id (1 + scale_id) + shift_id            (rounded once)

gated_id  = residual_id + gate_id x_id
"""

from __future__ import annotations

import torch
from torch import Tensor

from reca.kernels._checks import compute_dtype


def _affine(hat: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    normed = hat if weight is None else hat * weight.to(hat.dtype)
    return normed if bias is None else normed + bias.to(hat.dtype)


def forward(
    x: Tensor, shift: Tensor, scale: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(out [rows, dim] in the dtype of x; mean and rstd [rows] in the dtype of the arithmetic)."""
    wide = x.to(compute_dtype(x))
    mean = wide.mean(dim=-1)
    centred = wide - mean[..., None]
    rstd = torch.rsqrt(centred.square().mean(dim=-1) + eps)
    normed = _affine(centred * rstd[..., None], weight, bias)
    return (normed * (1 + scale.to(wide.dtype)) + shift.to(wide.dtype)).to(x.dtype), mean, rstd


def backward(
    d_out: Tensor,
    x: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, d_scale, d_weight, d_bias); d_shift is d_out. The last two are always formed."""
    dtype = compute_dtype(x)
    hat = (x.to(dtype) - mean[:, None]) * rstd[:, None]
    d_normed = d_out.to(dtype) * (1 + scale.to(dtype))
    d_scale = d_out.to(dtype) * _affine(hat, weight, bias)
    d_hat = d_normed if weight is None else d_normed * weight.to(dtype)
    slope = (d_hat * hat).mean(dim=1, keepdim=True)
    dx = rstd[:, None] * (d_hat - d_hat.mean(dim=1, keepdim=True) - hat * slope)
    return dx.to(x.dtype), d_scale.to(x.dtype), (d_normed * hat).sum(dim=0), d_normed.sum(dim=0)


def gate_residual(x: Tensor, gate: Tensor, residual: Tensor) -> Tensor:
    """[rows, dim] in the dtype of x, rounded once."""
    dtype = compute_dtype(x)
    return (residual.to(dtype) + gate.to(dtype) * x.to(dtype)).to(x.dtype)


def gate_backward(d_out: Tensor, x: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """(dx, d_gate); the gradient of the residual is d_out."""
    wide = d_out.to(compute_dtype(x))
    return (wide * gate.to(wide.dtype)).to(x.dtype), (wide * x.to(wide.dtype)).to(x.dtype)
