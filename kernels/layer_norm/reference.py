"""The mathematics in plain torch, forward and explicit backward; fp32 inside, fp64 for fp64 inputs.

summed_id = residual_id + sum_k delta_kid                     (rounded: it is the residual stream)
hat_id    = (summed_id - mean_d summed_id) rstd_i,    rstd_i = (var_d summed_id + eps)^-1/2
normed_id = hat_id weight_d + bias_d                          (rounded once, at the end)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from reca.kernels._checks import compute_dtype


def standardise(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(hat, rstd [..., 1]) of rows at the dtype of the arithmetic."""
    centred = x - x.mean(dim=-1, keepdim=True)
    rstd = torch.rsqrt(centred.square().mean(dim=-1, keepdim=True) + eps)
    return centred * rstd, rstd


def add(residual: Tensor, deltas: Sequence[Tensor]) -> Tensor:
    """[rows, dim]: the new residual stream; the deltas are summed before they meet it."""
    if not deltas:
        return residual
    dtype = compute_dtype(residual)
    total = deltas[0].to(dtype)
    for delta in deltas[1:]:
        total = total + delta.to(dtype)
    return (residual.to(dtype) + total).to(residual.dtype)


def forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """[rows, dim] in `dtype`."""
    wide = x.to(compute_dtype(x))
    hat, _ = standardise(wide, eps)
    return (hat * weight.to(wide.dtype) + bias.to(wide.dtype)).to(dtype)


def backward(
    d_normed: Sequence[Tensor], d_summed: Tensor | None, x: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """(dx [rows, dim] and [d weight; d bias], both at the dtype of the arithmetic)."""
    dtype = compute_dtype(x)
    d_out = d_normed[0].to(dtype)
    for more in d_normed[1:]:
        d_out = d_out + more.to(dtype)
    hat, rstd = standardise(x.to(dtype), eps)
    d_hat = d_out * weight.to(dtype)
    dx = d_hat - d_hat.mean(dim=-1, keepdim=True) - hat * (d_hat * hat).mean(dim=-1, keepdim=True)
    dx = rstd * dx if d_summed is None else rstd * dx + d_summed.to(dtype)
    return dx, torch.stack([(d_out * hat).sum(dim=0), d_out.sum(dim=0)])
