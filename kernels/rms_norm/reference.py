"""The mathematics in plain torch, forward and explicit backward; fp32 inside, fp64 for fp64 inputs.

summed_id = x_id + residual_id                                (rounded: it is the residual stream)
rstd_i    = (mean_d summed_id^2 + eps)^-1/2
normed_id = summed_id * rstd_i * weight_d                     (rounded once, at the end)

A quotient that is rounded is cast to the dtype of x before it meets the weight; the backward does not see it.
With experts, weight_d is weight_(experts_i, d). A row whose expert does not exist is NaN; so is its gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reca.kernels._checks import compute_dtype
from reca.kernels._experts import sum_by_expert, weight_rows


def forward(
    x: Tensor, weight: Tensor, eps: float, experts: Tensor | None = None, rounds_quotient: bool = False
) -> tuple[Tensor, Tensor]:
    """(normed [..., dim] in the dtype of x, rstd [...] in the dtype of the arithmetic); experts need rows."""
    dtype = compute_dtype(x)
    wide = x.to(dtype)
    rstd = torch.rsqrt(wide.square().mean(dim=-1) + eps)
    hat = wide * rstd[..., None]
    if rounds_quotient:
        hat = hat.to(x.dtype).to(dtype)
    return (hat * weight_rows(weight, experts, dtype)).to(x.dtype), rstd


def backward(
    d_normed: Tensor,
    d_summed: Tensor | None,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    experts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(dx, dweight). `d_summed` is the gradient that reaches x past the norm, None if there is none."""
    dtype = compute_dtype(x)
    hat = x.to(dtype) * rstd[:, None]  # [rows, dim]
    d_hat = d_normed.to(dtype) * weight_rows(weight, experts, dtype)
    dx = rstd[:, None] * (d_hat - hat * (d_hat * hat).mean(dim=1, keepdim=True))
    if d_summed is not None:
        dx = dx + d_summed.to(dtype)
    d_weight = sum_by_expert(d_normed.to(dtype) * hat, experts, weight.shape[0])
    return dx.to(x.dtype), d_weight.to(weight.dtype)
